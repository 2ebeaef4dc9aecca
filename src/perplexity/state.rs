//! What a long run has computed so far, on disk: a run that is cut off goes on where it was.
//!
//! ```text
//! "oxcartM1"  key[32]  u64 records  (u64 length  f64 values[length]) for each  sha256[32] of all before
//! ```
//!
//! A record holds the values of one chunk or one question, bit for bit; every figure is computed from records alone, so a
//! resumed run ends with the same digits. The key says of which run they are.

use super::PerplexityError;
use crate::disk;
use crate::gguf::Gguf;
use sha2::{Digest, Sha256};
use std::io;
use std::path::{Path, PathBuf};

const MAGIC: &[u8; 8] = b"oxcartM1";
/// Bytes of a state, at most: a hundred million values.
const MOST_BYTES: u64 = 1 << 30;

/// What makes a run the same run: a hash of everything that its figures depend on.
#[derive(Clone)]
pub struct Key(Sha256);

impl Key {
    /// A run of this program on a model: its metadata, and the beginning of each of its tensors.
    pub fn of(gguf: &Gguf) -> Key {
        let mut key = Key(Sha256::new());
        key.add(env!("CARGO_PKG_VERSION"));
        key.add_model(gguf);
        key
    }

    /// Adds a model.
    pub fn add_model(&mut self, gguf: &Gguf) {
        self.add(gguf.file_size().to_le_bytes());
        for (name, value) in gguf.metadata() {
            self.add(name);
            self.add(value.to_string());
        }
        for t in gguf.tensors() {
            self.add(&t.name);
            self.add(format!("{:?} {:?}", t.dims, t.kind));
            self.add(&t.bytes()[..t.bytes().len().min(4096)]);
        }
    }

    /// Adds something that matters.
    pub fn add(&mut self, what: impl AsRef<[u8]>) {
        self.0.update((what.as_ref().len() as u64).to_le_bytes());
        self.0.update(what);
    }

    /// Adds tokens.
    pub fn add_tokens(&mut self, tokens: &[u32]) {
        self.0.update((tokens.len() as u64).to_le_bytes());
        tokens.iter().for_each(|t| self.0.update(t.to_le_bytes()));
    }

    fn digest(&self) -> [u8; 32] {
        self.0.clone().finalize().into()
    }
}

/// The records of a run and the file that keeps them.
pub struct State {
    path: PathBuf,
    key: [u8; 32],
    records: Vec<Vec<f64>>,
}

impl State {
    /// A run from its beginning; its file is in `dir`.
    pub fn new(dir: &Path, key: &Key) -> State {
        let key = key.digest();
        let name: String = key[..12].iter().map(|b| format!("{b:02x}")).collect();
        State { path: dir.join(name + ".state"), key, records: Vec::new() }
    }

    /// Reads what an earlier run left. Returns whether there was something.
    pub fn load(&mut self) -> Result<bool, PerplexityError> {
        let bytes = match disk::read(&self.path, MOST_BYTES) {
            Ok(bytes) => bytes,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(false),
            Err(error) => return Err(PerplexityError::Io { file: self.path.clone(), what: "read", error }),
        };
        self.records = parse(&bytes, &self.key)
            .map_err(|problem| PerplexityError::State { file: self.path.clone(), problem: problem.into() })?;
        Ok(true)
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Everything computed so far.
    pub fn records(&self) -> &[Vec<f64>] {
        &self.records
    }

    /// Adds records.
    pub fn extend(&mut self, records: Vec<Vec<f64>>) {
        self.records.extend(records);
    }

    /// Saves all records.
    pub fn save(&self) -> Result<(), PerplexityError> {
        let mut out = MAGIC.to_vec();
        out.extend(self.key);
        out.extend((self.records.len() as u64).to_le_bytes());
        for r in &self.records {
            out.extend((r.len() as u64).to_le_bytes());
            out.extend(r.iter().flat_map(|v| v.to_le_bytes()));
        }
        let hash = Sha256::digest(&out);
        out.extend(hash);
        let saved =
            self.path.parent().map_or(Ok(()), std::fs::create_dir_all).and_then(|()| disk::write(&self.path, &out));
        saved.map_err(|error| PerplexityError::Io { file: self.path.clone(), what: "write", error })
    }

    /// Removes the file of a run that is done.
    pub fn remove(&self) -> Result<(), PerplexityError> {
        match std::fs::remove_file(&self.path) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => {
                Err(PerplexityError::Io { file: self.path.clone(), what: "remove", error: e })
            }
            _ => Ok(()),
        }
    }
}

fn parse(bytes: &[u8], key: &[u8; 32]) -> Result<Vec<Vec<f64>>, &'static str> {
    let (body, hash) = bytes.split_last_chunk::<32>().ok_or("truncated")?;
    if Sha256::digest(body)[..] != hash[..] {
        return Err("damaged");
    }
    let mut rest = body.strip_prefix(MAGIC).and_then(|b| b.strip_prefix(key)).ok_or("of another run")?;
    let mut number = || {
        let (n, after) = rest.split_first_chunk::<8>().ok_or("truncated")?;
        rest = after;
        Ok::<u64, &'static str>(u64::from_le_bytes(*n))
    };
    let mut records = Vec::new();
    for _ in 0..number()? {
        let mut record = Vec::new();
        for _ in 0..number()? {
            record.push(f64::from_bits(number()?));
        }
        records.push(record);
    }
    Ok(records)
}
