//! A conversation, and how it becomes the text that a model was trained to continue.

pub mod template;

pub use template::{Template, TemplateError};

use crate::tokenizer::{Tokenizer, TokenizerError};
use serde::{Deserialize, Serialize};

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

/// The tokens of a rendered conversation.
///
/// The template's control tokens are read as such. Text that a person wrote is not trusted with them: where a message
/// spells a control token out, its place in the rendering is encoded as plain text.
pub fn encode(t: &Tokenizer, rendered: &str, messages: &[Message]) -> Result<Vec<u32>, TokenizerError> {
    let mut forged = Vec::new();
    let mut from = 0;
    for m in messages {
        let content = m.content.trim();
        let ids = t.encode(content.as_bytes(), false, true)?;
        if !ids.iter().any(|&id| t.is_control(id)) {
            continue;
        }
        if let Some(at) = rendered[from..].find(content) {
            forged.push(from + at..from + at + content.len());
            from += at + content.len();
        }
    }
    let mut ids = Vec::new();
    let mut at = 0;
    for span in forged {
        ids.extend(t.encode(&rendered.as_bytes()[at..span.start], false, true)?);
        ids.extend(t.encode(&rendered.as_bytes()[span.clone()], false, false)?);
        at = span.end;
    }
    ids.extend(t.encode(&rendered.as_bytes()[at..], false, true)?);
    // Templates of models that begin with BOS write it themselves, most of them; it stands once.
    if let Some(bos) = t.bos().filter(|_| t.add_bos())
        && ids.first() != Some(&bos)
    {
        ids.insert(0, bos);
    }
    Ok(ids)
}
