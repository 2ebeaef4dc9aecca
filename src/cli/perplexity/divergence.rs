//! `--kl-divergence`: the distance from the model that wrote a base file.

use super::Args;
use crate::cli::engine::tell_facts;
use crate::perplexity::base::Base;
use crate::perplexity::divergence::{Divergence, Token};
use crate::perplexity::{PerplexityError, chunk, report, rows};
use anyhow::{Context, bail};
use serde_json::json;
use std::ops::ControlFlow;

pub fn run(a: &Args) -> anyhow::Result<()> {
    let Some(path) = &a.kl_divergence_base else { bail!("--kl-divergence-base: expected a file") };
    let base = Base::open(path)?;
    let layout = base.layout();
    let context = layout.n_ctx;
    if let Some(c) = a.ctx_size.filter(|&c| c != context) {
        bail!("--ctx-size {c}: {} has chunks of {context} tokens", path.display());
    }
    let e = a.engine.open()?;
    base.check_vocabulary(e.model.config.n_vocab)?;
    if let Some(text) = &a.file {
        base.check_text(&a.tokens(&e)?).with_context(|| text.display().to_string())?;
    }
    let n = a.chunks.map_or(layout.n_chunk, |limit| layout.n_chunk.min(limit));
    let mut s = a.session(&e, context, a.n_seq(context).min(n))?;
    let group = a.together(&e, context);
    tell_facts(&e, context);
    if let Some(k) = layout.top {
        tell!("kl_divergence: {} is compact: the {k} most probable tokens and the mass of the others", path.display());
    }
    let tokens = &base.tokens()[..n * context];
    let mut key = a.key(&e, "kl-divergence");
    key.add_tokens(tokens);
    // Another reference's, of the same text, may stand at the same path by now.
    key.add(base.ends()?);
    key.add(format!("{layout:?} {}", path.display()));
    let mut run = a.start(&key, "chunk", n, group)?;
    let batch = a.batch_size.min(group * context);
    tell!("kl_divergence: computing over {n} chunks, n_ctx={context}, batch_size={batch}, n_seq={group}");
    if !a.json {
        run.progress.line(&format!("\n{}", report::HEADING))?;
    }
    let ops = e.kernels.ops;
    let (mut all, mut each) = (Divergence::default(), Vec::new());
    run.drive(
        |_| e.gguf.path(),
        |first, count| {
            let compare = |i: usize, next: u32, logits: &[f32]| {
                Ok::<_, PerplexityError>(Token::compare(ops, logits, &base.row(first * rows(context) + i)?, next))
            };
            let compared = chunk::collect(&mut s, tokens, context, first, count, compare)?;
            Ok(compared.chunks(rows(context)).map(|c| c.iter().flat_map(Token::numbers).collect()).collect())
        },
        |progress, i, values| {
            let mut chunk = Divergence::default();
            for token in values.chunks_exact(Token::WIDTH).map(Token::of_numbers) {
                all.push(&token);
                chunk.push(&token);
            }
            each.push(json!({"ppl": chunk.ppl().value, "ppl_base": chunk.ppl_base().value, "kld": chunk.kld().value,
                "same_top": chunk.same_top().value}));
            if !a.json {
                progress.line(&report::running(i + 1, &all))?;
            }
            let narrow = a.until_error.is_some_and(|x| all.kld().error <= x && all.count() > 10);
            Ok(if narrow { ControlFlow::Break(()) } else { ControlFlow::Continue(()) })
        },
    )?;
    run.done()?;
    if a.json {
        let mut result = json!({"model": e.gguf.path(), "base": path, "compact": layout.top, "n_ctx": context,
            "chunks": each.len(), "seconds": run.progress.seconds(), "each_chunk": each});
        if let (Some(to), serde_json::Value::Object(all)) = (result.as_object_mut(), report::object(&all)) {
            to.extend(all);
        }
        say!("{result}")?;
    } else {
        say_part!("\n{}", report::closing(&all))?;
    }
    Ok(())
}
