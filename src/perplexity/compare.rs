//! Several models on one text, side by side: the first is the reference of the others.
//!
//! The text is gone through once. Of every group of chunks the reference's log-probabilities are kept in memory, in f32, while
//! the others go through the same chunks; no base file is written and nothing is rounded to 16 bits.

use super::divergence::{Divergence, Token};
use super::row::Row;
use super::{Score, chunk, nll, rows};
use crate::engine::{Engine, EngineError, Session, SessionOptions};
use std::sync::{Arc, OnceLock};
use std::time::Instant;

/// One of the models.
pub struct Contender {
    session: Session,
    /// Its perplexity so far.
    pub score: Score,
    /// Its distance from the reference so far; of the reference itself nothing.
    pub divergence: Divergence,
    /// Tokens fed.
    pub tokens: usize,
    /// Seconds that they took, scoring included.
    pub seconds: f64,
}

impl Contender {
    /// A model with a session of its own.
    pub fn new(engine: &Arc<Engine>, o: &SessionOptions) -> Result<Contender, EngineError> {
        let (score, divergence) = Default::default();
        Ok(Contender { session: engine.session(o)?, score, divergence, tokens: 0, seconds: 0.0 })
    }

    /// The model.
    pub fn engine(&self) -> &Arc<Engine> {
        self.session.engine()
    }

    /// Bytes of its KV cache.
    pub fn cache_bytes(&self) -> usize {
        self.session.cache_bytes()
    }

    /// Bytes of its tensors.
    pub fn size(&self) -> u64 {
        self.engine().gguf.tensors().iter().map(|t| t.n_bytes()).sum()
    }

    /// Bits of its tensors a weight.
    pub fn bits_per_weight(&self) -> f64 {
        let weights: u64 = self.engine().gguf.tensors().iter().map(|t| t.n_elements()).sum();
        self.size() as f64 * 8.0 / weights as f64
    }

    /// Tokens a second.
    pub fn rate(&self) -> f64 {
        self.tokens as f64 / self.seconds
    }

    fn feed<T: Clone + Default + Send>(
        &mut self,
        tokens: &[u32],
        first: usize,
        count: usize,
        value: impl Fn(usize, u32, &[f32]) -> Result<T, EngineError> + Sync,
    ) -> Result<Vec<T>, EngineError> {
        let (start, context) = (Instant::now(), self.session.context());
        let values = chunk::collect(&mut self.session, tokens, context, first, count, value)?;
        self.seconds += start.elapsed().as_secs_f64();
        self.tokens += count * context;
        Ok(values)
    }
}

/// Bytes that [`group`] keeps for `count` chunks.
pub fn kept_bytes(context: usize, n_vocab: usize, count: usize) -> u64 {
    (rows(context) * n_vocab * size_of::<f32>()) as u64 * count as u64
}

/// Sends `count` chunks through all models, whose sessions have room for as many sequences.
pub fn group(models: &mut [Contender], tokens: &[u32], first: usize, count: usize) -> Result<(), EngineError> {
    let Some((reference, others)) = models.split_first_mut() else { return Ok(()) };
    let kept: Vec<OnceLock<Row>> = vec![OnceLock::new(); count * rows(reference.session.context())];
    let ops = reference.engine().kernels.ops;
    let nlls: Vec<f64> = reference.feed(tokens, first, count, |i, next, logits| {
        kept[i].get_or_init(|| Row::exact(ops, logits));
        Ok(nll(ops, logits, next))
    })?;
    // Chunk by chunk, so that sums are those of a run of each model alone.
    let scored = rows(reference.session.context());
    nlls.chunks(scored).for_each(|c| reference.score.join(&Score::of(c)));
    for m in others {
        let found: Vec<Token> = m.feed(tokens, first, count, |i, next, logits| {
            Ok(kept[i].get().map_or(Token::default(), |row| Token::compare(ops, logits, row, next)))
        })?;
        found.iter().for_each(|t| m.divergence.push(t));
        let nlls: Vec<f64> = found.iter().map(|t| t.nll).collect();
        nlls.chunks(scored).for_each(|c| m.score.join(&Score::of(c)));
    }
    Ok(())
}
