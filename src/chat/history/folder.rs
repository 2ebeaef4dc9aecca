//! The folder of conversations.

use super::{Conversation, EXTENSION, HistoryError, Result, Tail, check_regular, io_error, text};
use crate::kv_store;
use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

/// A line of a list of conversations.
#[derive(Clone, Debug)]
pub struct Summary {
    /// The file.
    pub path: PathBuf,
    /// As [`Conversation::title`].
    pub title: String,
    /// The model that it was begun with.
    pub model: String,
    /// When it was last written to.
    pub modified: SystemTime,
    /// Turns, of all branches.
    pub turns: usize,
}

/// The conversations in a folder, the latest first. Files that are none are passed over.
pub fn list(dir: &Path) -> Vec<Summary> {
    list_with(dir, |_| ()).into_iter().map(|(summary, ())| summary).collect()
}

/// The same, each with what is taken out of it as it is read anyway; nothing of one that cannot be read.
pub fn list_with<T: Default>(dir: &Path, of: impl Fn(&Conversation) -> T) -> Vec<(Summary, T)> {
    let files = fs::read_dir(dir).into_iter().flatten().filter_map(|f| Some(f.ok()?.path()));
    let mut found: Vec<(Summary, T)> = files
        .filter(|path| path.extension().is_some_and(|e| e == EXTENSION))
        .filter_map(|path| {
            let modified = fs::metadata(&path).and_then(|m| m.modified()).ok()?;
            match Conversation::read(&path) {
                Ok(c) => {
                    let of = of(&c);
                    Some((Summary { title: c.title(), turns: c.turns.len(), model: c.model, modified, path }, of))
                }
                // What an editor broke is still there, and whoever opens it is told where.
                Err(e) if begins_as_one(&path) => {
                    let title = format!("cannot be read: {e}");
                    Some((Summary { title, turns: 0, model: String::new(), modified, path }, T::default()))
                }
                Err(_) => None,
            }
        })
        .collect();
    found.sort_by(|(a, _), (b, _)| b.modified.cmp(&a.modified).then_with(|| b.path.cmp(&a.path)));
    found
}

/// Deletes a conversation and the KV cache beside it. Refused for a file that is none, and while another program has it
/// open.
pub fn delete(path: &Path) -> Result<()> {
    check_regular(path)?;
    // Held until it is gone.
    let _tail = Tail::of(File::open(path).map_err(io_error(path))?, path)?;
    if !begins_as_one(path) {
        return Err(HistoryError::Refused { path: path.to_path_buf(), problem: "not a conversation".into() });
    }
    let cache = kv_store::beside(path);
    match fs::remove_file(&cache) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(io_error(&cache)(e)),
        _ => fs::remove_file(path).map_err(io_error(path)),
    }
}

/// The conversation that a person means by `name`: a file that is there, the name of one in the folder, a title, or the
/// beginning of one of those two.
pub fn find(dir: &Path, name: &str) -> Result<PathBuf> {
    let given = Path::new(name);
    if given.is_file() && (given.components().count() > 1 || given.extension().is_some_and(|e| e == EXTENSION)) {
        return Ok(given.to_path_buf());
    }
    let wanted = name.strip_suffix(&format!(".{EXTENSION}")).unwrap_or(name).to_lowercase();
    let all = list(dir);
    let names = |s: &Summary| [stem(&s.path).to_lowercase(), s.title.to_lowercase()];
    let error = |problem: String| HistoryError::Name { dir: dir.to_path_buf(), problem };
    let same: Vec<&Summary> = all.iter().filter(|s| names(s).contains(&wanted)).collect();
    let begin = || all.iter().filter(|s| names(s).iter().any(|n| n.starts_with(&wanted))).collect();
    let found: Vec<&Summary> = if same.is_empty() { begin() } else { same };
    match found.as_slice() {
        _ if wanted.is_empty() => Err(error("an empty name".into())),
        [one] => Ok(one.path.clone()),
        [] => Err(error(format!("no conversation {name:?}"))),
        several => {
            let stems: Vec<_> = several.iter().take(5).map(|s| stem(&s.path)).collect();
            let more = if several.len() > 5 { ", ..." } else { "" };
            Err(error(format!("{name:?} matches {} conversations: {}{more}", several.len(), stems.join(", "))))
        }
    }
}

/// A file's name without its ending: what a conversation is called where its title is not.
pub fn stem(path: &Path) -> String {
    path.file_stem().unwrap_or_default().to_string_lossy().into_owned()
}

/// Whether a file begins as conversations do.
fn begins_as_one(path: &Path) -> bool {
    let mut sign = Vec::new();
    let read = check_regular(path).is_ok()
        && File::open(path).is_ok_and(|f| f.take(text::SIGN.len() as u64).read_to_end(&mut sign).is_ok());
    read && text::is_conversation(&sign)
}
