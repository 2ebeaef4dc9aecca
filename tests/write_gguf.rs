//! What is written is what was read: copies byte for byte, parts that join to the whole, nothing half-written.

#[path = "common/gguf_file.rs"]
mod gguf_file;

use gguf_file::{GgufFile, valid};
use oxcart::gguf::{
    GGUFValueType, Gguf, GgufError, GgufWriter, MetadataArray, MetadataValue, NewTensor, Parts, Strings, TensorKind,
    Value,
};
use std::fs;
use std::path::{Path, PathBuf};

fn metadata(g: &Gguf) -> Vec<(String, Value)> {
    g.metadata().map(|(k, v)| (k.to_string(), v.clone())).collect()
}

fn tensors(g: &Gguf) -> Vec<NewTensor> {
    g.tensors().iter().map(|t| NewTensor { name: t.name.clone(), dims: t.dims.clone(), kind: t.kind }).collect()
}

/// Copies a file, its data in pieces of `piece` bytes.
fn copy(from: &Path, to: &Path, parts: &Parts, piece: usize) -> Vec<PathBuf> {
    let g = Gguf::open(from).unwrap();
    let mut w = GgufWriter::create(to, metadata(&g), tensors(&g), parts).unwrap();
    for t in g.tensors() {
        assert_eq!(w.due().map(|d| d.name.as_str()), Some(t.name.as_str()));
        match piece {
            usize::MAX => w.tensor(&t.name, t.bytes()).unwrap(),
            _ => t.bytes().chunks(piece).for_each(|c| w.push(c).unwrap()),
        }
    }
    assert!(w.due().is_none());
    let planned: Vec<PathBuf> = w.paths().map(Path::to_path_buf).collect();
    let paths = w.finish().unwrap();
    assert_eq!(paths, planned);
    paths
}

fn names(dir: &Path) -> Vec<String> {
    let mut names: Vec<_> = fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn a_copy_is_the_file() {
    let dir = tempfile::tempdir().unwrap();
    let (from, to) = (dir.path().join("from.gguf"), dir.path().join("to.gguf"));
    let larger = valid().u32("general.alignment", 64);
    let larger = GgufFile { alignment: 64, ..GgufFile { infos: Vec::new(), data: Vec::new(), ..larger } };
    let larger = larger.tensor("a", &[3], 0, 12).tensor("b", &[32, 7], 2, 7 * 18);
    for (what, bytes) in [
        ("valid", valid().bytes()),
        ("alignment 64", larger.bytes()),
        ("metadata alone", GgufFile::new().u32("a-b.c", 1).bytes()),
        ("nothing", GgufFile::new().bytes()),
    ] {
        fs::write(&from, &bytes).unwrap();
        for piece in [1, 7, 64, usize::MAX] {
            assert_eq!(copy(&from, &to, &Parts::One, piece), std::slice::from_ref(&to));
            assert!(fs::read(&to).unwrap() == bytes, "{what} in pieces of {piece}");
        }
    }
    assert_eq!(names(dir.path()), ["from.gguf", "to.gguf"]);
}

#[test]
fn parts_join_to_the_whole() {
    let dir = tempfile::tempdir().unwrap();
    let from = dir.path().join("from.gguf");
    let source = (0..9).fold(valid(), |f, i| f.tensor(&format!("blk.{i}.x"), &[256, 1 + i], 8, 272 * (1 + i as usize)));
    fs::write(&from, source.bytes()).unwrap();
    for max in [1, 1000, 2500, 4000, 8000, 1 << 20] {
        let out = tempfile::tempdir().unwrap();
        let paths = copy(&from, &out.path().join("m.gguf"), &Parts::Size(max), 100);
        let count = paths.len();
        match max {
            1 => assert_eq!(count, 14, "a tensor each"),
            1048576 => assert_eq!(paths, [out.path().join("m.gguf")], "one is enough"),
            _ => assert!((2..14).contains(&count), "{max}: {count} parts"),
        }
        for (i, p) in paths.iter().enumerate().filter(|_| count > 1) {
            assert_eq!(*p, out.path().join(format!("m-{:05}-of-{count:05}.gguf", i + 1)));
            let size = fs::metadata(p).unwrap().len();
            // The first has all the metadata; a part with one tensor is as large as that is.
            let one = size < 300 + 272 * 9;
            assert!(size <= max || one || i == 0, "{max}: {} has {size}", p.display());
        }
        assert_eq!(names(out.path()).len(), count);
        let back = out.path().join("back.gguf");
        copy(&paths[count / 2], &back, &Parts::One, usize::MAX);
        assert!(fs::read(&back).unwrap() == source.bytes(), "{max}");
    }
}

#[test]
fn values_of_every_type_are_written() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("new.gguf");
    let kinds = ["command-r.tokens", "falcon-h1.scores", "x.flags"];
    let strings: Strings = ["a", "", "ß"].into_iter().collect();
    let array =
        |element, values| Value::from(MetadataValue::Array(Box::new(MetadataArray::new(element, values).unwrap())));
    let metadata = vec![
        ("general.architecture".to_string(), MetadataValue::String("command-r".into()).into()),
        (kinds[0].to_string(), Value::Strings(strings)),
        (kinds[1].to_string(), array(GGUFValueType::F32, vec![MetadataValue::F32(0.5), MetadataValue::F32(-1.0)])),
        (kinds[2].to_string(), array(GGUFValueType::Bool, vec![MetadataValue::Bool(true)])),
        ("z".to_string(), MetadataValue::I64(-9).into()),
    ];
    GgufWriter::create(&path, metadata, vec![], &Parts::One).unwrap().finish().unwrap();
    let g = Gguf::open(&path).unwrap();
    let keys: Vec<_> = g.metadata().map(|(k, _)| k).collect();
    assert_eq!(keys, ["general.architecture", kinds[0], kinds[1], kinds[2], "z"]);
    assert_eq!(g.strings(kinds[0]).unwrap().unwrap().iter().collect::<Vec<_>>(), ["a", "", "ß"]);
    assert_eq!(g.floats(kinds[1]).unwrap(), Some(vec![0.5, -1.0]));
    assert_eq!(g.value(kinds[2]).unwrap().to_string(), "[true]");
    assert_eq!(g.float("z").unwrap(), Some(-9.0));
}

fn new(name: &str, dims: &[u64], kind: u32) -> NewTensor {
    NewTensor { name: name.into(), dims: dims.to_vec(), kind: TensorKind::from_id(kind).unwrap() }
}

#[test]
fn what_cannot_be_read_is_not_written() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("m.gguf");
    let one = || Value::from(MetadataValue::U32(1));
    let key = |k: &str| (k.to_string(), one());
    let cases = [
        (vec![key("")], vec![], "a key of 0 bytes"),
        (vec![key("a"), key("a")], vec![], "a: stands twice"),
        (vec![("general.alignment".into(), MetadataValue::U32(24).into())], vec![], "found 24"),
        (vec![], vec![new("", &[1], 0)], "a name of 0 bytes"),
        (vec![], vec![new(&"n".repeat(64), &[1], 0)], "a name of 64 bytes"),
        (vec![], vec![new("t", &[1], 0), new("t", &[2], 0)], "tensor t: stands twice"),
        (vec![], vec![new("t", &[], 0)], "tensor t: dimensions []"),
        (vec![], vec![new("t", &[1, 0], 0)], "tensor t: dimensions [1, 0]"),
        (vec![], vec![new("t", &[100], 12)], "tensor t: 100 columns, not a multiple of 256 (q4_K)"),
        (vec![], vec![new("t", &[1 << 40, 1 << 40], 0)], "overflow"),
        (vec![], vec![new("t", &[1 << 62], 0)], "overflow"),
    ];
    for (metadata, tensors, says) in cases {
        let error = GgufWriter::create(&path, metadata, tensors, &Parts::One).err().map(|e| e.to_string());
        assert!(error.as_ref().is_some_and(|e| e.contains(says)), "{says}: {error:?}");
    }
    assert!(names(dir.path()).is_empty());
    let nowhere = dir.path().join("absent").join("m.gguf");
    assert!(GgufWriter::create(&nowhere, vec![], vec![], &Parts::One).is_err());
}

#[test]
fn an_unfinished_file_leaves_the_old_one() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("m.gguf");
    fs::write(&path, "old").unwrap();
    let start =
        |parts: &Parts| GgufWriter::create(&path, vec![], vec![new("a", &[4], 0), new("b", &[4], 0)], parts).unwrap();
    type Misuse = fn(&mut GgufWriter) -> Result<(), GgufError>;
    let misuses: [(&str, Misuse); 6] = [
        ("due are 16", |w| w.tensor("b", &[0; 16])),
        ("due are 16", |w| w.tensor("a", &[0; 15])),
        ("given 17 bytes, expected 16", |w| w.push(&[0; 17])),
        ("due are 8", |w| w.push(&[0; 8]).and_then(|()| w.tensor("a", &[0; 16]))),
        ("after the last", |w| w.push(&[0; 16]).and_then(|()| w.push(&[0; 16])).and_then(|()| w.push(&[0]))),
        ("after the last", |w| w.push(&[0; 16]).and_then(|()| w.push(&[0; 16])).and_then(|()| w.tensor("c", &[]))),
    ];
    for parts in [Parts::One, Parts::Size(1)] {
        for (says, misuse) in misuses {
            let error = misuse(&mut start(&parts)).unwrap_err().to_string();
            assert!(error.contains(says), "{says}: {error}");
        }
        let mut w = start(&parts);
        w.push(&[0; 24]).unwrap_err();
        w.push(&[0; 16]).unwrap();
        w.push(&[0; 3]).unwrap();
        assert!(w.finish().unwrap_err().to_string().contains("tensor b"), "finished too early");
        assert_eq!(names(dir.path()), ["m.gguf"]);
        assert_eq!(fs::read(&path).unwrap(), b"old");
    }
    let (mut one, mut other) = (start(&Parts::One), start(&Parts::One));
    for w in [&mut one, &mut other] {
        w.tensor("a", &[1; 16]).unwrap();
        w.tensor("b", &[2; 16]).unwrap();
    }
    one.finish().unwrap();
    drop(other);
    assert_eq!(Gguf::open(&path).unwrap().tensor("b").unwrap().bytes()[..], [2; 16]);
    assert_eq!(names(dir.path()), ["m.gguf"]);
}
