//! `oxcart bench` with llama-bench's lists and forms, on the default model.

use assert_cmd::Command;
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
    let args: Vec<&str> = args.split(' ').chain(["-m", model, "-m", "SmolLM2-135M-Instruct"]).collect();
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
    for args in
        [["-p", "4-"], ["-n", "1-8*1"], ["-b", "0"], ["-ub", "0-4"], ["-t", "4097"], ["-d", "-1"], ["-o", "xml"]]
    {
        let (out, err, code) = bench(&args);
        assert!(code == Some(2) && out.is_empty() && err.contains("invalid value"), "{args:?}: {code:?} {err}");
    }
}
