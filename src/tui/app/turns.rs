//! Turns and branches: which one keys mean, and what is done with it.

use super::{App, Effect, Scroll};
use crate::chat::history::TurnState;
use crate::tui::store::Op;
use crate::tui::transcript::thought;

impl App {
    /// The turn that keys mean: the selected one, or the last that fits.
    fn meant(&self, fits: impl Fn(usize) -> bool) -> Option<usize> {
        let path = self.tree.path();
        let upto = self.selected.map_or(path.len(), |s| s + 1);
        path[..upto.min(path.len())].iter().rev().copied().find(|&i| fits(i))
    }

    pub(super) fn role(&self, i: usize) -> &str {
        &self.tree.nodes[i].role
    }

    pub(super) fn regenerate(&mut self) {
        if self.is_busy() {
            return;
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

    pub(super) fn go_on(&mut self) {
        if self.is_busy() {
            return;
        }
        match self.tree.head {
            Some(h) if self.role(h) == "assistant" && self.tree.nodes[h].state == TurnState::Whole => {
                self.note("the answer has ended: Ctrl-R gives another one");
            }
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

    pub(super) fn edit(&mut self) {
        let Some(i) = self.meant(|i| self.role(i) == "user") else { return self.note("nothing has been asked yet") };
        if self.is_busy() {
            return;
        }
        self.editing = Some(i);
        let content = self.tree.nodes[i].content.clone();
        // What was being written comes back with the up arrow.
        self.editor.remember();
        self.put(&content);
    }

    pub(super) fn branch(&mut self, step: isize) {
        if self.opening && self.is_busy() {
            return;
        }
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

    pub(super) fn select(&mut self, step: isize) {
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

    pub(super) fn copy(&mut self, which: &str) {
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

    pub(super) fn fold(&mut self) {
        match self.selected.and_then(|s| self.transcript.places().get(s)).map(|p| p.node) {
            Some(node) if self.transcript.open.contains(&node) => _ = self.transcript.open.remove(&node),
            Some(node) => _ = self.transcript.open.insert(node),
            None => {
                self.transcript.all_open = !self.transcript.all_open;
                self.transcript.open.clear();
            }
        }
    }
}
