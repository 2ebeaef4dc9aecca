//! GGUF files: metadata and views of tensors, from one file or many.
//!
//! The crate gguf-rs-lib decodes values and knows ggml's types; the walk over the file is ours, because it must accept what
//! that crate's own reader refuses (version 2, hyphens in keys) and refuse what it accepts (alignments that are no power
//! of two, empty dimensions), read through a mapping, and join files that were split:
//!
//! * `NAME-00001-of-00003.gguf`: each part is a GGUF; metadata comes from the first;
//! * `NAME.gguf.a`, `NAME.gguf.part1of2`, `NAME.gguf-split-a`: one GGUF cut anywhere. Tensors stay views of their part;
//!   one that a cut goes through is copied when it is first asked for.
//!
//! Nothing is read beyond headers and metadata. Every count is checked against the size of the file before memory is taken
//! for it.

mod parts;
mod values;

pub use gguf_rs_lib::format::{GGUFTensorType, MetadataValue};
pub use values::{Strings, Value};

use crate::mmap::Bytes;
use gguf_rs_lib::format::GGUFValueType;
use oxcart_quant::Format;
use parts::Span;
use std::collections::{HashMap, HashSet};
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

/// Bytes of decoded metadata, all values together.
const BUDGET: u64 = 512 << 20;
/// The longest key, as in llama.cpp's writer.
const MAX_KEY: u64 = 65_535;
/// The longest tensor name (`GGML_MAX_NAME` is 64; some writers go beyond).
const MAX_NAME: u64 = 1024;

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

/// How a tensor is stored: ggml's type.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct TensorKind(GGUFTensorType);

impl TensorKind {
    /// The id in the file.
    pub fn id(self) -> u32 {
        self.0 as u32
    }

    /// ggml's name, e.g. `q4_K`.
    pub fn name(self) -> String {
        match self.format() {
            Some(f) => f.name().to_string(),
            None => self.0.name().to_lowercase(),
        }
    }

    /// The format with which oxcart computes, if it does.
    pub fn format(self) -> Option<Format> {
        Format::from_id(self.id())
    }
}

/// A tensor: its description, and a view of its bytes.
pub struct Tensor {
    /// Its name.
    pub name: String,
    /// Its extents, ne0 (columns) first; at most four.
    pub dims: Vec<u64>,
    /// How it is stored.
    pub kind: TensorKind,
    at: u64,
    size: u64,
    span: Arc<Span>,
    bytes: OnceLock<Bytes>,
}

impl Tensor {
    /// The data. A view of the file, except where the file was cut in the middle of this tensor.
    pub fn bytes(&self) -> &Bytes {
        self.bytes.get_or_init(|| self.span.view(self.at, self.size as usize))
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
}

/// An open model file.
pub struct Gguf {
    path: PathBuf,
    parts: Vec<PathBuf>,
    file_size: u64,
    version: u32,
    keys: Vec<String>, // in the order of the file
    values: HashMap<String, Value>,
    tensors: Vec<Tensor>,
    by_name: HashMap<String, usize>,
}

impl Gguf {
    /// Opens a file, given it or any one of its parts.
    pub fn open(path: &Path) -> Result<Gguf, GgufError> {
        if let Some(split) = parts::Split::of(path) {
            return Gguf::open_split(path, split);
        }
        let files = parts::raw_parts(path);
        Gguf::open_span(path, files)
    }

    fn open_span(path: &Path, files: Vec<PathBuf>) -> Result<Gguf, GgufError> {
        let span = Span::open(&files).map_err(|(file, e)| Blame(&file).at("open", e))?;
        read(path, Arc::new(span), files)
    }

    fn open_split(path: &Path, split: parts::Split) -> Result<Gguf, GgufError> {
        let mut whole: Option<Gguf> = None;
        for no in 0..split.count {
            let file = split.part(no);
            if !file.exists() {
                return Err(Blame(path).at("split", format_args!("part {} is missing: {}", no + 1, file.display())));
            }
            let part = Gguf::open_span(&file, vec![file.clone()])?;
            let blame = Blame(&file);
            for (key, want) in [("split.count", split.count as u64), ("split.no", no as u64)] {
                let found = part.uint(key)?;
                if found != Some(want) {
                    let found = found.map_or("nothing".into(), |f| f.to_string());
                    return Err(blame.at(key, format_args!("found {found}, expected {want} from the file's name")));
                }
            }
            match &mut whole {
                None => whole = Some(part),
                Some(whole) => whole.join(part)?,
            }
        }
        let mut whole = whole.ok_or_else(|| Blame(path).at("split", "no parts"))?;
        if let Some(want) = whole.uint("split.tensors.count")?
            && want != whole.tensors.len() as u64
        {
            let found = whole.tensors.len();
            return Err(Blame(path).at("split.tensors.count", format_args!("found {found} tensors, expected {want}")));
        }
        whole.path = path.to_path_buf();
        Ok(whole)
    }

    fn join(&mut self, part: Gguf) -> Result<(), GgufError> {
        for t in part.tensors {
            if self.by_name.insert(t.name.clone(), self.tensors.len()).is_some() {
                let field = format!("tensor {}", t.name);
                return Err(Blame(&part.path).at(field, "is in an earlier part too"));
            }
            self.tensors.push(t);
        }
        self.parts.extend(part.parts);
        self.file_size += part.file_size;
        Ok(())
    }

    /// The path it was opened with.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Its files.
    pub fn parts(&self) -> &[PathBuf] {
        &self.parts
    }

    /// Bytes of all its files.
    pub fn file_size(&self) -> u64 {
        self.file_size
    }

    /// The format's version: 2 or 3.
    pub fn version(&self) -> u32 {
        self.version
    }

    /// Keys and values, in the order of the file.
    pub fn metadata(&self) -> impl Iterator<Item = (&str, &Value)> {
        self.keys.iter().map(|k| (k.as_str(), &self.values[k]))
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
    pub fn override_kv(&mut self, spec: &str) -> Result<(), GgufError> {
        let blame = Blame(&self.path);
        let usage = || blame.at("override-kv", format_args!("{spec:?}: expected KEY=int|float|bool|str:VALUE"));
        let (key, rest) = spec.split_once('=').ok_or_else(usage)?;
        let (kind, text) = rest.split_once(':').ok_or_else(usage)?;
        if key.is_empty() {
            return Err(usage());
        }
        let bad = |what: &str| blame.at("override-kv", format_args!("{key}: {text:?} is no {what}"));
        let value = match kind {
            "int" => MetadataValue::I64(text.parse().map_err(|_| bad("integer"))?),
            "float" => MetadataValue::F64(text.parse().map_err(|_| bad("number"))?),
            "bool" => MetadataValue::Bool(text.parse().map_err(|_| bad("bool (true or false)"))?),
            "str" => MetadataValue::String(text.to_string()),
            _ => return Err(usage()),
        };
        if self.values.insert(key.to_string(), Value::Plain(value)).is_none() {
            self.keys.push(key.to_string());
        }
        Ok(())
    }
}

/// Reads one whole GGUF.
fn read(path: &Path, span: Arc<Span>, files: Vec<PathBuf>) -> Result<Gguf, GgufError> {
    let blame = Blame(path);
    let mut r = parts::Cursor::new(&span, blame);
    let magic = r.bytes::<4>("magic")?;
    if magic != *b"GGUF" {
        return Err(blame.at("magic", format_args!("found {}, expected \"GGUF\"", magic.escape_ascii())));
    }
    let version = r.u32("version")?;
    if version.swap_bytes() == 2 || version.swap_bytes() == 3 {
        return Err(blame.at("version", "the file is big-endian, expected little-endian"));
    }
    if !(2..=3).contains(&version) {
        return Err(blame.at("version", format_args!("found {version}, expected 2 or 3")));
    }
    let n_tensors = r.u64("tensor count")?;
    let n_keys = r.u64("metadata count")?;
    // The shortest entries: a key of one byte with a value of one; a name of one byte with one dimension.
    for (what, n, least) in [("metadata count", n_keys, 14), ("tensor count", n_tensors, 33)] {
        if n > r.left() / least {
            return Err(blame.at(what, format_args!("found {n}, more than a file of {} bytes holds", span.len())));
        }
    }

    let (mut keys, mut map, mut budget) = (Vec::with_capacity(n_keys as usize), HashMap::new(), BUDGET);
    for i in 0..n_keys {
        let key = r.string(format_args!("key {i}"), MAX_KEY)?;
        let kind = r.u32(&key)?;
        let kind = GGUFValueType::from_u32(kind)
            .map_err(|_| blame.at(&key, format_args!("value type {kind}, expected one of 0 to 12")))?;
        let value = values::read(&mut r, &key, kind, &mut budget)?;
        if map.insert(key.clone(), value).is_some() {
            return Err(blame.at(key, "stands twice in the metadata"));
        }
        keys.push(key);
    }

    let alignment = match map.get("general.alignment") {
        None => 32,
        Some(v) => v.uint().ok_or_else(|| blame.at("general.alignment", format_args!("found {v}, expected an integer")))?,
    };
    if !alignment.is_power_of_two() || alignment > 1 << 20 {
        return Err(blame.at("general.alignment", format_args!("found {alignment}, expected a power of two up to 2^20")));
    }

    let mut tensors = Vec::with_capacity(n_tensors as usize);
    let mut names = HashSet::new();
    for i in 0..n_tensors {
        let name = r.string(format_args!("name of tensor {i}"), MAX_NAME)?;
        let field = format!("tensor {name}");
        let n_dims = r.u32(&field)?;
        if !(1..=4).contains(&n_dims) {
            return Err(blame.at(field, format_args!("{n_dims} dimensions, expected 1 to 4")));
        }
        let dims = (0..n_dims).map(|_| r.u64(&field)).collect::<Result<Vec<_>, _>>()?;
        let id = r.u32(&field)?;
        let offset = r.u64(&field)?;
        let kind = GGUFTensorType::from_u32(id)
            .map_err(|_| blame.at(&field, format_args!("type {} is not supported", foreign_type(id))))?;
        if dims.contains(&0) {
            return Err(blame.at(field, format_args!("a dimension of 0 in {dims:?}")));
        }
        let size = dims
            .iter()
            .try_fold(1u64, |n, &d| n.checked_mul(d))
            .filter(|&n| n <= i64::MAX as u64)
            .and_then(|n| kind.checked_calculate_size(n))
            .ok_or_else(|| blame.at(&field, format_args!("dimensions {dims:?} overflow")))?;
        if dims[0] % kind.block_size() as u64 != 0 {
            let block = kind.block_size();
            let problem = format_args!("{} columns, not a multiple of {block} ({})", dims[0], TensorKind(kind).name()).to_string();
            return Err(blame.at(field, problem));
        }
        if offset % alignment != 0 {
            return Err(blame.at(field, format_args!("offset {offset} is no multiple of the alignment {alignment}")));
        }
        if !names.insert(name.clone()) {
            return Err(blame.at(field, "stands twice"));
        }
        let kind = TensorKind(kind);
        tensors.push(Tensor { name, dims, kind, at: offset, size, span: span.clone(), bytes: OnceLock::new() });
    }

    let data = r.position().next_multiple_of(alignment);
    for t in &mut tensors {
        let end = t.at.checked_add(data).and_then(|at| at.checked_add(t.size)).filter(|&end| end <= span.len());
        if end.is_none() {
            let problem = format!("{} bytes at {} of the data, past the end of a file of {}", t.size, t.at, span.len());
            return Err(blame.at(format_args!("tensor {}", t.name), problem));
        }
        t.at += data;
    }
    let mut order: Vec<&Tensor> = tensors.iter().collect();
    order.sort_by_key(|t| t.at);
    for pair in order.windows(2) {
        if pair[0].at + pair[0].size > pair[1].at {
            return Err(blame.at(format_args!("tensor {}", pair[1].name), format_args!("overlaps tensor {}", pair[0].name)));
        }
    }
    let by_name = tensors.iter().enumerate().map(|(i, t)| (t.name.clone(), i)).collect();
    let file_size = span.len();
    Ok(Gguf { path: path.to_path_buf(), parts: files, file_size, version, keys, values: map, tensors, by_name })
}

/// The name of a type id that no current ggml has.
fn foreign_type(id: u32) -> String {
    let name = match id {
        4 => "q4_2, retired from ggml in 2023",
        5 => "q4_3, retired from ggml in 2023",
        31 => "q4_0_4_4, retired from ggml in 2024",
        32 => "q4_0_4_8, retired from ggml in 2024",
        33 => "q4_0_8_8, retired from ggml in 2024",
        36 => "iq4_nl_4_4 (retired from ggml in 2024), or ik_llama.cpp's i2_s",
        37 => "iq4_nl_4_8, retired from ggml in 2024",
        38 => "iq4_nl_8_8, retired from ggml in 2024",
        133 => "q6_0 of ik_llama.cpp",
        134 => "iq1_bn of ik_llama.cpp",
        135 => "iq2_bn of ik_llama.cpp",
        136 => "q8_k64 of ik_llama.cpp",
        137 => "iq2_k of ik_llama.cpp",
        138 => "iq3_k of ik_llama.cpp",
        139 => "iq4_k of ik_llama.cpp",
        140 => "iq5_k of ik_llama.cpp",
        141 => "iq6_k of ik_llama.cpp",
        144 => "iq4_ks of ik_llama.cpp",
        145 => "iq2_ks of ik_llama.cpp",
        146 => "iq4_kss of ik_llama.cpp",
        151 => "q8_kv of ik_llama.cpp",
        152 => "iq5_ks of ik_llama.cpp",
        153 => "iq2_kt of ik_llama.cpp",
        154 => "iq3_kt of ik_llama.cpp",
        155 => "iq4_kt of ik_llama.cpp",
        156 => "iq3_ks of ik_llama.cpp",
        157 => "iq2_kl of ik_llama.cpp",
        158 => "iq1_kt of ik_llama.cpp",
        202..=399 => "an interleaved type of ik_llama.cpp",
        _ => return id.to_string(),
    };
    format!("{id} ({name})")
}
