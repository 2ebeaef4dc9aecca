//! What both benchmarks measure with.

use std::fmt::Display;
use std::str::FromStr;
use std::time::Instant;

/// The best of nine: what other programs on the machine take away is not the kernel's.
pub fn seconds(mut f: impl FnMut()) -> f64 {
    f();
    let once = |_| {
        let start = Instant::now();
        f();
        start.elapsed().as_secs_f64()
    };
    (0..9).map(once).fold(f64::INFINITY, f64::min)
}

/// What is behind a flag such as `--rows=`, if it is given.
pub fn flag<T: FromStr<Err: Display>>(name: &str) -> Option<T> {
    let value = std::env::args().find_map(|a| Some(a.strip_prefix(name)?.to_string()))?;
    Some(value.parse().unwrap_or_else(|e| panic!("{name}{value}: {e}")))
}
