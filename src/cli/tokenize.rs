//! `oxcart tokenize`: the token ids of a text.

use super::engine::{file_here, items};
use super::text::EscapeArgs;
use crate::catalog;
use crate::disk;
use crate::engine::tokenizer;
use crate::gguf::Gguf;
use anyhow::Context;
use std::io::Write;
use std::path::PathBuf;

/// Flags as llama-tokenize has them.
#[derive(clap::Args)]
pub struct Args {
    /// A GGUF file (one with only a vocabulary will do), or a name from the catalogue, NAME[:QUANT]; nothing is fetched
    /// [default: SmolLM2-135M-Instruct]
    #[arg(short, long, value_name = "MODEL")]
    model: Option<String>,
    /// The text
    #[arg(short, long, value_name = "TEXT", conflicts_with = "file")]
    prompt: Option<String>,
    /// Read the text from a file; without -f and -p, from stdin
    #[arg(short, long, value_name = "FILE")]
    file: Option<PathBuf>,
    #[command(flatten)]
    escapes: EscapeArgs,
    /// Print only the ids, as a list
    #[arg(long, conflicts_with = "json")]
    ids: bool,
    /// Do not add BOS and EOS
    #[arg(long)]
    no_bos: bool,
    /// Treat control tokens in the text as plain text
    #[arg(long)]
    no_parse_special: bool,
    /// Print the number of tokens at the end
    #[arg(long)]
    show_count: bool,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
    /// Override metadata: KEY=TYPE:VALUE with TYPE int, float, bool or str; several are separated by commas; may be
    /// repeated
    #[arg(long, value_name = "KEY=TYPE:VALUE,..")]
    override_kv: Vec<String>,
}

pub fn run(a: Args) -> anyhow::Result<()> {
    let model = a.model.as_ref().unwrap_or(&catalog::catalog().default);
    let mut g = Gguf::open(&file_here(model)?)?;
    for spec in a.override_kv.iter().flat_map(|list| items(list)) {
        g.override_kv(&spec)?;
    }
    let t = tokenizer(&g)?;
    t.notes().iter().for_each(|n| tell!("{n}"));
    let text = match (&a.prompt, &a.file) {
        (Some(p), _) => a.escapes.bytes(p),
        (None, Some(f)) => disk::read(f, disk::MOST_TEXT).with_context(|| f.display().to_string())?,
        (None, None) => disk::read_from(std::io::stdin(), disk::MOST_TEXT).context("stdin")?,
    };
    let named = || a.file.as_ref().map_or("the text".into(), |f| f.display().to_string());
    let ids = t.encode(&text, !a.no_bos, !a.no_parse_special).with_context(named)?;
    let piece = |id: u32| String::from_utf8_lossy(t.piece(id)).into_owned();
    let mut out = std::io::BufWriter::new(std::io::stdout().lock());
    if a.json {
        let tokens: Vec<_> = ids.iter().map(|&id| serde_json::json!({"id": id, "piece": piece(id)})).collect();
        writeln!(out, "{}", serde_json::json!({"count": ids.len(), "tokens": tokens}))?;
    } else if a.ids {
        let ids: Vec<String> = ids.iter().map(u32::to_string).collect();
        writeln!(out, "[{}]", ids.join(", "))?;
    } else {
        for &id in &ids {
            writeln!(out, "{id:6} -> {:?}", piece(id))?;
        }
    }
    if a.show_count && !a.json {
        writeln!(out, "Total number of tokens: {}", ids.len())?;
    }
    out.flush()?;
    Ok(())
}
