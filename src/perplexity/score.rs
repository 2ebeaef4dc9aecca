//! Negative log-likelihoods of tokens, summed to a perplexity.

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

/// The largest logit, its place (the first of equals), and `sum(exp(logit - max))`:
/// exponentials in f32, their sum in f64, as llama-perplexity computes them.
pub fn extent(logits: &[f32]) -> (f32, usize, f64) {
    let mut top = 0;
    for (i, &l) in logits.iter().enumerate() {
        if l > logits[top] {
            top = i;
        }
    }
    let max = logits[top];
    (max, top, logits.iter().map(|&l| (l - max).exp() as f64).sum())
}

/// `-ln softmax(logits)[token]`.
pub fn nll(logits: &[f32], token: u32) -> f64 {
    let (max, _, sum) = extent(logits);
    sum.ln() + (max - logits[token as usize]) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_uniform_guess_has_the_vocabulary_s_perplexity() {
        let nlls: Vec<f64> = (0..10).map(|t| nll(&[0.5; 32], t)).collect();
        let s = Score::of(&nlls);
        assert!((s.perplexity() - 32.0).abs() < 1e-9 && s.error() < 1e-6);
    }

    #[test]
    fn the_error_is_that_of_a_mean() {
        let s = Score::of(&[1.0, 2.0, 3.0, 4.0]);
        // mean 2.5, variance 1.25 over 4, so the mean is known within sqrt(1.25 / 3).
        assert!((s.error() / s.perplexity() - (1.25f64 / 3.0).sqrt()).abs() < 1e-12);
    }
}
