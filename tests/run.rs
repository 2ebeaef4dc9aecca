//! `oxcart run` and flags of llama.cpp as its users give them, on the default model.

#[path = "common/program.rs"]
mod program;

use program::{ends, oxcart, process};
use rustix::process::{Pid, Signal, kill_process};
use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::process::Stdio;

const MODEL: &str = "SmolLM2-135M-Instruct";

/// stdout and stderr of what must succeed.
fn done(args: &[&str]) -> (String, String) {
    let (out, err, code) = ends(&mut oxcart(args));
    assert_eq!(code, Some(0), "{args:?}: {err}");
    (out, err)
}

fn json(args: &[&str]) -> serde_json::Value {
    serde_json::from_str(&done(args).0).expect("one JSON object")
}

#[test]
fn a_file_says_how_to_sample_and_flags_say_otherwise() {
    let told = |sampling: &str, more: &[&str]| {
        let kv: Vec<_> = sampling.split_whitespace().map(|s| format!("general.sampling.{s}")).collect();
        let kv = kv.join(",");
        let mut args = vec!["run", "-p", "The cart", "-n", "1"];
        args.extend(if kv.is_empty() { vec![] } else { vec!["--override-kv", &kv] });
        args.extend(more);
        ends(&mut oxcart(&args))
    };
    let cases: &[(&str, &[&str], &str)] = &[
        ("", &["-s", "7"], "seed 7 · temp 0.8 top-k 40 top-p 0.95 min-p 0.05\n"),
        ("temp=float:0", &[], " · temp 0\n"),
        ("temp=float:0.5 top_k=int:3 top_p=float:1 min_p=float:0", &[], " · temp 0.5 top-k 3\n"),
        ("temp=float:0.5 top_k=int:-1 top_p=float:1 min_p=float:0", &[], " · temp 0.5\n"),
        (
            "temp=int:0 penalty_repeat=float:1.5 penalty_last_n=int:-1",
            &[],
            "temp 0 repeat-penalty 1.5 repeat-last-n -1\n",
        ),
        ("temp=float:0.5 top_k=int:3 top_p=float:1", &["--temp", "0.25", "--min-p", "0"], " · temp 0.25 top-k 3\n"),
        ("mirostat=int:2", &[], "general.sampling.mirostat: requested by the file but not supported; ignored\n"),
    ];
    for (sampling, more, says) in cases {
        let (_, err, code) = told(sampling, more);
        assert!(code == Some(0) && err.contains(says), "{sampling} {more:?}: {err}");
    }
    for (sampling, says) in [
        ("temp=float:nan", "temp: found NaN, expected -100 to 100"),
        ("temp=float:-101", "temp: found -101, expected -100 to 100"),
        ("temp=float:inf", "temp: found inf, expected"),
        ("temp=str:hot", "temp: found string hot, expected a number"),
        ("top_k=float:1.5", "top_k: found f64 1.5, expected an integer"),
        ("top_k=int:-2", "top_k: found -2, expected -1 or more"),
        ("top_p=float:1.01", "top_p: found 1.01, expected 0 to 1"),
        ("penalty_repeat=float:0", "penalty_repeat: found 0, expected 0.001 to 100"),
        ("penalty_last_n=bool:true", "penalty_last_n: found bool true, expected an integer"),
    ] {
        let (_, err, code) = told(sampling, &[]);
        let line = format!(".gguf: general.sampling.{says}");
        let lines = err.lines().filter(|l| l.starts_with("oxcart: ")).count();
        assert!(code == Some(1) && lines == 1 && err.contains(&line), "{sampling}: {err}");
    }
}

#[test]
fn what_a_person_set_once_stands_over_the_file() {
    let config = tempfile::NamedTempFile::new().expect("a file");
    fs::write(config.path(), "[sampling]\ntemp = 0\n").expect("written");
    let chat = |args: &[&str]| {
        let base = ["chat", "--line", "--no-save", "-n", "6", "-c", "256"];
        let mut c = oxcart(&[&base[..], args].concat());
        c.env("OXCART_CONFIG", config.path());
        let (out, err, code) = ends(c.write_stdin("What is a cart?\n"));
        assert_eq!(code, Some(0), "{err}");
        out
    };
    let wild = ["--override-kv", "general.sampling.temp=float:100,general.sampling.min_p=float:0"];
    assert_eq!(chat(&wild), chat(&[]));
    let flag = [&wild[..], &["--temp", "100", "--seed", "1"]].concat();
    assert_ne!(chat(&flag), chat(&[]));
}

#[test]
fn escapes_are_those_of_the_command_line_alone() {
    let ids = |args: &[&str], stdin: &str| {
        let (out, err, code) = ends(oxcart(&[&["tokenize", "--ids"], args].concat()).write_stdin(stdin));
        assert_eq!(code, Some(0), "{err}");
        out
    };
    let (text, meant) = (r"a\n\tb\x21\\", "a\n\tb!\\");
    assert_eq!(ids(&["-p", text], ""), ids(&["-m", MODEL], meant));
    assert_eq!(ids(&["-p", text, "--no-escape", "-e"], ""), ids(&[], meant), "the last one counts");
    assert_eq!(ids(&["-p", text, "--no-escape"], ""), ids(&[], text));
    assert_ne!(ids(&[], "a\n"), ids(&[], "a"), "nothing is left out");
    let run = |args: &[&str]| done(&[&["run", "-n", "1", "--temp", "0"], args].concat()).0;
    assert!(run(&["-p", text]).starts_with(meant));
    assert!(run(&["-p", text, "--no-escape"]).starts_with(text));
    let system = |args: &[&str]| {
        json(&[&["run", "--chat", "-p", "x", "-n", "1", "--json", "--sys"], args].concat())["prompt_tokens"].clone()
    };
    assert_eq!(system(&[r"a\nb"]), system(&["a\nb", "--no-escape"]));
    assert_ne!(system(&[r"a\nb"]), system(&[r"a\nb", "--no-escape"]));
}

#[test]
fn a_line_break_at_the_end_of_a_file_is_none_of_the_text() {
    let file = tempfile::NamedTempFile::new().expect("a file");
    let args = ["run", "-n", "2", "--temp", "0"];
    for (bytes, want) in [
        (&b"The capital of France is\n"[..], "The capital of France is Paris.\n"),
        (br"The\n capital", r"The\n capital"),
        (b"Na\xefve\nThe\xff", "Na\u{fffd}ve\nThe\u{fffd}"),
    ] {
        fs::write(file.path(), bytes).expect("written");
        let o = oxcart(&args).arg("-f").arg(file.path()).output().expect("it runs");
        let out = String::from_utf8_lossy(&o.stdout);
        assert!(o.status.success() && out.starts_with(want), "{o:?}");
        let piped = oxcart(&args).write_stdin(bytes).output().expect("it runs");
        assert_eq!(piped.stdout, o.stdout, "{out}");
        let (told, says) = (String::from_utf8_lossy(&o.stderr), ": line 1: byte 0xef is not UTF-8");
        assert_eq!(told.contains(says), bytes.starts_with(b"Na"), "{told}");
    }
}

#[test]
fn what_a_context_has_no_room_for_is_told() {
    let args = ["run", "-p", "Once upon a time", "-n", "100", "--temp", "0", "-c"];
    let (_, err) = done(&[&args[..], &["24"]].concat());
    assert!(err.contains("(cut off: the context of 24 tokens is full"), "{err}");
    let (_, err) = done(&[&args[..], &["300", "--keep", "2"]].concat());
    assert!(!err.contains("cut off") && !err.contains("was trained for"), "{err}");
    let (_, err) = done(&["run", "-p", "Once", "-n", "1", "-c", "9000"]);
    assert!(err.contains("a context of 9000 tokens: the model was trained for 8192"), "{err}");
    let (out, err, code) = ends(&mut oxcart(&[&args[..], &["4"]].concat()));
    assert!(code == Some(1) && out.is_empty() && err.contains("the prompt has 4 tokens, the context 4"), "{out}{err}");
}

#[test]
fn texts_end_where_they_are_told_to_and_only_there() {
    let base = ["run", "-p", "The capital of France is", "--temp", "0", "-n", "12"];
    let stops = |r: &[&str]| done(&[&base[..], r].concat()).0;
    let whole = stops(&[]);
    assert!(whole.starts_with("The capital of France is Paris."), "{whole}");
    assert_eq!(stops(&["-r", "ari"]), "The capital of France is Pari\n", "within a token");
    assert_eq!(stops(&["-r", "zzz", "--reverse-prompt", "is."]), "The capital of France is Paris.\n");
    assert_eq!(stops(&["-r", r"\x69s."]), "The capital of France is Paris.\n");
    assert_eq!(stops(&["-r", "France"]), whole, "what the prompt says is no end");
    let o = json(&[&base[..], &["-r", "is.", "--json"]].concat());
    assert_eq!((o["text"].as_str(), o["end"].as_str()), (Some(" Paris."), Some("reverse-prompt")));

    let chat = ["run", "--chat", "-p", "Say hi.", "--temp", "0", "-n", "80", "--json"];
    assert_eq!(json(&chat)["end"], "eog");
    let o = json(&[&chat[..], &["--ignore-eos"]].concat());
    assert_eq!((o["end"].as_str(), o["tokens"].as_array().map(Vec::len)), (Some("length"), Some(80)));
}

#[test]
fn flags_are_read_as_llama_cpp_reads_them() {
    let base = ["run", "-p", "The capital of France is", "-n", "2", "--temp", "0"];
    let want = "The capital of France is Paris.\n";
    let cases: &[(&[&str], &str)] = &[
        (
            &["-ngl", "99", "-fa", "on", "-tb", "8", "--no-warmup"],
            "ignored, as it changes nothing here: -ngl -fa -tb --no-warmup\n",
        ),
        (&["-fa", "-no-cnv", "-st", "-dev", "none"], "ignored, as it changes nothing here: -fa -no-cnv -st -dev\n"),
        (&["-mmp", "0"], "of weights read in"),
        (&["-ctk=q8_0", "-ub", "8", "-c512"], "| ctx 512\n"),
        (&["-t", "-1"], ""),
        (&["-t", "0", "-t1", "-t2"], " 2 threads "),
        (&["-n", "7", "-n2", "--temp", "1", "--temp", "0"], " · temp 0\n"),
        (&["-l", "1+0", "-l", "2+0"], "logit-bias of 2\n"),
    ];
    for (flags, says) in cases {
        let (out, err) = done(&[&base[..], flags].concat());
        assert!(out == want && err.contains(says), "{flags:?}: {out}{err}");
    }
    let (out, _) = done(&["run", "-p", "-md", "-n", "1", "--temp", "0"]);
    assert!(out.starts_with("-md"), "{out}");
}

#[test]
fn wrong_usage_is_told_with_status_2() {
    let cases: &[(&[&str], &str)] = &[
        (&["run", "-hf", "foo"], "unknown flag -hf"),
        (&["-hf", "foo"], "unknown flag -hf"),
        (&["bench", "-xyz"], "unknown flag -xyz"),
        (&["list", "-ngl", "0"], "unknown flag -ngl"),
        (&["run", "-p", "x", "-t", "4097"], "expected 1 to 4096"),
        (&["run", "-p", "x", "-ub", "0"], "expected 1 to 2^31 tokens"),
        (&["chat", "-ub", "0"], "expected 1 to 2^31 tokens"),
        (&["perplexity", "-f", "x", "-ub", "0"], "expected 1 to 2^31 tokens"),
        (&["perplexity", "-f", "x", "--chunks", "0"], "expected 1 or more, or -1 for all"),
        (&["compare", "a", "b", "-f", "x", "-ub", "0"], "expected 1 to 2^31 tokens"),
        (&["imatrix", "-f", "x", "-ub", "0"], "expected 1 to 2^31 tokens"),
        (&["plan", "-ub", "0"], "expected 1 to 2^31 tokens"),
        (&["inspect", "x", "-ub", "0"], "expected 1 to 2^31 tokens"),
    ];
    let mut wrong = Vec::new();
    for (args, says) in cases {
        let (out, err, code) = ends(&mut oxcart(args));
        if code != Some(2) || !err.contains(says) || !out.is_empty() {
            wrong.push(format!("{args:?}: status {code:?}, {out}{err}"));
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

/// Runs it until `begun` is read from stdout, or, if that is nothing, until it says on stderr that it begins; then sends the
/// signal. The rest of stdout, stderr, and the status.
fn stopped(args: &[&str], begun: usize, signal: Signal) -> (String, String, Option<i32>) {
    let mut child =
        process(args).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("it starts");
    let mut out = child.stdout.take().expect("a pipe");
    let mut err = BufReader::new(child.stderr.take().expect("a pipe"));
    let (mut rest, mut told) = (String::new(), String::new());
    while !told.contains("seed ") {
        assert_ne!(err.read_line(&mut told).expect("UTF-8"), 0, "{told}");
    }
    out.read_exact(&mut vec![0; begun]).expect("an answer begins");
    kill_process(Pid::from_child(&child), signal).expect("it is there");
    out.read_to_string(&mut rest).expect("UTF-8");
    err.read_to_string(&mut told).expect("UTF-8");
    (rest, told, child.wait().expect("it ends").code())
}

#[test]
fn what_stops_it_is_its_status_and_the_figures_are_of_what_was_done() {
    let long = "The cart went on along the road by the river. ".repeat(600);
    for (signal, status) in [(Signal::INT, 130), (Signal::TERM, 143), (Signal::HUP, 129)] {
        // While the prompt is read.
        let args = ["run", "-p", &long, "-ub", "32", "--json", "-n", "400"];
        let (out, err, code) = stopped(&args, 0, signal);
        assert_eq!(code, Some(status), "{err}");
        let o: serde_json::Value = serde_json::from_str(&out).expect("one JSON object");
        let (fed, all) = (o["fed"].as_u64().expect("a count"), o["prompt_tokens"].as_array().expect("a list").len());
        assert!(fed > 0 && fed.is_multiple_of(32) && (fed as usize) < all, "{fed} of {all}");
        assert_eq!((&o["end"], o["tokens"].as_array().map(Vec::len)), (&"stopped".into(), Some(0)));
        assert!(err.contains(&format!(" / {fed:5} tokens (")), "{err}");
        // While it answers: what was said stays, and is all that comes.
        let args =
            ["run", "-p", "Once upon a time", "--no-display-prompt", "-n", "4000", "--temp", "0", "--ignore-eos"];
        let (out, err, code) = stopped(&args, 8, signal);
        assert_eq!(code, Some(status), "{err}");
        assert!(out.ends_with('\n') && err.contains(" /     4 tokens (") && err.contains("total time"), "{out}{err}");
        let steps = err.lines().find_map(|l| l.split("/ ").nth(1)?.split_once(" runs")?.0.trim().parse().ok());
        assert!(steps.is_some_and(|n: usize| n < 3999), "{err}");
    }
}
