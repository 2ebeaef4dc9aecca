//! IQ1_S and IQ1_M: three levels, shifted up or down by an eighth.
//!
//! With three levels the best codes are found exactly: in the order of their size, the weights are cut twice, and every pair
//! of cuts, with every shift, is tried by sums up to the cuts. Sixteen groups lie side by side. Then codes move to the grid.

use super::grid::{self, Grid};
use super::search::{lanes, nearest};
use super::{f16_bytes, sum_of_squares};
use crate::lanes::{L, Lanes};

/// The shift of the levels -1, 0 and 1.
const SHIFT: f32 = 0.125;

/// The weights of errors: by importance, or without one the weight's square.
#[inline(always)]
fn weights<V: Lanes>(x: &[f32; 256], importance: Option<&[f32]>) -> [f32; 256] {
    let sigma2 = V::splat(2.0 * sum_of_squares(x) / 256.0);
    let mut out = [0.0; 256];
    for (i, (x, out)) in x.as_chunks::<L>().0.iter().zip(out.as_chunks_mut::<L>().0).enumerate() {
        let x = V::load(x);
        let x2 = x.mul(x);
        let w = match importance {
            Some(w) => V::load(w[L * i..].first_chunk().expect("as long as x")).mul(sigma2.add(x2).sqrt()),
            None => x2,
        };
        w.store(out);
    }
    out
}

/// The numbers of a group's weights in the order of their size.
#[inline(always)]
fn order<const N: usize>(x: &[f32]) -> [u8; N] {
    let mut order = [0; N];
    for (i, o) in order.iter_mut().enumerate() {
        *o = i as u8;
    }
    // Stable, as equal weights may differ in importance.
    order.sort_by(|&a, &b| x[a as usize].partial_cmp(&x[b as usize]).unwrap_or(std::cmp::Ordering::Equal));
    order
}

/// Levels `0..=2` of weights in this order, cut at `at = first * (N + 1) + second`.
#[inline(always)]
fn cut<const N: usize>(order: &[u8; N], at: usize) -> [u8; N] {
    let (first, second, mut q) = (at / (N + 1), at % (N + 1), [0; N]);
    for (j, &i) in order.iter().enumerate() {
        q[i as usize] = (j >= first) as u8 + (j >= second) as u8;
    }
    q
}

/// Moves the codes of eight weights to the grid. Returns the point, and whether they were off it.
#[inline(always)]
fn to_grid<V: Lanes>(grid: &Grid<8>, q: &[u8], x: &[f32], w: &[f32], scale: f32, shift: f32) -> (usize, bool) {
    let combination = q.iter().rev().fold(0, |at, &l| at * 3 + l as usize);
    match grid.point(combination) {
        Some(point) => (point, false),
        None => (grid.nearest::<V>(combination, x, w, scale, shift - 1.0), true),
    }
}

/// Sums of `w * v * x` and `w * v * v`, added to `sums`, for the values `v = (level + shift - 1) * times`.
#[inline(always)]
fn add_moments(sums: &mut (f32, f32), levels: &[u8; 8], x: &[f32], w: &[f32], shift: f32, times: f32) {
    for i in 0..8 {
        let v = (levels[i] as f32 - 1.0 + shift) * times;
        sums.0 += w[i] * v * x[i];
        sums.1 += w[i] * v * v;
    }
}

/// What [`cuts_of_32`] and [`cuts_of_16`] find: a scale, the cuts and which shift; `at` is negative where nothing fits.
struct Best<V> {
    scale: V,
    score: V,
    at: V,
    which: V,
}

impl<V: Lanes> Best<V> {
    /// Takes what fits better: `vx^2 / v2` is larger.
    #[inline(always)]
    fn offer(&mut self, vx: V, v2: V, at: V, which: f32) {
        let gain = V::splat(0.0).below(v2, vx.mul(vx), V::splat(f32::NEG_INFINITY));
        let limit = self.score.mul(v2);
        let fit = vx.div(v2);
        self.scale = limit.below(gain, fit, self.scale);
        self.score = limit.below(gain, fit.mul(vx), self.score);
        self.at = limit.below(gain, at, self.at);
        self.which = limit.below(gain, V::splat(which), self.which);
    }
}

#[inline(always)]
fn nothing<V: Lanes>() -> Best<V> {
    let zero = V::splat(0.0);
    Best { scale: zero, score: V::splat(-f32::MAX), at: V::splat(-1.0), which: zero }
}

/// Cuts of groups of 32 by their sums of `w * x` and `w` up to each place, with one of two shifts.
#[inline(always)]
fn cuts_of_32<V: Lanes>(wx: &[[f32; L]; 33], w: &[[f32; L]; 33]) -> Best<V> {
    let mut best = nothing::<V>();
    let (all_wx, all_w) = (V::load(&wx[32]), V::load(&w[32]));
    for first in 0..=32 {
        let (low_wx, low_w) = (V::load(&wx[first]), V::load(&w[first]));
        for second in first..=32 {
            let (to_wx, to_w) = (V::load(&wx[second]), V::load(&w[second]));
            let at = V::splat((first * 33 + second) as f32);
            let parts = [(low_wx, low_w), (to_wx.sub(low_wx), to_w.sub(low_w)), (all_wx.sub(to_wx), all_w.sub(to_w))];
            for (which, shift) in [(0.0, SHIFT), (1.0, -SHIFT)] {
                let (mut vx, mut v2) = (V::splat(0.0), V::splat(0.0));
                for (i, (wx, w)) in parts.into_iter().enumerate() {
                    let v = V::splat(i as f32 - 1.0 + shift);
                    vx = vx.add(wx.mul(v));
                    v2 = v2.add(w.mul(v).mul(v));
                }
                best.offer(vx, v2, at, which);
            }
        }
    }
    best
}

/// Cuts of groups of 16 whose halves have shifts of their own, four together. Sums are those of each half alone; as
/// neighbouring levels differ by one, `vx = all * (1 + shift) - sum up to first - sum up to second`.
#[inline(always)]
fn cuts_of_16<V: Lanes>(wx: &[[[f32; L]; 17]; 2], w: &[[[f32; L]; 17]; 2]) -> Best<V> {
    let mut best = nothing::<V>();
    // For each shift the highest level, and the differences of the levels' squares.
    let values = [SHIFT, -SHIFT].map(|s| (1.0 + s, (s - 1.0) * (s - 1.0) - s * s, s * s - (1.0 + s) * (1.0 + s)));
    for first in 0..=16 {
        for second in first..=16 {
            let (mut vx, mut v2) = ([[V::splat(0.0); 2]; 2], [[V::splat(0.0); 2]; 2]); // by half and shift
            for h in 0..2 {
                let below = V::load(&wx[h][first]).add(V::load(&wx[h][second]));
                for (s, &(high, low_step, high_step)) in values.iter().enumerate() {
                    let high = V::splat(high);
                    vx[h][s] = V::load(&wx[h][16]).mul(high).sub(below);
                    v2[h][s] = V::load(&w[h][16])
                        .mul(high)
                        .mul(high)
                        .add(V::load(&w[h][first]).mul(V::splat(low_step)))
                        .add(V::load(&w[h][second]).mul(V::splat(high_step)));
                }
            }
            let at = V::splat((first * 17 + second) as f32);
            for which in 0..4 {
                let (a, b) = (which / 2, which % 2);
                best.offer(vx[0][a].add(vx[1][b]), v2[0][a].add(v2[1][b]), at, which as f32);
            }
        }
    }
    best
}

/// The largest magnitude.
#[inline(always)]
fn largest(x: &[f32]) -> f32 {
    x.iter().fold(0.0f32, |m, x| if x.abs() > m { x.abs() } else { m })
}

#[inline(always)]
pub(super) fn s<V: Lanes>(x: &[f32], importance: Option<&[f32]>, out: &mut [u8]) {
    const N: usize = 32;
    const LEAST: f32 = 1e-12;
    let grid = grid::iq1();
    for (i, (x, out)) in x.chunks(512).zip(out.chunks_mut(2 * 50)).enumerate() {
        let mut w = [0.0; 512];
        for (b, x) in x.as_chunks::<256>().0.iter().enumerate() {
            let importance = importance.map(|w| &w[512 * i + 256 * b..][..256]);
            w[256 * b..][..256].copy_from_slice(&weights::<V>(x, importance));
        }
        let (mut orders, mut up_wx, mut up_w) = ([[0; N]; L], [[0.0; L]; N + 1], [[0.0; L]; N + 1]);
        for (g, (x, w)) in x.as_chunks::<N>().0.iter().zip(w.as_chunks::<N>().0).enumerate() {
            orders[g] = order::<N>(x);
            for (j, &i) in orders[g].iter().enumerate() {
                up_wx[j + 1][g] = up_wx[j][g] + w[i as usize] * x[i as usize];
                up_w[j + 1][g] = up_w[j][g] + w[i as usize];
            }
        }
        let best = cuts_of_32::<V>(&up_wx, &up_w);
        let (scales, at, which) = (lanes(best.scale), lanes(best.at), lanes(best.which));
        for (b, out) in out.as_chunks_mut::<50>().0.iter_mut().enumerate() {
            out.fill(0);
            let (mut scale, mut down, mut high) = ([0.0f32; 8], [false; 8], [0u16; 8]);
            for j in 0..8 {
                let g = 8 * b + j;
                let (x, w) = (&x[N * g..][..N], &w[N * g..][..N]);
                if largest(x) < LEAST || at[g] < 0.0 {
                    continue;
                }
                let mut q = cut(&orders[g], at[g] as usize);
                (scale[j], down[j]) = (scales[g], which[g] == 1.0);
                if scale[j] < 0.0 {
                    q = q.map(|l| 2 - l);
                    (scale[j], down[j]) = (-scale[j], !down[j]);
                }
                let shift = if down[j] { -SHIFT } else { SHIFT };
                let (mut points, mut any_off) = ([0; 4], false);
                for k in 0..4 {
                    let of = 8 * k..8 * k + 8;
                    let (point, off) = to_grid::<V>(grid, &q[of.clone()], &x[of.clone()], &w[of], scale[j], shift);
                    (points[k], any_off) = (point, any_off | off);
                }
                if any_off {
                    let mut sums = (0.0, 0.0);
                    for (k, &p) in points.iter().enumerate() {
                        add_moments(&mut sums, &grid.points[p], &x[8 * k..], &w[8 * k..], shift, 1.0);
                    }
                    if sums.0 > 0.0 && sums.1 > 0.0 {
                        scale[j] = sums.0 / sums.1;
                    }
                }
                for (k, &p) in points.iter().enumerate() {
                    out[2 + 4 * j + k] = p as u8;
                    high[j] |= ((p >> 8) << (3 * k)) as u16;
                }
            }
            let max = largest(&scale);
            let d = max / 15.0;
            let id = 1.0 / d;
            if max != 0.0 {
                // ggml's factor; it was found by trying.
                out[..2].copy_from_slice(&f16_bytes(d * 1.125));
                for j in 0..8 {
                    let level = nearest(0.5 * (id * scale[j] - 1.0)).clamp(0, 7) as u16;
                    high[j] |= (level | (down[j] as u16) << 3) << 12;
                }
            }
            for (out, high) in out[34..].as_chunks_mut().0.iter_mut().zip(high) {
                *out = high.to_le_bytes();
            }
        }
    }
}

#[inline(always)]
pub(super) fn m<V: Lanes>(x: &[f32], importance: Option<&[f32]>, out: &mut [u8]) {
    const N: usize = 16;
    const LEAST: f32 = 1e-7;
    let grid = grid::iq1();
    for (i, (x, out)) in x.as_chunks::<256>().0.iter().zip(out.as_chunks_mut::<56>().0).enumerate() {
        let w = weights::<V>(x, importance.map(|w| &w[256 * i..][..256]));
        let (mut orders, mut up_wx, mut up_w) = ([[0; N]; L], [[[0.0; L]; N + 1]; 2], [[[0.0; L]; N + 1]; 2]);
        for (g, (x, w)) in x.as_chunks::<N>().0.iter().zip(w.as_chunks::<N>().0).enumerate() {
            orders[g] = order::<N>(x);
            for (j, &i) in orders[g].iter().enumerate() {
                let (i, half) = (i as usize, (i >= 8) as usize);
                for h in 0..2 {
                    let (wx, w) = if h == half { (w[i] * x[i], w[i]) } else { (0.0, 0.0) };
                    up_wx[h][j + 1][g] = up_wx[h][j][g] + wx;
                    up_w[h][j + 1][g] = up_w[h][j][g] + w;
                }
            }
        }
        let best = cuts_of_16::<V>(&up_wx, &up_w);
        let (scales, at, which) = (lanes(best.scale), lanes(best.at), lanes(best.which));
        out.fill(0);
        // Of each half of a group whether it is shifted down, and its point.
        let (mut scale, mut down, mut points) = ([0.0f32; L], [[false; 2]; L], [[0; 2]; L]);
        for g in 0..L {
            let (x, w) = (&x[N * g..][..N], &w[N * g..][..N]);
            if largest(x) < LEAST || at[g] < 0.0 {
                continue;
            }
            let mut q = cut(&orders[g], at[g] as usize);
            (scale[g], down[g]) = (scales[g], [which[g] >= 2.0, which[g] as u32 % 2 == 1]);
            if scale[g] < 0.0 {
                q = q.map(|l| 2 - l);
                (scale[g], down[g]) = (-scale[g], down[g].map(|d| !d));
            }
            let mut any_off = false;
            for k in 0..2 {
                let (of, shift) = (8 * k..8 * k + 8, if down[g][k] { -SHIFT } else { SHIFT });
                let (point, off) = to_grid::<V>(grid, &q[of.clone()], &x[of.clone()], &w[of], scale[g], shift);
                (points[g][k], any_off) = (point, any_off | off);
            }
            if any_off {
                let mut sums = (0.0, 0.0);
                for (k, &p) in points[g].iter().enumerate() {
                    let shift = if down[g][k] { -SHIFT } else { SHIFT };
                    add_moments(&mut sums, &grid.points[p], &x[8 * k..], &w[8 * k..], shift, 1.0);
                }
                if sums.0 > 0.0 && sums.1 > 0.0 {
                    scale[g] = sums.0 / sums.1;
                }
            }
            for (k, &p) in points[g].iter().enumerate() {
                out[2 * g + k] = p as u8;
                out[32 + g] |= ((p >> 8) << (4 * k)) as u8;
            }
        }
        let max = largest(&scale);
        if max == 0.0 {
            continue;
        }
        let mut d = max / 15.0;
        let (id, mut sums, mut words) = (1.0 / d, (0.0, 0.0), [0u16; 4]);
        for g in 0..L {
            let level = nearest(0.5 * (id * scale[g] - 1.0)).clamp(0, 7) as u16;
            words[g / 4] |= level << (3 * (g % 4));
            for k in 0..2 {
                out[32 + g] |= (down[g][k] as u8) << (3 + 4 * k);
                let shift = if down[g][k] { -SHIFT } else { SHIFT };
                let (at, times) = (N * g + 8 * k, (2 * level + 1) as f32);
                add_moments(&mut sums, &grid.points[points[g][k]], &x[at..], &w[at..], shift, times);
            }
        }
        if sums.1 > 0.0 {
            d = sums.0 / sums.1;
        }
        // ggml's factor; it was found by trying.
        let d = u16::from_le_bytes(f16_bytes(d * 1.1125));
        for (i, word) in words.iter().enumerate() {
            let word = word | (d >> (4 * i) & 15) << 12;
            out[48 + 2 * i..][..2].copy_from_slice(&word.to_le_bytes());
        }
    }
}
