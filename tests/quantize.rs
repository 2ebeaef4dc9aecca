//! `oxcart quantize` on a small model: recipes, what is refused, and that nothing half-written stays.

use assert_cmd::Command;
use oxcart::gguf::{Gguf, GgufWriter, MetadataValue, NewTensor, Parts, TensorKind, Value};
use oxcart_quant::Format;
use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStderr, Stdio};
use std::time::{Duration, Instant};

const LAYERS: usize = 8;

/// A model of eight layers in F16, three KV heads, and one matrix whose width is no multiple of 256. `poison` becomes the
/// first weight of the last layer's ffn_down.
fn model(path: &Path, poison: Option<u16>) {
    let text = |s: &str| Value::from(MetadataValue::String(s.into()));
    let number = |n: u32| Value::from(MetadataValue::U32(n));
    let metadata = vec![
        ("general.architecture".to_string(), text("llama")),
        ("general.file_type".to_string(), number(1)),
        ("llama.block_count".to_string(), number(LAYERS as u32)),
        ("llama.attention.head_count".to_string(), number(6)),
        ("llama.attention.head_count_kv".to_string(), number(3)),
    ];
    let (f32, f16) = (TensorKind::from_id(0).unwrap(), TensorKind::from_id(1).unwrap());
    let mut tensors =
        vec![("token_embd.weight".to_string(), vec![256, 40], f16), ("output.weight".to_string(), vec![256, 40], f16)];
    for i in 0..LAYERS {
        tensors.push((format!("blk.{i}.attn_norm.weight"), vec![256], f32));
        tensors.push((format!("blk.{i}.attn_v.weight"), vec![256, 9], f16));
        tensors.push((format!("blk.{i}.attn_output.weight"), vec![256, 8], f16));
        tensors.push((format!("blk.{i}.ffn_up.weight"), vec![256, 288], f16));
        tensors.push((format!("blk.{i}.ffn_down.weight"), vec![288, 8], f16));
    }
    let tensors: Vec<_> = tensors.into_iter().map(|(name, dims, kind)| NewTensor { name, dims, kind }).collect();
    let mut w = GgufWriter::create(path, metadata, tensors.clone(), &Parts::One).unwrap();
    let mut state = 1u64;
    for t in &tensors {
        let mut bytes = vec![0; t.n_bytes().unwrap() as usize];
        for b in bytes.as_chunks_mut::<2>().0 {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            // An f16 in ±[1/64, 1/2), also where it is one half of an f32.
            *b = ((state >> 48) as u16 & 0x93FF | 0x2400).to_le_bytes();
        }
        if let Some(p) = poison.filter(|_| t.name == "blk.7.ffn_down.weight") {
            bytes[..2].copy_from_slice(&p.to_le_bytes());
        }
        w.tensor(&t.name, &bytes).unwrap();
    }
    w.finish().unwrap();
}

fn quantize(args: &[&str]) -> Command {
    let mut c = Command::cargo_bin("oxcart").unwrap();
    c.arg("quantize").args(args);
    c
}

#[test]
fn roles_and_layers_decide_formats() {
    let dir = tempfile::tempdir().unwrap();
    let (from, to) = (dir.path().join("from.gguf"), dir.path().join("to.gguf"));
    model(&from, None);
    let (from, to) = (from.to_str().unwrap(), to.to_str().unwrap());
    type Case<'a> = (&'a [&'a str], &'a [(&'a str, Format)]);
    let cases: &[Case<'_>] = &[
        (
            &["Q4_K_M"],
            &[
                ("output.weight", Format::Q6_K),
                ("token_embd.weight", Format::Q4_K),
                ("blk.0.attn_norm.weight", Format::F32),
                ("blk.0.attn_v.weight", Format::Q6_K),
                ("blk.1.attn_v.weight", Format::Q4_K),
                ("blk.3.attn_v.weight", Format::Q6_K),
                ("blk.7.attn_v.weight", Format::Q6_K),
                ("blk.0.ffn_down.weight", Format::Q8_0), // q6_K does not fit 288 columns
                ("blk.1.ffn_down.weight", Format::Q5_0),
                ("blk.1.ffn_up.weight", Format::Q4_K),
            ],
        ),
        (
            &["Q2_K"],
            &[
                ("blk.1.attn_v.weight", Format::Q3_K),
                ("blk.1.attn_output.weight", Format::Q3_K),
                ("blk.1.ffn_up.weight", Format::Q2_K),
                ("blk.1.ffn_down.weight", Format::Q4_0),
            ],
        ),
        (&["Q3_K_M", "--pure"], &[("output.weight", Format::Q3_K), ("blk.0.attn_v.weight", Format::Q3_K)]),
        (
            &["IQ4_XS", "--leave-output-tensor"],
            &[("output.weight", Format::F16), ("blk.0.ffn_down.weight", Format::Q5_1)],
        ),
        (
            &["Q8_0", "--output-tensor-type", "q6_k", "--token-embedding-type", "bf16"],
            &[
                ("output.weight", Format::Q6_K),
                ("token_embd.weight", Format::BF16),
                ("blk.7.ffn_up.weight", Format::Q8_0),
            ],
        ),
        (&["F32"], &[("output.weight", Format::F32), ("blk.0.ffn_up.weight", Format::F32)]),
    ];
    let mut wrong = Vec::new();
    for (args, want) in cases {
        quantize(&[&[from, to], *args].concat()).assert().success();
        let g = Gguf::open(Path::new(to)).unwrap();
        for (name, format) in *want {
            let got = g.tensor(name).unwrap().format();
            if got != Some(*format) {
                wrong.push(format!("{args:?} {name}: {got:?}, expected {format:?}"));
            }
        }
        assert_eq!(g.uint("general.quantization_version").unwrap(), Some(2));
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn threads_and_parts_do_not_change_the_weights() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_string();
    let (from, one, three, split) = (path("from.gguf"), path("one.gguf"), path("three.gguf"), path("split.gguf"));
    model(Path::new(&from), None);
    quantize(&[&from, &one, "Q5_K_M", "1"]).assert().success();
    quantize(&[&from, &three, "Q5_K_M", "3"]).assert().success();
    assert!(fs::read(&one).unwrap() == fs::read(&three).unwrap());
    // Where there is room for the stacks of three threads, which wait for faults and Ctrl-C, and sync.
    let (alone, binary) = (path("alone.gguf"), assert_cmd::cargo::cargo_bin("oxcart"));
    let line = format!("ulimit -v 18874368 && exec {} quantize {from} {alone} Q5_K_M 3", binary.display());
    Command::new("sh").args(["-c", &line]).env("RUST_MIN_STACK", (5u64 << 30).to_string()).assert().success();
    assert!(fs::read(&one).unwrap() == fs::read(&alone).unwrap());
    quantize(&[&from, &alone, "Q5_K_M", "4097"]).assert().code(2);
    quantize(&[&from, &split, "Q5_K_M", "--split-max-size", "100000"]).assert().success();
    let whole = Gguf::open(Path::new(&one)).unwrap();
    let files = fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().path());
    let is_first = |p: &PathBuf| p.to_string_lossy().contains("split-00001-of-");
    let parts = Gguf::open(&files.into_iter().find(is_first).unwrap()).unwrap();
    assert!(parts.parts().len() > 1);
    for t in whole.tensors() {
        assert!(**t.bytes() == **parts.tensor(&t.name).unwrap().bytes(), "{}", t.name);
    }
}

#[test]
fn what_cannot_be_done_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_string();
    let (from, nan, small, to) = (path("from.gguf"), path("nan.gguf"), path("small.gguf"), path("to.gguf"));
    model(Path::new(&from), None);
    model(Path::new(&nan), Some(0x7E00));
    quantize(&[&from, &small, "Q4_0"]).assert().success();
    let before = fs::read_dir(dir.path()).unwrap().count();
    let cases: &[(&[&str], &str)] = &[
        (&[&nan, &to, "Q4_K_M"], "tensor blk.7.ffn_down.weight: 1 of 2304 weights are NaN or infinite"),
        (&[&small, &to, "Q2_K"], "is q4_0 already; quantizing again loses twice (--allow-requantize)"),
        (&[&from, &from, "Q4_0"], "is also an input, expected another file"),
        (&[&from, &to, "Q4"], "expected one of F32 F16"),
        (&[&from, &to, "Q4_0", "--split-max-size", "1T"], "expected a number of bytes"),
    ];
    for (args, want) in cases {
        let out = quantize(args).assert().failure().get_output().clone();
        let said = String::from_utf8_lossy(&out.stderr);
        assert!(said.contains(want), "{args:?}: {said}");
    }
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), before, "files were left");
    quantize(&[&small, &to, "Q2_K", "--allow-requantize"]).assert().success();
}

/// What a format does not hold is refused, not written as infinity; what it just holds is written.
#[test]
fn weights_beyond_a_format_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_string();
    let (from, to) = (path("from.gguf"), path("to.gguf"));
    let of_blocks = |format| format!("are too large for {format}, or in a block with one that is");
    let cases = [
        ("F16", 6.5e4, None),
        ("F16", 6.6e4, Some("1 of 512 weights are too large for f16".to_string())),
        ("BF16", f32::MAX, Some("1 of 512 weights are too large for bf16".into())),
        ("Q4_0", 5e5, None),
        ("Q4_0", 6e5, Some(format!("32 of 512 weights {}", of_blocks("q4_0")))),
        ("Q5_1", 1e7, Some(of_blocks("q5_1"))),
        ("Q8_0", 8e6, None),
        ("Q8_0", 1e7, Some(of_blocks("q8_0"))),
        ("Q2_K", 1e7, Some(of_blocks("q2_K"))),
        ("IQ4_NL", 1e7, Some(of_blocks("iq4_nl"))),
        ("IQ3_S", 1e8, Some(of_blocks("iq3_s"))),
        ("TQ2_0", 1e7, Some(of_blocks("tq2_0"))),
        ("Q6_K", 1e8, None),
        ("Q4_K_M", 1e38, Some(of_blocks("q4_K"))),
        ("Q6_K", 1e38, Some(of_blocks("q6_K"))),
        ("Q6_K", f32::MAX, Some(of_blocks("q6_K"))),
        ("IQ4_XS", f32::MAX, Some(of_blocks("iq4_xs"))),
    ];
    let number = |n: u32| Value::from(MetadataValue::U32(n));
    let metadata = [
        ("general.architecture".to_string(), MetadataValue::String("llama".into()).into()),
        ("llama.block_count".to_string(), number(1)),
        ("llama.attention.head_count".to_string(), number(1)),
    ];
    let name = "blk.0.ffn_up.weight";
    let tensor = NewTensor { name: name.into(), dims: vec![256, 2], kind: TensorKind::from_id(0).unwrap() };
    let mut wrong = Vec::new();
    for (format, weight, refused) in cases {
        let mut weights: Vec<f32> = (0..512).map(|i| ((i * 37 % 64) as f32 - 32.0) / 64.0).collect();
        weights[300] = weight;
        let mut w = GgufWriter::create(Path::new(&from), metadata.clone(), vec![tensor.clone()], &Parts::One).unwrap();
        w.tensor(name, bytemuck::cast_slice(&weights)).unwrap();
        w.finish().unwrap();
        let out = quantize(&[&from, &to, format, "--pure"]).output().unwrap();
        let said = String::from_utf8_lossy(&out.stderr);
        let g = Gguf::open(Path::new(&to)).ok();
        let finite = g.map(|g| {
            let (t, mut back) = (g.tensor(name).unwrap(), vec![0.0; 512]);
            t.format().unwrap().dequant(t.bytes(), &mut back);
            back.iter().all(|x: &f32| x.is_finite()) && (back[300] / weight - 1.0).abs() < 0.2
        });
        let right = match &refused {
            Some(problem) => finite.is_none() && said.contains(&format!("tensor {name}: ")) && said.contains(problem),
            None => finite == Some(true),
        };
        if !right {
            wrong.push(format!("{format}, {weight}: kept {finite:?}; {said}"));
        }
        let _ = fs::remove_file(&to);
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn no_part_of_the_output_takes_the_place_of_what_is_read() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_string();
    let (from, to) = (path("from.gguf"), path("s.gguf"));
    model(Path::new(&from), None);
    quantize(&[&from, &to, "COPY", "--split-max-size", "300000"]).assert().success();
    let parts = || {
        let all = fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().path());
        let mut all: Vec<_> = all.filter(|p| p.to_string_lossy().contains("s-0000")).collect();
        all.sort();
        all.into_iter().map(|p| (p.clone(), fs::read(p).unwrap())).collect::<Vec<_>>()
    };
    let before = parts();
    assert!(before.len() > 1);
    let first = before[0].0.to_str().unwrap();
    fs::rename(&from, path("s.gguf.partial")).unwrap();
    for args in [
        [first, &to, "Q8_0", "--keep-split", "--allow-requantize"], // parts of the same names
        [&path("s.gguf.partial"), &to, "Q8_0", "--pure", "--allow-requantize"], // the name until the end
    ] {
        let out = quantize(&args).assert().failure().get_output().clone();
        let said = String::from_utf8_lossy(&out.stderr);
        assert!(said.contains("is also an input, expected another file"), "{args:?}: {said}");
        assert!(parts() == before && Path::new(&path("s.gguf.partial")).exists(), "{args:?}: the source is another");
    }
}

#[test]
fn a_dry_run_tells_the_size_and_writes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_string();
    let (from, to) = (path("from.gguf"), path("to.gguf"));
    model(Path::new(&from), None);
    let json = |args: &[&str]| {
        let out = quantize(args).arg("--json").assert().success().get_output().stdout.clone();
        serde_json::from_slice::<serde_json::Value>(&out).unwrap()
    };
    let dry = json(&[&from, &to, "Q4_K_M", "--dry-run"]);
    assert!(!Path::new(&to).exists());
    let real = json(&[&from, &to, "Q4_K_M", "--report"]);
    assert_eq!(dry["bytes"], real["bytes"]);
    assert_eq!(dry["file_bytes"], fs::metadata(&to).unwrap().len());
    let written: u64 = Gguf::open(Path::new(&to)).unwrap().tensors().iter().map(|t| t.n_bytes()).sum();
    assert_eq!(real["bytes"], written);
    let error = |name: &str| {
        let tensors = real["tensors"].as_array().unwrap();
        tensors.iter().find(|t| t["name"] == name).unwrap()["relative_rms_error"].as_f64()
    };
    assert_eq!(error("blk.0.attn_norm.weight"), None);
    let (four, six) = (error("token_embd.weight").unwrap(), error("output.weight").unwrap());
    assert!(six < four / 2.0 && six > 0.005 && four < 0.1, "{six} {four}");
}

/// A model of so many small tensors that what is said of them fills a pipe, where nobody reads it: then quantizing waits.
fn many_tensors(path: &Path) {
    const N: usize = 1500;
    let text = |s: &str| Value::from(MetadataValue::String(s.into()));
    let number = |n: u32| Value::from(MetadataValue::U32(n));
    let metadata = vec![
        ("general.architecture".to_string(), text("llama")),
        ("llama.block_count".to_string(), number(1)),
        ("llama.attention.head_count".to_string(), number(1)),
    ];
    let f16 = TensorKind::from_id(1).unwrap();
    let name = |i| format!("blk.0.{}.{i:04}.weight", "of-a-name-as-long-as-gguf-lets-it-be");
    let tensors: Vec<_> = (0..N).map(|i| NewTensor { name: name(i), dims: vec![64, 2], kind: f16 }).collect();
    let mut w = GgufWriter::create(path, metadata, tensors.clone(), &Parts::One).unwrap();
    for (i, t) in tensors.iter().enumerate() {
        let bytes: Vec<u8> =
            (0..128).flat_map(|j| (0x3000 + (i * 131 + j * 17) as u16 % 0x0800).to_le_bytes()).collect();
        w.tensor(&t.name, &bytes).unwrap();
    }
    w.finish().unwrap();
}

/// Quantizes until nobody reads any more, a while after the first sync was due.
fn stuck(from: &Path, to: &Path, args: &[&str]) -> (Child, BufReader<ChildStderr>) {
    let exe = assert_cmd::cargo::cargo_bin("oxcart");
    let mut c = std::process::Command::new(exe);
    c.arg("quantize").arg(from).arg(to).args(["Q8_0", "1"]).args(args).stdout(Stdio::null()).stderr(Stdio::piped());
    let mut child = c.spawn().unwrap();
    let mut said = BufReader::with_capacity(4096, child.stderr.take().unwrap());
    std::thread::sleep(Duration::from_millis(1500));
    // Some lines make room for some more, and for the note that is due.
    let note = to.with_extension("gguf.partial.json");
    let start = Instant::now();
    for _ in 0..300 {
        said.read_line(&mut String::new()).unwrap();
        if note.exists() {
            break;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    assert!(note.exists(), "no note in {:?}", start.elapsed());
    (child, said)
}

#[test]
fn what_was_stopped_is_gone_on_with() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    let (from, whole) = (path("from.gguf"), path("whole.gguf"));
    many_tensors(&from);
    let run = |to: &Path, args: &[&str]| {
        let (from, to) = (from.to_str().unwrap(), to.to_str().unwrap());
        let out = quantize(&[&[from, to, "Q8_0", "2"], args].concat()).output().unwrap();
        (out.status.success(), String::from_utf8_lossy(&out.stderr).into_owned())
    };
    assert!(run(&whole, &[]).0);
    let want = fs::read(&whole).unwrap();
    for (name, split) in [("killed", false), ("interrupted", false), ("parts", true)] {
        let args: &[&str] = if split { &["--split-max-size", "100000"] } else { &[] };
        let to = path(&format!("{name}.gguf"));
        let (mut child, said) = stuck(&from, &to, args);
        if !split {
            let (ok, said) = run(&to, &[]);
            assert!(!ok && said.contains("another process is writing it"), "{said}");
        }
        if name == "killed" {
            child.kill().unwrap();
            child.wait().unwrap();
        } else {
            let pid = child.id().to_string();
            assert!(std::process::Command::new("kill").args(["-INT", &pid]).status().unwrap().success());
            let last = said.lines().map(|l| l.unwrap()).last().unwrap();
            assert!(last.contains("stopped after ") && last.contains("--resume"), "{last}");
            assert_eq!(child.wait().unwrap().code(), Some(1));
        }
        assert!(!to.exists());
        let (from, to_arg) = (from.to_str().unwrap(), to.to_str().unwrap());
        if !split {
            let out = quantize(&[from, to_arg, "Q4_0", "--resume"]).output().unwrap();
            let said = String::from_utf8_lossy(&out.stderr).into_owned();
            assert!(said.contains("run without --resume"), "{said}");
        }
        let (ok, said) = run(&to, &[args, &["--resume"]].concat());
        let there = said.lines().find_map(|l| l.strip_suffix(" of 1500 tensors are there already"));
        assert!(ok && there.is_some_and(|n| n.parse::<usize>().unwrap() >= 300), "{name}: {said}");
        match split {
            false => assert!(fs::read(&to).unwrap() == want, "{name}: other bytes"),
            true => {
                let first = fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().path());
                let first = first.into_iter().find(|p| p.to_string_lossy().contains("parts-00001-of-")).unwrap();
                let (parts, whole) = (Gguf::open(&first).unwrap(), Gguf::open(&whole).unwrap());
                assert!(parts.parts().len() > 1);
                for t in whole.tensors() {
                    assert!(**t.bytes() == **parts.tensor(&t.name).unwrap().bytes(), "{}", t.name);
                }
            }
        }
    }
    let left = fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().path());
    let left: Vec<_> = left.filter(|p| p.to_string_lossy().contains("partial")).collect();
    assert!(left.is_empty(), "{left:?}");
    // Another source is no source to go on from.
    let to = path("other.gguf");
    let (mut child, _) = stuck(&from, &to, &[]);
    child.kill().unwrap();
    child.wait().unwrap();
    many_tensors(&from);
    let (ok, said) = run(&to, &["--resume"]);
    assert!(!ok && said.contains("from.gguf changed since; run without --resume"), "{said}");
    assert!(run(&to, &[]).0 && fs::read(&to).unwrap() == want);
}

#[test]
fn what_cannot_be_given_its_name_is_kept() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    let (from, to, whole) = (path("from.gguf"), path("to.gguf"), path("whole.gguf"));
    many_tensors(&from);
    let arg = |p: &Path| p.to_str().unwrap().to_string();
    quantize(&[&arg(&from), &arg(&whole), "Q8_0"]).assert().success();
    // A folder is told of at once, also where nothing would be written.
    fs::create_dir(&to).unwrap();
    for dry in [&[][..], &["--dry-run"]] {
        let out = quantize(&[&[arg(&from).as_str(), &arg(&to), "Q8_0"], dry].concat())
            .assert()
            .failure()
            .get_output()
            .clone();
        assert!(String::from_utf8_lossy(&out.stderr).contains("is a folder, expected the name of a file"));
    }
    // A device would not be written but replaced.
    let out = quantize(&[&arg(&from), "/dev/null", "Q8_0"]).assert().failure().get_output().clone();
    assert!(String::from_utf8_lossy(&out.stderr).contains("/dev/null: create: is not a regular file"));
    fs::remove_dir(&to).unwrap();
    // One that comes later keeps the file from its name, not from the disk.
    let (mut child, said) = stuck(&from, &to, &[]);
    fs::create_dir(&to).unwrap();
    let last = said.lines().map(|l| l.unwrap()).last().unwrap();
    assert!(
        last.contains("to.gguf: rename: ") && last.contains("is whole, in ") && last.ends_with("to.gguf.partial"),
        "{last}"
    );
    assert_eq!(child.wait().unwrap().code(), Some(1));
    assert!(fs::read(path("to.gguf.partial")).unwrap() == fs::read(&whole).unwrap());
    fs::remove_dir(&to).unwrap();
    let out = quantize(&[&arg(&from), &arg(&to), "Q8_0", "--resume"]).output().unwrap();
    let said = String::from_utf8_lossy(&out.stderr).into_owned();
    assert!(out.status.success() && said.contains("1500 of 1500 tensors are there already"), "{said}");
    assert!(fs::read(&to).unwrap() == fs::read(&whole).unwrap());
    assert!(!path("to.gguf.partial").exists() && !path("to.gguf.partial.json").exists());
}

#[test]
fn tensors_are_given_formats_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let (from, to) = (dir.path().join("from.gguf"), dir.path().join("to.gguf"));
    model(&from, None);
    let (from, to) = (from.to_str().unwrap(), to.to_str().unwrap());
    let types =
        ["--tensor-type", r"blk\.[0-3]\.ffn_up=Q8_0", "--tensor-type", "FFN_UP=q5_k", "--tensor-type", "ffn_down=q6_k"];
    quantize(&[&[from, to, "Q4_K_M", "--token-embedding-type", "q8_0"], &types[..]].concat()).assert().success();
    let g = Gguf::open(Path::new(to)).unwrap();
    for (name, want) in [
        ("blk.3.ffn_up.weight", Format::Q8_0),
        ("blk.4.ffn_up.weight", Format::Q5_K),
        ("blk.4.ffn_down.weight", Format::Q8_0), // q6_K does not fit 288 columns
        ("token_embd.weight", Format::Q8_0),
        ("output.weight", Format::Q6_K),
    ] {
        assert_eq!(g.tensor(name).unwrap().format(), Some(want), "{name}");
    }
    for bad in ["ffn_up", "=q8_0", "ffn_up=q9", "(=q8_0"] {
        quantize(&[from, to, "Q4_K_M", "--tensor-type", bad]).assert().code(2);
    }
}

#[test]
fn layers_are_left_out_and_the_others_numbered_anew() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    model(&path("in.gguf"), None);
    let (input, output) = (path("in.gguf"), path("out.gguf"));
    let args =
        |layers: &'static str| ["--prune-layers", layers, input.to_str().unwrap(), output.to_str().unwrap(), "COPY"];
    quantize(&args("0,3,4")).assert().success();
    let (old, new) = (Gguf::open(&input).unwrap(), Gguf::open(&output).unwrap());
    assert_eq!(new.uint("llama.block_count").unwrap(), Some(5));
    assert_eq!(new.tensors().len(), 2 + 5 * 5);
    for (i, was) in [1, 2, 5, 6, 7].into_iter().enumerate() {
        for role in ["attn_norm", "attn_v", "attn_output", "ffn_up", "ffn_down"] {
            let bytes = |g: &Gguf, i: usize| g.tensor(&format!("blk.{i}.{role}.weight")).unwrap().bytes().to_vec();
            assert_eq!(bytes(&new, i), bytes(&old, was), "{role} of layer {i}");
        }
    }
    fs::remove_file(&output).unwrap();
    for (layers, says) in [("8", "found 8 to be left out, expected 0 to 7"), ("0,1,2,3,4,5,6,7", "found all 8")] {
        let o = quantize(&args(layers)).assert().failure().get_output().clone();
        assert!(String::from_utf8_lossy(&o.stderr).contains(says), "{o:?}");
        assert!(!output.exists());
    }
    // Parts keep their tensors, also where none is left to one.
    let parts = path("parts.gguf");
    quantize(&[input.to_str().unwrap(), parts.to_str().unwrap(), "--split-max-size", "60000", "COPY"])
        .assert()
        .success();
    let first = fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().path());
    let first = first.filter(|p| p.to_str().unwrap().contains("-00001-of-")).min().expect("parts");
    let all =
        ["--keep-split", "--prune-layers", "0,1,2,3,4,5", first.to_str().unwrap(), output.to_str().unwrap(), "COPY"];
    quantize(&all).assert().success();
    let n = Gguf::open(&first).unwrap().split().len();
    let out = path(&format!("out-00001-of-{n:05}.gguf"));
    assert_eq!(Gguf::open(&out).unwrap().tensors().len(), 2 + 2 * 5);
    // Recipes go by the depth that there was: of eight layers, the first, the last and every third from the third on.
    quantize(&["--prune-layers", "2,5", input.to_str().unwrap(), output.to_str().unwrap(), "Q4_0"]).assert().success();
    assert_eq!(Gguf::open(&output).unwrap().uint("llama.block_count").unwrap(), Some(6));
}

#[test]
fn what_is_asked_for_and_means_nothing_is_told() {
    let dir = tempfile::tempdir().unwrap();
    let input = dir.path().join("in.gguf");
    model(&input, None);
    let run = |args: &[&str]| {
        let o = quantize(args).arg("--dry-run").arg(&input).args(["Q8_0", "0"]).output().unwrap();
        assert!(o.status.success(), "{o:?}");
        String::from_utf8(o.stderr).unwrap()
    };
    let said = run(&["--tensor-type", "ffn_dwon=q6_k", "--tensor-type", "ffn_down=q8_0", "--max-buffer-size", "64"]);
    assert!(said.contains("--tensor-type ffn_dwon: no tensor has such a name\n"), "{said}");
    assert!(!said.contains("ffn_down:") && said.contains("changes nothing here: --max-buffer-size\n"), "{said}");
    let said = run(&["--override-kv", "a=str:x,b=int:2", "--override-kv", "c=str:x, y"]);
    assert!(said.contains("--override-kv a: its text has \"b=int:2\" in it") && !said.contains("kv c"), "{said}");
}

/// A source that cannot be read any more ends the program at once. What it wrote and noted stays for --resume, as it was the
/// disk perhaps, and not the file; both or none.
#[test]
fn a_source_that_is_cut_leaves_what_can_be_gone_on_with() {
    let dir = tempfile::tempdir().unwrap();
    let (from, to) = (dir.path().join("from.gguf"), dir.path().join("to.gguf"));
    many_tensors(&from);
    let (mut child, mut said) = stuck(&from, &to, &[]);
    assert!(to.with_extension("gguf.partial").exists());
    // The note is there, and a moment later it counts.
    std::thread::sleep(std::time::Duration::from_millis(300));
    fs::File::options().write(true).open(&from).unwrap().set_len(4096).unwrap();
    let mut rest = String::new();
    std::io::Read::read_to_string(&mut said, &mut rest).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(1), "{rest}");
    assert!(rest.contains("it was cut short while in use"), "{rest}");
    let mut left: Vec<_> = fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
    left.sort();
    assert_eq!(left, ["from.gguf", "to.gguf.partial", "to.gguf.partial.json"]);
}
