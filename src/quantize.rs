//! From one GGUF to another whose tensors have other formats.
//!
//! ```text
//! for each tensor, in the order of its name:          mapped, never the whole file in memory
//!     for each slab of rows:                          so many that a slab is about 16 MiB of blocks
//!         every thread takes a few rows: to f32, check, quantize
//!         write
//! ```
//!
//! Which format a tensor gets is [`recipe`]'s; how a row becomes blocks is `oxcart_quant::Quantizer`'s.

pub mod recipe;

use crate::gguf::{Gguf, GgufError, GgufWriter, MetadataValue, NewTensor, Tensor, TensorKind, Value};
use oxcart_quant::{Format, Quantizer};
use recipe::{Mix, RecipeError, Wishes};
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::{Duration, Instant};

/// Bytes of blocks that are made before they are written.
const SLAB: usize = 16 << 20;
/// Weights that a thread takes at once.
const PORTION: usize = 1 << 16;
/// `general.quantization_version` (ggml's `GGML_QNT_VERSION`).
const VERSION: u32 = 2;

/// Why a model was not quantized.
#[derive(Debug, thiserror::Error)]
pub enum QuantizeError {
    /// The file that is read or written.
    #[error(transparent)]
    Gguf(#[from] GgufError),
    /// The model has no recipe.
    #[error("{}: {error}", file.display())]
    Recipe {
        /// The model.
        file: PathBuf,
        /// Why not.
        error: RecipeError,
    },
    /// A tensor that cannot be converted.
    #[error("{}: tensor {tensor}: {problem}", file.display())]
    Tensor {
        /// The model.
        file: PathBuf,
        /// The tensor's name.
        tensor: String,
        /// What is wrong with it.
        problem: String,
    },
    /// Somebody asked to stop.
    #[error("stopped; nothing was written")]
    Stopped,
}

/// What shall be made.
pub struct Options {
    /// The mixture of formats.
    pub mix: &'static Mix,
    /// What differs from it.
    pub wishes: Wishes,
    /// Whether tensors that are quantized already may be quantized again, which loses twice.
    pub allow_requantize: bool,
    /// Bytes of a part of the output, where it shall be split.
    pub max_part: Option<u64>,
    /// Threads.
    pub threads: usize,
    /// Whether to measure what each tensor lost.
    pub report: bool,
}

/// A tensor and what becomes of it.
pub struct Step<'a> {
    /// The tensor as it is.
    pub tensor: &'a Tensor,
    /// As it will be.
    pub new: NewTensor,
    /// The format it gets; `None` where it is copied.
    pub to: Option<Format>,
}

/// What was made of a tensor.
pub struct Done {
    /// Root of the mean squared error, relative to the weights; only where a report was asked for and the format changed.
    pub error: Option<f64>,
    /// How long it took.
    pub time: Duration,
}

/// Every tensor of a model and what becomes of it, in the order in which it is written.
pub fn plan<'a>(g: &'a Gguf, o: &Options) -> Result<Vec<Step<'a>>, QuantizeError> {
    let mut tensors: Vec<&Tensor> = g.tensors().iter().collect();
    // llama.cpp's order: what belongs to no layer first.
    tensors.sort_by(|a, b| (recipe::layer(&a.name), &a.name).cmp(&(recipe::layer(&b.name), &b.name)));
    let formats = recipe::recipe(g, &tensors, o.mix, o.wishes)
        .map_err(|error| QuantizeError::Recipe { file: g.path().to_path_buf(), error })?;
    let step = |(tensor, to): (&'a Tensor, Option<Format>)| {
        let fail =
            |problem| QuantizeError::Tensor { file: g.path().to_path_buf(), tensor: tensor.name.clone(), problem };
        let to = to.filter(|&f| Some(f) != tensor.format());
        let mut kind = tensor.kind;
        if let Some(to) = to {
            let from = tensor.format().ok_or_else(|| fail(format!("cannot read {}", tensor.kind)))?;
            if from.spec().codes.is_some() && !o.allow_requantize {
                let problem = format!("is {} already; quantizing again loses twice (--allow-requantize)", from.name());
                return Err(fail(problem));
            }
            if Quantizer::new(to).is_none() {
                return Err(fail(format!("cannot quantize to {}", to.name())));
            }
            kind = TensorKind::from_id(to.spec().id).map_err(|e| fail(e.to_string()))?;
        }
        let new = NewTensor { name: tensor.name.clone(), dims: tensor.dims.clone(), kind };
        Ok(Step { tensor, new, to })
    };
    tensors.into_iter().zip(formats).map(step).collect()
}

/// Writes the quantized model to `out`. `watch` is called after each tensor (with its place in `steps`), and `go_on` now and
/// then: where it says no, nothing is left of the output.
pub fn write(
    g: &Gguf,
    steps: &[Step<'_>],
    o: &Options,
    out: &Path,
    mut watch: impl FnMut(usize, &Done),
    go_on: impl Fn() -> bool,
) -> Result<Vec<PathBuf>, QuantizeError> {
    const OURS: [&str; 2] = ["general.quantization_version", "general.file_type"];
    let mut metadata: Vec<(String, Value)> =
        g.metadata().filter(|(k, _)| !OURS.contains(k)).map(|(k, v)| (k.to_string(), v.clone())).collect();
    for (key, value) in OURS.into_iter().zip([VERSION, o.mix.file_type]) {
        metadata.push((key.to_string(), MetadataValue::U32(value).into()));
    }
    let new = steps.iter().map(|s| s.new.clone()).collect();
    let mut w = GgufWriter::create(out, metadata, new, o.max_part)?;
    for (i, step) in steps.iter().enumerate() {
        let start = Instant::now();
        let error = match step.to {
            Some(to) => convert(g, step.tensor, to, o, &mut w, &go_on)?,
            None => {
                for piece in step.tensor.bytes().chunks(SLAB) {
                    if !go_on() {
                        return Err(QuantizeError::Stopped);
                    }
                    w.push(piece)?;
                }
                None
            }
        };
        watch(i, &Done { error, time: start.elapsed() });
    }
    Ok(w.finish()?)
}

/// Sums over a tensor.
#[derive(Default)]
struct Sums {
    not_finite: u64,
    squares: f64,
    errors: f64,
}

fn convert(
    g: &Gguf,
    t: &Tensor,
    to: Format,
    o: &Options,
    w: &mut GgufWriter,
    go_on: &impl Fn() -> bool,
) -> Result<Option<f64>, QuantizeError> {
    let fail = |problem| QuantizeError::Tensor { file: g.path().to_path_buf(), tensor: t.name.clone(), problem };
    let cols = t.dims[0] as usize;
    let (Some(from), Some(q)) = (t.format(), Quantizer::new(to)) else {
        return Err(fail(format!("no way from {} to {}", t.kind, to.name())));
    };
    let (Some(from_bytes), Some(to_bytes)) = (from.row_bytes(cols), to.row_bytes(cols)) else {
        return Err(fail(format!("{cols} columns, not a multiple of {} ({})", to.spec().block_len, to.name())));
    };
    let rows = (SLAB / to_bytes).max(1);
    let portion = (PORTION / cols).max(1);
    let mut blocks = vec![0; rows * to_bytes];
    let mut sums = Sums::default();
    for source in t.bytes().chunks(rows * from_bytes) {
        if !go_on() {
            return Err(QuantizeError::Stopped);
        }
        let blocks = &mut blocks[..source.len() / from_bytes * to_bytes];
        // Once a number was found that is none, the rest is only counted.
        let quantizing = sums.not_finite == 0;
        let work = Mutex::new(source.chunks(portion * from_bytes).zip(blocks.chunks_mut(portion * to_bytes)));
        let total = Mutex::new(&mut sums);
        let worker = || {
            let (mut x, mut back, mut own) =
                (vec![0.0; cols], vec![0.0; if o.report { cols } else { 0 }], Sums::default());
            loop {
                let Some((source, blocks)) = work.lock().expect("no worker panics").next() else { break };
                for (source, blocks) in source.chunks(from_bytes).zip(blocks.chunks_mut(to_bytes)) {
                    from.dequant(source, &mut x);
                    let not_finite = x.iter().filter(|x| !x.is_finite()).count() as u64;
                    own.not_finite += not_finite;
                    if !quantizing || not_finite > 0 {
                        continue;
                    }
                    q.row(&x, None, blocks);
                    if o.report {
                        to.dequant(blocks, &mut back);
                        for (x, back) in x.iter().zip(&back) {
                            own.squares += (*x as f64).powi(2);
                            own.errors += (*x as f64 - *back as f64).powi(2);
                        }
                    }
                }
            }
            let mut total = total.lock().expect("no worker panics");
            total.not_finite += own.not_finite;
            total.squares += own.squares;
            total.errors += own.errors;
        };
        std::thread::scope(|s| {
            for _ in 1..o.threads {
                s.spawn(worker);
            }
            worker();
        });
        if sums.not_finite == 0 {
            w.push(blocks)?;
        }
    }
    if sums.not_finite > 0 {
        return Err(fail(format!("{} of {} weights are NaN or infinite", sums.not_finite, t.n_elements())));
    }
    Ok((o.report && sums.squares > 0.0).then(|| (sums.errors / sums.squares).sqrt()))
}
