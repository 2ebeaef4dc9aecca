//! Files that mean no good: each is refused with one line that names the file and the field, in bounded memory, without a
//! panic. And the odd ones that are valid: version 2, split and cut files.

#[path = "common/gguf_file.rs"]
mod gguf_file;

use gguf_file::{GgufFile, array, string, valid};
use oxcart::gguf::Gguf;
use proptest::prelude::*;
use proptest::test_runner::TestRunner;
use std::fmt::Write;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use tempfile::TempDir;

fn dir() -> TempDir {
    tempfile::tempdir().unwrap()
}

/// Writes a file of a folder.
fn put(dir: &TempDir, name: &str, bytes: &[u8]) -> PathBuf {
    let path = dir.path().join(name);
    // A new file: some file systems write one that was truncated to the disk at once, 5 ms each.
    if path.exists() {
        fs::remove_file(&path).unwrap();
    }
    fs::write(&path, bytes).unwrap();
    path
}

/// Everything that can be asked of a file, as text.
fn describe(g: &Gguf) -> String {
    let mut out = String::new();
    for (k, v) in g.metadata() {
        writeln!(out, "{k}: {} {v} {:?}", v.type_name(), v.array_len()).unwrap();
        // Of the wrong type these are errors, which must not be panics either.
        let asked = (g.str(k).ok(), g.uint(k).ok(), g.float(k).ok(), g.bool(k).ok(), g.ints(k).ok(), g.floats(k).ok());
        let strings = g.strings(k).ok().flatten().map(|s| s.iter().map(str::to_string).collect::<Vec<_>>());
        writeln!(out, "{asked:?} {strings:?}").unwrap();
    }
    for t in g.tensors() {
        assert_eq!(t.bytes().len() as u64, t.n_bytes());
        writeln!(out, "{} {:?} {} {} {:?}", t.name, t.dims, t.kind, t.n_elements(), &t.bytes()[..]).unwrap();
        assert!(g.tensor(&t.name).is_some());
    }
    out
}

/// What is wrong with an error message: it must be one line that begins with the file, and print nothing but text.
fn bad_message(text: &str, file: &Path) -> Option<String> {
    let named = text.strip_prefix(&format!("{}: ", file.display()));
    match named {
        None => Some(format!("does not begin with the file: {text:?}")),
        Some(rest) if rest.chars().any(char::is_control) => Some(format!("has control characters: {text:?}")),
        Some(rest) if rest.len() > 700 => Some(format!("is {} bytes long: {text:.200?}", rest.len())),
        Some(_) => None,
    }
}

/// Opens, and says what is wrong if it is neither a file nor a good error; `None` for a file.
fn refused(path: &Path) -> Result<Option<String>, String> {
    match Gguf::open(path) {
        Ok(g) => {
            describe(&g);
            Ok(None)
        }
        Err(e) => match bad_message(&e.to_string(), path) {
            None => Ok(Some(e.to_string())),
            Some(bad) => Err(bad),
        },
    }
}

struct Case {
    name: &'static str,
    bytes: Vec<u8>,
    /// What the error says beside the file.
    says: &'static [&'static str],
}

fn case(name: &'static str, file: &GgufFile, says: &'static [&'static str]) -> Case {
    Case { name, bytes: file.bytes(), says }
}

/// A description with data long enough for it.
fn info(name: &str, dims: &[u64], kind: u32, offset: u64) -> GgufFile {
    GgufFile::new().tensor("a", &[8], 0, 32).info(name, dims, kind, offset)
}

fn nested(depth: usize) -> Vec<u8> {
    [array(9, 1, &[]).repeat(depth), array(0, 0, &[])].concat()
}

fn with(change: impl FnOnce(&mut GgufFile)) -> GgufFile {
    let mut f = valid();
    change(&mut f);
    f
}

fn aligned(by: u32) -> GgufFile {
    GgufFile::new().u32("general.alignment", by).tensor("a", &[8], 0, 32)
}

fn cases() -> Vec<Case> {
    let raw = |name, bytes: &[u8], says| Case { name, bytes: bytes.to_vec(), says };
    let one = GgufFile::new;
    let big_endian = [&b"GGUF"[..], &3u32.to_be_bytes(), &0u64.to_be_bytes(), &0u64.to_be_bytes()].concat();
    vec![
        // The beginning.
        raw("empty", b"", &["open", "empty"]),
        raw("one byte", b"G", &["magic", "cut short"]),
        raw("text", b"hello, I am a text and not a model", &["magic", "hell", "GGUF"]),
        raw("git-lfs pointer", b"version https://git-lfs.github.com/spec/v1\n", &["magic", "git-lfs"]),
        raw("web page", b"<!DOCTYPE html><html><body>404</body></html>", &["magic", "web page"]),
        raw("ggjt", b"tjgg\x03\0\0\0aaaaaaaaaaaaaaaaaaaaaaa", &["magic", "before GGUF"]),
        raw("control characters", b"\x1b[2J\n\0\0\0aaaaaaaaaaaaaaaaaaaa", &["magic"]),
        raw("big-endian", &big_endian, &["version", "big-endian"]),
        case("version 0", &with(|f| f.version = 0), &["version", "found 0"]),
        case("version 1", &with(|f| f.version = 1), &["version", "found 1", "2 or 3"]),
        case("version 4", &with(|f| f.version = 4), &["version", "found 4"]),
        case("version 2^32-1", &with(|f| f.version = u32::MAX), &["version", "4294967295"]),
        // Counts.
        case("2^64-1 keys", &with(|f| f.n_keys = Some(u64::MAX)), &["metadata count", "18446744073709551615"]),
        case("2^40 keys", &with(|f| f.n_keys = Some(1 << 40)), &["metadata count", "1099511627776"]),
        case("2^63 tensors", &with(|f| f.n_tensors = Some(1 << 63)), &["tensor count"]),
        case("2^40 tensors", &with(|f| f.n_tensors = Some(1 << 40)), &["tensor count"]),
        case("a key too many", &GgufFile { n_keys: Some(2), ..one().str("a", &"b".repeat(99)) }, &["key 1"]),
        case("a tensor too many", &GgufFile { n_tensors: Some(2), ..aligned(32) }, &["tensor 1"]),
        // Keys.
        case("empty key", &one().u32("", 1), &["key 0", "empty"]),
        case("key not UTF-8", &one().key(b"a\xff\xfe", 4, &[0; 4]), &["key 0", "UTF-8"]),
        case("key of 2^64-1", &one().key("", 4, &[0; 4]).key([0xff; 8], 4, &[0; 4]), &["key 0"]),
        raw(
            "key length of 2^64-1",
            &[&one().bytes()[..16], &1u64.to_le_bytes(), &[0xff; 64]].concat(),
            &["key 0", "18446744073709551615"],
        ),
        case("key too long", &one().u32(&"k".repeat(70_000), 1), &["key 0", "70000"]),
        case("key twice", &one().u32("a.b", 1).str("a.b", "x"), &["a.b", "twice"]),
        case("key with a newline", &one().u32("a\nb\x1b[31m", 1).u32("a\nb\x1b[31m", 1), &["a\\nb", "twice"]),
        // Values.
        case("value type 13", &one().key("k", 13, &[0; 8]), &["k:", "type 13"]),
        case("value type 2^32-1", &one().key("k", u32::MAX, &[0; 8]), &["k:", "4294967295"]),
        case("bool 2", &one().key("k", 7, &[2]), &["k:", "boolean"]),
        case("bool 2 in an array", &one().key("k", 9, &array(7, 3, &[0, 1, 2])), &["k[2]", "found", "bool 2"][..1]),
        case("string of 2^64-1", &one().key("k", 8, &[0xff; 8]), &["k:", "18446744073709551615"]),
        case("string of 2^40", &one().key("k", 8, &(1u64 << 40).to_le_bytes()), &["k:"]),
        case(
            "string past the end",
            &one().key("k", 8, &[&200u64.to_le_bytes()[..], b"abc"].concat()),
            &["k:", "cut short"],
        ),
        case("string not UTF-8", &one().key("k", 8, &string(b"\xc3\x28")), &["k:", "UTF-8"]),
        case("surrogate", &one().key("k", 8, &string(b"\xed\xa0\x80")), &["k:", "UTF-8"]),
        // Arrays.
        case("array of 2^64-1 u64", &one().key("k", 9, &array(10, u64::MAX, &[0; 64])), &["k:", "array"]),
        case("array of 2^61 u64, times 8 is 0", &one().key("k", 9, &array(10, 1 << 61, &[0; 64])), &["k:", "array"]),
        case("array of 2^40 strings", &one().key("k", 9, &array(8, 1 << 40, &[0; 64])), &["k:", "array"]),
        case(
            "array a byte too short",
            &GgufFile { alignment: 1, ..one() }.key("k", 9, &array(4, 3, &[0; 11])),
            &["k:", "array"],
        ),
        case("array of type 77", &one().key("k", 9, &array(77, 1, &[0; 64])), &["k:", "element type 77"]),
        case(
            "strings past the end",
            &GgufFile { alignment: 1, ..one() }.key("k", 9, &array(8, 3, &[string("a"), string("b")].concat())),
            &["k"],
        ),
        case(
            "string of strings not UTF-8",
            &one().key("k", 9, &array(8, 2, &[string("a"), string(b"\x80")].concat())),
            &["k[1]", "UTF-8"],
        ),
        case("string of strings of 2^64-8", &one().key("k", 9, &array(8, 1, &(u64::MAX - 7).to_le_bytes())), &["k"]),
        case("nested 100 deep", &one().key("k", 9, &nested(100)), &["k:", "nesting"]),
        case("nested 100,000 deep", &one().key("k", 9, &nested(100_000)), &["k:", "nesting"]),
        case("nested of 2^64-1", &one().key("k", 9, &array(9, 1, &array(0, u64::MAX, &[0; 64]))), &["k:"]),
        case(
            "3 MB of empty arrays",
            &one().key("k", 9, &array(9, 250_000, &array(0, 0, &[]).repeat(250_000))),
            &["k:", "nested"],
        ),
        // Alignment.
        case("alignment 0", &aligned(0), &["general.alignment", "found 0"]),
        case("alignment 24", &aligned(24), &["general.alignment", "found 24", "power of two"]),
        case("alignment 2^31", &aligned(1 << 31), &["general.alignment"]),
        case("alignment 2^32-8", &aligned(u32::MAX - 7), &["general.alignment"]),
        case("alignment a string", &one().str("general.alignment", "32"), &["general.alignment", "string"]),
        case("alignment larger than the file", &aligned(1 << 30), &["tensor a", "past the end"]),
        // Tensors.
        case("empty name", &one().tensor("", &[8], 0, 32), &["tensor 0", "empty"]),
        case("name of 2000 bytes", &one().tensor(&"n".repeat(2000), &[8], 0, 32), &["tensor 0", "2000"]),
        case("name not UTF-8", &one().info(b"\xff", &[8], 0, 0), &["tensor 0", "UTF-8"]),
        case("tensor twice", &info("a", &[8], 0, 32), &["tensor a", "twice"]),
        case("no dimensions", &info("b", &[], 0, 32), &["tensor b", "0 dimensions"]),
        case("five dimensions", &info("b", &[1; 5], 0, 32), &["tensor b", "5 dimensions"]),
        case("dimension of 0", &info("b", &[8, 0], 0, 32), &["tensor b", "[8, 0]"]),
        case("dimensions of 2^64-1", &info("b", &[u64::MAX; 4], 0, 32), &["tensor b", "overflow"]),
        case("dimensions of 2^32 each", &info("b", &[1 << 32, 1 << 32], 0, 32), &["tensor b", "overflow"]),
        case("2^62 doubles", &info("b", &[1 << 62], 28, 32), &["tensor b", "overflow"]),
        case("columns no whole blocks", &info("b", &[4097, 2], 12, 32), &["tensor b", "4097", "256", "q4_K"]),
        case("out of the file", &info("b", &[8], 0, 32), &["tensor b", "past the end"]),
        case("far out of the file", &one().info("b", &[1 << 50], 0, 0), &["tensor b", "past the end"]),
        case("offset of 2^64-32", &info("b", &[8], 0, u64::MAX - 31), &["tensor b", "18446744073709551584"]),
        case("offset not aligned", &info("b", &[8], 0, 33), &["tensor b", "33", "alignment 32"]),
        case(
            "overlap",
            &one().tensor("a", &[32], 0, 128).info("b", &[8], 0, 64),
            &["tensor b", "overlaps tensor a", "128"],
        ),
        case("same place", &info("b", &[8], 0, 0), &["tensor b", "overlaps tensor a"]),
        case("gap", &one().tensor("a", &[8], 0, 128).info("b", &[8], 0, 64), &["tensor b", "gap after tensor a", "32"]),
        case("first not at 0", &one().tensor("a", &[64], 0, 256).info("b", &[8], 0, 32), &["tensor b"]),
        case("name with escapes", &info("b\x1b]0;x\x07\n", &[8, 0], 0, 32), &["tensor b", "[8, 0]"]),
        // Types.
        case("type 4", &info("b", &[32], 4, 32), &["tensor b", "q4_2"]),
        case("type 5", &info("b", &[32], 5, 32), &["tensor b", "q4_3"]),
        case("type 31", &info("b", &[32], 31, 32), &["tensor b", "q4_0_4_4"]),
        case("type 33", &info("b", &[32], 33, 32), &["tensor b", "q4_0_8_8"]),
        case("type 36", &info("b", &[32], 36, 32), &["tensor b", "iq4_nl_4_4", "i2_s"]),
        case("type 38", &info("b", &[32], 38, 32), &["tensor b", "iq4_nl_8_8"]),
        case("type 133", &info("b", &[32], 133, 32), &["tensor b", "q6_0", "ik_llama.cpp"]),
        case("type 139", &info("b", &[256], 139, 32), &["tensor b", "iq4_k", "ik_llama.cpp"]),
        case("type 158", &info("b", &[256], 158, 32), &["tensor b", "iq1_kt"]),
        case("type 202", &info("b", &[256], 202, 32), &["tensor b", "interleaved"]),
        case("type 43", &info("b", &[256], 43, 32), &["tensor b", "43"]),
        case("type 2^32-1", &info("b", &[256], u32::MAX, 32), &["tensor b", "4294967295"]),
        // Splits by metadata.
        case("a part by another name", &one().u32("split.count", 3), &["split.count", "3 parts", "of-NNNNN.gguf"]),
        case("split.count a string", &one().str("split.count", "3"), &["split.count", "string", "integer"]),
        case("split.count negative", &one().key("split.count", 5, &(-1i32).to_le_bytes()), &["split.count", "-1"]),
    ]
}

#[test]
fn hostile_files_are_refused_by_name() {
    let (dir, mut failures) = (dir(), Vec::new());
    for c in cases() {
        let path = put(&dir, "hostile.gguf", &c.bytes);
        match refused(&path) {
            Ok(None) => failures.push(format!("{}: was accepted", c.name)),
            Ok(Some(text)) => {
                let missing: Vec<_> = c.says.iter().filter(|s| !text.contains(**s)).collect();
                if !missing.is_empty() {
                    failures.push(format!("{}: lacks {missing:?}: {text}", c.name));
                }
            }
            Err(bad) => failures.push(format!("{}: {bad}", c.name)),
        }
    }
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

/// The program: exit status 1, one line on stderr, nothing on stdout, in 256 MiB of address space.
#[test]
fn the_program_says_one_line_and_fails() {
    let (dir, mut failures) = (dir(), Vec::new());
    let limited = || {
        let exe = assert_cmd::cargo::cargo_bin!("oxcart");
        let mut c = Command::new(if cfg!(target_os = "linux") { "sh" } else { exe.to_str().unwrap() });
        if cfg!(target_os = "linux") {
            c.args(["-c", "ulimit -v 262144; exec \"$0\" \"$@\""]).arg(exe);
        }
        c
    };
    let mut check = |name: &str, path: &Path, want: i32| {
        let out = limited().arg("inspect").arg(path).output().unwrap();
        let stderr = String::from_utf8_lossy(&out.stderr).into_owned();
        let line = stderr.strip_prefix("oxcart: ").and_then(|s| s.strip_suffix('\n'));
        if out.status.code() != Some(want) {
            failures.push(format!("{name}: {}, expected {want}: {stderr}", out.status));
        } else if want == 1 && !out.stdout.is_empty() {
            failures.push(format!("{name}: {} bytes on stdout", out.stdout.len()));
        } else if want == 1 {
            failures
                .extend(line.map_or(Some(stderr.clone()), |l| bad_message(l, path)).map(|b| format!("{name}: {b}")));
        }
    };
    for c in cases() {
        check(c.name, &put(&dir, "hostile.gguf", &c.bytes), 1);
    }
    check("absent", &dir.path().join("absent.gguf"), 1);
    check("a folder", dir.path(), 1);
    check("a missing part", &put(&dir, "x-00001-of-00002.gguf", &GgufFile::new().u32("split.count", 2).bytes()), 1);
    check("valid", &put(&dir, "valid.gguf", &valid().bytes()), 0);
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

/// Where the last tensor ends; what is cut behind it is padding.
fn end_of_data(bytes: &[u8]) -> usize {
    bytes.len() - (96 - 66)
}

#[test]
fn a_file_cut_at_any_byte_is_refused() {
    let (dir, mut failures) = (dir(), Vec::new());
    for version in [2, 3] {
        let whole = with(|f| f.version = version).bytes();
        for n in 0..=whole.len() {
            let path = put(&dir, "cut.gguf", &whole[..n]);
            match refused(&path) {
                Ok(None) if n < end_of_data(&whole) => failures.push(format!("{n} bytes: was accepted")),
                Ok(Some(text)) if n >= end_of_data(&whole) => failures.push(format!("{n} bytes: {text}")),
                Err(bad) => failures.push(format!("{n} bytes: {bad}")),
                _ => {}
            }
        }
    }
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

/// Counts that a file is large enough for, though there is nothing in it: it is no reason to take memory or time.
#[test]
fn a_large_file_of_nothing_is_refused() {
    let dir = dir();
    let zeros = |n: u64| GgufFile::new().key("k", 9, &array(8, n, &[]));
    let numbers = GgufFile::new().key("k", 9, &array(0, 1 << 33, &[]));
    let bools = GgufFile::new().key("k", 9, &array(7, 1 << 33, &[]));
    let text = GgufFile::new().key("k", 8, &(1u64 << 33).to_le_bytes());
    let count = |n_keys, n_tensors| GgufFile { n_keys, n_tensors, ..GgufFile::new() };
    let files = [
        ("strings", zeros(1 << 30)),
        ("numbers", numbers),
        ("bools", bools),
        ("text", text),
        ("keys", count(Some(1 << 29), None)),
        ("tensors", count(None, Some(1 << 28))),
    ];
    for (name, file) in files {
        let path = put(&dir, "sparse.gguf", &file.bytes());
        fs::File::options().write(true).open(&path).unwrap().set_len(16 << 30).unwrap();
        assert!(matches!(refused(&path), Ok(Some(_))), "{name}");
    }
}

#[test]
fn version_2_is_version_3() {
    let dir = dir();
    let texts: Vec<String> = [2, 3]
        .into_iter()
        .map(|v| {
            let g = Gguf::open(&put(&dir, "v.gguf", &with(|f| f.version = v).bytes())).unwrap();
            assert_eq!(g.version(), v);
            describe(&g)
        })
        .collect();
    assert_eq!(texts[0], texts[1]);
}

#[test]
fn values_are_read_by_the_type_wanted() {
    let dir = dir();
    let path = put(&dir, "v.gguf", &valid().bytes());
    let mut g = Gguf::open(&path).unwrap();
    assert_eq!(g.uint("command-r.hyphen-ated").unwrap(), Some(7));
    assert_eq!(g.uint("type.u8").unwrap(), Some(250));
    assert_eq!(g.uint("type.u64").unwrap(), Some(u64::MAX));
    assert_eq!(g.float("type.f32").unwrap(), Some(1e-6));
    assert_eq!(g.float("type.i16").unwrap(), Some(-2.0));
    assert_eq!(g.bool("type.bool").unwrap(), Some(true));
    assert_eq!(g.str("general.architecture").unwrap(), Some("llama"));
    assert_eq!(g.ints("list.i32").unwrap(), Some(vec![1, -1, 3]));
    assert_eq!(g.floats("list.f32").unwrap(), Some(vec![1.0, 2.0]));
    assert_eq!(g.floats("list.i32").unwrap(), Some(vec![1.0, -1.0, 3.0]));
    assert_eq!(g.ints("list.empty").unwrap(), Some(vec![]));
    let strings: Vec<_> = g.strings("list.strings").unwrap().unwrap().iter().collect();
    assert_eq!(strings, ["<s>", "", "Ġthe", "你好"]);
    assert_eq!(g.uint("absent").unwrap(), None);
    let keys: Vec<_> = g.metadata().map(|(k, _)| k).collect();
    assert_eq!((keys[0], keys[8], keys.len()), ("general.architecture", "command-r.hyphen-ated", 25));
    assert_eq!(g.tensor("output.weight").unwrap().format(), None);
    assert!(g.tensors().iter().all(|t| t.bytes().is_mapped()));

    let wrong = [
        (g.uint("type.i8").unwrap_err(), "type.i8: found i8 -6, expected a non-negative integer"),
        (g.uint("type.bool").unwrap_err(), "type.bool: found bool true, expected a non-negative integer"),
        (g.str("type.u8").unwrap_err(), "type.u8: found u8 250, expected a string"),
        (g.bool("type.u8").unwrap_err(), "type.u8: found u8 250, expected a bool"),
        (g.ints("list.strings").map(|_| ()).unwrap_err(), "expected an array of integers"),
        (
            g.ints("list.f32").map(|_| ()).unwrap_err(),
            "list.f32: found array of f32 [1, 2], expected an array of integers",
        ),
        (g.strings("list.i32").map(|_| ()).unwrap_err(), "expected an array of strings"),
        (g.float("general.name").unwrap_err(), "general.name: found string the small valid file, expected a number"),
    ];
    for (error, says) in wrong {
        let text = error.to_string();
        assert!(text.starts_with(&format!("{}: ", path.display())) && text.ends_with(says), "{text}");
    }

    for spec in ["a=int:-5", "b=float:2.5", "c=bool:true", "general.name=str:other=name:x", "llama.block_count=int:9"] {
        g.override_kv(spec).unwrap();
    }
    assert_eq!(g.float("a").unwrap(), Some(-5.0));
    assert_eq!(g.float("b").unwrap(), Some(2.5));
    assert_eq!(g.bool("c").unwrap(), Some(true));
    assert_eq!(g.str("general.name").unwrap(), Some("other=name:x"));
    assert_eq!(g.uint("llama.block_count").unwrap(), Some(9));
    assert_eq!(g.metadata().last().map(|(k, _)| k), Some("c"));
    for spec in ["", "a", "a=", "=int:1", "a=int", "a=int:x", "a=int:1.5", "a=bool:yes", "a=u32:1", "a=float:"] {
        assert!(g.override_kv(spec).is_err(), "{spec}");
    }
}

/// A file cut anywhere, in two and in three, is the whole file, whichever piece is given.
#[test]
fn cut_files_equal_the_whole() {
    let whole_dir = dir();
    let whole = valid().bytes();
    let want = describe(&Gguf::open(&put(&whole_dir, "m.gguf", &whole)).unwrap());
    for cut in (1..whole.len()).step_by(3) {
        let dir = dir();
        let ends = [0, cut, cut + (whole.len() - cut) / 2, whole.len()];
        let names = ["m.gguf.a", "m.gguf.b", "m.gguf.c"];
        let paths: Vec<PathBuf> = (0..3).map(|i| put(&dir, names[i], &whole[ends[i]..ends[i + 1]])).collect();
        let g = Gguf::open(&paths[cut % 3]).unwrap();
        assert_eq!(describe(&g), want, "cut at {ends:?}");
        assert_eq!((g.parts(), g.file_size()), (&paths[..], whole.len() as u64));
        let copied = g.tensors().iter().filter(|t| !t.bytes().is_mapped()).count();
        assert!(copied <= 2, "{copied} tensors copied for two cuts");
    }
    for names in
        [["n.gguf.part1of2", "n.gguf.part2of2"], ["n.gguf-split-a", "n.gguf-split-b"], ["n.gguf.aa", "n.gguf.ab"]]
    {
        let dir = dir();
        let paths = [put(&dir, names[0], &whole[..777]), put(&dir, names[1], &whole[777..])];
        for path in &paths {
            assert_eq!(describe(&Gguf::open(path).unwrap()), want, "{}", path.display());
        }
        fs::remove_file(&paths[0]).unwrap();
        let text = Gguf::open(&paths[1]).err().unwrap().to_string();
        assert!(text.contains(names[0]), "{text}");
    }
}

/// The parts of a split file: all metadata in the first, tensors in all.
fn split(count: u32) -> Vec<GgufFile> {
    let tell = |f: GgufFile, no: u32| {
        f.key("split.no", 2, &(no as u16).to_le_bytes()).key("split.count", 2, &(count as u16).to_le_bytes()).key(
            "split.tensors.count",
            5,
            &count.to_le_bytes(),
        )
    };
    (0..count)
        .map(|no| {
            let f = GgufFile::new();
            let f = if no == 0 { f.str("general.architecture", "llama") } else { f };
            tell(f, no).tensor(&format!("blk.{no}.weight"), &[8, 1 + no as u64], 0, 32 * (1 + no as usize))
        })
        .collect()
}

fn put_split(dir: &TempDir, parts: &[GgufFile], count: usize) -> Vec<PathBuf> {
    let name = |i: usize| format!("m-{:05}-of-{count:05}.gguf", i + 1);
    parts.iter().enumerate().map(|(i, f)| put(dir, &name(i), &f.bytes())).collect()
}

#[test]
fn split_files_open_from_any_part() {
    let dir = dir();
    let paths = put_split(&dir, &split(3), 3);
    let whole = (0..3u64)
        .fold(GgufFile::new(), |f, no| f.tensor(&format!("blk.{no}.weight"), &[8, 1 + no], 0, 32 * (1 + no as usize)));
    let whole = Gguf::open(&put(&dir, "whole.gguf", &whole.bytes())).unwrap();
    let tensors =
        |g: &Gguf| -> Vec<_> { g.tensors().iter().map(|t| (t.name.clone(), t.dims.clone(), t.n_bytes())).collect() };
    for path in &paths {
        let g = Gguf::open(path).unwrap();
        assert_eq!((g.path(), g.parts()), (path.as_path(), &paths[..]));
        assert_eq!(tensors(&g), tensors(&whole));
        assert!(g.tensors().iter().all(|t| t.bytes().is_mapped() && t.bytes().len() as u64 == t.n_bytes()));
        assert_eq!(g.str("general.architecture").unwrap(), Some("llama"));
        assert_eq!(g.file_size(), paths.iter().map(|p| fs::metadata(p).unwrap().len()).sum::<u64>());
    }
}

#[test]
fn bad_splits_are_refused() {
    let (mut failures, all) = (Vec::new(), split(3));
    let foreign = |f: GgufFile| [all[0].clone(), f, all[2].clone()];
    let part = |no: u16, count: u16, total: u32| {
        GgufFile::new().key("split.no", 2, &no.to_le_bytes()).key("split.count", 2, &count.to_le_bytes()).key(
            "split.tensors.count",
            4,
            &total.to_le_bytes(),
        )
    };
    let cases: Vec<(&str, Vec<GgufFile>, &[&str])> = vec![
        ("last missing", all[..2].to_vec(), &["part 3 of 3 is missing", "m-00003-of-00003.gguf"]),
        ("swapped", vec![all[0].clone(), all[2].clone(), all[1].clone()], &["split.no", "found 2, expected 1"]),
        ("of another count", foreign(part(1, 4, 3)).to_vec(), &["split.count", "found 4, expected 3"]),
        ("of another total", foreign(part(1, 3, 9)).to_vec(), &["split.tensors.count", "found 9, expected 3"]),
        ("no part at all", foreign(GgufFile::new()).to_vec(), &["split.no", "found nothing, expected 1"]),
        (
            "same tensor",
            foreign(part(1, 3, 3).tensor("blk.0.weight", &[8], 0, 32)).to_vec(),
            &["tensor blk.0.weight", "earlier"],
        ),
        ("a tensor less", foreign(part(1, 3, 3)).to_vec(), &["split.tensors.count", "found 2", "expected 3"]),
        (
            "a cut part",
            foreign(GgufFile { n_keys: Some(99), ..part(1, 3, 3) }).to_vec(),
            &["m-00002-of-00003.gguf", "metadata count"],
        ),
    ];
    for (name, parts, says) in cases {
        let dir = dir();
        let paths = put_split(&dir, &parts, 3);
        let text = Gguf::open(&paths[0]).err().map_or("was accepted".into(), |e| e.to_string());
        let missing: Vec<_> = says.iter().filter(|s| !text.contains(**s)).collect();
        if !missing.is_empty() || text.contains('\n') {
            failures.push(format!("{name}: lacks {missing:?}: {text}"));
        }
    }
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

/// Flipped bits and replaced words of a valid file: opened or refused, never a panic, in one piece or in two.
#[test]
fn damaged_files_do_not_panic() {
    let (dir, valid) = (dir(), valid().bytes());
    let n = valid.len();
    let flips = prop::collection::vec((0..n, 0..8u32), 0..6);
    let word = prop::sample::select(vec![0, 1, 8, 9, 255, 1 << 31, 1 << 40, u64::MAX / 8, u64::MAX]);
    let words = prop::collection::vec((0..n - 8, word), 0..3);
    let config = ProptestConfig { cases: 1500, failure_persistence: None, ..ProptestConfig::default() };
    let result = TestRunner::new(config).run(&(flips, words, 1..n), |(flips, words, cut)| {
        let mut bytes = valid.clone();
        flips.into_iter().for_each(|(at, bit)| bytes[at] ^= 1 << bit);
        words.into_iter().for_each(|(at, word): (usize, u64)| bytes[at..at + 8].copy_from_slice(&word.to_le_bytes()));
        let whole = refused(&put(&dir, "m.gguf", &bytes));
        prop_assert!(whole.is_ok(), "{whole:?}");
        put(&dir, "m.gguf.b", &bytes[cut..]);
        let parts = refused(&put(&dir, "m.gguf.a", &bytes[..cut]));
        prop_assert!(parts.is_ok(), "{parts:?}");
        prop_assert_eq!(whole.is_ok_and(|w| w.is_none()), parts.is_ok_and(|p| p.is_none()));
        Ok(())
    });
    if let Err(e) = result {
        panic!("{e}");
    }
}
