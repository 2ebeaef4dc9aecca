//! The k-quants: super-blocks of 256 weights whose group scales are themselves quantized, against one or two f16.
//!
//! ```text
//!        bytes                                          w
//! Q2_K   16 scales|mins (4+4 bit), 64 q, d, dmin        d * s * q - dmin * m       16 groups of 16
//! Q3_K   32 high bits, 64 q, 12 scales (6 bit), d       d * (s - 32) * (q - 4)     16 groups of 16
//! Q4_K   d, dmin, 12 scales|mins (6+6 bit), 128 q       d * s * q - dmin * m        8 groups of 32
//! Q5_K   as Q4_K, with 32 bytes of high bits before q   d * s * q - dmin * m        8 groups of 32
//! Q6_K   128 low q, 64 high q, 16 scales (i8), d        d * s * (q - 32)           16 groups of 16
//! Q8_K   d (f32), 256 signed bytes, 16 sums             d * q                      one group of 256
//! ```
//!
//! The fields of a byte belong to weights that are 32 (2-bit, 4-bit) or 64 (Q6_K's low nibbles) apart, so that a vector of
//! bytes shifted by one amount is a stretch of consecutive weights.

use super::{Codes, SLAB, dequant_codes, f16_at, part};

/// The 6-bit scales and minimums of Q4_K and Q5_K.
fn scales_6bit(b: &[u8; 12]) -> ([u8; 8], [u8; 8]) {
    let (mut s, mut m) = ([0; 8], [0; 8]);
    for j in 0..4 {
        s[j] = b[j] & 63;
        m[j] = b[j + 4] & 63;
        s[j + 4] = b[j + 8] & 15 | (b[j] >> 6) << 4;
        m[j + 4] = b[j + 8] >> 4 | (b[j + 4] >> 6) << 4;
    }
    (s, m)
}

/// 256 four-bit codes of 128 bytes.
fn nibbles(b: &[u8; 128], q: &mut [u8; SLAB]) {
    for (b, q) in b.as_chunks::<32>().0.iter().zip(q.as_chunks_mut::<64>().0) {
        for i in 0..32 {
            q[i] = b[i] & 15;
            q[i + 32] = b[i] >> 4;
        }
    }
}

/// 256 two-bit codes of 64 bytes.
pub(super) fn crumbs(b: &[u8; 64], q: &mut [u8; SLAB]) {
    for (b, q) in b.as_chunks::<32>().0.iter().zip(q.as_chunks_mut::<128>().0) {
        for i in 0..32 {
            for j in 0..4 {
                q[i + 32 * j] = b[i] >> (2 * j) & 3;
            }
        }
    }
}

/// Adds bit `g` of byte `i` to the code of weight `32 g + i`, as `1 << to`.
fn high_bits(b: &[u8; 32], to: u32, q: &mut [u8; SLAB]) {
    for (g, q) in q.as_chunks_mut::<32>().0.iter_mut().enumerate() {
        for i in 0..32 {
            q[i] |= (b[i] >> g & 1) << to;
        }
    }
}

pub(super) mod q2 {
    use super::*;

    pub fn dequant(bytes: &[u8], out: &mut [f32]) {
        dequant_codes::<84>(bytes, out, unpack, 16, 0);
    }

    pub fn unpack(b: &[u8], c: &mut Codes) {
        let (d, dmin) = (f16_at(b, 80), f16_at(b, 82));
        for (g, s) in b[..16].iter().enumerate() {
            c.scale[g] = d * (s & 15) as f32;
            c.min[g] = dmin * (s >> 4) as f32;
        }
        crumbs(&part(b, 16), &mut c.q);
    }
}

pub(super) mod q3 {
    use super::*;

    pub fn dequant(bytes: &[u8], out: &mut [f32]) {
        dequant_codes::<110>(bytes, out, unpack, 16, 4);
    }

    pub fn unpack(b: &[u8], c: &mut Codes) {
        let (s, d): ([u8; 12], f32) = (part(b, 96), f16_at(b, 108));
        for g in 0..16 {
            // Low nibbles: 8 bytes, the low halves first; high bits: 4 bytes, two bits for each of four.
            let low = if g < 8 { s[g] & 15 } else { s[g - 8] >> 4 };
            let high = s[8 + g % 4] >> (2 * (g / 4)) & 3;
            c.scale[g] = d * ((low | high << 4) as i32 - 32) as f32;
        }
        crumbs(&part(b, 32), &mut c.q);
        high_bits(&part(b, 0), 2, &mut c.q);
    }
}

pub(super) mod q4 {
    use super::*;

    pub fn dequant(bytes: &[u8], out: &mut [f32]) {
        dequant_codes::<144>(bytes, out, unpack, 32, 0);
    }

    pub fn unpack(b: &[u8], c: &mut Codes) {
        scales(b, c);
        nibbles(&part(b, 16), &mut c.q);
    }

    /// `d * scale` and `dmin * min` of Q4_K and Q5_K.
    pub(super) fn scales(b: &[u8], c: &mut Codes) {
        let (d, dmin, (s, m)) = (f16_at(b, 0), f16_at(b, 2), scales_6bit(&part(b, 4)));
        for g in 0..8 {
            c.scale[g] = d * s[g] as f32;
            c.min[g] = dmin * m[g] as f32;
        }
    }
}

pub(super) mod q5 {
    use super::*;

    pub fn dequant(bytes: &[u8], out: &mut [f32]) {
        dequant_codes::<176>(bytes, out, unpack, 32, 0);
    }

    pub fn unpack(b: &[u8], c: &mut Codes) {
        q4::scales(b, c);
        nibbles(&part(b, 48), &mut c.q);
        high_bits(&part(b, 16), 4, &mut c.q);
    }
}

pub(super) mod q6 {
    use super::*;

    pub fn dequant(bytes: &[u8], out: &mut [f32]) {
        dequant_codes::<210>(bytes, out, unpack, 16, 32);
    }

    pub fn unpack(b: &[u8], c: &mut Codes) {
        let (low, high): ([u8; 128], [u8; 64]) = (part(b, 0), part(b, 128));
        for n in 0..2 {
            let (low, high) = (&low[64 * n..][..64], &high[32 * n..][..32]);
            let q = &mut c.q.as_chunks_mut::<128>().0[n];
            for i in 0..32 {
                q[i] = low[i] & 15 | (high[i] & 3) << 4;
                q[i + 32] = low[i + 32] & 15 | (high[i] >> 2 & 3) << 4;
                q[i + 64] = low[i] >> 4 | (high[i] >> 4 & 3) << 4;
                q[i + 96] = low[i + 32] >> 4 | (high[i] >> 6) << 4;
            }
        }
        let d = f16_at(b, 208);
        for g in 0..16 {
            c.scale[g] = d * b[192 + g] as i8 as f32;
        }
    }
}

/// ggml's encoding of activations; now and then somebody stores weights in it.
pub(super) mod q8 {
    use super::*;

    pub fn dequant(bytes: &[u8], out: &mut [f32]) {
        dequant_codes::<292>(bytes, out, unpack, 32, 128);
    }

    pub fn unpack(b: &[u8], c: &mut Codes) {
        c.scale[..8].fill(f32::from_le_bytes(part(b, 0)));
        c.q = part::<SLAB>(b, 4).map(|q| q ^ 0x80);
    }
}
