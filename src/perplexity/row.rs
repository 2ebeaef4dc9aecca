//! One position of a base file: how probable the reference held each token.
//!
//! ```text
//! full      f32 scale  f32 min   u16 code[n_vocab]  to an even number of codes
//! compact   f32 scale  f32 min   f32 tail  f32 next   u32 id[k]  u16 code[k]
//! ```
//!
//! The log-probability of a code is `scale * code + min`. A full row covers the 16 nats below its most probable token (what
//! is rarer has code 0), a compact one its `k` most probable tokens, the first the most probable; `tail` is the log of the
//! mass of all others, `next` the log-probability of the token that the text goes on with.

use super::score::{Extent, exp_sum};
use oxcart_quant::f32ops::Ops;

/// Bytes of a full row.
pub fn full_bytes(n_vocab: usize) -> usize {
    8 + 2 * n_vocab.next_multiple_of(2)
}

/// Bytes of a compact row.
pub fn top_bytes(k: usize) -> usize {
    16 + 6 * k
}

/// The tokens that a compact row keeps unless told: rows are then 24 times smaller than full ones.
pub fn default_top(n_vocab: usize) -> usize {
    (n_vocab / 72).max(1)
}

/// The least value.
fn least(values: &[f32]) -> f32 {
    let (blocks, rest) = values.as_chunks::<16>();
    let mut lanes = [f32::INFINITY; 16];
    for block in blocks {
        for (lane, &v) in lanes.iter_mut().zip(block) {
            *lane = if v < *lane { v } else { *lane };
        }
    }
    lanes.iter().chain(rest).copied().fold(f32::INFINITY, f32::min)
}

/// The nearest whole number, of two the even one: of a value from 0 to 65535, to which 1.5 * 2^23 is added, the low bits.
fn nearest(value: f32) -> [u8; 2] {
    ((value + 12_582_912.0).to_bits() as u16).to_le_bytes()
}

/// A full row as llama-perplexity computes it, in f32; and `-ln p(next)`.
pub fn encode_full(ops: &Ops, logits: &[f32], next: u32) -> (Vec<u8>, f64) {
    let extent = Extent::of(ops, logits);
    let min = least(logits).max(extent.max - 16.0);
    let scale = (extent.max - min) / 65535.0;
    let mut out = vec![0; full_bytes(logits.len())];
    out[..4].copy_from_slice(&scale.to_le_bytes());
    out[4..8].copy_from_slice(&(min - extent.max - extent.ln_sum as f32).to_le_bytes());
    if scale > 0.0 {
        let inverse = 1.0 / scale;
        for (code, &l) in out[8..].as_chunks_mut().0.iter_mut().zip(logits) {
            *code = nearest(if l > min { inverse * (l - min) } else { 0.0 });
        }
    }
    (out, extent.nll(logits[next as usize]))
}

/// A compact row of `k` tokens, `k < logits.len()`; and `-ln p(next)`.
pub fn encode_top(ops: &Ops, logits: &[f32], next: u32, k: usize) -> (Vec<u8>, f64) {
    let extent = Extent::of(ops, logits);
    // A logit's bits in the order of its values, then its token, the first of equals the greater.
    let key = |(i, l): (u32, &f32)| {
        let bits = l.to_bits();
        let order = if bits >> 31 == 1 { !bits } else { bits | 1 << 31 };
        (order as u64) << 32 | !i as u64
    };
    let token = |key: &u64| !(*key as u32);
    let mut keys: Vec<u64> = (0..).zip(logits).map(key).collect();
    let (_, _, rest) = keys.select_nth_unstable_by(k - 1, |a, b| b.cmp(a));
    let rest: Vec<f32> = rest.iter().map(|key| logits[token(key) as usize]).collect();
    let tail = exp_sum(ops, &rest, extent.max).ln() - extent.ln_sum;
    keys.truncate(k);
    keys.sort_unstable_by(|a, b| b.cmp(a));
    let top: Vec<u32> = keys.iter().map(token).collect();
    let low = logits[top[k - 1] as usize];
    let scale = (extent.max - low) / 65535.0;
    let nll = extent.nll(logits[next as usize]);
    let mut out = Vec::with_capacity(top_bytes(k));
    for number in [scale, low - extent.max - extent.ln_sum as f32, tail as f32, -nll as f32] {
        out.extend(number.to_le_bytes());
    }
    out.extend(top.iter().flat_map(|id| id.to_le_bytes()));
    let inverse = if scale > 0.0 { 1.0 / scale } else { 0.0 };
    out.extend(top.iter().flat_map(|&id| nearest((logits[id as usize] - low) * inverse)));
    (out, nll)
}

/// What the reference says of one position.
#[derive(Clone)]
pub enum Row {
    /// The log-probability of every token, in nats; `-ln p(next)` is in it.
    Full(Vec<f32>),
    /// The log-probabilities of the most probable, in falling order.
    Top {
        /// Tokens with their log-probabilities.
        top: Vec<(u32, f32)>,
        /// Log of the mass of all others.
        tail: f32,
        /// Log-probability of the token that the text goes on with.
        next: f32,
    },
}

fn f32_at(bytes: &[u8], i: usize) -> f32 {
    f32::from_le_bytes([bytes[4 * i], bytes[4 * i + 1], bytes[4 * i + 2], bytes[4 * i + 3]])
}

fn codes(bytes: &[u8]) -> impl Iterator<Item = f32> {
    bytes.as_chunks().0.iter().map(|&b| u16::from_le_bytes(b) as f32)
}

impl Row {
    /// The exact row of logits.
    pub fn exact(ops: &Ops, logits: &[f32]) -> Row {
        let extent = Extent::of(ops, logits);
        let shift = extent.max as f64 + extent.ln_sum;
        Row::Full(logits.iter().map(|&l| (l as f64 - shift) as f32).collect())
    }

    /// Reads a full row.
    pub fn full(bytes: &[u8], n_vocab: usize) -> Result<Row, String> {
        let (scale, min) = (f32_at(bytes, 0), f32_at(bytes, 1));
        check(scale, min)?;
        Ok(Row::Full(codes(&bytes[8..]).take(n_vocab).map(|c| scale * c + min).collect()))
    }

    /// Reads a compact row.
    pub fn top(bytes: &[u8], k: usize, n_vocab: usize) -> Result<Row, String> {
        let (scale, min, tail, next) = (f32_at(bytes, 0), f32_at(bytes, 1), f32_at(bytes, 2), f32_at(bytes, 3));
        check(scale, min)?;
        // A tail of no mass has the log -inf; what the text goes on with has a score.
        if !(tail <= 1e-3 && next <= 1e-3 && next.is_finite()) {
            return Err(format!("tail {tail}, next {next}, expected logs of probabilities"));
        }
        let (ids, rest) = bytes[16..].split_at(4 * k);
        let ids = ids.chunks_exact(4).map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]]));
        let top: Vec<(u32, f32)> = ids.zip(codes(rest).map(|c| scale * c + min)).collect();
        if let Some((id, _)) = top.iter().find(|(id, _)| *id as usize >= n_vocab) {
            return Err(format!("token {id}, expected below {n_vocab}"));
        }
        Ok(Row::Top { top, tail, next })
    }
}

fn check(scale: f32, min: f32) -> Result<(), String> {
    let fine = scale.is_finite() && min.is_finite() && scale >= 0.0 && scale * 65535.0 + min <= 1e-3;
    if fine { Ok(()) } else { Err(format!("scale {scale}, minimum {min}, expected logs of probabilities")) }
}
