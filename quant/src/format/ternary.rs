//! TQ1_0 and TQ2_0: weights that are -1, 0 or 1 times one scale (BitNet, TriLM).
//!
//! ```text
//! TQ1_0  52 bytes of base-3 digits, d    w = d * (q - 1)    5 digits a byte in the first 48, 4 in the last 4
//! TQ2_0  64 bytes of 2 bits, d           w = d * (q - 1)
//! ```
//!
//! A byte of TQ1_0 is the number `0.q0 q1 q2 q3 q4` in base 3, times 256 and rounded up: digit n is the integer part of
//! `3 * frac(3^n * byte / 256)`. The digits of one place of consecutive bytes are consecutive weights.

use super::{Codes, SLAB, f16_at, part};

fn dequant<const BYTES: usize>(bytes: &[u8], out: &mut [f32], unpack: fn(&[u8], &mut Codes)) {
    for (b, o) in bytes.as_chunks::<BYTES>().0.iter().zip(out.as_chunks_mut::<SLAB>().0) {
        let mut c = Codes::ZERO;
        unpack(b, &mut c);
        for (o, &q) in o.iter_mut().zip(&c.q) {
            *o = (q as i32 - 1) as f32 * c.scale[0];
        }
    }
}

pub(super) mod tq1 {
    use super::*;

    pub fn dequant(bytes: &[u8], out: &mut [f32]) {
        super::dequant::<54>(bytes, out, unpack);
    }

    /// `places` digits of each byte.
    fn digits<const N: usize>(b: &[u8; N], places: usize, q: &mut [u8]) {
        let mut power = 1u8;
        for q in q.as_chunks_mut::<N>().0.iter_mut().take(places) {
            for i in 0..N {
                q[i] = ((b[i].wrapping_mul(power) as u16 * 3) >> 8) as u8;
            }
            power = power.wrapping_mul(3);
        }
    }

    pub fn unpack(b: &[u8], c: &mut Codes) {
        c.scale[..8].fill(f16_at(b, 52));
        digits::<32>(&part(b, 0), 5, &mut c.q[..160]);
        digits::<16>(&part(b, 32), 5, &mut c.q[160..240]);
        digits::<4>(&part(b, 48), 4, &mut c.q[240..]);
    }
}

pub(super) mod tq2 {
    use super::*;

    pub fn dequant(bytes: &[u8], out: &mut [f32]) {
        super::dequant::<66>(bytes, out, unpack);
    }

    pub fn unpack(b: &[u8], c: &mut Codes) {
        c.scale[..8].fill(f16_at(b, 64));
        super::super::kquant::crumbs(&part(b, 0), &mut c.q);
    }
}
