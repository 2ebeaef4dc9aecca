//! A matrix times many columns: 32 rows at a time, unpacked to a tile in memory.
//!
//! `G` is how many weights share a scale: 16, 32, or 256 where a format's small scales are multiplied into its codes
//! ([`slab::merged`](super::slab::merged)). Minimums, if any, are for 16 weights each then.

use super::slab::{MERGED_OFFSET, floats, load512};
use crate::act::{Acts, Q8Block, column_sums};
use crate::format::{Codes, SLAB};
use crate::isa::avx512;
use crate::kernels::Kernel;
use crate::panel::{Out, Panel, Scratch, align_stack, prefetch, prefetch_part};
use std::arch::x86_64::*;

/// Rows of a tile: two vectors.
const TILE: usize = 32;

/// A slab of 32 rows, interleaved.
#[derive(Clone, Copy, bytemuck::Zeroable, bytemuck::Pod)]
#[repr(C, align(64))]
struct Tile {
    q: [[u8; 4 * TILE]; SLAB / 4], // [k / 4][row][4]
    scale: [[f32; TILE]; 16],      // [group][row]
    min: [[f32; TILE]; 16],
}

avx512! {
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

    /// Unpacks slab `s` of up to 16 rows from `r0` on, through `codes`, into one half of a tile.
    fn interleave<const G: usize, const MIN: bool>(k: &Kernel, w: &Panel<'_>, r0: usize, s: usize, half: usize, (codes, tile): (&mut [Codes; 16], &mut Tile)) {
        let rows = w.rows.saturating_sub(r0).min(16);
        for (r, c) in codes.iter_mut().enumerate().take(rows) {
            let b = w.slab(r0 + r, s);
            // A row's next slab, for which its turn comes after the other rows'. No hardware follows so many streams.
            prefetch::<true>(b.as_ptr_range().end, b.len());
            // SAFETY: this rung's, as the table's construction guarantees.
            unsafe { (k.unpack)(b, c) }
        }
        for quarter in 0..4 {
            let mut m = [_mm512_setzero_si512(); 16];
            for (m, c) in m.iter_mut().zip(codes.iter()) {
                *m = load512(&c.q.as_chunks().0[quarter]);
            }
            transpose(&mut m);
            for (i, v) in m.into_iter().enumerate() {
                let to: &mut [u8] = &mut tile.q[16 * quarter + i][64 * half..][..64];
                // SAFETY: 64 writable bytes.
                unsafe { _mm512_storeu_si512(to.as_mut_ptr().cast(), v) };
            }
        }
        let floats_of_rows = |of: fn(&Codes) -> &[f32; 16], to: [&mut [[f32; TILE]]; 2]| {
            let mut m = [_mm512_setzero_si512(); 16];
            for (m, c) in m.iter_mut().zip(codes.iter()) {
                *m = _mm512_castps_si512(floats(of(c)));
            }
            transpose(&mut m);
            for (m, to) in m.into_iter().zip(to.into_iter().flatten()) {
                // SAFETY: 16 writable floats.
                unsafe { _mm512_storeu_ps(to[16 * half..][..16].as_mut_ptr(), _mm512_castsi512_ps(m)) };
            }
        };
        let [scale, min] = [&mut tile.scale, &mut tile.min].map(|x| x.split_at_mut(8));
        match (G, MIN) {
            // Minimums are the upper eight of the scales.
            (32, true) => floats_of_rows(|c| &c.scale, [scale.0, min.0]),
            (32, false) => floats_of_rows(|c| &c.scale, [scale.0, &mut []]),
            _ => floats_of_rows(|c| &c.scale, [scale.0, scale.1]),
        }
        if MIN && G != 32 {
            floats_of_rows(|c| &c.min, [min.0, min.1]);
        }
    }

    /// Half of a tile's row of floats.
    #[inline]
    fn half(row: &[f32; TILE], h: usize) -> __m512 {
        floats(row[16 * h..].first_chunk().expect("two halves"))
    }

    /// Group `g` of the tile times `NC` columns: a vector of dots for each half of the rows.
    #[inline]
    fn dots<const G: usize, const MIN: bool, const NC: usize>(
        tile: &Tile, x: &[Q8Block; NC], sums: &[[u32; 16]; NC], g: usize,
    ) -> [[__m512i; 2]; NC] {
        let mut a = [[_mm512_setzero_si512(); 2]; NC];
        if !MIN {
            for i in 0..NC {
                a[i] = [_mm512_set1_epi32(sums[i][g] as i32); 2];
            }
        }
        let quads = G.min(32) / 4;
        assert!((g + 1) * quads <= SLAB / 4, "no such group");
        for k in g * quads..(g + 1) * quads {
            // SAFETY: `k` is below a slab's number of quads: a row of the tile is two vectors, a quad of a column an i32. (With
            // slices instead, the compiler takes the columns in another order, 2 % slower.)
            unsafe {
                let q = tile.q.get_unchecked(k).as_ptr();
                let (w0, w1) = (_mm512_load_si512(q.cast()), _mm512_load_si512(q.add(64).cast()));
                for i in 0..NC {
                    let v = _mm512_set1_epi32(x[i].q.as_ptr().add(4 * k).cast::<i32>().read_unaligned());
                    a[i][0] = _mm512_dpbusd_epi32(a[i][0], w0, v);
                    a[i][1] = _mm512_dpbusd_epi32(a[i][1], w1, v);
                }
            }
        }
        a
    }

    /// Takes group `g`'s minimums, times the columns' sums, off `c`.
    #[inline]
    fn less_minimums<const NC: usize>(tile: &Tile, g: usize, sums: &[[u32; 16]; NC], c: &mut [[__m512; 2]; NC]) {
        for h in 0..2 {
            let m = half(&tile.min[g], h);
            for i in 0..NC {
                c[i][h] = _mm512_fnmadd_ps(m, _mm512_set1_ps(f32::from_bits(sums[i][g])), c[i][h]);
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
        // Or every index below would be checked for itself.
        assert!(groups <= SLAB / G.min(32), "a slab has no more groups");
        let old = |acc: &[[f32; TILE]; NC], i: usize| [half(&acc[i], 0), half(&acc[i], 1)];
        let mut c = [[_mm512_setzero_ps(); 2]; NC];
        if G != SLAB {
            for i in 0..NC {
                c[i] = old(acc, i);
            }
        }
        match G {
            SLAB => {
                for g in 0..groups {
                    let a = dots::<G, MIN, NC>(tile, x, sums, g);
                    for i in 0..NC {
                        let d = _mm512_set1_ps(x[i].d[g]);
                        for h in 0..2 {
                            c[i][h] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(a[i][h]), d, c[i][h]);
                        }
                    }
                }
                // What was there comes late: until here all registers are taken.
                let s = [half(&tile.scale[0], 0), half(&tile.scale[0], 1)];
                for i in 0..NC {
                    let old = old(acc, i);
                    c[i] = [_mm512_fmadd_ps(c[i][0], s[0], old[0]), _mm512_fmadd_ps(c[i][1], s[1], old[1])];
                }
                if MIN {
                    for g in 0..2 * groups {
                        less_minimums(tile, g, sums, &mut c);
                    }
                }
            }
            32 => {
                for g in 0..groups {
                    let a = dots::<G, MIN, NC>(tile, x, sums, g);
                    for h in 0..2 {
                        let s = half(&tile.scale[g], h);
                        for i in 0..NC {
                            let d = _mm512_set1_ps(x[i].d[g]);
                            c[i][h] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(a[i][h]), _mm512_mul_ps(s, d), c[i][h]);
                        }
                    }
                    if MIN {
                        less_minimums(tile, g, sums, &mut c);
                    }
                }
            }
            _ => {
                const { assert!(G == 32 || G == SLAB || !MIN, "no such format") };
                // Two groups share an activation's scale.
                for p in 0..groups / 2 {
                    let mut t = [[_mm512_setzero_ps(); 2]; NC];
                    for odd in 0..2 {
                        let g = 2 * p + odd;
                        let a = dots::<G, MIN, NC>(tile, x, sums, g);
                        for h in 0..2 {
                            let s = half(&tile.scale[g], h);
                            for i in 0..NC {
                                let a = _mm512_cvtepi32_ps(a[i][h]);
                                t[i][h] = if odd == 0 { _mm512_mul_ps(a, s) } else { _mm512_fmadd_ps(a, s, t[i][h]) };
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
        }
        for (acc, c) in acc.iter_mut().zip(c) {
            for (to, c) in acc.as_chunks_mut::<16>().0.iter_mut().zip(c) {
                // SAFETY: 16 writable floats.
                unsafe { _mm512_storeu_ps(to.as_mut_ptr(), c) };
            }
        }
    }

    pub(super) fn gemm<const G: usize, const MIN: bool, const COLS: usize>(
        k: &Kernel, w: Panel<'_>, x: Acts<'_>, out: &mut Out<'_>, scratch: &mut Scratch,
    ) {
        align_stack!();
        let n = x.n();
        let tiles = w.rows.div_ceil(TILE);
        let acc = scratch.floats.take::<[f32; TILE]>(tiles * n);
        let sums = scratch.sums.take::<[u32; 16]>(n);
        let tile = &mut scratch.tile.take::<Tile>(1)[0];
        // Of rows that are not there, what was before: nobody reads their sums.
        let codes = &mut [Codes::ZERO; 16];
        let spec = w.format.spec().codes.as_ref().expect("installed for formats with codes");
        let offset = if G == SLAB { MERGED_OFFSET } else { spec.offset };
        acc.fill([0.0; TILE]);
        for s in 0..w.slabs() {
            let next = if s + 1 < w.slabs() { x.q8(s + 1) } else { &[] };
            let x = x.q8(s);
            if G == 16 || G == SLAB && MIN {
                column_sums::<16, MIN>(offset, x, sums);
            } else {
                column_sums::<32, MIN>(offset, x, sums);
            }
            let groups = (w.cols - s * SLAB).min(SLAB).div_ceil(G.min(32));
            for t in 0..tiles {
                interleave::<G, MIN>(k, &w, t * TILE, s, 0, (codes, tile));
                interleave::<G, MIN>(k, &w, t * TILE + 16, s, 1, (codes, tile));
                let acc = &mut acc[t * n..(t + 1) * n];
                let mut c = 0;
                while c + COLS <= n {
                    let r = c..c + COLS;
                    prefetch_part(next, t * (n / COLS) + c / COLS, tiles * (n / COLS));
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
