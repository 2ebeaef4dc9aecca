//! Attention on tiles, for many query rows at once.
//!
//! ```text
//! for each 128 positions:
//!     K blocks to tiles: 16 pairs of dimensions x 16 positions          32 positions at a time
//!     for each 32 rows:        S = Q K                                  4 x tdpbf16ps for each 32 dimensions
//!     softmax of S, in f32
//!     V rows to tiles: 16 pairs of positions x 16 dimensions
//!     for each 32 rows:        O += P V                                 4 x tdpbf16ps for each 32 positions
//! ```
//!
//! The cache lies so that neighbouring dimensions of a K block, and neighbouring positions of V, are two vectors: rounded to
//! bf16 and interleaved they are a row of a tile, whatever the cache's type. That costs as much time as the products of 16
//! rows, and so many rows share it. Fewer, and heads that are no multiple of 32, stay with AVX-512.

use super::{ROWS, Tiles};
use crate::attention::{BLOCK, CHUNK, Cache, Partial, Products, Queries, attend, load_k, load_v, scale_k};
use crate::isa::amx;
use crate::lanes::Avx512;
use crate::panel::Scratch;
use std::arch::asm;
use std::arch::x86_64::*;
use std::ops::Range;

/// Rows from which tiles are worth it.
const LEAST: usize = 16;

/// 16 rows of 32 numbers in bf16.
#[derive(Clone, Copy, bytemuck::Zeroable, bytemuck::Pod)]
#[repr(C, align(64))]
struct Tile([[u16; 32]; ROWS]);

/// Products on tiles. Each array is cut from one scratch; `steps` is head_dim / 32.
struct OnTiles<'a> {
    steps: usize,
    q: &'a [Tile],     // (rows / 16, steps): queries times the scale
    k: &'a mut [Tile], // (2, steps): two K blocks
    v: &'a mut [Tile], // (CHUNK / 32, head_dim / 16)
    p: &'a mut [Tile], // (2, CHUNK / 32): weights of 32 rows
}

amx! {
    /// [`crate::attention::Attention::run`] on tiles.
    pub(crate) fn run(
        q: &Queries<'_>, cache: &Cache<'_>, range: Range<usize>, out: &mut Partial<'_>, scratch: &mut Scratch,
    ) {
        let rows = q.limits.len();
        let hd = q.q.len() / rows.max(1);
        if rows < LEAST || !hd.is_multiple_of(32) {
            return crate::attention::avx512(q, cache, range, out, scratch);
        }
        let (steps, padded) = (hd / 32, crate::attention::padded_rows(rows));
        let sizes = [padded / ROWS * steps, 2 * steps, CHUNK / 32 * 2 * steps, 2 * CHUNK / 32];
        let (tiles, rest) = scratch.tile.take::<Tile>(sizes.iter().sum()).split_at_mut(sizes[0]);
        let (k, rest) = rest.split_at_mut(sizes[1]);
        let (v, p) = rest.split_at_mut(sizes[2]);
        for r in 0..padded {
            for step in 0..steps {
                let to = &mut tiles[r / ROWS * steps + step].0[r % ROWS];
                match q.q.get(r * hd + 32 * step..r * hd + 32 * (step + 1)) {
                    Some(x) => put(halves(x, q.scale), to),
                    None => to.fill(0),
                }
            }
        }
        let products = OnTiles { steps, q: tiles, k, v, p };
        // SAFETY: this rung's, so there are tiles.
        let tiles = unsafe { Tiles::take() };
        attend::<Avx512>(products, (q.limits, hd), cache, range, out, scratch.floats.take(padded));
        drop(tiles);
    }

    /// 32 numbers times `by`, in bf16.
    #[inline]
    fn halves(x: &[f32], by: f32) -> __m512i {
        let by = _mm512_set1_ps(by);
        let (low, high) = x.split_at(16);
        // SAFETY: 16 floats each, of 32.
        let (low, high) = unsafe { (_mm512_loadu_ps(low.as_ptr()), _mm512_loadu_ps(high[..16].as_ptr())) };
        super::bf16(_mm512_mul_ps(low, by), _mm512_mul_ps(high, by))
    }

    #[inline]
    fn put(v: __m512i, to: &mut [u16; 32]) {
        // SAFETY: 64 writable bytes.
        unsafe { _mm512_storeu_si512(to.as_mut_ptr().cast(), v) }
    }

    /// Pairs of an even and an odd row of B, in bf16.
    #[inline]
    fn interleaved(even: Avx512, odd: Avx512) -> __m512i {
        const ORDER: [u16; 32] = {
            let mut order = [0; 32];
            let mut i = 0;
            while i < 32 {
                order[i] = (i / 2 + i % 2 * 16) as u16;
                i += 1;
            }
            order
        };
        // SAFETY: 64 bytes.
        let order = unsafe { _mm512_loadu_si512(ORDER.as_ptr().cast()) };
        _mm512_permutexvar_epi16(order, super::bf16(even.0, odd.0))
    }

    /// A K block as tiles, (steps).
    fn key_tiles(cache: &Cache<'_>, block: &[u8], to: &mut [Tile]) {
        let hd = 32 * to.len();
        for (step, tile) in to.iter_mut().enumerate() {
            // A group of dimensions that share a scale is as long as a tile's row.
            let scale = scale_k(cache.k_type, block, hd, step);
            for (pair, to) in tile.0.iter_mut().enumerate() {
                let i = 32 * step + 2 * pair;
                let key = |i: usize| load_k::<Avx512>(cache.k_type, block, i, scale);
                put(interleaved(key(i), key(i + 1)), to);
            }
        }
    }

    /// The values of up to 32 positions as tiles, (head_dim / 16); zeros for those that are not there.
    fn value_tiles(cache: &Cache<'_>, rows: &[u8], row_bytes: usize, to: &mut [Tile]) {
        let hd = 16 * to.len();
        let mut rows = rows.chunks_exact(row_bytes);
        for pair in 0..ROWS {
            // Written out: a closure called by code without the instructions would be called for every vector.
            match (rows.next(), rows.next()) {
                (Some(even), Some(odd)) => {
                    for (i, tile) in to.iter_mut().enumerate() {
                        let (even, odd) = (load_v(cache.v_type, even, hd, i), load_v(cache.v_type, odd, hd, i));
                        put(interleaved(even, odd), &mut tile.0[pair]);
                    }
                }
                (Some(even), None) => {
                    for (i, tile) in to.iter_mut().enumerate() {
                        let even = load_v(cache.v_type, even, hd, i);
                        put(interleaved(even, Avx512(_mm512_setzero_ps())), &mut tile.0[pair]);
                    }
                }
                (None, _) => {
                    for tile in to.iter_mut() {
                        tile.0[pair].fill(0);
                    }
                }
            }
        }
    }

    /// 32 rows x 32 columns of a matrix of f32 to the tiles 0 to 3: two of rows, then two of rows 16 columns on.
    ///
    /// # Safety
    /// The tiles are taken; `at` is the first of 32 rows, `stride` bytes apart, of at least 32 numbers.
    #[inline]
    unsafe fn load(at: *const f32, stride: usize) {
        // SAFETY: the caller's promise.
        unsafe {
            asm!(
                "tileloadd tmm0, [{a} + {row}]",
                "tileloadd tmm1, [{b} + {row}]",
                "tileloadd tmm2, [{a} + {row} + 64]",
                "tileloadd tmm3, [{b} + {row} + 64]",
                a = in(reg) at, b = in(reg) at.byte_add(ROWS * stride), row = in(reg) stride,
                out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                options(nostack, preserves_flags),
            )
        }
    }

    /// Zeros to the tiles 0 to 3.
    ///
    /// # Safety
    /// The tiles are taken.
    #[inline]
    unsafe fn zero() {
        // SAFETY: the caller's promise.
        unsafe {
            asm!(
                "tilezero tmm0", "tilezero tmm1", "tilezero tmm2", "tilezero tmm3",
                out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                options(nostack, preserves_flags),
            )
        }
    }

    /// The tiles 0 to 3 to where [`load`] had them from.
    ///
    /// # Safety
    /// As for [`load`], for writing.
    #[inline]
    unsafe fn store(at: *mut f32, stride: usize) {
        // SAFETY: the caller's promise.
        unsafe {
            asm!(
                "tilestored [{a} + {row}], tmm0",
                "tilestored [{b} + {row}], tmm1",
                "tilestored [{a} + {row} + 64], tmm2",
                "tilestored [{b} + {row} + 64], tmm3",
                a = in(reg) at, b = in(reg) at.byte_add(ROWS * stride), row = in(reg) stride,
                options(nostack, preserves_flags),
            )
        }
    }

    /// Adds the products of two tiles of rows and two of columns to the tiles 0 to 3.
    ///
    /// # Safety
    /// The tiles are taken.
    #[inline]
    unsafe fn multiply(a: [&Tile; 2], b: [&Tile; 2]) {
        // SAFETY: a tile is 16 rows of 64 bytes.
        unsafe {
            asm!(
                "tileloadd tmm4, [{a0} + {row}]",
                "tileloadd tmm6, [{b0} + {row}]",
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tileloadd tmm5, [{a1} + {row}]",
                "tdpbf16ps tmm1, tmm5, tmm6",
                "tileloadd tmm7, [{b1} + {row}]",
                "tdpbf16ps tmm2, tmm4, tmm7",
                "tdpbf16ps tmm3, tmm5, tmm7",
                a0 = in(reg) a[0], a1 = in(reg) a[1], b0 = in(reg) b[0], b1 = in(reg) b[1], row = in(reg) 64usize,
                out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                options(nostack, preserves_flags),
            )
        }
    }

    /// # Safety
    /// The tiles are taken.
    unsafe fn scores(t: &mut OnTiles<'_>, cache: &Cache<'_>, p0: usize, blocks: usize, scores: &mut [[f32; CHUNK]]) {
        let steps = t.steps;
        for b in (0..blocks).step_by(2) {
            // The second of two may not be there: then what comes out for it means nothing.
            for (i, to) in (b..blocks).zip(t.k.chunks_exact_mut(steps)) {
                key_tiles(cache, cache.k_block(p0 / BLOCK + i, 32 * steps), to);
            }
            let (k0, k1) = t.k.split_at(steps);
            for (q, to) in t.q.chunks_exact(2 * steps).zip(scores.as_chunks_mut::<{ 2 * ROWS }>().0) {
                let (q0, q1) = q.split_at(steps);
                // SAFETY: the tiles are taken; 32 rows of CHUNK scores, in which two blocks from `b` on have room.
                unsafe {
                    zero();
                    for s in 0..steps {
                        multiply([&q0[s], &q1[s]], [&k0[s], &k1[s]]);
                    }
                    store(to[0][b * BLOCK..][..2 * BLOCK].as_mut_ptr(), 4 * CHUNK);
                }
            }
        }
    }

    /// # Safety
    /// The tiles are taken.
    unsafe fn values(t: &mut OnTiles<'_>, cache: &Cache<'_>, positions: Range<usize>, p: &[[f32; CHUNK]], o: &mut [f32]) {
        let hd = 32 * t.steps;
        let row_bytes = cache.v_type.row_bytes(hd);
        let rows = &cache.v[positions.start * row_bytes..positions.end * row_bytes];
        let steps = positions.len().div_ceil(32);
        for (rows, to) in rows.chunks(32 * row_bytes).zip(t.v.chunks_exact_mut(hd / 16)) {
            value_tiles(cache, rows, row_bytes, to);
        }
        for (p, o) in p.as_chunks::<{ 2 * ROWS }>().0.iter().zip(o.chunks_exact_mut(2 * ROWS * hd)) {
            for (r, p) in p.iter().enumerate() {
                for s in 0..steps {
                    put(halves(&p[32 * s..32 * (s + 1)], 1.0), &mut t.p[r / ROWS * (CHUNK / 32) + s].0[r % ROWS]);
                }
            }
            let (p0, p1) = t.p.split_at(CHUNK / 32);
            for j in (0..hd / 16).step_by(2) {
                // SAFETY: the tiles are taken; 32 rows of head_dim numbers, of which 32 begin at 16 j.
                unsafe {
                    load(o[16 * j..].as_ptr(), 4 * hd);
                    for s in 0..steps {
                        let v = &t.v[s * (hd / 16) + j..];
                        multiply([&p0[s], &p1[s]], [&v[0], &v[1]]);
                    }
                    store(o[16 * j..].as_mut_ptr(), 4 * hd);
                }
            }
        }
    }
}

impl Products for OnTiles<'_> {
    #[inline(always)]
    fn scores(&mut self, cache: &Cache<'_>, p0: usize, blocks: usize, to: &mut [[f32; CHUNK]]) {
        // SAFETY: made in `run` alone, where the tiles are taken.
        unsafe { scores(self, cache, p0, blocks, to) }
    }

    #[inline(always)]
    fn values(&mut self, cache: &Cache<'_>, positions: Range<usize>, p: &[[f32; CHUNK]], o: &mut [f32]) {
        // SAFETY: as above.
        unsafe { values(self, cache, positions, p, o) }
    }
}
