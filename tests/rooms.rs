//! Imports point one way, from text and verbs to bytes: `src/lib.rs` draws it, this holds it.

use regex::Regex;
use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

/// Every room of `src/`, after the rooms that it may import from. `main.rs` and `lib.rs` are no rooms.
const ROOMS: &[(&str, &[&str])] = &[
    ("disk", &[]),
    ("mmap", &[]),
    ("machine", &[]),
    ("quota", &[]),
    ("signals", &[]),
    ("gguf", &["disk", "mmap"]),
    ("sample", &["gguf"]),
    ("placement", &["machine"]),
    ("config", &["disk", "gguf", "sample"]),
    ("catalog", &["disk", "sample"]),
    ("safetensors", &["disk", "gguf", "mmap"]),
    ("model", &["gguf", "mmap"]),
    ("tokenizer", &["gguf"]),
    ("load", &["mmap", "model"]),
    // A loaded model brings its tokenizer, which begins chunks of a text, and what its author samples with.
    ("engine", &["gguf", "load", "machine", "mmap", "model", "placement", "sample", "tokenizer"]),
    ("kv_store", &["disk", "engine"]),
    ("imatrix", &["disk", "engine", "gguf", "mmap", "model"]),
    ("quantize", &["disk", "gguf", "imatrix", "mmap"]),
    ("convert", &["gguf", "mmap", "quantize", "safetensors", "tokenizer"]),
    ("chat", &["gguf", "kv_store", "quota", "tokenizer"]),
    ("draft", &["engine", "load", "model", "sample"]),
    ("generate", &["draft", "engine", "model", "sample", "tokenizer"]),
    ("perplexity", &["disk", "engine", "gguf", "model", "tokenizer"]),
    ("plan", &["catalog", "engine", "gguf", "machine", "model"]),
    ("bench", &["engine", "model", "plan"]),
    (
        "tui",
        &[
            "catalog", "chat", "config", "disk", "draft", "engine", "generate", "kv_store", "machine", "sample",
            "signals",
        ],
    ),
    (
        "cli",
        &[
            "bench",
            "catalog",
            "chat",
            "config",
            "convert",
            "disk",
            "draft",
            "engine",
            "generate",
            "gguf",
            "imatrix",
            "kv_store",
            "load",
            "machine",
            "mmap",
            "perplexity",
            "placement",
            "plan",
            "quantize",
            "sample",
            "signals",
            "tui",
        ],
    ),
];

fn sources(folder: &Path, to: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        match path.is_dir() {
            true => sources(&path, to),
            false if path.extension().is_some_and(|e| e == "rs") => to.push(path),
            false => {}
        }
    }
}

#[test]
fn imports_point_one_way() {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let (mut files, comment, import) = (vec![], Regex::new("//.*").unwrap(), Regex::new(r"\bcrate::(\w+)").unwrap());
    sources(&src, &mut files);
    let (mut wrong, mut used) = (vec![], BTreeSet::new());
    for file in &files {
        let place = file.strip_prefix(&src).unwrap();
        let room = place.components().next().unwrap().as_os_str().to_str().unwrap().trim_end_matches(".rs");
        if ["main", "lib"].contains(&room) {
            continue;
        }
        let text = fs::read_to_string(file).unwrap();
        let text = comment.replace_all(&text, "");
        // A list of rooms in braces would pass unseen.
        assert!(!text.contains("use crate::{"), "{}: one line for each room", place.display());
        let Some(at) = ROOMS.iter().position(|r| r.0 == room) else {
            wrong.push(format!("{}: a room that the list lacks", place.display()));
            continue;
        };
        for from in import.captures_iter(&text).map(|c| c[1].to_string()).filter(|f| f != room) {
            if !ROOMS[at].1.contains(&from.as_str()) {
                wrong.push(format!("{}: imports from {from}", place.display()));
            }
            used.insert((room.to_string(), from));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    for (i, (room, from)) in ROOMS.iter().enumerate() {
        for f in *from {
            assert!(ROOMS[..i].iter().any(|r| r.0 == *f), "{room}: {f} must stand before it");
            assert!(used.contains(&(room.to_string(), f.to_string())), "{room}: no longer imports from {f}");
        }
    }
}
