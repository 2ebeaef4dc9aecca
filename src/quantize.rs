//! From a GGUF or a checkpoint to a GGUF whose tensors have other formats.
//!
//! ```text
//! for each tensor, in the order of its name:          mapped, never the whole file in memory
//!     for each slab of rows:                          so many that a slab is about 16 MiB of blocks
//!         every thread takes a few rows: to f32, check, quantize
//!         write; the rows need not stay in memory
//!     now and then: sync, note how many tensors are whole
//! ```
//!
//! Where the rows are is [`source`]'s; which format a tensor gets is [`recipe`]'s; how a row becomes blocks is
//! `oxcart_quant::Quantizer`'s. [`resume`] keeps what a stopped run has done.

pub mod importance;
pub mod recipe;
mod resume;
pub mod source;

use crate::disk::{folder, free_space, partial};
use crate::gguf::{GgufError, GgufWriter, MetadataValue, NewTensor, Parts, TensorKind, Unfinished, Value};
use importance::Importance;
use oxcart_quant::{Format, Quantizer};
use recipe::{Mix, RecipeError, Wishes};
use resume::Journal;
use source::{Source, Tensor};
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::{Duration, Instant};

/// Bytes of blocks that are made before they are written.
const SLAB: usize = 16 << 20;
/// Weights that a thread takes at once.
const PORTION: usize = 1 << 16;
/// Up to here no format's scales overflow: the least that does is 65520 itself, as an f16, and scales of blocks are at most
/// eight times the largest weight (IQ1's, whose least code is an eighth). No row of a model that works is beyond it.
const SURELY_FITS: f32 = 1024.0;
/// The same where importance is known, whose products with weights the search squares: 1e12, the most that is read, times
/// 128 of codes, 256 weights and the square of this is 2e18.
const SURELY_FITS_WEIGHED: f32 = 8.0;
/// The largest number that a block with scales in f16 holds: times 6 bits and a sign of scales, times 128 of codes.
const MOST_OF_BLOCKS: f32 = 65504.0 * 64.0 * 128.0;
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
    /// What a stopped run left cannot be gone on with.
    #[error("{}: {problem}", file.display())]
    Resume {
        /// The file that tells how far it came.
        file: PathBuf,
        /// What is wrong.
        problem: String,
    },
    /// The output would not fit the disk, sizes in bytes.
    #[error("{}: {free} bytes are free, {needed} are needed", folder.display())]
    Space {
        /// Where the output goes.
        folder: PathBuf,
        /// Bytes that are free there.
        free: u64,
        /// Bytes of output that are not there yet.
        needed: u64,
    },
    /// Somebody asked to stop.
    #[error("stopped after {done} of {all} tensors; --resume goes on from there")]
    Stopped {
        /// Tensors that are whole.
        done: usize,
        /// Tensors of the model.
        all: usize,
    },
}

/// What shall be made.
pub struct Options {
    /// The mixture of formats; `None` where all tensors are copied.
    pub mix: Option<&'static Mix>,
    /// What differs from it.
    pub wishes: Wishes,
    /// Whether tensors that are quantized already may be quantized again, which loses twice.
    pub allow_requantize: bool,
    /// Metadata that stands for what the source says, or is added.
    pub overrides: Vec<(String, Value)>,
    /// How the output is split.
    pub split: Split,
    /// Threads.
    pub threads: usize,
    /// Whether to measure what each tensor lost.
    pub report: bool,
    /// Whether to go on with what a stopped run left.
    pub resume: bool,
    /// Which columns matter; `None` also where nothing is known.
    pub importance: Option<Importance>,
}

/// How the output is split.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Split {
    /// Not at all.
    Whole,
    /// Into parts of at most so many bytes.
    Size(u64),
    /// As the source is, each tensor in the same part.
    Same,
}

/// A tensor and what becomes of it.
pub struct Step<'a> {
    /// The tensor as it is.
    pub tensor: &'a Tensor,
    /// As it will be.
    pub new: NewTensor,
    /// The format it gets; `None` where it is copied.
    pub to: Option<Format>,
    /// How much its columns matter, if that is known: (experts, columns).
    pub importance: Option<&'a [f32]>,
    /// Whether that is not known, though its new format cannot do without.
    pub lacks_importance: bool,
}

/// What happened last.
pub enum Event<'a> {
    /// A run that was stopped is gone on with: so many tensors are there already.
    Resumed(usize),
    /// So many bytes of the source were read and their blocks written.
    Read(u64),
    /// The tensor at this place in the steps is whole.
    Done(usize, &'a Done),
}

/// What was made of a tensor.
pub struct Done {
    /// What was lost; only where a report was asked for and the format changed.
    pub error: Option<Loss>,
    /// How long it took.
    pub time: Duration,
}

/// Roots of mean squared errors, relative to the weights.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Loss {
    /// Of all weights alike.
    pub plain: f64,
    /// Where importance is known, by how much each column matters.
    pub weighted: Option<f64>,
}

/// Every tensor of a model and what becomes of it, in the order in which it is written.
pub fn plan<'a>(g: &'a Source, o: &'a Options) -> Result<Vec<Step<'a>>, QuantizeError> {
    let mut tensors: Vec<&Tensor> = g.tensors().iter().collect();
    if o.split != Split::Same {
        // llama.cpp's order: what belongs to no layer first.
        tensors.sort_by(|a, b| (recipe::layer(&a.name), &a.name).cmp(&(recipe::layer(&b.name), &b.name)));
    }
    let formats = match o.mix {
        None => vec![None; tensors.len()],
        Some(mix) => {
            recipe::recipe(g, &tensors, mix, &o.wishes, o.importance.is_some()).map_err(|error| match error {
                // It names the file already.
                RecipeError::Gguf(error) => QuantizeError::Gguf(error),
                error => QuantizeError::Recipe { file: g.path().to_path_buf(), error },
            })?
        }
    };
    let step = |(tensor, to): (&'a Tensor, Option<Format>)| {
        let fail =
            |problem| QuantizeError::Tensor { file: g.path().to_path_buf(), tensor: tensor.name.clone(), problem };
        let to = to.or(tensor.plain.format()).filter(|&f| Some(f) != tensor.format());
        let mut kind = tensor.plain;
        let (mut importance, mut lacks_importance) = (None, false);
        if let Some(to) = to {
            let from = tensor.format().ok_or_else(|| fail(format!("cannot read {}", tensor.kind)))?;
            if from.spec().codes.is_some() && !o.allow_requantize {
                let problem = format!("is {} already; quantizing again loses twice (--allow-requantize)", from.name());
                return Err(fail(problem));
            }
            let Some(q) = Quantizer::new(to) else {
                return Err(fail(format!("cannot quantize to {}", to.name())));
            };
            if let Some(known) = &o.importance {
                importance = known.of(tensor.old_name.as_ref().unwrap_or(&tensor.name), &tensor.dims).map_err(fail)?;
            }
            let needed =
                q.needs_importance() || o.mix.is_some_and(|mix| recipe::needs_importance(&tensor.name, to, mix));
            lacks_importance = needed && importance.is_none();
            kind = TensorKind::from_id(to.spec().id).map_err(|e| fail(e.to_string()))?;
        }
        let new = NewTensor { name: tensor.name.clone(), dims: tensor.dims.clone(), kind };
        Ok(Step { tensor, new, to, importance, lacks_importance })
    };
    tensors.into_iter().zip(formats).map(step).collect()
}

/// The files that [`write()`] would write, and their sizes in bytes.
pub fn files(g: &Source, steps: &[Step<'_>], o: &Options, out: &Path) -> Result<Vec<(PathBuf, u64)>, QuantizeError> {
    let new = steps.iter().map(|s| s.new.clone()).collect();
    Ok(GgufWriter::layout(out, metadata(g, o), new, &parts(g, o))?)
}

fn parts(g: &Source, o: &Options) -> Parts {
    match o.split {
        Split::Whole => Parts::One,
        Split::Size(most) => Parts::Size(most),
        Split::Same => Parts::Tensors(g.split().to_vec()),
    }
}

/// Writes the quantized model to `out`. `watch` is told of every step, and `go_on` asked now and then: where it says no,
/// what is whole is kept beside `out` for a later run with [`Options::resume`], as it is where all is whole and cannot be given
/// its name. After any other error nothing is left.
pub fn write(
    g: &Source,
    steps: &[Step<'_>],
    o: &Options,
    out: &Path,
    mut watch: impl FnMut(Event<'_>),
    go_on: impl Fn() -> bool,
) -> Result<Vec<PathBuf>, QuantizeError> {
    if let Some(s) = steps.iter().find(|s| s.lacks_importance) {
        let tensor = s.new.name.clone();
        let problem = match &o.importance {
            None => format!("{} needs an importance matrix (--imatrix, made by oxcart imatrix)", s.new.kind),
            Some(i) => format!("{} needs an importance matrix; {} has none for it", s.new.kind, i.file().display()),
        };
        return Err(QuantizeError::Tensor { file: g.path().to_path_buf(), tensor, problem });
    }
    let read: Vec<PathBuf> =
        g.files().iter().cloned().chain(o.importance.iter().map(|i| i.file().to_path_buf())).collect();
    let mut journal = Journal::open(out, &read, &o.demand(g), o.resume)?;
    let whole = journal.whole().min(steps.len());
    enough_space(out, &files(g, steps, o, out)?)?;
    let new = steps.iter().map(|s| s.new.clone()).collect();
    let unfinished = if whole > 0 { Unfinished::Continue(whole) } else { Unfinished::Replace };
    let mut w = GgufWriter::create_resumable(out, metadata(g, o), new, &parts(g, o), unfinished)?;
    journal.begin();
    if whole > 0 {
        watch(Event::Resumed(whole));
    }
    for (i, step) in steps.iter().enumerate().skip(whole) {
        let start = Instant::now();
        // Floats that stay are rounded to what they are, which changes nothing, so that they are checked too.
        let to = step.to.or(step.tensor.format().filter(|&f| recipe::is_float(f)));
        let mut read = |bytes| watch(Event::Read(bytes));
        let done = match to {
            Some(to) => convert(g, step, to, o, &mut w, &mut read, &go_on),
            None => copy(step.tensor, &mut w, &mut read, &go_on),
        };
        let error = match done {
            Ok(error) => error,
            Err(QuantizeError::Stopped { .. }) => {
                w.keep()?;
                journal.keep(i)?;
                return Err(QuantizeError::Stopped { done: i, all: steps.len() });
            }
            Err(e) => return Err(e),
        };
        watch(Event::Done(i, &Done { error, time: start.elapsed() }));
        if let Some(file) = journal.is_due().then(|| w.flushed()).transpose()?.flatten() {
            journal.note(file, w.survivors(), i + 1);
        }
    }
    journal.stop()?;
    // The first part is the last to get its name.
    let first = w.paths().next().map(partial);
    match w.finish() {
        Err(e) if first.is_some_and(|p| p.exists()) => {
            journal.keep(steps.len())?;
            Err(e.into())
        }
        done => Ok(done?),
    }
}

/// The output's keys and values in llama-quantize's order: the source's, what is made, what was asked for, importance.
fn metadata(g: &Source, o: &Options) -> Vec<(String, Value)> {
    const OURS: [&str; 2] = ["general.quantization_version", "general.file_type"];
    let file_type = match o.mix {
        Some(mix) => Some(MetadataValue::U32(mix.file_type).into()),
        None => g.metadata().find(|(k, _)| *k == OURS[1]).map(|(_, v)| v.clone()).or_else(|| plain_file_type(g)),
    };
    let overridden = |k: &str| o.overrides.iter().any(|(key, _)| key == k);
    // What is quantized anew owes nothing to an older matrix.
    let kept = |k: &str| !OURS.contains(&k) && (o.mix.is_none() || !k.starts_with(importance::PREFIX));
    let mut all: Vec<(String, Value)> = g.metadata().map(|(k, v)| (k.to_string(), v.clone())).collect();
    all.retain(|(k, _)| kept(k));
    for (key, value) in OURS.into_iter().zip([Some(MetadataValue::U32(VERSION).into()), file_type]) {
        all.extend(value.map(|v| (key.to_string(), v)));
    }
    all.retain(|(k, _)| !overridden(k));
    all.extend(o.overrides.iter().cloned());
    for (key, value) in o.importance.iter().flat_map(|i| i.metadata()) {
        all.retain(|(k, _)| *k != key);
        all.push((key, value));
    }
    if let Some(left) = g.layers_left() {
        all.retain(|(k, _)| !k.ends_with(".block_count"));
        let arch = g.str("general.architecture").ok().flatten().unwrap_or_default();
        all.push((format!("{arch}.block_count"), MetadataValue::U32(left as u32).into()));
    }
    all
}

/// The file type of a model that does not say it: that of the format of most of its weights.
fn plain_file_type(g: &Source) -> Option<Value> {
    let mut weights: Vec<(Format, u64)> = Vec::new();
    for t in g.tensors() {
        let Some(format) = t.plain.format() else { continue };
        match weights.iter_mut().find(|(f, _)| *f == format) {
            Some((_, n)) => *n += t.n_elements(),
            None => weights.push((format, t.n_elements())),
        }
    }
    let (format, _) = weights.into_iter().max_by_key(|(_, n)| *n)?;
    Some(MetadataValue::U32(Mix::of(format)?.file_type).into())
}

impl Options {
    /// What decides the output's bytes beside the files that are read, and the program that does it.
    fn demand(&self, g: &Source) -> String {
        let names: Vec<_> = g.tensors().iter().filter_map(|t| t.old_name.as_ref()).collect();
        let (mix, by) = (self.mix.map(|m| m.name), self.importance.as_ref().map(|i| i.selection()));
        let overrides: Vec<_> = self.overrides.iter().map(|(k, v)| format!("{k}={v}")).collect();
        let (version, wishes, split) = (env!("CARGO_PKG_VERSION"), &self.wishes, self.split);
        format!("oxcart {version} {mix:?} {wishes:?} {split:?} {overrides:?} {by:?} {names:?}")
    }
}

/// Refuses what the disk has no room for. What another run left is gone on with or replaced, so its bytes are there.
fn enough_space(out: &Path, files: &[(PathBuf, u64)]) -> Result<(), QuantizeError> {
    let folder = folder(out);
    // A folder that cannot be asked is told of by the writer.
    let Ok(free) = free_space(folder) else { return Ok(()) };
    let needed = files.iter().fold(0u64, |n, (file, size)| {
        n.saturating_add(size.saturating_sub(std::fs::metadata(partial(file)).map_or(0, |m| m.len())))
    });
    match free < needed {
        true => Err(QuantizeError::Space { folder: folder.to_path_buf(), free, needed }),
        false => Ok(()),
    }
}

/// Bytes as they are.
fn copy(
    t: &Tensor,
    w: &mut GgufWriter,
    read: &mut impl FnMut(u64),
    go_on: &impl Fn() -> bool,
) -> Result<Option<Loss>, QuantizeError> {
    for row in 0..t.n_rows() {
        for piece in t.row(row).chunks(SLAB) {
            if !go_on() {
                return Err(STOPPED);
            }
            w.push(piece)?;
            read(piece.len() as u64);
        }
    }
    t.done_with(0..t.n_rows());
    Ok(None)
}

/// Told on by `write`, which knows how far it came.
const STOPPED: QuantizeError = QuantizeError::Stopped { done: 0, all: 0 };

/// Sums over a tensor.
#[derive(Default)]
struct Sums {
    not_finite: u64,
    too_large: u64, // for the new format
    // Of all weights alike, and by importance.
    squares: [f64; 2],
    errors: [f64; 2],
}

impl Sums {
    /// Adds what became of a row, whose columns matter so much.
    fn add_row(&mut self, x: &[f32], back: &[f32], importance: Option<&[f32]>) {
        for (i, (x, back)) in x.iter().zip(back).enumerate() {
            let (square, error) = ((*x as f64).powi(2), (*x as f64 - *back as f64).powi(2));
            let importance = importance.map_or(0.0, |w| w[i] as f64);
            self.squares[0] += square;
            self.errors[0] += error;
            self.squares[1] += importance * square;
            self.errors[1] += importance * error;
        }
    }

    fn join(&mut self, other: &Sums) {
        self.not_finite += other.not_finite;
        self.too_large += other.too_large;
        for i in 0..2 {
            self.squares[i] += other.squares[i];
            self.errors[i] += other.errors[i];
        }
    }

    fn loss(&self) -> Option<Loss> {
        let relative = |i: usize| (self.squares[i] > 0.0).then(|| (self.errors[i] / self.squares[i]).sqrt());
        Some(Loss { plain: relative(0)?, weighted: relative(1) })
    }
}

/// Whether a block has nothing of a weight: its scale overflowed, or the search for it did.
fn is_lost(to: Format, weight: f32, back: f32) -> bool {
    let scales_are_f16 = !recipe::is_float(to) && to != Format::MXFP4;
    !back.is_finite() || scales_are_f16 && weight.abs() > MOST_OF_BLOCKS
}

/// What a thread keeps for itself.
#[derive(Default)]
struct Own {
    x: Vec<f32>,    // a row
    back: Vec<f32>, // what its blocks give
    sums: Sums,
}

/// A tensor's way from one format to another.
struct Conversion<'a> {
    tensor: &'a Tensor,
    from: Format,
    to: Format,
    quantizer: Quantizer,
    cols: usize,
    row_bytes: usize, // of blocks
    importance: Option<&'a [f32]>,
    report: bool,
}

impl Conversion<'_> {
    /// How much the columns of a row matter. Each expert's rows have their own.
    fn importance(&self, row: usize) -> Option<&[f32]> {
        let rows_of_expert = self.tensor.dims.get(1).map_or(1, |&n| n as usize);
        self.importance.map(|w| &w[row / rows_of_expert * self.cols..][..self.cols])
    }

    /// Makes the blocks of the rows from `first` on; without `quantizing`, only counts what is no number.
    fn rows(&self, first: usize, blocks: &mut [u8], quantizing: bool, Own { x, back, sums }: &mut Own) {
        let surely_fits = if self.importance.is_some() { SURELY_FITS_WEIGHED } else { SURELY_FITS };
        x.resize(self.cols, 0.0);
        for (row, blocks) in (first..).zip(blocks.chunks_mut(self.row_bytes)) {
            self.from.dequant(self.tensor.row(row), x);
            // In the order of their bits, magnitudes are integers, and what is none is above infinity.
            let largest = f32::from_bits(x.iter().fold(0, |m, x| m.max(x.abs().to_bits())));
            if !largest.is_finite() {
                sums.not_finite += x.iter().filter(|x| !x.is_finite()).count() as u64;
            }
            if !quantizing || !largest.is_finite() {
                continue;
            }
            self.quantizer.row(x, self.importance(row), blocks);
            if largest <= surely_fits && !self.report {
                continue;
            }
            back.resize(self.cols, 0.0);
            self.to.dequant(blocks, back);
            if largest > surely_fits {
                sums.too_large += x.iter().zip(&*back).filter(|(x, back)| is_lost(self.to, **x, **back)).count() as u64;
            }
            if self.report {
                sums.add_row(x, back, self.importance(row));
            }
        }
    }

    /// Makes the blocks of a slab, on so many threads, or as many of them as the system gives.
    fn slab(&self, first: usize, blocks: &mut [u8], threads: usize, sums: &mut Sums) {
        let portion = (PORTION / self.cols).max(1);
        let portions = blocks.len().div_ceil(portion * self.row_bytes);
        // Once a number was found that is none, the rest is only counted.
        let quantizing = sums.not_finite == 0;
        let work = Mutex::new((first..).step_by(portion).zip(blocks.chunks_mut(portion * self.row_bytes)));
        let total = Mutex::new(sums);
        let worker = || {
            let mut own = Own::default();
            loop {
                let Some((first, blocks)) = work.lock().expect("no worker panics").next() else { break };
                self.rows(first, blocks, quantizing, &mut own);
            }
            total.lock().expect("no worker panics").join(&own.sums);
        };
        std::thread::scope(|scope| {
            let spawn = |_| std::thread::Builder::new().name("oxcart-quantize".into()).spawn_scoped(scope, worker).ok();
            (1..threads.min(portions)).map_while(spawn).for_each(drop);
            worker();
        });
    }
}

fn convert(
    g: &Source,
    step: &Step<'_>,
    to: Format,
    o: &Options,
    w: &mut GgufWriter,
    read: &mut impl FnMut(u64),
    go_on: &impl Fn() -> bool,
) -> Result<Option<Loss>, QuantizeError> {
    let t = step.tensor;
    let fail = |problem| QuantizeError::Tensor { file: g.path().to_path_buf(), tensor: t.name.clone(), problem };
    let cols = t.dims[0] as usize;
    let (Some(from), Some(quantizer)) = (t.format(), Quantizer::new(to)) else {
        return Err(fail(format!("no way from {} to {}", t.kind, to.name())));
    };
    let (Some(from_bytes), Some(row_bytes)) = (from.row_bytes(cols), to.row_bytes(cols)) else {
        return Err(fail(format!("{cols} columns, not a multiple of {} ({})", to.spec().block_len, to.name())));
    };
    let (importance, report) = (step.importance, o.report && step.to.is_some());
    let c = Conversion { tensor: t, from, to, quantizer, cols, row_bytes, importance, report };
    let rows = (SLAB / row_bytes).clamp(1, t.n_rows());
    let mut blocks = vec![0; rows * row_bytes];
    let mut sums = Sums::default();
    for first in (0..t.n_rows()).step_by(rows) {
        if !go_on() {
            return Err(STOPPED);
        }
        let slab = first..t.n_rows().min(first + rows);
        let blocks = &mut blocks[..slab.len() * row_bytes];
        c.slab(first, blocks, o.threads, &mut sums);
        if sums.not_finite == 0 {
            w.push(blocks)?;
        }
        read((slab.len() * from_bytes) as u64);
        t.done_with(slab);
    }
    let too_large = match to.spec().block_len {
        1 => format!("are too large for {}", to.name()),
        _ => format!("are too large for {}, or in a block with one that is", to.name()),
    };
    for (n, problem) in [(sums.not_finite, "are NaN or infinite"), (sums.too_large, too_large.as_str())] {
        if n > 0 {
            return Err(fail(format!("{n} of {} weights {problem}", t.n_elements())));
        }
    }
    Ok(sums.loss().filter(|_| report))
}
