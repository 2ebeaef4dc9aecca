//! Files that appear whole or not at all: written under another name, synced, renamed; a [`Partial`] is one that is not yet
//! whole. Files that are read whole, if they have an end. And the space that a disk has left.

use std::fs::{self, File, TryLockError};
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard};

/// The folder of a file.
pub fn folder(path: &Path) -> &Path {
    path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// The path that a word means: `~` is the home folder.
pub fn home_path(word: &str) -> PathBuf {
    match (word.strip_prefix("~/"), std::env::var_os("HOME")) {
        (Some(rest), Some(home)) => Path::new(&home).join(rest),
        _ => PathBuf::from(word),
    }
}

/// The name of an unfinished file that another run finds: `NAME.partial`, in the same folder.
pub fn partial(path: &Path) -> PathBuf {
    let mut temp = path.as_os_str().to_owned();
    temp.push(".partial");
    temp.into()
}

/// Where a file of this name is written: the name, or where the link leads that has it. Refuses what no file can be renamed
/// to, before the work whose end that is; and what is no file, as a device: it would not be written but replaced.
pub fn target(path: &Path) -> io::Result<PathBuf> {
    let is = |what: &str| Err(io::Error::other(format!("is {what}, expected the name of a file")));
    let link = fs::symlink_metadata(path).is_ok_and(|m| m.is_symlink());
    match fs::metadata(path) {
        Ok(m) if m.is_file() && link => path.canonicalize(),
        Ok(m) if m.is_file() => Ok(path.to_path_buf()),
        Ok(m) => is(if m.is_dir() { "a folder" } else { "not a regular file" }),
        Err(_) if link => is("a dangling link"),
        Err(_) => match fs::metadata(folder(path))?.is_dir() {
            true => Ok(path.to_path_buf()),
            false => is("in no folder"),
        },
    }
}

/// Locks a file for this process; the lock ends with the file.
fn lock(file: &File) -> io::Result<()> {
    match file.try_lock() {
        Err(TryLockError::WouldBlock) => Err(io::Error::other("another process is writing it")),
        Err(TryLockError::Error(e)) if e.kind() != io::ErrorKind::Unsupported => Err(e),
        // Some network file systems have no locks.
        _ => Ok(()),
    }
}

/// Opens an unfinished file that nobody writes; never through a link.
pub fn open_partial(temp: &Path) -> io::Result<File> {
    if !fs::symlink_metadata(temp)?.is_file() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a regular file"));
    }
    let file = File::options().read(true).write(true).open(temp)?;
    lock(&file)?;
    Ok(file)
}

/// The files that go with this process.
fn unfinished() -> MutexGuard<'static, Vec<(PathBuf, bool)>> {
    // And whether they stay when the program is ended.
    static UNFINISHED: Mutex<Vec<(PathBuf, bool)>> = Mutex::new(Vec::new());
    UNFINISHED.lock().unwrap_or_else(|e| e.into_inner())
}

/// Removes all files that are not whole, of a program that is about to end without dropping them: whoever would begin or
/// publish one after this waits for ever.
pub fn remove_unfinished() {
    let mut all = unfinished();
    // Nobody is left to be told of one that stays.
    all.drain(..).filter(|(_, stays)| !stays).for_each(|(path, _)| drop(fs::remove_file(path)));
    std::mem::forget(all);
}

/// A file that is not yet whole. It goes when this is dropped, unless it was published or is kept.
pub struct Partial(PathBuf);

/// Says of an unfinished file that it is of use to another run: it stays where the program is ended, though it still goes
/// when its [`Partial`] is dropped.
#[derive(Clone)]
pub struct Survivor(PathBuf);

impl Survivor {
    /// It is of use from now on.
    pub fn survive(&self) {
        let mut all = unfinished();
        let at = all.iter().position(|(path, _)| *path == self.0);
        at.into_iter().for_each(|i| all[i].1 = true);
    }
}

impl Partial {
    /// The file of this name is not whole; it need not be there yet.
    pub fn new(path: PathBuf) -> Partial {
        unfinished().push((path.clone(), false));
        Partial(path)
    }

    /// The file of this name was left by another run, and stays where this one is ended.
    pub fn of_another_run(path: PathBuf) -> Partial {
        unfinished().push((path.clone(), true));
        Partial(path)
    }

    /// Who may say that it is of use to another run.
    pub fn survivor(&self) -> Survivor {
        Survivor(self.0.clone())
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// Leaves it where it is.
    pub fn keep(&self) {
        self.forget(&mut unfinished());
    }

    /// Gives it its name, which an older file loses.
    pub fn rename(&self, to: &Path) -> io::Result<()> {
        let mut all = unfinished();
        fs::rename(&self.0, to)?;
        self.forget(&mut all);
        Ok(())
    }

    /// Makes it durable and gives it its name.
    pub fn publish(self, file: &File, to: &Path) -> io::Result<()> {
        file.sync_all()?;
        self.rename(to)?;
        sync_folder(to)
    }

    /// Whether it would have gone.
    fn forget(&self, all: &mut Vec<(PathBuf, bool)>) -> bool {
        let at = all.iter().position(|(path, _)| *path == self.0);
        at.map(|i| all.swap_remove(i)).is_some()
    }
}

impl Drop for Partial {
    fn drop(&mut self) {
        if self.forget(&mut unfinished()) {
            // There is nobody left to tell.
            let _ = fs::remove_file(&self.0);
        }
    }
}

/// Creates `NAME.partial`, in the place of one that nobody writes any more, or of a link.
pub fn create_partial(path: &Path) -> io::Result<(File, Partial)> {
    let temp = partial(path);
    match fs::symlink_metadata(&temp) {
        Ok(m) if m.is_symlink() => fs::remove_file(&temp)?,
        Ok(_) => {
            let _stale = open_partial(&temp)?;
            fs::remove_file(&temp)?;
        }
        Err(e) if e.kind() == io::ErrorKind::NotFound => {}
        Err(e) => return Err(e),
    }
    let (file, temp) = create_new(temp)?;
    lock(&file)?;
    Ok((file, temp))
}

/// Creates a file that is not yet whole, of a name that nobody has.
fn create_new(path: PathBuf) -> io::Result<(File, Partial)> {
    // Whoever removes what is unfinished finds it, or it is not there.
    let mut all = unfinished();
    let file = File::options().write(true).create_new(true).open(&path)?;
    all.push((path.clone(), false));
    Ok((file, Partial(path)))
}

/// Creates a file of a name that nobody has yet, `NAME.PID-N.partial`: never through a link, nor over the file of another
/// run, though process ids come again.
pub fn create_beside(path: &Path) -> io::Result<(File, Partial)> {
    let mut n = 0;
    loop {
        let mut temp = path.as_os_str().to_owned();
        temp.push(format!(".{}-{n}.partial", std::process::id()));
        match create_new(temp.into()) {
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists && n < 1000 => n += 1,
            created => return created,
        }
    }
}

/// As [`Partial::publish`], of a file that would have stayed.
pub fn publish(file: &File, from: &Path, to: &Path) -> io::Result<()> {
    file.sync_all()?;
    fs::rename(from, to)?;
    sync_folder(to)
}

/// Makes the renaming to a path last through a power failure: a name is durable only when its folder is.
pub fn sync_folder(path: &Path) -> io::Result<()> {
    if cfg!(unix) {
        File::open(folder(path))?.sync_all()?;
    }
    Ok(())
}

/// Writes a file of these bytes. One that fails leaves nothing, and an older file as it was.
pub fn write(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let path = &target(path)?;
    let (mut file, temp) = create_partial(path)?;
    file.write_all(bytes)?;
    temp.publish(&file, path)
}

/// Writes a file that must not be there yet, for its owner alone.
pub fn write_private(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let open = File::options().write(true).create_new(true).mode(0o600).open(path);
    let mut file = open.map_err(|e| match e.kind() {
        io::ErrorKind::AlreadyExists => io::Error::new(e.kind(), "exists already"),
        _ => e,
    })?;
    let written = file.write_all(bytes).and_then(|()| file.sync_all());
    if written.is_err() {
        // It is ours: half of it is worth nothing.
        let _ = fs::remove_file(path);
    }
    written
}

/// Bytes of a text that is read whole, at most.
pub const MOST_TEXT: u64 = 1 << 30;
/// Bytes of a file of settings or of a template, at most.
pub const MOST_SETTINGS: u64 = 1 << 20;

/// A file's bytes, `most` of them at most: a device has no end.
pub fn read(path: &Path, most: u64) -> io::Result<Vec<u8>> {
    read_from(File::open(path)?, most)
}

/// The same of what is open, up to its end.
pub fn read_from(open: impl Read, most: u64) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    open.take(most + 1).read_to_end(&mut bytes)?;
    match bytes.len() as u64 > most {
        true => Err(io::Error::other(format!("larger than {most} bytes, the most that is read"))),
        false => Ok(bytes),
    }
}

/// The same of a file that is a text.
pub fn read_text(path: &Path, most: u64) -> io::Result<String> {
    String::from_utf8(read(path, most)?).map_err(|e| {
        let line = line_of(e.as_bytes(), e.utf8_error().valid_up_to());
        io::Error::new(io::ErrorKind::InvalidData, format!("line {line}: not UTF-8, expected a text"))
    })
}

/// The line of a text, counted from one, that its byte `at` is in.
pub fn line_of(text: &[u8], at: usize) -> usize {
    text[..at].iter().filter(|&&b| b == b'\n').count() + 1
}

/// Bytes that are free where a file or folder is.
pub fn free_space(path: &Path) -> io::Result<u64> {
    let s = rustix::fs::statvfs(path)?;
    Ok(s.f_bavail.saturating_mul(s.f_frsize))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_whole_or_as_they_were() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        let names = || fs::read_dir(dir.path()).unwrap().count();
        for text in ["first", "second"] {
            // A link in the place of the unfinished file is not followed.
            std::os::unix::fs::symlink(dir.path().join("other"), partial(&path)).unwrap();
            write(&path, text.as_bytes()).unwrap();
            assert_eq!((fs::read_to_string(&path).unwrap().as_str(), names()), (text, 1));
        }
        // Nor is the unfinished file of another process taken away, as long as it is written.
        let (theirs, temp) = create_partial(&path).unwrap();
        assert_eq!(write(&path, b"x").unwrap_err().to_string(), "another process is writing it");
        assert!(temp.path().exists());
        drop(theirs);
        write(&path, b"x").unwrap();
        let (_, beside) = create_beside(&path).unwrap();
        assert_ne!(create_beside(&path).unwrap().1.path(), beside.path());
        beside.keep();
        let left = beside.path().to_path_buf();
        drop(beside);
        assert!(left.exists());
        fs::create_dir(dir.path().join("folder")).unwrap();
        let before = names();
        assert!(write(&dir.path().join("folder"), b"x").is_err() && names() == before, "nothing is left");
    }

    #[test]
    fn what_has_no_end_is_not_read_to_it() {
        let told = |path: &str, most| read_text(Path::new(path), most).map_err(|e| e.to_string());
        assert_eq!(told("/dev/zero", 100), Err("larger than 100 bytes, the most that is read".into()));
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        fs::write(&path, b"one\ntwo").unwrap();
        assert_eq!(read_text(&path, 7).unwrap(), "one\ntwo");
        assert!(read_text(&path, 6).is_err());
        fs::write(&path, b"one\nt\xFFo").unwrap();
        assert_eq!(read_text(&path, 7).unwrap_err().to_string(), "line 2: not UTF-8, expected a text");
    }

    #[test]
    fn names_that_no_file_can_have_are_known_before() {
        let dir = tempfile::tempdir().unwrap();
        let told = |path: &Path| target(path).map_err(|e| e.to_string());
        let [new, link, lost] = ["new", "link", "lost"].map(|n| dir.path().join(n));
        assert_eq!(told(&new), Ok(new.clone()));
        assert_eq!(told(Path::new("no-such-file")), Ok("no-such-file".into()));
        // A link stays one, and what it leads to is written.
        std::os::unix::fs::symlink("new", &link).unwrap();
        assert_eq!(told(&link), Err("is a dangling link, expected the name of a file".into()));
        write(&new, b"old").unwrap();
        write(&link, b"text").unwrap();
        assert_eq!(fs::read_to_string(&new).unwrap(), "text");
        assert!(link.is_symlink() && told(&link) == Ok(new.canonicalize().unwrap()));
        std::os::unix::fs::symlink("lost", &lost).unwrap();
        assert!(told(&lost).is_err(), "a link to itself");
        assert_eq!(told(dir.path()), Err("is a folder, expected the name of a file".into()));
        assert_eq!(told(Path::new("/dev/null")), Err("is not a regular file, expected the name of a file".into()));
        assert_eq!(told(&new.join("x")), Err("is in no folder, expected the name of a file".into()));
        assert_eq!(told(&dir.path().join("no/x")), Err("No such file or directory (os error 2)".into()));
    }
}
