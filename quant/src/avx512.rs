//! AVX-512 with VNNI.
//!
//! Everything rests on one function a format: a slab of 256 weights from memory to registers ([`Slab`]), codes in the
//! order of the weights. The matrix-vector body dots it with one or a few columns at once; the matrix-matrix body stores
//! it interleaved and dots the tile with all columns.
//!
//! ```text
//! gemv   4 rows at once (four memory streams), for each slab:
//!            slab = unpack(row)                            4 x 64 codes, 16 lanes of scales and minimums
//!            for each column: 4 vpdpbusd, each to f32, times (scale * d) spread over its lanes
//!            minimums: one fma of 16 groups
//!
//! gemm   32 rows at once, for each slab:
//!            unpack 32 rows, transposed: tile[k / 4][row][4]   a vector = 16 rows x 4 positions
//!            for each 6 columns, for each group of 32 (or 16) positions:
//!                acc[row, column] = sum of vpdpbusd(tile, broadcast of 4 activations)
//!                c[row, column] += acc * (scale[row] * d[column]) - min[row] * (d * sum)[column]
//! ```
//!
//! Offsets of codes (a q4_0 code is 0..15 for a weight -8..7) cost next to nothing: the integer accumulators start from
//! `-offset * sum(x)` instead of zero.

use crate::act::{Act, Acts, Q8Block};
use crate::float_matrix;
use crate::format::{CodeSpec, Codes, Format, SLAB, iq4};
use crate::isa::{Isa, avx512};
use crate::kernels::{Kernel, Run, Slot};
use crate::lanes::Avx512;
use crate::panel::{Out, Panel, Scratch};
use std::arch::x86_64::*;

/// Columns up to which unpacking a slab for a few dots beats interleaving it for many.
const GEMV_COLS: usize = 3;
/// Rows that the gemv reads side by side.
const STREAMS: usize = 4;
/// Rows of a gemm tile: two vectors.
const TILE: usize = 32;
/// Columns of the gemm's innermost body: 12 integer and 12 float accumulators.
const COLS: usize = 6;

/// Installs the kernels of this file.
pub(crate) fn overlay(table: &mut [Kernel]) {
    for (kernel, spec) in table.iter_mut().zip(crate::format::FORMATS) {
        match (kernel.act, &spec.codes) {
            (Act::Q8, Some(codes)) => {
                kernel.gemv = Slot { isa: Isa::Avx512, run: gemv_of(spec.format, codes) };
                kernel.gemm = Slot { isa: Isa::Avx512, run: gemm_of(codes) };
                kernel.gemv_cols = GEMV_COLS;
                if let Some(unpack) = unpack_of(spec.format) {
                    kernel.unpack = unpack;
                }
            }
            _ => {
                kernel.gemm = Slot { isa: Isa::Avx512, run: float_gemm };
                if spec.codes.is_none() {
                    kernel.gemv = Slot { isa: Isa::Avx512, run: float_gemv };
                    kernel.gemv_cols = 1;
                }
            }
        }
    }
}

fn gemm_of(codes: &CodeSpec) -> Run {
    match (codes.group, codes.has_min) {
        (32, false) => gemm::<32, false>,
        (32, true) => gemm::<32, true>,
        (_, false) => gemm::<16, false>,
        (_, true) => gemm::<16, true>,
    }
}

/// A slab in registers. In formats with groups of 32, `scale` holds 8 scales and then the 8 minimums, if any; `min` is for
/// the 16 minimums of formats with groups of 16.
struct Slab {
    q: [__m512i; 4],
    scale: __m512,
    min: __m512,
}

/// What `NC` columns' slab brings to the dots.
struct Columns<const NC: usize> {
    d: [__m512; NC],
    sum: [__m512; NC],
    start: [[__m512i; 4]; NC],
    q: [[__m512i; 4]; NC],
}

avx512! {
    fn float_gemm(_: &Kernel, w: Panel<'_>, x: Acts<'_>, out: &mut Out<'_>, scratch: &mut Scratch) {
        float_matrix::gemm::<Avx512>(w, x, out, scratch);
    }

    fn float_gemv(_: &Kernel, w: Panel<'_>, x: Acts<'_>, out: &mut Out<'_>, _: &mut Scratch) {
        float_matrix::gemv::<Avx512>(w, x, out);
    }

    /// `vpdpbusd` on registers, see [`crate::f32ops::Ops::peak`].
    pub(crate) fn peak(rounds: u64) -> u64 {
        const CHAINS: usize = 12;
        let (w, x) = (_mm512_set1_epi8(std::hint::black_box(3)), _mm512_set1_epi8(std::hint::black_box(5)));
        let mut acc = [_mm512_setzero_si512(); CHAINS];
        for _ in 0..rounds {
            for a in &mut acc {
                *a = _mm512_dpbusd_epi32(*a, w, x);
            }
        }
        let sum = acc.into_iter().fold(_mm512_setzero_si512(), |s, a| _mm512_add_epi32(s, a));
        std::hint::black_box(_mm512_reduce_add_epi32(sum));
        rounds * CHAINS as u64 * 64
    }

    // ---- loads -------------------------------------------------------------------------------------------------------

    fn load512(b: &[u8; 64]) -> __m512i {
        // SAFETY: 64 readable bytes.
        unsafe { _mm512_loadu_si512(b.as_ptr().cast()) }
    }

    fn signed(b: &[i8; 64]) -> __m512i {
        // SAFETY: 64 readable bytes.
        unsafe { _mm512_loadu_si512(b.as_ptr().cast()) }
    }

    fn load256(b: &[u8; 32]) -> __m256i {
        // SAFETY: 32 readable bytes.
        unsafe { _mm256_loadu_si256(b.as_ptr().cast()) }
    }

    fn load128(b: &[u8; 16]) -> __m128i {
        // SAFETY: 16 readable bytes.
        unsafe { _mm_loadu_si128(b.as_ptr().cast()) }
    }

    fn floats(x: &[f32; 16]) -> __m512 {
        // SAFETY: 64 readable bytes.
        unsafe { _mm512_loadu_ps(x.as_ptr()) }
    }

    fn at<const N: usize>(b: &[u8], i: usize) -> &[u8; N] {
        b[i..i + N].try_into().expect("of that length")
    }

    fn word(b: &[u8], i: usize) -> u32 {
        u32::from_le_bytes(*at(b, i))
    }

    /// Two f16 next to each other, as lanes 0 and 1.
    fn f16_pair(b: &[u8; 4]) -> __m128 {
        _mm_cvtph_ps(_mm_cvtsi32_si128(i32::from_le_bytes(*b)))
    }

    /// An f16 in every lane.
    fn f16_all(b: &[u8; 2]) -> __m512 {
        _mm512_broadcastss_ps(_mm_cvtph_ps(_mm_cvtsi32_si128(u16::from_le_bytes(*b) as i32)))
    }

    /// 32 bytes in both halves of a vector.
    fn twice(b: &[u8; 32]) -> __m512i {
        _mm512_broadcast_i64x4(load256(b))
    }

    // ---- a slab of each format to registers --------------------------------------------------------------------------

    fn slab_of_codes(c: &CodeSpec, codes: &Codes) -> Slab {
        let q = codes.q.as_chunks::<64>().0;
        let q = [load512(&q[0]), load512(&q[1]), load512(&q[2]), load512(&q[3])];
        let (scale, min) = (floats(&codes.scale), floats(&codes.min));
        if c.group == 32 { Slab { q, scale: halves(scale, min), min } } else { Slab { q, scale, min } }
    }

    /// The lower halves of two vectors.
    fn halves(a: __m512, b: __m512) -> __m512 {
        _mm512_insertf32x8::<1>(a, _mm512_castps512_ps256(b))
    }

    /// The 6-bit scales and minimums of Q4_K and Q5_K: 8 and 8, as bytes. Three words in, two pairs of words out; the
    /// bytes stay in general registers, since a store followed by a wider load would stall.
    fn scales_6bit(b: &[u8; 12]) -> __m128i {
        let (u0, u1, u2) = (word(b, 0), word(b, 4), word(b, 8));
        let scale = [u0 & 0x3F3F_3F3F, u2 & 0x0F0F_0F0F | (u0 >> 6 & 0x0303_0303) << 4];
        let min = [u1 & 0x3F3F_3F3F, u2 >> 4 & 0x0F0F_0F0F | (u1 >> 6 & 0x0303_0303) << 4];
        let pair = |p: [u32; 2]| (p[0] as u64 | (p[1] as u64) << 32) as i64;
        _mm_set_epi64x(pair(min), pair(scale))
    }

    /// `d * scale` in lanes 0 to 7 and `dmin * min` in lanes 8 to 15, of Q4_K and Q5_K.
    fn scales_4k(b: &[u8]) -> __m512 {
        let d = _mm512_permutexvar_ps(
            _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1),
            _mm512_castps128_ps512(f16_pair(at(b, 0))),
        );
        _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(scales_6bit(at(b, 4)))), d)
    }

    /// 64 nibbles of 32 bytes: the low ones, then the high ones.
    fn nibbles(b: &[u8; 32]) -> __m512i {
        let shift = _mm512_inserti64x4::<1>(_mm512_setzero_si512(), _mm256_set1_epi16(4));
        _mm512_and_si512(_mm512_srlv_epi16(twice(b), shift), _mm512_set1_epi8(15))
    }

    fn q4_k(b: &[u8]) -> Slab {
        let q = [nibbles(at(b, 16)), nibbles(at(b, 48)), nibbles(at(b, 80)), nibbles(at(b, 112))];
        Slab { q, scale: scales_4k(b), min: _mm512_setzero_ps() }
    }

    /// Bit `2 j` of 32 bytes for the first 32 lanes, bit `2 j + 1` for the others.
    fn bit_pair(high: __m512i, j: u32) -> __mmask64 {
        let bits = _mm512_inserti64x4::<1>(_mm512_set1_epi8((1u8 << (2 * j)) as i8), _mm256_set1_epi8((2u8 << (2 * j)) as i8));
        _mm512_test_epi8_mask(high, bits)
    }

    fn q5_k(b: &[u8]) -> Slab {
        let high = twice(at(b, 16));
        let part = |j: u32| {
            let low = nibbles(at(b, 48 + 32 * j as usize));
            _mm512_mask_add_epi8(low, bit_pair(high, j), low, _mm512_set1_epi8(16))
        };
        Slab { q: [part(0), part(1), part(2), part(3)], scale: scales_4k(b), min: _mm512_setzero_ps() }
    }

    fn q6_k(b: &[u8]) -> Slab {
        let mask = _mm512_set1_epi8(0x30);
        let half = |n: usize| {
            let low = load512(at(b, 64 * n));
            let high = twice(at(b, 128 + 32 * n));
            let up = _mm512_inserti64x4::<1>(_mm512_set1_epi16(4), _mm256_set1_epi16(2));
            let down = _mm512_inserti64x4::<1>(_mm512_setzero_si512(), _mm256_set1_epi16(2));
            let join = |low: __m512i, high: __m512i| {
                _mm512_or_si512(_mm512_and_si512(low, _mm512_set1_epi8(15)), _mm512_and_si512(high, mask))
            };
            [join(low, _mm512_sllv_epi16(high, up)), join(_mm512_srli_epi16::<4>(low), _mm512_srlv_epi16(high, down))]
        };
        let ([q0, q1], [q2, q3]) = (half(0), half(1));
        let scale = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(load128(at(b, 192)))), f16_all(at(b, 208)));
        Slab { q: [q0, q1, q2, q3], scale, min: _mm512_setzero_ps() }
    }

    /// 2-bit fields `2 j` and `2 j + 1` (of four in a byte) of 32 bytes.
    fn crumbs(b: &[u8; 32], j: i16) -> __m512i {
        let shift = _mm512_inserti64x4::<1>(_mm512_set1_epi16(4 * j), _mm256_set1_epi16(4 * j + 2));
        _mm512_and_si512(_mm512_srlv_epi16(twice(b), shift), _mm512_set1_epi8(3))
    }

    fn q2_k(b: &[u8]) -> Slab {
        let q = [crumbs(at(b, 16), 0), crumbs(at(b, 16), 1), crumbs(at(b, 48), 0), crumbs(at(b, 48), 1)];
        let s = load128(at(b, 0));
        let low = |x| _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_and_si128(x, _mm_set1_epi8(15))));
        let scale = _mm512_mul_ps(low(s), f16_all(at(b, 80)));
        Slab { q, scale, min: _mm512_mul_ps(low(_mm_srli_epi16::<4>(s)), f16_all(at(b, 82))) }
    }

    fn q3_k(b: &[u8]) -> Slab {
        let high = twice(at(b, 0));
        let part = |j: u32| {
            let low = crumbs(at(b, 32 + 32 * (j as usize / 2)), (j % 2) as i16);
            _mm512_mask_add_epi8(low, bit_pair(high, j), low, _mm512_set1_epi8(4))
        };
        let (a0, a1, t) = (word(b, 96), word(b, 100), word(b, 104));
        let (nib, two) = (0x0F0F_0F0F, 0x0303_0303);
        let s = _mm_setr_epi32(
            (a0 & nib | (t & two) << 4) as i32,
            (a1 & nib | (t >> 2 & two) << 4) as i32,
            (a0 >> 4 & nib | (t >> 4 & two) << 4) as i32,
            (a1 >> 4 & nib | (t >> 6 & two) << 4) as i32,
        );
        let s = _mm512_sub_epi32(_mm512_cvtepu8_epi32(s), _mm512_set1_epi32(32));
        let scale = _mm512_mul_ps(_mm512_cvtepi32_ps(s), f16_all(at(b, 108)));
        Slab { q: [part(0), part(1), part(2), part(3)], scale, min: _mm512_setzero_ps() }
    }

    /// The f16 at `stride * g + at` for the eight blocks of a slab.
    fn eight_f16(b: &[u8], stride: usize, from: usize) -> __m256 {
        let f = |g: usize| i16::from_le_bytes(*at(b, stride * g + from));
        _mm256_cvtph_ps(_mm_setr_epi16(f(0), f(1), f(2), f(3), f(4), f(5), f(6), f(7)))
    }

    /// The nibbles of two blocks of 16 bytes: low ones and high ones of the first, then of the second.
    fn block_nibbles(a: &[u8; 16], b: &[u8; 16]) -> __m512i {
        let both = _mm512_castsi256_si512(_mm256_inserti128_si256::<1>(_mm256_castsi128_si256(load128(a)), load128(b)));
        let spread = _mm512_permutexvar_epi64(_mm512_setr_epi64(0, 1, 0, 1, 2, 3, 2, 3), both);
        let shift = _mm512_maskz_set1_epi64(0b1100_1100, 0x0004_0004_0004_0004);
        _mm512_and_si512(_mm512_srlv_epi16(spread, shift), _mm512_set1_epi8(15))
    }

    /// Eight scales.
    fn scales(d: __m256) -> __m512 {
        _mm512_insertf32x8::<0>(_mm512_setzero_ps(), d)
    }

    /// Eight scales and eight minimums, which the old formats store with the other sign.
    fn min_scales(d: __m256, m: __m256) -> __m512 {
        let m = _mm256_xor_ps(m, _mm256_set1_ps(-0.0));
        halves(_mm512_castps256_ps512(d), _mm512_castps256_ps512(m))
    }

    fn q4_0(b: &[u8]) -> Slab {
        let q = |j: usize| block_nibbles(at(b, 36 * j + 2), at(b, 36 * j + 20));
        let scale = scales(eight_f16(b, 18, 0));
        Slab { q: [q(0), q(1), q(2), q(3)], scale, min: _mm512_setzero_ps() }
    }

    fn q4_1(b: &[u8]) -> Slab {
        let q = |j: usize| block_nibbles(at(b, 40 * j + 4), at(b, 40 * j + 24));
        let scale = min_scales(eight_f16(b, 20, 0), eight_f16(b, 20, 2));
        Slab { q: [q(0), q(1), q(2), q(3)], scale, min: _mm512_setzero_ps() }
    }

    /// `block_nibbles` with the fifth bits, which lie in the order of the weights.
    fn five_bits(b: &[u8], stride: usize, high: usize) -> __m512i {
        let low = block_nibbles(at(b, high + 4), at(b, stride + high + 4));
        let bits = word(b, high) as u64 | (word(b, stride + high) as u64) << 32;
        _mm512_mask_add_epi8(low, bits, low, _mm512_set1_epi8(16))
    }

    fn q5_0(b: &[u8]) -> Slab {
        let q = |j: usize| five_bits(&b[44 * j..], 22, 2);
        Slab { q: [q(0), q(1), q(2), q(3)], scale: scales(eight_f16(b, 22, 0)), min: _mm512_setzero_ps() }
    }

    fn q5_1(b: &[u8]) -> Slab {
        let q = |j: usize| five_bits(&b[48 * j..], 24, 4);
        let scale = min_scales(eight_f16(b, 24, 0), eight_f16(b, 24, 2));
        Slab { q: [q(0), q(1), q(2), q(3)], scale, min: _mm512_setzero_ps() }
    }

    /// The codes (offset 128) of indices into IQ4's values.
    fn iq4_codes(index: __m512i) -> __m512i {
        let values = _mm512_broadcast_i32x4(load128(&iq4::VALUES.map(|v| v as u8 ^ 0x80)));
        _mm512_shuffle_epi8(values, index)
    }

    fn iq4_nl(b: &[u8]) -> Slab {
        let q = |j: usize| iq4_codes(block_nibbles(at(b, 36 * j + 2), at(b, 36 * j + 20)));
        let scale = scales(eight_f16(b, 18, 0));
        Slab { q: [q(0), q(1), q(2), q(3)], scale, min: _mm512_setzero_ps() }
    }

    fn iq4_xs(b: &[u8]) -> Slab {
        let q = |j: usize| iq4_codes(block_nibbles(at(b, 8 + 32 * j), at(b, 24 + 32 * j)));
        let low = _mm256_srlv_epi32(_mm256_set1_epi32(word(b, 4) as i32), _mm256_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28));
        let high = _mm256_set1_epi32(u16::from_le_bytes(*at(b, 2)) as i32);
        let high = _mm256_srlv_epi32(high, _mm256_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14));
        let low = _mm256_and_si256(low, _mm256_set1_epi32(15));
        let high = _mm256_slli_epi32::<4>(_mm256_and_si256(high, _mm256_set1_epi32(3)));
        let s = _mm256_sub_epi32(_mm256_or_si256(low, high), _mm256_set1_epi32(32));
        let d = _mm512_castps512_ps256(f16_all(at(b, 0)));
        let scale = scales(_mm256_mul_ps(_mm256_cvtepi32_ps(s), d));
        Slab { q: [q(0), q(1), q(2), q(3)], scale, min: _mm512_setzero_ps() }
    }

    fn q8_0(b: &[u8]) -> Slab {
        let q = |j: usize| {
            let (x, y) = (load256(at(b, 68 * j + 2)), load256(at(b, 68 * j + 36)));
            _mm512_xor_si512(_mm512_inserti64x4::<1>(_mm512_castsi256_si512(x), y), _mm512_set1_epi8(-128))
        };
        let scale = scales(eight_f16(b, 34, 0));
        Slab { q: [q(0), q(1), q(2), q(3)], scale, min: _mm512_setzero_ps() }
    }

    // ---- matrix times a few columns ----------------------------------------------------------------------------------

    /// What a column's slab brings to the dot: 16 lanes of d and of d * sum, laid out as `Slab::scale` and `Slab::min` are.
    fn column<const G: usize>(x: &Q8Block) -> (__m512, __m512) {
        // SAFETY: both arrays are 32 bytes.
        let (d, sums) = unsafe { (_mm256_loadu_ps(x.d.as_ptr()), _mm256_loadu_si256(x.sums.as_ptr().cast())) };
        if G == 32 {
            let sums = _mm256_cvtepi32_ps(_mm256_madd_epi16(sums, _mm256_set1_epi16(1)));
            let zero = _mm512_setzero_ps();
            (_mm512_insertf32x8::<0>(zero, d), _mm512_insertf32x8::<1>(zero, _mm256_mul_ps(d, sums)))
        } else {
            let twice = _mm512_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7);
            let d = _mm512_permutexvar_ps(twice, _mm512_castps256_ps512(d));
            (d, _mm512_mul_ps(d, _mm512_cvtepi32_ps(_mm512_cvtepi16_epi32(sums))))
        }
    }

    /// For each quarter of a slab, which group's scale a lane (4 positions) takes.
    fn lanes_of_groups<const G: usize>() -> [__m512i; 4] {
        let first = if G == 32 {
            _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1)
        } else {
            _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3)
        };
        let step = (64 / G) as i32;
        let mut lanes = [first; 4];
        for j in 1..4 {
            lanes[j] = _mm512_add_epi32(lanes[j - 1], _mm512_set1_epi32(step));
        }
        lanes
    }

    #[inline]
    fn columns<const G: usize, const MIN: bool, const NC: usize>(x: &[Q8Block; NC], offset: i8) -> Columns<NC> {
        let zero = _mm512_setzero_si512();
        let mut cols = Columns {
            d: [_mm512_setzero_ps(); NC],
            sum: [_mm512_setzero_ps(); NC],
            start: [[zero; 4]; NC],
            q: [[zero; 4]; NC],
        };
        for c in 0..NC {
            (cols.d[c], cols.sum[c]) = column::<G>(&x[c]);
            for j in 0..4 {
                cols.q[c][j] = signed(&x[c].q.as_chunks().0[j]);
                // With minimums there is no offset; else what the offset adds to each lane, exactly, is taken off beforehand.
                if !MIN {
                    let plus = _mm512_dpbusd_epi32(zero, _mm512_set1_epi8(offset), cols.q[c][j]);
                    cols.start[c][j] = _mm512_sub_epi32(zero, plus);
                }
            }
        }
        cols
    }

    /// Adds one row's slab to its accumulators of `NC` columns.
    #[inline]
    fn accumulate<const G: usize, const MIN: bool, const NC: usize>(
        slab: &Slab, cols: &Columns<NC>, lanes: &[__m512i; 4], acc: &mut [__m512; NC], low: &mut [__m512; NC],
    ) {
        for c in 0..NC {
            if MIN {
                low[c] = _mm512_fmadd_ps(if G == 32 { slab.scale } else { slab.min }, cols.sum[c], low[c]);
            }
            let scale = _mm512_mul_ps(slab.scale, cols.d[c]);
            for j in 0..4 {
                let dot = _mm512_dpbusd_epi32(cols.start[c][j], slab.q[j], cols.q[c][j]);
                let scale = _mm512_permutexvar_ps(lanes[j], scale);
                acc[c] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot), scale, acc[c]);
            }
        }
    }

    /// `R` consecutive rows from `r0` on, or as many as there are; all `NC` columns.
    #[inline]
    fn gemv_rows<const G: usize, const MIN: bool, const R: usize, const NC: usize>(
        unpack: impl Fn(&[u8]) -> Slab, codes: &CodeSpec, w: &Panel<'_>, r0: usize, x: Acts<'_>, out: &mut Out<'_>,
    ) {
        let spec = w.format.spec();
        let bytes = SLAB / spec.block_len * spec.block_bytes;
        let offset = codes.offset as u8 as i8;
        let lanes = lanes_of_groups::<G>();
        let mut acc = [[_mm512_setzero_ps(); NC]; R];
        let mut low = [[_mm512_setzero_ps(); NC]; R];
        let mut rows = [w.row(r0); R];
        for (i, row) in rows.iter_mut().enumerate() {
            *row = w.row((r0 + i).min(w.rows - 1));
        }
        let whole = w.row_bytes / bytes;
        for s in 0..whole {
            let cols = columns::<G, MIN, NC>(x.q8(s).try_into().expect("NC columns"), offset);
            for r in 0..R {
                let slab = unpack(&rows[r][s * bytes..][..bytes]);
                accumulate::<G, MIN, NC>(&slab, &cols, &lanes, &mut acc[r], &mut low[r]);
            }
        }
        // The slab at the end of a row that is no multiple of 256: the general way.
        if whole < w.slabs() {
            let cols = columns::<G, MIN, NC>(x.q8(whole).try_into().expect("NC columns"), offset);
            for r in 0..R {
                let slab = slab_of_codes(codes, &unpacked(codes, &rows[r][whole * bytes..]));
                accumulate::<G, MIN, NC>(&slab, &cols, &lanes, &mut acc[r], &mut low[r]);
            }
        }
        for r in 0..R.min(w.rows - r0) {
            for c in 0..NC {
                out.column(c, r0 + r, 1)[0] = _mm512_reduce_add_ps(_mm512_sub_ps(acc[r][c], low[r][c]));
            }
        }
    }

    #[inline]
    fn gemv<const G: usize, const MIN: bool>(
        unpack: impl Fn(&[u8]) -> Slab + Copy, w: Panel<'_>, x: Acts<'_>, out: &mut Out<'_>,
    ) {
        let codes = w.format.spec().codes.as_ref().expect("installed for formats with codes");
        match x.n() {
            1 => (0..w.rows).step_by(STREAMS).for_each(|r| {
                gemv_rows::<G, MIN, STREAMS, 1>(unpack, codes, &w, r, x, out)
            }),
            2 => (0..w.rows).step_by(2).for_each(|r| gemv_rows::<G, MIN, 2, 2>(unpack, codes, &w, r, x, out)),
            GEMV_COLS => (0..w.rows).step_by(2).for_each(|r| {
                gemv_rows::<G, MIN, 2, GEMV_COLS>(unpack, codes, &w, r, x, out)
            }),
            n => unreachable!("{n} columns go to the gemm"),
        }
    }

    fn unpacked(c: &CodeSpec, b: &[u8]) -> Codes {
        let mut codes = Codes::ZERO;
        (c.unpack)(b, &mut codes);
        codes
    }

    // ---- matrix times many columns -----------------------------------------------------------------------------------

    /// The 16 rows of a 16 x 16 matrix of 32-bit values become its columns.
    fn transpose(m: &mut [__m512i; 16]) {
        let mut t = [_mm512_setzero_si512(); 16];
        for i in 0..8 {
            t[2 * i] = _mm512_unpacklo_epi32(m[2 * i], m[2 * i + 1]);
            t[2 * i + 1] = _mm512_unpackhi_epi32(m[2 * i], m[2 * i + 1]);
        }
        for i in 0..4 {
            let (a, b, c, d) = (t[4 * i], t[4 * i + 1], t[4 * i + 2], t[4 * i + 3]);
            m[4 * i] = _mm512_unpacklo_epi64(a, c);
            m[4 * i + 1] = _mm512_unpackhi_epi64(a, c);
            m[4 * i + 2] = _mm512_unpacklo_epi64(b, d);
            m[4 * i + 3] = _mm512_unpackhi_epi64(b, d);
        }
        for i in 0..4 {
            t[i] = _mm512_shuffle_i32x4::<0x88>(m[i], m[4 + i]);
            t[4 + i] = _mm512_shuffle_i32x4::<0xDD>(m[i], m[4 + i]);
            t[8 + i] = _mm512_shuffle_i32x4::<0x88>(m[8 + i], m[12 + i]);
            t[12 + i] = _mm512_shuffle_i32x4::<0xDD>(m[8 + i], m[12 + i]);
        }
        for i in 0..4 {
            m[i] = _mm512_shuffle_i32x4::<0x88>(t[i], t[8 + i]);
            m[4 + i] = _mm512_shuffle_i32x4::<0x88>(t[4 + i], t[12 + i]);
            m[8 + i] = _mm512_shuffle_i32x4::<0xDD>(t[i], t[8 + i]);
            m[12 + i] = _mm512_shuffle_i32x4::<0xDD>(t[4 + i], t[12 + i]);
        }
    }

    /// Unpacks slab `s` of up to 16 rows from `r0` on into one half of a tile.
    fn interleave<const G: usize>(k: &Kernel, w: &Panel<'_>, r0: usize, s: usize, half: usize, tile: &mut Tile) {
        let rows = w.rows.saturating_sub(r0).min(16);
        let partial = (s + 1) * SLAB > w.cols;
        let mut codes = [Codes::ZERO; 16];
        let scalar = w.format.spec().codes.as_ref().expect("installed for formats with codes").unpack;
        for (r, c) in codes.iter_mut().enumerate().take(rows) {
            let b = w.slab(r0 + r, s);
            if partial {
                scalar(b, c);
            } else {
                // SAFETY: this rung's or a lower one's, as the table's construction guarantees; a whole slab.
                unsafe { (k.unpack)(b, c) }
            }
        }
        for quarter in 0..4 {
            let mut m = [_mm512_setzero_si512(); 16];
            for (m, c) in m.iter_mut().zip(&codes) {
                *m = load512(&c.q.as_chunks().0[quarter]);
            }
            transpose(&mut m);
            for (i, v) in m.into_iter().enumerate() {
                let to: &mut [u8] = &mut tile.q[16 * quarter + i][64 * half..][..64];
                // SAFETY: 64 writable bytes.
                unsafe { _mm512_storeu_si512(to.as_mut_ptr().cast(), v) };
            }
        }
        let (mut scale, mut min) = ([_mm512_setzero_si512(); 16], [_mm512_setzero_si512(); 16]);
        for (r, c) in codes.iter().enumerate() {
            scale[r] = _mm512_castps_si512(floats(&c.scale));
            min[r] = _mm512_castps_si512(floats(&c.min));
        }
        transpose(&mut scale);
        transpose(&mut min);
        for g in 0..SLAB / G {
            // SAFETY: 16 writable floats each.
            unsafe {
                _mm512_storeu_ps(tile.scale[g][16 * half..][..16].as_mut_ptr(), _mm512_castsi512_ps(scale[g]));
                _mm512_storeu_ps(tile.min[g][16 * half..][..16].as_mut_ptr(), _mm512_castsi512_ps(min[g]));
            }
        }
    }

    /// `NC` columns of a tile: adds the slab's products to `acc`, (NC, TILE).
    #[inline]
    fn block<const G: usize, const MIN: bool, const NC: usize>(
        tile: &Tile, groups: usize, x: &[Q8Block], sums: &[[u32; 16]], acc: &mut [[f32; TILE]],
    ) {
        let (x, sums, acc): (&[Q8Block; NC], &[[u32; 16]; NC], &mut [[f32; TILE]; NC]) =
            (x.try_into().expect("NC columns"), sums.try_into().expect("NC columns"), acc.try_into().expect("NC columns"));
        // SAFETY: rows of `acc` and of the tile are 32 floats or 128 bytes: two vectors.
        unsafe {
            let mut c = [[_mm512_setzero_ps(); 2]; NC];
            for i in 0..NC {
                c[i] = [_mm512_loadu_ps(acc[i].as_ptr()), _mm512_loadu_ps(acc[i].as_ptr().add(16))];
            }
            for g in 0..groups {
                let mut a = [[_mm512_setzero_si512(); 2]; NC];
                if !MIN {
                    for i in 0..NC {
                        a[i] = [_mm512_set1_epi32(sums[i][g] as i32); 2];
                    }
                }
                for k in 0..G / 4 {
                    let k = g * (G / 4) + k;
                    let q = tile.q.get_unchecked(k).as_ptr();
                    let (w0, w1) = (_mm512_loadu_si512(q.cast()), _mm512_loadu_si512(q.add(64).cast()));
                    for i in 0..NC {
                        let v = _mm512_set1_epi32(x[i].q.as_ptr().add(4 * k).cast::<i32>().read());
                        a[i][0] = _mm512_dpbusd_epi32(a[i][0], w0, v);
                        a[i][1] = _mm512_dpbusd_epi32(a[i][1], w1, v);
                    }
                }
                let (scale, min) = (tile.scale.get_unchecked(g).as_ptr(), tile.min.get_unchecked(g).as_ptr());
                for h in 0..2 {
                    let (s, m) = (_mm512_loadu_ps(scale.add(16 * h)), _mm512_loadu_ps(min.add(16 * h)));
                    for i in 0..NC {
                        let d = _mm512_set1_ps(x[i].d[g * G / 32]);
                        c[i][h] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(a[i][h]), _mm512_mul_ps(s, d), c[i][h]);
                        if MIN {
                            c[i][h] = _mm512_fnmadd_ps(m, _mm512_set1_ps(f32::from_bits(sums[i][g])), c[i][h]);
                        }
                    }
                }
            }
            for i in 0..NC {
                _mm512_storeu_ps(acc[i].as_mut_ptr(), c[i][0]);
                _mm512_storeu_ps(acc[i].as_mut_ptr().add(16), c[i][1]);
            }
        }
    }

    /// What the body needs of each column's sums: `-offset * sum` as integers, or `d * sum` as floats where the format has
    /// minimums.
    fn column_sums<const G: usize, const MIN: bool>(offset: i32, x: &[Q8Block], to: &mut [[u32; 16]]) {
        for (x, to) in x.iter().zip(to) {
            for g in 0..SLAB / G {
                let s: i32 = x.sums[g * G / 16..(g + 1) * G / 16].iter().map(|&s| s as i32).sum();
                to[g] = if MIN { (x.d[g * G / 32] * s as f32).to_bits() } else { (-offset * s) as u32 };
            }
        }
    }

    fn gemm<const G: usize, const MIN: bool>(
        k: &Kernel, w: Panel<'_>, x: Acts<'_>, out: &mut Out<'_>, scratch: &mut Scratch,
    ) {
        let n = x.n();
        let tiles = w.rows.div_ceil(TILE);
        let acc = scratch.floats.take::<[f32; TILE]>(tiles * n);
        let sums = scratch.sums.take::<[u32; 16]>(n);
        let tile = &mut scratch.tile.take::<Tile>(1)[0];
        let offset = w.format.spec().codes.as_ref().expect("installed for formats with codes").offset;
        acc.fill([0.0; TILE]);
        for s in 0..w.slabs() {
            let x = x.q8(s);
            column_sums::<G, MIN>(offset, x, sums);
            let groups = (w.cols - s * SLAB).min(SLAB).div_ceil(G);
            for t in 0..tiles {
                interleave::<G>(k, &w, t * TILE, s, 0, tile);
                interleave::<G>(k, &w, t * TILE + 16, s, 1, tile);
                let acc = &mut acc[t * n..(t + 1) * n];
                let mut c = 0;
                while c + COLS <= n {
                    let r = c..c + COLS;
                    block::<G, MIN, COLS>(tile, groups, &x[r.clone()], &sums[r.clone()], &mut acc[r]);
                    c += COLS;
                }
                let r = c..n;
                match n - c {
                    1 => block::<G, MIN, 1>(tile, groups, &x[r.clone()], &sums[r.clone()], &mut acc[r]),
                    2 => block::<G, MIN, 2>(tile, groups, &x[r.clone()], &sums[r.clone()], &mut acc[r]),
                    3 => block::<G, MIN, 3>(tile, groups, &x[r.clone()], &sums[r.clone()], &mut acc[r]),
                    4 => block::<G, MIN, 4>(tile, groups, &x[r.clone()], &sums[r.clone()], &mut acc[r]),
                    5 => block::<G, MIN, 5>(tile, groups, &x[r.clone()], &sums[r.clone()], &mut acc[r]),
                    _ => (),
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

/// A slab of 32 rows, interleaved.
#[derive(Clone, Copy, bytemuck::Zeroable, bytemuck::Pod)]
#[repr(C, align(64))]
struct Tile {
    q: [[u8; 4 * TILE]; SLAB / 4], // [k / 4][row][4]
    scale: [[f32; TILE]; 16],      // [group][row]
    min: [[f32; TILE]; 16],
}

/// The matrix-vector kernel and the unpacker to memory of each format that has a register unpacker.
macro_rules! slabs {
    ($($format:ident $unpack:ident $group:literal $min:literal $gemv:ident $store:ident;)*) => {
        avx512! {
            $(
                fn $gemv(_: &Kernel, w: Panel<'_>, x: Acts<'_>, out: &mut Out<'_>, _: &mut Scratch) {
                    gemv::<$group, $min>(|b| $unpack(b), w, x, out);
                }

                fn $store(b: &[u8], codes: &mut Codes) {
                    store::<$group>($unpack(b), codes);
                }
            )*
        }

        fn gemv_of(format: Format, codes: &CodeSpec) -> Run {
            match format {
                $(Format::$format => $gemv,)*
                _ => match (codes.group, codes.has_min) {
                    (32, false) => gemv_codes::<32, false>,
                    (32, true) => gemv_codes::<32, true>,
                    (_, false) => gemv_codes::<16, false>,
                    (_, true) => gemv_codes::<16, true>,
                },
            }
        }

        fn unpack_of(format: Format) -> Option<unsafe fn(&[u8], &mut Codes)> {
            match format {
                $(Format::$format => Some($store),)*
                _ => None,
            }
        }
    };
}

slabs! {
    // format unpacker group has_min
    Q4_0 q4_0 32 false gemv_q4_0 store_q4_0;
    Q4_1 q4_1 32 true gemv_q4_1 store_q4_1;
    Q5_0 q5_0 32 false gemv_q5_0 store_q5_0;
    Q5_1 q5_1 32 true gemv_q5_1 store_q5_1;
    Q8_0 q8_0 32 false gemv_q8_0 store_q8_0;
    Q2_K q2_k 16 true gemv_q2_k store_q2_k;
    Q3_K q3_k 16 false gemv_q3_k store_q3_k;
    Q4_K q4_k 32 true gemv_q4_k store_q4_k;
    Q5_K q5_k 32 true gemv_q5_k store_q5_k;
    Q6_K q6_k 16 false gemv_q6_k store_q6_k;
    IQ4_NL iq4_nl 32 false gemv_iq4_nl store_iq4_nl;
    IQ4_XS iq4_xs 32 false gemv_iq4_xs store_iq4_xs;
}

avx512! {
    /// A slab to memory.
    fn store<const G: usize>(slab: Slab, codes: &mut Codes) {
        // SAFETY: 256 bytes and 16 floats are what the arrays hold.
        unsafe {
            for (j, q) in slab.q.into_iter().enumerate() {
                _mm512_storeu_si512(codes.q.as_mut_ptr().add(64 * j).cast(), q);
            }
            _mm512_storeu_ps(codes.scale.as_mut_ptr(), slab.scale);
            if G == 32 {
                _mm256_storeu_ps(codes.min.as_mut_ptr(), _mm512_extractf32x8_ps::<1>(slab.scale));
            } else {
                _mm512_storeu_ps(codes.min.as_mut_ptr(), slab.min);
            }
        }
    }

    /// Matrix times a few columns for formats whose blocks are unpacked by the format's own plain code.
    fn gemv_codes<const G: usize, const MIN: bool>(
        _: &Kernel, w: Panel<'_>, x: Acts<'_>, out: &mut Out<'_>, _: &mut Scratch,
    ) {
        let codes = w.format.spec().codes.as_ref().expect("installed for formats with codes");
        gemv::<G, MIN>(|b: &[u8]| slab_of_codes(codes, &unpacked(codes, b)), w, x, out);
    }
}
