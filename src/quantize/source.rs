//! What is quantized: metadata and tensors whose rows are read one by one, from a GGUF or from a checkpoint.
//!
//! A row knows nothing of where it lies. So a tensor may be one piece of a file, several (the experts of a layer, each with
//! its own matrix in a checkpoint), or have its rows in another order than the file, and nothing is copied for it.

use super::recipe::layer;
use crate::gguf::{Gguf, GgufError, MetadataValue, TensorKind, Value};
use crate::mmap::Bytes;
use oxcart_quant::Format;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// A model to be quantized.
pub struct Source {
    path: PathBuf,
    files: Vec<PathBuf>,
    metadata: Vec<(String, Value)>,
    tensors: Vec<Tensor>,
    split: Vec<usize>, // tensors of each file
    remarks: Vec<String>,
    layers_left: Option<u64>,
}

/// A tensor: its description, and its rows where they lie.
pub struct Tensor {
    /// Its name in GGUF.
    pub name: String,
    /// Its name before its layer was numbered anew, by which importance knows it.
    pub old_name: Option<String>,
    /// Its extents, ne0 (columns) first.
    pub dims: Vec<u64>,
    /// How it is stored.
    pub kind: TensorKind,
    /// How it is written where no recipe says otherwise.
    pub plain: TensorKind,
    rows: Rows,
}

/// Where the rows of a tensor are.
pub enum Rows {
    /// In a GGUF, the tensor of this index.
    Gguf(Arc<Gguf>, usize),
    /// In pieces of equally many rows, one after another.
    Pieces {
        /// The pieces.
        pieces: Vec<Bytes>,
        /// How rows of a piece are ordered.
        order: Order,
    },
}

/// The order of rows against that of the file.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Order {
    /// The same.
    Same,
    /// In each head of `head_dim` rows, row `i` of the first half and row `i` of the second become neighbours: RoPE turns
    /// halves in Hugging Face's checkpoints of llama and neighbours in GGUF.
    Interleaved {
        /// Rows of a head.
        head_dim: usize,
    },
}

impl Order {
    /// The place in the file of what is row `row` of the tensor.
    fn place(self, row: usize) -> usize {
        match self {
            Order::Same => row,
            Order::Interleaved { head_dim } => {
                let (head, i) = (row / head_dim, row % head_dim);
                head * head_dim + (i % 2) * (head_dim / 2) + i / 2
            }
        }
    }

    /// Rows that are moved among each other only.
    fn group(self) -> usize {
        match self {
            Order::Same => 1,
            Order::Interleaved { head_dim } => head_dim,
        }
    }
}

impl Tensor {
    /// A tensor of a checkpoint: `rows` of `stored` weights.
    pub fn new(name: String, dims: Vec<u64>, stored: Format, plain: Format, rows: Rows) -> Tensor {
        Tensor { name, old_name: None, dims, kind: stored.into(), plain: plain.into(), rows }
    }

    /// Brings the elements of a vector into another order, in a copy.
    pub fn reorder(&mut self, order: Order) {
        let width = (self.n_bytes() / self.n_elements()) as usize;
        let bytes = self.row(0);
        let moved = (0..bytes.len() / width).flat_map(|i| &bytes[order.place(i) * width..][..width]).copied().collect();
        self.rows = Rows::Pieces { pieces: vec![Bytes::owned(moved)], order: Order::Same };
    }

    /// The format in which it is stored, if oxcart computes with it.
    pub fn format(&self) -> Option<Format> {
        self.kind.format()
    }

    /// Number of weights.
    pub fn n_elements(&self) -> u64 {
        self.dims.iter().product()
    }

    /// Size of what is stored, in bytes.
    pub fn n_bytes(&self) -> u64 {
        match &self.rows {
            Rows::Gguf(g, i) => g.tensors()[*i].n_bytes(),
            Rows::Pieces { pieces, .. } => pieces.iter().map(|p| p.len() as u64).sum(),
        }
    }

    /// Rows: the product of all extents but the first.
    pub fn n_rows(&self) -> usize {
        self.dims[1..].iter().product::<u64>() as usize
    }

    /// The bytes of a row. Panics where there is none.
    pub fn row(&self, row: usize) -> &[u8] {
        let len = (self.n_bytes() / self.n_rows() as u64) as usize;
        match &self.rows {
            Rows::Gguf(g, i) => &g.tensors()[*i].bytes()[row * len..][..len],
            Rows::Pieces { pieces, order } => {
                let each = pieces[0].len() / len;
                &pieces[row / each][order.place(row % each) * len..][..len]
            }
        }
    }

    /// Tells the system that these rows were read for the last time, so that they need not stay in memory.
    pub fn done_with(&self, rows: Range<usize>) {
        let len = (self.n_bytes() / self.n_rows() as u64) as usize;
        match &self.rows {
            Rows::Gguf(g, i) => g.tensors()[*i].bytes().slice(rows.start * len..rows.end * len).will_not_need(),
            Rows::Pieces { pieces, order } => {
                let each = pieces[0].len() / len;
                // Whole groups; what is still read of the next one is read from the file again.
                let (start, end) = (rows.start / order.group() * order.group(), rows.end);
                for (i, piece) in pieces.iter().enumerate().take(end.div_ceil(each)).skip(start / each) {
                    let (from, to) = (start.max(i * each) - i * each, end.min((i + 1) * each) - i * each);
                    piece.slice(from * len..to * len).will_not_need();
                }
            }
        }
    }
}

impl Source {
    /// A model of which nothing has been written as GGUF yet. `files` are what it is read from.
    pub fn new(path: PathBuf, files: Vec<PathBuf>, metadata: Vec<(String, Value)>, tensors: Vec<Tensor>) -> Source {
        let split = vec![tensors.len()];
        Source { path, files, metadata, tensors, split, remarks: Vec::new(), layers_left: None }
    }

    /// Adds what a person should know of how the model was read.
    pub fn with_remarks(mut self, remarks: Vec<String>) -> Source {
        self.remarks.extend(remarks);
        self
    }

    /// What a person should know of how the model was read.
    pub fn remarks(&self) -> &[String] {
        &self.remarks
    }

    /// Sets a value: in the place of the one that has its key, or behind all.
    pub fn set(&mut self, key: &str, value: Value) {
        match self.metadata.iter_mut().find(|(k, _)| k == key) {
            Some((_, old)) => *old = value,
            None => self.metadata.push((key.to_string(), value)),
        }
    }

    /// Leaves layers out, and numbers those behind them anew. The metadata speak of all layers still: llama.cpp's recipes go by
    /// the depth that there was; what is written has [`Source::layers_left`].
    pub fn prune(&mut self, layers: &[u64]) -> Result<(), GgufError> {
        let wrong = |problem: String| GgufError { file: self.path.clone(), field: "layers".into(), problem };
        let key = format!("{}.block_count", self.str("general.architecture")?.unwrap_or_default());
        let n = self.uint(&key)?.ok_or_else(|| wrong(format!("{key} is missing")))?;
        let mut layers = layers.to_vec();
        layers.sort_unstable();
        layers.dedup();
        if let Some(layer) = layers.iter().find(|&&l| l >= n) {
            return Err(wrong(format!("found {layer} to be left out, expected 0 to {}", n.saturating_sub(1))));
        }
        let left = n - layers.len() as u64;
        if left == 0 {
            return Err(wrong(format!("found all {n} to be left out, expected fewer")));
        }
        let mut file = self.split.iter().enumerate().flat_map(|(i, &n)| std::iter::repeat_n(i, n));
        let mut split = vec![0; self.split.len()];
        self.tensors.retain_mut(|t| {
            let i = file.next().unwrap_or(0);
            if let Some(layer) = layer(&t.name) {
                if layers.contains(&layer) {
                    return false;
                }
                let new = layer - layers.partition_point(|&l| l < layer) as u64;
                let name = t.name.replacen(&format!("blk.{layer}."), &format!("blk.{new}."), 1);
                t.old_name = Some(std::mem::replace(&mut t.name, name));
            }
            split[i] += 1;
            true
        });
        self.split = split;
        self.layers_left = Some(left);
        Ok(())
    }

    /// How many layers there are after [`Source::prune`].
    pub fn layers_left(&self) -> Option<u64> {
        self.layers_left
    }

    /// Tensors of each GGUF that a split model consists of; one number for any other.
    pub fn split(&self) -> &[usize] {
        &self.split
    }

    /// What errors call it.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The files that are read.
    pub fn files(&self) -> &[PathBuf] {
        &self.files
    }

    /// Keys and values, in the order in which they are written.
    pub fn metadata(&self) -> impl Iterator<Item = (&str, &Value)> {
        self.metadata.iter().map(|(k, v)| (k.as_str(), v))
    }

    /// All tensors, in the order of the file.
    pub fn tensors(&self) -> &[Tensor] {
        &self.tensors
    }

    /// A tensor by name.
    pub fn tensor(&self, name: &str) -> Option<&Tensor> {
        self.tensors.iter().find(|t| t.name == name)
    }

    fn value(&self, key: &str) -> Option<&Value> {
        self.metadata.iter().find(|(k, _)| k == key).map(|(_, v)| v)
    }

    fn unfit(&self, key: &str, v: &Value, want: &str) -> GgufError {
        let problem = format!("found {} {v}, expected {want}", v.type_name());
        GgufError { file: self.path.clone(), field: key.to_string(), problem }
    }

    /// A string of the metadata; absent is `None`, another type an error.
    pub fn str(&self, key: &str) -> Result<Option<&str>, GgufError> {
        match self.value(key) {
            None => Ok(None),
            Some(Value::Plain(MetadataValue::String(s))) => Ok(Some(s)),
            Some(v) => Err(self.unfit(key, v, "a string")),
        }
    }

    /// An integer of the metadata, not negative; absent is `None`, anything else an error.
    pub fn uint(&self, key: &str) -> Result<Option<u64>, GgufError> {
        let Some(v) = self.value(key) else { return Ok(None) };
        v.uint().map(Some).ok_or_else(|| self.unfit(key, v, "a non-negative integer"))
    }
}

impl From<Gguf> for Source {
    fn from(g: Gguf) -> Source {
        let metadata = g.metadata().map(|(k, v)| (k.to_string(), v.clone())).collect();
        let (path, files, split) = (g.path().to_path_buf(), g.parts().to_vec(), g.split().to_vec());
        let g = Arc::new(g);
        let tensor = |(i, t): (usize, &crate::gguf::Tensor)| Tensor {
            name: t.name.clone(),
            old_name: None,
            dims: t.dims.clone(),
            kind: t.kind,
            plain: t.kind,
            rows: Rows::Gguf(g.clone(), i),
        };
        let tensors = g.tensors().iter().enumerate().map(tensor).collect();
        Source { path, files, metadata, tensors, split, remarks: Vec::new(), layers_left: None }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn matrix(pieces: &[&[u8]], order: Order) -> Tensor {
        let pieces: Vec<Bytes> = pieces.iter().map(|p| Bytes::owned(p.to_vec())).collect();
        let rows = pieces.iter().map(|p| p.len() as u64 / 2).sum();
        Tensor::new("t".into(), vec![1, rows], Format::F16, Format::F16, Rows::Pieces { pieces, order })
    }

    #[test]
    fn rows_come_from_pieces_in_their_order() {
        let rows = |t: &Tensor| (0..t.n_rows()).map(|i| t.row(i)[0]).collect::<Vec<_>>();
        let one = [0, 0, 1, 0, 2, 0, 3, 0, 4, 0, 5, 0, 6, 0, 7, 0];
        assert_eq!(rows(&matrix(&[&one], Order::Same)), [0, 1, 2, 3, 4, 5, 6, 7]);
        assert_eq!(rows(&matrix(&[&one], Order::Interleaved { head_dim: 4 })), [0, 2, 1, 3, 4, 6, 5, 7]);
        assert_eq!(rows(&matrix(&[&one], Order::Interleaved { head_dim: 8 })), [0, 4, 1, 5, 2, 6, 3, 7]);
        let two = matrix(&[&one[8..], &one[..8]], Order::Same);
        assert_eq!(rows(&two), [4, 5, 6, 7, 0, 1, 2, 3]);
        two.done_with(0..8);
        two.done_with(3..5);
        assert_eq!((two.n_bytes(), two.n_elements()), (16, 8));
    }
}
