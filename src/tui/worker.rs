//! The thread that owns the model: it loads, reads and answers, and says what happens as it happens.
//!
//! The screen never waits for it. Requests are taken one after another; [`Worker::stop`] ends the one at hand between two
//! tokens, or between two parts of a prompt.

use super::Msg;
use crate::catalog;
use crate::chat::{self, Message, Template};
use crate::draft::Drafter;
use crate::engine::{Engine, EngineOptions, Session, SessionOptions, common_prefix};
use crate::generate::{End, Event as Heard, generate_with};
use crate::kv_store::{self, KvStore};
use crate::machine::Machine;
use crate::sample::{SampleParams, Sampler};
use std::hint::black_box;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// Mapped bytes are touched so many at a time while loading.
const PART: usize = 64 << 20;
const PAGE: usize = 4096;

/// How models are opened; the same for every model of a run.
#[derive(Clone)]
pub struct Opening {
    /// Threads, kernels, overrides.
    pub engine: EngineOptions,
    /// Cache types and the largest forward pass; the context is that of the model unless `context` says otherwise.
    pub session: SessionOptions,
    /// Tokens of context.
    pub context: Option<usize>,
    /// Tokens that are guessed ahead, at most.
    pub draft_max: usize,
    /// A smaller model that guesses, too, by name or path; it must be on this machine.
    pub model_draft: Option<String>,
    /// The source of a chat template and where it comes from, instead of the model's own.
    pub template: Option<(String, String)>,
    /// One line about a model at a context.
    pub describe: fn(&Engine, usize) -> String,
    /// Bytes that the KV caches of all conversations may take on disk together; 0 keeps none.
    pub kv_limit: u64,
}

/// A question for the model.
#[derive(Clone, Debug, PartialEq)]
pub struct Ask {
    /// Which; [`Worker::stop`] names it.
    pub id: u64,
    /// The turns that lead to where the conversation stands.
    pub turns: Vec<Message>,
    /// The last one is an answer that was cut: go on with it.
    pub go_on: bool,
    /// How to sample.
    pub params: SampleParams,
    /// Tokens of the answer, at most.
    pub limit: Option<usize>,
    /// Whether the oldest turns may be left out where all do not fit.
    pub may_leave_out: bool,
    /// Turns that were left out for the question before.
    pub left_out: usize,
}

/// What the worker is asked for.
pub enum Request {
    /// Open a model, by name or path; none is the default one. It must be on this machine.
    Load(Option<String>),
    /// Answer.
    Ask(Ask),
}

/// What there is to know of a loaded model.
#[derive(Clone)]
pub struct Loaded {
    /// Its name.
    pub name: String,
    /// One line about it.
    pub facts: String,
    /// Tokens of context.
    pub context: usize,
    /// Bytes of weights that a token reads.
    pub bytes_per_token: usize,
    /// Bytes of cache that a token takes.
    pub cache_per_token: usize,
    /// How its makers say to sample.
    pub recommended: SampleParams,
    /// What the person should know.
    pub notes: Vec<String>,
}

/// What happens.
pub enum Event {
    /// So many of so many bytes of the file are in memory.
    Loading(u64, u64),
    /// It can be asked. The engine counts tokens for the screen.
    Loaded(Box<Loaded>, Option<Arc<Engine>>),
    /// It cannot be opened; the model before it is here as before, or there is none.
    LoadFailed {
        /// Why.
        problem: String,
        /// Whether there is another model.
        kept: bool,
    },
    /// So many of so many new tokens of the prompt are read, after so long; so many were in the cache.
    Reading {
        /// Tokens read.
        done: usize,
        /// Tokens to read.
        of: usize,
        /// Tokens that did not have to be read.
        reused: usize,
        /// Time for those read.
        time: Duration,
    },
    /// More of the answer, if only a token without text; so many tokens of it, in so many passes, after so long; so many positions of the context are in use.
    Text {
        /// The text.
        text: String,
        /// Tokens so far.
        tokens: usize,
        /// Passes over the weights that they took.
        passes: usize,
        /// Since the first of them.
        time: Duration,
        /// Positions in use.
        used: usize,
    },
    /// The answer is over.
    Ended {
        /// Why.
        end: End,
        /// Tokens of it.
        tokens: usize,
        /// Since the first of them.
        time: Duration,
        /// Positions in use.
        used: usize,
    },
    /// The conversation does not fit: so many of the oldest turns would have to be left out, and may not.
    Full(usize),
    /// So many of the oldest turns are left out.
    LeftOut(usize),
    /// There is no answer.
    Failed(String),
    /// What was noticed of the KV cache on disk.
    Noticed(String),
}

/// The thread.
pub struct Worker {
    requests: Sender<Request>,
    stopped: Arc<AtomicU64>,
    file: Arc<Mutex<Option<PathBuf>>>,
}

impl Worker {
    /// Starts it.
    pub fn start(opening: Opening, tell: Sender<Msg>) -> std::io::Result<Worker> {
        let (requests, inbox) = channel();
        let stopped = Arc::new(AtomicU64::new(0));
        let file = Arc::new(Mutex::new(None));
        let desk = Desk { opening, tell, stopped: stopped.clone(), file: file.clone(), loaded: None };
        std::thread::Builder::new().name("model".into()).spawn(move || desk.run(inbox))?;
        Ok(Worker { requests, stopped, file })
    }

    /// Asks for something.
    pub fn send(&self, r: Request) {
        // It ends only with us.
        let _ = self.requests.send(r);
    }

    /// Says which conversation this is, beside whose file the KV cache is kept.
    pub fn set_file(&self, path: Option<PathBuf>) {
        *self.file.lock().unwrap_or_else(|e| e.into_inner()) = path;
    }

    /// Ends the question `id` and those before it.
    pub fn stop(&self, id: u64) {
        self.stopped.fetch_max(id, Ordering::SeqCst);
    }
}

struct Desk {
    opening: Opening,
    tell: Sender<Msg>,
    stopped: Arc<AtomicU64>,
    file: Arc<Mutex<Option<PathBuf>>>, // of the conversation
    loaded: Option<Ready>,
}

struct Ready {
    engine: Arc<Engine>,
    session: Session,
    template: Template,
    sampler: Option<(SampleParams, Sampler)>,
    drafter: Drafter,
    kv: Kept,
    prefault: Option<Prefault>,
}

/// Weights on their way into memory, on a thread of its own, while this lives.
struct Prefault(Arc<AtomicBool>);

impl Prefault {
    /// Begins; questions are answered meanwhile.
    fn start(engine: &Arc<Engine>, tell: &Sender<Msg>) -> std::io::Result<Prefault> {
        let over = Arc::new(AtomicBool::new(false));
        let (engine, tell, ended) = (engine.clone(), tell.clone(), over.clone());
        std::thread::Builder::new().name("prefault".into()).spawn(move || {
            let say = |e: Event| drop(tell.send(Msg::Worker(e)));
            let end = engine.prefault(true, &|done, of| match ended.load(Ordering::SeqCst) {
                true => ControlFlow::Break(()),
                false => {
                    say(Event::Loading(done, of));
                    ControlFlow::Continue(())
                }
            });
            // A model that makes way for another has nothing to say any more.
            if let Err(e) = end
                && !ended.load(Ordering::SeqCst)
            {
                say(Event::Loading(1, 1));
                say(Event::Noticed(e.to_string()));
            }
        })?;
        Ok(Prefault(over))
    }
}

impl Drop for Prefault {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

/// The KV cache of the conversation on disk.
#[derive(Default)]
struct Kept {
    path: Option<PathBuf>, // of the conversation that was tried last
    store: Option<KvStore>,
}

impl Desk {
    fn say(&self, e: Event) {
        // Nobody listens any more when the program ends.
        let _ = self.tell.send(Msg::Worker(e));
    }

    fn run(mut self, inbox: Receiver<Request>) {
        let mut next = None;
        while let Some(request) = next.take().or_else(|| inbox.recv().ok()) {
            match request {
                Request::Load(wanted) => match self.load(wanted) {
                    Ok((mut ready, facts)) => {
                        self.say(Event::Loaded(Box::new(facts), Some(ready.engine.clone())));
                        match ready.engine.wants_prefault().then(|| Prefault::start(&ready.engine, &self.tell)) {
                            Some(Ok(p)) => ready.prefault = Some(p),
                            // Without a thread for it, it goes on until somebody asks.
                            Some(Err(_)) | None => next = self.warm(&ready.engine, &inbox),
                        }
                        self.loaded = Some(ready);
                    }
                    Err(problem) => self.say(Event::LoadFailed { problem, kept: self.loaded.is_some() }),
                },
                Request::Ask(ask) => {
                    let event = match self.loaded.take() {
                        Some(mut ready) => {
                            let event = self.answer(&mut ready, ask).unwrap_or_else(Event::Failed);
                            self.loaded = Some(ready);
                            event
                        }
                        None => Event::Failed("no model is loaded".into()),
                    };
                    self.say(event);
                }
            }
        }
    }

    fn load(&mut self, wanted: Option<String>) -> Result<(Ready, Loaded), String> {
        let text = |e: &dyn std::fmt::Display| e.to_string();
        let found = catalog::resolve(wanted.as_deref()).map_err(|e| text(&e))?;
        let o = EngineOptions { recommended: found.sampling, ..self.opening.engine.clone() };
        let watch = |done: u64, of: u64| {
            // It is ready only with its session.
            self.say(Event::Loading(done.min(of.saturating_sub(1)), of));
            ControlFlow::Continue(())
        };
        let engine = Arc::new(Engine::open_watched(&found.path, &o, &watch).map_err(|e| text(&e))?);
        let c = &engine.model.config;
        let context = self.opening.context.unwrap_or(c.n_context);
        let per_token = engine.model.weights.bytes_per_pass(c, 1, 1) as usize;
        let ubatch = self.opening.session.ubatch.min(stoppable(per_token));
        let template = match &self.opening.template {
            Some((source, origin)) => Template::from_source(source, origin.clone(), &engine.tokenizer),
            None => Template::from_gguf(&engine.gguf, &engine.tokenizer),
        };
        let template = template.map_err(|e| text(&e))?;
        // What can be wrong with a file has been seen; the old model's cache makes way for the new one's.
        self.loaded = None;
        let options = SessionOptions { context, ubatch, ..self.opening.session };
        let session = engine.session(&options).map_err(|e| text(&e))?;
        let mut notes = engine.notes().to_vec();
        notes.extend(engine.model.config.note_on(context));
        let mut drafter = Drafter::new(self.opening.draft_max);
        if let Some(small) = &self.opening.model_draft {
            let small = catalog::resolve(Some(small)).map_err(|e| text(&e));
            let added = small.and_then(|s| drafter.add_model(&engine, &s.path, &o, &options).map_err(|e| text(&e)));
            // Without it, the answer comes later, and is the same.
            notes.extend(added.err());
        }
        let name = engine.gguf.str("general.name").ok().flatten().map(str::to_string);
        let loaded = Loaded {
            name: found.name.map(str::to_string).or(name).unwrap_or_else(|| file_name(&found.path)),
            facts: (self.opening.describe)(&engine, context),
            context,
            bytes_per_token: per_token,
            cache_per_token: session.cache_bytes() / context.max(1),
            recommended: engine.recommended.clone(),
            notes,
        };
        let kv = Kept::default();
        Ok((Ready { engine, session, template, sampler: None, drafter, kv, prefault: None }, loaded))
    }

    /// Brings the weights into memory, so that the first question does not wait for the disk, until somebody asks for
    /// something. A file that does not fit would only push itself out.
    fn warm(&self, e: &Engine, inbox: &Receiver<Request>) -> Option<Request> {
        let matrices = e.model.weights.matrices();
        let of = matrices.iter().map(|m| m.len() as u64).sum();
        let there = !matrices.iter().any(|m| m.is_mapped());
        if there || e.stream().is_some() || Machine::here().available.is_none_or(|free| of > free) {
            self.say(Event::Loading(1, 1));
            return None;
        }
        let (mut done, mut told) = (0, Instant::now());
        for part in matrices.iter().flat_map(|m| m.chunks(PART)) {
            part.iter().step_by(PAGE).for_each(|b| _ = black_box(*b));
            done += part.len() as u64;
            if let Ok(r) = inbox.try_recv() {
                self.say(Event::Loading(of, of));
                return Some(r);
            }
            if told.elapsed() > Duration::from_millis(100) {
                self.say(Event::Loading(done, of));
                told = Instant::now();
            }
        }
        self.say(Event::Loading(of, of));
        None
    }

    /// Where weights come from the disk, a pass takes long: its layers are reported while the prompt is read, and a stop
    /// need not wait for its end. Returns where to say how many of the `of` tokens earlier passes have read.
    fn watch(&self, session: &mut Session, id: u64, of: usize, reused: usize, start: Instant) -> Arc<AtomicUsize> {
        let read = Arc::new(AtomicUsize::new(0));
        if session.engine().stream().is_some() {
            let (tell, stopped, before, walk) = (self.tell.clone(), self.stopped.clone(), read.clone(), session.walk());
            session.watch(Some(Arc::new(move |layer, layers| {
                let before = before.load(Ordering::SeqCst);
                if before < of {
                    let done = before + (of - before).min(walk) * layer / layers;
                    // Nobody listens any more when the program ends.
                    let _ = tell.send(Msg::Worker(Event::Reading { done, of, reused, time: start.elapsed() }));
                }
                if stopped.load(Ordering::SeqCst) >= id { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
            })));
        }
        read
    }

    /// Opens the KV cache of the conversation that the screen shows, which gets its file with its first question.
    fn follow(&self, kv: &mut Kept, session: &Session) {
        let file = self.file.lock().unwrap_or_else(|e| e.into_inner()).clone();
        if file == kv.path || self.opening.kv_limit == 0 {
            return;
        }
        kv.store = None;
        if let Some(path) = &file {
            match KvStore::open(&kv_store::beside(path), session, self.opening.kv_limit) {
                Ok(store) => kv.store = Some(store),
                Err(e) => self.say(Event::Noticed(format!("{e}; the KV cache is not kept"))),
            }
        }
        kv.path = file;
    }

    fn save(
        &self,
        kv: &mut Kept,
        session: &Session,
        save: fn(&mut KvStore, &Session) -> Result<(), kv_store::KvStoreError>,
    ) {
        self.follow(kv, session);
        let Some(store) = &mut kv.store else { return };
        let done = save(store, session);
        store.take_notes().into_iter().for_each(|n| self.say(Event::Noticed(n)));
        if let Err(e) = done {
            self.say(Event::Noticed(format!("{e}; the KV cache is not kept")));
            kv.store = None;
        }
    }

    fn answer(&self, ready: &mut Ready, ask: Ask) -> Result<Event, String> {
        let asked_to_stop = || self.stopped.load(Ordering::SeqCst) >= ask.id;
        let Ready { engine, session, template, sampler, drafter, kv, .. } = ready;
        let context = session.context();
        let encode = |kept: &[Message]| encode(engine, template, kept, ask.go_on);
        let ((mut prompt, begun, opened), left_out) =
            chat::within(&ask.turns, context, ask.left_out, encode, |(prompt, ..)| prompt.len())?;
        // An answer that fills the context by itself goes on from its end.
        if ask.go_on && ask.may_leave_out && begun < context / 2 && prompt.len() >= context {
            let n = prompt.len() - context / 2;
            prompt.drain(begun..begun + n);
            let text = format!("the model reads the question and the end of its answer, without {n} tokens between");
            self.say(Event::Noticed(text));
        }
        if left_out > 0 && !ask.may_leave_out {
            return Ok(Event::Full(left_out));
        }
        self.say(Event::LeftOut(left_out));
        if sampler.as_ref().is_none_or(|(p, _)| *p != ask.params) {
            *sampler = Some((ask.params.clone(), Sampler::new(ask.params.clone())));
        }
        let Some((_, sampler)) = sampler else { return Err("no sampler".into()) };

        self.follow(kv, session);
        if let Some(store) = &mut kv.store {
            store.restore(session, &prompt);
        }
        let common = common_prefix(session.tokens(0), &prompt);
        let reused = common.min(prompt.len().saturating_sub(1));
        self.say(Event::Reading { done: 0, of: prompt.len() - reused, reused, time: Duration::ZERO });
        let start = Instant::now();
        let mut first = None;
        if opened && !ask.go_on {
            // The template has opened the thought already.
            let (text, time, used) = ("<think>\n".into(), Duration::ZERO, prompt.len());
            self.say(Event::Text { text, tokens: 0, passes: 0, time, used });
        }
        let way = self.watch(session, ask.id, prompt.len() - reused, reused, start);
        let report = generate_with(session, sampler, drafter, &prompt, ask.limit, |session, event| {
            match event {
                Heard::Prompt { done, of } => {
                    way.store(done, Ordering::SeqCst);
                    self.say(Event::Reading { done, of, reused, time: start.elapsed() });
                }
                Heard::Text { text, tokens, passes } => {
                    let time = first.get_or_insert_with(Instant::now).elapsed();
                    self.say(Event::Text { text: text.into(), tokens, passes, time, used: prompt.len() + tokens });
                }
            }
            self.save(kv, session, KvStore::save_some);
            if asked_to_stop() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        })
        .map_err(|e| e.to_string())?;
        self.save(kv, session, KvStore::save);
        Ok(Event::Ended { end: report.end, tokens: report.generated.len(), time: report.time, used: session.len(0) })
    }
}

/// The tokens of a conversation up to where the answer goes on, how many of them stand before the answer, and whether the
/// template opens a thought there.
fn encode(
    e: &Engine,
    template: &Template,
    messages: &[Message],
    go_on: bool,
) -> Result<(Vec<u32>, usize, bool), String> {
    let (said, begun) = messages.split_at(messages.len() - usize::from(go_on));
    let mut ids = chat::encode(&e.tokenizer, template, said, true).map_err(|e| e.to_string())?;
    let before = ids.len();
    let end: Vec<u8> = ids[ids.len().saturating_sub(6)..].iter().flat_map(|&i| e.tokenizer.piece(i).to_vec()).collect();
    let opened = end.trim_ascii_end().ends_with(b"<think>");
    for m in begun {
        let content = if opened { m.content.trim_start_matches("<think>\n") } else { &m.content };
        // What a message says is not trusted with control tokens.
        ids.extend(e.tokenizer.encode(content.as_bytes(), false, false).map_err(|e| e.to_string())?);
    }
    Ok((ids, before, opened))
}

/// Tokens of a forward pass after which a stop is still prompt: a large model reads fewer at a time.
fn stoppable(bytes_per_token: usize) -> usize {
    match bytes_per_token >> 30 {
        0 => 512,
        1..8 => 256,
        _ => 128,
    }
}

fn file_name(path: &Path) -> String {
    path.file_name().map_or_else(|| path.display().to_string(), |n| n.to_string_lossy().into_owned())
}
