//! AVX2, and AVX2 with AVX-VNNI.
//!
//! Everything rests on one function a format: a slab of 256 weights from memory to registers ([`slab`]).
//!
//! Without VNNI a product of bytes is `vpmaddubsw` (pairs, to 16 bits) and `vpmaddwd` with ones (to 32). Its two traps:
//!
//! 1. Two products of a code above 128 and 127 do not fit 16 bits. Formats with codes up to 255 (all have offset 128) are
//!    read as signed bytes instead, and the sign moves to the activation: `|w| * sign(x, w)` (wide formats).
//! 2. Several pairs fit if codes are small: 8 of 4-bit codes (8 * 2 * 15 * 127 = 30,480), 4 of 5 bits, 2 of 6. The gemm
//!    adds that many in 16 bits before it widens.
//!
//! With it (Intel's desktops since Alder Lake, which have no AVX-512) the product is `vpdpbusd`, and neither trap exists.
//!
//! ```text
//! gemv   4 rows at once (four memory streams), for each slab: codes to registers, transposed: a lane has 4 codes of one half of
//!        a group in each of four vectors; for each column:
//!            acc += float(dots, added in 16 bits as far as they fit) * (scale * d)       a lane is a group
//!            acc -= min * (d * sum)
//! gemm   16 rows at once, interleaved as in `avx512`; for each 4 columns, for each group:
//!            16-bit sums of 2 x 4 accumulators, widened as rarely as they allow
//! ```

pub(crate) mod scales;
mod slab;

use crate::act::{Act, Acts, Q8Block, column_sums};
use crate::float_matrix;
use crate::format::{CodeSpec, Codes, Format, SLAB};
use crate::isa::{Isa, avx2};
use crate::kernels::{Kernel, Run, Slot};
use crate::lanes::Avx2;
use crate::panel::{Out, Panel, Rows, Scratch, align_stack, padded, prefetch, prefetch_part};
use slab::{Slab, load};
use std::arch::x86_64::*;

/// Columns up to which the gemv is used; with VNNI, whose gemm needs no widening from 16 bits, the gemm wins earlier.
const GEMV_COLS: usize = 16;
const GEMV_COLS_VNNI: usize = 12;
/// Rows that the gemv reads side by side.
const STREAMS: usize = 4;
/// Rows of a gemm tile.
const TILE: usize = 16;
/// Columns of the gemm's innermost body.
const COLS: usize = 4;

/// Installs the kernels of this file, those with AVX-VNNI if `vnni`.
pub(crate) fn overlay(table: &mut [Kernel], vnni: bool) {
    let isa = if vnni { Isa::AvxVnni } else { Isa::Avx2 };
    for (kernel, spec) in table.iter_mut().zip(crate::format::FORMATS) {
        match (kernel.gemm.act, &spec.codes) {
            (Act::Q8, Some(codes)) => {
                kernel.gemv = Slot { isa, act: Act::Q8, run: gemv_of(spec.format, vnni) };
                let gemm = if vnni { gemm_vnni_of(codes) } else { gemm_of(spec.format, codes) };
                kernel.gemm = Slot { isa, act: Act::Q8, run: gemm };
                kernel.gemv_cols = if vnni { GEMV_COLS_VNNI } else { GEMV_COLS };
                kernel.unpack = unpack_of(spec.format);
            }
            _ => {
                kernel.gemm = Slot { isa, act: Act::F32, run: float_gemm };
                if spec.codes.is_none() {
                    kernel.gemv = Slot { isa, act: Act::F32, run: float_gemv };
                    kernel.gemv_cols = float_matrix::GEMV_COLS;
                }
            }
        }
    }
}

/// Instead of a number of pairs: not even one fits 16 bits, so that codes lose their offset first and are multiplied as signed
/// bytes. (With VNNI products are added in 32 bits, and the number does not matter.)
const SIGNED: usize = 0;

/// How many products of pairs fit 16 bits, `P` of the functions below.
const fn pairs(format: Format) -> usize {
    match format {
        Format::Q2_K | Format::Q3_K | Format::Q4_0 | Format::Q4_1 | Format::Q4_K | Format::TQ1_0 | Format::TQ2_0 => 8,
        Format::Q5_0 | Format::Q5_1 | Format::Q5_K | Format::MXFP4 | Format::IQ1_S | Format::IQ1_M => 4,
        Format::Q6_K => 2,
        _ => match &crate::format::FORMATS[format as usize].codes {
            Some(codes) if codes.offset < 128 => 1,
            _ => SIGNED,
        },
    }
}

fn gemm_of(format: Format, codes: &CodeSpec) -> Run {
    match (codes.group, codes.has_min, pairs(format)) {
        (32, false, SIGNED) => gemm::<32, false, SIGNED, false>,
        (32, false, 8) => gemm::<32, false, 8, false>,
        (32, false, 4) => gemm::<32, false, 4, false>,
        (32, false, _) => gemm::<32, false, 1, false>,
        (32, true, 8) => gemm::<32, true, 8, false>,
        (32, true, 4) => gemm::<32, true, 4, false>,
        (16, false, 8 | 4) => gemm::<16, false, 4, false>,
        (16, false, 2) => gemm::<16, false, 2, false>,
        (16, false, 1) => gemm::<16, false, 1, false>,
        (16, true, 8 | 4) => gemm::<16, true, 4, false>,
        _ => unreachable!("no format is like that"),
    }
}

fn gemm_vnni_of(codes: &CodeSpec) -> Run {
    match (codes.group, codes.has_min) {
        (32, false) => gemm::<32, false, 1, true>,
        (32, true) => gemm::<32, true, 1, true>,
        (_, false) => gemm::<16, false, 1, true>,
        (_, true) => gemm::<16, true, 1, true>,
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
        float_matrix::gemm::<Avx2, 1, 6>(w, x, out, scratch);
    }

    fn float_gemv(_: &Kernel, w: Panel<'_>, x: Acts<'_>, out: &mut Out<'_>, scratch: &mut Scratch) {
        float_matrix::gemv::<Avx2, 2, 3>(w, x, out, scratch);
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

    /// `vpdpbusd` on registers.
    pub(crate) fn peak_vnni(rounds: u64) -> u64 {
        const CHAINS: usize = 12;
        let (w, x) = (_mm256_set1_epi8(std::hint::black_box(3)), _mm256_set1_epi8(std::hint::black_box(5)));
        let mut acc = [_mm256_setzero_si256(); CHAINS];
        for _ in 0..rounds {
            for a in &mut acc {
                // SAFETY: this rung's.
                *a = unsafe { dpbusd(*a, w, x) };
            }
        }
        let sum = acc.into_iter().fold(_mm256_setzero_si256(), |s, a| _mm256_add_epi32(s, a));
        std::hint::black_box(sum);
        rounds * CHAINS as u64 * 32
    }

    // ---- loads and stores --------------------------------------------------------------------------------------------

    fn signed(b: &[i8; 32]) -> __m256i {
        // SAFETY: 32 readable bytes.
        unsafe { _mm256_loadu_si256(b.as_ptr().cast()) }
    }

    fn floats(x: &[f32; 8]) -> __m256 {
        // SAFETY: 32 readable bytes.
        unsafe { _mm256_loadu_ps(x.as_ptr()) }
    }

    fn store_floats(x: &mut [f32; 8], v: __m256) {
        // SAFETY: 32 writable bytes.
        unsafe { _mm256_storeu_ps(x.as_mut_ptr(), v) }
    }

    // ---- matrix times a few columns ----------------------------------------------------------------------------------

    /// `start` plus, in each of 8 lanes, the product of 4 neighbouring codes and activations. In assembly, since the
    /// intrinsic would want every caller compiled for AVX-VNNI, and the rest of this file serves both rungs.
    ///
    /// # Safety
    /// The machine has AVX-VNNI.
    #[inline]
    unsafe fn dpbusd(start: __m256i, q: __m256i, x: __m256i) -> __m256i {
        let mut sum = start;
        // SAFETY: the caller's promise.
        unsafe {
            std::arch::asm!(
                "{{vex}} vpdpbusd {sum}, {q}, {x}",
                sum = inout(ymm_reg) sum, q = in(ymm_reg) q, x = in(ymm_reg) x,
                options(pure, nomem, nostack, preserves_flags),
            );
        }
        sum
    }

    /// 4 x 4 dwords in each half of four vectors, transposed: lane `i` of vector `j` is dword `j` of vector `i`. A dot of the
    /// four then has the sums of vector `i`'s halves in lane `i` of its halves.
    #[inline]
    fn transposed(v: [__m256i; 4]) -> [__m256i; 4] {
        let (a, b) = (_mm256_unpacklo_epi32(v[0], v[1]), _mm256_unpackhi_epi32(v[0], v[1]));
        let (c, d) = (_mm256_unpacklo_epi32(v[2], v[3]), _mm256_unpackhi_epi32(v[2], v[3]));
        [
            _mm256_unpacklo_epi64(a, c),
            _mm256_unpackhi_epi64(a, c),
            _mm256_unpacklo_epi64(b, d),
            _mm256_unpackhi_epi64(b, d),
        ]
    }

    /// Both fours of a slab's vectors, [`transposed`].
    #[inline]
    fn both_transposed(q: &[__m256i; 8]) -> [__m256i; 8] {
        let ([a, b, c, d], [e, f, g, h]) = (transposed([q[0], q[1], q[2], q[3]]), transposed([q[4], q[5], q[6], q[7]]));
        [a, b, c, d, e, f, g, h]
    }

    /// What belongs to eight groups of 16, as their sums lie in the dots of `transposed` vectors.
    #[inline]
    fn as_transposed(x: __m256) -> __m256 {
        _mm256_permutevar8x32_ps(x, _mm256_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7))
    }

    fn sum8(v: __m256) -> f32 {
        let v = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps::<1>(v));
        let v = _mm_add_ps(v, _mm_movehl_ps(v, v));
        _mm_cvtss_f32(_mm_add_ss(v, _mm_shuffle_ps::<1>(v, v)))
    }

    /// What every row needs of a slab's columns. `offset` is that of codes which keep it in the dot.
    fn columns<const G: usize>(x: Acts<'_>, slabs: usize, offset: i32, to: &mut [Column]) {
        for (s, to) in to.chunks_exact_mut(x.n()).take(slabs).enumerate() {
            for (to, x) in to.iter_mut().zip(x.q8(s)) {
                let mut q = [_mm256_setzero_si256(); 8];
                for (q, x) in q.iter_mut().zip(x.q.as_chunks().0) {
                    *q = signed(x);
                }
                for (to, q) in to.q.iter_mut().zip(both_transposed(&q)) {
                    // SAFETY: 32 writable bytes.
                    unsafe { _mm256_storeu_si256(to.as_mut_ptr().cast(), q) };
                }
                for g in 0..SLAB / G {
                    let sum = if G == 32 { x.sums[2 * g] as i32 + x.sums[2 * g + 1] as i32 } else { x.sums[g] as i32 };
                    let d = x.d[g * G / 32];
                    // Where the dot of group `g` is, see `transposed`; minimums need not lie as dots do.
                    let lane = if G == 32 { g } else { g / 8 * 8 + g % 2 * 4 + g % 8 / 2 };
                    to.d.as_flattened_mut()[lane] = d;
                    to.start.as_flattened_mut()[lane] = -offset * sum;
                    to.sum.as_flattened_mut()[g] = d * sum as f32;
                }
            }
        }
    }

    /// A slab as columns meet it.
    #[inline]
    fn prepared<const G: usize, const P: usize, const VNNI: bool>(slab: Slab) -> Transposed {
        let mut to = Transposed { q: both_transposed(&slab.q), sizes: slab.q, scale: slab.scale, min: slab.min };
        if G == 16 {
            to.scale = [as_transposed(slab.scale[0]), as_transposed(slab.scale[1])];
        }
        if P == SIGNED && !VNNI {
            for j in 0..8 {
                to.q[j] = _mm256_xor_si256(to.q[j], _mm256_set1_epi8(-128));
                to.sizes[j] = _mm256_abs_epi8(to.q[j]);
            }
        }
        to
    }

    /// Of two vectors the lower halves, and the upper halves.
    #[inline]
    fn halves(a: __m256i, b: __m256i) -> [__m256i; 2] {
        [_mm256_permute2x128_si256::<0x20>(a, b), _mm256_permute2x128_si256::<0x31>(a, b)]
    }

    /// The dots of a slab's groups: eight of 32, or twice eight of 16. `P` products of pairs fit 16 bits.
    #[inline]
    fn dots<const G: usize, const P: usize, const VNNI: bool>(w: &Transposed, x: &Column) -> [__m256i; 2] {
        let ones = _mm256_set1_epi16(1);
        let q = |j: usize| signed(&x.q[j]);
        let pairs = |j: usize| {
            if P == SIGNED {
                _mm256_maddubs_epi16(w.sizes[j], _mm256_sign_epi8(q(j), w.q[j]))
            } else {
                _mm256_maddubs_epi16(w.q[j], q(j))
            }
        };
        let two = |j: usize| _mm256_add_epi16(pairs(j), pairs(j + 1));
        let four = |j: usize| _mm256_add_epi16(two(j), two(j + 2));
        let wide = |v: __m256i| _mm256_madd_epi16(v, ones);
        let wide_two = |j: usize| {
            if P < 2 { _mm256_add_epi32(wide(pairs(j)), wide(pairs(j + 1))) } else { wide(two(j)) }
        };
        let half = |j: usize| {
            if VNNI {
                // SAFETY: `VNNI` is the AVX-VNNI rung's.
                let add = |a, j: usize| unsafe { dpbusd(a, w.q[j], q(j)) };
                add(add(add(add(_mm256_setzero_si256(), j), j + 1), j + 2), j + 3)
            } else if P >= 4 {
                wide(four(j))
            } else {
                _mm256_add_epi32(wide_two(j), wide_two(j + 2))
            }
        };
        if G == 16 {
            return [half(0), half(4)];
        }
        let all = if P == 8 && !VNNI {
            let [low, high] = halves(four(0), four(4));
            wide(_mm256_add_epi16(low, high))
        } else {
            let [low, high] = halves(half(0), half(4));
            _mm256_add_epi32(low, high)
        };
        [all, _mm256_setzero_si256()]
    }

    /// One row's slab times one column's, added to `acc`.
    #[inline]
    fn accumulate<const G: usize, const MIN: bool, const P: usize, const VNNI: bool>(
        w: &Transposed, x: &Column, mut acc: [__m256; 2],
    ) -> [__m256; 2] {
        let dots = dots::<G, P, VNNI>(w, x);
        for h in 0..SLAB / G / 8 {
            let mut dot = dots[h];
            if !MIN && (VNNI || P != SIGNED) {
                // SAFETY: 8 readable integers.
                dot = _mm256_add_epi32(dot, unsafe { _mm256_loadu_si256(x.start[h].as_ptr().cast()) });
            }
            let scale = _mm256_mul_ps(w.scale[h], floats(&x.d[h]));
            acc[h] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(dot), scale, acc[h]);
            if MIN {
                acc[h] = _mm256_fnmadd_ps(w.min[h], floats(&x.sum[h]), acc[h]);
            }
        }
        acc
    }

    /// Rows, see [`Rows`], times one column.
    #[inline]
    fn gemv_single<const G: usize, const MIN: bool, const P: usize, const VNNI: bool, const BYTES: usize>(
        unpack: impl Fn(&[u8; BYTES]) -> Slab, w: &Panel<'_>, step: usize, cols: &[Column], out: &mut Out<'_>,
    ) {
        let mut acc = [[_mm256_setzero_ps(); 2]; STREAMS];
        let rows = Rows::<STREAMS, BYTES>::at(w, step);
        for (s, x) in cols.iter().enumerate() {
            for r in 0..STREAMS {
                let slab = prepared::<G, P, VNNI>(unpack(rows.slab(w, r, s)));
                acc[r] = accumulate::<G, MIN, P, VNNI>(&slab, x, acc[r]);
            }
        }
        for (r, row) in rows.each() {
            out.column(0, row, 1)[0] = sum8(_mm256_add_ps(acc[r][0], acc[r][1]));
        }
    }

    /// Rows times several columns. `acc` is (rows, n).
    #[inline]
    fn gemv_several<const G: usize, const MIN: bool, const P: usize, const VNNI: bool, const BYTES: usize>(
        unpack: impl Fn(&[u8; BYTES]) -> Slab, w: &Panel<'_>, step: usize, n: usize, cols: &[Column],
        acc: &mut [[[f32; 8]; 2]], out: &mut Out<'_>,
    ) {
        let rows = Rows::<STREAMS, BYTES>::at(w, step);
        acc.fill([[0.0; 8]; 2]);
        for (s, cols) in cols.chunks_exact(n).enumerate() {
            for (r, acc) in acc.chunks_exact_mut(n).enumerate() {
                let slab = prepared::<G, P, VNNI>(unpack(rows.slab(w, r, s)));
                for (x, acc) in cols.iter().zip(acc) {
                    let sums = accumulate::<G, MIN, P, VNNI>(&slab, x, [floats(&acc[0]), floats(&acc[1])]);
                    store_floats(&mut acc[0], sums[0]);
                    if G == 16 {
                        store_floats(&mut acc[1], sums[1]);
                    }
                }
            }
        }
        for (r, row) in rows.each() {
            for c in 0..n {
                let [a, b] = &acc[r * n + c];
                out.column(c, row, 1)[0] = sum8(_mm256_add_ps(floats(a), floats(b)));
            }
        }
    }

    #[inline]
    fn gemv<const G: usize, const MIN: bool, const P: usize, const VNNI: bool, const BYTES: usize>(
        unpack: impl Fn(&[u8; BYTES]) -> Slab + Copy, w: Panel<'_>, x: Acts<'_>, out: &mut Out<'_>, scratch: &mut Scratch,
    ) {
        align_stack!();
        let (n, codes) = (x.n(), w.format.spec().codes.as_ref().expect("installed for formats with codes"));
        let cols = scratch.sums.take::<Column>(w.slabs() * n);
        columns::<G>(x, w.slabs(), codes.offset, cols);
        let steps = 0..Rows::<STREAMS, BYTES>::steps(&w);
        if n == 1 {
            steps.for_each(|i| gemv_single::<G, MIN, P, VNNI, BYTES>(unpack, &w, i, cols, out));
        } else {
            let acc = scratch.floats.take::<[[f32; 8]; 2]>(STREAMS * n);
            steps.for_each(|i| gemv_several::<G, MIN, P, VNNI, BYTES>(unpack, &w, i, n, cols, acc, out));
        }
    }

    // ---- matrix times many columns -----------------------------------------------------------------------------------

    /// The 8 rows of an 8 x 8 matrix of 32-bit values become its columns.
    #[inline]
    pub(crate) fn transpose(m: &mut [__m256i; 8]) {
        let t = both_transposed(m);
        for i in 0..4 {
            [m[i], m[4 + i]] = halves(t[i], t[4 + i]);
        }
    }

    /// Unpacks slab `s` of up to 8 rows from `r0` on, through `codes`, into one half of a tile.
    fn interleave<const G: usize, const MIN: bool>(k: &Kernel, w: &Panel<'_>, r0: usize, s: usize, half: usize, (codes, tile): (&mut [Codes; 8], &mut Tile)) {
        for (r, c) in codes.iter_mut().enumerate().take(w.rows.saturating_sub(r0)) {
            let b = w.slab(r0 + r, s);
            // A row's next slab, for which its turn comes after the other rows'.
            prefetch::<true>(b.as_ptr_range().end, b.len());
            // SAFETY: this rung's, as the table's construction guarantees.
            unsafe { (k.unpack)(b, c) }
        }
        let mut m = [_mm256_setzero_si256(); 8];
        for (to, j) in tile.q.as_chunks_mut::<8>().0.iter_mut().zip(0..) {
            for (m, c) in m.iter_mut().zip(codes.iter()) {
                *m = load(&c.q.as_chunks().0[j]);
            }
            transpose(&mut m);
            for (to, &v) in to.iter_mut().zip(&m) {
                // SAFETY: 32 writable bytes.
                unsafe { _mm256_storeu_si256(to[8 * half..][..8].as_mut_ptr().cast(), v) };
            }
        }
        let mut floats_of_rows = |of: fn(&Codes) -> &[f32; 16], to: &mut [[f32; TILE]; 16]| {
            for (to, j) in to.as_chunks_mut::<8>().0.iter_mut().zip(0..).take(SLAB / G / 8) {
                for (m, c) in m.iter_mut().zip(codes.iter()) {
                    *m = _mm256_castps_si256(floats(&of(c).as_chunks().0[j]));
                }
                transpose(&mut m);
                for (to, &v) in to.iter_mut().zip(&m) {
                    store_floats(&mut to.as_chunks_mut().0[half], _mm256_castsi256_ps(v));
                }
            }
        };
        floats_of_rows(|c| &c.scale, &mut tile.scale);
        if MIN {
            floats_of_rows(|c| &c.min, &mut tile.min);
        }
    }

    /// An optimization barrier: `x` is computed where this stands. The compiler, which sees eight unrolled steps as one expression, would take one column
    /// of accumulators after the other, and put all activations on the stack in between: a fifth slower.
    #[inline]
    fn in_turn(x: &mut __m256i) {
        // SAFETY: no instruction. Not `pure`: the order of these is what it is for.
        unsafe { std::arch::asm!("/* {0} */", inout(ymm_reg) *x, options(nomem, nostack, preserves_flags)) };
    }

    /// `NC` columns of a tile: adds the slab's products to `acc`, (NC, TILE). `P` products of pairs fit 16 bits.
    fn block<const G: usize, const MIN: bool, const P: usize, const VNNI: bool, const NC: usize>(
        tile: &Tile, groups: usize, x: &[Q8Block], sums: &[[u32; 16]], acc: &mut [[f32; TILE]],
    ) {
        let (x, sums, acc): (&[Q8Block; NC], &[[u32; 16]; NC], &mut [[f32; TILE]; NC]) =
            (x.try_into().expect("NC columns"), sums.try_into().expect("NC columns"), acc.try_into().expect("NC columns"));
        let ones = _mm256_set1_epi16(1);
        // Quads of positions between two widenings.
        let step = if P == SIGNED { 1 } else { P.min(G / 4) };
        for g in 0..groups {
            let mut a = [[_mm256_setzero_si256(); 2]; NC];
            if !MIN && P != SIGNED {
                for i in 0..NC {
                    a[i] = [_mm256_set1_epi32(sums[i][g] as i32); 2];
                }
            }
            for k in (g * G / 4..(g + 1) * G / 4).step_by(step) {
                if VNNI {
                    let q = tile.q[k].as_flattened().as_chunks::<32>().0;
                    let (w0, w1) = (load(&q[0]), load(&q[1]));
                    for i in 0..NC {
                        // SAFETY: position 4 k and the three after it are inside the block.
                        let v = _mm256_set1_epi32(unsafe { x[i].q.as_ptr().add(4 * k).cast::<i32>().read_unaligned() });
                        // SAFETY: `VNNI` is the AVX-VNNI rung's.
                        a[i] = unsafe { [dpbusd(a[i][0], w0, v), dpbusd(a[i][1], w1, v)] };
                    }
                    continue;
                }
                let mut narrow = [[_mm256_setzero_si256(); 2]; NC];
                for k in k..k + step {
                    let q = tile.q[k].as_flattened().as_chunks::<32>().0;
                    let (mut w0, mut w1) = (load(&q[0]), load(&q[1]));
                    let (mut s0, mut s1) = (w0, w1);
                    if P == SIGNED {
                        s0 = _mm256_xor_si256(w0, _mm256_set1_epi8(-128));
                        s1 = _mm256_xor_si256(w1, _mm256_set1_epi8(-128));
                        (w0, w1) = (_mm256_abs_epi8(s0), _mm256_abs_epi8(s1));
                    }
                    for i in 0..NC {
                        // SAFETY: position 4 k and the three after it are inside the block.
                        let v = _mm256_set1_epi32(unsafe { x[i].q.as_ptr().add(4 * k).cast::<i32>().read_unaligned() });
                        let (v0, v1) = if P == SIGNED { (_mm256_sign_epi8(v, s0), _mm256_sign_epi8(v, s1)) } else { (v, v) };
                        narrow[i][0] = _mm256_add_epi16(narrow[i][0], _mm256_maddubs_epi16(w0, v0));
                        narrow[i][1] = _mm256_add_epi16(narrow[i][1], _mm256_maddubs_epi16(w1, v1));
                    }
                    for n in narrow.as_flattened_mut() {
                        in_turn(n);
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

    fn gemm<const G: usize, const MIN: bool, const P: usize, const VNNI: bool>(
        k: &Kernel, w: Panel<'_>, x: Acts<'_>, out: &mut Out<'_>, scratch: &mut Scratch,
    ) {
        align_stack!();
        let n = x.n();
        let codes = w.format.spec().codes.as_ref().expect("installed for formats with codes");
        let tiles = w.rows.div_ceil(TILE);
        let acc = scratch.floats.take::<[f32; TILE]>(tiles * n);
        let sums = scratch.sums.take::<[u32; 16]>(n);
        let tile = &mut scratch.tile.take::<Tile>(1)[0];
        // Of rows that are not there, what was before: nobody reads their sums.
        let unpacked = &mut [Codes::ZERO; 8];
        let blocks = n.div_ceil(COLS);
        acc.fill([0.0; TILE]);
        for s in 0..w.slabs() {
            let next = if s + 1 < w.slabs() { x.q8(s + 1) } else { &[] };
            let x = x.q8(s);
            column_sums::<G, MIN>(codes.offset, x, sums);
            let groups = (w.cols - s * SLAB).min(SLAB).div_ceil(G);
            for t in 0..tiles {
                interleave::<G, MIN>(k, &w, t * TILE, s, 0, (unpacked, tile));
                interleave::<G, MIN>(k, &w, t * TILE + 8, s, 1, (unpacked, tile));
                let acc = &mut acc[t * n..(t + 1) * n];
                for c in (0..n).step_by(COLS) {
                    let r = c..n.min(c + COLS);
                    prefetch_part(next, t * blocks + c / COLS, tiles * blocks);
                    let (x, sums, acc) = (&x[r.clone()], &sums[r.clone()], &mut acc[r.clone()]);
                    match r.len() {
                        1 => block::<G, MIN, P, VNNI, 1>(tile, groups, x, sums, acc),
                        2 => block::<G, MIN, P, VNNI, 2>(tile, groups, x, sums, acc),
                        3 => block::<G, MIN, P, VNNI, 3>(tile, groups, x, sums, acc),
                        _ => block::<G, MIN, P, VNNI, COLS>(tile, groups, x, sums, acc),
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

/// What the gemv needs of one column's slab, in the order of its lanes.
#[derive(Clone, Copy, bytemuck::Zeroable, bytemuck::Pod)]
#[repr(C, align(64))]
struct Column {
    q: [[i8; 32]; 8],
    d: [[f32; 8]; 2],
    sum: [[f32; 8]; 2], // d * sum of each group, as `Slab::min` lies
    start: [[i32; 8]; 2],
}

/// A slab whose vectors are [`transposed`], its scales as their dots lie. Codes that `vpmaddubsw` cannot take have lost their offset
/// and give their signs to the activations: `sizes` is without.
struct Transposed {
    q: [__m256i; 8],
    sizes: [__m256i; 8],
    scale: [__m256; 2],
    min: [__m256; 2],
}

/// The matrix-vector kernels of each format, and its unpacker to memory: of a whole slab, or of the blocks that end a row.
macro_rules! kernels {
    ($($format:ident $unpack:ident $bytes:literal $group:literal $min:literal $order:ident;)*) => {
        mod gemvs {
            use super::*;
            avx2! {$(
                pub fn $unpack(_: &Kernel, w: Panel<'_>, x: Acts<'_>, out: &mut Out<'_>, scratch: &mut Scratch) {
                    gemv::<$group, $min, { pairs(Format::$format) }, false, $bytes>(
                        |b| slab::$unpack(b), w, x, out, scratch,
                    );
                }
            )*}
        }

        mod gemvs_vnni {
            use super::*;
            avx2! {$(
                pub fn $unpack(_: &Kernel, w: Panel<'_>, x: Acts<'_>, out: &mut Out<'_>, scratch: &mut Scratch) {
                    gemv::<$group, $min, 1, true, $bytes>(|b| slab::$unpack(b), w, x, out, scratch);
                }
            )*}
        }

        mod stores {
            use super::*;
            avx2! {$(
                pub fn $unpack(b: &[u8], codes: &mut Codes) {
                    let end;
                    let whole = match b.try_into() {
                        Ok(whole) => whole,
                        Err(_) => {
                            end = padded::<$bytes>(b);
                            &end
                        }
                    };
                    store(slab::$unpack(whole), codes);
                }
            )*}
        }

        fn gemv_of(format: Format, vnni: bool) -> Run {
            match format {
                $(Format::$format => if vnni { gemvs_vnni::$unpack } else { gemvs::$unpack },)*
                _ => unreachable!("a format without codes"),
            }
        }

        fn unpack_of(format: Format) -> unsafe fn(&[u8], &mut Codes) {
            match format {
                $(Format::$format => stores::$unpack,)*
                _ => unreachable!("a format without codes"),
            }
        }
    };
}

crate::slabs::slabs!(kernels);

avx2! {
    /// A slab to memory.
    fn store(slab: Slab, codes: &mut Codes) {
        // SAFETY: 256 bytes and 16 floats are what the arrays hold.
        unsafe {
            for (j, q) in slab.q.into_iter().enumerate() {
                _mm256_storeu_si256(codes.q.as_mut_ptr().add(32 * j).cast(), q);
            }
            for h in 0..2 {
                _mm256_storeu_ps(codes.scale.as_mut_ptr().add(8 * h), slab.scale[h]);
                _mm256_storeu_ps(codes.min.as_mut_ptr().add(8 * h), slab.min[h]);
            }
        }
    }
}
