//! The formats of 32 weights a block: one f16 scale `d`, in some an f16 minimum `m`.
//!
//! ```text
//! Q4_0  d, 16 bytes            w = d * (q - 8)      byte j: weight j in the low nibble, weight j + 16 in the high one
//! Q4_1  d, m, 16 bytes         w = d * q + m
//! Q8_0  d, 32 signed bytes     w = d * q
//! ```

use super::Codes;
use half::f16;

fn f16_at(b: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([b[at], b[at + 1]]).to_f32()
}

pub(super) mod q4_0 {
    use super::*;

    pub fn dequant(bytes: &[u8], out: &mut [f32]) {
        for (b, o) in bytes.as_chunks::<18>().0.iter().zip(out.as_chunks_mut::<32>().0) {
            let d = f16_at(b, 0);
            for j in 0..16 {
                o[j] = ((b[2 + j] & 15) as i32 - 8) as f32 * d;
                o[j + 16] = ((b[2 + j] >> 4) as i32 - 8) as f32 * d;
            }
        }
    }

    pub fn unpack(bytes: &[u8], c: &mut Codes) {
        for (g, b) in bytes.as_chunks::<18>().0.iter().enumerate() {
            c.scale[g] = f16_at(b, 0);
            for j in 0..16 {
                c.q[g * 32 + j] = b[2 + j] & 15;
                c.q[g * 32 + j + 16] = b[2 + j] >> 4;
            }
        }
    }
}

pub(super) mod q4_1 {
    use super::*;

    pub fn dequant(bytes: &[u8], out: &mut [f32]) {
        for (b, o) in bytes.as_chunks::<20>().0.iter().zip(out.as_chunks_mut::<32>().0) {
            let (d, m) = (f16_at(b, 0), f16_at(b, 2));
            for j in 0..16 {
                o[j] = (b[4 + j] & 15) as f32 * d + m;
                o[j + 16] = (b[4 + j] >> 4) as f32 * d + m;
            }
        }
    }

    pub fn unpack(bytes: &[u8], c: &mut Codes) {
        for (g, b) in bytes.as_chunks::<20>().0.iter().enumerate() {
            c.scale[g] = f16_at(b, 0);
            c.min[g] = -f16_at(b, 2);
            for j in 0..16 {
                c.q[g * 32 + j] = b[4 + j] & 15;
                c.q[g * 32 + j + 16] = b[4 + j] >> 4;
            }
        }
    }
}

pub(super) mod q8_0 {
    use super::*;

    pub fn dequant(bytes: &[u8], out: &mut [f32]) {
        for (b, o) in bytes.as_chunks::<34>().0.iter().zip(out.as_chunks_mut::<32>().0) {
            let d = f16_at(b, 0);
            for j in 0..32 {
                o[j] = b[2 + j] as i8 as f32 * d;
            }
        }
    }

    pub fn unpack(bytes: &[u8], c: &mut Codes) {
        for (g, b) in bytes.as_chunks::<34>().0.iter().enumerate() {
            c.scale[g] = f16_at(b, 0);
            for j in 0..32 {
                c.q[g * 32 + j] = b[2 + j] ^ 0x80;
            }
        }
    }
}
