//! Ctrl-C: the first one asks the work at hand to stop, and where there is none, ends the program.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

static BUSY: AtomicBool = AtomicBool::new(false);
static ASKED: AtomicBool = AtomicBool::new(false);

/// Work that Ctrl-C stops. Made before it, dropped after it.
pub struct Interruptible;

/// Begins such work.
pub fn interruptible() -> anyhow::Result<Interruptible> {
    static HANDLER: OnceLock<Result<(), String>> = OnceLock::new();
    let set = || {
        ctrlc::set_handler(|| {
            // A second Ctrl-C means it.
            if !BUSY.load(Ordering::SeqCst) || ASKED.swap(true, Ordering::SeqCst) {
                tell!();
                std::process::exit(130);
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

impl Drop for Interruptible {
    fn drop(&mut self) {
        BUSY.store(false, Ordering::SeqCst);
    }
}
