//! Every format and every encoding in plain Rust: what the other kernels mean. Tests compare this file, as those, with f64
//! arithmetic on dequantized weights.

use crate::act::{Act, Acts, Q8Block};
use crate::float_matrix;
use crate::format::{CodeSpec, Codes, SLAB, Spec};
use crate::isa::Isa;
use crate::kernels::{Kernel, Slot};
use crate::lanes::Scalar;
use crate::panel::{Out, Panel, Scratch};

/// Rows of a panel in which a gemm works best: four tiles of 32, whose accumulators for 512 columns fit the L2 cache.
const PANEL_ROWS: usize = 128;

/// The kernel of a format: codes against bytes, or floats against floats.
pub(crate) fn kernel(spec: &Spec) -> Kernel {
    match &spec.codes {
        Some(c) => {
            let slot = Slot { isa: Isa::Scalar, act: Act::Q8, run: codes };
            Kernel { gemv_cols: 1, gemm_rows: PANEL_ROWS, gemv: slot, gemm: slot, unpack: c.unpack }
        }
        None => float_kernel(spec),
    }
}

/// The kernel that dequantizes, whatever the format.
pub(crate) fn float_kernel(spec: &Spec) -> Kernel {
    let slot = Slot { isa: Isa::Scalar, act: Act::F32, run: float_gemm };
    let unpack = spec.codes.as_ref().map_or(no_codes as fn(&[u8], &mut Codes), |c| c.unpack);
    Kernel { gemv_cols: 0, gemm_rows: PANEL_ROWS, gemv: slot, gemm: slot, unpack }
}

fn no_codes(_: &[u8], _: &mut Codes) {
    unreachable!("float formats have no codes, and kernels of codes are never installed for them")
}

fn float_gemm(_: &Kernel, w: Panel<'_>, x: Acts<'_>, out: &mut Out<'_>, scratch: &mut Scratch) {
    float_matrix::gemm::<Scalar, 1, 8>(w, x, out, scratch);
}

/// A slab of weights times a block of activations:
/// `sum over g of scale[g] * d[g] * (dot - offset * sum) - min[g] * d[g] * sum`.
fn dot(c: &CodeSpec, w: &Codes, x: &Q8Block) -> f32 {
    let mut y = 0.0;
    for g in 0..SLAB / c.group {
        let i = g * c.group;
        let dot: i32 = (i..i + c.group).map(|i| w.q[i] as i32 * x.q[i] as i32).sum();
        let sum: i32 = x.sums[i / 16..(i + c.group) / 16].iter().map(|&s| s as i32).sum();
        let d = x.d[i / 32];
        y += w.scale[g] * d * (dot - c.offset * sum) as f32;
        if c.has_min {
            y -= w.min[g] * d * sum as f32;
        }
    }
    y
}

fn codes(_: &Kernel, w: Panel<'_>, x: Acts<'_>, out: &mut Out<'_>, _: &mut Scratch) {
    let c = w.format.spec().codes.as_ref().expect("installed for formats with codes");
    for r in 0..w.rows {
        for col in 0..x.n() {
            out.column(col, r, 1)[0] = 0.0;
        }
        for s in 0..w.slabs() {
            let mut slab = Codes::ZERO;
            (c.unpack)(w.slab(r, s), &mut slab);
            for (col, x) in x.q8(s).iter().enumerate() {
                out.column(col, r, 1)[0] += dot(c, &slab, x);
            }
        }
    }
}

/// Byte products in plain Rust, see [`crate::f32ops::Ops::peak`].
pub(crate) fn peak(rounds: u64) -> u64 {
    let (w, x) = (std::hint::black_box([3u8; SLAB]), std::hint::black_box([5i8; SLAB]));
    for _ in 0..rounds {
        let (w, x) = (std::hint::black_box(&w), std::hint::black_box(&x));
        std::hint::black_box(w.iter().zip(x).map(|(&w, &x)| w as i32 * x as i32).sum::<i32>());
    }
    rounds * SLAB as u64
}
