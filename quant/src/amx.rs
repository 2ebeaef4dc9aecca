//! AMX: many columns at once, in bf16 tiles.
//!
//! This file says whether there are tiles, and brings weights into them; [`gemm`] multiplies. A group's scale is multiplied
//! into the weight before it is rounded: the relative error of a product is at most 2^-8, without the noise of activations in
//! bytes (0.5 to 1 %), and every format costs the same.
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
mod block;
mod gemm;

/// Rows of a tile.
const ROWS: usize = 16;
/// Tiles along a slab: 32 weights in each.
const STEPS: usize = SLAB / 32;

/// A slab of 32 rows of weights: two halves of eight tiles.
#[derive(Clone, Copy, bytemuck::Zeroable, bytemuck::Pod)]
#[repr(C, align(64))]
struct A([[[[u16; 32]; ROWS]; STEPS]; 2]);

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
#[derive(Clone, Copy, bytemuck::Zeroable, bytemuck::Pod)]
#[repr(C, align(64))]
struct Vector([f32; 16]);

/// Installs the kernels of this file, over those of AVX-512.
pub(crate) fn overlay(table: &mut [Kernel]) {
    for (kernel, spec) in table.iter_mut().zip(crate::format::FORMATS) {
        let Some(run) = gemm_of(spec.format) else { continue };
        kernel.gemm = Slot { isa: Isa::Amx, act: Act::Bf16, run };
        kernel.gemv_cols = kernel.gemv_cols.max(COLUMNS);
        kernel.gemm_rows = gemm::PANEL_ROWS;
    }
}

/// Slab `s` of up to 32 rows of a panel, from row `r0` on, in bf16. The rows' next slab is asked for `ahead` slabs on.
type Fill = unsafe fn(w: &Panel<'_>, r0: usize, s: usize, ahead: usize, a: &mut A);

/// The matrix-matrix kernel of each format with codes.
macro_rules! gemms {
    ($($format:ident $unpack:ident $bytes:literal $group:literal $min:literal $order:ident;)*) => {
        mod gemms {
            use super::*;
            amx! {$(
                pub fn $unpack(_: &Kernel, w: Panel<'_>, x: Acts<'_>, out: &mut Out<'_>, scratch: &mut Scratch) {
                    amx! {
                        fn fill(w: &Panel<'_>, r0: usize, s: usize, ahead: usize, a: &mut A) {
                            const OFFSET: f32 = match Format::$format.spec().codes {
                                Some(ref c) => c.offset as f32,
                                None => 0.0,
                            };
                            const SMALL: bool = matches!(Format::$format, Format::Q4_0 | Format::Q4_1 | Format::Q4_K);
                            fill_with::<$bytes>(w, r0, s, ahead, a, |b, spread| {
                                weights::<$group, $min, { Order::$order }, SMALL>(slab::$unpack(b), OFFSET, spread)
                            });
                        }
                    }
                    // SAFETY: this rung's table calls it, `fill` is of the same features.
                    unsafe { gemm::gemm(w, x, out, scratch, fill) };
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

crate::slabs::slabs!(gemms);

// ---- whether there are tiles ---------------------------------------------------------------------------------------------

/// Whether this machine has tiles for bf16 and the system lets this process use them, which is asked for here.
pub(crate) fn tiles() -> bool {
    static TILES: OnceLock<bool> = OnceLock::new();
    *TILES.get_or_init(|| in_hardware() && permitted() || crate::isa::emulated())
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

/// Assembly that may change any tile register.
macro_rules! registers {
    ($line:expr $(, $name:ident = $($operand:tt)+)?) => {
        asm!(
            $line,
            $($name = $($operand)+,)?
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
            out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
            options(nostack, preserves_flags),
        )
    };
}

/// This thread's tile registers, in use. Given back at the end: what is in use is saved at every switch of threads, and keeps
/// an idle core from sleeping deeply.
struct Tiles;

impl Tiles {
    /// # Safety
    /// There are tiles.
    unsafe fn take() -> Tiles {
        // SAFETY: the operand is 64 bytes and valid.
        unsafe { registers!("ldtilecfg [{config}]", config = in(reg) &raw const CONFIG) };
        Tiles
    }
}

impl Drop for Tiles {
    fn drop(&mut self) {
        // SAFETY: a `Tiles` exists where there are tiles.
        unsafe { registers!("tilerelease") };
    }
}

amx! {
    /// `tdpbf16ps` on registers, see [`crate::f32ops::Ops::peak`].
    ///
    /// # Safety
    /// There are tiles.
    pub(crate) unsafe fn peak(rounds: u64) -> u64 {
        // A round of the other sets is some 12 instructions of one cycle.
        let rounds = rounds / 4;
        // SAFETY: the caller's promise; nothing is read or written but registers.
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
        // A table of what the codes mean in two groups, and where its bytes lie: those of the second group follow.
        let table = |g: usize| bf16(group(numbers, g), group(numbers, g + 1));
        let first = _mm512_set1_epi16(0x0100);
        if SMALL && ORDER == Order::NIBBLES {
            let (second, doubled) = (_mm512_or_si512(first, _mm512_set1_epi8(32)), _mm512_set1_epi8(2 * 15));
            for i in 0..4 {
                let bytes = _mm512_permutexvar_epi8(slab::load512(&spread.words[i % 2]), slab.q[i / 2 * 2]);
                let low = _mm512_ternarylogic_epi32::<0xF8>(first, _mm512_slli_epi16::<1>(bytes), doubled);
                let high = _mm512_ternarylogic_epi32::<0xF8>(second, _mm512_srli_epi16::<3>(bytes), doubled);
                let table = table(2 * i);
                to[2 * i] = _mm512_permutexvar_epi8(low, table);
                to[2 * i + 1] = _mm512_permutexvar_epi8(high, table);
            }
            return to;
        }
        for (j, q) in slab::in_order::<ORDER>(slab.q).into_iter().enumerate() {
            if SMALL {
                let table = table(2 * j);
                let second = _mm512_inserti64x4::<1>(_mm512_setzero_si512(), _mm256_set1_epi8(32));
                let doubled = _mm512_or_si512(_mm512_add_epi8(q, q), second);
                for h in 0..2 {
                    let index = _mm512_permutexvar_epi8(slab::load512(&spread.words[h]), doubled);
                    to[2 * j + h] = _mm512_permutexvar_epi8(_mm512_or_si512(index, first), table);
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
            fn fill(w: &Panel<'_>, r0: usize, s: usize, ahead: usize, a: &mut A) {
                fill_with::<{ 2 * SLAB }>(w, r0, s, ahead, a, |b, _| {
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
        // SAFETY: this rung's table calls it, `fill` is of the same features.
        unsafe { gemm::gemm(w, x, out, scratch, fill) };
    }

    fn gemm_bf16(_: &Kernel, w: Panel<'_>, x: Acts<'_>, out: &mut Out<'_>, scratch: &mut Scratch) {
        amx! {
            fn fill(w: &Panel<'_>, r0: usize, s: usize, ahead: usize, a: &mut A) {
                fill_with::<{ 2 * SLAB }>(w, r0, s, ahead, a, |b, _| {
                    let mut to = [_mm512_setzero_si512(); STEPS];
                    for (b, to) in b.as_chunks::<64>().0.iter().zip(&mut to) {
                        *to = slab::load512(b);
                    }
                    to
                });
            }
        }
        // SAFETY: this rung's table calls it, `fill` is of the same features.
        unsafe { gemm::gemm(w, x, out, scratch, fill) };
    }

    // ---- matrix times many columns -----------------------------------------------------------------------------------

    /// Slab `s` of up to 32 rows from `r0` on. Rows past the panel's end keep what they had: nobody reads their sums.
    #[inline]
    fn fill_with<const BYTES: usize>(
        w: &Panel<'_>, r0: usize, s: usize, ahead: usize, a: &mut A,
        weights: impl Fn(&[u8; BYTES], &Spread) -> [__m512i; STEPS],
    ) {
        align_stack!();
        let spread = black_box(&Spread::INDICES);
        for (r, row) in w.data[r0 * w.row_bytes..].chunks(w.row_bytes).take(2 * ROWS).enumerate() {
            let b = &row[s * BYTES..];
            // A row's next slab, for which its turn comes after the other rows'. No hardware follows so many streams.
            prefetch::<false>(b.as_ptr().wrapping_add(ahead * BYTES), BYTES);
            let end;
            let whole = match b.first_chunk() {
                Some(whole) => whole,
                None => {
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
}
