//! Sixteen f32 lanes: the one generic vector type, for code that is lane-wise on every machine.
//!
//! Integer dot products differ between instruction sets in algorithm and are written per set; float code (attention, f32
//! matrices) differs only in the names of its instructions and is written once over [`Lanes`]. Every method that needs
//! features is `inline(always)`, and so are the bodies that use them: all of it ends up inside a function that was compiled
//! with the features of its rung; nothing here may be called from elsewhere. Bodies use loops, not `array::from_fn` or
//! `map`: a function between a body and its closure would not have the features, and keep the instructions outside (4x).
#![allow(unsafe_code)]

use half::f16;

/// Lanes in a vector.
pub(crate) const L: usize = 16;

/// What rounds a number of up to 22 bits to a whole one when it is added: the whole number is then in the lowest bits.
const ROUND: f32 = 12_582_912.0; // 1.5 * 2^23

/// Sixteen f32 values.
///
/// # Safety
/// An implementation may use instructions that its methods are not compiled for: whoever calls them is a function compiled for
/// the rung's features, into which they are inlined.
pub(crate) unsafe trait Lanes: Copy {
    fn splat(x: f32) -> Self;
    fn load(x: &[f32; L]) -> Self;
    /// From IEEE half precision, little-endian.
    fn load_f16(x: &[u8; 2 * L]) -> Self;
    /// One IEEE half, little-endian, in every lane.
    fn splat_f16(x: [u8; 2]) -> Self;
    /// From the upper halves of f32 (bfloat16), little-endian.
    fn load_bf16(x: &[u8; 2 * L]) -> Self;
    /// From signed bytes.
    fn load_i8(x: &[u8; L]) -> Self;
    /// From f32 in bytes, little-endian.
    fn load_le(x: &[u8; 4 * L]) -> Self;
    fn store(self, to: &mut [f32; L]);
    /// `self * b + c`, rounded once where the machine can.
    fn fma(self, b: Self, c: Self) -> Self;
    fn add(self, b: Self) -> Self;
    fn sub(self, b: Self) -> Self;
    fn mul(self, b: Self) -> Self;
    fn div(self, b: Self) -> Self;
    /// The smaller; not for NaN.
    fn min(self, b: Self) -> Self;
    /// The larger; not for NaN.
    fn max(self, b: Self) -> Self;
    fn abs(self) -> Self;
    fn sqrt(self) -> Self;
    /// Where `self < b`, `yes`, else (also for NaN) `no`.
    fn below(self, b: Self, yes: Self, no: Self) -> Self;
    /// `self * 2^n` of a whole number n that comes as `n + ROUND`, where the result is a normal number.
    fn times_power(self, n: Self) -> Self;

    /// e to the power of each lane, within 3 ulp down to -87, 0 below; NaN stays, as long as the low nine bits of its payload are
    /// zero (as in those that arise from numbers, and in all that came from f16 or bf16). Not for more than 88.
    ///
    /// Range reduction `x = n ln 2 + r`, `|r| <= ln 2 / 2`, with ln 2 in two parts (Cody and Waite), then a polynomial of
    /// degree 6: the Taylor terms, whose remainder is below half an ulp on that interval.
    #[inline(always)]
    fn exp(self) -> Self {
        const LN2_HI: f32 = 0.693_359_4; // 355/512: n * LN2_HI is exact
        const LN2_LO: f32 = -2.121_944_4e-4;
        // Of a NaN, the second operand is what the machine's max gives.
        let x = Self::splat(-87.5).max(self);
        let shifted = x.fma(Self::splat(std::f32::consts::LOG2_E), Self::splat(ROUND));
        let n = shifted.sub(Self::splat(ROUND));
        let r = n.fma(Self::splat(-LN2_LO), n.fma(Self::splat(-LN2_HI), x));
        let mut p = Self::splat(1.0 / 720.0);
        p = p.fma(r, Self::splat(1.0 / 120.0));
        p = p.fma(r, Self::splat(1.0 / 24.0));
        p = p.fma(r, Self::splat(1.0 / 6.0));
        p = p.fma(r, Self::splat(0.5));
        p = p.fma(r, Self::splat(1.0));
        p = p.fma(r, Self::splat(1.0));
        self.below(Self::splat(-87.0), Self::splat(0.0), p.times_power(shifted))
    }

    /// The 16 rows of a 16 x 16 matrix become its columns.
    #[inline(always)]
    fn transpose(m: &mut [Self; L]) {
        let (mut rows, mut column) = ([[0.0; L]; L], [0.0; L]);
        for i in 0..L {
            m[i].store(&mut rows[i]);
        }
        for i in 0..L {
            for j in 0..L {
                column[j] = rows[j][i];
            }
            m[i] = Self::load(&column);
        }
    }

    /// The largest lane; not for NaN.
    #[inline(always)]
    fn largest_lane(self) -> f32 {
        let mut a = [0.0; L];
        self.store(&mut a);
        for half in [8, 4, 2, 1] {
            for i in 0..half {
                a[i] = if a[i + half] > a[i] { a[i + half] } else { a[i] };
            }
        }
        a[0]
    }

    /// The sum of the lanes: halves, then their halves, and so on.
    #[inline(always)]
    fn sum(self) -> f32 {
        let mut a = [0.0; L];
        self.store(&mut a);
        for half in [8, 4, 2, 1] {
            for i in 0..half {
                a[i] += a[i + half];
            }
        }
        a[0]
    }
}

/// Plain Rust.
#[derive(Clone, Copy)]
pub(crate) struct Scalar([f32; L]);

impl Scalar {
    #[inline(always)]
    fn each(f: impl Fn(usize) -> f32) -> Scalar {
        let mut v = [0.0; L];
        for (i, v) in v.iter_mut().enumerate() {
            *v = f(i);
        }
        Scalar(v)
    }
}

// SAFETY: no instruction that every machine lacks.
unsafe impl Lanes for Scalar {
    #[inline(always)]
    fn splat(x: f32) -> Self {
        Scalar([x; L])
    }
    #[inline(always)]
    fn load(x: &[f32; L]) -> Self {
        Scalar(*x)
    }
    #[inline(always)]
    fn load_f16(x: &[u8; 2 * L]) -> Self {
        Scalar::each(|i| f16::from_le_bytes([x[2 * i], x[2 * i + 1]]).to_f32_const())
    }
    #[inline(always)]
    fn splat_f16(x: [u8; 2]) -> Self {
        Scalar([f16::from_le_bytes(x).to_f32_const(); L])
    }
    #[inline(always)]
    fn load_bf16(x: &[u8; 2 * L]) -> Self {
        Scalar::each(|i| f32::from_bits((x[2 * i] as u32) << 16 | (x[2 * i + 1] as u32) << 24))
    }
    #[inline(always)]
    fn load_i8(x: &[u8; L]) -> Self {
        Scalar::each(|i| x[i] as i8 as f32)
    }
    #[inline(always)]
    fn load_le(x: &[u8; 4 * L]) -> Self {
        Scalar::each(|i| f32::from_le_bytes([x[4 * i], x[4 * i + 1], x[4 * i + 2], x[4 * i + 3]]))
    }
    #[inline(always)]
    fn store(self, to: &mut [f32; L]) {
        *to = self.0;
    }
    #[inline(always)]
    fn fma(self, b: Self, c: Self) -> Self {
        Scalar::each(|i| self.0[i] * b.0[i] + c.0[i])
    }
    // From here on out of line: inlined, the searches of `quantize` would take a minute to compile for this type.
    #[inline(never)]
    fn add(self, b: Self) -> Self {
        Scalar::each(|i| self.0[i] + b.0[i])
    }
    #[inline(never)]
    fn sub(self, b: Self) -> Self {
        Scalar::each(|i| self.0[i] - b.0[i])
    }
    #[inline(never)]
    fn div(self, b: Self) -> Self {
        Scalar::each(|i| self.0[i] / b.0[i])
    }
    #[inline(never)]
    fn min(self, b: Self) -> Self {
        Scalar::each(|i| if self.0[i] < b.0[i] { self.0[i] } else { b.0[i] })
    }
    #[inline(never)]
    fn max(self, b: Self) -> Self {
        Scalar::each(|i| if self.0[i] > b.0[i] { self.0[i] } else { b.0[i] })
    }
    #[inline(never)]
    fn abs(self) -> Self {
        Scalar::each(|i| self.0[i].abs())
    }
    #[inline(never)]
    fn sqrt(self) -> Self {
        Scalar::each(|i| self.0[i].sqrt())
    }
    #[inline(never)]
    fn below(self, b: Self, yes: Self, no: Self) -> Self {
        Scalar::each(|i| if self.0[i] < b.0[i] { yes.0[i] } else { no.0[i] })
    }
    #[inline(never)]
    fn mul(self, b: Self) -> Self {
        Scalar::each(|i| self.0[i] * b.0[i])
    }
    #[inline(never)]
    fn times_power(self, n: Self) -> Self {
        Scalar::each(|i| f32::from_bits(self.0[i].to_bits().wrapping_add(n.0[i].to_bits() << 23)))
    }
}

#[cfg(target_arch = "x86_64")]
pub(crate) use x86::{Avx2, Avx512};

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::{L, Lanes};
    use std::arch::x86_64::*;

    #[derive(Clone, Copy)]
    pub(crate) struct Avx512(pub __m512);

    /// The upper lanes combined with the lower ones, halving until one is left.
    macro_rules! fold {
        ($v:expr, $narrow:ident) => {{
            let v = $v;
            let v = $narrow(_mm256_castps256_ps128(v), _mm256_extractf128_ps::<1>(v));
            let v = $narrow(v, _mm_movehl_ps(v, v));
            _mm_cvtss_f32($narrow(v, _mm_movehdup_ps(v)))
        }};
    }

    // SAFETY: this, and all blocks below: the loads and stores are of whole arrays, unaligned forms; the instructions exist because
    // the methods are inlined only into functions compiled for the rung, which the dispatch calls only where it is detected.
    unsafe impl Lanes for Avx512 {
        #[inline(always)]
        fn transpose(m: &mut [Self; L]) {
            // SAFETY: as above.
            unsafe {
                let mut t = [_mm512_setzero_si512(); L];
                for i in 0..L {
                    t[i] = _mm512_castps_si512(m[i].0);
                }
                crate::avx512::transpose(&mut t);
                for i in 0..L {
                    m[i] = Avx512(_mm512_castsi512_ps(t[i]));
                }
            }
        }
        #[inline(always)]
        fn splat(x: f32) -> Self {
            // SAFETY: as above.
            Avx512(unsafe { _mm512_set1_ps(x) })
        }
        #[inline(always)]
        fn load(x: &[f32; L]) -> Self {
            // SAFETY: as above.
            Avx512(unsafe { _mm512_loadu_ps(x.as_ptr()) })
        }
        #[inline(always)]
        fn load_f16(x: &[u8; 2 * L]) -> Self {
            // SAFETY: as above.
            Avx512(unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(x.as_ptr().cast())) })
        }
        #[inline(always)]
        fn splat_f16(x: [u8; 2]) -> Self {
            // SAFETY: as above.
            Avx512(unsafe { _mm512_cvtph_ps(_mm256_set1_epi16(i16::from_le_bytes(x))) })
        }
        #[inline(always)]
        fn load_bf16(x: &[u8; 2 * L]) -> Self {
            // SAFETY: as above.
            Avx512(unsafe {
                _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(x.as_ptr().cast())), 16))
            })
        }
        #[inline(always)]
        fn load_i8(x: &[u8; L]) -> Self {
            // SAFETY: as above.
            Avx512(unsafe { _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(x.as_ptr().cast()))) })
        }
        #[inline(always)]
        fn load_le(x: &[u8; 4 * L]) -> Self {
            // SAFETY: as above.
            Avx512(unsafe { _mm512_loadu_ps(x.as_ptr().cast()) })
        }
        #[inline(always)]
        fn store(self, to: &mut [f32; L]) {
            // SAFETY: as above.
            unsafe { _mm512_storeu_ps(to.as_mut_ptr(), self.0) }
        }
        #[inline(always)]
        fn fma(self, b: Self, c: Self) -> Self {
            // SAFETY: as above.
            Avx512(unsafe { _mm512_fmadd_ps(self.0, b.0, c.0) })
        }
        #[inline(always)]
        fn add(self, b: Self) -> Self {
            // SAFETY: as above.
            Avx512(unsafe { _mm512_add_ps(self.0, b.0) })
        }
        #[inline(always)]
        fn sub(self, b: Self) -> Self {
            // SAFETY: as above.
            Avx512(unsafe { _mm512_sub_ps(self.0, b.0) })
        }
        #[inline(always)]
        fn div(self, b: Self) -> Self {
            // SAFETY: as above.
            Avx512(unsafe { _mm512_div_ps(self.0, b.0) })
        }
        #[inline(always)]
        fn min(self, b: Self) -> Self {
            // SAFETY: as above.
            Avx512(unsafe { _mm512_min_ps(self.0, b.0) })
        }
        #[inline(always)]
        fn max(self, b: Self) -> Self {
            // SAFETY: as above.
            Avx512(unsafe { _mm512_max_ps(self.0, b.0) })
        }
        #[inline(always)]
        fn abs(self) -> Self {
            // SAFETY: as above.
            Avx512(unsafe { _mm512_abs_ps(self.0) })
        }
        #[inline(always)]
        fn sqrt(self) -> Self {
            // SAFETY: as above.
            Avx512(unsafe { _mm512_sqrt_ps(self.0) })
        }
        #[inline(always)]
        fn below(self, b: Self, yes: Self, no: Self) -> Self {
            // SAFETY: as above.
            Avx512(unsafe { _mm512_mask_blend_ps(_mm512_cmp_ps_mask::<_CMP_LT_OQ>(self.0, b.0), no.0, yes.0) })
        }
        #[inline(always)]
        fn mul(self, b: Self) -> Self {
            // SAFETY: as above.
            Avx512(unsafe { _mm512_mul_ps(self.0, b.0) })
        }
        #[inline(always)]
        fn times_power(self, n: Self) -> Self {
            // SAFETY: as above.
            Avx512(unsafe {
                let n = _mm512_slli_epi32::<23>(_mm512_castps_si512(n.0));
                _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(self.0), n))
            })
        }
        #[inline(always)]
        fn sum(self) -> f32 {
            // SAFETY: as above.
            unsafe {
                let high = _mm512_extractf32x8_ps::<1>(self.0);
                fold!(_mm256_add_ps(_mm512_castps512_ps256(self.0), high), _mm_add_ps)
            }
        }
        #[inline(always)]
        fn largest_lane(self) -> f32 {
            // SAFETY: as above.
            unsafe {
                let high = _mm512_extractf32x8_ps::<1>(self.0);
                fold!(_mm256_max_ps(_mm512_castps512_ps256(self.0), high), _mm_max_ps)
            }
        }
    }

    #[derive(Clone, Copy)]
    pub(crate) struct Avx2(__m256, __m256);

    // SAFETY: this, and all blocks below: as for `Avx512`.
    unsafe impl Lanes for Avx2 {
        #[inline(always)]
        fn transpose(m: &mut [Self; L]) {
            // SAFETY: as above.
            unsafe {
                // Quarters of the matrix: of the first or last eight rows, the lower or upper halves.
                let mut t = [[[_mm256_setzero_si256(); 8]; 2]; 2];
                for i in 0..L {
                    t[i / 8][0][i % 8] = _mm256_castps_si256(m[i].0);
                    t[i / 8][1][i % 8] = _mm256_castps_si256(m[i].1);
                }
                for half in 0..2 {
                    crate::avx2::transpose(&mut t[0][half]);
                    crate::avx2::transpose(&mut t[1][half]);
                    for i in 0..8 {
                        m[8 * half + i] = Avx2(_mm256_castsi256_ps(t[0][half][i]), _mm256_castsi256_ps(t[1][half][i]));
                    }
                }
            }
        }
        #[inline(always)]
        fn splat(x: f32) -> Self {
            // SAFETY: as above.
            let v = unsafe { _mm256_set1_ps(x) };
            Avx2(v, v)
        }
        #[inline(always)]
        fn load(x: &[f32; L]) -> Self {
            // SAFETY: as above.
            unsafe { Avx2(_mm256_loadu_ps(x.as_ptr()), _mm256_loadu_ps(x.as_ptr().add(8))) }
        }
        #[inline(always)]
        fn load_f16(x: &[u8; 2 * L]) -> Self {
            // SAFETY: as above.
            unsafe {
                let p = x.as_ptr();
                Avx2(_mm256_cvtph_ps(_mm_loadu_si128(p.cast())), _mm256_cvtph_ps(_mm_loadu_si128(p.add(16).cast())))
            }
        }
        #[inline(always)]
        fn splat_f16(x: [u8; 2]) -> Self {
            // SAFETY: as above.
            let v = unsafe { _mm256_cvtph_ps(_mm_set1_epi16(i16::from_le_bytes(x))) };
            Avx2(v, v)
        }
        #[inline(always)]
        fn load_bf16(x: &[u8; 2 * L]) -> Self {
            // SAFETY: as above.
            unsafe {
                let (a, b) = (_mm_loadu_si128(x.as_ptr().cast()), _mm_loadu_si128(x.as_ptr().add(16).cast()));
                let (a, b) = (_mm256_cvtepu16_epi32(a), _mm256_cvtepu16_epi32(b));
                Avx2(_mm256_castsi256_ps(_mm256_slli_epi32(a, 16)), _mm256_castsi256_ps(_mm256_slli_epi32(b, 16)))
            }
        }
        #[inline(always)]
        fn load_i8(x: &[u8; L]) -> Self {
            // SAFETY: as above.
            unsafe {
                let x = _mm_loadu_si128(x.as_ptr().cast());
                let (a, b) = (_mm256_cvtepi8_epi32(x), _mm256_cvtepi8_epi32(_mm_unpackhi_epi64(x, x)));
                Avx2(_mm256_cvtepi32_ps(a), _mm256_cvtepi32_ps(b))
            }
        }
        #[inline(always)]
        fn load_le(x: &[u8; 4 * L]) -> Self {
            // SAFETY: as above.
            unsafe { Avx2(_mm256_loadu_ps(x.as_ptr().cast()), _mm256_loadu_ps(x.as_ptr().add(32).cast())) }
        }
        #[inline(always)]
        fn store(self, to: &mut [f32; L]) {
            // SAFETY: as above.
            unsafe {
                _mm256_storeu_ps(to.as_mut_ptr(), self.0);
                _mm256_storeu_ps(to.as_mut_ptr().add(8), self.1);
            }
        }
        #[inline(always)]
        fn fma(self, b: Self, c: Self) -> Self {
            // SAFETY: as above.
            unsafe { Avx2(_mm256_fmadd_ps(self.0, b.0, c.0), _mm256_fmadd_ps(self.1, b.1, c.1)) }
        }
        #[inline(always)]
        fn add(self, b: Self) -> Self {
            // SAFETY: as above.
            unsafe { Avx2(_mm256_add_ps(self.0, b.0), _mm256_add_ps(self.1, b.1)) }
        }
        #[inline(always)]
        fn sub(self, b: Self) -> Self {
            // SAFETY: as above.
            unsafe { Avx2(_mm256_sub_ps(self.0, b.0), _mm256_sub_ps(self.1, b.1)) }
        }
        #[inline(always)]
        fn div(self, b: Self) -> Self {
            // SAFETY: as above.
            unsafe { Avx2(_mm256_div_ps(self.0, b.0), _mm256_div_ps(self.1, b.1)) }
        }
        #[inline(always)]
        fn min(self, b: Self) -> Self {
            // SAFETY: as above.
            unsafe { Avx2(_mm256_min_ps(self.0, b.0), _mm256_min_ps(self.1, b.1)) }
        }
        #[inline(always)]
        fn max(self, b: Self) -> Self {
            // SAFETY: as above.
            unsafe { Avx2(_mm256_max_ps(self.0, b.0), _mm256_max_ps(self.1, b.1)) }
        }
        #[inline(always)]
        fn abs(self) -> Self {
            // SAFETY: as above.
            unsafe {
                let sign = _mm256_set1_ps(-0.0);
                Avx2(_mm256_andnot_ps(sign, self.0), _mm256_andnot_ps(sign, self.1))
            }
        }
        #[inline(always)]
        fn sqrt(self) -> Self {
            // SAFETY: as above.
            unsafe { Avx2(_mm256_sqrt_ps(self.0), _mm256_sqrt_ps(self.1)) }
        }
        #[inline(always)]
        fn below(self, b: Self, yes: Self, no: Self) -> Self {
            // SAFETY: as above.
            unsafe {
                Avx2(
                    _mm256_blendv_ps(no.0, yes.0, _mm256_cmp_ps::<_CMP_LT_OQ>(self.0, b.0)),
                    _mm256_blendv_ps(no.1, yes.1, _mm256_cmp_ps::<_CMP_LT_OQ>(self.1, b.1)),
                )
            }
        }
        #[inline(always)]
        fn mul(self, b: Self) -> Self {
            // SAFETY: as above.
            unsafe { Avx2(_mm256_mul_ps(self.0, b.0), _mm256_mul_ps(self.1, b.1)) }
        }
        #[inline(always)]
        fn times_power(self, n: Self) -> Self {
            // SAFETY: as above.
            let half = |x, n| unsafe {
                let n = _mm256_slli_epi32::<23>(_mm256_castps_si256(n));
                _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(x), n))
            };
            Avx2(half(self.0, n.0), half(self.1, n.1))
        }
        #[inline(always)]
        fn sum(self) -> f32 {
            // SAFETY: as above.
            unsafe { fold!(_mm256_add_ps(self.0, self.1), _mm_add_ps) }
        }
        #[inline(always)]
        fn largest_lane(self) -> f32 {
            // SAFETY: as above.
            unsafe { fold!(_mm256_max_ps(self.0, self.1), _mm_max_ps) }
        }
    }
}
