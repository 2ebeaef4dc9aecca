//! Attention's phases: rotating and storing, partial results, merging; and how a batch is divided for them.
#![allow(unsafe_code)]

use super::config::Pairs;
use super::decoder::{Batch, Local, Pass, split_runs};
use oxcart_quant::act::Wants;
use oxcart_quant::attention::{BLOCK, FEW, Partial, Queries, merge};
use oxcart_quant::format::SLAB;

/// Positions of a range, where a small batch has its positions divided among workers.
const RANGE: usize = 512;
/// Query rows of a task whose limits need no allocation.
const ROWS: usize = 256;

/// Tokens that are stored by one task: consecutive, of one sequence, no K block shared with another run.
pub(super) struct Run {
    pub first: usize,
    pub len: usize,
}

/// Tokens that attend together: consecutive, of one sequence.
pub(super) struct Tile {
    pub first: usize,
    pub len: usize,
    pub seen: usize, // positions that the last of them sees
}

/// Divides a batch where `cut` says so between a token and the one before it, given the first token of the piece.
fn pieces(b: &Batch, cut: impl Fn(usize, usize) -> bool) -> Vec<(usize, usize)> {
    let mut pieces: Vec<(usize, usize)> = Vec::new();
    for t in 0..b.len() {
        match pieces.last_mut() {
            Some((first, len)) if b.seq[t] == b.seq[t - 1] && b.pos[t] == b.pos[t - 1] + 1 && !cut(t, *first) => {
                *len += 1
            }
            _ => pieces.push((t, 1)),
        }
    }
    pieces
}

pub(super) fn runs(b: &Batch) -> Vec<Run> {
    // Whole blocks, some 64 tokens long.
    let cut = |t: usize, first: usize| (b.pos[t] as usize).is_multiple_of(BLOCK) && t - first >= 48;
    pieces(b, cut).into_iter().map(|(first, len)| Run { first, len }).collect()
}

/// Tiles of `rows` query rows.
pub(super) fn tiles(b: &Batch, heads_per_kv: usize, rows: usize) -> Vec<Tile> {
    let most = (rows / heads_per_kv).max(1);
    pieces(b, |t, first| t - first >= most)
        .into_iter()
        .map(|(first, len)| Tile { first, len, seen: b.pos[first + len - 1] as usize + 1 })
        .collect()
}

/// Into how many ranges of how many positions the batch's attention is divided. A matter of the batch alone, not of the
/// number of workers, and the same for all batches of few tokens; larger ones have tasks enough.
pub(super) fn ranges(b: &Batch) -> (usize, usize) {
    let seen = b.pos.iter().max().map_or(0, |&p| p as usize + 1);
    if b.len() <= FEW { (RANGE, seen.div_ceil(RANGE)) } else { (seen.next_multiple_of(BLOCK), 1) }
}

/// The most (range, token) pairs of a divided batch.
pub(super) fn most_parts(capacity: usize) -> usize {
    FEW * capacity.div_ceil(RANGE)
}

impl Pass<'_, '_> {
    /// Adds biases, rotates queries and keys, and puts keys and values into the cache.
    pub fn rotate_and_store(&mut self, layer: usize, bias: &[f32]) {
        let (c, b, batch) = (self.c, self.b, &*self.plan.batch);
        let (hd, heads) = (c.head_dim, c.n_heads / c.n_kv_heads);
        let (q_dim, kv_dim) = (c.q_dim(), c.kv_dim());
        let stride = q_dim + 2 * kv_dim;
        self.w.split(c.n_kv_heads * self.plan.runs.len(), |task| {
            let (head, run) = (task % c.n_kv_heads, &self.plan.runs[task / c.n_kv_heads]);
            for t in run.first..run.first + run.len {
                // SAFETY: angles are read only; these heads of these tokens, in `qkv` and in the cache, are this task's,
                // and runs share no K block.
                unsafe {
                    let angles = b.angles.read(self.plan.row(t, c.rope.dim));
                    let (cos, sin) = angles.split_at(c.rope.dim / 2);
                    let part = |at: usize, len: usize| {
                        let x = b.qkv.write(t * stride + at..t * stride + at + len);
                        if !bias.is_empty() {
                            self.k.ops.add(x, &bias[at..at + len]);
                        }
                        x
                    };
                    let turn = |x: &mut [f32]| match c.rope.pairs {
                        Pairs::Halves => self.k.ops.rope_halves(x, cos, sin),
                        Pairs::Neighbours => self.k.ops.rope_pairs(x, cos, sin),
                    };
                    part(head * heads * hd, heads * hd).chunks_exact_mut(hd).for_each(turn);
                    let key = part(q_dim + head * hd, hd);
                    turn(key);
                    let value = part(q_dim + kv_dim + head * hd, hd);
                    self.cache.store(layer, batch.seq[t] as usize, head, batch.pos[t] as usize, key, value);
                }
            }
        });
        self.w.sync();
    }

    /// Partial attention of every tile, KV head and range.
    pub fn attend(&mut self, layer: usize) {
        let (c, b, batch, plan) = (self.c, self.b, &*self.plan.batch, self.plan);
        let (n, hd, heads) = (batch.len(), c.head_dim, c.n_heads / c.n_kv_heads);
        let (q_dim, stride) = (c.q_dim(), c.q_dim() + 2 * c.kv_dim());
        let Local { out, more, scratch, .. } = &mut *self.local;
        self.w.split(plan.tiles.len() * c.n_kv_heads * plan.ranges, |task| {
            let (range, task) = (task % plan.ranges, task / plan.ranges);
            let (head, tile) = (task % c.n_kv_heads, &plan.tiles[task / c.n_kv_heads]);
            let positions = range * plan.range_len..((range + 1) * plan.range_len).min(tile.seen);
            if positions.is_empty() {
                return;
            }
            // Rows: the tile's tokens, for each the heads that share this KV head.
            let rows = tile.len * heads;
            let mut limits = [0; ROWS];
            let limits = if rows <= ROWS { &mut limits[..rows] } else { &mut vec![0; rows] };
            more.clear();
            for (i, t) in (tile.first..tile.first + tile.len).enumerate() {
                let at = t * stride + head * heads * hd;
                // SAFETY: queries were written before the last barrier.
                more.extend_from_slice(unsafe { b.qkv.read(at..at + heads * hd) });
                limits[i * heads..(i + 1) * heads].fill(batch.pos[t] as usize + 1);
            }
            let room = rows * hd;
            out.resize(out.len().max(2 * rows + room), 0.0);
            let (o, rest) = out.split_at_mut(room);
            let (m, rest) = rest.split_at_mut(rows);
            let mut part = Partial { m, s: &mut rest[..rows], o };
            let queries = Queries { q: more, limits, tokens: tile.len, scale: 1.0 / (hd as f32).sqrt() };
            // SAFETY: the cache is not written in this phase.
            let cache = unsafe { self.cache.view(layer, batch.seq[tile.first] as usize, head, tile.seen) };
            self.k.attention.run(&queries, &cache, positions, &mut part, scratch);
            for (i, t) in (tile.first..tile.first + tile.len).enumerate() {
                let r = i * heads..(i + 1) * heads;
                let at = (range * n + t) * c.n_heads + head * heads;
                let o = (range * n + t) * q_dim + head * heads * hd;
                // SAFETY: these heads of this token in this range are this task's.
                unsafe {
                    b.part_m.write(at..at + heads).copy_from_slice(&part.m[r.clone()]);
                    b.part_s.write(at..at + heads).copy_from_slice(&part.s[r.clone()]);
                    b.part_o.write(o..o + heads * hd).copy_from_slice(&part.o[r.start * hd..r.end * hd]);
                }
            }
        });
        self.w.sync();
    }

    /// `attn_acts = encode(attention)`, from the partial results of all ranges.
    pub fn merge(&mut self, wants: Wants) {
        let (c, b, plan) = (self.c, self.b, self.plan);
        let (n, hd, q_dim) = (self.n(), c.head_dim, c.q_dim());
        let slabs = q_dim.div_ceil(SLAB);
        let run = wants.together();
        // All slabs of a run of tokens, then the next run.
        split_runs(self.w, n.next_multiple_of(run) * slabs, run, |task| {
            let (runs, slab) = (task / run / slabs, task / run % slabs);
            let t = runs * run + task % run;
            if t >= n {
                return;
            }
            let dims = slab * SLAB..((slab + 1) * SLAB).min(q_dim);
            let mut whole = [0.0f32; SLAB];
            let ranges = (plan.batch.pos[t] as usize + 1).div_ceil(plan.range_len);
            let mut at = dims.start;
            // A slab holds heads, or a part of one.
            while at < dims.end {
                let (head, end) = (at / hd, ((at / hd + 1) * hd).min(dims.end));
                // SAFETY: partial results are not written in this phase.
                let parts = (0..ranges).map(|r| unsafe {
                    let (i, o) = ((r * n + t) * c.n_heads + head, (r * n + t) * q_dim);
                    (b.part_m.read(i..i + 1)[0], b.part_s.read(i..i + 1)[0], b.part_o.read(o + at..o + end))
                });
                merge(self.k.ops, parts, &mut whole[at - dims.start..end - dims.start]);
                at = end;
            }
            // SAFETY: this token's blocks of this slab are this task's.
            unsafe { b.attn_acts.encode_slab(self.k, wants, n, t, slab, &whole[..dims.len()]) };
        });
        self.w.sync();
    }
}
