//! Texts as people hand them over: with escapes on the command line, with a line break at the end of a file, in bytes that
//! are not always UTF-8.

use crate::disk;
use std::io::{self, BufRead, Read};

/// Whether texts of the command line have escapes.
#[derive(clap::Args)]
pub struct EscapeArgs {
    /// Process escape sequences (\n \r \t \' \" \\ \xHH) in command-line text (default)
    #[arg(short, long, overrides_with = "no_escape")]
    escape: bool,
    /// Do not process escape sequences in command-line text
    #[arg(long, overrides_with = "escape")]
    no_escape: bool,
}

impl EscapeArgs {
    /// What is meant; `\xHH` may be half a character.
    pub fn bytes(&self, text: &str) -> Vec<u8> {
        if self.no_escape && !self.escape { text.as_bytes().to_vec() } else { unescaped(text) }
    }

    /// What is meant, where only characters will do.
    pub fn text(&self, text: &str) -> String {
        String::from_utf8_lossy(&self.bytes(text)).into_owned()
    }
}

/// A text without escapes, as llama.cpp has them: a backslash before anything else stands for itself.
fn unescaped(text: &str) -> Vec<u8> {
    let mut out = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&b, after)) = rest.split_first() {
        rest = after;
        let (meant, taken) = match (b, after) {
            (b'\\', [b'n', ..]) => (b'\n', 1),
            (b'\\', [b'r', ..]) => (b'\r', 1),
            (b'\\', [b't', ..]) => (b'\t', 1),
            (b'\\', [c @ (b'\'' | b'"' | b'\\'), ..]) => (*c, 1),
            (b'\\', [b'x', high, low, ..]) => match (digit(*high), digit(*low)) {
                (Some(high), Some(low)) => (16 * high + low, 3),
                _ => (b, 0),
            },
            _ => (b, 0),
        };
        out.push(meant);
        rest = &rest[taken..];
    }
    out
}

fn digit(b: u8) -> Option<u8> {
    char::from(b).to_digit(16).map(|d| d as u8)
}

/// A text without the line break that editors put at its end.
pub fn without_line_break(bytes: &[u8]) -> &[u8] {
    bytes.strip_suffix(b"\n").unwrap_or(bytes)
}

/// Says where a text is not UTF-8; its bytes are read as they are, as llama.cpp does.
pub fn note_bytes(name: &str, bytes: &[u8]) {
    if let Err(e) = std::str::from_utf8(bytes) {
        let (at, line) = (e.valid_up_to(), disk::line_of(bytes, e.valid_up_to()));
        tell!("{name}: line {line}: byte 0x{:02x} is not UTF-8; such bytes are read as they are", bytes[at]);
    }
}

/// Lines that a person writes, or a program.
pub struct Lines<R> {
    from: R,
    name: &'static str,
    read: usize,
    noted: bool,
}

impl<R: BufRead> Lines<R> {
    /// The lines of what has this name.
    pub fn new(name: &'static str, from: R) -> Lines<R> {
        Lines { from, name, read: 0, noted: false }
    }

    /// The next one, without its end, if there is one. What is no character becomes U+FFFD; the first such byte is told of.
    pub fn next(&mut self) -> io::Result<Option<String>> {
        let mut bytes = Vec::new();
        let most = disk::MOST_TEXT;
        self.from.by_ref().take(most + 1).read_until(b'\n', &mut bytes)?;
        if bytes.is_empty() {
            return Ok(None);
        }
        self.read += 1;
        if bytes.len() as u64 > most {
            let problem = format!("line {}: larger than {most} bytes, the most that is read", self.read);
            return Err(io::Error::other(problem));
        }
        let line = bytes.strip_suffix(b"\n").unwrap_or(&bytes);
        let line = line.strip_suffix(b"\r").unwrap_or(line);
        if let Err(e) = std::str::from_utf8(line)
            && !std::mem::replace(&mut self.noted, true)
        {
            let byte = line[e.valid_up_to()];
            tell!("{}: line {}: byte 0x{byte:02x} is not UTF-8; such bytes are read as U+FFFD", self.name, self.read);
        }
        Ok(Some(String::from_utf8_lossy(line).into_owned()))
    }
}

#[cfg(test)]
mod tests {
    use super::{Lines, unescaped};

    #[test]
    fn lines_end_as_they_do_everywhere() {
        let mut lines = Lines::new("text", &b"a\n\nb\r\n\xff\r\xc3\xa4"[..]);
        for want in [Some("a"), Some(""), Some("b"), Some("\u{fffd}\r\u{e4}"), None, None] {
            assert_eq!(lines.next().expect("it is read").as_deref(), want);
        }
    }

    #[test]
    fn escapes_are_llama_cpp_s() {
        let cases: &[(&str, &[u8])] = &[
            (r"a\nb\tc\rd", b"a\nb\tc\rd"),
            (r#"\"\'\\n"#, b"\"'\\n"),
            (r"\x41\xe4\xff", b"A\xe4\xff"),
            (r"\x4", br"\x4"),
            (r"\xzz\q\", br"\xzz\q\"),
            ("\\ä", "\\ä".as_bytes()),
            ("", b""),
        ];
        for (text, want) in cases {
            assert_eq!(unescaped(text), *want, "{text:?}");
        }
    }
}
