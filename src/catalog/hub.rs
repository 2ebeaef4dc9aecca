//! Hugging Face: its cache folder and its protocol.
//!
//! ```text
//! models--OWNER--NAME/refs/main                  the commit that main was
//!                     snapshots/COMMIT/FILE      a link to its content
//!                     blobs/ETAG                 the content; ETAG is the sha256 of a large file
//!                     blobs/ETAG.incomplete      what is here of it, until it is whole
//! .locks/models--OWNER--NAME/ETAG.lock           held by whoever fetches it
//! ```
//!
//! Names and headers come from another machine: whatever becomes part of a path is checked first.

use super::disk::{self, env};
use super::download::{Client, Job, check_rest, explain, header};
use super::{CatalogError, Local, ModelFile, Result, io_error};
use crate::disk::{MOST_SETTINGS, read_text};
use serde::Deserialize;
use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};

/// The branch that is meant.
const REVISION: &str = "main";

/// The hub as the environment describes it: `HF_ENDPOINT`, `HF_TOKEN`, `HF_TOKEN_PATH`, `HF_HUB_CACHE`, `HF_HOME` and
/// `HF_HUB_OFFLINE`, as huggingface_hub reads them.
pub(super) struct Hub {
    endpoint: String,
    token: Option<String>,
    cache: PathBuf,
    offline: bool,
}

/// What the hub says of a file.
struct Meta {
    path: String,
    commit: String,
    etag: String,
    bytes: u64,
}

#[derive(Deserialize)]
struct TreeEntry {
    path: String,
}

impl Hub {
    pub fn from_env() -> Result<Hub> {
        let home = match env("HF_HOME") {
            Some(h) => h.into(),
            None => disk::xdg_cache()?.join("huggingface"),
        };
        let token = env("HF_TOKEN").or_else(|| {
            let path = env("HF_TOKEN_PATH").map_or_else(|| home.join("token"), PathBuf::from);
            read_text(&path, MOST_SETTINGS).ok()
        });
        Ok(Hub {
            endpoint: env("HF_ENDPOINT")
                .unwrap_or_else(|| "https://huggingface.co".into())
                .trim_end_matches('/')
                .into(),
            token: token.map(|t| t.trim().to_string()).filter(|t| !t.is_empty()),
            cache: env("HF_HUB_CACHE")
                .or_else(|| env("HUGGINGFACE_HUB_CACHE"))
                .map_or_else(|| home.join("hub"), PathBuf::from),
            offline: env("HF_HUB_OFFLINE")
                .is_some_and(|v| ["1", "on", "yes", "true"].contains(&v.to_ascii_lowercase().as_str())),
        })
    }

    fn folder(&self, repo: &str) -> PathBuf {
        self.cache.join(format!("models--{}", repo.replace('/', "--")))
    }

    /// The file, or all of its parts, in one snapshot: that of the branch first, then any.
    pub fn cached(&self, repo: &str, file: &ModelFile) -> Option<Local> {
        let folder = self.folder(repo);
        let snapshots = folder.join("snapshots");
        let main = read_text(&folder.join("refs").join(REVISION), MOST_SETTINGS).ok();
        let others = fs::read_dir(&snapshots).ok()?.flatten().map(|e| e.path());
        let dirs = main.map(|c| snapshots.join(c.trim())).into_iter().chain(others);
        dirs.filter_map(|dir| {
            let names = files_below(&dir);
            let parts = parts_of(&file.name, &names)?;
            let local = Local {
                complete: parts.complete || file.bytes.is_some(),
                parts: parts.names.iter().map(|n| dir.join(n)).collect(),
            };
            file.bytes.is_none_or(|b| b == local.bytes()).then_some(local)
        })
        .next()
    }

    /// Fetches a file and all of its parts.
    pub fn fetch(&self, repo: &str, file: &ModelFile) -> Result<Vec<PathBuf>> {
        if self.offline {
            let url = format!("{}/{repo}", self.endpoint);
            return Err(CatalogError::Http {
                url,
                problem: format!("{} is not here, and HF_HUB_OFFLINE is set", file.name),
            });
        }
        tell!("asking {} for {} of {repo}", self.endpoint, file.name);
        let client = Client::new(&self.endpoint, self.token.clone())?;
        let metas = match self.meta(&client, repo, &file.name)? {
            Some(m) => vec![m],
            None => self.parts(&client, repo, file)?,
        };
        let folder = self.folder(repo);
        let blobs = folder.join("blobs");
        disk::create_dir(&blobs)?;
        // The whole of it is known to fit before the first byte comes.
        let bytes: u64 = metas.iter().map(|m| m.bytes).sum();
        let missing = |m: &&Meta| !blobs.join(&m.etag).exists();
        let rest = |m: &Meta| m.bytes.saturating_sub(partial(&blobs, m).metadata().map_or(0, |d| d.len()));
        disk::check_space(&blobs, metas.iter().filter(missing).map(rest).sum())?;
        if let Some(expected) = file.bytes.filter(|&b| b != bytes) {
            return Err(mismatch(&file.name, "size", bytes, expected));
        }
        if let (1, Some(expected)) = (metas.len(), &file.sha256)
            && disk::is_sha256(&metas[0].etag)
            && *expected != metas[0].etag
        {
            return Err(mismatch(&file.name, "sha256", &metas[0].etag, expected));
        }
        let mut paths = Vec::new();
        for m in &metas {
            paths.push(self.fetch_one(&client, repo, m, file.sha256.as_deref().filter(|_| metas.len() == 1))?);
        }
        write_ref(&folder, &metas[0].commit)?;
        Ok(paths)
    }

    /// What the hub says of a file; nothing if it has none of that name.
    fn meta(&self, client: &Client, repo: &str, path: &str) -> Result<Option<Meta>> {
        let url = self.url(repo, REVISION, path);
        // The answer that names the commit is the hub's own; a redirect after it leads to where the content is stored.
        let r = client.head(&url, |r| r.headers().contains_key("x-repo-commit"))?;
        let status = r.status().as_u16();
        let bad = |problem: String| CatalogError::Http { url: url.clone(), problem };
        if status == 404 {
            return Ok(None);
        }
        if status >= 400 {
            return Err(bad(explain(status)));
        }
        let get = |names: &[&str]| names.iter().find_map(|n| header(r.headers(), n)).map(str::to_string);
        let commit = get(&["x-repo-commit"]).ok_or_else(|| bad("the answer names no commit".into()))?;
        let etag = get(&["x-linked-etag", "etag"]).ok_or_else(|| bad("the answer has no etag".into()))?;
        let bytes = get(&["x-linked-size", "content-length"]).and_then(|n| n.parse().ok());
        let etag = etag.trim_start_matches("W/").trim_matches('"').to_string();
        for part in [&commit, &etag] {
            let plain = (1..=128).contains(&part.len()) && part.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-');
            if !plain {
                return Err(bad(format!("{part:?} is no commit and no etag")));
            }
        }
        let bytes = bytes.ok_or_else(|| bad("the answer has no size".into()))?;
        Ok(Some(Meta { path: path.to_string(), commit, etag, bytes }))
    }

    /// What the hub says of the parts of a file.
    fn parts(&self, client: &Client, repo: &str, file: &ModelFile) -> Result<Vec<Meta>> {
        let url = format!("{}/api/models/{repo}/tree/{REVISION}?recursive=true", self.endpoint);
        tell!("asking {} for the list of files of {repo}", self.endpoint);
        let bad = |problem: String| CatalogError::Http { url: url.clone(), problem };
        let r = client.text(&url)?;
        if r.status() != 200 {
            return Err(bad(explain(r.status().as_u16())));
        }
        let tree: Vec<TreeEntry> =
            serde_json::from_str(r.body()).map_err(|e| bad(format!("not a list of files: {e}")))?;
        let names: Vec<String> = tree.into_iter().map(|e| e.path).filter(|p| is_plain(p)).collect();
        let parts =
            parts_of(&file.name, &names).ok_or_else(|| bad(format!("no {} there, whole or in parts", file.name)))?;
        let mut metas = Vec::new();
        for name in &parts.names {
            let m = self.meta(client, repo, name)?;
            metas.push(m.ok_or_else(|| bad(format!("{name} is listed but missing")))?);
        }
        Ok(metas)
    }

    fn url(&self, repo: &str, revision: &str, path: &str) -> String {
        format!("{}/{repo}/resolve/{revision}/{}", self.endpoint, escape(path))
    }

    fn fetch_one(&self, client: &Client, repo: &str, m: &Meta, sha256: Option<&str>) -> Result<PathBuf> {
        let folder = self.folder(repo);
        let blobs = folder.join("blobs");
        let blob = blobs.join(&m.etag);
        let lock =
            self.cache.join(".locks").join(folder.file_name().unwrap_or_default()).join(format!("{}.lock", m.etag));
        let lock = disk::lock(&lock, &m.path)?;
        if !blob.exists() {
            let partial = partial(&blobs, m);
            check_rest(&blobs, &partial, m.bytes)?;
            tell!("fetching {} ({:.1} MB) from {}", m.path, m.bytes as f64 / 1e6, self.endpoint);
            client.fetch(&Job {
                url: self.url(repo, &m.commit, &m.path),
                name: &m.path,
                partial: &partial,
                bytes: m.bytes,
                sha256: sha256.or(Some(m.etag.as_str()).filter(|e| disk::is_sha256(e))),
            })?;
            let file = File::open(&partial).map_err(io_error(&partial))?;
            disk::publish(&file, &partial, &blob)?;
        }
        let link = folder.join("snapshots").join(&m.commit).join(&m.path);
        if let Some(dir) = link.parent() {
            disk::create_dir(dir)?;
        }
        if !link.exists() {
            // From snapshots/COMMIT/ and the folders of the file's own name, up to the repository.
            let up = "../".repeat(2 + m.path.matches('/').count());
            let temporary = link.with_file_name(format!(".{}.{}", m.etag, std::process::id()));
            std::os::unix::fs::symlink(format!("{up}blobs/{}", m.etag), &temporary)
                .and_then(|()| fs::rename(&temporary, &link))
                .map_err(io_error(&link))?;
        }
        drop(lock);
        Ok(link)
    }
}

fn mismatch(file: &str, what: &'static str, found: impl ToString, expected: impl ToString) -> CatalogError {
    CatalogError::Mismatch { file: file.into(), what, found: found.to_string(), expected: expected.to_string() }
}

fn partial(blobs: &Path, m: &Meta) -> PathBuf {
    blobs.join(format!("{}.incomplete", m.etag))
}

fn write_ref(folder: &Path, commit: &str) -> Result<()> {
    let refs = folder.join("refs");
    disk::create_dir(&refs)?;
    let temporary = refs.join(format!(".{REVISION}.{}", std::process::id()));
    let mut f = File::create(&temporary).map_err(io_error(&temporary))?;
    f.write_all(commit.as_bytes()).map_err(io_error(&temporary))?;
    disk::publish(&f, &temporary, &refs.join(REVISION))
}

/// The files of a folder and of the folders in it, as relative paths. Links that lead nowhere are no files.
fn files_below(dir: &Path) -> Vec<String> {
    let mut names = Vec::new();
    let list = |d: &Path| fs::read_dir(d).into_iter().flatten().flatten().map(|e| e.path()).collect::<Vec<_>>();
    for path in list(dir).into_iter().flat_map(|p| if p.is_dir() { list(&p) } else { vec![p] }) {
        if path.is_file()
            && let Ok(name) = path.strip_prefix(dir)
        {
            names.extend(name.to_str().map(str::to_string));
        }
    }
    names
}

/// A path that stays below where it is put.
fn is_plain(path: &str) -> bool {
    path.len() <= 1024
        && path.split('/').all(|p| !matches!(p, "" | "." | "..") && !p.contains(['\\', '\0', '\n', '\r']))
}

/// The path with everything escaped that has a meaning in URLs.
fn escape(path: &str) -> String {
    let plain = |b: u8| b.is_ascii_alphanumeric() || b"-._~/".contains(&b);
    path.bytes().map(|b| if plain(b) { char::from(b).to_string() } else { format!("%{b:02X}") }).collect()
}

/// The files that make one, in order.
#[derive(Debug, PartialEq)]
struct Parts {
    names: Vec<String>,
    /// Whether the names tell how many there are.
    complete: bool,
}

/// Which of `paths` are the file `name`, whole or in parts: `-00001-of-00002`, `.part1of2`, `.a` `.b`, `-split-a`.
/// Folders do not matter, but all parts are in one.
fn parts_of(name: &str, paths: &[String]) -> Option<Parts> {
    let split =
        |p: &str| p.rsplit_once('/').map_or((String::new(), p.to_string()), |(d, n)| (format!("{d}/"), n.to_string()));
    let stem = name.strip_suffix(".gguf").unwrap_or(name);
    let has = |p: &str| paths.iter().any(|q| q == p);
    for (dir, file) in paths.iter().map(|p| split(p)) {
        if file == name {
            return Some(Parts { names: vec![format!("{dir}{file}")], complete: true });
        }
        let numbered =
            file.strip_prefix(stem).and_then(|t| t.strip_prefix("-00001-of-")).and_then(|t| t.strip_suffix(".gguf"));
        let cut = file.strip_prefix(name).and_then(|t| t.strip_prefix(".part1of"));
        let counted = |n: &str, part: &dyn Fn(u32) -> String| {
            let count = n.parse().ok().filter(|n| (1..=1000).contains(n))?;
            let names: Vec<String> = (1..=count).map(part).collect();
            names.iter().all(|n| has(n)).then_some(Parts { names, complete: true })
        };
        let found = match (numbered, cut) {
            (Some(n), _) => counted(n, &|i| format!("{dir}{stem}-{i:05}-of-{n}.gguf")),
            (_, Some(n)) => counted(n, &|i| format!("{dir}{name}.part{i}of{n}")),
            _ => None,
        };
        if found.is_some() {
            return found;
        }
        for mark in [".", "-split-"] {
            if file == format!("{name}{mark}a") {
                let letters = ('a'..='z').map(|c| format!("{dir}{name}{mark}{c}")).take_while(|n| has(n));
                return Some(Parts { names: letters.collect(), complete: false });
            }
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_found_by_their_names() {
        let paths = |s: &str| s.split_whitespace().map(str::to_string).collect::<Vec<_>>();
        let cases = [
            ("README.md m.gguf", Some(("m.gguf", true))),
            ("d/m.gguf", Some(("d/m.gguf", true))),
            (
                "m-00002-of-00002.gguf m-00001-of-00002.gguf",
                Some(("m-00001-of-00002.gguf m-00002-of-00002.gguf", true)),
            ),
            ("m-00001-of-00002.gguf", None),
            ("x/m-00001-of-00002.gguf y/m-00002-of-00002.gguf", None),
            ("m.gguf/m-00001-of-00001.gguf", Some(("m.gguf/m-00001-of-00001.gguf", true))),
            ("m.gguf.part1of2 m.gguf.part2of2", Some(("m.gguf.part1of2 m.gguf.part2of2", true))),
            ("m.gguf.part1of2", None),
            ("m.gguf.b m.gguf.a m.gguf.d", Some(("m.gguf.a m.gguf.b", false))),
            ("m.gguf-split-a m.gguf-split-b", Some(("m.gguf-split-a m.gguf-split-b", false))),
            ("m2.gguf am.gguf m.gguf.bak m-00001-of-99999.gguf m.gguf.part1of0", None),
        ];
        for (there, want) in cases {
            let want = want.map(|(names, complete)| Parts { names: paths(names), complete });
            assert_eq!(parts_of("m.gguf", &paths(there)), want, "{there}");
        }
    }

    #[test]
    fn names_from_outside_stay_inside() {
        for good in ["a", "a/b.gguf", "a b", "..a"] {
            assert!(is_plain(good), "{good}");
        }
        for bad in ["", "/a", "a/", "..", "a/../b", "./a", "a//b", "a\\b", "a\nb"] {
            assert!(!is_plain(bad), "{bad}");
        }
        assert_eq!(escape("a b/c?d#e%f+g~.gguf"), "a%20b/c%3Fd%23e%25f%2Bg~.gguf");
    }
}
