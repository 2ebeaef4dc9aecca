//! One file made of parts: finding them, mapping them, reading across their seams.

use super::{Blame, GgufError};
use crate::mmap::Bytes;
use std::borrow::Cow;
use std::fmt::Display;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

/// A file name of the form `PREFIX-00002-of-00003.gguf`, as gguf-split writes it.
pub(super) struct Split {
    prefix: PathBuf,
    /// Which part it is, from 0.
    pub no: u32,
    /// How many there are.
    pub count: u32,
}

impl Split {
    /// What the name says, where it has that form.
    pub fn of(path: &Path) -> Option<Split> {
        let stem = path.file_name()?.to_str()?.strip_suffix(".gguf")?;
        let (rest, count) = stem.rsplit_once("-of-")?;
        let (prefix, no) = rest.rsplit_once('-')?;
        let five = |s: &str| (s.len() == 5 && s.bytes().all(|b| b.is_ascii_digit())).then(|| s.parse::<u32>().ok())?;
        let (no, count) = (five(no)?, five(count)?);
        (1..=count).contains(&no).then(|| Split { prefix: path.with_file_name(prefix), no: no - 1, count })
    }

    /// The path of part `no`, counted from 0.
    pub fn part(&self, no: u32) -> PathBuf {
        split_name(&self.prefix, no, self.count)
    }
}

/// `PREFIX-00001-of-00003.gguf` for `no` 0 of `count` 3.
pub(super) fn split_name(prefix: &Path, no: u32, count: u32) -> PathBuf {
    let mut name = prefix.as_os_str().to_owned();
    name.push(format!("-{:05}-of-{count:05}.gguf", no + 1));
    name.into()
}

/// How pieces of a file that was cut by size are called after their common stem.
enum Label<'a> {
    /// `part1of2`: the digits of the number at least, the count, and the count as it is written
    Of { width: usize, count: u32, total: &'a str },
    /// `a`, `b` … or `aa`, `ab` …, as split(1) counts
    Letters { width: usize },
    /// `00`, `01` …, as `split -d` counts
    Digits { width: usize },
}

impl Label<'_> {
    /// The label of piece `i`, counted from 0; `None` past the last that has one.
    fn write(&self, i: u32) -> Option<String> {
        match *self {
            Label::Of { width, count, total } => (i < count).then(|| format!("{:0width$}of{total}", i + 1)),
            Label::Digits { width } => Some(format!("{i:0width$}")).filter(|s| s.len() == width),
            Label::Letters { width } => {
                let mut rest = i;
                let mut letters: Vec<u8> = Vec::with_capacity(width);
                for _ in 0..width {
                    letters.push(b'a' + (rest % 26) as u8);
                    rest /= 26;
                }
                letters.reverse();
                (rest == 0).then(|| String::from_utf8_lossy(&letters).into_owned())
            }
        }
    }
}

/// The stem that the pieces share, and how they are told apart, where a name is such a piece's.
fn raw_label(name: &str) -> Option<(&str, Label<'_>)> {
    let digits = |s: &str| !s.is_empty() && s.bytes().all(|b| b.is_ascii_digit());
    // NAME.part1of2, NAME-part01of12
    if let Some((head, total)) = name.rsplit_once("of") {
        let stem = head.trim_end_matches(|c: char| c.is_ascii_digit());
        let (no, width) = (&head[stem.len()..], head.len() - stem.len());
        if stem.ends_with("part") && digits(no) && digits(total) && no.len().max(total.len()) <= 5 {
            let count = total.parse().ok()?;
            // `part1of10` counts without leading zeros, `part01of10` with them.
            let width = if no.starts_with('0') { width } else { 1 };
            return Some((stem, Label::Of { width, count, total }));
        }
    }
    // After ".gguf": .a, .aa, -split-a, .part-aa, .00, .part0; and split(1)'s bare -split-a of any name.
    let (head, tail) = match name.rsplit_once(".gguf") {
        Some((head, tail)) => (head.len() + ".gguf".len(), tail),
        None => {
            let at = name.rfind("-split-")?;
            (at, &name[at..])
        }
    };
    let word = tail.trim_start_matches(['.', '-', '_']);
    let word = ["split", "part"].iter().find_map(|w| word.strip_prefix(w)).unwrap_or(word);
    let label = word.trim_start_matches(['.', '-', '_']);
    if label.is_empty() || label.len() == tail.len() {
        return None;
    }
    let stem = &name[..head + tail.len() - label.len()];
    match label.len() {
        1..=3 if label.bytes().all(|b| b.is_ascii_lowercase()) => Some((stem, Label::Letters { width: label.len() })),
        1..=5 if digits(label) => Some((stem, Label::Digits { width: label.len() })),
        _ => None,
    }
}

/// The files that make up one.
#[derive(PartialEq, Eq, Debug)]
pub(super) struct RawParts {
    /// In their order.
    pub files: Vec<PathBuf>,
    /// A piece that should stand before the one that was given, and is not there.
    pub missing: Option<PathBuf>,
}

/// The files of which `path` is one, where it is named as a piece of a file cut by size; else itself alone.
pub(super) fn raw_parts(path: &Path) -> RawParts {
    let alone = |missing| RawParts { files: vec![path.to_path_buf()], missing };
    let name = path.file_name().and_then(|n| n.to_str()).unwrap_or_default();
    let Some((stem, label)) = raw_label(name) else { return alone(None) };
    let piece = |i: u32| label.write(i).map(|l| path.with_file_name(format!("{stem}{l}")));
    // Numbers begin with 0 or with 1.
    let first = match label {
        Label::Digits { .. } if !piece(0).is_some_and(|p| p.exists()) => 1,
        _ => 0,
    };
    let files: Vec<PathBuf> = (first..).map_while(piece).take_while(|p| p.exists()).collect();
    let next = piece(first + files.len() as u32);
    let counted = matches!(label, Label::Of { .. });
    match files.iter().any(|p| p == path) {
        true => RawParts { files, missing: next.filter(|_| counted) },
        // Perhaps no piece at all: `model.gguf.bak` is only named like one.
        false => alone(next),
    }
}

/// Mapped files, one after another, as one file.
pub(super) struct Span {
    parts: Vec<(u64, Bytes)>, // where each begins
    len: u64,
}

impl Span {
    /// Maps the files; the error names the one that failed.
    pub fn open(files: &[PathBuf]) -> Result<Span, (PathBuf, io::Error)> {
        let (mut parts, mut len) = (Vec::with_capacity(files.len()), 0);
        for f in files {
            let bytes = Bytes::map(f).map_err(|e| (f.clone(), e))?;
            let n = bytes.len() as u64;
            parts.push((len, bytes));
            len += n;
        }
        Ok(Span { parts, len })
    }

    /// Bytes in all.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// The bytes from `at` to the end of the part in which they lie.
    fn rest_of_part(&self, at: u64) -> &[u8] {
        let i = self.parts.partition_point(|p| p.0 <= at).saturating_sub(1);
        match self.parts.get(i) {
            Some((start, bytes)) => bytes.get((at - start) as usize..).unwrap_or_default(),
            None => &[],
        }
    }

    /// The file in which the byte at `at` lies.
    pub fn file(&self, at: u64) -> Option<&Path> {
        let i = self.parts.partition_point(|p| p.0 <= at).checked_sub(1)?;
        self.parts[i].1.path()
    }

    /// A view of `len` bytes, which must be inside; a copy where they lie in more than one file.
    pub fn view(&self, at: u64, len: usize) -> Bytes {
        let i = self.parts.partition_point(|p| p.0 <= at).saturating_sub(1);
        let (start, bytes) = &self.parts[i];
        let from = (at - start) as usize;
        if len <= bytes.len() - from {
            return bytes.slice(from..from + len);
        }
        let mut whole = Vec::with_capacity(len);
        while whole.len() < len {
            let rest = self.rest_of_part(at + whole.len() as u64);
            whole.extend_from_slice(&rest[..rest.len().min(len - whole.len())]);
        }
        Bytes::owned(whole)
    }
}

/// Reads a span from its beginning.
pub(super) struct Cursor<'a> {
    span: &'a Span,
    at: u64,
    chunk: &'a [u8], // from `at` to the end of a part
    /// Memory that may still be taken for what is decoded, in bytes.
    budget: u64,
    blame: Blame<'a>,
}

impl<'a> Cursor<'a> {
    pub fn new(span: &'a Span, budget: u64, blame: Blame<'a>) -> Cursor<'a> {
        Cursor { span, at: 0, chunk: span.rest_of_part(0), budget, blame }
    }

    pub fn position(&self) -> u64 {
        self.at
    }

    /// Back, or forward, to `at`, which must be inside.
    pub fn seek(&mut self, at: u64) {
        self.at = at;
        self.chunk = self.span.rest_of_part(at);
    }

    /// Bytes until the end.
    pub fn left(&self) -> u64 {
        self.span.len - self.at
    }

    pub fn error(&self, field: impl Display, problem: impl Display) -> GgufError {
        self.blame.at(field, problem)
    }

    /// Memory that may still be taken.
    pub fn budget(&self) -> u64 {
        self.budget
    }

    /// Takes memory from the budget.
    pub fn charge(&mut self, field: impl Display, n: u64) -> Result<(), GgufError> {
        match self.budget.checked_sub(n) {
            Some(left) => self.budget = left,
            None => return Err(self.error(field, format_args!("{n} bytes more than metadata may take in memory"))),
        }
        Ok(())
    }

    fn advance(&mut self, n: usize) {
        match self.chunk.get(n..) {
            Some(rest) if !rest.is_empty() => (self.at, self.chunk) = (self.at + n as u64, rest),
            _ => self.seek(self.at + n as u64),
        }
    }

    /// The next `n` bytes, if there are as many; copied only across a seam.
    pub fn bytes(&mut self, field: impl Display, n: u64) -> Result<Cow<'a, [u8]>, GgufError> {
        if n > self.left() {
            return Err(self.end(field));
        }
        let n = n as usize;
        if let Some(bytes) = self.chunk.get(..n) {
            self.advance(n);
            return Ok(Cow::Borrowed(bytes));
        }
        self.charge(field, n as u64)?;
        let copy = self.span.view(self.at, n).to_vec();
        self.seek(self.at + n as u64);
        Ok(Cow::Owned(copy))
    }

    /// The error of a file that ends too early.
    pub fn end(&self, field: impl Display) -> GgufError {
        self.error(field, format_args!("cut short: the file ends at byte {}", self.span.len))
    }

    fn array<const N: usize>(&mut self, field: impl Display) -> Result<[u8; N], GgufError> {
        if let Some(bytes) = self.chunk.first_chunk::<N>() {
            self.advance(N);
            return Ok(*bytes);
        }
        let mut out = [0; N];
        out.copy_from_slice(&self.bytes(field, N as u64)?);
        Ok(out)
    }

    pub fn magic(&mut self) -> Result<[u8; 4], GgufError> {
        self.array("magic")
    }

    pub fn u32(&mut self, field: impl Display) -> Result<u32, GgufError> {
        self.array(field).map(u32::from_le_bytes)
    }

    pub fn u64(&mut self, field: impl Display) -> Result<u64, GgufError> {
        self.array(field).map(u64::from_le_bytes)
    }

    /// A length, at most `most`, and that many bytes of UTF-8.
    pub fn str(&mut self, field: impl Display, most: u64) -> Result<Cow<'a, str>, GgufError> {
        let n = self.u64(&field)?;
        if n > most {
            return Err(self.error(field, format_args!("a string of {n} bytes, expected at most {most}")));
        }
        let text = match self.bytes(&field, n)? {
            Cow::Borrowed(b) => std::str::from_utf8(b).map(Cow::Borrowed).ok(),
            Cow::Owned(b) => String::from_utf8(b).map(Cow::Owned).ok(),
        };
        text.ok_or_else(|| self.error(field, "not UTF-8"))
    }

    /// The bytes from an earlier position to this one. A copy, where a seam lies between, is taken from the budget.
    pub fn since(&mut self, field: impl Display, from: u64) -> Result<Bytes, GgufError> {
        let n = (self.at - from) as usize;
        if n > self.span.rest_of_part(from).len() {
            self.charge(field, n as u64)?;
        }
        Ok(self.span.view(from, n))
    }
}

impl Read for Cursor<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let n = self.chunk.len().min(buf.len());
        buf[..n].copy_from_slice(&self.chunk[..n]);
        self.advance(n);
        Ok(n)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn split_names_parse() {
        let s = Split::of(Path::new("/x/a-00002-of-00003.gguf")).unwrap();
        assert_eq!((s.no, s.count, s.part(0)), (1, 3, PathBuf::from("/x/a-00001-of-00003.gguf")));
        for not in ["a.gguf", "a-00000-of-00003.gguf", "a-00004-of-00003.gguf", "a-1-of-3.gguf", "a-00001-of-00003.bin"]
        {
            assert!(Split::of(Path::new(not)).is_none(), "{not}");
        }
    }

    #[test]
    fn raw_parts_are_found_from_any_of_them() {
        let series: [&[&str]; 12] = [
            &["a.gguf.a", "a.gguf.b", "a.gguf.c"],
            &["b.gguf-split-a", "b.gguf-split-b"],
            &["c-split-a", "c-split-b"],
            &["d.gguf.aa", "d.gguf.ab"],
            &["e.gguf.part1of2", "e.gguf.part2of2"],
            &["f.gguf.part01of02", "f.gguf.part02of02"],
            &["g.gguf.part-aa", "g.gguf.part-ab"],
            &["h.gguf.00", "h.gguf.01", "h.gguf.02"],
            &["i.gguf.part1", "i.gguf.part2"],
            &["j.gguf-part-a", "j.gguf-part-b"],
            &["k.gguf"],
            &["l.gguf.bin"],
        ];
        let dir = tempfile::tempdir().unwrap();
        for names in series {
            names.iter().for_each(|n| std::fs::write(dir.path().join(n), "GGUF").unwrap());
            let want: Vec<PathBuf> = names.iter().map(|n| dir.path().join(n)).collect();
            for given in &want {
                let found = raw_parts(given);
                assert_eq!(found.files, want, "{}", given.display());
            }
        }
    }

    #[test]
    fn a_missing_raw_part_is_named() {
        let cases: [(&[&str], &str, &str); 4] = [
            (&["a.gguf.b"], "a.gguf.b", "a.gguf.a"),
            (&["b.gguf.a", "b.gguf.c"], "b.gguf.c", "b.gguf.b"),
            (&["c.gguf.part1of3", "c.gguf.part3of3"], "c.gguf.part1of3", "c.gguf.part2of3"),
            (&["d.gguf.01", "d.gguf.03"], "d.gguf.03", "d.gguf.02"),
        ];
        let dir = tempfile::tempdir().unwrap();
        for (there, given, missing) in cases {
            there.iter().for_each(|n| std::fs::write(dir.path().join(n), "data").unwrap());
            let (given, missing) = (dir.path().join(given), dir.path().join(missing));
            assert_eq!(raw_parts(&given), RawParts { files: vec![given], missing: Some(missing) });
        }
    }

    #[test]
    fn labels_count_as_split_does() {
        let text = |l: Label<'_>, i| l.write(i);
        assert_eq!(text(Label::Letters { width: 1 }, 25).as_deref(), Some("z"));
        assert_eq!(text(Label::Letters { width: 1 }, 26), None);
        assert_eq!(text(Label::Letters { width: 2 }, 27).as_deref(), Some("bb"));
        assert_eq!(text(Label::Digits { width: 2 }, 99).as_deref(), Some("99"));
        assert_eq!(text(Label::Digits { width: 2 }, 100), None);
        assert_eq!(text(Label::Of { width: 1, count: 12, total: "12" }, 9).as_deref(), Some("10of12"));
        assert_eq!(text(Label::Of { width: 1, count: 12, total: "12" }, 12), None);
    }
}
