//! The KV cache: keys and values of every layer and sequence, addressed by (sequence, position).
//!
//! ```text
//! K  [layer][sequence][kv head][position / 16][head_dim][16]
//! V  [layer][sequence][kv head][position][head_dim]
//! ```
//!
//! The whole of it is reserved at once and filled page by page as positions are written.

use super::config::Config;
use oxcart_quant::attention::{BLOCK, Cache, KvType};
use oxcart_quant::{Shared, Team};
use std::io;
use std::ops::Range;

/// Keys and values. What is written is decided by the forward pass; how much of each sequence is valid, by the session.
pub struct KvCache {
    k: Shared<u8>,
    v: Shared<u8>,
    k_type: KvType,
    v_type: KvType,
    n_layers: usize,
    n_seqs: usize,
    n_kv_heads: usize,
    head_dim: usize,
    capacity: usize, // positions of a sequence, whole blocks
}

impl KvCache {
    /// Room for `capacity` positions of each of `n_seqs` sequences.
    pub fn new(c: &Config, n_seqs: usize, capacity: usize, k_type: KvType, v_type: KvType) -> io::Result<KvCache> {
        let too_large = || io::Error::new(io::ErrorKind::OutOfMemory, "the KV cache is larger than the address space");
        let capacity = capacity.checked_next_multiple_of(BLOCK).ok_or_else(too_large)?;
        let bytes = |t: KvType| {
            let sizes = [c.n_layers, n_seqs, c.n_kv_heads, capacity, t.row_bytes(c.head_dim)];
            sizes.into_iter().try_fold(1usize, |n, m| n.checked_mul(m)).ok_or_else(too_large)
        };
        Ok(KvCache {
            k: Shared::sparse(bytes(k_type)?)?,
            v: Shared::sparse(bytes(v_type)?)?,
            k_type,
            v_type,
            n_layers: c.n_layers,
            n_seqs,
            n_kv_heads: c.n_kv_heads,
            head_dim: c.head_dim,
            capacity,
        })
    }

    /// Positions of a sequence.
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// Sequences.
    pub fn n_seqs(&self) -> usize {
        self.n_seqs
    }

    /// Bytes when full.
    pub fn n_bytes(&self) -> usize {
        self.k.len() + self.v.len()
    }

    fn head(&self, layer: usize, seq: usize, head: usize) -> usize {
        assert!(seq < self.n_seqs && head < self.n_kv_heads);
        ((layer * self.n_seqs + seq) * self.n_kv_heads + head) * self.capacity
    }

    fn range(&self, t: KvType, at: usize, n: usize) -> Range<usize> {
        let row = t.row_bytes(self.head_dim);
        at * row..(at + n) * row
    }

    /// Writes one position of one head. A K block holds 16 positions, so the positions of a block must be written by one
    /// worker in a phase.
    ///
    /// # Safety
    /// In this phase nobody else touches the position's block of this head.
    #[allow(unsafe_code, clippy::too_many_arguments)]
    pub unsafe fn store(&self, layer: usize, seq: usize, head: usize, pos: usize, key: &[f32], value: &[f32]) {
        assert!(pos < self.capacity);
        let at = self.head(layer, seq, head);
        let block = self.range(self.k_type, at + pos / BLOCK * BLOCK, BLOCK);
        // SAFETY: the caller's promise.
        self.k_type.store_k(key, pos % BLOCK, unsafe { self.k.write(block) });
        // SAFETY: the caller's promise.
        self.v_type.store_v(value, unsafe { self.v.write(self.range(self.v_type, at + pos, 1)) });
    }

    /// Moves positions of a sequence up, so that the first becomes `to`; `turn` rotates their keys accordingly. Values know
    /// no position.
    pub fn shift(&mut self, team: &Team, seq: usize, from: Range<usize>, to: usize, turn: impl Fn(&mut [f32]) + Sync) {
        assert!(to <= from.start && from.end <= self.capacity);
        let heads: Vec<_> = self.heads().collect();
        team.run(|w| w.split(heads.len(), |task| self.shift_head(heads[task], seq, from.clone(), to, &turn)));
    }

    /// Of one layer and head. For [`KvCache::shift`], which holds the cache alone and calls it once for each.
    #[allow(unsafe_code)]
    fn shift_head(
        &self,
        (layer, head): (usize, usize),
        seq: usize,
        from: Range<usize>,
        to: usize,
        turn: impl Fn(&mut [f32]),
    ) {
        let at = self.head(layer, seq, head);
        // SAFETY: this head is the calling task's.
        let (k, v) = unsafe {
            let k = self.k.write(self.range(self.k_type, at, self.capacity));
            (k, self.v.write(self.range(self.v_type, at, self.capacity)))
        };
        let mut key = vec![0.0; self.head_dim];
        for (from, to) in from.clone().zip(to..) {
            let block = |pos: usize| self.range(self.k_type, pos / BLOCK * BLOCK, BLOCK);
            self.k_type.load_k(from % BLOCK, &k[block(from)], &mut key);
            turn(&mut key);
            self.k_type.store_k(&key, to % BLOCK, &mut k[block(to)]);
        }
        let first = self.range(self.v_type, to, 0).start;
        v.copy_within(self.range(self.v_type, from.start, from.len()), first);
    }

    /// The positions `0..n` of one head.
    ///
    /// # Safety
    /// Nobody writes to them while the view lives.
    #[allow(unsafe_code)]
    pub unsafe fn view(&self, layer: usize, seq: usize, head: usize, n: usize) -> Cache<'_> {
        assert!(n <= self.capacity);
        let at = self.head(layer, seq, head);
        // SAFETY: the caller's promise.
        unsafe {
            Cache {
                k_type: self.k_type,
                v_type: self.v_type,
                k: self.k.read(self.range(self.k_type, at, n.next_multiple_of(BLOCK))),
                v: self.v.read(self.range(self.v_type, at, n)),
            }
        }
    }

    /// How keys and values are stored.
    pub fn types(&self) -> (KvType, KvType) {
        (self.k_type, self.v_type)
    }

    /// Bytes of these positions of a sequence as [`KvCache::copy_out`] writes them.
    pub fn span_bytes(&self, positions: &Range<usize>) -> usize {
        let k = blocks(positions).len() * self.k_type.row_bytes(self.head_dim);
        let v = positions.len() * self.v_type.row_bytes(self.head_dim);
        self.n_layers * self.n_kv_heads * (k + v)
    }

    /// Appends these positions of a sequence to `out`: of each layer and head, the K blocks that they touch (with whatever
    /// their other positions hold), then the V rows.
    #[allow(unsafe_code)]
    pub fn copy_out(&self, seq: usize, positions: Range<usize>, out: &mut Vec<u8>) {
        out.reserve(self.span_bytes(&positions));
        for (layer, head) in self.heads() {
            // SAFETY: whoever writes has promised that nobody reads meanwhile ([`KvCache::store`]).
            let c = unsafe { self.view(layer, seq, head, positions.end) };
            let (k, v) = (blocks(&positions), positions.clone());
            out.extend_from_slice(&c.k[self.range(self.k_type, k.start, k.len())]);
            out.extend_from_slice(&c.v[self.range(self.v_type, v.start, v.len())]);
        }
    }

    /// Puts the first `n` of what was copied out of `positions` back where it was. Where `positions` begins within a K
    /// block, the positions before it in that block get what they had when it was copied out.
    pub fn copy_in(&mut self, seq: usize, positions: Range<usize>, n: usize, bytes: &[u8]) {
        let taken = positions.start..positions.start + n;
        assert!(taken.end <= positions.end && taken.end <= self.capacity);
        assert_eq!(bytes.len(), self.span_bytes(&positions));
        let k_bytes = blocks(&positions).len() * self.k_type.row_bytes(self.head_dim);
        let span = bytes.len() / (self.n_layers * self.n_kv_heads);
        for ((layer, head), bytes) in self.heads().zip(bytes.chunks_exact(span.max(1))) {
            let at = self.head(layer, seq, head);
            let (k, v) = bytes.split_at(k_bytes);
            let to = self.range(self.k_type, at + blocks(&taken).start, blocks(&taken).len());
            let k = &k[..to.len()];
            self.k.as_mut_slice()[to].copy_from_slice(k);
            let to = self.range(self.v_type, at + taken.start, n);
            let v = &v[..to.len()];
            self.v.as_mut_slice()[to].copy_from_slice(v);
        }
    }

    fn heads(&self) -> impl Iterator<Item = (usize, usize)> + use<> {
        let n_kv_heads = self.n_kv_heads;
        (0..self.n_layers).flat_map(move |layer| (0..n_kv_heads).map(move |head| (layer, head)))
    }
}

/// The positions of all blocks that these positions touch.
fn blocks(positions: &Range<usize>) -> Range<usize> {
    positions.start / BLOCK * BLOCK..positions.end.next_multiple_of(BLOCK)
}
