//! Rotary position embedding: the table of cosines and sines of a batch's positions.
//!
//! Angles are computed in f64 from the position, not by repeated multiplication, so that position 30,000 is as exact as
//! position 3.

use super::config::Rope;

/// The frequencies of a model: (rope.dim / 2).
pub fn frequencies(rope: &Rope, factors: Option<&[f32]>) -> Vec<f64> {
    let half = rope.dim / 2;
    (0..half)
        .map(|i| {
            let f = rope.base.powf(-2.0 * i as f64 / rope.dim as f64) / rope.position_divisor;
            factors.map_or(f, |x| f / x[i] as f64)
        })
        .collect()
}

/// The cosines and then the sines of one position: `row` has 2 * frequencies.
pub fn angles(frequencies: &[f64], position: u32, row: &mut [f32]) {
    let (cos, sin) = row.split_at_mut(frequencies.len());
    for ((c, s), f) in cos.iter_mut().zip(sin).zip(frequencies) {
        let (sin, cos) = (f * position as f64).sin_cos();
        (*c, *s) = (cos as f32, sin as f32);
    }
}
