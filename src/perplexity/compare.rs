//! Several models on one text, side by side: the first is the reference of the others.
//!
//! The text is gone through once. Of every group of chunks the reference's log-probabilities are kept in memory, in f32, while
//! the others go through the same chunks; no base file is written and nothing is rounded to 16 bits.

use super::divergence::{Divergence, Token};
use super::row::Row;
use super::{Score, chunk, nll, rows};
use crate::engine::{Engine, EngineError, Session};
use std::sync::{Arc, OnceLock};
use std::time::Instant;

/// What is known of one of the models.
pub struct Contender {
    engine: Arc<Engine>,
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
    /// A model of which nothing is known.
    pub fn new(engine: Arc<Engine>) -> Contender {
        let (score, divergence) = Default::default();
        Contender { engine, score, divergence, tokens: 0, seconds: 0.0 }
    }

    /// The model.
    pub fn engine(&self) -> &Arc<Engine> {
        &self.engine
    }

    /// Bytes of its tensors.
    pub fn size(&self) -> u64 {
        self.engine.gguf.tensors().iter().map(|t| t.n_bytes()).sum()
    }

    /// Bits of its tensors a weight.
    pub fn bits_per_weight(&self) -> f64 {
        let weights: u64 = self.engine.gguf.tensors().iter().map(|t| t.n_elements()).sum();
        self.size() as f64 * 8.0 / weights as f64
    }

    /// Tokens a second.
    pub fn rate(&self) -> f64 {
        self.tokens as f64 / self.seconds
    }
}

/// Bytes that [`group`] keeps for `count` chunks.
pub fn kept_bytes(context: usize, n_vocab: usize, count: usize) -> u64 {
    (rows(context) * n_vocab * size_of::<f32>()) as u64 * count as u64
}

/// Sends `count` chunks through the models' sessions, which have room for as many sequences. Returns a record for every
/// chunk: for each model its seconds, then of the reference the nats of every scored token, of the others its
/// [`Token::numbers`].
pub fn group(
    sessions: &mut [Session],
    tokens: &[u32],
    first: usize,
    count: usize,
) -> Result<Vec<Vec<f64>>, EngineError> {
    let mut records = vec![Vec::new(); count];
    let mut kept: Vec<OnceLock<Row>> = Vec::new();
    for (i, s) in sessions.iter_mut().enumerate() {
        let (start, context, ops) = (Instant::now(), s.context(), s.engine().kernels.ops);
        let values = if i == 0 {
            kept = vec![OnceLock::new(); count * rows(context)];
            chunk::collect::<_, EngineError>(s, tokens, context, first, count, |r, next, logits| {
                kept[r].get_or_init(|| Row::exact(ops, logits));
                Ok(nll(ops, logits, next))
            })?
        } else {
            let compare = |r: usize, next: u32, logits: &[f32]| {
                Ok::<_, EngineError>(
                    kept[r].get().map_or(Token::default(), |row| Token::compare(ops, logits, row, next)),
                )
            };
            let found = chunk::collect(s, tokens, context, first, count, compare)?;
            found.iter().flat_map(Token::numbers).collect()
        };
        let seconds = start.elapsed().as_secs_f64() / count as f64;
        for (record, values) in records.iter_mut().zip(values.chunks(values.len() / count)) {
            record.push(seconds);
            record.extend(values);
        }
    }
    Ok(records)
}

/// Which of the models the number at a place of a record is of.
pub fn whose(context: usize, at: usize) -> usize {
    let (first, other) = (1 + rows(context), 1 + rows(context) * Token::WIDTH);
    if at < first { 0 } else { 1 + (at - first) / other }
}

/// Adds a chunk's record to what is known of the models.
pub fn add(models: &mut [Contender], context: usize, record: &[f64]) {
    let (scored, mut rest) = (rows(context), record);
    for (i, m) in models.iter_mut().enumerate() {
        let width = if i == 0 { 1 } else { Token::WIDTH };
        let Some((part, after)) = rest.split_at_checked(1 + scored * width) else { return };
        rest = after;
        m.seconds += part[0];
        m.tokens += context;
        let nlls: Vec<f64> = part[1..].iter().copied().step_by(width).collect();
        m.score.join(&Score::of(&nlls));
        if i > 0 {
            part[1..].chunks_exact(width).for_each(|t| m.divergence.push(&Token::of_numbers(t)));
        }
    }
}
