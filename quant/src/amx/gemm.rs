//! Matrix times many columns, on tiles.
//!
//! ```text
//! for each two slabs of 256 weights:
//!     for each 32 rows of the panel:
//!         A = their weights in bf16                                   32 KiB, in L1
//!         for each 32 columns:
//!             C += A B                                                64 x tdpbf16ps
//! out = C, transposed
//! ```
//!
//! B is what `ActBuf` encoded: tiles of 16 pairs of weights x 16 columns, so that weights need no transposing. It comes from L2 past
//! L1 (`tileloaddt1`), which A would be driven out of. C is 16 rows x 16 columns of f32 a tile and stays in L2 between slabs;
//! [`super::block`] says how it comes into the registers and out again.

use super::block::{Block, C, END, before, begin, register};
use super::{A, Fill, ROWS, Tiles};
use crate::act::{Acts, Bf16Block, COLUMNS};
use crate::isa::amx;
use crate::panel::{Out, Panel, Scratch};
use std::arch::asm;
use std::arch::x86_64::*;

/// Rows of a panel in which the gemm works best: C for [`PASS`] columns is 512 KiB, a quarter of L2, and so is B of two slabs.
pub(super) const PANEL_ROWS: usize = 256;
/// Columns that are multiplied at a time.
const PASS: usize = 512;

/// The first 32 weights of a block: its tiles of C come in, those of the block before go out.
macro_rules! first {
    () => {
        concat!(
            "tileloadd tmm5, [{a} + {row}]\n",
            "tileloaddt1 tmm7, [{b} + {row}]\n",
            "tileloadd tmm6, [{a} + {row} + 8192]\n",
            "tdpbf16ps tmm{n0}, tmm5, tmm7\n",
            "tilestored [{old} + {row}], tmm{o0}\n",
            "tileloadd tmm{n1}, [{c} + {row} + 1024]\n",
            "tdpbf16ps tmm{n1}, tmm6, tmm7\n",
            "tileloaddt1 tmm7, [{b} + {row} + 8192]\n",
            "tilestored [{old} + {row} + 1024], tmm{o1}\n",
            "tileloadd tmm{n2}, [{c} + {row} + 2048]\n",
            "tdpbf16ps tmm{n2}, tmm5, tmm7\n",
            "tilestored [{old} + {row} + 2048], tmm{o2}\n",
            "tileloadd tmm{n3}, [{c} + {row} + 3072]\n",
            "tdpbf16ps tmm{n3}, tmm6, tmm7\n",
            "tilestored [{old} + {row} + 3072], tmm{o3}\n",
        )
    };
}

/// Another 32 weights: number `k` of slab `s`, for which B is `b`.
macro_rules! step {
    ($s:literal $b:literal $k:literal) => {
        concat!(
            "tileloadd tmm5, [{a} + {row} + 16384*",
            $s,
            " + 1024*",
            $k,
            "]\n",
            "tileloaddt1 tmm7, [{",
            $b,
            "} + {row} + 1024*",
            $k,
            "]\n",
            "tdpbf16ps tmm{n0}, tmm5, tmm7\n",
            "tileloadd tmm6, [{a} + {row} + 16384*",
            $s,
            " + 8192 + 1024*",
            $k,
            "]\n",
            "tdpbf16ps tmm{n1}, tmm6, tmm7\n",
            "tileloaddt1 tmm7, [{",
            $b,
            "} + {row} + 8192 + 1024*",
            $k,
            "]\n",
            "tdpbf16ps tmm{n2}, tmm5, tmm7\n",
            "tdpbf16ps tmm{n3}, tmm6, tmm7\n",
        )
    };
}

/// The next block's first tile comes in, into the register of the last one that went out.
macro_rules! early {
    () => {
        "tileloadd tmm{o3}, [{next} + {row}]\n"
    };
}

/// 32 weights of one block of columns.
macro_rules! narrow {
    ($k:literal) => {
        concat!(
            "tileloadd tmm4, [{a} + {row} + 1024*",
            $k,
            "]\n",
            "tileloadd tmm6, [{b} + {row} + 1024*",
            $k,
            "]\n",
            "tdpbf16ps tmm0, tmm4, tmm6\n",
            "tileloadd tmm5, [{a} + {row} + 8192 + 1024*",
            $k,
            "]\n",
            "tdpbf16ps tmm1, tmm5, tmm6\n",
        )
    };
}

/// What a block is computed from: A, and B of two neighbouring blocks of columns, for one slab or for two; its tiles of C,
/// those of the block before, which are stored meanwhile, and those of the next one, whose first is loaded.
struct Work {
    a: *const A,
    b: [*const Bf16Block; 2],
    c: *mut Block,
    old: *mut Block,
    next: *const Block,
}

/// Assembly with the registers and addresses of a block.
macro_rules! block {
    ($w:ident, $phase:ident, $b2:expr; $($line:expr),*) => {
        asm!(
            $($line,)*
            a = in(reg) $w.a, b = in(reg) $w.b[0], b2 = in(reg) $b2,
            c = in(reg) $w.c, old = in(reg) $w.old, next = in(reg) $w.next, row = in(reg) 64u64,
            n0 = const register($phase, 0), n1 = const register($phase, 1),
            n2 = const register($phase, 2), n3 = const register($phase, 3),
            o0 = const before($phase, 0), o1 = const before($phase, 1),
            o2 = const before($phase, 2), o3 = const before($phase, 3),
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
            out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
            options(nostack, preserves_flags),
        )
    };
}

/// The functions [`two_blocks`] for one slab and for two, by phase.
const TWO_BLOCKS: [[unsafe fn(&Work); 5]; 2] = [
    [two_blocks::<0, 1>, two_blocks::<1, 1>, two_blocks::<2, 1>, two_blocks::<3, 1>, two_blocks::<4, 1>],
    [two_blocks::<0, 2>, two_blocks::<1, 2>, two_blocks::<2, 2>, two_blocks::<3, 2>, two_blocks::<4, 2>],
];

amx! {
    /// `c += a b`: 32 rows, 32 columns, one slab or two. Five in turn, of the phases 0 to 4, keep C moving.
    ///
    /// # Safety
    /// The tiles are taken, and hold what the phase before left, or [`begin`]. The addresses are of what they say; B has the
    /// second block behind the first. `next` is not `c`.
    unsafe fn two_blocks<const PHASE: usize, const SLABS: usize>(w: &Work) {
        // SAFETY: the caller's promise.
        unsafe {
            if SLABS == 1 {
                block!(w, PHASE, w.b[0];
                    first!(), step!(0 "b" 1), step!(0 "b" 2), step!(0 "b" 3), step!(0 "b" 4), early!(),
                    step!(0 "b" 5), step!(0 "b" 6), step!(0 "b" 7), "/* every operand is to be used: {b2} */"
                )
            } else {
                block!(w, PHASE, w.b[1];
                    first!(), step!(0 "b" 1), step!(0 "b" 2), step!(0 "b" 3),
                    step!(0 "b" 4), step!(0 "b" 5), step!(0 "b" 6), step!(0 "b" 7),
                    step!(1 "b2" 0), step!(1 "b2" 1), step!(1 "b2" 2), step!(1 "b2" 3), step!(1 "b2" 4), early!(),
                    step!(1 "b2" 5), step!(1 "b2" 6), step!(1 "b2" 7)
                )
            }
        }
    }

    /// `c += a b`: 32 rows, 16 columns, a slab. Registers as they come.
    ///
    /// # Safety
    /// The tiles are taken.
    unsafe fn one_block(a: &A, b: &Bf16Block, c: &mut [C; 2]) {
        // SAFETY: two halves of 8 KiB, a block of 8 KiB and two tiles of 1 KiB are what the references hold.
        unsafe {
            asm!(
                "tileloadd tmm0, [{c} + {row}]",
                "tileloadd tmm1, [{c} + {row} + 1024]",
                narrow!(0), narrow!(1), narrow!(2), narrow!(3), narrow!(4), narrow!(5), narrow!(6), narrow!(7),
                "tilestored [{c} + {row}], tmm0",
                "tilestored [{c} + {row} + 1024], tmm1",
                a = in(reg) a, b = in(reg) b, c = in(reg) c, row = in(reg) 64u64,
                out("tmm0") _, out("tmm1") _, out("tmm4") _, out("tmm5") _, out("tmm6") _,
                options(nostack, preserves_flags),
            )
        }
    }

    /// `out = w x`, with the weights that `fill` makes.
    ///
    /// # Safety
    /// There are tiles, and `fill` can be called: both are this rung's.
    pub(super) unsafe fn gemm(w: Panel<'_>, x: Acts<'_>, out: &mut Out<'_>, scratch: &mut Scratch, fill: Fill) {
        // SAFETY: the caller's promise.
        let tiles = unsafe { Tiles::take() };
        for c0 in (0..x.n()).step_by(PASS) {
            // SAFETY: the caller's promise.
            unsafe { pass(&tiles, (&w, fill), x.columns(c0, PASS.min(x.n() - c0)), (out, c0), scratch) };
        }
    }

    /// The columns of `out` from `c0` on, which are those of `x`.
    ///
    /// # Safety
    /// `fill` can be called.
    unsafe fn pass(
        _: &Tiles, (w, fill): (&Panel<'_>, Fill), x: Acts<'_>, (out, c0): (&mut Out<'_>, usize), scratch: &mut Scratch,
    ) {
        let blocks = x.n().div_ceil(COLUMNS);
        let heights = w.rows.div_ceil(2 * ROWS);
        let c = scratch.floats.take::<C>(heights * blocks * 2 + 4);
        c.fill(bytemuck::Zeroable::zeroed());
        // `none` stands for the block before the first and after the last.
        let (c, none) = c.split_at_mut(heights * blocks * 2);
        let none: *mut Block = none.as_mut_ptr().cast();
        let a = scratch.tile.take::<A>(2);
        for s in (0..w.slabs()).step_by(2) {
            let slabs = (w.slabs() - s).min(2);
            let b: [_; 2] = std::array::from_fn(|i| x.bf16(s + i.min(slabs - 1)));
            for (h, c) in c.chunks_mut(blocks * 2).enumerate() {
                for (i, a) in a.iter_mut().enumerate().take(slabs) {
                    // SAFETY: the caller's promise.
                    unsafe { fill(w, h * 2 * ROWS, s + i, slabs, a) };
                }
                let (twos, last) = c.as_chunks_mut::<4>();
                let (n, twos) = (twos.len(), twos.as_mut_ptr());
                if n > 0 {
                    // SAFETY: the tiles are taken. Each pointer is to one of the `n` pairs of blocks, of C or of B, or to `none`.
                    unsafe {
                        let at = |i: usize| if i < n { twos.add(i) } else { none };
                        begin(at(0));
                        for i in 0..n {
                            let old = if i > 0 { at(i - 1) } else { none };
                            let b = b.map(|b| b[2 * i..].as_ptr());
                            TWO_BLOCKS[slabs - 1][i % 5](&Work { a: a.as_ptr(), b, c: at(i), old, next: at(i + 1) });
                        }
                        END[n % 5](at(n - 1));
                    }
                }
                if let Ok(c) = <&mut [C; 2]>::try_from(last) {
                    for (a, b) in a.iter().zip(b).take(slabs) {
                        // SAFETY: the tiles are taken.
                        unsafe { one_block(a, &b[blocks - 1], c) }
                    }
                }
            }
        }
        for (h, c) in c.chunks(blocks * 2).enumerate() {
            for (block, c) in c.as_chunks::<2>().0.iter().enumerate() {
                for (half, c) in c.iter().enumerate() {
                    let r0 = (2 * h + half) * ROWS;
                    if r0 < w.rows {
                        store(c, out, r0, ROWS.min(w.rows - r0), c0 + block * COLUMNS);
                    }
                }
            }
        }
    }

    /// A tile's rows to the columns of `out` from `c0` on.
    fn store(c: &C, out: &mut Out<'_>, r0: usize, rows: usize, c0: usize) {
        let mut m = [_mm512_setzero_si512(); 16];
        for (m, c) in m.iter_mut().zip(&c.0) {
            // SAFETY: 64 aligned bytes.
            *m = unsafe { _mm512_load_si512(c.as_ptr().cast()) };
        }
        crate::avx512::transpose(&mut m);
        // A mask, not a copy of so many: that would be a call for every column.
        let mask = (0xFFFF_u32 >> (ROWS - rows)) as u16;
        for (i, m) in m.into_iter().enumerate().take(out.cols - c0) {
            let to = out.column(c0 + i, r0, rows).as_mut_ptr();
            // SAFETY: `rows` numbers from there on.
            unsafe { _mm512_mask_storeu_epi32(to.cast(), mask, m) };
        }
    }
}
