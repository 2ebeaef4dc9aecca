//! The models that `models.toml` names: what they are, where their files lie on this machine, and how to fetch them.
//!
//! ```text
//! words -> Wanted (a path, or an entry and one of its files) -> here already? -> else hub or python -> paths
//! ```
//!
//! Files from Hugging Face live in its own cache, so that what other programs fetched is found and what is fetched here
//! is found by them; files out of Python packages live in oxcart's ([`cache_dir`]). Every access to the network is
//! announced on stderr before it happens. Nothing is taken for whole that was not checked: files are written under
//! another name, verified, synced and renamed into place, under a lock that other processes wait for.

mod disk;
mod download;
mod hub;
mod python;

pub use disk::cache_dir;
pub use python::PythonSource;

use crate::disk::home_path;
use crate::sample::Overrides;
use hub::Hub;
use serde::{Deserialize, Serialize};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::LazyLock;

/// The catalogue.
#[derive(Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Catalog {
    /// The model that is meant where none is named.
    pub default: String,
    /// The entries.
    #[serde(rename = "model")]
    pub models: Vec<Model>,
}

/// An entry: a model.
#[derive(Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Model {
    /// Its makers' name.
    pub name: String,
    /// Other names that mean it.
    #[serde(default)]
    pub aliases: Vec<String>,
    /// GGUF's `general.architecture`.
    pub arch: String,
    /// The family of its chat template: `chatml`, `llama3` or `mistral`.
    pub template: String,
    /// Its shape.
    pub geometry: Geometry,
    /// How its makers say to sample.
    #[serde(default)]
    pub sampling: Overrides,
    /// The Hugging Face repository of its files, `OWNER/NAME`.
    pub hub: Option<String>,
    /// One a quantization; the first is the default.
    #[serde(rename = "file")]
    pub files: Vec<ModelFile>,
}

/// The shape of a model.
#[derive(Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Geometry {
    /// Blocks.
    pub layers: u32,
    /// Width of the residual stream.
    pub dim: u32,
    /// Attention heads.
    pub heads: u32,
    /// Heads of keys and values.
    pub kv_heads: u32,
    /// Width of the feed-forward (of one expert).
    pub ffn: u32,
    /// Experts of a layer.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub experts: Option<u32>,
    /// Experts that a token goes through.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub experts_used: Option<u32>,
    /// Tokens that it knows.
    pub vocab: u32,
    /// Tokens of context that it was trained for.
    pub context: u32,
    /// Base of the rotary embedding.
    pub rope_theta: f64,
    /// Epsilon of the RMS norms.
    pub rms_eps: f64,
    /// Whether the output matrix is the embedding.
    pub tied: bool,
}

/// A file of a model: one quantization.
#[derive(Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct ModelFile {
    /// llama.cpp's name of the quantization.
    pub quant: String,
    /// File name; a file in parts has it as the beginning of theirs.
    pub name: String,
    /// Size, where it is known.
    pub bytes: Option<u64>,
    /// Lower-case hex digits, where it is known.
    pub sha256: Option<String>,
    /// The Python package that holds it, where it does not come from the hub.
    pub python: Option<PythonSource>,
}

/// What a name stands for.
#[derive(Clone, Debug)]
pub struct Resolved {
    /// The file, or the first of its parts: what [`crate::gguf::Gguf::open`] takes.
    pub path: PathBuf,
    /// All parts in order.
    pub parts: Vec<PathBuf>,
    /// The entry's name; none for a path.
    pub name: Option<&'static str>,
    /// How its makers say to sample.
    pub sampling: Overrides,
}

/// Why a model cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum CatalogError {
    /// Not a file and not an entry.
    #[error("{name}: no such file, and no such model in the catalogue{}", hint(near))]
    UnknownModel {
        /// What was asked for.
        name: String,
        /// Names like it.
        near: Vec<String>,
    },
    /// The entry has no such file.
    #[error("{model}: no quantization {quant}; the catalogue has {}", known.join(", "))]
    UnknownQuant {
        /// The entry.
        model: String,
        /// What was asked for.
        quant: String,
        /// What there is.
        known: Vec<String>,
    },
    /// A file or folder on this machine.
    #[error("{}: {error}", path.display())]
    Io {
        /// Which.
        path: PathBuf,
        /// What the system said.
        error: io::Error,
    },
    /// The other side.
    #[error("{url}: {problem}")]
    Http {
        /// What was asked for.
        url: String,
        /// What came of it.
        problem: String,
    },
    /// A file is not what it should be.
    #[error("{file}: {what} {found}, expected {expected}")]
    Mismatch {
        /// The file.
        file: String,
        /// `size` or `sha256`.
        what: &'static str,
        /// What it has.
        found: String,
        /// What it should have.
        expected: String,
    },
    /// The disk is too small.
    #[error("{}: {free} bytes free, {needed} needed", dir.display())]
    Space {
        /// Where.
        dir: PathBuf,
        /// Free.
        free: u64,
        /// Needed.
        needed: u64,
    },
    /// pip or Python.
    #[error("python package {package}: {problem}")]
    Python {
        /// `NAME==VERSION`.
        package: String,
        /// What came of it.
        problem: String,
    },
}

fn hint(near: &[String]) -> String {
    if near.is_empty() { " (oxcart list shows it)".into() } else { format!("; did you mean {}?", near.join(" or ")) }
}

type Result<T> = std::result::Result<T, CatalogError>;

fn io_error(path: &Path) -> impl FnOnce(io::Error) -> CatalogError {
    let path = path.to_path_buf();
    |error| CatalogError::Io { path, error }
}

/// The catalogue that was built in.
pub fn catalog() -> &'static Catalog {
    static CATALOG: LazyLock<Catalog> =
        LazyLock::new(|| toml::from_str(include_str!("../models.toml")).expect("models.toml is checked by a test"));
    &CATALOG
}

/// The entry and the file that `NAME` or `NAME:QUANT` means, upper or lower case; none means the default model.
pub fn find(name: Option<&str>) -> Result<(&'static Model, &'static ModelFile)> {
    let c = catalog();
    let whole = name.unwrap_or(&c.default);
    let (name, quant) = match whole.rsplit_once(':') {
        Some((n, q)) => (n, Some(q)),
        None => (whole, None),
    };
    let named = |m: &&Model| std::iter::once(&m.name).chain(&m.aliases).any(|n| n.eq_ignore_ascii_case(name));
    let model = c
        .models
        .iter()
        .find(named)
        .ok_or_else(|| CatalogError::UnknownModel { name: whole.to_string(), near: near(name) })?;
    let file = match quant {
        None => model.files.first(),
        Some(q) => model.files.iter().find(|f| f.quant.eq_ignore_ascii_case(q)),
    };
    let file = file.ok_or_else(|| CatalogError::UnknownQuant {
        model: model.name.clone(),
        quant: quant.unwrap_or_default().into(),
        known: model.files.iter().map(|f| f.quant.clone()).collect(),
    })?;
    Ok((model, file))
}

/// Up to three entries whose name is like this one: it holds it, or few letters differ.
fn near(name: &str) -> Vec<String> {
    let name = name.to_ascii_lowercase();
    let distance = |m: &Model| {
        let all = std::iter::once(&m.name).chain(&m.aliases).map(|n| n.to_ascii_lowercase());
        let each = all.map(|n| if !name.is_empty() && n.contains(&name) { 1 } else { edits(&n, &name) });
        each.min().unwrap_or(usize::MAX)
    };
    let mut found: Vec<_> = catalog().models.iter().map(|m| (distance(m), &m.name)).collect();
    found.sort();
    found.into_iter().filter(|f| f.0 <= 2 + name.len() / 4).take(3).map(|f| f.1.clone()).collect()
}

/// Letters to insert, delete or replace to make one text of the other (Levenshtein 1966).
fn edits(a: &str, b: &str) -> usize {
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.bytes().enumerate() {
        let mut diagonal = std::mem::replace(&mut row[0], i + 1);
        for (j, y) in b.bytes().enumerate() {
            let replaced = diagonal + usize::from(x != y);
            diagonal = row[j + 1];
            row[j + 1] = replaced.min(diagonal + 1).min(row[j] + 1);
        }
    }
    row[b.len()]
}

/// The path that a word means, where it is one: of a file that is there (`~` is the home folder). A folder that is called as
/// an entry is none: a checkpoint often lies beside what is made of it.
pub fn path(word: &str) -> Option<PathBuf> {
    let path = home_path(word);
    (path.is_file() || path.exists() && find(Some(word)).is_err()).then_some(path)
}

/// A model as a conversation remembers it: what finds it again from any folder. None is the default one.
pub fn lasting(word: Option<&str>) -> String {
    let word = word.unwrap_or(&catalog().default);
    let file = path(word).and_then(|p| p.canonicalize().ok());
    file.map_or_else(|| word.to_string(), |p| p.display().to_string())
}

/// The file on this machine that a path or a name means. A [`path`] wins; a model of the catalogue that is not here is
/// fetched, which is announced on stderr; none means the default model.
pub fn resolve(name_or_path: Option<&str>) -> Result<Resolved> {
    if let Some(path) = name_or_path.and_then(path) {
        return Ok(Resolved { parts: vec![path.clone()], path, name: None, sampling: Overrides::default() });
    }
    let (model, file) = find(name_or_path)?;
    let parts = match model.local(file)? {
        Some(here) => here.parts,
        None => model.fetch(file)?,
    };
    Ok(model.resolved(parts))
}

/// Fetches what a name means, unless it is here and whole.
pub fn pull(name: Option<&str>) -> Result<Resolved> {
    let (model, file) = find(name)?;
    let parts = match model.local(file)? {
        Some(here) if here.complete => here.parts,
        _ => model.fetch(file)?,
    };
    Ok(model.resolved(parts))
}

/// The default model's file, fetched once. Any number of processes may ask at the same time.
pub fn default_model() -> Result<PathBuf> {
    resolve(None).map(|r| r.path)
}

/// Files that were found on this machine.
pub struct Local {
    /// In order.
    pub parts: Vec<PathBuf>,
    /// Whether these are known to be all: of `NAME.a`, `NAME.b` nothing tells which is the last.
    pub complete: bool,
}

impl Local {
    /// Bytes of all parts.
    pub fn bytes(&self) -> u64 {
        self.parts.iter().filter_map(|p| p.metadata().ok()).map(|m| m.len()).sum()
    }
}

impl Model {
    /// Where a file of this model lies on this machine.
    pub fn local(&self, file: &ModelFile) -> Result<Option<Local>> {
        if file.python.is_some() {
            let path = python::place(file)?;
            let whole = path.metadata().is_ok_and(|m| file.bytes.is_none_or(|b| b == m.len()));
            return Ok(whole.then(|| Local { parts: vec![path], complete: true }));
        }
        match &self.hub {
            Some(repo) => Ok(Hub::from_env()?.cached(repo, file)),
            None => Ok(None),
        }
    }

    fn fetch(&self, file: &ModelFile) -> Result<Vec<PathBuf>> {
        if let Some(p) = &file.python {
            return Ok(vec![python::fetch(p, file)?]);
        }
        match &self.hub {
            Some(repo) => Hub::from_env()?.fetch(repo, file),
            None => Err(CatalogError::UnknownModel { name: self.name.clone(), near: Vec::new() }),
        }
    }

    fn resolved(&'static self, parts: Vec<PathBuf>) -> Resolved {
        Resolved { path: parts[0].clone(), parts, name: Some(&self.name), sampling: self.sampling.clone() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn the_catalogue_is_sound() {
        let c = catalog();
        let mut wrong = Vec::new();
        let mut names = HashSet::new();
        for m in &c.models {
            let mut check = |ok: bool, what: &str| {
                if !ok {
                    wrong.push(format!("{}: {what}", m.name));
                }
            };
            for n in std::iter::once(&m.name).chain(&m.aliases) {
                check(names.insert(n.to_ascii_lowercase()), "a name is taken");
                check(!n.contains([':', '/', ' ']), "a name cannot be typed");
            }
            let g = &m.geometry;
            check(g.dim % g.heads == 0 && g.heads % g.kv_heads == 0, "heads do not divide");
            check(g.experts.is_some() == g.experts_used.is_some(), "experts without their number in use");
            check(["chatml", "llama3", "mistral"].contains(&m.template.as_str()), "an unknown template");
            check(!m.files.is_empty(), "no files");
            check(m.sampling.check().is_ok(), "sampling");
            let quants: HashSet<_> = m.files.iter().map(|f| f.quant.to_ascii_lowercase()).collect();
            check(quants.len() == m.files.len(), "a quantization twice");
            for f in &m.files {
                check(m.hub.is_some() || f.python.is_some(), "a file from nowhere");
                check(f.name.ends_with(".gguf") && !f.name.contains('/'), "a file name");
                check(f.sha256.as_ref().is_none_or(|s| disk::is_sha256(s)), "a checksum");
                if let Some(p) = &f.python {
                    let known = f.sha256.is_some() && f.bytes.is_some() && disk::is_sha256(&p.wheel_sha256);
                    check(known, "a package without checksums");
                }
            }
        }
        assert!(wrong.is_empty(), "{}", wrong.join("\n"));
        assert!(find(None).is_ok(), "the default is an entry");
    }

    #[test]
    fn names_mean_entries() {
        let found = |n: &str| find(Some(n)).map(|(m, f)| format!("{}:{}", m.name, f.quant));
        for (name, want) in [
            ("qwen1.5-110b-chat", "Qwen1.5-110B-Chat:Q4_K_M"),
            ("Qwen1.5-110B:q2_k", "Qwen1.5-110B-Chat:Q2_K"),
            ("qwen1.5-110b:Q8_0", "Qwen1.5-110B-Chat:Q8_0"),
            ("smollm2", "SmolLM2-135M-Instruct:Q4_1"),
        ] {
            assert_eq!(found(name).unwrap(), want);
        }
        for (name, want) in [
            ("qwen1.5-110b-caht", "did you mean Qwen1.5-110B-Chat"),
            ("mixtral", "did you mean Mixtral-8x22B-Instruct"),
            ("zzz", "oxcart list"),
            ("", "oxcart list"),
            ("smollm2:Q9", "the catalogue has Q4_1"),
        ] {
            let e = found(name).unwrap_err().to_string();
            assert!(e.contains(want), "{name}: {e}");
        }
    }

    #[test]
    fn edits_are_counted() {
        for (a, b, n) in [("", "", 0), ("abc", "", 3), ("", "ab", 2), ("kitten", "sitting", 3), ("same", "same", 0)] {
            assert_eq!(edits(a, b), n, "{a} {b}");
        }
    }
}
