//! `oxcart inspect` as it is used: the whole, one section, one key, as JSON.

#[path = "common/gguf_file.rs"]
mod gguf_file;

use gguf_file::{array, string, valid};
use serde_json::{Value, json};
use std::process::Command;

/// Runs `oxcart inspect FILE ARGS` on the valid file and returns stdout.
fn inspect(args: &[&str]) -> String {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("valid.gguf");
    std::fs::write(&path, valid().bytes()).unwrap();
    let mut c = Command::new(assert_cmd::cargo::cargo_bin!("oxcart"));
    let out = c.arg("inspect").arg(&path).args(args).output().unwrap();
    assert!(out.status.success() && out.stderr.is_empty(), "{args:?}: {out:?}");
    String::from_utf8(out.stdout).unwrap().replace(path.to_str().unwrap(), "valid.gguf")
}

fn json_of(args: &[&str]) -> Value {
    serde_json::from_str(&inspect(&[&["--json"], args].concat())).unwrap()
}

#[test]
fn text_is_aligned() {
    let want = "\
valid.gguf: GGUF version 3, 3.19 KiB

tensors: 5
  token_embd.weight       f32    64 x 5      1.25 KiB
  blk.0.attn_norm.weight  f16    64             128 B
  blk.0.ffn-down.weight   q8_0   32 x 3 x 2     204 B
  blk.0.ffn_up.weight     q4_K  256 x 2         288 B
  output.weight           i8     66              66 B

types and totals
  type  tensors  weights      size   share     bits
  f32         1      320  1.25 KiB  65.1 %  32.0000
  q4_K        1      512     288 B  14.6 %   4.5000
  q8_0        1      192     204 B  10.4 %   8.5000
  f16         1       64     128 B   6.5 %  16.0000
  i8          1       66      66 B   3.4 %   8.0000  oxcart does not compute with this type
  all         5    1,154  1.92 KiB          13.6291

memory at a context of 512 (trained for 512)
  weights     1.92 KiB  mapped from the file
  KV cache   64.00 KiB  keys f16, values f16: 128 B a token
  buffers   897.25 KiB  about, for batches of 512 tokens
  all       963.17 KiB
";
    assert_eq!(inspect(&["--tensors", "--summary"]), want);
    let all = inspect(&[]);
    for line in [
        "metadata: 25 keys",
        "  command-r.hyphen-ated          u32               7",
        "  type.i64                       i64               -9223372036854775808",
        "  type.f32                       f32               0.000001",
        "  list.strings                   array of strings  [\"<s>\", \"\", \"Ġthe\", \"你好\"]",
        "  list.lists                     array of arrays   [[1, 2], [x]]",
        "tensors: 5",
        "types and totals",
    ] {
        assert!(all.lines().any(|l| l == line), "lacks {line:?}:\n{all}");
    }
}

#[test]
fn json_has_the_same() {
    let o = json_of(&[]);
    let metadata = &o["metadata"];
    for (key, want) in [
        ("type.u64", json!({"type": "u64", "value": u64::MAX})),
        ("type.f32", json!({"type": "f32", "value": 1e-6})),
        ("type.bool", json!({"type": "bool", "value": true})),
        ("list.i32", json!({"type": "array of i32", "len": 3, "first": [1, -1, 3]})),
        ("list.lists", json!({"type": "array of arrays", "len": 2, "first": [[1, 2], ["x"]]})),
        ("general.name", json!({"type": "string", "value": "the small valid file"})),
    ] {
        assert_eq!(metadata[key], want, "{key}");
    }
    assert_eq!(metadata.as_object().map(|m| m.len()), Some(25));
    let want = json!({"name": "blk.0.ffn_up.weight", "dims": [256, 2], "type": "q4_K", "weights": 512, "bytes": 288});
    assert_eq!(o["tensors"][3], want);
    assert_eq!((&o["version"], &o["parameters"], &o["tensor_bytes"]), (&json!(3), &json!(1154), &json!(1966)));
    assert_eq!(o["types"][4]["supported"], json!(false));
    assert_eq!(json_of(&["--summary"])["tensors"], Value::Null);
}

#[test]
fn memory_follows_context_and_cache_types() {
    let kv = |args: &[&str]| json_of(&[&["--summary"], args].concat())["memory"]["kv_cache"].clone();
    // One layer, two KV heads of 16 keys and 16 values.
    assert_eq!(kv(&["-c", "1024"]), json!(1024 * 2 * (16 + 16) * 2));
    assert_eq!(kv(&["-c", "1000"]), json!(1008 * 2 * (16 + 16) * 2));
    assert_eq!(kv(&["-c", "1024", "--cache-type-k", "q8_0"]), json!(1024 * 2 * (16 + 2 + 16 * 2)));
}

#[test]
fn a_key_is_shown_in_full() {
    assert_eq!(inspect(&["--key", "list.strings"]), "<s>\n\nĠthe\n你好\n");
    assert_eq!(inspect(&["--key", "list.i32", "--key", "general.name"]), "1\n-1\n3\nthe small valid file\n");
    assert_eq!(json_of(&["--key", "list.bool"]), json!({"list.bool": [false, true]}));
    assert_eq!(inspect(&["--key", "list.lists"]), "[1, 2]\n[x]\n");
    let oxcart = || Command::new(assert_cmd::cargo::cargo_bin!("oxcart"));
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("v.gguf");
    // More elements, and longer ones, than a summary has.
    let long = "x".repeat(200);
    let lists = [array(0, 9, &[1, 2, 3, 4, 5, 6, 7, 8, 9]), array(8, 1, &string(&long))].concat().repeat(4);
    std::fs::write(&path, valid().key("many.lists", 9, &array(9, 8, &lists)).bytes()).unwrap();
    let out = oxcart().arg("inspect").arg(&path).args(["--key", "many.lists"]).output().unwrap();
    let want = format!("[1, 2, 3, 4, 5, 6, 7, 8, 9]\n[{long}]\n").repeat(4);
    assert_eq!(String::from_utf8_lossy(&out.stdout), want);
    std::fs::write(&path, valid().bytes()).unwrap();
    let out = oxcart().arg("inspect").arg(&path).args(["--key", "no.such"]).output().unwrap();
    let text = format!("oxcart: {}: no.such: missing\n", path.display());
    assert_eq!((out.status.code(), String::from_utf8_lossy(&out.stderr).into_owned()), (Some(1), text));
}
