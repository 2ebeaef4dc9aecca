//! Signals that end a program, heard on a thread of their own.

use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use std::io;

/// Ctrl-C's.
pub const INTERRUPT: i32 = SIGINT;

/// Has `f` told of Ctrl-C, of a closing terminal and of whoever ends the program: of each, which. Once a process.
pub fn on_end(mut f: impl FnMut(i32) + Send + 'static) -> io::Result<()> {
    let mut signals = Signals::new([SIGINT, SIGTERM, SIGHUP])?;
    std::thread::Builder::new().name("oxcart-signals".into()).spawn(move || signals.forever().for_each(&mut f))?;
    Ok(())
}
