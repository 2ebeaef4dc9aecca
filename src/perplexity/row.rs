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

use super::score::extent;

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

/// A full row as llama-perplexity computes it, in f32; and `-ln p(next)`.
pub fn encode_full(logits: &[f32], next: u32) -> (Vec<u8>, f64) {
    let (max, _, sum) = extent(logits);
    let min = logits.iter().copied().fold(f32::INFINITY, f32::min).max(max - 16.0);
    let scale = (max - min) / 65535.0;
    let mut out = Vec::with_capacity(full_bytes(logits.len()));
    out.extend(scale.to_le_bytes());
    out.extend((min - max - sum.ln() as f32).to_le_bytes());
    if scale > 0.0 {
        let inverse = 1.0 / scale;
        let code = |l: f32| if l > min { (inverse * (l - min)).round_ties_even() as u16 } else { 0 };
        out.extend(logits.iter().flat_map(|&l| code(l).to_le_bytes()));
    }
    out.resize(full_bytes(logits.len()), 0);
    (out, sum.ln() + (max - logits[next as usize]) as f64)
}

/// A compact row of `k` tokens, `k < logits.len()`; and `-ln p(next)`.
pub fn encode_top(logits: &[f32], next: u32, k: usize) -> (Vec<u8>, f64) {
    let (max, _, sum) = extent(logits);
    let mut ids: Vec<u32> = (0..logits.len() as u32).collect();
    let by_logit = |a: &u32, b: &u32| logits[*b as usize].total_cmp(&logits[*a as usize]).then(a.cmp(b));
    let (top, (last, rest)) = {
        let (top, last, rest) = ids.select_nth_unstable_by(k - 1, by_logit);
        (top, (*last, rest))
    };
    let tail: f64 = rest.iter().map(|&i| (logits[i as usize] - max).exp() as f64).sum();
    let mut top = top.to_vec();
    top.push(last);
    top.sort_unstable_by(by_logit);
    let low = logits[last as usize];
    let scale = (max - low) / 65535.0;
    let nll = sum.ln() + (max - logits[next as usize]) as f64;
    let mut out = Vec::with_capacity(top_bytes(k));
    for number in [scale, low - max - sum.ln() as f32, (tail / sum).ln() as f32, -nll as f32] {
        out.extend(number.to_le_bytes());
    }
    out.extend(top.iter().flat_map(|id| id.to_le_bytes()));
    let code = |id: &u32| ((logits[*id as usize] - low) / scale).round_ties_even() as u16;
    out.extend(top.iter().flat_map(|id| if scale > 0.0 { code(id) } else { 0 }.to_le_bytes()));
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
    bytes.chunks_exact(2).map(|b| u16::from_le_bytes([b[0], b[1]]) as f32)
}

impl Row {
    /// The exact row of logits.
    pub fn exact(logits: &[f32]) -> Row {
        let (max, _, sum) = extent(logits);
        let shift = max as f64 + sum.ln();
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
        // A tail of no mass has the log -inf, and a token may be as improbable.
        if !(tail <= 1e-3 && next <= 1e-3) {
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
