//! Writing GGUF version 3 as a stream: descriptions first, then tensors in their order, each piece as it comes.
//!
//! What a file will hold is known before the first tensor is: types decide sizes, so offsets, parts and their names are
//! planned at once and nothing is kept in memory. Files are written under another name, synced, and renamed only when the
//! last byte is there; a writer that is dropped before leaves nothing behind and an older file as it was.
//!
//! The crate gguf-rs-lib encodes header, values and descriptions. Its own writers are not used: they refuse hyphens in keys,
//! sort the metadata, and do not pad the last tensor, which ggml reads with its padding.

use super::{Blame, GgufError, TensorKind, Value, one_line};
use crate::disk::{Partial, Survivor, create_beside, create_partial, open_partial, partial, sync_folder, target};
use gguf_rs_lib::format::{self, GGUFHeader, GGUFValueType, MetadataValue};
use std::collections::HashSet;
use std::fs::File;
use std::io::{self, BufWriter, Read, Seek, Write};
use std::ops::Range;
use std::path::{Path, PathBuf};

/// The longest tensor name that ggml reads, in bytes (`GGML_MAX_NAME` counts a final zero).
const MAX_NAME: usize = 63;
/// The longest key, in bytes.
const MAX_KEY: usize = 65_535;
/// What the writer says of parts itself.
const SPLIT_KEYS: [&str; 3] = ["split.no", "split.count", "split.tensors.count"];
/// The most parts, as `split.count` is a u16.
const MAX_PARTS: usize = u16::MAX as usize;

/// A tensor to be written.
#[derive(Clone, Debug)]
pub struct NewTensor {
    /// Its name.
    pub name: String,
    /// Its extents, ne0 (columns) first.
    pub dims: Vec<u64>,
    /// How it is stored.
    pub kind: TensorKind,
}

impl NewTensor {
    /// Size of the data in bytes; `None` where that overflows.
    pub fn n_bytes(&self) -> Option<u64> {
        self.kind.n_bytes(&self.dims)
    }

    fn check(&self) -> Result<u64, String> {
        match self {
            NewTensor { name, .. } if name.is_empty() || name.len() > MAX_NAME => {
                Err(format!("a name of {} bytes, expected 1 to {MAX_NAME}", name.len()))
            }
            NewTensor { dims, .. } if !(1..=4).contains(&dims.len()) || dims.contains(&0) => {
                Err(format!("dimensions {dims:?}, expected 1 to 4, none of 0"))
            }
            NewTensor { dims, kind, .. } if !dims[0].is_multiple_of(kind.block_len()) => {
                Err(format!("{} columns, not a multiple of {} ({kind})", dims[0], kind.block_len()))
            }
            t => t.n_bytes().ok_or_else(|| format!("dimensions {:?} overflow", t.dims)),
        }
    }
}

/// How a model is spread over files.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Parts {
    /// One file.
    One,
    /// Files of at most so many bytes, but of one tensor at least; one file where that is enough.
    Size(u64),
    /// Files of so many tensors each, in their order.
    Tensors(Vec<usize>),
}

/// What becomes of the files that a stopped run left.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Unfinished {
    /// They are replaced.
    Replace,
    /// They are gone on with after so many whole tensors.
    Continue(usize),
}

/// One file of those that are written.
struct Part {
    path: PathBuf,
    temp: Option<Partial>, // where it is until the end, once it has been created
    tensors: Range<usize>,
}

/// Writes one model, to one file or to parts.
pub struct GgufWriter {
    path: PathBuf,
    metadata: Vec<(String, Value)>,
    tensors: Vec<NewTensor>,
    sizes: Vec<u64>,
    alignment: u64,
    parts: Vec<Part>,
    part: usize,                   // the one that is written now
    file: Option<BufWriter<File>>, // `None` before and after all parts
    next: usize,                   // the tensor that is due
    given: u64,                    // bytes of it
    resumable: bool,               // unfinished files have names that another run finds
    first: Option<File>,           // the first part, whose lock keeps other runs away when it is written
}

impl GgufWriter {
    /// Plans the file and writes its beginning. Metadata keeps its order; what it says of parts (`split.*`) is left out.
    /// `general.alignment` in it decides the alignment, 32 without it.
    ///
    /// Where there are several parts, they are called `NAME-00001-of-0000N.gguf`, and the metadata is in the first; one is
    /// called `path`.
    pub fn create(
        path: &Path,
        metadata: impl IntoIterator<Item = (String, Value)>,
        tensors: Vec<NewTensor>,
        parts: &Parts,
    ) -> Result<GgufWriter, GgufError> {
        let mut w = GgufWriter::planned(path, metadata, tensors, parts)?;
        w.begin()?;
        w.close_full()?;
        Ok(w)
    }

    /// Checks what shall be written and decides on parts, and touches nothing yet.
    fn planned(
        path: &Path,
        metadata: impl IntoIterator<Item = (String, Value)>,
        tensors: Vec<NewTensor>,
        parts: &Parts,
    ) -> Result<GgufWriter, GgufError> {
        let blame = Blame(path);
        let metadata: Vec<_> = metadata.into_iter().filter(|(k, _)| !SPLIT_KEYS.contains(&k.as_str())).collect();
        let mut keys = HashSet::new();
        for (key, _) in &metadata {
            if key.is_empty() || key.len() > MAX_KEY {
                let problem = format!("a key of {} bytes, expected 1 to {MAX_KEY}", key.len());
                return Err(blame.at(one_line(key, 200), problem));
            }
            if !keys.insert(key.as_str()) {
                return Err(blame.at(one_line(key, 200), "stands twice in the metadata"));
            }
        }
        let alignment = match metadata.iter().find(|(k, _)| k == "general.alignment") {
            None => 32,
            Some((k, v)) => v
                .uint()
                .filter(|n| n.is_power_of_two() && *n <= 1 << 30)
                .ok_or_else(|| blame.at(k, format_args!("found {v}, expected a power of two up to 2^30")))?,
        };
        let (mut sizes, mut names) = (Vec::with_capacity(tensors.len()), HashSet::new());
        for t in &tensors {
            let size = t.check().map_err(|problem| blame.at(field(t), problem))?;
            if !names.insert(t.name.as_str()) {
                return Err(blame.at(field(t), "stands twice"));
            }
            sizes.push(size);
        }
        if let Parts::Tensors(counts) = parts
            && counts.iter().sum::<usize>() != tensors.len()
        {
            let problem = format!("parts of {counts:?} tensors, expected {} together", tensors.len());
            return Err(blame.at("split", problem));
        }
        let ranges = plan(&metadata, &tensors, &sizes, alignment, parts)
            .ok_or_else(|| blame.at("size", "larger than 2^64 bytes"))?;
        if ranges.len() > MAX_PARTS {
            return Err(blame.at("split", format_args!("{} parts, expected at most {MAX_PARTS}", ranges.len())));
        }
        let count = ranges.len() as u32;
        let prefix = if path.extension().is_some_and(|e| e == "gguf") { path.with_extension("") } else { path.into() };
        let part = |(no, tensors): (usize, Range<usize>)| {
            let path = match count {
                1 => path.to_path_buf(),
                _ => super::parts::split_name(&prefix, no as u32, count),
            };
            Part { path, temp: None, tensors }
        };
        let mut parts: Vec<Part> = ranges.into_iter().enumerate().map(part).collect();
        // Told now: at the end of the work the file could not be given its name.
        for p in &mut parts {
            p.path = target(&p.path).map_err(|e| Blame(&p.path).at("create", e))?;
        }
        Ok(GgufWriter {
            path: path.to_path_buf(),
            metadata,
            tensors,
            sizes,
            alignment,
            parts,
            part: 0,
            file: None,
            next: 0,
            given: 0,
            resumable: false,
            first: None,
        })
    }

    /// The files that would be written, and their sizes in bytes; nothing is touched.
    pub fn layout(
        path: &Path,
        metadata: impl IntoIterator<Item = (String, Value)>,
        tensors: Vec<NewTensor>,
        parts: &Parts,
    ) -> Result<Vec<(PathBuf, u64)>, GgufError> {
        let w = GgufWriter::planned(path, metadata, tensors, parts)?;
        let size = |(no, part): (usize, &Part)| {
            let head = w.head(no).map_err(|e| Blame(&part.path).at("header", e))?;
            let data = w.sizes[part.tensors.clone()].iter().map(|s| s.next_multiple_of(w.alignment));
            Ok((part.path.clone(), head.len() as u64 + data.sum::<u64>()))
        };
        w.parts.iter().enumerate().map(size).collect()
    }

    /// As [`GgufWriter::create`], but what is unfinished is called `NAME.partial`, so that [`GgufWriter::keep`] can leave it
    /// and another run go on with it. While one process writes it, others are refused.
    ///
    /// Going on demands that the unfinished files begin as they would now: with the same metadata, tensors and formats.
    pub fn create_resumable(
        path: &Path,
        metadata: impl IntoIterator<Item = (String, Value)>,
        tensors: Vec<NewTensor>,
        parts: &Parts,
        unfinished: Unfinished,
    ) -> Result<GgufWriter, GgufError> {
        let mut w = GgufWriter::planned(path, metadata, tensors, parts)?;
        w.resumable = true;
        match unfinished {
            Unfinished::Replace => w.begin()?,
            Unfinished::Continue(whole) => w.reopen(whole.min(w.tensors.len()))?,
        }
        w.close_full()?;
        Ok(w)
    }

    /// Opens what was written before the tensor `next`.
    fn reopen(&mut self, next: usize) -> Result<(), GgufError> {
        self.part = self.parts.iter().rposition(|p| p.tensors.start < next).unwrap_or(0);
        self.next = next;
        for no in 0..=self.part {
            let part = &self.parts[no];
            let temp = partial(&part.path);
            let head = self.head(no).map_err(|e| Blame(&part.path).at("header", e))?;
            let tensors = part.tensors.start..part.tensors.end.min(next);
            let data: u64 = self.sizes[tensors].iter().map(|s| s.next_multiple_of(self.alignment)).sum();
            let len = head.len() as u64 + data;
            let file = continue_partial(&temp, &head, len).map_err(|e| Blame(&temp).at("resume", e))?;
            if no == self.part {
                self.file = Some(BufWriter::with_capacity(1 << 20, file));
            } else if no == 0 {
                self.first = Some(file);
            }
            self.parts[no].temp = Some(Partial::of_another_run(temp));
        }
        Ok(())
    }

    /// The tensor whose data is due.
    pub fn due(&self) -> Option<&NewTensor> {
        self.tensors.get(self.next)
    }

    /// The files that there will be.
    pub fn paths(&self) -> impl Iterator<Item = &Path> {
        self.parts.iter().map(|p| p.path.as_path())
    }

    /// All data of the tensor that is due, which must be `name`.
    pub fn tensor(&mut self, name: &str, data: &[u8]) -> Result<(), GgufError> {
        match self.due() {
            Some(t) if t.name == name && self.given == 0 && data.len() as u64 == self.sizes[self.next] => {
                self.push(data)
            }
            Some(t) => {
                let (due, size) = (field(t), self.sizes[self.next] - self.given);
                let given = format!("given {} bytes of tensor {}, due are {size}", data.len(), one_line(name, 200));
                Err(Blame(&self.path).at(due, given))
            }
            None => Err(Blame(&self.path).at(format_args!("tensor {}", one_line(name, 200)), "given after the last")),
        }
    }

    /// The next piece of the tensor that is due.
    pub fn push(&mut self, data: &[u8]) -> Result<(), GgufError> {
        let blame = Blame(&self.path);
        let Some(t) = self.due() else {
            return Err(blame.at("data", format_args!("{} bytes given after the last tensor", data.len())));
        };
        let (size, given) = (self.sizes[self.next], self.given + data.len() as u64);
        if given > size {
            return Err(blame.at(field(t), format_args!("given {given} bytes, expected {size}")));
        }
        let file = self.file.as_mut().ok_or_else(|| blame.at("write", "failed before"))?;
        let pad = if given == size { size.next_multiple_of(self.alignment) - size } else { 0 };
        let written = file.write_all(data).and_then(|()| zeros(file, pad));
        self.given = given;
        if let Err(e) = written {
            self.file = None;
            return Err(Blame(self.written()).at("write", e));
        }
        if given == size {
            (self.next, self.given) = (self.next + 1, 0);
            self.close_full()?;
        }
        Ok(())
    }

    /// Renames what was written to its names, in one piece each, and returns them. What cannot be renamed stays under the
    /// name that it has, which the error tells: it is whole, and may be the work of hours.
    pub fn finish(self) -> Result<Vec<PathBuf>, GgufError> {
        if let Some(t) = self.due() {
            let problem = format!("the last bytes given: {} of {}", self.given, self.sizes[self.next]);
            return Err(Blame(&self.path).at(field(t), problem));
        }
        // The first last, which is the one that people name.
        for p in self.parts.iter().rev() {
            let Some(temp) = &p.temp else { continue };
            if let Err(e) = temp.rename(&p.path) {
                let whole = format!("{e}; what was written is whole, in {}", temp.path().display());
                let e = Blame(&p.path).at("rename", whole);
                self.leave();
                return Err(e);
            }
        }
        for p in &self.parts {
            sync_folder(&p.path).map_err(|e| Blame(&p.path).at("sync of the folder", e))?;
        }
        Ok(self.parts.into_iter().map(|p| p.path).collect())
    }

    /// The file that is written now, with everything given so far handed to the system; syncing it is the caller's. `None`
    /// after the last.
    pub fn flushed(&mut self) -> Result<Option<File>, GgufError> {
        let Some(file) = &mut self.file else { return Ok(None) };
        let flushed = file.flush().and_then(|()| file.get_ref().try_clone());
        flushed.map(Some).map_err(|e| Blame(self.written()).at("write", e))
    }

    /// Syncs what was written and leaves it for another run ([`GgufWriter::create_resumable`]).
    pub fn keep(mut self) -> Result<(), GgufError> {
        if let Some(mut file) = self.file.take() {
            let synced = file.flush().and_then(|()| file.get_ref().sync_all());
            synced.map_err(|e| Blame(self.written()).at("write", e))?;
        }
        self.leave();
        Ok(())
    }

    /// The files that are written: who notes how far that came says that they are of use to another run.
    pub fn survivors(&self) -> Vec<Survivor> {
        self.parts.iter().filter_map(|p| p.temp.as_ref()).map(Partial::survivor).collect()
    }

    /// What was written stays where it is.
    fn leave(&self) {
        self.parts.iter().filter_map(|p| p.temp.as_ref()).for_each(Partial::keep);
    }

    /// Closes the part if its last tensor is written, and begins the next.
    fn close_full(&mut self) -> Result<(), GgufError> {
        while self.part < self.parts.len() && self.next == self.parts[self.part].tensors.end {
            if let Some(mut file) = self.file.take() {
                let synced = file.flush().and_then(|()| file.get_ref().sync_all());
                synced.map_err(|e| Blame(self.written()).at("write", e))?;
                if self.part == 0 {
                    self.first = file.into_inner().ok();
                }
            }
            self.part += 1;
            if self.part < self.parts.len() {
                self.begin()?;
            }
        }
        Ok(())
    }

    /// The file that is written now, for errors.
    fn written(&self) -> &Path {
        let part = &self.parts[self.part];
        part.temp.as_ref().map_or(&part.path, Partial::path)
    }

    /// Creates a part and writes what stands before its data.
    fn begin(&mut self) -> Result<(), GgufError> {
        let part = &self.parts[self.part];
        let head = self.head(self.part).map_err(|e| Blame(&part.path).at("header", e))?;
        let create = if self.resumable { create_partial } else { create_beside };
        let (file, temp) = create(&part.path).map_err(|e| Blame(&part.path).at("create", e))?;
        self.parts[self.part].temp = Some(temp);
        let mut file = BufWriter::with_capacity(1 << 20, file);
        file.write_all(&head).map_err(|e| Blame(self.written()).at("write", e))?;
        self.file = Some(file);
        Ok(())
    }

    /// Header, metadata and descriptions of a part, padded.
    fn head(&self, no: usize) -> gguf_rs_lib::Result<Vec<u8>> {
        let part = &self.parts[no];
        let metadata = part_metadata(&self.metadata, no, self.parts.len(), self.tensors.len());
        let mut head = Vec::new();
        GGUFHeader::new(part.tensors.len() as u64, metadata.len() as u64).write_to(&mut head)?;
        for (key, value) in &metadata {
            MetadataValue::String(key.clone()).write_to(&mut head)?;
            encode(value, &mut head)?;
        }
        let mut offset = 0u64;
        for i in part.tensors.clone() {
            let t = &self.tensors[i];
            format::TensorInfo::new(t.name.clone(), t.dims.clone(), t.kind.id(), offset).write_to(&mut head)?;
            offset += self.sizes[i].next_multiple_of(self.alignment);
        }
        head.resize(head.len().next_multiple_of(self.alignment as usize), 0);
        Ok(head)
    }
}

/// Opens `NAME.partial`, which must begin with `head`, cuts it to `len` bytes and goes to its end.
fn continue_partial(temp: &Path, head: &[u8], len: u64) -> io::Result<File> {
    let mut file = open_partial(temp)?;
    let mut found = vec![0; head.len()];
    let unlike = |what| io::Error::other(format!("{what}; run without --resume"));
    if file.metadata()?.len() < len {
        return Err(unlike("shorter than what was noted"));
    }
    file.read_exact(&mut found)?;
    if found != head {
        return Err(unlike("of another model, or of other formats, than are asked for now"));
    }
    file.set_len(len)?;
    file.seek(io::SeekFrom::End(0))?;
    Ok(file)
}

/// What errors call a tensor.
fn field(t: &NewTensor) -> String {
    format!("tensor {}", one_line(&t.name, 200))
}

fn zeros(w: &mut impl Write, mut n: u64) -> io::Result<()> {
    let block = [0; 4096];
    while n > 0 {
        let now = n.min(block.len() as u64);
        w.write_all(&block[..now as usize])?;
        n -= now;
    }
    Ok(())
}

/// The metadata of part `no` of `count`: all of it in the first. Every part says its place, and its alignment.
fn part_metadata(all: &[(String, Value)], no: usize, count: usize, tensors: usize) -> Vec<(String, Value)> {
    let wanted = |k: &str| no == 0 || k == "general.alignment";
    let mut own: Vec<_> = all.iter().filter(|(k, _)| wanted(k)).cloned().collect();
    if count > 1 {
        // In the types of llama.cpp's gguf-split.
        let [no_key, count_key, tensors_key] = SPLIT_KEYS.map(String::from);
        own.push((no_key, MetadataValue::U16(no as u16).into()));
        own.push((count_key, MetadataValue::U16(count as u16).into()));
        own.push((tensors_key, MetadataValue::I32(tensors as i32).into()));
    }
    own
}

/// A value with its type's id before it.
fn encode(v: &Value, out: &mut Vec<u8>) -> gguf_rs_lib::Result<()> {
    let mut array = |element: GGUFValueType, len: usize, bytes: &[u8]| {
        out.extend((GGUFValueType::Array as u32).to_le_bytes());
        out.extend((element as u32).to_le_bytes());
        out.extend((len as u64).to_le_bytes());
        out.extend(bytes);
    };
    match v {
        Value::Strings(s) => array(GGUFValueType::String, s.len(), s.encoded()),
        Value::Numbers(n) => array(n.element(), n.len(), n.encoded()),
        Value::Plain(v) => {
            out.extend((v.value_type() as u32).to_le_bytes());
            v.write_to(out)?;
        }
    }
    Ok(())
}

/// Which tensors each part holds; `None` where sizes overflow.
fn plan(
    metadata: &[(String, Value)],
    tensors: &[NewTensor],
    sizes: &[u64],
    alignment: u64,
    parts: &Parts,
) -> Option<Vec<Range<usize>>> {
    let max_part = match parts {
        Parts::One => None,
        Parts::Size(most) => Some(*most),
        Parts::Tensors(counts) => {
            let ranges = counts.iter().scan(0, |end, n| {
                *end += n;
                Some(*end - n..*end)
            });
            return Some(ranges.collect());
        }
    };
    let head = |first: bool| {
        let metadata = part_metadata(metadata, if first { 0 } else { 1 }, 2, 0);
        metadata.iter().fold(24, |n, (k, v)| n + 12 + k.len() as u64 + v.encoded_len())
    };
    let (mut parts, mut start) = (Vec::new(), 0);
    let (mut info, mut data) = (head(true), 0u64);
    for (i, (t, &size)) in tensors.iter().zip(sizes).enumerate() {
        let (own_info, own_data) = (24 + t.name.len() as u64 + 8 * t.dims.len() as u64, aligned(size, alignment)?);
        let total = aligned(info + own_info, alignment)?.checked_add(data)?.checked_add(own_data)?;
        if i > start && max_part.is_some_and(|most| total > most) {
            parts.push(start..i);
            (start, info, data) = (i, head(false), 0);
        }
        (info, data) = (info + own_info, data.checked_add(own_data)?);
    }
    parts.push(start..tensors.len());
    Some(parts)
}

fn aligned(n: u64, alignment: u64) -> Option<u64> {
    n.checked_next_multiple_of(alignment)
}
