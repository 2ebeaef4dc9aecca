//! Files as mapped bytes.
//!
//! The one unsafe room of this crate for mappings.
//!
//! A mapping is only as long as the file stays. A file that another program cuts short while it is mapped (opened for
//! writing in place, or truncated), or a disk that fails, makes the next access to the lost pages raise SIGBUS: the work
//! cannot go on, but [`on_fault`] lets a program say why and end in order. A file overwritten in place changes the weights
//! under a running model, and nothing tells. Files that are *replaced*, written beside and renamed as downloads and the
//! writer of GGUF do, are safe: the mapping keeps the old file until it is dropped.
#![allow(unsafe_code)]

use memmap2::{Advice, Mmap, MmapMut, MmapOptions, UncheckedAdvice};
use std::fs::{self, File};
#[cfg(target_os = "linux")]
use std::io::Read;
use std::io::{self, ErrorKind};
use std::ops::{Deref, Range};
#[cfg(target_os = "linux")]
use std::os::fd::IntoRawFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
#[cfg(target_os = "linux")]
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard};

/// Bytes of a mapped file, or of memory: a view into what it keeps alive. Cheap to clone.
///
/// Nothing is promised about the address: a view of a file that was cut anywhere begins anywhere.
#[derive(Clone)]
pub struct Bytes {
    source: Source,
    range: Range<usize>,
}

#[derive(Clone)]
enum Source {
    Mapped(Arc<Mapping>),
    Owned(Arc<[u8]>),
    Filled(Arc<Mmap>),
}

/// A mapped file, which stays open: what is asked of the page cache is asked of the file.
struct Mapping {
    map: Mmap,
    file: File,
    path: PathBuf,
}

impl Bytes {
    /// Maps a whole file for reading.
    ///
    /// What is not a regular file (a folder, a pipe, which would block) is refused, and so is an empty file, which cannot be
    /// mapped.
    pub fn map(path: &Path) -> io::Result<Bytes> {
        let unfit = |what| Err(io::Error::new(ErrorKind::InvalidInput, what));
        let regular = |m: fs::Metadata| match m.is_dir() {
            _ if m.is_file() => Ok(m.len()),
            true => unfit("a folder, expected a file"),
            false => unfit("not a regular file"),
        };
        regular(fs::metadata(path)?)?;
        let file = File::open(path)?;
        if regular(file.metadata()?)? == 0 {
            return Err(io::Error::new(ErrorKind::UnexpectedEof, "the file is empty"));
        }
        // SAFETY: the mapping is read-only and its length was taken from the open file; that nobody shortens the file
        // while it is mapped is the condition that the module's text states.
        let map = unsafe { Mmap::map(&file)? };
        let range = 0..map.len();
        mapped().push((map.as_ptr().addr()..map.as_ptr().addr() + map.len(), path.to_path_buf()));
        Ok(Bytes { source: Source::Mapped(Arc::new(Mapping { map, file, path: path.to_path_buf() })), range })
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

    /// Whether they are views of a file, with no memory of their own.
    pub fn is_mapped(&self) -> bool {
        matches!(self.source, Source::Mapped(_))
    }

    /// The file, if they are views of one.
    pub fn path(&self) -> Option<&Path> {
        match &self.source {
            Source::Mapped(m) => Some(&m.path),
            Source::Owned(_) | Source::Filled(_) => None,
        }
    }

    /// Tells the system that these bytes will not be read again soon, so that they stop counting as this program's memory.
    /// What is read all the same comes from the file again. A hint.
    pub fn will_not_need(&self) {
        if let Source::Mapped(m) = &self.source {
            // SAFETY: the mapping is of a file and nobody writes through it, so a page that is given up comes back with the
            // same bytes; views of it stay valid throughout.
            let _ =
                unsafe { m.map.unchecked_advise_range(UncheckedAdvice::DontNeed, self.range.start, self.range.len()) };
        }
    }

    /// Gives these bytes up, also from the system's page cache, so that other pages of the file can stay there. A hint.
    pub fn evict(&self) {
        self.will_not_need();
        #[cfg(target_os = "linux")]
        if let Source::Mapped(m) = &self.source {
            let len = std::num::NonZeroU64::new(self.range.len() as u64);
            let _ = rustix::fs::fadvise(&m.file, self.range.start as u64, len, rustix::fs::Advice::DontNeed);
        }
    }

    /// Tells the system that single rows of these bytes will be read, here and there: it then reads no more than those.
    /// A hint.
    pub fn random(&self) {
        if let Source::Mapped(m) = &self.source {
            // The error is dropped on purpose: a kernel without the advice still reads the pages, only more of them.
            let _ = m.map.advise_range(Advice::Random, self.range.start, self.range.len());
        }
    }

    /// Reads these bytes into memory and returns when they are there. A file that was cut short, or a disk that fails, is
    /// an error here, where a later access would raise SIGBUS.
    pub fn populate(&self) -> io::Result<()> {
        let Source::Mapped(m) = &self.source else { return Ok(()) };
        #[cfg(target_os = "linux")]
        match m.map.advise_range(Advice::PopulateRead, self.range.start, self.range.len()) {
            // Linux before 5.14 does not know it.
            Err(e) if e.raw_os_error() == Some(libc::EINVAL) => {}
            Ok(()) => return Ok(()),
            Err(e) => return Err(m.read_error(&self.range).unwrap_or(e)),
        }
        if let Some(e) = m.read_error(&self.range) {
            return Err(e);
        }
        self.iter().step_by(4096).for_each(|b| _ = std::hint::black_box(*b));
        Ok(())
    }

    /// Locks these bytes: their pages stay once they are there. On Linux this brings none of them in, which
    /// [`Bytes::populate`] does, and fails at once where the process may not lock as many. Ends with the last view of the
    /// mapping.
    pub fn lock(&self) -> io::Result<()> {
        lock(self)
    }

    /// Takes [`Bytes::lock`] back.
    pub fn unlock(&self) {
        // SAFETY: the range is mapped, as these bytes live; what it holds does not change. A refusal changes nothing.
        unsafe { libc::munlock(self.as_ptr().cast(), self.len()) };
    }

    /// Copies these bytes to `out`, which is as long; those of a file are read from it, past the mapping.
    pub fn read_into(&self, out: &mut [u8]) -> io::Result<()> {
        match &self.source {
            Source::Mapped(m) => {
                let read = m.file.read_exact_at(out, self.range.start as u64);
                read.map_err(|e| m.read_error(&self.range).unwrap_or(e))
            }
            Source::Owned(_) | Source::Filled(_) => {
                out.copy_from_slice(self);
                Ok(())
            }
        }
    }
}

/// Locks pages that are mapped, when they come in where the system knows such a lock, else at once.
fn lock(bytes: &[u8]) -> io::Result<()> {
    let (at, len) = (bytes.as_ptr().cast::<libc::c_void>(), bytes.len());
    if len == 0 {
        return Ok(());
    }
    #[cfg(target_os = "linux")]
    {
        const MLOCK_ONFAULT: libc::c_uint = 1; // linux/mman.h
        // SAFETY: the range is mapped, as `bytes` lives, and its content does not change. The system rounds to whole pages;
        // their other bytes are of the same mapping or allocation and only stay in memory, too.
        if unsafe { libc::syscall(libc::SYS_mlock2, at, len, MLOCK_ONFAULT) } == 0 {
            return Ok(());
        }
        let e = io::Error::last_os_error();
        // Linux before 4.4 does not know it.
        if !matches!(e.raw_os_error(), Some(libc::ENOSYS | libc::EINVAL)) {
            return Err(e);
        }
    }
    // SAFETY: as above.
    match unsafe { libc::mlock(at, len) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Memory that is filled once and then only read, in huge pages where the system has them.
pub struct Room(MmapMut);

impl Room {
    /// So many bytes, zeros until they are written.
    pub fn new(len: usize) -> io::Result<Room> {
        let map = MmapOptions::new().len(len.max(1)).map_anon()?;
        #[cfg(target_os = "linux")]
        // Without huge pages it works all the same.
        let _ = map.advise(Advice::HugePage);
        Ok(Room(map))
    }

    /// As [`Bytes::lock`].
    pub fn lock(&self) -> io::Result<()> {
        lock(&self.0)
    }

    /// All of it.
    pub fn as_mut_slice(&mut self) -> &mut [u8] {
        &mut self.0
    }

    /// Ends the writing: the room becomes bytes.
    pub fn into_bytes(self) -> io::Result<Bytes> {
        let range = 0..self.0.len();
        Ok(Bytes { source: Source::Filled(Arc::new(self.0.make_read_only()?)), range })
    }
}

/// From now on, pages that this thread, or one that it starts later, is the first to touch, of files and of memory, come
/// from these memory nodes in turn. Elsewhere than on Linux it does nothing.
pub fn interleave(nodes: &[usize]) -> io::Result<()> {
    #[cfg(target_os = "linux")]
    {
        const MPOL_INTERLEAVE: libc::c_int = 3; // linux/mempolicy.h
        const WORD: usize = libc::c_ulong::BITS as usize;
        let mut mask = vec![0 as libc::c_ulong; nodes.iter().max().map_or(0, |m| m / WORD + 1)];
        nodes.iter().for_each(|n| mask[n / WORD] |= 1 << (n % WORD));
        // The system looks at one bit fewer than it is told.
        let bits = mask.len() * WORD + 1;
        // SAFETY: `mask` has the bits that are told and lives through the call, which reads it.
        if unsafe { libc::syscall(libc::SYS_set_mempolicy, MPOL_INTERLEAVE, mask.as_ptr(), bits) } != 0 {
            return Err(io::Error::last_os_error());
        }
    }
    #[cfg(not(target_os = "linux"))]
    let _ = nodes;
    Ok(())
}

impl Drop for Mapping {
    fn drop(&mut self) {
        let start = self.map.as_ptr().addr();
        mapped().retain(|(range, _)| range.start != start);
    }
}

/// What is mapped where.
fn mapped() -> MutexGuard<'static, Vec<(Range<usize>, PathBuf)>> {
    static MAPPED: Mutex<Vec<(Range<usize>, PathBuf)>> = Mutex::new(Vec::new());
    MAPPED.lock().unwrap_or_else(|e| e.into_inner())
}

/// From now on, when a mapped file cannot be read, `report` is called with what is wrong, on a thread of its own, and should
/// end the program: the thread that wanted the page waits for ever. To be called once; elsewhere than on Linux it does
/// nothing.
pub fn on_fault(report: impl FnOnce(String) + Send + 'static) -> io::Result<()> {
    #[cfg(target_os = "linux")]
    {
        let (mut reader, writer) = io::pipe()?;
        // Open for as long as the program runs.
        fault::PIPE.store(writer.into_raw_fd(), Ordering::SeqCst);
        std::thread::Builder::new().name("oxcart-faults".into()).spawn(move || {
            if reader.read_exact(&mut [0]).is_ok() {
                report(describe(fault::ADDRESS.load(Ordering::SeqCst)));
            }
        })?;
        fault::install()?;
    }
    #[cfg(not(target_os = "linux"))]
    drop(report);
    Ok(())
}

/// What is wrong with the page at an address.
#[cfg(target_os = "linux")]
fn describe(address: usize) -> String {
    let mapped = mapped();
    let Some((range, path)) = mapped.iter().find(|(range, _)| range.contains(&address)) else {
        return format!("memory at {address:#x} cannot be read");
    };
    let (at, len) = (address - range.start, range.len());
    match fs::metadata(path) {
        Ok(m) if m.len() < len as u64 => {
            format!("{}: {} bytes, expected {len}: it was cut short while in use", path.display(), m.len())
        }
        _ => format!("{}: the disk does not give byte {at}", path.display()),
    }
}

/// What happens in the thread that touched a page that is not there.
#[cfg(target_os = "linux")]
mod fault {
    use std::ffi::{c_int, c_void};
    use std::io;
    use std::sync::atomic::{AtomicI32, AtomicUsize, Ordering};

    pub static PIPE: AtomicI32 = AtomicI32::new(-1);
    pub static ADDRESS: AtomicUsize = AtomicUsize::new(0);

    extern "C" fn wake_the_reporter(_: c_int, info: *mut libc::siginfo_t, _: *mut c_void) {
        // SAFETY: the kernel passes a valid `info` to a handler installed with SA_SIGINFO, and for SIGBUS it has an address.
        ADDRESS.store(unsafe { (*info).si_addr() }.addr(), Ordering::SeqCst);
        // SAFETY: write and pause may be called in a handler; the byte lives through the call. Nothing else is done here,
        // and nothing of the interrupted code runs again.
        unsafe {
            libc::write(PIPE.load(Ordering::SeqCst), [0u8].as_ptr().cast(), 1);
            loop {
                libc::pause();
            }
        }
    }

    pub fn install() -> io::Result<()> {
        // SAFETY: `sigaction` is plain data, for which zeros are valid; the handler has the type that SA_SIGINFO asks for
        // and does only what a handler may.
        let done = unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = wake_the_reporter as *const () as usize;
            action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
            libc::sigaction(libc::SIGBUS, &action, std::ptr::null_mut())
        };
        if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }
}

impl Mapping {
    /// Why a part of the file cannot be read, if it cannot: by reading it.
    fn read_error(&self, range: &Range<usize>) -> Option<io::Error> {
        let read = || {
            let found = self.file.metadata()?.len();
            if found < range.end as u64 {
                let problem = format!("{found} bytes, expected {}: it was cut short while in use", self.map.len());
                return Err(io::Error::new(ErrorKind::UnexpectedEof, problem));
            }
            // Each read says where: several threads read parts of the file at once, and its position is one for all.
            let mut buffer = vec![0; range.len().min(1 << 20)];
            for at in range.clone().step_by(1 << 20) {
                let n = (range.end - at).min(buffer.len());
                self.file.read_exact_at(&mut buffer[..n], at as u64)?;
            }
            Ok(())
        };
        read().err()
    }
}

impl Deref for Bytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match &self.source {
            Source::Mapped(m) => &m.map[self.range.clone()],
            Source::Owned(b) => &b[self.range.clone()],
            Source::Filled(m) => &m[self.range.clone()],
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn views_share_the_mapping_and_outlive_the_whole() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        fs::write(&path, (0..=255u8).collect::<Vec<_>>()).unwrap();
        let whole = Bytes::map(&path).unwrap();
        let view = whole.slice(16..32).slice(4..8);
        view.will_not_need();
        view.populate().unwrap();
        view.evict();
        drop(whole);
        fs::remove_file(&path).unwrap();
        assert!(view.is_mapped());
        assert_eq!(view[..], [20, 21, 22, 23]);
        let owned = Bytes::owned(vec![1, 2, 3]).slice(1..3);
        assert!(!owned.is_mapped());
        assert_eq!(owned[..], [2, 3]);
    }

    #[test]
    fn what_cannot_be_read_any_more_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        fs::write(&path, vec![7u8; 100_000]).unwrap();
        let whole = Bytes::map(&path).unwrap();
        fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(50_000).unwrap();
        whole.slice(0..50_000).populate().unwrap();
        let e = whole.slice(40_000..80_000).populate().unwrap_err();
        assert_eq!(e.to_string(), "50000 bytes, expected 100000: it was cut short while in use");
    }

    #[test]
    fn several_threads_read_parts_of_one_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        fs::write(&path, vec![7u8; 5 << 20]).unwrap();
        let whole = Bytes::map(&path).unwrap();
        let Source::Mapped(m) = &whole.source else { panic!("a mapping") };
        // As `populate` reads where the system does not know how to bring pages in.
        std::thread::scope(|s| {
            for i in 0..8 {
                s.spawn(move || {
                    for _ in 0..50 {
                        let e = m.read_error(&(i * 512 << 10..5 << 20));
                        assert!(e.is_none(), "{e:?}");
                    }
                });
            }
        });
    }

    /// Kilobytes of this process that a line of /proc/self/status tells.
    #[cfg(target_os = "linux")]
    fn status(key: &str) -> u64 {
        let status = fs::read_to_string("/proc/self/status").unwrap();
        let line = status.lines().find_map(|l| l.strip_prefix(key)).expect(key);
        line.trim_start_matches(':').split_whitespace().next().unwrap().parse().unwrap()
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn locked_pages_are_counted_and_given_back() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        fs::write(&path, vec![7u8; 32 << 10]).unwrap();
        let whole = Bytes::map(&path).unwrap();
        let before = status("VmLck");
        whole.slice(4096..16384).lock().unwrap();
        whole.slice(0..0).lock().unwrap();
        assert_eq!(status("VmLck"), before + 12);
        whole.populate().unwrap();
        whole.slice(4096..8192).unlock();
        assert_eq!(status("VmLck"), before + 8);
        drop(whole);
        assert_eq!(status("VmLck"), before);
    }

    #[test]
    fn a_room_is_filled_from_a_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        fs::write(&path, (0..=255u8).collect::<Vec<_>>()).unwrap();
        let whole = Bytes::map(&path).unwrap();
        let mut room = Room::new(20).unwrap();
        whole.slice(100..110).read_into(&mut room.as_mut_slice()[..10]).unwrap();
        Bytes::owned(vec![1; 10]).read_into(&mut room.as_mut_slice()[10..]).unwrap();
        let bytes = room.into_bytes().unwrap();
        assert!(!bytes.is_mapped() && bytes.path().is_none());
        assert_eq!(bytes.slice(8..12)[..], [108, 109, 1, 1]);
        fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(50).unwrap();
        let e = whole.slice(40..60).read_into(&mut [0; 20]).unwrap_err();
        assert_eq!(e.to_string(), "50 bytes, expected 256: it was cut short while in use");
    }

    #[test]
    fn what_is_no_file_with_bytes_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let empty = dir.path().join("empty");
        fs::write(&empty, "").unwrap();
        assert_eq!(Bytes::map(&empty).err().map(|e| e.to_string()), Some("the file is empty".into()));
        assert_eq!(Bytes::map(dir.path()).err().map(|e| e.to_string()), Some("a folder, expected a file".into()));
        assert_eq!(Bytes::map(&dir.path().join("absent")).err().map(|e| e.kind()), Some(ErrorKind::NotFound));
    }
}
