//! The cache folder, locks, checksums and the space that is left.

use super::{CatalogError, Result, io_error};
use crate::disk;
use sha2::{Digest, Sha256};
use std::fs::{self, File, TryLockError};
use std::io::{self, Read, Seek};
use std::path::{Path, PathBuf};

/// An environment variable that is set to something.
pub(super) fn env(name: &str) -> Option<String> {
    std::env::var(name).ok().filter(|v| !v.is_empty())
}

/// The user's cache folder (XDG).
pub(super) fn xdg_cache() -> Result<PathBuf> {
    use etcetera::BaseStrategy;
    etcetera::choose_base_strategy()
        .map(|s| s.cache_dir())
        .map_err(|e| CatalogError::Io { path: "~/.cache".into(), error: io::Error::other(e) })
}

/// The folder of what oxcart keeps: `OXCART_CACHE`, or `oxcart` in the user's cache folder.
pub fn cache_dir() -> Result<PathBuf> {
    match env("OXCART_CACHE") {
        Some(dir) => Ok(dir.into()),
        None => Ok(xdg_cache()?.join("oxcart")),
    }
}

/// Creates a folder and those above it.
pub(super) fn create_dir(dir: &Path) -> Result<()> {
    fs::create_dir_all(dir).map_err(io_error(dir))
}

/// Waits until no other process works on what `path` guards. The lock ends with the file handle, and with the process.
pub(super) fn lock(path: &Path, what: &str) -> Result<File> {
    if let Some(dir) = path.parent() {
        create_dir(dir)?;
    }
    let file = File::options().create(true).write(true).truncate(false).open(path).map_err(io_error(path))?;
    match file.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => {
            tell!("another process is fetching {what}: waiting for it");
            file.lock().map_err(io_error(path))?;
        }
        Err(TryLockError::Error(e)) => return Err(io_error(path)(e)),
    }
    Ok(file)
}

/// Refuses to begin what the disk has no room for.
pub(super) fn check_space(dir: &Path, needed: u64) -> Result<()> {
    let free = disk::free_space(dir).map_err(io_error(dir))?;
    if free < needed {
        return Err(CatalogError::Space { dir: dir.to_path_buf(), free, needed });
    }
    Ok(())
}

/// Makes a finished file durable and gives it its name.
pub(super) fn publish(file: &File, from: &Path, to: &Path) -> Result<()> {
    disk::publish(file, from, to).map_err(io_error(to))
}

/// 64 lower-case hex digits.
pub(super) fn is_sha256(s: &str) -> bool {
    s.len() == 64 && s.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
}

/// The digest in hex digits.
pub(super) fn hex(hash: Sha256) -> String {
    hash.finalize().iter().map(|b| format!("{b:02x}")).collect()
}

/// Feeds the first `len` bytes of a file to a hash.
pub(super) fn hash_file(file: &mut File, len: u64, path: &Path) -> Result<Sha256> {
    let mut hash = Sha256::new();
    let mut buffer = vec![0; 1 << 18];
    file.rewind().map_err(io_error(path))?;
    let mut from = file.take(len);
    loop {
        match from.read(&mut buffer).map_err(io_error(path))? {
            0 => return Ok(hash),
            n => hash.update(&buffer[..n]),
        }
    }
}
