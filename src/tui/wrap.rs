//! Text to lines that fit a width, counted in cells of the terminal.
//!
//! Lines break where Unicode allows it (UAX 14), so Chinese breaks between characters but not before a full stop, and a
//! word that is wider than the line breaks between graphemes. Text stays in logical order: terminals that know how to
//! write from right to left do so themselves. What could upset the screen (control characters, direction overrides) is
//! not shown.

use ratatui::text::{Line, Span};
use std::borrow::Cow;
use std::ops::Range;
use unicode_segmentation::UnicodeSegmentation;
use unicode_width::UnicodeWidthStr;

/// Cells that a text takes.
pub fn width(s: &str) -> usize {
    if s.is_ascii() { s.len() } else { s.graphemes(true).map(UnicodeWidthStr::width).sum() }
}

/// Whether a character is never shown.
fn hidden(c: char) -> bool {
    (c.is_control() && c != '\n' && c != '\t')
        || matches!(c, '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}' | '\u{200e}' | '\u{200f}' | '\u{2028}' | '\u{2029}')
        // Without width, or a cell wide, as the terminal likes.
        || matches!(c, '\u{ad}' | '\u{200b}' | '\u{2060}' | '\u{feff}')
}

/// A text without what is never shown, tabs as four spaces.
pub fn clean(s: &str) -> Cow<'_, str> {
    if !s.contains(|c| c == '\t' || hidden(c)) {
        return Cow::Borrowed(s);
    }
    let mut out = String::with_capacity(s.len());
    for c in s.chars().filter(|&c| !hidden(c)) {
        if c == '\t' { out.push_str("    ") } else { out.push(c) }
    }
    Cow::Owned(out)
}

/// Divides one line of text (no line ends in it) into ranges of at most `width` cells, spaces at the end not counted.
/// `measure` gives the cells of a grapheme.
pub fn ranges(text: &str, width: usize, measure: impl Fn(&str) -> usize) -> Vec<Range<usize>> {
    let width = width.max(2);
    let mut out = Vec::new();
    let (mut start, mut used, mut at) = (0, 0, 0);
    for (end, _) in unicode_linebreak::linebreaks(text) {
        let word = &text[at..end];
        let cells: usize = word.graphemes(true).map(&measure).sum();
        let spaces = word.len() - word.trim_end_matches(' ').len();
        if used + cells - spaces > width && at > start {
            out.push(start..at);
            (start, used) = (at, 0);
        }
        if used + cells - spaces > width {
            for (i, g) in word.trim_end_matches(' ').grapheme_indices(true) {
                let cells = measure(g);
                if used + cells > width && at + i > start {
                    out.push(start..at + i);
                    (start, used) = (at + i, 0);
                }
                used += cells;
            }
            used += spaces;
        } else {
            used += cells;
        }
        at = end;
    }
    out.push(start..text.len());
    out
}

/// Wraps styled text into lines. The first begins with `first`, the others with `rest`; both count.
pub fn wrap(
    spans: &[Span<'static>],
    width: usize,
    first: &[Span<'static>],
    rest: &[Span<'static>],
    out: &mut Vec<Line<'static>>,
) {
    let cells = |p: &[Span]| p.iter().map(|s| self::width(&s.content)).sum::<usize>();
    let room = width.saturating_sub(cells(first).max(cells(rest)));
    let text: String = spans.iter().map(|s| s.content.as_ref()).collect();
    for (i, r) in ranges(&text, room, UnicodeWidthStr::width).into_iter().enumerate() {
        let end = r.start + text[r.clone()].trim_end_matches(' ').len();
        let mut line = if i == 0 { first.to_vec() } else { rest.to_vec() };
        cut(spans, r.start..end, &mut line);
        out.push(Line::from(line));
    }
}

/// The part of styled text that a byte range of its characters covers.
pub fn cut(spans: &[Span<'static>], range: Range<usize>, out: &mut Vec<Span<'static>>) {
    let mut at = 0;
    for s in spans {
        let (from, to) = (range.start.max(at), range.end.min(at + s.content.len()));
        if from < to {
            out.push(Span::styled(s.content[from - at..to - at].to_string(), s.style));
        }
        at += s.content.len();
    }
}

/// A text cut to a width, with an ellipsis where something was cut.
pub fn ellipsis(s: &str, width: usize) -> String {
    let s = clean(s);
    if self::width(&s) <= width {
        return s.into_owned();
    }
    let mut out = String::new();
    let mut used = 1;
    for g in s.graphemes(true) {
        used += g.width();
        if used > width {
            break;
        }
        out.push_str(g);
    }
    if width > 0 { out + "…" } else { out }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_fit_and_nothing_is_lost() {
        let cases: &[(&str, usize, &[&str])] = &[
            ("a few words that go on", 10, &["a few", "words that", "go on"]),
            ("unbreakablelongword and", 8, &["unbreaka", "blelongw", "ord and"]),
            ("你好世界，再见。", 8, &["你好世", "界，再", "见。"]),
            ("e\u{301}e\u{301}e\u{301}e\u{301}", 2, &["e\u{301}e\u{301}", "e\u{301}e\u{301}"]),
            ("👩‍👩‍👧 👍🏽 x", 5, &["👩‍👩‍👧 👍🏽", "x"]),
            ("مرحبا بالعالم", 8, &["مرحبا", "بالعالم"]),
            ("", 8, &[""]),
        ];
        let mut wrong = Vec::new();
        for (text, width, want) in cases {
            let mut lines = Vec::new();
            wrap(&[Span::raw(text.to_string())], *width, &[], &[], &mut lines);
            let got: Vec<String> = lines.iter().map(Line::to_string).collect();
            if got != *want {
                wrong.push(format!("{text:?}: {got:?}, expected {want:?}"));
            }
            wrong.extend(
                got.iter().filter(|l| super::width(l) > *width).map(|l| format!("{l:?} is wider than {width}")),
            );
        }
        assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    }

    #[test]
    fn what_upsets_a_screen_is_not_shown() {
        assert_eq!(clean("a\u{1b}[31mb\u{202e}c\td\r"), "a[31mbc    d");
        assert_eq!(ellipsis("你好世界", 5), "你好…");
        assert_eq!(ellipsis("short", 5), "short");
        assert_eq!(ellipsis("anything", 0), "");
    }

    #[test]
    fn prefixes_count() {
        let mut lines = Vec::new();
        wrap(&[Span::raw("one two three")], 7, &[Span::raw("• ")], &[Span::raw("  ")], &mut lines);
        let got: Vec<String> = lines.iter().map(Line::to_string).collect();
        assert_eq!(got, ["• one", "  two", "  three"]);
    }
}
