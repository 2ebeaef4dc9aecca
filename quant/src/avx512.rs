//! AVX-512 with VNNI.
//!
//! Everything rests on one function a format: a slab of 256 weights from memory to registers ([`slab`]). The matrix-vector
//! body dots it with up to 32 columns at once ([`mod@gemv`]; decode's single column has a body of its own there); the
//! matrix-matrix body stores it interleaved and dots the tile with all ([`mod@gemm`]).
//!
//! ```text
//! gemv   4 rows at once (four memory streams), for each slab:
//!            slab = transposed(unpack(row))    4 x 64 codes; a lane has 4 codes of the same 16 weights in each vector
//!            for each column (with groups of 32 each two, whose lanes are folded to one vector):
//!                acc += float(4 vpdpbusd, one after the other) * (scale * d)       16 lanes, 16 weights each
//!                acc -= min * (d * sum)                                            16 groups, or 8
//!
//! gemm   32 rows at once, for each slab:
//!            unpack 32 rows, transposed: tile[k / 4][row][4]   a vector = 16 rows x 4 positions
//!            for each 6 columns, for each group of 32 positions (or each 4 columns, two groups of 16):
//!                acc[row, column] = sum of vpdpbusd(tile, broadcast of 4 activations)
//!                c[row, column] += acc * (scale[row] * d[column]) - min[row] * (d * sum)[column]
//!            (Q2_K and Q3_K, whose codes with their small scales are bytes still: one scale a slab)
//! ```
//!
//! Codes stay where their bytes have them ([`slab::Order`]): those of a high nibble are 16 times too large for the gemv, and
//! its columns' scales 16 times smaller.
//!
//! Offsets of codes (a q4_0 code is 0..15 for a weight -8..7) cost next to nothing: the integer accumulators start from
//! `-offset * sum(x)` instead of zero.

mod gemm;
mod gemv;
pub(crate) mod slab;

use crate::act::{Act, Acts};
use crate::float_matrix;
use crate::format::{CodeSpec, Codes, Format, SLAB};
use crate::isa::{Isa, avx512};
use crate::kernels::{Kernel, Run, Slot};
use crate::lanes::Avx512;
use crate::panel::{Out, Panel, Scratch, padded};
use gemm::gemm;
pub(crate) use gemm::transpose;
use gemv::gemv;
use slab::{Order, Slab};
use std::arch::x86_64::*;

/// Columns up to which unpacking a slab for a few dots beats interleaving it for many: with groups of 32 some 45, with groups of
/// 16 some 35.
const GEMV_COLS: usize = 32;

/// Installs the kernels of this file.
pub(crate) fn overlay(table: &mut [Kernel]) {
    for (kernel, spec) in table.iter_mut().zip(crate::format::FORMATS) {
        match (kernel.gemm.act, &spec.codes) {
            (Act::Q8, Some(codes)) => {
                kernel.gemv = Slot { isa: Isa::Avx512, act: Act::Q8, run: gemv_of(spec.format) };
                kernel.gemv_cols = GEMV_COLS;
                let (run, unpack) = gemm_of(spec.format, codes);
                kernel.gemm = Slot { isa: Isa::Avx512, act: Act::Q8, run };
                kernel.unpack = unpack;
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

/// A format's slab to codes in memory.
type Unpack = unsafe fn(&[u8], &mut Codes);

/// The gemm, and the unpacker whose codes it takes. Columns of the innermost body: each has two integer and two float
/// accumulators; with groups of 16, two more.
fn gemm_of(format: Format, codes: &CodeSpec) -> (Run, Unpack) {
    let as_it_is = unpack_of(format);
    match (format, codes.group, codes.has_min) {
        (Format::Q2_K, ..) => (gemm::<SLAB, true, 6>, q2_k_merged),
        (Format::Q3_K, ..) => (gemm::<SLAB, false, 6>, q3_k_merged),
        (_, 32, false) => (gemm::<32, false, 6>, as_it_is),
        (_, 32, true) => (gemm::<32, true, 6>, as_it_is),
        (_, 16, false) => (gemm::<16, false, 4>, as_it_is),
        _ => unreachable!("no other format is like that"),
    }
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

        fn unpack_of(format: Format) -> Unpack {
            match format {
                $(Format::$format => stores::$unpack,)*
                _ => unreachable!("a format without codes"),
            }
        }
    };
}

crate::slabs::slabs!(kernels);

avx512! {
    // Blocks of these two are whole slabs.

    fn q2_k_merged(b: &[u8], codes: &mut Codes) {
        store::<16, { Order::PLAIN }>(slab::q2_k_merged(b.try_into().expect("a block")), codes);
    }

    fn q3_k_merged(b: &[u8], codes: &mut Codes) {
        store::<16, { Order::PLAIN }>(slab::q3_k_merged(b.try_into().expect("a block")), codes);
    }

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
