//! Speed, as llama-bench measures it, beside what the machine could do: a streaming read of the same weights and the byte
//! products of the same instruction set, both taken in the same run.

use crate::engine::{Engine, EngineError, Session, SessionOptions};
use crate::model::Batch;
use crate::plan::{Probe, compute_once, read_once};
use std::sync::Arc;
use std::time::Instant;

/// What is timed: `prompt` tokens at once and then `generate` one by one, after `depth` tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Test {
    /// Tokens of the prompt.
    pub prompt: usize,
    /// Tokens generated.
    pub generate: usize,
    /// Tokens in the cache beforehand.
    pub depth: usize,
}

impl Test {
    /// llama-bench's name: `pp512`, `tg128`, `pp512+tg128`, with ` @ d4096` behind.
    pub fn name(&self) -> String {
        let what = match (self.prompt, self.generate) {
            (p, 0) => format!("pp{p}"),
            (0, n) => format!("tg{n}"),
            (p, n) => format!("pp{p}+tg{n}"),
        };
        if self.depth > 0 { format!("{what} @ d{}", self.depth) } else { what }
    }

    fn tokens(&self) -> usize {
        self.prompt + self.generate
    }
}

/// The times of a test's repetitions.
#[derive(Clone, Debug)]
pub struct Timing {
    /// What was timed.
    pub test: Test,
    /// Seconds of each repetition.
    pub seconds: Vec<f64>,
}

impl Timing {
    /// Tokens per second of each repetition.
    pub fn rates(&self) -> impl Iterator<Item = f64> + Clone {
        self.seconds.iter().map(|s| self.test.tokens() as f64 / s)
    }

    /// Tokens per second: mean and standard deviation over the repetitions.
    pub fn rate(&self) -> (f64, f64) {
        mean_and_deviation(self.rates())
    }
}

/// Mean and sample standard deviation.
pub fn mean_and_deviation(x: impl Iterator<Item = f64> + Clone) -> (f64, f64) {
    let n = x.clone().count() as f64;
    let mean = x.clone().sum::<f64>() / n;
    let square = x.map(|v| (v - mean).powi(2)).sum::<f64>();
    (mean, if n > 1.0 { (square / (n - 1.0)).sqrt() } else { 0.0 })
}

/// What the machine can do with the engine's threads and instruction set.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Streaming read of the model's own bytes, or of memory where they are not all there, GB/s.
    pub read: f64,
    /// Byte products on registers, 10^12 multiplications and additions (each counted) a second.
    pub tops: f64,
}

/// Runs tests on one engine.
pub struct Bench {
    session: Session,
    tokens: Vec<u32>,
}

impl Bench {
    /// Room for a test's tokens.
    pub fn new(e: &Arc<Engine>, test: Test, o: &SessionOptions) -> Result<Bench, EngineError> {
        let context = test.depth.saturating_add(test.tokens());
        // First, since it is refused where there is no memory for it.
        let session = e.session(&SessionOptions { context, ..*o })?;
        // Random tokens, the same in every run.
        let (mut state, n) = (1u64, e.model.config.n_vocab as u64);
        let tokens = (0..context)
            .map(|_| {
                state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                ((state >> 33) % n) as u32
            })
            .collect();
        Ok(Bench { session, tokens })
    }

    /// Bytes that a repetition reads, about: the weights once for each walk, and for each token generated the keys and values
    /// before it and its own. Those that a prompt reads are mostly in a cache, for they serve many tokens.
    pub fn n_bytes(&self, test: Test) -> f64 {
        let (c, w) = (&self.session.engine().model.config, &self.session.engine().model.weights);
        let (k, v) = self.session.cache_types();
        let position = c.n_layers * c.n_kv_heads * (k.row_bytes(c.head_dim) + v.row_bytes(c.head_dim));
        let positions: usize = (1..=test.generate).map(|n| test.depth + test.prompt + n).sum();
        let walk = self.session.walk();
        let prompt = (0..test.prompt).step_by(walk).map(|at| {
            let n = walk.min(test.prompt - at);
            w.bytes_per_pass(c, n, usize::from(at + n == test.prompt))
        });
        prompt.sum::<f64>() + test.generate as f64 * w.bytes_per_pass(c, 1, 1) + positions as f64 * position as f64
    }

    /// Products with weights in a repetition. All but the last token of a prompt go without the output matrix, and without the
    /// last layer behind its keys and values.
    pub fn n_products(&self, test: Test) -> f64 {
        let (c, w) = (&self.session.engine().model.config, &self.session.engine().model.weights);
        let (layer, output) = (w.parameters_per_layer(c), c.n_vocab * c.dim);
        let behind = layer - c.dim * (c.q_dim() + 2 * c.kv_dim());
        let outputs = test.generate + (test.prompt > 0) as usize;
        test.tokens() as f64 * (c.n_layers * layer) as f64 + (outputs * output) as f64
            - test.prompt.saturating_sub(1) as f64 * behind as f64
    }

    fn feed(&mut self, n: usize) -> Result<(), EngineError> {
        let at = self.session.len(0);
        self.session.forward(&Batch::of(&self.tokens[at..at + n], at, 0)).map(drop)
    }

    /// One repetition, in seconds.
    pub fn run(&mut self, test: Test) -> Result<f64, EngineError> {
        self.session.truncate(0, test.depth);
        if self.session.len(0) < test.depth {
            self.session.truncate(0, 0);
            self.feed(test.depth)?;
        }
        let start = Instant::now();
        if test.prompt > 0 {
            self.feed(test.prompt)?;
        }
        for _ in 0..test.generate {
            self.feed(1)?;
        }
        Ok(start.elapsed().as_secs_f64())
    }
}

/// Measures the machine's limits: some tenths of a second each.
pub fn limits(e: &Engine) -> std::io::Result<Limits> {
    if e.stream().is_some() {
        let Probe { read, tops, .. } = Probe::run(e.kernels, e.threads())?;
        return Ok(Limits { read, tops });
    }
    const PART: usize = 1 << 20;
    let ops = e.kernels.ops;
    let matrices = e.model.weights.matrices();
    let parts: Vec<&[u8]> = matrices.iter().flat_map(|m| m.chunks(PART)).take((2 << 30) / PART).collect();
    let read = median((0..5).map(|_| read_once(e.team(), ops, &parts)).collect());
    let tops = median((0..5).map(|_| compute_once(e.team(), ops, 1 << 20)).collect());
    Ok(Limits { read, tops })
}

fn median(mut x: Vec<f64>) -> f64 {
    x.sort_by(f64::total_cmp);
    x[x.len() / 2]
}
