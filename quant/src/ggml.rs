//! Activations as ggml's kernels see them, for figures that are to equal llama.cpp's.
//!
//! ggml multiplies blocks of weights by blocks of bytes, whose products and sums it takes exactly: all that sets its results
//! apart from arithmetic in f32 is how it rounds activations. Here they are rounded in the same way, and stay f32.

use crate::format::{Format, SLAB};

/// How ggml rounds the activations that meet a format (`vec_dot_type` in ggml-cpu.c, commit 0c1e570).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Rounding {
    /// Bytes with a scale in f32 for every 256: k-quants, i-quants, ternary formats.
    Q8K,
    /// Bytes with a scale in f16 for every 32: the formats with blocks of 32. (Where they have a minimum, ggml rounds the sum of
    /// each block once more; that is left out.)
    Q8_0,
    /// bf16.
    Bf16,
    /// f16. (Not so where ggml was compiled for AMX: its kernel for F16 leaves them f32.)
    F16,
}

impl Rounding {
    /// All of them.
    pub const ALL: [Rounding; 4] = [Rounding::Q8K, Rounding::Q8_0, Rounding::Bf16, Rounding::F16];

    /// The format's; none where activations stay f32.
    pub fn of(format: Format) -> Option<Rounding> {
        match format {
            Format::F32 => None,
            Format::F16 => Some(Rounding::F16),
            Format::BF16 => Some(Rounding::Bf16),
            Format::Q4_0
            | Format::Q4_1
            | Format::Q5_0
            | Format::Q5_1
            | Format::Q8_0
            | Format::IQ4_NL
            | Format::MXFP4 => Some(Rounding::Q8_0),
            _ => Some(Rounding::Q8K),
        }
    }

    /// Rounds up to 256 values.
    pub fn round(self, x: &mut [f32]) {
        match self {
            // quantize_row_q8_K_ref: the value of the largest magnitude becomes -127.
            Rounding::Q8K => x.chunks_mut(SLAB).for_each(|x| {
                let most = x.iter().fold(0.0f32, |m, &v| if v.abs() > m.abs() { v } else { m });
                let inverse = -127.0 / most;
                // Too small to divide by: ggml's integers mean nothing then, but their scale is zero.
                match inverse.is_infinite() {
                    true => x.iter_mut().for_each(|v| *v *= 0.0),
                    false => x.iter_mut().for_each(|v| {
                        let rounded = (inverse * *v).round_ties_even();
                        // Not `min`, which would make NaN a number.
                        *v = if rounded > 127.0 { 127.0 } else { rounded } * (1.0 / inverse);
                    }),
                }
            }),
            // quantize_row_q8_0 of x86.
            Rounding::Q8_0 => x.chunks_mut(32).for_each(|x| {
                let most = x.iter().fold(0.0f32, |m, &v| m.max(v.abs()));
                let (inverse, scale) = (127.0 / most, half::f16::from_f32(most / 127.0).to_f32());
                match inverse.is_infinite() {
                    true => x.iter_mut().for_each(|v| *v *= 0.0),
                    false => x.iter_mut().for_each(|v| *v = (inverse * *v).round_ties_even() * scale),
                }
            }),
            Rounding::Bf16 => x.iter_mut().for_each(|v| *v = half::bf16::from_f32(*v).to_f32()),
            Rounding::F16 => x.iter_mut().for_each(|v| *v = half::f16::from_f32(*v).to_f32()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::FORMATS;

    /// `type_traits_cpu` in ggml-cpu.c: only weights in f32 meet activations as they are.
    #[test]
    fn activations_beside_all_formats_but_f32_are_rounded() {
        let stay = FORMATS.iter().filter(|s| Rounding::of(s.format).is_none()).map(|s| s.name);
        assert_eq!(stay.collect::<Vec<_>>(), ["f32"]);
        let mut x = [1.0 + 1.0 / 4096.0, 1.0 + 3.0 / 4096.0];
        Rounding::F16.round(&mut x);
        assert_eq!(x, [1.0, 1.0 + 1.0 / 1024.0]);
    }

    #[test]
    fn numbers_too_small_to_divide_by_become_zero_and_nan_stays() {
        for r in Rounding::ALL {
            let mut x = [0.0; SLAB];
            (x[0], x[1], x[2]) = (2e-37, -1e-37, f32::NAN);
            r.round(&mut x);
            assert!(x[2].is_nan() && x[0].abs() < 1e-36 && x[1].abs() < 1e-36 && x[3] == 0.0, "{r:?}: {:?}", &x[..4]);
        }
    }

    #[test]
    fn values_on_the_grid_stay_and_others_go_to_the_nearest() {
        for r in Rounding::ALL {
            // -127 to 128 halves, of which the largest sets the scale: the grid is the halves, but for the last.
            let mut x: Vec<f32> = (0..SLAB).map(|i| (i as f32 - 127.0) / 2.0).collect();
            x[SLAB - 1] = 0.0;
            let want = x.clone();
            r.round(&mut x);
            if r != Rounding::Q8_0 {
                assert_eq!(x, want, "{r:?}");
            }
            let step = match r {
                Rounding::Bf16 => 0.25,
                Rounding::F16 => 1.0 / 32.0,
                Rounding::Q8K | Rounding::Q8_0 => 0.51,
            };
            let mut y: Vec<f32> = want.iter().map(|v| v * 0.99 + 0.1).collect();
            let before = y.clone();
            r.round(&mut y);
            let off = y.iter().zip(&before).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            assert!(0.0 < off && off < step / 2.0 + 0.03, "{r:?}: off by {off}");
            let mut zeros = [0.0; SLAB];
            r.round(&mut zeros);
            assert_eq!(zeros, [0.0; SLAB]);
        }
    }
}
