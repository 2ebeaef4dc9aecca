//! A slab of each format, from its blocks to registers.

use crate::avx2::scales::{self, at, eight_halves, load128, word};
use crate::format::iq::grid;
use crate::format::{iq4, mxfp4};
use crate::isa::avx512;
use std::arch::x86_64::*;

/// A slab in registers. In formats with groups of 32, `scale` holds 8 scales and then the 8 minimums, if any (else zeros);
/// `min` is for the 16 minimums of formats with groups of 16.
///
/// How the codes lie is the format's [`Order`]: as close to the weights' order as is possible without extra instructions. Where vectors share their
/// bytes, each is those bytes, and [`apart`] takes the codes out of them: of two rows at once, if that suits.
pub(crate) struct Slab {
    pub q: [__m512i; 4],
    pub scale: __m512,
    pub min: __m512,
}

/// How codes lie in the four vectors of a [`Slab`], a parameter of its readers.
pub(crate) struct Order;

impl Order {
    /// As the weights.
    pub const PLAIN: u8 = 0;
    /// Where a byte's nibbles belong to weights 16 apart: the low nibbles of four blocks, then their high ones. They share bytes.
    pub const PAIRED: u8 = 1;
    /// The same, and nibbles are indices of IQ4's codes, or of MXFP4's.
    pub const PAIRED_IQ4: u8 = 2;
    pub const PAIRED_MXFP4: u8 = 3;
    /// Where they belong to weights 32 apart: the low nibbles of 64 bytes, then their high ones.
    pub const HALVES: u8 = 4;
    /// The same, the high ones left where they are. They share bytes.
    pub const NIBBLES: u8 = 5;
    /// Where a byte has two bits of weights 32 apart: the lowest of 64 bytes, the next ones, left where they are, and so on.
    /// They share bytes.
    pub const QUARTERS: u8 = 6;
    /// The same, but the highest are moved down: a third bit has room above each. The first three vectors share the bytes with
    /// two bits, the last is the third bits: 0 to 3 in the bytes of the lower half and, moved to there, of the upper one.
    pub const THIRDS: u8 = 7;

    /// Whether the nibbles of a byte belong to one block.
    pub const fn is_paired(order: u8) -> bool {
        matches!(order, Order::PAIRED | Order::PAIRED_IQ4 | Order::PAIRED_MXFP4)
    }

    /// Whether the first two vectors are the same bytes, and the last two.
    pub const fn shares_bytes(order: u8) -> bool {
        Order::is_paired(order) || matches!(order, Order::NIBBLES | Order::QUARTERS)
    }

    /// Bits by which the codes of each vector are shifted up.
    pub const fn shifts(order: u8) -> [u32; 4] {
        match order {
            Order::NIBBLES => [0, 4, 0, 4],
            Order::QUARTERS => [0, 2, 4, 6],
            Order::THIRDS => [0, 2, 4, 0],
            _ => [0; 4],
        }
    }
}

/// The offset of [`merged`] codes without minimums.
pub(crate) const MERGED_OFFSET: i32 = 124;

avx512! {
    // ---- loads -------------------------------------------------------------------------------------------------------

    #[inline]
    pub(crate) fn load512(b: &[u8; 64]) -> __m512i {
        // SAFETY: 64 readable bytes.
        unsafe { _mm512_loadu_si512(b.as_ptr().cast()) }
    }

    #[inline]
    pub(crate) fn signed(b: &[i8; 64]) -> __m512i {
        // SAFETY: 64 readable bytes.
        unsafe { _mm512_loadu_si512(b.as_ptr().cast()) }
    }

    #[inline]
    pub(crate) fn load256(b: &[u8; 32]) -> __m256i {
        // SAFETY: 32 readable bytes.
        unsafe { _mm256_loadu_si256(b.as_ptr().cast()) }
    }

    #[inline]
    pub(crate) fn floats(x: &[f32; 16]) -> __m512 {
        // SAFETY: 64 readable bytes.
        unsafe { _mm512_loadu_ps(x.as_ptr()) }
    }

    /// An f16 in every lane.
    #[inline]
    fn f16_all(b: &[u8; 2]) -> __m512 {
        _mm512_broadcastss_ps(_mm_cvtph_ps(_mm_cvtsi32_si128(u16::from_le_bytes(*b) as i32)))
    }

    /// 32 bytes in both halves of a vector.
    #[inline]
    fn twice(b: &[u8; 32]) -> __m512i {
        _mm512_broadcast_i64x4(load256(b))
    }

    // ---- a slab of each format to registers --------------------------------------------------------------------------

    /// The lower half of `a`, and that of `b` above it.
    #[inline]
    fn halves(a: __m512, b: __m512) -> __m512 {
        _mm512_insertf32x8::<1>(a, _mm512_castps512_ps256(b))
    }

    /// `d * scale` in lanes 0 to 7 and `dmin * min` in lanes 8 to 15, of the first 16 bytes of Q4_K and Q5_K: two f16, and 8
    /// and 8 numbers of 6 bits in three words. All in registers: a store followed by a wider load would stall.
    #[inline]
    fn scales_4k(b: &[u8]) -> __m512 {
        let x = load128(at(b, 0));
        // Words: scales 0-3, scales 4-7, minimums 0-3, minimums 4-7; four bits of the last word or six, and two from above.
        let low = _mm_srlv_epi32(_mm_shuffle_epi32::<0b11_10_11_01>(x), _mm_setr_epi32(0, 0, 0, 4));
        let high = _mm_srli_epi32::<2>(_mm_shuffle_epi32::<0b10_10_01_01>(x));
        let low = _mm_and_si128(low, _mm_setr_epi32(0x3F3F_3F3F, 0x0F0F_0F0F, 0x3F3F_3F3F, 0x0F0F_0F0F));
        let high = _mm_and_si128(high, _mm_setr_epi32(0, 0x3030_3030, 0, 0x3030_3030));
        let d = _mm512_permutexvar_ps(
            _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1),
            _mm512_castps128_ps512(_mm_cvtph_ps(x)),
        );
        _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_or_si128(low, high))), d)
    }

    #[inline]
    pub(crate) fn q4_k(b: &[u8; 144]) -> Slab {
        let (x, y) = (load512(at(b, 16)), load512(at(b, 80)));
        Slab { q: [x, x, y, y], scale: scales_4k(b), min: _mm512_setzero_ps() }
    }

    /// 32 bytes twice, in the upper half moved down by `shift` bits.
    #[inline]
    fn upper_shifted(b: &[u8; 32], shift: i16) -> __m512i {
        _mm512_srlv_epi16(twice(b), _mm512_inserti64x4::<1>(_mm512_setzero_si512(), _mm256_set1_epi16(shift)))
    }

    /// `q`, and of `high` the bits of `mask`.
    #[inline]
    fn with_bits(q: __m512i, high: __m512i, mask: u8) -> __m512i {
        _mm512_ternarylogic_epi32::<0xF8>(q, high, _mm512_set1_epi8(mask as i8))
    }

    #[inline]
    pub(crate) fn q5_k(b: &[u8; 176]) -> Slab {
        let ([q0, q1], [q2, q3]) = (pair(load512(at(b, 48))), pair(load512(at(b, 112))));
        // The fifth bits: 0, 1, 4 and 5 for the lower half of each vector, two higher for the upper one.
        let high = upper_shifted(at(b, 16), 2);
        let q = [
            with_bits(q0, _mm512_slli_epi16::<4>(high), 16),
            with_bits(q1, _mm512_slli_epi16::<3>(high), 16),
            with_bits(q2, high, 16),
            with_bits(q3, _mm512_srli_epi16::<1>(high), 16),
        ];
        Slab { q, scale: scales_4k(b), min: _mm512_setzero_ps() }
    }

    #[inline]
    pub(crate) fn q6_k(b: &[u8; 210]) -> Slab {
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

    /// Scales and minimums of Q2_K, and the f16 that they are multiplied by.
    #[inline]
    fn scales_2k(b: &[u8; 84]) -> ([__m512i; 2], [__m512; 2]) {
        let s = _mm512_cvtepu8_epi32(load128(at(b, 0)));
        let d = _mm_cvtph_ps(_mm_cvtsi32_si128(word(b, 80) as i32));
        let (d, dmin) = (_mm512_broadcastss_ps(d), _mm512_broadcastss_ps(_mm_movehdup_ps(d)));
        ([_mm512_and_si512(s, _mm512_set1_epi32(15)), _mm512_srli_epi32::<4>(s)], [d, dmin])
    }

    #[inline]
    pub(crate) fn q2_k(b: &[u8; 84]) -> Slab {
        let ([scale, min], [d, dmin]) = scales_2k(b);
        let (scale, min) = (_mm512_mul_ps(_mm512_cvtepi32_ps(scale), d), _mm512_mul_ps(_mm512_cvtepi32_ps(min), dmin));
        Slab { q: [load512(at(b, 16)); 4], scale, min }
    }

    #[inline]
    pub(crate) fn q2_k_merged(b: &[u8; 84]) -> Slab {
        let ([scales, _], [d, _]) = scales_2k(b);
        merged::<true, { Order::QUARTERS }>(q2_k(b), scales, d)
    }

    /// Scales of Q3_K, -32 to 31. Three words before the f16: four bits of scales 0-3 and, above them, 8-11; of 4-7 and 12-15;
    /// two more of each.
    #[inline]
    fn scales_3k(b: &[u8; 110]) -> __m512i {
        let x = load128(at(b, 94));
        let low = _mm_shuffle_epi8(x, _mm_setr_epi8(2, 3, 4, 5, 6, 7, 8, 9, 2, 3, 4, 5, 6, 7, 8, 9));
        let high = _mm_shuffle_epi8(x, _mm_set1_epi32(0x0D0C_0B0A));
        let low = _mm_and_si128(_mm_srlv_epi32(low, _mm_setr_epi32(0, 0, 4, 4)), _mm_set1_epi8(15));
        let high = _mm_and_si128(_mm_srlv_epi32(high, _mm_setr_epi32(0, 2, 4, 6)), _mm_set1_epi8(3));
        let s = _mm_or_si128(low, _mm_slli_epi16::<4>(high));
        _mm512_sub_epi32(_mm512_cvtepu8_epi32(s), _mm512_set1_epi32(32))
    }

    #[inline]
    pub(crate) fn q3_k(b: &[u8; 110]) -> Slab {
        let low = load512(at(b, 32));
        let scale = _mm512_mul_ps(_mm512_cvtepi32_ps(scales_3k(b)), f16_all(at(b, 108)));
        Slab { q: [low, low, low, upper_shifted(at(b, 0), 4)], scale, min: _mm512_setzero_ps() }
    }

    #[inline]
    pub(crate) fn q3_k_merged(b: &[u8; 110]) -> Slab {
        merged::<false, { Order::THIRDS }>(q3_k(b), scales_3k(b), f16_all(at(b, 108)))
    }

    /// Words of the two 64-byte stretches of a slab that begin at its start and at byte `second`. `i` counts in words of
    /// the first, and from 32 on of the second.
    #[inline]
    fn words(b: &[u8], second: usize, i: __m512i) -> __m512 {
        let w = _mm512_permutex2var_epi16(load512(at(b, 0)), i, load512(at(b, second)));
        _mm512_cvtph_ps(_mm512_castsi512_si256(w))
    }

    /// The eight f16 scales of blocks of 18 bytes.
    #[inline]
    fn scales_18(b: &[u8; 144]) -> __m512 {
        let i = _mm256_setr_epi16(0, 9, 18, 27, 32, 41, 50, 59, 0, 0, 0, 0, 0, 0, 0, 0);
        _mm512_maskz_mov_ps(0xFF, words(b, 72, _mm512_castsi256_si512(i)))
    }

    /// The bytes of four blocks, from `from` on in each.
    #[inline]
    fn four(b: &[u8], stride: usize, from: usize) -> __m512i {
        if stride == 16 {
            return load512(at(b, from));
        }
        let part = |g: usize| load128(at(b, stride * g + from));
        let low = _mm512_castsi128_si512(part(0));
        let low = _mm512_inserti32x4::<1>(low, part(1));
        _mm512_inserti32x4::<3>(_mm512_inserti32x4::<2>(low, part(2)), part(3))
    }

    /// Low and high nibbles.
    #[inline]
    fn pair(b: __m512i) -> [__m512i; 2] {
        let low = _mm512_set1_epi8(15);
        [_mm512_and_si512(b, low), _mm512_and_si512(_mm512_srli_epi16::<4>(b), low)]
    }

    /// The nibbles of eight blocks.
    #[inline]
    fn eight_blocks(b: &[u8], stride: usize, from: usize) -> [__m512i; 4] {
        let (x, y) = (four(b, stride, from), four(b, stride, from + 4 * stride));
        [x, x, y, y]
    }

    /// The codes that are taken out of bytes which vectors of a slab share: of each four lanes, those of the vectors `of`.
    #[inline]
    pub(crate) fn codes<const ORDER: u8>(of: [usize; 4], bytes: __m512i) -> __m512i {
        let lanes = |x: [u32; 4]| {
            let [a, b, c, d] = x.map(u32::cast_signed);
            _mm512_broadcast_i32x4(_mm_setr_epi32(a, b, c, d))
        };
        let only = |bytes, bits: [u8; 4]| _mm512_and_si512(bytes, lanes(bits.map(|b| u32::from_ne_bytes([b; 4]))));
        let nibbles = || only(_mm512_srlv_epi32(bytes, lanes(of.map(|j| 4 * (j as u32 % 2)))), [15; 4]);
        let looked_up = |codes| _mm512_shuffle_epi8(_mm512_broadcast_i32x4(load128(codes)), nibbles());
        match ORDER {
            Order::PAIRED => nibbles(),
            Order::PAIRED_IQ4 => looked_up(&iq4::CODES),
            Order::PAIRED_MXFP4 => looked_up(&mxfp4::CODES),
            Order::NIBBLES => only(bytes, of.map(|j| 0x0F << (4 * (j % 2)))),
            Order::QUARTERS => only(bytes, of.map(|j| 0x03 << (2 * j))),
            _ => bytes,
        }
    }

    /// The codes of a slab.
    #[inline]
    pub(crate) fn apart<const ORDER: u8>([a, b, c, d]: [__m512i; 4]) -> [__m512i; 4] {
        if ORDER == Order::THIRDS {
            let two = |j: usize| codes::<{ Order::QUARTERS }>([j; 4], a);
            return [
                with_bits(two(0), _mm512_slli_epi16::<2>(d), 4),
                with_bits(two(1), _mm512_slli_epi16::<3>(d), 16),
                with_bits(two(2), _mm512_slli_epi16::<4>(d), 64),
                with_bits(_mm512_srli_epi16::<6>(two(3)), _mm512_srli_epi16::<1>(d), 4),
            ];
        }
        [codes::<ORDER>([0; 4], a), codes::<ORDER>([1; 4], b), codes::<ORDER>([2; 4], c), codes::<ORDER>([3; 4], d)]
    }

    /// A slab of Q2_K or Q3_K whose sixteen small scales are multiplied into the codes, exactly, which are in the order of the
    /// weights then; what is left is one scale, in every lane, and Q2_K's minimums. Two bits times four are at most 45; three
    /// signed ones times six are -124 to 128, [`MERGED_OFFSET`] more are bytes.
    #[inline]
    pub(crate) fn merged<const MIN: bool, const ORDER: u8>(slab: Slab, scales: __m512i, d: __m512) -> Slab {
        let mut q = in_order::<ORDER>(slab.q);
        for j in 0..4 {
            // What each code becomes, for the four groups of a vector.
            let group = _mm512_add_epi32(
                _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3),
                _mm512_set1_epi32(4 * j as i32),
            );
            let scale = _mm512_permutexvar_epi32(group, scales);
            let table = if MIN {
                _mm512_mullo_epi32(scale, _mm512_set1_epi32(0x0302_0100))
            } else {
                let scale = _mm512_mask_mov_epi16(scale, 0xAAAA_AAAA, _mm512_slli_epi32::<16>(scale));
                let codes = _mm512_broadcast_i32x4(_mm_setr_epi16(-4, -3, -2, -1, 0, 1, 2, 3));
                let products = _mm512_mullo_epi16(scale, codes);
                let products = _mm512_add_epi16(products, _mm512_set1_epi16(MERGED_OFFSET as i16));
                _mm512_packus_epi16(products, products)
            };
            q[j] = _mm512_shuffle_epi8(table, q[j]);
        }
        Slab { q, scale: d, min: slab.min }
    }

    /// The codes of a slab, moved down, in the order of the weights.
    #[inline]
    pub(crate) fn in_order<const ORDER: u8>(q: [__m512i; 4]) -> [__m512i; 4] {
        let mut q = apart::<ORDER>(q);
        for (q, shift) in q.iter_mut().zip(Order::shifts(ORDER)) {
            // No bits come from a byte's neighbour: those that would are not the code's.
            *q = if shift > 0 { _mm512_srl_epi16(*q, _mm_cvtsi32_si128(shift as i32)) } else { *q };
        }
        match ORDER {
            Order::PAIRED | Order::PAIRED_IQ4 | Order::PAIRED_MXFP4 => {
                let first = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11);
                let second = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
                [
                    _mm512_permutex2var_epi64(q[0], first, q[1]),
                    _mm512_permutex2var_epi64(q[0], second, q[1]),
                    _mm512_permutex2var_epi64(q[2], first, q[3]),
                    _mm512_permutex2var_epi64(q[2], second, q[3]),
                ]
            }
            Order::HALVES | Order::NIBBLES => [low(q[0], q[1]), high(q[0], q[1]), low(q[2], q[3]), high(q[2], q[3])],
            Order::QUARTERS | Order::THIRDS => [low(q[0], q[1]), low(q[2], q[3]), high(q[0], q[1]), high(q[2], q[3])],
            _ => q,
        }
    }

    /// What stands in the order of the weights (activations), in the codes'.
    #[inline]
    pub(crate) fn arranged<const ORDER: u8>(x: [__m512i; 4]) -> [__m512i; 4] {
        match ORDER {
            Order::PAIRED | Order::PAIRED_IQ4 | Order::PAIRED_MXFP4 => {
                let low = _mm512_setr_epi64(0, 1, 4, 5, 8, 9, 12, 13);
                let high = _mm512_setr_epi64(2, 3, 6, 7, 10, 11, 14, 15);
                [
                    _mm512_permutex2var_epi64(x[0], low, x[1]),
                    _mm512_permutex2var_epi64(x[0], high, x[1]),
                    _mm512_permutex2var_epi64(x[2], low, x[3]),
                    _mm512_permutex2var_epi64(x[2], high, x[3]),
                ]
            }
            Order::HALVES | Order::NIBBLES => [low(x[0], x[1]), high(x[0], x[1]), low(x[2], x[3]), high(x[2], x[3])],
            Order::QUARTERS | Order::THIRDS => [low(x[0], x[2]), high(x[0], x[2]), low(x[1], x[3]), high(x[1], x[3])],
            _ => x,
        }
    }

    /// The lower halves of two vectors.
    #[inline]
    fn low(a: __m512i, b: __m512i) -> __m512i {
        _mm512_shuffle_i64x2::<0b01_00_01_00>(a, b)
    }

    /// The upper halves.
    #[inline]
    fn high(a: __m512i, b: __m512i) -> __m512i {
        _mm512_shuffle_i64x2::<0b11_10_11_10>(a, b)
    }

    /// The nibbles of two blocks of 16 bytes: low ones and high ones of the first, then of the second.
    #[inline]
    fn block_nibbles(a: &[u8; 16], b: &[u8; 16]) -> __m512i {
        let both = _mm512_castsi256_si512(_mm256_inserti128_si256::<1>(_mm256_castsi128_si256(load128(a)), load128(b)));
        let spread = _mm512_permutexvar_epi64(_mm512_setr_epi64(0, 1, 0, 1, 2, 3, 2, 3), both);
        let shift = _mm512_maskz_set1_epi64(0b1100_1100, 0x0004_0004_0004_0004);
        _mm512_and_si512(_mm512_srlv_epi16(spread, shift), _mm512_set1_epi8(15))
    }

    /// Eight scales.
    #[inline]
    fn eight(d: __m256) -> __m512 {
        _mm512_insertf32x8::<0>(_mm512_setzero_ps(), d)
    }

    /// Eight scales and eight minimums, which the old formats store with the other sign.
    #[inline]
    fn min_scales(d: __m256, m: __m256) -> __m512 {
        let m = _mm256_xor_ps(m, _mm256_set1_ps(-0.0));
        halves(_mm512_castps256_ps512(d), _mm512_castps256_ps512(m))
    }

    #[inline]
    pub(crate) fn q4_0(b: &[u8; 144]) -> Slab {
        Slab { q: eight_blocks(b, 18, 2), scale: scales_18(b), min: _mm512_setzero_ps() }
    }

    #[inline]
    pub(crate) fn q4_1(b: &[u8; 160]) -> Slab {
        let i = _mm256_setr_epi16(0, 10, 20, 30, 32, 42, 52, 62, 1, 11, 21, 31, 33, 43, 53, 63);
        // The old formats store minimums with the other sign.
        let minus = _mm512_maskz_set1_epi32(0xFF00, i32::MIN);
        let scale = _mm512_xor_ps(words(b, 80, _mm512_castsi256_si512(i)), _mm512_castsi512_ps(minus));
        Slab { q: eight_blocks(b, 20, 4), scale, min: _mm512_setzero_ps() }
    }

    /// `block_nibbles` with the fifth bits, which lie in the order of the weights.
    #[inline]
    fn five_bits(b: &[u8], stride: usize, high: usize) -> __m512i {
        let low = block_nibbles(at(b, high + 4), at(b, stride + high + 4));
        let bits = word(b, high) as u64 | (word(b, stride + high) as u64) << 32;
        _mm512_mask_add_epi8(low, bits, low, _mm512_set1_epi8(16))
    }

    #[inline]
    pub(crate) fn q5_0(b: &[u8; 176]) -> Slab {
        let q = |j: usize| five_bits(&b[44 * j..], 22, 2);
        Slab { q: [q(0), q(1), q(2), q(3)], scale: eight(eight_halves(b, 22, 0)), min: _mm512_setzero_ps() }
    }

    #[inline]
    pub(crate) fn q5_1(b: &[u8; 192]) -> Slab {
        let q = |j: usize| five_bits(&b[48 * j..], 24, 4);
        let scale = min_scales(eight_halves(b, 24, 0), eight_halves(b, 24, 2));
        Slab { q: [q(0), q(1), q(2), q(3)], scale, min: _mm512_setzero_ps() }
    }

    #[inline]
    pub(crate) fn iq4_nl(b: &[u8; 144]) -> Slab {
        Slab { q: eight_blocks(b, 18, 2), scale: scales_18(b), min: _mm512_setzero_ps() }
    }

    #[inline]
    pub(crate) fn iq4_xs(b: &[u8; 136]) -> Slab {
        Slab { q: eight_blocks(b, 16, 8), scale: eight(scales::iq4_xs(b)), min: _mm512_setzero_ps() }
    }

    #[inline]
    pub(crate) fn q8_0(b: &[u8; 272]) -> Slab {
        let q = |j: usize| {
            let (x, y) = (load256(at(b, 68 * j + 2)), load256(at(b, 68 * j + 36)));
            _mm512_xor_si512(_mm512_inserti64x4::<1>(_mm512_castsi256_si512(x), y), _mm512_set1_epi8(-128))
        };
        let scale = eight(eight_halves(b, 34, 0));
        Slab { q: [q(0), q(1), q(2), q(3)], scale, min: _mm512_setzero_ps() }
    }

    #[inline]
    pub(crate) fn q8_k(b: &[u8; 292]) -> Slab {
        let q = |j: usize| _mm512_xor_si512(load512(at(b, 4 + 64 * j)), _mm512_set1_epi8(-128));
        let scale = _mm512_maskz_mov_ps(0xFF, _mm512_set1_ps(f32::from_bits(word(b, 0))));
        Slab { q: [q(0), q(1), q(2), q(3)], scale, min: _mm512_setzero_ps() }
    }

    /// Four-bit floats: their codes from a table, powers of two as the exponent fields that they are.
    #[inline]
    pub(crate) fn mxfp4(b: &[u8; 136]) -> Slab {
        let e = u64::from_le_bytes([b[0], b[17], b[34], b[51], b[68], b[85], b[102], b[119]]);
        let e = _mm256_cvtepu8_epi32(_mm_cvtsi64_si128(e as i64));
        let normal = _mm256_slli_epi32::<23>(_mm256_sub_epi32(e, _mm256_set1_epi32(1)));
        // 2^-128 and 2^-127 are subnormal.
        let small = _mm256_cmplt_epu32_mask(e, _mm256_set1_epi32(2));
        let e = _mm256_mask_sllv_epi32(normal, small, _mm256_set1_epi32(0x0020_0000), e);
        let scale = eight(_mm256_castsi256_ps(e));
        Slab { q: eight_blocks(b, 17, 1), scale, min: _mm512_setzero_ps() }
    }

    #[inline]
    pub(crate) fn tq2_0(b: &[u8; 66]) -> Slab {
        let q = [load512(at(b, 0)); 4];
        Slab { q, scale: _mm512_maskz_mov_ps(0xFF, f16_all(at(b, 64))), min: _mm512_setzero_ps() }
    }

    /// The next digit of base 3 moves to the front: three times each byte, without its overflow.
    #[inline]
    fn thrice(x: __m512i) -> __m512i {
        _mm512_add_epi8(x, _mm512_add_epi8(x, x))
    }

    /// The digit in front, the integer part of `3 x / 256`: how many of the thresholds 256 / 3 and 512 / 3 a byte reaches.
    #[inline]
    fn digit(x: __m512i) -> __m512i {
        let one = _mm512_set1_epi8(1);
        let d = _mm512_maskz_mov_epi8(_mm512_cmpge_epu8_mask(x, _mm512_set1_epi8(86)), one);
        _mm512_mask_add_epi8(d, _mm512_cmpge_epu8_mask(x, _mm512_set1_epi8(171u8 as i8)), d, one)
    }

    /// 32 bytes give five digits each, 16 bytes five, 4 bytes four.
    #[inline]
    pub(crate) fn tq1_0(b: &[u8; 54]) -> Slab {
        let nine = |x| thrice(thrice(x));
        // The digits' places side by side: x * [1, 3], then [9, 27], [81, 243].
        let places = |x: __m512i, half: __mmask64| _mm512_mask_blend_epi8(half, x, thrice(x));
        let x = places(twice(at(b, 0)), 0xFFFF_FFFF_0000_0000);
        let y = places(_mm512_broadcast_i32x4(load128(at(b, 32))), 0xFFFF_0000_FFFF_0000);
        let z = _mm512_set1_epi32(word(b, 48) as i32);
        let z = places(z, 0xF0F0_F0F0_F0F0_F0F0);
        let z = _mm512_mask_blend_epi64(0b1010_1010, z, nine(z));
        let (x9, y9) = (nine(x), nine(y));
        let (x81, y81) = (nine(x9), nine(y9));
        let q2 = _mm512_mask_blend_epi64(0b1111_0000, x81, y);
        let q3 = _mm512_mask_blend_epi64(0b0011_0000, _mm512_mask_blend_epi64(0b1100_0000, y9, z), y81);
        let scale = _mm512_maskz_mov_ps(0xFF, f16_all(at(b, 52)));
        Slab { q: [digit(x), digit(x9), digit(q2), digit(q3)], scale, min: _mm512_setzero_ps() }
    }

    // ---- formats with grids: indices to a gather of points, then signs --------------------------------------------------

    /// Eight points of eight bytes. `index` is below the number of points.
    #[inline]
    fn points<const N: usize>(grid: &[[u8; 8]; N], index: __m256i) -> __m512i {
        let index = _mm256_and_si256(index, _mm256_set1_epi32(N as i32 - 1));
        const { assert!(N.is_power_of_two()) };
        // SAFETY: indices below N.
        unsafe { _mm512_i32gather_epi64::<8>(index, grid.as_ptr().cast()) }
    }

    /// Sixteen points of four bytes.
    #[inline]
    fn small_points<const N: usize>(grid: &[[u8; 4]; N], index: __m512i) -> __m512i {
        let index = _mm512_and_si512(index, _mm512_set1_epi32(N as i32 - 1));
        const { assert!(N.is_power_of_two()) };
        // SAFETY: indices below N.
        unsafe { _mm512_i32gather_epi32::<4>(index, grid.as_ptr().cast()) }
    }

    /// Eight bytes as indices.
    #[inline]
    fn indices(b: &[u8; 8]) -> __m256i {
        _mm256_cvtepu8_epi32(_mm_cvtsi64_si128(i64::from_le_bytes(*b)))
    }

    /// Magnitudes with signs, and 64 more.
    #[inline]
    fn with_signs(magnitudes: __m512i, negative: u64) -> __m512i {
        let q = _mm512_mask_sub_epi8(magnitudes, negative, _mm512_setzero_si512(), magnitudes);
        _mm512_add_epi8(q, _mm512_set1_epi8(64))
    }

    /// Eight times seven signs, each with the eighth that makes their number even.
    #[inline]
    fn even(seven: u64) -> u64 {
        // Bit 0 of each byte becomes its parity; what the shifts bring in from the next byte stays above it.
        let p = seven ^ seven >> 4;
        let p = p ^ p >> 2;
        let p = p ^ p >> 1;
        seven | (p & 0x0101_0101_0101_0101) << 7
    }

    /// The 28 sign bits of each of two words to bytes of seven.
    #[inline]
    fn signs_28(a: u32, b: u32) -> u64 {
        let both = (a & 0x0FFF_FFFF) as u64 | ((b & 0x0FFF_FFFF) as u64) << 28;
        even(_pdep_u64(both, 0x7F7F_7F7F_7F7F_7F7F))
    }

    /// `d * (s + 1/2)` for the 4-bit `s` on top of eight words.
    #[inline]
    fn scales_top(d: __m512, words: __m256i) -> __m512 {
        let s = _mm256_cvtepi32_ps(_mm256_srli_epi32::<28>(words));
        eight(_mm256_mul_ps(_mm512_castps512_ps256(d), _mm256_add_ps(s, _mm256_set1_ps(0.5))))
    }

    #[inline]
    pub(crate) fn iq2_xxs(b: &[u8; 66]) -> Slab {
        // Eight pairs of words: four indices; signs and scale.
        let high = _mm512_permutexvar_epi32(
            _mm512_setr_epi32(1, 3, 5, 7, 9, 11, 13, 15, 0, 0, 0, 0, 0, 0, 0, 0),
            load512(at(b, 2)),
        );
        let scale = _mm512_mul_ps(scales_top(f16_all(at(b, 0)), _mm512_castsi512_si256(high)), _mm512_set1_ps(0.25));
        let q = |j: usize| {
            let (i, k) = (2 + 16 * j, 10 + 16 * j);
            let index = word(b, i) as u64 | (word(b, k) as u64) << 32;
            with_signs(points(&grid::IQ2_XXS, indices(&index.to_le_bytes())), signs_28(word(b, i + 4), word(b, k + 4)))
        };
        Slab { q: [q(0), q(1), q(2), q(3)], scale, min: _mm512_setzero_ps() }
    }

    /// `d * (s + 1/2) / 4` for sixteen 4-bit scales.
    #[inline]
    fn scales_2(d: __m512, b: &[u8; 8]) -> __m512 {
        let s = _mm_cvtsi64_si128(i64::from_le_bytes(*b));
        let s = _mm_and_si128(_mm_unpacklo_epi8(s, _mm_srli_epi16::<4>(s)), _mm_set1_epi8(15));
        let s = _mm512_add_ps(_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(s)), _mm512_set1_ps(0.5));
        _mm512_mul_ps(_mm512_mul_ps(s, d), _mm512_set1_ps(0.25))
    }

    #[inline]
    pub(crate) fn iq2_xs(b: &[u8; 74]) -> Slab {
        let q = |j: usize| {
            let words = load128(at(b, 2 + 16 * j));
            let seven = _mm_cvtsi128_si64(_mm_cvtepi16_epi8(_mm_srli_epi16::<9>(words))) as u64;
            with_signs(points(&grid::IQ2_XS, _mm256_cvtepu16_epi32(words)), even(seven))
        };
        let scale = scales_2(f16_all(at(b, 0)), at(b, 66));
        Slab { q: [q(0), q(1), q(2), q(3)], scale, min: _mm512_setzero_ps() }
    }

    #[inline]
    pub(crate) fn iq2_s(b: &[u8; 82]) -> Slab {
        let q = |j: usize| {
            let high = _mm256_set1_epi32(u16::from_le_bytes(*at(b, 66 + 2 * j)) as i32);
            let high = _mm256_srlv_epi32(high, _mm256_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14));
            let high = _mm256_slli_epi32::<8>(_mm256_and_si256(high, _mm256_set1_epi32(3)));
            let index = _mm256_or_si256(indices(at(b, 2 + 8 * j)), high);
            with_signs(points(&grid::IQ2_S, index), u64::from_le_bytes(*at(b, 34 + 8 * j)))
        };
        let scale = scales_2(f16_all(at(b, 0)), at(b, 74));
        Slab { q: [q(0), q(1), q(2), q(3)], scale, min: _mm512_setzero_ps() }
    }

    #[inline]
    pub(crate) fn iq3_xxs(b: &[u8; 98]) -> Slab {
        let scale = _mm512_mul_ps(scales_top(f16_all(at(b, 0)), load256(at(b, 66))), _mm512_set1_ps(0.5));
        let q = |j: usize| {
            let index = _mm512_cvtepu8_epi32(load128(at(b, 2 + 16 * j)));
            with_signs(small_points(&grid::IQ3_XXS, index), signs_28(word(b, 66 + 8 * j), word(b, 70 + 8 * j)))
        };
        Slab { q: [q(0), q(1), q(2), q(3)], scale, min: _mm512_setzero_ps() }
    }

    #[inline]
    pub(crate) fn iq3_s(b: &[u8; 110]) -> Slab {
        let q = |j: usize| {
            let index = _mm512_cvtepu8_epi32(load128(at(b, 2 + 16 * j)));
            let high = u16::from_le_bytes(*at(b, 66 + 2 * j));
            let index = _mm512_mask_add_epi32(index, high, index, _mm512_set1_epi32(256));
            with_signs(small_points(&grid::IQ3_S, index), u64::from_le_bytes(*at(b, 74 + 8 * j)))
        };
        Slab { q: [q(0), q(1), q(2), q(3)], scale: eight(scales::iq3_s(b)), min: _mm512_setzero_ps() }
    }

    /// Eight points of IQ1: `high` has three more bits of each lane's index at the bottom, `down` the lanes whose points are
    /// shifted down; the others are shifted up.
    #[inline]
    fn shifted(index: &[u8; 8], high: __m256i, down: __mmask8) -> __m512i {
        let high = _mm256_slli_epi32::<8>(_mm256_and_si256(high, _mm256_set1_epi32(7)));
        let q = points(&grid::IQ1, _mm256_or_si256(indices(index), high));
        _mm512_add_epi8(q, _mm512_mask_blend_epi64(down, _mm512_set1_epi8(1), _mm512_set1_epi8(-1)))
    }

    #[inline]
    pub(crate) fn iq1_s(b: &[u8; 50]) -> Slab {
        let q = |j: usize| {
            let high = _mm256_set1_epi32(word(b, 34 + 4 * j) as i32);
            let top = i32::MIN;
            let down = _mm256_test_epi32_mask(high, _mm256_setr_epi32(0x8000, 0x8000, 0x8000, 0x8000, top, top, top, top));
            let high = _mm256_srlv_epi32(high, _mm256_setr_epi32(0, 3, 6, 9, 16, 19, 22, 25));
            shifted(at(b, 2 + 8 * j), high, down)
        };
        Slab { q: [q(0), q(1), q(2), q(3)], scale: eight(scales::iq1_s(b)), min: _mm512_setzero_ps() }
    }

    #[inline]
    pub(crate) fn iq1_m(b: &[u8; 56]) -> Slab {
        let words = u64::from_le_bytes(*at(b, 48));
        let d = f16_all(&(_pext_u64(words, 0xF000_F000_F000_F000) as u16).to_le_bytes());
        let s = _mm512_castsi256_si512(_mm256_cvtepu16_epi32(_mm_cvtsi64_si128(words as i64)));
        let s = _mm512_permutexvar_epi32(_mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3), s);
        let s = _mm512_srlv_epi32(s, _mm512_setr_epi32(0, 3, 6, 9, 0, 3, 6, 9, 0, 3, 6, 9, 0, 3, 6, 9));
        let s = _mm512_and_si512(s, _mm512_set1_epi32(7));
        let s = _mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_add_epi32(s, s), _mm512_set1_epi32(1)));
        let scale = _mm512_mul_ps(s, _mm512_mul_ps(d, _mm512_set1_ps(0.125)));
        let q = |j: usize| {
            let high = _mm256_set1_epi32(word(b, 32 + 4 * j) as i32);
            let high = _mm256_srlv_epi32(high, _mm256_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28));
            shifted(at(b, 8 * j), high, _mm256_test_epi32_mask(high, _mm256_set1_epi32(8)))
        };
        Slab { q: [q(0), q(1), q(2), q(3)], scale, min: _mm512_setzero_ps() }
    }
}
