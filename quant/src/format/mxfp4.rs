//! MXFP4: four-bit floats (E2M1) with a common power of two, as the OCP Microscaling specification defines them.
//!
//! ```text
//! e, 16 bytes    w = 2^(e - 128) * value[q]    value: twice 0, 1/2, 1, 3/2, 2, 3, 4, 6 and their negatives
//! ```

use super::{Codes, part};

/// What is added to a value to make its code.
pub(super) const OFFSET: i32 = 12;
/// The codes of the sixteen values. Both zeros are zero.
pub(crate) const CODES: [u8; 16] = [12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0];

/// `2^(e - 128)`; the two smallest are subnormal.
pub(crate) fn scale(e: u8) -> f32 {
    f32::from_bits(if e < 2 { 0x0020_0000 << e } else { (e as u32 - 1) << 23 })
}

pub(super) fn dequant(bytes: &[u8], out: &mut [f32]) {
    for (b, o) in bytes.as_chunks::<17>().0.iter().zip(out.as_chunks_mut::<32>().0) {
        let (d, mut q) = (scale(b[0]), [0; 32]);
        codes(&part(b, 1), &mut q);
        *o = q.map(|q| (q as i32 - OFFSET) as f32 * d);
    }
}

pub(super) fn unpack(bytes: &[u8], c: &mut Codes) {
    for (g, b) in bytes.as_chunks::<17>().0.iter().enumerate() {
        c.scale[g] = scale(b[0]);
        codes(&part(b, 1), &mut c.q.as_chunks_mut().0[g]);
    }
}

fn codes(b: &[u8; 16], q: &mut [u8; 32]) {
    for j in 0..16 {
        q[j] = CODES[b[j] as usize & 15];
        q[j + 16] = CODES[b[j] as usize >> 4];
    }
}
