//! The program as a person runs it, on the default model: what goes to stdout, what to stderr, and with which status.

#[path = "common/program.rs"]
mod program;

use oxcart::chat::history::Conversation;
use program::{ends, oxcart, process};
use std::collections::BTreeSet;
use std::fs;
use std::io::{BufRead, BufReader};

#[test]
fn a_piped_conversation_keeps_its_cache_and_ends() {
    let mut c = oxcart(&["chat", "--temp", "0", "-n", "24", "-c", "512", "--show-timings", "--sys", "Be brief."]);
    let (out, err, code) = ends(c.write_stdin("My name is Ada.\nWhat is my name?\n/nonsense\n/regen\n"));
    assert_eq!(code, Some(0), "{err}");
    assert!(out.lines().filter(|l| !l.is_empty()).count() >= 3, "two answers and one again: {out:?}");
    assert!(err.contains("no command /nonsense"), "{err}");
    // Tokens fed in each turn: the second feeds the new question only, the third one token of what it knows.
    let fed: Vec<usize> = err
        .lines()
        .filter(|l| l.starts_with("prompt eval"))
        .map(|l| l.split(" / ").nth(1).and_then(|t| t.split_whitespace().next()?.parse().ok()).expect("a count"))
        .collect();
    assert_eq!(fed.len(), 3, "{err}");
    assert!(fed[1] < fed[0] && fed[2] <= fed[1], "tokens fed: {fed:?}");
}

#[test]
fn a_question_may_have_bytes_that_are_no_characters() {
    let mut c = oxcart(&["chat", "--temp", "0", "-n", "4", "-c", "512"]);
    let (out, err, code) = ends(c.write_stdin(&b"Hello.\nWhat is na\xefve?\nAnd caf\xe9?\n"[..]));
    assert_eq!(code, Some(0), "{err}");
    let notes: Vec<&str> = err.lines().filter(|l| l.contains("UTF-8")).collect();
    assert_eq!(notes, ["stdin: line 2: byte 0xef is not UTF-8; such bytes are read as U+FFFD"]);
    assert!(out.lines().filter(|l| !l.is_empty()).count() >= 3, "three answers: {out:?}");
}

#[test]
fn a_question_may_begin_with_a_slash() {
    let mut c = oxcart(&["chat", "--temp", "0", "-n", "4", "-c", "512"]);
    let (out, err, code) = ends(c.write_stdin("/etc/passwd is what?\n//exit\n/stop it now\n"));
    assert_eq!((code, err.contains("no command")), (Some(0), false), "{err}");
    assert_eq!(out.lines().filter(|l| !l.is_empty()).count(), 3, "three answers: {out:?}");
}

/// Who ends a program means all of it: the answer at hand is kept, and no other question is asked.
#[test]
fn a_chat_that_is_ended_answers_no_more() {
    use std::io::{Read, Write};
    use std::process::Stdio;
    let mut child = process(&["chat", "--temp", "0", "-n", "400", "-c", "2048"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .expect("it starts");
    let mut stdin = child.stdin.take().expect("a pipe");
    stdin.write_all("Count from one to five hundred, in words.\n".repeat(5).as_bytes()).expect("written");
    drop(stdin);
    let mut out = child.stdout.take().expect("a pipe");
    out.read_exact(&mut [0; 8]).expect("an answer begins");
    let pid = rustix::process::Pid::from_child(&child);
    rustix::process::kill_process(pid, rustix::process::Signal::TERM).expect("it is there");
    let mut rest = String::new();
    out.read_to_string(&mut rest).expect("UTF-8");
    assert_eq!(child.wait().expect("it ends").code(), Some(143));
    assert!(rest.lines().count() < 100, "one answer, and not all of it: {rest}");
}

#[test]
fn a_conversation_longer_than_its_context_forgets_its_oldest_turns() {
    let long = "Tell me about rivers, lakes, seas and the rain that fills them, and about boats, too.\n";
    let mut c = oxcart(&["chat", "--temp", "0", "-n", "8", "-c", "160", "--sys", "Be brief."]);
    let (out, err, code) = ends(c.write_stdin(long.repeat(7)));
    assert_eq!(code, Some(0), "{err}");
    assert!(out.lines().filter(|l| !l.is_empty()).count() >= 7, "an answer to each question: {out:?}");
    assert!(err.contains("oldest messages are not read any more"), "{err}");
}

/// Of a conversation as the full screen leaves it: a question stopped before the first word, and another system prompt.
#[test]
fn a_conversation_goes_on_under_a_template_that_wants_roles_to_alternate() {
    let dir = tempfile::tempdir().expect("a folder");
    let template = dir.path().join("strict.jinja");
    let strict = "{% for m in messages %}{% if m.role != (['system', 'user', 'assistant', 'user'][loop.index0]) %}\
        {{ raise_exception('roles must alternate') }}{% endif %}{{ m.content }}\n{% endfor %}";
    fs::write(&template, strict).expect("written");
    let mut c = Conversation::create(dir.path(), "").expect("created");
    let mut last = None;
    for (role, content) in
        [("system", "Be brief."), ("user", "Hi"), ("user", "Hello"), ("assistant", "Hey"), ("system", "Sing.")]
    {
        last = Some(c.add(last, role, content).expect("added"));
    }
    let path = c.path().to_path_buf();
    drop(c);
    let (file, template) = (path.to_str().expect("UTF-8"), template.to_str().expect("UTF-8"));
    let base = ["chat", "--line", "--resume", file, "--chat-template-file", template, "-n", "2", "-c", "128"];
    let model = oxcart::catalog::default_model().expect("it can be fetched");
    let (_, err, code) = ends(oxcart(&base).args(["-m", model.to_str().expect("UTF-8")]).write_stdin("And now?\n"));
    assert_eq!(code, Some(0), "{err}");
    let c = Conversation::read(&path).expect("it is read");
    assert_eq!(c.turns().len(), 7, "the question and its answer are in the file");
}

#[test]
fn a_seed_repeats_a_text_and_json_is_one_object() {
    let run = |seed: &str| {
        let (out, err, code) =
            ends(&mut oxcart(&["run", "-p", "A short story:", "-n", "12", "--seed", seed, "--json"]));
        assert_eq!(code, Some(0), "{err}");
        serde_json::from_str::<serde_json::Value>(&out).expect("one JSON object")
    };
    let (a, b, c) = (run("7"), run("7"), run("8"));
    assert_eq!(a["tokens"], b["tokens"]);
    assert_ne!(a["tokens"], c["tokens"]);
    assert_eq!(a["tokens"].as_array().expect("a list").len(), 12);
}

#[test]
fn a_full_context_ends_a_text_or_is_shifted() {
    let run = |more: &[&str]| {
        let base = ["run", "-p", "Once upon a time", "-c", "48", "-n", "150", "--temp", "0", "--json"];
        let (out, err, code) = ends(&mut oxcart(&[&base[..], more].concat()));
        assert_eq!(code, Some(0), "{err}");
        serde_json::from_str::<serde_json::Value>(&out).expect("one JSON object")
    };
    let (full, shifted) = (run(&[]), run(&["--context-shift", "--keep", "4", "--seed", "1"]));
    let tokens = |v: &serde_json::Value| v["tokens"].as_array().expect("a list").clone();
    assert_eq!(full["end"], "context");
    assert!(["length", "eog"].contains(&shifted["end"].as_str().expect("a word")), "{shifted}");
    let n = tokens(&full).len();
    assert!(tokens(&shifted).len() > n + 30, "{} tokens after {n}", tokens(&shifted).len());
    assert_eq!(tokens(&shifted)[..n], tokens(&full)[..]);
}

#[test]
fn text_goes_to_stdout_and_figures_to_stderr() {
    let (out, err, code) = ends(&mut oxcart(&["run", "-p", "The capital of France is", "-n", "2", "--temp", "0"]));
    assert_eq!((out.as_str(), code), ("The capital of France is Paris.\n", Some(0)));
    assert!(err.contains("tokens per second"), "{err}");
}

#[test]
fn what_is_only_looked_at_has_a_name_too() {
    let path = oxcart::catalog::default_model().expect("the default model can be fetched");
    let path = path.to_str().expect("UTF-8");
    for before in [&["inspect", "--summary", "--json"][..], &["tokenize", "--ids", "-p", "The cart", "-m"]] {
        let by = |model: &str| {
            let (out, err, code) = ends(&mut oxcart(&[before, &[model]].concat()));
            assert_eq!(code, Some(0), "{before:?} {model}: {err}");
            out
        };
        assert_eq!(by("SmolLM2-135M-Instruct"), by(path), "{before:?}");
        let (_, err, code) = ends(&mut oxcart(&[before, &["no-such-model"]].concat()));
        assert!(code == Some(1) && err.contains("no-such-model"), "{before:?}: {err}");
    }
}

#[test]
fn a_checkpoint_s_folder_is_told_what_becomes_a_file() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("config.json"), "{}").unwrap();
    let folder = dir.path().to_str().expect("UTF-8");
    for args in [&["plan", folder][..], &["inspect", folder], &["run", "-p", "x", "-m", folder]] {
        let (_, err, code) = ends(&mut oxcart(args));
        let says =
            format!("oxcart: {folder}: open: a folder, expected a file; oxcart quantize {folder} OUT.gguf TYPE makes");
        assert!(code == Some(1) && err.contains(&says), "{args:?}: {err}");
    }
}

#[test]
fn a_plan_measures_the_instruction_set_that_is_named() {
    let (_, err, code) = ends(&mut oxcart(&["plan", "--isa", "avx3"]));
    assert!(code == Some(1) && err.contains("--isa: unknown instruction set"), "{err}");
    let (_, err, code) = ends(oxcart(&["plan", "--no-probe"]).env("OXCART_ISA", "avx3"));
    assert!(code == Some(1) && err.contains("--isa: unknown instruction set"), "{err}");
    let tops = |isa: &str| {
        let (out, err, code) = ends(&mut oxcart(&["plan", "--json", "-t", "0", "--isa", isa]));
        assert_eq!(code, Some(0), "{err}");
        let plan: serde_json::Value = serde_json::from_str(&out).expect("JSON");
        plan["probe"]["tops"].as_f64().expect("a number")
    };
    let (best, scalar) = (oxcart_quant::Kernels::best().isa, tops("scalar"));
    assert!(best == oxcart_quant::Isa::Scalar || tops(best.name()) > 1.5 * scalar, "{best}");
}

/// No machine has the memory for this cache.
#[test]
fn a_plan_tells_no_speed_of_what_does_not_fit() {
    let plan = |more: &[&str]| -> serde_json::Value {
        let (out, err, code) = ends(&mut oxcart(&[&["plan", "--json"][..], more].concat()));
        assert_eq!(code, Some(0), "{err}");
        serde_json::from_str(&out).expect("JSON")
    };
    let speeds =
        |p: &serde_json::Value| [&p["decode_tokens_per_second"], &p["prefill_tokens_per_second"]].map(|s| s.is_null());
    let (fits, not) = (plan(&[]), plan(&["Qwen1.5-110B-Chat", "-c", "2147483648"]));
    assert_eq!((fits["fit"].as_str(), speeds(&fits)), (Some("memory"), [false; 2]), "{fits}");
    assert_eq!((not["fit"].as_str(), speeds(&not)), (Some("not"), [true; 2]), "{not}");
}

#[test]
fn sizes_that_nobody_told_are_estimates() {
    let (out, err, code) = ends(&mut oxcart(&["list"]));
    assert_eq!(code, Some(0), "{err}");
    let about = |l: &&str| l.starts_with("Llama-3-70B-Instruct:Q4_K_M ") && l.contains(" ~42.8 GB");
    assert!(out.lines().any(|l| about(&l)), "{out}");
    assert!(out.lines().any(|l| l.contains(" 0.41 GB")), "{out}");
}

#[test]
fn a_context_of_nothing_is_the_model_s() {
    for (context, says) in [(&["-c", "0"][..], "| ctx 8192\n"), (&[], "| ctx 8192\n"), (&["-c", "64"], "| ctx 64\n")] {
        let args = [&["run", "-p", "The capital of France is", "-n", "1", "--temp", "0"], context].concat();
        let (out, err, code) = ends(&mut oxcart(&args));
        assert_eq!((out.as_str(), code), ("The capital of France is Paris\n", Some(0)), "{err}");
        assert!(err.contains(says), "{context:?}: {err}");
    }
}

#[test]
fn weights_come_into_memory_in_many_ways() {
    let run = |more: &[&str]| {
        let mut args = vec!["run", "-p", "The capital of France is", "-n", "8", "--temp", "0"];
        args.extend(more);
        let (out, err, code) = ends(&mut oxcart(&args));
        assert_eq!(code, Some(0), "{more:?}: {err}");
        (out, err)
    };
    let (want, err) = run(&[]);
    assert!(!err.contains("of weights read"), "{err}");
    let cases: &[(&[&str], &str)] = &[
        (&["--no-mmap"], "of weights read in"),
        (&["--prefault"], "of weights read in"),
        (&["--prefault", "-t", "1"], "of weights read in"),
        (&["--mlock"], "weights"), // were read or could not be locked, as the next test has it
        (&["--cpu-range", "0-0"], " 1 threads "),
        (&["-Cr", "0-0", "--cpu-strict", "1", "-t", "2"], " 2 threads "),
        (&["-C", "0x1"], " 1 threads "),
    ];
    for (flags, says) in cases {
        let (out, err) = run(flags);
        assert_eq!(out, want, "{flags:?}");
        assert!(err.contains(says), "{flags:?}: {err}");
    }
}

/// The processors that the threads of a chat may run on, each list once. It waits for its first question.
#[cfg(target_os = "linux")]
fn places(flags: &[&str]) -> BTreeSet<String> {
    let mut c = process(&[&["chat", "--no-save", "-c", "64"], flags].concat());
    let (stdin, out) = (std::process::Stdio::piped(), std::process::Stdio::null());
    let mut child = c.stdin(stdin).stdout(out).stderr(std::process::Stdio::piped()).spawn().unwrap();
    // Its facts come when the model is loaded, and the workers are where they stay.
    let mut said = BufReader::new(child.stderr.take().unwrap()).lines();
    let loaded = said.any(|l| l.unwrap().contains(" threads | ctx "));
    let tasks = fs::read_dir(format!("/proc/{}/task", child.id())).unwrap();
    let list = |task: fs::DirEntry| {
        let status = fs::read_to_string(task.path().join("status")).unwrap();
        status.lines().find_map(|l| l.strip_prefix("Cpus_allowed_list:")).expect("a list").trim().to_string()
    };
    let found = tasks.map(|task| list(task.unwrap())).collect();
    drop(child.stdin.take());
    assert!(child.wait().unwrap().success() && loaded, "{flags:?}");
    found
}

#[cfg(target_os = "linux")]
#[test]
fn workers_run_where_flags_say() {
    let all = places(&[]);
    assert_eq!(all.len(), 1, "{all:?}");
    let first = all.first().unwrap().split([',', '-']).next().unwrap().to_string();
    let mask = format!("{:x}", 1u64 << first.parse::<u32>().unwrap());
    let one = BTreeSet::from([first.clone()]);
    let pinned = &all | &one;
    assert_eq!(places(&["-C", &mask]), pinned);
    assert_eq!(places(&["-Cr", &format!("{first}-{first}"), "-t", "3"]), pinned);
    let strict = places(&["--cpu-strict", "1", "-t", "2"]);
    assert!(
        strict.is_superset(&pinned) && strict.iter().all(|l| all.contains(l) || l.parse::<u32>().is_ok()),
        "{strict:?}"
    );
    // What numactl left is what there is.
    assert_eq!(places(&["--numa", "numactl"]), all);
}

#[cfg(target_os = "linux")]
#[test]
fn a_limit_of_locked_memory_is_told() {
    // Whoever may lock without a limit has this capability.
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let may = status.lines().find_map(|l| l.strip_prefix("CapEff:")).expect("capabilities");
    let may = u64::from_str_radix(may.trim(), 16).unwrap() >> 14 & 1 == 1;
    let binary = assert_cmd::cargo::cargo_bin("oxcart");
    for flags in ["--mlock", "--mlock --no-mmap"] {
        let line = format!("ulimit -l 64 && exec {} run -p 'The cart' -n 2 --temp 0 {flags}", binary.display());
        let o =
            std::process::Command::new("sh").args(["-c", &line]).env("OXCART_CONFIG", "/dev/null").output().unwrap();
        let err = String::from_utf8(o.stderr).unwrap();
        assert_eq!(o.status.code(), Some(0), "{err}");
        let told = err.contains("--mlock: weights are not locked: ")
            && err.contains("bytes, and this process may lock 65536; raise the limit with ulimit -l ");
        assert_eq!(told, !may, "{err}");
    }
}

#[test]
fn a_chat_begins_before_its_weights_are_there() {
    let mut c = oxcart(&["chat", "--temp", "0", "-n", "4", "-c", "256", "--prefault", "--mlock"]);
    let (out, err, code) = ends(c.write_stdin("My name is Ada.\n"));
    assert_eq!(code, Some(0), "{err}");
    assert!(!out.trim().is_empty() && !err.contains("weights read"), "{err}");
}

#[test]
fn every_repetition_of_a_measurement_is_in_its_json() {
    let bench = |form: &str| {
        let (out, err, code) = ends(&mut oxcart(&["bench", "-p", "8", "-n", "2", "-r", "3", "-t", "2", "-o", form]));
        assert_eq!(code, Some(0), "{err}");
        out
    };
    let tests: serde_json::Value = serde_json::from_str(&bench("json")).expect("JSON");
    for (test, tokens) in tests.as_array().expect("a list").iter().zip([8.0, 2.0]) {
        let list = |key: &str| -> Vec<f64> {
            let list = test[key].as_array().expect("a list");
            list.iter().map(|v| v.as_f64().expect("a number")).collect()
        };
        let (ns, ts) = (list("samples_ns"), list("samples_ts"));
        assert_eq!((ns.len(), ts.len()), (3, 3));
        for (ns, ts) in ns.iter().zip(&ts) {
            assert!((tokens * 1e9 / ns / ts - 1.0).abs() < 1e-6, "{tokens} tokens in {ns} ns, {ts} a second");
        }
        let mean = ts.iter().sum::<f64>() / 3.0;
        assert!((test["avg_ts"].as_f64().expect("a number") / mean - 1.0).abs() < 1e-9);
    }
    let csv = bench("csv");
    let columns: Vec<usize> = csv.lines().map(|l| l.split(',').count()).collect();
    assert!(columns.len() == 3 && columns.iter().all(|&n| n == columns[0]) && !csv.contains("samples"), "{csv}");
}

#[test]
fn failures_are_one_line_and_have_their_status() {
    let dir = tempfile::tempdir().unwrap();
    let file = |name: &str, bytes: &[u8]| {
        let path = dir.path().join(name);
        fs::write(&path, bytes).unwrap();
        path.to_str().expect("UTF-8").to_string()
    };
    let (short, binary, empty) = (file("short.txt", b"too short"), file("b.gguf", b"\x7fELF"), file("empty.gguf", b""));
    let cases: &[(&[&str], i32, &str)] = &[
        (&["perplexity", "-f", &short], 1, "short.txt: 2 tokens, expected at least 1024"),
        (&["run", "-m", &binary, "-p", "x"], 1, "b.gguf: magic"),
        (&["run", "-m", &empty, "-p", "x"], 1, "empty.gguf: open: the file is empty"),
        (&["run", "-m", "no-such-model", "-p", "x"], 1, "no-such-model"),
        (&["run", "-p", "x", "--isa", "avx3"], 1, "--isa: unknown instruction set"),
        (&["run", "-p", "x", "-c", "1"], 1, "the prompt has 1 tokens, the context 1"),
        (&["run", "-p", "x", "-c", "18446744073709551615"], 2, "expected 0 (the model's own) to 2^31"),
        (&["chat", "-p", "x", "-c", "2147483649"], 2, "expected 0 (the model's own) to 2^31"),
        (&["inspect", "x", "-c", "-1"], 2, "expected 0 (the model's own)"),
        (&["run", "-p", "x", "--top-p", "2"], 2, "--top-p"),
        (&["run", "-p", "x", "-ctk", "q9"], 2, "expected f16, bf16 or q8_0"),
        (&["run", "-p", "x", "--cpu-range", "3-1"], 2, "expected LO-HI"),
        (&["run", "-p", "x", "-Cr", "1"], 2, "expected LO-HI"),
        (&["run", "-p", "x", "-C", "0x"], 2, "expected hexadecimal digits"),
        (&["run", "-p", "x", "--cpu-strict", "2"], 2, "expected 0 or 1"),
        (&["run", "-p", "x", "--numa", "mirror"], 2, "expected distribute, isolate or numactl"),
        (&["run", "-p", "x", "--numa", "isolate", "-C", "1"], 2, "cannot be used with"),
        (&["run", "-p", "x", "--mlock", "--resident-memory", "1G"], 2, "cannot be used with"),
        (
            &["run", "-p", "x", "--cpu-range", "1000-1023"],
            1,
            "--cpu-mask, --cpu-range: processor 1000, of those that may be used: ",
        ),
        (&["frobnicate"], 2, "frobnicate"),
    ];
    let mut wrong = Vec::new();
    for (args, status, says) in cases {
        let (_, err, code) = ends(&mut oxcart(args));
        let lines = err.lines().filter(|l| l.starts_with("oxcart: ")).count();
        if code != Some(*status) || !err.contains(says) || (*status == 1 && lines != 1) {
            wrong.push(format!("{args:?}: status {code:?}, {err}"));
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

/// Runs with a pipe for stdout, or for stderr, that nobody reads.
fn unread(args: &[&str], stdout: bool) -> std::process::Output {
    let (reader, writer) = std::io::pipe().expect("a pipe");
    drop(reader);
    let mut c = process(args);
    if stdout { c.stdout(writer).output() } else { c.stderr(writer).output() }.expect("it runs")
}

#[test]
fn nobody_has_to_read_what_is_said() {
    // Talk that goes unheard changes neither the result nor the status.
    let o = unread(&["run", "-p", "The cart", "-n", "4", "--temp", "0"], false);
    assert!(o.status.success() && !o.stdout.is_empty(), "{o:?}");
    let o = unread(&["run", "-m", "/nowhere/m.gguf", "-p", "x"], false);
    assert_eq!(o.status.code(), Some(1), "{o:?}");
    // A result that nobody wants is no failure, and no panic.
    for args in [&["plan", "SmolLM2-135M-Instruct"][..], &["list"], &["run", "-p", "The cart", "-n", "4"]] {
        let o = unread(args, true);
        let talk = String::from_utf8_lossy(&o.stderr);
        assert!(o.status.success() && !talk.contains("panicked"), "{args:?}: {talk}");
    }
}
