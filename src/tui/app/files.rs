//! Files in a question, and completions of what is written.

use super::{App, Choice, Completion, Effect, Weight};
use crate::tui::NoText;
use crate::tui::command;
use crate::tui::editor::Attachment;
use std::ops::Range;

impl App {
    pub(super) fn file(&mut self, word: String, result: Result<String, NoText>) {
        self.reading_files = self.reading_files.saturating_sub(1);
        self.completion = Completion::default();
        let at = mentions(self.editor.text()).into_iter().find(|m| m.name == word).map(|m| m.range);
        let given = self.given.take_if(|g| *g == word).is_some();
        if at.is_none() && !given {
            // It was asked for twice and is there, or the person has thought better of it.
            return;
        }
        match result {
            Ok(content) => {
                let a = Attachment { name: Some(word), content: content.clone(), tokens: None };
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
                let is_word = at.is_some() && !word.contains(['.', '/']);
                match e {
                    NoText::Missing(_) if is_word => {}
                    NoText::Missing(e) | NoText::Unfit(e) => {
                        self.unfit = Some(if at.is_some() { format!("{e}; Enter sends the word as it is") } else { e });
                    }
                }
                if at.is_some() {
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
        if let Some(m) = mention_at_end(before).filter(|m| m.name == word) {
            self.completion = Completion {
                of: before.into(),
                from: m.range.start + 1,
                choices: paths.iter().map(|path| Choice { text: written(path), what: String::new() }).collect(),
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
        if let Some(m) = mention_at_end(before) {
            self.effects.push(Effect::Paths(m.name));
        }
    }
}

/// A file that is named in a text: `@path`, or `@"a path"`.
#[derive(Debug, PartialEq)]
pub(super) struct Mention {
    /// Where it stands, with its mark.
    pub range: Range<usize>,
    /// The path.
    pub name: String,
}

/// Punctuation after which, in Chinese and Japanese, no space comes.
const WIDE: &[char] = &[
    '，', '。', '；', '：', '！', '？', '、', '（', '）', '「', '」', '『', '』', '《', '》', '“', '”', '‘', '’', '…',
];

/// The mention that begins with the `@` at `at`; an `@` within a word of letters is an address.
fn mention(text: &str, at: usize) -> Option<Mention> {
    let within = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '%' | '+' | '-' | '@');
    if text[..at].chars().next_back().is_some_and(within) {
        return None;
    }
    let rest = &text[at + 1..];
    if let Some(quoted) = rest.strip_prefix('"') {
        let end = quoted.find(['"', '\n']).unwrap_or(quoted.len());
        let closed = usize::from(quoted[end..].starts_with('"'));
        return Some(Mention { range: at..at + 2 + end + closed, name: quoted[..end].into() });
    }
    let end = rest.find(|c: char| c.is_whitespace() || WIDE.contains(&c)).unwrap_or(rest.len());
    Some(Mention { range: at..at + 1 + end, name: rest[..end].into() })
}

/// Marks after which a sentence goes on or ends: not of the path before them, unless it is in quotes.
const MARKS: &[char] = &[',', '.', ';', ':', '!', '?', ')', ']', '}', '\'', '"'];

/// The files that a text names.
pub(super) fn mentions(text: &str) -> Vec<Mention> {
    let all = text.match_indices('@').filter_map(|(at, _)| mention(text, at));
    let without_marks = |m: Mention| match text[m.range.clone()].starts_with("@\"") {
        true => m,
        false => {
            let name = m.name.trim_end_matches(MARKS).to_string();
            Mention { range: m.range.start..m.range.start + 1 + name.len(), name }
        }
    };
    all.map(without_marks).filter(|m| !m.name.is_empty()).collect()
}

/// What is being written at the end of a text, if it is a mention.
fn mention_at_end(text: &str) -> Option<Mention> {
    let (at, _) = text.match_indices('@').next_back()?;
    mention(text, at).filter(|m| m.range.end == text.len())
}

/// A path as a mention has it behind its `@`; that of a folder can be gone on with.
fn written(path: &str) -> String {
    match path.contains(|c: char| c.is_whitespace() || WIDE.contains(&c)) || path.ends_with(MARKS) {
        true => format!("\"{path}{}", if path.ends_with('/') { "" } else { "\"" }),
        false => path.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_named_in_any_language() {
        let cases: &[(&str, &[&str])] = &[
            ("compare @main.cpp and @main.c", &["@main.cpp", "@main.c"]),
            ("总结@a.txt", &["@a.txt"]),
            ("总结 @文件.txt，谢谢", &["@文件.txt"]),
            ("read @a.txt, please (or @b/c.md).", &["@a.txt", "@b/c.md"]),
            ("see @\"my file.txt\" here", &["@\"my file.txt\""]),
            ("write to ada@example.org", &[]),
            ("an @ alone", &[]),
            ("not ended @\"my fi", &["@\"my fi"]),
        ];
        for (text, want) in cases {
            let found: Vec<&str> = mentions(text).into_iter().map(|m| &text[m.range]).collect();
            assert_eq!(found, *want, "{text}");
        }
        assert_eq!(mentions("@\"my file.txt\"")[0].name, "my file.txt");
        for path in ["a.txt", "my file.txt", "文，件.txt", "my folder/", "notes(1)"] {
            let text = format!("x @{}", written(path));
            assert_eq!(mention_at_end(&text).unwrap().name, path);
            assert_eq!(mentions(&text)[0].name, path);
        }
        // What is still being written may go on behind a mark.
        assert_eq!(mention_at_end("@a.").unwrap().name, "a.");
    }
}
