//! `oxcart inspect`: what a GGUF holds, and what memory it needs. Works on every architecture and on every type of ggml,
//! also on those that oxcart does not run.

use super::engine::{SessionArgs, file_here};
use super::units::{count, size};
use crate::gguf::{Gguf, MetadataValue, TensorKind, Value, one_line};
use crate::plan::{Geometry, Needs};
use anyhow::{Context, bail};
use serde::Serialize;
use serde_json::json;
use std::collections::HashMap;
use std::io::Write;

/// How many elements of an array the JSON has, where it is not asked for by name.
const FIRST: usize = 6;

/// What to show of which file.
#[derive(clap::Args)]
pub struct Args {
    /// A GGUF file (any part of a split one), or a name from the catalogue, NAME[:QUANT]; nothing is fetched
    #[arg(value_name = "MODEL")]
    model: String,
    /// Show the metadata
    #[arg(long)]
    metadata: bool,
    /// Show the tensors
    #[arg(long)]
    tensors: bool,
    /// Show types, totals and memory; with none of these three flags, everything is shown
    #[arg(long)]
    summary: bool,
    /// Show only the value of this key, in full; may be repeated
    #[arg(long, value_name = "KEY", conflicts_with_all = ["metadata", "tensors", "summary"])]
    key: Vec<String>,
    /// Context size in tokens for the memory estimate; 0: the training context [default: the training context, at most
    /// 4096]
    #[arg(short, long, value_name = "N", value_parser = super::engine::context)]
    ctx_size: Option<usize>,
    #[command(flatten)]
    session: SessionArgs,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

pub fn run(a: Args) -> anyhow::Result<()> {
    let g = Gguf::open(&file_here(&a.model)?)?;
    // First, so that nothing is printed of a file whose numbers are refused.
    let memory = if a.key.is_empty() && sections(&a)[2] { memory(&a, &g)? } else { None };
    let mut out = std::io::BufWriter::new(std::io::stdout().lock());
    if !a.key.is_empty() {
        values(&a, &g, &mut out)?;
    } else if a.json {
        writeln!(out, "{}", whole(&a, &g, memory))?;
    } else {
        text(&a, &g, memory, &mut out)?;
    }
    out.flush()?;
    Ok(())
}

/// The values of the keys asked for, in full.
fn values(a: &Args, g: &Gguf, out: &mut impl Write) -> anyhow::Result<()> {
    let mut object = serde_json::Map::new();
    for key in &a.key {
        let named = || format!("{}: {}: missing", g.path().display(), one_line(key, 200));
        let v = g.value(key).with_context(named)?;
        if a.json {
            object.insert(key.clone(), value_json(v, usize::MAX));
            continue;
        }
        match v {
            Value::Plain(MetadataValue::String(s)) => writeln!(out, "{}", printable(s))?,
            Value::Strings(s) => s.iter().try_for_each(|s| writeln!(out, "{}", one_line(s, usize::MAX)))?,
            Value::Numbers(n) => n.iter().try_for_each(|v| writeln!(out, "{}", Value::Plain(v)))?,
            Value::Plain(MetadataValue::Array(a)) => a.iter().try_for_each(|v| writeln!(out, "{}", whole_value(v)))?,
            Value::Plain(_) => writeln!(out, "{v}")?,
        }
    }
    if a.json {
        writeln!(out, "{}", serde_json::Value::Object(object))?;
    }
    Ok(())
}

/// A value on one line, arrays with all their elements.
fn whole_value(v: &MetadataValue) -> String {
    match v {
        MetadataValue::String(s) => one_line(s, usize::MAX),
        MetadataValue::Array(a) => format!("[{}]", a.iter().map(whole_value).collect::<Vec<_>>().join(", ")),
        v => Value::Plain(v.clone()).to_string(),
    }
}

/// A text of many lines that a terminal takes for text alone.
fn printable(text: &str) -> String {
    text.split('\n').map(|line| one_line(line, usize::MAX)).collect::<Vec<_>>().join("\n")
}

fn value_json(v: &Value, most: usize) -> serde_json::Value {
    match v {
        Value::Strings(s) => s.iter().take(most).collect(),
        Value::Numbers(n) => n.iter().take(most).map(|v| plain_json(&v, most)).collect(),
        Value::Plain(v) => plain_json(v, most),
    }
}

fn plain_json(v: &MetadataValue, most: usize) -> serde_json::Value {
    match v {
        MetadataValue::Bool(b) => json!(b),
        MetadataValue::String(s) => json!(s),
        // By its shortest decimal: 1e-6, not the f64 next to the f32.
        MetadataValue::F32(x) => json!(x.to_string().parse::<f64>().ok()),
        MetadataValue::F64(x) => json!(x),
        MetadataValue::Array(a) => a.iter().take(most).map(|v| plain_json(v, most)).collect(),
        _ => v.as_u64().map(|u| json!(u)).or_else(|| v.as_i64().map(|i| json!(i))).unwrap_or_default(),
    }
}

/// All tensors of one type.
#[derive(Serialize)]
struct Type {
    #[serde(rename = "type")]
    name: String,
    tensors: usize,
    weights: u64,
    bytes: u64,
    bits_per_weight: f64,
    /// Whether oxcart computes with it.
    supported: bool,
}

/// Types by the bytes that they take, most first.
fn types(g: &Gguf) -> Vec<Type> {
    let mut by_kind: HashMap<TensorKind, (usize, u64, u64)> = HashMap::new();
    for t in g.tensors() {
        let sum = by_kind.entry(t.kind).or_default();
        *sum = (sum.0 + 1, sum.1 + t.n_elements(), sum.2 + t.n_bytes());
    }
    let mut all: Vec<Type> = by_kind
        .into_iter()
        .map(|(kind, (tensors, weights, bytes))| Type {
            name: kind.name(),
            tensors,
            weights,
            bytes,
            bits_per_weight: bits(bytes, weights),
            supported: kind.format().is_some(),
        })
        .collect();
    all.sort_by(|a, b| b.bytes.cmp(&a.bytes).then_with(|| a.name.cmp(&b.name)));
    all
}

fn bits(bytes: u64, weights: u64) -> f64 {
    if weights == 0 { 0.0 } else { bytes as f64 * 8.0 / weights as f64 }
}

/// Weights and their bytes, of all tensors.
fn totals(g: &Gguf) -> (u64, u64) {
    g.tensors().iter().fold((0, 0), |(w, b), t| (w + t.n_elements(), b + t.n_bytes()))
}

/// Memory at the context asked for; `None` for files without a model in them.
fn memory(a: &Args, g: &Gguf) -> anyhow::Result<Option<Needs>> {
    let Some(geo) = Geometry::of(g)? else { return Ok(None) };
    let context = geo.context(a.ctx_size.map(|n| n as u64));
    let session = a.session.options(usize::try_from(context)?, 1);
    match Needs::of(&geo, totals(g).1, context, &session) {
        None => bail!("{}: memory at a context of {context}: more than 2^64 bytes", g.path().display()),
        needs => Ok(needs),
    }
}

/// Which sections are shown: metadata, tensors, summary.
fn sections(a: &Args) -> [bool; 3] {
    let asked = [a.metadata, a.tensors, a.summary];
    if asked == [false; 3] { [true; 3] } else { asked }
}

fn whole(a: &Args, g: &Gguf, memory: Option<Needs>) -> serde_json::Value {
    let [metadata, tensors, summary] = sections(a);
    let mut o = json!({
        "file": g.path(), "parts": g.parts(), "version": g.version(), "alignment": g.alignment(),
        "file_bytes": g.file_size(),
    });
    if metadata {
        let entries = g.metadata().map(|(k, v)| {
            let mut entry = json!({ "type": v.type_name() });
            match v.array_len() {
                Some(len) => {
                    entry["len"] = json!(len);
                    entry["first"] = value_json(v, FIRST);
                }
                None => entry["value"] = value_json(v, FIRST),
            }
            (k.to_string(), entry)
        });
        o["metadata"] = serde_json::Value::Object(entries.collect());
    }
    if tensors {
        let list = g.tensors().iter().map(
            |t| json!({ "name": t.name, "dims": t.dims, "type": t.kind.name(), "weights": t.n_elements(), "bytes": t.n_bytes() }),
        );
        o["tensors"] = list.collect();
    }
    if summary {
        let (weights, bytes) = totals(g);
        o["types"] = json!(types(g));
        o["parameters"] = json!(weights);
        o["tensor_bytes"] = json!(bytes);
        o["bits_per_weight"] = json!(bits(bytes, weights));
        o["memory"] = json!(memory);
    }
    o
}

/// A table: every column as wide as its widest cell, numbers to the right.
#[derive(Default)]
struct Table {
    rows: Vec<Vec<String>>,
}

impl Table {
    fn row<const N: usize>(&mut self, cells: [&dyn std::fmt::Display; N]) {
        self.rows.push(cells.iter().map(|c| c.to_string()).collect());
    }

    /// `right` tells of each column whether it ends rather than begins at a common edge.
    fn write(&self, out: &mut impl Write, right: &[bool]) -> std::io::Result<()> {
        let wide = |s: &str| s.chars().count();
        let width = |i: usize| self.rows.iter().filter_map(|r| r.get(i)).map(|c| wide(c)).max().unwrap_or(0);
        let widths: Vec<usize> = (0..right.len()).map(width).collect();
        for row in &self.rows {
            let mut line = String::new();
            for ((cell, &width), &right) in row.iter().zip(&widths).zip(right) {
                let gap = " ".repeat(width - wide(cell));
                let (before, after) = if right { (gap.as_str(), "") } else { ("", gap.as_str()) };
                line.extend(["  ", before, cell, after]);
            }
            writeln!(out, "{}", line.trim_end())?;
        }
        Ok(())
    }
}

fn text(a: &Args, g: &Gguf, memory: Option<Needs>, out: &mut impl Write) -> std::io::Result<()> {
    let [metadata, tensors, summary] = sections(a);
    let files = if g.parts().len() > 1 { format!(", {} files", g.parts().len()) } else { String::new() };
    let file = one_line(&g.path().display().to_string(), usize::MAX);
    writeln!(out, "{file}: GGUF version {}, {}{files}", g.version(), size(g.file_size()))?;
    if metadata {
        writeln!(out, "\nmetadata: {} keys", g.metadata().count())?;
        let mut table = Table::default();
        for (k, v) in g.metadata() {
            table.row([&one_line(k, 60), &v.type_name(), v]);
        }
        table.write(out, &[false, false, false])?;
    }
    if tensors {
        writeln!(out, "\ntensors: {}", count(g.tensors().len() as u64))?;
        let mut table = Table::default();
        let columns = g.tensors().iter().map(|t| t.dims[0].to_string().len()).max().unwrap_or(0);
        for t in g.tensors() {
            let more: String = t.dims[1..].iter().map(|d| format!(" x {d}")).collect();
            let dims = format!("{:columns$}{more}", t.dims[0]);
            table.row([&one_line(&t.name, 60), &t.kind.name(), &dims, &size(t.n_bytes())]);
        }
        table.write(out, &[false, false, false, true])?;
    }
    if summary {
        let (weights, bytes) = totals(g);
        let mut table = Table::default();
        table.row([&"type", &"tensors", &"weights", &"size", &"share", &"bits", &""]);
        for t in types(g) {
            let share = format!("{:.1} %", t.bytes as f64 * 100.0 / bytes as f64);
            let note = if t.supported { "" } else { "oxcart does not compute with this type" };
            let (weights, bits) = (count(t.weights), format!("{:.4}", t.bits_per_weight));
            table.row([&t.name, &t.tensors, &weights, &size(t.bytes), &share, &bits, &note]);
        }
        let all = format!("{:.4}", bits(bytes, weights));
        table.row([&"all", &g.tensors().len(), &count(weights), &size(bytes), &"", &all, &""]);
        writeln!(out, "\ntypes and totals")?;
        table.write(out, &[false, true, true, true, true, true, false])?;
        if let Some(m) = memory {
            let trained = m.trained_context.map_or(String::new(), |n| format!(" (trained for {n})"));
            writeln!(out, "\nmemory at a context of {}{trained}", m.context)?;
            let mut table = Table::default();
            table.row([&"weights", &size(m.weights), &"mapped from the file"]);
            let each =
                format!("keys {}, values {}: {} a token", m.cache_type_k, m.cache_type_v, size(m.kv_cache_per_token));
            table.row([&"KV cache", &size(m.kv_cache), &each]);
            let batch = format!("about, for batches of {} tokens", a.session.ubatch_size);
            table.row([&"buffers", &size(m.buffers), &batch]);
            table.row([&"all", &size(m.total), &""]);
            table.write(out, &[false, true, false])?;
        }
    }
    Ok(())
}
