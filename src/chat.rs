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
    /// What was said.
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
/// something must go, half of the context is made free; `left_out_before` is what this gave for the question before, and
/// as long as that is enough it stays, or every question would be read from the beginning again.
pub fn within<T, E>(
    turns: &[Message],
    context: usize,
    left_out_before: usize,
    mut encode: impl FnMut(&[Message]) -> Result<T, E>,
    len: impl Fn(&T) -> usize,
) -> Result<(T, usize), E> {
    let (system, said): (Vec<&Message>, Vec<&Message>) = turns.iter().partition(|m| m.role == "system");
    let mut prompt = |from: usize| encode(&messages(system.iter().chain(&said[from..]).copied()));
    let (whole, half) = (context - (context / 8).min(512), context / 2);
    // What is left begins with all that was said, or with a question.
    let cuts: Vec<usize> = (0..said.len().max(1)).filter(|&i| i == 0 || said[i].role == "user").collect();
    if left_out_before > 0 && cuts.binary_search(&left_out_before).is_ok() {
        let p = prompt(left_out_before)?;
        // Much less than half: this is another branch, with room for more.
        if (context / 4..=whole).contains(&len(&p)) {
            return Ok((p, left_out_before));
        }
    }
    // Hardly a token has so many bytes. What is far too long is not rendered: templates have a budget.
    let may_fit = turns.iter().map(|m| m.content.len()).sum::<usize>() <= context * 64;
    if may_fit {
        let all = prompt(0)?;
        if len(&all) <= whole {
            return Ok((all, 0));
        }
    }
    // From the last question backwards, in steps that double until it is too much.
    let (mut fits, mut step) = (cuts.len() - 1, 1);
    let mut lowest = usize::from(may_fit);
    let mut best = prompt(cuts[fits])?;
    while fits > lowest && len(&best) <= half {
        let cut = fits.saturating_sub(step).max(lowest);
        let p = prompt(cuts[cut])?;
        if len(&p) <= if cut == 0 { whole } else { half } {
            (fits, best, step) = (cut, p, step * 2);
        } else {
            (lowest, step) = (cut + 1, (step / 2).max(1));
        }
    }
    Ok((best, cuts[fits]))
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
            within(&path, 2 * room, 0, |m| Ok::<_, ()>(said(m)), |s| if s.len() > room { 2 * room } else { 0 }).unwrap()
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
            within(&talk, context, 0, encode, |lengths| lengths.iter().sum()).unwrap()
        };
        assert_eq!(fit(66), (vec![2, 20, 10, 10, 10, 5], 0)); // 57 of 58
        assert_eq!(fit(64), (vec![2, 10, 10, 5], 2)); // 57 of 56, then 27 of 32
        assert_eq!(fit(52), (vec![2, 5], 4)); // then 27 of 26
        assert_eq!(fit(4), (vec![2, 5], 4));
    }

    #[test]
    fn what_was_left_out_stays_left_out_until_it_is_full_again() {
        let mut talk = Vec::new();
        let (mut before, mut seen, mut rendered) = (0, Vec::new(), 0);
        for i in 0..200 {
            talk.push(Message::new("user", format!("{i:010}")));
            let encode = |kept: &[Message]| {
                rendered += kept.len();
                Ok::<_, ()>(kept.len() * 10)
            };
            let (tokens, left_out) = within(&talk, 1000, before, encode, |&n| n).unwrap();
            assert!(tokens <= 1000 && left_out >= before && left_out % 2 == 0, "{i}: {tokens} {left_out}");
            if left_out != before {
                assert_eq!(tokens, 490, "half is free");
                seen.push(left_out);
            }
            before = left_out;
            talk.push(Message::new("assistant", format!("{i:010}")));
        }
        // Of 875 tokens that fit, some 490 remain: it is read anew after every 20 questions or so.
        assert_eq!(seen.len(), 8, "{seen:?}");
        // And a long one is found the end of without rendering all of it again and again.
        let mut messages = 0;
        let encode = |kept: &[Message]| {
            messages += kept.len();
            Ok::<_, ()>(kept.len() * 1000)
        };
        let (tokens, _) = within(&talk, 10_000, 0, encode, |&n| n).unwrap();
        assert!(tokens == 4000 && messages < talk.len() + 60, "{tokens} {messages}");
    }
}
