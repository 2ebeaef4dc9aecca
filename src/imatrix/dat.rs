//! The older form of a file.
//!
//! ```text
//! i32 entries, for each: i32 length and name, i32 chunks, i32 length and f32 values (mean square * chunks)
//! i32 chunks, i32 length and name of the text                                                  (may be missing)
//! ```

use super::{Entry, Imatrix, Problem};
use crate::disk;
use crate::gguf::{GgufError, one_line};
use std::path::Path;

/// Takes a file apart; every length is held against what is left of it.
struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn bytes(&mut self, n: usize, field: &str) -> Result<&'a [u8], Problem> {
        let problem = || (field.to_string(), format!("{n} bytes, but {} are left of the file", self.0.len()));
        let (now, rest) = self.0.split_at_checked(n).ok_or_else(problem)?;
        self.0 = rest;
        Ok(now)
    }

    fn count(&mut self, field: &str, least: i32) -> Result<usize, Problem> {
        let n = i32::from_le_bytes(self.bytes(4, field)?.try_into().expect("four bytes"));
        if n < least {
            return Err((field.to_string(), format!("found {n}, expected at least {least}")));
        }
        Ok(n as usize)
    }

    fn text(&mut self, field: &str) -> Result<String, Problem> {
        let n = self.count(field, 0)?;
        let text = String::from_utf8(self.bytes(n, field)?.to_vec());
        text.map_err(|_| (field.to_string(), "not UTF-8".to_string()))
    }
}

pub(super) fn read(bytes: &[u8]) -> Result<Imatrix, Problem> {
    let mut r = Reader(bytes);
    let mut m = Imatrix::default();
    for i in 0..r.count("entries", 1)? {
        let name = r.text(&format!("entry {i}: name"))?;
        let field = format!("entry {i}");
        let chunks = r.count(&field, 0)?;
        let n = r.count(&field, 1)?;
        let values = r.bytes(n.saturating_mul(4), &field)?;
        let sums = values.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect();
        if m.entries.contains_key(&name) {
            return Err((format!("entry {i}: name"), format!("{} stands twice", one_line(&name, 200))));
        }
        // Values that no chunk was counted for are means.
        m.entries.insert(name, Entry { sums, counts: vec![chunks.max(1) as u64] });
    }
    if !r.0.is_empty() {
        m.chunks = r.count("chunks", 0)? as u32;
    }
    if !r.0.is_empty() {
        m.datasets.extend(Some(r.text("text")?).filter(|t| !t.is_empty()));
    }
    match r.0.len() {
        0 => Ok(m),
        n => Err(("end".to_string(), format!("{n} bytes behind the text"))),
    }
}

pub(super) fn write(m: &Imatrix, path: &Path) -> Result<(), GgufError> {
    let fail = |field: &str, problem: String| GgufError { file: path.to_path_buf(), field: field.to_string(), problem };
    let mut out = Vec::new();
    let number = |out: &mut Vec<u8>, n: u64| out.extend((n.min(i32::MAX as u64) as i32).to_le_bytes());
    let known = || m.entries.iter().filter(|(_, e)| e.counts.iter().any(|&c| c > 0));
    match known().count() {
        0 => return Err(fail("entries", "no token was counted for any".into())),
        n => number(&mut out, n as u64),
    }
    for (name, e) in known() {
        let most = e.counts.iter().max().copied().unwrap_or(0);
        let chunks = most.div_ceil(m.chunk_size.max(1) as u64);
        number(&mut out, name.len() as u64);
        out.extend(name.as_bytes());
        number(&mut out, chunks);
        number(&mut out, e.sums.len() as u64);
        out.extend(e.means().iter().flat_map(|mean| (mean * chunks as f32).to_le_bytes()));
    }
    number(&mut out, m.chunks as u64);
    let text = m.datasets.last().map_or("", |t| t.as_str());
    number(&mut out, text.len() as u64);
    out.extend(text.as_bytes());

    disk::write(path, &out).map_err(|e| fail("write", e.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lengths_that_lie_are_refused() {
        let number = |n: i32| n.to_le_bytes().to_vec();
        let entry = |n: i32| [number(1), number(1), b"a".to_vec(), number(1), number(n), vec![0; 4]].concat();
        let cases = [
            (vec![1, 0], "entries: 4 bytes, but 2 are left of the file"),
            (number(0), "entries: found 0, expected at least 1"),
            (number(7), "entry 0: name: 4 bytes, but 0 are left of the file"),
            ([number(1), number(-1)].concat(), "entry 0: name: found -1, expected at least 0"),
            ([number(1), number(1), vec![0xFF]].concat(), "entry 0: name: not UTF-8"),
            (entry(i32::MAX), "entry 0: 8589934588 bytes, but 4 are left of the file"),
            ([entry(1), number(2), number(9)].concat(), "text: 9 bytes, but 0 are left of the file"),
            ([entry(1), number(2), number(1), vec![b't', 0]].concat(), "end: 1 bytes behind the text"),
            ([number(2), entry(1)[4..].repeat(2)].concat(), "entry 1: name: a stands twice"),
        ];
        for (bytes, want) in cases {
            let (field, problem) = read(&bytes).unwrap_err();
            assert_eq!(format!("{field}: {problem}"), want);
        }
        assert_eq!(read(&entry(1)).unwrap().entries["a"], Entry { sums: vec![0.0], counts: vec![1] });
    }
}
