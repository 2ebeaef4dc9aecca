//! `oxcart bench` with llama-bench's lists and forms, on the default model.

#[path = "common/checkpoint.rs"]
#[allow(dead_code)] // what only conversions need
mod checkpoint;

use assert_cmd::Command;
use checkpoint::{DIM, EXPERTS, FFN, HEAD_DIM, HEADS, KV_HEADS, LAYERS, VOCAB};
use serde_json::Value;

/// stdout, stderr and exit status.
fn bench(args: &[&str]) -> (String, String, Option<i32>) {
    let o =
        Command::cargo_bin("oxcart").expect("the binary is built").arg("bench").args(args).output().expect("it runs");
    let text = |b: Vec<u8>| String::from_utf8(b).expect("UTF-8");
    (text(o.stdout), text(o.stderr), o.status.code())
}

fn done(args: &[&str]) -> (String, String) {
    let (out, err, code) = bench(&[&["-r", "1", "--no-warmup"], args].concat());
    assert_eq!(code, Some(0), "{args:?}: {err}");
    (out, err)
}

#[test]
fn all_combinations_are_run_and_recorded_as_they_were() {
    let model = oxcart::catalog::default_model().expect("the default model can be fetched");
    let model = model.to_str().expect("UTF-8");
    let args = "-t 1 -t 2 -p 4-8*2 -p 3 -n 1,0 -d 0 -b 2 -b 64 -ub 4 -o json";
    let models = format!("{model},SmolLM2-135M-Instruct");
    let args: Vec<&str> = args.split(' ').chain(["-m", &models]).collect();
    let rows: Vec<Value> = serde_json::from_str(&done(&args).0).expect("JSON");
    let of = |key: &str| rows.iter().map(|r| r[key].as_u64().expect("a number")).collect::<Vec<_>>();
    // Two models, two numbers of workers, two sizes of batch, and pp4, pp8, pp3, tg1 of each.
    assert_eq!(rows.len(), 32);
    assert_eq!(of("n_prompt")[..4], [4, 8, 3, 0]);
    assert_eq!(of("n_gen")[..4], [0, 0, 0, 1]);
    assert_eq!((of("n_batch")[0], of("n_ubatch")[0], of("n_batch")[4], of("n_ubatch")[4]), (2, 2, 64, 4));
    assert_eq!((of("n_threads")[0], of("n_threads")[8], of("n_threads")[16]), (1, 2, 1));
    let row = &rows[0];
    assert_eq!(row["model_type"], "llama Q4_1");
    let time: jiff::Timestamp = row["test_time"].as_str().expect("a time").parse().expect("ISO 8601");
    let age = jiff::Timestamp::now().as_second() - time.as_second();
    assert!((0..600).contains(&age), "{row}");
    assert!(!row["cpu_info"].as_str().expect("a name").is_empty(), "{row}");
}

#[test]
fn what_comes_to_the_same_is_run_once() {
    let out = done(&["-p", "4", "-n", "0", "-b", "512", "-ub", "512,128,1024", "-o", "jsonl"]).0;
    let rows = out.lines().map(|l| serde_json::from_str::<Value>(l).expect("JSON"));
    assert_eq!(rows.map(|r| r["n_ubatch"].as_u64().unwrap()).collect::<Vec<_>>(), [512, 128]);
}

#[test]
fn a_model_that_fails_takes_no_measurement_with_it() {
    let dir = tempfile::tempdir().unwrap();
    let file = |name: &str, bytes: &[u8]| {
        let path = dir.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        path.to_str().unwrap().to_string()
    };
    let default = "SmolLM2-135M-Instruct";
    // A file of no tensors and no keys is a GGUF, and no model.
    let empty = file("empty.gguf", &[&b"GGUF\x03\0\0\0"[..], &[0; 24]].concat());
    let (out, err, code) = bench(&["-r", "1", "-p", "4", "-n", "0", "-o", "json", "-m", default, "-m", &empty]);
    let rows: Vec<Value> = serde_json::from_str(&out).expect("JSON");
    assert!(code == Some(1) && rows.len() == 1 && err.contains("empty.gguf: general.architecture: missing"), "{err}");
    // What is no file of models at all is told before anything is measured.
    let none = file("none.gguf", b"nonsense");
    let (out, err, code) = bench(&["-r", "1", "-p", "4", "-n", "0", "-m", default, "-m", &none]);
    assert!(code == Some(1) && out.is_empty() && err.contains("none.gguf: magic"), "{out}{err}");
}

#[test]
fn bytes_are_those_that_were_read() {
    let dir = tempfile::tempdir().unwrap();
    let (attention, output) = (4 * DIM * HEAD_DIM * (2 * HEADS + 2 * KV_HEADS), 4 * VOCAB * DIM);
    let (qkv, expert) = (4 * DIM * HEAD_DIM * (HEADS + 2 * KV_HEADS), 4 * 3 * FFN * DIM);
    let position = 2 * 2 * LAYERS * KV_HEADS * HEAD_DIM; // two bytes of keys and of values
    for (class, all, one, two) in [
        ("LlamaForCausalLM", 1, 1.0, 1.0),
        ("MixtralForCausalLM", EXPERTS, EXPERTS as f64 / 2.0, EXPERTS as f64 * 0.75),
    ] {
        let (from, to) = (dir.path().join(class), dir.path().join(format!("{class}.gguf")));
        checkpoint::model(class, "F32", 5).write(&from, 1);
        Command::cargo_bin("oxcart").unwrap().arg("quantize").args([&from, &to]).arg("F32").assert().success();
        let path = to.to_str().unwrap();
        let args =
            ["-m", path, "-t", "1", "-p", "80,2", "-n", "3", "-pg", "80,1", "-d", "0,7", "-ub", "40", "-o", "json"];
        let rows: Vec<Value> = serde_json::from_str(&done(&args).0).expect("JSON");
        let layers = |n: usize, experts: f64| (n * attention) as f64 + (n * expert) as f64 * experts;
        let token = layers(LAYERS, one) + output as f64;
        // Two walks of 40 tokens, of which the first asks for no logits, and the second for those of one token.
        let prompt = 2.0 * layers(LAYERS - 1, all as f64) + qkv as f64 + layers(1, one) + output as f64;
        let short = layers(LAYERS - 1, two) + layers(1, one) + output as f64;
        let kv = |positions: usize| (positions * position) as f64;
        let mut want = Vec::new();
        for depth in [0, 7] {
            want.extend([prompt, short, 3.0 * token + kv(3 * depth + 6), prompt + token + kv(depth + 81)]);
        }
        let read: Vec<f64> =
            rows.iter().map(|r| r["gb_per_s"].as_f64().unwrap() * r["avg_ns"].as_f64().unwrap()).collect();
        assert_eq!(read.len(), want.len());
        for (row, (read, want)) in rows.iter().zip(read.iter().zip(&want)) {
            assert!((read / want - 1.0).abs() < 1e-4, "{class}: {read} bytes, expected {want}: {row}");
        }
    }
}

#[test]
fn results_go_to_stderr_in_another_form() {
    let (out, err) = done(&["-p", "4", "-n", "1", "-o", "sql", "-oe", "md", "--progress", "-ctv", "bf16"]);
    let statements: Vec<&str> = out.lines().filter(|l| l.starts_with("INSERT INTO llama_bench (build, ")).collect();
    assert!(
        out.starts_with("CREATE TABLE IF NOT EXISTS llama_bench (\n  build TEXT,\n") && statements.len() == 2,
        "{out}"
    );
    assert!(statements.iter().all(|s| s.ends_with("');")) && !out.contains("samples"), "{out}");
    let table: Vec<&str> = err.lines().filter(|l| l.starts_with('|')).collect();
    assert!(table.len() == 4 && table[2].contains("|  f16/bf16 |"), "{err}");
    assert!(err.contains("bench: 2/2 tg1: run 1 of 1\n") && !err.contains("warm-up"), "{err}");
    let (_, err, code) = bench(&["-p", "4", "-n", "0", "-r", "1", "--progress"]);
    assert!(code == Some(0) && err.contains("bench: 1/1 pp4: warm-up\n"), "{err}");
}

#[test]
fn lists_that_are_none_are_usage_errors() {
    for args in [
        ["-p", "4-"],
        ["-n", "1-8*1"],
        ["-b", "0"],
        ["-ub", "0-4"],
        ["-t", "4097"],
        ["-d", "-1"],
        ["-o", "xml"],
        ["-r", "0"],
    ] {
        let (out, err, code) = bench(&args);
        assert!(code == Some(2) && out.is_empty() && err.contains("invalid value"), "{args:?}: {code:?} {err}");
    }
}
