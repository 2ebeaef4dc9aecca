//! `oxcart list`: the models of the catalogue, and which of them are on this machine.

use crate::catalog::catalog;
use crate::plan::file_bytes;
use serde_json::{Value, json};
use std::io::Write;

/// Options.
#[derive(clap::Args)]
pub struct Args {
    /// List only models on this machine
    #[arg(long)]
    here: bool,
    /// Print one JSON object with the whole catalogue
    #[arg(long)]
    json: bool,
}

pub fn run(a: Args) -> anyhow::Result<()> {
    let c = catalog();
    let mut out = std::io::BufWriter::new(std::io::stdout().lock());
    let mut models = Vec::new();
    if !a.json {
        writeln!(out, "{:<32} {:>10}  HERE", "NAME:QUANT", "SIZE")?;
    }
    for m in &c.models {
        let mut entry = serde_json::to_value(m)?;
        let mut files = Vec::new();
        for f in &m.files {
            let local = m.local(f)?;
            if a.here && local.is_none() {
                continue;
            }
            if a.json {
                let mut file = serde_json::to_value(f)?;
                file["here"] = local.map_or(Value::Null, |l| json!(l.parts));
                files.push(file);
                continue;
            }
            let gb = |b: u64| b as f64 / 1e9;
            let known = f.bytes.or(local.as_ref().map(|l| l.bytes())).map(|b| format!("{:.2} GB", gb(b)));
            let about = || file_bytes(m, f).map(|b| format!("~{:.1} GB", gb(b)));
            let size = known.or_else(about).unwrap_or_else(|| "?".into());
            let place = local.map(|l| l.parts[0].display().to_string()).unwrap_or_default();
            let line = format!("{:<32} {size:>10}  {place}", format!("{}:{}", m.name, f.quant));
            writeln!(out, "{}", line.trim_end())?;
        }
        if !files.is_empty() {
            entry["file"] = files.into();
            models.push(entry);
        }
    }
    if a.json {
        writeln!(out, "{}", json!({"default": c.default, "model": models}))?;
    }
    out.flush()?;
    Ok(())
}
