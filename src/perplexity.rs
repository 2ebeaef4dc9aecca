//! The measuring bench: how well a model predicts texts and answers questions, by the conventions of llama-perplexity, so
//! that figures compare.
//!
//! Perplexity: the text is tokenized whole; chunks of `context` tokens follow each other without overlap, the tail is
//! dropped; where the vocabulary adds BOS, it stands in place of each chunk's first token; the second half of each chunk is
//! scored, each token by the logits of the one before it: `context - context / 2 - 1` tokens.
//!
//! * [`chunk`], [`stride`]: a text's way through a model; [`score`](Score): its perplexity;
//! * [`base`], [`row`]: a reference model's predictions in a file; [`divergence`], [`report`]: another's distance from them;
//! * [`compare`], [`plot`]: several models on one text;
//! * [`task`]: HellaSwag, Winogrande, multiple choice;
//! * [`state`]: long runs that are cut off and go on.

pub mod base;
pub mod chunk;
pub mod compare;
pub mod divergence;
pub mod plot;
pub mod report;
pub mod row;
mod score;
pub mod state;
pub mod stride;
pub mod task;

pub use chunk::{chunks, rows, score};
pub use score::{Score, nll};

use crate::engine::EngineError;
use std::io;
use std::path::PathBuf;

/// A text or data set that cannot be scored, or a file of the bench that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum PerplexityError {
    /// The model.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// Too little text.
    #[error("{found} tokens, expected at least {expected}: two chunks of the context")]
    TooShort {
        /// Tokens of the text.
        found: usize,
        /// What is needed.
        expected: usize,
    },
    /// A base file that is none, or of something else.
    #[error("{}: {field}: {problem}", file.display())]
    Base {
        /// The file.
        file: PathBuf,
        /// What in it.
        field: String,
        /// What was found and expected.
        problem: String,
    },
    /// A saved state that cannot be gone on with.
    #[error("{}: state: {problem}, expected that of the run that is resumed", file.display())]
    State {
        /// The file.
        file: PathBuf,
        /// What is wrong.
        problem: String,
    },
    /// A file that cannot be read or written.
    #[error("{}: {what}: {error}", file.display())]
    Io {
        /// The file.
        file: PathBuf,
        /// What was done.
        what: &'static str,
        /// What the system said.
        error: io::Error,
    },
}
