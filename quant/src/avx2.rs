//! AVX2.
//!
//! Without VNNI a product of bytes is `vpmaddubsw` (pairs, to 16 bits) and `vpmaddwd` with ones (to 32). Its two traps:
//!
//! 1. Two products of a code above 128 and 127 do not fit 16 bits. Formats with codes up to 255 (all have offset 128) are
//!    read as signed bytes instead, and the sign moves to the activation: `|w| * sign(x, w)` (may-saturate formats).
//! 2. Several pairs fit if codes are small: 8 of 4-bit codes (8 * 2 * 15 * 127 = 30,480), 4 of 5 bits, 2 of 6. The gemm
//!    adds that many in 16 bits before it widens.
//!
//! ```text
//! gemv   for each slab of a row: codes to the L1 cache, then for each group of 32 positions
//!            acc += float(dot of 32) * (scale * d)            8 lanes of 4 positions
//! gemm   16 rows at once, interleaved as in `avx512`; for each 4 columns, for each group:
//!            16-bit sums of 2 x 4 accumulators, widened as rarely as they allow
//! ```

use crate::act::{Act, Acts, Q8Block};
use crate::float_matrix;
use crate::format::{CodeSpec, Codes, Format, SLAB};
use crate::isa::{Isa, avx2};
use crate::kernels::{Kernel, Run, Slot};
use crate::lanes::Avx2;
use crate::panel::{Out, Panel, Scratch};
use std::arch::x86_64::*;

/// Columns up to which the gemv is used.
const GEMV_COLS: usize = 3;
/// Rows of a gemm tile.
const TILE: usize = 16;
/// Columns of the gemm's innermost body.
const COLS: usize = 4;

/// Installs the kernels of this file.
pub(crate) fn overlay(table: &mut [Kernel]) {
    for (kernel, spec) in table.iter_mut().zip(crate::format::FORMATS) {
        match (kernel.act, &spec.codes) {
            (Act::Q8, Some(codes)) => {
                let wide = pairs(spec.format, codes) == 0;
                kernel.gemv = Slot { isa: Isa::Avx2, run: gemv_of(codes, wide) };
                kernel.gemm = Slot { isa: Isa::Avx2, run: gemm_of(spec.format, codes) };
                kernel.gemv_cols = GEMV_COLS;
                match spec.format {
                    Format::Q4_K => kernel.unpack = q4_k,
                    Format::Q6_K => kernel.unpack = q6_k,
                    Format::Q8_0 => kernel.unpack = q8_0,
                    Format::Q4_0 => kernel.unpack = q4_0,
                    Format::Q4_1 => kernel.unpack = q4_1,
                    _ => (),
                }
            }
            _ => {
                kernel.gemm = Slot { isa: Isa::Avx2, run: float_gemm };
                if spec.codes.is_none() {
                    kernel.gemv = Slot { isa: Isa::Avx2, run: float_gemv };
                    kernel.gemv_cols = 1;
                }
            }
        }
    }
}

/// How many products of pairs fit 16 bits; 0 where not even one does.
fn pairs(format: Format, codes: &CodeSpec) -> usize {
    match format {
        Format::Q2_K | Format::Q3_K | Format::Q4_0 | Format::Q4_1 | Format::Q4_K => 8,
        Format::Q5_0 | Format::Q5_1 | Format::Q5_K => 4,
        Format::Q6_K => 2,
        _ => (codes.offset < 128) as usize,
    }
}

fn gemv_of(codes: &CodeSpec, wide: bool) -> Run {
    match (codes.group, codes.has_min, wide) {
        (32, false, true) => gemv::<32, false, true>,
        (32, false, false) => gemv::<32, false, false>,
        (32, true, _) => gemv::<32, true, false>,
        (_, false, true) => gemv::<16, false, true>,
        (_, false, false) => gemv::<16, false, false>,
        (_, true, _) => gemv::<16, true, false>,
    }
}

fn gemm_of(format: Format, codes: &CodeSpec) -> Run {
    match (codes.group, codes.has_min, pairs(format, codes)) {
        (32, false, 0) => gemm::<32, false, 0>,
        (32, false, 8) => gemm::<32, false, 8>,
        (32, false, 4) => gemm::<32, false, 4>,
        (32, false, _) => gemm::<32, false, 1>,
        (32, true, 8) => gemm::<32, true, 8>,
        (32, true, 4) => gemm::<32, true, 4>,
        (32, true, _) => gemm::<32, true, 1>,
        (_, false, 0) => gemm::<16, false, 0>,
        (_, false, 8 | 4) => gemm::<16, false, 4>,
        (_, false, 2) => gemm::<16, false, 2>,
        (_, false, _) => gemm::<16, false, 1>,
        (_, true, 8 | 4) => gemm::<16, true, 4>,
        (_, true, _) => gemm::<16, true, 1>,
    }
}

/// A slab of 16 rows, interleaved.
#[derive(Clone, Copy, bytemuck::Zeroable, bytemuck::Pod)]
#[repr(C, align(64))]
struct Tile {
    q: [[[u8; 4]; TILE]; SLAB / 4], // [k / 4][row][4]
    scale: [[f32; TILE]; 16],       // [group][row]
    min: [[f32; TILE]; 16],
}

avx2! {
    fn float_gemm(_: &Kernel, w: Panel<'_>, x: Acts<'_>, out: &mut Out<'_>, scratch: &mut Scratch) {
        float_matrix::gemm::<Avx2>(w, x, out, scratch);
    }

    fn float_gemv(_: &Kernel, w: Panel<'_>, x: Acts<'_>, out: &mut Out<'_>, _: &mut Scratch) {
        float_matrix::gemv::<Avx2>(w, x, out);
    }

    /// `vpmaddubsw`, `vpmaddwd` and an addition on registers, see [`crate::f32ops::Ops::peak`].
    pub(crate) fn peak(rounds: u64) -> u64 {
        const CHAINS: usize = 12;
        let (w, ones) = (_mm256_set1_epi8(std::hint::black_box(3)), _mm256_set1_epi16(1));
        let mut acc = [_mm256_setzero_si256(); CHAINS];
        for _ in 0..rounds {
            for a in &mut acc {
                // The accumulator is an operand, so that no product can be taken out of the loop.
                *a = _mm256_add_epi32(*a, _mm256_madd_epi16(_mm256_maddubs_epi16(w, *a), ones));
            }
        }
        let mut sum = acc.into_iter().fold(_mm256_setzero_si256(), |s, a| _mm256_add_epi32(s, a));
        sum = std::hint::black_box(sum);
        rounds * CHAINS as u64 * 32 + (_mm256_extract_epi32::<0>(sum) == 1) as u64
    }

    // ---- loads and stores --------------------------------------------------------------------------------------------

    fn load(b: &[u8; 32]) -> __m256i {
        // SAFETY: 32 readable bytes.
        unsafe { _mm256_loadu_si256(b.as_ptr().cast()) }
    }

    fn signed(b: &[i8; 32]) -> __m256i {
        // SAFETY: 32 readable bytes.
        unsafe { _mm256_loadu_si256(b.as_ptr().cast()) }
    }

    fn store(b: &mut [u8; 32], v: __m256i) {
        // SAFETY: 32 writable bytes.
        unsafe { _mm256_storeu_si256(b.as_mut_ptr().cast(), v) }
    }

    fn floats(x: &[f32; 8]) -> __m256 {
        // SAFETY: 32 readable bytes.
        unsafe { _mm256_loadu_ps(x.as_ptr()) }
    }

    fn store_floats(x: &mut [f32; 8], v: __m256) {
        // SAFETY: 32 writable bytes.
        unsafe { _mm256_storeu_ps(x.as_mut_ptr(), v) }
    }

    fn at<const N: usize>(b: &[u8], i: usize) -> &[u8; N] {
        b[i..i + N].try_into().expect("of that length")
    }

    fn half(b: &[u8], i: usize) -> f32 {
        _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(u16::from_le_bytes(*at(b, i)) as i32)))
    }

    // ---- a slab of a format to codes ---------------------------------------------------------------------------------

    fn q4_k(b: &[u8], c: &mut Codes) {
        let word = |i: usize| u32::from_le_bytes(*at(b, i));
        let (u0, u1, u2) = (word(4), word(8), word(12));
        let scale = [u0 & 0x3F3F_3F3F, u2 & 0x0F0F_0F0F | (u0 >> 6 & 0x0303_0303) << 4];
        let min = [u1 & 0x3F3F_3F3F, u2 >> 4 & 0x0F0F_0F0F | (u1 >> 6 & 0x0303_0303) << 4];
        let wide = |p: [u32; 2]| {
            _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_set_epi32(0, 0, p[1] as i32, p[0] as i32)))
        };
        store_floats(&mut c.scale.as_chunks_mut().0[0], _mm256_mul_ps(wide(scale), _mm256_set1_ps(half(b, 0))));
        store_floats(&mut c.min.as_chunks_mut().0[0], _mm256_mul_ps(wide(min), _mm256_set1_ps(half(b, 2))));
        let mask = _mm256_set1_epi8(15);
        let q = c.q.as_chunks_mut().0;
        for j in 0..4 {
            let v = load(at(b, 16 + 32 * j));
            store(&mut q[2 * j], _mm256_and_si256(v, mask));
            store(&mut q[2 * j + 1], _mm256_and_si256(_mm256_srli_epi16::<4>(v), mask));
        }
    }

    fn q6_k(b: &[u8], c: &mut Codes) {
        let (mask, two) = (_mm256_set1_epi8(15), _mm256_set1_epi8(0x30));
        let q = c.q.as_chunks_mut().0;
        for n in 0..2 {
            let (l0, l1, h) = (load(at(b, 64 * n)), load(at(b, 64 * n + 32)), load(at(b, 128 + 32 * n)));
            let high = [_mm256_slli_epi16::<4>(h), _mm256_slli_epi16::<2>(h), h, _mm256_srli_epi16::<2>(h)];
            let low = [l0, l1, _mm256_srli_epi16::<4>(l0), _mm256_srli_epi16::<4>(l1)];
            for j in 0..4 {
                let v = _mm256_or_si256(_mm256_and_si256(low[j], mask), _mm256_and_si256(high[j], two));
                store(&mut q[4 * n + j], v);
            }
        }
        let d = _mm256_set1_ps(half(b, 208));
        for n in 0..2 {
            let s = _mm_set_epi64x(0, i64::from_le_bytes(*at(b, 192 + 8 * n)));
            let s = _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(s)), d);
            store_floats(&mut c.scale.as_chunks_mut().0[n], s);
        }
    }

    fn q8_0(b: &[u8], c: &mut Codes) {
        for ((b, q), scale) in b.as_chunks::<34>().0.iter().zip(c.q.as_chunks_mut().0).zip(&mut c.scale) {
            *scale = half(b, 0);
            store(q, _mm256_xor_si256(load(at(b, 2)), _mm256_set1_epi8(-128)));
        }
    }

    /// The nibbles of 16 bytes: low ones, then high ones.
    fn nibbles(b: &[u8; 16]) -> __m256i {
        // SAFETY: 16 readable bytes.
        let v = unsafe { _mm_loadu_si128(b.as_ptr().cast()) };
        _mm256_and_si256(_mm256_set_m128i(_mm_srli_epi16::<4>(v), v), _mm256_set1_epi8(15))
    }

    fn q4_0(b: &[u8], c: &mut Codes) {
        for ((b, q), scale) in b.as_chunks::<18>().0.iter().zip(c.q.as_chunks_mut().0).zip(&mut c.scale) {
            *scale = half(b, 0);
            store(q, nibbles(at(b, 2)));
        }
    }

    fn q4_1(b: &[u8], c: &mut Codes) {
        for (g, (b, q)) in b.as_chunks::<20>().0.iter().zip(c.q.as_chunks_mut().0).enumerate() {
            (c.scale[g], c.min[g]) = (half(b, 0), -half(b, 2));
            store(q, nibbles(at(b, 4)));
        }
    }

    // ---- matrix times a few columns ----------------------------------------------------------------------------------

    /// 8 lanes, each the product of 4 neighbouring codes and activations. `WIDE` codes carry an offset of 128, which is
    /// taken off here.
    fn dot32<const WIDE: bool>(q: __m256i, x: __m256i) -> __m256i {
        let pairs = if WIDE {
            let w = _mm256_xor_si256(q, _mm256_set1_epi8(-128));
            _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(x, w))
        } else {
            _mm256_maddubs_epi16(q, x)
        };
        _mm256_madd_epi16(pairs, _mm256_set1_epi16(1))
    }

    /// `d` and `d * sum` of each group of a column's slab.
    fn column<const G: usize>(x: &Q8Block) -> ([f32; 16], [f32; 16]) {
        let (mut d, mut sum) = ([0.0; 16], [0.0; 16]);
        for g in 0..SLAB / G {
            d[g] = x.d[g * G / 32];
            let s = if G == 32 { x.sums[2 * g] as i32 + x.sums[2 * g + 1] as i32 } else { x.sums[g] as i32 };
            sum[g] = d[g] * s as f32;
        }
        (d, sum)
    }

    fn sum8(v: __m256) -> f32 {
        let v = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps::<1>(v));
        let v = _mm_add_ps(v, _mm_movehl_ps(v, v));
        _mm_cvtss_f32(_mm_add_ss(v, _mm_shuffle_ps::<1>(v, v)))
    }

    fn gemv<const G: usize, const MIN: bool, const WIDE: bool>(
        k: &Kernel, w: Panel<'_>, x: Acts<'_>, out: &mut Out<'_>, scratch: &mut Scratch,
    ) {
        let n = x.n();
        let codes = w.format.spec().codes.as_ref().expect("installed for formats with codes");
        let offset = if MIN || WIDE { 0 } else { codes.offset };
        // What every row needs of a slab's columns, once.
        let cols = scratch.sums.take::<Column>(w.slabs() * n);
        for (s, cols) in cols.chunks_exact_mut(n).enumerate() {
            for (c, x) in cols.iter_mut().zip(x.q8(s)) {
                (c.d, c.sum) = column::<G>(x);
                for (to, q) in c.start.iter_mut().zip(x.q.as_chunks().0) {
                    let v = dot32::<false>(_mm256_set1_epi8(offset as i8), signed(q));
                    // SAFETY: 8 writable integers.
                    unsafe { _mm256_storeu_si256(to.as_mut_ptr().cast(), v) };
                }
            }
        }
        for r in 0..w.rows {
            let (mut acc, mut low) = ([_mm256_setzero_ps(); GEMV_COLS], [_mm256_setzero_ps(); GEMV_COLS]);
            for s in 0..w.slabs() {
                let mut slab = Codes::ZERO;
                let b = w.slab(r, s);
                if (s + 1) * SLAB <= w.cols {
                    // SAFETY: this rung's or a lower one's; a whole slab.
                    unsafe { (k.unpack)(b, &mut slab) };
                } else {
                    (codes.unpack)(b, &mut slab);
                }
                for (c, (x, col)) in x.q8(s).iter().zip(&cols[s * n..]).enumerate() {
                    let mut scale = [0.0f32; 16];
                    for h in 0..SLAB / G / 8 {
                        let (d, sum) = (floats(&col.d.as_chunks().0[h]), floats(&col.sum.as_chunks().0[h]));
                        let p = _mm256_mul_ps(floats(&slab.scale.as_chunks().0[h]), d);
                        store_floats(&mut scale.as_chunks_mut().0[h], p);
                        if MIN {
                            low[c] = _mm256_fmadd_ps(floats(&slab.min.as_chunks().0[h]), sum, low[c]);
                        }
                    }
                    for g in 0..8 {
                        let mut dot = dot32::<WIDE>(load(&slab.q.as_chunks().0[g]), signed(&x.q.as_chunks().0[g]));
                        if !MIN && !WIDE {
                            // SAFETY: 8 readable integers.
                            dot = _mm256_sub_epi32(dot, unsafe { _mm256_loadu_si256(col.start[g].as_ptr().cast()) });
                        }
                        let p = if G == 32 {
                            _mm256_set1_ps(scale[g])
                        } else {
                            _mm256_blend_ps::<0xF0>(_mm256_set1_ps(scale[2 * g]), _mm256_set1_ps(scale[2 * g + 1]))
                        };
                        acc[c] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(dot), p, acc[c]);
                    }
                }
            }
            for c in 0..n {
                out.column(c, r, 1)[0] = sum8(_mm256_sub_ps(acc[c], low[c]));
            }
        }
    }

    // ---- matrix times many columns -----------------------------------------------------------------------------------

    fn interleave(k: &Kernel, w: &Panel<'_>, codes: &CodeSpec, r0: usize, s: usize, tile: &mut Tile) {
        for r in 0..TILE {
            let mut slab = Codes::ZERO;
            if r0 + r < w.rows {
                let b = w.slab(r0 + r, s);
                if (s + 1) * SLAB <= w.cols {
                    // SAFETY: this rung's or a lower one's; a whole slab.
                    unsafe { (k.unpack)(b, &mut slab) };
                } else {
                    (codes.unpack)(b, &mut slab);
                }
            }
            for (to, q) in tile.q.iter_mut().zip(slab.q.as_chunks().0) {
                to[r] = *q;
            }
            for g in 0..SLAB / codes.group {
                tile.scale[g][r] = slab.scale[g];
                tile.min[g][r] = slab.min[g];
            }
        }
    }

    /// `NC` columns of a tile: adds the slab's products to `acc`, (NC, TILE). `P` products of pairs fit 16 bits.
    fn block<const G: usize, const MIN: bool, const P: usize, const NC: usize>(
        tile: &Tile, groups: usize, x: &[Q8Block], sums: &[[u32; 16]], acc: &mut [[f32; TILE]],
    ) {
        let (x, sums, acc): (&[Q8Block; NC], &[[u32; 16]; NC], &mut [[f32; TILE]; NC]) =
            (x.try_into().expect("NC columns"), sums.try_into().expect("NC columns"), acc.try_into().expect("NC columns"));
        let ones = _mm256_set1_epi16(1);
        // Quads of positions between two widenings.
        let step = if P == 0 { 1 } else { P.min(G / 4) };
        for g in 0..groups {
            let mut a = [[_mm256_setzero_si256(); 2]; NC];
            if !MIN && P > 0 {
                for i in 0..NC {
                    a[i] = [_mm256_set1_epi32(sums[i][g] as i32); 2];
                }
            }
            for k in (g * G / 4..(g + 1) * G / 4).step_by(step) {
                let mut narrow = [[_mm256_setzero_si256(); 2]; NC];
                for k in k..k + step {
                    let q = tile.q[k].as_flattened().as_chunks::<32>().0;
                    let (mut w0, mut w1) = (load(&q[0]), load(&q[1]));
                    let (mut s0, mut s1) = (w0, w1);
                    if P == 0 {
                        s0 = _mm256_xor_si256(w0, _mm256_set1_epi8(-128));
                        s1 = _mm256_xor_si256(w1, _mm256_set1_epi8(-128));
                        (w0, w1) = (_mm256_abs_epi8(s0), _mm256_abs_epi8(s1));
                    }
                    for i in 0..NC {
                        // SAFETY: position 4 k and the three after it are inside the block.
                        let v = _mm256_set1_epi32(unsafe { x[i].q.as_ptr().add(4 * k).cast::<i32>().read_unaligned() });
                        let (v0, v1) = if P == 0 { (_mm256_sign_epi8(v, s0), _mm256_sign_epi8(v, s1)) } else { (v, v) };
                        narrow[i][0] = _mm256_add_epi16(narrow[i][0], _mm256_maddubs_epi16(w0, v0));
                        narrow[i][1] = _mm256_add_epi16(narrow[i][1], _mm256_maddubs_epi16(w1, v1));
                    }
                }
                for i in 0..NC {
                    a[i][0] = _mm256_add_epi32(a[i][0], _mm256_madd_epi16(narrow[i][0], ones));
                    a[i][1] = _mm256_add_epi32(a[i][1], _mm256_madd_epi16(narrow[i][1], ones));
                }
            }
            for h in 0..2 {
                let (s, m) = (floats(&tile.scale[g].as_chunks().0[h]), floats(&tile.min[g].as_chunks().0[h]));
                for i in 0..NC {
                    let to = &mut acc[i].as_chunks_mut().0[h];
                    let d = _mm256_set1_ps(x[i].d[g * G / 32]);
                    let mut c = _mm256_fmadd_ps(_mm256_cvtepi32_ps(a[i][h]), _mm256_mul_ps(s, d), floats(to));
                    if MIN {
                        c = _mm256_fnmadd_ps(m, _mm256_set1_ps(f32::from_bits(sums[i][g])), c);
                    }
                    store_floats(to, c);
                }
            }
        }
    }

    fn gemm<const G: usize, const MIN: bool, const P: usize>(
        k: &Kernel, w: Panel<'_>, x: Acts<'_>, out: &mut Out<'_>, scratch: &mut Scratch,
    ) {
        let n = x.n();
        let codes = w.format.spec().codes.as_ref().expect("installed for formats with codes");
        let tiles = w.rows.div_ceil(TILE);
        let acc = scratch.floats.take::<[f32; TILE]>(tiles * n);
        let sums = scratch.sums.take::<[u32; 16]>(n);
        let tile = &mut scratch.tile.take::<Tile>(1)[0];
        acc.fill([0.0; TILE]);
        for s in 0..w.slabs() {
            let x = x.q8(s);
            for (x, to) in x.iter().zip(sums.iter_mut()) {
                let (_, sum) = column::<G>(x);
                for g in 0..SLAB / G {
                    let s: i32 = x.sums[g * G / 16..(g + 1) * G / 16].iter().map(|&s| s as i32).sum();
                    to[g] = if MIN { sum[g].to_bits() } else { (-codes.offset * s) as u32 };
                }
            }
            let groups = (w.cols - s * SLAB).min(SLAB).div_ceil(G);
            for t in 0..tiles {
                interleave(k, &w, codes, t * TILE, s, tile);
                let acc = &mut acc[t * n..(t + 1) * n];
                for c in (0..n).step_by(COLS) {
                    let r = c..n.min(c + COLS);
                    let (x, sums, acc) = (&x[r.clone()], &sums[r.clone()], &mut acc[r.clone()]);
                    match r.len() {
                        1 => block::<G, MIN, P, 1>(tile, groups, x, sums, acc),
                        2 => block::<G, MIN, P, 2>(tile, groups, x, sums, acc),
                        3 => block::<G, MIN, P, 3>(tile, groups, x, sums, acc),
                        _ => block::<G, MIN, P, COLS>(tile, groups, x, sums, acc),
                    }
                }
            }
        }
        for t in 0..tiles {
            let rows = TILE.min(w.rows - t * TILE);
            for c in 0..n {
                out.column(c, t * TILE, rows).copy_from_slice(&acc[t * n + c][..rows]);
            }
        }
    }
}

/// What the gemv needs of one column's slab.
#[derive(Clone, Copy, bytemuck::Zeroable, bytemuck::Pod)]
#[repr(C, align(64))]
struct Column {
    d: [f32; 16],
    sum: [f32; 16],
    start: [[i32; 8]; 8],
}
