//! How far a run came, so that another goes on from there: `NAME.gguf.partial.json` beside the unfinished file.
//!
//! A tensor counts as whole when its bytes were synced, which a thread of its own does every second or so: neither a killed
//! process nor a power failure leaves a count that the file does not keep. It also writes the output back steadily, so that
//! the system never has gigabytes of it to write at once.

use super::QuantizeError;
use crate::disk::{self, Partial, Survivor};
use crate::gguf::one_line;
use serde::{Deserialize, Serialize};
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{SyncSender, sync_channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant, UNIX_EPOCH};

/// The time between two syncs, at least.
const PERIOD: Duration = Duration::from_secs(1);
/// More than such a file ever has, in bytes.
const MOST_BYTES: u64 = 1 << 20;

/// A file that is read, and how to tell that it is still the same.
#[derive(Clone, Serialize, Deserialize, PartialEq, Eq)]
struct Input {
    file: PathBuf,
    bytes: u64,
    modified: u64, // ns since 1970
}

impl Input {
    fn of(file: &PathBuf) -> io::Result<Input> {
        let (path, m) = (file.canonicalize()?, fs::metadata(file)?);
        let since = m.modified()?.duration_since(UNIX_EPOCH).unwrap_or_default();
        Ok(Input { file: path, bytes: m.len(), modified: since.as_nanos() as u64 })
    }
}

/// What the file says. Read back, it comes from another run, and inputs and demand are checked.
#[derive(Serialize, Deserialize)]
struct Note {
    inputs: Vec<Input>,
    demand: String, // what else decides the bytes
    tensors: usize, // whole ones
}

/// Writes the note in one piece, which lasts as the tensors do that it counts.
fn save(path: &Path, note: &Note) -> io::Result<()> {
    disk::write(path, &serde_json::to_vec(note)?)
}

/// Notes how many tensors are whole. Dropped between [`Journal::begin`] and [`Journal::keep`], it leaves nothing.
pub(super) struct Journal {
    file: PathBuf,
    inputs: Vec<Input>,
    demand: String,
    whole: usize,
    last: Instant,
    syncs: Option<SyncSender<(File, Vec<Survivor>, Note)>>,
    thread: Option<JoinHandle<io::Result<()>>>,
    ours: Option<Partial>,
}

impl Journal {
    /// Reads what another run noted, where `resume` says so: a run that read the same `inputs` on the same `demand`.
    pub fn open(out: &Path, inputs: &[PathBuf], demand: &str, resume: bool) -> Result<Journal, QuantizeError> {
        let mut file = out.as_os_str().to_owned();
        file.push(".partial.json");
        let file = PathBuf::from(file);
        let fail = |problem: String| QuantizeError::Resume { file: file.clone(), problem };
        let input = |path: &PathBuf| Input::of(path).map_err(|e| fail(format!("{}: {e}", path.display())));
        let inputs = inputs.iter().map(input).collect::<Result<Vec<_>, _>>()?;
        let whole = if resume && file.exists() { read(&file, &inputs, demand).map_err(fail)? } else { 0 };
        let demand = demand.to_string();
        Ok(Journal { file, inputs, demand, whole, last: Instant::now(), syncs: None, thread: None, ours: None })
    }

    /// Begins to note: from here on the note is this run's, and goes with it, but where the program is ended.
    pub fn begin(&mut self) {
        let (syncs, due) = sync_channel::<(File, Vec<Survivor>, Note)>(1);
        let of = if self.whole > 0 { Partial::of_another_run } else { Partial::new };
        let (path, ours) = (self.file.clone(), of(self.file.clone()));
        let own = ours.survivor();
        // Where the system gives no thread, nothing is noted.
        let thread = std::thread::Builder::new().name("oxcart-notes".into()).spawn(move || {
            for (file, written, note) in due {
                file.sync_data()?;
                // Without a note another run begins anew: no reason to lose what this one makes.
                if save(&path, &note).is_ok() {
                    written.iter().chain([&own]).for_each(Survivor::survive);
                }
            }
            Ok(())
        });
        (self.syncs, self.thread, self.ours) = (Some(syncs), thread.ok(), Some(ours));
    }

    /// Tensors that were whole when the other run ended.
    pub fn whole(&self) -> usize {
        self.whole
    }

    /// Whether it is time for a note.
    pub fn is_due(&self) -> bool {
        self.last.elapsed() >= PERIOD
    }

    /// Has `file` synced and then noted that `tensors` are whole, in the background. Where the last is still at it, nothing.
    /// `written` are all files of the output so far.
    pub fn note(&mut self, file: File, written: Vec<Survivor>, tensors: usize) {
        let note = Note { inputs: self.inputs.clone(), demand: self.demand.clone(), tensors };
        if let Some(syncs) = &self.syncs
            && syncs.try_send((file, written, note)).is_ok()
        {
            self.last = Instant::now();
        }
    }

    /// Ends the syncing.
    pub fn stop(&mut self) -> Result<(), QuantizeError> {
        self.syncs = None;
        let ended = self.thread.take().map_or(Ok(()), |t| t.join().expect("syncing does not panic"));
        ended.map_err(|e| self.fail(e))
    }

    /// Leaves a note that `tensors` are whole, which the caller has synced.
    pub fn keep(mut self, tensors: usize) -> Result<(), QuantizeError> {
        self.stop()?;
        let note = Note { inputs: std::mem::take(&mut self.inputs), demand: std::mem::take(&mut self.demand), tensors };
        save(&self.file, &note).map_err(|e| self.fail(e))?;
        self.ours.iter().for_each(Partial::keep);
        Ok(())
    }

    fn fail(&self, e: io::Error) -> QuantizeError {
        QuantizeError::Resume { file: self.file.clone(), problem: e.to_string() }
    }
}

impl Drop for Journal {
    fn drop(&mut self) {
        // An error of it was told of by `stop`, or stands behind one that is being told.
        let _ = self.stop();
    }
}

/// How many tensors a note says are whole, if it speaks of the same inputs and demand.
fn read(file: &Path, inputs: &[Input], demand: &str) -> Result<usize, String> {
    let text = disk::read(file, MOST_BYTES).map_err(|e| e.to_string())?;
    let note: Note = serde_json::from_slice(&text).map_err(|e| e.to_string())?;
    if note.inputs.len() != inputs.len() {
        let (found, now) = (note.inputs.len(), inputs.len());
        return Err(format!("is of a run that read {found} files, expected {now}; run without --resume"));
    }
    match note.inputs.iter().zip(inputs).find(|(was, is)| was != is) {
        Some((was, is)) if was.file == is.file => {
            Err(format!("{} changed since; run without --resume", is.file.display()))
        }
        Some((was, is)) => {
            Err(format!("read {}, expected {}; run without --resume", was.file.display(), is.file.display()))
        }
        None if note.demand != demand => {
            let (was, is) = (one_line(&note.demand, 300), one_line(demand, 300));
            Err(format!("is of a run that made {was}, expected {is}; run without --resume"))
        }
        None => Ok(note.tensors),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_note_that_cannot_be_written_is_done_without() {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("m.gguf");
        fs::create_dir(dir.path().join("m.gguf.partial.json")).unwrap();
        let mut journal = Journal::open(&out, &[], "", false).unwrap();
        journal.begin();
        journal.note(File::create(disk::partial(&out)).unwrap(), Vec::new(), 1);
        journal.stop().unwrap();
    }
}
