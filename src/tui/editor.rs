//! The place where a question is written: text of many lines with undo, history, and folded attachments.
//!
//! A long paste or a file stands in the text as one character of a private plane, which is drawn as `[name, size]`, moved
//! over and deleted as one, and becomes its contents when the question is sent. So the editor stays quick however much
//! was pasted.

use super::wrap::{clean, ranges, width};
use std::ops::Range;
use unicode_segmentation::{GraphemeCursor, UnicodeSegmentation};

/// The first of the characters that stand for attachments: supplementary private use area B, which no text uses for long.
const FIRST: u32 = 0x10_0000;
/// As many attachments as a question can have.
const MOST: usize = 4096;
/// A paste is folded beyond so many bytes or lines.
const FOLD_BYTES: usize = 2000;
const FOLD_LINES: usize = 12;
/// Bytes of a text that can be gone back to.
pub const MOST_PAST: usize = 16 << 10;
/// Bytes of texts that undo remembers.
const UNDO_BYTES: usize = 4 << 20;

/// Something folded.
#[derive(Clone, PartialEq, Debug)]
pub struct Attachment {
    /// Its file; none for a paste.
    pub name: Option<String>,
    /// What it stands for.
    pub content: String,
    /// Tokens of it, when they have been counted.
    pub tokens: Option<usize>,
}

impl Attachment {
    /// What is drawn for it.
    pub fn label(&self) -> String {
        let size = match self.content.len() {
            n if n < 1000 => format!("{n} B"),
            n if n < 1_000_000 => format!("{:.0} kB", n as f64 / 1e3),
            n => format!("{:.1} MB", n as f64 / 1e6),
        };
        let name = self.name.as_ref().map_or("pasted".into(), |n| format!("@{n}"));
        match self.tokens {
            Some(n) => format!("[{name} {size}, {n} tokens]"),
            None => format!("[{name} {size}]"),
        }
    }

    /// What the model reads: a file in a fence that it cannot end, under its name.
    fn expanded(&self) -> String {
        let Some(name) = &self.name else { return self.content.clone() };
        let longest =
            self.content.lines().map(|l| l.trim_start()).map(|l| l.len() - l.trim_start_matches('`').len()).max();
        let fence = "`".repeat(longest.unwrap_or(0).max(2) + 1);
        let kind = name.rsplit_once('.').map_or("", |n| n.1);
        format!("{name}:\n{fence}{kind}\n{}\n{fence}\n", self.content.trim_end_matches('\n'))
    }
}

/// Line ends as `\n`, and none of the characters that stand for attachments.
fn plain(s: &str) -> String {
    s.replace("\r\n", "\n").replace('\r', "\n").replace(|c| c as u32 >= FIRST, "\u{fffd}")
}

/// A move of the cursor.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Motion {
    /// One character.
    Left,
    /// One character.
    Right,
    /// To the beginning of this word or the one before.
    WordLeft,
    /// To the end of this word or the next.
    WordRight,
    /// To the beginning of the line.
    Home,
    /// To the end of the line.
    End,
    /// To the beginning of the text.
    Start,
    /// To the end of the text.
    Finish,
}

/// The editor.
#[derive(Default)]
pub struct Editor {
    text: String,
    cursor: usize,
    attachments: Vec<Attachment>,
    undo: Vec<(String, usize)>,
    redo: Vec<(String, usize)>,
    typing: bool,        // whether the last change was a typed character, which the next one joins
    goal: Option<usize>, // the column that up and down try to keep
    killed: String,
    past: Vec<String>,
    older: usize,                      // how many of `past` are of earlier runs
    browsing: Option<(usize, String)>, // place in `past`, and what was being written
    rows: Vec<Range<usize>>,
    cells: usize,
}

impl Editor {
    /// The text, with attachments folded.
    pub fn text(&self) -> &str {
        &self.text
    }

    /// Whether there is nothing in it.
    pub fn is_empty(&self) -> bool {
        self.text.is_empty()
    }

    /// Where the cursor stands, in bytes.
    pub fn cursor(&self) -> usize {
        self.cursor
    }

    /// The text before the cursor.
    pub fn before(&self) -> &str {
        &self.text[..self.cursor]
    }

    /// The attachments, those that were deleted from the text included.
    pub fn attachments(&self) -> &[Attachment] {
        &self.attachments
    }

    /// Tokens of the attachments in the text, as far as they have been counted.
    pub fn attached_tokens(&self) -> usize {
        self.text.graphemes(true).filter_map(|g| self.attachment(g)?.tokens).sum()
    }

    /// The attachment that a grapheme stands for.
    pub fn attachment(&self, g: &str) -> Option<&Attachment> {
        let c = g.chars().next()? as u32;
        self.attachments.get(c.checked_sub(FIRST)? as usize)
    }

    /// The text with attachments unfolded.
    pub fn expanded(&self) -> String {
        let mut out = String::with_capacity(self.text.len());
        for c in self.text.chars() {
            match self.attachment(c.encode_utf8(&mut [0; 4])) {
                Some(a) => out.push_str(&a.expanded()),
                None => out.push(c),
            }
        }
        out
    }

    /// Says how many tokens an attachment has.
    pub fn set_tokens(&mut self, index: usize, tokens: usize) {
        if let Some(a) = self.attachments.get_mut(index) {
            a.tokens = Some(tokens);
        }
        self.rows.clear();
    }

    fn save(&mut self, typing: bool) {
        if !(typing && self.typing) {
            self.undo.push((self.text.clone(), self.cursor));
            while self.undo.iter().map(|u| u.0.len() + 32).sum::<usize>() > UNDO_BYTES {
                self.undo.remove(0);
            }
        }
        self.typing = typing;
        self.redo.clear();
        self.goal = None;
        self.rows.clear();
    }

    fn replace(&mut self, range: Range<usize>, with: &str) {
        self.cursor = range.start + with.len();
        self.text.replace_range(range, with);
        self.rows.clear();
    }

    /// A typed character.
    pub fn insert(&mut self, c: char) {
        // A word is undone at a time.
        self.save(!c.is_whitespace());
        let c = plain(c.encode_utf8(&mut [0; 4]));
        self.replace(self.cursor..self.cursor, &c);
    }

    /// Pasted text: folded where it is long. Returns the number of the attachment that was made.
    pub fn paste(&mut self, s: &str) -> Option<usize> {
        let s = plain(s);
        if s.len() > FOLD_BYTES || s.lines().count() > FOLD_LINES {
            return self.attach(self.cursor..self.cursor, Attachment { name: None, content: s, tokens: None });
        }
        self.save(false);
        self.replace(self.cursor..self.cursor, &s);
        None
    }

    /// Puts an attachment in the place of a range.
    pub fn attach(&mut self, range: Range<usize>, a: Attachment) -> Option<usize> {
        let c = char::from_u32(FIRST + self.attachments.len() as u32).filter(|_| self.attachments.len() < MOST)?;
        self.save(false);
        self.attachments.push(a);
        self.replace(range, c.encode_utf8(&mut [0; 4]));
        Some(self.attachments.len() - 1)
    }

    /// Puts text in the place of a range, however long it is.
    pub fn complete(&mut self, range: Range<usize>, with: &str) {
        self.save(false);
        self.replace(range, &plain(with));
    }

    /// Replaces everything, e.g. by what came from another editor.
    pub fn set(&mut self, s: &str) {
        self.save(false);
        let s = plain(s);
        self.replace(0..self.text.len(), &s);
        self.browsing = None;
    }

    /// Empties it, and gives what was in it: unfolded. It can be gone back to.
    pub fn take(&mut self) -> String {
        let whole = self.expanded();
        self.remember();
        self.clear();
        // What was cut and holds an attachment would stand for nothing, or for another.
        if self.killed.chars().any(|c| c as u32 >= FIRST) {
            self.killed.clear();
        }
        (self.attachments, self.undo, self.redo) = (Vec::new(), Vec::new(), Vec::new());
        whole
    }

    /// Empties it.
    pub fn clear(&mut self) {
        self.save(false);
        self.replace(0..self.text.len(), "");
        self.browsing = None;
    }

    /// Makes the text one to go back to.
    pub fn remember(&mut self) {
        let text = self.expanded();
        self.add_past(&text);
    }

    /// Adds a text to go back to.
    pub fn add_past(&mut self, text: &str) {
        if text.len() > MOST_PAST || text.trim().is_empty() || self.past.last().is_some_and(|p| p == text) {
            return;
        }
        // An earlier run's question that is asked again, or whose conversation is opened, is of this run.
        if let Some(i) = self.past[..self.older].iter().position(|p| p == text) {
            self.past.remove(i);
            self.older -= 1;
            self.browsing.iter_mut().filter(|b| b.0 > i).for_each(|b| b.0 -= 1);
        }
        self.past.push(plain(text));
    }

    /// Has texts of earlier runs to go back to, beyond those of this one, instead of those that it had before; the latest
    /// last.
    pub fn set_older(&mut self, texts: &[String]) {
        let (before, own) = (self.older, self.past.split_off(self.older));
        self.past = texts.iter().map(|t| plain(t)).filter(|t| !t.trim().is_empty() && !own.contains(t)).collect();
        self.older = self.past.len();
        self.past.extend(own);
        // Whoever walks through them stays as far from the end of them.
        self.browsing.iter_mut().for_each(|b| b.0 = (b.0 + self.older).saturating_sub(before));
    }

    fn target(&self, m: Motion) -> usize {
        let line_start = self.text[..self.cursor].rfind('\n').map_or(0, |i| i + 1);
        let line_end = self.text[self.cursor..].find('\n').map_or(self.text.len(), |i| self.cursor + i);
        let blank = |w: &str| w.chars().all(|c| c.is_whitespace() || c.is_ascii_punctuation());
        match m {
            Motion::Left => {
                let mut c = GraphemeCursor::new(self.cursor, self.text.len(), true);
                c.prev_boundary(&self.text, 0).ok().flatten().unwrap_or(0)
            }
            Motion::Right => {
                let mut c = GraphemeCursor::new(self.cursor, self.text.len(), true);
                c.next_boundary(&self.text, 0).ok().flatten().unwrap_or(self.text.len())
            }
            Motion::WordLeft => {
                let words = self.text[..self.cursor].split_word_bound_indices().rev();
                words.filter(|w| !blank(w.1)).map(|w| w.0).next().unwrap_or(0)
            }
            Motion::WordRight => {
                let words = self.text[self.cursor..].split_word_bound_indices();
                let end = words.filter(|w| !blank(w.1)).map(|w| self.cursor + w.0 + w.1.len()).next();
                end.unwrap_or(self.text.len())
            }
            Motion::Home => line_start,
            Motion::End => line_end,
            Motion::Start => 0,
            Motion::Finish => self.text.len(),
        }
    }

    /// Moves the cursor.
    pub fn go(&mut self, m: Motion) {
        self.cursor = self.target(m);
        (self.typing, self.goal) = (false, None);
    }

    /// Deletes from the cursor to where a motion leads. Words and lines can be put back with [`Editor::yank`].
    pub fn delete(&mut self, m: Motion) {
        let mut to = self.target(m);
        if m == Motion::End && to == self.cursor {
            to = self.target(Motion::Right);
        }
        let range = self.cursor.min(to)..self.cursor.max(to);
        if range.is_empty() {
            return;
        }
        self.save(false);
        if !matches!(m, Motion::Left | Motion::Right) {
            self.killed = self.text[range.clone()].to_string();
        }
        self.replace(range, "");
    }

    /// Puts back what was deleted last.
    pub fn yank(&mut self) {
        self.save(false);
        let killed = self.killed.clone();
        self.replace(self.cursor..self.cursor, &killed);
    }

    /// Takes the last change back.
    pub fn undo(&mut self) {
        if let Some(before) = self.undo.pop() {
            self.redo.push((std::mem::replace(&mut self.text, before.0), self.cursor));
            self.cursor = before.1;
            self.typing = false;
            self.rows.clear();
        }
    }

    /// Takes the taking back back.
    pub fn redo(&mut self) {
        if let Some(after) = self.redo.pop() {
            self.undo.push((std::mem::replace(&mut self.text, after.0), self.cursor));
            self.cursor = after.1;
            self.typing = false;
            self.rows.clear();
        }
    }

    /// A row up; at the top, to the question before.
    pub fn up(&mut self) {
        let (row, _) = self.place();
        if row > 0 {
            self.go_to_row(row - 1);
        } else {
            let at = self.browsing.as_ref().map_or(self.past.len(), |b| b.0);
            if at > 0 {
                self.browse(at - 1);
            }
        }
    }

    /// A row down; at the bottom, to the question after.
    pub fn down(&mut self) {
        let (row, _) = self.place();
        if row + 1 < self.rows.len() {
            self.go_to_row(row + 1);
        } else if let Some(at) = self.browsing.as_ref().map(|b| b.0) {
            self.browse(at + 1);
        }
    }

    fn browse(&mut self, to: usize) {
        let draft = self.browsing.take().map_or_else(|| self.text.clone(), |b| b.1);
        let text = self.past.get(to).cloned().unwrap_or_else(|| draft.clone());
        self.save(false);
        self.replace(0..self.text.len(), &text);
        if to < self.past.len() {
            self.browsing = Some((to, draft));
        }
        self.layout(self.cells);
    }

    fn go_to_row(&mut self, row: usize) {
        let goal = self.goal.unwrap_or_else(|| self.place().1);
        let range = self.rows[row].clone();
        let mut used = 0;
        self.cursor = range.start;
        for (i, g) in self.text[range.clone()].grapheme_indices(true) {
            if used >= goal || g == "\n" {
                break;
            }
            used += self.measure(g);
            // The end of a row that was wrapped is the beginning of the next.
            if range.start + i + g.len() < range.end
                || range.end == self.text.len()
                || self.text[range.end..].starts_with('\n')
            {
                self.cursor = range.start + i + g.len();
            }
        }
        (self.typing, self.goal) = (false, Some(goal));
    }

    /// Cells of a grapheme.
    pub fn measure(&self, g: &str) -> usize {
        match self.attachment(g) {
            Some(a) => width(&clean(&a.label())),
            None if g == "\t" => 4,
            None => width(&clean(g)),
        }
    }

    /// Divides the text into rows of a width.
    pub fn layout(&mut self, cells: usize) {
        if self.cells == cells && !self.rows.is_empty() {
            return;
        }
        self.cells = cells;
        let mut rows = Vec::new();
        let mut at = 0;
        for line in self.text.split('\n') {
            rows.extend(ranges(line, cells, |g| self.measure(g)).into_iter().map(|r| at + r.start..at + r.end));
            at += line.len() + 1;
        }
        self.rows = rows;
    }

    /// The rows, as [`Editor::layout`] made them.
    pub fn rows(&self) -> &[Range<usize>] {
        &self.rows
    }

    /// Row and column of the cursor.
    pub fn place(&self) -> (usize, usize) {
        let row = self.rows.iter().rposition(|r| r.start <= self.cursor).unwrap_or(0);
        let Some(range) = self.rows.get(row) else { return (0, 0) };
        let before = &self.text[range.start..self.cursor.min(range.end)];
        (row, before.graphemes(true).map(|g| self.measure(g)).sum())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn editor(text: &str) -> Editor {
        let mut e = Editor::default();
        e.set(text);
        e.layout(20);
        e
    }

    #[test]
    fn motions_know_graphemes_and_words() {
        use Motion::*;
        let cases: &[(&str, &[Motion], usize)] = &[
            ("ae\u{301}", &[Left], 1),
            ("x👩‍👩‍👧", &[Left], 1),
            ("one two, three", &[WordLeft], 9),
            ("one two, three", &[WordLeft, WordLeft], 4),
            ("one two", &[Start, WordRight], 3),
            ("one two", &[Start, WordRight, WordRight], 7),
            ("你好世界", &[WordLeft], 9),
            ("a\nbc\nd", &[Left, Left, Home], 2),
            ("a\nbc\nd", &[Start, Right, Right, End], 4),
            ("", &[Left, Right, WordLeft, WordRight, Home, End], 0),
        ];
        for (text, motions, want) in cases {
            let mut e = editor(text);
            motions.iter().for_each(|&m| e.go(m));
            assert_eq!(e.cursor(), *want, "{text:?} {motions:?}");
        }
    }

    #[test]
    fn changes_are_undone_a_word_at_a_time() {
        let mut e = Editor::default();
        "one two".chars().for_each(|c| e.insert(c));
        e.delete(Motion::WordLeft);
        assert_eq!(e.text(), "one ");
        e.yank();
        assert_eq!(e.text(), "one two");
        let mut seen = Vec::new();
        for _ in 0..5 {
            e.undo();
            seen.push(e.text().to_string());
        }
        assert_eq!(seen, ["one ", "one two", "one ", "one", ""]);
        (0..9).for_each(|_| e.redo());
        assert_eq!(e.text(), "one two");
    }

    #[test]
    fn a_long_paste_is_folded_and_sent_whole() {
        let long = "0123456789\r\n".repeat(10_000);
        let mut e = editor("before ");
        assert_eq!(e.paste(&long), Some(0));
        e.insert('!');
        e.layout(40);
        assert_eq!(e.rows().len(), 1);
        assert_eq!(e.attachment(&e.text()[7..11]).unwrap().label(), "[pasted 110 kB]");
        e.set_tokens(0, 7);
        assert_eq!(e.attachments()[0].label(), "[pasted 110 kB, 7 tokens]");
        e.go(Motion::Left);
        e.go(Motion::Left);
        assert_eq!(e.cursor(), 7);
        assert_eq!(e.expanded(), format!("before {}!", long.replace('\r', "")));
        e.delete(Motion::Right);
        assert_eq!(e.take(), "before !");
        assert!(e.is_empty() && e.attachments().is_empty());
    }

    #[test]
    fn what_was_cut_with_an_attachment_goes_with_it() {
        let mut e = editor("see ");
        e.attach(4..4, Attachment { name: None, content: "x".into(), tokens: None });
        e.delete(Motion::Start);
        e.insert('a');
        assert_eq!(e.take(), "a");
        e.yank();
        assert_eq!(e.text(), "");
        e.set("text");
        e.delete(Motion::Start);
        e.insert('a');
        e.take();
        e.yank();
        assert_eq!(e.text(), "text", "text alone can still be put back");
    }

    #[test]
    fn what_is_pasted_cannot_stand_for_an_attachment() {
        let mut e = editor("");
        e.paste(&"x\n".repeat(20));
        e.paste("\u{100000}");
        e.insert('\u{100000}');
        assert_eq!(e.expanded(), format!("{}\u{fffd}\u{fffd}", "x\n".repeat(20)));
    }

    #[test]
    fn a_file_cannot_end_its_fence() {
        let a = Attachment { name: Some("a.md".into()), content: "```\nx\n````\n".into(), tokens: None };
        assert_eq!(a.expanded(), "a.md:\n`````md\n```\nx\n````\n`````\n");
    }

    #[test]
    fn up_and_down_walk_rows_and_then_questions() {
        let mut e = Editor::default();
        ["first", "second"].into_iter().for_each(|q| e.add_past(q));
        e.set("long line here\nxy\nanother line");
        e.layout(20);
        e.up();
        assert_eq!(e.place(), (1, 2));
        e.up();
        assert_eq!(e.place(), (0, 12), "the column is kept over a short row");
        e.up();
        assert_eq!(e.text(), "second");
        e.up();
        assert_eq!(e.text(), "first");
        e.up();
        assert_eq!(e.text(), "first");
        e.down();
        e.down();
        assert_eq!(e.text(), "long line here\nxy\nanother line");
        e.down();
        assert_eq!(e.text(), "long line here\nxy\nanother line");
    }

    #[test]
    fn questions_of_earlier_runs_come_before_those_of_this_one() {
        let mut e = Editor::default();
        let older = |texts: &[&str]| texts.iter().map(|t| t.to_string()).collect::<Vec<_>>();
        let walk = |e: &mut Editor, n: usize| {
            let up = |_| {
                e.up();
                e.text().to_string()
            };
            (0..n).map(up).collect::<Vec<_>>()
        };
        ["own", "both"].into_iter().for_each(|q| e.add_past(q));
        e.set_older(&older(&["old", "both", "older\r\nline"]));
        e.set("draft");
        e.layout(20);
        assert_eq!(walk(&mut e, 3), ["both", "own", "older\nline"]);
        // They are others now, and whoever walks through them does not notice.
        e.set_older(&older(&["oldest", "old", "older\nline"]));
        e.go(Motion::Start);
        assert_eq!(walk(&mut e, 3), ["old", "oldest", "oldest"]);
        (0..9).for_each(|_| e.down());
        assert_eq!(e.text(), "draft");
        // One that is asked again is the last one.
        e.add_past("old");
        assert_eq!(walk(&mut e, 4), ["old", "both", "own", "older\nline"]);
        // Those of a conversation that was deleted are gone.
        e.set_older(&[]);
        (0..9).for_each(|_| e.down());
        assert_eq!(walk(&mut e, 4), ["old", "both", "own", "own"]);
    }
}
