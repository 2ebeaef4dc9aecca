//! Tokens to text, as they come: a character is shown when its last byte has arrived, and not before.

use super::Tokenizer;

/// Collects the bytes of tokens and gives out whole characters.
pub struct TextDecoder<'t> {
    tokenizer: &'t Tokenizer,
    pending: Vec<u8>, // the beginning of a character: at most three bytes
}

impl<'t> TextDecoder<'t> {
    pub(super) fn new(tokenizer: &'t Tokenizer) -> TextDecoder<'t> {
        TextDecoder { tokenizer, pending: Vec::new() }
    }

    /// The text that a token completes. Control tokens are no text. Bytes that can be no character become U+FFFD.
    pub fn push(&mut self, id: u32) -> String {
        if self.tokenizer.is_control(id) {
            return self.finish();
        }
        self.push_bytes(self.tokenizer.piece(id))
    }

    fn push_bytes(&mut self, bytes: &[u8]) -> String {
        self.pending.extend_from_slice(bytes);
        let mut text = String::new();
        let mut rest: &[u8] = &self.pending;
        loop {
            match std::str::from_utf8(rest) {
                Ok(s) => {
                    text.push_str(s);
                    rest = &[];
                    break;
                }
                Err(e) => {
                    let (valid, tail) = rest.split_at(e.valid_up_to());
                    text.push_str(std::str::from_utf8(valid).expect("valid up to there"));
                    match e.error_len() {
                        Some(n) => {
                            text.push(char::REPLACEMENT_CHARACTER);
                            rest = &tail[n..];
                        }
                        // Cut off, not wrong: the rest may come.
                        None => {
                            rest = tail;
                            break;
                        }
                    }
                }
            }
        }
        self.pending = rest.to_vec();
        text
    }

    /// What is left at the end: a replacement character where a character was begun.
    pub fn finish(&mut self) -> String {
        if std::mem::take(&mut self.pending).is_empty() { String::new() } else { char::REPLACEMENT_CHARACTER.into() }
    }
}
