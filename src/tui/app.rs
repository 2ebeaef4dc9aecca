//! What the screen shows, and how it changes: [`App::update`] takes what happened and leaves what shall be done in
//! [`App::effects`]. Nothing here touches the terminal, a file or the model.

mod actions;
mod answer;
mod files;
mod keys;
mod turns;

use super::editor::Editor;
use super::panel::{Items, List, Panel, Place, Settings};
use super::store::Op;
use super::theme::{Scheme, Theme};
use super::transcript::Transcript;
use super::tree::Tree;
use super::worker::{Ask, Loaded};
use super::{Msg, view};
use crate::chat::history::{Summary, TurnState};
use crate::sample::SampleParams;
use std::collections::HashSet;
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// How long a notice stays.
const NOTICE: Duration = Duration::from_secs(6);

/// Something to be done outside.
#[derive(Clone, Debug, PartialEq)]
pub enum Effect {
    /// Ask the model.
    Ask(Ask),
    /// Stop the question of this number.
    Stop(u64),
    /// Load another model.
    Load(Option<String>),
    /// Load a model; whether it may be fetched is asked first.
    Choose(String),
    /// Fetch a model, then load it.
    Fetch(String),
    /// Write or read conversations.
    Store(Op),
    /// The conversation has this file.
    File(Option<PathBuf>),
    /// Count the tokens of a text, the attachment of this number.
    Count(usize, String),
    /// Read the file that a word names.
    Read(String),
    /// Complete a path.
    Paths(String),
    /// List the models.
    Models,
    /// Put a text into the terminal's clipboard.
    Copy(String),
    /// Let the person write in another editor.
    Write(String),
    /// Go to the shell.
    Suspend,
    /// Draw everything anew.
    Redraw,
    /// Whether the mouse is ours.
    Mouse(bool),
}

/// What the model is doing.
#[derive(Clone, Debug, PartialEq)]
pub enum State {
    /// A file comes into memory: so many of so many bytes.
    Loading(u64, u64),
    /// It waits for a question.
    Ready,
    /// A question was handed over.
    Asked,
    /// It reads: so many of so many tokens, those in the cache not counted, after so long.
    Reading {
        /// Tokens read.
        done: usize,
        /// Tokens to read.
        of: usize,
        /// Time for those.
        time: Duration,
    },
    /// It thinks before it answers.
    Thinking,
    /// It answers.
    Answering,
    /// It was stopped.
    Stopped,
    /// There is no model.
    NoModel,
}

/// How important a notice is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Weight {
    /// To be known.
    Note,
    /// To be minded.
    Warning,
    /// Something failed.
    Problem,
}

/// A line for the person.
pub struct Notice {
    /// What it says.
    pub text: String,
    /// How important.
    pub weight: Weight,
    /// When it goes.
    pub until: Instant,
}

/// The model that there was, while another one is loaded.
struct Before {
    model: Loaded,
    name: String,
    wanted: String,
    used: usize,
}

/// The question that is being answered.
struct Answer {
    id: u64,
    leaf: Option<usize>, // the turn that is answered, or gone on with
    node: Option<usize>, // the answer, once it has begun
    go_on: bool,
    stopped: bool,
}

/// Where the conversation is looked at from.
#[derive(Clone, Copy, PartialEq, Debug)]
pub enum Scroll {
    /// From its end, wherever that goes.
    End,
    /// A turn of the branch, and a row of it at the top of the screen.
    At(usize, usize),
}

/// A completion of what stands before the cursor.
#[derive(Clone, Debug, PartialEq)]
pub struct Choice {
    /// What is put there.
    pub text: String,
    /// What is said about it.
    pub what: String,
}

/// Completions.
#[derive(Default)]
pub struct Completion {
    /// What stood before the cursor when they were looked for: they are of no other text.
    pub of: String,
    /// What they take the place of, in bytes of it.
    pub from: usize,
    /// The candidates.
    pub choices: Vec<Choice>,
    /// The one chosen.
    pub at: usize,
}

/// Everything that the screen shows.
pub struct App {
    /// Columns and rows.
    pub size: (u16, u16),
    /// The time of the last event.
    pub now: Instant,
    /// Colours.
    pub theme: Theme,
    /// What was said.
    pub tree: Tree,
    /// As rows.
    pub transcript: Transcript,
    /// What is being written.
    pub editor: Editor,
    /// Its completions.
    pub completion: Completion,
    /// What lies over it.
    pub panel: Option<Panel>,
    /// What the model is doing.
    pub state: State,
    /// The model.
    pub model: Option<Loaded>,
    /// Its name, also before it is loaded.
    pub model_name: String,
    wanted: String,
    before: Option<Before>,
    /// A line for the person.
    pub notice: Option<Notice>,
    /// The name of the conversation.
    pub title: String,
    /// Its file.
    pub path: Option<PathBuf>,
    /// Why what was said is not in the file, if it is not.
    pub unsaved: Option<String>,
    /// The last conversations, for an empty screen.
    pub recent: Vec<Summary>,
    /// Where it is looked at from.
    pub scroll: Scroll,
    /// The turn that keys mean, by its place in the branch.
    pub selected: Option<usize>,
    /// A question that waits for the answer at hand, or for the conversation that is being opened.
    pub queued: Option<String>,
    /// The question that is being changed.
    pub editing: Option<usize>,
    /// Tokens of the answer at hand, and since when.
    pub pace: (usize, Duration),
    /// Passes over the weights that those tokens took.
    passes: usize,
    /// Positions of the context in use.
    pub used: usize,
    /// Tokens a second of the last reading, for a guess at the next one's time.
    pub reading_rate: Option<f64>,
    /// Bytes that the program has in memory.
    pub memory: Option<u64>,
    /// How to sample.
    pub params: SampleParams,
    /// The system prompt of this conversation.
    pub system: String,
    system_of_new: String, // of those that are begun
    /// Whether the mouse scrolls here.
    pub mouse: bool,
    /// Whether the program shall end.
    pub quit: bool,
    /// What shall be done.
    pub effects: Vec<Effect>,
    set_params: Box<dyn Fn(SampleParams) -> SampleParams>,
    limit: Option<usize>,
    answer: Option<Answer>,
    asked: u64,
    left_out: usize,
    may_leave_out: bool,
    warned_full: bool,
    not_files: HashSet<String>,
    reading_files: usize,
    attached: bool,
    given: Option<String>, // a file that is to be attached, and that the text does not name
    unfit: Option<String>,
    quit_asked: Option<Instant>,
    listing: Option<Place>, // whether the list of conversations is to be shown, and from where on
    opening: bool,
    recorded: Option<String>, // the model that the conversation's file names, as far as it is known
    interrupted: Option<Instant>, // when a question of ours came unasked
    first: Option<String>,
    began: Instant,
}

/// What a conversation begins with.
pub struct Beginning {
    /// What the person named the model by.
    pub model: Option<String>,
    /// Colours.
    pub scheme: Scheme,
    /// Whether the mouse scrolls.
    pub mouse: bool,
    /// What the person said about sampling, over what the makers of a model recommend.
    pub set_params: Box<dyn Fn(SampleParams) -> SampleParams>,
    /// System prompt.
    pub system: String,
    /// The first question.
    pub prompt: Option<String>,
    /// Tokens of an answer, at most.
    pub limit: Option<usize>,
}

impl App {
    /// A new conversation.
    pub fn new(b: Beginning, size: (u16, u16), now: Instant) -> App {
        let model_name = b.model.clone().unwrap_or_else(|| crate::catalog::catalog().default.clone());
        let name = model_name.rsplit('/').next().unwrap_or_default().to_string();
        App {
            size,
            now,
            theme: Theme::new(b.scheme),
            tree: Tree::default(),
            transcript: Transcript::default(),
            editor: Editor::default(),
            completion: Completion::default(),
            panel: None,
            state: State::Loading(0, 0),
            model: None,
            model_name: name,
            wanted: model_name.clone(),
            before: None,
            notice: None,
            title: String::new(),
            path: None,
            unsaved: None,
            recent: Vec::new(),
            scroll: Scroll::End,
            selected: None,
            queued: None,
            editing: None,
            pace: (0, Duration::ZERO),
            passes: 0,
            used: 0,
            reading_rate: None,
            memory: None,
            params: (b.set_params)(SampleParams::default()),
            system: b.system.clone(),
            system_of_new: b.system,
            mouse: b.mouse,
            quit: false,
            effects: vec![Effect::Store(Op::New(model_name.clone())), Effect::Load(b.model), Effect::Store(Op::List)],
            set_params: b.set_params,
            limit: b.limit,
            answer: None,
            asked: 0,
            left_out: 0,
            may_leave_out: false,
            warned_full: false,
            not_files: HashSet::new(),
            reading_files: 0,
            attached: false,
            given: None,
            unfit: None,
            quit_asked: None,
            listing: None,
            opening: false,
            recorded: Some(model_name.clone()),
            interrupted: None,
            first: b.prompt,
            began: now,
        }
    }

    /// Takes what happened.
    pub fn update(&mut self, msg: Msg) {
        if self.notice.as_ref().is_some_and(|n| n.until <= self.now) {
            self.notice = None;
        }
        match msg {
            Msg::Terminal(e) => self.terminal(e),
            Msg::Worker(e) => self.worker(e),
            Msg::Store(e) => self.store(e),
            Msg::Counted(i, tokens) => self.editor.set_tokens(i, tokens),
            Msg::File(word, result) => self.file(word, result),
            Msg::Paths(word, paths) => self.paths(&word, paths),
            Msg::Models(_) if self.asks() => {}
            Msg::Models(models) => self.panel = Some(Panel::List(List::new(Items::Models(models)))),
            Msg::Written(Ok(text)) => self.put(text.trim_end_matches('\n')),
            Msg::Written(Err(e)) => self.say(Weight::Problem, e),
            Msg::Chosen(None, name) => self.load(Some(name)),
            Msg::Chosen(Some(bytes), name) => self.ask_to_fetch(name, bytes),
            Msg::NotFetched(e) => self.not_loaded(e, true),
            Msg::Quit => self.quit(),
            Msg::Tick => {}
        }
        if self.completion.of != self.editor.before() {
            self.completion = Completion::default();
        }
        self.layout();
    }

    /// Brings the rows up to date with everything else.
    fn layout(&mut self) {
        let cells = view::reading_cells(self.size.0);
        let growing = self.answer.as_ref().and_then(|a| a.node);
        self.transcript.layout(&self.tree, cells, self.theme, growing, self.left_out);
        self.editor.layout(view::editor_cells(self.size.0));
        match &mut self.panel {
            Some(Panel::Find(f)) => {
                f.rows = self.transcript.find(&f.query);
                f.at = f.at.min(f.rows.len().saturating_sub(1));
            }
            Some(Panel::Settings(Settings { editor: Some(e), .. })) => e.layout(view::setting_cells(self.size.0)),
            Some(Panel::List(List { naming: Some((_, e)), .. })) => e.layout(view::naming_cells(self.size.0)),
            _ => {}
        }
        let turns = self.transcript.places().len();
        self.selected = self.selected.filter(|&s| s < turns);
    }

    /// Rows of the conversation on the screen.
    fn page(&self) -> usize {
        view::areas(self, self.size).transcript.height as usize
    }

    /// The row at the top of the screen.
    pub fn top(&self, page: usize) -> usize {
        let end = self.transcript.height.saturating_sub(page);
        match self.scroll {
            Scroll::End => end,
            Scroll::At(place, row) => match self.transcript.places().get(place) {
                Some(p) => (p.rows.start + row).min(end),
                None => end,
            },
        }
    }

    /// Looks from a row on.
    fn scroll_to(&mut self, row: usize) {
        if row + self.page() >= self.transcript.height {
            self.scroll = Scroll::End;
            return;
        }
        let places = self.transcript.places();
        let i = places.partition_point(|p| p.rows.start <= row).saturating_sub(1);
        self.scroll = Scroll::At(i, row - places.get(i).map_or(0, |p| p.rows.start));
    }

    fn scroll_by(&mut self, rows: isize) {
        let top = self.top(self.page());
        self.scroll_to(top.saturating_add_signed(rows));
    }

    /// Shows a row, with something above it.
    fn show_row(&mut self, row: usize) {
        let page = self.page();
        let top = self.top(page);
        if !(top..top + page).contains(&row) {
            self.scroll_to(row.saturating_sub(page / 3));
        }
    }

    /// Tells the person something.
    pub fn say(&mut self, weight: Weight, text: impl Into<String>) {
        let text = text.into();
        let long = Duration::from_millis(40 * text.len() as u64);
        self.notice = Some(Notice { text, weight, until: self.now + NOTICE + long });
    }

    fn note(&mut self, text: impl Into<String>) {
        self.say(Weight::Note, text);
    }

    /// Whether something moves on the screen by itself.
    pub fn busy(&self) -> bool {
        matches!(
            self.state,
            State::Loading(..) | State::Asked | State::Reading { .. } | State::Thinking | State::Answering
        )
    }

    /// Eighths of a second since the beginning, for what moves.
    pub fn ticks(&self) -> u128 {
        self.now.duration_since(self.began).as_millis() / 125
    }

    fn quit(&mut self) {
        self.stop();
        self.end_answer(TurnState::Stopped);
        self.quit = true;
    }
}

#[cfg(test)]
mod tests;
