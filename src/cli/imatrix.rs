//! `oxcart imatrix`: collects an importance matrix over a text, with llama-imatrix's flags.

use super::engine::{EngineArgs, SessionArgs, items, tell_facts};
use super::interrupt::interruptible;
use super::perplexity::tokens;
use super::progress::bar;
use super::text::note_bytes;
use super::usage_error;
use crate::disk;
use crate::imatrix::collect::{self, Collector};
use crate::imatrix::statistics::Statistics;
use crate::imatrix::{FileFormat, Imatrix};
use crate::perplexity::{Score, chunks, score};
use anyhow::{Context, bail};
use indicatif::ProgressBar;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

/// Flags as llama-imatrix has them.
#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    engine: EngineArgs,
    #[command(flatten)]
    session: SessionArgs,
    /// The text; without one, the files of --in-file are only combined
    #[arg(short, long, value_name = "FILE", required_unless_present = "in_file")]
    file: Option<PathBuf>,
    /// Output file
    #[arg(short, long, visible_alias = "output-file", value_name = "FILE", default_value = "imatrix.gguf")]
    output: PathBuf,
    /// Output format: gguf, or dat for older programs
    #[arg(long, value_name = "FORMAT", default_value = "gguf", value_parser = format)]
    output_format: FileFormat,
    /// Add the contents of these files, separated by commas; may be repeated
    #[arg(long, value_name = "FILE,..")]
    in_file: Vec<String>,
    /// Save the output every N chunks
    #[arg(long, visible_alias = "ofreq", value_name = "N", default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..))]
    output_frequency: u32,
    /// Keep a copy, OUTPUT.at_CHUNK, every N chunks; 0 for none
    #[arg(long, value_name = "N", default_value_t = 0)]
    save_frequency: u32,
    /// Skip the first N chunks
    #[arg(long, visible_alias = "from-chunk", value_name = "N", default_value_t = 0)]
    chunk: usize,
    /// Read at most N chunks; -1 for all
    #[arg(long, value_name = "N", value_parser = super::engine::limit, allow_negative_numbers = true)]
    chunks: Option<usize>,
    /// Chunk size in tokens
    #[arg(short, long, value_name = "N", default_value_t = 512, value_parser = super::engine::chunk)]
    ctx_size: usize,
    /// Batch size in tokens; as many chunks as fit are evaluated together
    #[arg(short, long, value_name = "N", default_value_t = 2048, value_parser = super::engine::batch)]
    batch_size: usize,
    /// Also collect for the output matrix
    #[arg(long)]
    process_output: bool,
    /// Do not compute the perplexity; this skips the output matrix
    #[arg(long)]
    no_ppl: bool,
    /// Parse special tokens such as <|im_end|> in the text
    #[arg(long)]
    parse_special: bool,
    /// Print how importance is distributed over the columns of each tensor of a single --in-file, and do nothing else
    #[arg(long, requires = "in_file", conflicts_with = "file")]
    show_statistics: bool,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

impl Args {
    fn in_files(&self) -> Vec<PathBuf> {
        self.in_file.iter().flat_map(|list| items(list)).map(PathBuf::from).collect()
    }
}

fn format(s: &str) -> Result<FileFormat, String> {
    match s {
        "gguf" => Ok(FileFormat::Gguf),
        "dat" => Ok(FileFormat::Dat),
        _ => Err("expected gguf or dat".into()),
    }
}

pub fn run(a: Args) -> anyhow::Result<()> {
    if a.show_statistics {
        return show_statistics(&a);
    }
    // Now, not after the first chunks.
    disk::target(&a.output).with_context(|| a.output.display().to_string())?;
    let mut known = Imatrix { chunk_size: a.ctx_size as u32, ..Imatrix::default() };
    for file in a.in_files() {
        let m = Imatrix::read(&file)?;
        tell!("imatrix: {}: {} entries, {} chunks", file.display(), m.entries.len(), m.chunks);
        known.join(&m).map_err(|problem| anyhow::anyhow!("{}: entry {problem}", file.display()))?;
    }
    match &a.file {
        None => {
            known.write(&a.output, a.output_format)?;
            report(&a, &known, None, 0.0)
        }
        Some(text) => collect(&a, &known, text),
    }
}

/// A line for each tensor, those of one role together and the largest sums first.
fn show_statistics(a: &Args) -> anyhow::Result<()> {
    let files = a.in_files();
    let [file] = files.as_slice() else {
        usage_error(&format!("--show-statistics: {} files, expected one", files.len()));
    };
    let m = Imatrix::read(file)?;
    let mut all: Vec<_> = m.entries.keys().filter_map(|name| Some((name, Statistics::of(&m, name)?))).collect();
    let role = |name: &str| name.splitn(3, '.').last().unwrap_or_default().to_string();
    all.sort_by(|(a, x), (b, y)| role(a).cmp(&role(b)).then(y.sum.total_cmp(&x.sum)));
    let out = &mut std::io::stdout().lock();
    if a.json {
        let line = |(name, s): &(&String, Statistics)| {
            serde_json::json!({
                "name": name, "columns": s.columns, "sum": s.sum, "min": s.min, "max": s.max, "mean": s.mean,
                "deviation": s.deviation, "active": s.active, "entropy": s.entropy, "outliers": s.outliers,
                "cosine_to_layer_before": s.cosine,
            })
        };
        let lines: Vec<_> = all.iter().map(line).collect();
        writeln!(out, "{}", serde_json::json!({ "file": file, "chunks": m.chunks, "tensors": lines }))?;
        return Ok(());
    }
    writeln!(
        out,
        "{:32} {:>12} {:>10} {:>12} {:>10} {:>10} {:>8} {:>6} {:>8} {:>9} {:>7} {:>7}",
        "tensor", "sum E[x^2]", "min", "max", "mean", "std", "active", "N", "entropy", "E (norm)", "ZD", "CosSim"
    )?;
    for (name, s) in &all {
        let norm = 100.0 * s.entropy / (s.columns as f64).log2();
        let cosine = s.cosine.map_or("-".to_string(), |c| format!("{c:.4}"));
        writeln!(
            out,
            "{name:32} {:12.2} {:10.4} {:12.4} {:10.4} {:10.4} {:7.2}% {:6} {:8.4} {norm:8.2}% {:6.2}% {cosine:>7}",
            s.sum,
            s.min,
            s.max,
            s.mean,
            s.deviation,
            100.0 * s.active,
            s.columns,
            s.entropy,
            100.0 * s.outliers
        )?;
    }
    Ok(())
}

/// What the files hold and what was seen of the text.
fn joined(known: &Imatrix, seen: &Collector, a: &Args, model: &Path, text: &Path) -> anyhow::Result<Imatrix> {
    let mut seen = seen.imatrix(a.ctx_size as u32).with_context(|| model.display().to_string())?;
    seen.datasets.push(text.display().to_string());
    let mut m = known.clone();
    m.join(&seen).map_err(|problem| anyhow::anyhow!("--in-file and this model: entry {problem}"))?;
    Ok(m)
}

fn collect(a: &Args, known: &Imatrix, text: &Path) -> anyhow::Result<()> {
    let e = a.engine.open()?;
    let bytes = disk::read(text, disk::MOST_TEXT).with_context(|| text.display().to_string())?;
    note_bytes(&text.display().to_string(), &bytes);
    let context = a.ctx_size;
    let tokens = tokens("imatrix", &e, &bytes, a.parse_special).with_context(|| text.display().to_string())?;
    let skip = a.chunk.saturating_mul(context);
    let tokens = tokens.get(skip..).with_context(|| {
        format!("{}: {} tokens, fewer than --chunk {} leaves out", text.display(), tokens.len(), a.chunk)
    })?;
    let n = chunks(tokens.len(), context).with_context(|| text.display().to_string())?;
    let n = a.chunks.map_or(n, |limit| limit.min(n));
    let n_seq = (a.batch_size / context).clamp(1, n);
    let mut s = e.session(&a.session.options(context, n_seq))?;
    let own_output = e.gguf.tensor("output.weight").is_some();
    if a.process_output && !own_output {
        tell!("imatrix: this model's output matrix is its token embeddings; none is collected for it");
    }
    let collector = Arc::new(Collector::new(&e.model.config, a.process_output && own_output));
    s.observe(Arc::new({
        let collector = collector.clone();
        move |seen: &_| collector.see(seen)
    }));
    tell_facts(&e, context);
    tell!("imatrix: computing over {n} chunks, n_ctx={context}, batch_size={}, n_seq={n_seq}", a.batch_size);

    let stop = interruptible()?;
    let bar = match a.no_ppl || a.json {
        true => bar(Some((n * context) as u64), "{bar:30} {pos}/{len} tokens {per_sec} {eta}"),
        false => ProgressBar::hidden(),
    };
    let (mut total, mut done, start) = (Score::default(), 0, Instant::now());
    while done < n && !stop.asked() {
        let count = n_seq.min(n - done);
        let scores = match a.no_ppl {
            true => collect::read(&mut s, tokens, done, count).map(|()| Vec::new())?,
            false => score(&mut s, tokens, done, count)?,
        };
        if done == 0 {
            let left = start.elapsed().as_secs_f64() * (n.div_ceil(n_seq) - 1) as f64 / 60.0;
            tell!("imatrix: {:.2} seconds per pass - ETA {left:.2} minutes", start.elapsed().as_secs_f64());
        }
        for (i, s) in scores.iter().enumerate() {
            if !s.nll.is_finite() {
                let (model, chunk) = (e.gguf.path().display(), done + i + 1);
                bail!("{model}: chunk {chunk}: logits that are NaN or infinite");
            }
            total.join(s);
            if !a.json {
                // The file is the result: it does not depend on whether these are read.
                let _ = say_part!("[{}]{:.4},", done + i + 1, total.perplexity());
                let _ = std::io::stdout().flush();
            }
        }
        done += count;
        bar.inc((count * context) as u64);
        // Whether a multiple of the frequency was passed.
        let due = |frequency: u32| done % (frequency as usize) < count;
        if done < n && due(a.output_frequency) {
            joined(known, &collector, a, e.gguf.path(), text)?.write(&a.output, a.output_format)?;
        }
        if a.save_frequency > 0 && due(a.save_frequency) {
            let mut copy = a.output.clone().into_os_string();
            copy.push(format!(".at_{}", known.chunks as usize + done));
            joined(known, &collector, a, e.gguf.path(), text)?.write(copy.as_ref(), a.output_format)?;
        }
    }
    bar.finish_and_clear();
    if !a.no_ppl && !a.json && done > 0 {
        let _ = say!("\nFinal estimate: PPL = {:.4} +/- {:.5}", total.perplexity(), total.error());
    }
    if done == 0 {
        bail!("stopped; nothing was written");
    }
    let m = joined(known, &collector, a, e.gguf.path(), text)?;
    m.write(&a.output, a.output_format)?;
    if done < n {
        bail!("stopped after {done} of {n} chunks, which {} holds", a.output.display());
    }
    report(a, &m, (!a.no_ppl).then_some(total), start.elapsed().as_secs_f64())
}

fn report(a: &Args, m: &Imatrix, score: Option<Score>, seconds: f64) -> anyhow::Result<()> {
    for (name, e) in &m.entries {
        let unseen = e.counts.iter().filter(|&&c| c == 0).count();
        if unseen > 0 {
            tell!("imatrix: {name}: {unseen} of {} experts saw no token", e.counts.len());
        }
    }
    if a.json {
        let result = serde_json::json!({
            "output": a.output, "entries": m.entries.len(), "chunks": m.chunks, "chunk_size": m.chunk_size,
            "datasets": m.datasets, "ppl": score.map(|s| s.perplexity()), "seconds": seconds,
        });
        say!("{result}")?;
    } else {
        say!("{}: {} entries, {} chunks", a.output.display(), m.entries.len(), m.chunks)?;
    }
    Ok(())
}
