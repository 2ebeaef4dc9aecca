//! IQ4_NL and IQ4_XS: a search over scales in which every weight takes the nearest of the sixteen values.

use super::legacy::{nibbles, weigh};
use super::search::{Groups, ZERO_BELOW, extreme, in_order, lanes, nearest, side_by_side};
use super::{f16_bytes, sum_of_squares};
use crate::format::iq4::VALUES;
use crate::lanes::{L, Lanes};

/// Weights of a group.
const N: usize = 32;
/// Candidates on either side.
const TRIES: i32 = 7;

/// The values as f32.
const LEVELS: [f32; 16] = floats();
const INDICES: [f32; 16] = [0., 1., 2., 3., 4., 5., 6., 7., 8., 9., 10., 11., 12., 13., 14., 15.];

const fn floats() -> [f32; 16] {
    let (mut f, mut i) = ([0.0; 16], 0);
    while i < 16 {
        f[i] = VALUES[i] as f32;
        i += 1;
    }
    f
}

/// What `of` has for the value nearest to `x`, the larger of two as near: passes the middles that `x` has reached.
#[inline(always)]
fn nearest_of<V: Lanes>(x: V, of: &[f32; 16]) -> V {
    let mut v = V::splat(of[0]);
    for j in 0..15 {
        let middle = (LEVELS[j] + LEVELS[j + 1]) / 2.0;
        v = x.below(V::splat(middle), v, V::splat(of[j + 1]));
    }
    v
}

#[inline(always)]
fn indices<V: Lanes>(x: &Groups<V, N>, id: V) -> Groups<V, N> {
    let mut q = *x;
    for q in &mut q {
        *q = nearest_of(id.mul(*q), &INDICES);
    }
    q
}

/// Sums of `w * q * x` and `w * q * q` for the values `q` nearest to `id * x`.
#[inline(always)]
fn moments<V: Lanes>(x: &Groups<V, N>, w: &Groups<V, N>, id: V) -> (V, V) {
    let (mut qx, mut q2) = (V::splat(0.0), V::splat(0.0));
    for i in 0..N {
        let q = nearest_of(id.mul(x[i]), &LEVELS);
        let wq = w[i].mul(q);
        qx = qx.add(wq.mul(x[i]));
        q2 = q2.add(wq.mul(q));
    }
    (qx, q2)
}

/// The scale of each group.
#[inline(always)]
fn scales<V: Lanes>(x: &Groups<V, N>, w: &Groups<V, N>) -> V {
    let zero = V::splat(0.0);
    let (max, amax) = extreme(x);
    let first = V::splat(VALUES[0] as f32);
    let (qx, q2) = moments(x, w, V::splat(1.0).div(V::splat(-0.0).sub(max).div(first)));
    let mut d = zero.below(q2, qx.div(q2), zero);
    let mut best = d.mul(qx);
    for step in -TRIES..=TRIES {
        let (qx, q2) = moments(x, w, V::splat((step + VALUES[0] as i32) as f32).div(max));
        let gain = zero.below(q2, qx.mul(qx), V::splat(f32::NEG_INFINITY));
        let (limit, candidate) = (best.mul(q2), qx.div(q2));
        d = limit.below(gain, candidate, d);
        best = limit.below(gain, candidate.mul(qx), best);
    }
    amax.below(V::splat(ZERO_BELOW), zero, d)
}

/// The weight of each error: from the importance matrix and `sigma2`, or without one the weight's square.
#[inline(always)]
fn weights<V: Lanes>(x: &Groups<V, N>, importance: Option<&[f32]>, sigma2: V) -> Groups<V, N> {
    let mut w = *x;
    match importance {
        Some(i) => {
            w = side_by_side(i);
            weigh(x, sigma2, &mut w);
        }
        None => w.iter_mut().for_each(|w| *w = w.mul(*w)),
    }
    w
}

#[inline(always)]
pub(super) fn nl<V: Lanes>(x: &[f32], importance: Option<&[f32]>, out: &mut [u8]) {
    for (i, (x, out)) in x.chunks(L * N).zip(out.chunks_mut(L * 18)).enumerate() {
        let groups = side_by_side::<V, N>(x);
        let mut sum = V::splat(0.0);
        for x in groups {
            sum = sum.add(x.mul(x));
        }
        let w = weights(&groups, importance.map(|w| &w[i * L * N..][..x.len()]), sum.mul(V::splat(2.0 / N as f32)));
        let d = scales(&groups, &w);
        let id = V::splat(0.0).below(d.abs(), V::splat(1.0).div(d), V::splat(0.0));
        let (d, mut q) = (lanes(d), [0; L * N]);
        in_order(&indices(&groups, id), &mut q);
        for (g, out) in out.as_chunks_mut::<18>().0.iter_mut().enumerate() {
            out[..2].copy_from_slice(&f16_bytes(d[g]));
            nibbles(&q.as_chunks().0[g], &mut out[2..]);
        }
    }
}

#[inline(always)]
pub(super) fn xs<V: Lanes>(x: &[f32], importance: Option<&[f32]>, out: &mut [u8]) {
    for (i, (x, out)) in x.chunks(512).zip(out.chunks_mut(2 * 136)).enumerate() {
        let groups = side_by_side::<V, N>(x);
        let mut sigma2 = [0.0; L];
        if importance.is_some() {
            for (x, s) in x.chunks(256).zip(sigma2.chunks_mut(8)) {
                s.fill(sum_of_squares(x) * (2.0 / 256.0));
            }
        }
        let w = weights(&groups, importance.map(|w| &w[i * 512..][..x.len()]), V::load(&sigma2));
        let scale = lanes(scales(&groups, &w));
        let (mut id, mut levels, mut q) = ([0.0; L], [0; L], [0; L * N]);
        let mut ds = [0.0; 2];
        for s in 0..2 {
            let mut max = 0.0f32;
            for &d in &scale[8 * s..][..8] {
                max = if d.abs() > max.abs() { d } else { max };
            }
            let d = -max / 32.0;
            ds[s] = d;
            let inverse = if d != 0.0 { 1.0 / d } else { 0.0 };
            for g in 8 * s..8 * s + 8 {
                let level = nearest(inverse * scale[g]).clamp(-32, 31);
                let dl = d * level as f32;
                id[g] = if dl != 0.0 { 1.0 / dl } else { 0.0 };
                levels[g] = (level + 32) as u16;
            }
        }
        in_order(&indices(&groups, V::load(&id)), &mut q);
        for (s, out) in out.as_chunks_mut::<136>().0.iter_mut().enumerate() {
            let levels = &levels[8 * s..][..8];
            out[..2].copy_from_slice(&f16_bytes(ds[s]));
            let high = (0..8).fold(0, |h, g| h | (levels[g] >> 4) << (2 * g));
            out[2..4].copy_from_slice(&high.to_le_bytes());
            for j in 0..4 {
                out[4 + j] = (levels[2 * j] & 15 | (levels[2 * j + 1] & 15) << 4) as u8;
            }
            for g in 0..8 {
                nibbles(&q.as_chunks().0[8 * s + g], &mut out[8 + 16 * g..][..16]);
            }
        }
    }
}
