//! Weights in memory before they are used: read in through their mapping, or copied out of the file.
//!
//! Both go part by part, so that somebody can be told how far it is and end it.

use crate::mmap::{Bytes, Room};
use crate::model::Halt;
use oxcart_quant::Team;
use std::ops::{ControlFlow, Range};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

/// Bytes that are asked for at once.
const PART: usize = 32 << 20;
/// Workers that read, at most.
const READERS: usize = 4;
/// What copies of matrices begin at a multiple of, in bytes: a cache line.
const ALIGNMENT: usize = 64;

/// Is told how many bytes of how many are in memory, by several threads, and may end the reading.
pub type Watch<'a> = dyn Fn(u64, u64) -> ControlFlow<()> + Sync + 'a;

/// How weights come into memory and stay there. By itself nothing is done: pages of the mapped file come when they are used
/// and go when memory is wanted for something else.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Residence {
    /// Copied into memory of the program's own, and not mapped.
    pub copy: bool,
    /// Locked, so that the system takes no page of them away.
    pub lock: bool,
    /// All read in before they are used.
    pub prefault: bool,
}

impl Residence {
    /// The flag that asks for most, for errors.
    pub fn flag(self) -> Option<&'static str> {
        match self {
            Residence { copy: true, .. } => Some("--no-mmap"),
            Residence { lock: true, .. } => Some("--mlock"),
            Residence { prefault: true, .. } => Some("--prefault"),
            _ => None,
        }
    }
}

/// Reads all of these bytes in, on a few workers of a team, or without one on the calling thread.
pub fn populate(bytes: &[Bytes], team: Option<&Team>, watch: &Watch<'_>) -> Result<(), Halt> {
    let mut bytes = bytes.to_vec();
    // As they lie in the file.
    bytes.sort_by_key(|b| b.as_ptr().addr());
    let parts: Vec<Bytes> = bytes.iter().flat_map(|b| parts(b.len()).map(|r| b.slice(r))).collect();
    let read = |i: usize| {
        let part: &Bytes = &parts[i];
        part.populate().map_err(|e| failed(part, e)).map(|()| part.len())
    };
    each(parts.len(), bytes.iter().map(|b| b.len() as u64).sum(), team, watch, &read)
}

/// Where copies of these bytes lie, one behind another, and how many bytes that takes.
pub fn places(bytes: &[Bytes]) -> (Vec<Range<usize>>, usize) {
    let mut end = 0;
    let place = |b: &Bytes| {
        let at = usize::next_multiple_of(end, ALIGNMENT);
        end = at + b.len();
        at..end
    };
    (bytes.iter().map(place).collect(), end)
}

/// Copies these bytes to their [`places`].
pub fn fill(room: &mut Room, bytes: &[Bytes], team: Option<&Team>, watch: &Watch<'_>) -> Result<(), Halt> {
    let mut jobs = Vec::new();
    let (mut rest, mut at) = (room.as_mut_slice(), 0);
    for (b, place) in bytes.iter().zip(places(bytes).0) {
        let (out, behind) = std::mem::take(&mut rest)[place.start - at..].split_at_mut(place.len());
        jobs.extend(out.chunks_mut(PART).zip(parts(b.len())).map(|(out, r)| Mutex::new((b.slice(r), out))));
        (rest, at) = (behind, place.end);
    }
    let read = |i: usize| {
        let mut job = jobs[i].lock().unwrap_or_else(|e| e.into_inner());
        let (from, out) = &mut *job;
        from.read_into(out).map_err(|e| failed(from, e)).map(|()| out.len())
    };
    each(jobs.len(), bytes.iter().map(|b| b.len() as u64).sum(), team, watch, &read)
}

fn parts(len: usize) -> impl Iterator<Item = Range<usize>> {
    (0..len).step_by(PART).map(move |at| at..len.min(at + PART))
}

fn failed(bytes: &Bytes, error: std::io::Error) -> Halt {
    Halt::Read { file: bytes.path().unwrap_or("memory".as_ref()).to_path_buf(), error: Arc::new(error) }
}

/// Does `n` jobs, each of which says how many bytes it was, of `of` in all.
fn each(
    n: usize,
    of: u64,
    team: Option<&Team>,
    watch: &Watch<'_>,
    job: &(dyn Fn(usize) -> Result<usize, Halt> + Sync),
) -> Result<(), Halt> {
    let (over, done, end) = (AtomicBool::new(false), AtomicU64::new(0), Mutex::new(Ok(())));
    let one = |i: usize| {
        if over.load(Ordering::Relaxed) {
            return;
        }
        let result = job(i).and_then(|len| {
            let done = done.fetch_add(len as u64, Ordering::Relaxed) + len as u64;
            if watch(done, of).is_break() { Err(Halt::Stopped) } else { Ok(()) }
        });
        if result.is_err() && !over.swap(true, Ordering::Relaxed) {
            *end.lock().unwrap_or_else(|e| e.into_inner()) = result;
        }
    };
    match team {
        Some(team) => {
            let next = AtomicU64::new(0);
            let next = || Some(next.fetch_add(1, Ordering::Relaxed) as usize).filter(|&i| i < n);
            team.run(|w| {
                if w.index() < READERS {
                    std::iter::from_fn(next).for_each(one);
                }
            });
        }
        None => (0..n).for_each(one),
    }
    end.into_inner().unwrap_or_else(|e| e.into_inner())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    /// Two mapped files of several parts, and memory.
    fn some_bytes(dir: &std::path::Path) -> Vec<Bytes> {
        let file = |name: &str, len: usize| {
            let path = dir.join(name);
            fs::write(&path, (0..len).map(|i| (i * 7 + i / 251) as u8).collect::<Vec<_>>()).unwrap();
            Bytes::map(&path).unwrap()
        };
        let (a, b) = (file("a", PART + 12_345), file("b", 1000));
        vec![b.slice(1..990), a.slice(77..a.len()), Bytes::owned(vec![9; 100])]
    }

    #[test]
    fn copies_are_the_same_and_everything_is_told() {
        let dir = tempfile::tempdir().unwrap();
        let bytes = some_bytes(dir.path());
        let all: u64 = bytes.iter().map(|b| b.len() as u64).sum();
        let (places, len) = places(&bytes);
        let team = Team::new(2).unwrap();
        for team in [None, Some(&team)] {
            let most = AtomicU64::new(0);
            let watch = |done: u64, of: u64| {
                assert!(done <= of && of == all);
                most.fetch_max(done, Ordering::Relaxed);
                ControlFlow::Continue(())
            };
            let mut room = Room::new(len).unwrap();
            fill(&mut room, &bytes, team, &watch).unwrap();
            let whole = room.into_bytes().unwrap();
            for (b, place) in bytes.iter().zip(&places) {
                assert!(whole.slice(place.clone())[..] == b[..]);
            }
            assert_eq!(most.swap(0, Ordering::Relaxed), all);
            populate(&bytes, team, &watch).unwrap();
            assert_eq!(most.into_inner(), all);
        }
    }

    #[test]
    fn reading_ends_when_somebody_says_so_or_the_file_does() {
        let dir = tempfile::tempdir().unwrap();
        let bytes = some_bytes(dir.path());
        let (told, stop) = (AtomicU64::new(0), ControlFlow::Break(()));
        let end = populate(&bytes, None, &|_, _| {
            told.fetch_add(1, Ordering::Relaxed);
            stop
        });
        assert!(matches!(end, Err(Halt::Stopped)) && told.into_inner() == 1, "{end:?}");
        fs::OpenOptions::new().write(true).open(dir.path().join("a")).unwrap().set_len(9999).unwrap();
        let mut room = Room::new(places(&bytes).1).unwrap();
        for end in [
            populate(&bytes, None, &|_, _| ControlFlow::Continue(())),
            fill(&mut room, &bytes, None, &|_, _| ControlFlow::Continue(())),
        ] {
            let Err(Halt::Read { file, error }) = end else { panic!("{end:?}") };
            assert!(file.ends_with("a") && error.to_string().contains("9999 bytes, expected"), "{error}");
        }
    }
}
