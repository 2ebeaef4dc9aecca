//! `oxcart compare` on the default model and a smaller one made from it.

use assert_cmd::Command;
use serde_json::Value;
use std::fs;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::Stdio;

fn oxcart(args: &[&str], dir: &Path) -> (String, String, Option<i32>) {
    let mut c = Command::cargo_bin("oxcart").expect("the binary is built");
    let o = c.current_dir(dir).args(args).env("OXCART_CACHE", dir.join("cache")).output().expect("it runs");
    let text = |b: Vec<u8>| String::from_utf8(b).expect("UTF-8");
    (text(o.stdout), text(o.stderr), o.status.code())
}

#[test]
fn models_stand_side_by_side_against_the_first() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let model = oxcart::catalog::default_model().expect("the default model can be fetched");
    let model = model.to_str().expect("UTF-8");
    let (_, err, code) = oxcart(&["quantize", "--allow-requantize", "--pure", model, "q4_0.gguf", "Q4_0"], dir);
    assert_eq!(code, Some(0), "{err}");
    let words = ["ship", "crew", "captain", "harbour", "anchor", "storm", "lantern"];
    let line =
        |i: usize| format!("In the {} watch of day {i} the {} saw the {}.\n", i % 7, words[i % 7], words[i * 3 % 5]);
    fs::write(dir.join("text"), (0..60).map(line).collect::<String>()).unwrap();
    let common = ["-f", "text", "-c", "64", "--chunks", "4"];
    let compare = |more: &[&str]| {
        let (out, err, code) =
            oxcart(&[&["compare", "-t", "1", model, "q4_0.gguf", model][..], &common, more].concat(), dir);
        assert_eq!(code, Some(0), "{err}");
        out
    };
    let all: Value = serde_json::from_str(&compare(&["-o", "json", "--plot", "plot.svg"])).unwrap();
    let [reference, small, same] = &all["models"].as_array().unwrap()[..] else { panic!("{all}") };
    assert!(reference["divergence"].is_null() && all["chunks"] == 4, "{all}");
    let kld = |m: &Value| m["divergence"]["kld"]["value"].as_f64().unwrap();
    assert!(kld(same).abs() < 1e-6 && same["divergence"]["same_top"]["value"] == 1.0, "{same}");
    assert!(kld(small) > 0.01, "{small}");
    assert!(small["size_bytes"].as_u64() < reference["size_bytes"].as_u64(), "{all}");
    assert!(small["bits_per_weight"].as_f64() < reference["bits_per_weight"].as_f64(), "{all}");
    // What the same measurements say one by one.
    let one = |args: &[&str]| -> Value {
        let (out, err, code) = oxcart(&[&["perplexity", "-t", "1", "--json", "-b", "512"][..], args].concat(), dir);
        assert_eq!(code, Some(0), "{err}");
        serde_json::from_str(&out).unwrap()
    };
    let base = one(&[&["-m", model, "--kl-divergence-base", "base"][..], &common].concat());
    let alone = one(&["-m", "q4_0.gguf", "--kl-divergence", "--kl-divergence-base", "base"]);
    assert_eq!((&base["ppl"], &base["ppl_error"]), (&reference["ppl"], &reference["ppl_error"]));
    assert_eq!(alone["ppl"]["value"], small["divergence"]["ppl"]["value"]);
    let off = alone["kld"]["value"].as_f64().unwrap() / kld(small) - 1.0;
    assert!(off.abs() < 1e-3, "a base file of 16 bits against f32: {off}");
    // Killed as soon as something is saved, it goes on to the same figures; only the speed is another.
    let figures = |csv: &str| -> Vec<String> {
        csv.lines().map(|l| l.rsplit_once(',').expect("columns").0.to_string()).collect()
    };
    let args = ["compare", "-t", "1", model, "q4_0.gguf", model, "-f", "text", "-c", "64", "-b", "64", "-o", "csv"];
    let mut command = std::process::Command::new(assert_cmd::cargo::cargo_bin("oxcart"));
    command.current_dir(dir).args(args).env("OXCART_CACHE", dir.join("cache"));
    let mut child = command.stderr(Stdio::piped()).stdout(Stdio::null()).spawn().unwrap();
    let mut lines = BufReader::new(child.stderr.take().unwrap()).lines().map_while(Result::ok);
    assert!(lines.any(|l| l.contains("seconds per pass")), "it ended before anything was saved");
    child.kill().unwrap();
    child.wait().unwrap();
    let (resumed, err, code) = oxcart(&[&args[..], &["--resume"]].concat(), dir);
    assert!(code == Some(0) && err.contains("compare: resuming behind ") && !err.contains("perplexity: "), "{err}");
    assert_eq!(figures(&resumed), figures(&oxcart(&args, dir).0));
    let table = compare(&[]);
    let lines: Vec<&str> = table.lines().collect();
    assert!(lines.len() == 5 && lines.iter().all(|l| l.matches('|').count() == 9), "{table}");
    let widths: Vec<usize> = lines.iter().map(|l| l.chars().count()).collect();
    assert!(widths.iter().all(|w| *w == widths[0]), "{table}");
    // Two files of one name are told apart by their folders.
    fs::create_dir(dir.join("sub")).unwrap();
    fs::copy(dir.join("q4_0.gguf"), dir.join("sub/q4_0.gguf")).unwrap();
    let here = dir.join("q4_0.gguf");
    let twins =
        ["compare", "-t", "1", here.to_str().unwrap(), "sub/q4_0.gguf", "-f", "text", "-c", "64", "--chunks", "1"];
    let (out, err, code) = oxcart(&twins, dir);
    let own = format!("| {}/q4_0 ", dir.file_name().unwrap().to_str().unwrap());
    assert!(code == Some(0) && out.contains("| sub/q4_0 ") && out.contains(&own), "{out}{err}");
    let csv = compare(&["-o", "csv"]);
    assert!(csv.lines().count() == 4 && csv.lines().all(|l| l.matches(',').count() == 10), "{csv}");
    let svg = fs::read_to_string(dir.join("plot.svg")).unwrap();
    assert!(svg.starts_with("<svg ") && svg.ends_with("</svg>\n") && svg.contains(">q4_0</text>"), "{svg}");
    fs::write(dir.join("short"), "short").unwrap();
    let cases: &[(&[&str], i32, &str)] = &[
        (&["compare", model, "-f", "text"], 2, "MODEL"),
        (&["compare", model, model, "-f", "short"], 1, "short: 1 tokens, expected at least 1024"),
        (&["compare", model, "missing.gguf", "-f", "text"], 1, "missing.gguf"),
        (&["compare", model, model, "-f", "missing"], 1, "missing: "),
        (&["compare", model, model, "-f", "text", "-c", "3"], 2, "expected 4 to 2^24 tokens"),
    ];
    for (args, status, says) in cases {
        let (_, err, code) = oxcart(args, dir);
        assert!(code == Some(*status) && err.contains(says), "{args:?}: {code:?} {err}");
    }
}
