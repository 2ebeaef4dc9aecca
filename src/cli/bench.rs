//! `oxcart bench`: llama-bench's flags and columns, and the share of what the machine could do.

mod form;
mod list;

use super::engine::{ComputeArgs, beyond_memory, kv_type, model_type, tokens};
use crate::bench::{Bench, Test, Timing, limits, mean_and_deviation};
use crate::catalog;
use crate::engine::{Engine, SessionOptions};
use crate::gguf::Gguf;
use crate::machine::processor;
use form::{Form, Printer, Row};
use jiff::Timestamp;
use list::{List, list, threads};
use oxcart_quant::attention::KvType;
use std::sync::Arc;
use std::time::Duration;

const LISTS: &str = "\
A LIST is numbers and ranges, separated by commas; ranges are FIRST-LAST, FIRST-LAST+STEP and FIRST-LAST*FACTOR. Flags with
lists may be repeated. All combinations are run.";

/// Flags as llama-bench has them.
#[derive(clap::Args)]
#[command(after_help = LISTS)]
pub struct Args {
    /// Models: GGUF files or names from the catalogue, NAME[:QUANT]; may be repeated [default: SmolLM2-135M-Instruct]
    #[arg(short, long, value_name = "MODEL,..", value_delimiter = ',')]
    model: Vec<String>,
    /// Worker threads; 0: the default [default: all available processors, or those that the flags below choose]
    #[arg(short, long, value_name = "LIST", value_parser = threads, allow_negative_numbers = true, default_value = "0", hide_default_value = true)]
    threads: Vec<List>,
    #[command(flatten)]
    compute: ComputeArgs,
    /// Prompt lengths in tokens
    #[arg(short = 'p', long, value_name = "LIST", default_value = "512", value_parser = list::<0>)]
    n_prompt: Vec<List>,
    /// Numbers of tokens to generate
    #[arg(short = 'n', long, value_name = "LIST", default_value = "128", value_parser = list::<0>)]
    n_gen: Vec<List>,
    /// Prompt and generation, timed together; may be repeated
    #[arg(long, visible_alias = "pg", value_name = "PP,TG", value_parser = pair)]
    n_prompt_gen: Vec<(usize, usize)>,
    /// Tokens already in the context
    #[arg(short = 'd', long, value_name = "LIST", default_value = "0", value_parser = list::<0>)]
    n_depth: Vec<List>,
    /// Logical batch size; upper limit for -ub
    #[arg(short, long, value_name = "LIST", default_value = "2048", value_parser = list::<1>)]
    batch_size: Vec<List>,
    /// Physical batch size: tokens per forward pass
    #[arg(long, visible_alias = "ub", value_name = "LIST", default_value = "512", value_parser = list::<1>)]
    ubatch_size: Vec<List>,
    /// KV cache type for keys
    #[arg(long, visible_alias = "ctk", value_name = "TYPE,..", value_delimiter = ',', default_value = "f16", value_parser = kv_type)]
    cache_type_k: Vec<KvType>,
    /// KV cache type for values
    #[arg(long, visible_alias = "ctv", value_name = "TYPE,..", value_delimiter = ',', default_value = "f16", value_parser = kv_type)]
    cache_type_v: Vec<KvType>,
    /// Repetitions per test
    #[arg(short, long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    repetitions: u32,
    /// Seconds to wait between tests
    #[arg(long, value_name = "S", default_value_t = 0)]
    delay: u32,
    /// Skip the warm-up run
    #[arg(long)]
    no_warmup: bool,
    /// Report progress on stderr
    #[arg(long)]
    progress: bool,
    /// Output format
    #[arg(short, long, value_enum, value_name = "FORM", default_value = "md")]
    output: Form,
    /// Also print the results on stderr, in this format
    #[arg(long, visible_alias = "oe", value_enum, value_name = "FORM")]
    output_err: Option<Form>,
}

fn pair(s: &str) -> Result<(usize, usize), String> {
    let (p, n) = s.split_once(',').ok_or("expected PP,TG")?;
    Ok((tokens(p)?, tokens(n)?))
}

fn all(lists: &[List]) -> impl Iterator<Item = usize> {
    lists.iter().flat_map(|l| l.0.iter().copied())
}

/// What is run on one model with one number of workers.
#[derive(Clone, Copy)]
struct Case {
    test: Test,
    batch: usize,
    o: SessionOptions,
}

impl Args {
    fn cases(&self) -> Vec<Case> {
        let mut tests = Vec::new();
        for depth in all(&self.n_depth) {
            let single = |prompt, generate| Test { prompt, generate, depth };
            tests.extend(all(&self.n_prompt).map(|p| single(p, 0)));
            tests.extend(all(&self.n_gen).map(|n| single(0, n)));
            tests.extend(self.n_prompt_gen.iter().map(|&(p, n)| single(p, n)));
        }
        tests.retain(|t| t.prompt + t.generate > 0);
        let mut cases = Vec::new();
        for batch in all(&self.batch_size) {
            // Above the batch, several are one.
            let mut ubatches = Vec::new();
            for ubatch in all(&self.ubatch_size).map(|n| n.min(batch)) {
                if !ubatches.contains(&ubatch) {
                    ubatches.push(ubatch);
                }
            }
            for ubatch in ubatches {
                for &k_type in &self.cache_type_k {
                    for &v_type in &self.cache_type_v {
                        let o = SessionOptions { context: 0, sequences: 1, ubatch, k_type, v_type };
                        cases.extend(tests.iter().map(|&test| Case { test, batch, o }));
                    }
                }
            }
        }
        cases
    }
}

pub fn run(a: Args) -> anyhow::Result<()> {
    let models: Vec<Option<&str>> = match a.model.is_empty() {
        true => vec![None],
        false => a.model.iter().map(|m| Some(m.as_str())).collect(),
    };
    // Not after hours of the models before it.
    for &model in &models {
        Gguf::open(&catalog::resolve(model)?.path)?;
    }
    let mut out = Printer::new(a.output, std::io::stdout().lock());
    let mut err = a.output_err.map(|form| Printer::new(form, std::io::stderr()));
    let measured = measure_all(&a, &models, |row| {
        // Nobody has to read stderr.
        let _ = err.as_mut().map_or(Ok(()), |err| err.row(row));
        out.row(row)
    });
    // What was measured is told also where the rest fails.
    let _ = err.map_or(Ok(()), Printer::finish);
    let told = out.finish();
    measured?;
    Ok(told?)
}

fn measure_all(
    a: &Args,
    models: &[Option<&str>],
    mut tell_row: impl FnMut(&Row) -> std::io::Result<()>,
) -> anyhow::Result<()> {
    let cases = a.cases();
    let (mut done, of) = (0, models.len() * all(&a.threads).count() * cases.len());
    for &model in models {
        for threads in all(&a.threads) {
            let e = a.compute.open(model, Some(threads))?;
            let mut told = false;
            for case in &cases {
                if done > 0 {
                    std::thread::sleep(Duration::from_secs(a.delay.into()));
                }
                done += 1;
                let progress = |what: &str| {
                    if a.progress {
                        tell!("bench: {done}/{of} {}: {what}", case.test.name());
                    }
                };
                tell_row(&measure(&e, a, case, !std::mem::replace(&mut told, true), progress)?)?;
            }
        }
    }
    Ok(())
}

fn measure(
    e: &Arc<Engine>,
    a: &Args,
    &Case { test, batch, ref o }: &Case,
    first: bool,
    progress: impl Fn(&str),
) -> anyhow::Result<Row> {
    let test_time = Timestamp::now().strftime("%FT%TZ").to_string();
    let mut b = Bench::new(e, test, o)?;
    if first && let Some(divided) = beyond_memory(e) {
        tell!("{divided}");
    }
    if !a.no_warmup {
        // Pages in, caches warm; generation is warm after one token.
        progress("warm-up");
        b.run(Test { prompt: test.prompt, generate: test.generate.min(1), depth: test.depth })?;
    }
    let mut seconds = Vec::new();
    for i in 0..a.repetitions {
        progress(&format!("run {} of {}", i + 1, a.repetitions));
        seconds.push(b.run(test)?);
    }
    let limit = limits(e)?;
    let timing = Timing { test, seconds };
    let (ts, ts_dev) = timing.rate();
    let (ns, ns_dev) = mean_and_deviation(timing.seconds.iter().map(|s| s * 1e9));
    let read = b.n_bytes(test) / ns;
    let tflops = 2.0 * b.n_products(test) / (ns / 1e9) / 1e12;
    let params: u64 = e.gguf.tensors().iter().map(|t| t.n_elements()).sum();
    let size: u64 = e.gguf.tensors().iter().map(|t| t.n_bytes()).sum();
    let isa = e.kernels.label();
    Ok(vec![
        ("build", env!("CARGO_PKG_VERSION").into()),
        ("cpu_info", processor().into()),
        ("isa", isa.into()),
        ("model_filename", e.gguf.path().display().to_string().into()),
        ("model_type", model_type(e).into()),
        ("model_size", size.into()),
        ("model_n_params", params.into()),
        ("n_batch", batch.into()),
        ("n_ubatch", o.ubatch.into()),
        ("n_threads", e.threads().into()),
        ("type_k", o.k_type.name().into()),
        ("type_v", o.v_type.name().into()),
        ("n_prompt", test.prompt.into()),
        ("n_gen", test.generate.into()),
        ("n_depth", test.depth.into()),
        ("test", test.name().into()),
        ("test_time", test_time.into()),
        ("avg_ns", (ns.round() as u64).into()),
        ("stddev_ns", (ns_dev.round() as u64).into()),
        ("avg_ts", ts.into()),
        ("stddev_ts", ts_dev.into()),
        ("samples_ns", timing.seconds.iter().map(|s| (s * 1e9).round() as u64).collect()),
        ("samples_ts", timing.rates().collect()),
        ("gb_per_s", read.into()),
        ("read_probe_gb_per_s", limit.read.into()),
        ("tflops", tflops.into()),
        ("peak_tflops", limit.tops.into()),
    ])
}
