//! The conversation as rows of the screen. What does not change is laid out once; of an answer that grows, its end.

use super::markdown::Document;
use super::theme::Theme;
use super::tree::{Node, Tree};
use super::wrap::{clean, wrap};
use crate::chat::history::TurnState;
use ratatui::text::{Line, Span};
use std::collections::{HashMap, HashSet};
use std::ops::Range;

/// Rows of a question or a system prompt that are shown while it is folded.
const FOLDED: usize = 14;
/// Rows of a thought that are shown while it grows.
const THOUGHT: usize = 3;

/// The rows.
#[derive(Default)]
pub struct Transcript {
    entries: HashMap<usize, Entry>,
    places: Vec<Place>,
    /// Rows of all turns.
    pub height: usize,
    /// Turns whose thoughts and long texts are unfolded.
    pub open: HashSet<usize>,
    /// Whether all are.
    pub all_open: bool,
    look: Option<(usize, Theme)>,
}

/// Where a turn stands.
#[derive(Clone, Debug, PartialEq)]
pub struct Place {
    /// The turn.
    pub node: usize,
    /// Its rows.
    pub rows: Range<usize>,
}

/// What a turn's rows depend on besides its text, which only grows.
#[derive(PartialEq, Clone)]
struct Stamp {
    bytes: usize,
    state: TurnState,
    growing: bool,
    open: bool,
    branch: (usize, usize),
    figures: bool,
    left_out: bool,
}

struct Entry {
    stamp: Stamp,
    head: Vec<Line<'static>>,
    thought: Option<Thought>,
    gap: Option<Line<'static>>, // between thought and answer
    body: Option<Document>,
    foot: Vec<Line<'static>>,
}

impl Entry {
    /// Its rows, one part after the other.
    fn parts(&self) -> [&[Line<'static>]; 5] {
        let thought = self.thought.as_ref().map_or(&[][..], |t| &t.rows[t.from..]);
        let body = self.body.as_ref().map_or(&[][..], |b| &b.lines);
        [&self.head, thought, self.gap.as_slice(), body, &self.foot]
    }

    fn rows(&self) -> usize {
        self.parts().iter().map(|p| p.len()).sum()
    }

    fn line(&self, mut i: usize) -> Option<&Line<'static>> {
        for part in self.parts() {
            match part.get(i) {
                Some(line) => return Some(line),
                None => i -= part.len(),
            }
        }
        None
    }
}

/// A thought as rows. It grows like an answer; what of it has been laid out stays.
#[derive(Default)]
struct Thought {
    rows: Vec<Line<'static>>,
    ended: (usize, usize), // bytes and rows of the lines that have ended
    from: usize,           // the first row that is shown
}

impl Thought {
    /// Lays out `text`, which begins with what it was the last time.
    fn update(&mut self, text: &str, cells: usize, t: &Theme) {
        let rows = |text: &str| plain(text, cells, &[Span::styled("┊ ", t.rule)], t.quote, usize::MAX).0;
        if text.len() < self.ended.0 {
            // What looked like a line of it was the beginning of its end.
            *self = Thought::default();
        }
        let (bytes, kept) = self.ended;
        self.rows.truncate(kept);
        let (ended, growing) = text[bytes..].split_at(text[bytes..].rfind('\n').map_or(0, |i| i + 1));
        self.rows.extend(rows(ended));
        self.ended = (bytes + ended.len(), self.rows.len());
        self.rows.extend(rows(growing));
    }
}

/// An answer's thought (and whether it has ended), and the answer.
pub fn thought(content: &str) -> Option<(&str, bool, &str)> {
    let rest = content.trim_start().strip_prefix("<think>")?;
    Some(match rest.split_once("</think>") {
        Some((thought, answer)) => (thought.trim(), true, answer.trim_start()),
        None => (rest.trim(), false, ""),
    })
}

impl Transcript {
    /// Lays out the branch at which the conversation stands, `cells` wide. `growing` is the turn that is being answered;
    /// the first `left_out` questions and answers are not read by the model.
    pub fn layout(&mut self, tree: &Tree, cells: usize, theme: Theme, growing: Option<usize>, left_out: usize) {
        if self.look != Some((cells, theme)) {
            self.entries.clear();
            self.look = Some((cells, theme));
        }
        self.places.clear();
        let (mut row, mut said) = (0, 0);
        let branches = tree.branches();
        for i in tree.path() {
            let node = &tree.nodes[i];
            said += usize::from(node.role != "system");
            let siblings = branches.get(&(node.parent, node.role.as_str())).map_or(&[][..], |s| s);
            let stamp = Stamp {
                bytes: node.content.len(),
                state: node.state,
                growing: growing == Some(i),
                open: self.all_open || self.open.contains(&i),
                branch: (siblings.iter().position(|&s| s == i).unwrap_or(0), siblings.len()),
                figures: node.figures.is_some(),
                left_out: left_out > 0 && said == left_out && node.role != "system",
            };
            if self.entries.get(&i).is_none_or(|e| e.stamp != stamp) {
                let old = self.entries.remove(&i);
                self.entries.insert(i, entry(node, stamp, old, cells, theme));
            }
            // An empty row before each turn but the first.
            let start = row + usize::from(row > 0);
            row = start + self.entries[&i].rows();
            self.places.push(Place { node: i, rows: start..row });
        }
        self.height = row;
    }

    /// Forgets what was laid out: the turns are others now.
    pub fn clear(&mut self) {
        self.entries.clear();
        self.open.clear();
    }

    /// Where the turns stand.
    pub fn places(&self) -> &[Place] {
        &self.places
    }

    /// The turn of a row and what stands there; no text between turns.
    pub fn row(&self, row: usize) -> (Option<usize>, Option<&Line<'static>>) {
        let i = self.places.partition_point(|p| p.rows.end <= row);
        match self.places.get(i) {
            Some(p) if p.rows.contains(&row) => (Some(p.node), self.entries[&p.node].line(row - p.rows.start)),
            _ => (None, None),
        }
    }

    /// The code blocks of a turn.
    pub fn codes(&self, node: usize) -> &[String] {
        self.entries.get(&node).and_then(|e| e.body.as_ref()).map_or(&[], |b| &b.codes)
    }

    /// The rows in which a text stands, in any case; it may go on over the end of a row.
    pub fn find(&self, needle: &str) -> Vec<usize> {
        let needle: String = needle.to_lowercase().split_whitespace().collect::<Vec<_>>().join(" ");
        let mut found = Vec::new();
        if needle.is_empty() {
            return found;
        }
        for p in &self.places {
            let entry = &self.entries[&p.node];
            let (mut text, mut starts) = (String::new(), Vec::new());
            for i in 0..p.rows.len() {
                starts.push(text.len());
                let line = entry.line(i).map(Line::to_string).unwrap_or_default().to_lowercase();
                for word in line.split_whitespace() {
                    text.push_str(word);
                    text.push(' ');
                }
            }
            for (at, _) in text.match_indices(&needle) {
                found.push(p.rows.start + starts.partition_point(|&s| s <= at) - 1);
            }
        }
        found.dedup();
        found
    }
}

fn entry(node: &Node, stamp: Stamp, old: Option<Entry>, cells: usize, t: Theme) -> Entry {
    let (mut head, mut foot) = (Vec::new(), Vec::new());
    let (mut thinking, mut gap, mut body) = (None, None, None);
    if stamp.branch.1 > 1 {
        let text = format!("‹ {} of {} ›", stamp.branch.0 + 1, stamp.branch.1);
        head.push(Line::styled(text, t.dim));
    }
    match node.role.as_str() {
        "assistant" => {
            let (thought, answer) = match thought(&node.content) {
                Some((text, ended, answer)) => (Some((text, ended)), answer),
                None => (None, node.content.as_str()),
            };
            let old = old.filter(|o| o.stamp.bytes <= stamp.bytes && o.stamp.growing);
            let (old_thought, old_body) = old.map_or((None, None), |o| (o.thought, o.body));
            if let Some((text, ended)) = thought {
                let words = text.split_whitespace().count();
                let (mark, verb) = (if stamp.open { "▾" } else { "▸" }, if ended { "thought" } else { "thinking" });
                head.push(Line::styled(format!("{mark} {verb}, {words} words"), t.dim));
                if stamp.open || !ended && stamp.growing {
                    let mut rows = old_thought.unwrap_or_default();
                    rows.update(text, cells, &t);
                    rows.from = if stamp.open { 0 } else { rows.rows.len().saturating_sub(THOUGHT) };
                    thinking = Some(rows);
                }
                gap = (!answer.is_empty()).then(Line::default);
            }
            let mut d = old_body.unwrap_or_else(|| Document::new(cells, t));
            d.update(answer, !stamp.growing);
            body = Some(d);
            match node.state {
                _ if stamp.growing => {}
                TurnState::Stopped => foot.push(Line::styled("■ stopped · Alt-C goes on", t.warn)),
                TurnState::Partial => foot.push(Line::styled("■ cut off · Alt-C goes on", t.warn)),
                TurnState::Whole => {}
            }
            if let Some(f) = &node.figures {
                foot.push(Line::styled(f.clone(), t.dim));
            }
        }
        role => {
            let (style, first) = match role {
                "system" => (t.quote, vec![Span::styled("system ", t.dim)]),
                _ => (t.text, Vec::new()),
            };
            let most = if stamp.open { usize::MAX } else { FOLDED };
            let (rows, cut) = plain(&node.content, cells, &[], style, most);
            head.extend(rows);
            if role == "system" && node.content.is_empty() {
                head.push(Line::styled("no system prompt", t.quote));
            }
            if !first.is_empty() && !head.is_empty() {
                let mut rows = Vec::new();
                let text = head.remove(0);
                wrap(&text.spans, cells, &first, &[], &mut rows);
                head.splice(0..0, rows);
            }
            if cut {
                let lines = node.content.lines().count();
                let text = format!("▸ {lines} lines, {:.1} kB · Ctrl-T unfolds", node.content.len() as f64 / 1e3);
                head.push(Line::styled(text, t.dim));
            }
        }
    }
    if stamp.left_out {
        foot.push(Line::styled("╌╌ the model no longer reads what stands above ╌╌", t.warn));
    }
    Entry { stamp, head, thought: thinking, gap, body, foot }
}

/// Text as it was typed, at most so many rows, and whether there would be more.
fn plain(
    text: &str,
    cells: usize,
    mark: &[Span<'static>],
    style: ratatui::style::Style,
    most: usize,
) -> (Vec<Line<'static>>, bool) {
    let mut rows = Vec::new();
    for line in text.lines() {
        // Of a line without end only what can be seen is laid out.
        let bytes = most.saturating_mul(cells).saturating_mul(4).min(line.len());
        let end = (bytes..=line.len()).find(|&i| line.is_char_boundary(i)).unwrap_or(line.len());
        wrap(&[Span::styled(clean(&line[..end]).into_owned(), style)], cells, mark, mark, &mut rows);
        if rows.len() > most {
            rows.truncate(most.saturating_sub(2));
            return (rows, true);
        }
    }
    (rows, false)
}

#[cfg(test)]
mod tests {
    use super::super::theme::Scheme;
    use super::*;

    fn rows(t: &Transcript) -> Vec<String> {
        (0..t.height).map(|r| t.row(r).1.map(Line::to_string).unwrap_or_default()).collect()
    }

    #[test]
    fn turns_follow_one_another() {
        let theme = Theme::new(Scheme::None);
        let mut tree = Tree::default();
        let q = tree.push(None, "user", &"line\n".repeat(40), TurnState::Whole);
        tree.push(Some(q), "assistant", "first", TurnState::Whole);
        let a = tree.push(Some(q), "assistant", "<think>\nhm, a b\n</think>\n\nA *b*.", TurnState::Stopped);
        let mut t = Transcript::default();
        t.layout(&tree, 30, theme, None, 0);
        let mut want = vec!["line"; 12];
        want.extend(["▸ 40 lines, 0.2 kB · Ctrl-T unfolds", "", "‹ 2 of 2 ›", "▸ thought, 3 words", "", "A b."]);
        want.push("■ stopped · Alt-C goes on");
        assert_eq!(rows(&t), want);
        assert_eq!(t.find("A  B"), [15 + 2], "found in the answer, the thought being folded");
        t.open.insert(a);
        t.layout(&tree, 30, theme, None, 0);
        assert!(rows(&t).contains(&"┊ hm, a b".to_string()));
        assert_eq!(t.find("unfolds a"), [] as [usize; 0], "no match goes over two turns");
    }

    #[test]
    fn a_growing_answer_ends_as_one_that_came_whole() {
        let theme = Theme::new(Scheme::None);
        let text = "<think>\none two\n\nthree, and more than a row has room for\n</think>\n# Head\n\nsome *text*\n\n- a\n- \
            b\n\n```c\nint x;\n```\n";
        for open in [false, true] {
            let mut tree = Tree::default();
            let a = tree.push(None, "assistant", "", TurnState::Partial);
            let look = || Transcript { all_open: open, ..Transcript::default() };
            let mut grown = look();
            for (end, _) in text.char_indices() {
                tree.nodes[a].content = text[..end].into();
                grown.layout(&tree, 24, theme, Some(a), 0);
                let mut whole = look();
                whole.layout(&tree, 24, theme, Some(a), 0);
                assert_eq!(rows(&grown), rows(&whole));
            }
            tree.nodes[a].content = text.into();
            tree.nodes[a].state = TurnState::Whole;
            grown.layout(&tree, 24, theme, None, 0);
            let mut whole = look();
            whole.layout(&tree, 24, theme, None, 0);
            assert_eq!(rows(&grown), rows(&whole));
            assert_eq!(whole.codes(a), ["int x;\n"]);
        }
    }

    /// Models think for tens of thousands of tokens: a token must not cost what all before it did.
    #[test]
    fn what_was_thought_is_laid_out_once() {
        let theme = Theme::new(Scheme::None);
        for open in [false, true] {
            let mut tree = Tree::default();
            let a = tree.push(None, "assistant", "<think>\nfirst line\n", TurnState::Partial);
            let mut t = Transcript { all_open: open, ..Transcript::default() };
            let mut first = Vec::new();
            for _ in 0..5 {
                tree.nodes[a].content.push_str("another line\nand");
                t.layout(&tree, 24, theme, Some(a), 0);
                let rows = &t.entries[&a].thought.as_ref().unwrap().rows;
                first.push(rows[0].spans.as_ptr());
            }
            first.dedup();
            assert_eq!(first.len(), 1);
            // Nor at all where it is folded.
            tree.nodes[a].content.push_str("\n</think>\nanswer");
            t.layout(&tree, 24, theme, Some(a), 0);
            assert_eq!(t.entries[&a].thought.is_some(), open);
        }
    }
}
