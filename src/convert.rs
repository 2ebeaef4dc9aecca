//! From a checkpoint folder of Hugging Face's to what llama.cpp's converter makes of it, without writing it anywhere: a
//! [`Source`] whose metadata is GGUF's and whose tensors are views of the checkpoint.
//!
//! * [`config`]: `config.json` to the numbers of a model and its keys;
//! * [`names`]: which tensors of the checkpoint become which of GGUF, and in what order their rows stand there;
//! * [`card`]: name, size, licence and sampling hints (`general.*`), by the model card in [`readme`] and what else there is;
//! * [`vocab`]: `tokenizer.json` or `tokenizer.model` to `tokenizer.ggml.*`.
//!
//! Weights are taken as they are stored, F32, F16 or BF16, and quantized from there. For BF16 this is what llama.cpp makes
//! by way of a BF16 GGUF (its converter's `--outtype auto`) or an F32 one; by way of F16, weights beyond F16's range or
//! finer than its steps are rounded twice.

mod card;
mod config;
mod names;
mod readme;
mod sentencepiece;
mod vocab;

use crate::gguf::{MetadataValue, Value};
use crate::quantize::source::Source;
use crate::safetensors::{Checkpoint, CheckpointError};
use std::fmt::Display;
use std::path::Path;

/// What a person may say of a checkpoint beside where it is.
#[derive(Default)]
pub struct Options {
    /// The name of the pre-tokenizer (`tokenizer.ggml.pre`), where the checkpoint's is none that oxcart knows.
    pub pre: Option<String>,
}

/// Opens a checkpoint folder as what it is in GGUF.
pub fn open(dir: &Path, o: &Options) -> Result<Source, CheckpointError> {
    let checkpoint = Checkpoint::open(dir)?;
    let config = config::Config::read(&checkpoint)?;
    let tensors = names::tensors(&checkpoint, &config)?;
    let mut metadata = Metadata::default();
    metadata.str("general.architecture", config.family.arch());
    metadata.str("general.type", "model");
    let mut remarks: Vec<String> = config.remark.iter().map(ToString::to_string).collect();
    card::write(&checkpoint, &tensors, &mut metadata, &mut remarks)?;
    config.write(&mut metadata);
    vocab::write(&checkpoint, &config, o.pre.as_deref(), &mut metadata)?;
    Ok(Source::new(dir.to_path_buf(), checkpoint.files(), metadata.0, tensors).with_remarks(remarks))
}

/// Says what is wrong with a file of the folder.
fn unfit(c: &Checkpoint, file: &str, field: impl Display, problem: impl Display) -> CheckpointError {
    CheckpointError { file: c.dir().join(file), field: field.to_string(), problem: problem.to_string() }
}

/// Keys and values in the order in which they are set; one that is set again keeps its place.
#[derive(Default)]
struct Metadata(Vec<(String, Value)>);

impl Metadata {
    fn set(&mut self, key: &str, value: impl Into<Value>) {
        match self.0.iter_mut().find(|(k, _)| k == key) {
            Some((_, v)) => *v = value.into(),
            None => self.0.push((key.to_string(), value.into())),
        }
    }

    fn str(&mut self, key: &str, value: &str) {
        self.set(key, MetadataValue::String(value.to_string()));
    }

    fn u32(&mut self, key: &str, value: u64) {
        self.set(key, MetadataValue::U32(value as u32));
    }

    fn f32(&mut self, key: &str, value: f64) {
        self.set(key, MetadataValue::F32(value as f32));
    }

    fn bool(&mut self, key: &str, value: bool) {
        self.set(key, MetadataValue::Bool(value));
    }
}
