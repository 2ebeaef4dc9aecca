//! Weights beyond memory: layers that do not fit are read ahead of the forward pass and given up behind it.
//!
//! Decoding reads a model round and round. Where it is larger than memory, a page cache that keeps what was used last has
//! always just dropped what is needed next: every byte comes from the disk again, a few pages at a time, while the workers
//! wait. Here as many layers as fit stay in memory, spread evenly over the model, and of the others two are there at most:
//! the one in use, and the next on its way, so that the disk is never idle.
//!
//! ```text
//! reader     | populate 4      | populate 7      | evict 4, populate 10     | evict 7, ...
//! workers      wait ...........  4 5 6  wait ....  7 8 9  wait .............  10 ...
//! ```
//!
//! It reads by `MADV_POPULATE_READ` through the mapping, so that the matrices are where they always are and results cannot
//! differ. On the machine where this was chosen (ext4, one thread) that gave 1.3 to 1.5 GB/s with 3 % of a processor;
//! `O_DIRECT` into buffers, in pieces of 1 to 64 MiB by one to eight threads, 0.8 to 1.2 GB/s with 8 %; buffered reads by
//! several threads were slower still.

use super::weights::Weights;
use crate::mmap::Bytes;
use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::JoinHandle;

/// Streamed units in memory at once: one in use, one on its way.
const AHEAD: usize = 2;
/// Bytes that are asked for at once; between them the reader looks whether they are still wanted.
const PART: usize = 32 << 20;

/// Why a pass ended early.
#[derive(Clone, Debug)]
pub enum Halt {
    /// A file could not be read.
    Read {
        /// The file.
        file: PathBuf,
        /// What the system said.
        error: Arc<io::Error>,
    },
    /// Somebody asked for it.
    Stopped,
}

/// The reader of a model's weights.
///
/// A unit is a layer, or the output matrix behind the last. One worker of a pass calls [`Stream::begin`], and for each unit
/// in order [`Stream::wait`], and [`Stream::done`] when all workers are through with it. The others stand at a barrier while
/// it waits (which a panic opens, too), and then ask [`Stream::halted`].
pub struct Stream {
    units: Arc<Units>,
    shared: Arc<Shared>,
    reader: Option<JoinHandle<()>>,
}

struct Units {
    bytes: Vec<Vec<Bytes>>,
    resident: Vec<bool>,
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

/// Units are counted through all passes: number `n` is unit `n % units`.
#[derive(Default)]
struct State {
    /// Those below are in memory, or were.
    loaded: u64,
    /// Those below are used.
    used: u64,
    /// Those below are given up, if they do not stay.
    evicted: u64,
    /// Reading number `loaded` failed.
    failed: Option<Halt>,
    /// The pass ends before number `used`.
    halted: Option<Halt>,
    /// The program ends.
    quit: bool,
}

impl Stream {
    /// A stream of these weights that keeps what it can within `budget` bytes, and two layers even beyond them.
    pub fn new(w: &Weights, budget: u64) -> io::Result<Stream> {
        w.embedding_by_rows();
        Stream::of(w.units(), budget)
    }

    fn of(bytes: Vec<Vec<Bytes>>, budget: u64) -> io::Result<Stream> {
        let sizes: Vec<u64> = bytes.iter().map(|u| u.iter().map(|b| b.len() as u64).sum()).collect();
        let units = Arc::new(Units { resident: residents(&sizes, budget), bytes });
        let shared = Arc::<Shared>::default();
        let (of, with) = (units.clone(), shared.clone());
        let reader = std::thread::Builder::new().name("oxcart-reader".into()).spawn(move || with.read(&of))?;
        Ok(Stream { units, shared, reader: Some(reader) })
    }

    /// Bytes of weights that stay, and bytes that are read from the disk in every pass.
    pub fn bytes(&self) -> (u64, u64) {
        let sum = |stays: bool| {
            let units = self.units.bytes.iter().zip(&self.units.resident);
            units.filter(|u| *u.1 == stays).flat_map(|u| u.0).map(|b| b.len() as u64).sum()
        };
        (sum(true), sum(false))
    }

    /// A pass begins, at the first unit, however the last one ended.
    pub(super) fn begin(&self) {
        let mut s = self.shared.lock();
        s.used = s.used.next_multiple_of(self.units.len());
        s.loaded = s.loaded.max(s.used);
        (s.failed, s.halted) = (None, None);
        self.shared.changed.notify_all();
    }

    /// Waits until the next unit is in memory, or the pass is halted.
    pub(super) fn wait(&self) {
        let mut s = self.shared.lock();
        while s.halted.is_none() && s.loaded <= s.used {
            s = match s.failed.clone() {
                None => self.shared.changed.wait(s).unwrap_or_else(|e| e.into_inner()),
                failed => {
                    s.halted = failed;
                    return;
                }
            };
        }
    }

    /// Whether the pass ends before the unit that was waited for.
    pub(super) fn halted(&self) -> Result<(), Halt> {
        self.shared.lock().halted.clone().map_or(Ok(()), Err)
    }

    /// No worker reads the unit that was waited for any more. With `stop`, the pass ends here.
    pub(super) fn done(&self, stop: bool) {
        let mut s = self.shared.lock();
        s.used += 1;
        s.halted = stop.then_some(Halt::Stopped);
        self.shared.changed.notify_all();
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        self.shared.lock().quit = true;
        self.shared.changed.notify_all();
        if let Some(reader) = self.reader.take() {
            // It panics nowhere, and if it did there would be nothing left to do here.
            let _ = reader.join();
        }
    }
}

impl Units {
    fn len(&self) -> u64 {
        self.bytes.len() as u64
    }

    fn stays(&self, n: u64) -> bool {
        self.resident[(n % self.len()) as usize]
    }

    fn bytes(&self, n: u64) -> &[Bytes] {
        &self.bytes[(n % self.len()) as usize]
    }
}

/// What the reader does next.
enum Step {
    Load(u64),
    Evict(u64),
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|e| e.into_inner())
    }

    fn read(&self, units: &Units) {
        while let Some(step) = self.next(units) {
            match step {
                Step::Evict(n) => {
                    units.bytes(n).iter().for_each(Bytes::evict);
                    self.lock().evicted = n + 1;
                }
                Step::Load(n) => {
                    let end = self.load(units, n);
                    let mut s = self.lock();
                    match end {
                        Ok(()) => s.loaded = s.loaded.max(n + 1),
                        // A pass that began since then is past it.
                        Err(halt) if s.loaded == n => s.failed = Some(halt),
                        Err(_) => {}
                    }
                    self.changed.notify_all();
                }
            }
        }
    }

    /// Waits for something to do; `None` when the program ends.
    fn next(&self, units: &Units) -> Option<Step> {
        let mut s = self.lock();
        loop {
            if s.quit {
                return None;
            }
            while s.evicted < s.used && units.stays(s.evicted) {
                s.evicted += 1;
            }
            if s.evicted < s.used {
                return Some(Step::Evict(s.evicted));
            }
            let streamed = (s.used..s.loaded).filter(|&n| !units.stays(n)).count();
            let room = units.stays(s.loaded) || streamed < AHEAD;
            if s.failed.is_none() && room && s.loaded < s.used + units.len() {
                return Some(Step::Load(s.loaded));
            }
            s = self.changed.wait(s).unwrap_or_else(|e| e.into_inner());
        }
    }

    fn load(&self, units: &Units, n: u64) -> Result<(), Halt> {
        for bytes in units.bytes(n) {
            for at in (0..bytes.len()).step_by(PART) {
                let s = self.lock();
                if s.quit || s.loaded > n {
                    return Ok(());
                }
                drop(s);
                let part = bytes.slice(at..bytes.len().min(at + PART));
                part.populate().map_err(|error| Halt::Read {
                    file: part.path().map(PathBuf::from).unwrap_or_default(),
                    error: Arc::new(error),
                })?;
            }
        }
        Ok(())
    }
}

/// Which units stay within `budget` bytes, beside the room for those that are streamed: the last one, which is the output
/// matrix, and of the others as many as fit, spread evenly.
fn residents(sizes: &[u64], budget: u64) -> Vec<bool> {
    let layers = sizes.len() - 1;
    let spread = |n: usize, last: bool| -> Vec<bool> {
        (0..layers).map(|i| (i + 1) * n / layers > i * n / layers).chain([last]).collect()
    };
    let fits = |resident: &[bool]| {
        let of = |stays: bool| sizes.iter().zip(resident).filter(move |u| *u.1 == stays).map(|u| *u.0);
        of(true).sum::<u64>() + AHEAD as u64 * of(false).max().unwrap_or(0) <= budget
    };
    let candidates = (0..=layers).rev().map(|n| spread(n, true)).chain([spread(0, false)]);
    candidates.into_iter().find(|r| fits(r)).unwrap_or_else(|| spread(0, false))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::path::Path;

    #[test]
    fn what_fits_stays_evenly_spread() {
        let layers = |n: usize, output: u64| -> Vec<u64> { vec![10; n].into_iter().chain([output]).collect() };
        let pattern = |sizes: &[u64], budget| {
            residents(sizes, budget).into_iter().map(|r| if r { 'r' } else { '.' }).collect::<String>()
        };
        for (sizes, budget, want) in [
            (layers(8, 20), 100, "rrrrrrrrr"),
            (layers(8, 20), 99, ".r.rr.rrr"), // 5 layers, 20 of output, 20 on their way
            (layers(8, 20), 60, "...r...rr"),
            (layers(8, 20), 40, "........r"),
            (layers(8, 20), 39, "........."),
            (layers(8, 20), 0, "........."),
            (layers(3, 1), 31, "rrrr"),
            (vec![10, 30, 10, 5], 54, "...."),
            (vec![5], 5, "r"),
            (vec![5], 4, "."),
        ] {
            assert_eq!(pattern(&sizes, budget), want, "{sizes:?} within {budget}");
        }
    }

    fn file(dir: &Path, len: usize) -> Bytes {
        let path = dir.join("weights");
        fs::write(&path, (0..len).map(|i| (i / 4096) as u8).collect::<Vec<_>>()).unwrap();
        Bytes::map(&path).unwrap()
    }

    /// Units of two pages.
    fn units(whole: &Bytes) -> Vec<Vec<Bytes>> {
        (0..whole.len() / 8192)
            .map(|i| vec![whole.slice(i * 8192..i * 8192 + 4096), whole.slice(i * 8192 + 4096..(i + 1) * 8192)])
            .collect()
    }

    /// A pass that stops after `stop` units: how many it went through.
    fn pass(s: &Stream, whole: &Bytes, stop: usize) -> Result<usize, String> {
        s.begin();
        for i in 0..s.units.bytes.len() {
            s.wait();
            match s.halted() {
                Ok(()) => assert_eq!(whole[i * 8192 + 4096], (i * 2 + 1) as u8),
                Err(Halt::Stopped) => return Ok(i),
                Err(Halt::Read { file, error }) => {
                    return Err(format!("{}: {error}", file.file_name().unwrap().display()));
                }
            }
            s.done(i + 1 == stop);
        }
        Ok(s.units.bytes.len())
    }

    #[test]
    fn passes_go_round_and_may_stop_anywhere() {
        let dir = tempfile::tempdir().unwrap();
        let whole = file(dir.path(), 10 * 8192);
        for budget in [0, 3 * 8192, 7 * 8192, 9 * 8192] {
            let s = Stream::of(units(&whole), budget).unwrap();
            for stop in [0, 1, 4, 0, 9, 0, 0] {
                assert_eq!(pass(&s, &whole, stop), Ok(if stop == 0 { 10 } else { stop }), "{budget}: {stop}");
            }
            let state = s.shared.lock();
            let streamed = (state.used..state.loaded).filter(|&n| !s.units.stays(n)).count();
            assert!(streamed <= AHEAD, "{streamed} units ahead");
        }
    }

    #[test]
    fn a_file_that_is_cut_ends_a_pass() {
        let dir = tempfile::tempdir().unwrap();
        let whole = file(dir.path(), 10 * 8192);
        let s = Stream::of(units(&whole), 0).unwrap();
        assert_eq!(pass(&s, &whole, 0), Ok(10));
        let cut = |len: u64| fs::OpenOptions::new().write(true).open(dir.path().join("weights")).unwrap().set_len(len);
        cut(5 * 8192).unwrap();
        let problem = "weights: 40960 bytes, expected 81920: it was cut short while in use";
        for _ in 0..2 {
            assert_eq!(pass(&s, &whole, 0), Err(problem.to_string()));
        }
    }
}
