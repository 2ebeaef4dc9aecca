//! What the screen shows, and how it changes: [`App::update`] takes what happened and leaves what shall be done in
//! [`App::effects`]. Nothing here touches the terminal, a file or the model.

mod keys;

use super::command::{self, Action};
use super::editor::{Attachment, Editor, Motion};
use super::panel::{self, Confirmed, Find, Items, List, Panel, Settings};
use super::store::{self, Op};
use super::theme::{Scheme, Theme};
use super::transcript::{Transcript, thought};
use super::tree::Tree;
use super::worker::{self, Ask, Loaded};
use super::{Msg, NoText, view};
use crate::chat::history::{Summary, TurnState};
use crate::generate::End;
use crate::sample::SampleParams;
use std::collections::HashSet;
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// How long a notice stays.
const NOTICE: Duration = Duration::from_secs(6);
/// From so much of the context on, the person is told what will happen.
const NEARLY_FULL: f64 = 0.85;

/// Something to be done outside.
#[derive(Clone, Debug, PartialEq)]
pub enum Effect {
    /// Ask the model.
    Ask(Ask),
    /// Stop the question of this number.
    Stop(u64),
    /// Load another model.
    Load(Option<String>),
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
    /// What.
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
    /// Them.
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
    /// The system prompt of this conversation, and of the next.
    pub system: String,
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
    unfit: Option<String>,
    quit_asked: Option<Instant>,
    listing: bool,
    opening: bool,
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
            system: b.system,
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
            unfit: None,
            quit_asked: None,
            listing: false,
            opening: false,
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
            Msg::Written(Ok(text)) => self.editor.set(text.trim_end_matches('\n')),
            Msg::Written(Err(e)) => self.say(Weight::Problem, e),
            Msg::Fetched(Ok(name)) => self.load(Some(name)),
            Msg::Fetched(Err(e)) => self.not_loaded(e, true),
            Msg::Memory(bytes) => self.memory = Some(bytes),
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
        if let Some(Panel::Find(f)) = &mut self.panel {
            f.rows = self.transcript.find(&f.query);
            f.at = f.at.min(f.rows.len().saturating_sub(1));
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

    // ---- asking and answering ----

    /// Sends what was written.
    fn submit(&mut self) {
        let text = self.editor.text().trim();
        if text.is_empty() {
            return;
        }
        if text.starts_with('/') && !text.starts_with("//") && !text.contains('\n') {
            let line = text.to_string();
            if command::parse(&line).is_some() {
                self.editor.remember();
                self.editor.clear();
            }
            return self.command(&line);
        }
        // Files that are named and not yet read come in first, so that their size is seen before they are sent.
        let words: HashSet<String> = text
            .split_whitespace()
            .filter_map(|w| w.strip_prefix('@'))
            .filter(|w| !w.is_empty() && !self.not_files.contains(*w))
            .map(str::to_string)
            .collect();
        if !words.is_empty() {
            (self.reading_files, self.attached, self.unfit) = (words.len(), false, None);
            self.effects.extend(words.into_iter().map(Effect::Read));
            return;
        }
        let (tokens, context) = (self.editor.attached_tokens(), self.model.as_ref().map_or(usize::MAX, |m| m.context));
        if tokens >= context {
            let text = format!("what is attached has {tokens} tokens, the context {context} (-c sets it)");
            return self.say(Weight::Problem, text);
        }
        self.not_files.clear();
        self.notice = None;
        let question = self.editor.take();
        let question =
            question.trim().strip_prefix('/').filter(|q| q.starts_with('/')).unwrap_or(question.trim()).to_string();
        if self.answer.is_some() || self.opening {
            // One more line to what waits already.
            let before = self.queued.take().map_or(String::new(), |q| q + "\n");
            self.queued = Some(before + &question);
            return;
        }
        self.say_as_user(&question);
    }

    fn say_as_user(&mut self, question: &str) {
        let parent = match self.editing.take() {
            Some(i) => self.tree.nodes[i].parent,
            None => self.tree.head,
        };
        let parent = self.with_system(parent);
        let node = self.add(parent, "user", question);
        if self.title.is_empty() {
            let line = question.lines().find(|l| !l.trim().is_empty()).unwrap_or_default();
            self.title = super::wrap::ellipsis(line.trim(), 60);
        }
        (self.scroll, self.selected) = (Scroll::End, None);
        self.ask(Some(node), false);
    }

    /// The turn to follow, after a system prompt where it is not the one in force.
    fn with_system(&mut self, parent: Option<usize>) -> Option<usize> {
        let path = self.tree.path_to(parent);
        let last = path.iter().rev().find(|&&i| self.tree.nodes[i].role == "system");
        let in_force = last.map_or("", |&i| &self.tree.nodes[i].content);
        match in_force == self.system {
            true => parent,
            false => Some(self.add(parent, "system", &self.system.clone())),
        }
    }

    fn add(&mut self, parent: Option<usize>, role: &str, content: &str) -> usize {
        let (role, content) = (role.to_string(), content.to_string());
        let node = self.tree.push(parent, &role, &content, TurnState::Whole);
        self.effects.push(Effect::Store(Op::Add { parent, role, content }));
        node
    }

    /// Asks for an answer to a turn, or for more of one.
    fn ask(&mut self, leaf: Option<usize>, go_on: bool) {
        self.asked += 1;
        self.answer = Some(Answer { id: self.asked, leaf, node: leaf.filter(|_| go_on), go_on, stopped: false });
        (self.pace, self.passes) = ((0, Duration::ZERO), 0);
        match &self.state {
            State::NoModel => {
                self.answer = None;
                self.give_back();
                self.say(Weight::Problem, "there is no model: /model chooses one, and Ctrl-R asks again");
            }
            State::Loading(..) if self.model.is_none() => {} // as soon as it is there
            _ => self.hand_over(),
        }
    }

    fn hand_over(&mut self) {
        let Some(a) = &self.answer else { return };
        self.effects.push(Effect::Ask(Ask {
            id: a.id,
            turns: self.tree.turns(a.leaf),
            go_on: a.go_on,
            params: self.params.clone(),
            limit: self.limit,
            may_leave_out: self.may_leave_out,
        }));
        self.state = State::Asked;
    }

    fn stop(&mut self) {
        if let Some(a) = &mut self.answer {
            a.stopped = true;
            let id = a.id;
            self.effects.push(Effect::Stop(id));
            if self.model.is_none() {
                // The question was never handed over.
                self.answer = None;
            }
        }
        self.give_back();
    }

    /// What waits for an answer that does not come goes back to where it was written, before what is there by now.
    fn give_back(&mut self) {
        let Some(q) = self.queued.take() else { return };
        let draft = !self.editor.is_empty();
        self.editor.go(Motion::Start);
        if let Some(i) = self.editor.paste(&q) {
            self.count(i, q);
        }
        if draft {
            self.editor.insert('\n');
            self.editor.go(Motion::Finish);
        }
    }

    /// Ends the answer at hand.
    fn end_answer(&mut self, state: TurnState) {
        if let Some(a) = self.answer.take()
            && let Some(node) = a.node
        {
            self.tree.nodes[node].state = state;
            self.effects.push(Effect::Store(Op::End(node, state)));
        }
    }

    fn worker(&mut self, e: worker::Event) {
        match e {
            worker::Event::Loading(done, of) => {
                if matches!(self.state, State::Loading(..)) {
                    self.state = if done == of { State::Ready } else { State::Loading(done, of) };
                }
            }
            worker::Event::Loaded(m, _) => {
                self.params = (self.set_params)(m.recommended.clone());
                self.model_name = m.name.clone();
                self.before = None;
                if let Some(note) = m.notes.first() {
                    self.say(Weight::Warning, note.clone());
                }
                self.model = Some(*m);
                for (i, a) in self.editor.attachments().iter().enumerate().filter(|(_, a)| a.tokens.is_none()) {
                    self.effects.push(Effect::Count(i, a.content.clone()));
                }
                if self.answer.is_some() {
                    self.hand_over();
                } else if let Some(q) = self.first.take() {
                    self.say_as_user(&q);
                }
            }
            worker::Event::LoadFailed { problem, kept } => self.not_loaded(problem, kept),
            worker::Event::Reading { done, of, reused, time } => {
                if done > 0 && !time.is_zero() {
                    self.reading_rate = Some(done as f64 / time.as_secs_f64());
                }
                self.used = reused + done;
                self.state = State::Reading { done, of, time };
            }
            worker::Event::Text { text, tokens, passes, time, used } => {
                self.text(&text, tokens, time, used);
                self.passes = passes;
            }
            worker::Event::Ended { end, tokens, time, used } => self.ended(end, tokens, time, used),
            worker::Event::Full(n) => {
                // The model has ended this question. However the person is asked, and even if not, another may come.
                let Some(Answer { leaf, go_on, .. }) = self.answer.take() else { return };
                self.give_back();
                self.state = State::Ready;
                let text = format!(
                    "The conversation no longer fits into the context. If you go on, the model will not read the oldest {n} \
                     turns any more; the system prompt stays, and nothing is deleted."
                );
                self.panel = Some(Panel::Confirm(text, Confirmed::LeaveOut { leaf, go_on }));
            }
            worker::Event::LeftOut(n) => self.left_out = n,
            worker::Event::Noticed(text) => self.say(Weight::Warning, text),
            worker::Event::Failed(e) => {
                self.end_answer(TurnState::Partial);
                self.give_back();
                self.state = State::Ready;
                self.say(Weight::Problem, e);
            }
        }
    }

    /// A model cannot be had: the one before it stays, if it is still there.
    fn not_loaded(&mut self, problem: String, kept: bool) {
        self.answer = None;
        self.give_back();
        match self.before.take().filter(|_| kept) {
            Some(b) => {
                self.say(Weight::Problem, format!("{problem}; {} stays", b.name));
                (self.model, self.model_name, self.wanted, self.used) = (Some(b.model), b.name, b.wanted, b.used);
                self.state = State::Ready;
            }
            None => {
                self.say(Weight::Problem, problem);
                self.state = State::NoModel;
            }
        }
    }

    fn text(&mut self, text: &str, tokens: usize, time: Duration, used: usize) {
        let Some(a) = &mut self.answer else { return };
        let node = match a.node {
            Some(node) => node,
            None => {
                let head = self.tree.head;
                let node = self.tree.push(a.leaf, "assistant", "", TurnState::Partial);
                self.effects.push(Effect::Store(Op::Begin { parent: a.leaf, role: "assistant".into() }));
                if head != a.leaf {
                    // The person looks at another branch by now.
                    self.tree.head = head;
                    self.effects.extend(head.map(|h| Effect::Store(Op::Head(h))));
                }
                a.node = Some(node);
                node
            }
        };
        let n = &mut self.tree.nodes[node];
        n.content.push_str(text);
        n.state = TurnState::Partial;
        self.effects.push(Effect::Store(Op::Append(node, text.into())));
        (self.pace, self.used) = ((tokens, time), used);
        self.warn_of_the_end();
        let n = &self.tree.nodes[node];
        let thinks = thought(&n.content).is_some_and(|t| !t.1);
        self.state = if thinks { State::Thinking } else { State::Answering };
    }

    fn ended(&mut self, end: End, tokens: usize, time: Duration, used: usize) {
        let Some(a) = &self.answer else { return };
        let (node, stopped) = (a.node, a.stopped || end == End::Stopped);
        (self.pace, self.used) = ((tokens, time), used);
        if let Some(node) = node {
            let mut figures = format!("{tokens} tokens");
            if let Some(rate) = self.rate() {
                figures += &format!(" · {rate:.1} t/s · {:.1} s", time.as_secs_f64());
            }
            self.tree.nodes[node].figures = Some(figures);
        }
        self.end_answer(match end {
            _ if stopped => TurnState::Stopped,
            End::Eog => TurnState::Whole,
            _ => TurnState::Partial,
        });
        self.state = if stopped { State::Stopped } else { State::Ready };
        match end {
            End::Context => self.say(
                Weight::Warning,
                "the context is full: Alt-C goes on without the oldest turns; nothing is deleted, and the system prompt stays",
            ),
            End::Length => self.note("the answer has as many tokens as -n allows: Alt-C goes on"),
            _ => self.warn_of_the_end(),
        }
        self.ask_what_waits();
    }

    fn ask_what_waits(&mut self) {
        if let Some(q) = self.queued.take() {
            self.say_as_user(&q);
        }
    }

    /// Says what will happen before the context is full, once.
    fn warn_of_the_end(&mut self) {
        match self.fill() {
            f if f >= NEARLY_FULL && !self.warned_full => {
                self.warned_full = true;
                let text = format!(
                    "the context is {:.0} % full: when it is, you will be asked whether the oldest turns may be left out of \
                     what the model reads; the system prompt stays, and nothing is deleted",
                    f * 100.0
                );
                self.say(Weight::Warning, text);
            }
            f if f < NEARLY_FULL / 2.0 => self.warned_full = false,
            _ => {}
        }
    }

    /// How much of the context is in use.
    pub fn fill(&self) -> f64 {
        self.model.as_ref().map_or(0.0, |m| self.used as f64 / m.context.max(1) as f64)
    }

    /// Tokens a second of the answer.
    pub fn rate(&self) -> Option<f64> {
        let (tokens, time) = self.pace;
        (tokens > 1 && !time.is_zero()).then(|| (tokens - 1) as f64 / time.as_secs_f64())
    }

    /// GB/s at which the answer reads weights and cache.
    pub fn bandwidth(&self) -> Option<f64> {
        let (m, tokens) = (self.model.as_ref()?, self.pace.0);
        let passes = self.rate()? * self.passes as f64 / (tokens - 1) as f64;
        Some(passes * (m.bytes_per_token + m.cache_per_token * self.used) as f64 / 1e9)
    }

    /// How long the reading will still take.
    pub fn time_left(&self) -> Option<Duration> {
        let State::Reading { done, of, time } = self.state else { return None };
        let rate = if done > 0 { done as f64 / time.as_secs_f64().max(1e-6) } else { self.reading_rate? };
        Some(Duration::from_secs_f64(((of - done.min(of)) as f64 / rate.max(1e-3)).min(1e6)))
    }

    // ---- turns and branches ----

    /// The turn that keys mean: the selected one, or the last that fits.
    fn meant(&self, fits: impl Fn(usize) -> bool) -> Option<usize> {
        let path = self.tree.path();
        let upto = self.selected.map_or(path.len(), |s| s + 1);
        path[..upto.min(path.len())].iter().rev().copied().find(|&i| fits(i))
    }

    fn role(&self, i: usize) -> &str {
        &self.tree.nodes[i].role
    }

    fn regenerate(&mut self) {
        if self.answer.is_some() {
            return self.note("an answer is still coming: Esc stops it");
        }
        match self.meant(|i| self.role(i) == "user") {
            Some(q) => {
                // The answers that there are stay, as branches.
                self.tree.head = Some(q);
                self.effects.push(Effect::Store(Op::Head(q)));
                (self.scroll, self.selected) = (Scroll::End, None);
                self.ask(Some(q), false);
            }
            None => self.note("nothing has been asked yet"),
        }
    }

    fn go_on(&mut self) {
        if self.answer.is_some() {
            return self.note("an answer is still coming");
        }
        match self.tree.head {
            Some(h) if self.role(h) == "assistant" => {
                if self.fill() >= 0.99 {
                    self.may_leave_out = true;
                }
                self.scroll = Scroll::End;
                self.ask(Some(h), true);
            }
            Some(h) if self.role(h) == "user" => self.ask(Some(h), false),
            _ => self.note("there is no answer to go on with"),
        }
    }

    fn edit(&mut self) {
        let Some(i) = self.meant(|i| self.role(i) == "user") else { return self.note("nothing has been asked yet") };
        if self.answer.is_some() {
            return self.note("an answer is still coming: Esc stops it");
        }
        self.editing = Some(i);
        let content = self.tree.nodes[i].content.clone();
        self.editor.clear();
        self.editor.paste(&content);
    }

    fn branch(&mut self, step: isize) {
        let Some(i) = self.meant(|i| self.tree.siblings(i).len() > 1) else {
            return self.note("there is one branch only: Ctrl-R answers anew, Alt-E changes a question");
        };
        let siblings = self.tree.siblings(i);
        let at = siblings.iter().position(|&s| s == i).unwrap_or(0);
        let to = siblings[at.saturating_add_signed(step).min(siblings.len() - 1)];
        if to != i {
            self.tree.head = Some(self.tree.leaf(to));
            self.effects.extend(self.tree.head.map(|h| Effect::Store(Op::Head(h))));
            self.left_out = 0;
            self.layout();
            let place = self.transcript.places().iter().position(|p| p.node == to);
            if let Some(p) = place {
                let rows = self.transcript.places()[p].rows.clone();
                self.selected = self.selected.map(|_| p);
                self.show_row(rows.start);
            }
        }
    }

    fn select(&mut self, step: isize) {
        let turns = self.transcript.places().len();
        if turns == 0 {
            return;
        }
        let at = match self.selected {
            None if step > 0 => return,
            None => turns - 1,
            Some(at) => at.saturating_add_signed(step),
        };
        if at >= turns {
            (self.selected, self.scroll) = (None, Scroll::End);
            return;
        }
        self.selected = Some(at);
        let start = self.transcript.places()[at].rows.start;
        self.scroll_to(start);
    }

    fn copy(&mut self, which: &str) {
        let Some(i) = self.meant(|i| self.role(i) == "assistant") else { return self.note("there is no answer yet") };
        let codes = self.transcript.codes(i);
        let (what, text) = match which {
            "" => {
                let content = &self.tree.nodes[i].content;
                ("the answer".to_string(), thought(content).map_or(content.as_str(), |t| t.2).to_string())
            }
            "code" => match codes.last() {
                Some(c) => (format!("code block {}", codes.len()), c.clone()),
                None => return self.note("the answer has no code block"),
            },
            n => match n.parse::<usize>().ok().and_then(|n| codes.get(n.checked_sub(1)?)) {
                Some(c) => (format!("code block {n}"), c.clone()),
                None => return self.note(format!("no code block {n}; the answer has {}", codes.len())),
            },
        };
        self.note(format!("{what} is copied ({} characters)", text.chars().count()));
        self.effects.push(Effect::Copy(text));
    }

    fn fold(&mut self) {
        match self.selected.and_then(|s| self.transcript.places().get(s)).map(|p| p.node) {
            Some(node) if self.transcript.open.contains(&node) => _ = self.transcript.open.remove(&node),
            Some(node) => _ = self.transcript.open.insert(node),
            None => {
                self.transcript.all_open = !self.transcript.all_open;
                self.transcript.open.clear();
            }
        }
    }

    // ---- commands ----

    fn command(&mut self, line: &str) {
        let Some((c, argument)) = command::parse(line) else {
            let name = line.split_whitespace().next().unwrap_or_default();
            return self
                .say(Weight::Warning, format!("no command {name}: F1 shows them; // sends a line that begins with /"));
        };
        self.act(c.action, argument);
    }

    fn act(&mut self, action: Action, argument: &str) {
        match action {
            Action::Help => self.panel = Some(Panel::Help(0)),
            Action::New => self.begin_anew(),
            Action::Conversations => self.list(),
            Action::Rename if argument.is_empty() => self.note("/rename TITLE"),
            Action::Rename => {
                self.title = argument.to_string();
                self.effects.push(Effect::Store(Op::Rename(argument.into())));
            }
            Action::Export if argument.is_empty() => self.note("/export FILE.md or FILE.json"),
            Action::Export => self.effects.push(Effect::Store(Op::Export(None, argument.into()))),
            Action::Regenerate => self.regenerate(),
            Action::Edit => self.edit(),
            Action::Continue => self.go_on(),
            Action::PreviousBranch => self.branch(-1),
            Action::NextBranch => self.branch(1),
            Action::Copy => self.copy(argument),
            Action::System => self.set("system", argument),
            Action::Settings => match argument.trim_start_matches("parameter ").split_once(char::is_whitespace) {
                Some((name, value)) => self.set(name, value),
                None => self.panel = Some(Panel::Settings(Settings::new(&self.system, &self.params))),
            },
            Action::Model if argument.is_empty() => self.effects.push(Effect::Models),
            Action::Model => self.load(Some(argument.into())),
            Action::Info => {
                let facts = self.model.as_ref().map_or("no model is loaded".into(), |m| m.facts.clone());
                let file = self.path.as_ref().map_or("not in a file yet".into(), |p| p.display().to_string());
                self.note(format!("{facts} · this conversation: {file}"));
            }
            Action::Find => {
                self.panel = Some(Panel::Find(Find { query: argument.into(), ..Find::default() }));
                self.layout();
                self.found(0);
            }
            Action::File if argument.is_empty() => self.note("/file PATH, or @PATH in the question"),
            Action::File => {
                (self.reading_files, self.attached, self.unfit) = (1, false, None);
                self.effects.push(Effect::Read(argument.into()));
            }
            Action::Fold => self.fold(),
            Action::Theme => {
                let next = Scheme::ALL[(self.theme.scheme as usize + 1) % Scheme::ALL.len()];
                match if argument.is_empty() { Some(next) } else { Scheme::named(argument) } {
                    Some(s) => self.theme = Theme::new(s),
                    None => self.note("/theme dark, light or none"),
                }
            }
            Action::Mouse => {
                self.mouse = !self.mouse;
                self.effects.push(Effect::Mouse(self.mouse));
                self.note(match self.mouse {
                    true => "the mouse scrolls; with Shift it selects",
                    false => "the mouse selects; /mouse lets it scroll again",
                });
            }
            Action::Stop => self.stop(),
            Action::Quit => self.ask_to_quit(),
        }
    }

    /// Ends the program; not before it is agreed to where something would be lost.
    fn ask_to_quit(&mut self) {
        match &self.unsaved {
            None => self.quit(),
            Some(problem) => {
                let text =
                    format!("The end of this conversation is not saved ({problem}). Enter ends, and it is lost.");
                self.panel = Some(Panel::Confirm(text, Confirmed::Quit));
            }
        }
    }

    fn set(&mut self, name: &str, value: &str) {
        if name == "system" {
            self.system = value.trim().to_string();
            return self.note("the next question goes with this system prompt");
        }
        match panel::set(&mut self.params, name, value) {
            Ok(()) => self.note(format!("{name} is {}", value.trim())),
            Err(e) => self.say(Weight::Problem, e),
        }
    }

    fn load(&mut self, name: Option<String>) {
        if self.answer.is_some() {
            return self.note("an answer is still coming: Esc stops it");
        }
        let shown = name.unwrap_or_default();
        let wanted = std::mem::replace(&mut self.wanted, shown.clone());
        let name = shown.rsplit('/').next().unwrap_or_default().to_string();
        let name = std::mem::replace(&mut self.model_name, name);
        if let Some(model) = self.model.take() {
            self.before = Some(Before { model, name, wanted, used: self.used });
        }
        (self.state, self.reading_rate, self.used) = (State::Loading(0, 0), None, 0);
        self.effects.push(Effect::Fetch(shown));
    }

    fn begin_anew(&mut self) {
        if self.answer.is_some() {
            return self.note("an answer is still coming: Esc stops it");
        }
        self.leave();
        self.unsaved = None;
        self.effects.push(Effect::Store(Op::New(self.wanted.clone())));
        self.effects.push(Effect::File(None));
    }

    /// Opens another conversation; the one on the screen stays until it is there.
    pub fn open(&mut self, path: PathBuf) {
        self.opening = true;
        self.effects.push(Effect::Store(Op::Open(path)));
    }

    /// Forgets the conversation on the screen.
    fn leave(&mut self) {
        self.tree = Tree::default();
        self.transcript.clear();
        (self.title, self.path, self.editing, self.selected) = (String::new(), None, None, None);
        (self.left_out, self.may_leave_out, self.warned_full, self.used) = (0, false, false, 0);
        self.scroll = Scroll::End;
    }

    fn store(&mut self, e: store::Event) {
        match e {
            store::Event::Created(path) => {
                self.effects.push(Effect::File(Some(path.clone())));
                self.path = Some(path);
            }
            store::Event::Opened { path, title, turns, head, notes } => {
                self.leave();
                for (parent, role, content, state) in turns {
                    if role == "user" {
                        self.editor.add_past(&content);
                    }
                    self.tree.push(parent, &role, &content, state);
                }
                self.tree.head = head;
                let system = self.tree.path().into_iter().rev().find(|&i| self.role(i) == "system");
                if let Some(i) = system {
                    self.system = self.tree.nodes[i].content.clone();
                }
                self.effects.push(Effect::File(Some(path.clone())));
                (self.title, self.path) = (title, Some(path));
                if let Some(n) = notes.first() {
                    self.say(Weight::Warning, n.clone());
                }
                self.opening = false;
                self.ask_what_waits();
            }
            store::Event::Listed(found) => {
                self.recent = found.clone();
                if std::mem::take(&mut self.listing) && !self.asks() {
                    let (filter, at) = match self.panel.take() {
                        Some(Panel::List(l)) => (l.filter, l.at),
                        _ => (String::new(), 0),
                    };
                    let at = at.min(found.len().saturating_sub(1));
                    self.panel = Some(Panel::List(List { filter, at, ..List::new(Items::Conversations(found)) }));
                }
            }
            store::Event::Done(text) => self.note(text),
            store::Event::Failed(text) => {
                self.say(Weight::Problem, text);
                if std::mem::take(&mut self.opening) {
                    // It was meant for the conversation that is not there.
                    self.give_back();
                }
            }
            store::Event::Unsaved(None) => {
                if self.unsaved.take().is_some() {
                    self.note("everything is saved again");
                }
            }
            store::Event::Unsaved(Some(problem)) => {
                self.say(Weight::Problem, format!("not saved: {problem}; it is tried again every few seconds"));
                self.unsaved = Some(problem);
            }
        }
    }

    /// Whether the person is asked something, which nothing that comes late may push away.
    fn asks(&self) -> bool {
        matches!(self.panel, Some(Panel::Confirm(..)))
    }

    /// Asks for the list of conversations, to be shown.
    fn list(&mut self) {
        self.listing = true;
        self.effects.push(Effect::Store(Op::List));
    }

    // ---- files ----

    fn file(&mut self, word: String, result: Result<String, NoText>) {
        self.reading_files = self.reading_files.saturating_sub(1);
        self.completion = Completion::default();
        match result {
            Ok(content) => {
                let a = Attachment { name: Some(word.clone()), content: content.clone(), tokens: None };
                let mark = format!("@{word}");
                let at = self.editor.text().find(&mark).map(|i| i..i + mark.len());
                let range = at.unwrap_or(self.editor.cursor()..self.editor.cursor());
                match self.editor.attach(range, a) {
                    Some(i) => {
                        self.attached = true;
                        self.count(i, content);
                    }
                    None => self.say(Weight::Problem, "too many attachments"),
                }
            }
            Err(e) => {
                // A word with an @ that neither names a file nor looks as if it should is a word.
                let in_text = self.editor.text().contains(&format!("@{word}"));
                let is_word = in_text && !word.contains(['.', '/']);
                match e {
                    NoText::Missing(_) if is_word => {}
                    NoText::Missing(e) | NoText::Unfit(e) => {
                        self.unfit = Some(if in_text { format!("{e}; Enter sends the word as it is") } else { e });
                    }
                }
                if in_text {
                    self.not_files.insert(word);
                }
            }
        }
        if self.reading_files == 0 {
            match (self.unfit.take(), self.attached) {
                (Some(e), _) => self.say(Weight::Problem, e),
                (None, true) => self.note("attached: Enter sends"),
                (None, false) if self.editor.text().contains('@') => self.submit(),
                (None, false) => {}
            }
        }
    }

    fn count(&mut self, i: usize, content: String) {
        if self.model.is_some() {
            self.effects.push(Effect::Count(i, content));
        }
    }

    fn paths(&mut self, word: &str, paths: Vec<String>) {
        let before = self.editor.before();
        if before.ends_with(&format!("@{word}")) {
            self.completion = Completion {
                of: before.into(),
                from: before.len() - word.len(),
                choices: paths.into_iter().map(|text| Choice { text, what: String::new() }).collect(),
                at: 0,
            };
        }
    }

    /// Looks for completions of what stands before the cursor.
    fn look_for_completions(&mut self) {
        let before = self.editor.before();
        let choices = command::matching(before);
        if !choices.is_empty() {
            let choice = |c: &&command::Command| Choice {
                text: format!("/{}", c.names[0]),
                what: format!("{}  {}", c.argument, c.what).trim().into(),
            };
            self.completion =
                Completion { of: before.into(), from: 0, choices: choices.iter().map(choice).collect(), at: 0 };
            return;
        }
        self.completion = Completion::default();
        let word = before.rsplit(char::is_whitespace).next().unwrap_or_default();
        if let Some(path) = word.strip_prefix('@') {
            self.effects.push(Effect::Paths(path.into()));
        }
    }
}

#[cfg(test)]
mod tests;
