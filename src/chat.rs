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
