//! A conversation, and how it becomes the text that a model was trained to continue.

pub mod history;
pub mod template;

pub use template::{Template, TemplateError};

use crate::tokenizer::Tokenizer;
use serde::{Deserialize, Serialize};
use std::ops::Range;

/// What somebody said.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Message {
    /// Who: `system`, `user` or `assistant`.
    pub role: String,
    /// What.
    pub content: String,
}

impl Message {
    /// A message of somebody.
    pub fn new(role: &str, content: impl Into<String>) -> Message {
        Message { role: role.to_string(), content: content.into() }
    }
}

/// Noncharacters of Unicode, reserved for a program's own use: they stand around what a message says.
const OPEN: char = '\u{fdd0}';
const CLOSE: char = '\u{fdd1}';

/// The tokens of a conversation; with `add_generation_prompt`, up to where the assistant begins to speak.
///
/// The template's control tokens are read as such. What the messages say is not trusted with them: a control token that is
/// written in a message is encoded as the letters it is written with.
pub fn encode(
    t: &Tokenizer,
    template: &Template,
    messages: &[Message],
    add_generation_prompt: bool,
) -> Result<Vec<u32>, TemplateError> {
    let mut text = template.render(messages, add_generation_prompt)?;
    let mut plain = Vec::new();
    let mut marked = false;
    // Nearly no message spells a control token out; only then is it rendered again, with marks.
    let guarded: Vec<Message> = messages
        .iter()
        .map(|m| {
            let content = guard(t, &m.content);
            marked |= content != m.content;
            Message::new(&m.role, content)
        })
        .collect();
    if marked {
        (text, plain) = unmark(&template.render(&guarded, add_generation_prompt)?);
    }
    let mut ids = t.encode_guarded(text.as_bytes(), &plain)?;
    // Templates of models that begin with BOS write it themselves, most of them; it stands once.
    if let Some(bos) = t.bos().filter(|_| t.add_bos())
        && ids.first() != Some(&bos)
    {
        ids.insert(0, bos);
    }
    Ok(ids)
}

/// What a template is given of the turns that lead to where a conversation stands: the system prompt in force, which is the
/// last one, first; then what was said, a question that has no answer in one with the next. Many templates refuse two
/// messages of one role.
pub fn messages<'a>(turns: impl IntoIterator<Item = &'a Message>) -> Vec<Message> {
    let (system, said): (Vec<&Message>, Vec<&Message>) = turns.into_iter().partition(|m| m.role == "system");
    // An empty one takes the one before back.
    let mut out: Vec<Message> =
        system.last().filter(|m| !m.content.is_empty()).map(|&m| m.clone()).into_iter().collect();
    for m in said {
        match out.last_mut().filter(|l| l.role == m.role) {
            Some(last) => last.content = format!("{}\n\n{}", last.content, m.content),
            None => out.push(m.clone()),
        }
    }
    out
}

/// The turns of a conversation within a context: the [`messages`] of all of them `encode`d, or without the oldest where room
/// for an answer would be lacking. The system prompt and the last question, with what there is of its answer, always stay,
/// whether they fit or not. Returns what `encode` gave, whose number of tokens `len` knows, and how many turns besides
/// system prompts were left out.
///
/// A question is left out together with its answer, so that what is left begins with a question, as templates want it. Once
/// something must go, half of the context is made free, or the next question would be read from the beginning again.
pub fn within<T, E>(
    turns: &[Message],
    context: usize,
    mut encode: impl FnMut(&[Message]) -> Result<T, E>,
    len: impl Fn(&T) -> usize,
) -> Result<(T, usize), E> {
    let (system, said): (Vec<&Message>, Vec<&Message>) = turns.iter().partition(|m| m.role == "system");
    let mut left_out = 0;
    loop {
        let prompt = encode(&messages(system.iter().chain(&said[left_out..]).copied()))?;
        let room = if left_out > 0 { context / 2 } else { context - (context / 8).min(512) };
        let next = (left_out + 1..said.len()).find(|&i| said[i].role == "user");
        match next.filter(|_| len(&prompt) > room) {
            Some(next) => left_out = next,
            None => return Ok((prompt, left_out)),
        }
    }
}

/// Puts marks around the control tokens that a message spells out; marks that it brought along become U+FFFD.
fn guard(t: &Tokenizer, content: &str) -> String {
    let clean = content.replace([OPEN, CLOSE], "\u{fffd}");
    let mut out = String::with_capacity(clean.len());
    let mut at = 0;
    for span in t.control_spans(&clean) {
        out.extend([&clean[at..span.start], &String::from(OPEN), &clean[span.clone()], &String::from(CLOSE)]);
        at = span.end;
    }
    out + &clean[at..]
}

/// A text without its marks, and the byte ranges that stood between them. A range whose end the template dropped goes on to
/// the end: nothing there is trusted.
fn unmark(marked: &str) -> (String, Vec<Range<usize>>) {
    let (mut text, mut plain, mut open) = (String::with_capacity(marked.len()), Vec::new(), None);
    for c in marked.chars() {
        match c {
            OPEN => _ = open.get_or_insert(text.len()),
            CLOSE => plain.extend(open.take().map(|from| from..text.len())),
            _ => text.push(c),
        }
    }
    plain.extend(open.map(|from| from..text.len()));
    (text, plain)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn turns(roles: &str) -> Vec<Message> {
        let role = |c| match c {
            's' => "system",
            'u' => "user",
            _ => "assistant",
        };
        roles.split(' ').map(|t| Message::new(role(t.chars().next().unwrap()), t)).collect()
    }

    fn said(messages: &[Message]) -> String {
        messages.iter().map(|m| m.content.replace("\n\n", "+")).collect::<Vec<_>>().join(" ")
    }

    #[test]
    fn a_path_of_turns_is_what_templates_take() {
        for (path, want) in [
            ("u1 a1 u2", "u1 a1 u2"),
            ("s1 u1 a1 s2 u2", "s2 u1 a1 u2"),
            ("s1 u1 u2 s2 u3 a3", "s2 u1+u2+u3 a3"),
            ("s1 s2 u1 a1 a2", "s2 u1 a1+a2"),
        ] {
            assert_eq!(said(&messages(&turns(path))), want);
        }
        let mut taken_back = turns("s1 u1 s2 u2");
        taken_back[2].content.clear();
        assert_eq!(said(&messages(&taken_back)), "u1+u2");
    }

    #[test]
    fn whole_exchanges_are_left_out() {
        let left = |path: &str, room: usize| {
            let path = turns(path);
            within(&path, 2 * room, |m| Ok::<_, ()>(said(m)), |s| if s.len() > room { 2 * room } else { 0 }).unwrap()
        };
        // A question that never got an answer once left an answer first.
        assert_eq!(left("u1 u2 a2 u3", 9), ("u2 a2 u3".into(), 1));
        assert_eq!(left("u1 u2 a2 u3", 7), ("u3".into(), 3));
        assert_eq!(left("s1 u1 a1 s2 u2 a2 u3", 11), ("s2 u2 a2 u3".into(), 2));
        // Also the last but one, however long it is; what is gone on with stays with its question.
        assert_eq!(left("s1 u1 a1 u2 u3", 5), ("s1 u3".into(), 3));
        assert_eq!(left("s1 u1 a1 u2 a2", 4), ("s1 u2 a2".into(), 2));
    }

    #[test]
    fn a_conversation_keeps_its_system_message_and_its_last_words() {
        let m = |role: &str, words: usize| Message::new(role, "w".repeat(words));
        let talk = [m("system", 2), m("user", 20), m("assistant", 10), m("user", 10), m("assistant", 10), m("user", 5)];
        let fit = |context: usize| {
            let encode = |kept: &[Message]| Ok::<_, ()>(kept.iter().map(|m| m.content.len()).collect::<Vec<_>>());
            within(&talk, context, encode, |lengths| lengths.iter().sum()).unwrap()
        };
        assert_eq!(fit(66), (vec![2, 20, 10, 10, 10, 5], 0)); // 57 of 58
        assert_eq!(fit(64), (vec![2, 10, 10, 5], 2)); // 57 of 56, then 27 of 32
        assert_eq!(fit(52), (vec![2, 5], 4)); // then 27 of 26
        assert_eq!(fit(4), (vec![2, 5], 4));
    }
}
