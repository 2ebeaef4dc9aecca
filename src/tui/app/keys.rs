//! Keys and the mouse.

use super::{App, Completion, Effect, Scroll};
use crate::tui::command::Action;
use crate::tui::editor::{Editor, Motion};
use crate::tui::panel::{Confirmed, Find, Items, List, Panel, Settings};
use crate::tui::store::Op;
use crate::tui::view::help_scroll;
use crossterm::event::{Event, KeyCode, KeyEvent, KeyEventKind, KeyModifiers, MouseEventKind};
use std::path::PathBuf;
use std::time::Duration;

/// Rows that one step of the wheel goes.
const WHEEL: isize = 3;
/// How long keys still go to the editor after a question of ours came unasked.
const UNREAD: Duration = Duration::from_millis(800);
/// How long a second Ctrl-C means the first.
const TWICE: Duration = Duration::from_secs(2);

/// Letters of other layouts than the Latin one, and those that stand on the same keys there: Russian and Ukrainian, Greek,
/// Hebrew, Arabic, and what Persian has elsewhere.
const LAYOUTS: [(&str, &str); 6] = [
    ("йцукенгшщзфывапролдячсмить", "qwertyuiopasdfghjklzxcvbnm"),
    ("іς", "sw"),
    ("ερτυθιοπασδφγηξκλζχψωβνμ", "ertyuiopasdfghjklzxcvbnm"),
    ("קראטוןםפשדגכעיחלךזסבהנמצ", "ertyuiopasdfghjklzxcvbnm"),
    ("ضصثقفغعهخحشسيبلاتنمئءؤرﻻىة", "qwertyuiopasdfghjklzxcvbnm"),
    ("یکظطزذدپ", "dkzxcbnm"),
];

impl App {
    pub(super) fn terminal(&mut self, e: Event) {
        match e {
            Event::Key(k) if k.kind != KeyEventKind::Release => self.key(k),
            Event::Paste(text) => self.paste(&text),
            Event::Mouse(m) => match m.kind {
                MouseEventKind::ScrollUp => self.wheel(-WHEEL),
                MouseEventKind::ScrollDown => self.wheel(WHEEL),
                _ => {}
            },
            Event::Resize(columns, rows) => {
                self.size = (columns, rows);
            }
            _ => {}
        }
    }

    fn wheel(&mut self, rows: isize) {
        match &mut self.panel {
            Some(Panel::Help(at)) => *at = at.saturating_add_signed(rows).min(help_scroll(self.size, &self.theme)),
            Some(Panel::List(l)) => {
                l.at = l.at.saturating_add_signed(rows.signum()).min(l.shown().len().saturating_sub(1))
            }
            _ => self.scroll_by(rows),
        }
    }

    fn paste(&mut self, text: &str) {
        // Terminals send line ends as the key does.
        let line = text.split(['\r', '\n']).next().unwrap_or_default();
        match &mut self.panel {
            Some(Panel::Settings(s)) => {
                if let Some(e) = &mut s.editor {
                    e.complete(e.cursor()..e.cursor(), text);
                }
            }
            Some(Panel::List(l)) => match &mut l.naming {
                Some((_, e)) => e.complete(e.cursor()..e.cursor(), line),
                None => {
                    l.filter.push_str(line);
                    l.at = 0;
                }
            },
            Some(Panel::Find(f)) => {
                let query = std::mem::take(&mut f.query) + line;
                self.find(query);
            }
            Some(_) => {}
            None => {
                if let Some(i) = self.editor.paste(text) {
                    let content = self.editor.attachments()[i].content.clone();
                    self.count(i, content);
                }
            }
        }
    }

    fn key(&mut self, k: KeyEvent) {
        let k = KeyEvent { code: latin(k), ..k };
        let ctrl = k.modifiers.contains(KeyModifiers::CONTROL);
        if ctrl && k.code == KeyCode::Char('c') {
            return self.interrupt();
        }
        if ctrl && k.code == KeyCode::Char('l') {
            return self.effects.push(Effect::Redraw);
        }
        if ctrl && k.code == KeyCode::Char('z') {
            return self.effects.push(Effect::Suspend);
        }
        match self.panel.take() {
            Some(p) => self.panel_key(p, k),
            None => self.main_key(k),
        }
    }

    /// Ctrl-C: stops, then clears, then ends.
    fn interrupt(&mut self) {
        if self.panel.take().is_some() {
            return;
        }
        if self.answer.is_some() {
            return self.stop();
        }
        if !self.editor.is_empty() || self.editing.is_some() {
            self.editor.remember();
            self.editor.clear();
            self.editing = None;
            return;
        }
        match self.quit_asked {
            Some(at) if self.now - at < TWICE => self.ask_to_leave(Confirmed::Quit),
            _ => {
                self.quit_asked = Some(self.now);
                self.note("press Ctrl-C again to quit");
            }
        }
    }

    fn escape(&mut self) {
        if !self.completion.choices.is_empty() {
            self.completion = Completion::default();
        } else if self.answer.is_some() {
            self.stop();
        } else if self.editing.take().is_some() {
            self.editor.remember();
            self.editor.clear();
        } else if self.selected.take().is_none() {
            self.notice = None;
            self.scroll = Scroll::End;
        }
    }

    fn main_key(&mut self, k: KeyEvent) {
        let (ctrl, alt) = (k.modifiers.contains(KeyModifiers::CONTROL), k.modifiers.contains(KeyModifiers::ALT));
        let shift = k.modifiers.contains(KeyModifiers::SHIFT);
        let choosing = !self.completion.choices.is_empty();
        let page = self.page() as isize;
        match k.code {
            KeyCode::Esc => self.escape(),
            KeyCode::Up if choosing && !alt => self.completion.at = self.completion.at.saturating_sub(1),
            KeyCode::Down if choosing && !alt => {
                self.completion.at = (self.completion.at + 1).min(self.completion.choices.len() - 1);
            }
            KeyCode::Tab if choosing => self.take_completion(),
            KeyCode::Enter if choosing && self.completed_otherwise() && !alt && !shift => {
                self.take_completion();
                // A command that needs nothing more is meant to be done.
                if self.editor.text().starts_with('/') && !self.editor.text().ends_with([' ', '/']) {
                    self.submit();
                }
            }
            KeyCode::Enter if alt || shift || ctrl => self.editor.insert('\n'),
            KeyCode::Char('j') if ctrl => self.editor.insert('\n'),
            KeyCode::Enter if self.goes_on() => {
                self.editor.delete(Motion::Left);
                self.editor.insert('\n');
            }
            KeyCode::Enter => self.submit(),
            KeyCode::Tab => self.look_for_completions(),
            KeyCode::F(1) => self.act(Action::Help, ""),
            KeyCode::Char('?') if self.editor.is_empty() => self.act(Action::Help, ""),

            KeyCode::Up if alt => self.select(-1),
            KeyCode::Down if alt => self.select(1),
            KeyCode::Left if alt => self.branch(-1),
            KeyCode::Right if alt => self.branch(1),
            KeyCode::Up if shift => self.scroll_by(-1),
            KeyCode::Down if shift => self.scroll_by(1),
            KeyCode::PageUp => self.scroll_by(2 - page),
            KeyCode::PageDown => self.scroll_by(page - 2),
            KeyCode::Home if ctrl => self.scroll_to(0),
            KeyCode::End if ctrl => self.scroll = Scroll::End,

            KeyCode::Char('r') if ctrl || alt => self.act(Action::Regenerate, ""),
            KeyCode::Char('e') if alt => self.act(Action::Edit, ""),
            KeyCode::Char('c') if alt => self.act(Action::Continue, ""),
            KeyCode::Char('y') if ctrl => self.copy(""),
            KeyCode::Char('y') if alt => self.copy("code"),
            KeyCode::Char('f') if ctrl => self.act(Action::Find, ""),
            KeyCode::Char('t') if ctrl => self.act(Action::Fold, ""),
            KeyCode::Char('n') if ctrl => self.act(Action::New, ""),
            KeyCode::Char('o') if ctrl => self.act(Action::Conversations, ""),
            KeyCode::Char('p') if ctrl => self.act(Action::Settings, ""),
            KeyCode::Char('m') if alt => self.act(Action::Model, ""),
            KeyCode::Char('g') if ctrl => self.effects.push(Effect::Write(self.editor.expanded())),
            KeyCode::Char('d') if ctrl && self.editor.is_empty() => self.act(Action::Quit, ""),

            _ => {
                let before = (self.editor.text().len(), self.editor.cursor());
                if !edit(&mut self.editor, k) {
                    return;
                }
                // Where somebody walks through earlier questions, the next key goes on with that.
                let walks = matches!(k.code, KeyCode::Up | KeyCode::Down);
                if !walks && before != (self.editor.text().len(), self.editor.cursor()) {
                    self.look_for_completions();
                }
            }
        }
    }

    /// Whether a backslash at the end says that another line comes; two are a backslash.
    fn goes_on(&self) -> bool {
        let text = self.editor.text();
        let line = text.trim_end_matches('\\');
        self.editor.cursor() == text.len() && (text.len() - line.len()) % 2 == 1
    }

    /// Whether the chosen completion is another than what stands there.
    fn completed_otherwise(&self) -> bool {
        let c = &self.completion;
        let there = &c.of[c.from..];
        c.choices.get(c.at).is_some_and(|choice| choice.text != there && choice.text.starts_with(there))
    }

    fn take_completion(&mut self) {
        let c = std::mem::take(&mut self.completion);
        let Some(choice) = c.choices.get(c.at) else { return };
        let range = c.from..self.editor.cursor();
        let command = choice.text.starts_with('/') && c.from == 0;
        let folder = choice.text.ends_with('/');
        let takes_more = command && choice.what.starts_with(|c: char| c == '[' || c.is_ascii_uppercase());
        self.editor.complete(range, &format!("{}{}", choice.text, if takes_more { " " } else { "" }));
        if folder {
            self.look_for_completions();
        } else if !command {
            // A file: read at once, so that its size is seen.
            (self.reading_files, self.attached, self.unfit) = (1, false, None);
            self.effects.push(Effect::Read(choice.text.trim_matches('"').to_string()));
        }
    }

    fn panel_key(&mut self, panel: Panel, k: KeyEvent) {
        match panel {
            Panel::Help(at) => self.help_key(at, k),
            Panel::Settings(s) => self.settings_key(s, k),
            Panel::List(l) => self.list_key(l, k),
            Panel::Find(f) => self.find_key(f, k),
            Panel::Confirm(text, then) => self.confirm_key(text, then, k),
        }
    }

    fn help_key(&mut self, mut at: usize, k: KeyEvent) {
        match k.code {
            KeyCode::Esc | KeyCode::Enter | KeyCode::Char('q' | '?') | KeyCode::F(1) => return,
            KeyCode::Up => at = at.saturating_sub(1),
            KeyCode::Down => at = at.saturating_add(1),
            KeyCode::PageUp => at = at.saturating_sub(10),
            KeyCode::PageDown | KeyCode::Char(' ') => at += 10,
            KeyCode::Home => at = 0,
            KeyCode::End => at = usize::MAX,
            _ => {}
        }
        self.panel = Some(Panel::Help(at.min(help_scroll(self.size, &self.theme))));
    }

    fn settings_key(&mut self, mut s: Settings, k: KeyEvent) {
        let ctrl = k.modifiers.contains(KeyModifiers::CONTROL);
        match (&mut s.editor, k.code) {
            (Some(e), KeyCode::Enter) if k.modifiers.is_empty() => {
                let value = e.expanded();
                let name = s.rows[s.at].0;
                let set = match name {
                    "system" => {
                        self.set_system(&value);
                        Ok(())
                    }
                    name => crate::tui::panel::set(&mut self.params, name, &value),
                };
                s.problem = set.err();
                if s.problem.is_none() {
                    s.rows[s.at].1 = value.trim().to_string();
                    s.editor = None;
                }
            }
            (Some(e), KeyCode::Enter) => e.insert('\n'),
            (Some(_), KeyCode::Esc) => (s.editor, s.problem) = (None, None),
            (Some(e), _) => _ = edit(e, k),
            (None, KeyCode::Esc | KeyCode::Char('q')) => return,
            (None, KeyCode::Char('p')) if ctrl => return,
            (None, KeyCode::Up) => s.at = s.at.saturating_sub(1),
            (None, KeyCode::Down) => s.at = (s.at + 1).min(s.rows.len() - 1),
            (None, KeyCode::Enter) => {
                let mut e = Editor::default();
                e.set(&s.rows[s.at].1);
                s.editor = Some(e);
            }
            (None, KeyCode::Char(c)) if !ctrl && !c.is_ascii_alphabetic() && s.at > 0 => {
                let mut e = Editor::default();
                e.insert(c);
                s.editor = Some(e);
            }
            _ => {}
        }
        self.panel = Some(Panel::Settings(s));
    }

    fn find_key(&mut self, mut f: Find, k: KeyEvent) {
        let ctrl = k.modifiers.contains(KeyModifiers::CONTROL);
        match k.code {
            KeyCode::Esc => return,
            KeyCode::Char('f') if ctrl => return,
            KeyCode::Enter | KeyCode::Up => {
                let back = k.code == KeyCode::Up || !k.modifiers.contains(KeyModifiers::SHIFT);
                self.panel = Some(Panel::Find(f));
                return self.found(if back { -1 } else { 1 });
            }
            KeyCode::Down => {
                self.panel = Some(Panel::Find(f));
                return self.found(1);
            }
            KeyCode::Backspace => _ = f.query.pop(),
            KeyCode::Char('u') if ctrl => f.query.clear(),
            KeyCode::Char(c) if !ctrl => f.query.push(c),
            _ => {}
        }
        self.find(f.query);
    }

    fn confirm_key(&mut self, text: String, then: Confirmed, k: KeyEvent) {
        // Whoever was writing has not read it yet.
        let unread = self.interrupted.is_some_and(|at| self.now < at + UNREAD);
        if unread && !k.modifiers.contains(KeyModifiers::CONTROL) && k.code != KeyCode::Esc {
            if k.code != KeyCode::Enter {
                edit(&mut self.editor, k);
            }
            self.panel = Some(Panel::Confirm(text, then));
            return;
        }
        match k.code {
            KeyCode::Enter | KeyCode::Char('y') => self.confirmed(then),
            KeyCode::Esc | KeyCode::Char('n' | 'q') => {
                if let Confirmed::Delete(_, place) = then {
                    self.list(place);
                }
            }
            _ => self.panel = Some(Panel::Confirm(text, then)),
        }
    }

    /// Looks for a text; the last place where it stands is the one meant, as a rule.
    pub(super) fn find(&mut self, query: String) {
        let rows = self.transcript.find(&query);
        self.panel = Some(Panel::Find(Find { at: rows.len().saturating_sub(1), query, rows }));
        self.found(0);
    }

    /// Goes to another place where what was sought stands.
    pub(super) fn found(&mut self, step: isize) {
        let Some(Panel::Find(f)) = &mut self.panel else { return };
        if f.rows.is_empty() {
            return;
        }
        let n = f.rows.len() as isize;
        f.at = (f.at as isize + step).rem_euclid(n) as usize;
        let row = f.rows[f.at];
        self.show_row(row);
    }

    pub(super) fn confirmed(&mut self, then: Confirmed) {
        match then {
            Confirmed::LeaveOut { leaf, go_on } => {
                self.may_leave_out = true;
                self.ask(leaf, go_on);
            }
            Confirmed::Delete(path, place) => {
                let here = self.path.as_ref() == Some(&path);
                if !(here && self.is_busy()) {
                    if here {
                        self.begin_anew();
                    }
                    self.effects.push(Effect::Store(Op::Delete(path)));
                }
                self.list(place);
            }
            Confirmed::Fetch(name) => self.load(Some(name)),
            Confirmed::New => {
                self.begin_anew();
                // What was left is one of the last ones by now.
                self.effects.push(Effect::Store(Op::List));
            }
            Confirmed::Open(path) => self.open(path),
            Confirmed::Quit => self.quit(),
        }
    }

    fn list_key(&mut self, mut l: List, k: KeyEvent) {
        let ctrl = k.modifiers.contains(KeyModifiers::CONTROL);
        let shown = l.shown().len();
        if let Some((path, e)) = &mut l.naming {
            match k.code {
                KeyCode::Esc => l.naming = None,
                KeyCode::Enter => {
                    let (path, title) = (path.clone(), e.expanded());
                    let op = match self.path.as_ref() == Some(&path) && !self.opening {
                        true => {
                            self.title = title.clone();
                            Op::Rename(title)
                        }
                        false => Op::RenameOther(path, title),
                    };
                    self.effects.push(Effect::Store(op));
                    l.naming = None;
                    self.list(l.place());
                }
                _ => _ = edit(e, k),
            }
            self.panel = Some(Panel::List(l));
            return;
        }
        match k.code {
            KeyCode::Esc if l.filter.is_empty() => return,
            KeyCode::Esc => {
                l.filter.clear();
                l.at = 0;
            }
            KeyCode::Up => l.at = l.at.saturating_sub(1),
            KeyCode::Down => l.at = (l.at + 1).min(shown.saturating_sub(1)),
            KeyCode::PageUp => l.at = l.at.saturating_sub(10),
            KeyCode::PageDown => l.at = (l.at + 10).min(shown.saturating_sub(1)),
            KeyCode::Enter => match &l.items {
                Items::Conversations(_) if self.is_busy() => {}
                Items::Conversations(_) => {
                    if let Some(c) = l.conversation() {
                        return self.ask_to_leave(Confirmed::Open(c.path.clone()));
                    }
                }
                Items::Models(_) => {
                    if let Some(m) = l.model().cloned() {
                        return match m.here {
                            true => self.load(Some(m.name)),
                            false => self.ask_to_fetch(m.name, m.bytes),
                        };
                    }
                }
            },
            KeyCode::F(2) => l.naming = naming(&l),
            KeyCode::Char('r') if ctrl => l.naming = naming(&l),
            KeyCode::Delete | KeyCode::Char('d') if ctrl || k.code == KeyCode::Delete => {
                if let Some(c) = l.conversation() {
                    let text = format!("Delete \u{201c}{}\u{201d} and its {} turns for good?", c.title, c.turns);
                    self.panel = Some(Panel::Confirm(text, Confirmed::Delete(c.path.clone(), l.place())));
                    return;
                }
            }
            KeyCode::Char('e') if ctrl => {
                if let Some(c) = l.conversation() {
                    let name = c.path.file_stem().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
                    self.effects.push(Effect::Store(Op::Export(Some(c.path.clone()), format!("{name}.md").into())));
                }
            }
            KeyCode::Backspace => {
                l.filter.pop();
                l.at = 0;
            }
            KeyCode::Char(c) if !ctrl => {
                l.filter.push(c);
                l.at = 0;
            }
            _ => {}
        }
        self.panel = Some(Panel::List(l));
    }
}

/// The key that is meant together with Ctrl or Alt: terminals tell it by its letter in the layout at hand, with Alt all of
/// them, with Ctrl those that know the keyboard protocol.
pub(super) fn latin(k: KeyEvent) -> KeyCode {
    let (ctrl, alt) = (k.modifiers.contains(KeyModifiers::CONTROL), k.modifiers.contains(KeyModifiers::ALT));
    let KeyCode::Char(c) = k.code else { return k.code };
    if ctrl == alt || c.is_ascii() {
        return k.code;
    }
    let there = |(letters, keys): &(&str, &str)| keys.chars().nth(letters.chars().position(|l| l == c)?);
    KeyCode::Char(LAYOUTS.iter().find_map(there).unwrap_or(c))
}

/// The conversation under the cursor, and its name to be changed.
fn naming(l: &List) -> Option<(PathBuf, Editor)> {
    let (c, mut e) = (l.conversation()?, Editor::default());
    e.set(&c.title);
    Some((c.path.clone(), e))
}

/// Keys that change a text. Whether this was one.
fn edit(e: &mut Editor, k: KeyEvent) -> bool {
    let (ctrl, alt) = (k.modifiers.contains(KeyModifiers::CONTROL), k.modifiers.contains(KeyModifiers::ALT));
    match k.code {
        // Ctrl-_ arrives as what the terminal makes of it.
        KeyCode::Char('_' | '/' | '7' | '-') if ctrl => e.undo(),
        KeyCode::Char('_' | '/') if alt => e.redo(),
        KeyCode::Char('<') if alt => e.go(Motion::Start),
        KeyCode::Char('>') if alt => e.go(Motion::Finish),
        KeyCode::Char('a') if ctrl => e.go(Motion::Home),
        KeyCode::Char('e') if ctrl => e.go(Motion::End),
        KeyCode::Char('b') if ctrl => e.go(Motion::Left),
        KeyCode::Char('b') if alt => e.go(Motion::WordLeft),
        KeyCode::Char('f') if alt => e.go(Motion::WordRight),
        KeyCode::Char('w') if ctrl => e.delete(Motion::WordLeft),
        KeyCode::Char('u') if ctrl => e.delete(Motion::Home),
        KeyCode::Char('k') if ctrl => e.delete(Motion::End),
        KeyCode::Char('d') if alt => e.delete(Motion::WordRight),
        KeyCode::Char('d') if ctrl => e.delete(Motion::Right),
        KeyCode::Char('h') if ctrl => e.delete(Motion::Left),
        KeyCode::Char('v') if ctrl => e.yank(),
        KeyCode::Backspace if ctrl || alt => e.delete(Motion::WordLeft),
        KeyCode::Backspace => e.delete(Motion::Left),
        KeyCode::Delete if ctrl || alt => e.delete(Motion::WordRight),
        KeyCode::Delete => e.delete(Motion::Right),
        KeyCode::Left if ctrl => e.go(Motion::WordLeft),
        KeyCode::Right if ctrl => e.go(Motion::WordRight),
        KeyCode::Left => e.go(Motion::Left),
        KeyCode::Right => e.go(Motion::Right),
        KeyCode::Home => e.go(Motion::Home),
        KeyCode::End => e.go(Motion::End),
        KeyCode::Up => e.up(),
        KeyCode::Down => e.down(),
        // AltGr is Ctrl and Alt together on some keyboards.
        KeyCode::Char(c) if ctrl == alt => e.insert(c),
        _ => return false,
    }
    true
}
