//! TQ1_0 and TQ2_0: the largest magnitude is the scale, and all else rounds to -1, 0 or 1 of it.

use super::f16_bytes;

/// 256 codes in `0..=2` and the scale.
fn codes(x: &[f32; 256]) -> (f32, [u8; 256]) {
    let d = x.iter().fold(0.0f32, |m, x| m.max(x.abs()));
    let id = if d != 0.0 { 1.0 / d } else { 0.0 };
    (d, x.map(|x| ((x * id).round() as i32 + 1) as u8))
}

pub(super) fn tq1(x: &[f32], out: &mut [u8]) {
    for (x, out) in x.as_chunks::<256>().0.iter().zip(out.as_chunks_mut::<54>().0) {
        let (d, q) = codes(x);
        // Bytes, codes and the distance between the codes of one byte: 5 codes a byte, 4 in the last ones.
        for (at, n, from) in [(0, 32, 0), (32, 16, 160), (48, 4, 240)] {
            for i in 0..n {
                let digit = |k: usize| if from + i + k * n < 256 { q[from + i + k * n] as u16 } else { 0 };
                let number = (0..5).fold(0, |v, k| 3 * v + digit(k));
                out[at + i] = ((number * 256).div_ceil(243)) as u8;
            }
        }
        out[52..].copy_from_slice(&f16_bytes(d));
    }
}

pub(super) fn tq2(x: &[f32], out: &mut [u8]) {
    for (x, out) in x.as_chunks::<256>().0.iter().zip(out.as_chunks_mut::<66>().0) {
        let (d, q) = codes(x);
        out[..64].copy_from_slice(&super::kquant::crumbs(&q));
        out[64..].copy_from_slice(&f16_bytes(d));
    }
}
