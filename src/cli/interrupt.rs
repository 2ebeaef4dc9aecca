//! Ctrl-C: the first one asks the work at hand to stop, and where there is none, ends the program. What ends a program from
//! outside (TERM, HUP) does as well, and after that work nothing more is begun.

use crate::signals::{INTERRUPT, on_end};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};

static BUSY: AtomicBool = AtomicBool::new(false);
static ASKED: AtomicBool = AtomicBool::new(false);
static ENDED_BY: AtomicI32 = AtomicI32::new(0);

/// Work that Ctrl-C stops. Made before it, dropped after it.
pub struct Interruptible;

/// Begins such work.
pub fn interruptible() -> anyhow::Result<Interruptible> {
    static HANDLER: OnceLock<Result<(), String>> = OnceLock::new();
    let set = || {
        on_end(|signal| {
            if signal != INTERRUPT {
                ENDED_BY.store(signal, Ordering::SeqCst);
            }
            // A second Ctrl-C means it.
            if !BUSY.load(Ordering::SeqCst) || ASKED.swap(true, Ordering::SeqCst) {
                tell!();
                std::process::exit(128 + signal);
            }
        })
        .map_err(|e| e.to_string())
    };
    HANDLER.get_or_init(set).clone().map_err(|e| anyhow::anyhow!("Ctrl-C handler: {e}"))?;
    ASKED.store(false, Ordering::SeqCst);
    BUSY.store(true, Ordering::SeqCst);
    Ok(Interruptible)
}

impl Interruptible {
    /// Whether Ctrl-C was pressed.
    pub fn asked(&self) -> bool {
        asked()
    }
}

/// Whether Ctrl-C was pressed, for code that the work runs on other threads.
pub fn asked() -> bool {
    ASKED.load(Ordering::SeqCst)
}

/// The exit status of a program that was ended from outside, as shells have it.
pub fn ended() -> Option<i32> {
    Some(ENDED_BY.load(Ordering::SeqCst)).filter(|&s| s != 0).map(|s| 128 + s)
}

/// The exit status of a program that ends with the work which Ctrl-C or who ends it has stopped.
pub fn stopped_by() -> i32 {
    ended().unwrap_or(128 + INTERRUPT)
}

impl Drop for Interruptible {
    fn drop(&mut self) {
        BUSY.store(false, Ordering::SeqCst);
    }
}
