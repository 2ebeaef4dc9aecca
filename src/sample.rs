//! From logits to a token.
//!
//! The samplers run in the order of llama.cpp's default chain, which is the order of [`Sampler::sample`]'s lines. The
//! random numbers (PCG-XSH-RR 64/32, O'Neill 2014) and the exponential are our own, so that the same logits and seed
//! give the same token on every machine: the C library's `expf` may differ in its last bit.
//!
//! Vocabularies have 150,000 tokens, and 40 of them are usually wanted. So nothing here sorts them all: greedy is one
//! pass, top-k one pass with a rising threshold, and the samplers that keep a sum of probabilities select as they go.

mod params;
pub mod parse;

pub use params::{Overrides, SampleParams};

use std::cmp::Ordering;
use std::collections::{HashMap, VecDeque};
use std::f64::consts::{LN_2, LOG2_E};

/// A token that may be drawn.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Candidate {
    id: u32,
    logit: f32,
    /// What it counts for in a draw: relative to the most likely token at first, as a share of all after [`softmax`].
    p: f64,
}

/// More likely first; of equals, the lower id.
fn by_logit(a: &Candidate, b: &Candidate) -> Ordering {
    b.logit.total_cmp(&a.logit).then(a.id.cmp(&b.id))
}

/// Draws tokens, and remembers the recent ones.
pub struct Sampler {
    params: SampleParams,
    seed: u64,
    rng: Pcg,
    recent: VecDeque<u32>,
    /// Scratch: how often each recent token occurs; the logits with bias and penalties; what is left to draw from.
    counts: HashMap<u32, u32>,
    adjusted: Vec<f32>,
    candidates: Vec<Candidate>,
}

impl Sampler {
    /// A sampler; without a seed, one is taken from the system's randomness.
    pub fn new(params: SampleParams) -> Sampler {
        let seed = params.seed.unwrap_or_else(random_seed);
        Sampler {
            rng: Pcg::new(seed),
            params,
            seed,
            recent: VecDeque::new(),
            counts: HashMap::new(),
            adjusted: Vec::new(),
            candidates: Vec::new(),
        }
    }

    /// The seed that repeats this sampler's choices.
    pub fn seed(&self) -> u64 {
        self.seed
    }

    /// Counts a token among the recent ones.
    pub fn accept(&mut self, id: u32) {
        self.recent.push_back(id);
        while self.recent.len() > self.params.repeat_last_n {
            self.recent.pop_front();
        }
    }

    /// Makes the end of a text the recent tokens.
    pub fn reset_recent(&mut self, text: &[u32]) {
        self.recent.clear();
        self.recent.extend(&text[text.len().saturating_sub(self.params.repeat_last_n)..]);
    }

    /// Forgets the recent tokens and starts the random numbers again.
    pub fn reset(&mut self) {
        self.recent.clear();
        self.rng = Pcg::new(self.seed);
    }

    /// Chooses the next token. NaN counts as impossible. Panics on no logits.
    pub fn sample(&mut self, logits: &[f32]) -> u32 {
        assert!(!logits.is_empty());
        let copied = self.adjust(logits);
        let adjusted = std::mem::take(&mut self.adjusted);
        let logits = if copied { &adjusted } else { logits };
        let greedy = self.params.temp <= 0.0;
        // Of the filters, only the typical one may leave out the most likely token.
        let id = if greedy && self.params.typical_p >= 1.0 {
            most_likely(logits)
        } else {
            self.top_k(logits);
            self.typical();
            if greedy {
                self.candidates.iter().min_by(|a, b| by_logit(a, b)).map_or(0, |c| c.id)
            } else {
                self.top_p();
                self.min_p();
                self.temperature();
                self.draw()
            }
        };
        self.adjusted = adjusted;
        id
    }

    /// Writes the logits with bias and penalties, if there are any, to `adjusted`; whether it did.
    fn adjust(&mut self, logits: &[f32]) -> bool {
        let p = &self.params;
        let penalties = (p.repeat_penalty != 1.0 || p.presence_penalty != 0.0 || p.frequency_penalty != 0.0)
            && !self.recent.is_empty();
        if p.logit_bias.is_empty() && !penalties {
            return false;
        }
        self.adjusted.clear();
        self.adjusted.extend_from_slice(logits);
        for &(id, bias) in &p.logit_bias {
            if let Some(logit) = self.adjusted.get_mut(id as usize) {
                *logit += bias;
            }
        }
        if penalties {
            self.counts.clear();
            for &id in &self.recent {
                *self.counts.entry(id).or_default() += 1;
            }
            for (&id, &n) in &self.counts {
                if let Some(logit) = self.adjusted.get_mut(id as usize) {
                    *logit = if *logit > 0.0 { *logit / p.repeat_penalty } else { *logit * p.repeat_penalty };
                    *logit -= p.presence_penalty + p.frequency_penalty * n as f32;
                }
            }
        }
        true
    }

    /// Loads the K most likely, sorted; all, by id, where K is 0 or no fewer.
    fn top_k(&mut self, logits: &[f32]) {
        let all = (0..).zip(logits).map(|(id, &logit)| Candidate { id, logit: possible(logit), p: 0.0 });
        let k = self.params.top_k;
        self.candidates.clear();
        if k == 0 || k >= logits.len() {
            self.candidates.extend(all);
            return;
        }
        // Whenever twice K (and enough to pay for a selection) have come together, the better half stays, and its worst
        // logit becomes the threshold for all that follow. Equals of it that follow have higher ids: they lose.
        let room = (2 * k).max(256);
        let mut threshold = None;
        for c in all {
            if threshold.is_some_and(|t| c.logit.total_cmp(&t).is_le()) {
                continue;
            }
            self.candidates.push(c);
            if self.candidates.len() == room {
                self.candidates.select_nth_unstable_by(k - 1, by_logit);
                self.candidates.truncate(k);
                threshold = Some(self.candidates[k - 1].logit);
            }
        }
        self.candidates.sort_unstable_by(by_logit);
        self.candidates.truncate(k);
    }

    /// Locally typical sampling (Meister et al., 2023).
    fn typical(&mut self) {
        if self.params.typical_p >= 1.0 {
            return;
        }
        softmax(&mut self.candidates);
        // A token's surprise is ln(sum) - logit and the entropy is the mean surprise: ln(sum) falls out of the
        // difference.
        let mean: f64 = self.candidates.iter().filter(|c| c.p > 0.0).map(|c| c.p * f64::from(c.logit)).sum();
        let distance = |c: &Candidate| (mean - f64::from(c.logit)).abs();
        let nearer = |a: &Candidate, b: &Candidate| distance(a).total_cmp(&distance(b)).then(by_logit(a, b));
        keep_sum(&mut self.candidates, nearer, |sum| sum > f64::from(self.params.typical_p));
        self.candidates.sort_unstable_by(by_logit);
    }

    /// Nucleus sampling (Holtzman et al., 2020).
    fn top_p(&mut self) {
        if self.params.top_p >= 1.0 {
            return;
        }
        softmax(&mut self.candidates);
        keep_sum(&mut self.candidates, by_logit, |sum| sum >= f64::from(self.params.top_p));
    }

    fn min_p(&mut self) {
        if self.params.min_p <= 0.0 {
            return;
        }
        weigh(&mut self.candidates);
        let least = f64::from(self.params.min_p.min(1.0));
        self.candidates.retain(|c| c.p >= least);
    }

    fn temperature(&mut self) {
        let max = max_logit(&self.candidates);
        for c in &mut self.candidates {
            // Relative to the greatest, which then stands at 0 however small the temperature is.
            c.logit = if c.logit == max { 0.0 } else { (c.logit - max) / self.params.temp };
        }
    }

    fn draw(&mut self) -> u32 {
        softmax(&mut self.candidates);
        let mut left = self.rng.unit();
        for c in &self.candidates {
            left -= c.p;
            if left < 0.0 {
                return c.id;
            }
        }
        // Rounding left a sliver above the sum of all.
        self.candidates.iter().rfind(|c| c.p > 0.0).map_or(0, |c| c.id)
    }
}

/// The logit, or the least one if it is no number.
fn possible(logit: f32) -> f32 {
    if logit.is_nan() { f32::NEG_INFINITY } else { logit }
}

/// The token of the greatest logit; of equals, the lowest id.
pub(crate) fn most_likely(logits: &[f32]) -> u32 {
    let mut best = (0, f32::NEG_INFINITY);
    for (id, &logit) in (0..).zip(logits) {
        // False for NaN.
        if logit > best.1 {
            best = (id, logit);
        }
    }
    best.0
}

fn max_logit(candidates: &[Candidate]) -> f32 {
    candidates.iter().map(|c| c.logit).fold(f32::NEG_INFINITY, f32::max)
}

/// Sets `p` to the probability relative to the most likely candidate, whose is 1.
fn weigh(candidates: &mut [Candidate]) {
    let max = max_logit(candidates);
    for c in candidates {
        // Where the greatest is infinite, the difference of equals is no number; they are equally likely.
        c.p = if c.logit == max { 1.0 } else { exp(f64::from(c.logit) - f64::from(max)) };
    }
}

/// Sets `p` to the probability among the candidates.
fn softmax(candidates: &mut [Candidate]) {
    weigh(candidates);
    let sum: f64 = candidates.iter().map(|c| c.p).sum();
    candidates.iter_mut().for_each(|c| c.p /= sum);
}

/// Keeps the first candidates in `order`, sorted, up to the one whose probability makes the sum `enough`.
fn keep_sum(
    candidates: &mut Vec<Candidate>,
    order: impl Fn(&Candidate, &Candidate) -> Ordering,
    enough: impl Fn(f64) -> bool,
) {
    let (mut done, mut step, mut sum) = (0, 256, 0.0);
    while done < candidates.len() {
        let rest = &mut candidates[done..];
        let n = step.min(rest.len());
        if n < rest.len() {
            rest.select_nth_unstable_by(n - 1, &order);
        }
        rest[..n].sort_unstable_by(&order);
        for i in 0..n {
            sum += rest[i].p;
            if enough(sum) {
                candidates.truncate(done + i + 1);
                return;
            }
        }
        done += n;
        step *= 4;
    }
}

/// e^x for x <= 0, within 1e-10 of it relatively, from additions, multiplications and divisions alone: IEEE 754 makes
/// those equal on every machine. x = k ln 2 + r with |r| <= ln 2 / 2; e^r by Taylor's series to r^9, whose next term is
/// below 1e-11.
fn exp(x: f64) -> f64 {
    // Below any share that a draw of 53 bits can tell from nothing; and the scale stays a normal number.
    if x.is_nan() || x < -700.0 {
        return 0.0;
    }
    let k = (x * LOG2_E).round();
    let r = x - k * LN_2;
    let mut e = 1.0;
    for n in (1..=9).rev() {
        e = 1.0 + e * r / f64::from(n);
    }
    e * f64::from_bits(((1023 + k as i64) as u64) << 52)
}

fn random_seed() -> u64 {
    use std::hash::{BuildHasher, Hasher};
    // The keys of a RandomState are drawn from the system.
    std::collections::hash_map::RandomState::new().build_hasher().finish() >> 32
}

/// PCG-XSH-RR: 64 bits of state, 32 of output.
struct Pcg(u64);

impl Pcg {
    fn new(seed: u64) -> Pcg {
        let mut r = Pcg(seed.wrapping_add(1442695040888963407));
        r.next();
        r
    }

    fn next(&mut self) -> u32 {
        let s = self.0;
        self.0 = s.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        ((((s >> 18) ^ s) >> 27) as u32).rotate_right((s >> 59) as u32)
    }

    /// Uniform in [0, 1), 53 bits: a step of 24 would miss the tail of a large vocabulary.
    fn unit(&mut self) -> f64 {
        let high = u64::from(self.next()) << 21;
        let low = u64::from(self.next()) >> 11;
        (high | low) as f64 / (1u64 << 53) as f64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn open() -> SampleParams {
        SampleParams { temp: 1.0, top_k: 0, top_p: 1.0, min_p: 0.0, seed: Some(1), ..SampleParams::default() }
    }

    /// How often each of `n` tokens is drawn.
    fn counts(p: SampleParams, logits: &[f32], draws: usize) -> Vec<usize> {
        let (mut s, mut n) = (Sampler::new(p), vec![0; logits.len()]);
        (0..draws).for_each(|_| n[s.sample(logits) as usize] += 1);
        n
    }

    #[test]
    fn draws_follow_the_distribution() {
        let p = [0.5f32, 0.25, 0.15, 0.07, 0.03];
        let n = 200_000;
        for (temp, power) in [(1.0, 1.0f32), (0.5, 2.0), (2.0, 0.5)] {
            let want: Vec<f32> = p.iter().map(|p| p.powf(power)).collect();
            let total: f32 = want.iter().sum();
            let got = counts(SampleParams { temp, ..open() }, &p.map(f32::ln), n);
            let chi: f32 = got
                .iter()
                .zip(&want)
                .map(|(&g, w)| {
                    let w = w / total * n as f32;
                    (g as f32 - w).powi(2) / w
                })
                .sum();
            assert!(chi < 18.5, "temp {temp}: chi-squared {chi} of 4 degrees (0.1 %): {got:?}");
        }
    }

    #[test]
    fn each_filter_keeps_what_it_should() {
        let logits = [0.4f32, 0.3, 0.2, 0.06, 0.04].map(f32::ln);
        let kept = |p: SampleParams| {
            let n = counts(p, &logits, 20_000);
            (0..5).filter(|&i| n[i] > 0).collect::<Vec<_>>()
        };
        assert_eq!(kept(open()), [0, 1, 2, 3, 4]);
        assert_eq!(kept(SampleParams { top_k: 2, ..open() }), [0, 1]);
        assert_eq!(kept(SampleParams { top_p: 0.65, ..open() }), [0, 1]);
        assert_eq!(kept(SampleParams { top_p: 0.0, ..open() }), [0]);
        assert_eq!(kept(SampleParams { min_p: 0.4, ..open() }), [0, 1, 2]);
        assert_eq!(kept(SampleParams { min_p: 1.0, ..open() }), [0]);
        // Entropy 1.37 nats; surprises 0.92 1.20 1.61 2.81 3.22: the nearest are 1, 2, 0.
        assert_eq!(kept(SampleParams { typical_p: 0.45, ..open() }), [1, 2]);
        assert_eq!(kept(SampleParams { temp: 0.0, ..open() }), [0]);
        assert_eq!(kept(SampleParams { temp: 0.0, typical_p: 0.45, ..open() }), [1], "the most likely of the typical");
        assert_eq!(kept(SampleParams { temp: 0.0, typical_p: 0.45, top_p: 0.1, min_p: 1.0, ..open() }), [1]);
        assert_eq!(kept(SampleParams { temp: 0.0, logit_bias: vec![(3, 9.0)], ..open() }), [3]);
    }

    #[test]
    fn penalties_fall_on_recent_tokens() {
        let p = SampleParams { temp: 0.0, repeat_penalty: 2.0, repeat_last_n: 2, ..SampleParams::default() };
        let mut s = Sampler::new(p);
        let logits = [3.0, 2.0, -1.0];
        assert_eq!(s.sample(&logits), 0);
        s.accept(0);
        assert_eq!(s.sample(&logits), 1, "3 / 2 is below 2");
        s.accept(2);
        s.accept(2);
        assert_eq!(s.sample(&logits), 0, "0 is no longer recent");
        let p = SampleParams { temp: 0.0, frequency_penalty: 0.6, presence_penalty: 0.1, ..SampleParams::default() };
        let mut s = Sampler::new(p);
        s.accept(0);
        assert_eq!(s.sample(&logits), 0, "3 - 0.7 is above 2");
        s.accept(0);
        assert_eq!(s.sample(&logits), 1, "3 - 1.3 is not");
    }

    #[test]
    fn ties_and_odd_logits_have_an_answer() {
        let greedy = || SampleParams { temp: 0.0, ..open() };
        assert_eq!(Sampler::new(greedy()).sample(&[1.0, 2.0, 2.0]), 1, "of equals the lowest id");
        assert_eq!(Sampler::new(greedy()).sample(&[f32::NAN, -5.0, f32::NAN]), 1);
        for odd in [vec![f32::NAN; 3], vec![f32::NEG_INFINITY; 3], vec![f32::INFINITY, 0.0, 1.0], vec![7.0]] {
            assert!((Sampler::new(SampleParams::default()).sample(&odd) as usize) < odd.len());
        }
    }

    #[test]
    fn a_seed_repeats_its_choices() {
        let logits: Vec<f32> = (0..1000).map(|i| (i as f32 * 0.37).sin()).collect();
        let run = |seed| {
            let mut s = Sampler::new(SampleParams { seed: Some(seed), ..SampleParams::default() });
            (0..50).map(|_| s.sample(&logits)).collect::<Vec<_>>()
        };
        assert_eq!(run(7), run(7));
        assert_ne!(run(7), run(8));
        let mut s = Sampler::new(SampleParams { seed: Some(7), ..SampleParams::default() });
        let first = s.sample(&logits);
        s.reset();
        assert_eq!(s.sample(&logits), first);
    }

    #[test]
    fn the_exponential_is_one() {
        for i in 0..=70_000 {
            let x = -f64::from(i) / 100.0;
            let (got, want) = (exp(x), x.exp());
            assert!((got - want).abs() <= 1e-10 * want, "exp({x}): {got}, expected {want}");
        }
        assert_eq!(exp(0.0), 1.0);
        assert_eq!(exp(f64::NEG_INFINITY), 0.0);
        assert_eq!(exp(f64::NAN), 0.0);
    }
}
