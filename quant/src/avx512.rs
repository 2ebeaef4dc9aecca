//! AVX-512 with VNNI.
//!
//! Everything rests on one function a format: a slab of 256 weights from memory to registers ([`Slab`]). The matrix-vector
//! body dots it with up to 16 columns at once; the matrix-matrix body stores it interleaved and dots the tile with all.
//!
//! ```text
//! gemv   4 rows at once (four memory streams), for each slab:
//!            slab = turned(unpack(row))        4 x 64 codes; a lane has 4 codes of the same 16 weights in each vector
//!            for each column (with groups of 32 each two, whose lanes are folded to one vector; of one column each two rows):
//!                acc += float(4 vpdpbusd, one after the other) * (scale * d)       16 lanes, 16 weights each
//!                acc -= min * (d * sum)                                            16 groups, or 8
//!
//! gemm   32 rows at once, for each slab:
//!            unpack 32 rows, transposed: tile[k / 4][row][4]   a vector = 16 rows x 4 positions
//!            for each 6 columns, for each group of 32 positions (or each 4 columns, two groups of 16):
//!                acc[row, column] = sum of vpdpbusd(tile, broadcast of 4 activations)
//!                c[row, column] += acc * (scale[row] * d[column]) - min[row] * (d * sum)[column]
//! ```
//!
//! Codes stay where their bytes have them ([`slab::Order`]): those of a high nibble are 16 times too large for the gemv, and
//! its columns' scales 16 times smaller.
//!
//! Offsets of codes (a q4_0 code is 0..15 for a weight -8..7) cost next to nothing: the integer accumulators start from
//! `-offset * sum(x)` instead of zero.

pub(crate) mod slab;

use crate::act::{Act, Acts, Q8Block, column_sums};
use crate::float_matrix;
use crate::format::{CodeSpec, Codes, Format, SLAB};
use crate::isa::{Isa, avx512};
use crate::kernels::{Kernel, Run, Slot};
use crate::lanes::Avx512;
use crate::panel::{Out, Panel, Rows, Scratch, align_stack, padded};
use slab::{Order, Slab, floats, load512, signed};
use std::arch::x86_64::*;

/// Columns up to which unpacking a slab for a few dots beats interleaving it for many.
const GEMV_COLS: usize = 16;
/// Rows that the gemv reads side by side.
const STREAMS: usize = 4;
/// Rows of a gemm tile: two vectors.
const TILE: usize = 32;

/// Installs the kernels of this file.
pub(crate) fn overlay(table: &mut [Kernel]) {
    for (kernel, spec) in table.iter_mut().zip(crate::format::FORMATS) {
        match (kernel.gemm.act, &spec.codes) {
            (Act::Q8, Some(codes)) => {
                kernel.gemv = Slot { isa: Isa::Avx512, act: Act::Q8, run: gemv_of(spec.format) };
                kernel.gemm = Slot { isa: Isa::Avx512, act: Act::Q8, run: gemm_of(codes) };
                kernel.gemv_cols = GEMV_COLS;
                kernel.unpack = unpack_of(spec.format);
            }
            _ => {
                kernel.gemm = Slot { isa: Isa::Avx512, act: Act::F32, run: float_gemm };
                if spec.codes.is_none() {
                    kernel.gemv = Slot { isa: Isa::Avx512, act: Act::F32, run: float_gemv };
                    kernel.gemv_cols = float_matrix::GEMV_COLS;
                }
            }
        }
    }
}

fn gemm_of(codes: &CodeSpec) -> Run {
    match (codes.group, codes.has_min) {
        // Columns of the innermost body: each has two integer and two float accumulators; with groups of 16, two more.
        (32, false) => gemm::<32, false, 6>,
        (32, true) => gemm::<32, true, 6>,
        (_, false) => gemm::<16, false, 4>,
        (_, true) => gemm::<16, true, 4>,
    }
}

/// What the gemv needs of one column's slab, in the order of its lanes.
#[derive(Clone, Copy, bytemuck::Zeroable, bytemuck::Pod)]
#[repr(C, align(64))]
struct Column {
    q: [[i8; 64]; 4],
    d: [f32; 16],
    sum: [f32; 16], // d * sum of each group, as `Slab::min` lies
    start: [i32; 16],
}

/// Two columns' slab, for formats with groups of 32: what [`Column`] has of each, and scales and sums as a vector of
/// [`folded`] dots lies.
#[derive(Clone, Copy, bytemuck::Zeroable, bytemuck::Pod)]
#[repr(C, align(64))]
struct Pair {
    q: [[[i8; 64]; 4]; 2],
    start: [[i32; 16]; 2],
    d: [f32; 16],
    sum: [f32; 16],
}

avx512! {
    fn float_gemm(_: &Kernel, w: Panel<'_>, x: Acts<'_>, out: &mut Out<'_>, scratch: &mut Scratch) {
        float_matrix::gemm::<Avx512, 2, 12>(w, x, out, scratch);
    }

    fn float_gemv(_: &Kernel, w: Panel<'_>, x: Acts<'_>, out: &mut Out<'_>, scratch: &mut Scratch) {
        float_matrix::gemv::<Avx512, 4, 4>(w, x, out, scratch);
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

    // ---- matrix times a few columns ----------------------------------------------------------------------------------

    /// The sixteen 16-byte parts of four vectors, turned: lane `4 a + v` of vector `j` is dword `j` of lane `a` of vector `v`.
    /// A dot of four vectors then has the sum of one part in each lane, and needs one conversion and one scale in all.
    #[inline]
    fn turned(v: [__m512i; 4]) -> [__m512i; 4] {
        let (a, b) = (_mm512_unpacklo_epi32(v[0], v[1]), _mm512_unpackhi_epi32(v[0], v[1]));
        let (c, d) = (_mm512_unpacklo_epi32(v[2], v[3]), _mm512_unpackhi_epi32(v[2], v[3]));
        [
            _mm512_unpacklo_epi64(a, c),
            _mm512_unpackhi_epi64(a, c),
            _mm512_unpacklo_epi64(b, d),
            _mm512_unpackhi_epi64(b, d),
        ]
    }

    /// Which 16 weights a lane of `turned` vectors belongs to.
    #[inline]
    fn sixteenth<const ORDER: u8>() -> __m512i {
        match ORDER {
            Order::PAIRED => _mm512_setr_epi32(0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15),
            Order::HALVES | Order::NIBBLES => _mm512_setr_epi32(0, 2, 8, 10, 1, 3, 9, 11, 4, 6, 12, 14, 5, 7, 13, 15),
            Order::QUARTERS | Order::THIRDS => _mm512_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15),
            _ => _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15),
        }
    }

    /// Prepares the columns of all slabs, (slabs, n).
    fn columns<const G: usize, const MIN: bool, const ORDER: u8>(
        x: Acts<'_>, slabs: usize, offset: i32, to: &mut [Column],
    ) {
        let one = x.n() == 1;
        let lanes = sixteenth::<ORDER>();
        // Codes that are shifted up meet smaller scales. A lane's are those of vector `lane % 4`.
        let [a, b, c, d] = Order::shifts(ORDER).map(|s| s as i32);
        let shifts = _mm512_setr_epi32(a, b, c, d, a, b, c, d, a, b, c, d, a, b, c, d);
        for (s, to) in to.chunks_exact_mut(x.n()).take(slabs).enumerate() {
            for (to, x) in to.iter_mut().zip(x.q8(s)) {
                let mut q = [_mm512_setzero_si512(); 4];
                for j in 0..4 {
                    q[j] = signed(&x.q.as_chunks().0[j]);
                }
                let q = slab::arranged::<ORDER>(q);
                let q = if one { q } else { turned(q) };
                // SAFETY: both arrays are 32 bytes.
                let (d, sums) = unsafe { (_mm256_loadu_ps(x.d.as_ptr()), _mm256_loadu_si256(x.sums.as_ptr().cast())) };
                let sums = _mm512_cvtepi16_epi32(sums);
                let d16 = _mm512_permutexvar_ps(_mm512_srli_epi32::<1>(lanes), _mm512_castps256_ps512(d));
                let d16 = _mm512_scalef_ps(d16, _mm512_sub_ps(_mm512_setzero_ps(), _mm512_cvtepi32_ps(shifts)));
                // Each side of a minimum's product lies as `Slab::min` does.
                let sum = if G == 32 {
                    let pairs = _mm512_add_epi32(sums, _mm512_shuffle_epi32::<0b10_11_00_01>(sums));
                    let eight = _mm512_cvtepi32_ps(_mm512_castsi256_si512(_mm512_cvtepi64_epi32(pairs)));
                    let eight = _mm256_mul_ps(_mm512_castps512_ps256(eight), d);
                    _mm512_insertf32x8::<1>(_mm512_setzero_ps(), eight)
                } else {
                    let twice = _mm512_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7);
                    _mm512_mul_ps(_mm512_permutexvar_ps(twice, _mm512_castps256_ps512(d)), _mm512_cvtepi32_ps(sums))
                };
                // What the offset adds to each lane, exactly, is taken off beforehand.
                let start = _mm512_mullo_epi32(_mm512_permutexvar_epi32(lanes, sums), _mm512_set1_epi32(-offset));
                let start = _mm512_sllv_epi32(start, shifts);
                // SAFETY: every field is as long as the vectors stored to it.
                unsafe {
                    for j in 0..4 {
                        _mm512_store_si512(to.q[j].as_mut_ptr().cast(), q[j]);
                    }
                    _mm512_store_ps(to.d.as_mut_ptr(), d16);
                    _mm512_store_ps(to.sum.as_mut_ptr(), sum);
                    _mm512_store_si512(to.start.as_mut_ptr().cast(), start);
                }
            }
        }
    }

    /// Of vectors of two columns, in which a lane is 16 weights: the lanes of the first half of each group of 32, and those of
    /// the second.
    #[inline]
    fn halves<const ORDER: u8>([a, b]: [__m512i; 2]) -> [__m512i; 2] {
        if ORDER == Order::PAIRED {
            let (a, b) = (_mm512_castsi512_ps(a), _mm512_castsi512_ps(b));
            let (firsts, seconds) = (_mm512_shuffle_ps::<0x88>(a, b), _mm512_shuffle_ps::<0xDD>(a, b));
            [_mm512_castps_si512(firsts), _mm512_castps_si512(seconds)]
        } else {
            [_mm512_shuffle_i64x2::<0x88>(a, b), _mm512_shuffle_i64x2::<0xDD>(a, b)]
        }
    }

    /// Dots of two columns, the halves of each group added: one vector, for which conversion and scales are paid once.
    #[inline]
    fn folded<const ORDER: u8>(dots: [__m512i; 2]) -> __m512i {
        let [firsts, seconds] = halves::<ORDER>(dots);
        _mm512_add_epi32(firsts, seconds)
    }

    /// The lanes of a folded vector that are the first column's.
    const fn first_column(order: u8) -> u16 {
        if order == Order::PAIRED { 0x3333 } else { 0x00FF }
    }

    /// Puts columns together two by two; the last of an odd number stands beside itself.
    fn pairs<const ORDER: u8>(cols: &[Column], n: usize, to: &mut [Pair]) {
        // The sums of the groups are the upper eight.
        let groups = _mm512_or_si512(_mm512_srli_epi32::<1>(sixteenth::<ORDER>()), _mm512_set1_epi32(8));
        for (cols, to) in cols.chunks_exact(n).zip(to.chunks_exact_mut(n.div_ceil(2))) {
            for (cols, to) in cols.chunks(2).zip(to) {
                let two = [&cols[0], cols.get(1).unwrap_or(&cols[0])];
                // What belongs to a group is the same in both of its halves.
                let [d, _] = halves::<ORDER>(two.map(|c| _mm512_castps_si512(floats(&c.d))));
                let sums = two.map(|c| _mm512_permutexvar_epi32(groups, _mm512_castps_si512(floats(&c.sum))));
                let [sum, _] = halves::<ORDER>(sums);
                *to = Pair { q: two.map(|c| c.q), start: two.map(|c| c.start), d: [0.0; 16], sum: [0.0; 16] };
                // SAFETY: 64 aligned bytes each.
                unsafe {
                    _mm512_store_si512(to.d.as_mut_ptr().cast(), d);
                    _mm512_store_si512(to.sum.as_mut_ptr().cast(), sum);
                }
            }
        }
    }

    /// What the dots of a column start from.
    #[inline]
    fn start<const MIN: bool>(start: &[i32; 16]) -> __m512i {
        // SAFETY: 64 aligned bytes, as every field of `Column` and `Pair` is.
        if MIN { _mm512_setzero_si512() } else { unsafe { _mm512_load_si512(start.as_ptr().cast()) } }
    }

    /// Four rows' slabs, `turned`, times one column's.
    #[inline]
    fn dots<const MIN: bool>(slabs: &[Slab; STREAMS], q: &[[i8; 64]; 4], from: &[i32; 16]) -> [__m512i; STREAMS] {
        let mut dots = [start::<MIN>(from); STREAMS];
        // Each vector of the column is loaded once for all rows, whose sums do not wait for each other.
        for j in 0..4 {
            let q = signed(&q[j]);
            for r in 0..STREAMS {
                dots[r] = _mm512_dpbusd_epi32(dots[r], slabs[r].q[j], q);
            }
        }
        dots
    }

    /// One row's slab times one column's, neither `turned`: the dots are. The same numbers.
    #[inline]
    fn dot<const MIN: bool>(slab: &Slab, q: &[[i8; 64]; 4], from: &[i32; 16]) -> __m512i {
        let mut dots = [_mm512_setzero_si512(); 4];
        for j in 0..4 {
            dots[j] = _mm512_dpbusd_epi32(dots[j], slab.q[j], signed(&q[j]));
        }
        _mm512_add_epi32(start::<MIN>(from), parts(dots))
    }

    /// Dots times the scales of both sides and less the minimums times the column's sums, added to `acc`.
    #[inline]
    fn scaled<const MIN: bool>(
        dots: __m512i, (scale, min): (__m512, __m512), (d, sum): (&[f32; 16], &[f32; 16]), acc: __m512,
    ) -> __m512 {
        let acc = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dots), _mm512_mul_ps(scale, floats(d)), acc);
        if MIN { _mm512_fnmadd_ps(min, floats(sum), acc) } else { acc }
    }

    /// The sums of four rows' vectors, to column `c`.
    #[inline]
    fn put<const BYTES: usize>(sums: [__m512; STREAMS], rows: &Rows<STREAMS, BYTES>, c: usize, out: &mut Out<'_>) {
        let totals = totals(sums);
        for (r, row) in rows.each() {
            out.column(c, row, 1)[0] = totals[r];
        }
    }

    /// Four rows' slabs times two columns', added to `acc`. Slabs are `turned`; their scales and minimums are those of the
    /// folded lanes.
    #[inline]
    fn accumulate_pair<const MIN: bool, const ORDER: u8>(
        slabs: &[Slab; STREAMS], x: &Pair, acc: &mut [[f32; 16]; STREAMS],
    ) {
        let (first, second) = (dots::<MIN>(slabs, &x.q[0], &x.start[0]), dots::<MIN>(slabs, &x.q[1], &x.start[1]));
        for r in 0..STREAMS {
            let dots = folded::<ORDER>([first[r], second[r]]);
            let sum = scaled::<MIN>(dots, (slabs[r].scale, slabs[r].min), (&x.d, &x.sum), floats(&acc[r]));
            // SAFETY: 16 floats.
            unsafe { _mm512_storeu_ps(acc[r].as_mut_ptr(), sum) };
        }
    }

    /// Two rows' slabs times one column's, added to `acc`: the sums of [`accumulate_pair`] to the last bit, in the lanes of the
    /// first and of the second column. Neither side is `turned`; the slabs' scales are as they were unpacked.
    #[inline]
    fn accumulate_rows<const MIN: bool, const ORDER: u8>(slabs: [Slab; 2], x: &Pair, acc: __m512) -> __m512 {
        let [first, second] = &slabs;
        let dots = [dot::<MIN>(first, &x.q[0], &x.start[0]), dot::<MIN>(second, &x.q[0], &x.start[0])];
        // Which lane of which slab: minimums are the upper eight of a slab's scales.
        let groups = folded_groups::<ORDER>();
        let which = _mm512_mask_or_epi32(groups, !first_column(ORDER), groups, _mm512_set1_epi32(16));
        let (a, b) = (first.scale, second.scale);
        let scale = _mm512_permutex2var_ps(a, which, b);
        let min = _mm512_permutex2var_ps(a, _mm512_or_si512(which, _mm512_set1_epi32(8)), b);
        scaled::<MIN>(folded::<ORDER>(dots), (scale, min), (&x.d, &x.sum), acc)
    }

    /// The group of 32 that each lane of a folded vector belongs to.
    #[inline]
    fn folded_groups<const ORDER: u8>() -> __m512i {
        let groups = _mm512_srli_epi32::<1>(sixteenth::<ORDER>());
        let [groups, _] = halves::<ORDER>([groups, groups]);
        groups
    }

    /// Four rows times one column, in formats with groups of 32: two rows share a vector of dots, as two columns do in
    /// [`gemv_pairs`].
    #[inline]
    fn gemv_single32<const MIN: bool, const ORDER: u8, const BYTES: usize>(
        unpack: impl Fn(&[u8; BYTES]) -> Slab, w: &Panel<'_>, step: usize, cols: &[Pair], out: &mut Out<'_>,
    ) {
        let rows = Rows::<STREAMS, BYTES>::at(w, step);
        let mut acc = [_mm512_setzero_ps(); 2];
        for (s, x) in cols.iter().enumerate().take(w.slabs()) {
            let slab = |r: usize| unpack(rows.slab(w, r, s));
            // Not a loop: it would not be unrolled, and keep its sums in memory.
            acc[0] = accumulate_rows::<MIN, ORDER>([slab(0), slab(1)], x, acc[0]);
            acc[1] = accumulate_rows::<MIN, ORDER>([slab(2), slab(3)], x, acc[1]);
        }
        let first = first_column(ORDER);
        let row = |r: usize| _mm512_maskz_mov_ps(if r.is_multiple_of(2) { first } else { !first }, acc[r / 2]);
        put([row(0), row(1), row(2), row(3)], &rows, 0, out);
    }

    /// Four rows times several columns, in formats with groups of 32: two columns share a vector of dots, of which each has
    /// eight. `acc` is (pairs, rows).
    #[inline]
    fn gemv_pairs<const MIN: bool, const ORDER: u8, const BYTES: usize>(
        unpack: impl Fn(&[u8; BYTES]) -> Slab, w: &Panel<'_>, step: usize, n: usize, cols: &[Pair],
        acc: &mut [[f32; 16]], out: &mut Out<'_>,
    ) {
        let groups = folded_groups::<ORDER>();
        let rows = Rows::<STREAMS, BYTES>::at(w, step);
        let turn = |b: &[u8; BYTES]| {
            let slab = unpack(b);
            let scale = _mm512_permutexvar_ps(groups, slab.scale);
            let min = _mm512_permutexvar_ps(_mm512_or_si512(groups, _mm512_set1_epi32(8)), slab.scale);
            Slab { q: turned(slab.q), scale, min }
        };
        acc.fill([0.0; 16]);
        for (s, x) in cols.chunks_exact(n.div_ceil(2)).take(w.slabs()).enumerate() {
            let block = |r: usize| rows.slab(w, r, s);
            let slabs = [turn(block(0)), turn(block(1)), turn(block(2)), turn(block(3))];
            for (x, acc) in x.iter().zip(acc.as_chunks_mut::<STREAMS>().0) {
                accumulate_pair::<MIN, ORDER>(&slabs, x, acc);
            }
        }
        for c in 0..n {
            let first = first_column(ORDER);
            let lanes = if c % 2 == 0 { first } else { !first };
            let mut sums = [_mm512_setzero_ps(); STREAMS];
            for r in 0..STREAMS {
                sums[r] = _mm512_maskz_mov_ps(lanes, floats(&acc[c / 2 * STREAMS + r]));
            }
            put(sums, &rows, c, out);
        }
    }

    /// The sums of the sixteen 16-byte parts of four vectors, where a dot of `turned` ones has them: lane `4 a + v` for part
    /// `a` of vector `v`. Six shuffles, where turning takes eight.
    #[inline]
    fn parts(v: [__m512i; 4]) -> __m512i {
        let fold = |a, b| _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
        let (a, b) = (fold(v[0], v[1]), fold(v[2], v[3]));
        _mm512_add_epi32(_mm512_unpacklo_epi64(a, b), _mm512_unpackhi_epi64(a, b))
    }

    /// Four rows, see [`Rows`], times one column, in formats with groups of 16. Neither side is `turned`: the dots are.
    #[inline]
    fn gemv_single16<const MIN: bool, const ORDER: u8, const BYTES: usize>(
        unpack: impl Fn(&[u8; BYTES]) -> Slab, w: &Panel<'_>, step: usize, cols: &[Column], out: &mut Out<'_>,
    ) {
        let lanes = sixteenth::<ORDER>();
        let rows = Rows::<STREAMS, BYTES>::at(w, step);
        let mut sums = [_mm512_setzero_ps(); STREAMS];
        for (s, x) in cols.iter().enumerate().take(w.slabs()) {
            let add = |r: usize, sum: __m512| {
                let mut slab = unpack(rows.slab(w, r, s));
                slab.scale = _mm512_permutexvar_ps(lanes, slab.scale);
                let dots = dot::<MIN>(&slab, &x.q, &x.start);
                scaled::<MIN>(dots, (slab.scale, slab.min), (&x.d, &x.sum), sum)
            };
            // Not a loop: it would not be unrolled, and keep its sums in memory.
            sums[0] = add(0, sums[0]);
            sums[1] = add(1, sums[1]);
            sums[2] = add(2, sums[2]);
            sums[3] = add(3, sums[3]);
        }
        put(sums, &rows, 0, out);
    }

    /// Four rows times several columns, in formats with groups of 16. `acc` is (n, rows).
    #[inline]
    fn gemv_columns<const MIN: bool, const ORDER: u8, const BYTES: usize>(
        unpack: impl Fn(&[u8; BYTES]) -> Slab, w: &Panel<'_>, step: usize, n: usize, cols: &[Column],
        acc: &mut [[f32; 16]], out: &mut Out<'_>,
    ) {
        let lanes = sixteenth::<ORDER>();
        let rows = Rows::<STREAMS, BYTES>::at(w, step);
        let turn = |b: &[u8; BYTES]| {
            let slab = unpack(b);
            Slab { q: turned(slab.q), scale: _mm512_permutexvar_ps(lanes, slab.scale), min: slab.min }
        };
        acc.fill([0.0; 16]);
        for (s, x) in cols.chunks_exact(n).take(w.slabs()).enumerate() {
            let block = |r: usize| rows.slab(w, r, s);
            let slabs = [turn(block(0)), turn(block(1)), turn(block(2)), turn(block(3))];
            for (x, acc) in x.iter().zip(acc.as_chunks_mut::<STREAMS>().0) {
                let dots = dots::<MIN>(&slabs, &x.q, &x.start);
                for r in 0..STREAMS {
                    let sum =
                        scaled::<MIN>(dots[r], (slabs[r].scale, slabs[r].min), (&x.d, &x.sum), floats(&acc[r]));
                    // SAFETY: 16 floats.
                    unsafe { _mm512_storeu_ps(acc[r].as_mut_ptr(), sum) };
                }
            }
        }
        for c in 0..n {
            let acc = |r: usize| floats(&acc[c * STREAMS + r]);
            put([acc(0), acc(1), acc(2), acc(3)], &rows, c, out);
        }
    }

    /// The sum of each vector's lanes.
    #[inline]
    fn totals(v: [__m512; STREAMS]) -> [f32; STREAMS] {
        let fold = |a, b| _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
        let (a, b) = (_mm512_castps_pd(fold(v[0], v[1])), _mm512_castps_pd(fold(v[2], v[3])));
        let (low, high) = (_mm512_unpacklo_pd(a, b), _mm512_unpackhi_pd(a, b));
        let v = _mm512_add_ps(_mm512_castpd_ps(low), _mm512_castpd_ps(high));
        let v = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps::<1>(v));
        let v = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps::<1>(v));
        let mut sums = [0.0; STREAMS];
        // SAFETY: four floats.
        unsafe { _mm_storeu_ps(sums.as_mut_ptr(), v) };
        sums
    }

    #[inline]
    fn gemv<const G: usize, const MIN: bool, const ORDER: u8, const BYTES: usize>(
        unpack: impl Fn(&[u8; BYTES]) -> Slab + Copy, w: Panel<'_>, x: Acts<'_>, out: &mut Out<'_>, scratch: &mut Scratch,
    ) {
        align_stack!();
        let (n, offset) = (x.n(), w.format.spec().codes.as_ref().expect("installed for formats with codes").offset);
        let cols = scratch.sums.take::<Column>(w.slabs() * n);
        columns::<G, MIN, ORDER>(x, w.slabs(), offset, cols);
        let steps = 0..Rows::<STREAMS, BYTES>::steps(&w);
        if G == 32 {
            let two = scratch.tile.take::<Pair>(w.slabs() * n.div_ceil(2));
            pairs::<ORDER>(cols, n, two);
            if n == 1 {
                steps.for_each(|i| gemv_single32::<MIN, ORDER, BYTES>(unpack, &w, i, two, out));
            } else {
                let acc = scratch.floats.take::<[f32; 16]>(n.div_ceil(2) * STREAMS);
                steps.for_each(|i| gemv_pairs::<MIN, ORDER, BYTES>(unpack, &w, i, n, two, acc, out));
            }
        } else if n == 1 {
            steps.for_each(|i| gemv_single16::<MIN, ORDER, BYTES>(unpack, &w, i, cols, out));
        } else {
            let acc = scratch.floats.take::<[f32; 16]>(n * STREAMS);
            steps.for_each(|i| gemv_columns::<MIN, ORDER, BYTES>(unpack, &w, i, n, cols, acc, out));
        }
    }

    // ---- matrix times many columns -----------------------------------------------------------------------------------

    /// The 16 rows of a 16 x 16 matrix of 32-bit values become its columns.
    pub(crate) fn transpose(m: &mut [__m512i; 16]) {
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
        let mut codes = [Codes::ZERO; 16];
        for (r, c) in codes.iter_mut().enumerate().take(rows) {
            let b = w.slab(r0 + r, s);
            let next = b.as_ptr_range().end;
            for line in 0..b.len().div_ceil(64) {
                // A row's next slab, for which its turn comes after the other rows'. No hardware follows so many streams.
                _mm_prefetch::<_MM_HINT_T0>(next.wrapping_add(64 * line).cast());
            }
            // SAFETY: this rung's, as the table's construction guarantees.
            unsafe { (k.unpack)(b, c) }
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
            let dots = |g: usize| {
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
                a
            };
            let rows = |of: &[[f32; TILE]; 16], g: usize, h: usize| _mm512_loadu_ps(of.get_unchecked(g).as_ptr().add(16 * h));
            if G == 32 {
                for g in 0..groups {
                    let a = dots(g);
                    for h in 0..2 {
                        let (s, m) = (rows(&tile.scale, g, h), rows(&tile.min, g, h));
                        for i in 0..NC {
                            let d = _mm512_set1_ps(x[i].d[g]);
                            c[i][h] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(a[i][h]), _mm512_mul_ps(s, d), c[i][h]);
                            if MIN {
                                c[i][h] = _mm512_fnmadd_ps(m, _mm512_set1_ps(f32::from_bits(sums[i][g])), c[i][h]);
                            }
                        }
                    }
                }
            } else {
                // Two groups share an activation's scale.
                for p in 0..groups / 2 {
                    let mut t = [[_mm512_setzero_ps(); 2]; NC];
                    for odd in 0..2 {
                        let g = 2 * p + odd;
                        let a = dots(g);
                        for h in 0..2 {
                            let (s, m) = (rows(&tile.scale, g, h), rows(&tile.min, g, h));
                            for i in 0..NC {
                                let a = _mm512_cvtepi32_ps(a[i][h]);
                                t[i][h] = if odd == 0 { _mm512_mul_ps(a, s) } else { _mm512_fmadd_ps(a, s, t[i][h]) };
                                if MIN {
                                    c[i][h] = _mm512_fnmadd_ps(m, _mm512_set1_ps(f32::from_bits(sums[i][g])), c[i][h]);
                                }
                            }
                        }
                    }
                    for i in 0..NC {
                        let d = _mm512_set1_ps(x[i].d[p]);
                        for h in 0..2 {
                            c[i][h] = _mm512_fmadd_ps(t[i][h], d, c[i][h]);
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

    fn gemm<const G: usize, const MIN: bool, const COLS: usize>(
        k: &Kernel, w: Panel<'_>, x: Acts<'_>, out: &mut Out<'_>, scratch: &mut Scratch,
    ) {
        align_stack!();
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

/// The matrix-vector kernel of each format, and its unpacker to memory: of a whole slab, or of the blocks that end a row.
macro_rules! kernels {
    ($($format:ident $unpack:ident $bytes:literal $group:literal $min:literal $order:ident;)*) => {
        mod gemvs {
            use super::*;
            avx512! {$(
                pub fn $unpack(_: &Kernel, w: Panel<'_>, x: Acts<'_>, out: &mut Out<'_>, scratch: &mut Scratch) {
                    gemv::<$group, $min, { Order::$order }, $bytes>(|b| slab::$unpack(b), w, x, out, scratch);
                }
            )*}
        }

        mod stores {
            use super::*;
            avx512! {$(
                pub fn $unpack(b: &[u8], codes: &mut Codes) {
                    let end;
                    let whole = match b.try_into() {
                        Ok(whole) => whole,
                        Err(_) => {
                            end = padded::<$bytes>(b);
                            &end
                        }
                    };
                    store::<$group, { Order::$order }>(slab::$unpack(whole), codes);
                }
            )*}
        }

        fn gemv_of(format: Format) -> Run {
            match format {
                $(Format::$format => gemvs::$unpack,)*
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

avx512! {
    /// A slab to memory.
    fn store<const G: usize, const ORDER: u8>(slab: Slab, codes: &mut Codes) {
        let q = slab::in_order::<ORDER>(slab.q);
        // SAFETY: 256 bytes and 16 floats are what the arrays hold.
        unsafe {
            for (j, q) in q.into_iter().enumerate() {
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
}
