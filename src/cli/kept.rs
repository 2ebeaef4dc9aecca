//! The conversation of line mode, and what of it is kept on disk.
//!
//! On a terminal a conversation is kept unless it is asked not to be. In a pipe it is not, unless it is asked to be: who
//! calls a program from a script does not expect it to leave files.

use crate::chat::history::{self, Conversation, TurnId, TurnState, find, list};
use crate::chat::{Message, messages};
use crate::config::Config;
use crate::engine::Session;
use crate::kv_store::{KvStore, beside};
use anyhow::Context;
use std::path::{Path, PathBuf};
use std::time::Instant;

/// Which conversation, and whether it is kept.
#[derive(clap::Args)]
pub struct KeepArgs {
    /// Continue the latest conversation
    #[arg(long = "continue", conflicts_with_all = ["resume", "no_save", "system_prompt"])]
    latest: bool,
    /// Continue a conversation by name, title or file; a prefix is enough
    #[arg(long, value_name = "NAME", conflicts_with_all = ["no_save", "system_prompt"])]
    resume: Option<String>,
    /// Keep the conversation on disk, also in a pipe
    #[arg(long, conflicts_with = "no_save")]
    save: bool,
    /// Do not keep anything on disk
    #[arg(long)]
    no_save: bool,
}

impl KeepArgs {
    /// The file of the conversation to continue, if any.
    pub fn file(&self, dir: &Path) -> anyhow::Result<Option<PathBuf>> {
        if let Some(name) = &self.resume {
            return Ok(Some(find(dir, name)?));
        }
        if !self.latest {
            return Ok(None);
        }
        let latest = list(dir).into_iter().next();
        let latest = latest.with_context(|| format!("{}: no conversation to go on with", dir.display()))?;
        Ok(Some(latest.path))
    }

    /// Whether a conversation is kept.
    pub fn keeps(&self, terminal: bool) -> bool {
        !self.no_save && (terminal || self.save || self.latest || self.resume.is_some())
    }
}

/// A conversation: what the model is to continue, and its file.
pub struct Dialogue {
    /// The turns that lead to where it stands.
    pub turns: Vec<Message>,
    kept: Option<Kept>,
}

struct Kept {
    dir: PathBuf,
    model: String,
    kv_limit: u64,
    file: Option<Conversation>, // made with the first question
    kv: Option<KvStore>,
    kv_tried: bool,
    ids: Vec<TurnId>, // of the turns that are in the file
    answer: Option<TurnId>,
}

impl Dialogue {
    /// A conversation that begins with `opening` or goes on with `file`; `model` is what it remembers of the model.
    pub fn new(
        opening: Vec<Message>,
        file: Option<Conversation>,
        keep: bool,
        config: &Config,
        model: String,
    ) -> anyhow::Result<Dialogue> {
        let (mut turns, mut ids) = (opening, Vec::new());
        if let Some(c) = &file {
            let path = c.head().map(|h| c.path_to(h)).unwrap_or_default();
            turns = path.iter().map(|t| Message::new(&t.role, &t.content)).collect();
            ids = path.iter().map(|t| t.id).collect();
            tell!("going on with {:?}, {} turns, {}", c.title(), turns.len(), c.path().display());
            c.notes().iter().for_each(|n| tell!("{n}"));
            match path.last() {
                Some(t) if t.role == "user" => tell!("the last question has no answer yet: /regen gives one"),
                Some(t) if t.state == TurnState::Partial => {
                    tell!("the last answer was cut off: /regen gives another")
                }
                _ => (),
            }
        }
        let dir = config.conversations_dir();
        let kept = match keep {
            true => Some(Kept {
                dir: dir?,
                model,
                kv_limit: config.kv_cache_bytes(),
                file,
                kv: None,
                kv_tried: false,
                ids,
                answer: None,
            }),
            false => None,
        };
        Ok(Dialogue { turns, kept })
    }

    /// Somebody asks. A question before it that has no answer is left to its branch.
    pub fn ask(&mut self, question: String) -> anyhow::Result<()> {
        if self.turns.last().is_some_and(|m| m.role == "user") {
            self.pop();
        }
        self.turns.push(Message::new("user", question));
        if let Some(k) = &mut self.kept {
            k.catch_up(&self.turns)?;
        }
        Ok(())
    }

    /// Takes the answer back, if there is one, so that the question stands open. Whether a question does.
    pub fn reopen(&mut self) -> bool {
        if self.turns.last().is_some_and(|m| m.role == "assistant") {
            self.pop();
        }
        self.turns.last().is_some_and(|m| m.role == "user")
    }

    /// Takes a question back that does not fit, before anything was answered.
    pub fn take_back(&mut self) -> anyhow::Result<()> {
        self.pop();
        let Some(k) = &mut self.kept else { return Ok(()) };
        let Some(file) = &mut k.file else { return Ok(()) };
        match k.ids.last() {
            Some(&last) => file.set_head(last)?,
            // A conversation of nothing else is none.
            None if file.turns().len() == 1 => {
                let path = file.path().to_path_buf();
                (k.file, k.kv, k.kv_tried) = (None, None, false);
                history::delete(&path)?;
            }
            None => {}
        }
        Ok(())
    }

    fn pop(&mut self) {
        self.turns.pop();
        if let Some(k) = &mut self.kept {
            k.ids.truncate(self.turns.len());
        }
    }

    /// Begins another conversation, with the system prompt in force.
    pub fn clear(&mut self) {
        self.turns.retain(|t| t.role == "system");
        self.turns = messages(&self.turns);
        if let Some(k) = &mut self.kept {
            (k.file, k.kv, k.kv_tried, k.answer) = (None, None, false, None);
            k.ids.clear();
        }
    }

    /// Reads what the disk has of the prompt's keys and values.
    pub fn restore(&mut self, session: &mut Session, prompt: &[u32]) {
        let Some(k) = &mut self.kept else { return };
        k.open_kv(session);
        let Some(kv) = &mut k.kv else { return };
        let start = Instant::now();
        let read = kv.restore(session, prompt);
        if read > 0 {
            let seconds = start.elapsed().as_secs_f64();
            tell!("{read} of {} tokens read from the KV cache on disk in {seconds:.2} s", prompt.len());
        }
        k.say_notes();
    }

    /// The answer comes.
    pub fn hear(&mut self, text: &str) -> anyhow::Result<()> {
        let Some(Kept { file: Some(file), ids, answer, .. }) = &mut self.kept else { return Ok(()) };
        let id = match *answer {
            Some(id) => id,
            None => *answer.insert(file.begin(ids.last().copied(), "assistant")?),
        };
        Ok(file.append(id, text)?)
    }

    /// The answer ended.
    pub fn answered(&mut self, answer: String, state: TurnState) -> anyhow::Result<()> {
        self.turns.push(Message::new("assistant", answer));
        let Some(Kept { file: Some(file), ids, answer, .. }) = &mut self.kept else { return Ok(()) };
        let id = match answer.take() {
            Some(id) => id,
            None => file.begin(ids.last().copied(), "assistant")?,
        };
        ids.push(id);
        Ok(file.end(id, state)?)
    }

    /// Writes keys and values: all that are new, or, while an answer comes, when it is worth a write.
    pub fn save(&mut self, session: &Session, all: bool) {
        let Some(k) = &mut self.kept else { return };
        let Some(kv) = &mut k.kv else { return };
        let done = if all { kv.save(session) } else { kv.save_some(session) };
        k.say_notes();
        if let Err(e) = done {
            tell!("{e}; the KV cache is not kept");
            k.kv = None;
        }
    }
}

impl Kept {
    /// Puts the turns that the file does not have into it.
    fn catch_up(&mut self, turns: &[Message]) -> anyhow::Result<()> {
        let file = match &mut self.file {
            Some(file) => file,
            None => self.file.insert(Conversation::create(&self.dir, &self.model)?),
        };
        for m in &turns[self.ids.len()..] {
            self.ids.push(file.add(self.ids.last().copied(), &m.role, &m.content)?);
        }
        Ok(())
    }

    fn open_kv(&mut self, session: &Session) {
        let Some(file) = &self.file else { return };
        if self.kv_tried || self.kv_limit == 0 {
            return;
        }
        self.kv_tried = true;
        match KvStore::open(&beside(file.path()), session, self.kv_limit) {
            Ok(kv) => self.kv = Some(kv),
            Err(e) => tell!("{e}; the KV cache is not kept"),
        }
    }

    fn say_notes(&mut self) {
        if let Some(kv) = &mut self.kv {
            kv.take_notes().iter().for_each(|n| tell!("{n}"));
        }
    }
}
