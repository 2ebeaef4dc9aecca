//! A loaded model, and a timeline through it.
//!
//! An [`Engine`] is what is loaded: file, weights, tokenizer, kernels and threads. It never changes and is shared. A
//! [`Session`] is one mutable timeline: the KV cache of its sequences and the buffers of its forward passes. The price of
//! a session is its cache; of an engine, the pages of the file that are in use.

use crate::gguf::{Gguf, GgufError};
use crate::load::{self, Residence};
use crate::machine::Machine;
use crate::mmap::{self, Bytes, Room};
use crate::model::config::Pairs;
use crate::model::decoder::{self, Local, Plan, Way};
use crate::model::observe::Observer;
use crate::model::{Batch, Buffers, Halt, KvCache, Model, ModelError, Stream, rope};
use crate::placement::{self, Here, Placement};
use crate::sample::{Overrides, SampleParams};
use crate::tokenizer::{Tokenizer, TokenizerError};
use oxcart_quant::attention::KvType;
use oxcart_quant::{Kernels, Team};
use std::io;
use std::ops::{ControlFlow, Range};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, OnceLock};

/// How a model is opened.
#[derive(Clone)]
pub struct EngineOptions {
    /// Workers.
    pub threads: usize,
    /// Kernels.
    pub kernels: &'static Kernels,
    /// `KEY=TYPE:VALUE`, over the file's metadata.
    pub overrides: Vec<String>,
    /// How its makers say to sample, over what the file says.
    pub recommended: Overrides,
    /// Bytes of weights that may stay in memory; the rest is read from the disk for every pass, of experts what it uses.
    /// `None`: what fits.
    pub resident: Option<u64>,
    /// How the weights come into memory, and whether they stay.
    pub residence: Residence,
    /// Where the workers run. What `--numa` asks for also holds for the calling thread, and those that it starts, from now on:
    /// `isolate` pins it, `distribute` spreads the pages that it is the first to touch over the memory nodes.
    pub placement: Placement,
}

impl Default for EngineOptions {
    fn default() -> EngineOptions {
        EngineOptions {
            threads: default_threads(),
            kernels: Kernels::best(),
            overrides: Vec::new(),
            recommended: Overrides::default(),
            resident: None,
            residence: Residence::default(),
            placement: Placement::default(),
        }
    }
}

/// The processors that this process may use, as affinity and control groups leave them.
pub fn default_threads() -> usize {
    std::thread::available_parallelism().map_or(1, |n| n.get())
}

/// Why a model could not be opened or run.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// The file.
    #[error(transparent)]
    Gguf(#[from] GgufError),
    /// The model in it.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// Its tokenizer.
    #[error("{}: {error}", file.display())]
    Tokenizer {
        /// The file.
        file: PathBuf,
        /// What is wrong.
        error: TokenizerError,
    },
    /// Memory or threads.
    #[error("{what}: {error}")]
    System {
        /// What was asked for.
        what: String,
        /// What the system said.
        error: io::Error,
    },
    /// A session that cannot fit: refused, before the system ends the program over it.
    #[error(
        "a session of {sequences} x {context} tokens: {needed} bytes of KV cache alone, {available} bytes of memory and \
         swap available; a smaller context or -ctk q8_0 -ctv q8_0 takes less"
    )]
    Memory {
        /// Sequences.
        sequences: usize,
        /// Tokens of each.
        context: usize,
        /// Bytes of the cache when it is full.
        needed: u64,
        /// Bytes that can be had.
        available: u64,
    },
    /// Weights that shall all be in memory, and cannot.
    #[error(
        "{flag}: {needed} bytes of weights, {available} bytes of memory for them: without it, those that do not fit are \
         read from the disk for every pass"
    )]
    Weights {
        /// What asks for it.
        flag: &'static str,
        /// Bytes of weights.
        needed: u64,
        /// Bytes that they may take.
        available: u64,
    },
    /// The weights, while they were in use.
    #[error("{}: reading weights: {error}", file.display())]
    Read {
        /// The file.
        file: PathBuf,
        /// What the system said.
        error: Arc<io::Error>,
    },
    /// What [`Session::watch`] asked for.
    #[error("stopped")]
    Stopped,
    /// A batch that does not continue its sequences.
    #[error("batch: token {index}: {problem}")]
    Batch {
        /// Which token.
        index: usize,
        /// What was found and expected.
        problem: String,
    },
}

impl From<Halt> for EngineError {
    fn from(halt: Halt) -> EngineError {
        match halt {
            Halt::Read { file, error } => EngineError::Read { file, error },
            Halt::Stopped => EngineError::Stopped,
        }
    }
}

fn system(what: impl Into<String>) -> impl FnOnce(io::Error) -> EngineError {
    let what = what.into();
    |error| EngineError::System { what, error }
}

/// The tokenizer of a file, which errors name.
pub fn tokenizer(g: &Gguf) -> Result<Tokenizer, EngineError> {
    Tokenizer::from_gguf(g).map_err(|error| match error {
        // It names the file already.
        TokenizerError::Gguf(error) => EngineError::Gguf(error),
        error => EngineError::Tokenizer { file: g.path().to_path_buf(), error },
    })
}

/// Workers where they shall run.
fn team(threads: usize, p: &Placement, notes: &mut Vec<String>) -> Result<Team, EngineError> {
    if !p.is_some() {
        return Team::new(threads).map_err(system("threads"));
    }
    let here = Here::find().map_err(system("processors"))?;
    let places = p.of_workers(threads, &here).map_err(system("--cpu-mask, --cpu-range"))?;
    if let Some(nodes) = p.spread_over(&here) {
        if nodes.len() == 1 {
            notes.push("--numa distribute: there is only one memory node, nothing to distribute".into());
        }
        // Workers spread by themselves are still worth having.
        if let Err(e) = mmap::interleave(&nodes) {
            notes.push(format!("--numa distribute: pages are not spread over the memory nodes: {e}"));
        }
    }
    if let Some(node) = p.of_caller(&here) {
        placement::pin(&node).map_err(system("processors"))?;
    }
    let team = match places {
        None => Team::new(threads),
        Some(places) => Team::starting_with(threads, move |i| placement::pin(&places[i])),
    };
    team.map_err(system("threads"))
}

/// Bytes that should be locked, and why they cannot be.
type Unlocked = (u64, io::Error);

/// Locks the weights where they are mapped: all or none.
fn lock(model: &Model) -> Result<(), Unlocked> {
    let matrices = model.weights.matrices();
    for (i, m) in matrices.iter().enumerate() {
        if let Err(e) = m.lock() {
            matrices[..i].iter().for_each(Bytes::unlock);
            // Whole pages are locked, at both ends of a matrix.
            let page = rustix::param::page_size();
            return Err((matrices.iter().map(|m| (m.len().next_multiple_of(page) + page) as u64).sum(), e));
        }
    }
    Ok(())
}

/// Copies the weights to memory of our own, which is locked before it is filled if it shall be. Returns how that went.
fn copy(
    model: &mut Model,
    lock: bool,
    team: &Team,
    watch: &load::Watch<'_>,
) -> Result<Option<Result<(), Unlocked>>, EngineError> {
    let matrices = model.weights.matrices();
    let (places, len) = load::places(&matrices);
    let mut room = Room::new(len).map_err(system(format!("{len} bytes for weights")))?;
    let locked = lock.then(|| room.lock().map_err(|e| (len.next_multiple_of(rustix::param::page_size()) as u64, e)));
    load::fill(&mut room, &matrices, Some(team), watch)?;
    let whole = room.into_bytes().map_err(system("weights"))?;
    model.weights.replace(places.into_iter().map(|p| whole.slice(p)).collect());
    Ok(locked)
}

/// What to do about weights that could not be locked.
fn not_locked(needed: u64, error: &io::Error) -> String {
    use rustix::process::{Resource, getrlimit};
    match getrlimit(Resource::Memlock).current {
        Some(limit) if limit < needed => format!(
            "--mlock: weights are not locked: {needed} bytes, and this process may lock {limit}; raise the limit with \
             ulimit -l {} (as root, or memlock in /etc/security/limits.conf, or LimitMEMLOCK= of a service)",
            needed.div_ceil(1024)
        ),
        _ => format!("--mlock: weights are not locked: {needed} bytes: {error}"),
    }
}

/// A loaded model.
pub struct Engine {
    /// The file.
    pub gguf: Gguf,
    /// Configuration and weights.
    pub model: Model,
    /// Text to tokens and back.
    pub tokenizer: Tokenizer,
    /// How to sample, as the file and its makers say; else the defaults.
    pub recommended: SampleParams,
    /// How it computes.
    pub kernels: &'static Kernels,
    team: Team,
    resident: Option<u64>,
    residence: Residence,
    stays: bool, // weights are copied or locked
    notes: Vec<String>,
    stream: OnceLock<Stream>,
}

/// Tokens that go through the layers in one walk, where a walk reads the disk.
pub const WALK: usize = 4096;

/// How many tokens two texts begin with alike.
pub fn common_prefix(a: &[u32], b: &[u32]) -> usize {
    a.iter().zip(b).take_while(|(a, b)| a == b).count()
}

/// How much of the available memory a model may use; 1/16 is left to other processes.
pub fn most_taken(available: u64) -> u64 {
    available - available / 16
}

impl Engine {
    /// Opens a model file (any one part of a split one).
    pub fn open(path: &Path, o: &EngineOptions) -> Result<Engine, EngineError> {
        Engine::open_watched(path, o, &|_, _| ControlFlow::Continue(()))
    }

    /// The same; where the weights are copied, which takes long, `watch` is told of it.
    pub fn open_watched(path: &Path, o: &EngineOptions, watch: &load::Watch<'_>) -> Result<Engine, EngineError> {
        let mut gguf = Gguf::open(path)?;
        for spec in &o.overrides {
            gguf.override_kv(spec)?;
        }
        let mut model = Model::from_gguf(&gguf)?;
        let tokenizer = tokenizer(&gguf)?;
        let (n, rows) = (tokenizer.n_vocab(), model.config.n_vocab);
        if n > rows {
            let (key, problem) =
                ("tokenizer.ggml.tokens".into(), format!("{n} tokens, the model has embeddings of {rows}"));
            let error = TokenizerError::Unfit { key, problem };
            return Err(EngineError::Tokenizer { file: gguf.path().to_path_buf(), error });
        }
        let (sampling, mut notes) = Overrides::of(&gguf)?;
        let team = team(o.threads, &o.placement, &mut notes)?;
        if let Some(flag) = o.residence.flag() {
            let needed = model.weights.matrices().iter().map(|b| b.len() as u64).sum();
            let available = Machine::here().available.map_or(u64::MAX, most_taken).min(o.resident.unwrap_or(u64::MAX));
            if needed > available {
                return Err(EngineError::Weights { flag, needed, available });
            }
        }
        let locked = match o.residence {
            Residence { copy: true, lock, .. } => copy(&mut model, lock, &team, watch)?,
            Residence { lock: true, .. } => Some(lock(&model)),
            _ => None,
        };
        let stays = o.residence.copy || matches!(locked, Some(Ok(())));
        if let Some(Err((needed, error))) = locked {
            notes.push(not_locked(needed, &error));
        }
        notes.extend_from_slice(tokenizer.notes());
        Ok(Engine {
            gguf,
            model,
            tokenizer,
            recommended: o.recommended.over(sampling.over(SampleParams::default())),
            kernels: o.kernels,
            team,
            resident: o.resident,
            residence: o.residence,
            stays,
            notes,
            stream: OnceLock::new(),
        })
    }

    /// Number of workers.
    pub fn threads(&self) -> usize {
        self.team.threads()
    }

    /// The workers, for measurements.
    pub fn team(&self) -> &Team {
        &self.team
    }

    /// So many tokens may be fed one by one or together, in any pieces: their logits are the same, to the last bit.
    pub fn alike(&self) -> usize {
        self.model.weights.alike(self.kernels)
    }

    /// Warnings: about the tokenizer and about options that could not be honoured.
    pub fn notes(&self) -> &[String] {
        &self.notes
    }

    /// Whether to call [`Engine::prefault`]: it was requested, or weights are locked on fault and must be faulted in.
    pub fn wants_prefault(&self) -> bool {
        !self.residence.copy && (self.residence.prefault || self.residence.lock && self.stays)
    }

    /// Reads all weights into memory: on the engine's workers, which compute nothing meanwhile, or `aside` of them on the
    /// calling thread alone.
    pub fn prefault(&self, aside: bool, watch: &load::Watch<'_>) -> Result<(), EngineError> {
        let team = (!aside).then_some(&self.team);
        Ok(load::populate(&self.model.weights.matrices(), team, watch)?)
    }

    /// Whether the weights are copied or locked, so that the system cannot drop them.
    pub fn stays(&self) -> bool {
        self.stays
    }

    /// The weights' way into memory, where they do not fit there: known from the first session on.
    pub fn stream(&self) -> Option<&Stream> {
        self.stream.get()
    }

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

    /// Whether weights are streamed, given the bytes that they may take.
    fn decide(&self, free: Option<u64>) -> Result<bool, EngineError> {
        // They have their memory, and it no longer counts as free.
        if self.stays {
            return Ok(false);
        }
        let Some(budget) = self.resident.or(free) else { return Ok(false) };
        let weights = &self.model.weights;
        if self.stream.get().is_none() && weights.n_bytes() > budget {
            let stream =
                Stream::new(weights, self.model.config.experts, budget).map_err(system("thread that reads weights"))?;
            // Another session may have been first: its stream serves as well.
            let _ = self.stream.set(stream);
        }
        Ok(self.stream.get().is_some())
    }
}

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
