//! F32, F16 and BF16, rounded to nearest even.

pub(super) fn f32(x: &[f32], out: &mut [u8]) {
    for (x, o) in x.iter().zip(out.as_chunks_mut::<4>().0) {
        *o = x.to_le_bytes();
    }
}

pub(super) fn f16(x: &[f32], out: &mut [u8]) {
    for (x, o) in x.iter().zip(out.as_chunks_mut::<2>().0) {
        *o = super::f16_bytes(*x);
    }
}

pub(super) fn bf16(x: &[f32], out: &mut [u8]) {
    for (x, o) in x.iter().zip(out.as_chunks_mut::<2>().0) {
        *o = half::bf16::from_f32(*x).to_le_bytes();
    }
}
