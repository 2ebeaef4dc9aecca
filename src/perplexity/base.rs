//! The base file: a text's tokens and the log-probabilities that a reference model gave the next token at every scored
//! position. Two layouts, told apart by their first eight bytes; all numbers are little-endian.
//!
//! ```text
//! full      "_logits_"  i32 n_ctx  i32 n_vocab  i32 n_chunk         i32 tokens[n_chunk * n_ctx]  rows
//! compact   "_logtop_"  i32 n_ctx  i32 n_vocab  i32 n_chunk  i32 k  i32 tokens[n_chunk * n_ctx]  rows
//! ```
//!
//! The full layout is llama-perplexity's own; the rows are in [`super::row`]. Rows have one size and their place, so they
//! are written and read where they belong, by any worker, and the file is never in memory.

use super::row::{self, Row};
use super::{PerplexityError, rows};
use crate::disk::{Partial, create_partial, open_partial, partial, target};
use oxcart_quant::f32ops::Ops;
use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

const FULL: &[u8; 8] = b"_logits_";
const COMPACT: &[u8; 8] = b"_logtop_";
/// Sizes beyond which a header is nonsense.
const MOST: i32 = 1 << 24;

/// What a base file is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    /// Tokens of a chunk.
    pub n_ctx: usize,
    /// Tokens of the vocabulary.
    pub n_vocab: usize,
    /// Chunks.
    pub n_chunk: usize,
    /// Of a compact file: how many tokens of each row are kept.
    pub top: Option<usize>,
}

impl Layout {
    /// Bytes of a row.
    pub fn row_bytes(&self) -> usize {
        match self.top {
            None => row::full_bytes(self.n_vocab),
            Some(k) => row::top_bytes(k),
        }
    }

    /// Bytes before the first row; none where that is beyond all files.
    fn head_bytes(&self) -> Option<u64> {
        let numbers = if self.top.is_some() { 16 } else { 12 };
        (self.n_chunk as u64).checked_mul(self.n_ctx as u64)?.checked_mul(4)?.checked_add(8 + numbers)
    }

    /// Bytes of the file; none where that is beyond all files.
    pub fn file_bytes(&self) -> Option<u64> {
        let all = (self.n_chunk as u64).checked_mul(rows(self.n_ctx) as u64)?;
        all.checked_mul(self.row_bytes() as u64)?.checked_add(self.head_bytes()?)
    }

    fn row_at(&self, row: usize) -> u64 {
        self.head_bytes().unwrap_or(u64::MAX) + row as u64 * self.row_bytes() as u64
    }

    fn head(&self, tokens: &[u32]) -> Vec<u8> {
        let mut out = if self.top.is_some() { COMPACT.to_vec() } else { FULL.to_vec() };
        let numbers = [Some(self.n_ctx), Some(self.n_vocab), Some(self.n_chunk), self.top];
        out.extend(numbers.into_iter().flatten().flat_map(|n| (n as i32).to_le_bytes()));
        out.extend(tokens.iter().flat_map(|t| t.to_le_bytes()));
        out
    }
}

fn io_error(path: &Path, what: &'static str) -> impl FnOnce(io::Error) -> PerplexityError {
    move |error| PerplexityError::Io { file: path.to_path_buf(), what, error }
}

/// A base file being written: `FILE.partial` until [`BaseWriter::finish`]. Dropped before, it leaves nothing.
pub struct BaseWriter {
    file: File,
    temp: Partial,
    path: PathBuf,
    layout: Layout,
}

impl BaseWriter {
    /// Begins the file. `tokens` are all chunks' tokens, as the text has them.
    pub fn create(path: &Path, layout: Layout, tokens: &[u32]) -> Result<BaseWriter, PerplexityError> {
        assert_eq!(tokens.len(), layout.n_chunk * layout.n_ctx);
        let path = target(path).map_err(io_error(path, "create"))?;
        let (mut file, temp) = create_partial(&path).map_err(io_error(&partial(&path), "create"))?;
        file.write_all(&layout.head(tokens)).map_err(io_error(temp.path(), "write"))?;
        Ok(BaseWriter { file, temp, path, layout })
    }

    /// Continues a file that was begun for the same text and layout, and stays for a run after this one.
    pub fn resume(path: &Path, layout: Layout, tokens: &[u32]) -> Result<BaseWriter, PerplexityError> {
        let path = target(path).map_err(io_error(path, "create"))?;
        let temp = partial(&path);
        let file = open_partial(&temp).map_err(io_error(&temp, "open"))?;
        let want = layout.head(tokens);
        let mut found = vec![0; want.len()];
        file.read_exact_at(&mut found, 0).map_err(io_error(&temp, "read"))?;
        if found != want {
            let problem = "of another run, expected the one that is resumed".into();
            return Err(PerplexityError::Base { file: temp, field: "header".into(), problem });
        }
        let temp = Partial::of_another_run(temp);
        temp.keep();
        Ok(BaseWriter { file, temp, path, layout })
    }

    /// From now on, what is written stays for another run: it is known how much of it there is.
    pub fn stays(&self) {
        self.temp.keep();
    }

    /// Writes a row, counted from the first of the file; returns the negative log-likelihood of `next` in nats.
    pub fn put(&self, ops: &Ops, row: usize, logits: &[f32], next: u32) -> Result<f64, PerplexityError> {
        let (bytes, nll) = match self.layout.top {
            None => row::encode_full(ops, logits, next),
            Some(k) => row::encode_top(ops, logits, next, k),
        };
        self.file.write_all_at(&bytes, self.layout.row_at(row)).map_err(io_error(self.temp.path(), "write"))?;
        Ok(nll)
    }

    /// Makes durable what is written.
    pub fn sync(&self) -> Result<(), PerplexityError> {
        self.file.sync_data().map_err(io_error(self.temp.path(), "sync"))
    }

    /// Ends the file and gives it its name.
    pub fn finish(self) -> Result<(), PerplexityError> {
        self.temp.publish(&self.file, &self.path).map_err(io_error(&self.path, "rename"))
    }
}

/// A base file that is read.
pub struct Base {
    file: File,
    path: PathBuf,
    layout: Layout,
    tokens: Vec<u32>,
}

impl Base {
    /// Opens a file of either layout and checks it: its magic, its numbers, its tokens, its length.
    pub fn open(path: &Path) -> Result<Base, PerplexityError> {
        let unfit = |field: &str, problem: String| PerplexityError::Base {
            file: path.to_path_buf(),
            field: field.into(),
            problem,
        };
        // A pipe would be waited for.
        let found = fs::metadata(path).map_err(io_error(path, "open"))?;
        if !found.is_file() {
            return Err(unfit("open", "not a regular file".into()));
        }
        let file = File::open(path).map_err(io_error(path, "open"))?;
        let length = file.metadata().map_err(io_error(path, "open"))?.len();
        let mut magic = [0; 8];
        if length < 20 {
            return Err(unfit("length", format!("{length} bytes, expected a header of at least 20")));
        }
        file.read_exact_at(&mut magic, 0).map_err(io_error(path, "read"))?;
        let compact = &magic == COMPACT;
        if !compact && &magic != FULL {
            let found = String::from_utf8_lossy(&magic).into_owned();
            return Err(unfit("magic", format!("{found:?}, expected \"_logits_\" or \"_logtop_\"")));
        }
        let number = |i: u64, name: &str, from: i32| -> Result<usize, PerplexityError> {
            let mut b = [0; 4];
            file.read_exact_at(&mut b, 8 + 4 * i).map_err(io_error(path, "read"))?;
            match i32::from_le_bytes(b) {
                n if (from..=MOST).contains(&n) => Ok(n as usize),
                n => Err(unfit(name, format!("{n}, expected {from} to {MOST}"))),
            }
        };
        let (n_ctx, n_vocab, n_chunk) = (number(0, "n_ctx", 4)?, number(1, "n_vocab", 2)?, number(2, "n_chunk", 1)?);
        let top = if compact { Some(number(3, "k", 1)?) } else { None };
        if let Some(k) = top.filter(|&k| k >= n_vocab) {
            return Err(unfit("k", format!("{k}, expected below n_vocab, {n_vocab}")));
        }
        let layout = Layout { n_ctx, n_vocab, n_chunk, top };
        // Before anything is allocated: the file is as long as its header says.
        match layout.file_bytes() {
            Some(n) if n == length => {}
            n => {
                let n = n.map_or("more than any file has".into(), |n| n.to_string());
                return Err(unfit(
                    "length",
                    format!("{length} bytes, expected {n} for {n_chunk} chunks of {n_ctx} tokens"),
                ));
            }
        }
        let mut bytes = vec![0; n_chunk * n_ctx * 4];
        let at = layout.head_bytes().unwrap_or(0) - bytes.len() as u64;
        file.read_exact_at(&mut bytes, at).map_err(io_error(path, "read"))?;
        let tokens: Vec<u32> = bytes.chunks_exact(4).map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect();
        if let Some(i) = tokens.iter().position(|&t| t as usize >= n_vocab) {
            return Err(unfit("tokens", format!("id {} at {i}, expected below n_vocab, {n_vocab}", tokens[i] as i32)));
        }
        Ok(Base { file, path: path.to_path_buf(), layout, tokens })
    }

    /// What it is about.
    pub fn layout(&self) -> Layout {
        self.layout
    }

    /// The tokens of all chunks.
    pub fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    /// Whether it serves a model with this many tokens.
    pub fn check_vocabulary(&self, n_vocab: usize) -> Result<(), PerplexityError> {
        if self.layout.n_vocab != n_vocab {
            return Err(self.unfit("n_vocab", format!("{}, the model has {n_vocab}", self.layout.n_vocab)));
        }
        Ok(())
    }

    /// Whether it was made from this text.
    pub fn check_text(&self, tokens: &[u32]) -> Result<(), PerplexityError> {
        if let Some(i) = self.tokens.iter().zip(tokens).position(|(a, b)| a != b) {
            let problem = format!("id {} at {i}, the text has {}", self.tokens[i], tokens[i]);
            return Err(self.unfit("tokens", problem));
        }
        if tokens.len() < self.tokens.len() {
            return Err(self.unfit("tokens", format!("{}, the text has {}", self.tokens.len(), tokens.len())));
        }
        Ok(())
    }

    fn unfit(&self, field: &str, problem: String) -> PerplexityError {
        PerplexityError::Base { file: self.path.clone(), field: field.into(), problem }
    }

    /// The bytes of its first and its last row, by which it is told from one that another model wrote.
    pub fn ends(&self) -> Result<Vec<u8>, PerplexityError> {
        let last = self.layout.n_chunk * rows(self.layout.n_ctx) - 1;
        Ok([self.row_bytes(0)?, self.row_bytes(last)?].concat())
    }

    fn row_bytes(&self, row: usize) -> Result<Vec<u8>, PerplexityError> {
        let mut bytes = vec![0; self.layout.row_bytes()];
        self.file.read_exact_at(&mut bytes, self.layout.row_at(row)).map_err(io_error(&self.path, "read"))?;
        Ok(bytes)
    }

    /// Reads a row, counted from the first of the file.
    pub fn row(&self, at: usize) -> Result<Row, PerplexityError> {
        let bytes = self.row_bytes(at)?;
        let row = match self.layout.top {
            None => Row::full(&bytes, self.layout.n_vocab),
            Some(k) => Row::top(&bytes, k, self.layout.n_vocab),
        };
        row.map_err(|problem| {
            self.unfit(&format!("chunk {}: log-probabilities", at / rows(self.layout.n_ctx) + 1), problem)
        })
    }
}
