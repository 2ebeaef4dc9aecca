//! The formats of 32 weights a block, sixteen blocks at a time.

use super::search::{Groups, Walk, affine, extreme, in_order, lanes, side_by_side, symmetric};
use super::{f16_bytes, sum_of_squares};
use crate::lanes::{L, Lanes};

/// Weights of a block.
const N: usize = 32;

/// The walk over scales that an importance matrix asks for.
pub(super) const WALK: Walk = Walk { start: -0.9, step: 0.05, steps: 36 };

/// How scales, minimums and codes are found, with so many codes. (Not closures: where one is not inlined, the rung's features
/// are not its own, and every instruction in it is a call.)
#[derive(Clone, Copy)]
enum Search {
    /// Without minimums; the extreme weight has the least code.
    Symmetric(f32),
    /// With minimums.
    Affine(f32),
    /// Q8_0's.
    Bytes,
}

/// Searches and packs sixteen blocks after the other. An importance matrix says what each error weighs.
#[inline(always)]
fn blocks<V: Lanes, const BYTES: usize>(
    x: &[f32],
    importance: Option<&[f32]>,
    out: &mut [u8],
    search: Search,
    pack: impl Fn(f32, f32, &[u8; N], &mut [u8; BYTES]),
) {
    let sigma2 = V::splat(if importance.is_some() { sum_of_squares(x) / x.len() as f32 } else { 0.0 });
    for (i, (x, out)) in x.chunks(L * N).zip(out.chunks_mut(L * BYTES)).enumerate() {
        let groups = side_by_side::<V, N>(x);
        let weights = importance.map(|w| {
            let mut w = side_by_side::<V, N>(&w[i * L * N..][..x.len()]);
            weigh(&groups, sigma2, &mut w);
            w
        });
        let (scale, min, q) = match search {
            Search::Symmetric(n) => symmetric_or(&groups, weights.as_ref(), n),
            Search::Affine(n) => affine_or(&groups, weights.as_ref(), n),
            Search::Bytes => signed_bytes(&groups),
        };
        let (scale, min, mut codes) = (lanes(scale), lanes(min), [0; L * N]);
        in_order::<V, N>(&q, &mut codes);
        for (g, out) in out.as_chunks_mut::<BYTES>().0.iter_mut().enumerate() {
            pack(scale[g], min[g], &codes.as_chunks().0[g], out);
        }
    }
}

/// `w *= sqrt(sigma2 + x^2)`: the larger a weight, the more its error counts.
#[inline(always)]
pub(super) fn weigh<V: Lanes, const N: usize>(x: &Groups<V, N>, sigma2: V, w: &mut Groups<V, N>) {
    for i in 0..N {
        w[i] = w[i].mul(sigma2.add(x[i].mul(x[i])).sqrt());
    }
}

/// `1 / d`, 0 for 0.
#[inline(always)]
fn inverse<V: Lanes>(d: V) -> V {
    V::splat(0.0).below(d.abs(), V::splat(1.0).div(d), V::splat(0.0))
}

/// Codes `0..2n` whose lowest is the largest magnitude.
#[inline(always)]
fn by_extreme<V: Lanes>(x: &Groups<V, N>, n: f32) -> (V, V, Groups<V, N>) {
    let d = extreme(x).0.div(V::splat(-n));
    let (id, mut q) = (inverse(d), *x);
    for q in &mut q {
        *q = q.mul(id).add(V::splat(n + 0.5)).min(V::splat(2.0 * n - 1.0));
    }
    (d, V::splat(0.0), q)
}

/// Codes `0..=n` from the least to the greatest weight.
#[inline(always)]
fn by_range<V: Lanes>(x: &Groups<V, N>, n: f32) -> (V, V, Groups<V, N>) {
    let (mut min, mut max) = (x[0], x[0]);
    for &x in x {
        min = x.below(min, x, min);
        max = max.below(x, x, max);
    }
    let d = max.sub(min).div(V::splat(n));
    let (id, mut q) = (inverse(d), *x);
    for q in &mut q {
        *q = q.sub(min).mul(id).add(V::splat(0.5)).min(V::splat(n));
    }
    (d, min, q)
}

/// With an importance matrix: nineteen scales around the extreme.
#[inline(always)]
fn symmetric_or<V: Lanes>(x: &Groups<V, N>, w: Option<&Groups<V, N>>, n: f32) -> (V, V, Groups<V, N>) {
    match w {
        None => by_extreme(x, n),
        Some(w) => {
            let (scale, q) = symmetric(x, w, n);
            (scale, V::splat(0.0), q)
        }
    }
}

/// With an importance matrix: a search for scale and minimum.
#[inline(always)]
fn affine_or<V: Lanes>(x: &Groups<V, N>, w: Option<&Groups<V, N>>, n: f32) -> (V, V, Groups<V, N>) {
    match w {
        None => by_range(x, n),
        Some(w) => {
            let found = affine::<V, N, false>(x, w, n, WALK);
            (found.scale, V::splat(-0.0).sub(found.min), found.q)
        }
    }
}

/// Nibbles of 32 codes: the first sixteen low, the others high.
#[inline(always)]
pub(super) fn nibbles(q: &[u8; N], out: &mut [u8]) {
    for j in 0..16 {
        out[j] = q[j] & 15 | q[j + 16] << 4;
    }
}

/// The fifth bits of 32 codes.
#[inline(always)]
fn fifth_bits(q: &[u8; N]) -> [u8; 4] {
    q.iter().enumerate().fold(0u32, |bits, (i, q)| bits | (*q as u32 >> 4 & 1) << i).to_le_bytes()
}

#[inline(always)]
pub(super) fn q4_0<V: Lanes>(x: &[f32], importance: Option<&[f32]>, out: &mut [u8]) {
    blocks::<V, 18>(x, importance, out, Search::Symmetric(8.0), |d, _, q, out| {
        out[..2].copy_from_slice(&f16_bytes(d));
        nibbles(q, &mut out[2..]);
    });
}

#[inline(always)]
pub(super) fn q4_1<V: Lanes>(x: &[f32], importance: Option<&[f32]>, out: &mut [u8]) {
    blocks::<V, 20>(x, importance, out, Search::Affine(15.0), |d, m, q, out| {
        out[..2].copy_from_slice(&f16_bytes(d));
        out[2..4].copy_from_slice(&f16_bytes(m));
        nibbles(q, &mut out[4..]);
    });
}

#[inline(always)]
pub(super) fn q5_0<V: Lanes>(x: &[f32], importance: Option<&[f32]>, out: &mut [u8]) {
    blocks::<V, 22>(x, importance, out, Search::Symmetric(16.0), |d, _, q, out| {
        out[..2].copy_from_slice(&f16_bytes(d));
        out[2..6].copy_from_slice(&fifth_bits(q));
        nibbles(q, &mut out[6..]);
    });
}

#[inline(always)]
pub(super) fn q5_1<V: Lanes>(x: &[f32], importance: Option<&[f32]>, out: &mut [u8]) {
    blocks::<V, 24>(x, importance, out, Search::Affine(31.0), |d, m, q, out| {
        out[..2].copy_from_slice(&f16_bytes(d));
        out[2..4].copy_from_slice(&f16_bytes(m));
        out[4..8].copy_from_slice(&fifth_bits(q));
        nibbles(q, &mut out[8..]);
    });
}

/// Codes -127 to 127, rounded to the nearest, at halves away from zero.
#[inline(always)]
fn signed_bytes<V: Lanes>(x: &Groups<V, N>) -> (V, V, Groups<V, N>) {
    let d = extreme(x).1.div(V::splat(127.0));
    let (id, mut q, half) = (inverse(d), *x, V::splat(0.5f32.next_down()));
    for q in &mut q {
        // The largest number below a half carries exactly those over. `in_order` truncates.
        let v = q.mul(id);
        *q = v.below(V::splat(0.0), v.sub(half), v.add(half));
    }
    (d, V::splat(0.0), q)
}

#[inline(always)]
pub(super) fn q8_0<V: Lanes>(x: &[f32], out: &mut [u8]) {
    blocks::<V, 34>(x, None, out, Search::Bytes, |d, _, q, out| {
        out[..2].copy_from_slice(&f16_bytes(d));
        out[2..].copy_from_slice(q);
    });
}
