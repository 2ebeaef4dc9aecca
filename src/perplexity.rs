//! Perplexity, by the conventions of llama-perplexity, so that figures compare.
//!
//! The text is tokenized whole; chunks of `context` tokens follow each other without overlap, the tail is dropped; where
//! the vocabulary adds BOS, it stands in place of each chunk's first token; the second half of each chunk is scored, each
//! token by the logits of the one before it: `context - context / 2 - 1` tokens.

use crate::engine::{EngineError, Session};
use crate::model::Batch;
use std::sync::Mutex;

/// A text that cannot be scored.
#[derive(Debug, thiserror::Error)]
pub enum PerplexityError {
    /// The model.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// Too little text.
    #[error("{found} tokens, expected at least {expected}: two chunks of the context")]
    TooShort {
        /// Tokens of the text.
        found: usize,
        /// What is needed.
        expected: usize,
    },
}

/// The negative log-likelihoods of scored tokens, summed.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Score {
    /// Sum, in nats.
    pub nll: f64,
    /// Sum of squares.
    pub nll2: f64,
    /// Tokens.
    pub count: usize,
}

impl Score {
    fn add(&mut self, nll: f64) {
        self.nll += nll;
        self.nll2 += nll * nll;
        self.count += 1;
    }

    /// Joins two.
    pub fn join(&mut self, o: &Score) {
        self.nll += o.nll;
        self.nll2 += o.nll2;
        self.count += o.count;
    }

    /// exp of the mean.
    pub fn perplexity(&self) -> f64 {
        (self.nll / self.count as f64).exp()
    }

    /// The standard error of the perplexity, to first order.
    pub fn error(&self) -> f64 {
        let n = self.count as f64;
        let mean = self.nll / n;
        let variance = (self.nll2 / n - mean * mean).max(0.0);
        self.perplexity() * (variance / (n - 1.0)).sqrt()
    }
}

/// `-ln softmax(logits)[token]`, in f64.
pub fn nll(logits: &[f32], token: u32) -> f64 {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|&l| ((l - max) as f64).exp()).sum();
    sum.ln() + (max - logits[token as usize]) as f64
}

/// How many chunks a text of `tokens` has; an error where it is too short.
pub fn chunks(tokens: usize, context: usize) -> Result<usize, PerplexityError> {
    if tokens < 2 * context {
        return Err(PerplexityError::TooShort { found: tokens, expected: 2 * context });
    }
    Ok(tokens / context)
}

/// Scores the chunks that start at `first`, as many as the session has sequences, one a sequence. Returns their scores.
pub fn score(s: &mut Session, tokens: &[u32], first: usize, count: usize) -> Result<Vec<Score>, EngineError> {
    let context = s.context();
    let bos = s.engine().tokenizer.bos().filter(|_| s.engine().tokenizer.add_bos());
    let mut batch = Batch::default();
    let mut next = Vec::new(); // of each row of logits: the chunk and the token that it predicts
    for c in 0..count {
        let chunk = &tokens[(first + c) * context..(first + c + 1) * context];
        s.truncate(c, 0);
        for (i, &t) in chunk.iter().enumerate() {
            let scored = i >= context / 2 && i + 1 < context;
            batch.push(if i == 0 { bos.unwrap_or(t) } else { t }, i as u32, c as u32, scored);
            if scored {
                next.push((c, chunk[i + 1]));
            }
        }
    }
    let nlls = Mutex::new(vec![0.0; next.len()]);
    s.forward_each(&batch, &|i, logits| {
        let v = nll(logits, next[i].1);
        nlls.lock().unwrap_or_else(|e| e.into_inner())[i] = v;
    })?;
    let mut scores = vec![Score::default(); count];
    // In the order of the text, so that sums do not depend on who computed what.
    for ((c, _), v) in next.iter().zip(nlls.into_inner().unwrap_or_else(|e| e.into_inner())) {
        scores[*c].add(v);
    }
    Ok(scores)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_uniform_guess_has_the_vocabulary_s_perplexity() {
        let mut s = Score::default();
        (0..10).for_each(|t| s.add(nll(&[0.5; 32], t)));
        assert!((s.perplexity() - 32.0).abs() < 1e-9 && s.error() < 1e-6);
    }

    #[test]
    fn the_error_is_that_of_a_mean() {
        let mut s = Score::default();
        [1.0, 2.0, 3.0, 4.0].into_iter().for_each(|v| s.add(v));
        // mean 2.5, variance 1.25 over 4, so the mean is known within sqrt(1.25 / 3).
        assert!((s.error() / s.perplexity() - (1.25f64 / 3.0).sqrt()).abs() < 1e-12);
    }
}
