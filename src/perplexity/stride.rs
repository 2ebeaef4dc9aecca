//! Perplexity by overlapping windows (`--ppl-stride`): every token is scored behind much text, at the price of feeding the
//! text several times.
//!
//! As llama-perplexity has it where one window is fed at a time (`-b` not above `-c`; with several it fails): the window is
//! the context and half the stride, rounded up to the 256 positions of which its cache is made; windows begin a stride
//! apart; of each, the last `stride` tokens are scored; BOS stands only where the text begins.

use super::{PerplexityError, nll};
use crate::engine::{EngineError, Session};
use crate::model::Batch;
use std::sync::Mutex;

/// llama.cpp's caches have a multiple of so many positions.
const PADDING: usize = 256;

/// Windows over a text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Windows {
    /// Tokens of a window.
    pub window: usize,
    /// Tokens between the beginnings of windows, and scored in each.
    pub stride: usize,
    /// Windows.
    pub count: usize,
}

impl Windows {
    /// Tokens of a window; a stride is below them.
    pub fn window(context: usize, stride: usize) -> usize {
        (context + stride / 2).next_multiple_of(PADDING)
    }

    /// The windows of a text of `tokens`; an error where it is too short.
    pub fn new(tokens: usize, context: usize, stride: usize) -> Result<Windows, PerplexityError> {
        let window = Windows::window(context, stride);
        if tokens < 2 * window {
            return Err(PerplexityError::TooShort { found: tokens, expected: 2 * window });
        }
        Ok(Windows { window, stride, count: (tokens - window).div_ceil(stride) })
    }

    /// Scores a window with a session of one sequence: nats of each of its last `stride` tokens.
    pub fn score(&self, s: &mut Session, tokens: &[u32], index: usize) -> Result<Vec<f64>, EngineError> {
        let window = &tokens[index * self.stride..index * self.stride + self.window];
        let first = self.window - self.stride;
        s.truncate(0, 0);
        let mut batch = Batch::default();
        for (i, &t) in window.iter().enumerate() {
            batch.push(t, i as u32, 0, (first - 1..self.window - 1).contains(&i));
        }
        let ops = s.engine().kernels.ops;
        let nlls = Mutex::new(vec![0.0; self.stride]);
        s.forward_each(&batch, &|i, logits| {
            let v = nll(ops, logits, window[first + i]);
            nlls.lock().unwrap_or_else(|e| e.into_inner())[i] = v;
        })?;
        Ok(nlls.into_inner().unwrap_or_else(|e| e.into_inner()))
    }
}
