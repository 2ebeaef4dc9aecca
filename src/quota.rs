//! How much memory and time a piece of work may take.
//!
//! What a stranger's program asks for while it is interpreted here (a chat template) cannot be seen from outside: its
//! interpreter asks the allocator. So the allocator counts, for a thread that has a quota. A thread that asks for more gets
//! no answer: it sleeps for good, with what it has, and who waits for it is told. (To refuse would be to abort the process.)
//!
//! Memory is counted where a program makes [`Allocator`] its own, as `main.rs` does; elsewhere there is the time alone.
#![allow(unsafe_code)]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::marker::PhantomData;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

/// How often who waits looks whether all memory is spent.
const LOOK: Duration = Duration::from_millis(20);

/// What a piece of work may take.
#[derive(Clone, Copy, Debug)]
pub struct Quota {
    /// Bytes of stack; what is not reached takes no memory.
    pub stack: usize,
    /// Bytes of memory at a time.
    pub memory: usize,
    /// How long it may last.
    pub time: Duration,
}

/// Work that did not come to its end.
#[derive(Debug, thiserror::Error)]
pub enum QuotaError {
    /// It asked for more memory.
    #[error("takes more than {mb} MB of memory", mb = .0 >> 20)]
    Memory(usize),
    /// It went on.
    #[error("takes more than {0} seconds")]
    Time(u64),
    /// It panicked.
    #[error("the interpreter failed")]
    Panic,
    /// There is no thread for it.
    #[error("no stack for it: {0}")]
    Start(#[from] std::io::Error),
}

impl Quota {
    /// Runs `f` on a thread of its own. A thread that wants more than its quota is left behind, asleep as soon as it asks for
    /// memory again; what it holds is lost to the process.
    pub fn run<T: Send + 'static>(self, name: &str, f: impl FnOnce() -> T + Send + 'static) -> Result<T, QuotaError> {
        let account = Arc::new(Account { left: AtomicUsize::new(self.memory), over: false.into(), stop: false.into() });
        let (done, end) = mpsc::sync_channel(1);
        let of_thread = account.clone();
        thread::Builder::new().name(name.into()).stack_size(self.stack).spawn(move || {
            let open = Open::new(&of_thread);
            let value = f();
            drop(open);
            // Nobody waits any more where time was up.
            let _ = done.send(value);
        })?;
        let start = Instant::now();
        loop {
            match end.recv_timeout(LOOK) {
                Ok(value) => return Ok(value),
                Err(RecvTimeoutError::Disconnected) => return Err(QuotaError::Panic),
                Err(RecvTimeoutError::Timeout) if account.over.load(Relaxed) => {
                    return Err(QuotaError::Memory(self.memory));
                }
                Err(RecvTimeoutError::Timeout) if start.elapsed() > self.time => {
                    account.stop.store(true, Relaxed);
                    return Err(QuotaError::Time(self.time.as_secs()));
                }
                Err(RecvTimeoutError::Timeout) => (),
            }
        }
    }
}

/// What a thread has left.
struct Account {
    left: AtomicUsize,
    over: AtomicBool, // more was asked for
    stop: AtomicBool, // time is up
}

thread_local! {
    /// This thread's account, or null. (Nothing to be dropped: that would allocate.)
    static ACCOUNT: Cell<*const Account> = const { Cell::new(std::ptr::null()) };
}

/// An account in use by this thread.
struct Open<'a>(PhantomData<&'a Account>);

impl<'a> Open<'a> {
    fn new(account: &'a Account) -> Open<'a> {
        ACCOUNT.set(account);
        Open(PhantomData)
    }
}

impl Drop for Open<'_> {
    fn drop(&mut self) {
        ACCOUNT.set(std::ptr::null());
    }
}

/// Takes `bytes` from this thread's account, or does not return.
fn take(bytes: usize) {
    // SAFETY: `Open` has the account borrowed for as long as the pointer stands here.
    let Some(account) = (unsafe { ACCOUNT.get().as_ref() }) else { return };
    match account.left.load(Relaxed).checked_sub(bytes) {
        Some(left) if !account.stop.load(Relaxed) => account.left.store(left, Relaxed),
        // The message of a panic is under way, and with it the lock of stderr.
        _ if thread::panicking() => (),
        _ => {
            account.over.store(true, Relaxed);
            loop {
                thread::park();
            }
        }
    }
}

fn give_back(bytes: usize) {
    // SAFETY: as in `take`.
    if let Some(account) = unsafe { ACCOUNT.get().as_ref() } {
        account.left.fetch_add(bytes, Relaxed);
    }
}

/// The system's allocator, which keeps accounts.
pub struct Allocator;

// SAFETY: every call goes to the system's allocator as it came, or never returns.
unsafe impl GlobalAlloc for Allocator {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        take(layout.size());
        // SAFETY: the caller's promise.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        take(layout.size());
        // SAFETY: the caller's promise.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        give_back(layout.size());
        // SAFETY: the caller's promise.
        unsafe { System.dealloc(at, layout) }
    }

    unsafe fn realloc(&self, at: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        match size.checked_sub(layout.size()) {
            Some(more) => take(more),
            None => give_back(layout.size() - size),
        }
        // SAFETY: the caller's promise.
        unsafe { System.realloc(at, layout, size) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SMALL: Quota = Quota { stack: 1 << 20, memory: 1 << 20, time: Duration::from_secs(60) };

    #[test]
    fn work_within_its_quota_ends() {
        // What is given back may be taken again.
        let work = || (0..100).map(|i| vec![i as u8; 900_000].len()).sum::<usize>();
        assert_eq!(SMALL.run("test", work).unwrap(), 90_000_000);
        let grown = || (0..100_000u64).collect::<Vec<_>>().len();
        assert_eq!(SMALL.run("test", grown).unwrap(), 100_000);
    }

    #[test]
    fn more_memory_is_an_error() {
        for work in [
            || vec![1u8; 2 << 20].len(),
            || vec![0u8; 1 << 40].len(),
            || {
                let mut text = String::from("x");
                for _ in 0..60 {
                    text.push_str(&text.clone());
                }
                text.len()
            },
        ] {
            assert!(matches!(SMALL.run("test", work), Err(QuotaError::Memory(n)) if n == 1 << 20));
        }
    }

    #[test]
    fn more_time_is_an_error_and_so_is_a_panic() {
        let short = Quota { time: Duration::from_millis(50), ..SMALL };
        // It goes on until it asks for memory.
        let endless = || while *std::hint::black_box(Box::new(true)) {};
        assert!(matches!(short.run("test", endless), Err(QuotaError::Time(0))));
        let panics = || std::panic::resume_unwind(Box::new("on purpose"));
        assert!(matches!(SMALL.run("test", panics), Err::<(), _>(QuotaError::Panic)));
    }
}
