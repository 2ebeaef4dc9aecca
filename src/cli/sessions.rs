//! `oxcart sessions`: the conversations that were kept.

use crate::chat::history::{Conversation, Summary, delete, export_json, export_markdown, find, list, stem};
use crate::config::Config;
use crate::disk::write_private;
use crate::tui::clean;
use anyhow::Context;
use jiff::{Timestamp, tz::TimeZone};
use serde_json::json;
use std::io::{IsTerminal, Write};
use std::path::{Path, PathBuf};

/// What to do.
#[derive(clap::Args)]
pub struct Args {
    #[command(subcommand)]
    action: Action,
    /// Folder of the conversations [default: as configured]
    #[arg(long, value_name = "DIR", global = true)]
    dir: Option<PathBuf>,
}

#[derive(clap::Subcommand)]
enum Action {
    /// List conversations, the latest first
    List {
        /// Print one JSON object
        #[arg(long)]
        json: bool,
    },
    /// Print a conversation
    Show {
        #[command(flatten)]
        which: Which,
    },
    /// Write one as Markdown (its current branch) or as JSON (all branches)
    Export {
        #[command(flatten)]
        which: Which,
        /// JSON
        #[arg(long)]
        json: bool,
        /// Output file, which must not exist [default: stdout]
        #[arg(short, long, value_name = "FILE")]
        output: Option<PathBuf>,
    },
    /// Set a title
    Rename {
        #[command(flatten)]
        which: Which,
        /// The title; an empty one removes it
        title: String,
    },
    /// Delete conversations and the files beside them
    Delete {
        /// Names, titles or files
        #[arg(required = true, value_name = "NAME")]
        names: Vec<String>,
    },
    /// Print the folder, or the file of one
    Path {
        /// Name, title or file
        name: Option<String>,
    },
}

#[derive(clap::Args)]
struct Which {
    /// Name, title or file; a prefix is enough
    name: String,
}

pub fn run(a: Args) -> anyhow::Result<()> {
    let dir = match a.dir {
        Some(dir) => dir,
        None => Config::load()?.conversations_dir()?,
    };
    let mut out = std::io::stdout().lock();
    match a.action {
        Action::List { json } => print_list(&dir, json, &mut out)?,
        Action::Show { which } => {
            let text = export_markdown(&read(&dir, &which.name)?);
            // What a model or a paste said must not command the terminal.
            let text = if out.is_terminal() { clean(&text) } else { text.into() };
            write!(out, "{text}")?;
        }
        Action::Export { which, json, output } => {
            let c = read(&dir, &which.name)?;
            let text = if json { format!("{}\n", export_json(&c)) } else { export_markdown(&c) };
            match output {
                None => write!(out, "{text}")?,
                Some(file) => write_private(&file, text.as_bytes()).with_context(|| file.display().to_string())?,
            }
        }
        Action::Rename { which, title } => Conversation::open(&find(&dir, &which.name)?)?.rename(&title)?,
        Action::Delete { names } => {
            // All are found before the first one goes, once each.
            let mut paths = Vec::new();
            for name in &names {
                let path = find(&dir, name)?;
                if !paths.contains(&path) {
                    paths.push(path);
                }
            }
            for path in paths {
                delete(&path)?;
                tell!("deleted {}", path.display());
            }
        }
        Action::Path { name } => {
            let path = name.map_or(Ok(dir.clone()), |n| find(&dir, &n))?;
            writeln!(out, "{}", path.display())?;
        }
    }
    out.flush()?;
    Ok(())
}

fn read(dir: &Path, name: &str) -> anyhow::Result<Conversation> {
    let c = Conversation::read(&find(dir, name)?)?;
    c.notes().iter().for_each(|n| tell!("{}: {n}", c.path().display()));
    Ok(c)
}

fn print_list(dir: &Path, json: bool, out: &mut impl Write) -> anyhow::Result<()> {
    let all = list(dir);
    if json {
        let entries: Vec<_> = all
            .iter()
            .map(|s| {
                let (name, at) = (stem(&s.path), changed(s).strftime("%Y-%m-%dT%H:%M:%SZ").to_string());
                json!({"name": name, "title": s.title, "model": s.model, "modified": at, "turns": s.turns, "path": s.path})
            })
            .collect();
        writeln!(out, "{}", json!({"dir": dir, "conversations": entries}))?;
        return Ok(());
    }
    if all.is_empty() {
        tell!("no conversations in {}", dir.display());
        return Ok(());
    }
    writeln!(out, "{:<20} {:<19} {:>5}  TITLE", "NAME", "CHANGED", "TURNS")?;
    let here = TimeZone::system();
    for s in &all {
        let at = changed(s).to_zoned_datetime(here.clone()).strftime("%Y-%m-%d %H:%M:%S").to_string();
        writeln!(out, "{:<20} {at:<19} {:>5}  {}", stem(&s.path), s.turns, s.title)?;
    }
    Ok(())
}

/// When a conversation was last written to; 1970, where the clock was out of all bounds.
fn changed(s: &Summary) -> Timestamp {
    Timestamp::try_from(s.modified).unwrap_or_default()
}
