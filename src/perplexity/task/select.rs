//! The questions that llama-perplexity takes of a data set, drawn with the Mersenne twister from seed 1.

use rand_mt::Mt;

/// `n` of `all` as for HellaSwag: drawn without putting back, in the order drawn; all of them where `n` is 0 or larger. Numbers
/// below a bound are drawn as libstdc++'s `uniform_int_distribution` does (Lemire, arXiv 1805.10941).
pub fn drawn(all: usize, n: usize) -> Vec<usize> {
    let mut rng = Mt::new(1);
    let mut left: Vec<usize> = (0..all).collect();
    let mut below = |bound: u32| {
        let mut product = rng.next_u32() as u64 * bound as u64;
        if (product as u32) < bound {
            let threshold = bound.wrapping_neg() % bound;
            while (product as u32) < threshold {
                product = rng.next_u32() as u64 * bound as u64;
            }
        }
        (product >> 32) as usize
    };
    let n = if n == 0 { all } else { n.min(all) };
    (0..n).map(|_| left.remove(below(left.len() as u32))).collect()
}

/// `n` of `all` as for Winogrande and multiple choice: drawn, the last one taking the place of each; all of them in their
/// order where `n` is 0 or not smaller.
pub fn sampled(all: usize, n: usize) -> Vec<usize> {
    let mut left: Vec<usize> = (0..all).collect();
    if n == 0 || n >= all {
        return left;
    }
    let mut rng = Mt::new(1);
    // In f32, product by product, as there.
    let scale = 1.0 / (1.0 + u32::MAX as f32);
    let mut draw = |left: usize| ((scale * rng.next_u32() as f32 * left as f32) as usize).min(left - 1);
    (0..n).map(|_| left.swap_remove(draw(left.len()))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_question_is_drawn_once() {
        for all in [1, 2, 7, 400] {
            for (pick, n) in [(drawn as fn(_, _) -> _, all), (drawn, 0), (sampled, all), (sampled, 0)] {
                let mut got: Vec<usize> = pick(all, n);
                got.sort_unstable();
                assert_eq!(got, (0..all).collect::<Vec<_>>());
            }
        }
        assert_eq!((drawn(50, 9).len(), sampled(50, 9).len()), (9, 9));
    }

    #[test]
    fn the_twister_is_the_reference_s() {
        // The 10,000th output from the default seed, as the C++ standard gives it (rand.predef).
        let mut rng = Mt::new(5489);
        assert_eq!((0..10_000).map(|_| rng.next_u32()).last(), Some(4_123_659_995));
    }
}
