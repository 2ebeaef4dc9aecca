//! Products with one column: decode. Unpacking is amortized over two rows, where it cannot be over columns.
//!
//! ```text
//! groups of 32:  two rows' vectors transposed together; a lane has 16 weights of one row; halves of a group are added
//! groups of 16:  two rows' vectors interleaved; a lane has 8 weights of one row; halves of a group are added
//! ```
//!
//! Vectors that share their bytes ([`Order`]) are transposed or interleaved once, as bytes, and codes taken out of them behind that. Sums
//! are those of several columns to the last bit: the same numbers meet in the same order, and at a row's end they are put into
//! the same lanes.

use super::{
    STREAMS, column, first_column, folded_groups, group_sums, ints, minus, put, scaled, shifted_down, sixteenths,
    start, transposed, without_offset,
};
use crate::act::Acts;
use crate::avx512::slab::{self, Order, Slab, signed};
use crate::isa::avx512;
use crate::panel::{Out, Panel, Rows};
use std::arch::x86_64::*;

/// A slab of a single column, for formats with groups of 32, as [`Two`] rows lie.
#[derive(Clone, Copy, bytemuck::Zeroable, bytemuck::Pod)]
#[repr(C, align(64))]
pub(super) struct Single {
    q: [[[i8; 64]; 4]; 2],
    start: [i32; 16],
    d: [f32; 16],
    sum: [f32; 16],
}

/// The same for formats with groups of 16, as two rows' slabs lie that are `interleaved`: the two vectors for each vector of codes,
/// and what belongs to each vector of sums.
#[derive(Clone, Copy, bytemuck::Zeroable, bytemuck::Pod)]
#[repr(C, align(64))]
pub(super) struct Single16 {
    q: [[[i8; 64]; 2]; 4],
    start: [[i32; 16]; 2],
    d: [[f32; 16]; 2],
    sum: [[f32; 16]; 2],
}

/// The same slab of two rows of a format with groups of 32, `transposed` together: of vectors 0 and 2 of both, and of vectors 1 and 3.
/// Those may be of the same bytes, and then this takes half of the shuffles.
struct Two {
    q: [[__m512i; 4]; 2],
    scale: __m512,
    min: __m512,
}

/// What is in each lane of the sums of [`Two`] rows.
struct Lanes {
    /// The group of 32.
    groups: [i32; 16],
    /// Where its scale is: in the first row's scales, or 16 further on in the second's.
    scales: [i32; 16],
    /// Bits by which the codes are shifted up.
    shifts: [i32; 16],
}

impl Lanes {
    const fn of(order: u8) -> Lanes {
        let mut to = Lanes { groups: [0; 16], scales: [0; 16], shifts: [0; 16] };
        let mut lane = 0;
        while lane < 16 {
            // Of four lanes, two are of each row: of its vectors 0 and 2 (with those, 1 and 3). A block's nibbles are in two
            // vectors; otherwise a group is in two parts of one.
            let (quarter, even) = (lane / 4, lane % 2 * 2);
            let (vector, part) =
                if Order::is_paired(order) { (even, quarter) } else { (even + quarter / 2, quarter % 2 * 2) };
            to.groups[lane] = sixteenths(order)[4 * part + vector] / 2;
            to.scales[lane] = to.groups[lane] + (lane % 4 / 2 * 16) as i32;
            to.shifts[lane] = Order::shifts(order)[vector] as i32;
            lane += 1;
        }
        to
    }
}

/// For each lane of the first column of [`folded`](super::folded) vectors, the lane of the first of [`Two`] rows with the same
/// group.
const fn folded_from(order: u8) -> [i32; 16] {
    let mut lanes = [0; 16];
    let mut lane = 0;
    while lane < 16 {
        let mut from = 0;
        while from % 4 > 1 || Lanes::of(order).groups[from] != folded_groups(order)[lane] {
            from += 1;
        }
        lanes[lane] = from as i32;
        lane += 1;
    }
    lanes
}

/// Which 16 weights are in each lane of vector `half` of the sums of two rows `interleaved`, and in which lane several columns have
/// their sum.
const fn interleaved_lanes(order: u8, half: usize) -> ([i32; 16], [i32; 16]) {
    let (mut which, mut lanes) = ([0; 16], [0; 16]);
    let mut lane = 0;
    while lane < 16 {
        let to = lane / 4 * 4 + 2 * half + lane % 4 / 2;
        (which[lane], lanes[lane]) = (sixteenths(order)[to], to as i32);
        lane += 1;
    }
    (which, lanes)
}

avx512! {
    /// Prepares the slabs of a single column, in formats with groups of 32.
    pub(super) fn singles32<const ORDER: u8>(x: Acts<'_>, offset: i32, to: &mut [Single]) {
        let lanes = const { &Lanes::of(ORDER) };
        let (groups, shifts) = (ints(&lanes.groups), ints(&lanes.shifts));
        for (s, to) in to.iter_mut().enumerate() {
            let (q, d, sums) = column::<ORDER>(&x.q8(s)[0]);
            let q = [transposed([q[0], q[2], q[0], q[2]]), transposed([q[1], q[3], q[1], q[3]])];
            let (d, sums) = (_mm512_permutexvar_ps(groups, d), _mm512_permutexvar_epi32(groups, group_sums(sums)));
            // SAFETY: every field is as long as the vectors stored to it.
            unsafe {
                for (to, q) in to.q.as_flattened_mut().iter_mut().zip(q.as_flattened()) {
                    _mm512_store_si512(to.as_mut_ptr().cast(), *q);
                }
                _mm512_store_si512(to.start.as_mut_ptr().cast(), without_offset(sums, offset, shifts));
                _mm512_store_ps(to.d.as_mut_ptr(), shifted_down(d, shifts));
                _mm512_store_ps(to.sum.as_mut_ptr(), _mm512_mul_ps(minus(sums), d));
            }
        }
    }

    /// Prepares the slabs of a single column, in formats with groups of 16.
    pub(super) fn singles16<const ORDER: u8>(x: Acts<'_>, offset: i32, to: &mut [Single16]) {
        let vectors = Order::shifts(ORDER).map(|s| _mm512_set1_epi32(s as i32));
        for (s, to) in to.iter_mut().enumerate() {
            let (q, d, sums) = column::<ORDER>(&x.q8(s)[0]);
            // SAFETY: every field is as long as the vectors stored to it.
            unsafe {
                for j in 0..4 {
                    for (to, q) in to.q[j].iter_mut().zip(interleaved(q[j], q[j])) {
                        _mm512_store_si512(to.as_mut_ptr().cast(), q);
                    }
                }
                for half in 0..2 {
                    let (which, lanes) = &const { [interleaved_lanes(ORDER, 0), interleaved_lanes(ORDER, 1)] }[half];
                    let (which, lanes) = (ints(which), ints(lanes));
                    let shifts = _mm512_mask_mov_epi32(vectors[2 * half], 0xCCCC, vectors[2 * half + 1]);
                    let scale = |i| _mm512_permutexvar_ps(_mm512_srli_epi32::<1>(i), d);
                    let start = without_offset(_mm512_permutexvar_epi32(which, sums), offset, shifts);
                    let sum = minus(_mm512_permutexvar_epi32(lanes, sums));
                    _mm512_store_si512(to.start[half].as_mut_ptr().cast(), start);
                    _mm512_store_ps(to.d[half].as_mut_ptr(), shifted_down(scale(which), shifts));
                    _mm512_store_ps(to.sum[half].as_mut_ptr(), _mm512_mul_ps(scale(lanes), sum));
                }
            }
        }
    }

    /// Two rows' slabs as they meet a single column.
    #[inline]
    fn two<const ORDER: u8>(a: Slab, b: Slab) -> Two {
        // Where vectors share bytes, both sets are the same before codes are taken out of them. (But not where what a lane takes
        // depends on its vector.)
        let late = ORDER != Order::QUARTERS;
        let (x, y) = if late { (a.q, b.q) } else { (slab::apart::<ORDER>(a.q), slab::apart::<ORDER>(b.q)) };
        let mut q = [transposed([x[0], x[2], y[0], y[2]]), transposed([x[1], x[3], y[1], y[3]])];
        if late {
            for set in 0..2 {
                for j in 0..4 {
                    q[set][j] = slab::codes::<ORDER>([set; 4], q[set][j]);
                }
            }
        }
        // Minimums are the upper eight of a slab's scales.
        let which = ints(&const { Lanes::of(ORDER) }.scales);
        let scale = _mm512_permutex2var_ps(a.scale, which, b.scale);
        let min = _mm512_permutex2var_ps(a.scale, _mm512_or_si512(which, _mm512_set1_epi32(8)), b.scale);
        Two { q, scale, min }
    }

    /// Four rows' slabs times one column's, added to `acc`: the sums of [`accumulate_pair`] to the last bit, where
    /// [`folded_from`] says.
    #[inline]
    fn accumulate_single<const MIN: bool, const ORDER: u8>(w: [Two; 2], x: &Single, acc: [__m512; 2]) -> [__m512; 2] {
        let mut dots = [[_mm512_setzero_si512(); 2]; 2];
        for j in 0..4 {
            for set in 0..2 {
                // Loaded once for all rows.
                let q = signed(&x.q[set][j]);
                for i in 0..2 {
                    dots[i][set] = _mm512_dpbusd_epi32(dots[i][set], w[i].q[set][j], q);
                }
            }
        }
        let add = |i: usize| {
            let [a, b] = dots[i];
            // The halves of each group.
            let (a, b) = if Order::is_paired(ORDER) {
                (a, b)
            } else {
                (_mm512_shuffle_i64x2::<0x88>(a, b), _mm512_shuffle_i64x2::<0xDD>(a, b))
            };
            let dots = _mm512_add_epi32(_mm512_add_epi32(a, b), start::<MIN>(&x.start));
            scaled::<MIN>(dots, (w[i].scale, w[i].min), (&x.d, &x.sum), acc[i])
        };
        [add(0), add(1)]
    }

    /// Four rows times one column, in formats with groups of 32.
    #[inline]
    pub(super) fn gemv_single32<const MIN: bool, const ORDER: u8, const BYTES: usize>(
        unpack: impl Fn(&[u8; BYTES]) -> Slab, w: &Panel<'_>, step: usize, cols: &[Single], out: &mut Out<'_>,
    ) {
        let rows = Rows::<STREAMS, BYTES>::at(w, step);
        let mut acc = [_mm512_setzero_ps(); 2];
        for (s, x) in cols.iter().enumerate() {
            let slab = |r: usize| unpack(rows.slab(w, r, s));
            let four = [two::<ORDER>(slab(0), slab(1)), two::<ORDER>(slab(2), slab(3))];
            acc = accumulate_single::<MIN, ORDER>(four, x, acc);
        }
        let row = |r: usize| {
            let lanes = _mm512_add_epi32(ints(&const { folded_from(ORDER) }), _mm512_set1_epi32(2 * (r % 2) as i32));
            _mm512_maskz_permutexvar_ps(first_column(ORDER), lanes, acc[r / 2])
        };
        put([row(0), row(1), row(2), row(3)], &rows, 0, out);
    }

    /// Interleaves the dwords of two rows' vectors: lane `4 a + v` is of row `v % 2`, and of part `a`.
    #[inline]
    fn interleaved(a: __m512i, b: __m512i) -> [__m512i; 2] {
        [_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b)]
    }

    /// Two rows' slabs times a single column's, added to `acc`, in formats with groups of 16: the sums of [`gemv_columns`] to the
    /// last bit, in lane `4 a + v` of vector `h` those of row `v % 2` in its lane `4 a + 2 h + v / 2`. Bytes that vectors share
    /// are interleaved once, before codes are taken out of them.
    #[inline]
    fn accumulate_interleaved<const MIN: bool, const ORDER: u8>([a, b]: [Slab; 2], x: &Single16, acc: [__m512; 2]) -> [__m512; 2] {
        let mut dots = [_mm512_setzero_si512(); 4];
        let [p, q, r, s] = [0, 1, 2, 3].map(|j| (a.q[j], b.q[j])).map(|(a, b)| interleaved(a, b));
        for i in 0..2 {
            let codes = slab::apart::<ORDER>([p[i], q[i], r[i], s[i]]);
            for j in 0..4 {
                dots[j] = _mm512_dpbusd_epi32(dots[j], codes[j], signed(&x.q[j][i]));
            }
        }
        let second = _mm512_maskz_set1_epi32(0xAAAA, 16);
        let add = |half: usize| {
            let (even, odd) = (dots[2 * half], dots[2 * half + 1]);
            let dots = _mm512_add_epi32(_mm512_unpacklo_epi64(even, odd), _mm512_unpackhi_epi64(even, odd));
            let dots = _mm512_add_epi32(dots, start::<MIN>(&x.start[half]));
            let (which, lanes) = &const { [interleaved_lanes(ORDER, 0), interleaved_lanes(ORDER, 1)] }[half];
            let (which, lanes) = (ints(which), ints(lanes));
            let scale = _mm512_permutex2var_ps(a.scale, _mm512_or_si512(which, second), b.scale);
            let min = _mm512_permutex2var_ps(a.min, _mm512_or_si512(lanes, second), b.min);
            scaled::<MIN>(dots, (scale, min), (&x.d[half], &x.sum[half]), acc[half])
        };
        [add(0), add(1)]
    }

    /// Four rows, see [`Rows`], times a single column, in formats with groups of 16.
    #[inline]
    pub(super) fn gemv_single16<const MIN: bool, const ORDER: u8, const BYTES: usize>(
        unpack: impl Fn(&[u8; BYTES]) -> Slab, w: &Panel<'_>, step: usize, cols: &[Single16], out: &mut Out<'_>,
    ) {
        let rows = Rows::<STREAMS, BYTES>::at(w, step);
        let mut acc = [[_mm512_setzero_ps(); 2]; 2];
        for (s, x) in cols.iter().enumerate() {
            let slab = |r: usize| unpack(rows.slab(w, r, s));
            // Written out: LLVM would not unroll the loop, and would keep the accumulators in memory.
            acc[0] = accumulate_interleaved::<MIN, ORDER>([slab(0), slab(1)], x, acc[0]);
            acc[1] = accumulate_interleaved::<MIN, ORDER>([slab(2), slab(3)], x, acc[1]);
        }
        let row = |r: usize| {
            let lanes = _mm512_setr_epi32(0, 2, 16, 18, 4, 6, 20, 22, 8, 10, 24, 26, 12, 14, 28, 30);
            let lanes = _mm512_add_epi32(lanes, _mm512_set1_epi32((r % 2) as i32));
            _mm512_permutex2var_ps(acc[r / 2][0], lanes, acc[r / 2][1])
        };
        put([row(0), row(1), row(2), row(3)], &rows, 0, out);
    }
}
