//! IQ2 and IQ3: a search over scales in which each eight (or four) codes are moved to a point of a grid.
//!
//! ```text
//! signs apart; where only seven of eight are kept, the least important weight of an odd number changes its own
//! for each of some scales around the one that maps the largest weight to the highest level:
//!     codes, moved to the grid; the scale that fits them best; keep the best of all
//! at the best scale, the codes that were off the grid once more
//! ```
//!
//! Sixteen groups lie side by side, as in every search; only the moves to the grid go from group to group, and there the
//! candidates lie side by side ([`Grid::nearest`]).

use super::grid::{self, Grid};
use super::search::{Groups, ZERO_BELOW, code, in_order, lanes, nearest, positive, side_by_side};
use super::{f16_bytes, sum_of_squares};
use crate::lanes::{L, Lanes};

/// The most weights that are searched together: sixteen groups of 32.
const MOST: usize = 512;

/// Which codes are looked up again at the best scale.
#[derive(Clone, Copy, PartialEq)]
enum Again {
    /// Those that were off the grid.
    Off,
    /// All of a group of which some were.
    Group,
    /// All.
    All,
}

/// How a format searches.
#[derive(Clone, Copy)]
struct Search {
    /// What the squares of the weights are multiplied by for `sigma2`.
    sigma: f32,
    /// Without an importance matrix, `share * sigma2 + x^2` weighs an error.
    share: f32,
    /// Whether the signs of eight weights are made even in number.
    even: bool,
    /// A group whose largest weight is below this is all zero.
    least: f32,
    /// Scales on either side.
    steps: i32,
    /// Their distance, in levels.
    width: f32,
    again: Again,
}

/// What was found of up to sixteen groups.
struct Found {
    scale: [f32; L],
    live: [bool; L],
    q: [u8; MOST],
    signs: [u8; MOST / 8],
}

/// Makes `x` magnitudes, bit `i % 8` of `signs[i / 8]` their signs. With `even`, the weight that matters least changes its
/// sign where that makes their number even, and keeps the wrong one as a negative magnitude.
#[inline(always)]
fn take_signs(x: &mut [f32; MOST], w: &[f32; MOST], even: bool) -> [u8; MOST / 8] {
    let mut signs = [0; MOST / 8];
    for ((x, w), signs) in x.as_chunks_mut::<8>().0.iter_mut().zip(w.as_chunks::<8>().0).zip(&mut signs) {
        for i in 0..8 {
            *signs |= ((x[i] < 0.0) as u8) << i;
            x[i] = x[i].abs();
        }
        if even && signs.count_ones() % 2 == 1 {
            let (mut at, mut least) = (0, w[0] * x[0] * x[0]);
            for i in 1..8 {
                let loss = w[i] * x[i] * x[i];
                (at, least) = if loss < least { (i, loss) } else { (at, least) };
            }
            x[at] = -x[at];
            *signs ^= 1 << at;
        }
    }
    signs
}

/// Moves the codes of each `D` weights to the grid, of group `g` those whose bits `todo[g]` has. Returns the bits of those
/// that were off it.
#[inline(always)]
fn to_grid<V: Lanes, const N: usize, const D: usize>(
    grid: &Grid<D>,
    x: &[f32; MOST],
    root: &[f32; MOST],
    scale: V,
    todo: [u8; L],
    q: &mut Groups<V, N>,
) -> [u8; L] {
    let (scale, mut off, mut t) = (lanes(scale), [0; L], [[0.0; L]; N]);
    for i in 0..N {
        q[i].store(&mut t[i]);
    }
    for k in 0..N / D {
        let mut combination = q[k * D + D - 1];
        for i in (0..D - 1).rev() {
            combination = combination.mul(V::splat(grid.levels as f32)).add(q[k * D + i]);
        }
        let combination = lanes(combination);
        for g in 0..L {
            let at = combination[g] as usize;
            if todo[g] >> k & 1 == 0 || grid.point(at).is_some() {
                continue;
            }
            off[g] |= 1 << k;
            let start = g * N + k * D;
            let point = grid.nearest::<V>(at, &x[start..][..D], &root[start..][..D], scale[g], 0.0);
            for i in 0..D {
                t[k * D + i][g] = grid.points[point][i] as f32;
            }
        }
    }
    for i in 0..N {
        q[i] = V::load(&t[i]);
    }
    off
}

/// The codes at an inverse scale, before they are moved to the grid.
#[inline(always)]
fn codes<V: Lanes, const N: usize>(x: &Groups<V, N>, id: V, highest: f32) -> Groups<V, N> {
    let mut q = *x;
    for q in &mut q {
        *q = code(V::splat(0.5).mul(id.mul(*q).sub(V::splat(1.0))), 0.0, highest);
    }
    q
}

/// Sums of `w * x * v` and `w * v * v` for the values `v = 2 q + 1`.
#[inline(always)]
fn moments<V: Lanes, const N: usize>(x: &Groups<V, N>, w: &Groups<V, N>, q: &Groups<V, N>) -> (V, V) {
    let (mut vx, mut v2) = (V::splat(0.0), V::splat(0.0));
    for i in 0..N {
        let v = q[i].add(q[i]).add(V::splat(1.0));
        vx = vx.add(w[i].mul(x[i]).mul(v));
        v2 = v2.add(w[i].mul(v).mul(v));
    }
    (vx, v2)
}

/// What errors of values count, and the roots of that: up to `MOST` each.
#[inline(always)]
fn weigh<V: Lanes>(s: &Search, x: &[f32], importance: Option<&[f32]>) -> ([f32; MOST], [f32; MOST]) {
    let (mut weights, mut roots) = ([0.0; MOST], [0.0; MOST]);
    for (b, x) in x.as_chunks::<256>().0.iter().enumerate() {
        let sigma2 = V::splat(s.sigma * sum_of_squares(x) / 256.0);
        for (i, x) in x.as_chunks::<L>().0.iter().enumerate() {
            let (at, x) = (256 * b + L * i, V::load(x));
            let x2 = x.mul(x);
            let w = match importance {
                Some(w) => V::load(w[at..].first_chunk().expect("as long as x")).mul(sigma2.add(x2).sqrt()),
                None => V::splat(s.share).mul(sigma2).add(x2),
            };
            w.store(weights[at..].first_chunk_mut().expect("room for x"));
            w.sqrt().store(roots[at..].first_chunk_mut().expect("room for x"));
        }
    }
    (weights, roots)
}

/// Searches sixteen groups, or fewer where `x` ends.
#[inline(always)]
fn find<V: Lanes, const N: usize, const D: usize>(
    grid: &Grid<D>,
    s: Search,
    x: &[f32],
    importance: Option<&[f32]>,
) -> Found {
    let (zero, one) = (V::splat(0.0), V::splat(1.0));
    let mut values = [0.0; MOST];
    values[..x.len()].copy_from_slice(x);
    let (weights, roots) = weigh::<V>(&s, x, importance);
    let mut signs = take_signs(&mut values, &weights, s.even);
    let (xs, ws) = (side_by_side::<V, N>(&values[..L * N]), side_by_side::<V, N>(&weights[..L * N]));
    let mut max = xs[0];
    for &x in &xs {
        max = max.below(x, x, max);
    }
    let highest = (grid.levels - 1) as f32;
    let top = 2.0 * highest + 1.0;
    let mut live = lanes(max).map(|max| max >= s.least);
    let mut scale = max.div(V::splat(top));
    if s.again == Again::All {
        // From the scale of four levels, and what it would be for three.
        scale = positive(&xs, &ws, grid.levels as f32 + 1.0).0;
        max = scale.mul(V::splat(grid.levels as f32));
        for (live, max) in live.iter_mut().zip(lanes(max)) {
            *live &= max > 0.0;
        }
    }
    let everything = live.map(|l| if l { 0xFF } else { 0 });
    let mut off = if s.again == Again::Group { everything } else { [0; L] };
    let (mut best, mut q) = (zero, [zero; N]);
    for step in -s.steps..=s.steps {
        let id = V::splat(top + step as f32 * s.width).div(max);
        let mut new = codes(&xs, id, highest);
        let new_off = to_grid(grid, &values, &roots, one.div(id), everything, &mut new);
        let (vx, v2) = moments(&xs, &ws, &new);
        let gain = zero.below(v2, vx.mul(vx), V::splat(f32::NEG_INFINITY));
        let limit = best.mul(v2);
        let fit = vx.div(v2);
        scale = limit.below(gain, fit, scale);
        best = limit.below(gain, fit.mul(vx), best);
        for i in 0..N {
            q[i] = limit.below(gain, new[i], q[i]);
        }
        for (g, better) in lanes(limit.below(gain, one, zero)).into_iter().enumerate() {
            off[g] = if better != 0.0 { new_off[g] } else { off[g] };
        }
    }
    let (mut todo, positive) = (off, lanes(zero.below(scale, one, zero)));
    for g in 0..L {
        let all = s.again == Again::All || s.again == Again::Group && off[g] != 0;
        todo[g] = if positive[g] == 0.0 {
            0
        } else if all {
            everything[g]
        } else {
            off[g]
        };
    }
    if todo.iter().any(|&t| t != 0) {
        let mut new = codes(&xs, one.div(scale), highest);
        to_grid(grid, &values, &roots, scale, todo, &mut new);
        for k in 0..N / D {
            let mut mask = [0.0; L];
            for g in 0..L {
                mask[g] = (todo[g] >> k & 1) as f32;
            }
            let mask = V::load(&mask);
            for i in k * D..(k + 1) * D {
                q[i] = zero.below(mask, new[i], q[i]);
            }
        }
        let (vx, v2) = moments(&xs, &ws, &q);
        let fit = zero.below(v2, vx.div(v2), scale);
        scale = zero.below(V::load(&todo.map(|t| t as f32)), fit, scale);
    }
    let mut found = Found { scale: lanes(scale), live, q: [0; MOST], signs };
    for g in 0..L {
        if !live[g] {
            found.scale[g] = 0.0;
        } else if found.scale[g] < 0.0 {
            // Scales have no sign: the weights change theirs.
            found.scale[g] = -found.scale[g];
            signs[g * N / 8..(g + 1) * N / 8].iter_mut().for_each(|s| *s = !*s);
        }
    }
    found.signs = signs;
    in_order(&q, &mut found.q[..L * N]);
    found
}

impl Found {
    /// The point that the `i`th `D` codes are.
    #[inline(always)]
    fn point<const D: usize>(&self, grid: &Grid<D>, i: usize) -> usize {
        let combination = self.q[i * D..(i + 1) * D].iter().rev().fold(0, |at, &l| at * grid.levels + l as usize);
        grid.point(combination).expect("codes were moved to the grid")
    }

    /// The scale of the groups `of`, and the level of each: `scale = d / 31 * (2 * level + 1)`, nearly. `None` where all
    /// are zero.
    #[inline(always)]
    fn levels<const GROUPS: usize>(&self, first: usize) -> Option<(f32, [u8; GROUPS])> {
        let of: &[f32; GROUPS] = self.scale[first..].first_chunk().expect("a block's groups");
        let max = of.iter().fold(0.0f32, |m, &s| if s > m { s } else { m });
        let d = max / 31.0;
        let id = 1.0 / d;
        (max != 0.0).then(|| (d, of.map(|s| nearest(0.5 * (id * s - 1.0)).clamp(0, 15) as u8)))
    }

    /// Four times seven signs of a group of 32.
    #[inline(always)]
    fn seven_signs(&self, g: usize) -> u32 {
        (0..4).fold(0, |s, k| s | (self.signs[4 * g + k] as u32 & 127) << (7 * k))
    }
}

#[inline(always)]
pub(super) fn xxs2<V: Lanes>(x: &[f32], importance: Option<&[f32]>, out: &mut [u8]) {
    const S: Search =
        Search { sigma: 1.0, share: 0.0, even: true, least: ZERO_BELOW, steps: 6, width: 0.1, again: Again::All };
    let grid = grid::iq2_xxs();
    for (i, (x, out)) in x.chunks(512).zip(out.chunks_mut(2 * 66)).enumerate() {
        let f = find::<V, 32, 8>(grid, S, x, importance.map(|w| &w[512 * i..][..x.len()]));
        for (s, out) in out.as_chunks_mut::<66>().0.iter_mut().enumerate() {
            out.fill(0);
            let Some((d, levels)) = f.levels::<8>(8 * s) else { continue };
            out[..2].copy_from_slice(&f16_bytes(d));
            for (g, out) in out[2..].as_chunks_mut::<8>().0.iter_mut().enumerate() {
                let mut high = (levels[g] as u32) << 28;
                let g = 8 * s + g;
                if f.live[g] {
                    for k in 0..4 {
                        out[k] = f.point(grid, 4 * g + k) as u8;
                    }
                    high |= f.seven_signs(g);
                }
                out[4..].copy_from_slice(&high.to_le_bytes());
            }
        }
    }
}

#[inline(always)]
pub(super) fn xs2<V: Lanes>(x: &[f32], importance: Option<&[f32]>, out: &mut [u8]) {
    const S: Search =
        Search { sigma: 1.0, share: 0.0, even: true, least: ZERO_BELOW, steps: 9, width: 0.1, again: Again::Off };
    let grid = grid::iq2_xs();
    for (i, (x, out)) in x.chunks(256).zip(out.as_chunks_mut::<74>().0).enumerate() {
        let f = find::<V, 16, 8>(grid, S, x, importance.map(|w| &w[256 * i..][..256]));
        out.fill(0);
        let Some((d, levels)) = f.levels::<16>(0) else { continue };
        out[..2].copy_from_slice(&f16_bytes(d));
        for k in (0..32).filter(|k| f.live[k / 2]) {
            let word = f.point(grid, k) as u16 | (f.signs[k] as u16 & 127) << 9;
            out[2 + 2 * k..][..2].copy_from_slice(&word.to_le_bytes());
        }
        for g in 0..8 {
            out[66 + g] = levels[2 * g] | levels[2 * g + 1] << 4;
        }
    }
}

#[inline(always)]
pub(super) fn s2<V: Lanes>(x: &[f32], importance: Option<&[f32]>, out: &mut [u8]) {
    const S: Search =
        Search { sigma: 2.0, share: 0.25, even: false, least: 1e-8, steps: 9, width: 0.1, again: Again::Off };
    let grid = grid::iq2_s();
    for (i, (x, out)) in x.chunks(256).zip(out.as_chunks_mut::<82>().0).enumerate() {
        let f = find::<V, 16, 8>(grid, S, x, importance.map(|w| &w[256 * i..][..256]));
        out.fill(0);
        for k in (0..32).filter(|k| f.live[k / 2]) {
            let point = f.point(grid, k);
            out[2 + k] = point as u8;
            out[34 + k] = f.signs[k];
            out[66 + k / 4] |= ((point >> 8) << (2 * (k % 4))) as u8;
        }
        let Some((d, levels)) = f.levels::<16>(0) else { continue };
        out[..2].copy_from_slice(&f16_bytes(d * 0.9875));
        for g in 0..8 {
            out[74 + g] = levels[2 * g] | levels[2 * g + 1] << 4;
        }
    }
}

#[inline(always)]
pub(super) fn xxs3<V: Lanes>(x: &[f32], importance: Option<&[f32]>, out: &mut [u8]) {
    const S: Search =
        Search { sigma: 2.0, share: 0.0, even: true, least: 1e-8, steps: 15, width: 0.2, again: Again::Off };
    let grid = grid::iq3_xxs();
    for (i, (x, out)) in x.chunks(512).zip(out.chunks_mut(2 * 98)).enumerate() {
        let f = find::<V, 32, 4>(grid, S, x, importance.map(|w| &w[512 * i..][..x.len()]));
        for (s, out) in out.as_chunks_mut::<98>().0.iter_mut().enumerate() {
            out.fill(0);
            let Some((d, levels)) = f.levels::<8>(8 * s) else { continue };
            out[..2].copy_from_slice(&f16_bytes(d * 1.0125));
            for (i, &level) in levels.iter().enumerate() {
                let (mut high, g) = ((level as u32) << 28, 8 * s + i);
                if f.live[g] {
                    for k in 0..8 {
                        out[2 + 8 * i + k] = f.point(grid, 8 * g + k) as u8;
                    }
                    high |= f.seven_signs(g);
                }
                out[66 + 4 * i..][..4].copy_from_slice(&high.to_le_bytes());
            }
        }
    }
}

/// ggml's own does not step over groups of zeros: what follows one in its block is written 32 weights too early. Here every
/// group is in its place; without such groups bytes are the same.
#[inline(always)]
pub(super) fn s3<V: Lanes>(x: &[f32], importance: Option<&[f32]>, out: &mut [u8]) {
    // Only zeros are no group: everything else is at least the smallest number.
    const LEAST: f32 = f32::from_bits(1);
    const S: Search =
        Search { sigma: 2.0, share: 0.0, even: false, least: LEAST, steps: 9, width: 0.2, again: Again::Group };
    let grid = grid::iq3_s();
    for (i, (x, out)) in x.chunks(512).zip(out.chunks_mut(2 * 110)).enumerate() {
        let f = find::<V, 32, 4>(grid, S, x, importance.map(|w| &w[512 * i..][..x.len()]));
        for (s, out) in out.as_chunks_mut::<110>().0.iter_mut().enumerate() {
            out.fill(0);
            for i in (0..8).filter(|i| f.live[8 * s + i]) {
                for k in 0..8 {
                    let point = f.point(grid, 64 * s + 8 * i + k);
                    out[2 + 8 * i + k] = point as u8;
                    out[66 + i] |= ((point >> 8) << k) as u8;
                }
                out[74 + 4 * i..][..4].copy_from_slice(&f.signs[32 * s + 4 * i..][..4]);
            }
            let Some((d, levels)) = f.levels::<8>(8 * s) else { continue };
            out[..2].copy_from_slice(&f16_bytes(d * 1.033));
            for g in 0..4 {
                out[106 + g] = levels[2 * g] | levels[2 * g + 1] << 4;
            }
        }
    }
}
