//! One file made of parts: finding them, mapping them, reading across their seams.

use super::{Blame, GgufError};
use crate::mmap::{self, Bytes};
use memmap2::Mmap;
use std::fmt::Display;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// A file name of the form `PREFIX-00001-of-00003.gguf`.
pub(super) struct Split {
    prefix: PathBuf,
    pub count: u32,
}

impl Split {
    /// What the name says, where it has that form.
    pub fn of(path: &Path) -> Option<Split> {
        let stem = path.file_name()?.to_str()?.strip_suffix(".gguf")?;
        let (rest, count) = stem.rsplit_once("-of-")?;
        let (prefix, no) = rest.rsplit_once('-')?;
        let five = |s: &str| (s.len() == 5 && s.bytes().all(|b| b.is_ascii_digit())).then(|| s.parse::<u32>().ok()).flatten();
        let (no, count) = (five(no)?, five(count)?);
        (1..=count).contains(&no).then(|| Split { prefix: path.with_file_name(prefix), count })
    }

    /// The path of part `no`, counted from 0.
    pub fn part(&self, no: u32) -> PathBuf {
        let mut name = self.prefix.clone().into_os_string();
        name.push(format!("-{:05}-of-{:05}.gguf", no + 1, self.count));
        name.into()
    }
}

/// The files of which `path` is one, where it is named as a piece of a file cut by size; else itself alone.
pub(super) fn raw_parts(path: &Path) -> Vec<PathBuf> {
    let alone = vec![path.to_path_buf()];
    let Some(name) = path.file_name().and_then(|n| n.to_str()) else { return alone };
    // NAME.part1of2
    if let Some((stem, tail)) = name.rsplit_once(".part")
        && let Some((no, count)) = tail.split_once("of")
        && let (Ok(no), Ok(count)) = (no.parse::<u32>(), count.parse::<u32>())
        && (1..=count).contains(&no)
        && count <= 1000
    {
        return (1..=count).map(|i| path.with_file_name(format!("{stem}.part{i}of{count}"))).collect();
    }
    // NAME-split-a, NAME.gguf.a, NAME.gguf.aa
    let (stem, tail) = match name.rsplit_once("-split-").map(|(s, t)| (format!("{s}-split-"), t)) {
        Some(found) => found,
        None => match name.rsplit_once(".gguf.") {
            Some((s, t)) => (format!("{s}.gguf."), t),
            None => return alone,
        },
    };
    if !(1..=2).contains(&tail.len()) || !tail.bytes().all(|b| b.is_ascii_lowercase()) {
        return alone;
    }
    let letter = |i: u32| char::from(b'a' + (i % 26) as u8);
    let label = |i: u32| match tail.len() {
        1 => letter(i).to_string(),
        _ => format!("{}{}", letter(i / 26), letter(i)),
    };
    let most = 26u32.pow(tail.len() as u32);
    let found: Vec<PathBuf> = (0..most)
        .map(|i| path.with_file_name(format!("{stem}{}", label(i))))
        .take_while(|p| p.exists())
        .collect();
    // A gap before the file that was named shows itself as a file without its beginning or its middle.
    if found.iter().any(|p| p == path) { found } else { alone }
}

/// Mapped files, one after another.
pub(super) struct Span {
    parts: Vec<(u64, Arc<Mmap>)>, // where each begins
    len: u64,
}

impl Span {
    /// Maps the files; the error names the one that failed.
    pub fn open(files: &[PathBuf]) -> Result<Span, (PathBuf, io::Error)> {
        let (mut parts, mut len) = (Vec::new(), 0);
        for f in files {
            let m = mmap::map(f).map_err(|e| (f.clone(), e))?;
            parts.push((len, m.clone()));
            len += m.len() as u64;
        }
        Ok(Span { parts, len })
    }

    /// Bytes in all.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// A view of `len` bytes, which must be inside; a copy where they lie in more than one file.
    pub fn view(&self, at: u64, len: usize) -> Bytes {
        let i = self.parts.partition_point(|p| p.0 <= at) - 1;
        let (start, map) = &self.parts[i];
        let from = (at - start) as usize;
        if from + len <= map.len() {
            return Bytes::mapped(map.clone(), from..from + len);
        }
        let mut whole = Vec::with_capacity(len);
        let mut from = from;
        for (_, map) in &self.parts[i..] {
            let take = (map.len() - from).min(len - whole.len());
            whole.extend_from_slice(&map[from..from + take]);
            from = 0;
        }
        Bytes::owned(whole)
    }
}

/// Reads a span from its beginning.
pub(super) struct Cursor<'a> {
    span: &'a Span,
    at: u64,
    blame: Blame<'a>,
}

impl<'a> Cursor<'a> {
    pub fn new(span: &'a Span, blame: Blame<'a>) -> Cursor<'a> {
        Cursor { span, at: 0, blame }
    }

    pub fn position(&self) -> u64 {
        self.at
    }

    /// Back to where `position` was.
    pub fn rewind(&mut self, at: u64) {
        self.at = at;
    }

    /// Bytes until the end.
    pub fn left(&self) -> u64 {
        self.span.len - self.at
    }

    pub fn error(&self, field: impl Display, problem: impl Display) -> GgufError {
        self.blame.at(field, problem)
    }

    /// The next `n` bytes, where there are as many.
    pub fn take(&mut self, field: impl Display, n: u64) -> Result<Bytes, GgufError> {
        if n > self.left() {
            let problem = format!("{n} bytes at {}, past the end of a file of {}", self.at, self.span.len);
            return Err(self.blame.at(field, problem));
        }
        let bytes = self.span.view(self.at, n as usize);
        self.at += n;
        Ok(bytes)
    }

    pub fn bytes<const N: usize>(&mut self, field: impl Display) -> Result<[u8; N], GgufError> {
        let mut b = [0; N];
        match self.read_exact(&mut b) {
            Ok(()) => Ok(b),
            Err(_) => Err(self.blame.at(field, format_args!("the file ends at byte {}", self.span.len))),
        }
    }

    pub fn u32(&mut self, field: impl Display) -> Result<u32, GgufError> {
        self.bytes(field).map(u32::from_le_bytes)
    }

    pub fn u64(&mut self, field: impl Display) -> Result<u64, GgufError> {
        self.bytes(field).map(u64::from_le_bytes)
    }

    /// A length and that many bytes of UTF-8.
    pub fn string(&mut self, field: impl Display, most: u64) -> Result<String, GgufError> {
        let n = self.u64(&field)?;
        if n > most {
            return Err(self.blame.at(field, format_args!("{n} bytes long, expected at most {most}")));
        }
        let bytes = self.take(&field, n)?;
        match std::str::from_utf8(&bytes) {
            Ok(s) => Ok(s.to_string()),
            Err(_) => Err(self.blame.at(field, "not UTF-8")),
        }
    }
}

impl Read for Cursor<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        if self.left() == 0 {
            return Ok(0);
        }
        let i = self.span.parts.partition_point(|p| p.0 <= self.at) - 1;
        let (start, map) = &self.span.parts[i];
        let rest = &map[(self.at - start) as usize..];
        let n = rest.len().min(buf.len());
        buf[..n].copy_from_slice(&rest[..n]);
        self.at += n as u64;
        Ok(n)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn split_names_parse() {
        let s = Split::of(Path::new("/x/a-00002-of-00003.gguf")).unwrap();
        assert_eq!((s.count, s.part(0)), (3, PathBuf::from("/x/a-00001-of-00003.gguf")));
        for not in ["a.gguf", "a-00000-of-00003.gguf", "a-00004-of-00003.gguf", "a-1-of-3.gguf", "a-00001-of-00003.bin"] {
            assert!(Split::of(Path::new(not)).is_none(), "{not}");
        }
    }

    #[test]
    fn raw_parts_are_found_from_any_of_them() {
        let dir = tempfile::tempdir().unwrap();
        let touch = |n: &str| std::fs::write(dir.path().join(n), b"x").unwrap();
        ["m.gguf.a", "m.gguf.b", "m.gguf.c", "n-split-a", "n-split-b", "o.gguf"].map(touch);
        for (given, want) in [
            ("m.gguf.b", vec!["m.gguf.a", "m.gguf.b", "m.gguf.c"]),
            ("n-split-a", vec!["n-split-a", "n-split-b"]),
            ("p.gguf.part2of2", vec!["p.gguf.part1of2", "p.gguf.part2of2"]),
            ("o.gguf", vec!["o.gguf"]),
        ] {
            let want: Vec<PathBuf> = want.into_iter().map(|n| dir.path().join(n)).collect();
            assert_eq!(raw_parts(&dir.path().join(given)), want);
        }
    }
}
