//! Weights beyond memory: layers that do not fit are read ahead of the forward pass and given up behind it; experts that do
//! not fit are read when tokens have chosen them.
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
//! In a mixture of experts, that is the way of what every token uses: attention, and the output. It stays first. The room
//! behind it is for experts, and is divided among the layers; a layer keeps those that it used last. (One such list for the
//! whole model would be useless where it holds fewer experts than a token uses: a token's last layers would push out what
//! the next token's first layers need.) What else comes into memory depends on the tokens of the pass:
//!
//! ```text
//! few        route; fetch the chosen experts that the layer does not keep; compute; give up those that went longest unused
//! many       they use nearly all experts: the reader reads those ahead with the layer, and gives them up behind it
//! ```
//!
//! It reads by `MADV_POPULATE_READ` through the mapping, so that the matrices are where they always are and results cannot
//! differ. On the machine where this was chosen (ext4, one thread) that gave 1.3 to 1.5 GB/s with 3 % of a processor;
//! `O_DIRECT` into buffers, in pieces of 1 to 64 MiB by one to eight threads, 0.8 to 1.2 GB/s with 8 %; buffered reads by
//! several threads were slower still. Fetched experts are waited for, so that the disk should have more to do at once: two of
//! Mixtral-8x22B (366 MB) came at 1.0 to 1.5 GB/s by one thread, at 1.5 to 1.9 by four that each populate a whole matrix; at
//! 0.9 to 1.1 by four in parts of 8 MiB, which disturb each other's readahead.

mod room;

use super::config::Experts;
use super::weights::{Unit, Weights};
use crate::mmap::Bytes;
use room::{residents, slots, taken};
use std::io;
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::JoinHandle;

/// Streamed units in memory at once: one in use, one on its way.
pub const AHEAD: usize = 2;
/// Bytes that are asked for at once; between them the reader looks whether they are still wanted.
const PART: usize = 32 << 20;
/// Threads that fetch experts together.
const FETCHERS: usize = 4;

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
/// in order [`Stream::wait`], and [`Stream::done`] when all workers are through with it. Where [`Reading::fetches`] says so, it
/// also calls [`Stream::fetch`] with the experts that a layer's tokens chose. The others stand at a barrier while it waits
/// (which a panic opens, too), and then ask [`Stream::halted`].
pub struct Stream {
    units: Arc<Units>,
    shared: Arc<Shared>,
    reader: Option<JoinHandle<()>>,
}

/// How experts come into memory in a pass; by default, of a model without experts.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(super) struct Reading {
    /// Layers, from the first on, whose experts are all read ahead.
    ahead: usize,
    /// Experts that any other layer uses, at most.
    most: usize,
}

struct Units {
    all: Vec<Unit>,
    resident: Vec<bool>, // what every token uses, of each unit
    experts: Option<Experts>,
    room: u64, // bytes for experts
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
    /// The pass ends before this one.
    end: u64,
    /// Reading number `loaded` failed.
    failed: Option<Halt>,
    /// The pass ends before number `used`, or in it.
    halted: Option<Halt>,
    /// The program ends.
    quit: bool,
    /// How its experts are read.
    reading: Reading,
    /// Changes when what is being read may not count as loaded.
    turn: u64,
    /// Experts that stay, of each unit.
    slots: Vec<usize>,
    /// Experts that are in memory, of each unit, those used last first.
    held: Vec<Vec<usize>>,
    /// There are fewer slots than before.
    trim: bool,
}

impl Reading {
    /// For `tokens` in all layers but the last, and `last` there, of so many `layers`.
    ///
    /// With as many choices as two for each expert, most experts are chosen by some token (Mixtral, 8 tokens: 7.2 of 8): then
    /// reading ahead while the workers compute gains more than the others cost.
    pub fn of(experts: Option<Experts>, layers: usize, tokens: usize, last: usize) -> Reading {
        let Some(e) = experts else { return Reading::default() };
        let all = |n: usize| n * e.used >= 2 * e.count;
        let most = |n: usize| if all(n) { 0 } else { e.count.min(n * e.used) };
        let ahead = match (all(tokens), all(last)) {
            (true, true) => layers,
            (true, false) => layers - 1,
            (false, _) => 0,
        };
        Reading { ahead, most: most(tokens).max(most(last)) }
    }

    /// Whether a layer's experts are fetched when they are chosen.
    pub fn fetches(&self, layer: usize) -> bool {
        self.most > 0 && layer >= self.ahead
    }
}

impl Stream {
    /// A stream of these weights that keeps what it can within `budget` bytes, and two layers even beyond them.
    pub fn new(w: &Weights, experts: Option<Experts>, budget: u64) -> io::Result<Stream> {
        w.embedding_by_rows();
        Stream::of(w.units(), experts, budget)
    }

    fn of(all: Vec<Unit>, experts: Option<Experts>, budget: u64) -> io::Result<Stream> {
        let sizes: Vec<u64> = all.iter().map(|u| total(&u.always)).collect();
        let resident = residents(&sizes, budget);
        let room = budget.saturating_sub(taken(&sizes, &resident));
        let units = Arc::new(Units { all, resident, experts, room });
        let reading = Reading::of(experts, units.all.len() - 1, 1, 1);
        let state =
            State { reading, slots: units.slots(reading), held: vec![Vec::new(); units.all.len()], ..State::default() };
        let shared = Arc::new(Shared { state: Mutex::new(state), changed: Condvar::new() });
        let (of, with) = (units.clone(), shared.clone());
        let reader = std::thread::Builder::new().name("oxcart-reader".into()).spawn(move || with.read(&of))?;
        Ok(Stream { units, shared, reader: Some(reader) })
    }

    /// Bytes of weights that stay, and bytes that are read from the disk for a token (for every pass, whatever its tokens,
    /// where there are no experts; at most, where there are).
    pub fn bytes(&self) -> (u64, u64) {
        let units = &self.units;
        let slots = units.slots(Reading::of(units.experts, units.all.len() - 1, 1, 1));
        let used = units.experts.map_or(0, |e| e.used);
        let (mut stay, mut go) = (0, 0);
        for ((u, resident), slots) in units.all.iter().zip(&units.resident).zip(slots) {
            *(if *resident { &mut stay } else { &mut go }) += total(&u.always);
            let expert = u.experts.first().map_or(0, |e| total(e));
            stay += slots as u64 * expert;
            go += used.min(u.experts.len() - slots) as u64 * expert;
        }
        (stay, go)
    }

    /// A pass begins, at the first unit, however the last one ended.
    pub(super) fn begin(&self, reading: Reading) {
        let mut s = self.shared.lock();
        s.used = s.used.next_multiple_of(self.units.len());
        s.end = s.used + self.units.len();
        s.loaded = s.loaded.max(s.used);
        if reading != s.reading || reading.ahead > 0 {
            // What was read for this pass beforehand is without the experts, and more may be kept than now has room.
            s.loaded = s.used;
            s.turn += 1;
            s.reading = reading;
            s.slots = self.units.slots(reading);
            s.trim = true;
        }
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

    /// Brings the chosen experts of the layer that was waited for into memory, or halts the pass.
    pub(super) fn fetch(&self, layer: usize, chosen: impl Iterator<Item = usize> + Clone) {
        let held = self.shared.lock().held[layer].clone();
        let matrices = |there: bool| {
            let which = chosen.clone().filter(|e| held.contains(e) == there);
            which.flat_map(|e| &self.units.all[layer].experts[e]).collect::<Vec<_>>()
        };
        // Of those that are there, the end tells whether the file still is.
        let end = |b: &Bytes| populate(&b.slice(b.len().saturating_sub(1)..b.len()));
        let read = matrices(true).into_iter().try_for_each(end).and_then(|()| fetch(&matrices(false)));
        let mut s = self.shared.lock();
        match read {
            Ok(()) => {
                let older = held.into_iter().filter(|&e| chosen.clone().all(|c| c != e));
                s.held[layer] = chosen.clone().chain(older).collect();
            }
            Err(halt) => s.halted = Some(halt),
        }
    }

    /// Whether the pass ends before the unit that was waited for, or in it.
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

fn total(bytes: &[Bytes]) -> u64 {
    bytes.iter().map(|b| b.len() as u64).sum()
}

fn populate(bytes: &Bytes) -> Result<(), Halt> {
    // What is no file is memory, which is there.
    let Some(file) = bytes.path() else { return Ok(()) };
    bytes.populate().map_err(|error| Halt::Read { file: file.to_path_buf(), error: Arc::new(error) })
}

/// Populates matrices, several at once.
fn fetch(matrices: &[&Bytes]) -> Result<(), Halt> {
    let next = AtomicUsize::new(0);
    let work = || {
        while let Some(matrix) = matrices.get(next.fetch_add(1, Ordering::Relaxed)) {
            populate(matrix)?;
        }
        Ok(())
    };
    std::thread::scope(|scope| {
        // Where the system gives no more threads, those that there are do it.
        let helpers = (1..FETCHERS.min(matrices.len()))
            .map_while(|_| std::thread::Builder::new().name("oxcart-fetcher".into()).spawn_scoped(scope, work).ok());
        let helpers: Vec<_> = helpers.collect();
        let own = work();
        // They do not panic.
        helpers.into_iter().filter_map(|h| h.join().ok()).fold(own, Result::and)
    })
}

impl Units {
    fn len(&self) -> u64 {
        self.all.len() as u64
    }

    fn index(&self, n: u64) -> usize {
        (n % self.len()) as usize
    }

    /// How many experts each unit keeps in passes of this kind: as many as fit beside those that are on their way.
    fn slots(&self, reading: Reading) -> Vec<usize> {
        let sizes: Vec<(usize, u64)> =
            self.all.iter().map(|u| (u.experts.len(), u.experts.first().map_or(0, |e| total(e)))).collect();
        slots(&sizes, self.room, reading)
    }
}

/// What the reader does next.
enum Step {
    /// A unit's number, whether with its experts, and the turn.
    Load(u64, bool, u64),
    /// A unit's number, and experts of it.
    Evict(u64, Vec<usize>),
    /// Experts of a unit.
    Trim(usize, Vec<usize>),
}

impl State {
    /// Whether number `n` brings its experts with it.
    fn ahead(&self, units: &Units, n: u64) -> bool {
        n < self.end && units.index(n) < self.reading.ahead && !units.all[units.index(n)].experts.is_empty()
    }

    /// Whether number `n` takes memory only while it is used.
    fn streamed(&self, units: &Units, n: u64) -> bool {
        let i = units.index(n);
        !units.resident[i] || self.ahead(units, n) && self.slots[i] < units.all[i].experts.len()
    }

    /// The experts of a unit that have no slot: they are held no more.
    fn surplus(&mut self, unit: usize) -> Vec<usize> {
        let slots = self.slots[unit].min(self.held[unit].len());
        self.held[unit].split_off(slots)
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|e| e.into_inner())
    }

    fn read(&self, units: &Units) {
        let evict = |unit: usize, experts: &[usize]| {
            experts.iter().for_each(|&e| units.all[unit].experts[e].iter().for_each(Bytes::evict));
        };
        while let Some(step) = self.next(units) {
            match step {
                Step::Trim(unit, experts) => evict(unit, &experts),
                Step::Evict(n, experts) => {
                    let unit = units.index(n);
                    if !units.resident[unit] {
                        units.all[unit].always.iter().for_each(Bytes::evict);
                    }
                    evict(unit, &experts);
                    self.lock().evicted = n + 1;
                }
                Step::Load(n, with_experts, turn) => {
                    let unit = units.index(n);
                    let end = self.load(&units.all[unit], n, with_experts, turn);
                    let mut s = self.lock();
                    let mut missing: Vec<usize> = match with_experts {
                        true => (0..units.all[unit].experts.len()).filter(|e| !s.held[unit].contains(e)).collect(),
                        false => Vec::new(),
                    };
                    match end {
                        Ok(()) if s.turn == turn => {
                            s.loaded = s.loaded.max(n + 1);
                            s.held[unit].append(&mut missing);
                        }
                        // A pass that began since then is past it.
                        Err(halt) if s.loaded == n && s.turn == turn => s.failed = Some(halt),
                        _ => {}
                    }
                    self.changed.notify_all();
                    drop(s);
                    evict(unit, &missing);
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
            while s.evicted < s.used {
                let (n, unit) = (s.evicted, units.index(s.evicted));
                let experts = s.surplus(unit);
                if !units.resident[unit] || !experts.is_empty() {
                    return Some(Step::Evict(n, experts));
                }
                s.evicted += 1;
            }
            if s.trim {
                for unit in 0..units.all.len() {
                    let experts = s.surplus(unit);
                    if !experts.is_empty() {
                        return Some(Step::Trim(unit, experts));
                    }
                }
                s.trim = false;
            }
            let streamed = (s.used..s.loaded).filter(|&n| s.streamed(units, n)).count();
            let room = !s.streamed(units, s.loaded) || streamed < AHEAD;
            if s.failed.is_none() && room && s.loaded < s.used + units.len() {
                return Some(Step::Load(s.loaded, s.ahead(units, s.loaded), s.turn));
            }
            s = self.changed.wait(s).unwrap_or_else(|e| e.into_inner());
        }
    }

    fn load(&self, unit: &Unit, n: u64, with_experts: bool, turn: u64) -> Result<(), Halt> {
        let experts = if with_experts { &unit.experts[..] } else { &[] };
        for bytes in unit.always.iter().chain(experts.iter().flatten()) {
            for at in (0..bytes.len()).step_by(PART) {
                let s = self.lock();
                if s.quit || s.loaded > n || s.turn != turn {
                    return Ok(());
                }
                drop(s);
                populate(&bytes.slice(at..bytes.len().min(at + PART)))?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::path::Path;

    fn file(dir: &Path, len: usize) -> Bytes {
        let path = dir.join("weights");
        fs::write(&path, (0..len).map(|i| (i / 4096) as u8).collect::<Vec<_>>()).unwrap();
        Bytes::map(&path).unwrap()
    }

    /// Units of two pages.
    fn units(whole: &Bytes) -> Vec<Unit> {
        let page = |i: usize| whole.slice(i * 4096..(i + 1) * 4096);
        let unit = |i: usize| Unit { always: vec![page(i * 2), page(i * 2 + 1)], experts: Vec::new() };
        (0..whole.len() / 8192).map(unit).collect()
    }

    /// A pass that stops after `stop` units: how many it went through.
    fn pass(s: &Stream, whole: &Bytes, stop: usize) -> Result<usize, String> {
        s.begin(Reading::default());
        for i in 0..s.units.all.len() {
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
        Ok(s.units.all.len())
    }

    #[test]
    fn passes_go_round_and_may_stop_anywhere() {
        let dir = tempfile::tempdir().unwrap();
        let whole = file(dir.path(), 10 * 8192);
        for budget in [0, 3 * 8192, 7 * 8192, 9 * 8192] {
            let s = Stream::of(units(&whole), None, budget).unwrap();
            for stop in [0, 1, 4, 0, 9, 0, 0] {
                assert_eq!(pass(&s, &whole, stop), Ok(if stop == 0 { 10 } else { stop }), "{budget}: {stop}");
            }
            let state = s.shared.lock();
            let streamed = (state.used..state.loaded).filter(|&n| state.streamed(&s.units, n)).count();
            assert!(streamed <= AHEAD, "{streamed} units ahead");
        }
    }

    #[test]
    fn a_file_that_is_cut_ends_a_pass() {
        let dir = tempfile::tempdir().unwrap();
        let whole = file(dir.path(), 10 * 8192);
        let s = Stream::of(units(&whole), None, 0).unwrap();
        assert_eq!(pass(&s, &whole, 0), Ok(10));
        let cut = |len: u64| fs::OpenOptions::new().write(true).open(dir.path().join("weights")).unwrap().set_len(len);
        cut(5 * 8192).unwrap();
        let problem = "weights: 40960 bytes, expected 81920: it was cut short while in use";
        for _ in 0..2 {
            assert_eq!(pass(&s, &whole, 0), Err(problem.to_string()));
        }
    }

    #[test]
    fn few_tokens_fetch_and_many_read_ahead() {
        let e = Some(Experts { count: 8, used: 2 });
        for (tokens, last, ahead, most) in [
            (1, 1, 0, 2),
            (3, 1, 0, 6),
            (7, 7, 0, 8),
            (8, 8, 5, 0),
            (500, 1, 4, 2),
            (500, 0, 4, 0), // nobody comes to the last layer's experts
            (500, 5, 4, 8),
            (500, 9, 5, 0),
        ] {
            assert_eq!(Reading::of(e, 5, tokens, last), Reading { ahead, most }, "{tokens}, {last}");
        }
        assert_eq!(Reading::of(None, 5, 1, 1), Reading::default());
        let prompt = Reading::of(e, 5, 500, 1);
        assert_eq!([3, 4].map(|i| prompt.fetches(i)), [false, true]);
    }

    const LAYERS: usize = 4;
    const COUNT: usize = 4;

    /// Layers of one page and four experts of three, and an output of one page.
    fn mixture(whole: &Bytes) -> Vec<Unit> {
        let page = |i: usize| whole.slice(i * 4096..(i + 1) * 4096);
        let expert = |l: usize, e: usize| std::array::from_fn(|m| page(l * 13 + 1 + e * 3 + m));
        let layer = |l| Unit { always: vec![page(l * 13)], experts: (0..COUNT).map(|e| expert(l, e)).collect() };
        (0..LAYERS).map(layer).chain([Unit { always: vec![page(LAYERS * 13)], experts: Vec::new() }]).collect()
    }

    /// Waits until the reader has done all that it can.
    fn settled(s: &Stream) -> MutexGuard<'_, State> {
        loop {
            let state = s.shared.lock();
            let ahead = state.loaded == state.used + s.units.len()
                || (state.used..state.loaded).filter(|&n| state.streamed(&s.units, n)).count() == AHEAD;
            if state.evicted == state.used && !state.trim && ahead {
                return state;
            }
            drop(state);
            std::thread::yield_now();
        }
    }

    /// A pass in which layer `l` uses the experts that `chosen` gives it.
    fn mixed(s: &Stream, reading: Reading, chosen: impl Fn(usize) -> Vec<usize>) -> Result<(), Halt> {
        s.begin(reading);
        for i in 0..=LAYERS {
            s.wait();
            s.halted()?;
            if i < LAYERS && reading.fetches(i) {
                s.fetch(i, chosen(i).into_iter());
                s.halted()?;
            }
            s.done(false);
        }
        Ok(())
    }

    const PAGE: u64 = 4096;
    const ONE: Reading = Reading { ahead: 0, most: 2 };
    const ALL: Reading = Reading { ahead: LAYERS, most: 0 };

    #[test]
    fn a_layer_keeps_the_experts_that_it_used_last() {
        let dir = tempfile::tempdir().unwrap();
        let whole = file(dir.path(), (LAYERS * 13 + 1) * 4096);
        let experts = Some(Experts { count: COUNT, used: 2 });
        // The layers and the output, two experts on their way, and then three in one layer and two in the others.
        let s = Stream::of(mixture(&whole), experts, 5 * PAGE + (2 + 9) * 3 * PAGE).unwrap();
        assert_eq!(s.bytes(), (32 * PAGE, (3 * 2 + 1) * 3 * PAGE));
        let held = |s: &Stream| settled(s).held[..LAYERS].to_vec();
        for (chosen, want) in [([0, 1], [0, 1, 9]), ([1, 2], [1, 2, 0]), ([3, 1], [3, 1, 2]), ([3, 1], [3, 1, 2])] {
            mixed(&s, ONE, |_| chosen.to_vec()).unwrap();
            let third = want.iter().copied().filter(|&e| e < COUNT).collect::<Vec<_>>();
            assert_eq!(held(&s), [want[..2].to_vec(), want[..2].to_vec(), want[..2].to_vec(), third], "{chosen:?}");
        }
        // Two whole layers on their way leave less room: those that were used last stay.
        mixed(&s, ALL, |_| unreachable!()).unwrap();
        let kept = held(&s);
        assert!(kept.iter().all(|h| h.len() <= 2 && [3, 1].starts_with(h)), "{kept:?}");
        mixed(&s, ONE, |l| vec![l]).unwrap();
        assert!(held(&s).iter().enumerate().all(|(l, h)| h[0] == l), "what came last is first");
    }

    #[test]
    fn whatever_the_passes_memory_is_bounded() {
        let dir = tempfile::tempdir().unwrap();
        let whole = file(dir.path(), (LAYERS * 13 + 1) * 4096);
        for budget in (0..58).step_by(3) {
            let s = Stream::of(mixture(&whole), Some(Experts { count: COUNT, used: 2 }), budget * PAGE).unwrap();
            for round in 0..30usize {
                let reading = if round * round % 7 < 4 { ONE } else { ALL };
                mixed(&s, reading, |l| vec![(l + round) % COUNT, (l + round * round + 1) % COUNT]).unwrap();
                let state = settled(&s);
                let held: u64 = state.held.iter().map(|h| h.len() as u64 * 3).sum();
                assert!(held == 0 || held + 5 <= budget, "{held} pages of experts within {budget}");
                drop(state);
            }
        }
    }

    #[test]
    fn a_file_that_is_cut_ends_a_fetch() {
        let dir = tempfile::tempdir().unwrap();
        let whole = file(dir.path(), (LAYERS * 13 + 1) * 4096);
        let s = Stream::of(mixture(&whole), Some(Experts { count: COUNT, used: 2 }), 40 * PAGE).unwrap();
        mixed(&s, ONE, |_| vec![2, 3]).unwrap();
        // The last layer's first page is still there.
        let cut = fs::OpenOptions::new().write(true).open(dir.path().join("weights")).unwrap();
        cut.set_len(40 * PAGE).unwrap();
        s.begin(ONE);
        for layer in 0..LAYERS {
            s.wait();
            s.halted().unwrap();
            s.fetch(layer, [3, 2].into_iter());
            if layer + 1 < LAYERS {
                s.halted().unwrap();
                s.done(false);
            }
        }
        // Whether they are kept or not.
        let Err(Halt::Read { error, .. }) = s.halted() else { panic!("the experts are not there") };
        assert_eq!(error.to_string(), "163840 bytes, expected 217088: it was cut short while in use");
    }
}
