//! Guesses at the tokens to come, several of which one pass checks (speculative decoding: Leviathan et al., 2023).
//!
//! Decoding reads all weights for every token, and a pass over a few tokens reads them once as well. So what is likely to
//! come is fed behind the token that is certain; as far as the model then says the same, it has said several tokens in one
//! pass. Every token is drawn from the model's own logits, and few tokens together have the logits that they have one by
//! one ([`crate::engine::Engine::alike`]): the text is the same, token for token, whatever is guessed.
//!
//! Guesses come from the text itself (`lookup`) and from a smaller model (`model`). How many are worth their time is
//! arithmetic: the tokens that a pass is expected to give, by the time that it is expected to take. Both are learned from
//! what happens, and where guesses do not pay there are none.

mod lookup;
mod model;

use crate::engine::{Engine, EngineError, EngineOptions, SessionOptions};
use crate::load::Residence;
use lookup::Lookup;
use model::Small;
use oxcart_quant::attention::FEW;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

/// Guesses of a pass, at most: with the certain token before them they are as many tokens as are alike.
pub const MOST: usize = FEW - 1;

/// Minimum predicted speed-up for drafting; smaller gains are noise.
const WORTH: f64 = 1.02;

/// Makes guesses, and learns from how they fare.
pub struct Drafter {
    most: usize,
    lookup: Lookup,
    small: Option<Small>,
    times: Times,
    always: bool,
}

/// Two models that do not speak of the same tokens.
#[derive(Debug, thiserror::Error)]
pub enum DraftError {
    /// The draft model.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// Too many tokens differ.
    #[error(
        "{draft} cannot draft for {model}: {differing} tokens differ, the first is {id}: {found:?}, expected {expected:?}"
    )]
    Vocabulary {
        /// The draft model's file.
        draft: String,
        /// The model's file.
        model: String,
        /// How many tokens differ.
        differing: usize,
        /// The first that does.
        id: usize,
        /// What it is to the draft model.
        found: String,
        /// What it is to the model.
        expected: String,
    },
}

impl Drafter {
    /// Guesses at most `most` tokens a pass, from the text itself; with 0, none.
    pub fn new(most: usize) -> Drafter {
        Drafter { most, lookup: Lookup::default(), small: None, times: Times::default(), always: false }
    }

    /// Guesses as much as it may, whether it pays or not: what passes take then does not decide what is fed.
    pub fn always(most: usize) -> Drafter {
        Drafter { always: true, ..Drafter::new(most) }
    }

    /// Asks a smaller model, too, a file. `o` and `s` are what `large` and its session were opened by.
    pub fn add_model(
        &mut self,
        large: &Engine,
        small: &Path,
        o: &EngineOptions,
        s: &SessionOptions,
    ) -> Result<(), DraftError> {
        // What is said of the large model's file and memory is not said of this one.
        let o = EngineOptions { overrides: Vec::new(), resident: None, residence: Residence::default(), ..o.clone() };
        self.small = Some(Small::new(large, Arc::new(Engine::open(small, &o)?), s)?);
        Ok(())
    }

    /// Tells it the text that is continued.
    pub fn begin(&mut self, text: &[u32]) {
        if self.most > 0 {
            self.lookup.begin(text);
            self.small.iter_mut().for_each(Small::begin);
        }
    }

    /// Tells it the next token.
    pub fn told(&mut self, id: u32) {
        if self.most > 0 {
            self.lookup.told(id);
            self.small.iter_mut().for_each(|s| s.told(id));
        }
    }

    /// Tells it what a pass over `n` tokens took.
    pub fn took(&mut self, n: usize, time: Duration) {
        self.times.took(n, time.as_secs_f64());
    }

    /// Guesses what comes next, at most `room` tokens.
    pub fn guess(&mut self, room: usize) -> Result<Vec<u32>, EngineError> {
        let room = room.min(self.most);
        if room == 0 {
            return Ok(Vec::new());
        }
        if self.always {
            return match &mut self.small {
                Some(small) => small.guess(self.lookup.text(), room, None),
                None => Ok(self.lookup.guess(room)),
            };
        }
        let (found, found_pace) = self.times.plan(room, 0.0, |i| self.lookup.odds(i));
        if let Some(small) = &mut self.small {
            let (_, pace) = self.times.plan(room, small.step(), |_| small.odds());
            if pace > found_pace * WORTH {
                return small.guess(self.lookup.text(), room, Some(&self.times));
            }
        }
        Ok(self.lookup.guess(found))
    }
}

/// What passes take, by their tokens.
#[derive(Default)]
struct Times {
    seconds: [f64; MOST + 2], // 0: not known
}

/// What another token is taken to add to a pass, of the time of the first, before it is known.
const ANOTHER: f64 = 0.05;
/// How fast what was not measured again is forgotten.
const FORGET: f64 = 0.01;

/// Lets a time follow its latest sample; 0 is none yet.
fn sample(known: &mut f64, latest: f64) {
    *known = if *known == 0.0 { latest } else { *known + (latest - *known) * 0.25 };
}

impl Times {
    fn took(&mut self, n: usize, seconds: f64) {
        for i in 1..self.seconds.len() {
            let supposed = self.supposed(i);
            let known = &mut self.seconds[i];
            if i == n {
                sample(known, seconds);
            } else if i > 1 && *known > 0.0 {
                // One slow pass must not forbid its like for ever.
                *known += (supposed - *known) * FORGET;
            }
        }
    }

    /// What a pass over `n` tokens may take, judged by passes over fewer.
    fn supposed(&self, n: usize) -> f64 {
        let below = (1..n).rev().find(|&i| self.seconds[i] > 0.0).unwrap_or(1);
        self.seconds[below] + self.seconds[1] * ANOTHER * (n - below) as f64
    }

    /// Seconds of a pass over `n` tokens.
    fn of(&self, n: usize) -> f64 {
        match self.seconds.get(n) {
            Some(&known) if known > 0.0 => known,
            _ => self.supposed(n),
        }
    }

    /// How many guesses to make, at most `room`, where the `i`-th is right with `odds(i)` if those before it are, and takes
    /// `step` seconds to make; and the tokens a second that they promise.
    fn plan(&self, room: usize, step: f64, odds: impl Fn(usize) -> f64) -> (usize, f64) {
        let alone = 1.0 / self.of(1);
        // Nothing is known before the first pass.
        if !alone.is_finite() {
            return (0, 0.0);
        }
        let (mut best, mut tokens, mut all) = ((0, alone), 1.0, 1.0);
        for i in 0..room {
            all *= odds(i);
            tokens += all;
            let pace = tokens / (self.of(i + 2) + step * (i + 1) as f64);
            if pace > best.1.max(alone * WORTH) {
                best = (i + 1, pace);
            }
        }
        best
    }
}

/// How often something is right: a share that follows what happens.
#[derive(Clone, Copy)]
struct Odds(f64);

impl Odds {
    /// Counts one more case.
    fn count(&mut self, right: bool) {
        const LATEST: f64 = 1.0 / 16.0;
        self.0 += (f64::from(u8::from(right)) - self.0) * LATEST;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn times(per_token: f64) -> Times {
        Times { seconds: std::array::from_fn(|n| if n == 0 { 0.0 } else { 1.0 + per_token * (n - 1) as f64 }) }
    }

    #[test]
    fn as_many_are_guessed_as_pay() {
        // Free: as many as there is room for, if there is any hope.
        assert_eq!(times(0.0).plan(7, 0.0, |_| 0.3).0, 7);
        assert_eq!(times(0.0).plan(3, 0.0, |_| 0.3).0, 3);
        assert_eq!(times(0.0).plan(7, 0.0, |_| 0.0).0, 0);
        // A token more costs half a pass: certain ones pay, unlikely ones do not.
        assert_eq!(times(0.5).plan(7, 0.0, |_| 1.0), (7, 8.0 / 4.5));
        assert_eq!(times(0.5).plan(7, 0.0, |_| 0.4).0, 0);
        // As much as a pass: never.
        assert_eq!(times(1.0).plan(7, 0.0, |_| 1.0).0, 0);
        // Guessing itself takes time.
        assert_eq!(times(0.1).plan(7, 0.0, |_| 0.9).0, 7);
        assert_eq!(times(0.1).plan(7, 0.9, |_| 0.9).0, 0);
        // Likely ones before unlikely ones.
        assert_eq!(times(0.2).plan(7, 0.0, |i| if i < 2 { 0.9 } else { 0.1 }).0, 2);
    }

    #[test]
    fn what_a_pass_takes_is_learned() {
        let mut t = Times::default();
        assert_eq!(t.plan(7, 0.0, |_| 1.0).0, 0, "nothing is known yet");
        t.took(1, 1.0);
        assert_eq!(t.plan(7, 0.0, |_| 1.0).0, 7);
        // More tokens turn out to be dear, fewer are still worth a try; then those are known to be dear as well.
        t.took(8, 9.0);
        assert!((1..7).contains(&t.plan(7, 0.0, |_| 0.9).0));
        (2..8).for_each(|n| t.took(n, n as f64));
        assert_eq!(t.plan(7, 0.0, |_| 0.9).0, 0);
        // Long ago, that is forgotten.
        (0..500).for_each(|_| t.took(1, 1.0));
        assert!(t.plan(7, 0.0, |_| 0.9).0 > 0);
    }
}
