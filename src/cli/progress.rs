//! How far a long measurement is: a bar with the time left on a terminal, plain lines elsewhere.

use super::interrupt::asked;
use super::units::size;
use crate::engine::Session;
use indicatif::{HumanDuration, ProgressBar, ProgressDrawTarget, ProgressStyle};
use std::io::{IsTerminal, Write};
use std::ops::ControlFlow;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// A bar on stderr, hidden where that is no terminal.
pub fn bar(length: Option<u64>, template: &str) -> ProgressBar {
    let bar = ProgressBar::with_draw_target(length, ProgressDrawTarget::stderr());
    bar.with_style(ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar()))
}

/// Between plain lines.
const EVERY: Duration = Duration::from_secs(60);

/// A bar on stderr while a prompt of so many tokens is read, if that reads weights from the disk, too, and if there is a
/// terminal; otherwise a hidden one. Ctrl-C still ends a pass.
pub fn reading(s: &mut Session, tokens: usize) -> ProgressBar {
    if s.engine().stream().is_none() {
        return ProgressBar::hidden();
    }
    let units = tokens.div_ceil(s.walk()) * (s.engine().model.config.n_layers + 1);
    let bar = bar(Some(units as u64), "reading the prompt {bar:20} {pos} of {len} layers{msg}");
    let told = bar.clone();
    s.watch(Some(Arc::new(move |_, _| {
        // The passes after it are no longer the prompt's.
        if !told.is_finished() {
            told.inc(1);
            told.set_message(format!(", {} left", HumanDuration(told.eta())));
        }
        if asked() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    })));
    bar.tick();
    bar
}

/// Between plain lines about bytes that are read.
const EVERY_READ: Duration = Duration::from_secs(10);

/// Bytes that are read, by several threads, on stderr.
pub struct Reading {
    bar: ProgressBar,
    told: Mutex<Instant>,
}

impl Reading {
    /// Nothing is read yet.
    pub fn new() -> Reading {
        let template = "{bar:30} {binary_bytes}/{binary_total_bytes} of weights, {binary_bytes_per_sec}, {eta} left";
        Reading { bar: bar(None, template), told: Mutex::new(Instant::now()) }
    }

    /// So many bytes of so many are read.
    pub fn done(&self, done: u64, of: u64) {
        self.bar.set_length(of);
        // Threads tell in no order.
        self.bar.set_position(self.bar.position().max(done));
        let mut told = self.told.lock().unwrap_or_else(|e| e.into_inner());
        if self.bar.is_hidden() && told.elapsed() >= EVERY_READ {
            let rate = done as f64 / self.bar.elapsed().as_secs_f64();
            let (rate, left) = (rate.max(1.0), (of - done) as f64 / rate.max(1.0));
            tell!("{} of {} of weights, {}/s, {left:.0} seconds left", size(done), size(of), size(rate as u64));
            *told = Instant::now();
        }
    }

    /// Takes the bar away and says what it came to.
    pub fn finish(self) {
        self.bar.finish_and_clear();
        let (bytes, seconds) = (self.bar.position(), self.bar.elapsed().as_secs_f64());
        let rate = bytes as f64 / seconds.max(1e-9);
        tell!("{} of weights read in {seconds:.1} seconds, {}/s", size(bytes), size(rate as u64));
    }
}

/// Progress on stderr, and running results on stdout that do not disturb it.
pub struct Progress {
    bar: ProgressBar,
    unit: &'static str,
    total: usize,
    begun: Option<(Instant, usize)>, // when, and what was done before
    told: Instant,
    values: String, // of a running line that the bar holds back
}

impl Progress {
    /// Of `total` units.
    pub fn new(unit: &'static str, total: usize) -> Progress {
        let bar = bar(Some(total as u64), "{bar:30} {pos}/{len} {msg}");
        Progress { bar, unit, total, begun: None, told: Instant::now(), values: String::new() }
    }

    /// Computing begins; so many units were done in an earlier run.
    pub fn begin(&mut self, done: usize) {
        self.begun = Some((Instant::now(), done));
        self.bar.set_position(done as u64);
    }

    /// Seconds since then.
    pub fn seconds(&self) -> f64 {
        self.begun.map_or(0.0, |(t, _)| t.elapsed().as_secs_f64())
    }

    /// A result's line.
    pub fn line(&self, text: &str) -> std::io::Result<()> {
        self.bar.suspend(|| writeln!(std::io::stdout(), "{text}"))
    }

    /// A value of a line that grows. Where a bar shares the terminal, the line waits for its end.
    pub fn value(&mut self, text: &str) -> std::io::Result<()> {
        if !self.bar.is_hidden() && std::io::stdout().is_terminal() {
            self.values.push_str(text);
            self.bar.set_prefix(text.to_string());
            return Ok(());
        }
        let mut out = std::io::stdout();
        write!(out, "{text}")?;
        out.flush()
    }

    /// So many units are done in all.
    pub fn done(&mut self, done: usize) {
        let Some((start, before)) = self.begun else { return };
        self.bar.set_position(done as u64);
        let computed = done.saturating_sub(before).max(1);
        let left = start.elapsed().as_secs_f64() / computed as f64 * (self.total - done.min(self.total)) as f64;
        let left = match left {
            s if s >= 3600.0 => format!("{:.1} hours left", s / 3600.0),
            s if s >= 60.0 => format!("{:.1} minutes left", s / 60.0),
            s => format!("{s:.0} seconds left"),
        };
        self.bar.set_message(format!("{}s, {left} {}", self.unit, self.bar.prefix().trim_end_matches(',')));
        if self.bar.is_hidden() && self.told.elapsed() >= EVERY {
            tell!("{done} of {} {}s, {left}", self.total, self.unit);
            self.told = Instant::now();
        }
    }

    /// Takes the bar away and prints what it held back.
    pub fn finish(&mut self) -> std::io::Result<()> {
        self.bar.finish_and_clear();
        write!(std::io::stdout(), "{}", std::mem::take(&mut self.values))
    }
}
