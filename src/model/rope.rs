//! Rotary position embedding: the table of cosines and sines of a batch's positions.
//!
//! Angles are computed in f64 from the position, not by repeated multiplication, so that position 30,000 is as exact as
//! position 3.

use super::config::{Rope, Yarn};
use std::f64::consts::TAU;

/// The frequencies of a model: (rope.dim / 2).
pub fn frequencies(rope: &Rope, factors: Option<&[f32]>) -> Vec<f64> {
    let half = rope.dim / 2;
    let frequency = |i: usize| {
        let f = rope.base.powf(-2.0 * i as f64 / rope.dim as f64) / factors.map_or(1.0, |x| x[i] as f64);
        let stays = rope.yarn.map_or(0.0, |y| y.stays(rope, i));
        f * stays + f / rope.position_divisor * (1.0 - stays)
    };
    (0..half).map(frequency).collect()
}

impl Yarn {
    /// How much of frequency `i` stays as it is.
    fn stays(&self, rope: &Rope, i: usize) -> f64 {
        // The number of the frequency that turns so often.
        let number = |turns: f64| rope.dim as f64 * (self.original / (turns * TAU)).ln() / (2.0 * rope.base.ln());
        let (fast, slow) = (number(self.beta_fast), number(self.beta_slow));
        let (low, high) = (fast.floor().max(0.0), slow.ceil().min(rope.dim as f64 - 1.0));
        self.ext_factor * (1.0 - ((i as f64 - low) / (high - low).max(0.001)).clamp(0.0, 1.0))
    }
}

/// The cosines and then the sines of one position, times `magnitude`: `row` has 2 * frequencies.
pub fn angles(frequencies: &[f64], magnitude: f64, position: u32, row: &mut [f32]) {
    let (cos, sin) = row.split_at_mut(frequencies.len());
    for ((c, s), f) in cos.iter_mut().zip(sin).zip(frequencies) {
        let (sin, cos) = (f * position as f64).sin_cos();
        (*c, *s) = ((cos * magnitude) as f32, (sin * magnitude) as f32);
    }
}

#[cfg(test)]
mod tests {
    use super::super::config::Pairs;
    use super::*;

    /// Qwen2.5's: 128 dimensions, base 1e6, 32,768 positions of training, four times as many.
    #[test]
    fn yarn_divides_what_did_not_turn() {
        let yarn = Some(Yarn { original: 32_768.0, beta_fast: 32.0, beta_slow: 1.0, ext_factor: 1.0 });
        let rope =
            Rope { dim: 128, base: 1e6, pairs: Pairs::Halves, position_divisor: 4.0, yarn: None, magnitude: 1.0 };
        let whole = frequencies(&Rope { position_divisor: 1.0, ..rope.clone() }, None);
        let got = frequencies(&Rope { yarn, ..rope.clone() }, None);
        let divided = frequencies(&rope, None);
        let turns: Vec<f64> = whole.iter().map(|f| f * 32_768.0 / TAU).collect();
        for i in 0..64 {
            // Rounded outwards to whole numbers of a frequency.
            if turns[i] > 32.0 * whole[0] / whole[1] {
                assert_eq!(got[i], whole[i], "{i}");
            } else if turns[i] < whole[1] / whole[0] {
                assert_eq!(got[i], divided[i], "{i}");
            } else {
                assert!((divided[i]..=whole[i]).contains(&got[i]), "{i}");
            }
        }
        let between = (0..64).filter(|&i| got[i] != whole[i] && got[i] != divided[i]).count();
        assert!((14..=18).contains(&between), "{between}: ln(32) / ln(1e6) * 64 is 16");
    }
}
