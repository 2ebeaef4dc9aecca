//! AMX: many columns at once, in bf16 tiles.
//!
//! ```text
//! for each slab of 256 weights:
//!     for each 32 rows of the panel:
//!         A = their weights in bf16: two halves of eight tiles, 16 rows x 32 weights     16 KiB, from L1
//!         for each 32 columns:
//!             C += A B                                                                   32 x tdpbf16ps
//! out = C, turned
//! ```
//!
//! B is what `ActBuf` encoded: tiles of 16 pairs of weights x 16 columns, so that weights need no turning. C is 16 rows x 16
//! columns of f32 a tile and stays in L2 between slabs. A group's scale is multiplied into the weight before it is rounded:
//! the relative error of a product is at most 2^-8, without the noise of activations in bytes (0.5 to 1 %), and every format
//! costs the same.
//!
//! `tdpbf16ps` sums even and odd k apart and rounds after every step, to nearest even, denormals as zero, whatever the
//! control registers say (Intel SDM). It takes 16 cycles however few columns there are: few columns stay with the gemv of
//! AVX-512.
//!
//! The instructions have no stable intrinsics; `asm!` takes them. The compiler allocates no tile registers, so tiles keep
//! their contents from one block of assembly to the next.

use crate::act::{Act, Acts, COLUMNS};
use crate::avx512::slab::{self, Order, Slab};
use crate::format::{Format, SLAB};
use crate::isa::{Isa, amx};
use crate::kernels::{Kernel, Run, Slot};
use crate::panel::{Out, Panel, Scratch, align_stack, padded, prefetch};
use std::arch::asm;
use std::arch::x86_64::*;
use std::hint::black_box;
use std::sync::OnceLock;

pub(crate) mod attention;
#[cfg(any(test, feature = "emulate-amx"))]
mod emulate;

/// Rows of a tile.
const ROWS: usize = 16;
/// Tiles along a slab: 32 weights in each.
const STEPS: usize = SLAB / 32;
/// Rows of a panel in which the gemm works best: C for 512 columns is 1 MiB, half of L2.
const PANEL_ROWS: usize = 512;

/// Weights of 32 rows.
#[derive(Clone, Copy, bytemuck::Zeroable, bytemuck::Pod)]
#[repr(C, align(64))]
struct A([[[[u16; 32]; ROWS]; STEPS]; 2]);

/// Sums of 16 rows x 16 columns.
#[derive(Clone, Copy, bytemuck::Zeroable, bytemuck::Pod)]
#[repr(C, align(64))]
struct C([[f32; COLUMNS]; ROWS]);

/// Indices that give every fourth byte of a vector, or every second, the next byte of another. The compiler must not see what
/// they are: it would make two shuffles of each.
#[repr(C, align(64))]
struct Spread {
    dwords: [[u8; 64]; 4],
    words: [[u8; 64]; 2],
}

impl Spread {
    const INDICES: Spread = {
        let (mut dwords, mut words) = ([[0; 64]; 4], [[0; 64]; 2]);
        let mut i = 0;
        while i < 256 {
            dwords[i / 64][i % 64] = (i / 4) as u8;
            words[i / 128][i / 2 % 64] = (i / 4) as u8;
            i += 1;
        }
        Spread { dwords, words }
    };
}

/// A vector in memory.
#[repr(C, align(64))]
struct Vector([f32; 16]);

/// Installs the kernels of this file, over those of AVX-512.
pub(crate) fn overlay(table: &mut [Kernel]) {
    for (kernel, spec) in table.iter_mut().zip(crate::format::FORMATS) {
        let Some(run) = gemm_of(spec.format) else { continue };
        kernel.gemm = Slot { isa: Isa::Amx, act: Act::Bf16, run };
        kernel.gemv_cols = kernel.gemv_cols.max(COLUMNS);
        kernel.gemm_rows = PANEL_ROWS;
    }
}

/// Slab `s` of up to 32 rows of a panel, from row `r0` on, in bf16.
type Fill = unsafe fn(w: &Panel<'_>, r0: usize, s: usize, a: &mut A);

/// The matrix-matrix kernel of each format with codes.
macro_rules! gemms {
    ($($format:ident $unpack:ident $bytes:literal $group:literal $min:literal $order:ident;)*) => {
        mod gemms {
            use super::*;
            amx! {$(
                pub fn $unpack(_: &Kernel, w: Panel<'_>, x: Acts<'_>, out: &mut Out<'_>, scratch: &mut Scratch) {
                    amx! {
                        fn fill(w: &Panel<'_>, r0: usize, s: usize, a: &mut A) {
                            const OFFSET: f32 = match Format::$format.spec().codes {
                                Some(ref c) => c.offset as f32,
                                None => 0.0,
                            };
                            const SMALL: bool = matches!(Format::$format, Format::Q4_0 | Format::Q4_1 | Format::Q4_K);
                            fill_with::<$bytes>(w, r0, s, a, |b, spread| {
                                weights::<$group, $min, { Order::$order }, SMALL>(slab::$unpack(b), OFFSET, spread)
                            });
                        }
                    }
                    gemm(w, x, out, scratch, fill);
                }
            )*}
        }

        fn gemm_of(format: Format) -> Option<Run> {
            match format {
                $(Format::$format => Some(gemms::$unpack),)*
                Format::F16 => Some(gemm_f16),
                Format::BF16 => Some(gemm_bf16),
                // Of f32 somebody wants all its bits.
                Format::F32 => None,
            }
        }
    };
}

slab::slabs!(gemms);

// ---- whether there are tiles ---------------------------------------------------------------------------------------------

/// Whether this machine has tiles for bf16 and the system lets this process use them, which is asked for here.
pub(crate) fn tiles() -> bool {
    static TILES: OnceLock<bool> = OnceLock::new();
    *TILES.get_or_init(|| in_hardware() && permitted() || emulated())
}

/// Whether tiles can be had in software: in tests.
fn emulated() -> bool {
    #[cfg(any(test, feature = "emulate-amx"))]
    return emulate::install();
    #[cfg(not(any(test, feature = "emulate-amx")))]
    false
}

fn in_hardware() -> bool {
    /// What the system saves of a thread: XCR0.
    #[target_feature(enable = "xsave")]
    fn saved() -> u64 {
        // SAFETY: reading register 0 needs the feature alone.
        unsafe { _xgetbv(0) }
    }
    // SAFETY: every x86-64 has CPUID. (Since Rust 1.94 the function is safe.)
    #[allow(unused_unsafe)]
    let (last, features, extended) = unsafe { (__cpuid(0).eax, __cpuid(1).ecx, __cpuid_count(7, 0).edx) };
    // CPUID 7.0 EDX: bit 22 AMX-BF16, bit 24 AMX-TILE. CPUID 1 ECX: bit 27 OSXSAVE.
    let bits = 1 << 22 | 1 << 24;
    if last < 7 || extended & bits != bits || features & 1 << 27 == 0 {
        return false;
    }
    // SAFETY: OSXSAVE says that the instruction may be used.
    let saved = unsafe { saved() };
    // Bits 17 and 18: tile configuration and tile data.
    saved >> 17 & 3 == 3
}

/// Asks Linux for the 8 KiB of tiles in every thread's saved state (`arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILE_DATA)`,
/// since 5.16): for the whole process, threads to come included.
fn permitted() -> bool {
    #[cfg(target_os = "linux")]
    // SAFETY: a request that reads no memory of ours.
    return unsafe { libc::syscall(libc::SYS_arch_prctl, 0x1023, 18) } == 0;
    #[cfg(not(target_os = "linux"))]
    false
}

// ---- tiles ---------------------------------------------------------------------------------------------------------------

/// `ldtilecfg`'s operand: palette 1, eight tiles of 16 rows of 64 bytes.
#[repr(C, align(64))]
struct Config {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

static CONFIG: Config = {
    let (mut row_bytes, mut rows) = ([0; 16], [0; 16]);
    let mut i = 0;
    while i < 8 {
        (row_bytes[i], rows[i]) = (64, ROWS as u8);
        i += 1;
    }
    Config { palette: 1, start_row: 0, reserved: [0; 14], row_bytes, rows }
};

/// This thread's tile registers, in use. Given back at the end: what is in use is saved at every switch of threads, and keeps
/// an idle core from sleeping deeply.
struct Tiles;

impl Tiles {
    /// # Safety
    /// There are tiles.
    unsafe fn take() -> Tiles {
        // SAFETY: the operand is 64 bytes and valid.
        unsafe { asm!("ldtilecfg [{}]", in(reg) &raw const CONFIG, options(nostack, preserves_flags)) };
        Tiles
    }
}

impl Drop for Tiles {
    fn drop(&mut self) {
        // SAFETY: a `Tiles` exists where there are tiles.
        unsafe { asm!("tilerelease", options(nostack, preserves_flags)) };
    }
}

/// 32 weights: with two blocks of columns (tiles 0 to 3), with one (tiles 0 and 1).
macro_rules! step {
    (two $k:literal) => {
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
            "tileloadd tmm7, [{b} + {row} + 8192 + 1024*",
            $k,
            "]\n",
            "tdpbf16ps tmm2, tmm4, tmm7\n",
            "tdpbf16ps tmm3, tmm5, tmm7\n",
        )
    };
    (one $k:literal) => {
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

amx! {
    /// `c += a b`: 32 rows, 32 columns, a slab. The four tiles of `c` lie column block by column block.
    ///
    /// # Safety
    /// The tiles are taken.
    unsafe fn two_blocks(a: &A, b: &[[u32; 16 * SLAB / 2]; 2], c: &mut [C; 4]) {
        // SAFETY: two halves of 8 KiB, two blocks of 8 KiB and four tiles of 1 KiB are what the references hold.
        unsafe {
            asm!(
                "tileloadd tmm0, [{c} + {row}]",
                "tileloadd tmm1, [{c} + {row} + 1024]",
                "tileloadd tmm2, [{c} + {row} + 2048]",
                "tileloadd tmm3, [{c} + {row} + 3072]",
                step!(two 0), step!(two 1), step!(two 2), step!(two 3),
                step!(two 4), step!(two 5), step!(two 6), step!(two 7),
                "tilestored [{c} + {row}], tmm0",
                "tilestored [{c} + {row} + 1024], tmm1",
                "tilestored [{c} + {row} + 2048], tmm2",
                "tilestored [{c} + {row} + 3072], tmm3",
                a = in(reg) a, b = in(reg) b, c = in(reg) c, row = in(reg) 64u64,
                out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                options(nostack, preserves_flags),
            )
        }
    }

    /// The same with 16 columns.
    ///
    /// # Safety
    /// The tiles are taken.
    unsafe fn one_block(a: &A, b: &[u32; 16 * SLAB / 2], c: &mut [C; 2]) {
        // SAFETY: two halves of 8 KiB, a block of 8 KiB and two tiles of 1 KiB are what the references hold.
        unsafe {
            asm!(
                "tileloadd tmm0, [{c} + {row}]",
                "tileloadd tmm1, [{c} + {row} + 1024]",
                step!(one 0), step!(one 1), step!(one 2), step!(one 3),
                step!(one 4), step!(one 5), step!(one 6), step!(one 7),
                "tilestored [{c} + {row}], tmm0",
                "tilestored [{c} + {row} + 1024], tmm1",
                a = in(reg) a, b = in(reg) b, c = in(reg) c, row = in(reg) 64u64,
                out("tmm0") _, out("tmm1") _, out("tmm4") _, out("tmm5") _, out("tmm6") _,
                options(nostack, preserves_flags),
            )
        }
    }

    /// `tdpbf16ps` on registers, see [`crate::f32ops::Ops::peak`].
    pub(crate) fn peak(rounds: u64) -> u64 {
        // A round of the other sets is some 12 instructions of one cycle.
        let rounds = rounds / 4;
        // SAFETY: this rung's, so there are tiles; nothing is read or written but registers.
        unsafe {
            let _tiles = Tiles::take();
            asm!(
                "tilezero tmm0", "tilezero tmm1", "tilezero tmm2", "tilezero tmm3",
                "tilezero tmm4", "tilezero tmm5", "tilezero tmm6", "tilezero tmm7",
                "2:",
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tdpbf16ps tmm1, tmm5, tmm6",
                "tdpbf16ps tmm2, tmm4, tmm7",
                "tdpbf16ps tmm3, tmm5, tmm7",
                "dec {n}",
                "jnz 2b",
                n = inout(reg) rounds.max(1) => _,
                out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                options(nostack),
            );
        }
        rounds.max(1) * 4 * (ROWS * COLUMNS * 32) as u64
    }

    // ---- weights to bf16 ---------------------------------------------------------------------------------------------

    /// Rounds 32 values to nearest even.
    #[inline]
    fn bf16(low: __m512, high: __m512) -> __m512i {
        // SAFETY: two vectors of the same 64 bytes.
        unsafe { std::mem::transmute(_mm512_cvtne2ps_pbh(high, low)) }
    }

    /// A slab's codes to weights; those of `SMALL` codes, below 16 and in groups of 32, from tables. Scales and what is added to
    /// each product lie in memory, from which they come to all lanes at no cost; the compiler would shuffle them out of
    /// registers.
    #[inline]
    fn weights<const G: usize, const MIN: bool, const ORDER: u8, const SMALL: bool>(
        slab: Slab, offset: f32, spread: &Spread,
    ) -> [__m512i; STEPS] {
        let q = slab::in_order::<ORDER>(slab.q);
        let (mut scale, mut add) = (Vector([0.0; 16]), Vector([0.0; 16]));
        let minus = match (MIN, G) {
            (false, _) => _mm512_mul_ps(slab.scale, _mm512_set1_ps(-offset)),
            // The minimums are the upper eight.
            (true, 32) => _mm512_shuffle_f32x4::<0b11_10_11_10>(slab.scale, slab.scale),
            (true, _) => slab.min,
        };
        let minus = if MIN { _mm512_xor_ps(minus, _mm512_set1_ps(-0.0)) } else { minus };
        // SAFETY: 16 floats each.
        unsafe {
            _mm512_store_ps(scale.0.as_mut_ptr(), slab.scale);
            _mm512_store_ps(add.0.as_mut_ptr(), minus);
        }
        let (Vector(scale), Vector(add)) = (black_box(&scale), black_box(&add));
        let group = |q: __m512, g: usize| _mm512_fmadd_ps(q, _mm512_set1_ps(scale[g]), _mm512_set1_ps(add[g]));
        let numbers = _mm512_setr_ps(0., 1., 2., 3., 4., 5., 6., 7., 8., 9., 10., 11., 12., 13., 14., 15.);
        let mut to = [_mm512_setzero_si512(); STEPS];
        for (j, q) in q.into_iter().enumerate() {
            if SMALL {
                // A table of what the codes mean in two groups, of which the second follows the first.
                let table = bf16(group(numbers, 2 * j), group(numbers, 2 * j + 1));
                let second = _mm512_inserti64x4::<1>(_mm512_setzero_si512(), _mm256_set1_epi8(16));
                let q = _mm512_or_si512(q, second);
                for h in 0..2 {
                    // Of an index counts the low byte.
                    let index = _mm512_permutexvar_epi8(slab::load512(&spread.words[h]), q);
                    to[2 * j + h] = _mm512_permutexvar_epi16(index, table);
                }
            } else {
                let part = |i: usize| {
                    let q = _mm512_maskz_permutexvar_epi8(0x1111_1111_1111_1111, slab::load512(&spread.dwords[i]), q);
                    group(_mm512_cvtepi32_ps(q), (64 * j + 16 * i) / G)
                };
                to[2 * j] = bf16(part(0), part(1));
                to[2 * j + 1] = bf16(part(2), part(3));
            }
        }
        to
    }

    fn gemm_f16(_: &Kernel, w: Panel<'_>, x: Acts<'_>, out: &mut Out<'_>, scratch: &mut Scratch) {
        amx! {
            fn fill(w: &Panel<'_>, r0: usize, s: usize, a: &mut A) {
                fill_with::<{ 2 * SLAB }>(w, r0, s, a, |b, _| {
                    let mut to = [_mm512_setzero_si512(); STEPS];
                    for (b, to) in b.as_chunks::<64>().0.iter().zip(&mut to) {
                        // SAFETY: twice 32 bytes.
                        let (low, high) = unsafe {
                            (_mm256_loadu_si256(b.as_ptr().cast()), _mm256_loadu_si256(b.as_ptr().add(32).cast()))
                        };
                        *to = bf16(_mm512_cvtph_ps(low), _mm512_cvtph_ps(high));
                    }
                    to
                });
            }
        }
        gemm(w, x, out, scratch, fill);
    }

    fn gemm_bf16(_: &Kernel, w: Panel<'_>, x: Acts<'_>, out: &mut Out<'_>, scratch: &mut Scratch) {
        amx! {
            fn fill(w: &Panel<'_>, r0: usize, s: usize, a: &mut A) {
                fill_with::<{ 2 * SLAB }>(w, r0, s, a, |b, _| {
                    let mut to = [_mm512_setzero_si512(); STEPS];
                    for (b, to) in b.as_chunks::<64>().0.iter().zip(&mut to) {
                        *to = slab::load512(b);
                    }
                    to
                });
            }
        }
        gemm(w, x, out, scratch, fill);
    }

    // ---- matrix times many columns -----------------------------------------------------------------------------------

    /// Slab `s` of up to 32 rows from `r0` on. Rows past the panel's end keep what they had: nobody reads their sums.
    #[inline]
    fn fill_with<const BYTES: usize>(
        w: &Panel<'_>, r0: usize, s: usize, a: &mut A, weights: impl Fn(&[u8; BYTES], &Spread) -> [__m512i; STEPS],
    ) {
        align_stack!();
        let spread = black_box(&Spread::INDICES);
        for r in 0..(w.rows - r0).min(2 * ROWS) {
            let b = w.slab(r0 + r, s);
            // A row's next slab, for which its turn comes after the other rows'. No hardware follows so many streams.
            prefetch(b.as_ptr_range().end, b.len());
            let end;
            let whole = match b.try_into() {
                Ok(whole) => whole,
                Err(_) => {
                    end = padded::<BYTES>(b);
                    &end
                }
            };
            for (step, v) in weights(whole, spread).into_iter().enumerate() {
                let to = &mut a.0[r / ROWS][step][r % ROWS];
                // SAFETY: 64 aligned bytes.
                unsafe { _mm512_store_si512(to.as_mut_ptr().cast(), v) };
            }
        }
    }

    fn gemm(w: Panel<'_>, x: Acts<'_>, out: &mut Out<'_>, scratch: &mut Scratch, fill: Fill) {
        let blocks = x.n().div_ceil(COLUMNS);
        let heights = w.rows.div_ceil(2 * ROWS);
        let c = scratch.floats.take::<C>(heights * blocks * 2);
        let a = &mut scratch.tile.take::<A>(1)[0];
        c.fill(bytemuck::Zeroable::zeroed());
        // SAFETY: this rung's, so there are tiles.
        let tiles = unsafe { Tiles::take() };
        for s in 0..w.slabs() {
            let (twos, last) = x.bf16(s).as_chunks::<2>();
            for h in 0..heights {
                // SAFETY: this rung's.
                unsafe { fill(&w, h * 2 * ROWS, s, a) };
                let (c_twos, c_last) = c[h * blocks * 2..(h + 1) * blocks * 2].as_chunks_mut::<4>();
                for (b, c) in twos.iter().zip(c_twos) {
                    // SAFETY: the tiles are taken.
                    unsafe { two_blocks(a, b, c) }
                }
                if let (Some(b), Ok(c)) = (last.first(), c_last.try_into()) {
                    // SAFETY: the tiles are taken.
                    unsafe { one_block(a, b, c) }
                }
            }
        }
        drop(tiles);
        for h in 0..heights {
            for (block, c) in c[h * blocks * 2..(h + 1) * blocks * 2].as_chunks::<2>().0.iter().enumerate() {
                for (half, c) in c.iter().enumerate() {
                    let r0 = (2 * h + half) * ROWS;
                    store(c, out, r0, ROWS.min(w.rows.saturating_sub(r0)), block * COLUMNS);
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
