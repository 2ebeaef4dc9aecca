//! IQ4_NL and IQ4_XS: four-bit indices into sixteen values that lie denser around zero.
//!
//! ```text
//! IQ4_NL  d, 16 bytes                                            w = d * value[q]               blocks of 32
//! IQ4_XS  d, 8 x 2 high scale bits, 8 x 4 low ones, 128 bytes    w = d * (s - 32) * value[q]    8 groups of 32
//! ```

use super::{Codes, dequant_codes, f16_at, part};

/// The values (ggml's `kvalues_iq4nl`).
pub const VALUES: [i8; 16] = [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113];

/// Their codes: offset 128.
pub const CODES: [u8; 16] = {
    let (mut codes, mut i) = ([0; 16], 0);
    while i < 16 {
        codes[i] = VALUES[i] as u8 ^ 0x80;
        i += 1;
    }
    codes
};

/// 32 codes of 16 bytes: low nibbles first.
fn codes(b: &[u8; 16], q: &mut [u8; 32]) {
    for j in 0..16 {
        q[j] = CODES[b[j] as usize & 15];
        q[j + 16] = CODES[b[j] as usize >> 4];
    }
}

pub(super) mod nl {
    use super::*;

    pub fn dequant(bytes: &[u8], out: &mut [f32]) {
        for (b, o) in bytes.as_chunks::<18>().0.iter().zip(out.as_chunks_mut::<32>().0) {
            let (d, mut q) = (f16_at(b, 0), [0; 32]);
            codes(&part(b, 2), &mut q);
            *o = q.map(|q| d * (q as i32 - 128) as f32);
        }
    }

    pub fn unpack(bytes: &[u8], c: &mut Codes) {
        for (g, b) in bytes.as_chunks::<18>().0.iter().enumerate() {
            c.scale[g] = f16_at(b, 0);
            codes(&part(b, 2), &mut c.q.as_chunks_mut().0[g]);
        }
    }
}

pub(super) mod xs {
    use super::*;

    pub fn dequant(bytes: &[u8], out: &mut [f32]) {
        dequant_codes::<136>(bytes, out, unpack, 32, 128);
    }

    pub fn unpack(b: &[u8], c: &mut Codes) {
        let (d, high) = (f16_at(b, 0), u16::from_le_bytes(part(b, 2)));
        for g in 0..8 {
            let low = b[4 + g / 2] >> (4 * (g % 2)) & 15;
            let s = low as i32 | ((high >> (2 * g) & 3) as i32) << 4;
            c.scale[g] = d * (s - 32) as f32;
            codes(&part(b, 8 + 16 * g), &mut c.q.as_chunks_mut().0[g]);
        }
    }
}
