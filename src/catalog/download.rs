//! A file over HTTP: resumed where it broke off, verified, and whole or not there.
//!
//! Redirects are followed here and not by the client, so that the token goes to the endpoint and nowhere else. A
//! connection that brings nothing for a while is given up and asked again for the rest; only attempts without progress
//! count as failures.

use super::disk::{self, env, hash_file, hex};
use super::{CatalogError, Result, io_error};
use crate::disk::read;
use indicatif::{ProgressBar, ProgressStyle};
use sha2::{Digest, Sha256};
use std::fs::File;
use std::io::{self, IsTerminal, Read, Seek, SeekFrom, Write};
use std::path::Path;
use std::time::Duration;
use ureq::http::{HeaderMap, Method, Request, Response, Uri};
use ureq::tls::{PemItem, RootCerts, TlsConfig, parse_pem};
use ureq::{Agent, Body};

/// Attempts without progress before a download is given up, over some minutes: a network that is gone comes back.
const ATTEMPTS: u32 = 10;
/// Attempts where there is less to hope for: at a server that was never reached, or begins a file anew each time.
const FEW: u32 = 5;
/// The longest time between two attempts.
const LONGEST: Duration = Duration::from_secs(30);
/// Redirects before a request is given up, as in browsers.
const REDIRECTS: usize = 20;
/// Bytes of a file of certificates, at most; a system's are a quarter of a megabyte.
const MOST_CERTIFICATES: u64 = 16 << 20;
/// A connection that brings nothing for so long is dead.
const STALLED: Duration = Duration::from_secs(60);

/// An HTTP client with the token of one origin.
pub(super) struct Client {
    agent: Agent,
    /// Scheme, host and port that may see the token.
    home: Option<(String, String)>,
    token: Option<String>,
}

/// What to write where, and how to know that it is right.
pub(super) struct Job<'a> {
    pub url: String,
    /// What people call it.
    pub name: &'a str,
    /// The file under its temporary name.
    pub partial: &'a Path,
    pub bytes: u64,
    pub sha256: Option<&'a str>,
}

fn origin(uri: &Uri) -> Option<(String, String)> {
    Some((uri.scheme_str()?.to_ascii_lowercase(), uri.authority()?.as_str().to_ascii_lowercase()))
}

fn http(url: &str, problem: impl Into<String>) -> CatalogError {
    CatalogError::Http { url: url.to_string(), problem: problem.into() }
}

pub(super) fn header<'a>(h: &'a HeaderMap, name: &str) -> Option<&'a str> {
    h.get(name)?.to_str().ok()
}

/// Why an attempt failed, and how many are worth making.
struct Failure {
    error: CatalogError,
    attempts: u32,
}

impl Client {
    /// A client that shows `token` to the origin of `endpoint` alone.
    pub fn new(endpoint: &str, token: Option<String>) -> Result<Client> {
        let uri: Uri = endpoint.parse().map_err(|e| http(endpoint, format!("not a URL: {e}")))?;
        let home = origin(&uri).ok_or_else(|| http(endpoint, "expected https://HOST or http://HOST"))?;
        let agent = Agent::config_builder()
            .max_redirects(0)
            .max_redirects_will_error(false)
            .http_status_as_error(false)
            .timeout_connect(Some(Duration::from_secs(30)))
            .timeout_recv_response(Some(STALLED))
            .timeout_per_read(Some(STALLED))
            .user_agent(concat!("oxcart/", env!("CARGO_PKG_VERSION")))
            .tls_config(TlsConfig::builder().root_certs(roots()?).build())
            .build()
            .new_agent();
        Ok(Client { agent, home: Some(home), token })
    }

    fn once(&self, method: &Method, uri: &Uri, range: Option<u64>) -> std::result::Result<Response<Body>, ureq::Error> {
        let mut r = Request::builder().method(method.clone()).uri(uri.clone());
        // A compressed answer would have another length than the file.
        r = r.header("accept-encoding", "identity");
        if let Some(from) = range {
            r = r.header("range", format!("bytes={from}-"));
        }
        if let Some(t) = self.token.as_ref().filter(|_| origin(uri) == self.home) {
            r = r.header("authorization", format!("Bearer {t}"));
        }
        self.agent.run(r.body(()).map_err(ureq::Error::Http)?)
    }

    /// Asks, and follows redirects until `stop` is content with an answer or there are none.
    fn ask(
        &self,
        method: Method,
        url: &str,
        range: Option<u64>,
        stop: impl Fn(&Response<Body>) -> bool,
    ) -> std::result::Result<Response<Body>, Failure> {
        let fail = |problem: String, attempts| Failure { error: http(url, problem), attempts };
        let mut uri: Uri = url.parse().map_err(|e| fail(format!("not a URL: {e}"), 1))?;
        for _ in 0..REDIRECTS {
            let r = self.once(&method, &uri, range).map_err(|e| fail(e.to_string(), ATTEMPTS))?;
            if !matches!(r.status().as_u16(), 301 | 302 | 303 | 307 | 308) || stop(&r) {
                return Ok(r);
            }
            let to = header(r.headers(), "location").ok_or_else(|| fail("a redirect without a location".into(), 1))?;
            uri = join(&uri, to).ok_or_else(|| fail(format!("a redirect to {to:?}, which is no URL"), 1))?;
        }
        Err(fail(format!("more than {REDIRECTS} redirects"), 1))
    }

    /// The headers of the first answer that `stop` is content with, or of the last.
    pub fn head(&self, url: &str, stop: impl Fn(&Response<Body>) -> bool) -> Result<Response<Body>> {
        self.patiently(|| self.ask(Method::HEAD, url, None, &stop))
    }

    /// A short text.
    pub fn text(&self, url: &str) -> Result<Response<String>> {
        self.patiently(|| {
            let (head, mut body) = self.ask(Method::GET, url, None, |_| false)?.into_parts();
            let text = body.with_config().limit(64 << 20).read_to_string();
            let text = text.map_err(|e| Failure { error: http(url, e.to_string()), attempts: FEW })?;
            Ok(Response::from_parts(head, text))
        })
    }

    /// Tries again what may do better the next time.
    fn patiently<T>(
        &self,
        mut attempt: impl FnMut() -> std::result::Result<Response<T>, Failure>,
    ) -> Result<Response<T>> {
        let mut failed = 0;
        loop {
            let result = attempt();
            failed += 1;
            match result {
                Ok(r) if !busy(r.status().as_u16()) || failed == ATTEMPTS => return Ok(r),
                Err(f) if failed >= f.attempts.min(FEW) => return Err(f.error),
                Ok(r) if failed >= FEW => tell!("{}; trying again", explain(r.status().as_u16())),
                _ => {}
            }
            wait(failed);
        }
    }

    /// Brings a file; what is there of it already stays. It is verified and synced when this returns, and deleted where
    /// it is not what it should be.
    pub fn fetch(&self, job: &Job<'_>) -> Result<()> {
        let at = job.partial;
        let mut file =
            File::options().create(true).truncate(false).read(true).write(true).open(at).map_err(io_error(at))?;
        let mut have = file.metadata().map_err(io_error(at))?.len();
        if have > job.bytes {
            file.set_len(0).map_err(io_error(at))?;
            have = 0;
        }
        let mut hash = hash_file(&mut file, have, at)?;
        let progress = Progress::new(job.name, job.bytes, have);
        let (mut best, mut failed) = (have, 0);
        while have < job.bytes {
            let result = self.attempt(job, &mut file, &mut have, &mut hash, &progress);
            if have > best {
                (best, failed) = (have, 0);
            }
            if let Err(f) = result {
                failed += 1;
                if failed >= f.attempts {
                    return Err(f.error);
                }
                progress.note(&format!("{}; {have} of {} bytes are here, trying again", f.error, job.bytes));
                wait(failed);
            }
        }
        progress.done();
        let found = hex(hash);
        if let Some(expected) = job.sha256.filter(|e| *e != found) {
            std::fs::remove_file(at).map_err(io_error(at))?;
            let expected = expected.to_string();
            return Err(CatalogError::Mismatch { file: job.name.into(), what: "sha256", found, expected });
        }
        file.sync_all().map_err(io_error(at))
    }

    /// One connection: asks for the rest and takes what comes.
    fn attempt(
        &self,
        job: &Job<'_>,
        file: &mut File,
        have: &mut u64,
        hash: &mut Sha256,
        progress: &Progress,
    ) -> std::result::Result<(), Failure> {
        let at = job.partial;
        let fail = |problem: String, attempts| Failure { error: http(&job.url, problem), attempts };
        let disk = |e| Failure { error: io_error(at)(e), attempts: 1 };
        let r = self.ask(Method::GET, &job.url, (*have > 0).then_some(*have), |_| false)?;
        let status = r.status().as_u16();
        let size = |found: u64| {
            let (found, expected) = (found.to_string(), job.bytes.to_string());
            Failure {
                error: CatalogError::Mismatch { file: job.name.into(), what: "size", found, expected },
                attempts: 1,
            }
        };
        let mut attempts = ATTEMPTS;
        match status {
            206 => {
                let range = header(r.headers(), "content-range").and_then(content_range);
                let (from, of) = range.ok_or_else(|| fail("a range without content-range".into(), 1))?;
                if from != *have {
                    return Err(fail(format!("asked for bytes from {have}, got them from {from}"), 1));
                }
                of.filter(|&n| n != job.bytes).map_or(Ok(()), |n| Err(size(n)))?;
            }
            200 => {
                let length = header(r.headers(), "content-length").and_then(|l| l.parse().ok());
                length.filter(|&n| n != job.bytes).map_or(Ok(()), |n| Err(size(n)))?;
                // The whole file, whatever was asked for: this server knows no ranges.
                if *have > 0 {
                    attempts = FEW;
                }
                *have = 0;
                *hash = Sha256::new();
                file.set_len(0).map_err(disk)?;
            }
            _ => return Err(fail(explain(status), if busy(status) { ATTEMPTS } else { 1 })),
        }
        file.seek(SeekFrom::Start(*have)).map_err(disk)?;
        let mut body = r.into_body().into_reader().take(job.bytes - *have);
        let mut buffer = vec![0; 1 << 18];
        loop {
            let n = match body.read(&mut buffer) {
                Ok(0) if *have < job.bytes => return Err(fail("the connection ended early".into(), attempts)),
                Ok(0) => return Ok(()),
                Ok(n) => n,
                Err(e) => return Err(fail(format!("the connection ended early: {e}"), attempts)),
            };
            file.write_all(&buffer[..n]).map_err(disk)?;
            hash.update(&buffer[..n]);
            *have += n as u64;
            progress.at(*have);
        }
    }
}

fn wait(failed: u32) {
    std::thread::sleep(Duration::from_millis(100 << failed.min(9)).min(LONGEST));
}

/// Too many requests, and what proxies and servers say in bad moments.
fn busy(status: u16) -> bool {
    matches!(status, 408 | 429 | 500 | 502 | 503 | 504)
}

/// A status in words.
pub(super) fn explain(status: u16) -> String {
    match status {
        401 | 403 => format!("HTTP {status}: not allowed; a gated or private repository needs HF_TOKEN"),
        404 => "HTTP 404: not there".into(),
        416 => "HTTP 416: the file is shorter than what is here of it".into(),
        _ => format!("HTTP {status}"),
    }
}

/// First byte and, where it is told, size of the whole: `bytes 100-199/200`.
fn content_range(s: &str) -> Option<(u64, Option<u64>)> {
    let (range, of) = s.strip_prefix("bytes ")?.split_once('/')?;
    Some((range.split_once('-')?.0.parse().ok()?, of.parse().ok()))
}

/// The URI that a `location` means.
fn join(base: &Uri, location: &str) -> Option<Uri> {
    if location.starts_with("http://") || location.starts_with("https://") {
        return location.parse().ok();
    }
    let (scheme, authority) = (base.scheme_str()?, base.authority()?);
    if let Some(rest) = location.strip_prefix("//") {
        return format!("{scheme}://{rest}").parse().ok();
    }
    if location.starts_with('/') {
        return format!("{scheme}://{authority}{location}").parse().ok();
    }
    let dir = base.path().rsplit_once('/').map_or("", |(d, _)| d);
    format!("{scheme}://{authority}{dir}/{location}").parse().ok()
}

/// The certificates to trust: those of `SSL_CERT_FILE`, as OpenSSL has it, or the ones that are built in.
fn roots() -> Result<RootCerts> {
    let Some(file) = env("SSL_CERT_FILE") else { return Ok(RootCerts::WebPki) };
    let file = Path::new(&file);
    let pem = read(file, MOST_CERTIFICATES).map_err(io_error(file))?;
    let certs: Vec<_> = parse_pem(&pem)
        .filter_map(|item| match item {
            Ok(PemItem::Certificate(c)) => Some(c),
            _ => None,
        })
        .collect();
    if certs.is_empty() {
        return Err(io_error(file)(io::Error::other("SSL_CERT_FILE: no certificate, expected PEM")));
    }
    Ok(RootCerts::new_with_certs(&certs))
}

/// How far a download is: a bar on a terminal, a line every tenth elsewhere.
pub(super) struct Progress {
    bar: ProgressBar,
    name: String,
    bytes: u64,
    tenth: std::cell::Cell<u64>,
    plain: bool,
}

impl Progress {
    pub fn new(name: &str, bytes: u64, have: u64) -> Progress {
        let plain = !std::io::stderr().is_terminal();
        let bar = if plain { ProgressBar::hidden() } else { ProgressBar::new(bytes) };
        let style = ProgressStyle::with_template("{wide_bar} {bytes}/{total_bytes} {bytes_per_sec} {eta}");
        bar.set_style(style.expect("a constant template"));
        bar.reset_eta();
        bar.set_position(have);
        if plain && have > 0 {
            tell!("{name}: {have} of {bytes} bytes are here already");
        }
        Progress { bar, name: name.into(), bytes, tenth: (have * 10 / bytes.max(1)).into(), plain }
    }

    pub fn at(&self, have: u64) {
        self.bar.set_position(have);
        let tenth = have * 10 / self.bytes.max(1);
        if self.plain && tenth > self.tenth.replace(tenth) {
            tell!("{}: {}0 % of {:.1} MB", self.name, tenth, self.bytes as f64 / 1e6);
        }
    }

    pub fn note(&self, text: &str) {
        self.bar.suspend(|| tell!("{text}"));
    }

    pub fn done(&self) {
        self.bar.finish_and_clear();
    }
}

/// Space for what is still missing of a file.
pub(super) fn check_rest(dir: &Path, partial: &Path, bytes: u64) -> Result<()> {
    let have = partial.metadata().map_or(0, |m| m.len());
    disk::check_space(dir, bytes.saturating_sub(have))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn locations_are_joined() {
        let base: Uri = "https://a.example:8443/x/y?z=1".parse().unwrap();
        for (location, want) in [
            ("/q", "https://a.example:8443/q"),
            ("q?r=2", "https://a.example:8443/x/q?r=2"),
            ("//b.example/q", "https://b.example/q"),
            ("http://b.example/", "http://b.example/"),
        ] {
            assert_eq!(join(&base, location).unwrap().to_string(), want);
        }
    }

    #[test]
    fn the_token_has_one_origin() {
        let o = |s: &str| origin(&s.parse().unwrap());
        assert_eq!(o("https://Hub.example/a"), o("https://hub.example/b"));
        for other in ["http://hub.example/", "https://hub.example:444/", "https://hub.example.evil/"] {
            assert_ne!(o("https://hub.example/"), o(other), "{other}");
        }
    }

    #[test]
    fn content_ranges_are_read() {
        assert_eq!(content_range("bytes 5-9/10"), Some((5, Some(10))));
        assert_eq!(content_range("bytes 5-9/*"), Some((5, None)));
        for bad in ["", "bytes", "bytes */10", "items 5-9/10", "bytes a-9/10"] {
            assert_eq!(content_range(bad), None, "{bad}");
        }
    }
}
