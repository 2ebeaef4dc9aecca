//! `oxcart bench`: llama-bench's flags and columns, and the share of what the machine could do.

use super::engine::{EngineArgs, beyond_memory, kv_type, tokens};
use crate::bench::{Bench, Test, Timing, limits, mean_and_deviation};
use crate::engine::{Engine, SessionOptions};
use anyhow::bail;
use clap::ValueEnum;
use oxcart_quant::attention::KvType;
use std::io::Write;
use std::sync::Arc;

/// Flags as llama-bench has them. Lists are separated by commas; their combinations are run.
#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    engine: EngineArgs,
    /// Tokens of prompts
    #[arg(short = 'p', long, value_name = "N,..", value_delimiter = ',', default_value = "512", value_parser = tokens)]
    n_prompt: Vec<usize>,
    /// Tokens to generate
    #[arg(short = 'n', long, value_name = "N,..", value_delimiter = ',', default_value = "128", value_parser = tokens)]
    n_gen: Vec<usize>,
    /// A prompt and then generation, timed together
    #[arg(long, visible_alias = "pg", value_name = "PP,TG", value_parser = pair)]
    n_prompt_gen: Vec<(usize, usize)>,
    /// Tokens in the context beforehand
    #[arg(short = 'd', long, value_name = "N,..", value_delimiter = ',', default_value = "0", value_parser = tokens)]
    n_depth: Vec<usize>,
    /// Tokens of a batch: the same as -ub here, accepted for llama-bench's sake
    #[arg(short, long, value_name = "N", default_value_t = 2048)]
    batch_size: usize,
    /// Tokens of a forward pass
    #[arg(long, visible_alias = "ub", value_name = "N,..", value_delimiter = ',', default_value = "512", value_parser = tokens)]
    ubatch_size: Vec<usize>,
    /// How the cache stores keys
    #[arg(long, visible_alias = "ctk", value_name = "TYPE,..", value_delimiter = ',', default_value = "f16", value_parser = kv_type)]
    cache_type_k: Vec<KvType>,
    /// How the cache stores values
    #[arg(long, visible_alias = "ctv", value_name = "TYPE,..", value_delimiter = ',', default_value = "f16", value_parser = kv_type)]
    cache_type_v: Vec<KvType>,
    /// Repetitions
    #[arg(short, long, value_name = "N", default_value_t = 5)]
    repetitions: usize,
    /// Form of the results
    #[arg(short, long, value_enum, default_value = "md")]
    output: Form,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Form {
    Md,
    Csv,
    Json,
    Jsonl,
}

fn pair(s: &str) -> Result<(usize, usize), String> {
    let (p, n) = s.split_once(',').ok_or("expected PP,TG")?;
    Ok((tokens(p)?, tokens(n)?))
}

/// One line of the table: names and values, in order.
type Row = Vec<(&'static str, serde_json::Value)>;

pub fn run(a: Args) -> anyhow::Result<()> {
    if a.repetitions == 0 {
        bail!("--repetitions 0: expected at least 1");
    }
    let e = a.engine.open()?;
    let mut tests = Vec::new();
    for &depth in &a.n_depth {
        let single = |prompt, generate| Test { prompt, generate, depth };
        tests.extend(a.n_prompt.iter().map(|&p| single(p, 0)));
        tests.extend(a.n_gen.iter().map(|&n| single(0, n)));
        tests.extend(a.n_prompt_gen.iter().map(|&(p, n)| single(p, n)));
    }
    tests.retain(|t| t.prompt + t.generate > 0);
    let mut out = std::io::stdout().lock();
    let mut rows = Vec::new();
    for &ubatch in &a.ubatch_size {
        for &k_type in &a.cache_type_k {
            for &v_type in &a.cache_type_v {
                for &test in &tests {
                    let o = SessionOptions { context: 0, sequences: 1, ubatch, k_type, v_type };
                    let row = measure(&e, &a, test, &o, rows.is_empty())?;
                    match a.output {
                        Form::Md => markdown(&mut out, &e, &row, &o, rows.is_empty())?,
                        Form::Csv => csv(&mut out, &row, rows.is_empty())?,
                        Form::Jsonl => writeln!(out, "{}", object(&row))?,
                        Form::Json => (),
                    }
                    out.flush()?;
                    rows.push(row);
                }
            }
        }
    }
    if a.output == Form::Json {
        writeln!(out, "{}", serde_json::to_string_pretty(&rows.iter().map(object).collect::<Vec<_>>())?)?;
    }
    Ok(())
}

fn object(row: &Row) -> serde_json::Value {
    serde_json::Value::Object(row.iter().map(|(k, v)| (k.to_string(), v.clone())).collect())
}

fn measure(e: &Arc<Engine>, a: &Args, test: Test, o: &SessionOptions, first: bool) -> anyhow::Result<Row> {
    let mut b = Bench::new(e, test, o)?;
    if first && let Some(divided) = beyond_memory(e) {
        tell!("{divided}");
    }
    // Pages in, caches warm; generation is warm after one token.
    b.run(Test { prompt: test.prompt, generate: test.generate.min(1), depth: test.depth })?;
    let mut seconds = Vec::new();
    for _ in 0..a.repetitions {
        seconds.push(b.run(test)?);
    }
    let limit = limits(e)?;
    let timing = Timing { test, seconds };
    let (ts, ts_dev) = timing.rate();
    let (ns, ns_dev) = mean_and_deviation(timing.seconds.iter().map(|s| s * 1e9));
    let (c, w) = (&e.model.config, &e.model.weights);
    // A forward pass reads the weights once, however many tokens it feeds.
    let passes = test.prompt.div_ceil(b.walk()) + test.generate;
    let read = passes as f64 * w.bytes_per_token(c) as f64 / (ns / 1e9) / 1e9;
    // All but the last token of a prompt go without the output matrix.
    let outputs = test.generate + (test.prompt > 0) as usize;
    let inner = w.parameters_per_token(c) - c.n_vocab * c.dim;
    // And without the last layer behind its keys and values.
    let last = w.parameters_per_layer(c) - c.dim * (c.q_dim() + 2 * c.kv_dim());
    let products = (test.prompt + test.generate) as f64 * inner as f64 + (outputs * c.n_vocab * c.dim) as f64
        - test.prompt.saturating_sub(1) as f64 * last as f64;
    let tflops = 2.0 * products / (ns / 1e9) / 1e12;
    let params: u64 = e.gguf.tensors().iter().map(|t| t.n_elements()).sum();
    let size: u64 = e.gguf.tensors().iter().map(|t| t.n_bytes()).sum();
    let isa = e.kernels.label();
    Ok(vec![
        ("build", env!("CARGO_PKG_VERSION").into()),
        ("isa", isa.into()),
        ("model_filename", e.gguf.path().display().to_string().into()),
        ("model_type", super::engine::model_type(e).into()),
        ("model_size", size.into()),
        ("model_n_params", params.into()),
        ("n_batch", a.batch_size.into()),
        ("n_ubatch", o.ubatch.into()),
        ("n_threads", e.threads().into()),
        ("type_k", o.k_type.name().into()),
        ("type_v", o.v_type.name().into()),
        ("n_prompt", test.prompt.into()),
        ("n_gen", test.generate.into()),
        ("n_depth", test.depth.into()),
        ("test", test.name().into()),
        ("avg_ns", ns.into()),
        ("stddev_ns", ns_dev.into()),
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

fn number(row: &Row, key: &str) -> f64 {
    row.iter().find(|(k, _)| *k == key).and_then(|(_, v)| v.as_f64()).unwrap_or(0.0)
}

fn markdown(out: &mut impl Write, e: &Engine, row: &Row, o: &SessionOptions, first: bool) -> std::io::Result<()> {
    if first {
        writeln!(
            out,
            "| {:<30} | {:>10} | {:>10} | {:<7} | {:>7} | {:>7} | {:>15} | {:>16} | {:>6} | {:>6} | {:>6} | {:>6} |",
            "model", "size", "params", "backend", "threads", "kv", "test", "t/s", "GB/s", "% read", "TFLOPS", "% peak"
        )?;
        writeln!(
            out,
            "| {:-<30} | {:->9}: | {:->9}: | {:-<7} | {:->6}: | {:->7} | {:->14}: | {:->15}: | {:->5}: | {:->5}: | {:->5}: | {:->5}: |",
            "", "", "", "", "", "", "", "", "", "", "", ""
        )?;
    }
    let text = |key: &str| row.iter().find(|(k, _)| *k == key).and_then(|(_, v)| v.as_str()).unwrap_or("").to_string();
    let kv = if o.k_type == o.v_type {
        o.k_type.name().to_string()
    } else {
        format!("{}/{}", o.k_type.name(), o.v_type.name())
    };
    writeln!(
        out,
        "| {:<30} | {:>6.2} GiB | {:>8.2} B | {:<7} | {:>7} | {:>7} | {:>15} | {:>7.2} ± {:>6.2} | {:>6.2} | {:>6.1} | {:>6.3} | {:>6.1} |",
        text("model_type"),
        number(row, "model_size") / (1u64 << 30) as f64,
        number(row, "model_n_params") / 1e9,
        text("isa"),
        e.threads(),
        kv,
        text("test"),
        number(row, "avg_ts"),
        number(row, "stddev_ts"),
        number(row, "gb_per_s"),
        100.0 * number(row, "gb_per_s") / number(row, "read_probe_gb_per_s"),
        number(row, "tflops"),
        100.0 * number(row, "tflops") / number(row, "peak_tflops"),
    )
}

fn csv(out: &mut impl Write, row: &Row, first: bool) -> std::io::Result<()> {
    // A cell holds one value: the samples stay out, as llama-bench's do.
    let cells = || row.iter().filter(|(_, v)| !v.is_array());
    if first {
        writeln!(out, "{}", cells().map(|(k, _)| *k).collect::<Vec<_>>().join(","))?;
    }
    let quoted =
        |v: &serde_json::Value| format!("\"{}\"", v.as_str().map_or_else(|| v.to_string(), |s| s.replace('"', "\"\"")));
    writeln!(out, "{}", cells().map(|(_, v)| quoted(v)).collect::<Vec<_>>().join(","))
}
