//! A loaded model, and a timeline through it.
//!
//! An [`Engine`] is what is loaded: file, weights, tokenizer, kernels and threads. It never changes and is shared. A
//! [`Session`] is one mutable timeline: the KV cache of its sequences and the buffers of its forward passes. The price of
//! a session is its cache; of an engine, the pages of the file that are in use.

mod session;

pub use session::{Session, SessionOptions, Watch, common_prefix};

use crate::gguf::{Gguf, GgufError};
use crate::load::{self, Residence};
use crate::machine::Machine;
use crate::mmap::{self, Bytes, Room};
use crate::model::{Halt, Model, ModelError, Stream};
use crate::placement::{self, Here, Placement};
use crate::sample::{Overrides, SampleParams};
use crate::tokenizer::{Tokenizer, TokenizerError};
use oxcart_quant::{Kernels, Team};
use std::io;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

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
    // As a team has one at least.
    let threads = threads.max(1);
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
