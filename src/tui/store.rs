//! The thread that writes what is said to the conversation's file, so that a slow disk never holds up a key press.
//!
//! Changes arrive in order and are written in order. Turns are numbered as the screen numbers them; the file's own
//! numbers stay here. What cannot be written, on a full disk, waits here and is tried again. Dropping the [`Store`] waits
//! until everything is written that can be.

use super::Msg;
use super::editor::MOST_PAST;
use crate::chat::history::{self, Conversation, HistoryError, Summary, TurnId, TurnState};
use crate::disk::{home_path, write_private};
use std::collections::{HashSet, VecDeque};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Questions of earlier conversations that the editor can go back to.
const QUESTIONS: usize = 200;
/// How long until what could not be written is tried again.
const AGAIN: Duration = Duration::from_secs(3);

/// What to write, or to read.
#[derive(Clone, Debug, PartialEq)]
pub enum Op {
    /// A whole turn.
    Add {
        /// What it follows.
        parent: Option<usize>,
        /// Who.
        role: String,
        /// What was said.
        content: String,
    },
    /// A turn whose text is still to come.
    Begin {
        /// What it follows.
        parent: Option<usize>,
        /// Who.
        role: String,
    },
    /// More of it.
    Append(usize, String),
    /// The end of it.
    End(usize, TurnState),
    /// The conversation goes to another turn.
    Head(usize),
    /// Its name.
    Rename(String),
    /// It goes on with another model, of this name.
    Model(String),
    /// Another conversation, to be created with its first turn; the name of the model that it is begun with.
    New(String),
    /// Go on with a file.
    Open(PathBuf),
    /// Say which there are.
    List,
    /// Delete one.
    Delete(PathBuf),
    /// Name another one.
    RenameOther(PathBuf, String),
    /// Write this one (or another) for other programs: `.json`, else Markdown.
    Export(Option<PathBuf>, PathBuf),
}

/// What came of it.
#[derive(Debug)]
pub enum Event {
    /// A file was opened: its turns, with parents by their place in the list, and where it stands.
    Opened {
        /// The file.
        path: PathBuf,
        /// Its name.
        title: String,
        /// Parent, role, content, state.
        turns: Vec<(Option<usize>, String, String, TurnState)>,
        /// Where it stands.
        head: Option<usize>,
        /// What was mended.
        notes: Vec<String>,
    },
    /// A file was created.
    Created(PathBuf),
    /// The conversations, the latest first.
    Listed(Vec<Summary>),
    /// The last questions of those that are not open, the latest last.
    Questions(Vec<String>),
    /// Something was done that the person should hear of.
    Done(String),
    /// Something was not.
    Failed(String),
    /// What was said cannot be written, for this reason; none when it has been written after all.
    Unsaved(Option<String>),
}

/// The thread.
pub struct Store {
    ops: Option<Sender<Op>>,
    thread: Option<JoinHandle<()>>,
}

impl Store {
    /// Starts it on a folder; without one, nothing is written.
    pub fn start(dir: Option<PathBuf>, tell: Sender<Msg>) -> std::io::Result<Store> {
        let (ops, inbox) = channel();
        let thread = std::thread::Builder::new().name("store".into()).spawn(move || {
            let ended = tell.clone();
            let mut s = Shelf {
                dir,
                tell,
                model: String::new(),
                open: None,
                waiting: VecDeque::new(),
                problem: None,
                tried: Instant::now(),
            };
            // A panic has given the terminal back: nothing is shown any more, and nothing that is said would be kept.
            if catch_unwind(AssertUnwindSafe(|| s.run(inbox))).is_err() {
                let problem = "writing it has failed".to_string();
                let _ = ended.send(Msg::Store(Event::Unsaved(Some(problem))));
                let _ = ended.send(Msg::Quit);
            }
        })?;
        Ok(Store { ops: Some(ops), thread: Some(thread) })
    }

    /// Hands a change over.
    pub fn send(&self, op: Op) {
        if let Some(ops) = &self.ops {
            // It ends only with us.
            let _ = ops.send(op);
        }
    }
}

impl Drop for Store {
    fn drop(&mut self) {
        self.ops = None;
        if let Some(t) = self.thread.take() {
            let _ = t.join();
        }
    }
}

struct Shelf {
    dir: Option<PathBuf>,
    tell: Sender<Msg>,
    model: String,
    open: Option<(Conversation, Vec<TurnId>)>, // and the file's numbers of the screen's turns
    waiting: VecDeque<Op>,                     // changes that are not in the file yet
    problem: Option<String>,                   // why not
    tried: Instant,                            // when they were last tried
}

impl Shelf {
    fn run(&mut self, inbox: Receiver<Op>) {
        loop {
            let op = match self.problem {
                None => inbox.recv().map_err(|_| RecvTimeoutError::Disconnected),
                Some(_) => inbox.recv_timeout(AGAIN),
            };
            match op {
                Ok(op) => {
                    if let Err(e) = self.apply(op) {
                        self.say(Event::Failed(e));
                    }
                }
                Err(RecvTimeoutError::Timeout) => self.write_waiting(),
                Err(RecvTimeoutError::Disconnected) => return self.write_waiting(),
            }
        }
    }

    fn say(&self, e: Event) {
        // Nobody listens any more when the program ends.
        let _ = self.tell.send(Msg::Store(e));
    }

    fn has_open(&self, path: &Path) -> bool {
        self.open.as_ref().is_some_and(|(c, _)| c.path() == path)
    }

    fn apply(&mut self, op: Op) -> Result<(), String> {
        let text = |e: HistoryError| e.to_string();
        match op {
            Op::New(model) => {
                self.give_up();
                (self.model, self.open) = (model, None);
            }
            Op::Open(path) => {
                let opened = self.go_to(path);
                // It is still the one before that is not saved.
                if let (Err(_), Some(problem)) = (&opened, &self.problem) {
                    self.say(Event::Unsaved(Some(problem.clone())));
                }
                opened?;
            }
            Op::List => {
                let mut found = self.dir.as_deref().map(|d| history::list_with(d, questions)).unwrap_or_default();
                // The one that is open goes by the path that it was opened by, so that it is known again.
                if let Some((c, _)) = &self.open
                    && let Ok(there) = c.path().canonicalize()
                {
                    let same = |s: &&mut (Summary, _)| s.0.path.canonicalize().is_ok_and(|p| p == there);
                    found.iter_mut().filter(same).for_each(|s| s.0.path = c.path().to_path_buf());
                }
                let others = found.iter().filter(|(s, _)| !self.has_open(&s.path));
                let asked = latest(others.flat_map(|(_, questions)| questions));
                self.say(Event::Listed(found.into_iter().map(|(s, _)| s).collect()));
                self.say(Event::Questions(asked));
            }
            Op::Delete(path) => {
                // Its lock is ours as long as it is open.
                let open = if self.has_open(&path) { self.open.take().map(|(_, turns)| turns) } else { None };
                if let Err(e) = history::delete(&path) {
                    self.open = open.and_then(|turns| Some((Conversation::open(&path).ok()?, turns)));
                    return Err(text(e));
                }
                self.say(Event::Done("deleted".into()));
            }
            Op::RenameOther(path, title) => match &mut self.open {
                Some((c, _)) if c.path() == path => c.rename(&title).map_err(text)?,
                _ => Conversation::open(&path).and_then(|mut c| c.rename(&title)).map_err(text)?,
            },
            Op::Export(from, to) => self.export(from, &to)?,
            Op::Model(model) if self.open.is_none() => self.model = model,
            change => {
                if self.dir.is_some() {
                    self.waiting.push_back(change);
                    // While something is wrong it is tried now and then, not with every word of an answer.
                    if self.problem.is_none() || self.tried.elapsed() >= AGAIN {
                        self.write_waiting();
                    }
                }
            }
        }
        Ok(())
    }

    /// Goes on with a file.
    fn go_to(&mut self, path: PathBuf) -> Result<(), String> {
        if self.has_open(&path) {
            // Its lock would refuse us the file; and what is not in the file yet must not be lost.
            self.write_waiting();
            if let Some(problem) = &self.problem {
                return Err(problem.clone());
            }
        } else {
            let c = Conversation::open(&path).map_err(|e| e.to_string())?;
            // Only now is the one before left.
            self.give_up();
            let ids = c.turns().iter().map(|t| t.id).collect();
            self.open = Some((c, ids));
        }
        let Some((c, ids)) = &self.open else { return Ok(()) };
        let place = |id: TurnId| ids.iter().position(|&i| i == id);
        let turns = c.turns().iter().map(|t| (t.parent.and_then(place), t.role.clone(), t.content.clone(), t.state));
        let turns = turns.collect();
        let (title, head, notes) = (c.title(), c.head().and_then(place), c.notes().to_vec());
        self.say(Event::Opened { path, title, turns, head, notes });
        Ok(())
    }

    /// Writes the changes that wait, in order, as far as they can be.
    fn write_waiting(&mut self) {
        self.tried = Instant::now();
        while let Some(op) = self.waiting.pop_front() {
            if let Err(problem) = self.change(&op) {
                self.waiting.push_front(op);
                if self.problem.as_ref() != Some(&problem) {
                    self.say(Event::Unsaved(Some(problem.clone())));
                    self.problem = Some(problem);
                }
                return;
            }
        }
        if self.problem.take().is_some() {
            self.say(Event::Unsaved(None));
        }
    }

    /// The conversation is left: what could not be written of it is lost.
    fn give_up(&mut self) {
        self.write_waiting();
        self.waiting.clear();
        if self.problem.take().is_some() {
            self.say(Event::Unsaved(None));
        }
    }

    fn change(&mut self, op: &Op) -> Result<(), String> {
        let Some(dir) = &self.dir else { return Ok(()) };
        let turn = match op {
            Op::Add { parent, .. } | Op::Begin { parent, .. } => *parent,
            Op::Append(i, _) | Op::End(i, _) | Op::Head(i) => Some(*i),
            _ => None,
        };
        let ids = self.open.as_ref().map_or(&[][..], |(_, ids)| ids);
        // What goes on with a turn that is not here belongs to a file that is gone; it must not begin another.
        let id = turn.map(|i| ids.get(i).copied().ok_or("the file that it belongs to is gone")).transpose()?;
        let text = |e: HistoryError| e.to_string();
        if self.open.is_none() {
            let c = Conversation::create(dir, &self.model).map_err(text)?;
            self.say(Event::Created(c.path().to_path_buf()));
            self.open = Some((c, Vec::new()));
        }
        let Some((c, ids)) = &mut self.open else { return Ok(()) };
        match (op, id) {
            (Op::Add { role, content, .. }, parent) => c.add(parent, role, content).map(|id| ids.push(id)),
            (Op::Begin { role, .. }, parent) => c.begin(parent, role).map(|id| ids.push(id)),
            (Op::Append(_, text), Some(id)) => c.append(id, text),
            (Op::End(_, state), Some(id)) => c.end(id, *state),
            (Op::Head(_), Some(id)) => c.set_head(id),
            (Op::Rename(title), _) => c.rename(title),
            (Op::Model(model), _) => c.set_model(model),
            _ => Ok(()),
        }
        .map_err(text)
    }

    fn export(&self, from: Option<PathBuf>, to: &Path) -> Result<(), String> {
        let other = match from {
            Some(path) => Some(Conversation::read(&path).map_err(|e| e.to_string())?),
            None => None,
        };
        let c = other.as_ref().or(self.open.as_ref().map(|o| &o.0)).ok_or("nothing has been said yet")?;
        let to = home_path(&to.to_string_lossy());
        let text = match to.extension().is_some_and(|e| e.eq_ignore_ascii_case("json")) {
            true => format!("{:#}\n", history::export_json(c)),
            false => history::export_markdown(c),
        };
        // A file that is there stays.
        write_private(&to, text.as_bytes()).map_err(|e| format!("{}: {e}", to.display()))?;
        self.say(Event::Done(format!("written to {}", to.display())));
        Ok(())
    }
}

/// The questions of a conversation that the editor can go back to, of all branches, the latest first.
fn questions(c: &Conversation) -> Vec<String> {
    let asked = c.turns().iter().rev().filter(|t| t.role == "user" && t.content.len() <= MOST_PAST);
    asked.take(QUESTIONS).map(|t| t.content.clone()).collect()
}

/// Of questions, the latest first, as many as can be gone back to, each once, the latest last.
fn latest<'a>(asked: impl Iterator<Item = &'a String>) -> Vec<String> {
    let mut seen = HashSet::new();
    let mut found: Vec<String> = asked.filter(|q| seen.insert(*q)).take(QUESTIONS).cloned().collect();
    found.reverse();
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_cannot_be_written_is_written_when_it_can() {
        let home = tempfile::tempdir().unwrap();
        let dir = home.path().join("kept");
        // No folder can be made where a file stands.
        std::fs::write(&dir, "in the way").unwrap();
        let (tell, told) = channel();
        let store = Store::start(Some(dir.clone()), tell).unwrap();
        store.send(Op::New("m".into()));
        store.send(Op::Add { parent: None, role: "user".into(), content: "question".into() });
        store.send(Op::Begin { parent: Some(0), role: "assistant".into() });
        let Ok(Msg::Store(Event::Unsaved(Some(why)))) = told.recv() else { panic!("it was written") };
        assert!(why.starts_with(&dir.display().to_string()), "{why}");
        std::fs::remove_file(&dir).unwrap();
        store.send(Op::Append(1, "answer".into()));
        store.send(Op::End(1, TurnState::Whole));
        drop(store);
        assert!(matches!(told.recv(), Ok(Msg::Store(Event::Created(_)))));
        assert!(matches!(told.recv(), Ok(Msg::Store(Event::Unsaved(None)))));
        let found = history::list(&dir);
        let c = Conversation::read(&found[0].path).unwrap();
        let said: Vec<_> = c.turns().iter().map(|t| (t.content.as_str(), t.state)).collect();
        assert_eq!(said, [("question", TurnState::Whole), ("answer", TurnState::Whole)]);
    }

    #[test]
    fn where_another_one_cannot_be_opened_this_one_is_still_not_saved() {
        let home = tempfile::tempdir().unwrap();
        let dir = home.path().join("kept");
        std::fs::write(&dir, "in the way").unwrap();
        let (tell, told) = channel();
        let store = Store::start(Some(dir.clone()), tell).unwrap();
        store.send(Op::Add { parent: None, role: "user".into(), content: "question".into() });
        store.send(Op::Open(home.path().join("nothing.txt")));
        let unsaved = || matches!(told.recv(), Ok(Msg::Store(Event::Unsaved(Some(_)))));
        assert!(unsaved() && unsaved());
        assert!(matches!(told.recv(), Ok(Msg::Store(Event::Failed(_)))));
        std::fs::remove_file(&dir).unwrap();
        drop(store);
        assert_eq!(history::list(&dir)[0].title, "question");
    }

    #[test]
    fn the_questions_of_other_conversations_are_told() {
        let dir = tempfile::tempdir().unwrap();
        let kept = |questions: &[&str]| {
            let mut c = Conversation::create(dir.path(), "m").unwrap();
            let mut parent = None;
            for q in questions {
                let q = c.add(parent, "user", q).unwrap();
                parent = Some(c.add(Some(q), "assistant", "answer").unwrap());
            }
            std::thread::sleep(Duration::from_millis(20)); // times of files have their grain
            c.path().to_path_buf()
        };
        kept(&["one", "two", "three"]);
        kept(&["two", &"long ".repeat(MOST_PAST)]);
        let last = kept(&["four"]);
        let (tell, told) = channel();
        let questions =
            || told.iter().find_map(|m| if let Msg::Store(Event::Questions(q)) = m { Some(q) } else { None }).unwrap();
        let store = Store::start(Some(dir.path().to_path_buf()), tell.clone()).unwrap();
        store.send(Op::List);
        assert_eq!(questions(), ["one", "three", "two", "four"]);
        store.send(Op::Open(last));
        store.send(Op::List);
        assert_eq!(questions(), ["one", "three", "two"]);
        // Where nothing is kept, nothing is read either.
        drop(store);
        let store = Store::start(None, tell).unwrap();
        store.send(Op::List);
        assert_eq!(questions(), [""; 0]);
    }

    #[test]
    fn what_goes_on_with_a_file_that_is_gone_is_not_saved_and_the_next_one_is() {
        let dir = tempfile::tempdir().unwrap();
        let (tell, told) = channel();
        let store = Store::start(Some(dir.path().to_path_buf()), tell).unwrap();
        let add = |content: &str| Op::Add { parent: None, role: "user".into(), content: content.into() };
        let created = || told.iter().find_map(|m| if let Msg::Store(Event::Created(p)) = m { Some(p) } else { None });
        store.send(add("question"));
        store.send(Op::Begin { parent: Some(0), role: "assistant".into() });
        store.send(Op::Delete(created().unwrap()));
        store.send(Op::Append(1, "answer".into()));
        let unsaved = told.iter().find_map(|m| if let Msg::Store(Event::Unsaved(why)) = m { why } else { None });
        assert!(unsaved.unwrap().contains("gone"));
        assert_eq!(history::list(dir.path()).len(), 0);
        store.send(Op::New("m".into()));
        store.send(add("another"));
        let path = created().unwrap();
        drop(store);
        assert_eq!(Conversation::read(&path).unwrap().title(), "another");
    }

    #[test]
    fn the_conversation_that_is_open_is_opened_again() {
        let dir = tempfile::tempdir().unwrap();
        let mut c = Conversation::create(dir.path(), "m").unwrap();
        c.add(None, "user", "question").unwrap();
        let given =
            dir.path().join(".").join("..").join(dir.path().file_name().unwrap()).join(c.path().file_name().unwrap());
        drop(c);
        let (tell, told) = channel();
        let store = Store::start(Some(dir.path().to_path_buf()), tell).unwrap();
        store.send(Op::Open(given.clone()));
        store.send(Op::Add { parent: Some(0), role: "assistant".into(), content: "answer".into() });
        store.send(Op::List);
        let listed =
            told.iter().find_map(|m| if let Msg::Store(Event::Listed(l)) = m { Some(l) } else { None }).unwrap();
        assert_eq!(listed[0].path, given, "it is listed by the path that it was opened by");
        store.send(Op::Open(given));
        let again = told.iter().find(|m| !matches!(m, Msg::Store(Event::Questions(_)))).unwrap();
        let Msg::Store(Event::Opened { turns, head: Some(1), .. }) = again else { panic!("it was refused") };
        assert_eq!(turns.len(), 2);
        // And it is written to as before.
        store.send(Op::Add { parent: Some(1), role: "user".into(), content: "another".into() });
        drop(store);
        assert_eq!(Conversation::read(&listed[0].path).unwrap().turns().len(), 3);
    }

    #[test]
    fn what_is_said_is_in_the_file() {
        let dir = tempfile::tempdir().unwrap();
        let (tell, told) = channel();
        let store = Store::start(Some(dir.path().to_path_buf()), tell.clone()).unwrap();
        let add = |parent, role: &str, content: &str| Op::Add { parent, role: role.into(), content: content.into() };
        store.send(Op::New("m".into()));
        store.send(add(None, "user", "question"));
        store.send(Op::Begin { parent: Some(0), role: "assistant".into() });
        store.send(Op::Append(1, "ans".into()));
        store.send(Op::Append(1, "wer".into()));
        store.send(Op::End(1, TurnState::Stopped));
        store.send(add(Some(0), "assistant", "another"));
        store.send(Op::Head(1));
        store.send(Op::Export(None, dir.path().join("out.md")));
        drop(store);
        let created =
            told.try_iter().find_map(|m| if let Msg::Store(Event::Created(p)) = m { Some(p) } else { None }).unwrap();
        assert!(std::fs::read_to_string(dir.path().join("out.md")).unwrap().contains("answer"));

        let store = Store::start(Some(dir.path().to_path_buf()), tell).unwrap();
        store.send(Op::Open(created.clone()));
        store.send(Op::Open(dir.path().join("nothing.txt")));
        drop(store);
        let events: Vec<_> = told.try_iter().collect();
        let [Msg::Store(Event::Done(_)), Msg::Store(Event::Opened { turns, head, .. }), Msg::Store(Event::Failed(_))] =
            &events[..]
        else {
            panic!("{} events", events.len())
        };
        assert_eq!(*head, Some(1));
        assert_eq!(turns[1], (Some(0), "assistant".into(), "answer".into(), TurnState::Stopped));
        assert_eq!(turns[2].0, Some(0));
    }
}
