//! Checkpoint folders as Hugging Face's tools write them: `*.safetensors`, one or several with an index, mapped; and the
//! JSON files beside them.
//!
//! The crate safetensors reads headers and checks that ranges follow each other without gap or overlap to the end of the
//! file. What it leaves open is checked here: names of shards that leave the folder, tensors that an index promises and no
//! shard has, sizes of the files that are read whole.

use crate::disk;
use crate::gguf::one_line;
use crate::mmap::Bytes;
use ::safetensors::tensor::{Dtype, SafeTensorError, SafeTensors};
use oxcart_quant::Format;
use serde::de::DeserializeOwned;
use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Display;
use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

/// What a list of all tensors is called, and how large it may be in bytes.
const INDEX: (&str, u64) = ("model.safetensors.index.json", 64 << 20);
/// The most shards of a checkpoint.
const MOST_SHARDS: usize = 10_000;

/// What is wrong with a checkpoint: the file, the field, what was found and expected.
#[derive(Debug, thiserror::Error)]
#[error("{}: {field}: {problem}", file.display())]
pub struct CheckpointError {
    /// The file, or the folder.
    pub file: PathBuf,
    /// The field, key or tensor.
    pub field: String,
    /// What was found, and what was expected.
    pub problem: String,
}

/// A tensor of a checkpoint.
pub struct Stored {
    /// Its element type.
    pub dtype: Dtype,
    /// Its extents, the slowest first.
    pub shape: Vec<usize>,
    /// Its data, in place.
    pub bytes: Bytes,
    shard: usize,
}

/// An open folder.
pub struct Checkpoint {
    dir: PathBuf,
    shards: Vec<PathBuf>,
    tensors: BTreeMap<String, Stored>,
    read: RefCell<BTreeSet<PathBuf>>, // files that were read whole
}

#[derive(serde::Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

fn error(file: &Path, field: impl Display, problem: impl Display) -> CheckpointError {
    CheckpointError { file: file.to_path_buf(), field: field.to_string(), problem: problem.to_string() }
}

impl Checkpoint {
    /// Maps the shards of a folder and reads their headers.
    pub fn open(dir: &Path) -> Result<Checkpoint, CheckpointError> {
        let index: Option<Index> = json(&dir.join(INDEX.0), INDEX.1)?;
        let names = match &index {
            Some(index) => index.weight_map.values().cloned().collect::<BTreeSet<_>>(),
            None => found(dir)?,
        };
        if names.is_empty() || names.len() > MOST_SHARDS {
            let problem = format!("{} files model*.safetensors, expected 1 to {MOST_SHARDS}", names.len());
            return Err(error(dir, "weights", problem));
        }
        let read = RefCell::new(index.iter().map(|_| dir.join(INDEX.0)).collect());
        let mut c = Checkpoint { dir: dir.to_path_buf(), shards: Vec::new(), tensors: BTreeMap::new(), read };
        for name in &names {
            if Path::new(name).file_name().is_none_or(|n| n != name.as_str()) {
                let problem = format!("names the file {:?}, expected one in the same folder", one_line(name, 200));
                return Err(error(&dir.join(INDEX.0), "weight_map", problem));
            }
            c.add(dir.join(name))?;
        }
        let Some(index) = index else { return Ok(c) };
        let file = dir.join(INDEX.0);
        for (tensor, shard) in &index.weight_map {
            if c.tensors.get(tensor).is_none_or(|t| c.shards[t.shard] != dir.join(shard)) {
                return Err(error(&file, field(tensor), format!("should be in {shard}, which does not have it")));
            }
        }
        match c.tensors.keys().find(|t| !index.weight_map.contains_key(*t)) {
            Some(t) => Err(error(&c.shards[c.tensors[t].shard], field(t), format!("is not in {}", INDEX.0))),
            None => Ok(c),
        }
    }

    fn add(&mut self, path: PathBuf) -> Result<(), CheckpointError> {
        let bytes = Bytes::map(&path).map_err(|e| error(&path, "open", e))?;
        let (len, header) = SafeTensors::read_metadata(&bytes).map_err(|e| unreadable(&path, &bytes, e))?;
        let mut tensors: Vec<_> = header.tensors().into_iter().collect();
        tensors.sort_by_key(|(_, t)| t.data_offsets);
        let shard = self.shards.len();
        for (name, t) in tensors {
            let (from, to) = t.data_offsets;
            let stored = Stored {
                dtype: t.dtype,
                shape: t.shape.clone(),
                bytes: bytes.slice(8 + len + from..8 + len + to),
                shard,
            };
            if let Some(first) = self.tensors.get(&name) {
                let problem = format!("is in {} too", self.shards[first.shard].display());
                return Err(error(&path, field(&name), problem));
            }
            self.tensors.insert(name, stored);
        }
        self.shards.push(path);
        Ok(())
    }

    /// The folder.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// What has been read so far: the files with weights in the order of their names, then the others.
    pub fn files(&self) -> Vec<PathBuf> {
        self.shards.iter().chain(&*self.read.borrow()).cloned().collect()
    }

    /// All tensors by name.
    pub fn tensors(&self) -> &BTreeMap<String, Stored> {
        &self.tensors
    }

    /// Says what is wrong with a tensor, naming the file in which it is.
    pub fn unfit(&self, tensor: &str, problem: impl Display) -> CheckpointError {
        let file = self.tensors.get(tensor).map_or(&self.dir, |t| &self.shards[t.shard]);
        error(file, field(tensor), problem)
    }

    /// A tensor and the format of its weights.
    pub fn weights(&self, tensor: &str) -> Result<(&Stored, Format), CheckpointError> {
        let t = self.tensors.get(tensor).ok_or_else(|| self.unfit(tensor, "missing"))?;
        let format = match t.dtype {
            Dtype::F32 => Format::F32,
            Dtype::F16 => Format::F16,
            Dtype::BF16 => Format::BF16,
            other => return Err(self.unfit(tensor, format!("found {other:?}, expected F32, F16 or BF16"))),
        };
        Ok((t, format))
    }

    /// A JSON file of the folder of `most` bytes at most; `None` where it is not there.
    pub fn json<T: DeserializeOwned>(&self, name: &str, most: u64) -> Result<Option<T>, CheckpointError> {
        json(&self.note(name), most)
    }

    /// A file of the folder of `most` bytes at most; `None` where it is not there.
    pub fn read(&self, name: &str, most: u64) -> Result<Option<Vec<u8>>, CheckpointError> {
        read(&self.note(name), most)
    }

    /// The path of a file, which is noted if there is one.
    fn note(&self, name: &str) -> PathBuf {
        let path = self.dir.join(name);
        if path.exists() {
            self.read.borrow_mut().insert(path.clone());
        }
        path
    }
}

/// What errors call a tensor.
fn field(tensor: &str) -> String {
    format!("tensor {}", one_line(tensor, 200))
}

/// The weights of a folder without an index: `model.safetensors`, or all parts of `model-00001-of-00003.safetensors`.
fn found(dir: &Path) -> Result<BTreeSet<String>, CheckpointError> {
    let mut names = BTreeSet::new();
    for entry in fs::read_dir(dir).map_err(|e| error(dir, "open", e))? {
        let entry = entry.map_err(|e| error(dir, "open", e))?;
        match entry.file_name().to_str() {
            Some(n) if n.starts_with("model") && n.ends_with(".safetensors") => names.insert(n.to_string()),
            _ => false,
        };
    }
    let count = |n: &str| n.strip_suffix(".safetensors")?.rsplit_once("-of-")?.1.parse::<usize>().ok();
    match names.iter().find_map(|n| count(n)) {
        Some(count) if count != names.len() => {
            Err(error(dir, "weights", format!("found {} of {count} files model-*.safetensors", names.len())))
        }
        _ => Ok(names),
    }
}

/// What the crate found wrong with a header, in words that name the tensor.
fn unreadable(path: &Path, bytes: &[u8], e: SafeTensorError) -> CheckpointError {
    let (field, problem) = match &e {
        _ if bytes.starts_with(b"version https://git-lfs") => {
            ("header", "a git-lfs pointer, expected the file itself".to_string())
        }
        SafeTensorError::HeaderTooSmall => ("header", format!("a file of {} bytes, expected 8 or more", bytes.len())),
        SafeTensorError::HeaderTooLarge | SafeTensorError::InvalidHeaderLength => {
            let claimed = bytes.first_chunk().map_or(0, |n| u64::from_le_bytes(*n));
            ("header", format!("said to have {claimed} bytes, more than a file of {} bytes may hold", bytes.len()))
        }
        SafeTensorError::InvalidHeader(e) => ("header", e.to_string()),
        SafeTensorError::InvalidHeaderDeserialization(e) => ("header", e.to_string()),
        SafeTensorError::InvalidOffset(t) => {
            return error(path, self::field(t), "its range does not begin where the one before it ends");
        }
        SafeTensorError::MetadataIncompleteBuffer => {
            ("data", format!("a file of {} bytes, which is not where the last tensor ends", bytes.len()))
        }
        SafeTensorError::TensorInvalidInfo => {
            ("header", "a tensor whose range is not the size of its shape".to_string())
        }
        SafeTensorError::ValidationOverflow => ("header", "a tensor whose shape overflows".to_string()),
        e => ("header", e.to_string()),
    };
    error(path, field, problem)
}

fn read(path: &Path, most: u64) -> Result<Option<Vec<u8>>, CheckpointError> {
    let fail = |e: std::io::Error| error(path, "open", e);
    match fs::metadata(path) {
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(None),
        // A pipe would be waited for.
        Ok(m) if !m.is_file() => return Err(error(path, "open", "not a regular file")),
        found => found.map_err(fail)?,
    };
    disk::read(path, most).map(Some).map_err(fail)
}

fn json<T: DeserializeOwned>(path: &Path, most: u64) -> Result<Option<T>, CheckpointError> {
    let Some(bytes) = read(path, most)? else { return Ok(None) };
    serde_json::from_slice(&bytes).map(Some).map_err(|e| error(path, "JSON", e))
}
