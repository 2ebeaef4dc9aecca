//! Conversations that last: one append-only text file each, which a person can read and mend in an editor.
//!
//! What was said is a tree: an edited question or a second answer is another child of the same turn. Every change is a
//! line or a few at the end of the file (`history/text.rs` says which), written before anybody is told that it happened; an answer
//! that is still coming is appended piece by piece. So whatever ends the program, the file has all that was said, and
//! [`Conversation::open`] mends where it was cut.
//!
//! Files are readable by their owner alone. One program at a time writes to a conversation, by a lock that ends with the
//! program; others may [`Conversation::read`] it.

mod export;
mod folder;
mod text;

pub use export::{export_json, export_markdown};
pub use folder::{Summary, delete, find, list, list_with, stem};

use jiff::ZonedDateTime;
use std::collections::HashMap;
use std::fmt;
use std::fs::{self, DirBuilder, File, OpenOptions, TryLockError};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// The ending of a conversation's file name.
pub const EXTENSION: &str = "txt";
/// No conversation grows larger, and no larger file is read as one.
const MOST_BYTES: u64 = 64 << 20;
/// How often a growing answer is made durable against a power cut. (The end of the program does not harm it at all.)
const SYNC_EVERY: Duration = Duration::from_secs(1);
/// Characters of a title that is taken from the first question.
const TITLE_CHARS: usize = 60;

/// Why a conversation cannot be opened or go on.
#[derive(Debug, thiserror::Error)]
pub enum HistoryError {
    /// The file system.
    #[error("{}: {error}", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What the system said.
        error: io::Error,
    },
    /// Another program has it open.
    #[error("{}: in use by another program", .0.display())]
    Busy(PathBuf),
    /// Somebody else wrote to the file or replaced it since it was opened.
    #[error("{}: changed by another program since it was opened; open it again", .0.display())]
    Changed(PathBuf),
    /// What stands in it cannot be.
    #[error("{}: line {line}: {problem}", path.display())]
    Contents {
        /// The file.
        path: PathBuf,
        /// Which line, from 1.
        line: usize,
        /// What was found and expected.
        problem: String,
    },
    /// No conversation, or several, that a name may mean.
    #[error("{}: {problem}", dir.display())]
    Name {
        /// The folder.
        dir: PathBuf,
        /// What was looked for and found.
        problem: String,
    },
    /// A turn or a role that cannot be written.
    #[error("{}: {problem}", path.display())]
    Refused {
        /// The file.
        path: PathBuf,
        /// Why.
        problem: String,
    },
}

fn io_error(path: &Path) -> impl FnOnce(io::Error) -> HistoryError + '_ {
    move |error| HistoryError::Io { path: path.to_path_buf(), error }
}

type Result<T> = std::result::Result<T, HistoryError>;

/// The number of a turn in its conversation, from 1.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct TurnId(u32);

impl TurnId {
    /// The number, as the file has it.
    pub fn number(self) -> u32 {
        self.0
    }
}

impl fmt::Display for TurnId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// How a turn ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum TurnState {
    /// All of it is there.
    Whole,
    /// It is still coming, or was cut off: the program died, or the context was full.
    Partial,
    /// A person stopped it.
    Stopped,
}

impl TurnState {
    const ALL: [TurnState; 3] = [TurnState::Whole, TurnState::Partial, TurnState::Stopped];

    /// The word in the file.
    pub fn name(self) -> &'static str {
        match self {
            TurnState::Whole => "whole",
            TurnState::Partial => "partial",
            TurnState::Stopped => "stopped",
        }
    }
}

/// What somebody said.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Turn {
    /// Its number.
    pub id: TurnId,
    /// What it follows; none at the beginning of the conversation.
    pub parent: Option<TurnId>,
    /// Who: `system`, `user` or `assistant`.
    pub role: String,
    /// What was said.
    pub content: String,
    /// How it ended.
    pub state: TurnState,
}

/// A conversation and its file.
pub struct Conversation {
    path: PathBuf,
    turns: Vec<Turn>,
    by_id: HashMap<TurnId, usize>,
    title: Option<String>,
    model: String,
    head: Option<TurnId>,
    notes: Vec<String>,
    tail: Option<Tail>, // none for one that is only read
}

impl Conversation {
    /// Begins a conversation in a new file of `dir`, named after the local time. Creates `dir`, for the owner alone.
    pub fn create(dir: &Path, model: &str) -> Result<Conversation> {
        DirBuilder::new().recursive(true).mode(0o700).create(dir).map_err(io_error(dir))?;
        let stem = ZonedDateTime::now().strftime("%Y-%m-%d-%H%M%S").to_string();
        let mut no = 1;
        let (path, file) = loop {
            let name = if no == 1 { format!("{stem}.{EXTENSION}") } else { format!("{stem}-{no}.{EXTENSION}") };
            let path = dir.join(name);
            match OpenOptions::new().read(true).append(true).create_new(true).mode(0o600).open(&path) {
                Ok(file) => break (path, file),
                Err(e) if e.kind() == io::ErrorKind::AlreadyExists => no += 1,
                Err(e) => return Err(io_error(&path)(e)),
            }
        };
        let mut tail = Tail::of(file, &path)?;
        let begun = tail.write(&path, &text::header(model)).and_then(|()| tail.sync(&path));
        if let Err(e) = begun {
            // It is ours and has nothing in it.
            let _ = fs::remove_file(&path);
            return Err(e);
        }
        // The name is durable only when its folder is.
        File::open(dir).and_then(|d| d.sync_all()).map_err(io_error(dir))?;
        let contents = text::Contents { model: text::one_line(model), ..Default::default() };
        Ok(Conversation::of(path, contents, Some(tail)))
    }

    /// Opens a conversation to go on with it. Where its file was cut off, it is mended; [`Conversation::notes`] says so.
    pub fn open(path: &Path) -> Result<Conversation> {
        check_regular(path)?;
        let file = OpenOptions::new().read(true).append(true).open(path).map_err(io_error(path))?;
        let mut tail = Tail::of(file, path)?;
        let bytes = read_file(&tail.file, path)?;
        let mut c = contents(path, &bytes)?;
        tail.cut(path, c.len as u64)?;
        tail.line_start = bytes[..c.len].last().is_none_or(|&b| b == b'\n');
        tail.open = c.open;
        if c.headless {
            tail.write(path, &text::header(""))?;
        }
        if let Some(id) = c.open {
            c.notes.push(format!("turn {id} was cut off; what was said of it is here"));
            tail.end(path, id, TurnState::Partial)?;
        }
        tail.sync(path)?;
        Ok(Conversation::of(path.to_path_buf(), c, Some(tail)))
    }

    /// Reads a conversation, also one that another program has open. It cannot be written to.
    pub fn read(path: &Path) -> Result<Conversation> {
        check_regular(path)?;
        let file = File::open(path).map_err(io_error(path))?;
        let c = contents(path, &read_file(&file, path)?)?;
        Ok(Conversation::of(path.to_path_buf(), c, None))
    }

    fn of(path: PathBuf, c: text::Contents, tail: Option<Tail>) -> Conversation {
        let text::Contents { turns, by_id, title, model, head, notes, .. } = c;
        Conversation { path, turns, by_id, title, model, head, notes, tail }
    }

    /// Adds a turn that is known at once. It is durable when this returns.
    pub fn add(&mut self, parent: Option<TurnId>, role: &str, content: &str) -> Result<TurnId> {
        let id = self.next(parent, role)?;
        let (path, tail) = self.tail()?;
        tail.durably(path, |tail| tail.add(path, id, parent, role, content))?;
        self.insert(Turn { id, parent, role: role.into(), content: content.into(), state: TurnState::Whole });
        Ok(id)
    }

    /// Begins a turn whose text is still to come.
    pub fn begin(&mut self, parent: Option<TurnId>, role: &str) -> Result<TurnId> {
        let id = self.next(parent, role)?;
        let (path, tail) = self.tail()?;
        tail.begin(path, id, parent, role)?;
        self.insert(Turn { id, parent, role: role.into(), content: String::new(), state: TurnState::Partial });
        Ok(id)
    }

    /// Goes on with a turn; one that had ended is open again. The text is in the file when this returns, which the end of
    /// the program does not harm, and durable against a power cut about a second later.
    pub fn append(&mut self, id: TurnId, text: &str) -> Result<()> {
        let i = self.index(id)?;
        if text.is_empty() {
            return Ok(());
        }
        let (path, tail) = self.tail()?;
        tail.append(path, id, text)?;
        self.turns[i].content.push_str(text);
        self.turns[i].state = TurnState::Partial;
        Ok(())
    }

    /// Ends a turn. It is durable when this returns.
    pub fn end(&mut self, id: TurnId, state: TurnState) -> Result<()> {
        let i = self.index(id)?;
        let (path, tail) = self.tail()?;
        tail.durably(path, |tail| tail.end(path, id, state))?;
        self.turns[i].state = state;
        Ok(())
    }

    /// All turns, in the order in which they began.
    pub fn turns(&self) -> &[Turn] {
        &self.turns
    }

    /// A turn.
    pub fn turn(&self, id: TurnId) -> Option<&Turn> {
        self.by_id.get(&id).map(|&i| &self.turns[i])
    }

    /// The turns from the beginning of the conversation to `leaf`.
    pub fn path_to(&self, leaf: TurnId) -> Vec<&Turn> {
        // A parent stands before its children in the file, so this ends.
        let mut path: Vec<&Turn> =
            std::iter::successors(self.turn(leaf), |t| t.parent.and_then(|p| self.turn(p))).collect();
        path.reverse();
        path
    }

    /// The turn at which the conversation stands: the one begun last, or as [`Conversation::set_head`] said since.
    pub fn head(&self) -> Option<TurnId> {
        self.head
    }

    /// Goes to another turn.
    pub fn set_head(&mut self, id: TurnId) -> Result<()> {
        self.index(id)?;
        if self.head != Some(id) {
            let (path, tail) = self.tail()?;
            tail.mark(path, &format!("head {id}"))?;
            self.head = Some(id);
        }
        Ok(())
    }

    /// Its name: as given, or the beginning of the first question.
    pub fn title(&self) -> String {
        self.title.clone().unwrap_or_else(|| {
            let first = self.turns.iter().find(|t| t.role == "user").map(|t| t.content.as_str()).unwrap_or_default();
            let line = first.lines().find(|l| !l.trim().is_empty()).unwrap_or_default();
            let line = text::one_line(line).split_whitespace().collect::<Vec<_>>().join(" ");
            match line.char_indices().nth(TITLE_CHARS) {
                Some((end, _)) => format!("{}…", line[..end].trim_end()),
                None => line,
            }
        })
    }

    /// Gives it a name of one line; an empty one takes the name back.
    pub fn rename(&mut self, title: &str) -> Result<()> {
        let title = text::one_line(title);
        let (path, tail) = self.tail()?;
        tail.durably(path, |tail| tail.mark(path, &format!("title {title}")))?;
        self.title = Some(title).filter(|t| !t.is_empty());
        Ok(())
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The model that it goes on with.
    pub fn model(&self) -> &str {
        &self.model
    }

    /// Says that it goes on with another one.
    pub fn set_model(&mut self, model: &str) -> Result<()> {
        let model = text::one_line(model);
        if model != self.model {
            let (path, tail) = self.tail()?;
            tail.durably(path, |tail| tail.mark(path, &format!("model {model}")))?;
            self.model = model;
        }
        Ok(())
    }

    /// What had to be mended or was not understood when the file was read, each a sentence for a person.
    pub fn notes(&self) -> &[String] {
        &self.notes
    }

    fn index(&self, id: TurnId) -> Result<usize> {
        self.by_id.get(&id).copied().ok_or_else(|| self.refused(format!("there is no turn {id}")))
    }

    fn refused(&self, problem: String) -> HistoryError {
        HistoryError::Refused { path: self.path.clone(), problem }
    }

    /// The number of a new turn, if it may be.
    fn next(&self, parent: Option<TurnId>, role: &str) -> Result<TurnId> {
        if role.is_empty() || role.contains(|c: char| c.is_whitespace() || c.is_control()) {
            return Err(self.refused(format!("role {role:?}, expected one word")));
        }
        parent.map(|p| self.index(p)).transpose()?;
        let last = self.turns.iter().map(|t| t.id.0).max().unwrap_or(0);
        match last < text::MOST_TURNS {
            true => Ok(TurnId(last + 1)),
            false => Err(self.refused(format!("turn {last} is the last that a conversation can have"))),
        }
    }

    fn tail(&mut self) -> Result<(&Path, &mut Tail)> {
        match &mut self.tail {
            Some(tail) => Ok((&self.path, tail)),
            None => Err(HistoryError::Refused { path: self.path.clone(), problem: "open for reading only".into() }),
        }
    }

    fn insert(&mut self, turn: Turn) {
        self.head = Some(turn.id);
        self.by_id.insert(turn.id, self.turns.len());
        self.turns.push(turn);
    }
}

/// The end of a file, where writing goes on.
struct Tail {
    file: Arc<File>,
    len: u64,
    inode: (u64, u64),    // device and number: an editor may put another file in this one's place
    line_start: bool,     // whether the file ends with a line end
    open: Option<TurnId>, // whose text it ends in
    synced: Instant,
    syncing: Option<JoinHandle<io::Result<()>>>,
    failed: Option<io::Error>, // of a sync that nobody waited for
}

impl Tail {
    /// Locks a file.
    fn of(file: File, path: &Path) -> Result<Tail> {
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(HistoryError::Busy(path.to_path_buf())),
            Err(TryLockError::Error(e)) => return Err(io_error(path)(e)),
        }
        let m = file.metadata().map_err(io_error(path))?;
        Ok(Tail {
            file: Arc::new(file),
            len: m.len(),
            inode: (m.dev(), m.ino()),
            line_start: true,
            open: None,
            synced: Instant::now(),
            syncing: None,
            failed: None,
        })
    }

    /// Drops what stands after `len`.
    fn cut(&mut self, path: &Path, len: u64) -> Result<()> {
        if len < self.len {
            self.file.set_len(len).map_err(io_error(path))?;
            self.len = len;
        }
        Ok(())
    }

    /// Appends, all or nothing: a full disk leaves no half of it.
    fn write(&mut self, path: &Path, text: &str) -> Result<()> {
        let same = fs::metadata(path).is_ok_and(|m| (m.dev(), m.ino()) == self.inode && m.len() == self.len);
        if !same {
            return Err(HistoryError::Changed(path.to_path_buf()));
        }
        if self.len + text.len() as u64 > MOST_BYTES {
            return Err(too_large(path));
        }
        if let Err(e) = (&*self.file).write_all(text.as_bytes()) {
            // If this fails too, the length gives the next write away, and reading mends it.
            let _ = self.file.set_len(self.len);
            return Err(io_error(path)(e));
        }
        self.len += text.len() as u64;
        self.line_start = text.ends_with('\n');
        Ok(())
    }

    /// Writes, and waits until it is durable. Where it cannot be, it is taken back, so that it can be tried again.
    fn durably(&mut self, path: &Path, write: impl FnOnce(&mut Tail) -> Result<()>) -> Result<()> {
        let (len, line_start, open) = (self.len, self.line_start, self.open);
        write(self)?;
        let synced = self.sync(path);
        if synced.is_err() {
            // If this fails too, the length gives it away to the next write.
            self.len = len;
            let _ = self.file.set_len(len);
            (self.line_start, self.open) = (line_start, open);
        }
        synced
    }

    /// What stands between the text of an open turn, or anything, and a mark.
    fn line_end(&self) -> &'static str {
        if self.open.is_some() || !self.line_start { "\n" } else { "" }
    }

    fn mark(&mut self, path: &Path, words: &str) -> Result<()> {
        self.write(path, &format!("{}{}", self.line_end(), text::mark(words)))?;
        self.open = None;
        Ok(())
    }

    fn begin(&mut self, path: &Path, id: TurnId, parent: Option<TurnId>, role: &str) -> Result<()> {
        self.write(path, &text::turn(id, parent, role))?;
        self.open = Some(id);
        Ok(())
    }

    fn add(&mut self, path: &Path, id: TurnId, parent: Option<TurnId>, role: &str, content: &str) -> Result<()> {
        let (turn, end) = (text::turn(id, parent, role), text::end(id, TurnState::Whole));
        self.write(path, &format!("{turn}{}\n{end}", text::escape(content, true)))?;
        self.open = None;
        Ok(())
    }

    fn append(&mut self, path: &Path, id: TurnId, text: &str) -> Result<()> {
        if self.open == Some(id) {
            self.write(path, &text::escape(text, self.line_start))?;
        } else {
            let more = text::mark(&format!("more {id}"));
            self.write(path, &format!("{}{more}{}", self.line_end(), text::escape(text, true)))?;
            self.open = Some(id);
        }
        self.sync_soon();
        Ok(())
    }

    fn end(&mut self, path: &Path, id: TurnId, state: TurnState) -> Result<()> {
        self.write(path, &format!("{}{}", self.line_end(), text::end(id, state)))?;
        self.open = None;
        Ok(())
    }

    /// Makes what was written durable on a thread of its own, unless that happened within the last second: a slow disk
    /// must not hold up an answer.
    fn sync_soon(&mut self) {
        if self.synced.elapsed() < SYNC_EVERY || self.syncing.as_ref().is_some_and(|s| !s.is_finished()) {
            return;
        }
        self.wait();
        self.synced = Instant::now();
        let file = self.file.clone();
        self.syncing = std::thread::Builder::new().name("sync".into()).spawn(move || file.sync_data()).ok();
    }

    fn wait(&mut self) {
        if let Some(Ok(Err(e))) = self.syncing.take().map(JoinHandle::join) {
            self.failed = Some(e);
        }
    }

    fn sync(&mut self, path: &Path) -> Result<()> {
        self.wait();
        self.synced = Instant::now();
        match self.failed.take() {
            Some(e) => Err(e),
            None => self.file.sync_data(),
        }
        .map_err(io_error(path))
    }
}

impl Drop for Tail {
    fn drop(&mut self) {
        // The lock ends with the last handle, which may be the thread's.
        self.wait();
    }
}

/// Refuses what would never end, such as a pipe.
fn check_regular(path: &Path) -> Result<()> {
    match fs::metadata(path).map_err(io_error(path))?.is_file() {
        true => Ok(()),
        false => Err(HistoryError::Refused { path: path.to_path_buf(), problem: "not a regular file".into() }),
    }
}

fn read_file(file: &File, path: &Path) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    file.take(MOST_BYTES + 1).read_to_end(&mut bytes).map_err(io_error(path))?;
    match bytes.len() as u64 > MOST_BYTES {
        true => Err(too_large(path)),
        false => Ok(bytes),
    }
}

fn too_large(path: &Path) -> HistoryError {
    let problem = format!("larger than {} MiB, which no conversation may be", MOST_BYTES >> 20);
    HistoryError::Refused { path: path.to_path_buf(), problem }
}

fn contents(path: &Path, bytes: &[u8]) -> Result<text::Contents> {
    text::read(bytes).map_err(|text::Contradiction { line, problem }| HistoryError::Contents {
        path: path.to_path_buf(),
        line,
        problem,
    })
}
