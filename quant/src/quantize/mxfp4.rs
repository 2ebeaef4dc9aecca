//! MXFP4: the power of two that the largest magnitude asks for, and for every weight the nearest of the values.

use super::legacy::nibbles;
use super::search::{extreme, in_order, lanes, side_by_side};
use crate::lanes::{L, Lanes};

/// Twice the values that codes stand for; ggml's search meets them in this order.
const VALUES: [f32; 16] = [0., 1., 2., 3., 4., 6., 8., 12., 0., -1., -2., -3., -4., -6., -8., -12.];

#[inline(always)]
pub(super) fn mxfp4<V: Lanes>(x: &[f32], out: &mut [u8]) {
    const N: usize = 32;
    for (x, out) in x.chunks(L * N).zip(out.chunks_mut(L * 17)) {
        let groups = side_by_side::<V, N>(x);
        let (mut e, mut d) = ([0; L], [0.0; L]);
        for (g, &max) in lanes(extreme(&groups).1).iter().enumerate() {
            // The exponent of the largest, two less, as the largest value is 1.5 * 2^2. Magnitudes below 2^-125 wrap, as
            // they do in ggml; their codes are all zero.
            e[g] = if max > 0.0 { (max.log2().floor() - 2.0 + 127.0) as i32 as u8 } else { 0 };
            d[g] = crate::format::mxfp4::scale(e[g]);
        }
        let (d, mut q) = (V::load(&d), groups);
        for q in &mut q {
            let (x, mut code) = (*q, V::splat(0.0));
            let mut least = d.mul(V::splat(VALUES[0])).sub(x).abs();
            for (i, &value) in VALUES.iter().enumerate().skip(1) {
                let error = d.mul(V::splat(value)).sub(x).abs();
                code = error.below(least, V::splat(i as f32), code);
                least = error.below(least, error, least);
            }
            *q = code;
        }
        let mut codes = [0; L * N];
        in_order(&q, &mut codes);
        for (g, out) in out.as_chunks_mut::<17>().0.iter_mut().enumerate() {
            out[0] = e[g];
            nibbles(&codes.as_chunks().0[g], &mut out[1..]);
        }
    }
}
