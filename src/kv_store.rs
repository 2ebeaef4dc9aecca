//! The KV cache of a conversation on disk, so that it resumes in seconds: reading a position takes what the disk takes,
//! computing it the whole model.
//!
//! ```text
//! header   magic, version, identity
//! span     header (parent, start, count, crc of the data), tokens, crc of these two | keys and values of the positions
//! span     ...
//! ```
//!
//! A span holds consecutive positions. It follows its parent at any position of it: conversations that share a beginning
//! share the spans of it. The file only grows, and only by whole spans; it is a cache, so nothing is synced. Whatever is
//! torn, damaged or of another model is noticed by lengths, checksums and the identity, said ([`KvStore::take_notes`]),
//! and computed anew. The text of the conversation never depends on it.
//!
//! The identity hashes what keys and values depend on: the model's numbers and tensors, sizes and times of its files, how
//! the cache stores them, and whether the arithmetic is exact. Which instruction set computed them is left out: all are
//! within rounding of one another.

use crate::disk;
use crate::engine::{Session, common_prefix};
use sha2::{Digest, Sha256};
use std::fs::{self, File, OpenOptions, TryLockError};
use std::io;
use std::ops::Range;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{channel, sync_channel};
use std::time::SystemTime;

/// The ending of the file's name, beside that of the conversation.
pub const EXTENSION: &str = "kv";
const MAGIC: [u8; 8] = *b"oxcartkv";
const VERSION: u32 = 1;
/// Bytes of the header: magic, version, identity, crc.
const HEADER: usize = 8 + 4 + 32 + 4;
/// Bytes of a span's header: parent, start, count, crc of the data; then the tokens and the crc of all that.
const SPAN_HEADER: usize = 16;
/// No parent.
const ROOT: u32 = u32::MAX;
/// Bytes of keys and values in a span, about, at most: what a reader holds in memory.
const SPAN_BYTES: usize = 32 << 20;
/// Positions of a K block: spans that end with one store no block twice.
const BLOCK: usize = oxcart_quant::attention::BLOCK;
/// New positions for which [`KvStore::save_some`] writes.
const SOME: usize = 64;
/// Bytes that a cache leaves free on the disk: the text must go on.
const LEAVE_FREE: u64 = 1 << 30;

/// Why a cache cannot be used. The conversation goes on without it.
#[derive(Debug, thiserror::Error)]
pub enum KvStoreError {
    /// The file system.
    #[error("{}: {error}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        error: io::Error,
    },
    /// Another program has it open.
    #[error("{}: in use by another program", .0.display())]
    Busy(PathBuf),
}

struct Span {
    parent: Option<usize>,
    start: usize, // position of the first token
    tokens: Vec<u32>,
    at: u64, // of the data in the file
    crc: u32,
    damaged: bool,
}

impl Span {
    fn positions(&self) -> Range<usize> {
        self.start..self.start + self.tokens.len()
    }
}

/// How far a reading went.
struct Done {
    end: usize,                      // the position after the last that was read; 0 for none
    damage: Option<(usize, String)>, // a span, and what is wrong with it
}

/// The file of a conversation's keys and values.
pub struct KvStore {
    path: PathBuf,
    file: File,
    identity: [u8; 32],
    spans: Vec<Span>,
    len: u64,
    limit: u64,
    full: bool, // and it was said
    notes: Vec<String>,
    buffer: Vec<u8>,
}

/// Where the cache of a conversation lies.
pub fn beside(conversation: &Path) -> PathBuf {
    conversation.with_extension(EXTENSION)
}

impl KvStore {
    /// Opens the file for sessions like `session`, or makes it; what it holds of another model is dropped. All such files
    /// in its folder may take `limit` bytes together.
    pub fn open(path: &Path, session: &Session, limit: u64) -> Result<KvStore, KvStoreError> {
        let io_error = |error| KvStoreError::Io { path: path.to_path_buf(), error };
        let file = locked(path)?;
        let len = file.metadata().map_err(io_error)?.len();
        let mut store = KvStore {
            path: path.to_path_buf(),
            file,
            identity: identity(session),
            spans: Vec::new(),
            len,
            limit,
            full: false,
            notes: Vec::new(),
            buffer: Vec::new(),
        };
        store.index(session).map_err(io_error)?;
        Ok(store)
    }

    /// What was noticed since the last call, each a sentence for a person.
    pub fn take_notes(&mut self) -> Vec<String> {
        std::mem::take(&mut self.notes)
    }

    /// Reads into sequence 0 what the file has of `tokens` beyond what the sequence has of them already. Returns how many
    /// positions were read.
    pub fn restore(&mut self, session: &mut Session, tokens: &[u32]) -> usize {
        let tokens = &tokens[..tokens.len().min(session.context())];
        let common = common_prefix(session.tokens(0), tokens);
        let mut read = 0;
        // Each try that ends at damage marks a span, and is followed by one without it.
        loop {
            let (known, leaf) = self.longest(tokens);
            if known <= common + read {
                return read;
            }
            let mut chain = Vec::new();
            let (mut end, mut next) = (known, leaf);
            while let Some(i) = next {
                chain.push((i, self.spans[i].start..end));
                (end, next) = (self.spans[i].start, self.spans[i].parent);
            }
            let missing = |(_, positions): &(usize, Range<usize>)| positions.end > common + read;
            let chain: Vec<_> = chain.into_iter().rev().filter(missing).collect();
            let done = self.read(session, &chain, tokens);
            read = read.max(done.end.saturating_sub(common));
            let Some((span, problem)) = done.damage else { return read };
            self.spans[span].damaged = true;
            let Range { start, end } = self.spans[span].positions();
            let what = format!("positions {start} to {end}: {problem}; they are computed anew");
            self.notes.push(format!("{}: {what}", self.path.display()));
        }
    }

    /// Writes the positions of sequence 0 that the file does not have.
    pub fn save(&mut self, session: &Session) -> Result<(), KvStoreError> {
        let tokens = session.tokens(0);
        let (mut start, mut parent) = self.longest(tokens);
        if start == tokens.len() || self.full {
            return Ok(());
        }
        let needs = |start: usize| {
            let spans = 1 + session.span_bytes(&(start..tokens.len())) / SPAN_BYTES * 2;
            let k_blocks_twice = spans * session.span_bytes(&(0..BLOCK));
            (session.span_bytes(&(start..tokens.len())) + k_blocks_twice + 8 * tokens.len()) as u64
        };
        // Other branches and damaged spans may go; the conversation as it stands stays.
        let anew = self.len + needs(start) > self.limit && needs(0) + HEADER as u64 <= self.limit;
        if anew {
            (start, parent) = (0, None);
        }
        if let Err(problem) = self.make_room(if anew { HEADER as u64 } else { self.len }, needs(start)) {
            self.full = true;
            self.notes.push(format!("{}: {problem}; no more of it is kept", self.path.display()));
            return Ok(());
        }
        if anew {
            self.clear().map_err(|e| self.io_error(e))?;
        }
        let each = (SPAN_BYTES / session.span_bytes(&(0..BLOCK)).max(1)).max(1) * BLOCK;
        while start < tokens.len() {
            let end = ((start + each) / BLOCK * BLOCK).min(tokens.len());
            self.write(session, parent, start..end).map_err(|e| self.io_error(e))?;
            (start, parent) = (end, Some(self.spans.len() - 1));
        }
        Ok(())
    }

    /// Writes when enough is new that it is worth a write: to be called while an answer comes.
    pub fn save_some(&mut self, session: &Session) -> Result<(), KvStoreError> {
        match session.len(0) - self.longest(session.tokens(0)).0 >= SOME {
            true => self.save(session),
            false => Ok(()),
        }
    }

    fn io_error(&self, error: io::Error) -> KvStoreError {
        KvStoreError::Io { path: self.path.clone(), error }
    }

    /// How many of `tokens` the file has, and the span that has the last of them.
    fn longest(&self, tokens: &[u32]) -> (usize, Option<usize>) {
        let mut best = (0, None);
        let mut shared = Vec::with_capacity(self.spans.len()); // of each span with those before it
        for (i, s) in self.spans.iter().enumerate() {
            let before = s.parent.map_or(0, |p: usize| shared[p]).min(s.start);
            let here = if before < s.start || s.damaged { 0 } else { common_prefix(&s.tokens, &tokens[s.start..]) };
            shared.push(before + here);
            // Of equals the later: it was written because the earlier one is damaged.
            if here > 0 && before + here >= best.0 {
                best = (before + here, Some(i));
            }
        }
        best
    }

    /// Reads positions of spans, each where the one before ends, into the sequence. While one is put in its place, the next
    /// is read and checked.
    fn read(&mut self, session: &mut Session, chain: &[(usize, Range<usize>)], tokens: &[u32]) -> Done {
        let (file, spans) = (&self.file, &self.spans);
        let sizes: Vec<usize> = chain.iter().map(|&(i, _)| session.span_bytes(&spans[i].positions())).collect();
        let mut done = Done { end: 0, damage: None };
        std::thread::scope(|scope| {
            let (give, take) = sync_channel::<Result<Vec<u8>, String>>(1);
            let (give_back, take_back) = channel::<Vec<u8>>();
            // Where the system gives no thread, nothing is taken: it is computed anew.
            let _ = std::thread::Builder::new().name("oxcart-cache".into()).spawn_scoped(scope, move || {
                for (&(i, _), &size) in chain.iter().zip(&sizes) {
                    let mut data = take_back.try_recv().unwrap_or_default();
                    data.resize(size, 0);
                    let read = file.read_exact_at(&mut data, spans[i].at).map_err(|e| e.to_string());
                    let checked = read.and_then(|()| match crc32fast::hash(&data) == spans[i].crc {
                        true => Ok(data),
                        false => Err("the checksum does not fit".into()),
                    });
                    // Nobody takes any more after damage.
                    if give.send(checked).is_err() {
                        break;
                    }
                }
            });
            for ((i, positions), data) in chain.iter().zip(take) {
                let put = data.and_then(|data| {
                    session.truncate(0, positions.start);
                    let tokens = &tokens[positions.clone()];
                    session.restore_positions(0, spans[*i].positions(), tokens, &data).map_err(|e| e.to_string())?;
                    Ok(data)
                });
                match put {
                    // The thread may have read its last.
                    Ok(data) => drop(give_back.send(data)),
                    Err(problem) => {
                        done.damage = Some((*i, problem));
                        break;
                    }
                }
                done.end = positions.end;
            }
        });
        done
    }

    /// Appends a span.
    fn write(&mut self, session: &Session, parent: Option<usize>, positions: Range<usize>) -> io::Result<()> {
        let tokens = session.tokens(0)[positions.clone()].to_vec();
        self.buffer.clear();
        session.copy_positions(0, positions.clone(), &mut self.buffer);
        let crc = crc32fast::hash(&self.buffer);
        let parent_no = parent.map_or(ROOT, |p| p as u32);
        let mut head = Vec::with_capacity(SPAN_HEADER + 4 * tokens.len() + 4);
        for n in [parent_no, positions.start as u32, tokens.len() as u32, crc].iter().chain(&tokens) {
            head.extend(n.to_le_bytes());
        }
        head.extend(crc32fast::hash(&head).to_le_bytes());
        let at = self.len + head.len() as u64;
        // The data first: a header says that they are there.
        let written = self.file.write_all_at(&self.buffer, at).and_then(|()| self.file.write_all_at(&head, self.len));
        if let Err(e) = written {
            // If this fails too, the next one to open the file cuts it.
            let _ = self.file.set_len(self.len);
            return Err(e);
        }
        self.len = at + self.buffer.len() as u64;
        self.spans.push(Span { parent, start: positions.start, tokens, at, crc, damaged: false });
        Ok(())
    }

    /// Makes it an empty file.
    fn clear(&mut self) -> io::Result<()> {
        self.spans.clear();
        self.file.set_len(0)?;
        let mut head = [&MAGIC[..], &VERSION.to_le_bytes(), &self.identity].concat();
        head.extend(crc32fast::hash(&head).to_le_bytes());
        self.file.write_all_at(&head, 0)?;
        self.len = head.len() as u64;
        Ok(())
    }

    /// Reads the headers of all spans.
    fn index(&mut self, session: &Session) -> io::Result<()> {
        if self.len == 0 {
            return self.clear();
        }
        let mut head = [0; HEADER];
        let told = if self.len >= HEADER as u64 {
            self.file.read_exact_at(&mut head, 0)?;
            crc32fast::hash(&head[..HEADER - 4]).to_le_bytes() == head[HEADER - 4..]
        } else {
            false
        };
        let same = head[..8] == MAGIC && head[8..12] == VERSION.to_le_bytes() && head[12..44] == self.identity;
        if !told || !same {
            let why = match (told && head[..8] == MAGIC, head[8..12] == VERSION.to_le_bytes()) {
                (false, _) => "its header is damaged",
                (true, false) => "it is of another version",
                (true, true) => "it is of another model, or of another cache type",
            };
            self.notes.push(format!("{}: {why}; it is computed anew", self.path.display()));
            return self.clear();
        }
        let mut at = HEADER as u64;
        while at < self.len {
            match self.span_at(session, at)? {
                Some(span) => {
                    at = span.at + session.span_bytes(&span.positions()) as u64;
                    self.spans.push(span);
                }
                None => {
                    let lost = self.len - at;
                    self.notes.push(format!(
                        "{}: {lost} bytes from {at} on are torn or damaged; they are computed anew",
                        self.path.display()
                    ));
                    self.file.set_len(at)?;
                    self.len = at;
                }
            }
        }
        Ok(())
    }

    /// The span whose header stands at `at`, unless it is torn or damaged.
    fn span_at(&self, session: &Session, at: u64) -> io::Result<Option<Span>> {
        let left = (self.len - at) as usize;
        let mut head = [0; SPAN_HEADER];
        if left < SPAN_HEADER {
            return Ok(None);
        }
        self.file.read_exact_at(&mut head, at)?;
        let [parent, start, count, crc] =
            std::array::from_fn(|i| u32::from_le_bytes(std::array::from_fn(|b| head[4 * i + b])));
        let (start, count) = (start as usize, count as usize);
        let tokens_end = SPAN_HEADER + 4 * count + 4;
        // Held against the file before anything is allocated.
        if count == 0 || left < tokens_end || left - tokens_end < session.span_bytes(&(start..start + count)) {
            return Ok(None);
        }
        let mut rest = vec![0; tokens_end - SPAN_HEADER];
        self.file.read_exact_at(&mut rest, at + SPAN_HEADER as u64)?;
        let (tokens, told) = rest.split_at(4 * count);
        let mut sum = crc32fast::Hasher::new();
        sum.update(&head);
        sum.update(tokens);
        let parent = (parent != ROOT).then_some(parent as usize);
        let follows = match parent {
            None => start == 0,
            Some(p) => self.spans.get(p).is_some_and(|p| p.start < start && start <= p.positions().end),
        };
        if sum.finalize().to_le_bytes() != told || !follows {
            return Ok(None);
        }
        let tokens = tokens.as_chunks().0.iter().map(|&b| u32::from_le_bytes(b)).collect();
        Ok(Some(Span { parent, start, tokens, at: at + tokens_end as u64, crc, damaged: false }))
    }

    /// Sees to it that `needs` bytes behind the first `len` are within the limit and on the disk; the oldest files of other
    /// conversations make way.
    fn make_room(&self, len: u64, needs: u64) -> Result<(), String> {
        let gib = |b: u64| format!("{:.1} GiB", b as f64 / f64::from(1 << 30));
        let own = len + needs;
        if own > self.limit {
            return Err(format!("the KV cache needs {}, the limit is {}", gib(own), gib(self.limit)));
        }
        let dir = disk::folder(&self.path);
        let mut others = files(dir);
        others.retain(|f| f.path.file_name() != self.path.file_name());
        let mut total: u64 = own + others.iter().map(|f| f.bytes).sum::<u64>();
        for f in others {
            if total <= self.limit {
                break;
            }
            if remove_unused(&f.path) {
                total -= f.bytes;
            }
        }
        if total > self.limit {
            return Err(format!("KV caches in use take {}, the limit is {}", gib(total), gib(self.limit)));
        }
        // A system that does not tell is not asked again.
        if let Ok(free) = disk::free_space(dir).map(|free| free.saturating_add(self.len - len))
            && free < needs.saturating_add(LEAVE_FREE)
        {
            return Err(format!("{} are free on the disk, {} must stay so", gib(free), gib(LEAVE_FREE)));
        }
        Ok(())
    }
}

struct Kept {
    path: PathBuf,
    bytes: u64,
    modified: SystemTime,
}

/// The caches in a folder, the oldest first.
fn files(dir: &Path) -> Vec<Kept> {
    let mut found: Vec<Kept> = fs::read_dir(dir)
        .into_iter()
        .flatten()
        .filter_map(|f| {
            let path = f.ok()?.path();
            let m = fs::symlink_metadata(&path).ok()?;
            let ours = m.is_file() && path.extension().is_some_and(|e| e == EXTENSION);
            ours.then_some(Kept { path, bytes: m.len(), modified: m.modified().ok()? })
        })
        .collect();
    found.sort_by_key(|f| f.modified);
    found
}

/// Opens the file of a cache, or makes it, for this program alone.
fn locked(path: &Path) -> Result<File, KvStoreError> {
    let io_error = |error| KvStoreError::Io { path: path.to_path_buf(), error };
    loop {
        let open = OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o600).open(path);
        let file = open.map_err(io_error)?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(KvStoreError::Busy(path.to_path_buf())),
            Err(TryLockError::Error(e)) => return Err(io_error(e)),
        }
        // Before it was locked, another program may have removed it to make room.
        if is_named(&file, path) {
            return Ok(file);
        }
    }
}

/// Whether this is the file at a path.
fn is_named(file: &File, path: &Path) -> bool {
    let id = |m: fs::Metadata| (m.dev(), m.ino());
    matches!((file.metadata().map(id), fs::metadata(path).map(id)), (Ok(a), Ok(b)) if a == b)
}

/// Removes a cache that no program has open.
fn remove_unused(path: &Path) -> bool {
    File::open(path).is_ok_and(|f| f.try_lock().is_ok() && is_named(&f, path) && fs::remove_file(path).is_ok())
}

/// What keys and values depend on, beside the tokens.
fn identity(session: &Session) -> [u8; 32] {
    let e = session.engine();
    let mut hash = Sha256::new();
    let mut add = |what: &str| {
        hash.update((what.len() as u64).to_le_bytes());
        hash.update(what);
    };
    let (k, v) = session.cache_types();
    add(&format!("{:?} {} {} {:?}", e.model.config, k.name(), v.name(), e.kernels.arithmetic));
    for t in e.gguf.tensors() {
        add(&format!("{} {} {:?}", t.name, t.kind.id(), t.dims));
    }
    for part in e.gguf.parts() {
        // Opened and mapped as they are; one that is gone by now is gone for the next session too.
        let m = fs::metadata(part).ok();
        add(&format!("{:?}", m.map(|m| (m.len(), m.modified().ok()))));
    }
    hash.finalize().into()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicBool, Ordering};

    #[test]
    fn a_file_that_is_locked_has_its_name() {
        let dir = tempfile::tempdir().unwrap();
        let (path, end) = (dir.path().join("c.kv"), AtomicBool::new(false));
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !end.load(Ordering::Relaxed) {
                    remove_unused(&path);
                }
            });
            let held = (0..20_000).filter_map(|_| locked(&path).ok());
            let nameless = held.filter(|file| file.metadata().unwrap().nlink() == 0).count();
            end.store(true, Ordering::Relaxed);
            assert_eq!(nameless, 0);
        });
    }
}
