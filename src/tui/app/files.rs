//! Files in a question, and completions of what is written.

use super::{App, Choice, Completion, Effect, Weight};
use crate::tui::NoText;
use crate::tui::command;
use crate::tui::editor::Attachment;

impl App {
    pub(super) fn file(&mut self, word: String, result: Result<String, NoText>) {
        self.reading_files = self.reading_files.saturating_sub(1);
        self.completion = Completion::default();
        match result {
            Ok(content) => {
                let a = Attachment { name: Some(word.clone()), content: content.clone(), tokens: None };
                let at = self.editor.word(&format!("@{word}"));
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
                let in_text = self.editor.word(&format!("@{word}")).is_some();
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

    pub(super) fn count(&mut self, i: usize, content: String) {
        if self.model.is_some() {
            self.effects.push(Effect::Count(i, content));
        }
    }

    pub(super) fn paths(&mut self, word: &str, paths: Vec<String>) {
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
    pub(super) fn look_for_completions(&mut self) {
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
