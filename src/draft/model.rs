//! Guesses from a smaller model with the same vocabulary.

use super::{DraftError, Odds, Times, sample};
use crate::engine::{Engine, EngineError, Session, SessionOptions};
use crate::model::Batch;
use crate::sample::most_likely;
use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Instant;

/// So many tokens may differ: vocabularies of one family are padded to different lengths.
const DIFFERING: usize = 128;
/// Shares of certainty that are told apart.
const BINS: usize = 8;
/// How fast a model that was of no use, or slow, is forgiven, a token.
const FORGIVE: f64 = 1.0 / 512.0;
/// What is thought of a model that was never asked.
const UNKNOWN: f64 = 0.7;

/// The smaller model, and what is known of its guesses.
pub struct Small {
    session: Session,
    n_vocab: usize,               // of the large model: what both know
    made: VecDeque<(u32, usize)>, // guesses that were not judged yet, with their bins
    right: [Odds; BINS],          // by how certain it was
    mean: Odds,
    seconds: f64, // of a guess
}

impl Small {
    pub fn new(large: &Engine, small: Arc<Engine>, options: &SessionOptions) -> Result<Small, DraftError> {
        let (ours, theirs) = (&large.tokenizer, &small.tokenizer);
        let n_vocab = ours.n_vocab().min(theirs.n_vocab());
        let mut differing = (0..n_vocab).filter(|&i| ours.piece(i as u32) != theirs.piece(i as u32));
        if let Some(id) = differing.next() {
            let differing = 1 + differing.count();
            if differing > DIFFERING {
                let name = |e: &Engine| e.gguf.path().display().to_string();
                let (draft, model) = (name(&small), name(large));
                let text = |piece: &[u8]| String::from_utf8_lossy(piece).chars().take(40).collect();
                let (found, expected) = (text(theirs.piece(id as u32)), text(ours.piece(id as u32)));
                return Err(DraftError::Vocabulary { draft, model, differing, id, found, expected });
            }
        }
        let n_vocab = n_vocab.min(small.model.config.n_vocab).min(large.model.config.n_vocab);
        let session = small.session(&SessionOptions { sequences: 1, ..*options })?;
        let right = std::array::from_fn(|i| Odds((i as f64 + 0.5) / BINS as f64));
        Ok(Small { session, n_vocab, made: VecDeque::new(), right, mean: Odds(UNKNOWN), seconds: 0.0 })
    }

    /// The odds of one of its guesses.
    pub fn odds(&self) -> f64 {
        self.mean.0
    }

    /// Seconds that a guess takes.
    pub fn step(&self) -> f64 {
        self.seconds
    }

    /// Forgets guesses at another text.
    pub fn begin(&mut self) {
        self.made.clear();
    }

    /// Judges its guesses by the token that came.
    pub fn told(&mut self, id: u32) {
        match self.made.pop_front() {
            Some((guess, bin)) => {
                let right = guess == id;
                self.right[bin].count(right);
                self.mean.count(right);
                if !right {
                    // Those behind a wrong one were of another text.
                    self.begin();
                }
            }
            None => {
                self.mean.0 += (UNKNOWN - self.mean.0).max(0.0) * FORGIVE;
                self.seconds -= self.seconds * FORGIVE;
            }
        }
    }

    /// The tokens that it would say after `text`, as long as they promise more than they cost in passes of such `times`; if
    /// none are given, at most `room`.
    pub fn guess(&mut self, text: &[u32], room: usize, times: Option<&Times>) -> Result<Vec<u32>, EngineError> {
        self.begin();
        if text.is_empty() || text.len() + room > self.session.context() {
            return Ok(Vec::new());
        }
        let new = &text[self.session.reuse(0, text)..];
        // A long prompt is read piece by piece between the large model's tokens, so that a person is heard meanwhile.
        if new.len() > self.session.walk() {
            self.feed(&new[..self.session.walk()])?;
            return Ok(Vec::new());
        }
        let mut logits = self.feed(new)?;
        // What is expected of the pass: tokens, and the odds that all guesses so far are right.
        let (mut tokens, mut all) = (1.0, 1.0);
        // Whether guess `n` comes faster, with `odds` and at a cost of `more` than its check, than what there is without it.
        let pays = |n: usize, (tokens, odds): (f64, f64), spent: f64, more: f64| {
            times.is_none_or(|t| odds * (t.of(n) + spent) >= tokens * (t.of(n + 1) - t.of(n) + more))
        };
        for n in 1..=room {
            let (id, p) = likeliest(&logits[..self.n_vocab]);
            let bin = ((p * BINS as f64) as usize).min(BINS - 1);
            all *= self.right[bin].0;
            // It is made already: only its check costs.
            let spent = self.seconds * n as f64;
            if !pays(n, (tokens, all), spent, 0.0) {
                break;
            }
            tokens += all;
            self.made.push_back((id, bin));
            let last = n == room || self.session.engine().tokenizer.is_eog(id);
            if last || !pays(n + 1, (tokens, all * self.mean.0), spent, self.seconds) {
                break;
            }
            logits = self.feed(&[id])?;
        }
        Ok(self.made.iter().map(|m| m.0).collect())
    }

    /// The logits after more tokens.
    fn feed(&mut self, tokens: &[u32]) -> Result<Vec<f32>, EngineError> {
        let (start, at) = (Instant::now(), self.session.len(0));
        let logits = self.session.forward(&Batch::of(tokens, at, 0))?;
        // One token, or two where all guesses were right. A prompt is no measure of them.
        if tokens.len() <= 2 {
            sample(&mut self.seconds, start.elapsed().as_secs_f64());
        }
        Ok(logits)
    }
}

/// The most likely token and its probability.
fn likeliest(logits: &[f32]) -> (u32, f64) {
    let id = most_likely(logits);
    let most = logits[id as usize];
    let sum: f64 = logits.iter().map(|&l| f64::from((l - most).exp())).sum();
    (id, 1.0 / sum)
}
