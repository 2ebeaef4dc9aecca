//! Files that appear whole or not at all: written under another name, synced, renamed.

use std::fs::File;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

/// The name under which a file is written until it is whole: `NAME.partial`, in the same folder.
pub fn partial(path: &Path) -> PathBuf {
    let mut name = path.file_name().unwrap_or_default().to_os_string();
    name.push(".partial");
    path.with_file_name(name)
}

/// Makes a finished file durable and gives it its name.
pub fn publish(file: &File, from: &Path, to: &Path) -> io::Result<()> {
    file.sync_all()?;
    std::fs::rename(from, to)?;
    // The name is durable only when its folder is.
    let dir = to.parent().filter(|d| !d.as_os_str().is_empty()).unwrap_or(Path::new("."));
    File::open(dir)?.sync_all()
}

/// Writes a file of these bytes.
pub fn write(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let from = partial(path);
    let mut file = File::create(&from)?;
    file.write_all(bytes)?;
    publish(&file, &from, path)
}
