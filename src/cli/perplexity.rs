//! `oxcart perplexity`: how well a model predicts a text, with llama-perplexity's flags and lines.

use super::engine::{EngineArgs, SessionArgs, facts};
use crate::perplexity::{Score, chunks, score};
use anyhow::{Context, bail};
use std::io::{IsTerminal, Write};
use std::path::PathBuf;
use std::time::Instant;

/// Flags as llama-perplexity has them.
#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    engine: EngineArgs,
    #[command(flatten)]
    session: SessionArgs,
    /// The text
    #[arg(short, long, value_name = "FILE")]
    file: PathBuf,
    /// Tokens of a chunk
    #[arg(short, long, value_name = "N", default_value_t = 512)]
    ctx_size: usize,
    /// Tokens of a batch: so many chunks are computed together as it holds
    #[arg(short, long, value_name = "N", default_value_t = 2048)]
    batch_size: usize,
    /// Score only the first N chunks
    #[arg(long, value_name = "N")]
    chunks: Option<usize>,
    /// Print one JSON object with the score of every chunk
    #[arg(long)]
    json: bool,
}

pub fn run(a: Args) -> anyhow::Result<()> {
    if a.ctx_size < 4 {
        bail!("--ctx-size {}: expected at least 4", a.ctx_size);
    }
    let e = a.engine.open()?;
    let text = std::fs::read(&a.file).with_context(|| a.file.display().to_string())?;
    let start = Instant::now();
    eprintln!("perplexity: tokenizing the input ..");
    let tokens = e.tokenizer.encode(&text, true, false).with_context(|| a.file.display().to_string())?;
    eprintln!("perplexity: tokenization took {:.3} ms", start.elapsed().as_secs_f64() * 1e3);
    let n = chunks(tokens.len(), a.ctx_size).with_context(|| a.file.display().to_string())?;
    let n = a.chunks.map_or(n, |limit| limit.min(n));
    let n_seq = (a.batch_size / a.ctx_size).clamp(1, n.max(1));
    let mut s = e.session(&a.session.options(a.ctx_size, n_seq))?;
    eprintln!("{}", facts(&e, a.ctx_size));
    eprintln!(
        "perplexity: calculating perplexity over {n} chunks, n_ctx={}, batch_size={}, n_seq={n_seq}",
        a.ctx_size, a.batch_size
    );
    let (mut total, mut each): (Score, Vec<Score>) = Default::default();
    let start = Instant::now();
    for first in (0..n).step_by(n_seq) {
        let count = n_seq.min(n - first);
        for s in score(&mut s, &tokens, first, count)? {
            total.join(&s);
            each.push(s);
            if !a.json {
                print!("[{}]{:.4},", each.len(), total.perplexity());
                std::io::stdout().flush()?;
            }
        }
        if first == 0 {
            let pass = start.elapsed().as_secs_f64();
            let left = pass * (n.div_ceil(n_seq) - 1) as f64 / 60.0;
            eprintln!("perplexity: {pass:.2} seconds per pass - ETA {left:.2} minutes");
        }
    }
    let seconds = start.elapsed().as_secs_f64();
    if a.json {
        let per_chunk: Vec<_> = each.iter().map(|s| s.nll / s.count as f64).collect();
        let result = serde_json::json!({
            "model": e.gguf.path(), "file": a.file, "n_ctx": a.ctx_size, "chunks": n, "tokens_scored": total.count,
            "ppl": total.perplexity(), "ppl_error": total.error(), "chunk_nll": per_chunk, "seconds": seconds,
        });
        println!("{result}");
    } else {
        println!("\nFinal estimate: PPL = {:.4} +/- {:.5}", total.perplexity(), total.error());
    }
    if std::io::stderr().is_terminal() {
        eprintln!("{:.2} tokens per second", (n * a.ctx_size) as f64 / seconds);
    }
    Ok(())
}
