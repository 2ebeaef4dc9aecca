//! Commands, and the conversations and settings that they change.

use super::{App, Before, Effect, Scroll, State, Weight};
use crate::tui::command::{self, Action};
use crate::tui::panel::{self, Confirmed, List, Panel, Place, Settings};
use crate::tui::store::{self, Op};
use crate::tui::theme::{Scheme, Theme};
use crate::tui::tree::Tree;
use std::path::PathBuf;

impl App {
    pub(super) fn command(&mut self, line: &str) {
        let Some((c, argument)) = command::parse(line) else {
            let name = line.split_whitespace().next().unwrap_or_default();
            return self
                .say(Weight::Warning, format!("no command {name}: F1 shows them; // sends a line that begins with /"));
        };
        self.act(c.action, argument);
    }

    pub(super) fn act(&mut self, action: Action, argument: &str) {
        match action {
            Action::Help => self.panel = Some(Panel::Help(0)),
            Action::New if self.is_busy() => {}
            Action::New => self.ask_to_leave(Confirmed::New),
            Action::Conversations => self.list(Place::default()),
            Action::Rename if self.opening => _ = self.is_busy(),
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
            Action::Model => self.effects.push(Effect::Choose(argument.into())),
            Action::Info => {
                let facts = self.model.as_ref().map_or("no model is loaded".into(), |m| m.facts.clone());
                let file = self.path.as_ref().map_or("not in a file yet".into(), |p| p.display().to_string());
                self.note(format!("{facts} · this conversation: {file}"));
            }
            Action::Find => {
                self.layout();
                self.find(argument.into());
            }
            Action::File if argument.is_empty() => self.note("/file PATH, or @PATH in the question"),
            Action::File => {
                (self.reading_files, self.attached, self.unfit) = (1, false, None);
                self.given = Some(argument.into());
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
            Action::Quit => self.ask_to_leave(Confirmed::Quit),
        }
    }

    /// Sets the system prompt of this conversation and of those that are begun from now on.
    pub(super) fn set_system(&mut self, text: &str) {
        self.system = text.trim().to_string();
        self.system_of_new = self.system.clone();
    }

    /// Leaves this conversation for what comes then; not before it is agreed to where something would be lost.
    pub(super) fn ask_to_leave(&mut self, then: Confirmed) {
        match &self.unsaved {
            Some(problem) => {
                let does = if then == Confirmed::Quit { "quits" } else { "leaves it" };
                let text = format!("The end of this conversation is not saved ({problem}). Enter {does} and loses it.");
                self.panel = Some(Panel::Confirm(text, then));
            }
            None => self.confirmed(then),
        }
    }

    pub(super) fn set(&mut self, name: &str, value: &str) {
        if name == "system" {
            self.set_system(value);
            let with = if self.system.is_empty() { "without a" } else { "with this" };
            return self.note(format!("the next question goes {with} system prompt"));
        }
        match panel::set(&mut self.params, name, value) {
            Ok(()) => self.note(format!("{name} is {}", value.trim())),
            Err(e) => self.say(Weight::Problem, e),
        }
    }

    /// Whether an answer is still coming, or another conversation is being opened, which is said: what was asked for has to
    /// wait, or it would happen to a conversation that is not the one on the screen.
    pub(super) fn is_busy(&mut self) -> bool {
        if self.answer.is_some() {
            self.note("an answer is still coming: Esc stops it");
        } else if self.opening {
            self.note("the conversation is still being opened");
        }
        self.answer.is_some() || self.opening
    }

    /// Asks whether a model of so many bytes, where they are known, may be fetched.
    pub(super) fn ask_to_fetch(&mut self, name: String, bytes: Option<u64>) {
        let size = bytes.map_or(String::new(), |b| format!(" ({:.1} GB)", b as f64 / 1e9));
        let text = format!("{name}{size} is not on this machine. Enter fetches it from the network.");
        self.panel = Some(Panel::Confirm(text, Confirmed::Fetch(name)));
    }

    pub(super) fn load(&mut self, name: Option<String>) {
        if self.is_busy() {
            return;
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

    pub(super) fn begin_anew(&mut self) {
        if self.is_busy() {
            return;
        }
        self.leave();
        self.system = self.system_of_new.clone();
        self.unsaved = None;
        self.effects.push(Effect::Store(Op::New(self.wanted.clone())));
        self.recorded = Some(self.wanted.clone());
        self.effects.push(Effect::File(None));
    }

    /// Opens another conversation; the one on the screen stays until it is there.
    pub fn open(&mut self, path: PathBuf) {
        self.opening = true;
        // Whoever opens it says so again where this one stays.
        self.unsaved = None;
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

    pub(super) fn store(&mut self, e: store::Event) {
        match e {
            store::Event::Created(path) => {
                self.effects.push(Effect::File(Some(path.clone())));
                self.path = Some(path);
            }
            store::Event::Opened { path, title, turns, head, notes } => {
                self.leave();
                // Whoever asks says with which model.
                self.recorded = None;
                for (parent, role, content, state) in turns {
                    if role == "user" {
                        self.editor.add_past(&content);
                    }
                    self.tree.push(parent, &role, &content, state);
                }
                self.tree.head = head;
                // Another conversation's prompt would be asked for, and kept, in this one.
                let system = self.tree.path().into_iter().rev().find(|&i| self.role(i) == "system");
                self.system = system.map_or(String::new(), |i| self.tree.nodes[i].content.clone());
                self.effects.push(Effect::File(Some(path.clone())));
                (self.title, self.path) = (title, Some(path));
                if let Some(n) = notes.first() {
                    self.say(Weight::Warning, n.clone());
                }
                self.opening = false;
                if self.model.is_some() {
                    self.ask_first();
                } else {
                    self.ask_what_waits();
                }
            }
            store::Event::Listed(found) => {
                self.recent = found.clone();
                if let Some(place) = self.listing.take()
                    && !self.asks()
                {
                    let place = if let Some(Panel::List(l)) = &self.panel { l.place() } else { place };
                    self.panel = Some(Panel::List(List::conversations(found, place)));
                }
            }
            store::Event::Questions(found) => self.editor.set_older(&found),
            store::Event::Done(text) => self.note(text),
            store::Event::Failed(text) => {
                self.say(Weight::Problem, text);
                if std::mem::take(&mut self.opening) {
                    // It was meant for the conversation that is not there.
                    self.queued = self.first.take().or(self.queued.take());
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
    pub(super) fn asks(&self) -> bool {
        matches!(self.panel, Some(Panel::Confirm(..)))
    }

    /// Asks for the list of conversations, to be shown from there on.
    pub(super) fn list(&mut self, from: Place) {
        self.listing = Some(from);
        self.effects.push(Effect::Store(Op::List));
    }
}
