//! `oxcart compare`: models side by side on one text, the first as the reference: size, perplexity, divergence, speed.

use super::engine::{ComputeArgs, SessionArgs, tell_facts};
use super::perplexity::run::{Run, Work};
use super::perplexity::{check_memory, tokens};
use super::text::note_bytes;
use super::units::gib;
use crate::disk;
use crate::engine::{Session, common_prefix};
use crate::perplexity::compare::{Contender, add, group, kept_bytes, whose};
use crate::perplexity::plot::{Point, svg};
use crate::perplexity::state::Key;
use crate::perplexity::{chunks, report};
use anyhow::{Context, bail};
use clap::ValueEnum;
use serde_json::json;
use std::io::{IsTerminal, stdout};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

const FIELDS: &str = "\
Output:
  size is of the tensors, in GiB (2^30 bytes); bpw are their bits per weight; PPL is the perplexity, ± its standard error;
  KLD is the mean Kullback-Leibler divergence from the reference in nats, 99% KLD its 99th percentile; same top is the
  share of positions at which both models agree on the most probable token; t/s are tokens evaluated per second.
  csv and json have every figure at full precision: errors are standard errors, shares fractions of 1.
  json: {file, n_ctx, chunks, models: [{model, size_bytes, bits_per_weight, ppl, ppl_error, tokens_per_second,
  divergence}]}; the reference's divergence is null, another's is the object that
  `oxcart perplexity --kl-divergence --json` prints.";

/// Which models, which text.
#[derive(clap::Args)]
#[command(after_long_help = FIELDS)]
pub struct Args {
    /// Models: GGUF files or names from the catalogue. The first is the reference
    #[arg(value_name = "MODEL", required = true, num_args = 2..)]
    models: Vec<String>,
    /// The text
    #[arg(short, long, value_name = "FILE")]
    file: PathBuf,
    /// Chunk size in tokens
    #[arg(short, long, value_name = "N", default_value_t = 512, value_parser = super::engine::chunk)]
    ctx_size: usize,
    /// Batch size in tokens; chunks are evaluated in batches of N tokens, one model after another
    #[arg(short, long, value_name = "N", default_value_t = 512, value_parser = super::engine::batch)]
    batch_size: usize,
    /// Compare only on the first N chunks
    #[arg(long, value_name = "N", value_parser = super::engine::limit, allow_negative_numbers = true)]
    chunks: Option<usize>,
    #[command(flatten)]
    session: SessionArgs,
    /// Worker threads [default: all available processors]
    #[arg(short, long, value_name = "N", value_parser = super::engine::threads, allow_negative_numbers = true)]
    threads: Option<usize>,
    /// Instruction set: scalar, avx2, avxvnni, avx512, amx; exact: f32 throughout; ggml: f32 with activations quantized as
    /// in llama.cpp, to reproduce its figures [default: the best this machine has]
    #[arg(long, value_name = "ISA", env = "OXCART_ISA")]
    isa: Option<String>,
    /// Output format
    #[arg(short, long, value_enum, default_value_t = Form::Md)]
    output: Form,
    /// Resume an interrupted comparison of the same models on the same text
    #[arg(long)]
    resume: bool,
    /// Plot divergence against size, as SVG
    #[arg(long, value_name = "FILE")]
    plot: Option<PathBuf>,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Form {
    Md,
    Csv,
    Json,
}

pub fn run(a: Args) -> anyhow::Result<()> {
    if let Some(plot) = &a.plot {
        // Now, not after the work.
        disk::target(plot).with_context(|| plot.display().to_string())?;
    }
    let name = a.file.display().to_string();
    let bytes = disk::read(&a.file, disk::MOST_TEXT).with_context(|| name.clone())?;
    note_bytes(&name, &bytes);
    let mut models: Vec<Contender> = Vec::new();
    let mut text = Vec::new();
    for model in &a.models {
        let e = ComputeArgs { isa: a.isa.clone(), ..ComputeArgs::default() }.open(Some(model), a.threads)?;
        tell_facts(&e, a.ctx_size);
        let encoded = tokens("compare", &e, &bytes, false).with_context(|| name.clone())?;
        if let Some(first) = models.first() {
            let (n, found) = (first.engine().model.config.n_vocab, e.model.config.n_vocab);
            if n != found {
                bail!("{model}: a vocabulary of {found} tokens, the reference has {n}");
            }
            if encoded != text {
                let at = common_prefix(&text, &encoded);
                bail!("{model}: tokenizes the text differently from the reference, from token {at} on");
            }
        }
        text = encoded;
        models.push(Contender::new(e));
    }
    let n = chunks(text.len(), a.ctx_size).with_context(|| name.clone())?;
    let n = a.chunks.map_or(n, |limit| n.min(limit));
    let n_seq = (a.batch_size / a.ctx_size).clamp(1, n);
    let o = a.session.options(a.ctx_size, n_seq);
    let mut sessions: Vec<Session> = models.iter().map(|m| m.engine().session(&o)).collect::<Result<_, _>>()?;
    let engines: Vec<_> = models.iter().map(Contender::engine).collect();
    let caches: u64 = sessions.iter().map(|s| s.cache_bytes() as u64).sum();
    check_memory(&engines, caches + kept_bytes(a.ctx_size, engines[0].model.config.n_vocab, n_seq))?;
    let work = Work { verb: "compare", unit: "chunk", total: n, group: n_seq };
    let mut run = Run::start(&key(&a, &models, &text, n), a.resume, work)?;
    let files: Vec<PathBuf> = models.iter().map(|m| m.engine().gguf.path().to_path_buf()).collect();
    run.drive(
        |at| &files[whose(a.ctx_size, at)],
        |first, count| Ok(group(&mut sessions, &text, first, count)?),
        |_, _, record| {
            add(&mut models, a.ctx_size, record);
            Ok(ControlFlow::Continue(()))
        },
    )?;
    if let Some(path) = &a.plot {
        let names = labels(&models);
        let point = |(m, name): (&Contender, &String)| {
            let kld = m.divergence.kld();
            Point { name: name.clone(), size: gib(m.size()), kld: (kld.value, kld.error) }
        };
        let points: Vec<Point> = models.iter().zip(&names).skip(1).map(point).collect();
        let title = format!("divergence from {}", names[0]);
        disk::write(path, svg(&title, &points).as_bytes()).with_context(|| path.display().to_string())?;
    }
    run.done()?;
    match a.output {
        Form::Md => {
            let table = markdown(&models);
            let wide = table.lines().next().map_or(0, |l| l.chars().count());
            match terminal_width().filter(|&columns| columns < wide) {
                Some(columns) => say_part!("{}", narrow(&models, columns))?,
                None => say_part!("{table}")?,
            }
        }
        Form::Csv => csv(&models)?,
        Form::Json => say!("{}", object(&a, &models, n))?,
    }
    Ok(())
}

/// What makes a comparison the same one.
fn key(a: &Args, models: &[Contender], text: &[u32], n: usize) -> Key {
    let mut key = Key::of(&models[0].engine().gguf);
    models[1..].iter().for_each(|m| key.add_model(&m.engine().gguf));
    let kernels = models[0].engine().kernels;
    let isa = kernels.label();
    let (k, v) = (a.session.cache_type_k.name(), a.session.cache_type_v.name());
    let sizes = (models.len(), a.ctx_size, a.batch_size, a.session.ubatch_size, n);
    key.add(format!("compare {isa} {k} {v} {sizes:?}"));
    key.add_tokens(text);
    key
}

/// The models' files, without ending, and with their folder where names are equal otherwise.
fn labels(models: &[Contender]) -> Vec<String> {
    let paths: Vec<&Path> = models.iter().map(|m| m.engine().gguf.path()).collect();
    let twin = |a: &&Path| paths.iter().any(|b| b != a && b.file_stem() == a.file_stem());
    let label = |path: &&Path| {
        let stem = PathBuf::from(path.file_stem().unwrap_or_default());
        let folder = path.parent().and_then(Path::file_name).filter(|_| twin(path));
        folder.map_or(stem.clone(), |f| Path::new(f).join(&stem)).display().to_string()
    };
    paths.iter().map(label).collect()
}

/// Columns of the terminal that stdout is, if it is one.
fn terminal_width() -> Option<usize> {
    let out = stdout();
    let size = out.is_terminal().then(|| rustix::termios::tcgetwinsize(&out).ok())??;
    (size.ws_col > 0).then_some(size.ws_col as usize)
}

fn markdown(models: &[Contender]) -> String {
    let names: Vec<String> = labels(models);
    let wide = names.iter().map(|n| n.chars().count()).max().unwrap_or(0).max("model".len());
    let mut out = format!(
        "| {:wide$} | {:>9} | {:>5} | {:>19} | {:>19} | {:>8} | {:>15} | {:>8} |\n",
        "model", "size, GiB", "bpw", "PPL", "mean KLD", "99% KLD", "same top, %", "t/s"
    );
    out += &format!(
        "| {:-<wide$} | {:->8}: | {:->4}: | {:->18}: | {:->18}: | {:->7}: | {:->14}: | {:->7}: |\n",
        "", "", "", "", "", "", "", ""
    );
    for (i, (m, name)) in models.iter().zip(names).enumerate() {
        let (kld, percentile, same) = if i == 0 {
            ("reference".into(), String::new(), String::new())
        } else {
            let (kld, same) = (m.divergence.kld(), m.divergence.same_top());
            (
                format!("{} ± {:.6}", millionths(kld.value), kld.error),
                format!("{:.5}", m.divergence.klds().at(0.99)),
                format!("{:.2} ± {:.2}", 100.0 * same.value, 100.0 * same.error),
            )
        };
        let ppl = format!("{:.4} ± {:.4}", m.score.perplexity(), m.score.error());
        out += &format!(
            "| {name:wide$} | {:9.3} | {:5.2} | {ppl:>19} | {kld:>19} | {percentile:>8} | {same:>15} | {:8.1} |\n",
            gib(m.size()),
            m.bits_per_weight(),
            m.rate()
        );
    }
    out
}

/// A figure with six digits. Of a model against itself rounding may leave a little less than nothing: no sign for that.
fn millionths(x: f64) -> String {
    format!("{:.6}", (x * 1e6).round() / 1e6 + 0.0)
}

/// The same without errors and percentiles, in so many columns; of names that are longer, the end.
fn narrow(models: &[Contender], columns: usize) -> String {
    const FIGURES: usize = 56;
    let names: Vec<String> = labels(models);
    let longest = names.iter().map(|n| n.chars().count()).max().unwrap_or(0).max("model".len());
    let wide = longest.min(columns.saturating_sub(FIGURES)).max(8);
    let mut out = format!("{:wide$}  size, GiB   bpw       PPL  mean KLD  same top      t/s\n", "model");
    for (i, (m, name)) in models.iter().zip(names).enumerate() {
        let cut = name.chars().count().saturating_sub(wide);
        let name = if cut == 0 { name } else { format!("…{}", name.chars().skip(cut + 1).collect::<String>()) };
        let (kld, same) = if i == 0 {
            ("reference".into(), String::new())
        } else {
            let (kld, same) = (m.divergence.kld().value, m.divergence.same_top().value);
            (millionths(kld), format!("{:.2} %", 100.0 * same))
        };
        out += &format!(
            "{name:wide$}  {:9.3} {:5.2} {:9.4} {kld:>9} {same:>9} {:8.1}\n",
            gib(m.size()),
            m.bits_per_weight(),
            m.score.perplexity(),
            m.rate()
        );
    }
    out + "errors and percentiles: in a wider terminal, or with -o csv\n"
}

fn csv(models: &[Contender]) -> std::io::Result<()> {
    say!(
        "model,size_bytes,bits_per_weight,ppl,ppl_error,kld,kld_error,kld_99,same_top,same_top_error,tokens_per_second"
    )?;
    for (i, m) in models.iter().enumerate() {
        let name = m.engine().gguf.path().display().to_string().replace('"', "\"\"");
        let (ppl, error) = (m.score.perplexity(), m.score.error());
        say_part!("\"{name}\",{},{},{ppl},{error},", m.size(), m.bits_per_weight())?;
        if i == 0 {
            say_part!(",,,,")?;
        } else {
            let (kld, same) = (m.divergence.kld(), m.divergence.same_top());
            let percentile = m.divergence.klds().at(0.99);
            say_part!("{},{},{percentile},{},{}", kld.value, kld.error, same.value, same.error)?;
        }
        say!(",{}", m.rate())?;
    }
    Ok(())
}

fn object(a: &Args, models: &[Contender], n: usize) -> serde_json::Value {
    let model = |(i, m): (usize, &Contender)| {
        json!({
            "model": m.engine().gguf.path(), "size_bytes": m.size(), "bits_per_weight": m.bits_per_weight(),
            "ppl": m.score.perplexity(), "ppl_error": m.score.error(), "tokens_per_second": m.rate(),
            "divergence": (i > 0).then(|| report::object(&m.divergence)),
        })
    };
    let models: Vec<_> = models.iter().enumerate().map(model).collect();
    json!({"file": a.file, "n_ctx": a.ctx_size, "chunks": n, "models": models})
}
