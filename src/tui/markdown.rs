//! Markdown to lines, as it comes.
//!
//! A [`Document`] is rendered again and again while its source grows. Blocks that have ended stay as they are; only the
//! last one is parsed anew, and of a fenced block only the lines that came since. So a frame costs the same at the end of
//! a long answer as at its beginning.

use super::highlight::Highlighter;
use super::theme::Theme;
use super::wrap::{clean, cut, ranges, width, wrap};
use pulldown_cmark::{Alignment, CodeBlockKind, Event, Options, Parser, Tag, TagEnd};
use ratatui::style::{Modifier, Style};
use ratatui::text::{Line, Span};
use std::borrow::Cow;
use std::ops::Range;
use unicode_width::UnicodeWidthStr;

/// Columns of a table become no narrower than so many cells.
const NARROW: usize = 8;
/// Deeper nesting is drawn no further in: a stranger's text may nest without end.
const MOST_DEPTH: usize = 8;

/// A rendered text, and how far it will not change any more.
pub struct Document {
    /// What is drawn.
    pub lines: Vec<Line<'static>>,
    /// The contents of its code blocks.
    pub codes: Vec<String>,
    cells: usize,
    theme: Theme,
    seen: usize,                 // bytes of source rendered
    done: (usize, usize, usize), // bytes of source, lines and code blocks of the blocks that have ended
    fence: Option<Fence>,
}

/// The last block, if it is fenced: what of it has been drawn.
struct Fence {
    start: usize, // in the source
    name: String,
    drawn: usize, // bytes of code
    lines: usize, // of the document, up to there
    next: Highlighter,
}

impl Document {
    /// An empty one, `cells` wide.
    pub fn new(cells: usize, theme: Theme) -> Document {
        let (lines, codes) = (Vec::new(), Vec::new());
        Document { lines, codes, cells: cells.max(8), theme, seen: 0, done: (0, 0, 0), fence: None }
    }

    /// Renders `source`, which begins with what it was the last time; a shorter one is another. `last` says that it will not grow.
    pub fn update(&mut self, source: &str, last: bool) {
        if source.len() < self.seen {
            *self = Document::new(self.cells, self.theme);
        }
        if source.len() == self.seen && !last {
            return;
        }
        self.seen = source.len();
        let (from, lines, codes) = self.done;
        let tail = emphasis(formulas(&source[from..]));
        let options =
            Options::ENABLE_TABLES | Options::ENABLE_STRIKETHROUGH | Options::ENABLE_TASKLISTS | Options::ENABLE_MATH;
        let events: Vec<(Event, Range<usize>)> =
            Parser::new_ext(&tail, options).into_offset_iter().map(|(e, at)| (with_punctuation(e), at)).collect();
        let blocks = top_blocks(&events);
        let start = |i: usize| from + events[blocks[i].start].1.start;
        let code = |i: usize| match &events[blocks[i].start].0 {
            Event::Start(Tag::CodeBlock(kind)) => Some(language(kind)),
            _ => None,
        };
        // A fence that is still the same goes on where it was left.
        let same = |f: &Fence| blocks.len() == 1 && !last && f.start == start(0) && code(0) == Some(&f.name);
        self.fence = self.fence.take().filter(same);
        self.lines.truncate(self.fence.as_ref().map_or(lines, |f| f.lines));
        self.codes.truncate(codes);
        // What comes may still change the last block, and join it with the one before: a row of a table or an item of a
        // list begins as a paragraph. Code joins with nothing.
        let n = blocks.len();
        let ended = if n > 1 && (code(n - 1).is_some() || code(n - 2).is_some()) { n - 1 } else { n.saturating_sub(2) };
        for (i, block) in blocks.iter().enumerate() {
            if i > 0 && i == ended {
                self.done = (start(i), self.lines.len(), self.codes.len());
            }
            if let (Some(name), true) = (code(i), i + 1 == n) {
                self.last_fence(name, start(i), &events[block.clone()], last);
                continue;
            }
            if !self.lines.is_empty() {
                self.lines.push(Line::default());
            }
            let mut r = Renderer::new(self);
            events[block.clone()].iter().for_each(|(e, _)| r.event(e));
            r.flush();
        }
    }

    /// A code block at the end, of which only what is new is rendered.
    fn last_fence(&mut self, name: &str, start: usize, events: &[(Event, Range<usize>)], last: bool) {
        let text = |e: &(Event, Range<usize>)| if let Event::Text(t) = &e.0 { Some(t.to_string()) } else { None };
        let code: String = events.iter().filter_map(text).collect();
        let mut f = match self.fence.take() {
            Some(f) => f,
            None => {
                if !self.lines.is_empty() {
                    self.lines.push(Line::default());
                }
                self.lines.push(code_head(name, self.codes.len() + 1, &self.theme));
                let (lines, next) = (self.lines.len(), Highlighter::new(name));
                Fence { start, name: name.to_string(), drawn: 0, lines, next }
            }
        };
        let whole = if last { code.len() } else { code.rfind('\n').map_or(0, |i| i + 1) };
        // A fence that closes takes the line back that looked like code.
        if whole < f.drawn {
            self.codes.push(code);
            return;
        }
        for line in code[f.drawn..whole].lines() {
            self.lines.extend(code_line(line, &mut f.next, &[], self.cells, &self.theme));
        }
        (f.drawn, f.lines) = (whole, self.lines.len());
        if whole < code.len() {
            // A line that is still growing: drawn plain, coloured when it has ended.
            let mut plain = Highlighter::new("");
            self.lines.extend(code_line(&code[whole..], &mut plain, &[], self.cells, &self.theme));
        }
        self.codes.push(code);
        self.fence = Some(f);
    }
}

/// The events of each top-level block.
fn top_blocks(events: &[(Event, Range<usize>)]) -> Vec<Range<usize>> {
    let (mut out, mut depth, mut start) = (Vec::new(), 0usize, 0);
    for (i, (e, _)) in events.iter().enumerate() {
        match e {
            Event::Start(_) => {
                if depth == 0 {
                    start = i;
                }
                depth += 1;
            }
            Event::End(_) => {
                depth = depth.saturating_sub(1);
                if depth == 0 {
                    out.push(start..i + 1);
                }
            }
            _ if depth == 0 => out.push(i..i + 1),
            _ => {}
        }
    }
    out
}

/// LaTeX's `\(…\)` and `\[…\]` as `$…$` and `$$…$$`, each mark in as many bytes as before, outside code. Markdown would
/// take their backslashes and underscores for its own.
fn formulas(source: &str) -> Cow<'_, str> {
    if !source.contains("\\(") && !source.contains("\\[") {
        return Cow::Borrowed(source);
    }
    let mut out = source.as_bytes().to_vec();
    let (mut fenced, mut at) = (false, 0);
    for line in source.split_inclusive('\n') {
        if line.trim_start().starts_with("```") || line.trim_start().starts_with("~~~") {
            fenced = !fenced;
        } else if !fenced {
            let b = line.as_bytes();
            let mut ticks = false;
            for i in 0..b.len().saturating_sub(1) {
                ticks ^= b[i] == b'`';
                if ticks || b[i] != b'\\' || (i > 0 && b[i - 1] == b'\\') {
                    continue;
                }
                // A dollar opens only before a letter, and closes only after one.
                let mark: &[u8] = match (b[i + 1], b.get(i + 2) == Some(&b' '), i > 0 && b[i - 1] == b' ') {
                    (b'(', true, _) => b"  $",
                    (b'(', false, _) => b" $",
                    (b')', _, true) => {
                        out[at + i - 1] = b'$';
                        b"  "
                    }
                    (b')', _, false) => b"$ ",
                    (b'[' | b']', ..) => b"$$",
                    _ => continue,
                };
                out[at + i..at + i + mark.len()].copy_from_slice(mark);
            }
        }
        at += line.len();
    }
    // Only ASCII was put in the place of ASCII.
    String::from_utf8(out).map_or(Cow::Borrowed(source), Cow::Owned)
}

/// Punctuation of Chinese and Japanese, all of three bytes.
const WIDE: &[char] = &[
    '，', '。', '；', '：', '！', '？', '、', '（', '）', '「', '」', '『', '』', '《', '》', '【', '】', '“', '”',
    '‘', '’', '…',
];
/// The first of the private characters that stand for them, of three bytes as well.
const STANDS_FOR: u32 = 0xe000;

/// Text whose wide punctuation beside asterisks is hidden from CommonMark: it would not let `**注意：**这` begin or end
/// emphasis where no space stands on the other side, and Chinese has none.
fn emphasis(source: Cow<'_, str>) -> Cow<'_, str> {
    let private = |c: char| (c as u32).wrapping_sub(STANDS_FOR) < WIDE.len() as u32;
    if !source.contains('*') || !source.contains(WIDE) || source.contains(private) {
        return source;
    }
    let chars: Vec<char> = source.chars().collect();
    let mut out = chars.clone();
    let mut i = 0;
    while i < chars.len() {
        let run = chars[i..].iter().take_while(|&&c| c == '*').count();
        if run > 0 && i > 0 && i + run < chars.len() {
            let beside = [(i - 1, i + run), (i + run, i - 1)];
            for (mark, _) in beside.into_iter().filter(|&(_, letter)| chars[letter].is_alphanumeric()) {
                if let Some(n) = WIDE.iter().position(|&c| c == chars[mark]) {
                    out[mark] = char::from_u32(STANDS_FOR + n as u32).expect("a private character");
                }
            }
        }
        i += run.max(1);
    }
    Cow::Owned(out.into_iter().collect())
}

/// An event with the punctuation that [`emphasis`] hid.
fn with_punctuation(e: Event<'_>) -> Event<'_> {
    let back = |s: &str| -> String {
        s.chars().map(|c| WIDE.get((c as u32).wrapping_sub(STANDS_FOR) as usize).copied().unwrap_or(c)).collect()
    };
    match e {
        Event::Text(s) if s.contains(|c: char| c >= '\u{e000}') => Event::Text(back(&s).into()),
        Event::Code(s) if s.contains(|c: char| c >= '\u{e000}') => Event::Code(back(&s).into()),
        e => e,
    }
}

fn language<'a>(kind: &'a CodeBlockKind) -> &'a str {
    match kind {
        CodeBlockKind::Fenced(info) => info.split_whitespace().next().unwrap_or_default(),
        CodeBlockKind::Indented => "",
    }
}

/// What stands above a code block: its language and the number that `/copy` knows it by.
fn code_head(name: &str, n: usize, t: &Theme) -> Line<'static> {
    let name = if name.is_empty() { "code" } else { name };
    Line::from(vec![Span::styled("╭ ", t.rule), Span::styled(format!("{} · {n}", clean(name)), t.dim)])
}

fn code_line(line: &str, h: &mut Highlighter, prefix: &[Span<'static>], cells: usize, t: &Theme) -> Vec<Line<'static>> {
    let line = clean(line);
    let spans = h.line(&line, t);
    let mark = |s: &'static str| [prefix, &[Span::styled(s, t.rule)]].concat();
    let (first, rest) = (mark("│ "), mark("│ "));
    let room = cells.saturating_sub(first.iter().map(|s| width(&s.content)).sum());
    // Code breaks anywhere: its spaces mean something.
    let mut out = Vec::new();
    for (i, r) in broken(&line, room).into_iter().enumerate() {
        let mut spans_of_line = if i == 0 { first.clone() } else { rest.clone() };
        cut(&spans, r, &mut spans_of_line);
        out.push(Line::from(spans_of_line));
    }
    out
}

/// Ranges of at most `cells`, broken between any two graphemes.
fn broken(line: &str, cells: usize) -> Vec<Range<usize>> {
    use unicode_segmentation::UnicodeSegmentation;
    let (mut out, mut start, mut used) = (Vec::new(), 0, 0);
    for (i, g) in line.grapheme_indices(true) {
        if used + g.width() > cells.max(2) && i > start {
            out.push(start..i);
            (start, used) = (i, 0);
        }
        used += g.width();
    }
    out.push(start..line.len());
    out
}

/// What a line of a nested block begins with.
struct Prefix {
    first: Option<Span<'static>>, // used up by the first line
    rest: Span<'static>,
}

/// Draws the events of one block.
struct Renderer<'d> {
    doc: &'d mut Document,
    prefixes: Vec<Prefix>,
    lists: Vec<Option<u64>>,
    styles: Vec<Style>,
    spans: Vec<Span<'static>>,
    link: Option<String>,
    code: Option<(String, String)>, // language, text
    table: Option<Table>,
    gap: bool, // whether an empty line comes before the next block
}

#[derive(Default)]
struct Table {
    alignments: Vec<Alignment>,
    rows: Vec<Vec<Vec<Span<'static>>>>,
}

impl<'d> Renderer<'d> {
    fn new(doc: &'d mut Document) -> Renderer<'d> {
        let styles = vec![doc.theme.text];
        Renderer {
            doc,
            prefixes: Vec::new(),
            lists: Vec::new(),
            styles,
            spans: Vec::new(),
            link: None,
            code: None,
            table: None,
            gap: false,
        }
    }

    fn style(&self) -> Style {
        self.styles.last().copied().unwrap_or_default()
    }

    fn push_style(&mut self, s: Style) {
        let style = self.style().patch(s);
        self.styles.push(style);
    }

    fn text(&mut self, s: &str, style: Style) {
        let s = clean(s).into_owned();
        if !s.is_empty() {
            self.spans.push(Span::styled(s, style));
        }
    }

    /// The prefix of the next line, and of those after it.
    fn prefix(&mut self) -> (Vec<Span<'static>>, Vec<Span<'static>>) {
        let rest: Vec<_> = self.prefixes.iter().take(MOST_DEPTH).map(|p| p.rest.clone()).collect();
        let first =
            self.prefixes.iter_mut().take(MOST_DEPTH).map(|p| p.first.take().unwrap_or(p.rest.clone())).collect();
        (first, rest)
    }

    fn space(&mut self) {
        if std::mem::take(&mut self.gap) {
            let rest: Vec<_> = self.prefixes.iter().take(MOST_DEPTH).map(|p| p.rest.clone()).collect();
            self.doc.lines.push(Line::from(rest));
        }
    }

    /// Writes the paragraph that has been collected.
    fn flush(&mut self) {
        if self.spans.is_empty() {
            return;
        }
        self.space();
        let spans = std::mem::take(&mut self.spans);
        for line in spans.split(|s| s.content == "\n") {
            let (first, rest) = self.prefix();
            wrap(line, self.doc.cells, &first, &rest, &mut self.doc.lines);
        }
    }

    fn event(&mut self, e: &Event) {
        let t = self.doc.theme;
        match e {
            Event::Start(tag) => self.start(tag),
            Event::End(tag) => self.end(tag),
            Event::Text(s) => match &mut self.code {
                Some((_, code)) => code.push_str(s),
                None => self.text(s, self.style()),
            },
            Event::Code(s) => self.text(s, self.style().patch(t.code)),
            Event::InlineMath(s) => self.text(s, self.style().patch(t.code)),
            Event::DisplayMath(s) => {
                self.flush();
                for line in s.trim().lines() {
                    let (first, rest) = self.prefix();
                    let indent = [first, vec![Span::raw("  ")]].concat();
                    let rest = [rest, vec![Span::raw("  ")]].concat();
                    wrap(
                        &[Span::styled(clean(line).into_owned(), t.code)],
                        self.doc.cells,
                        &indent,
                        &rest,
                        &mut self.doc.lines,
                    );
                }
            }
            Event::Html(s) | Event::InlineHtml(s) => {
                for (i, line) in s.trim_end_matches('\n').split('\n').enumerate() {
                    if i > 0 {
                        self.spans.push(Span::raw("\n"));
                    }
                    self.text(line, t.dim);
                }
            }
            Event::SoftBreak => self.text(" ", self.style()),
            Event::HardBreak => self.spans.push(Span::raw("\n")),
            Event::Rule => {
                self.flush();
                self.space();
                let (first, _) = self.prefix();
                let room = self.doc.cells.saturating_sub(first.len() * 2).min(40);
                self.doc.lines.push(Line::from([first, vec![Span::styled("─".repeat(room), t.rule)]].concat()));
                self.gap = true;
            }
            Event::TaskListMarker(done) => self.text(if *done { "☒ " } else { "☐ " }, t.accent),
            Event::FootnoteReference(s) => self.text(&format!("[{s}]"), t.dim),
        }
    }

    fn start(&mut self, tag: &Tag) {
        let t = self.doc.theme;
        match tag {
            Tag::Heading { level, .. } => {
                self.flush();
                let mark = "#".repeat(*level as usize);
                self.push_style(t.heading);
                self.spans.push(Span::styled(format!("{mark} "), t.dim));
            }
            Tag::BlockQuote(_) => {
                self.flush();
                self.push_style(t.quote);
                self.prefixes.push(Prefix { first: None, rest: Span::styled("▎ ", t.rule) });
            }
            Tag::CodeBlock(kind) => {
                self.flush();
                self.code = Some((language(kind).to_string(), String::new()));
            }
            Tag::List(first) => {
                self.flush();
                self.lists.push(*first);
                self.gap &= self.lists.len() == 1;
            }
            Tag::Item => {
                self.flush();
                self.gap = false;
                let bullet = ["• ", "◦ ", "▪ "][(self.lists.len().max(1) - 1) % 3];
                let mark = match self.lists.last_mut() {
                    Some(Some(n)) => {
                        let mark = format!("{n}. ");
                        *n = n.saturating_add(1);
                        mark
                    }
                    _ => bullet.to_string(),
                };
                let rest = Span::raw(" ".repeat(width(&mark)));
                self.prefixes.push(Prefix { first: Some(Span::styled(mark, t.accent)), rest });
            }
            Tag::Emphasis => self.push_style(Style::new().add_modifier(Modifier::ITALIC)),
            Tag::Strong => self.push_style(Style::new().add_modifier(Modifier::BOLD)),
            Tag::Strikethrough => self.push_style(Style::new().add_modifier(Modifier::CROSSED_OUT)),
            Tag::Link { dest_url, .. } | Tag::Image { dest_url, .. } => {
                self.link = Some(dest_url.to_string());
                self.push_style(t.link);
            }
            Tag::Table(alignments) => {
                self.flush();
                self.table = Some(Table { alignments: alignments.clone(), rows: Vec::new() });
            }
            Tag::TableHead | Tag::TableRow => {
                if let Some(table) = &mut self.table {
                    table.rows.push(Vec::new());
                }
                if matches!(tag, Tag::TableHead) {
                    self.push_style(Style::new().add_modifier(Modifier::BOLD));
                }
            }
            _ => {}
        }
    }

    fn end(&mut self, tag: &TagEnd) {
        let t = self.doc.theme;
        match tag {
            TagEnd::Paragraph | TagEnd::HtmlBlock => {
                self.flush();
                self.gap = true;
            }
            TagEnd::Heading(_) => {
                self.styles.pop();
                self.flush();
                self.gap = true;
            }
            TagEnd::BlockQuote(_) => {
                self.flush();
                self.styles.pop();
                self.prefixes.pop();
                self.gap = true;
            }
            TagEnd::CodeBlock => {
                let Some((name, code)) = self.code.take() else { return };
                self.space();
                let (first, rest) = self.prefix();
                let head = code_head(&name, self.doc.codes.len() + 1, &t);
                self.doc.lines.push(Line::from([first, head.spans].concat()));
                let mut h = Highlighter::new(&name);
                for line in code.lines() {
                    self.doc.lines.extend(code_line(line, &mut h, &rest, self.doc.cells, &t));
                }
                self.doc.codes.push(code);
                self.gap = true;
            }
            TagEnd::List(_) => {
                self.lists.pop();
                self.gap = true;
            }
            TagEnd::Item => {
                self.flush();
                // An item without text still shows its mark.
                if self.prefixes.last().is_some_and(|p| p.first.is_some()) {
                    let (first, _) = self.prefix();
                    self.doc.lines.push(Line::from(first));
                }
                self.prefixes.pop();
            }
            TagEnd::Emphasis | TagEnd::Strong | TagEnd::Strikethrough => _ = self.styles.pop(),
            TagEnd::Link | TagEnd::Image => {
                self.styles.pop();
                let shown = self.spans.last().map(|s| s.content.to_string()).unwrap_or_default();
                if let Some(url) = self.link.take().filter(|u| *u != shown && !u.is_empty()) {
                    self.text(&format!(" ({url})"), t.dim);
                }
            }
            TagEnd::TableCell => {
                let spans = std::mem::take(&mut self.spans);
                if let Some(row) = self.table.as_mut().and_then(|t| t.rows.last_mut()) {
                    row.push(spans);
                }
            }
            TagEnd::TableHead => _ = self.styles.pop(),
            TagEnd::Table => {
                if let Some(table) = self.table.take() {
                    self.space();
                    let (first, _) = self.prefix();
                    let room = self.doc.cells.saturating_sub(first.iter().map(|s| width(&s.content)).sum());
                    for line in table.lines(room, &t) {
                        self.doc.lines.push(Line::from([first.clone(), line].concat()));
                    }
                }
                self.gap = true;
            }
            _ => {}
        }
    }
}

impl Table {
    fn lines(&self, room: usize, t: &Theme) -> Vec<Vec<Span<'static>>> {
        let columns = self.rows.iter().map(Vec::len).max().unwrap_or(0);
        if columns == 0 {
            return Vec::new();
        }
        let cells = |c: &[Span]| c.iter().map(|s| width(&s.content)).sum::<usize>();
        let mut widths: Vec<usize> = (0..columns)
            .map(|i| self.rows.iter().filter_map(|r| r.get(i)).map(|c| cells(c)).max().unwrap_or(0).max(1))
            .collect();
        // The widest give way. Where columns would become too narrow to be read, each row becomes a list.
        let inner = room.saturating_sub(3 * (columns - 1));
        while widths.iter().sum::<usize>() > inner {
            match widths.iter_mut().max() {
                Some(w) if *w > NARROW => *w -= 1,
                _ => return self.list(room, t),
            }
        }
        let mut out = Vec::new();
        for (n, row) in self.rows.iter().enumerate() {
            let wrapped: Vec<Vec<Vec<Span>>> = (0..columns)
                .map(|i| {
                    let spans = row.get(i).map_or(&[][..], |c| &c[..]);
                    let text: String = spans.iter().map(|s| s.content.as_ref()).collect();
                    let parts = ranges(&text, widths[i], UnicodeWidthStr::width).into_iter().map(|r| {
                        let end = r.start + text[r.clone()].trim_end_matches(' ').len();
                        let mut part = Vec::new();
                        cut(spans, r.start..end, &mut part);
                        part
                    });
                    parts.collect()
                })
                .collect();
            for y in 0..wrapped.iter().map(Vec::len).max().unwrap_or(1) {
                let mut line = Vec::new();
                for (i, cell) in wrapped.iter().enumerate() {
                    if i > 0 {
                        line.push(Span::styled(" │ ", t.rule));
                    }
                    let part = cell.get(y).cloned().unwrap_or_default();
                    let free = widths[i].saturating_sub(cells(&part));
                    let left = match self.alignments.get(i) {
                        Some(Alignment::Right) => free,
                        Some(Alignment::Center) => free / 2,
                        _ => 0,
                    };
                    line.push(Span::raw(" ".repeat(left)));
                    line.extend(part);
                    if i + 1 < columns {
                        line.push(Span::raw(" ".repeat(free - left)));
                    }
                }
                out.push(line);
            }
            if n == 0 {
                let rule: Vec<String> = widths.iter().map(|w| "─".repeat(*w)).collect();
                out.push(vec![Span::styled(rule.join("─┼─"), t.rule)]);
            }
        }
        out
    }

    /// A line for each cell, its column's name before it.
    fn list(&self, room: usize, t: &Theme) -> Vec<Vec<Span<'static>>> {
        let Some((names, rows)) = self.rows.split_first() else { return Vec::new() };
        let mut lines = Vec::new();
        for (n, row) in rows.iter().enumerate() {
            if n > 0 {
                lines.push(Line::styled("─".repeat(room.min(NARROW)), t.rule));
            }
            for (i, cell) in row.iter().enumerate() {
                let mut spans = names.get(i).cloned().unwrap_or_default();
                spans.push(Span::styled(": ", t.dim));
                spans.extend(cell.iter().cloned());
                wrap(&spans, room, &[], &[Span::raw("  ")], &mut lines);
            }
        }
        if rows.is_empty() {
            wrap(&names.join(&Span::raw(" · ")), room, &[], &[], &mut lines);
        }
        lines.into_iter().map(|l| l.spans).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::super::theme::Scheme;
    use super::*;

    const ALL: &str = "# Title\n\nA *slanted* and **bold** text with `code`, [a link](https://x.y) and more words\nin it.\n\n\
        - one\n- two\n  1. inner\n  2. second\n- three\n\n> quoted\n> text\n\n```rust\nfn main() {}\n// end\n```\n\n\
        | a | b |\n|---|--:|\n| 你好 | 1 |\n| long cell text | 22 |\n\n---\n\nMath \\(a_1 + b_1\\) and $x_2$.\n\n\
        \\[ \\frac{a}{b} \\]\n\ncosts $5 and $6\n";

    fn render(source: &str, cells: usize) -> Vec<String> {
        let mut d = Document::new(cells, Theme::new(Scheme::None));
        d.update(source, true);
        d.lines.iter().map(|l| l.to_string().trim_end().to_string()).collect()
    }

    #[test]
    fn everything_is_drawn() {
        let want = "# Title\n\nA slanted and bold text with code, a link\n(https://x.y) and more words in it.\n\n• one\n• two\n  \
            1. inner\n  2. second\n• three\n\n▎ quoted text\n\n╭ rust · 1\n│ fn main() {}\n│ // end\n\na              │  b\n\
            ───────────────┼───\n你好           │  1\nlong cell text │ 22\n\n\
            ────────────────────────────────────────\n\nMath  a_1 + b_1  and x_2.\n\n  \\frac{a}{b}\n\ncosts $5 and $6";
        assert_eq!(render(ALL, 44).join("\n"), want);
    }

    #[test]
    fn emphasis_needs_no_spaces_in_chinese() {
        for (source, want) in [
            ("**注意：**这是一个测试。", "注意：这是一个测试。"),
            ("他说**“你好”**然后走了", "他说“你好”然后走了"),
            ("`**注意：**这` 2 * 3", "**注意：**这 2 * 3"),
        ] {
            assert_eq!(render(source, 80), [want]);
        }
    }

    #[test]
    fn what_grows_looks_in_the_end_as_what_came_at_once() {
        for cells in [12, 30, 80] {
            let mut grown = Document::new(cells, Theme::new(Scheme::Dark));
            for (end, _) in ALL.char_indices() {
                grown.update(&ALL[..end], false);
            }
            grown.update(ALL, true);
            let mut whole = Document::new(cells, Theme::new(Scheme::Dark));
            whole.update(ALL, true);
            assert_eq!(grown.lines, whole.lines, "{cells} cells");
            assert_eq!(grown.codes, whole.codes);
        }
    }

    #[test]
    fn no_line_is_wider_than_the_screen() {
        let long = format!("{ALL}{}\n\n```\n{}\n```\n", "很长的文字".repeat(40), "x".repeat(300));
        for cells in [10, 17, 40] {
            let wide: Vec<_> = render(&long, cells).into_iter().filter(|l| width(l) > cells).collect();
            assert!(wide.is_empty(), "{cells}: {wide:?}");
        }
    }

    #[test]
    fn a_table_that_does_not_fit_becomes_a_list() {
        let table = "| name | kind | what |\n|---|---|---|\n| temp | float | heat of the draw |\n| 名字 | 整数 | b |\n";
        let want = [
            "name: temp",
            "kind: float",
            "what: heat of the",
            "  draw",
            "────────",
            "name: 名字",
            "kind: 整数",
            "what: b",
        ];
        assert_eq!(render(table, 20), want);
        assert!(render(table, 40)[0].starts_with("name │ kind  │ what"));
        assert_eq!(render("| one | two | three |\n|---|---|---|\n", 12), ["one · two ·", "three"]);
    }

    #[test]
    fn hostile_text_is_only_text() {
        for text in [
            &">".repeat(5000),
            &"- ".repeat(3000),
            &"[".repeat(5000),
            &"*".repeat(5000),
            &"|a".repeat(2000),
            "\u{1b}[2J\u{202e}x",
            "```\u{1b}]52;c;x\u{7}\n\u{9b}31m",
            "\\(",
            "a\\[",
        ] {
            for line in render(text, 20) {
                assert!(!line.contains(|c: char| c.is_control() || c == '\u{202e}'), "{line:?}");
            }
        }
    }
}
