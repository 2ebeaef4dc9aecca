//! F32, F16 and BF16: weights that are floats already. Little-endian, as everything in GGUF.

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

pub(super) fn f32(bytes: &[u8], out: &mut [f32]) {
    for (o, b) in out.iter_mut().zip(bytes.as_chunks::<4>().0) {
        *o = f32::from_le_bytes(*b);
    }
}

pub(super) fn f16(bytes: &[u8], out: &mut [f32]) {
    // The crate's slice conversion uses F16C, eight at a time; one at a time it asks for the CPU's features each.
    for (o, b) in out.chunks_mut(64).zip(bytes.chunks(128)) {
        let mut half = [f16::ZERO; 64];
        for (h, b) in half.iter_mut().zip(b.as_chunks::<2>().0) {
            *h = f16::from_le_bytes(*b);
        }
        half[..o.len()].convert_to_f32_slice(o);
    }
}

pub(super) fn bf16(bytes: &[u8], out: &mut [f32]) {
    for (o, b) in out.iter_mut().zip(bytes.as_chunks::<2>().0) {
        *o = bf16::from_le_bytes(*b).to_f32();
    }
}
