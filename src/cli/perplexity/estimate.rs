//! Perplexity by chunks, and the writing of a base file.

use super::Args;
use crate::cli::engine::tell_facts;
use crate::cli::units::size;
use crate::cli::usage_error;
use crate::disk::{folder, free_space};
use crate::engine::Engine;
use crate::perplexity::base::{BaseWriter, Layout};
use crate::perplexity::{Score, chunk, chunks, nll, row, rows};
use anyhow::{Context, bail};
use std::ops::ControlFlow;
use std::path::Path;

pub fn run(a: &Args) -> anyhow::Result<()> {
    let context = a.context();
    if a.kl_divergence_base.is_some() && a.until_error.is_some() {
        usage_error("--until-error: a base file has all its chunks, expected one or the other");
    }
    let e = a.engine.open()?;
    let tokens = a.tokens(&e)?;
    let n = chunks(tokens.len(), context).with_context(|| a.name())?;
    let n = a.chunks.map_or(n, |limit| n.min(limit));
    let mut s = a.session(&e, context, a.n_seq(context).min(n))?;
    let group = a.together(&e, context);
    tell_facts(&e, context);
    let tokens = &tokens[..n * context];
    let layout = layout(a, &e, context, n)?;
    let mut key = a.key(&e, "perplexity");
    key.add_tokens(tokens);
    key.add(format!("{layout:?} {:?}", a.kl_divergence_base));
    let mut run = a.start(&key, "chunk", n, group)?;
    let resumed = run.resumed();
    let writer = match &a.kl_divergence_base {
        None => None,
        Some(path) if resumed > 0 => Some(BaseWriter::resume(path, layout, tokens)?),
        Some(path) => {
            tell!("perplexity: saving all logits to {}", path.display());
            check_space(path, &layout)?;
            Some(BaseWriter::create(path, layout, tokens)?)
        }
    };
    let batch = a.batch_size.min(group * context);
    tell!("perplexity: calculating perplexity over {n} chunks, n_ctx={context}, batch_size={batch}, n_seq={group}");
    let ops = e.kernels.ops;
    let (mut total, mut each) = (Score::default(), Vec::new());
    run.drive(
        |_| e.gguf.path(),
        |first, count| {
            let value = |i: usize, next: u32, logits: &[f32]| match &writer {
                None => Ok(nll(ops, logits, next)),
                Some(w) => w.put(ops, first * rows(context) + i, logits, next),
            };
            let nlls = chunk::collect(&mut s, tokens, context, first, count, value)?;
            // What the state counts as done is in the file.
            writer.as_ref().map_or(Ok(()), BaseWriter::sync)?;
            Ok(nlls.chunks(rows(context)).map(<[f64]>::to_vec).collect())
        },
        |progress, i, nlls| {
            writer.iter().for_each(BaseWriter::stays);
            total.join(&Score::of(nlls));
            each.push(Score::of(nlls).mean().0);
            match (a.json, a.ppl_output_type) {
                (true, _) => {}
                (_, 0) => progress.value(&format!("[{}]{:.4},", i + 1, total.perplexity()))?,
                _ => {
                    let (mean, error) = total.mean();
                    // llama-perplexity numbers the chunks of a batch alike.
                    let n_seq = a.n_seq(context);
                    let first = i / n_seq * n_seq * context;
                    progress.line(&format!("{first:8}  {:.4}  {mean:4.6}  {error:4.6}", total.perplexity()))?;
                }
            }
            let narrow = a.until_error.is_some_and(|x| total.error() <= x);
            Ok(if narrow { ControlFlow::Break(()) } else { ControlFlow::Continue(()) })
        },
    )?;
    writer.map_or(Ok(()), BaseWriter::finish)?;
    run.done()?;
    let seconds = run.progress.seconds();
    if a.json {
        let result = serde_json::json!({
            "model": e.gguf.path(), "file": a.file, "n_ctx": context, "chunks": each.len(), "tokens_scored": total.count,
            "ppl": total.perplexity(), "ppl_error": total.error(), "chunk_nll": each, "seconds": seconds,
        });
        say!("{result}")?;
    } else {
        say!("\nFinal estimate: PPL = {:.4} +/- {:.5}", total.perplexity(), total.error())?;
    }
    let computed = each.len().saturating_sub(resumed) * context;
    tell!("{:.2} tokens per second", computed as f64 / seconds);
    Ok(())
}

fn layout(a: &Args, e: &Engine, n_ctx: usize, n_chunk: usize) -> anyhow::Result<Layout> {
    let n_vocab = e.model.config.n_vocab;
    let top = match a.kl_divergence_base_compact {
        Some(0) => Some(row::default_top(n_vocab)),
        Some(k) if k >= n_vocab => bail!("--kl-divergence-base-compact {k}: expected below {n_vocab}, the vocabulary"),
        top => top,
    };
    Ok(Layout { n_ctx, n_vocab, n_chunk, top })
}

/// Refuses to begin a file that the disk has no room for.
fn check_space(path: &Path, layout: &Layout) -> anyhow::Result<()> {
    let needed = layout.file_bytes().unwrap_or(u64::MAX);
    let dir = folder(path);
    let free = free_space(dir).with_context(|| dir.display().to_string())?;
    if free < needed {
        let (file, needed, free) = (path.display(), size(needed), size(free));
        bail!("{file}: {needed} needed, {free} free (--kl-divergence-base-compact needs 24 times less)");
    }
    Ok(())
}
