//! The text of a conversation, read and written.
//!
//! ```text
//! % oxcart conversation 1
//! % model SmolLM2-135M-Instruct
//!
//! % turn 1 user
//! What is two plus two?
//! % end 1 whole
//!
//! % turn 2 assistant after 1
//! Four.
//! % end 2 whole
//! ```
//!
//! A line that begins with one `%` is a mark, every other line is what was said; what was said with a `%` at the beginning
//! of a line stands there with two. The line end before a mark belongs to the mark. The marks:
//!
//! * `turn N ROLE [after PARENT]` begins a turn, `end N whole|partial|stopped` ends it, `more N` goes on with it;
//! * `head N`: the turn that the conversation stands at, where that is not the one begun last;
//! * `title TEXT`, `model TEXT`.
//!
//! Reading accepts whatever a power cut or an editor may leave: a file that ends anywhere, an unknown mark (it is text), a
//! turn whose parent was deleted. Only contradictions are errors: they name the line, and the file stays as it is.

use super::{Turn, TurnId, TurnState};
use std::collections::HashMap;

/// What every file begins with.
pub(super) const SIGN: &str = "% oxcart conversation ";
/// The version that this program writes.
const VERSION: &str = "1";
/// The largest number of a turn: far from overflow.
pub(super) const MOST_TURNS: u32 = 1 << 30;

/// What a file says.
#[derive(Default)]
pub(super) struct Contents {
    pub turns: Vec<Turn>,
    pub by_id: HashMap<TurnId, usize>,
    pub title: Option<String>,
    pub model: String,
    pub head: Option<TurnId>,
    /// The turn whose text the file ends in, without a mark that ends it.
    pub open: Option<TurnId>,
    /// Bytes of the file that are kept; the rest is a torn mark, a torn character or zeros.
    pub len: usize,
    /// Whether the header itself was torn.
    pub headless: bool,
    /// What was mended, for a person.
    pub notes: Vec<String>,
}

/// Notes that are made of a file, at most: one that is no conversation at all would have millions.
const MOST_NOTES: usize = 20;

/// A line that cannot be.
pub(super) struct Contradiction {
    pub line: usize,
    pub problem: String,
}

/// The header of a new file.
pub(super) fn header(model: &str) -> String {
    format!("{SIGN}{VERSION}\n{}", mark(&format!("model {}", one_line(model))))
}

/// A mark's line.
pub(super) fn mark(words: &str) -> String {
    format!("% {words}\n")
}

/// A text that stays in its line.
pub(super) fn one_line(text: &str) -> String {
    text.split(|c: char| c.is_control()).collect::<Vec<_>>().join(" ").trim().to_string()
}

/// The beginning of a line, for a note.
fn excerpt(line: &str) -> String {
    one_line(&line.chars().take(80).collect::<String>())
}

/// The beginning of a turn, after a blank line, which a turn before it that is still open takes for its line end.
pub(super) fn turn(id: TurnId, parent: Option<TurnId>, role: &str) -> String {
    let after = parent.map(|p| format!(" after {p}")).unwrap_or_default();
    format!("\n{}", mark(&format!("turn {id} {role}{after}")))
}

/// The end of a turn.
pub(super) fn end(id: TurnId, state: TurnState) -> String {
    mark(&format!("end {id} {}", state.name()))
}

/// Text as it is written.
pub(super) fn escape(text: &str, mut line_start: bool) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        if line_start && c == '%' {
            out.push('%');
        }
        out.push(c);
        line_start = c == '\n';
    }
    out
}

/// Whether a file begins as a conversation does, so far as it goes.
pub(super) fn is_conversation(bytes: &[u8]) -> bool {
    let n = bytes.len().min(SIGN.len());
    bytes[..n] == SIGN.as_bytes()[..n]
}

enum Mark<'a> {
    Turn(TurnId, &'a str, Option<TurnId>),
    End(TurnId, TurnState),
    More(TurnId),
    Head(TurnId),
    Title(&'a str),
    Model(&'a str),
}

fn parse_mark(line: &str) -> Option<Mark<'_>> {
    let (verb, rest) = line.strip_prefix("% ")?.split_once(' ')?;
    let id = |s: &str| s.parse().ok().filter(|n| (1..=MOST_TURNS).contains(n)).map(TurnId);
    let words: Vec<&str> = rest.split_whitespace().collect();
    Some(match (verb, words.as_slice()) {
        ("title", _) => Mark::Title(rest),
        ("model", _) => Mark::Model(rest),
        ("turn", [n, role]) => Mark::Turn(id(n)?, role, None),
        ("turn", [n, role, "after", parent]) => Mark::Turn(id(n)?, role, Some(id(parent)?)),
        ("end", [n, state]) => Mark::End(id(n)?, TurnState::ALL.into_iter().find(|s| s.name() == *state)?),
        ("more", [n]) => Mark::More(id(n)?),
        ("head", [n]) => Mark::Head(id(n)?),
        _ => return None,
    })
}

/// Whether an unfinished last line is the beginning of a mark.
fn is_torn_mark(line: &[u8]) -> bool {
    [SIGN, "% turn ", "% end ", "% more ", "% head ", "% title ", "% model "].iter().any(|m| {
        let n = m.len().min(line.len());
        line[..n] == m.as_bytes()[..n]
    })
}

/// The bytes without zeros and without half a character at the end, as a file system may leave them.
fn without_torn_end(bytes: &[u8]) -> usize {
    let zeros = bytes.iter().rev().take_while(|&&b| b == 0).count();
    let bytes = &bytes[..bytes.len() - zeros];
    let start = bytes.len() - bytes.iter().rev().take(3).take_while(|&&b| b & 0xc0 == 0x80).count();
    match start.checked_sub(1).map(|lead| (lead, std::str::from_utf8(&bytes[lead..]))) {
        Some((lead, Err(e))) if e.error_len().is_none() => lead,
        _ => bytes.len(),
    }
}

/// Reads a file.
pub(super) fn read(bytes: &[u8]) -> Result<Contents, Contradiction> {
    let mut c = Contents { len: without_torn_end(bytes), ..Contents::default() };
    if c.len < bytes.len() {
        c.note(format!("{} bytes of an unfinished write at the end are left out", bytes.len() - c.len));
    }
    let bytes = &bytes[..c.len];
    let first = bytes.iter().position(|&b| b == b'\n');
    let Some(first) = first else {
        if !is_conversation(bytes) {
            return Err(Contradiction { line: 1, problem: format!("expected {SIGN:?}, not a conversation") });
        }
        c.note("the header was not finished".into());
        (c.headless, c.len) = (true, 0);
        return Ok(c);
    };
    match bytes[..first].strip_prefix(SIGN.as_bytes()).map(|v| v.trim_ascii()) {
        Some(v) if v == VERSION.as_bytes() => {}
        Some(v) => {
            let v = String::from_utf8_lossy(&v[..v.len().min(20)]);
            return Err(Contradiction { line: 1, problem: format!("version {v:?}, expected {VERSION}") });
        }
        None => return Err(Contradiction { line: 1, problem: format!("expected {SIGN:?}, not a conversation") }),
    }
    let mut said = Said { open: None, text: Vec::new(), invalid: false };
    let mut at = first + 1;
    for (line, raw) in (2..).zip(bytes[first + 1..].split_inclusive(|&b| b == b'\n')) {
        let (start, end) = (at, at + raw.len());
        at = end;
        let is_mark = raw.starts_with(b"%") && !raw.starts_with(b"%%");
        let text = if is_mark { String::from_utf8_lossy(raw) } else { "".into() };
        let parsed = parse_mark(text.trim_end_matches(['\n', '\r']));
        // Cut short, a number may still look whole.
        let cut = !raw.ends_with(b"\n") && !matches!(parsed, Some(Mark::Title(_) | Mark::End(..)));
        if is_mark && cut && is_torn_mark(raw) {
            c.note(format!("line {line}: an unfinished mark is left out: {:?}", excerpt(&text)));
            c.len = start - usize::from(said.drop_line_end());
            break;
        }
        let Some(mark) = parsed else {
            if is_mark {
                c.note(format!("line {line}: no mark of a conversation, taken as text: {:?}", excerpt(&text)));
            }
            let raw = raw.strip_prefix(b"%").filter(|r| r.starts_with(b"%")).unwrap_or(raw);
            if said.open.is_some() {
                said.text.extend_from_slice(raw);
            } else if !raw.trim_ascii().is_empty() {
                c.note(format!("line {line}: belongs to no turn, left where it is"));
            }
            continue;
        };
        said.drop_line_end();
        said.flush(&mut c);
        c.apply(mark, line, &mut said)?;
    }
    said.flush(&mut c);
    if said.invalid {
        c.note("bytes that are no UTF-8 are shown as U+FFFD".into());
    }
    c.open = said.open.map(|i| c.turns[i].id);
    Ok(c)
}

/// The text since the last mark, and whose it is.
struct Said {
    open: Option<usize>,
    text: Vec<u8>,
    invalid: bool,
}

impl Said {
    /// Takes off the line end that belongs to a mark.
    fn drop_line_end(&mut self) -> bool {
        self.open.is_some() && self.text.pop_if(|b| *b == b'\n').is_some()
    }

    fn flush(&mut self, c: &mut Contents) {
        let text = std::mem::take(&mut self.text);
        if let Some(i) = self.open {
            let text = String::from_utf8_lossy(&text);
            self.invalid |= matches!(text, std::borrow::Cow::Owned(_));
            c.turns[i].content.push_str(&text);
        }
    }
}

impl Contents {
    fn note(&mut self, note: String) {
        match self.notes.len() {
            0..MOST_NOTES => self.notes.push(note),
            MOST_NOTES => self.notes.push("and more of the kind".into()),
            _ => (),
        }
    }

    fn apply(&mut self, mark: Mark<'_>, line: usize, said: &mut Said) -> Result<(), Contradiction> {
        let known = |c: &mut Contents, id: TurnId| {
            let found = c.by_id.get(&id).copied();
            if found.is_none() {
                c.note(format!("line {line}: there is no turn {id}"));
            }
            found
        };
        match mark {
            Mark::Turn(id, role, parent) => {
                if self.by_id.contains_key(&id) {
                    return Err(Contradiction { line, problem: format!("turn {id} again, expected another number") });
                }
                if parent == Some(id) {
                    return Err(Contradiction { line, problem: format!("turn {id} after itself") });
                }
                let parent = parent.and_then(|p| match self.by_id.contains_key(&p) {
                    true => Some(p),
                    false => {
                        self.note(format!("line {line}: turn {p} is not there, {id} follows the turn before it"));
                        self.turns.last().map(|t| t.id)
                    }
                });
                said.open = Some(self.turns.len());
                self.by_id.insert(id, self.turns.len());
                let (role, content) = (role.to_string(), String::new());
                self.turns.push(Turn { id, parent, role, content, state: TurnState::Partial });
                self.head = Some(id);
            }
            Mark::End(id, state) => {
                if let Some(i) = known(self, id) {
                    self.turns[i].state = state;
                    said.open.take_if(|open| *open == i);
                }
            }
            Mark::More(id) => {
                said.open = known(self, id);
                if let Some(i) = said.open {
                    self.turns[i].state = TurnState::Partial;
                }
            }
            Mark::Head(id) => {
                if known(self, id).is_some() {
                    self.head = Some(id);
                }
            }
            Mark::Title(t) => self.title = Some(one_line(t)).filter(|t| !t.is_empty()),
            Mark::Model(m) => self.model = one_line(m),
        }
        Ok(())
    }
}
