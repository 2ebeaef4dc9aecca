//! Text to tokens and back, from a GGUF's own metadata.
//!
//! The crate tokenizers splits and merges byte-level vocabularies, [`scores`] merges SentencePiece's; this module builds them
//! from `tokenizer.ggml.*` and does what llama.cpp does around them: special tokens are cut out of the text first, pieces
//! between them are encoded, invalid UTF-8 is let through byte by byte, BOS and EOS are added where the file says so.

mod build;
mod cut;
mod decoder;
mod scores;

pub(crate) use build::{MOST_BYTES, merged};
pub use decoder::TextDecoder;

use crate::gguf::{Gguf, GgufError};
use aho_corasick::AhoCorasick;
use cut::Cuts;
use scores::Scores;
use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};

/// A tokenizer that cannot be built, or a text that cannot be encoded.
#[derive(Debug, thiserror::Error)]
pub enum TokenizerError {
    /// A key of the wrong type.
    #[error(transparent)]
    Gguf(#[from] GgufError),
    /// A key that is missing or says what cannot be.
    #[error("{key}: {problem}")]
    Unfit {
        /// The key.
        key: String,
        /// What was found and expected.
        problem: String,
    },
    /// The text could not be encoded.
    #[error("encoding: {0}")]
    Encode(String),
}

/// What a token is (`tokenizer.ggml.token_type`).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Kind {
    Normal,
    Unknown,
    Control,
    UserDefined,
    Unused,
    Byte,
}

/// How the text between special tokens is encoded.
enum Scheme {
    /// Byte-level BPE behind a pre-tokenizer.
    Bytes(Box<tokenizers::Tokenizer>),
    /// SentencePiece's BPE: spaces as U+2581, bytes where no piece fits.
    SentencePiece {
        /// Whether text at the start and after a special token gets a space before it.
        space_prefix: bool,
        /// What merges characters to tokens.
        scores: Scores,
    },
}

/// SentencePiece's space.
const SPACE: &[u8] = "\u{2581}".as_bytes();
/// Bytes of a UTF-8 character by the upper half of its first byte; 1 where no character begins so.
const LENGTHS: [usize; 16] = [1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 2, 2, 3, 4];

/// Bytes of text that are encoded together at least, where it can be cut: the crate tokenizers takes some 150 bytes of
/// memory for each.
const TOGETHER: usize = 64 << 10;
/// The most of them: where no cut is found, a text of any length is one part.
const MOST_TOGETHER: usize = 8 << 20;

/// Encodes and decodes.
pub struct Tokenizer {
    together: usize,
    cuts: Cuts,
    scheme: Scheme,
    pieces: Pieces,
    kinds: Vec<Kind>,
    special: Option<Special>,
    bos: Option<u32>,
    eos: Option<u32>,
    add_bos: bool,
    add_eos: bool,
    eog: Vec<u32>,
    notes: Vec<String>,
}

/// The bytes of all tokens, one after another.
struct Pieces {
    bytes: Vec<u8>,
    ends: Vec<u32>,
}

impl Pieces {
    fn get(&self, id: u32) -> &[u8] {
        let Some(&end) = self.ends.get(id as usize) else { return &[] };
        let start = if id == 0 { 0 } else { self.ends[id as usize - 1] };
        &self.bytes[start as usize..end as usize]
    }
}

/// Finds special tokens in a text.
struct Special {
    /// Those that are always cut out (user-defined), and all.
    matchers: [Option<AhoCorasick>; 2],
    ids: [Vec<u32>; 2],
}

impl Tokenizer {
    /// Builds the tokenizer of a file.
    pub fn from_gguf(g: &Gguf) -> Result<Tokenizer, TokenizerError> {
        build::tokenizer(g)
    }

    /// The tokens of a text. `add_special` puts BOS and EOS around it where the model wants them; `parse_special` reads
    /// control tokens written in the text as such (never for text that a stranger wrote).
    pub fn encode(&self, text: &[u8], add_special: bool, parse_special: bool) -> Result<Vec<u32>, TokenizerError> {
        let mut out = Vec::with_capacity(text.len() / 3 + 2);
        if add_special && self.add_bos {
            out.extend(self.bos);
        }
        self.encode_around(text, parse_special as usize, |_| true, &mut out)?;
        if add_special && self.add_eos {
            out.extend(self.eos);
        }
        Ok(out)
    }

    /// As [`Tokenizer::encode`] with `parse_special` and without BOS and EOS, but control tokens that touch one of the
    /// `plain` spans (byte ranges in order) are the letters they are written with.
    pub fn encode_guarded(&self, text: &[u8], plain: &[Range<usize>]) -> Result<Vec<u32>, TokenizerError> {
        let mut out = Vec::with_capacity(text.len() / 3 + 2);
        let trusted = |m: Range<usize>| {
            let next = plain.partition_point(|p| p.end <= m.start);
            plain.get(next).is_none_or(|p| p.start >= m.end)
        };
        self.encode_around(text, 1, trusted, &mut out)?;
        Ok(out)
    }

    /// Where a text spells control tokens out: byte ranges in order.
    pub fn control_spans(&self, text: &str) -> Vec<Range<usize>> {
        let Some(Special { matchers: [_, Some(all)], ids: [_, ids] }) = &self.special else { return Vec::new() };
        let control = |m: &aho_corasick::Match| self.is_control(ids[m.pattern().as_usize()]);
        all.find_iter(text).filter(control).map(|m| m.range()).collect()
    }

    /// Cuts special tokens out of a text and encodes what is between them. `which` is an index of [`Special`]; control
    /// tokens are cut out where they may.
    fn encode_around(
        &self,
        text: &[u8],
        which: usize,
        may: impl Fn(Range<usize>) -> bool,
        out: &mut Vec<u32>,
    ) -> Result<(), TokenizerError> {
        let mut at = 0;
        if let Some(special) = &self.special
            && let Some(matcher) = &special.matchers[which]
        {
            for m in matcher.find_iter(text) {
                let id = special.ids[which][m.pattern().as_usize()];
                if self.is_control(id) && !may(m.range()) {
                    continue;
                }
                self.encode_plain(&text[at..m.start()], out)?;
                out.push(id);
                at = m.end();
            }
        }
        self.encode_plain(&text[at..], out)
    }

    /// Text without special tokens.
    fn encode_plain(&self, text: &[u8], out: &mut Vec<u32>) -> Result<(), TokenizerError> {
        if text.is_empty() {
            return Ok(());
        }
        match &self.scheme {
            Scheme::Bytes(_) => match std::str::from_utf8(text) {
                Ok(text) => self.encode_str(text, out),
                Err(_) => {
                    // As llama.cpp: each byte that is in no character is one replacement character. (It lets overlong forms
                    // and surrogates pass as what they disguise; here they are no characters.)
                    let mut whole = String::with_capacity(text.len() + 16);
                    for c in text.utf8_chunks() {
                        whole.push_str(c.valid());
                        whole.extend(c.invalid().iter().map(|_| char::REPLACEMENT_CHARACTER));
                    }
                    self.encode_str(&whole, out)
                }
            },
            Scheme::SentencePiece { space_prefix, scores } => {
                let mut escaped = Vec::with_capacity(text.len() * 3 / 2);
                let spaces = if *space_prefix { " " } else { "" };
                for &b in spaces.as_bytes().iter().chain(text) {
                    if b == b' ' { escaped.extend_from_slice(SPACE) } else { escaped.push(b) }
                }
                // As llama.cpp cuts characters: as long as the first byte says, whatever follows. Bytes that are no
                // character become byte tokens, the text between them is encoded.
                let (mut run, mut at) = (0, 0);
                while at < escaped.len() {
                    let end = escaped.len().min(at + LENGTHS[escaped[at] as usize >> 4]);
                    if escaped[at] >= 0x80 && std::str::from_utf8(&escaped[at..end]).is_err() {
                        self.encode_utf8(&escaped[run..at], out)?;
                        out.extend(escaped[at..end].iter().map(|&b| scores.bytes[b as usize]));
                        run = end;
                    }
                    at = end;
                }
                self.encode_utf8(&escaped[run..], out)
            }
        }
    }

    fn encode_utf8(&self, text: &[u8], out: &mut Vec<u32>) -> Result<(), TokenizerError> {
        self.encode_str(std::str::from_utf8(text).expect("checked by the caller"), out)
    }

    fn encode_str(&self, mut text: &str, out: &mut Vec<u32>) -> Result<(), TokenizerError> {
        let mut parts = Vec::new();
        while !text.is_empty() {
            let (part, rest) = text.split_at(self.cuts.first(text, self.together));
            if part.len() > MOST_TOGETHER {
                let found = part.len();
                return Err(TokenizerError::Encode(format!(
                    "{found} bytes without a place to cut the text, as before a word or behind a line, expected at most {MOST_TOGETHER}"
                )));
            }
            parts.push(part);
            text = rest;
        }
        let encode = |part: &str| match &self.scheme {
            Scheme::Bytes(bpe) => match bpe.encode_fast(part, false) {
                Ok(e) => Ok(e.get_ids().to_vec()),
                Err(e) => Err(TokenizerError::Encode(e.to_string())),
            },
            Scheme::SentencePiece { scores, .. } => Ok(scores.encode(part)),
        };
        if let [part] = parts[..] {
            out.extend(encode(part)?);
            return Ok(());
        }
        // A long text: on all processors, each taking the next part.
        let threads = std::thread::available_parallelism().map_or(1, |n| n.get()).min(parts.len());
        let next = AtomicUsize::new(0);
        let work = || {
            let part = || Some(next.fetch_add(1, Ordering::Relaxed)).filter(|&i| i < parts.len());
            std::iter::from_fn(|| part().map(|i| (i, encode(parts[i])))).collect::<Vec<_>>()
        };
        let mut done = std::thread::scope(|s| {
            // As many as the system gives.
            let helper = |_| std::thread::Builder::new().name("oxcart-tokens".into()).spawn_scoped(s, work).ok();
            let helpers: Vec<_> = (1..threads).map_while(helper).collect();
            let mut done = work();
            done.extend(helpers.into_iter().flat_map(|h| h.join().unwrap_or_else(|e| std::panic::resume_unwind(e))));
            done
        });
        done.sort_by_key(|(i, _)| *i);
        done.into_iter().try_for_each(|(_, ids)| {
            out.extend(ids?);
            Ok(())
        })
    }

    /// Encodes at least so many bytes together, where a text can be cut: what is encoded does not depend on it, how much
    /// memory it takes does.
    pub fn with_bytes_together(self, bytes: usize) -> Tokenizer {
        Tokenizer { together: bytes, ..self }
    }

    /// The bytes of a token, of a control token its text; none where there is no such token.
    pub fn piece(&self, id: u32) -> &[u8] {
        self.pieces.get(id)
    }

    /// Tokens in the vocabulary.
    pub fn n_vocab(&self) -> usize {
        self.kinds.len()
    }

    /// The token that begins a text.
    pub fn bos(&self) -> Option<u32> {
        self.bos
    }

    /// The token that ends a text.
    pub fn eos(&self) -> Option<u32> {
        self.eos
    }

    /// Whether texts begin with BOS.
    pub fn add_bos(&self) -> bool {
        self.add_bos
    }

    /// Whether generation ends at a token.
    pub fn is_eog(&self, id: u32) -> bool {
        self.eog.contains(&id)
    }

    /// Whether a token controls the model rather than being text.
    pub fn is_control(&self, id: u32) -> bool {
        matches!(self.kinds.get(id as usize), Some(Kind::Control | Kind::Unknown))
    }

    /// What the person should know about this tokenizer, once.
    pub fn notes(&self) -> &[String] {
        &self.notes
    }

    /// Turns tokens to text as they come.
    pub fn decoder(&self) -> TextDecoder<'_> {
        TextDecoder::new(self)
    }
}
