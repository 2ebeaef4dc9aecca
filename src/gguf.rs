//! GGUF files: metadata and views of tensors, from one file or many.
//!
//! The crate gguf-rs-lib decodes values and knows ggml's types; the walk over the file is ours, because it must accept what
//! that crate's own reader refuses (version 2, hyphens in keys) and refuse what it accepts (alignments that are no power
//! of two, empty dimensions, gaps between tensors), read through a mapping, and join files that were split:
//!
//! * `NAME-00001-of-00003.gguf`: each part is a GGUF that says which one it is; metadata comes from the first;
//! * `NAME.gguf.a`, `NAME.gguf.part1of2`, `NAME.gguf-split-a`: one GGUF cut anywhere. Tensors stay views of their part;
//!   one that a cut goes through is copied when it is first asked for.
//!
//! Any one of the parts opens them all. Nothing is read beyond headers and metadata; arrays stay in the file. Whatever is
//! decoded is taken from one budget of memory, and every count is held against the size of the file first.

mod kind;
mod parts;
mod read;
mod values;
mod write;

pub use gguf_rs_lib::format::{GGUFValueType, MetadataArray, MetadataValue};
pub use kind::{ForeignKind, TensorKind};
pub(crate) use values::one_line;
pub use values::{Numbers, Strings, Value};
pub use write::{GgufWriter, NewTensor, Parts, Unfinished};

use crate::mmap::Bytes;
use oxcart_quant::Format;
use parts::Span;
use std::collections::HashMap;
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

/// What is wrong with a file: the file, the field, what was found and expected.
#[derive(Debug, thiserror::Error)]
#[error("{}: {field}: {problem}", file.display())]
pub struct GgufError {
    /// The file.
    pub file: PathBuf,
    /// The field, key or tensor.
    pub field: String,
    /// What was found, and what was expected.
    pub problem: String,
}

/// Says what is wrong, of one file.
#[derive(Clone, Copy)]
struct Blame<'a>(&'a Path);

impl Blame<'_> {
    fn at(self, field: impl fmt::Display, problem: impl fmt::Display) -> GgufError {
        GgufError { file: self.0.to_path_buf(), field: field.to_string(), problem: problem.to_string() }
    }
}

/// A tensor: its description, and a view of its bytes.
pub struct Tensor {
    /// Its name.
    pub name: String,
    /// Its extents, ne0 (columns) first; one to four, none of them 0.
    pub dims: Vec<u64>,
    /// How it is stored.
    pub kind: TensorKind,
    at: u64,
    size: u64,
    span: Arc<Span>,
    bytes: OnceLock<Bytes>,
}

impl Tensor {
    /// The data, whole blocks in the order of ggml, at any address. A view of the file, except where the file was cut in
    /// the middle of this tensor: then a copy, made once.
    pub fn bytes(&self) -> &Bytes {
        self.bytes.get_or_init(|| self.span.view(self.at, self.size as usize))
    }

    /// The file in which the data begins, of those that the model is made of.
    pub fn file(&self) -> Option<&Path> {
        self.span.file(self.at)
    }

    /// Size of the data in bytes.
    pub fn n_bytes(&self) -> u64 {
        self.size
    }

    /// Number of weights.
    pub fn n_elements(&self) -> u64 {
        self.dims.iter().product()
    }

    /// The format with which oxcart computes, if it does.
    pub fn format(&self) -> Option<Format> {
        self.kind.format()
    }

    /// What errors call it.
    fn field(&self) -> String {
        format!("tensor {}", one_line(&self.name, 200))
    }
}

/// An open model file.
pub struct Gguf {
    path: PathBuf,
    parts: Vec<PathBuf>,
    split: Vec<usize>, // tensors of each GGUF that it was split into
    file_size: u64,
    version: u32,
    alignment: u64,
    keys: Vec<String>, // in the order of the file
    values: HashMap<String, Value>,
    tensors: Vec<Tensor>,
    by_name: HashMap<String, usize>,
}

impl Gguf {
    /// Opens a file, given it or any one of its parts.
    pub fn open(path: &Path) -> Result<Gguf, GgufError> {
        let g = Gguf::open_raw(path)?;
        match g.values.contains_key("split.count") {
            true => Gguf::join(g),
            false => Ok(g),
        }
    }

    /// Opens one GGUF, whole or cut in pieces.
    fn open_raw(path: &Path) -> Result<Gguf, GgufError> {
        if path.is_dir() {
            let mut problem = "a folder, expected a file".to_string();
            if path.join("config.json").exists() {
                let dir = path.display();
                problem += &format!("; oxcart quantize {dir} OUT.gguf TYPE makes one of a checkpoint");
            }
            return Err(Blame(path).at("open", problem));
        }
        let parts::RawParts { files, missing } = parts::raw_parts(path);
        let absent = |m: &Path| format!("part {} is missing", m.display());
        let span = Span::open(&files).map_err(|(file, e)| Blame(&file).at("open", e))?;
        let read = read::read(path, Arc::new(span), files);
        match (read, missing) {
            (Err(e), Some(m)) => Err(GgufError { problem: format!("{}; {}", e.problem, absent(&m)), ..e }),
            (read, _) => read,
        }
    }

    /// Opens the other parts of a file that was split, and joins their tensors.
    fn join(given: Gguf) -> Result<Gguf, GgufError> {
        let blame = Blame(&given.path);
        let count = given.uint("split.count")?.unwrap_or_default();
        if count <= 1 {
            return Ok(given);
        }
        let form = "-NNNNN-of-NNNNN.gguf";
        let split = parts::Split::of(&given.path).ok_or_else(|| {
            blame.at("split.count", format_args!("one of {count} parts, whose name must end in {form}"))
        })?;
        let total = given.uint("split.tensors.count")?;
        let path = given.path.clone();
        let mut whole: Option<Gguf> = None;
        let mut given = Some(given);
        for no in 0..split.count {
            let file = split.part(no);
            let part = match given.take_if(|_| no == split.no) {
                Some(given) => given,
                None if file.exists() => Gguf::open_raw(&file)?,
                None => {
                    let problem = format!("part {} of {} is missing: {}", no + 1, split.count, file.display());
                    return Err(Blame(&path).at("split", problem));
                }
            };
            for (key, want) in [
                ("split.no", Some(no as u64)),
                ("split.count", Some(split.count as u64)),
                ("split.tensors.count", total),
            ] {
                let found = part.uint(key)?;
                if found != want {
                    let text = |n: Option<u64>| n.map_or("nothing".into(), |n| n.to_string());
                    let problem = format!("found {}, expected {} by {}", text(found), text(want), path.display());
                    return Err(Blame(&file).at(key, problem));
                }
            }
            match &mut whole {
                None => whole = Some(part),
                Some(whole) => whole.append(part)?,
            }
        }
        let mut whole = whole.ok_or_else(|| Blame(&path).at("split", "no parts"))?;
        let found = whole.tensors.len() as u64;
        if let Some(total) = total.filter(|&t| t != found) {
            let problem = format!("found {found} tensors in all parts, expected {total}");
            return Err(Blame(&path).at("split.tensors.count", problem));
        }
        whole.path = path;
        Ok(whole)
    }

    fn append(&mut self, part: Gguf) -> Result<(), GgufError> {
        for t in part.tensors {
            if self.by_name.insert(t.name.clone(), self.tensors.len()).is_some() {
                return Err(Blame(&part.path).at(t.field(), "is in an earlier part too"));
            }
            self.tensors.push(t);
        }
        self.parts.extend(part.parts);
        self.split.extend(part.split);
        self.file_size += part.file_size;
        Ok(())
    }

    /// The path it was opened with.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Its files, in order.
    pub fn parts(&self) -> &[PathBuf] {
        &self.parts
    }

    /// Tensors of each GGUF that it was split into, in their order; one number where it is whole, or cut anywhere.
    pub fn split(&self) -> &[usize] {
        &self.split
    }

    /// Bytes of all its files.
    pub fn file_size(&self) -> u64 {
        self.file_size
    }

    /// The format's version: 2 or 3.
    pub fn version(&self) -> u32 {
        self.version
    }

    /// What the offsets of tensors are multiples of, in bytes.
    pub fn alignment(&self) -> u64 {
        self.alignment
    }

    /// Keys and values, in the order of the file (of the first, if it was split).
    pub fn metadata(&self) -> impl Iterator<Item = (&str, &Value)> {
        self.keys.iter().filter_map(|k| Some((k.as_str(), self.values.get(k)?)))
    }

    /// A value, whatever its type.
    pub fn value(&self, key: &str) -> Option<&Value> {
        self.values.get(key)
    }

    /// All tensors, in the order of the file.
    pub fn tensors(&self) -> &[Tensor] {
        &self.tensors
    }

    /// A tensor by name.
    pub fn tensor(&self, name: &str) -> Option<&Tensor> {
        self.by_name.get(name).map(|&i| &self.tensors[i])
    }

    /// Sets a value by `KEY=TYPE:VALUE` with the types int, float, bool and str: llama.cpp's `--override-kv`.
    ///
    /// It stands for what the file says, of whatever type that is, or is added. The layout of the file (alignment, parts)
    /// has been read by then and does not change.
    pub fn override_kv(&mut self, spec: &str) -> Result<(), GgufError> {
        let (key, value) = parse_override(spec).map_err(|problem| Blame(&self.path).at("override-kv", problem))?;
        if self.values.insert(key.to_string(), Value::Plain(value)).is_none() {
            self.keys.push(key.to_string());
        }
        Ok(())
    }
}

/// Key and value of `KEY=TYPE:VALUE` with the types int (i64), float (f64), bool and str.
pub fn parse_override(spec: &str) -> Result<(&str, MetadataValue), String> {
    let usage = || format!("{spec:?}, expected KEY=TYPE:VALUE, TYPE int, float, bool or str");
    let (key, rest) = spec.split_once('=').filter(|(key, _)| !key.is_empty()).ok_or_else(usage)?;
    let (kind, text) = rest.split_once(':').ok_or_else(usage)?;
    let bad = |what: &str| format!("{key}: found {text:?}, expected {what}");
    let value = match kind {
        "int" => MetadataValue::I64(text.parse().map_err(|_| bad("an integer"))?),
        "float" => MetadataValue::F64(text.parse().map_err(|_| bad("a number"))?),
        "bool" => MetadataValue::Bool(text.parse().map_err(|_| bad("true or false"))?),
        "str" => MetadataValue::String(text.to_string()),
        _ => return Err(usage()),
    };
    Ok((key, value))
}
