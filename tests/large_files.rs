//! What the files of large models are like: many parts, tensors beyond 4 GiB, offsets beyond 2^32; and parts that are
//! missing, cut short or another model's.

#[path = "common/gguf_file.rs"]
mod gguf_file;

use assert_cmd::cargo::cargo_bin;
use gguf_file::{GgufFile, array, valid};
use oxcart::engine::{Engine, EngineOptions, SessionOptions};
use oxcart::gguf::{Gguf, GgufWriter, NewTensor, Parts, Unfinished};
use oxcart::model::Batch;
use std::fs;
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::Arc;

/// The default model in `count` parts.
fn split(dir: &Path, count: usize) -> Vec<PathBuf> {
    let g = Gguf::open(&oxcart::catalog::default_model().expect("the default model can be fetched")).unwrap();
    let tensors: Vec<NewTensor> =
        g.tensors().iter().map(|t| NewTensor { name: t.name.clone(), dims: t.dims.clone(), kind: t.kind }).collect();
    let n = tensors.len();
    let parts = Parts::Tensors((0..count).map(|i| (i + 1) * n / count - i * n / count).collect());
    let metadata = g.metadata().map(|(k, v)| (k.to_string(), v.clone()));
    let to = dir.join("m.gguf");
    let mut w = GgufWriter::create_resumable(&to, metadata, tensors, &parts, Unfinished::Replace).unwrap();
    g.tensors().iter().for_each(|t| w.tensor(&t.name, t.bytes()).unwrap());
    w.finish().unwrap()
}

fn run(model: &Path, more: &[&str]) -> Command {
    let mut c = Command::new(cargo_bin("oxcart"));
    c.env("OXCART_CONFIG", "/dev/null").args(["run", "-t", "2", "-p", "The cart", "--temp", "0", "-m"]).arg(model);
    c.args(more).stdout(Stdio::piped()).stderr(Stdio::piped());
    c
}

/// The one line that says why the program failed; anything else is a panic here.
fn refused(out: &Output) -> String {
    let talk = String::from_utf8_lossy(&out.stderr);
    assert_eq!(out.status.code(), Some(1), "{talk}");
    let lines: Vec<&str> = talk.lines().filter_map(|l| l.strip_prefix("oxcart: ")).collect();
    assert!(lines.len() == 1 && !talk.contains("panicked"), "{talk}");
    lines[0].to_string()
}

#[test]
fn thirty_parts_are_one_model_and_a_bad_one_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let parts = split(dir.path(), 30);
    assert_eq!(parts.len(), 30);
    let text = |model: &Path, more: &[&str]| {
        let out = run(model, &["-n", "12"]).args(more).output().unwrap();
        assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
        out.stdout
    };
    let want = text(&oxcart::catalog::default_model().unwrap(), &[]);
    assert_eq!(text(&parts[29], &[]), want);
    assert_eq!(text(&parts[13], &["--resident-memory", "40M"]), want, "from the disk");

    // Cut short in use: with weights mapped and with weights streamed.
    let cut = |path: &Path, len: u64| fs::OpenOptions::new().write(true).open(path).unwrap().set_len(len).unwrap();
    let (bad, name) = (&parts[17], "m-00018-of-00030.gguf");
    let kept = fs::read(bad).unwrap();
    for more in [&["-c", "4096"][..], &["-c", "4096", "--resident-memory", "0"]] {
        let mut child = run(&parts[0], more).spawn().unwrap();
        child.stdout.as_mut().unwrap().read_exact(&mut [0; 20]).unwrap();
        cut(bad, 4096);
        let said = refused(&child.wait_with_output().unwrap());
        let problem = format!("4096 bytes, expected {}: it was cut short while in use", kept.len());
        assert!(said.contains(name) && said.contains(&problem), "{said}");
        fs::write(bad, &kept).unwrap();
    }
    assert_eq!(text(&parts[0], &[]), want, "whole again");

    // Cut short before, within a tensor's data and within what describes it.
    let fails = |says: &[&str]| {
        let said = refused(&run(&parts[0], &["-n", "1"]).output().unwrap());
        assert!(says.iter().all(|s| said.contains(s)), "{said}: lacks some of {says:?}");
    };
    let first = Gguf::open(&parts[0]).unwrap();
    let of_bad: usize = first.split()[..17].iter().sum();
    let mut of_other = first.tensors()[of_bad..][..first.split()[17]].iter();
    let last = of_other.next_back().unwrap();
    cut(bad, kept.len() as u64 - last.n_bytes() / 2);
    fails(&[name, &format!("tensor {}", last.name), "past the end of a file of"]);
    cut(bad, 100);
    fails(&[name, "tensor count: found", "more than a file of 100 bytes holds"]);
    fs::write(bad, "").unwrap();
    fails(&[name, "the file is empty"]);
    fs::remove_file(bad).unwrap();
    fails(&["part 18 of 30 is missing", name]);

    // The same part of a model of another width: nothing but the shapes tells.
    let number = |n: u16| n.to_le_bytes();
    let mut other = GgufFile::new().key("split.no", 2, &number(17)).key("split.count", 2, &number(30)).key(
        "split.tensors.count",
        5,
        &(first.tensors().len() as i32).to_le_bytes(),
    );
    for t in &first.tensors()[of_bad..][..first.split()[17]] {
        let dims: Vec<u64> = t.dims.iter().map(|d| d * 2).collect();
        other = other.tensor(&t.name, &dims, 0, 4 * dims.iter().product::<u64>() as usize);
    }
    fs::write(bad, other.bytes()).unwrap();
    fails(&[name, "tensor blk.", "dimensions [", "expected ["]);
    // And one of as many tensors by other names.
    fs::copy(&parts[16], bad).unwrap();
    fails(&[name, "split.no: found 16, expected 17"]);
    // And a file that is no part.
    fs::write(bad, valid().bytes()).unwrap();
    fails(&[name, "split."]);
}

/// A model of one layer whose embedding alone is larger than 4 GiB; almost all of the file is a hole. Its layer gives
/// nothing, so that logits are products of one row of the embedding and one of the output.
#[test]
fn tensors_beyond_4_gib_are_read_where_they_are() {
    const DIM: u64 = 256;
    const VOCAB: u64 = (1 << 22) + 8;
    const F32: u32 = 0;
    const TQ1_0: u32 = 34; // 256 weights in 54 bytes
    let mut f = GgufFile::new()
        .str("general.architecture", "llama")
        .u32("llama.block_count", 1)
        .u32("llama.context_length", 64)
        .u32("llama.embedding_length", DIM as u32)
        .u32("llama.feed_forward_length", 256)
        .u32("llama.attention.head_count", 4)
        .key("llama.attention.layer_norm_rms_epsilon", 6, &1e-6f32.to_le_bytes())
        .str("tokenizer.ggml.model", "gpt2")
        .str("tokenizer.ggml.pre", "gpt-2")
        .strs("tokenizer.ggml.tokens", &["a", "b"])
        .key("tokenizer.ggml.merges", 9, &array(8, 0, &[]));
    let mut next = 0;
    let mut tensor = |f: GgufFile, name: &str, dims: &[u64], kind: u32, n_bytes: u64| {
        let at = next;
        next += n_bytes.next_multiple_of(32);
        (f.info(name, dims, kind, at), at)
    };
    let (embedding, output, norm);
    (f, embedding) = tensor(f, "token_embd.weight", &[DIM, VOCAB], F32, DIM * VOCAB * 4);
    for name in ["attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"] {
        f = tensor(f, &format!("blk.0.{name}.weight"), &[DIM, 256], TQ1_0, 256 * 54).0;
    }
    for name in ["attn_norm", "ffn_norm"] {
        f = tensor(f, &format!("blk.0.{name}.weight"), &[DIM], F32, DIM * 4).0;
    }
    (f, output) = tensor(f, "output.weight", &[DIM, VOCAB], TQ1_0, VOCAB * 54);
    (f, norm) = tensor(f, "output_norm.weight", &[DIM], F32, DIM * 4);
    assert!(output > 1 << 32);

    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("large.gguf");
    let head = f.bytes();
    fs::write(&path, &head).unwrap();
    let file = fs::OpenOptions::new().write(true).open(&path).unwrap();
    file.set_len(head.len() as u64 + next).unwrap();
    let put = |at: u64, bytes: &[u8]| file.write_all_at(bytes, head.len() as u64 + at).unwrap();
    let row = |x: f32| [x; DIM as usize].map(f32::to_le_bytes).concat();
    put(norm, &row(1.0));
    // 2^22 + 5 is row 5, for whoever counts bytes in 32 bits.
    const LAST: u64 = (1 << 22) + 5;
    const FIRST: u64 = 5;
    put(embedding + LAST * DIM * 4, &row(2.0));
    put(embedding + FIRST * DIM * 4, &row(-2.0));
    // All weights 1, and all -1.
    let ternary = |byte: u8| [&[byte; 52][..], &[0x00, 0x3C]].concat();
    put(output + LAST * 54, &ternary(0xFF));
    put(output + FIRST * 54, &ternary(0x00));

    let e = Arc::new(Engine::open(&path, &EngineOptions { threads: 2, ..EngineOptions::default() }).unwrap());
    assert_eq!(e.gguf.tensors()[0].n_bytes(), DIM * VOCAB * 4);
    let o = SessionOptions { context: 8, ..SessionOptions::default() };
    for (token, sign) in [(LAST, 1.0), (FIRST, -1.0)] {
        let logits = e.session(&o).unwrap().forward(&Batch::of(&[token as u32], 0, 0)).unwrap();
        let seen: Vec<(u64, f32)> = (0..).zip(logits).filter(|l| l.1 != 0.0).collect();
        let near = |x: f32, want: f32| (x / want - 1.0).abs() < 0.01;
        assert!(
            matches!(seen[..], [(FIRST, a), (LAST, b)] if near(a, -256.0 * sign) && near(b, 256.0 * sign)),
            "{token}: {seen:?}"
        );
    }
}
