//! The threads. This is the only file that names rayon.
//!
//! A [`Team`] owns a pool; [`Team::run`] sends every worker through the same function, once (one broadcast). Inside,
//! work is divided by [`Worker::split`], which hands out task numbers from a shared counter, and ordered by
//! [`Worker::sync`], a barrier. A fork and join through a work-stealing pool costs 6 to 15 microseconds; this barrier
//! costs 0.3, so that a forward pass can afford hundreds.
//!
//! ```text
//! team.run(|w| {
//!     w.split(n, |task| ...);   // each task once, on whichever worker comes first
//!     w.sync();                 // everything before is done, and seen by all
//! })
//! ```
//!
//! Every worker must make the same calls in the same order. Which worker takes a task is chance; what a task computes must
//! not depend on it, and then results do not depend on the number of threads.

use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, OnceLock};
use std::time::{Duration, Instant};

/// Splits between two barriers, at most.
const COUNTERS: usize = 16;

/// Turns of its loop that a worker waits in before it sleeps: 50 microseconds and more, about as long as another's task, and
/// several times as long as to be woken.
const SPINS: usize = 2_000;
/// And where others want the processors.
const FEWEST_SPINS: usize = 32;
/// A turn, at least. One pause takes 3 nanoseconds on Haswell, 25 on Zen 4, 50 on Xeons since Skylake.
const TURN: Duration = Duration::from_nanos(25);
/// A wait of this length was not for a task: the other worker had lost its processor.
const LOST: Duration = Duration::from_micros(500);

/// Threads that run a region of code together.
pub struct Team {
    pool: Option<rayon::ThreadPool>, // none where one thread does it all
    threads: usize,
    spins: Vec<Padded<AtomicUsize>>, // how long each worker spins by now
    most_spins: usize,
    pauses: u32, // of a turn
    // Two regions at once on one pool would each hold threads that the other's barriers wait for.
    busy: Mutex<()>,
}

impl Team {
    /// A team of `threads` workers, at least one.
    pub fn new(threads: usize) -> std::io::Result<Team> {
        match threads {
            // The caller does it all.
            0 | 1 => Ok(Team::of(None, 1)),
            _ => Team::starting_with(threads, |_| Ok(())),
        }
    }

    fn of(pool: Option<rayon::ThreadPool>, threads: usize) -> Team {
        // Whoever spins while there are fewer processors than workers keeps one from the worker that it waits for.
        let processors = std::thread::available_parallelism().map_or(threads, |n| n.get());
        let most_spins = if threads > processors { FEWEST_SPINS } else { SPINS };
        let spins = (0..threads).map(|_| Padded(AtomicUsize::new(most_spins))).collect();
        let pauses = if threads > 1 { pauses() } else { 1 };
        Team { pool, threads, spins, most_spins, pauses, busy: Mutex::new(()) }
    }

    /// The same, of threads that are all the team's own, each of which begins with `start` and its index: to be pinned to
    /// processors, for example. The first error of one is returned.
    pub fn starting_with(
        threads: usize,
        start: impl Fn(usize) -> std::io::Result<()> + Send + Sync + 'static,
    ) -> std::io::Result<Team> {
        let threads = threads.max(1);
        let failed = Arc::new(Mutex::new(None));
        let heard = failed.clone();
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .thread_name(|i| format!("oxcart-{i}"))
            .start_handler(move |i| {
                if let Err(e) = start(i) {
                    heard.lock().unwrap_or_else(|e| e.into_inner()).get_or_insert(e);
                }
            })
            .build()
            .map_err(std::io::Error::other)?;
        let team = Team::of(Some(pool), threads);
        // When all have done this, all have started.
        team.run(|_| ());
        let first = failed.lock().unwrap_or_else(|e| e.into_inner()).take();
        first.map_or(Ok(team), Err)
    }

    /// Number of workers.
    pub fn threads(&self) -> usize {
        self.threads
    }

    /// Runs `f` on every worker at once and returns when all have. Callers take turns; one that is inside of a region would
    /// wait for itself, and panics.
    ///
    /// A panic in one worker ends the others at their next barrier and is then raised here.
    pub fn run(&self, f: impl Fn(&Worker<'_>) + Sync) {
        assert!(!INSIDE.get(), "a region inside a region");
        let _alone = self.busy.lock().unwrap_or_else(|e| e.into_inner());
        let region = Region::new(self.threads);
        let body = |index: usize| {
            let w = Worker {
                index,
                region: &region,
                spins: &self.spins[index].0,
                most_spins: self.most_spins,
                pauses: self.pauses,
                phase: Cell::new(0),
                since_sync: Cell::new(0),
                generation: Cell::new(0),
            };
            INSIDE.set(true);
            let end = catch_unwind(AssertUnwindSafe(|| f(&w)));
            INSIDE.set(false);
            if end.is_err() {
                region.poison();
            }
            end
        };
        let ends = match &self.pool {
            None => vec![body(0)],
            Some(pool) => pool.broadcast(|ctx| body(ctx.index())),
        };
        // The first panic is the cause; those of the others only say that they stopped.
        let mut panics: Vec<_> = ends.into_iter().filter_map(Result::err).collect();
        if let Some(i) = panics.iter().position(|p| !p.is::<Stopped>()) {
            resume_unwind(panics.swap_remove(i));
        }
    }
}

thread_local! {
    /// Whether this thread runs a region's code.
    static INSIDE: Cell<bool> = const { Cell::new(false) };
}

/// Pauses that make a turn, measured once.
fn pauses() -> u32 {
    static PAUSES: OnceLock<u32> = OnceLock::new();
    *PAUSES.get_or_init(|| {
        const PAUSES: u32 = 64;
        let time = || {
            let begun = Instant::now();
            (0..PAUSES).for_each(|_| std::hint::spin_loop());
            begun.elapsed()
        };
        // The shortest: nothing came between.
        let shortest = (0..8).map(|_| time()).min().expect("eight").max(Duration::from_nanos(1));
        let (turn, shortest) = ((TURN * PAUSES).as_nanos(), shortest.as_nanos());
        ((turn + shortest / 2) / shortest).clamp(1, 64) as u32
    })
}

/// Turns to spin in the next wait, after one that was begun with so many, and slept for so long where they did not suffice.
///
/// Where other programs want the processors, it is few: the late worker has lost its processor to one of them and needs this
/// one, and a thread that sleeps often is preferred by the scheduler when it wakes. One long wait takes all patience; each wait
/// that was spun through gives a turn of it back. Waits slept through give none: beside a busy neighbour most of them are
/// short, too.
fn patience(spins: usize, slept: Option<Duration>) -> usize {
    match slept {
        None => spins + 1,
        Some(long) if long > LOST => FEWEST_SPINS,
        Some(_) => spins,
    }
}

/// What a worker panics with when another one has: its own stack unwinds, no message is printed.
struct Stopped;

/// What the workers of one `run` share.
struct Region {
    threads: usize,
    counters: [Padded<AtomicUsize>; COUNTERS],
    arrived: Padded<AtomicUsize>,
    generation: Padded<AtomicUsize>,
    poisoned: Padded<AtomicBool>, // read in every turn of a wait
    sleepers: AtomicUsize,
    lock: Mutex<()>,
    wake: Condvar,
}

/// Alone on its cache line (two, for the adjacent-line prefetcher).
#[repr(align(128))]
#[derive(Default)]
struct Padded<T>(T);

impl Region {
    fn new(threads: usize) -> Region {
        Region {
            threads,
            counters: Default::default(),
            arrived: Padded::default(),
            generation: Padded::default(),
            poisoned: Padded::default(),
            sleepers: AtomicUsize::new(0),
            lock: Mutex::new(()),
            wake: Condvar::new(),
        }
    }

    fn poison(&self) {
        self.poisoned.0.store(true, Ordering::SeqCst);
        self.wake_all();
    }

    fn wake_all(&self) {
        drop(self.lock.lock());
        self.wake.notify_all();
    }
}

/// One of the threads inside [`Team::run`].
pub struct Worker<'t> {
    index: usize,
    region: &'t Region,
    spins: &'t AtomicUsize,
    most_spins: usize,
    pauses: u32,
    phase: Cell<usize>,      // splits so far
    since_sync: Cell<usize>, // splits since the last barrier
    generation: Cell<usize>, // barriers passed
}

impl Worker<'_> {
    /// 0 to `threads() - 1`.
    pub fn index(&self) -> usize {
        self.index
    }

    /// Number of workers in the team.
    pub fn threads(&self) -> usize {
        self.region.threads
    }

    /// Does its share of the tasks `0..tasks`. There is no barrier at the end.
    pub fn split(&self, tasks: usize, mut f: impl FnMut(usize)) {
        let counter = &self.region.counters[self.phase.get() % COUNTERS].0;
        self.phase.set(self.phase.get() + 1);
        self.since_sync.set(self.since_sync.get() + 1);
        assert!(self.since_sync.get() <= COUNTERS, "more than {COUNTERS} splits without a sync");
        if self.region.threads == 1 {
            (0..tasks).for_each(f);
            return;
        }
        loop {
            let task = counter.fetch_add(1, Ordering::Relaxed);
            if task >= tasks {
                return;
            }
            f(task);
        }
    }

    /// Waits until every worker is here. What was written before is seen by all after.
    pub fn sync(&self) {
        let r = self.region;
        let since = self.since_sync.replace(0);
        if r.threads == 1 {
            return;
        }
        let generation = self.generation.get();
        self.generation.set(generation + 1);
        if r.arrived.0.fetch_add(1, Ordering::AcqRel) + 1 == r.threads {
            // All have left the splits since the last barrier: their counters can serve again.
            for p in self.phase.get() - since..self.phase.get() {
                r.counters[p % COUNTERS].0.store(0, Ordering::Relaxed);
            }
            r.arrived.0.store(0, Ordering::Relaxed);
            // SeqCst pairs with the sleeper's: either it sees the new generation or we see the sleeper.
            r.generation.0.store(generation + 1, Ordering::SeqCst);
            if r.sleepers.load(Ordering::SeqCst) > 0 {
                r.wake_all();
            }
        } else {
            self.wait(generation);
        }
        if r.poisoned.0.load(Ordering::Relaxed) {
            resume_unwind(Box::new(Stopped));
        }
    }

    /// Spins while another worker's task ends, then sleeps; how long is [`patience`].
    fn wait(&self, generation: usize) {
        let r = self.region;
        let passed = || r.generation.0.load(Ordering::Acquire) != generation || r.poisoned.0.load(Ordering::Relaxed);
        let spins = self.spins.load(Ordering::Relaxed);
        for _ in 0..spins {
            if passed() {
                self.spins.store(patience(spins, None).min(self.most_spins), Ordering::Relaxed);
                return;
            }
            (0..self.pauses).for_each(|_| std::hint::spin_loop());
        }
        let asleep = Instant::now();
        self.sleep(generation);
        self.spins.store(patience(spins, Some(asleep.elapsed())), Ordering::Relaxed);
    }

    fn sleep(&self, generation: usize) {
        let r = self.region;
        r.sleepers.fetch_add(1, Ordering::SeqCst);
        let mut guard = r.lock.lock().unwrap_or_else(|e| e.into_inner());
        while r.generation.0.load(Ordering::SeqCst) == generation && !r.poisoned.0.load(Ordering::SeqCst) {
            guard = r.wake.wait(guard).unwrap_or_else(|e| e.into_inner());
        }
        drop(guard);
        r.sleepers.fetch_sub(1, Ordering::SeqCst);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_task_runs_once_and_barriers_order_phases() {
        for threads in [1, 2, 3, 7] {
            let team = Team::new(threads).unwrap();
            let cells: Vec<AtomicUsize> = (0..1000).map(|_| AtomicUsize::new(0)).collect();
            team.run(|w| {
                for phase in 0..50 {
                    w.split(cells.len(), |i| {
                        assert_eq!(cells[i].fetch_add(1, Ordering::Relaxed), phase, "task {i}");
                    });
                    if phase % 7 == 0 {
                        w.split(3, |_| ());
                    }
                    w.sync();
                }
            });
            assert!(cells.iter().all(|c| c.load(Ordering::Relaxed) == 50));
        }
    }

    #[test]
    fn a_panic_ends_all_and_is_raised() {
        let team = Team::new(3).unwrap();
        for _ in 0..20 {
            let end = catch_unwind(AssertUnwindSafe(|| {
                team.run(|w| {
                    w.split(10, |i| assert!(i != 5, "task five"));
                    w.sync();
                    w.sync();
                })
            }));
            let text = *end.unwrap_err().downcast::<&str>().expect("the first panic's own payload");
            assert_eq!(text, "task five");
        }
        team.run(|w| w.sync());
    }

    #[test]
    fn threads_begin_with_what_they_are_told() {
        for threads in [1, 3] {
            let started = Arc::new(Mutex::new(Vec::new()));
            let here = started.clone();
            let start = move |i| {
                here.lock().unwrap().push((i, std::thread::current().id()));
                Ok(())
            };
            let team = Team::starting_with(threads, start).unwrap();
            let ran = Mutex::new(Vec::new());
            team.run(|w| ran.lock().unwrap().push((w.index(), std::thread::current().id())));
            let (mut started, mut ran) = (started.lock().unwrap().clone(), ran.into_inner().unwrap());
            started.sort_by_key(|s| s.0);
            ran.sort_by_key(|r| r.0);
            assert_eq!(started, ran);
            assert_eq!(ran.len(), threads);
        }
        let start = |i| if i == 1 { Err(std::io::Error::other("no processor")) } else { Ok(()) };
        assert_eq!(Team::starting_with(2, start).err().map(|e| e.to_string()), Some("no processor".into()));
    }

    #[test]
    fn patience_is_lost_by_long_waits_and_comes_back() {
        let team = Team::new(2).unwrap();
        let spins = |team: &Team| team.spins[1].0.load(Ordering::Relaxed);
        team.run(|w| {
            for _ in 0..4 {
                if w.index() == 0 {
                    std::thread::sleep(Duration::from_millis(5));
                }
                w.sync();
            }
        });
        assert_eq!(spins(&team), FEWEST_SPINS);
        assert_eq!(patience(FEWEST_SPINS, None), FEWEST_SPINS + 1);
        assert_eq!(patience(1000, Some(LOST)), 1000);
        assert_eq!(patience(1000, Some(2 * LOST)), FEWEST_SPINS);
    }

    /// What this thread has had of a processor.
    #[cfg(unix)]
    #[allow(unsafe_code)]
    fn processor_time() -> Duration {
        let mut t = libc::timespec { tv_sec: 0, tv_nsec: 0 };
        // SAFETY: the address is of a `timespec`.
        assert_eq!(unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &mut t) }, 0);
        Duration::new(t.tv_sec as u64, t.tv_nsec as u32)
    }

    #[cfg(unix)]
    #[test]
    fn a_slow_worker_is_waited_for_asleep() {
        const SLOW: Duration = Duration::from_millis(30);
        let team = Team::new(2).unwrap();
        let spent = Mutex::new(Duration::ZERO);
        team.run(|w| {
            for _ in 0..3 {
                // Both are here: the wait is as long as the sleep.
                w.sync();
                if w.index() == 0 {
                    std::thread::sleep(SLOW);
                }
                let before = processor_time();
                w.sync();
                if w.index() == 1 {
                    *spent.lock().unwrap() += processor_time() - before;
                }
            }
        });
        let spent = spent.into_inner().unwrap();
        assert!(spent < SLOW * 3 / 10, "{spent:?} of a processor to wait {:?}", SLOW * 3);
    }
}
