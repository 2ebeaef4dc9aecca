//! What a slab's unpackers share with AVX-512's: reading bytes, and eight scales of formats with groups of 32.

use crate::isa::avx2;
use std::arch::x86_64::*;

/// `N` bytes from `i` on.
#[inline]
pub(crate) fn at<const N: usize>(b: &[u8], i: usize) -> &[u8; N] {
    b[i..i + N].try_into().expect("of that length")
}

/// The little-endian word from byte `i` on.
#[inline]
pub(crate) fn word(b: &[u8], i: usize) -> u32 {
    u32::from_le_bytes(*at(b, i))
}

avx2! {
    #[inline]
    pub(crate) fn load128(b: &[u8; 16]) -> __m128i {
        // SAFETY: 16 readable bytes.
        unsafe { _mm_loadu_si128(b.as_ptr().cast()) }
    }

    /// The f16 from byte `i` on, in every lane.
    #[inline]
    pub(crate) fn half(b: &[u8], i: usize) -> __m256 {
        _mm256_broadcastss_ps(_mm_cvtph_ps(_mm_cvtsi32_si128(u16::from_le_bytes(*at(b, i)) as i32)))
    }

    /// The f16 at `stride * g + from` for the eight blocks of a slab.
    #[inline]
    pub(crate) fn eight_halves(b: &[u8], stride: usize, from: usize) -> __m256 {
        let f = |g: usize| i16::from_le_bytes(*at(b, stride * g + from));
        _mm256_cvtph_ps(_mm_setr_epi16(f(0), f(1), f(2), f(3), f(4), f(5), f(6), f(7)))
    }

    /// The eight nibbles of a word.
    #[inline]
    fn nibbles(word: u32) -> __m256i {
        let s = _mm256_srlv_epi32(_mm256_set1_epi32(word as i32), _mm256_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28));
        _mm256_and_si256(s, _mm256_set1_epi32(15))
    }

    /// `d * (s + 1/2)` for eight `s`.
    #[inline]
    pub(crate) fn plus_half(s: __m256i, d: __m256) -> __m256 {
        _mm256_mul_ps(_mm256_add_ps(_mm256_cvtepi32_ps(s), _mm256_set1_ps(0.5)), d)
    }

    /// Scales of IQ4_XS, -32 to 31: four bits each in a word, two more in the one before.
    #[inline]
    pub(crate) fn iq4_xs(b: &[u8; 136]) -> __m256 {
        let high = _mm256_set1_epi32(u16::from_le_bytes(*at(b, 2)) as i32);
        let high = _mm256_srlv_epi32(high, _mm256_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14));
        let high = _mm256_slli_epi32::<4>(_mm256_and_si256(high, _mm256_set1_epi32(3)));
        let s = _mm256_sub_epi32(_mm256_or_si256(nibbles(word(b, 4)), high), _mm256_set1_epi32(32));
        _mm256_mul_ps(_mm256_cvtepi32_ps(s), half(b, 0))
    }

    /// Scales of IQ3_S: four bits each, twice that and one more.
    #[inline]
    pub(crate) fn iq3_s(b: &[u8; 110]) -> __m256 {
        let s = nibbles(word(b, 106));
        let s = _mm256_add_epi32(_mm256_add_epi32(s, s), _mm256_set1_epi32(1));
        _mm256_mul_ps(_mm256_cvtepi32_ps(s), half(b, 0))
    }

    /// Scales of IQ1_S, an eighth of them: bits 12 to 14 of each word of the high bits, twice that and one more.
    #[inline]
    pub(crate) fn iq1_s(b: &[u8; 50]) -> __m256 {
        let s = _mm256_cvtepu16_epi32(load128(at(b, 34)));
        let s = _mm256_and_si256(_mm256_srli_epi32::<11>(s), _mm256_set1_epi32(14));
        let s = _mm256_cvtepi32_ps(_mm256_add_epi32(s, _mm256_set1_epi32(1)));
        _mm256_mul_ps(s, _mm256_mul_ps(half(b, 0), _mm256_set1_ps(0.125)))
    }
}
