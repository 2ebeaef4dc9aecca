//! What this program has of memory, where the system tells (Linux's /proc).

use std::fs;

/// Bytes that this program has in memory, the pages of the model's file included.
pub fn resident() -> Option<u64> {
    let statm = fs::read_to_string("/proc/self/statm").ok()?;
    let pages: u64 = statm.split(' ').nth(1)?.parse().ok()?;
    Some(pages * rustix::param::page_size() as u64)
}
