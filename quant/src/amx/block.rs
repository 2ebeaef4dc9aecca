//! C's way through the tile registers.
//!
//! If C is loaded before its products and stored after them, its traffic is not hidden at all: a store waits 52 cycles for the
//! last product, few stores can wait at once, and nothing behind them begins. So the four tiles of a block of C move through five
//! registers. The first tile of the next block is loaded into the fifth while this one is computed; when the next block has
//! begun with it, a tile of the last block is stored and its register free for the next, three times over, and there are always
//! products to do. On a Xeon at 2.8 GHz, where a product takes 5.7 ns, that made 5.9 of 6.8 ns with all in L1, and 7.2 of 8.7
//! with B and C in L2.
//!
//! ```text
//! phase   tiles 0 1 2 3   before them: the last block's   behind them: the
//!         lie in          tiles 0 1 2 3 are stored from   next tile 0 into
//!   0     0 1 2 3         1 2 3 4                         4
//!   1     4 0 1 2         0 1 2 3                         3
//!   2     3 4 0 1         4 0 1 2                         2
//!   3     2 3 4 0         3 4 0 1                         1
//!   4     1 2 3 4         2 3 4 0                         0
//! ```

use super::ROWS;
use crate::act::COLUMNS;
use crate::isa::amx;
use std::arch::asm;

/// Sums of 16 rows x 16 columns.
#[derive(Clone, Copy, bytemuck::Zeroable, bytemuck::Pod)]
#[repr(C, align(64))]
pub(super) struct C(pub [[f32; COLUMNS]; ROWS]);

/// Sums of 32 rows x 32 columns: column block by column block.
pub(super) type Block = [C; 4];

/// The register of tile `i` of a block of C. A block's phase is its number modulo five; its tiles 1 to 3 take the registers
/// that tiles 0 to 2 of the block before it leave, and its tile 0 the one that that block left free.
pub(super) const fn register(phase: usize, i: usize) -> usize {
    (i + 5 - phase) % 5
}

/// The same of the block before.
pub(super) const fn before(phase: usize, i: usize) -> usize {
    register((phase + 4) % 5, i)
}

/// The functions [`end`], by phase.
pub(super) const END: [unsafe fn(*mut Block); 5] = [end::<0>, end::<1>, end::<2>, end::<3>, end::<4>];

amx! {
    /// Before a block of phase 0: loads its first tile.
    ///
    /// # Safety
    /// The tiles are taken.
    pub(super) unsafe fn begin(next: *const Block) {
        // SAFETY: the caller's promise.
        unsafe { begin_behind::<4>(next) }
    }

    /// Behind the last tile of a block of a phase that is stored: loads the first tile of the block to come.
    ///
    /// # Safety
    /// The tiles are taken.
    pub(super) unsafe fn begin_behind<const PHASE: usize>(next: *const Block) {
        // SAFETY: the caller's promise.
        unsafe {
            asm!(
                "tileloadd tmm{o3}, [{next} + {row}]",
                next = in(reg) next, row = in(reg) 64u64, o3 = const before(PHASE, 3),
                // One of these.
                out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _, out("tmm4") _,
                options(nostack, preserves_flags),
            )
        }
    }

    /// In place of a block of a phase: stores the tiles of the one before.
    ///
    /// # Safety
    /// The tiles are taken, and hold them.
    unsafe fn end<const PHASE: usize>(old: *mut Block) {
        // SAFETY: the caller's promise.
        unsafe {
            asm!(
                "tilestored [{old} + {row}], tmm{o0}",
                "tilestored [{old} + {row} + 1024], tmm{o1}",
                "tilestored [{old} + {row} + 2048], tmm{o2}",
                "tilestored [{old} + {row} + 3072], tmm{o3}",
                old = in(reg) old, row = in(reg) 64u64,
                o0 = const before(PHASE, 0), o1 = const before(PHASE, 1),
                o2 = const before(PHASE, 2), o3 = const before(PHASE, 3),
                options(nostack, preserves_flags),
            )
        }
    }
}
