//! `--ppl-stride`: perplexity by overlapping windows.

use super::Args;
use crate::cli::engine::tell_facts;
use crate::cli::usage_error;
use crate::perplexity::Score;
use crate::perplexity::stride::Windows;
use anyhow::Context;
use std::ops::ControlFlow;

pub fn run(a: &Args, stride: usize) -> anyhow::Result<()> {
    let context = a.context();
    let window = Windows::window(context, stride);
    if stride >= window {
        usage_error(&format!("--ppl-stride {stride}: expected below the window, {window}"));
    }
    if a.kl_divergence_base.is_some() {
        usage_error("--kl-divergence-base: a base file has chunks, expected no --ppl-stride");
    }
    let e = a.engine.open()?;
    let tokens = a.tokens(&e)?;
    let windows = Windows::new(tokens.len(), context, stride).with_context(|| a.name())?;
    let n = a.chunks.map_or(windows.count, |limit| windows.count.min(limit));
    let mut s = a.session(&e, window, 1)?;
    tell_facts(&e, window);
    let mut key = a.key(&e, "stride");
    key.add_tokens(&tokens);
    key.add(format!("{windows:?} {n}"));
    let mut run = a.start(&key, "window", n, 1)?;
    tell!("perplexity: have {} tokens. Calculation chunk = {window}", tokens.len());
    tell!("perplexity: computing over {n} chunks, n_ctx={window}, batch_size={}, n_seq=1", a.batch_size);
    let (mut total, mut each) = (Score::default(), Vec::new());
    run.drive(
        |_| e.gguf.path(),
        |first, _| Ok(vec![windows.score(&mut s, &tokens, first)?]),
        |progress, i, nlls| {
            total.join(&Score::of(nlls));
            each.push(Score::of(nlls).mean().0);
            match (a.json, a.ppl_output_type) {
                (true, _) => {}
                (_, 0) => progress.value(&format!("[{}]{:.4},", i + 1, total.perplexity()))?,
                _ => progress.line(&format!("{:8}  {:.4}", i * stride, total.perplexity()))?,
            }
            let narrow = a.until_error.is_some_and(|x| total.error() <= x);
            Ok(if narrow { ControlFlow::Break(()) } else { ControlFlow::Continue(()) })
        },
    )?;
    run.done()?;
    if a.json {
        let result = serde_json::json!({
            "model": e.gguf.path(), "file": a.file, "n_ctx": window, "stride": stride, "windows": each.len(),
            "tokens_scored": total.count, "ppl": total.perplexity(), "ppl_error": total.error(), "window_nll": each,
            "seconds": run.progress.seconds(),
        });
        say!("{result}")?;
    } else {
        say!("\nFinal estimate: PPL = {:.4} +/- {:.5}", total.perplexity(), total.error())?;
    }
    Ok(())
}
