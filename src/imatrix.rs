//! Importance matrices: how large the activations are that each column of a weight matrix meets on a text.
//!
//! An error in column `j` of a matrix is multiplied by the activation `j`; the mean square of that activation says how much
//! the error will matter. So for each matrix, or each expert of a stack of them:
//!
//! ```text
//! sums[j] = sum over tokens of x[j]^2        counts = tokens        importance[j] = sums[j] / counts
//! ```
//!
//! [`collect`] sums what a session is shown; files have llama-imatrix's two forms, a GGUF with the tensors `NAME.in_sum2` and
//! `NAME.counts`, or the older [`dat`], which knows one count for a tensor and no chunk size. Sums are f64 while they are
//! made, in the order of the text, so that they do not depend on the number of threads; files hold f32. [`statistics`] tells how importance is spread.

pub mod collect;
mod dat;
pub mod statistics;

use crate::gguf::{Gguf, GgufError, GgufWriter, MetadataValue, NewTensor, Parts, Strings, Tensor, TensorKind, Value};
use crate::mmap::Bytes;
use oxcart_quant::Format;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

const SUMS: &str = ".in_sum2";
const COUNTS: &str = ".counts";
/// More tokens than anybody feeds a model.
const MOST_TOKENS: u64 = 1 << 53;

/// An importance matrix that cannot be read, joined or written.
#[derive(Debug, thiserror::Error)]
pub enum ImatrixError {
    /// The GGUF.
    #[error(transparent)]
    Gguf(#[from] GgufError),
    /// What a file says.
    #[error("{}: {field}: {problem}", file.display())]
    Unfit {
        /// The file.
        file: PathBuf,
        /// The entry or field.
        field: String,
        /// What was found and expected.
        problem: String,
    },
    /// Activations that are no numbers.
    #[error("{0}: activations that are NaN or infinite")]
    NotFinite(String),
}

/// What is known of one tensor.
#[derive(Clone, Debug, PartialEq)]
pub struct Entry {
    /// Sums of squares: (matrices, columns).
    pub sums: Vec<f32>,
    /// Tokens: one count, or one for each matrix.
    pub counts: Vec<u64>,
}

impl Entry {
    /// What no file may say, and none is written that does.
    fn check(&self) -> Result<(), String> {
        if !self.sums.iter().all(|s| s.is_finite() && *s >= 0.0) {
            return Err("sums of squares that are negative or no numbers".into());
        }
        match self.counts.iter().find(|&&n| n > MOST_TOKENS) {
            Some(n) => Err(format!("{n} tokens, expected at most {MOST_TOKENS}")),
            None => Ok(()),
        }
    }

    /// Columns that share a count.
    fn shared(&self) -> usize {
        self.sums.len() / self.counts.len()
    }

    /// The mean square of each column; 1 for experts that saw no token, as llama.cpp has it.
    pub fn means(&self) -> Vec<f32> {
        let shared = self.shared();
        let mean = |(i, sum): (usize, &f32)| match self.counts[i / shared] {
            0 => 1.0,
            n => sum / n as f32,
        };
        self.sums.iter().enumerate().map(mean).collect()
    }
}

/// How a file is written.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum FileFormat {
    /// GGUF.
    Gguf,
    /// The older form.
    Dat,
}

/// An importance matrix.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Imatrix {
    /// By the name of the tensor.
    pub entries: BTreeMap<String, Entry>,
    /// The texts.
    pub datasets: Vec<String>,
    /// Tokens of a chunk; 0 where the file does not say, and then counts are chunks.
    pub chunk_size: u32,
    /// Chunks.
    pub chunks: u32,
}

impl Imatrix {
    /// Reads a file of either form.
    pub fn read(path: &Path) -> Result<Imatrix, ImatrixError> {
        let bytes = Bytes::map(path).map_err(|e| GgufError {
            file: path.into(),
            field: "open".into(),
            problem: e.to_string(),
        })?;
        let m = if bytes.starts_with(b"GGUF") { read_gguf(&Gguf::open(path)?) } else { dat::read(&bytes) };
        let unfit = |(field, problem)| ImatrixError::Unfit { file: path.into(), field, problem };
        let m = m.map_err(unfit)?;
        if m.entries.is_empty() {
            return Err(unfit(("entries".into(), "none".into())));
        }
        m.check().map_err(unfit)?;
        Ok(m)
    }

    fn check(&self) -> Result<(), Problem> {
        let wrong = |(name, e): (&String, &Entry)| Some((format!("entry {name}"), e.check().err()?));
        self.entries.iter().find_map(wrong).map_or(Ok(()), Err)
    }

    /// Writes a file, in one piece or not at all. A reader of the older form takes whole chunks for counts.
    pub fn write(&self, path: &Path, format: FileFormat) -> Result<(), ImatrixError> {
        let unfit = |(field, problem)| ImatrixError::Unfit { file: path.into(), field, problem };
        self.check().map_err(unfit)?;
        match format {
            FileFormat::Gguf => Ok(self.write_gguf(path)?),
            FileFormat::Dat => Ok(dat::write(self, path)?),
        }
    }

    /// Adds what another one knows; where that counts chunks, they have this one's size. An error says which tensor has
    /// other sizes there, or more than an entry holds.
    pub fn join(&mut self, other: &Imatrix) -> Result<(), String> {
        let tokens = if other.chunk_size == 0 { self.chunk_size.max(1) } else { 1 };
        for (name, from) in &other.entries {
            let to = self.entries.entry(name.clone());
            let to =
                to.or_insert_with(|| Entry { sums: vec![0.0; from.sums.len()], counts: vec![0; from.counts.len()] });
            if to.sums.len() != from.sums.len() {
                return Err(format!("{name}: {} sums, expected {}", from.sums.len(), to.sums.len()));
            }
            // One count for all experts stands for each of them.
            let counts = to.counts.len().max(from.counts.len());
            for c in [&to.counts, &from.counts] {
                if c.len() != 1 && c.len() != counts {
                    return Err(format!("{name}: {} counts, expected {counts}", c.len()));
                }
            }
            to.counts = (0..counts)
                .map(|i| {
                    let of = |c: &[u64]| c[i % c.len()];
                    of(&to.counts).saturating_add(of(&from.counts).saturating_mul(tokens as u64))
                })
                .collect();
            to.sums.iter_mut().zip(&from.sums).for_each(|(to, from)| *to += from * tokens as f32);
            to.check().map_err(|problem| format!("{name}: together: {problem}"))?;
        }
        self.datasets.extend(other.datasets.iter().cloned());
        let most = self.entries.values().flat_map(|e| &e.counts).max().copied().unwrap_or(0);
        self.chunks = (most / self.chunk_size.max(1) as u64).min(u32::MAX as u64) as u32;
        Ok(())
    }

    fn write_gguf(&self, path: &Path) -> Result<(), GgufError> {
        let metadata = [
            ("general.type", MetadataValue::String("imatrix".into()).into()),
            ("imatrix.datasets", Value::Strings(self.datasets.iter().collect::<Strings>())),
            ("imatrix.chunk_count", MetadataValue::U32(self.chunks).into()),
            ("imatrix.chunk_size", MetadataValue::U32(self.chunk_size).into()),
        ];
        let mut tensors = Vec::new();
        for (name, e) in &self.entries {
            let matrices = e.counts.len() as u64;
            for (suffix, columns) in [(SUMS, e.shared() as u64), (COUNTS, 1)] {
                // As ggml writes them: without a last extent of 1.
                let dims = if matrices > 1 { vec![columns, matrices] } else { vec![columns] };
                tensors.push(NewTensor { name: format!("{name}{suffix}"), dims, kind: TensorKind::from(Format::F32) });
            }
        }
        let mut w = GgufWriter::create(path, metadata.map(|(k, v)| (k.to_string(), v)), tensors, &Parts::One)?;
        for e in self.entries.values() {
            w.push(bytemuck::cast_slice(&e.sums))?;
            w.push(bytemuck::cast_slice(&e.counts.iter().map(|&c| c as f32).collect::<Vec<_>>()))?;
        }
        w.finish().map(|_| ())
    }
}

/// Field and problem.
type Problem = (String, String);

fn read_gguf(g: &Gguf) -> Result<Imatrix, Problem> {
    let number = |key: &str| {
        let n = g.uint(key).map_err(|e| (e.field, e.problem))?.ok_or((key.to_string(), "missing".to_string()))?;
        u32::try_from(n).map_err(|_| (key.to_string(), format!("found {n}, more than 32 bits hold")))
    };
    let key = "imatrix.datasets";
    let datasets = match g.value(key) {
        Some(Value::Strings(s)) => s.iter().map(String::from).collect(),
        Some(v) => return Err((key.into(), format!("found {}, expected an array of strings", v.type_name()))),
        None => return Err((key.into(), "missing".into())),
    };
    let mut m = Imatrix {
        datasets,
        chunks: number("imatrix.chunk_count")?,
        chunk_size: number("imatrix.chunk_size")?,
        ..Imatrix::default()
    };
    if m.chunk_size == 0 {
        return Err(("imatrix.chunk_size".into(), "found 0, expected the tokens of a chunk".into()));
    }
    for t in g.tensors() {
        if let Some(name) = t.name.strip_suffix(COUNTS).filter(|n| g.tensor(&format!("{n}{SUMS}")).is_none()) {
            return Err((format!("tensor {}", t.name), format!("no tensor {name}{SUMS} beside it")));
        }
        // Other tensors say other things.
        let Some(name) = t.name.strip_suffix(SUMS) else { continue };
        let counts = g.tensor(&format!("{name}{COUNTS}"));
        let counts = counts.ok_or((format!("tensor {}", t.name), format!("no tensor {name}{COUNTS} beside it")))?;
        let (sums, n) = (floats(t)?, floats(counts)?);
        if !sums.len().is_multiple_of(n.len()) {
            let problem = format!("{} counts for {} sums", n.len(), sums.len());
            return Err((format!("tensor {}", counts.name), problem));
        }
        if let Some(n) = n.iter().find(|n| !(0.0..=MOST_TOKENS as f32).contains(*n)) {
            return Err((format!("tensor {}", counts.name), format!("found {n}, expected 0 to {MOST_TOKENS} tokens")));
        }
        let counts = n.iter().map(|n| n.round() as u64).collect();
        m.entries.insert(name.to_string(), Entry { sums, counts });
    }
    Ok(m)
}

fn floats(t: &Tensor) -> Result<Vec<f32>, Problem> {
    if t.format() != Some(Format::F32) {
        return Err((format!("tensor {}", t.name), format!("is {}, expected f32", t.kind)));
    }
    let mut out = vec![0.0; t.n_elements() as usize];
    Format::F32.dequant(t.bytes(), &mut out);
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn matrix() -> Imatrix {
        let mut m = Imatrix { datasets: vec!["a.txt".into()], chunk_size: 10, ..Imatrix::default() };
        m.entries.insert("blk.0.attn_q.weight".into(), Entry { sums: vec![20.0, 5.0, 0.0, 40.0], counts: vec![20] });
        let sums = vec![6.0, 12.0, 0.0, 0.0, 1.0, 2.0];
        m.entries.insert("blk.0.ffn_up_exps.weight".into(), Entry { sums, counts: vec![15, 0, 5] });
        m.chunks = 2;
        m
    }

    #[test]
    fn experts_without_tokens_matter_alike() {
        let m = matrix();
        assert_eq!(m.entries["blk.0.attn_q.weight"].means(), [1.0, 0.25, 0.0, 2.0]);
        assert_eq!(m.entries["blk.0.ffn_up_exps.weight"].means(), [0.4, 0.8, 1.0, 1.0, 0.2, 0.4]);
    }

    #[test]
    fn files_hold_what_was_written() {
        let dir = tempfile::tempdir().unwrap();
        let (gguf, dat) = (dir.path().join("m.gguf"), dir.path().join("m.dat"));
        let m = matrix();
        m.write(&gguf, FileFormat::Gguf).unwrap();
        assert_eq!(Imatrix::read(&gguf).unwrap(), m);
        m.write(&dat, FileFormat::Dat).unwrap();
        let back = Imatrix::read(&dat).unwrap();
        assert_eq!((back.chunks, back.chunk_size, &back.datasets), (2, 0, &m.datasets));
        for (name, e) in &m.entries {
            assert_eq!(back.entries[name].means(), e.means(), "{name}");
        }
    }

    #[test]
    fn joined_matrices_are_those_of_both_texts() {
        let (mut m, more) = (matrix(), matrix());
        m.join(&more).unwrap();
        assert_eq!(m.entries["blk.0.attn_q.weight"], Entry { sums: vec![40.0, 10.0, 0.0, 80.0], counts: vec![40] });
        assert_eq!(m.entries["blk.0.ffn_up_exps.weight"].counts, [30, 0, 10]);
        assert_eq!((m.chunks, m.datasets.len()), (4, 2));
        // Chunks of an older file are as long as ours.
        let mut old = Imatrix::default();
        old.entries.insert("blk.0.attn_q.weight".into(), Entry { sums: vec![1.0, 1.0, 1.0, 1.0], counts: vec![1] });
        m.join(&old).unwrap();
        assert_eq!(m.entries["blk.0.attn_q.weight"], Entry { sums: vec![50.0, 20.0, 10.0, 90.0], counts: vec![50] });
        old.entries.insert("blk.0.attn_q.weight".into(), Entry { sums: vec![1.0], counts: vec![1] });
        assert_eq!(m.join(&old).unwrap_err(), "blk.0.attn_q.weight: 1 sums, expected 4");
        let mut large = Imatrix::default();
        large.entries.insert("blk.0.attn_q.weight".into(), Entry { sums: vec![3e38; 4], counts: vec![1] });
        let problem = m.join(&large).unwrap_err();
        assert_eq!(problem, "blk.0.attn_q.weight: together: sums of squares that are negative or no numbers");
    }

    #[test]
    fn what_would_not_be_read_is_not_written() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("m");
        for (sums, counts) in [(vec![f32::INFINITY], vec![1]), (vec![1.0], vec![MOST_TOKENS + 1]), (vec![1.0], vec![0])]
        {
            let mut m = Imatrix { chunk_size: 1, ..Imatrix::default() };
            let counted = counts[0] > 0;
            m.entries.insert("a".into(), Entry { sums, counts });
            assert!(m.write(&path, FileFormat::Dat).is_err() && !path.exists());
            // An entry that no token was counted for is left out of the older form alone.
            assert_eq!(m.write(&path, FileFormat::Gguf).is_err(), counted);
        }
    }

    #[test]
    fn counts_that_are_none_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("m.gguf");
        matrix().write(&path, FileFormat::Gguf).unwrap();
        let whole = std::fs::read(&path).unwrap();
        let at = whole.windows(4).rposition(|b| b == 15f32.to_le_bytes()).unwrap();
        for n in [f32::NAN, -1.0, f32::INFINITY, 1e16] {
            let mut bytes = whole.clone();
            bytes[at..at + 4].copy_from_slice(&n.to_le_bytes());
            std::fs::write(&path, bytes).unwrap();
            let problem = Imatrix::read(&path).unwrap_err().to_string();
            assert!(problem.contains("tensor blk.0.ffn_up_exps.weight.counts: found "), "{problem}");
        }
    }
}
