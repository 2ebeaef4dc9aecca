//! The walk over one GGUF: header, metadata, tensor descriptions. The data is never touched.

use super::kind::TensorKind;
use super::parts::{Cursor, Span};
use super::values::{self, one_line};
use super::{Blame, Gguf, GgufError, Tensor};
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

/// Memory for decoded metadata and tensor descriptions, in bytes. Arrays stay in the file; what is left, a few hundred
/// numbers and a chat template, takes some hundred KiB in real files.
const BUDGET: u64 = 64 << 20;
/// The longest key in bytes, as the format's description has it.
const MAX_KEY: u64 = 65_535;
/// The longest tensor name in bytes. ggml allows 63; writers of other models go beyond.
const MAX_NAME: u64 = 1024;
/// The largest alignment in bytes, a huge page of 1 GiB.
const MAX_ALIGNMENT: u64 = 1 << 30;
/// What the maps and lists take for an entry beside its name, in bytes, rounded up.
const ENTRY_COST: u64 = 256;

/// Reads the GGUF in `span`; errors name it by `path`.
pub(super) fn read(path: &Path, span: Arc<Span>, files: Vec<PathBuf>) -> Result<Gguf, GgufError> {
    let blame = Blame(path);
    let mut r = Cursor::new(&span, BUDGET, blame);
    let version = version(&mut r)?;
    let n_tensors = r.u64("tensor count")?;
    let n_keys = r.u64("metadata count")?;
    // The shortest entries: a key of one byte with a value of one; a name of one byte with one dimension.
    for (what, n, least) in [("metadata count", n_keys, 14), ("tensor count", n_tensors, 33)] {
        if n > r.left() / least {
            return Err(blame.at(what, format_args!("found {n}, more than a file of {} bytes holds", span.len())));
        }
    }

    let (mut keys, mut map) = (Vec::new(), HashMap::new());
    for i in 0..n_keys {
        let key = r.str(format_args!("key {i}"), MAX_KEY)?.into_owned();
        let label = one_line(&key, 200);
        if key.is_empty() {
            return Err(blame.at(format_args!("key {i}"), "empty"));
        }
        r.charge(&label, 2 * key.len() as u64 + ENTRY_COST)?;
        let value = values::read(&mut r, &label)?;
        if map.insert(key.clone(), value).is_some() {
            return Err(blame.at(label, "stands twice in the metadata"));
        }
        keys.push(key);
    }

    let alignment = match map.get("general.alignment") {
        None => 32,
        Some(v) => v.uint().ok_or_else(|| {
            blame.at("general.alignment", format_args!("found {} {v}, expected an integer", v.type_name()))
        })?,
    };
    if !alignment.is_power_of_two() || alignment > MAX_ALIGNMENT {
        return Err(
            blame.at("general.alignment", format_args!("found {alignment}, expected a power of two up to 2^30"))
        );
    }

    let (mut tensors, mut by_name) = (Vec::new(), HashMap::new());
    for i in 0..n_tensors {
        let t = tensor(&mut r, i, &span)?;
        r.charge(t.field(), 2 * t.name.len() as u64 + ENTRY_COST)?;
        if by_name.insert(t.name.clone(), tensors.len()).is_some() {
            return Err(blame.at(t.field(), "stands twice"));
        }
        tensors.push(t);
    }
    place(&mut tensors, r.position(), alignment, span.len(), blame)?;
    let file_size = span.len();
    let path = path.to_path_buf();
    let split = vec![tensors.len()];
    Ok(Gguf { path, parts: files, split, file_size, version, alignment, keys, values: map, tensors, by_name })
}

/// Magic and version.
fn version(r: &mut Cursor<'_>) -> Result<u32, GgufError> {
    let magic = r.magic()?;
    if magic != *b"GGUF" {
        let what = match &magic {
            b"lmgg" | b"fmgg" | b"tjgg" => ": a GGML file from before GGUF, to be converted",
            b"vers" => ": probably a git-lfs pointer, not the file itself",
            b"<!DO" | b"<htm" => ": probably a web page, not the file itself",
            b"PK\x03\x04" => ": a zip archive",
            _ => "",
        };
        return Err(r.error("magic", format_args!("found \"{}\", expected \"GGUF\"{what}", magic.escape_ascii())));
    }
    match r.u32("version")? {
        v @ 2..=3 => Ok(v),
        v if (1..=3).contains(&v.swap_bytes()) => Err(r.error("version", "a big-endian file, expected little-endian")),
        v => Err(r.error("version", format_args!("found {v}, expected 2 or 3"))),
    }
}

/// One description; its offset still counts from the beginning of the data.
fn tensor(r: &mut Cursor<'_>, i: u64, span: &Arc<Span>) -> Result<Tensor, GgufError> {
    let name = r.str(format_args!("name of tensor {i}"), MAX_NAME)?.into_owned();
    if name.is_empty() {
        return Err(r.error(format_args!("name of tensor {i}"), "empty"));
    }
    let field = format!("tensor {}", one_line(&name, 200));
    let n_dims = r.u32(&field)?;
    if !(1..=4).contains(&n_dims) {
        return Err(r.error(field, format_args!("{n_dims} dimensions, expected 1 to 4")));
    }
    let dims = (0..n_dims).map(|_| r.u64(&field)).collect::<Result<Vec<_>, _>>()?;
    let kind = TensorKind::from_id(r.u32(&field)?)
        .map_err(|foreign| r.error(&field, format_args!("type {foreign}, is not supported")))?;
    let at = r.u64(&field)?;
    if dims.contains(&0) {
        return Err(r.error(field, format_args!("dimensions {dims:?}, expected none of 0")));
    }
    let size = kind.n_bytes(&dims).ok_or_else(|| r.error(&field, format_args!("dimensions {dims:?} overflow")))?;
    let block = kind.block_len();
    if !dims[0].is_multiple_of(block) {
        return Err(r.error(field, format_args!("{} columns, not a multiple of {block} ({kind})", dims[0])));
    }
    Ok(Tensor { name, dims, kind, at, size, span: span.clone(), bytes: OnceLock::new() })
}

/// Checks that the tensors follow each other as ggml demands, each padded to the alignment, and turns their offsets into
/// positions in the file.
fn place(ts: &mut [Tensor], end: u64, alignment: u64, len: u64, blame: Blame<'_>) -> Result<(), GgufError> {
    let data = end.next_multiple_of(alignment);
    let mut next = 0u64;
    for i in 0..ts.len() {
        let t = &ts[i];
        let wrong = |problem: String| blame.at(t.field(), format_args!("data at offset {}, {problem}", t.at));
        if !t.at.is_multiple_of(alignment) {
            return Err(wrong(format!("not a multiple of the alignment {alignment}")));
        }
        if t.at != next {
            let before = match i.checked_sub(1).map(|i| ts[i].field()) {
                Some(before) if t.at < next => format!(": overlaps {before}"),
                Some(before) => format!(": a gap after {before}"),
                None => String::new(),
            };
            return Err(wrong(format!("expected {next}{before}")));
        }
        let last = data.checked_add(t.at).and_then(|at| at.checked_add(t.size));
        if last.is_none_or(|last| last > len) {
            return Err(wrong(format!("{} bytes, past the end of a file of {len} bytes", t.size)));
        }
        next = (t.at + t.size).next_multiple_of(alignment);
        ts[i].at += data;
    }
    Ok(())
}
