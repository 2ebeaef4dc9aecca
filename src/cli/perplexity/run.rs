//! A run that is saved as it goes, and can be resumed.

use super::Args;
use crate::catalog::cache_dir;
use crate::cli::progress::Progress;
use crate::engine::Engine;
use crate::perplexity::state::{Key, State};
use anyhow::bail;
use std::ops::ControlFlow;
use std::path::Path;
use std::time::{Duration, Instant};

/// A run of many units (chunks, questions), computed in groups.
pub struct Run {
    state: State,
    /// How far it is.
    pub progress: Progress,
    work: Work,
    saved: Option<Instant>,
    fails: bool,
}

/// What is to be done.
pub struct Work {
    /// The verb that does it, for what is said.
    pub verb: &'static str,
    /// A unit's name.
    pub unit: &'static str,
    /// Units in all.
    pub total: usize,
    /// Units that are computed together.
    pub group: usize,
}

/// Between savings, so that syncing does not slow down what is quick anyway: a longer chunk is saved as soon as it is done.
const SAVE_EVERY: Duration = Duration::from_secs(1);

impl Args {
    /// The key of a run with these settings, to which the caller adds what is measured, and in pieces of which size.
    pub fn key(&self, e: &Engine, what: &str) -> Key {
        let mut key = Key::of(&e.gguf);
        key.add(what);
        let isa = e.kernels.label();
        let (k, v) = (self.session.cache_type_k.name(), self.session.cache_type_v.name());
        let sizes = (self.batch_size, self.session.ubatch_size);
        key.add(format!("{isa} {k} {v} {sizes:?} {:?}", self.engine.compute.override_kv));
        key
    }

    /// A run of `total` units in groups, from its beginning or from where it was cut off.
    pub fn start(&self, key: &Key, unit: &'static str, total: usize, group: usize) -> anyhow::Result<Run> {
        Run::start(key, self.resume, Work { verb: "perplexity", unit, total, group })
    }
}

impl Run {
    /// A run from its beginning or, to `resume` it, from where it was cut off.
    pub fn start(key: &Key, resume: bool, work: Work) -> anyhow::Result<Run> {
        let mut state = State::new(&cache_dir()?.join("perplexity"), key);
        let Work { verb, unit, total, .. } = work;
        if resume {
            if state.load()? {
                let found = state.records().len();
                if found > total {
                    bail!("{}: {found} {unit}s, expected {total} at most", state.path().display());
                }
                tell!("{verb}: resuming behind {found} of {total} {unit}s");
            } else {
                tell!("{verb}: nothing to resume, starting from the beginning");
            }
        }
        Ok(Run { state, progress: Progress::new(unit, total), work, saved: None, fails: false })
    }

    /// Units that an earlier run has computed.
    pub fn resumed(&self) -> usize {
        self.state.records().len()
    }

    /// Computes every group that is not yet there (`compute`: first unit, how many; a record for each, of finite numbers) and
    /// tells every unit's record in order; `tell` may stop it. What was computed is kept until [`Run::done`]. `model` is the
    /// file of the one that a record's number at some place is of.
    pub fn drive<'a>(
        &mut self,
        model: impl Fn(usize) -> &'a Path,
        mut compute: impl FnMut(usize, usize) -> anyhow::Result<Vec<Vec<f64>>>,
        mut tell: impl FnMut(&mut Progress, usize, &[f64]) -> anyhow::Result<ControlFlow<()>>,
    ) -> anyhow::Result<()> {
        let resumed = self.resumed();
        let Work { verb, unit, total, group } = self.work;
        let mut told = 0;
        self.progress.begin(resumed);
        'all: while told < total {
            if told == self.resumed() {
                let count = group.min(total - told);
                let records = compute(told, count)?;
                for (i, record) in (told + 1..).zip(&records) {
                    if let Some(at) = record.iter().position(|v| !v.is_finite()) {
                        bail!("{}: {unit} {i}: logits that are NaN or infinite", model(at).display());
                    }
                }
                self.save(records);
                if told == resumed {
                    let (pass, left) = (self.progress.seconds(), total - told);
                    let minutes = pass * left as f64 / count as f64 / 60.0;
                    tell!("{verb}: {pass:.2} seconds per pass - ETA {minutes:.2} minutes");
                }
            }
            while let Some(record) = self.state.records().get(told) {
                if tell(&mut self.progress, told, record)?.is_break() {
                    break 'all;
                }
                told += 1;
            }
            self.progress.done(told);
        }
        Ok(self.progress.finish()?)
    }

    /// Nothing is kept of a run that is done: when all that it writes has its name.
    pub fn done(&self) -> anyhow::Result<()> {
        Ok(self.state.remove()?)
    }

    fn save(&mut self, records: Vec<Vec<f64>>) {
        self.state.extend(records);
        if self.saved.is_some_and(|t| t.elapsed() < SAVE_EVERY) {
            return;
        }
        if let Err(e) = self.state.save()
            && !std::mem::replace(&mut self.fails, true)
        {
            // The measurement is worth more than its safety net.
            tell!("{}: {e}: this run cannot be resumed", self.work.verb);
        }
        self.saved = Some(Instant::now());
    }
}
