//! Asking the model, and what it says: from what was written to the end of the answer.

use super::files::mentions;
use super::{Answer, App, Effect, Scroll, State, Weight};
use crate::chat::history::TurnState;
use crate::generate::End;
use crate::tui::command::{self, Action};
use crate::tui::editor::Motion;
use crate::tui::panel::{Confirmed, Panel};
use crate::tui::store::Op;
use crate::tui::transcript::thought;
use crate::tui::worker::{self, Ask};
use std::collections::HashSet;
use std::time::Duration;

/// A question of more bytes is folded when it is changed.
const MOST_UNFOLDED: usize = 64 << 10;
/// From so much of the context on, the person is told what will happen.
const NEARLY_FULL: f64 = 0.85;

impl App {
    /// Sends what was written.
    pub(super) fn submit(&mut self) {
        let text = self.editor.text().trim();
        if text.is_empty() {
            return;
        }
        // A question may begin with a slash and go on below; a system prompt has many lines.
        let lines = || command::parse(text).is_some_and(|(c, _)| c.action == Action::System);
        if text.starts_with('/') && !text.starts_with("//") && (!text.contains('\n') || lines()) {
            let line = text.to_string();
            if command::parse(&line).is_some() {
                self.editor.remember();
                self.editor.clear();
            }
            return self.command(&line);
        }
        // Files that are named and not yet read come in first, so that their size is seen before they are sent.
        let named = mentions(text).into_iter().map(|m| m.name);
        let words: HashSet<String> = named.filter(|w| !self.not_files.contains(w)).collect();
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
            self.title = crate::tui::wrap::ellipsis(line.trim(), 60);
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
    pub(super) fn ask(&mut self, leaf: Option<usize>, go_on: bool) {
        // The conversation goes on with the model that is asked, not with one that was only looked at.
        if self.recorded.as_ref() != Some(&self.wanted) {
            self.effects.push(Effect::Store(Op::Model(self.wanted.clone())));
            self.recorded = Some(self.wanted.clone());
        }
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
            left_out: self.left_out,
        }));
        self.state = State::Asked;
    }

    pub(super) fn stop(&mut self) {
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
    pub(super) fn give_back(&mut self) {
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

    /// Puts a question in the place of what is written, to be changed: as text, but for one that would make the editor
    /// slow.
    pub(super) fn put(&mut self, question: &str) {
        let short = question.len() <= MOST_UNFOLDED;
        self.editor.set(if short { question } else { "" });
        if !short && let Some(i) = self.editor.paste(question) {
            self.count(i, question.to_string());
        }
    }

    /// Ends the answer at hand.
    pub(super) fn end_answer(&mut self, state: TurnState) {
        if let Some(a) = self.answer.take()
            && let Some(node) = a.node
        {
            self.tree.nodes[node].state = state;
            self.effects.push(Effect::Store(Op::End(node, state)));
        }
    }

    pub(super) fn worker(&mut self, e: worker::Event) {
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
                } else if !self.opening {
                    self.ask_first();
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
                let Some(Answer { leaf, go_on, stopped, .. }) = self.answer.take() else { return };
                self.give_back();
                self.state = State::Ready;
                if stopped {
                    return;
                }
                self.interrupted = Some(self.now);
                let text = format!(
                    "The conversation no longer fits into the context. If you go on, the model no longer reads the oldest {n} \
                     turns; the system prompt stays, and nothing is deleted."
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
    pub(super) fn not_loaded(&mut self, problem: String, kept: bool) {
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

    pub(super) fn text(&mut self, text: &str, tokens: usize, time: Duration, used: usize) {
        let Some(a) = &self.answer else { return };
        let (leaf, mut node) = (a.leaf, a.node);
        // An answer begins with its first word.
        if !text.is_empty() {
            let node = *node.get_or_insert_with(|| self.begin(leaf));
            let n = &mut self.tree.nodes[node];
            n.content.push_str(text);
            n.state = TurnState::Partial;
            self.effects.push(Effect::Store(Op::Append(node, text.into())));
        }
        (self.pace, self.used) = ((tokens, time), used);
        self.warn_of_the_end();
        let thinks = node.and_then(|node| thought(&self.tree.nodes[node].content)).is_some_and(|t| !t.1);
        self.state = if thinks { State::Thinking } else { State::Answering };
    }

    /// Begins the answer to `leaf`.
    fn begin(&mut self, leaf: Option<usize>) -> usize {
        let head = self.tree.head;
        let node = self.tree.push(leaf, "assistant", "", TurnState::Partial);
        self.effects.push(Effect::Store(Op::Begin { parent: leaf, role: "assistant".into() }));
        if head != leaf {
            // The person looks at another branch by now.
            self.tree.head = head;
            self.effects.extend(head.map(|h| Effect::Store(Op::Head(h))));
        }
        if let Some(a) = &mut self.answer {
            a.node = Some(node);
        }
        node
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

    /// Asks what the program was started with, then what waits.
    pub(super) fn ask_first(&mut self) {
        match self.first.take() {
            Some(q) => self.say_as_user(&q),
            None => self.ask_what_waits(),
        }
    }

    pub(super) fn ask_what_waits(&mut self) {
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
        self.a_second(self.pace.0.saturating_sub(1))
    }

    /// GB/s at which the answer reads weights and cache, once a pass.
    pub fn bandwidth(&self) -> Option<f64> {
        let m = self.model.as_ref()?;
        Some(self.a_second(self.passes)? * (m.bytes_per_token + m.cache_per_token * self.used) as f64 / 1e9)
    }

    /// So many in the time since the first token, where there is another.
    fn a_second(&self, n: usize) -> Option<f64> {
        let (tokens, time) = self.pace;
        (tokens > 1 && !time.is_zero()).then(|| n as f64 / time.as_secs_f64())
    }

    /// How long the reading will still take.
    pub fn time_left(&self) -> Option<Duration> {
        let State::Reading { done, of, time } = self.state else { return None };
        let rate = if done > 0 { done as f64 / time.as_secs_f64().max(1e-6) } else { self.reading_rate? };
        Some(Duration::from_secs_f64(((of - done.min(of)) as f64 / rate.max(1e-3)).min(1e6)))
    }
}
