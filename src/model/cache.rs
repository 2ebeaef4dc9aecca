//! The KV cache: keys and values of every layer and sequence, addressed by (sequence, position).
//!
//! ```text
//! K  [layer][sequence][kv head][position / 16][head_dim][16]
//! V  [layer][sequence][kv head][position][head_dim]
//! ```
//!
//! The whole of it is reserved at once and filled page by page as positions are written.

use super::config::Config;
use oxcart_quant::Shared;
use oxcart_quant::attention::{BLOCK, Cache, KvType};
use std::io;
use std::ops::Range;

/// Keys and values. What is written is decided by the forward pass; how much of each sequence is valid, by the session.
pub struct KvCache {
    k: Shared<u8>,
    v: Shared<u8>,
    k_type: KvType,
    v_type: KvType,
    n_seqs: usize,
    n_kv_heads: usize,
    head_dim: usize,
    capacity: usize, // positions of a sequence, whole blocks
}

impl KvCache {
    /// Room for `capacity` positions of each of `n_seqs` sequences.
    pub fn new(c: &Config, n_seqs: usize, capacity: usize, k_type: KvType, v_type: KvType) -> io::Result<KvCache> {
        let capacity = capacity.next_multiple_of(BLOCK);
        let bytes = |t: KvType| {
            [c.n_layers, n_seqs, c.n_kv_heads, capacity, t.row_bytes(c.head_dim)]
                .into_iter()
                .try_fold(1usize, |n, m| n.checked_mul(m))
                .ok_or_else(|| {
                    io::Error::new(io::ErrorKind::OutOfMemory, "the KV cache is larger than the address space")
                })
        };
        Ok(KvCache {
            k: Shared::sparse(bytes(k_type)?)?,
            v: Shared::sparse(bytes(v_type)?)?,
            k_type,
            v_type,
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
}
