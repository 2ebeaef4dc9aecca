//! The k-quants: a search in every group, then the groups' scales quantized in turn, then all codes anew for the scales
//! that a reader will see.

use super::legacy::{WALK, weigh};
use super::search::{
    Groups, Walk, ZERO_BELOW, affine, code, descent, in_order, lanes, nearest, positive, side_by_side, symmetric,
};
use super::{f16_bytes, sum_of_squares, through_f16};
use crate::lanes::{L, Lanes};

/// Codes for the scales and minimums that are stored; where a scale came out as zero, the search's codes stay.
#[inline(always)]
fn recode<V: Lanes, const N: usize>(
    x: &Groups<V, N>,
    d: &[f32; L],
    min: &[f32; L],
    low: f32,
    high: f32,
    q: &mut Groups<V, N>,
) {
    let (d, min, zero) = (V::load(d), V::load(min), V::splat(0.0));
    for i in 0..N {
        // From `low..=high` to `0..=high - low`.
        let new = code(x[i].add(min).div(d), low, high).sub(V::splat(low));
        q[i] = zero.below(d.abs(), new, q[i]);
    }
}

/// Errors' weights with an importance matrix, and their sum in each group.
#[inline(always)]
fn weighted<V: Lanes, const N: usize>(x: &Groups<V, N>, importance: &[f32], sigma2: V) -> (Groups<V, N>, [f32; L]) {
    let mut w = side_by_side(importance);
    weigh(x, sigma2, &mut w);
    let mut sum = V::splat(0.0);
    for &w in &w {
        sum = sum.add(w);
    }
    (w, lanes(sum))
}

/// 64 bytes of 256 two-bit codes.
#[inline(always)]
pub(super) fn crumbs(q: &[u8; 256]) -> [u8; 64] {
    let mut out = [0; 64];
    for (q, out) in q.as_chunks::<128>().0.iter().zip(out.as_chunks_mut::<32>().0) {
        for i in 0..32 {
            out[i] = q[i] & 3 | (q[i + 32] & 3) << 2 | (q[i + 64] & 3) << 4 | (q[i + 96] & 3) << 6;
        }
    }
    out
}

/// Bit `at` of 256 codes, in 32 bytes: bit `g` of byte `i` is weight `32 g + i`'s.
#[inline(always)]
fn high_bits(q: &[u8; 256], at: u32) -> [u8; 32] {
    let mut out = [0; 32];
    for (g, q) in q.as_chunks::<32>().0.iter().enumerate() {
        for i in 0..32 {
            out[i] |= (q[i] >> at & 1) << g;
        }
    }
    out
}

#[inline(always)]
pub(super) fn q2<V: Lanes>(x: &[f32], importance: Option<&[f32]>, out: &mut [u8]) {
    const N: usize = 16;
    for (b, (x, out)) in x.as_chunks::<256>().0.iter().zip(out.as_chunks_mut::<84>().0).enumerate() {
        let groups = side_by_side::<V, N>(x);
        let (mut q, d, dmin);
        match importance {
            None => {
                let mut w = groups;
                w.iter_mut().for_each(|w| *w = w.abs());
                let found = affine::<V, N, true>(&groups, &w, 3.0, Walk { start: -0.5, step: 0.1, steps: 15 });
                q = found.q;
                let (scale, min) = (lanes(found.scale), lanes(found.min));
                let level = |v: &[f32; L]| {
                    let max = v.iter().fold(0.0f32, |m, &v| if v > m { v } else { m });
                    if max > 0.0 { (max / 15.0, v.map(|v| nearest(15.0 / max * v) as u8)) } else { (0.0, [0; L]) }
                };
                let (scales, mins) = (level(&scale), level(&min));
                (d, dmin) = (scales.0, mins.0);
                for (out, (s, m)) in out.iter_mut().zip(scales.1.iter().zip(&mins.1)) {
                    *out = s | m << 4;
                }
            }
            Some(w) => {
                let sigma2 = V::splat(sum_of_squares(x) / 256.0);
                let (w, sums) = weighted(&groups, &w[256 * b..][..256], sigma2);
                let found = affine::<V, N, false>(&groups, &w, 3.0, WALK);
                q = found.q;
                let both = [lanes(found.scale), lanes(found.min)];
                let (scale, levels) = positive::<V, 16>(
                    &side_by_side(both.as_flattened()),
                    &side_by_side([sums, sums].as_flattened()),
                    15.0,
                );
                let mut codes = [0; 2 * 16];
                in_order(&levels, &mut codes);
                (d, dmin) = (lanes(scale)[0], lanes(scale)[1]);
                for g in 0..16 {
                    out[g] = codes[g] | codes[16 + g] << 4;
                }
            }
        }
        out[80..82].copy_from_slice(&f16_bytes(d));
        out[82..].copy_from_slice(&f16_bytes(dmin));
        let (d, dmin, mut ds, mut mins) = (through_f16(d), through_f16(dmin), [0.0; L], [0.0; L]);
        for g in 0..16 {
            ds[g] = d * (out[g] & 15) as f32;
            mins[g] = dmin * (out[g] >> 4) as f32;
        }
        recode(&groups, &ds, &mins, 0.0, 3.0, &mut q);
        let mut codes = [0; 256];
        in_order(&q, &mut codes);
        out[16..80].copy_from_slice(&crumbs(&codes));
    }
}

#[inline(always)]
pub(super) fn q3<V: Lanes>(x: &[f32], importance: Option<&[f32]>, out: &mut [u8]) {
    const N: usize = 16;
    for (b, (x, out)) in x.as_chunks::<256>().0.iter().zip(out.as_chunks_mut::<110>().0).enumerate() {
        let groups = side_by_side::<V, N>(x);
        let mut q;
        let (mut d, mut levels) = (0.0, [0u8; 16]);
        match importance {
            None => {
                let found = descent(&groups, 4.0);
                q = found.1;
                let scale = lanes(found.0);
                let mut max = 0.0f32;
                for s in scale {
                    max = if s.abs() > max.abs() { s } else { max };
                }
                if max != 0.0 {
                    let iscale = -32.0 / max;
                    levels = scale.map(|s| (nearest(iscale * s).clamp(-32, 31) + 32) as u8);
                    d = 1.0 / iscale;
                }
            }
            Some(w) => {
                let sigma2 = V::splat(2.0 * sum_of_squares(x) / 256.0);
                let (w, sums) = weighted(&groups, &w[256 * b..][..256], sigma2);
                let found = symmetric(&groups, &w, 4.0);
                q = found.1;
                let (scale, codes) = symmetric::<V, 16>(&side_by_side(&lanes(found.0)), &side_by_side(&sums), 32.0);
                in_order(&codes, &mut levels);
                d = lanes(scale)[0];
            }
        }
        let scales = &mut out[96..108];
        scales.fill(0);
        for g in 0..16 {
            scales[g % 8] |= (levels[g] & 15) << (4 * (g / 8));
            scales[8 + g % 4] |= (levels[g] >> 4) << (2 * (g / 4));
        }
        out[108..].copy_from_slice(&f16_bytes(d));
        let (d, mut ds) = (through_f16(d), [0.0; L]);
        for g in 0..16 {
            ds[g] = d * (levels[g] as i32 - 32) as f32;
        }
        recode(&groups, &ds, &[0.0; L], -4.0, 3.0, &mut q);
        let mut codes = [0; 256];
        in_order(&q, &mut codes);
        out[..32].copy_from_slice(&high_bits(&codes, 2));
        out[32..96].copy_from_slice(&crumbs(&codes));
    }
}

/// What Q4_K and Q5_K have in common: two super-blocks, whose sixteen groups are searched together. Writes d, dmin and the
/// scales of each; returns the codes.
#[inline(always)]
fn scaled<V: Lanes>(
    x: &[f32],
    importance: Option<&[f32]>,
    n: f32,
    walk: Walk,
    out: [Option<&mut [u8]>; 2],
) -> [[u8; 256]; 2] {
    const N: usize = 32;
    let groups = side_by_side::<V, N>(x);
    let found;
    let (mut levels, mut mins, mut d, mut dmin) = ([0u8; 16], [0u8; 16], [0.0f32; 2], [0.0f32; 2]);
    match importance {
        None => {
            let mut sum = V::splat(0.0);
            for &x in &groups {
                sum = sum.add(x.mul(x));
            }
            let mean = sum.div(V::splat(32.0)).sqrt();
            let mut w = groups;
            w.iter_mut().for_each(|w| *w = mean.add(w.abs()));
            found = affine::<V, N, false>(&groups, &w, n, walk);
            let (scale, min) = (lanes(found.scale), lanes(found.min));
            for s in 0..2 {
                let level = |v: &[f32]| {
                    let max = v.iter().fold(0.0f32, |m, &v| if v > m { v } else { m });
                    (max, if max > 0.0 { 63.0 / max } else { 0.0 })
                };
                let of = 8 * s..8 * s + 8;
                let ((max, inverse), (max_min, inverse_min)) = (level(&scale[of.clone()]), level(&min[of.clone()]));
                (d[s], dmin[s]) = (max / 63.0, max_min / 63.0);
                for g in of {
                    levels[g] = (nearest(inverse * scale[g]) as u8).min(63);
                    mins[g] = (nearest(inverse_min * min[g]) as u8).min(63);
                }
            }
        }
        Some(w) => {
            let mut sigma2 = [0.0; L];
            for (x, s) in x.chunks(256).zip(sigma2.chunks_mut(8)) {
                s.fill(2.0 * sum_of_squares(x) / 256.0);
            }
            let (w, sums) = weighted(&groups, w, V::load(&sigma2));
            found = affine::<V, N, false>(&groups, &w, n, WALK);
            // Four problems of eight: scales and minimums of both blocks.
            let both = [lanes(found.scale), lanes(found.min)];
            let (scale, q) =
                positive::<V, 8>(&side_by_side(both.as_flattened()), &side_by_side([sums, sums].as_flattened()), 63.0);
            let (scale, mut codes) = (lanes(scale), [0; 32]);
            in_order(&q, &mut codes);
            (d, dmin) = ([scale[0], scale[1]], [scale[2], scale[3]]);
            levels.copy_from_slice(&codes[..16]);
            mins.copy_from_slice(&codes[16..]);
        }
    }
    let (mut ds, mut ms) = ([0.0; L], [0.0; L]);
    for g in 0..16 {
        ds[g] = through_f16(d[g / 8]) * levels[g] as f32;
        ms[g] = through_f16(dmin[g / 8]) * mins[g] as f32;
    }
    let mut q = found.q;
    recode(&groups, &ds, &ms, 0.0, n, &mut q);
    let mut codes = [[0; 256]; 2];
    in_order(&q, codes.as_flattened_mut());
    for (s, out) in out.into_iter().enumerate() {
        let Some(out) = out else { continue };
        let (levels, mins) = (&levels[8 * s..][..8], &mins[8 * s..][..8]);
        out[..2].copy_from_slice(&f16_bytes(d[s]));
        out[2..4].copy_from_slice(&f16_bytes(dmin[s]));
        for j in 0..4 {
            out[4 + j] = levels[j] | (levels[j + 4] >> 4) << 6;
            out[8 + j] = mins[j] | (mins[j + 4] >> 4) << 6;
            out[12 + j] = levels[j + 4] & 15 | mins[j + 4] << 4;
        }
    }
    codes
}

/// 128 bytes of the low four bits of 256 codes.
#[inline(always)]
fn nibbles(q: &[u8; 256], out: &mut [u8]) {
    for (q, out) in q.as_chunks::<64>().0.iter().zip(out.as_chunks_mut::<32>().0) {
        for i in 0..32 {
            out[i] = q[i] & 15 | q[i + 32] << 4;
        }
    }
}

#[inline(always)]
pub(super) fn q4<V: Lanes>(x: &[f32], importance: Option<&[f32]>, out: &mut [u8]) {
    for (b, (x, out)) in x.chunks(512).zip(out.chunks_mut(2 * 144)).enumerate() {
        let w = importance.map(|w| &w[512 * b..][..x.len()]);
        let mut out = out.as_chunks_mut::<144>().0.iter_mut();
        let (mut first, mut second) = (out.next(), out.next());
        let heads = [first.as_deref_mut().map(|o| &mut o[..]), second.as_deref_mut().map(|o| &mut o[..])];
        let q = scaled::<V>(x, w, 15.0, Walk { start: -1.0, step: 0.1, steps: 20 }, heads);
        for (q, out) in q.iter().zip([first, second].into_iter().flatten()) {
            nibbles(q, &mut out[16..]);
        }
    }
}

#[inline(always)]
pub(super) fn q5<V: Lanes>(x: &[f32], importance: Option<&[f32]>, out: &mut [u8]) {
    for (b, (x, out)) in x.chunks(512).zip(out.chunks_mut(2 * 176)).enumerate() {
        let w = importance.map(|w| &w[512 * b..][..x.len()]);
        let mut out = out.as_chunks_mut::<176>().0.iter_mut();
        let (mut first, mut second) = (out.next(), out.next());
        let heads = [first.as_deref_mut().map(|o| &mut o[..]), second.as_deref_mut().map(|o| &mut o[..])];
        let q = scaled::<V>(x, w, 31.0, Walk { start: -0.5, step: 0.1, steps: 15 }, heads);
        for (q, out) in q.iter().zip([first, second].into_iter().flatten()) {
            out[16..48].copy_from_slice(&high_bits(q, 4));
            nibbles(q, &mut out[48..]);
        }
    }
}

#[inline(always)]
pub(super) fn q6<V: Lanes>(x: &[f32], importance: Option<&[f32]>, out: &mut [u8]) {
    const N: usize = 16;
    for (b, (x, out)) in x.as_chunks::<256>().0.iter().zip(out.as_chunks_mut::<210>().0).enumerate() {
        let groups = side_by_side::<V, N>(x);
        let w = match importance {
            Some(w) => side_by_side(&w[256 * b..][..256]),
            None => {
                let mut w = groups;
                w.iter_mut().for_each(|w| *w = w.mul(*w));
                w
            }
        };
        let (scale, mut q) = symmetric(&groups, &w, 32.0);
        let scale = lanes(scale);
        let mut max = 0.0f32;
        for s in scale {
            max = if s.abs() > max.abs() { s } else { max };
        }
        out.fill(0);
        if max.abs() < ZERO_BELOW {
            continue;
        }
        let iscale = -128.0 / max;
        out[208..].copy_from_slice(&f16_bytes(1.0 / iscale));
        let (d, mut ds) = (through_f16(1.0 / iscale), [0.0; L]);
        for g in 0..16 {
            let level = nearest(iscale * scale[g]).min(127) as i8;
            out[192 + g] = level as u8;
            ds[g] = d * level as f32;
        }
        recode(&groups, &ds, &[0.0; L], -32.0, 31.0, &mut q);
        let mut codes = [0; 256];
        in_order(&q, &mut codes);
        for (n, q) in codes.as_chunks::<128>().0.iter().enumerate() {
            let (low, high) = out.split_at_mut(128);
            let (low, high) = (&mut low[64 * n..][..64], &mut high[32 * n..][..32]);
            for i in 0..32 {
                low[i] = q[i] & 15 | q[i + 64] << 4;
                low[i + 32] = q[i + 32] & 15 | q[i + 96] << 4;
                high[i] = q[i] >> 4 | q[i + 32] >> 4 << 2 | q[i + 64] >> 4 << 4 | q[i + 96] >> 4 << 6;
            }
        }
    }
}
