//! How far a model's predictions are from a reference's: the statistics of llama-perplexity's `--kl-divergence`.
//!
//! For every scored token, with `p` the reference and `q` the model: `-ln q(next)`, `-ln p(next)`, the Kullback-Leibler
//! divergence `sum p ln(p / q)` in nats, `q(next) - p(next)`, and whether both hold the same token most probable. Errors are
//! standard errors of means; those of derived figures follow to first order, with the covariance of both models' scores.

use super::row::Row;
use super::score::{BLOCK, Extent, top};
use oxcart_quant::f32ops::Ops;

/// Reference log-probabilities that count: what is rarer is below the resolution of a full row.
const FLOOR: f32 = -16.0;

/// One scored token.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Token {
    /// `-ln q(next)`.
    pub nll: f64,
    /// `-ln p(next)`.
    pub nll_base: f64,
    /// Divergence from the reference, in nats.
    pub kld: f64,
    /// `q(next) - p(next)`.
    pub p_diff: f64,
    /// Whether the most probable token is the same.
    pub same_top: bool,
}

impl Token {
    /// Numbers that it has.
    pub const WIDTH: usize = 5;

    /// It as numbers, for a record; `-ln q(next)` first.
    pub fn numbers(&self) -> [f64; Token::WIDTH] {
        [self.nll, self.nll_base, self.kld, self.p_diff, self.same_top as u8 as f64]
    }

    /// Of [`Token::WIDTH`] numbers.
    pub fn of_numbers(n: &[f64]) -> Token {
        Token { nll: n[0], nll_base: n[1], kld: n[2], p_diff: n[3], same_top: n[4] != 0.0 }
    }

    /// Compares the logits of a model with the reference's row, where the text goes on with `next`. Of a compact row the
    /// tail counts as one token, which makes the divergence smaller than it is by what happens within the tail.
    pub fn compare(ops: &Ops, logits: &[f32], base: &Row, next: u32) -> Token {
        let extent = Extent::of(ops, logits);
        let nll = extent.nll(logits[next as usize]);
        let (nll_base, kld, base_top) = match base {
            Row::Full(log_p) => (-log_p[next as usize] as f64, full(ops, logits, extent, log_p), top(ops, log_p)),
            Row::Top { top, tail, next } => {
                let shift = extent.max as f64 + extent.ln_sum;
                let against = |log_p: f32, i: usize| (log_p as f64).exp() * (log_p as f64 + shift - logits[i] as f64);
                // Codes are rounded, the tail is not: what is kept makes up the rest of 1.
                let p = (*tail as f64).exp().min(1.0);
                let kept: f64 = top.iter().map(|&(_, l)| (l as f64).exp()).sum();
                let whole = ((1.0 - p) / kept).ln() as f32;
                let (mut kld, mut mass) = (0.0, 0.0);
                for &(i, l) in top {
                    kld += against(l + whole, i as usize);
                    mass += (logits[i as usize] as f64 - shift).exp();
                }
                if p > 0.0 {
                    kld += p * (p.ln() - (1.0 - mass).max(1e-12).ln());
                }
                (-*next as f64, kld, top[0].0 as usize)
            }
        };
        let p_diff = (-nll).exp() - (-nll_base).exp();
        Token { nll, nll_base, kld, p_diff, same_top: top(ops, logits) == base_top }
    }
}

/// `sum p ln(p / q)` over a whole row.
fn full(ops: &Ops, logits: &[f32], extent: Extent, log_p: &[f32]) -> f64 {
    let (mut p, mut ratio) = ([0.0; BLOCK], [0.0; BLOCK]);
    // ln(p / q) = ln p - (logit - max) + ln_sum: what f32 keeps of ln_sum is added before products are summed, so that they
    // are small, the rest behind.
    let near = extent.ln_sum as f32;
    let rest = extent.ln_sum - near as f64;
    let parts = log_p.chunks(BLOCK).zip(logits.chunks(BLOCK)).map(|(log_p, logits)| {
        let n = log_p.len();
        for (((p, ratio), &l), &logit) in p.iter_mut().zip(&mut ratio).zip(log_p).zip(logits) {
            let counts = l > FLOOR;
            *p = if counts { l } else { f32::NEG_INFINITY };
            *ratio = if counts { l - (logit - extent.max) + near } else { 0.0 };
        }
        let mass = ops.exp_sum(&mut p[..n], 0.0);
        mass as f64 * rest + ops.dot(&p[..n], &ratio[..n]) as f64
    });
    parts.sum()
}

/// A figure and its standard error.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Estimate {
    /// The figure.
    pub value: f64,
    /// One standard deviation of it.
    pub error: f64,
}

/// Values, their squares, how many.
#[derive(Clone, Copy, Debug, Default)]
struct Sum {
    x: f64,
    x2: f64,
    n: usize,
}

impl Sum {
    fn add(&mut self, x: f64) {
        self.x += x;
        self.x2 += x * x;
        self.n += 1;
    }

    /// The mean; without an error where there are 10 values or fewer, as llama-perplexity has it.
    fn mean(&self) -> Estimate {
        let n = self.n.max(1) as f64;
        let value = self.x / n;
        let variance = self.x2 / n - value * value;
        let error = if self.n > 10 && variance > 0.0 { (variance / (n - 1.0)).sqrt() } else { 0.0 };
        Estimate { value, error }
    }
}

/// The statistics of all tokens so far.
#[derive(Clone, Debug, Default)]
pub struct Divergence {
    nll: Sum,
    nll_base: Sum,
    product: f64, // sum of nll * nll_base
    kld: Sum,
    p_diff: Sum,
    p_diff2: Sum,
    same_top: usize,
    klds: Vec<f64>,
    p_diffs: Vec<f64>,
}

impl Divergence {
    /// Adds a token.
    pub fn push(&mut self, t: &Token) {
        self.nll.add(t.nll);
        self.nll_base.add(t.nll_base);
        self.product += t.nll * t.nll_base;
        self.kld.add(t.kld);
        self.p_diff.add(t.p_diff);
        self.p_diff2.add(t.p_diff * t.p_diff);
        self.same_top += t.same_top as usize;
        self.klds.push(t.kld);
        self.p_diffs.push(t.p_diff);
    }

    /// Tokens.
    pub fn count(&self) -> usize {
        self.klds.len()
    }

    fn exp(e: Estimate) -> Estimate {
        Estimate { value: e.value.exp(), error: e.value.exp() * e.error }
    }

    /// The model's perplexity.
    pub fn ppl(&self) -> Estimate {
        Divergence::exp(self.nll.mean())
    }

    /// The reference's perplexity.
    pub fn ppl_base(&self) -> Estimate {
        Divergence::exp(self.nll_base.mean())
    }

    /// Covariance of the two mean scores; 0 for fewer than 10 tokens.
    fn covariance(&self) -> f64 {
        let n = self.count() as f64;
        if n < 10.0 { 0.0 } else { (self.product / n - self.nll.x / n * (self.nll_base.x / n)) / (n - 1.0) }
    }

    /// Correlation of the two scores.
    pub fn correlation(&self) -> f64 {
        self.covariance() / (self.nll.mean().error * self.nll_base.mean().error)
    }

    /// `ln(PPL / PPL of the reference)`.
    pub fn ln_ratio(&self) -> Estimate {
        let (q, p) = (self.nll.mean(), self.nll_base.mean());
        let variance = q.error * q.error + p.error * p.error - 2.0 * self.covariance();
        Estimate { value: q.value - p.value, error: variance.max(0.0).sqrt() }
    }

    /// `PPL / PPL of the reference`.
    pub fn ratio(&self) -> Estimate {
        Divergence::exp(self.ln_ratio())
    }

    /// `PPL - PPL of the reference`.
    pub fn difference(&self) -> Estimate {
        let (q, p) = (self.ppl(), self.ppl_base());
        let covariance = q.value * p.value * self.covariance();
        let variance = q.error * q.error + p.error * p.error - 2.0 * covariance;
        Estimate { value: q.value - p.value, error: variance.max(0.0).sqrt() }
    }

    /// Mean divergence, in nats.
    pub fn kld(&self) -> Estimate {
        self.kld.mean()
    }

    /// Mean difference of the next token's probability.
    pub fn p_diff(&self) -> Estimate {
        self.p_diff.mean()
    }

    /// Root mean square of that difference.
    pub fn rms_p_diff(&self) -> Estimate {
        let mean = self.p_diff2.mean();
        let value = mean.value.sqrt();
        Estimate { value, error: if value > 0.0 { 0.5 / value * mean.error } else { 0.0 } }
    }

    /// Share of tokens for which both models hold the same one most probable.
    pub fn same_top(&self) -> Estimate {
        let n = self.count() as f64;
        let value = self.same_top as f64 / n;
        Estimate { value, error: (value * (1.0 - value) / (n - 1.0)).sqrt() }
    }

    /// All divergences in rising order.
    pub fn klds(&self) -> Sorted {
        Sorted::new(&self.klds)
    }

    /// All differences of the next token's probability in rising order.
    pub fn p_diffs(&self) -> Sorted {
        Sorted::new(&self.p_diffs)
    }
}

/// Values in rising order.
pub struct Sorted(Vec<f64>);

impl Sorted {
    fn new(values: &[f64]) -> Sorted {
        let mut values = values.to_vec();
        values.sort_unstable_by(f64::total_cmp);
        Sorted(values)
    }

    /// The value below which this fraction lies, between neighbours by their distance; 0 where there are no values.
    pub fn at(&self, fraction: f64) -> f64 {
        let Some(last) = self.0.len().checked_sub(1) else { return 0.0 };
        let at = fraction.clamp(0.0, 1.0) * last as f64;
        let i = at as usize;
        let rest = at - i as f64;
        (1.0 - rest) * self.0[i] + rest * self.0[(i + 1).min(last)]
    }
}
