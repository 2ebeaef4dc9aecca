//! Conversations of the program on the default model: killed in the middle of an answer and gone on with, as a person does
//! it in a shell.

use assert_cmd::cargo::cargo_bin;
use oxcart::chat::history::{Conversation, TurnState, list};
use std::fs;
use std::io::{Read, Write};
use std::path::Path;
use std::process::{Command, Output, Stdio};

/// The program with conversations in `dir` and no configuration but that.
fn oxcart(dir: &Path, args: &[&str]) -> Command {
    let config = dir.join("config.toml");
    if !config.exists() {
        let kept = toml::Value::from(dir.join("kept").to_str().expect("UTF-8"));
        fs::write(&config, format!("ctx-size = 1024\n[sampling]\ntemp = 0\n[conversations]\ndir = {kept}\n")).unwrap();
    }
    let mut c = Command::new(cargo_bin("oxcart"));
    c.env("OXCART_CONFIG", config).args(args);
    c
}

/// Runs it on lines of input.
fn run(dir: &Path, args: &[&str], input: &str) -> Output {
    let mut c = oxcart(dir, args);
    let mut child = c.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    // One that ends on an error does not read.
    let _ = child.stdin.take().unwrap().write_all(input.as_bytes());
    child.wait_with_output().unwrap()
}

fn out(o: &Output) -> String {
    String::from_utf8(o.stdout.clone()).unwrap()
}

fn err(o: &Output) -> String {
    String::from_utf8_lossy(&o.stderr).into_owned()
}

/// The tokens that were fed for each answer, as the figures tell.
fn fed(o: &Output) -> Vec<usize> {
    let figure = |l: &str| l.split(" / ").nth(1).and_then(|t| t.split_whitespace().next()?.parse().ok());
    err(o).lines().filter(|l| l.starts_with("prompt eval")).map(|l| figure(l).expect("a count")).collect()
}

const LONG: &str =
    "Tell me a very long story about a cart, an ox, a river and a market, with every detail of the road.";

#[test]
fn an_answer_that_was_killed_is_there_and_the_conversation_resumes() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let kept = dir.join("kept");
    let mut child = oxcart(dir, &["chat", "--save", "-n", "600"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    writeln!(child.stdin.take().unwrap(), "{LONG}").unwrap();
    // Long enough that a part of the answer's keys and values was written too.
    let mut seen = Vec::new();
    let mut stdout = child.stdout.take().unwrap();
    let mut piece = [0; 4096];
    while seen.len() < 600 {
        match stdout.read(&mut piece).unwrap() {
            0 => break,
            n => seen.extend(&piece[..n]),
        }
    }
    // While it answers, nobody else writes.
    let path = list(&kept)[0].path.clone();
    let name = path.to_str().unwrap().to_string();
    let busy = run(dir, &["chat", "--continue"], "Hello.\n");
    let busy = (busy.status.code(), err(&busy));
    assert!(busy.0 == Some(1) && busy.1.contains("in use by another program"), "{busy:?}");
    child.kill().unwrap();
    child.wait().unwrap();

    // All that was seen is in the file.
    let c = Conversation::read(&path).unwrap();
    let seen = String::from_utf8_lossy(&seen).into_owned();
    assert_eq!((c.turns()[0].content.as_str(), c.turns()[0].state), (LONG, TurnState::Whole));
    let answer = c.turns()[1].content.clone();
    assert!(answer.starts_with(seen.trim_end_matches('\u{fffd}')), "seen {seen:?}, kept {answer:?}");
    assert_eq!(c.turns()[1].state, TurnState::Partial);
    let shown = run(dir, &["sessions", "show", "tell me a very"], "");
    assert!(out(&shown).contains(&answer) && out(&shown).contains("## Assistant (cut off)"), "{}", out(&shown));
    drop(c);

    // The next question feeds itself and little more: the rest comes from the disk.
    let resumed = run(dir, &["chat", "--continue", "-n", "8", "--show-timings"], "And then?\n");
    assert_eq!(resumed.status.code(), Some(0), "{}", err(&resumed));
    assert!(err(&resumed).contains("turn 2 was cut off") && err(&resumed).contains("from the KV cache on disk"));
    let told: Vec<usize> = err(&resumed)
        .lines()
        .find(|l| l.contains("from the KV cache on disk"))
        .map(|l| l.split_whitespace().filter_map(|w| w.parse().ok()).collect())
        .unwrap();
    let (read, of) = (told[0], told[1]);
    assert!(of > 120 && of - read < 100 && fed(&resumed) == [of - read], "{told:?} {}", err(&resumed));

    // Without the cache it is the same conversation, read again from its text.
    fs::remove_file(path.with_extension("kv")).unwrap();
    let again = run(dir, &["chat", "--resume", &name, "-n", "8", "--show-timings"], "/regen\n");
    assert!(!out(&again).trim().is_empty() && fed(&again) == [of], "{}", err(&again));
    let c = Conversation::read(&path).unwrap();
    assert_eq!(c.turns().len(), 5, "two answers to one question");
    assert_eq!(c.turns()[3].parent, c.turns()[4].parent);
}

#[test]
fn a_stale_or_damaged_cache_is_said_and_computed_anew() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let first = run(dir, &["chat", "--save", "-n", "4"], "My name is Ada.\n");
    assert_eq!(first.status.code(), Some(0), "{}", err(&first));
    let path = list(&dir.join("kept"))[0].path.clone();
    let cache = path.with_extension("kv");
    let flags = ["chat", "--continue", "-n", "4", "--show-timings"];
    let other = run(dir, &[&flags[..], &["-ctk", "q8_0"]].concat(), "/regen\n");
    assert!(err(&other).contains("of another model, or of another cache type"), "{}", err(&other));
    let mut bytes = fs::read(&cache).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 4;
    fs::write(&cache, bytes).unwrap();
    let damaged = run(dir, &[&flags[..], &["-ctk", "q8_0"]].concat(), "/regen\n");
    assert!(err(&damaged).contains("the checksum does not fit; they are computed anew"), "{}", err(&damaged));
    let good = run(dir, &[&flags[..], &["-ctk", "q8_0"]].concat(), "/regen\n");
    assert!(fed(&damaged)[0] > 1 && fed(&good) == [1], "{} {}", err(&damaged), err(&good));
}

#[test]
fn pipes_leave_no_trace_and_what_is_kept_is_managed() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let kept = dir.join("kept");
    let o = run(dir, &["chat", "-n", "2"], "Hello.\n");
    assert_eq!(o.status.code(), Some(0), "{}", err(&o));
    assert!(!kept.exists());
    let none = run(dir, &["chat", "--continue"], "Hello.\n");
    assert!(none.status.code() == Some(1) && err(&none).contains("no conversation to go on with"), "{}", err(&none));
    // A question that cannot be answered is no conversation either.
    let long = run(dir, &["chat", "--save", "-c", "48"], &format!("{}\n", LONG.repeat(4)));
    assert!(long.status.code() == Some(1) && err(&long).contains("tokens"), "{}", err(&long));
    assert_eq!(list(&kept).len(), 0);
    // A conversation for each of two, the second without a cache.
    fs::write(dir.join("more"), fs::read_to_string(dir.join("config.toml")).unwrap() + "kv-cache = false\n").unwrap();
    run(dir, &["chat", "--save", "-n", "2", "--sys", "Be brief."], "First?\n/clear\nSecond?\n");
    fs::rename(dir.join("more"), dir.join("config.toml")).unwrap();
    run(dir, &["chat", "--save", "-n", "2"], "Third?\n");
    let caches = || fs::read_dir(&kept).unwrap().flatten().filter(|f| f.path().extension().unwrap() == "kv").count();
    assert_eq!((list(&kept).len(), caches()), (3, 2));
    let sessions = |args: &[&str]| run(dir, &[&["sessions"][..], args].concat(), "");
    let text = out(&sessions(&["list"]));
    assert_eq!(text.lines().count(), 4, "{text}");
    let json: serde_json::Value = serde_json::from_str(&out(&sessions(&["list", "--json"]))).unwrap();
    let titles: Vec<&str> =
        json["conversations"].as_array().unwrap().iter().filter_map(|c| c["title"].as_str()).collect();
    assert_eq!(titles, ["Third?", "Second?", "First?"]);
    let at = json["conversations"][0]["modified"].as_str().unwrap();
    assert!(at.starts_with("20") && at.ends_with('Z') && at.len() == "2026-11-23T15:40:12Z".len(), "{at}");
    let export = out(&sessions(&["export", "second", "--json"]));
    let export: serde_json::Value = serde_json::from_str(&export).unwrap();
    assert_eq!(
        (&export["turns"][0]["content"], &export["turns"][1]["content"]),
        (&"Be brief.".into(), &"Second?".into())
    );
    let file = dir.join("out.md");
    let file = file.to_str().unwrap();
    assert_eq!(sessions(&["export", "First?", "-o", file]).status.code(), Some(0));
    assert!(fs::read_to_string(file).unwrap().starts_with("# First?\n\n## System\n\nBe brief.\n\n## User\n\nFirst?\n"));
    let cases: &[(&[&str], &str)] = &[
        (&["export", "First?", "-o", file], "out.md: exists already"),
        (&["show", "fourth"], "no conversation \"fourth\""),
        (&["show", "2"], "\"2\" matches 3 conversations"),
        (&["delete", "third", "fourth"], "no conversation \"fourth\""),
        (&["show", file], "line 1: expected"),
    ];
    for (args, says) in cases {
        let o = sessions(args);
        assert!(o.status.code() == Some(1) && err(&o).contains(says), "{args:?}: {}", err(&o));
    }
    assert_eq!(sessions(&["rename", "third", "A title"]).status.code(), Some(0));
    assert!(out(&sessions(&["path", "a tit"])).ends_with(".txt\n"));
    assert_eq!(sessions(&["delete", "A title", "second"]).status.code(), Some(0));
    assert_eq!((list(&kept).len(), caches()), (1, 1), "a cache goes with its conversation");
}

/// As where a model was made from its checkpoint.
#[test]
fn a_folder_that_is_called_as_the_model_is_not_the_model() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    fs::create_dir(dir.join("SmolLM2-135M-Instruct")).unwrap();
    let ask = |args: &[&str]| {
        let mut c = oxcart(dir, args);
        let o = c.current_dir(dir).stdin(Stdio::null()).output().unwrap();
        assert!(o.status.success(), "{}", err(&o));
    };
    ask(&["chat", "--save", "-n", "2", "-m", "SmolLM2-135M-Instruct", "-p", "Hello"]);
    assert_eq!(list(&dir.join("kept"))[0].model, "SmolLM2-135M-Instruct");
    ask(&["chat", "--continue", "-n", "2", "-p", "Go on"]);
}
