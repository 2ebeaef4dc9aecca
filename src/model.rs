//! The model: what its numbers are, where its weights lie, and how a forward pass goes through them.
//!
//! [`config`] and [`weights`] are filled from a GGUF by one of the architectures in [`arch`]; they differ in data, not in
//! code. [`decoder`] is the forward pass, written as one worker of a team runs it; [`cache`] is what it remembers;
//! [`stream`] brings weights that do not fit in memory.
//! Nothing here knows text.

pub mod arch;
mod attention;
pub mod cache;
pub mod config;
pub mod decoder;
mod ffn;
mod matmul;
pub mod observe;
pub mod rope;
pub mod stream;
pub mod weights;

pub use cache::KvCache;
pub use config::Config;
pub use decoder::{Batch, Buffers};
pub use stream::{Halt, Stream};
pub use weights::Weights;

use crate::gguf::{Gguf, GgufError};
use std::path::PathBuf;

/// A model that oxcart cannot run, and why.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    /// The file itself.
    #[error(transparent)]
    Gguf(#[from] GgufError),
    /// Something that the file says or lacks.
    #[error("{}: {field}: {problem}", file.display())]
    Unfit {
        /// The file.
        file: PathBuf,
        /// The key or tensor.
        field: String,
        /// What was found and expected.
        problem: String,
    },
}

/// A loaded model: immutable, its weights views of the file.
pub struct Model {
    /// Its numbers.
    pub config: Config,
    /// Its matrices.
    pub weights: Weights,
}

impl Model {
    /// Reads the configuration and finds every tensor. Touches no weights but the norms.
    pub fn from_gguf(g: &Gguf) -> Result<Model, ModelError> {
        let config = arch::config(g)?;
        let weights = Weights::from_gguf(g, &config)?;
        Ok(Model { config, weights })
    }
}
