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

/// A conversation within a context: `encode`d whole, or without its oldest turns where room for an answer would be lacking.
/// A system message and the last `stay` messages always stay, whether they fit or not. Returns what `encode` gave, whose
/// number of tokens `len` knows, and how many messages were left out.
///
/// Once something must go, half of the context is made free, or the next question would be read from the beginning again.
pub fn within<T, E>(
    messages: &[Message],
    context: usize,
    stay: usize,
    mut encode: impl FnMut(&[Message]) -> Result<T, E>,
    len: impl Fn(&T) -> usize,
) -> Result<(T, usize), E> {
    let system = usize::from(messages.first().is_some_and(|m| m.role == "system"));
    let turns = &messages[system..];
    let mut left_out = 0;
    loop {
        let kept: Vec<Message> = messages[..system].iter().chain(&turns[left_out..]).cloned().collect();
        let prompt = encode(&kept)?;
        let room = if left_out > 0 { context / 2 } else { context - (context / 8).min(512) };
        let more = (turns.len() - left_out).saturating_sub(stay).min(2);
        if len(&prompt) <= room || more == 0 {
            return Ok((prompt, left_out));
        }
        left_out += more;
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

    #[test]
    fn a_conversation_keeps_its_system_message_and_its_last_words() {
        let m = |role: &str, words: usize| Message::new(role, "w".repeat(words));
        let talk = [m("system", 2), m("user", 20), m("assistant", 10), m("user", 10), m("assistant", 10), m("user", 5)];
        let fit = |context: usize, stay: usize| {
            let encode = |kept: &[Message]| Ok::<_, ()>(kept.iter().map(|m| m.content.len()).collect::<Vec<_>>());
            within(&talk, context, stay, encode, |lengths| lengths.iter().sum()).unwrap()
        };
        assert_eq!(fit(66, 1), (vec![2, 20, 10, 10, 10, 5], 0)); // 57 of 58
        assert_eq!(fit(64, 1), (vec![2, 10, 10, 5], 2)); // 57 of 56, then 27 of 32
        assert_eq!(fit(52, 1), (vec![2, 5], 4)); // then 27 of 26
        assert_eq!(fit(4, 1), (vec![2, 5], 4));
        assert_eq!(fit(4, 2), (vec![2, 10, 5], 3));
    }
}
