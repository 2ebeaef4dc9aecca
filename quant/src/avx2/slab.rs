//! A slab of each format, from its blocks to registers.

use super::scales::{self, at, eight_halves, half, load128, plus_half, word};
use crate::format::iq::grid;
use crate::format::{SLAB, iq4, mxfp4};
use crate::isa::avx2;
use std::arch::x86_64::*;

/// A slab in registers: codes in the order of the weights, 32 in a vector; scales and minimums of 8 groups of 32, or of 16
/// groups of 16.
pub(super) struct Slab {
    pub q: [__m256i; SLAB / 32],
    pub scale: [__m256; 2],
    pub min: [__m256; 2],
}

avx2! {
    // ---- loads -------------------------------------------------------------------------------------------------------

    #[inline]
    pub(super) fn load(b: &[u8; 32]) -> __m256i {
        // SAFETY: 32 readable bytes.
        unsafe { _mm256_loadu_si256(b.as_ptr().cast()) }
    }

    #[inline]
    fn negated(x: __m256) -> __m256 {
        _mm256_xor_ps(x, _mm256_set1_ps(-0.0))
    }

    /// The low eight bytes as floats.
    #[inline]
    fn bytes_to_floats(b: __m128i) -> __m256 {
        _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(b))
    }

    /// The low eight signed bytes as floats.
    #[inline]
    fn signed_to_floats(b: __m128i) -> __m256 {
        _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(b))
    }

    /// One scale a group of 32, no minimums.
    #[inline]
    fn plain(q: [__m256i; 8], scale: __m256) -> Slab {
        let zero = _mm256_setzero_ps();
        Slab { q, scale: [scale, zero], min: [zero; 2] }
    }

    /// Eight vectors, filled by the caller.
    #[inline]
    fn none() -> [__m256i; 8] {
        [_mm256_setzero_si256(); 8]
    }

    // ---- bit fields --------------------------------------------------------------------------------------------------

    #[inline]
    fn low4(x: __m256i) -> __m256i {
        _mm256_and_si256(x, _mm256_set1_epi8(15))
    }

    /// The nibbles of 16 bytes: low ones, then high ones.
    #[inline]
    fn nibbles(b: &[u8; 16]) -> __m256i {
        let v = load128(b);
        low4(_mm256_set_m128i(_mm_srli_epi16::<4>(v), v))
    }

    /// The nibbles of eight blocks.
    #[inline]
    fn block_nibbles(b: &[u8], stride: usize, from: usize) -> [__m256i; 8] {
        let mut q = none();
        for g in 0..8 {
            q[g] = nibbles(at(b, stride * g + from));
        }
        q
    }

    /// The codes of four-bit indices.
    #[inline]
    fn looked_up(codes: &[u8; 16], mut q: [__m256i; 8]) -> [__m256i; 8] {
        let codes = _mm256_broadcastsi128_si256(load128(codes));
        for g in 0..8 {
            q[g] = _mm256_shuffle_epi8(codes, q[g]);
        }
        q
    }

    /// All ones in the bytes whose bit is set.
    #[inline]
    fn spread(bits: u32) -> __m256i {
        let byte = _mm256_setr_epi64x(
            0, 0x0101_0101_0101_0101, 0x0202_0202_0202_0202, 0x0303_0303_0303_0303,
        );
        let bit = _mm256_set1_epi64x(0x8040_2010_0804_0201u64 as i64);
        let b = _mm256_shuffle_epi8(_mm256_set1_epi32(bits as i32), byte);
        _mm256_cmpeq_epi8(_mm256_and_si256(b, bit), bit)
    }

    /// `value` in the bytes of `x` that have bit `i`.
    #[inline]
    fn where_bit(x: __m256i, i: usize, value: i8) -> __m256i {
        let bit = _mm256_set1_epi8((1u8 << i) as i8);
        _mm256_and_si256(_mm256_cmpeq_epi8(_mm256_and_si256(x, bit), bit), _mm256_set1_epi8(value))
    }

    /// The 2-bit fields of 64 bytes.
    #[inline]
    fn crumbs(b: &[u8; 64]) -> [__m256i; 8] {
        let (mut q, three) = (none(), _mm256_set1_epi8(3));
        for h in 0..2 {
            let v = load(at(b, 32 * h));
            q[4 * h] = _mm256_and_si256(v, three);
            q[4 * h + 1] = _mm256_and_si256(_mm256_srli_epi16::<2>(v), three);
            q[4 * h + 2] = _mm256_and_si256(_mm256_srli_epi16::<4>(v), three);
            q[4 * h + 3] = _mm256_and_si256(_mm256_srli_epi16::<6>(v), three);
        }
        q
    }

    // ---- the old formats ---------------------------------------------------------------------------------------------

    #[inline]
    pub(super) fn q4_0(b: &[u8; 144]) -> Slab {
        plain(block_nibbles(b, 18, 2), eight_halves(b, 18, 0))
    }

    #[inline]
    pub(super) fn q4_1(b: &[u8; 160]) -> Slab {
        let zero = _mm256_setzero_ps();
        let (scale, min) = (eight_halves(b, 20, 0), negated(eight_halves(b, 20, 2)));
        Slab { q: block_nibbles(b, 20, 4), scale: [scale, zero], min: [min, zero] }
    }

    /// Nibbles with the fifth bits, which stand in front of them.
    #[inline]
    fn five_bits(b: &[u8], stride: usize, high: usize) -> [__m256i; 8] {
        let mut q = block_nibbles(b, stride, high + 4);
        for g in 0..8 {
            let bits = _mm256_and_si256(spread(word(b, stride * g + high)), _mm256_set1_epi8(16));
            q[g] = _mm256_or_si256(q[g], bits);
        }
        q
    }

    #[inline]
    pub(super) fn q5_0(b: &[u8; 176]) -> Slab {
        plain(five_bits(b, 22, 2), eight_halves(b, 22, 0))
    }

    #[inline]
    pub(super) fn q5_1(b: &[u8; 192]) -> Slab {
        let zero = _mm256_setzero_ps();
        let (scale, min) = (eight_halves(b, 24, 0), negated(eight_halves(b, 24, 2)));
        Slab { q: five_bits(b, 24, 4), scale: [scale, zero], min: [min, zero] }
    }

    #[inline]
    pub(super) fn q8_0(b: &[u8; 272]) -> Slab {
        let mut q = none();
        for g in 0..8 {
            q[g] = _mm256_xor_si256(load(at(b, 34 * g + 2)), _mm256_set1_epi8(-128));
        }
        plain(q, eight_halves(b, 34, 0))
    }

    // ---- k-quants ----------------------------------------------------------------------------------------------------

    #[inline]
    pub(super) fn q2_k(b: &[u8; 84]) -> Slab {
        let s = load128(at(b, 0));
        let low = _mm_set1_epi8(15);
        let (scales, mins) = (_mm_and_si128(s, low), _mm_and_si128(_mm_srli_epi16::<4>(s), low));
        let (d, dmin) = (half(b, 80), half(b, 82));
        let both = |x, d| {
            [
                _mm256_mul_ps(bytes_to_floats(x), d),
                _mm256_mul_ps(bytes_to_floats(_mm_srli_si128::<8>(x)), d),
            ]
        };
        Slab { q: crumbs(at(b, 16)), scale: both(scales, d), min: both(mins, dmin) }
    }

    #[inline]
    pub(super) fn q3_k(b: &[u8; 110]) -> Slab {
        let (mut q, high) = (crumbs(at(b, 32)), load(at(b, 0)));
        for i in 0..8 {
            q[i] = _mm256_or_si256(q[i], where_bit(high, i, 4));
        }
        let (a0, a1, t) = (word(b, 96), word(b, 100), word(b, 104));
        let (nib, two) = (0x0F0F_0F0F, 0x0303_0303);
        let s = _mm_setr_epi32(
            (a0 & nib | (t & two) << 4) as i32,
            (a1 & nib | (t >> 2 & two) << 4) as i32,
            (a0 >> 4 & nib | (t >> 4 & two) << 4) as i32,
            (a1 >> 4 & nib | (t >> 6 & two) << 4) as i32,
        );
        let (s, d) = (_mm_sub_epi8(s, _mm_set1_epi8(32)), half(b, 108));
        let scale = [
            _mm256_mul_ps(signed_to_floats(s), d),
            _mm256_mul_ps(signed_to_floats(_mm_srli_si128::<8>(s)), d),
        ];
        Slab { q, scale, min: [_mm256_setzero_ps(); 2] }
    }

    /// Scales and minimums of Q4_K and Q5_K: 6 bits each, in three words.
    #[inline]
    fn scales_4k(b: &[u8]) -> ([__m256; 2], [__m256; 2]) {
        let (u0, u1, u2) = (word(b, 4), word(b, 8), word(b, 12));
        let scale = [u0 & 0x3F3F_3F3F, u2 & 0x0F0F_0F0F | (u0 >> 6 & 0x0303_0303) << 4];
        let min = [u1 & 0x3F3F_3F3F, u2 >> 4 & 0x0F0F_0F0F | (u1 >> 6 & 0x0303_0303) << 4];
        let wide = |p: [u32; 2]| bytes_to_floats(_mm_cvtsi64_si128((p[0] as u64 | (p[1] as u64) << 32) as i64));
        let zero = _mm256_setzero_ps();
        ([_mm256_mul_ps(wide(scale), half(b, 0)), zero], [_mm256_mul_ps(wide(min), half(b, 2)), zero])
    }

    #[inline]
    fn nibbles_4k(b: &[u8; 128]) -> [__m256i; 8] {
        let mut q = none();
        for j in 0..4 {
            let v = load(at(b, 32 * j));
            q[2 * j] = low4(v);
            q[2 * j + 1] = low4(_mm256_srli_epi16::<4>(v));
        }
        q
    }

    #[inline]
    pub(super) fn q4_k(b: &[u8; 144]) -> Slab {
        let (scale, min) = scales_4k(b);
        Slab { q: nibbles_4k(at(b, 16)), scale, min }
    }

    #[inline]
    pub(super) fn q5_k(b: &[u8; 176]) -> Slab {
        let (scale, min) = scales_4k(b);
        let (mut q, high) = (nibbles_4k(at(b, 48)), load(at(b, 16)));
        for i in 0..8 {
            q[i] = _mm256_or_si256(q[i], where_bit(high, i, 16));
        }
        Slab { q, scale, min }
    }

    #[inline]
    pub(super) fn q6_k(b: &[u8; 210]) -> Slab {
        let (mut q, two) = (none(), _mm256_set1_epi8(0x30));
        for n in 0..2 {
            let (l0, l1, h) = (load(at(b, 64 * n)), load(at(b, 64 * n + 32)), load(at(b, 128 + 32 * n)));
            let join = |low, high| _mm256_or_si256(low4(low), _mm256_and_si256(high, two));
            q[4 * n] = join(l0, _mm256_slli_epi16::<4>(h));
            q[4 * n + 1] = join(l1, _mm256_slli_epi16::<2>(h));
            q[4 * n + 2] = join(_mm256_srli_epi16::<4>(l0), h);
            q[4 * n + 3] = join(_mm256_srli_epi16::<4>(l1), _mm256_srli_epi16::<2>(h));
        }
        let (s, d) = (load128(at(b, 192)), half(b, 208));
        let scale = [
            _mm256_mul_ps(signed_to_floats(s), d),
            _mm256_mul_ps(signed_to_floats(_mm_srli_si128::<8>(s)), d),
        ];
        Slab { q, scale, min: [_mm256_setzero_ps(); 2] }
    }

    #[inline]
    pub(super) fn q8_k(b: &[u8; 292]) -> Slab {
        let mut q = none();
        for g in 0..8 {
            q[g] = _mm256_xor_si256(load(at(b, 4 + 32 * g)), _mm256_set1_epi8(-128));
        }
        plain(q, _mm256_set1_ps(f32::from_bits(word(b, 0))))
    }

    // ---- tables of sixteen, digits -----------------------------------------------------------------------------------

    #[inline]
    pub(super) fn iq4_nl(b: &[u8; 144]) -> Slab {
        plain(looked_up(&iq4::CODES, block_nibbles(b, 18, 2)), eight_halves(b, 18, 0))
    }

    #[inline]
    pub(super) fn iq4_xs(b: &[u8; 136]) -> Slab {
        plain(looked_up(&iq4::CODES, block_nibbles(b, 16, 8)), scales::iq4_xs(b))
    }

    #[inline]
    pub(super) fn mxfp4(b: &[u8; 136]) -> Slab {
        let e = u64::from_le_bytes([b[0], b[17], b[34], b[51], b[68], b[85], b[102], b[119]]);
        let e = _mm256_cvtepu8_epi32(_mm_cvtsi64_si128(e as i64));
        let normal = _mm256_slli_epi32::<23>(_mm256_sub_epi32(e, _mm256_set1_epi32(1)));
        // 2^-128 and 2^-127 are subnormal.
        let small = _mm256_sllv_epi32(_mm256_set1_epi32(0x0020_0000), e);
        let e = _mm256_blendv_epi8(normal, small, _mm256_cmpgt_epi32(_mm256_set1_epi32(2), e));
        plain(looked_up(&mxfp4::CODES, block_nibbles(b, 17, 1)), _mm256_castsi256_ps(e))
    }

    #[inline]
    pub(super) fn tq2_0(b: &[u8; 66]) -> Slab {
        plain(crumbs(at(b, 0)), half(b, 64))
    }

    /// The next digit of base 3 moves to the front: three times each byte, without its overflow.
    #[inline]
    fn thrice(x: __m256i) -> __m256i {
        _mm256_add_epi8(x, _mm256_add_epi8(x, x))
    }

    /// The digit in front, the integer part of `3 x / 256`: how many of the thresholds 256 / 3 and 512 / 3 a byte reaches.
    #[inline]
    fn digit(x: __m256i) -> __m256i {
        let reaches = |t: u8| _mm256_cmpeq_epi8(_mm256_max_epu8(x, _mm256_set1_epi8(t as i8)), x);
        _mm256_sub_epi8(_mm256_setzero_si256(), _mm256_add_epi8(reaches(86), reaches(171)))
    }

    /// 32 bytes give five digits each, 16 bytes five, 4 bytes four.
    #[inline]
    pub(super) fn tq1_0(b: &[u8; 54]) -> Slab {
        let mut q = none();
        let mut x = load(at(b, 0));
        for i in 0..5 {
            q[i] = digit(x);
            x = thrice(x);
        }
        let y = _mm256_broadcastsi128_si256(load128(at(b, 32)));
        let y = _mm256_blend_epi32::<0xF0>(y, thrice(y));
        let y9 = thrice(thrice(y));
        let z = _mm256_set1_epi32(word(b, 48) as i32);
        let z = _mm256_blend_epi32::<0b1010_1010>(z, thrice(z));
        let z = _mm256_blend_epi32::<0b1100_1100>(z, thrice(thrice(z)));
        q[5] = digit(y);
        q[6] = digit(y9);
        q[7] = digit(_mm256_blend_epi32::<0xF0>(thrice(thrice(y9)), z));
        plain(q, half(b, 52))
    }

    // ---- formats with grids ------------------------------------------------------------------------------------------

    /// Four points of eight bytes. (Four loads: `vpgatherdq` costs more on the machines that end at this rung.)
    #[inline]
    fn points<const N: usize>(grid: &[[u8; 8]; N], index: [usize; 4]) -> __m256i {
        const { assert!(N.is_power_of_two()) };
        let point = |i: usize| i64::from_le_bytes(grid[index[i] & (N - 1)]);
        _mm256_setr_epi64x(point(0), point(1), point(2), point(3))
    }

    /// Eight points of four bytes.
    #[inline]
    fn small_points<const N: usize>(grid: &[[u8; 4]; N], index: [usize; 8]) -> __m256i {
        const { assert!(N.is_power_of_two()) };
        let point = |i: usize| i32::from_le_bytes(grid[index[i] & (N - 1)]);
        _mm256_setr_epi32(point(0), point(1), point(2), point(3), point(4), point(5), point(6), point(7))
    }

    /// Magnitudes with signs, and 64 more.
    #[inline]
    fn with_signs(magnitudes: __m256i, negative: u32) -> __m256i {
        let n = spread(negative);
        _mm256_add_epi8(_mm256_sub_epi8(_mm256_xor_si256(magnitudes, n), n), _mm256_set1_epi8(64))
    }

    /// Four times seven signs in bytes, each with the eighth that makes their number even.
    #[inline]
    fn even(seven: u32) -> u32 {
        // Bit 0 of each byte becomes its parity; what the shifts bring in from the next byte stays above it.
        let p = seven ^ seven >> 4;
        let p = p ^ p >> 2;
        let p = p ^ p >> 1;
        seven | (p & 0x0101_0101) << 7
    }

    /// The 28 sign bits of a word to bytes of seven. (Shifts: `pdep` is slow on AMD before Zen 3.)
    #[inline]
    fn signs_28(a: u32) -> u32 {
        even(a & 0x7F | (a << 1) & 0x7F00 | (a << 2) & 0x7F_0000 | (a << 3) & 0x7F00_0000)
    }

    #[inline]
    pub(super) fn iq2_xxs(b: &[u8; 66]) -> Slab {
        let mut q = none();
        for g in 0..8 {
            let (i, high) = (word(b, 2 + 8 * g) as usize, word(b, 6 + 8 * g));
            let index = [i & 255, i >> 8 & 255, i >> 16 & 255, i >> 24];
            q[g] = with_signs(points(&grid::IQ2_XXS, index), signs_28(high));
        }
        // Every second word, with the scale in its top four bits.
        let (v, w) = (load(at(b, 2)), load(at(b, 34)));
        let high = _mm256_castps_si256(_mm256_shuffle_ps::<0b11_01_11_01>(_mm256_castsi256_ps(v), _mm256_castsi256_ps(w)));
        let high = _mm256_srli_epi32::<28>(_mm256_permute4x64_epi64::<0b11_01_10_00>(high));
        plain(q, plus_half(high, _mm256_mul_ps(half(b, 0), _mm256_set1_ps(0.25))))
    }

    /// `d * (s + 1/2) / 4` for sixteen 4-bit scales.
    #[inline]
    fn scales_2(d: __m256, b: &[u8; 8]) -> [__m256; 2] {
        let s = _mm_cvtsi64_si128(i64::from_le_bytes(*b));
        let s = _mm_and_si128(_mm_unpacklo_epi8(s, _mm_srli_epi16::<4>(s)), _mm_set1_epi8(15));
        let d = _mm256_mul_ps(d, _mm256_set1_ps(0.25));
        [plus_half(_mm256_cvtepu8_epi32(s), d), plus_half(_mm256_cvtepu8_epi32(_mm_srli_si128::<8>(s)), d)]
    }

    #[inline]
    pub(super) fn iq2_xs(b: &[u8; 74]) -> Slab {
        let mut q = none();
        for g in 0..8 {
            let w = u64::from_le_bytes(*at(b, 2 + 8 * g));
            let index = [w as usize & 511, (w >> 16) as usize & 511, (w >> 32) as usize & 511, (w >> 48) as usize & 511];
            let seven = w >> 9 & 0x7F | w >> 17 & 0x7F00 | w >> 25 & 0x7F_0000 | w >> 33 & 0x7F00_0000;
            q[g] = with_signs(points(&grid::IQ2_XS, index), even(seven as u32));
        }
        Slab { q, scale: scales_2(half(b, 0), at(b, 66)), min: [_mm256_setzero_ps(); 2] }
    }

    #[inline]
    pub(super) fn iq2_s(b: &[u8; 82]) -> Slab {
        let mut q = none();
        for g in 0..8 {
            let (i, high) = (word(b, 2 + 4 * g) as usize, b[66 + g] as usize);
            let index = [
                i & 255 | (high & 3) << 8,
                i >> 8 & 255 | (high >> 2 & 3) << 8,
                i >> 16 & 255 | (high >> 4 & 3) << 8,
                i >> 24 | (high >> 6) << 8,
            ];
            q[g] = with_signs(points(&grid::IQ2_S, index), word(b, 34 + 4 * g));
        }
        Slab { q, scale: scales_2(half(b, 0), at(b, 74)), min: [_mm256_setzero_ps(); 2] }
    }

    /// Eight byte indices with a ninth bit each.
    #[inline]
    fn nine_bits(low: &[u8; 8], high: u8) -> [usize; 8] {
        let mut index = [0; 8];
        for i in 0..8 {
            index[i] = low[i] as usize | (high as usize >> i & 1) << 8;
        }
        index
    }

    #[inline]
    pub(super) fn iq3_xxs(b: &[u8; 98]) -> Slab {
        let mut q = none();
        for g in 0..8 {
            let index = nine_bits(at(b, 2 + 8 * g), 0);
            q[g] = with_signs(small_points(&grid::IQ3_XXS, index), signs_28(word(b, 66 + 4 * g)));
        }
        let s = _mm256_srli_epi32::<28>(load(at(b, 66)));
        plain(q, plus_half(s, _mm256_mul_ps(half(b, 0), _mm256_set1_ps(0.5))))
    }

    #[inline]
    pub(super) fn iq3_s(b: &[u8; 110]) -> Slab {
        let mut q = none();
        for g in 0..8 {
            let index = nine_bits(at(b, 2 + 8 * g), b[66 + g]);
            q[g] = with_signs(small_points(&grid::IQ3_S, index), word(b, 74 + 4 * g));
        }
        plain(q, scales::iq3_s(b))
    }

    /// What shifts a point of IQ1: all its bytes one down or one up.
    #[inline]
    fn shift(down: bool) -> i64 {
        if down { -1 } else { 0x0101_0101_0101_0101 }
    }

    #[inline]
    pub(super) fn iq1_s(b: &[u8; 50]) -> Slab {
        let mut q = none();
        for g in 0..8 {
            let (i, high) = (word(b, 2 + 4 * g) as usize, u16::from_le_bytes(*at(b, 34 + 2 * g)) as usize);
            let index = [
                i & 255 | (high & 7) << 8,
                i >> 8 & 255 | (high >> 3 & 7) << 8,
                i >> 16 & 255 | (high >> 6 & 7) << 8,
                i >> 24 | (high >> 9 & 7) << 8,
            ];
            q[g] = _mm256_add_epi8(points(&grid::IQ1, index), _mm256_set1_epi64x(shift(high & 0x8000 != 0)));
        }
        plain(q, scales::iq1_s(b))
    }

    #[inline]
    pub(super) fn iq1_m(b: &[u8; 56]) -> Slab {
        let mut q = none();
        for g in 0..8 {
            let (i, high) = (word(b, 4 * g) as usize, u16::from_le_bytes(*at(b, 32 + 2 * g)) as usize);
            let index = [
                i & 255 | (high & 7) << 8,
                i >> 8 & 255 | (high >> 4 & 7) << 8,
                i >> 16 & 255 | (high >> 8 & 7) << 8,
                i >> 24 | (high >> 12 & 7) << 8,
            ];
            let down = |bit: usize| shift(high >> bit & 1 == 1);
            let down = _mm256_setr_epi64x(down(3), down(7), down(11), down(15));
            q[g] = _mm256_add_epi8(points(&grid::IQ1, index), down);
        }
        let words = u64::from_le_bytes(*at(b, 48));
        let d = (words >> 12 & 0xF | words >> 24 & 0xF0 | words >> 36 & 0xF00 | words >> 48 & 0xF000) as u16;
        let d = _mm256_mul_ps(half(&d.to_le_bytes(), 0), _mm256_set1_ps(0.125));
        let mut scale = [_mm256_setzero_ps(); 2];
        for h in 0..2 {
            let (a, c) = ((words >> (32 * h)) as i32 & 0xFFFF, (words >> (32 * h + 16)) as i32 & 0xFFFF);
            let s = _mm256_setr_epi32(a, a, a, a, c, c, c, c);
            let s = _mm256_srlv_epi32(s, _mm256_setr_epi32(0, 3, 6, 9, 0, 3, 6, 9));
            let s = _mm256_and_si256(s, _mm256_set1_epi32(7));
            let s = _mm256_cvtepi32_ps(_mm256_add_epi32(_mm256_add_epi32(s, s), _mm256_set1_epi32(1)));
            scale[h] = _mm256_mul_ps(s, d);
        }
        Slab { q, scale, min: [_mm256_setzero_ps(); 2] }
    }
}
