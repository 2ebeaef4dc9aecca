//! Files as mapped bytes.
//!
//! The one unsafe room of this crate for mappings. A mapping stays valid as long as the file keeps its length: a file that
//! is cut short while it is in use makes the system stop the program (SIGBUS). Nothing here can prevent that; files that
//! are replaced (written beside and renamed, as downloads and `quantize` do) are safe.
#![allow(unsafe_code)]

use memmap2::Mmap;
use std::fs::File;
use std::io;
use std::ops::{Deref, Range};
use std::path::Path;
use std::sync::Arc;

/// Maps a whole file for reading. An empty file cannot be mapped and is an error.
pub fn map(path: &Path) -> io::Result<Arc<Mmap>> {
    let file = File::open(path)?;
    let meta = file.metadata()?;
    if !meta.is_file() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a regular file"));
    }
    if meta.len() == 0 {
        return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the file is empty"));
    }
    // SAFETY: read-only and private to this process; see the module's words on files that shrink.
    Ok(Arc::new(unsafe { Mmap::map(&file)? }))
}

/// Bytes of a mapping, or of memory. Cheap to clone: what they lie in is shared.
#[derive(Clone)]
pub struct Bytes {
    source: Source,
    range: Range<usize>,
}

#[derive(Clone)]
enum Source {
    Mapped(Arc<Mmap>),
    Owned(Arc<[u8]>),
}

impl Bytes {
    /// A part of a mapping. Panics where it is not inside.
    pub fn mapped(map: Arc<Mmap>, range: Range<usize>) -> Bytes {
        assert!(range.start <= range.end && range.end <= map.len());
        Bytes { source: Source::Mapped(map), range }
    }

    /// Bytes in memory.
    pub fn owned(bytes: Vec<u8>) -> Bytes {
        let range = 0..bytes.len();
        Bytes { source: Source::Owned(bytes.into()), range }
    }

    /// A part of these bytes. Panics where it is not inside.
    pub fn slice(&self, range: Range<usize>) -> Bytes {
        assert!(range.start <= range.end && range.end <= self.len());
        Bytes { source: self.source.clone(), range: self.range.start + range.start..self.range.start + range.end }
    }

    /// Whether they are views of a file: no memory of their own.
    pub fn is_mapped(&self) -> bool {
        matches!(self.source, Source::Mapped(_))
    }
}

impl Deref for Bytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match &self.source {
            Source::Mapped(m) => &m[self.range.clone()],
            Source::Owned(b) => &b[self.range.clone()],
        }
    }
}
