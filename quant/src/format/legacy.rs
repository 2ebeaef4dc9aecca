//! The formats of 32 weights a block: one f16 scale `d`, in some an f16 minimum `m`.
//!
//! ```text
//! Q4_0  d, 16 bytes            w = d * (q - 8)      byte j: weight j in the low nibble, weight j + 16 in the high one
//! Q4_1  d, m, 16 bytes         w = d * q + m
//! Q5_0  d, 4 + 16 bytes        w = d * (q - 16)     bit i of the 4 bytes is the fifth bit of weight i
//! Q5_1  d, m, 4 + 16 bytes     w = d * q + m
//! Q8_0  d, 32 signed bytes     w = d * q
//! ```

use super::{Codes, f16_at, part};

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

/// The codes of a block with fifth bits `h` and nibbles `b`.
fn five_bits(h: &[u8; 4], b: &[u8; 16], q: &mut [u8; 32]) {
    let h = u32::from_le_bytes(*h);
    for j in 0..16 {
        q[j] = b[j] & 15 | ((h >> j) as u8 & 1) << 4;
        q[j + 16] = b[j] >> 4 | ((h >> (j + 16)) as u8 & 1) << 4;
    }
}

pub(super) mod q5_0 {
    use super::*;

    pub fn dequant(bytes: &[u8], out: &mut [f32]) {
        for (b, o) in bytes.as_chunks::<22>().0.iter().zip(out.as_chunks_mut::<32>().0) {
            let (d, mut q) = (f16_at(b, 0), [0; 32]);
            five_bits(&part(b, 2), &part(b, 6), &mut q);
            *o = q.map(|q| (q as i32 - 16) as f32 * d);
        }
    }

    pub fn unpack(bytes: &[u8], c: &mut Codes) {
        for (g, b) in bytes.as_chunks::<22>().0.iter().enumerate() {
            c.scale[g] = f16_at(b, 0);
            five_bits(&part(b, 2), &part(b, 6), &mut c.q.as_chunks_mut().0[g]);
        }
    }
}

pub(super) mod q5_1 {
    use super::*;

    pub fn dequant(bytes: &[u8], out: &mut [f32]) {
        for (b, o) in bytes.as_chunks::<24>().0.iter().zip(out.as_chunks_mut::<32>().0) {
            let (d, m, mut q) = (f16_at(b, 0), f16_at(b, 2), [0; 32]);
            five_bits(&part(b, 4), &part(b, 8), &mut q);
            *o = q.map(|q| q as f32 * d + m);
        }
    }

    pub fn unpack(bytes: &[u8], c: &mut Codes) {
        for (g, b) in bytes.as_chunks::<24>().0.iter().enumerate() {
            (c.scale[g], c.min[g]) = (f16_at(b, 0), -f16_at(b, 2));
            five_bits(&part(b, 4), &part(b, 8), &mut c.q.as_chunks_mut().0[g]);
        }
    }
}
