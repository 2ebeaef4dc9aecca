//! IQ1, IQ2 and IQ3: eight (or four) magnitudes at a time, named by an index into a grid ([`grid`]), with signs apart.
//!
//! ```text
//!          bytes                                                                  w
//! IQ2_XXS  d, 8 x (4 grid indices, u32: 4 x 7 signs, 4 bit scale)                 d * (s + 1/2) / 4 * ±grid   8 groups of 32
//! IQ2_XS   d, 32 x u16 (9 bit index, 7 signs), 8 x 2 scales                       d * (s + 1/2) / 4 * ±grid  16 groups of 16
//! IQ2_S    d, 32 indices, 32 signs, 8 x 4 x 2 high index bits, 8 x 2 scales       d * (s + 1/2) / 4 * ±grid  16 groups of 16
//! IQ3_XXS  d, 64 indices, 8 x u32 (4 x 7 signs, 4 bit scale)                      d * (s + 1/2) / 2 * ±grid   8 groups of 32
//! IQ3_S    d, 64 indices, 8 x 8 high index bits, 32 signs, 4 x 2 scales           d * (2 s + 1) * ±grid       8 groups of 32
//! IQ1_S    d, 32 indices, 8 x u16 (4 x 3 high bits, 3 bit scale, sign of 1/8)     d * (2 s + 1) * (grid ± 1/8)   8 of 32
//! IQ1_M    32 indices, 16 x 2 x (3 high bits, sign of 1/8), 4 x u16 (4 x 3 bit    d * (2 s + 1) * (grid ± 1/8)  16 of 16
//!          scales, a quarter of d)
//! ```
//!
//! Seven signs are given, the eighth makes their number even. Codes of IQ2 and IQ3 are magnitudes with their sign, offset
//! 64. Codes of IQ1 are eight times the weight, `8 grid ± 1`, offset 9: integers, so that the shift by 1/8 costs nothing.

pub(crate) mod grid;

use super::{Codes, dequant_codes, f16_at, part};

/// What is added to the codes of IQ2 and IQ3.
pub(super) const OFFSET: i32 = 64;
/// What is added to the codes of IQ1.
pub(super) const OFFSET_1: i32 = 9;

/// All signs from the seven that are stored: bit `j` is set where value `j` is negative.
fn signs(seven: u32) -> u8 {
    let s = seven as u8 & 127;
    s | (s.count_ones() as u8 & 1) << 7
}

/// Eight magnitudes, below 64 and not 0, and their signs to codes: all eight bytes of a word at once.
fn signed(magnitudes: [u8; 8], signs: u8) -> [u8; 8] {
    const ONES: u64 = 0x0101_0101_0101_0101;
    // Bit j of the signs alone in byte j; then 1 in the bytes that have theirs. No byte carries into the next.
    let bits = (signs as u64 * ONES) & 0x8040_2010_0804_0201;
    let negative = (bits + 0x7F * ONES) >> 7 & ONES;
    // Two's complement of seven bits, and 64 more.
    (((u64::from_le_bytes(magnitudes) ^ (negative * 0x7F)) + negative) ^ (0x40 * ONES)).to_le_bytes()
}

/// Two halves of a grid point.
fn pair(a: [u8; 4], b: [u8; 4]) -> [u8; 8] {
    (u32::from_le_bytes(a) as u64 | (u32::from_le_bytes(b) as u64) << 32).to_le_bytes()
}

pub(super) mod xxs2 {
    use super::*;

    pub fn dequant(bytes: &[u8], out: &mut [f32]) {
        dequant_codes::<66>(bytes, out, unpack, 32, OFFSET);
    }

    pub fn unpack(b: &[u8], c: &mut Codes) {
        let (d, q) = (f16_at(b, 0), c.q.as_chunks_mut::<8>().0);
        for (g, b) in b[2..].as_chunks::<8>().0.iter().enumerate() {
            let high = u32::from_le_bytes(part(b, 4));
            c.scale[g] = d * (0.5 + (high >> 28) as f32) * 0.25;
            for l in 0..4 {
                q[4 * g + l] = signed(grid::IQ2_XXS[b[l] as usize], signs(high >> (7 * l)));
            }
        }
    }
}

/// The two 4-bit scales of each 32 weights in IQ2_XS and IQ2_S.
fn scales_2(d: f32, s: &[u8; 8], scale: &mut [f32; 16]) {
    for (s, scale) in s.iter().zip(scale.as_chunks_mut::<2>().0) {
        *scale = [d * (0.5 + (s & 15) as f32) * 0.25, d * (0.5 + (s >> 4) as f32) * 0.25];
    }
}

pub(super) mod xs2 {
    use super::*;

    pub fn dequant(bytes: &[u8], out: &mut [f32]) {
        dequant_codes::<74>(bytes, out, unpack, 16, OFFSET);
    }

    pub fn unpack(b: &[u8], c: &mut Codes) {
        scales_2(f16_at(b, 0), &part(b, 66), &mut c.scale);
        for (b, q) in b[2..66].as_chunks::<2>().0.iter().zip(c.q.as_chunks_mut::<8>().0) {
            let word = u16::from_le_bytes(*b);
            *q = signed(grid::IQ2_XS[word as usize & 511], signs(word as u32 >> 9));
        }
    }
}

pub(super) mod s2 {
    use super::*;

    pub fn dequant(bytes: &[u8], out: &mut [f32]) {
        dequant_codes::<82>(bytes, out, unpack, 16, OFFSET);
    }

    pub fn unpack(b: &[u8], c: &mut Codes) {
        scales_2(f16_at(b, 0), &part(b, 74), &mut c.scale);
        let (index, signs, high): ([u8; 32], [u8; 32], [u8; 8]) = (part(b, 2), part(b, 34), part(b, 66));
        for (i, q) in c.q.as_chunks_mut::<8>().0.iter_mut().enumerate() {
            let at = index[i] as usize | (high[i / 4] as usize >> (2 * (i % 4)) & 3) << 8;
            *q = signed(grid::IQ2_S[at], signs[i]);
        }
    }
}

pub(super) mod xxs3 {
    use super::*;

    pub fn dequant(bytes: &[u8], out: &mut [f32]) {
        dequant_codes::<98>(bytes, out, unpack, 32, OFFSET);
    }

    pub fn unpack(b: &[u8], c: &mut Codes) {
        let (d, q) = (f16_at(b, 0), c.q.as_chunks_mut::<8>().0);
        for g in 0..8 {
            let (index, high): ([u8; 8], _) = (part(b, 2 + 8 * g), u32::from_le_bytes(part(b, 66 + 4 * g)));
            c.scale[g] = d * (0.5 + (high >> 28) as f32) * 0.5;
            for l in 0..4 {
                let point = pair(grid::IQ3_XXS[index[2 * l] as usize], grid::IQ3_XXS[index[2 * l + 1] as usize]);
                q[4 * g + l] = signed(point, signs(high >> (7 * l)));
            }
        }
    }
}

pub(super) mod s3 {
    use super::*;

    pub fn dequant(bytes: &[u8], out: &mut [f32]) {
        dequant_codes::<110>(bytes, out, unpack, 32, OFFSET);
    }

    pub fn unpack(b: &[u8], c: &mut Codes) {
        let d = f16_at(b, 0);
        let (index, high, signs): ([u8; 64], [u8; 8], [u8; 32]) = (part(b, 2), part(b, 66), part(b, 74));
        for g in 0..8 {
            c.scale[g] = d * (1 + 2 * (b[106 + g / 2] >> (4 * (g % 2)) & 15)) as f32;
        }
        for (i, q) in c.q.as_chunks_mut::<8>().0.iter_mut().enumerate() {
            let at = |j: usize| index[2 * i + j] as usize | (high[i / 4] as usize >> (2 * (i % 4) + j) & 1) << 8;
            *q = signed(pair(grid::IQ3_S[at(0)], grid::IQ3_S[at(1)]), signs[i]);
        }
    }
}

/// The codes of a grid point of IQ1, shifted up or down.
fn shifted(at: usize, down: bool) -> [u8; 8] {
    let shift = if down { -1i8 as u8 } else { 1 };
    grid::IQ1[at].map(|g| g.wrapping_add(shift))
}

pub(super) mod s1 {
    use super::*;

    pub fn dequant(bytes: &[u8], out: &mut [f32]) {
        dequant_codes::<50>(bytes, out, unpack, 32, OFFSET_1);
    }

    pub fn unpack(b: &[u8], c: &mut Codes) {
        let (d, q) = (f16_at(b, 0), c.q.as_chunks_mut::<8>().0);
        for g in 0..8 {
            let (index, high): ([u8; 4], _) = (part(b, 2 + 4 * g), u16::from_le_bytes(part(b, 34 + 2 * g)));
            c.scale[g] = d * (2 * (high >> 12 & 7) + 1) as f32 * 0.125;
            for l in 0..4 {
                let at = index[l] as usize | (high as usize >> (3 * l) & 7) << 8;
                q[4 * g + l] = shifted(at, high & 0x8000 != 0);
            }
        }
    }
}

pub(super) mod m1 {
    use super::*;

    pub fn dequant(bytes: &[u8], out: &mut [f32]) {
        dequant_codes::<56>(bytes, out, unpack, 16, OFFSET_1);
    }

    pub fn unpack(b: &[u8], c: &mut Codes) {
        // Four words of four scales; their top nibbles are d, lowest first.
        let words: [u16; 4] = std::array::from_fn(|i| u16::from_le_bytes(part(b, 48 + 2 * i)));
        let d = (0..4).fold(0, |d, i| d | (words[i] >> 12) << (4 * i));
        let d = half::f16::from_bits(d).to_f32();
        for g in 0..16 {
            c.scale[g] = d * (2 * (words[g / 4] >> (3 * (g % 4)) & 7) + 1) as f32 * 0.125;
        }
        for (i, q) in c.q.as_chunks_mut::<8>().0.iter_mut().enumerate() {
            let high = b[32 + i / 2] >> (4 * (i % 2));
            *q = shifted(b[i] as usize | (high as usize & 7) << 8, high & 8 != 0);
        }
    }
}
