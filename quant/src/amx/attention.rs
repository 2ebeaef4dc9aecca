//! Attention on tiles, for many query rows at once.
//!
//! ```text
//! for each 128 positions:
//!     K blocks and V rows to tiles                                      64 KiB for heads of 128 dimensions, in L2
//!     for each 32 rows:
//!         S = Q K                                                       16 KiB, in L1
//!         m, s; P = 2^(S - m) in bf16                                   8 KiB
//!         O += P V                                                      16 KiB
//! ```
//!
//! The cache lies so that neighbouring dimensions of a K block, and neighbouring positions of V, are two vectors: rounded to
//! bf16 and interleaved they are a row of a tile, whatever the cache's type. That costs as much time as the products of some
//! 60 rows, and 256 share it. Fewer than 16, and heads that are no multiple of 32, stay with AVX-512.
//!
//! Scores are in bits: queries are multiplied by the scale and by log2 e, so that the softmax needs powers of two. A row's
//! sums are made smaller only when its maximum has grown by more than [`SLACK`] bits, which is seldom: until then they are
//! larger than they would be otherwise, by a factor that f32 and bf16 do not mind.

use super::block::{Block, END, before, begin, begin_behind, register};
use super::{ROWS, Tiles, Vector};
use crate::attention::{BLOCK, CHUNK, Cache, FEW, Partial, Queries, load_k, load_v, scale_k};
use crate::avx512::{slab::load512, transpose};
use crate::isa::amx;
use crate::lanes::Avx512;
use crate::panel::{Scratch, align_stack};
use std::arch::asm;
use std::arch::x86_64::*;
use std::f32::consts::{LN_2, LOG2_E};
use std::hint::black_box;
use std::ops::Range;

/// Rows from which tiles are worth it.
const LEAST: usize = 16;
/// Rows that go through the products together.
const ROW_GROUP: usize = 2 * ROWS;
/// Bits by which a score may be above what its row's sums are relative to.
const SLACK: f32 = 8.0;

/// 16 rows of 32 numbers in bf16.
#[derive(Clone, Copy, bytemuck::Zeroable, bytemuck::Pod)]
#[repr(C, align(64))]
struct Tile([[u16; 32]; ROWS]);

/// Indices by which the words of a vector's halves alternate. The compiler must not see what they are: it would move words,
/// which takes longer than bytes.
static INTERLEAVED: Bytes = {
    let (mut order, mut i) = ([0; 64], 0);
    while i < 64 {
        order[i] = (i / 4 * 2 + i / 2 % 2 * 32 + i % 2) as u8;
        i += 1;
    }
    Bytes(order)
};

/// A vector in memory.
#[repr(C, align(64))]
struct Bytes([u8; 64]);

/// The online softmax's state of a group of rows, over the chunks of positions.
struct State<'a> {
    m: &'a mut [Vector; 2],         // what sums are relative to
    s: &'a mut [Vector; ROW_GROUP], // sums of a row, 16 positions apart
    o: &'a mut [Block],             // (head_dim / 32)
}

/// A product of two tiles of rows and two of columns: `steps` tiles each, side by side. Where its sums are, those of the
/// product before, which are stored meanwhile, and those of the next one, whose first tile is loaded.
struct Work {
    a: [*const Tile; 2],
    b: [*const Tile; 2],
    steps: usize,
    c: *mut Block,
    old: *mut Block,
    next: *const Block,
}

/// The functions [`product`], by phase: for sums that begin at zero, and for others.
const PRODUCTS: [[unsafe fn(&Work); 5]; 2] = [
    [product::<0, false>, product::<1, false>, product::<2, false>, product::<3, false>, product::<4, false>],
    [product::<0, true>, product::<1, true>, product::<2, true>, product::<3, true>, product::<4, true>],
];

/// The first step of a product: its sums come into the registers, those of the product before go out, as [`super::block`]
/// has it. `$n0` to `$n3` bring them in.
macro_rules! first {
    ($n0:literal $n1:literal $n2:literal $n3:literal) => {
        concat!(
            $n0,
            "tileloadd tmm5, [{a0} + {row}]\n",
            "tileloadd tmm7, [{b0} + {row}]\n",
            "tileloadd tmm6, [{a1} + {row}]\n",
            "tdpbf16ps tmm{n0}, tmm5, tmm7\n",
            "tilestored [{old} + {row}], tmm{o0}\n",
            $n1,
            "tdpbf16ps tmm{n1}, tmm6, tmm7\n",
            "tileloadd tmm7, [{b1} + {row}]\n",
            "tilestored [{old} + {row} + 1024], tmm{o1}\n",
            $n2,
            "tdpbf16ps tmm{n2}, tmm5, tmm7\n",
            "tilestored [{old} + {row} + 2048], tmm{o2}\n",
            $n3,
            "tdpbf16ps tmm{n3}, tmm6, tmm7\n",
            "tilestored [{old} + {row} + 3072], tmm{o3}\n",
            "/* every operand is to be used: {c} */",
        )
    };
}

/// Assembly with the addresses of step `$s` of a product, and the registers of its phase.
macro_rules! step {
    ($w:ident, $s:expr, $phase:ident; $line:expr $(, $name:ident = $operand:expr)* $(; $($old:ident $i:literal),*)?) => {
        asm!(
            $line,
            a0 = in(reg) $w.a[0].wrapping_add($s), a1 = in(reg) $w.a[1].wrapping_add($s),
            b0 = in(reg) $w.b[0].wrapping_add($s), b1 = in(reg) $w.b[1].wrapping_add($s), row = in(reg) 64u64,
            n0 = const register($phase, 0), n1 = const register($phase, 1),
            n2 = const register($phase, 2), n3 = const register($phase, 3),
            $($name = in(reg) $operand,)*
            $($($old = const before($phase, $i),)*)?
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
            out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
            options(nostack, preserves_flags),
        )
    };
}

amx! {
    /// [`crate::attention::Attention::run`] on tiles.
    ///
    /// # Safety
    /// There are tiles.
    pub(crate) unsafe fn run(
        q: &Queries<'_>, cache: &Cache<'_>, range: Range<usize>, out: &mut Partial<'_>, scratch: &mut Scratch,
    ) {
        let rows = q.limits.len();
        let hd = q.q.len() / rows.max(1);
        if rows < LEAST || q.tokens <= FEW || !hd.is_multiple_of(32) {
            return crate::attention::avx512(q, cache, range, out, scratch);
        }
        align_stack!();
        let (steps, groups) = (hd / 32, rows.div_ceil(ROW_GROUP));
        // Queries (groups, 2, steps); keys (CHUNK / 16, steps); values (head_dim / 16, CHUNK / 32); weights (2, CHUNK / 32).
        let sizes = [groups * 2 * steps, CHUNK / 16 * steps, 2 * steps * (CHUNK / 32)];
        let tiles = scratch.tile.take::<Tile>(sizes.iter().sum::<usize>() + 2 * (CHUNK / 32));
        let (queries, rest) = tiles.split_at_mut(sizes[0]);
        let (keys, rest) = rest.split_at_mut(sizes[1]);
        let (values, weights) = rest.split_at_mut(sizes[2]);
        // Scores (CHUNK / 32), a place for what nobody reads, and outputs (groups, steps).
        let (scores, outputs) = scratch.floats.take::<Block>(CHUNK / 32 + 1 + groups * steps).split_at_mut(CHUNK / 32);
        let (none, outputs) = outputs.split_first_mut().expect("made for it");
        let (m, s) = scratch.sums.take::<Vector>(groups * (2 + ROW_GROUP)).split_at_mut(2 * groups);
        m.fill(Vector([f32::NEG_INFINITY; 16]));
        s.fill(Vector([0.0; 16]));
        for r in 0..groups * ROW_GROUP {
            for step in 0..steps {
                let to = &mut queries[r / ROWS * steps + step].0[r % ROWS];
                match q.q.get(r * hd + 32 * step..).and_then(|q| q.first_chunk()) {
                    Some(x) => put(halves(x, q.scale * LOG2_E), to),
                    None => to.fill(0),
                }
            }
        }
        let seen = q.limits.iter().copied().max().unwrap_or(0).min(range.end);
        // SAFETY: the caller's promise.
        let tiles = unsafe { Tiles::take() };
        for p0 in (range.start..seen).step_by(CHUNK) {
            let p1 = seen.min(p0 + CHUNK);
            let first = p0 == range.start;
            for (i, to) in (0..(p1 - p0).div_ceil(BLOCK)).zip(keys.chunks_exact_mut(steps)) {
                key_tiles(cache, cache.k_block(p0 / BLOCK + i, hd), to);
            }
            value_tiles(cache, p0..p1, hd, values);
            let parts = (p1 - p0).div_ceil(32);
            for (g, queries) in queries.chunks_exact(2 * steps).enumerate() {
                let mut state = State {
                    m: m[2 * g..].first_chunk_mut().expect("two vectors a group"),
                    s: s[ROW_GROUP * g..].first_chunk_mut().expect("a vector a row"),
                    o: &mut outputs[steps * g..][..steps],
                };
                let mut product = |a: &[Tile], b: &[Tile], steps, c: &mut [Block], begun| {
                    // SAFETY: the tiles are taken.
                    unsafe { products(a, b, steps, c, none, begun) }
                };
                // Of the last two K blocks the second may not be there: nobody looks at what comes out for it.
                product(queries, keys, steps, &mut scores[..parts], false);
                softmax(&q.limits[ROW_GROUP * g..], p0..p1, &scores[..parts], weights, &mut state, !first);
                product(weights, values, parts, state.o, !first);
            }
        }
        drop(tiles);
        for (r, ((m_out, s_out), o)) in out.m.iter_mut().zip(&mut *out.s).zip(out.o.chunks_exact_mut(hd)).enumerate() {
            *m_out = m[r / ROWS].0[r % ROWS] * LN_2;
            // SAFETY: 16 aligned floats.
            *s_out = _mm512_reduce_add_ps(unsafe { _mm512_load_ps(s[r].0.as_ptr()) });
            for (step, o) in o.chunks_exact_mut(32).enumerate() {
                let block = &outputs[r / ROW_GROUP * steps + step];
                for (half, o) in o.chunks_exact_mut(16).enumerate() {
                    match seen > range.start {
                        true => o.copy_from_slice(&block[2 * half + r / ROWS % 2].0[r % ROWS]),
                        false => o.fill(0.0),
                    }
                }
            }
        }
    }

    /// `c = a b`, or `c += a b` where `add` says so: 32 rows, and 32 columns for each block of `c`. Of `a` there are two halves,
    /// of `b` two for each block, all equally long, of which the first `steps` tiles count.
    ///
    /// # Safety
    /// The tiles are taken.
    unsafe fn products(a: &[Tile], b: &[Tile], steps: usize, c: &mut [Block], none: &mut Block, add: bool) {
        let (n, stride) = (c.len(), a.len() / 2);
        assert!(steps > 0 && steps <= stride && 2 * n * stride <= b.len());
        let (c, none): (*mut Block, *mut Block) = (c.as_mut_ptr(), none);
        // `none` stands for the block before the first and after the last.
        // SAFETY: of n blocks.
        let at = |i: usize| if i < n { unsafe { c.add(i) } } else { none };
        // SAFETY: the caller's promise; halves of `stride` tiles, checked above.
        unsafe {
            if add {
                begin(at(0));
            }
            for i in 0..n {
                let half = |x: &[Tile], i: usize| x.as_ptr().add(i * stride);
                PRODUCTS[add as usize][i % 5](&Work {
                    a: [half(a, 0), half(a, 1)],
                    b: [half(b, 2 * i), half(b, 2 * i + 1)],
                    steps,
                    c: at(i),
                    old: if i > 0 { at(i - 1) } else { none },
                    next: at(i + 1),
                });
            }
            END[n % 5](if n > 0 { at(n - 1) } else { none });
        }
    }

    /// A block of [`products`]. Five in turn, of the phases 0 to 4, keep C moving.
    ///
    /// # Safety
    /// The tiles are taken, and hold what the phase before left, or [`begin`]. The addresses are of what they say.
    unsafe fn product<const PHASE: usize, const ADD: bool>(w: &Work) {
        // SAFETY: the caller's promise.
        unsafe {
            if ADD {
                step!(w, 0, PHASE; first!(
                    "" "tileloadd tmm{n1}, [{c} + {row} + 1024]\n" "tileloadd tmm{n2}, [{c} + {row} + 2048]\n"
                    "tileloadd tmm{n3}, [{c} + {row} + 3072]\n"
                ), c = w.c, old = w.old; o0 0, o1 1, o2 2, o3 3);
            } else {
                step!(w, 0, PHASE; first!(
                    "tilezero tmm{n0}\n" "tilezero tmm{n1}\n" "tilezero tmm{n2}\n" "tilezero tmm{n3}\n"
                ), c = w.c, old = w.old; o0 0, o1 1, o2 2, o3 3);
            }
            for s in 1..w.steps {
                step!(w, s, PHASE; concat!(
                    "tileloadd tmm5, [{a0} + {row}]\n",
                    "tileloadd tmm7, [{b0} + {row}]\n",
                    "tdpbf16ps tmm{n0}, tmm5, tmm7\n",
                    "tileloadd tmm6, [{a1} + {row}]\n",
                    "tdpbf16ps tmm{n1}, tmm6, tmm7\n",
                    "tileloadd tmm7, [{b1} + {row}]\n",
                    "tdpbf16ps tmm{n2}, tmm5, tmm7\n",
                    "tdpbf16ps tmm{n3}, tmm6, tmm7",
                ));
            }
            if ADD {
                begin_behind::<PHASE>(w.next);
            }
        }
    }

    // ---- the softmax -------------------------------------------------------------------------------------------------

    /// Scores of a group of rows for up to [`CHUNK`] positions to weights, of which each half has as many tiles as `scores` has
    /// blocks. `limits` are those of the group's rows, and of rows behind them. Sums of positions before, in `state.o` too
    /// where `begun` says that there are any, are made relative to larger maxima.
    fn softmax(
        limits: &[usize], positions: Range<usize>, scores: &[Block], weights: &mut [Tile], state: &mut State<'_>,
        begun: bool,
    ) {
        for half in 0..2 {
            let limits: [u32; ROWS] = std::array::from_fn(|r| match limits.get(half * ROWS + r) {
                Some(&limit) => (limit.clamp(positions.start, positions.end) - positions.start) as u32,
                None => 0,
            });
            if limits.iter().all(|&l| l as usize >= 32 * scores.len()) {
                half_softmax::<false>(half, &limits, scores, weights, state, begun);
            } else {
                half_softmax::<true>(half, &limits, scores, weights, state, begun);
            }
        }
    }

    /// The upper or the lower 16 rows of [`softmax`], of which `MASKED` see only so many positions.
    fn half_softmax<const MASKED: bool>(
        half: usize, limits: &[u32; ROWS], scores: &[Block], weights: &mut [Tile], state: &mut State<'_>, begun: bool,
    ) {
        align_stack!();
        let seen = |r: usize, i: usize| match MASKED {
            // Index 16 and more leaves all.
            true => _bzhi_u32(0xFFFF, limits[r].saturating_sub(16 * i as u32)) as __mmask16,
            false => 0xFFFF,
        };
        // Two vectors for each block.
        let score = |r: usize, i: usize| load(&scores[i / 2][2 * (i % 2) + half].0[r]);
        let mut highest = [_mm512_setzero_si512(); ROWS];
        for (r, highest) in highest.iter_mut().enumerate() {
            let mut max = _mm512_set1_ps(f32::NEG_INFINITY);
            for i in 0..2 * scores.len() {
                // NaN is passed over.
                max = _mm512_mask_max_ps(max, seen(r, i), score(r, i), max);
            }
            *highest = _mm512_castps_si512(max);
        }
        transpose(&mut highest);
        let highest = highest.map(|v| _mm512_castsi512_ps(v));
        let m = highest.into_iter().reduce(|a, b| _mm512_max_ps(a, b)).expect("sixteen");
        let old = load(&state.m[half].0);
        let grown = _mm512_cmp_ps_mask::<_CMP_GT_OQ>(m, _mm512_add_ps(old, _mm512_set1_ps(SLACK)));
        if grown != 0 {
            let new = _mm512_mask_mov_ps(old, grown, m);
            store(new, &mut state.m[half].0);
            let mut fade = Vector([0.0; 16]);
            store(exp2(_mm512_sub_ps(old, new)), &mut fade.0);
            for r in (0..ROWS).filter(|r| grown >> r & 1 == 1) {
                let fade = _mm512_set1_ps(fade.0[r]);
                let faded = |v: &mut [f32; 16]| store(_mm512_mul_ps(load(v), fade), v);
                faded(&mut state.s[half * ROWS + r].0);
                if begun {
                    for o in state.o.iter_mut() {
                        faded(&mut o[half].0[r]);
                        faded(&mut o[2 + half].0[r]);
                    }
                }
            }
        }
        let stride = weights.len() / 2;
        for r in 0..ROWS {
            let m = _mm512_set1_ps(state.m[half].0[r]);
            let mut sum = load(&state.s[half * ROWS + r].0);
            for b in 0..scores.len() {
                let weight = |i: usize| {
                    let e = exp2(_mm512_sub_ps(score(r, i), m));
                    if MASKED { _mm512_maskz_mov_ps(seen(r, i), e) } else { e }
                };
                let (low, high) = (weight(2 * b), weight(2 * b + 1));
                sum = _mm512_add_ps(sum, _mm512_add_ps(low, high));
                put(super::bf16(low, high), &mut weights[half * stride + b].0[r]);
            }
            store(sum, &mut state.s[half * ROWS + r].0);
        }
    }

    /// Two to the power of each lane, within 3e-6 of it; for less than -125 some 1e-38; NaN stays. Not for more than 127.
    ///
    /// A whole number, which goes into the exponent, and a rest of at most a half, for which a polynomial of degree 4 has the
    /// least relative error.
    #[inline]
    fn exp2(x: __m512) -> __m512 {
        // Where adding it leaves whole numbers, in the low bits.
        let round = _mm512_set1_ps(12_582_912.0);
        // Of a NaN, the second operand is what comes out.
        let x = _mm512_max_ps(_mm512_set1_ps(-125.0), x);
        let shifted = _mm512_add_ps(x, round);
        let f = _mm512_sub_ps(x, _mm512_sub_ps(shifted, round));
        let mut p = _mm512_set1_ps(0.009_570_102);
        for c in [0.055_917_87, 0.240_247_44, 0.693_121_8, 0.999_999_3] {
            p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(c));
        }
        let power = _mm512_slli_epi32::<23>(_mm512_castps_si512(shifted));
        _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(p), power))
    }

    // ---- to tiles ----------------------------------------------------------------------------------------------------

    #[inline]
    fn load(x: &[f32; 16]) -> __m512 {
        // SAFETY: 64 readable bytes.
        unsafe { _mm512_loadu_ps(x.as_ptr()) }
    }

    #[inline]
    fn store(v: __m512, to: &mut [f32; 16]) {
        // SAFETY: 64 writable bytes.
        unsafe { _mm512_storeu_ps(to.as_mut_ptr(), v) }
    }

    #[inline]
    fn put(v: __m512i, to: &mut [u16; 32]) {
        // SAFETY: 64 writable bytes.
        unsafe { _mm512_storeu_si512(to.as_mut_ptr().cast(), v) }
    }

    /// 32 numbers times `by`, in bf16.
    #[inline]
    fn halves(x: &[f32; 32], by: f32) -> __m512i {
        let by = _mm512_set1_ps(by);
        let [low, high] = [0, 16].map(|i| load(x[i..].first_chunk().expect("of 32")));
        super::bf16(_mm512_mul_ps(low, by), _mm512_mul_ps(high, by))
    }

    /// Pairs of an even and an odd row of B, in bf16.
    #[inline]
    fn interleaved(even: Avx512, odd: Avx512, order: &[u8; 64]) -> __m512i {
        _mm512_permutexvar_epi8(load512(order), super::bf16(even.0, odd.0))
    }

    /// A K block as tiles, (steps).
    fn key_tiles(cache: &Cache<'_>, block: &[u8], to: &mut [Tile]) {
        let (hd, order) = (32 * to.len(), black_box(&INTERLEAVED.0));
        for (step, tile) in to.iter_mut().enumerate() {
            // A group of dimensions that share a scale is as long as a tile's row.
            let scale = scale_k(cache.k_type, block, hd, step);
            for (pair, to) in tile.0.iter_mut().enumerate() {
                let i = 32 * step + 2 * pair;
                let key = |i: usize| load_k::<Avx512>(cache.k_type, block, i, scale);
                put(interleaved(key(i), key(i + 1), order), to);
            }
        }
    }

    /// The values of up to [`CHUNK`] positions as tiles, (head_dim / 16, CHUNK / 32); zeros for those that are not there, as
    /// far as a product of whole tiles reads them.
    fn value_tiles(cache: &Cache<'_>, positions: Range<usize>, hd: usize, to: &mut [Tile]) {
        let order = black_box(&INTERLEAVED.0);
        let row_bytes = cache.v_type.row_bytes(hd);
        let mut rows = cache.v[positions.start * row_bytes..positions.end * row_bytes].chunks_exact(row_bytes);
        for pair in 0..positions.len().div_ceil(32) * ROWS {
            let tiles = to.iter_mut().skip(pair / ROWS).step_by(CHUNK / 32).map(|t| &mut t.0[pair % ROWS]);
            let none = Avx512(_mm512_setzero_ps());
            // Written out: a closure called by code without the instructions would be called for every vector.
            match (rows.next(), rows.next()) {
                (Some(even), Some(odd)) => {
                    for (i, to) in tiles.enumerate() {
                        let (even, odd) = (load_v(cache.v_type, even, hd, i), load_v(cache.v_type, odd, hd, i));
                        put(interleaved(even, odd, order), to);
                    }
                }
                (Some(even), None) => {
                    for (i, to) in tiles.enumerate() {
                        put(interleaved(load_v(cache.v_type, even, hd, i), none, order), to);
                    }
                }
                (None, _) => {
                    for to in tiles {
                        to.fill(0);
                    }
                }
            }
        }
    }
}
