//! oxcart: a CPU engine for large language models in GGUF.
//!
//! ```text
//! bytes -> gguf -> weights -> model (decoder) -> logits -> sample -> tokenizer -> text
//!                    └── quant: formats, kernels, matmul ──┘
//! ```
//!
//! Imports point left only: [`model`] never sees text, [`tokenizer`] never sees a matrix, the crate `oxcart-quant` never
//! sees a file. An [`engine`] has its model's tokenizer and recommended sampling, and [`draft`] takes a small model's most
//! likely tokens; only [`generate`] samples from a session's logits until they are text. The verbs in [`cli`] are leaves.
//!
//! * [`quota`]: limits on memory and time for untrusted code (chat templates);
//! * [`disk`], [`mmap`], [`gguf`]: files that appear whole, files as mapped bytes, metadata and tensor views;
//! * [`model`]: configuration, weights, KV cache, the forward pass; one small file an architecture;
//! * [`engine`]: [`engine::Engine`] (a loaded model, immutable, shared) and [`engine::Session`] (one mutable timeline);
//! * [`load`], [`placement`]: weights in memory before they are used, and kept there; workers on processors;
//! * [`sample`], [`tokenizer`], [`chat`], [`generate`]: from logits to text and from a conversation to tokens;
//! * [`draft`]: guesses at the tokens to come, so that a pass gives several;
//! * [`kv_store`]: what sessions remember, kept on disk;
//! * [`config`]: what a person sets once; [`signals`]: what ends a program;
//! * [`catalog`]: the models that `models.toml` names, and how to fetch them;
//! * [`machine`], [`plan`]: what this machine has, whether a model fits it, and how fast it will be;
//! * [`safetensors`], [`convert`]: checkpoint folders, and what they are in GGUF;
//! * [`quantize`]: from a GGUF or a checkpoint to a GGUF of other formats, by llama.cpp's recipes;
//! * [`imatrix`]: what weights matter, by the activations that they meet;
//! * [`perplexity`], [`mod@bench`]: how good a model is, and how fast, in the peers' figures;
//! * [`tui`]: the chat as a full screen;
//! * [`cli`]: one file a verb.
#![deny(unsafe_code)]
// They panic where nobody reads: `tell!`, `say!`.
#![deny(clippy::print_stdout, clippy::print_stderr)]

/// A line to stderr, for a person; where nobody reads it, it goes unheard.
macro_rules! tell {
    ($($text:tt)*) => {{
        use std::io::Write as _;
        let _ = writeln!(std::io::stderr(), $($text)*);
    }};
}

/// A line of the result, to stdout. An error where nobody reads it any more, which ends the program quietly.
macro_rules! say {
    ($($text:tt)*) => {{
        use std::io::Write as _;
        writeln!(std::io::stdout(), $($text)*)
    }};
}

/// A part of a line, as [`say`].
macro_rules! say_part {
    ($($text:tt)*) => {{
        use std::io::Write as _;
        write!(std::io::stdout(), $($text)*)
    }};
}

pub mod bench;
pub mod catalog;
pub mod chat;
pub mod cli;
pub mod config;
pub mod convert;
pub mod disk;
pub mod draft;
pub mod engine;
pub mod generate;
pub mod gguf;
pub mod imatrix;
pub mod kv_store;
pub mod load;
pub mod machine;
pub mod mmap;
pub mod model;
pub mod perplexity;
pub mod placement;
pub mod plan;
pub mod quantize;
pub mod quota;
pub mod safetensors;
pub mod sample;
pub mod signals;
pub mod tokenizer;
pub mod tui;

// `main.rs` has the same for the program.
#[cfg(test)]
#[global_allocator]
static ALLOCATOR: quota::Allocator = quota::Allocator;
