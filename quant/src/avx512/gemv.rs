//! A matrix times a few columns: four rows side by side, unpacked to registers.

mod single;

use super::slab::{self, Order, Slab, floats, signed};
use crate::act::{Acts, Q8Block};
use crate::isa::avx512;
use crate::panel::{Out, Panel, Rows, Scratch, align_stack};
use single::{Single, Single16, gemv_single16, gemv_single32, singles16, singles32};
use std::arch::x86_64::*;

/// Rows that the gemv reads side by side.
const STREAMS: usize = 4;

/// What the gemv needs of one column's slab, in the order of its lanes. A sum is `-d` times that of a group's values (minimums
/// are taken off), and lies as `Slab::min` does.
#[derive(Clone, Copy, bytemuck::Zeroable, bytemuck::Pod)]
#[repr(C, align(64))]
struct Column {
    q: [[i8; 64]; 4],
    start: [i32; 16],
    d: [f32; 16],
    sum: [f32; 16],
}

/// Two columns' slab, for formats with groups of 32: scales and sums lie as a vector of [`folded`] dots.
#[derive(Clone, Copy, bytemuck::Zeroable, bytemuck::Pod)]
#[repr(C, align(64))]
struct Pair {
    q: [[[i8; 64]; 4]; 2],
    start: [[i32; 16]; 2],
    d: [f32; 16],
    sum: [f32; 16],
}

/// Which 16 weights a lane of `transposed` vectors belongs to.
const fn sixteenths(order: u8) -> [i32; 16] {
    match order {
        Order::PAIRED | Order::PAIRED_IQ4 | Order::PAIRED_MXFP4 => {
            [0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15]
        }
        Order::HALVES | Order::NIBBLES => [0, 2, 8, 10, 1, 3, 9, 11, 4, 6, 12, 14, 5, 7, 13, 15],
        Order::QUARTERS | Order::THIRDS => [0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15],
        _ => [0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15],
    }
}

/// The group of 32 that each lane of [`folded`] vectors belongs to.
const fn folded_groups(order: u8) -> [i32; 16] {
    let mut groups = [0; 16];
    let mut lane = 0;
    while lane < 16 {
        // As `halves` takes the first of each.
        let from = if Order::is_paired(order) { lane / 4 * 4 + 2 * (lane % 2) } else { lane / 4 % 2 * 8 + lane % 4 };
        groups[lane] = sixteenths(order)[from] / 2;
        lane += 1;
    }
    groups
}

/// The lanes of [`folded`] vectors that are the first column's.
const fn first_column(order: u8) -> u16 {
    if Order::is_paired(order) { 0x3333 } else { 0x00FF }
}

avx512! {
    /// Transposes 4 x 4 dwords in each 128-bit lane: dword `4 a + v` of vector `j` is dword `j` of lane `a` of vector `v`.
    /// A dot of four vectors then has the sum of one part in each lane, and needs one conversion and one scale in all.
    #[inline]
    fn transposed(v: [__m512i; 4]) -> [__m512i; 4] {
        let (a, b) = (_mm512_unpacklo_epi32(v[0], v[1]), _mm512_unpackhi_epi32(v[0], v[1]));
        let (c, d) = (_mm512_unpacklo_epi32(v[2], v[3]), _mm512_unpackhi_epi32(v[2], v[3]));
        [
            _mm512_unpacklo_epi64(a, c),
            _mm512_unpackhi_epi64(a, c),
            _mm512_unpacklo_epi64(b, d),
            _mm512_unpackhi_epi64(b, d),
        ]
    }

    /// The codes of a slab, [`transposed`]. Where vectors share bytes, those are transposed (each dword of the first two vectors' and
    /// of the last two's, twice) before codes are taken out of them, with half of the shuffles.
    #[inline]
    fn transposed_codes<const ORDER: u8>(q: [__m512i; 4]) -> [__m512i; 4] {
        if !Order::shares_bytes(ORDER) {
            return transposed(slab::apart::<ORDER>(q));
        }
        let (x, y) = (_mm512_castsi512_ps(q[0]), _mm512_castsi512_ps(q[2]));
        let bytes = [
            _mm512_shuffle_ps::<0x00>(x, y),
            _mm512_shuffle_ps::<0x55>(x, y),
            _mm512_shuffle_ps::<0xAA>(x, y),
            _mm512_shuffle_ps::<0xFF>(x, y),
        ];
        let codes = |j: usize| slab::codes::<ORDER>([0, 1, 2, 3], _mm512_castps_si512(bytes[j]));
        [codes(0), codes(1), codes(2), codes(3)]
    }

    #[inline]
    fn ints(x: &[i32; 16]) -> __m512i {
        // SAFETY: 64 readable bytes.
        unsafe { _mm512_loadu_si512(x.as_ptr().cast()) }
    }

    /// A column's slab: values in the order of the codes, scales of its eight groups of 32, sums of 16 values each.
    #[inline]
    fn column<const ORDER: u8>(x: &Q8Block) -> ([__m512i; 4], __m512, __m512i) {
        let mut q = [_mm512_setzero_si512(); 4];
        for j in 0..4 {
            q[j] = signed(&x.q.as_chunks().0[j]);
        }
        // SAFETY: both arrays are 32 bytes.
        let (d, sums) = unsafe { (_mm256_loadu_ps(x.d.as_ptr()), _mm256_loadu_si256(x.sums.as_ptr().cast())) };
        (slab::arranged::<ORDER>(q), _mm512_castps256_ps512(d), _mm512_cvtepi16_epi32(sums))
    }

    /// Sums of 32 values from those of 16, in the lower half.
    #[inline]
    fn group_sums(sums: __m512i) -> __m512i {
        let pairs = _mm512_add_epi32(sums, _mm512_shuffle_epi32::<0b10_11_00_01>(sums));
        _mm512_castsi256_si512(_mm512_cvtepi64_epi32(pairs))
    }

    /// Sums of values, negative: minimums are taken off.
    #[inline]
    fn minus(sums: __m512i) -> __m512 {
        _mm512_cvtepi32_ps(_mm512_sub_epi32(_mm512_setzero_si512(), sums))
    }

    /// Scales for codes that are shifted up: as much smaller.
    #[inline]
    fn shifted_down(d: __m512, shifts: __m512i) -> __m512 {
        _mm512_scalef_ps(d, _mm512_sub_ps(_mm512_setzero_ps(), _mm512_cvtepi32_ps(shifts)))
    }

    /// What an offset of codes, which may be shifted up, adds to a dot, exactly, to be taken off beforehand.
    #[inline]
    fn without_offset(sums: __m512i, offset: i32, shifts: __m512i) -> __m512i {
        _mm512_sllv_epi32(_mm512_mullo_epi32(sums, _mm512_set1_epi32(-offset)), shifts)
    }

    /// A column's slab in lanes of 16 weights: codes, scales, and what the dots start from; and its groups' scales, and sums of
    /// 16 values.
    #[inline]
    fn prepared<const ORDER: u8>(x: &Q8Block, offset: i32) -> ([__m512i; 4], __m512, __m512i, (__m512, __m512i)) {
        let lanes = ints(&const { sixteenths(ORDER) });
        // A lane's codes are those of vector `lane % 4`.
        let [a, b, c, d] = Order::shifts(ORDER).map(|s| s as i32);
        let shifts = _mm512_setr_epi32(a, b, c, d, a, b, c, d, a, b, c, d, a, b, c, d);
        let (q, d, sums) = column::<ORDER>(x);
        let scales = shifted_down(_mm512_permutexvar_ps(_mm512_srli_epi32::<1>(lanes), d), shifts);
        (transposed(q), scales, without_offset(_mm512_permutexvar_epi32(lanes, sums), offset, shifts), (d, sums))
    }

    /// Stores codes and starts that were [`prepared`].
    #[inline]
    fn store_codes(q: [__m512i; 4], start: __m512i, to: (&mut [[i8; 64]; 4], &mut [i32; 16])) {
        // SAFETY: 64 aligned bytes each.
        unsafe {
            for j in 0..4 {
                _mm512_store_si512(to.0[j].as_mut_ptr().cast(), q[j]);
            }
            _mm512_store_si512(to.1.as_mut_ptr().cast(), start);
        }
    }

    /// Stores scales and sums.
    #[inline]
    fn store_scales(d: __m512, sum: __m512, to: (&mut [f32; 16], &mut [f32; 16])) {
        // SAFETY: 64 aligned bytes each.
        unsafe {
            _mm512_store_ps(to.0.as_mut_ptr(), d);
            _mm512_store_ps(to.1.as_mut_ptr(), sum);
        }
    }

    /// Prepares the columns of all slabs, (slabs, n), for formats with groups of 16.
    fn columns<const ORDER: u8>(x: Acts<'_>, offset: i32, to: &mut [Column]) {
        for (s, to) in to.chunks_exact_mut(x.n()).enumerate() {
            for (to, x) in to.iter_mut().zip(x.q8(s)) {
                let (q, scales, start, (d, sums)) = prepared::<ORDER>(x, offset);
                // As `Slab::min` lies.
                let twice = _mm512_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7);
                let sum = _mm512_mul_ps(_mm512_permutexvar_ps(twice, d), minus(sums));
                store_codes(q, start, (&mut to.q, &mut to.start));
                store_scales(scales, sum, (&mut to.d, &mut to.sum));
            }
        }
    }

    /// Prepares the columns of all slabs two by two, (slabs, pairs), for formats with groups of 32. An odd last column is
    /// paired with itself.
    fn pairs<const ORDER: u8>(x: Acts<'_>, offset: i32, to: &mut [Pair]) {
        let groups = _mm512_srli_epi32::<1>(ints(&const { sixteenths(ORDER) }));
        for (s, to) in to.chunks_exact_mut(x.n().div_ceil(2)).enumerate() {
            for (to, x) in to.iter_mut().zip(x.q8(s).chunks(2)) {
                let (mut scales, mut sums) = ([_mm512_setzero_si512(); 2], [_mm512_setzero_si512(); 2]);
                for i in 0..2 {
                    let (q, of_lanes, start, (d, sixteen)) = prepared::<ORDER>(&x[i.min(x.len() - 1)], offset);
                    let sum = _mm512_mul_ps(minus(group_sums(sixteen)), d);
                    scales[i] = _mm512_castps_si512(of_lanes);
                    sums[i] = _mm512_permutexvar_epi32(groups, _mm512_castps_si512(sum));
                    store_codes(q, start, (&mut to.q[i], &mut to.start[i]));
                }
                // What belongs to a group is the same in both of its halves.
                let ([d, _], [sum, _]) = (halves::<ORDER>(scales), halves::<ORDER>(sums));
                store_scales(_mm512_castsi512_ps(d), _mm512_castsi512_ps(sum), (&mut to.d, &mut to.sum));
            }
        }
    }

    /// Of vectors of two columns, in which a lane is 16 weights: the lanes of the first half of each group of 32, and those of
    /// the second.
    #[inline]
    fn halves<const ORDER: u8>([a, b]: [__m512i; 2]) -> [__m512i; 2] {
        if Order::is_paired(ORDER) {
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

    /// What the dots of a column start from.
    #[inline]
    fn start<const MIN: bool>(start: &[i32; 16]) -> __m512i {
        // SAFETY: 64 aligned bytes, as every field of a prepared column is.
        if MIN { _mm512_setzero_si512() } else { unsafe { _mm512_load_si512(start.as_ptr().cast()) } }
    }

    /// Four rows' slabs, `transposed`, times one column's.
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

    /// Dots times the scales of both sides, and the minimums times the column's sums, added to `acc`.
    #[inline]
    fn scaled<const MIN: bool>(
        dots: __m512i, (scale, min): (__m512, __m512), (d, sum): (&[f32; 16], &[f32; 16]), acc: __m512,
    ) -> __m512 {
        let acc = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dots), _mm512_mul_ps(scale, floats(d)), acc);
        if MIN { _mm512_fmadd_ps(min, floats(sum), acc) } else { acc }
    }

    /// The sums of four rows' vectors, to column `c`.
    #[inline]
    fn put<const BYTES: usize>(sums: [__m512; STREAMS], rows: &Rows<STREAMS, BYTES>, c: usize, out: &mut Out<'_>) {
        let totals = totals(sums);
        for (r, row) in rows.each() {
            out.column(c, row, 1)[0] = totals[r];
        }
    }

    /// Four rows' slabs times `N` columns' of a pair, added to `acc`. Slabs are `transposed`; their scales and minimums are those of
    /// the folded lanes. Lanes of a column that is left out take the other's dots.
    #[inline]
    fn accumulate_pair<const MIN: bool, const ORDER: u8, const N: usize>(
        slabs: &[Slab; STREAMS], x: &Pair, acc: &mut [[f32; 16]; STREAMS],
    ) {
        let first = dots::<MIN>(slabs, &x.q[0], &x.start[0]);
        let second = if N == 2 { dots::<MIN>(slabs, &x.q[1], &x.start[1]) } else { first };
        for r in 0..STREAMS {
            let dots = folded::<ORDER>([first[r], second[r]]);
            let sum = scaled::<MIN>(dots, (slabs[r].scale, slabs[r].min), (&x.d, &x.sum), floats(&acc[r]));
            // SAFETY: 16 floats.
            unsafe { _mm512_storeu_ps(acc[r].as_mut_ptr(), sum) };
        }
    }

    /// Four rows times several columns, in formats with groups of 32: two columns share a vector of dots, of which each has
    /// eight. `acc` is (pairs, rows).
    #[inline]
    fn gemv_pairs<const MIN: bool, const ORDER: u8, const BYTES: usize>(
        unpack: impl Fn(&[u8; BYTES]) -> Slab, w: &Panel<'_>, step: usize, n: usize, cols: &[Pair],
        acc: &mut [[f32; 16]], out: &mut Out<'_>,
    ) {
        let groups = ints(&const { folded_groups(ORDER) });
        let rows = Rows::<STREAMS, BYTES>::at(w, step);
        let unpacked = |b: &[u8; BYTES]| {
            let slab = unpack(b);
            let scale = _mm512_permutexvar_ps(groups, slab.scale);
            let min = _mm512_permutexvar_ps(_mm512_or_si512(groups, _mm512_set1_epi32(8)), slab.scale);
            Slab { q: transposed_codes::<ORDER>(slab.q), scale, min }
        };
        acc.fill([0.0; 16]);
        for (s, x) in cols.chunks_exact(n.div_ceil(2)).take(w.slabs()).enumerate() {
            let block = |r: usize| rows.slab(w, r, s);
            let slabs = [unpacked(block(0)), unpacked(block(1)), unpacked(block(2)), unpacked(block(3))];
            let acc = acc.as_chunks_mut::<STREAMS>().0;
            for (x, acc) in x.iter().zip(&mut *acc).take(n / 2) {
                accumulate_pair::<MIN, ORDER, 2>(&slabs, x, acc);
            }
            if n % 2 == 1 {
                accumulate_pair::<MIN, ORDER, 1>(&slabs, &x[n / 2], &mut acc[n / 2]);
            }
        }
        for (c, acc) in acc.as_chunks::<STREAMS>().0.iter().enumerate() {
            let totals = pair_totals::<ORDER>([floats(&acc[0]), floats(&acc[1]), floats(&acc[2]), floats(&acc[3])]);
            for (c, totals) in (2 * c..n).zip(totals) {
                for (r, row) in rows.each() {
                    out.column(c, row, 1)[0] = totals[r];
                }
            }
        }
    }

    /// Four rows times several columns, in formats with groups of 16. `acc` is (n, rows).
    #[inline]
    fn gemv_columns<const MIN: bool, const ORDER: u8, const BYTES: usize>(
        unpack: impl Fn(&[u8; BYTES]) -> Slab, w: &Panel<'_>, step: usize, n: usize, cols: &[Column],
        acc: &mut [[f32; 16]], out: &mut Out<'_>,
    ) {
        let lanes = ints(&const { sixteenths(ORDER) });
        let rows = Rows::<STREAMS, BYTES>::at(w, step);
        let unpacked = |b: &[u8; BYTES]| {
            let slab = unpack(b);
            let q = transposed_codes::<ORDER>(slab.q);
            Slab { q, scale: _mm512_permutexvar_ps(lanes, slab.scale), min: slab.min }
        };
        acc.fill([0.0; 16]);
        for (s, x) in cols.chunks_exact(n).take(w.slabs()).enumerate() {
            let block = |r: usize| rows.slab(w, r, s);
            let slabs = [unpacked(block(0)), unpacked(block(1)), unpacked(block(2)), unpacked(block(3))];
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

    /// The lanes of pairs of vectors, each two added.
    #[inline]
    fn fold(a: __m512, b: __m512) -> __m512 {
        _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b))
    }

    /// The same for pairs of such pairs: each quarter has a sum of each of four vectors.
    #[inline]
    fn fold_pairs(x: __m512, y: __m512) -> __m512 {
        let (x, y) = (_mm512_castps_pd(x), _mm512_castps_pd(y));
        _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(x, y)), _mm512_castpd_ps(_mm512_unpackhi_pd(x, y)))
    }

    /// The halves of a vector, added.
    #[inline]
    fn half_sums(v: __m512) -> __m256 {
        _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps::<1>(v))
    }

    /// The halves of a half, added.
    #[inline]
    fn quarter_sums(v: __m256) -> [f32; STREAMS] {
        let v = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps::<1>(v));
        let mut sums = [0.0; STREAMS];
        // SAFETY: four floats.
        unsafe { _mm_storeu_ps(sums.as_mut_ptr(), v) };
        sums
    }

    /// The sum of each vector's lanes.
    #[inline]
    fn totals(v: [__m512; STREAMS]) -> [f32; STREAMS] {
        quarter_sums(half_sums(fold_pairs(fold(v[0], v[1]), fold(v[2], v[3]))))
    }

    /// The sums of each [`folded`] vector's lanes, those of either column, in the order of [`totals`] of vectors in which the
    /// other's are zero.
    #[inline]
    fn pair_totals<const ORDER: u8>(v: [__m512; STREAMS]) -> [[f32; STREAMS]; 2] {
        if Order::is_paired(ORDER) {
            let first = fold_pairs(_mm512_unpacklo_ps(v[0], v[1]), _mm512_unpacklo_ps(v[2], v[3]));
            let second = fold_pairs(_mm512_unpackhi_ps(v[0], v[1]), _mm512_unpackhi_ps(v[2], v[3]));
            [quarter_sums(half_sums(first)), quarter_sums(half_sums(second))]
        } else {
            let both = fold_pairs(fold(v[0], v[1]), fold(v[2], v[3]));
            [quarter_sums(_mm512_castps512_ps256(both)), quarter_sums(_mm512_extractf32x8_ps::<1>(both))]
        }
    }

    #[inline]
    pub(super) fn gemv<const G: usize, const MIN: bool, const ORDER: u8, const BYTES: usize>(
        unpack: impl Fn(&[u8; BYTES]) -> Slab + Copy, w: Panel<'_>, x: Acts<'_>, out: &mut Out<'_>, scratch: &mut Scratch,
    ) {
        align_stack!();
        let (n, offset) = (x.n(), w.format.spec().codes.as_ref().expect("installed for formats with codes").offset);
        let steps = 0..Rows::<STREAMS, BYTES>::steps(&w);
        match (G, n) {
            (32, 1) => {
                let cols = scratch.sums.take::<Single>(w.slabs());
                singles32::<ORDER>(x, offset, cols);
                steps.for_each(|i| gemv_single32::<MIN, ORDER, BYTES>(unpack, &w, i, cols, out));
            }
            (_, 1) => {
                let cols = scratch.sums.take::<Single16>(w.slabs());
                singles16::<ORDER>(x, offset, cols);
                steps.for_each(|i| gemv_single16::<MIN, ORDER, BYTES>(unpack, &w, i, cols, out));
            }
            (32, _) => {
                let pairs_of_slab = n.div_ceil(2);
                let cols = scratch.sums.take::<Pair>(w.slabs() * pairs_of_slab);
                pairs::<ORDER>(x, offset, cols);
                let acc = scratch.floats.take::<[f32; 16]>(pairs_of_slab * STREAMS);
                steps.for_each(|i| gemv_pairs::<MIN, ORDER, BYTES>(unpack, &w, i, n, cols, acc, out));
            }
            _ => {
                let cols = scratch.sums.take::<Column>(w.slabs() * n);
                columns::<ORDER>(x, offset, cols);
                let acc = scratch.floats.take::<[f32; 16]>(n * STREAMS);
                steps.for_each(|i| gemv_columns::<MIN, ORDER, BYTES>(unpack, &w, i, n, cols, acc, out));
            }
        }
    }
}
