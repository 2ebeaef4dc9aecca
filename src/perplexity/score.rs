//! Negative log-likelihoods of tokens, summed to a perplexity.

use oxcart_quant::f32ops::Ops;

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
    /// The score of tokens, summed in their order.
    pub fn of(nlls: &[f64]) -> Score {
        let mut s = Score::default();
        nlls.iter().for_each(|&v| s.add(v));
        s
    }

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

    /// Nats a token, and their standard error.
    pub fn mean(&self) -> (f64, f64) {
        let n = self.count as f64;
        let mean = self.nll / n;
        let variance = (self.nll2 / n - mean * mean).max(0.0);
        (mean, (variance / (n - 1.0)).sqrt())
    }

    /// exp of the mean.
    pub fn perplexity(&self) -> f64 {
        self.mean().0.exp()
    }

    /// The standard error of the perplexity, to first order.
    pub fn error(&self) -> f64 {
        self.perplexity() * self.mean().1
    }
}

/// Values that are summed in f32; the sums of blocks are summed in f64.
pub const BLOCK: usize = 1024;

/// What logits have in common: the largest, and `ln(sum(exp(logit - max)))`. So `ln softmax(logits)[i]` is
/// `logits[i] - max - ln_sum`.
#[derive(Clone, Copy, Debug)]
pub struct Extent {
    /// The largest logit.
    pub max: f32,
    /// `ln(sum(exp(logit - max)))`.
    pub ln_sum: f64,
}

impl Extent {
    /// Of a row of logits.
    pub fn of(ops: &Ops, logits: &[f32]) -> Extent {
        let max = ops.max(logits);
        Extent { max, ln_sum: exp_sum(ops, logits, max).ln() }
    }

    /// `-ln softmax(logits)` of a token with this logit.
    pub fn nll(&self, logit: f32) -> f64 {
        self.ln_sum + (self.max - logit) as f64
    }
}

/// `sum(exp(x - max))`.
pub fn exp_sum(ops: &Ops, values: &[f32], max: f32) -> f64 {
    let mut block = [0.0; BLOCK];
    let sums = values.chunks(BLOCK).map(|part| {
        block[..part.len()].copy_from_slice(part);
        ops.exp_sum(&mut block[..part.len()], max) as f64
    });
    sums.sum()
}

/// The place of the largest value, the first of equals.
pub fn top(ops: &Ops, values: &[f32]) -> usize {
    let max = ops.max(values);
    // Whole groups first: without a way out in the middle they are compared in vectors.
    let group = values.chunks(64).position(|c| c.iter().fold(false, |found, &v| found | (v == max))).unwrap_or(0);
    values[64 * group..].iter().position(|&v| v == max).map_or(0, |i| 64 * group + i)
}

/// `-ln softmax(logits)[token]`.
pub fn nll(ops: &Ops, logits: &[f32], token: u32) -> f64 {
    Extent::of(ops, logits).nll(logits[token as usize])
}

#[cfg(test)]
mod tests {
    use super::*;
    use oxcart_quant::{Isa, Kernels};

    #[test]
    fn a_uniform_guess_has_the_vocabulary_s_perplexity() {
        let nlls: Vec<f64> = (0..10).map(|t| nll(Kernels::best().ops, &[0.5; 32], t)).collect();
        let s = Score::of(&nlls);
        assert!((s.perplexity() - 32.0).abs() < 1e-9 && s.error() < 1e-6);
    }

    #[test]
    fn the_error_is_that_of_a_mean() {
        let s = Score::of(&[1.0, 2.0, 3.0, 4.0]);
        // mean 2.5, variance 1.25 over 4, so the mean is known within sqrt(1.25 / 3).
        assert!((s.error() / s.perplexity() - (1.25f64 / 3.0).sqrt()).abs() < 1e-12);
    }

    #[test]
    fn sums_and_places_are_right_about_every_block_s_end() {
        for kernels in Isa::ALL.into_iter().filter_map(Kernels::for_isa) {
            for n in [1, 2, 63, 64, 65, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 17] {
                let values: Vec<f32> = (0..n).map(|i| (i * 7919 % 1009) as f32 / 40.0 - 30.0).collect();
                let max = values.iter().copied().fold(f32::MIN, f32::max);
                let want: f64 = values.iter().map(|&v| (v as f64 - max as f64).exp()).sum();
                let got = Extent::of(kernels.ops, &values);
                assert!((got.ln_sum - want.ln()).abs() < 1e-6 && got.max == max, "{} {n}", kernels.isa.name());
                let first = values.iter().position(|&v| v == max);
                assert_eq!(Some(top(kernels.ops, &values)), first, "{} {n}", kernels.isa.name());
            }
            assert_eq!(top(kernels.ops, &[f32::NAN; 3]), 0);
        }
    }
}
