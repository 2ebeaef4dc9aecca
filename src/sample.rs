//! From logits to a token.
//!
//! The samplers run in the order of llama.cpp's default chain, which is the order of [`Sampler::sample`]'s lines. The
//! random numbers are our own (PCG-XSH-RR 64/32, O'Neill 2014), so that a seed gives the same text on every machine.

use std::cmp::Ordering;
use std::collections::{HashMap, VecDeque};

/// What a person may set. The defaults are llama.cpp's.
#[derive(Clone, Debug, PartialEq)]
pub struct SampleParams {
    /// 0 or less: always the most likely token.
    pub temp: f32,
    /// Keep the K most likely; 0 for all.
    pub top_k: usize,
    /// Keep the most likely tokens whose probabilities sum to P; 1 for all.
    pub top_p: f32,
    /// Keep tokens at least P times as likely as the most likely; 0 for all.
    pub min_p: f32,
    /// Keep the tokens whose surprise is nearest to the expected, up to a sum of P; 1 for all.
    pub typical_p: f32,
    /// Divides (multiplies, where negative) the logits of recent tokens; 1 for none.
    pub repeat_penalty: f32,
    /// How many tokens are recent.
    pub repeat_last_n: usize,
    /// Subtracted once from the logits of recent tokens.
    pub presence_penalty: f32,
    /// Subtracted for each time a token is among the recent.
    pub frequency_penalty: f32,
    /// Added to logits.
    pub logit_bias: Vec<(u32, f32)>,
    /// The seed; none for a random one.
    pub seed: Option<u64>,
}

impl Default for SampleParams {
    fn default() -> SampleParams {
        SampleParams {
            temp: 0.8,
            top_k: 40,
            top_p: 0.95,
            min_p: 0.05,
            typical_p: 1.0,
            repeat_penalty: 1.0,
            repeat_last_n: 64,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            logit_bias: Vec::new(),
            seed: None,
        }
    }
}

/// A token that may be drawn.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Candidate {
    id: u32,
    logit: f32,
    p: f32,
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
    candidates: Vec<Candidate>,
}

impl Sampler {
    /// A sampler; without a seed, one is taken from the system's randomness.
    pub fn new(params: SampleParams) -> Sampler {
        let seed = params.seed.unwrap_or_else(random_seed);
        Sampler { seed, rng: Pcg::new(seed), recent: VecDeque::new(), candidates: Vec::new(), params }
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
        self.load(logits);
        self.penalize();
        if self.params.temp <= 0.0 {
            return self.most_likely();
        }
        self.top_k();
        self.typical();
        self.top_p();
        self.min_p();
        self.temperature();
        self.draw()
    }

    fn load(&mut self, logits: &[f32]) {
        self.candidates.clear();
        self.candidates.extend((0..).zip(logits).map(|(id, &l)| {
            let logit = if l.is_nan() { f32::NEG_INFINITY } else { l };
            Candidate { id, logit, p: 0.0 }
        }));
        for &(id, bias) in &self.params.logit_bias {
            if let Some(c) = self.candidates.get_mut(id as usize) {
                c.logit += bias;
            }
        }
    }

    fn penalize(&mut self) {
        let p = &self.params;
        if p.repeat_penalty == 1.0 && p.presence_penalty == 0.0 && p.frequency_penalty == 0.0 {
            return;
        }
        let mut counts: HashMap<u32, u32> = HashMap::new();
        self.recent.iter().for_each(|&t| *counts.entry(t).or_default() += 1);
        for (id, n) in counts {
            if let Some(c) = self.candidates.get_mut(id as usize) {
                c.logit = if c.logit > 0.0 { c.logit / p.repeat_penalty } else { c.logit * p.repeat_penalty };
                c.logit -= p.presence_penalty + p.frequency_penalty * n as f32;
            }
        }
    }

    fn most_likely(&self) -> u32 {
        self.candidates.iter().min_by(|a, b| by_logit(a, b)).map_or(0, |c| c.id)
    }

    /// Leaves the candidates sorted, as the samplers after it want them.
    fn top_k(&mut self) {
        let k = if self.params.top_k == 0 { usize::MAX } else { self.params.top_k };
        if k < self.candidates.len() {
            self.candidates.select_nth_unstable_by(k - 1, by_logit);
            self.candidates.truncate(k);
        }
        self.candidates.sort_unstable_by(by_logit);
    }

    /// Probabilities of the candidates that are left; they are sorted.
    fn softmax(&mut self) {
        let max = self.candidates.iter().map(|c| c.logit).fold(f32::NEG_INFINITY, f32::max);
        let mut sum = 0.0;
        for c in &mut self.candidates {
            // All impossible (or one infinite): equals are equally likely.
            c.p = if c.logit == max { 1.0 } else { (c.logit - max).exp() };
            sum += c.p;
        }
        self.candidates.iter_mut().for_each(|c| c.p /= sum);
    }

    /// Locally typical sampling (Meister et al., 2023).
    fn typical(&mut self) {
        if self.params.typical_p >= 1.0 {
            return;
        }
        self.softmax();
        let entropy: f32 = self.candidates.iter().filter(|c| c.p > 0.0).map(|c| -c.p * c.p.ln()).sum();
        let distance = |c: &Candidate| (-c.p.ln() - entropy).abs();
        self.candidates.sort_by(|a, b| distance(a).total_cmp(&distance(b)));
        self.keep_sum(self.params.typical_p);
        self.candidates.sort_unstable_by(by_logit);
    }

    /// Nucleus sampling (Holtzman et al., 2020).
    fn top_p(&mut self) {
        if self.params.top_p >= 1.0 {
            return;
        }
        self.softmax();
        self.keep_sum(self.params.top_p);
    }

    /// Keeps candidates, in their order, until their probabilities reach `p`; at least one.
    fn keep_sum(&mut self, p: f32) {
        let mut sum = 0.0;
        let n = self.candidates.iter().position(|c| {
            sum += c.p;
            sum >= p
        });
        self.candidates.truncate(n.map_or(usize::MAX, |n| n + 1));
    }

    fn min_p(&mut self) {
        if self.params.min_p <= 0.0 {
            return;
        }
        let least = self.candidates[0].logit + self.params.min_p.min(1.0).ln();
        let n = self.candidates.partition_point(|c| c.logit >= least);
        self.candidates.truncate(n.max(1));
    }

    fn temperature(&mut self) {
        self.candidates.iter_mut().for_each(|c| c.logit /= self.params.temp);
    }

    fn draw(&mut self) -> u32 {
        self.softmax();
        let mut left = self.rng.unit();
        for c in &self.candidates {
            left -= c.p;
            if left < 0.0 {
                return c.id;
            }
        }
        // Rounding left a sliver above the sum of all.
        self.candidates.last().map_or(0, |c| c.id)
    }
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

    /// Uniform in [0, 1).
    fn unit(&mut self) -> f32 {
        (self.next() >> 8) as f32 / (1 << 24) as f32
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
}
