//! The searches: which scale (and minimum) makes a group's codes err least.
//!
//! Every one is a loop over candidate scales, and for each a sum over the weights of a group. ggml's order of those sums
//! decides its bytes, so they cannot be split; but the groups of a block do not know of each other. Sixteen of them lie
//! side by side in the lanes, weight `i` of each in one vector, and every lane does exactly what ggml's scalar loop does:
//!
//! ```text
//! x[i] = (weight i of group 0, weight i of group 1, .. group 15)
//! ```
//!
//! The bodies are `inline(always)` functions and loops, not closures: a closure that is not inlined lacks the rung's
//! features, and every instruction becomes a call (IQ4_XS: 2 MB/s).
//!
//! No multiplication is fused with an addition, on any machine: ggml's library is built without.

use crate::lanes::{L, Lanes};

/// A group whose largest magnitude is below this is all zero (ggml's `GROUP_MAX_EPS`).
pub(super) const ZERO_BELOW: f32 = 1e-15;

/// Sixteen groups of `N` values side by side.
pub(super) type Groups<V, const N: usize> = [V; N];

/// Lays groups that follow one another side by side; missing ones are zero.
#[inline(always)]
pub(super) fn side_by_side<V: Lanes, const N: usize>(x: &[f32]) -> Groups<V, N> {
    let mut t = [[0.0; L]; N];
    for (g, x) in x.as_chunks::<N>().0.iter().enumerate() {
        for i in 0..N {
            t[i][g] = x[i];
        }
    }
    let mut v = [V::splat(0.0); N];
    for i in 0..N {
        v[i] = V::load(&t[i]);
    }
    v
}

/// Codes back in the order of the weights, as bytes.
#[inline(always)]
pub(super) fn in_order<V: Lanes, const N: usize>(q: &Groups<V, N>, out: &mut [u8]) {
    let mut t = [[0.0; L]; N];
    for i in 0..N {
        q[i].store(&mut t[i]);
    }
    for (g, out) in out.as_chunks_mut::<N>().0.iter_mut().enumerate() {
        for i in 0..N {
            out[i] = t[i][g] as i32 as u8;
        }
    }
}

/// The lanes of a vector.
#[inline(always)]
pub(super) fn lanes<V: Lanes>(v: V) -> [f32; L] {
    let mut a = [0.0; L];
    v.store(&mut a);
    a
}

/// To the nearest integer, ties to even, for magnitudes up to 2^22: the bits below one fall off the end of the mantissa.
#[inline(always)]
pub(super) fn round<V: Lanes>(x: V) -> V {
    let shift = V::splat(12_582_912.0); // 1.5 * 2^23
    x.add(shift).sub(shift)
}

/// The same, of one value.
#[inline(always)]
pub(super) fn nearest(x: f32) -> i32 {
    (x + 12_582_912.0).to_bits() as i32 - 0x4B40_0000
}

/// `round(x)`, kept in `low..=high`.
#[inline(always)]
pub(super) fn code<V: Lanes>(x: V, low: f32, high: f32) -> V {
    round(x).min(V::splat(high)).max(V::splat(low))
}

/// The value of largest magnitude in each group, the first of equals, with its sign, and its magnitude.
#[inline(always)]
pub(super) fn extreme<V: Lanes, const N: usize>(x: &Groups<V, N>) -> (V, V) {
    let (mut max, mut amax) = (V::splat(0.0), V::splat(0.0));
    for &x in x {
        let a = x.abs();
        max = amax.below(a, x, max);
        amax = amax.below(a, a, amax);
    }
    (max, amax)
}

/// Sums of `w * x * l` and `w * l * l` for the codes `l = round(iscale * x)` in `-n..n`.
#[inline(always)]
fn moments<V: Lanes, const N: usize>(x: &Groups<V, N>, w: &Groups<V, N>, iscale: V, n: f32) -> (V, V) {
    let (mut lx, mut l2) = (V::splat(0.0), V::splat(0.0));
    for i in 0..N {
        let l = code(iscale.mul(x[i]), -n, n - 1.0);
        lx = lx.add(w[i].mul(x[i]).mul(l));
        l2 = l2.add(w[i].mul(l).mul(l));
    }
    (lx, l2)
}

/// Codes in `0..2n` and a signed scale, `x = scale * (q - n)`, least weighted squares over nineteen scales
/// (`make_qx_quants`). A group of zeros has scale 0 and codes 0.
#[inline(always)]
pub(super) fn symmetric<V: Lanes, const N: usize>(x: &Groups<V, N>, w: &Groups<V, N>, n: f32) -> (V, Groups<V, N>) {
    let zero = V::splat(0.0);
    let (max, amax) = extreme(x);
    let mut iscale = V::splat(-n).div(max);
    let (lx, l2) = moments(x, w, iscale, n);
    let mut scale = zero.below(l2, lx.div(l2), zero);
    let mut best = scale.mul(lx);
    for step in (-9..=9).filter(|&s| s != 0) {
        let candidate = V::splat(-(n + 0.1 * step as f32)).div(max);
        let (lx, l2) = moments(x, w, candidate, n);
        // Better where l2 > 0 and lx^2 / l2 > best.
        let gain = zero.below(l2, lx.mul(lx), V::splat(f32::NEG_INFINITY));
        let limit = best.mul(l2);
        let s = lx.div(l2);
        iscale = limit.below(gain, candidate, iscale);
        scale = limit.below(gain, s, scale);
        best = limit.below(gain, s.mul(lx), best);
    }
    let least = V::splat(ZERO_BELOW);
    let mut q = [zero; N];
    for i in 0..N {
        let l = code(iscale.mul(x[i]), -n, n - 1.0).add(V::splat(n));
        q[i] = amax.below(least, zero, l);
    }
    (amax.below(least, zero, scale), q)
}

/// Codes in `0..2n` and a signed scale, by changing one code at a time while that helps (`make_q3_quants`).
#[inline(always)]
pub(super) fn descent<V: Lanes, const N: usize>(x: &Groups<V, N>, n: f32) -> (V, Groups<V, N>) {
    let zero = V::splat(0.0);
    let (max, amax) = extreme(x);
    let iscale = V::splat(-n).div(max);
    let (mut lx, mut l2, mut q) = (zero, zero, [zero; N]);
    for i in 0..N {
        let l = code(iscale.mul(x[i]), -n, n - 1.0);
        let w = x[i].mul(x[i]);
        q[i] = l;
        lx = lx.add(w.mul(x[i]).mul(l));
        l2 = l2.add(w.mul(l).mul(l));
    }
    for _ in 0..5 {
        let before = q;
        for i in 0..N {
            let w = x[i].mul(x[i]);
            let wx = w.mul(x[i]);
            let without_lx = lx.sub(wx.mul(q[i]));
            let without_l2 = l2.sub(w.mul(q[i]).mul(q[i]));
            let l = code(x[i].mul(without_l2).div(without_lx), -n, n - 1.0);
            let new_lx = without_lx.add(wx.mul(l));
            let new_l2 = without_l2.add(w.mul(l).mul(l));
            // Taken where the rest still points the right way, the code is another, and the fit is better.
            let gain = new_lx.mul(new_lx).mul(l2);
            let gain = zero.below(without_lx, zero.below(new_l2, gain, zero), zero);
            let gain = zero.below(l.sub(q[i]).abs(), gain, zero);
            // A gain of exactly zero is none, so that a masked lane never passes.
            let limit = lx.mul(lx).mul(new_l2).max(zero);
            lx = limit.below(gain, new_lx, lx);
            l2 = limit.below(gain, new_l2, l2);
            q[i] = limit.below(gain, l, q[i]);
        }
        let mut changed = zero;
        for i in 0..N {
            changed = changed.add(q[i].sub(before[i]).abs());
        }
        if lanes(changed).iter().all(|&c| c == 0.0) {
            break;
        }
    }
    let least = V::splat(ZERO_BELOW);
    for q in &mut q {
        *q = amax.below(least, zero, q.add(V::splat(n)));
    }
    let scale = zero.below(l2, lx.div(l2), zero);
    (amax.below(least, zero, scale), q)
}

/// How [`affine`] walks: `(start + step * i + n) / range` for `i` in `0..=steps`.
#[derive(Clone, Copy)]
pub(super) struct Walk {
    pub start: f32,
    pub step: f32,
    pub steps: u32,
}

/// What [`affine`] found: `x = scale * q - min`.
pub(super) struct Affine<V, const N: usize> {
    pub scale: V,
    pub min: V,
    pub q: Groups<V, N>,
}

/// Weighted squares (magnitudes with `ABS`) of what `scale * q + min` misses.
#[inline(always)]
fn affine_error<V: Lanes, const N: usize, const ABS: bool>(
    x: &Groups<V, N>,
    w: &Groups<V, N>,
    scale: V,
    min: V,
    q: &Groups<V, N>,
) -> V {
    let mut error = V::splat(0.0);
    for i in 0..N {
        let d = scale.mul(q[i]).add(min).sub(x[i]);
        error = error.add(w[i].mul(if ABS { d.abs() } else { d.mul(d) }));
    }
    error
}

/// Codes in `0..=n`, a scale and a minimum that is not negative: least weighted squares, or with `ABS` least weighted
/// magnitudes (`make_qkx2_quants`, `make_qkx3_quants`). Each better candidate moves the minimum from which the next starts.
#[inline(always)]
pub(super) fn affine<V: Lanes, const N: usize, const ABS: bool>(
    x: &Groups<V, N>,
    w: &Groups<V, N>,
    n: f32,
    walk: Walk,
) -> Affine<V, N> {
    let zero = V::splat(0.0);
    let (mut min, mut max, mut sum_w, mut sum_x) = (x[0], x[0], w[0], w[0].mul(x[0]));
    for i in 1..N {
        min = x[i].below(min, x[i], min);
        max = max.below(x[i], x[i], max);
        sum_w = sum_w.add(w[i]);
        sum_x = sum_x.add(w[i].mul(x[i]));
    }
    min = zero.below(min, zero, min);
    let first_min = min;
    let mut iscale = V::splat(n).div(max.sub(min));
    let mut scale = V::splat(1.0).div(iscale);
    // The best candidate: its inverse scale, and the minimum from which it was rounded.
    let mut from = min;
    let mut q = [zero; N];
    for i in 0..N {
        q[i] = code(iscale.mul(x[i].sub(min)), 0.0, n);
    }
    let mut best = affine_error::<V, N, ABS>(x, w, scale, min, &q);
    for i in 0..=walk.steps {
        let candidate = V::splat(walk.start + walk.step * i as f32 + n).div(max.sub(min));
        let (mut l1, mut l2, mut lx) = (zero, zero, zero);
        for i in 0..N {
            let l = code(candidate.mul(x[i].sub(min)), 0.0, n);
            let wl = w[i].mul(l);
            q[i] = l;
            l1 = l1.add(wl);
            l2 = l2.add(wl.mul(l));
            lx = lx.add(wl.mul(x[i]));
        }
        let det = sum_w.mul(l2).sub(l1.mul(l1));
        let s = sum_w.mul(lx).sub(sum_x.mul(l1)).div(det);
        let m = l2.mul(sum_x).sub(l1.mul(lx)).div(det);
        // A positive minimum is none.
        let s = zero.below(m, lx.div(l2), s);
        let m = zero.below(m, zero, m);
        let error = zero.below(det, affine_error::<V, N, ABS>(x, w, s, m, &q), V::splat(f32::INFINITY));
        iscale = error.below(best, candidate, iscale);
        from = error.below(best, min, from);
        scale = error.below(best, s, scale);
        min = error.below(best, m, min);
        best = error.below(best, error, best);
    }
    // Groups of one value: nothing to search.
    let flat = first_min.below(max, V::splat(0.0), V::splat(1.0));
    for i in 0..N {
        q[i] = zero.below(flat, zero, code(iscale.mul(x[i].sub(from)), 0.0, n));
    }
    min = zero.below(flat, first_min, min);
    Affine { scale: zero.below(flat, zero, scale), min: V::splat(-0.0).sub(min), q }
}

/// A code as the byte in which it is kept: a negative one comes back as 256 more. Only values that should not be negative
/// have such codes; the grids of IQ2_XXS meet them, where a sign is changed for parity's sake, and ggml's bytes depend on it.
#[inline(always)]
fn byte<V: Lanes>(l: V) -> V {
    // Down to a whole multiple of 256.
    let wraps = round(l.sub(V::splat(127.5)).mul(V::splat(1.0 / 256.0)));
    l.sub(wraps.mul(V::splat(256.0)))
}

/// Weighted squares of what codes `0..=n` miss at a scale of `1 / iscale`; with `KEPT`, of the codes as they are kept.
#[inline(always)]
fn positive_error<V: Lanes, const N: usize, const KEPT: bool>(
    x: &Groups<V, N>,
    w: &Groups<V, N>,
    n: f32,
    iscale: V,
) -> V {
    let (scale, mut error) = (V::splat(1.0).div(iscale), V::splat(0.0));
    for i in 0..N {
        let l = round(iscale.mul(x[i]));
        let l = if KEPT { byte(l) } else { l.min(V::splat(n)) };
        let d = x[i].sub(scale.mul(l));
        error = error.add(w[i].mul(d).mul(d));
    }
    error
}

/// Codes in `0..=n` and a scale for values that are not negative (`make_qp_quants`): how scales are quantized in turn.
#[inline(always)]
pub(super) fn positive<V: Lanes, const N: usize>(x: &Groups<V, N>, w: &Groups<V, N>, n: f32) -> (V, Groups<V, N>) {
    let zero = V::splat(0.0);
    let mut max = zero;
    for &x in x {
        max = max.below(x, x, max);
    }
    let mut iscale = V::splat(n).div(max);
    let mut best = positive_error::<V, N, true>(x, w, n, iscale);
    for step in (-4..=4).filter(|&s| s != 0) {
        let candidate = V::splat(0.1 * step as f32 + n).div(max);
        let e = positive_error::<V, N, false>(x, w, n, candidate);
        iscale = e.below(best, candidate, iscale);
        best = e.below(best, e, best);
    }
    let (mut lx, mut l2, mut q) = (zero, zero, [zero; N]);
    for i in 0..N {
        let l = round(iscale.mul(x[i])).min(V::splat(n));
        q[i] = byte(l);
        lx = lx.add(w[i].mul(x[i]).mul(l));
        l2 = l2.add(w[i].mul(l).mul(l));
    }
    for _ in 0..5 {
        let mut changed = zero;
        for i in 0..N {
            let wx = w[i].mul(x[i]);
            let without_lx = lx.sub(wx.mul(q[i]));
            let without_l2 = l2.sub(w[i].mul(q[i]).mul(q[i]));
            let l = round(x[i].mul(without_l2).div(without_lx)).min(V::splat(n));
            let new_lx = without_lx.add(wx.mul(l));
            let new_l2 = without_l2.add(w[i].mul(l).mul(l));
            let gain = new_lx.mul(new_lx).mul(l2);
            let gain = zero.below(without_lx, zero.below(without_l2, gain, zero), zero);
            let gain = zero.below(l.sub(q[i]).abs(), gain, zero);
            let limit = lx.mul(lx).mul(new_l2).max(zero);
            lx = limit.below(gain, new_lx, lx);
            l2 = limit.below(gain, new_l2, l2);
            q[i] = limit.below(gain, byte(l), q[i]);
            // Also where a code that was kept as another byte is set to what it was.
            changed = limit.below(gain, V::splat(1.0), changed);
        }
        if lanes(changed).iter().all(|&c| c == 0.0) {
            break;
        }
    }
    let least = V::splat(ZERO_BELOW);
    for q in &mut q {
        *q = max.below(least, zero, *q);
    }
    let scale = zero.below(l2, lx.div(l2), zero);
    (max.below(least, zero, scale), q)
}
