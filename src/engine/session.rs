//! A timeline through a loaded model.

use super::{Engine, EngineError, WALK, most_taken, system};
use crate::machine::Machine;
use crate::model::config::Pairs;
use crate::model::decoder::{self, Local, Plan, Way};
use crate::model::observe::Observer;
use crate::model::{Batch, Buffers, KvCache, rope};
use oxcart_quant::attention::KvType;
use std::ops::{ControlFlow, Range};
use std::sync::{Arc, Mutex};

/// How much a session remembers, and how.
#[derive(Clone, Copy, Debug)]
pub struct SessionOptions {
    /// Positions of a sequence.
    pub context: usize,
    /// Sequences.
    pub sequences: usize,
    /// Tokens of a forward pass, at most; longer batches are divided.
    pub ubatch: usize,
    /// How keys are stored.
    pub k_type: KvType,
    /// How values are stored.
    pub v_type: KvType,
}

impl Default for SessionOptions {
    fn default() -> SessionOptions {
        SessionOptions { context: 4096, sequences: 1, ubatch: 512, k_type: KvType::F16, v_type: KvType::F16 }
    }
}

/// One mutable timeline: sequences of tokens and what the model remembers of them.
pub struct Session {
    engine: Arc<Engine>,
    cache: KvCache,
    buffers: Buffers,
    locals: Vec<Mutex<Local>>,
    observer: Option<Arc<Observer>>,
    watch: Option<Arc<Watch>>,
    tokens: Vec<Vec<u32>>, // of each sequence: what the cache holds
    context: usize,
    keep: Option<usize>,
    walk: usize,   // tokens that go through the layers together
    ubatch: usize, // tokens that go through a layer together
}

/// Is told how many layers of how many a pass has done, and may end it.
pub type Watch = dyn Fn(usize, usize) -> ControlFlow<()> + Send + Sync;

impl Engine {
    /// A timeline. The first one decides which weights stay in memory.
    pub fn session(self: &Arc<Engine>, o: &SessionOptions) -> Result<Session, EngineError> {
        self.session_on(&Machine::here(), o)
    }

    /// The same, on a machine with this much memory.
    pub fn session_on(self: &Arc<Engine>, machine: &Machine, o: &SessionOptions) -> Result<Session, EngineError> {
        let c = &self.model.config;
        let cache = KvCache::new(c, o.sequences, o.context, o.k_type, o.v_type)
            .map_err(system(format!("KV cache of {} sequences of {} tokens", o.sequences, o.context)))?;
        // Of a cache that there is room for, the product does not overflow.
        let positions = o.context.saturating_mul(o.sequences).max(1);
        let ubatch = o.ubatch.clamp(1, positions);
        let available = machine.available.map_or(u64::MAX, |a| a.saturating_add(machine.swap));
        let needed = cache.n_bytes() as u64;
        if needed > available {
            return Err(EngineError::Memory { sequences: o.sequences, context: o.context, needed, available });
        }
        // Room for a walk from the disk; what a walk from memory leaves of it untouched costs nothing.
        let walk = ubatch.max(WALK.min(positions));
        let buffers = Buffers::new(c, walk, ubatch, cache.capacity()).map_err(system("buffers of a forward pass"))?;
        let room = buffers.n_bytes(self.kernels) as u64;
        // Swap is no place for weights that can be read again.
        let free = machine.available.map(most_taken);
        let streams = self.decide(free.map(|f| f.saturating_sub(needed + room)))?;
        Ok(Session {
            tokens: vec![Vec::new(); o.sequences],
            locals: (0..self.threads()).map(|_| Mutex::default()).collect(),
            context: o.context,
            engine: self.clone(),
            observer: None,
            watch: None,
            keep: None,
            buffers,
            cache,
            walk: if streams { walk } else { ubatch },
            ubatch,
        })
    }
}

impl Session {
    /// The model.
    pub fn engine(&self) -> &Arc<Engine> {
        &self.engine
    }

    /// Positions that a sequence may have.
    pub fn context(&self) -> usize {
        self.context
    }

    /// Positions that a sequence has.
    pub fn len(&self, seq: usize) -> usize {
        self.tokens[seq].len()
    }

    /// Whether a sequence is empty.
    pub fn is_empty(&self, seq: usize) -> bool {
        self.tokens[seq].is_empty()
    }

    /// Forgets all positions of a sequence from `len` on.
    pub fn truncate(&mut self, seq: usize, len: usize) {
        self.tokens[seq].truncate(len);
    }

    /// Begins a sequence anew with a chunk of a text, which is added to `batch`: with BOS in the place of its first token
    /// where the model wants one, as llama.cpp feeds chunks. `wanted` tells the positions whose logits are asked for.
    pub fn begin_chunk(&mut self, batch: &mut Batch, seq: usize, chunk: &[u32], wanted: impl Fn(usize) -> bool) {
        self.truncate(seq, 0);
        let tokenizer = &self.engine.tokenizer;
        let bos = tokenizer.bos().filter(|_| tokenizer.add_bos());
        for (i, &t) in chunk.iter().enumerate() {
            batch.push(if i == 0 { bos.unwrap_or(t) } else { t }, i as u32, seq as u32, wanted(i));
        }
    }

    /// The tokens of a sequence.
    pub fn tokens(&self, seq: usize) -> &[u32] {
        &self.tokens[seq]
    }

    /// Forgets the `discard` positions after the first `keep` of a sequence; those behind them move up, their keys rotated
    /// back by as many positions, as llama.cpp's context shift does. Their values still know of what was forgotten: logits
    /// are not those of the remaining tokens fed anew.
    pub fn shift(&mut self, seq: usize, keep: usize, discard: usize) {
        let len = self.len(seq);
        assert!(keep + discard <= len, "{keep} + {discard} positions of {len}");
        let e = &self.engine;
        let (c, ops) = (&e.model.config, e.kernels.ops);
        let mut angles = vec![0.0; c.rope.dim];
        let frequencies = rope::frequencies(&c.rope, e.model.weights.rope_factors.as_deref());
        rope::angles(&frequencies, 1.0, discard as u32, &mut angles);
        let (cos, sin) = angles.split_at_mut(c.rope.dim / 2);
        sin.iter_mut().for_each(|s| *s = -*s);
        let back = |key: &mut [f32]| match c.rope.pairs {
            Pairs::Halves => ops.rope_halves(key, cos, sin),
            Pairs::Neighbours => ops.rope_pairs(key, cos, sin),
        };
        self.cache.shift(&e.team, seq, keep + discard..len, keep, back);
        self.tokens[seq].drain(keep..keep + discard);
    }

    /// Says that generation is not to end where the context is full: beside the first `keep` positions, half of the rest is
    /// then forgotten ([`Session::shift`]).
    pub fn shift_when_full(&mut self, keep: usize) {
        self.keep = Some(keep);
    }

    /// Makes room in a sequence that fills the context, if that was asked for. Returns whether there is room.
    pub fn make_room(&mut self, seq: usize) -> bool {
        let len = self.len(seq);
        if len < self.context {
            return true;
        }
        let Some(keep) = self.keep else { return false };
        let discard = len.saturating_sub(keep).div_ceil(2);
        self.shift(seq, keep.min(len), discard);
        discard > 0
    }

    /// Keeps what a sequence has in common with `tokens`, but never all of `tokens`, so that feeding the rest gives logits.
    /// Returns how many are kept.
    pub fn reuse(&mut self, seq: usize, tokens: &[u32]) -> usize {
        let common = common_prefix(&self.tokens[seq], tokens);
        self.truncate(seq, common.min(tokens.len().saturating_sub(1)));
        self.len(seq)
    }

    /// Bytes of the KV cache when it is full.
    pub fn cache_bytes(&self) -> usize {
        self.cache.n_bytes()
    }

    /// How the cache stores keys and values.
    pub fn cache_types(&self) -> (KvType, KvType) {
        self.cache.types()
    }

    /// Bytes of the keys and values of these positions of a sequence, as [`Session::copy_positions`] gives them.
    pub fn span_bytes(&self, positions: &Range<usize>) -> usize {
        self.cache.span_bytes(positions)
    }

    /// Appends the keys and values of these positions of a sequence to `out`.
    pub fn copy_positions(&self, seq: usize, positions: Range<usize>, out: &mut Vec<u8>) {
        assert!(positions.end <= self.len(seq), "{positions:?} of {}", self.len(seq));
        // Only a forward pass writes to the cache, and it holds `&mut self`.
        self.cache.copy_out(seq, positions, out);
    }

    /// Continues a sequence by `tokens`, with the keys and values that [`Session::copy_positions`] gave of `positions` in a
    /// session of the same model and cache types, for the same tokens from the first on. `positions` begins where the
    /// sequence ends; of what it has, the first `tokens.len()` are taken.
    pub fn restore_positions(
        &mut self,
        seq: usize,
        positions: Range<usize>,
        tokens: &[u32],
        bytes: &[u8],
    ) -> Result<(), EngineError> {
        let n = tokens.len();
        let bad = |index: usize, problem: String| Err(EngineError::Batch { index, problem });
        if positions.start != self.len(seq) || n > positions.len() {
            return bad(0, format!("{n} tokens of positions {positions:?}, expected from {} on", self.len(seq)));
        }
        if positions.start + n > self.context {
            return bad(self.context - positions.start, format!("past a context of {}", self.context));
        }
        if bytes.len() != self.span_bytes(&positions) {
            return bad(0, format!("{} bytes, expected {}", bytes.len(), self.span_bytes(&positions)));
        }
        if let Some(i) = tokens.iter().position(|&t| t as usize >= self.engine.model.config.n_vocab) {
            return bad(i, format!("id {}, expected below {}", tokens[i], self.engine.model.config.n_vocab));
        }
        self.cache.copy_in(seq, positions, n, bytes);
        self.tokens[seq].extend_from_slice(tokens);
        Ok(())
    }

    /// Tokens that are best fed together: as many as go through the layers in one walk.
    pub fn walk(&self) -> usize {
        self.walk
    }

    /// Where weights are streamed and a pass takes long, `watch` is told of its way from now on. A pass that it ends is an
    /// [`EngineError::Stopped`] and leaves the session as it was; of a batch of more than one walk, the walks before stay.
    pub fn watch(&mut self, watch: Option<Arc<Watch>>) {
        self.watch = watch;
    }

    /// From now on, `observer` is shown what enters each matrix.
    pub fn observe(&mut self, observer: Arc<Observer>) {
        self.observer = Some(observer);
    }

    /// Feeds a batch. `sink` receives the logits of every token that wants them, with its number among those that do; it
    /// is called by several workers at once, in no order. The tokens of each sequence must continue it, and stand together.
    pub fn forward_each(&mut self, batch: &Batch, sink: &(dyn Fn(usize, &[f32]) + Sync)) -> Result<(), EngineError> {
        self.check(batch)?;
        let mut done = 0;
        for start in (0..batch.len()).step_by(self.walk) {
            let walk = start..batch.len().min(start + self.walk);
            let parts: Vec<Batch> =
                walk.clone().step_by(self.ubatch).map(|i| batch.part(i..walk.end.min(i + self.ubatch))).collect();
            let plans = Plan::of(self.engine.kernels, &self.engine.model, &parts, self.observer.as_deref());
            let (e, cache, buffers, locals) = (&self.engine, &self.cache, &self.buffers, &self.locals);
            let watch = |done: usize, of: usize| self.watch.as_ref().map_or(ControlFlow::Continue(()), |w| w(done, of));
            let end = Mutex::new(Ok(()));
            e.team.run(|w| {
                let mut local = locals[w.index()].lock().unwrap_or_else(|e| e.into_inner());
                let sink = |i: usize, logits: &[f32]| sink(done + i, logits);
                let way = e.stream().map(|stream| Way { stream, watch: &watch });
                let through = decoder::forward(w, e.kernels, &e.model, way, &plans, cache, buffers, &mut local, &sink);
                if w.index() == 0 {
                    *end.lock().unwrap_or_else(|e| e.into_inner()) = through;
                }
            });
            end.into_inner().unwrap_or_else(|e| e.into_inner())?;
            for part in &parts {
                done += part.logits.iter().filter(|&&l| l).count();
                for (&seq, &token) in part.seq.iter().zip(&part.tokens) {
                    self.tokens[seq as usize].push(token);
                }
            }
        }
        Ok(())
    }

    /// Feeds a batch and returns the logits of every token that wants them.
    pub fn forward_all(&mut self, batch: &Batch) -> Result<Vec<Vec<f32>>, EngineError> {
        let wanted = batch.logits.iter().filter(|&&l| l).count();
        let logits = Mutex::new(vec![Vec::new(); wanted]);
        self.forward_each(batch, &|i, row| {
            logits.lock().unwrap_or_else(|e| e.into_inner())[i] = row.to_vec();
        })?;
        Ok(logits.into_inner().unwrap_or_else(|e| e.into_inner()))
    }

    /// Feeds a batch and returns the logits of the last token that wants them.
    pub fn forward(&mut self, batch: &Batch) -> Result<Vec<f32>, EngineError> {
        Ok(self.forward_all(batch)?.pop().unwrap_or_default())
    }

    fn check(&self, batch: &Batch) -> Result<(), EngineError> {
        let mut next: Vec<usize> = self.tokens.iter().map(Vec::len).collect();
        let n = batch.len();
        if batch.pos.len() != n || batch.seq.len() != n || batch.logits.len() != n {
            return Err(EngineError::Batch { index: n, problem: "fields differ in length".into() });
        }
        for i in 0..n {
            let (token, pos, seq) = (batch.tokens[i], batch.pos[i] as usize, batch.seq[i] as usize);
            let bad = |problem: String| Err(EngineError::Batch { index: i, problem });
            if token as usize >= self.engine.model.config.n_vocab {
                return bad(format!("id {token}, expected below {}", self.engine.model.config.n_vocab));
            }
            let Some(want) = next.get_mut(seq) else {
                return bad(format!("sequence {seq} of {}", self.tokens.len()));
            };
            // Who stores the keys of one piece shares no block with who stores those of another.
            if *want > self.tokens[seq].len() && batch.seq[i - 1] as usize != seq {
                return bad(format!("sequence {seq} again, expected its tokens to stand together"));
            }
            if pos != *want {
                return bad(format!("position {pos} of sequence {seq}, expected {want}"));
            }
            if pos >= self.context {
                return bad(format!("position {pos}, past a context of {}", self.context));
            }
            *want += 1;
        }
        Ok(())
    }
}

/// How many tokens two texts begin with alike.
pub fn common_prefix(a: &[u32], b: &[u32]) -> usize {
    a.iter().zip(b).take_while(|(a, b)| a == b).count()
}
