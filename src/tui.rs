//! The chat as a full screen.
//!
//! ```text
//! keys ──┐                                   ┌─> worker: owns the model
//! worker ├─> Msg ─> App::update ─> Effects ──┼─> store: owns the conversation's file
//! store ─┘              └─> view::draw       └─> the terminal, files, other programs
//! ```
//!
//! The main thread waits for messages and draws; it computes nothing, reads none of the user's files and waits for nobody. Keys are drawn
//! at once, an answer that streams at most [`FRAME`] apart.

mod app;
mod command;
mod editor;
mod highlight;
mod markdown;
mod memory;
mod panel;
mod store;
mod term;
mod theme;
mod transcript;
mod tree;
mod view;
mod worker;
mod wrap;

pub use theme::Scheme;
pub use worker::Opening;
pub use wrap::clean;

use crate::catalog::{self, catalog};
use crate::disk::{Partial, home_path, remove_unfinished, write_private};
use crate::engine::Engine;
use crate::sample::SampleParams;
use crate::signals::{INTERRUPT, on_end};
use app::{App, Beginning, Effect};
use crossterm::clipboard::CopyToClipboard;
use crossterm::event;
use panel::ModelItem;
use std::fs::DirBuilder;
use std::io::{self, Read};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, Instant, UNIX_EPOCH};
use store::Store;
use term::Screen;
pub use term::give_back as give_back_terminal;
use worker::{Request, Worker};

/// Between two frames of what moves by itself.
const FRAME: Duration = Duration::from_millis(33);
/// Between two frames while only the spinner moves.
const TICK: Duration = Duration::from_millis(125);
/// A file that is attached, at most.
const MOST_FILE: u64 = 4 << 20;
/// How long the reader of keys looks before it sees whether it shall rest.
const LOOK: Duration = Duration::from_millis(100);

/// What happens.
pub enum Msg {
    /// A key, the mouse, a paste, another size.
    Terminal(event::Event),
    /// The model.
    Worker(worker::Event),
    /// The conversation's file.
    Store(store::Event),
    /// The attachment of this number has so many tokens.
    Counted(usize, usize),
    /// The file that a word names, or why not.
    File(String, Result<String, NoText>),
    /// What completes a path.
    Paths(String, Vec<String>),
    /// The models.
    Models(Vec<ModelItem>),
    /// What was written in another editor.
    Written(Result<String, String>),
    /// A model was chosen: the bytes to fetch, where it is not here and they are known, and its name.
    Chosen(Option<Option<u64>>, String),
    /// A model cannot be had.
    NotFetched(String),
    /// Time passed.
    Tick,
    /// Somebody wants the program to end.
    Quit,
}

/// Why a word names no text.
#[derive(Debug, PartialEq)]
pub enum NoText {
    /// There is no such file.
    Missing(String),
    /// There is, but it is none.
    Unfit(String),
}

/// What a chat is to be.
pub struct Chat {
    /// A model of the catalogue or a path; it is on this machine. None is the default one.
    pub model: Option<String>,
    /// How models are opened.
    pub opening: Opening,
    /// What the person said about sampling, over what the makers of a model recommend.
    pub set_params: Box<dyn Fn(SampleParams) -> SampleParams>,
    /// System prompt.
    pub system: String,
    /// The first question.
    pub prompt: Option<String>,
    /// Tokens of an answer, at most.
    pub limit: Option<usize>,
    /// Where conversations are kept; none keeps none.
    pub dir: Option<PathBuf>,
    /// A conversation to go on with.
    pub resume: Option<PathBuf>,
    /// Colours; none asks the environment.
    pub scheme: Option<Scheme>,
    /// Whether the mouse scrolls.
    pub mouse: bool,
}

/// Runs the chat until the person leaves. The terminal is as before when this returns.
pub fn run(c: Chat) -> io::Result<()> {
    let (tell, inbox) = channel();
    let elsewhere: Arc<AtomicBool> = Arc::default();
    {
        let (tell, elsewhere) = (tell.clone(), elsewhere.clone());
        // A closing terminal and its shell may each send one; a later signal does not wait for a screen that hangs.
        let asked = OnceLock::new();
        on_end(move |signal| {
            // The terminal sends it to all that run on it, and it is meant for the other editor.
            if signal == INTERRUPT && elsewhere.load(Ordering::SeqCst) {
                return;
            }
            let again = asked.get_or_init(Instant::now).elapsed() > Duration::from_secs(1);
            if again || tell.send(Msg::Quit).is_err() {
                remove_unfinished();
                term::give_back();
                std::process::exit(143);
            }
        })?;
    }
    let scheme = c.scheme.unwrap_or_else(|| Scheme::detect(|name| std::env::var(name).ok()));
    let mut screen = Screen::take(c.mouse)?;
    let beginning = Beginning {
        model: c.model,
        scheme,
        mouse: c.mouse,
        set_params: c.set_params,
        system: c.system,
        prompt: c.prompt,
        limit: c.limit,
    };
    let mut app = App::new(beginning, screen.size()?, Instant::now());
    app.update(Msg::Tick);
    screen.draw(|f| view::draw(f, &app))?;
    if let Some(path) = c.resume {
        app.open(path);
    }
    let keys = Keys::start(tell.clone())?;
    let store = Store::start(c.dir, tell.clone())?;
    let worker = Worker::start(c.opening, tell.clone())?;
    let mut desk = Outside { screen, keys, store, worker, tell, engine: None, elsewhere };
    let result = event_loop(&mut app, &mut desk, &inbox);
    // What was said is in the file before the terminal is given back.
    let Outside { screen, store, .. } = desk;
    drop(store);
    drop(screen);
    for msg in inbox.try_iter() {
        if let Msg::Store(store::Event::Unsaved(problem)) = msg {
            app.unsaved = problem;
        }
    }
    if let Some(problem) = &app.unsaved {
        tell!("the end of the conversation is not saved: {problem}");
    }
    result
}

/// Waits, updates, draws, until the person leaves.
fn event_loop(app: &mut App, desk: &mut Outside, inbox: &Receiver<Msg>) -> io::Result<()> {
    let (mut drawn, mut stale, mut measured) = (Instant::now(), true, Instant::now());
    while !app.quit {
        for effect in std::mem::take(&mut app.effects) {
            if let Some(msg) = desk.apply(effect)? {
                app.update(msg);
                stale = true;
            }
        }
        let wait = match (stale, app.busy(), &app.notice) {
            (true, ..) => FRAME.saturating_sub(drawn.elapsed()),
            (false, true, _) => TICK.saturating_sub(drawn.elapsed()),
            (false, false, Some(n)) => n.until.saturating_duration_since(Instant::now()) + FRAME,
            (false, false, None) => Duration::from_secs(3600),
        };
        let mut urgent = false;
        let mut next = match inbox.recv_timeout(wait) {
            Ok(msg) => Some(msg),
            Err(RecvTimeoutError::Timeout) => Some(Msg::Tick),
            Err(RecvTimeoutError::Disconnected) => None,
        };
        while let Some(mut msg) = next.take() {
            urgent |= matches!(msg, Msg::Terminal(_));
            if let Msg::Worker(worker::Event::Loaded(_, engine)) = &mut msg {
                desk.engine = engine.take();
            }
            app.now = Instant::now();
            app.update(msg);
            stale = true;
            // Keys that came together are drawn together, but not without end.
            if !urgent || drawn.elapsed() < 2 * FRAME {
                next = inbox.try_recv().ok();
            }
        }
        if measured.elapsed() > Duration::from_secs(1) || app.memory.is_none() {
            app.memory = memory::resident();
            measured = Instant::now();
        }
        if stale && app.effects.is_empty() && (urgent || drawn.elapsed() >= FRAME) {
            desk.screen.draw(|f| view::draw(f, app))?;
            (drawn, stale) = (Instant::now(), false);
        }
    }
    for effect in std::mem::take(&mut app.effects) {
        desk.apply(effect)?;
    }
    Ok(())
}

/// Everything that effects touch.
struct Outside {
    screen: Screen,
    keys: Keys,
    store: Store,
    worker: Worker,
    tell: Sender<Msg>,
    engine: Option<Arc<Engine>>,
    elsewhere: Arc<AtomicBool>, // whether the person writes in another editor
}

impl Outside {
    /// Does what shall be done; what is known at once is returned.
    fn apply(&mut self, e: Effect) -> io::Result<Option<Msg>> {
        match e {
            Effect::Ask(ask) => self.worker.send(Request::Ask(ask)),
            Effect::Stop(id) => self.worker.stop(id),
            Effect::Load(name) => self.worker.send(Request::Load(name)),
            Effect::Choose(name) => return Ok(Some(Msg::Chosen(to_fetch(&name), name))),
            Effect::Fetch(name) => return self.fetch(name).map(Some),
            Effect::Store(store::Op::New(model)) => self.store.send(store::Op::New(catalog::lasting(Some(&model)))),
            Effect::Store(store::Op::Model(model)) => self.store.send(store::Op::Model(catalog::lasting(Some(&model)))),
            Effect::Store(op) => self.store.send(op),
            Effect::File(path) => self.worker.set_file(path),
            Effect::Count(i, text) => {
                if let Some(engine) = self.engine.clone() {
                    self.aside(move || {
                        Some(Msg::Counted(i, engine.tokenizer.encode(text.as_bytes(), false, false).ok()?.len()))
                    });
                }
            }
            Effect::Read(word) => self.aside(move || {
                let content = read_text(&word);
                Some(Msg::File(word, content))
            }),
            Effect::Paths(word) => self.aside(move || {
                let paths = complete_path(&word);
                Some(Msg::Paths(word, paths))
            }),
            Effect::Models => self.aside(|| Some(Msg::Models(models()))),
            Effect::Copy(text) => {
                self.screen.send(CopyToClipboard::to_clipboard_from(&text))?;
                self.aside(move || {
                    copy_by_program(&text);
                    None
                });
            }
            Effect::Write(text) => {
                self.elsewhere.store(true, Ordering::SeqCst);
                let written = self.away(|| write_elsewhere(&text));
                self.elsewhere.store(false, Ordering::SeqCst);
                return Ok(Some(Msg::Written(written?)));
            }
            Effect::Suspend => self.away(|| {
                // The whole job, as the terminal does it: a shell waits for the first program of it.
                let _ = rustix::process::kill_current_process_group(rustix::process::Signal::TSTP);
            })?,
            Effect::Redraw => self.screen.redraw()?,
            Effect::Mouse(on) => self.screen.set_mouse(on)?,
        }
        Ok(None)
    }

    /// Loads a model, after fetching it where it is not here: that says on the ordinary screen what it does.
    fn fetch(&mut self, name: String) -> io::Result<Msg> {
        if to_fetch(&name).is_some()
            && let Err(e) = self.away(|| catalog::pull(Some(&name)))?
        {
            return Ok(Msg::NotFetched(e.to_string()));
        }
        self.worker.send(Request::Load(Some(name)));
        Ok(Msg::Tick)
    }

    /// Runs something while the terminal is not ours, and nobody reads its keys.
    fn away<T>(&mut self, f: impl FnOnce() -> T) -> io::Result<T> {
        let _rest = self.keys.rest();
        self.screen.without(f)
    }

    /// Runs something short on a thread of its own.
    fn aside(&self, f: impl FnOnce() -> Option<Msg> + Send + 'static) {
        let tell = self.tell.clone();
        let started = std::thread::Builder::new().spawn(move || {
            if let Some(msg) = f() {
                let _ = tell.send(msg);
            }
        });
        drop(started);
    }
}

/// The thread that reads keys.
struct Keys {
    resting: Arc<AtomicBool>,
    reading: Arc<Mutex<()>>,
}

impl Keys {
    fn start(tell: Sender<Msg>) -> io::Result<Keys> {
        let keys = Keys { resting: Arc::default(), reading: Arc::default() };
        let (resting, reading) = (keys.resting.clone(), keys.reading.clone());
        std::thread::Builder::new().name("keys".into()).spawn(move || {
            loop {
                while resting.load(Ordering::SeqCst) {
                    std::thread::sleep(LOOK / 10);
                }
                let _reading = reading.lock().unwrap_or_else(|e| e.into_inner());
                let event = match event::poll(LOOK) {
                    Ok(true) => event::read(),
                    Ok(false) => continue,
                    Err(e) => Err(e),
                };
                if matches!(&event, Ok(event::Event::Mouse(m)) if m.kind == event::MouseEventKind::Moved) {
                    continue;
                }
                // The terminal is gone: whoever sat there left.
                let (msg, gone) = match event {
                    Ok(e) => (Msg::Terminal(e), false),
                    Err(_) => (Msg::Quit, true),
                };
                if tell.send(msg).is_err() || gone {
                    return;
                }
            }
        })?;
        Ok(keys)
    }

    /// Lets the keys to somebody else, as long as the result lives.
    fn rest(&self) -> impl Drop + use<> {
        struct Rest(Arc<AtomicBool>);
        impl Drop for Rest {
            fn drop(&mut self) {
                self.0.store(false, Ordering::SeqCst);
            }
        }
        self.resting.store(true, Ordering::SeqCst);
        drop(self.reading.lock());
        Rest(self.resting.clone())
    }
}

/// The bytes of a model that is not here, or not whole, where they are known.
fn to_fetch(name: &str) -> Option<Option<u64>> {
    if catalog::path(name).is_some() {
        return None;
    }
    // What is no model is told of by who loads it.
    let (model, file) = catalog::find(Some(name)).ok()?;
    (!model.local(file).is_ok_and(|l| l.is_some_and(|l| l.complete))).then_some(file.bytes)
}

fn read_text(word: &str) -> Result<String, NoText> {
    let path = home_path(word);
    let error = |e: io::Error| match e.kind() {
        io::ErrorKind::NotFound | io::ErrorKind::NotADirectory => NoText::Missing(format!("{word}: no such file")),
        _ => NoText::Unfit(format!("{word}: {e}")),
    };
    let meta = std::fs::metadata(&path).map_err(error)?;
    if !meta.is_file() {
        return Err(NoText::Unfit(format!("{word}: not a file")));
    }
    let mut bytes = Vec::new();
    std::fs::File::open(&path).and_then(|f| f.take(MOST_FILE + 1).read_to_end(&mut bytes)).map_err(error)?;
    if bytes.len() as u64 > MOST_FILE {
        return Err(NoText::Unfit(format!("{word}: {} bytes, expected at most {MOST_FILE}", meta.len())));
    }
    match String::from_utf8(bytes) {
        Ok(text) if !text.contains('\0') => Ok(text),
        _ => Err(NoText::Unfit(format!("{word}: not a text in UTF-8"))),
    }
}

/// Paths that begin so, folders with a slash at the end.
fn complete_path(word: &str) -> Vec<String> {
    let (folder, begun) = word.rsplit_once('/').map_or(("", word), |(f, b)| (&word[..f.len() + 1], b));
    let dir = if folder.is_empty() { PathBuf::from(".") } else { home_path(folder) };
    let mut found: Vec<String> = std::fs::read_dir(dir)
        .into_iter()
        .flatten()
        .take(10_000)
        .filter_map(|e| {
            let e = e.ok()?;
            let name = e.file_name().into_string().ok()?;
            let shown = name.starts_with(begun) && (begun.starts_with('.') || !name.starts_with('.'));
            let plain = !name.contains(|c: char| c == '"' || c.is_control());
            let slash = if e.path().is_dir() { "/" } else { "" };
            (shown && plain).then(|| format!("{folder}{name}{slash}"))
        })
        .collect();
    found.sort();
    found.truncate(50);
    found
}

/// The models of the catalogue, those on this machine first.
fn models() -> Vec<ModelItem> {
    let mut found = Vec::new();
    for m in &catalog().models {
        for f in &m.files {
            let local = m.local(f).ok().flatten();
            let bytes = f.bytes.or(local.as_ref().map(|l| l.bytes()));
            found.push(ModelItem { name: format!("{}:{}", m.name, f.quant), bytes, here: local.is_some() });
        }
    }
    found.sort_by_key(|m| !m.here);
    found
}

/// Gives a text to the programs that own clipboards here, for terminals that do not hear OSC 52 or, as tmux, are not let
/// to. One that is not installed is passed over: there is no telling which terminal took the text already.
fn copy_by_program(text: &str) {
    let programs: [(&str, &str, &[&str]); 3] = [
        ("TMUX", "tmux", &["load-buffer", "-w", "-"]),
        ("WAYLAND_DISPLAY", "wl-copy", &[]),
        ("DISPLAY", "xclip", &["-selection", "clipboard"]),
    ];
    for (variable, program, args) in programs {
        if std::env::var_os(variable).is_none_or(|v| v.is_empty()) {
            continue;
        }
        let mut command = Command::new(program);
        command.args(args).stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null());
        if let Ok(mut child) = command.spawn() {
            if let Some(mut stdin) = child.stdin.take() {
                let _ = io::Write::write_all(&mut stdin, text.as_bytes());
            }
            let _ = child.wait();
        }
    }
}

/// Lets the person write in `$VISUAL` or `$EDITOR`.
fn write_elsewhere(text: &str) -> Result<String, String> {
    let set = |name: &str| std::env::var(name).ok().filter(|v| !v.trim().is_empty());
    let editor = set("VISUAL").or_else(|| set("EDITOR")).unwrap_or_else(|| "vi".into());
    let error = |e: io::Error| format!("{editor}: {e}");
    // In a folder of its own, which nobody else may look into: some editors leave copies beside the file.
    let dir = std::env::temp_dir().join(format!(
        "oxcart-{}-{}",
        std::process::id(),
        UNIX_EPOCH.elapsed().unwrap_or_default().as_nanos()
    ));
    DirBuilder::new().mode(0o700).create(&dir).map_err(error)?;
    let file = Partial::new(dir.join("question.md"));
    let written =
        write_private(file.path(), text.as_bytes()).map_err(error).and_then(|()| edited(&editor, file.path()));
    drop(file);
    let _ = std::fs::remove_dir_all(&dir);
    written
}

/// What a file says after an editor had it.
fn edited(editor: &str, path: &Path) -> Result<String, String> {
    let error = |e: io::Error| format!("{editor}: {e}");
    // The value may hold flags; the shell divides it as every program has it.
    let status = Command::new("sh").arg("-c").arg(format!("{editor} \"$1\"")).arg("sh").arg(path).status();
    match status {
        // What is no UTF-8 there was written all the same.
        Ok(s) if s.success() => Ok(String::from_utf8_lossy(&std::fs::read(path).map_err(error)?).into_owned()),
        Ok(s) if s.code() == Some(127) => Err(format!("{editor}: not found; $VISUAL or $EDITOR names an editor")),
        Ok(s) => Err(format!("{editor}: {s}; the question is as before")),
        Err(e) => Err(error(e)),
    }
}
