//! Importance matrices: collected from the default model, joined, and used by `quantize`.

use assert_cmd::Command;
use oxcart::engine::{Engine, EngineOptions, Session, SessionOptions};
use oxcart::gguf::{Gguf, GgufWriter, MetadataValue, NewTensor, Parts, TensorKind, Value};
use oxcart::imatrix::collect::{Collector, read};
use oxcart::imatrix::{Entry, FileFormat, Imatrix};
use oxcart::perplexity::score;
use oxcart_quant::{Format, Quantizer};
use std::path::Path;
use std::sync::Arc;

/// Half of two such chunks, which are scored, go to the same kernel as the whole.
const CONTEXT: usize = 64;

fn text() -> String {
    (1..40).map(|i| format!("Cart {i} carried {} sacks of salt to the market at the river. ", 3 * i + 5)).collect()
}

fn oxcart(args: &[&str]) -> Command {
    let mut c = Command::cargo_bin("oxcart").unwrap();
    c.args(args);
    c
}

fn engine(threads: usize) -> Arc<Engine> {
    let path = oxcart::catalog::default_model().expect("the default model can be fetched");
    Arc::new(Engine::open(&path, &EngineOptions { threads, ..EngineOptions::default() }).expect("it opens"))
}

/// A session of two sequences that shows a collector what it computes.
fn watched(e: &Arc<Engine>) -> (Session, Arc<Collector>) {
    let mut s = e.session(&SessionOptions { context: CONTEXT, sequences: 2, ..SessionOptions::default() }).unwrap();
    let collector = Arc::new(Collector::new(&e.model.config, true));
    let c = collector.clone();
    s.observe(Arc::new(move |seen: &_| c.see(seen)));
    (s, collector)
}

#[test]
fn sums_are_those_of_the_inputs_on_any_number_of_threads() {
    let mut known: Option<Imatrix> = None;
    for threads in [1, 3] {
        let e = engine(threads);
        let tokens = e.tokenizer.encode(text().as_bytes(), true, false).unwrap();
        let (mut s, collector) = watched(&e);
        read(&mut s, &tokens, 0, 2).unwrap();
        let m = collector.imatrix(CONTEXT as u32).unwrap();
        // Seven matrices in each of thirty layers, and the output.
        assert_eq!((m.entries.len(), m.chunks), (7 * 30 + 1, 2));
        assert!(m.entries.values().all(|e| e.counts == [2 * CONTEXT as u64] && e.sums.iter().all(|&s| s > 0.0)));
        assert_eq!(m.entries["blk.29.ffn_down.weight"].sums.len(), 1536);
        assert_eq!(m.entries["blk.3.attn_v.weight"], m.entries["blk.3.attn_q.weight"]);
        assert_ne!(m.entries["blk.3.attn_v.weight"], m.entries["blk.3.ffn_up.weight"]);

        // The first input anew: the embeddings' norm.
        let (dim, bos) = (e.model.config.dim, e.tokenizer.bos().filter(|_| e.tokenizer.add_bos()));
        let weights = |name: &str, row: usize| {
            let t = e.gguf.tensor(name).unwrap();
            let (format, mut x) = (t.format().unwrap(), vec![0.0; dim]);
            let bytes = format.row_bytes(dim).unwrap();
            format.dequant(&t.bytes()[row * bytes..][..bytes], &mut x);
            x.into_iter().map(f64::from).collect::<Vec<_>>()
        };
        let (norm, mut want) = (weights("blk.0.attn_norm.weight", 0), vec![0.0; dim]);
        for (i, &token) in tokens[..2 * CONTEXT].iter().enumerate() {
            let token = if i % CONTEXT == 0 { bos.unwrap_or(token) } else { token };
            let x = weights("token_embd.weight", token as usize);
            let mean = x.iter().map(|x| x * x).sum::<f64>() / dim as f64 + e.model.config.norm_eps as f64;
            for ((want, x), norm) in want.iter_mut().zip(&x).zip(&norm) {
                *want += x * x / mean * norm * norm;
            }
        }
        for (i, (got, want)) in m.entries["blk.0.attn_k.weight"].sums.iter().zip(&want).enumerate() {
            assert!((*got as f64 - want).abs() <= 1e-5 * want, "column {i}: {got}, expected {want}");
        }
        match &known {
            None => known = Some(m),
            Some(known) => assert!(*known == m, "{threads} threads differ from one"),
        }
    }
}

#[test]
fn to_be_watched_changes_nothing() {
    let e = engine(2);
    let tokens = e.tokenizer.encode(text().as_bytes(), true, false).unwrap();
    let (mut s, _) = watched(&e);
    let seen = score(&mut s, &tokens, 0, 2).unwrap();
    let mut s = e.session(&SessionOptions { context: CONTEXT, sequences: 2, ..SessionOptions::default() }).unwrap();
    assert_eq!(seen, score(&mut s, &tokens, 0, 2).unwrap());
}

#[test]
fn parts_of_a_text_join_to_the_whole() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_string();
    let (txt, whole, first, both, dat) =
        (path("t.txt"), path("whole.gguf"), path("first.gguf"), path("both.gguf"), path("both.dat"));
    std::fs::write(&txt, text()).unwrap();
    // Chunks of so many tokens go to the same kernel alone and together.
    let run =
        |args: &[&str]| oxcart(&[&["imatrix", "-f", &txt, "-c", "48", "--no-ppl"], args].concat()).assert().success();
    run(&["-o", &whole, "--chunks", "4"]);
    run(&["-o", &first, "--chunks", "2", "--save-frequency", "1", "-b", "48"]);
    run(&["-o", &both, "--from-chunk", "2", "--chunks", "2", "--in-file", &first]);
    // Without a text, what is there is written again.
    oxcart(&["imatrix", "--in-file", &both, "-c", "48", "-o", &dat, "--output-format", "dat"]).assert().success();
    let joined = path("joined.gguf");
    oxcart(&["imatrix", "--in-file", &format!("{whole},{first}"), "-c", "48", "-o", &joined]).assert().success();
    assert_eq!(Imatrix::read(Path::new(&joined)).unwrap().chunks, 6);
    let [whole, parts, old] = [&whole, &both, &dat].map(|file| Imatrix::read(Path::new(file)).unwrap());
    for wrong in [&["--in-file", &dat, "--in-file", &dat, "--show-statistics"][..], &["-f", &dat, "-c", "3"]] {
        oxcart(&[&["imatrix"], wrong].concat()).assert().code(2);
    }
    let out = oxcart(&["imatrix", "--in-file", &dat, "--show-statistics", "--json"]).assert().success();
    let shown: serde_json::Value = serde_json::from_slice(&out.get_output().stdout).unwrap();
    assert_eq!((shown["chunks"].as_u64(), shown["tensors"].as_array().unwrap().len()), (Some(4), 210));
    assert_eq!((parts.chunks, parts.chunk_size, parts.datasets.len()), (4, 48, 2));
    assert_eq!(Imatrix::read(Path::new(&path("first.gguf.at_1"))).unwrap().chunks, 1);
    for (name, e) in &whole.entries {
        let (parts, old) = (&parts.entries[name], old.entries[name].means());
        assert_eq!(parts.counts, e.counts, "{name}");
        for ((sum, part), (mean, old)) in e.sums.iter().zip(&parts.sums).zip(e.means().iter().zip(&old)) {
            assert!((sum - part).abs() <= 1e-5 * sum && (mean - old).abs() <= 1e-5 * mean, "{name}: {sum} {part}");
        }
    }
}

#[test]
fn a_text_is_read_as_for_its_perplexity() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_string();
    let (txt, out) = (path("t.txt"), path("out.gguf"));
    // One token short of another chunk: the line break at its end, which is no part of it, would make it one.
    let (e, mut text) = (engine(1), text());
    text.truncate(600);
    let count = |text: &str| e.tokenizer.encode(text.as_bytes(), true, false).unwrap().len();
    while count(&text) % CONTEXT != CONTEXT - 1 {
        text += " cart";
    }
    std::fs::write(&txt, text.clone() + "\n").unwrap();
    assert_eq!(count(&(text.clone() + "\n")) % CONTEXT, 0);
    let args = ["imatrix", "-f", &txt, "-c", "64", "--no-ppl", "-o", &out];
    oxcart(&args).assert().success();
    assert_eq!(Imatrix::read(Path::new(&out)).unwrap().chunks as usize, count(&text) / CONTEXT);
    std::fs::write(&txt, b"a line\n\x7fELF\0\0").unwrap();
    let out = oxcart(&args).assert().failure().get_output().clone();
    let said = String::from_utf8_lossy(&out.stderr);
    assert!(said.contains("t.txt: line 2: a zero byte"), "{said}");
    // What the output cannot be called is told before anything is read.
    let o = oxcart(&["imatrix", "-f", "missing", "-o", dir.path().to_str().unwrap()]).assert().failure();
    assert!(String::from_utf8_lossy(&o.get_output().stderr).contains("is a folder, expected the name of a file"));
}

/// A model of two layers with two experts each, in F32, and importance for it. Returns the weights of the experts.
fn model(path: &Path) -> (Vec<f32>, Imatrix) {
    let number = |n: u32| Value::from(MetadataValue::U32(n));
    let metadata = vec![
        ("general.architecture".to_string(), MetadataValue::String("llama".into()).into()),
        ("llama.block_count".to_string(), number(2)),
        ("llama.attention.head_count".to_string(), number(2)),
        ("llama.expert_count".to_string(), number(2)),
    ];
    let kind = TensorKind::from(Format::F32);
    let tensor = |(name, dims): (&str, &[u64])| NewTensor { name: name.into(), dims: dims.to_vec(), kind };
    let tensors = [
        ("token_embd.weight", &[256, 8][..]),
        ("output.weight", &[256, 8]),
        ("blk.0.attn_q.weight", &[256, 4]),
        ("blk.0.ffn_down_exps.weight", &[512, 3, 2]),
        ("blk.1.attn_q.weight", &[256, 4]),
    ]
    .map(tensor);
    let (mut state, mut experts) = (1u64, Vec::new());
    let mut unit = || {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (state >> 40) as f32 / 8388608.0 - 1.0
    };
    let mut w = GgufWriter::create(path, metadata, tensors.to_vec(), &Parts::One).unwrap();
    let mut m = Imatrix { datasets: vec!["a text".into()], chunk_size: 512, chunks: 7, ..Imatrix::default() };
    for t in &tensors {
        let x: Vec<f32> = (0..t.dims.iter().product()).map(|_| unit()).collect();
        w.push(bytemuck::cast_slice(&x)).unwrap();
        let matrices = *t.dims.get(2).unwrap_or(&1);
        if t.name.starts_with("blk.") {
            let sums = (0..t.dims[0] * matrices).map(|_| unit().powi(2) * 1000.0).collect();
            m.entries.insert(t.name.clone(), Entry { sums, counts: (1..=matrices).map(|i| 300 * i).collect() });
        }
        if matrices > 1 {
            experts = x;
        }
    }
    w.finish().unwrap();
    (experts, m)
}

#[test]
fn quantize_weighs_each_expert_by_its_own() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_string();
    let (from, to, file) = (path("from.gguf"), path("to.gguf"), path("m.gguf"));
    let (experts, m) = model(Path::new(&from));
    m.write(Path::new(&file), FileFormat::Gguf).unwrap();
    let out = oxcart(&["quantize", &from, &to, "IQ2_XS", "--imatrix", &file, "--report", "--json"]).assert().success();
    let report: serde_json::Value = serde_json::from_slice(&out.get_output().stdout).unwrap();
    let g = Gguf::open(Path::new(&to)).unwrap();
    assert_eq!(g.str("quantize.imatrix.file").unwrap(), Some(file.as_str()));
    assert_eq!(g.str("quantize.imatrix.dataset").unwrap(), Some("a text"));
    assert_eq!(g.uint("quantize.imatrix.entries_count").unwrap(), Some(3));
    assert_eq!(g.uint("quantize.imatrix.chunks_count").unwrap(), Some(7));
    // What a file, or a person, says of a matrix gives way to the one that is taken.
    let (other, copy) = (path("other.gguf"), path("copy.gguf"));
    m.write(Path::new(&other), FileFormat::Gguf).unwrap();
    let key = "quantize.imatrix.dataset=str:another text";
    oxcart(&["quantize", "--imatrix", &other, "--override-kv", key, &to, &copy, "COPY"]).assert().success();
    let copied = Gguf::open(Path::new(&copy)).unwrap();
    assert_eq!(copied.str("quantize.imatrix.file").unwrap(), Some(other.as_str()));
    assert_eq!(copied.str("quantize.imatrix.dataset").unwrap(), Some("a text"));

    let name = "blk.0.ffn_down_exps.weight";
    let t = g.tensor(name).unwrap();
    assert_eq!(t.format(), Some(Format::IQ2_XS));
    let (q, means, row_bytes) = (Quantizer::new(Format::IQ2_XS).unwrap(), m.entries[name].means(), 2 * 74);
    let (mut errors, mut squares) = (0.0, 0.0);
    for (row, (x, got)) in experts.chunks(512).zip(t.bytes().chunks(row_bytes)).enumerate() {
        let w = &means[row / 3 * 512..][..512];
        let (mut want, mut back) = (vec![0; row_bytes], vec![0.0; 512]);
        q.row(x, Some(w), &mut want);
        assert!(got == want, "row {row}");
        Format::IQ2_XS.dequant(got, &mut back);
        for ((x, back), w) in x.iter().zip(&back).zip(w) {
            errors += *w as f64 * (*x as f64 - *back as f64).powi(2);
            squares += *w as f64 * (*x as f64).powi(2);
        }
    }
    let line = report["tensors"].as_array().unwrap().iter().find(|t| t["name"] == name).unwrap();
    let (plain, weighted) =
        (line["relative_rms_error"].as_f64().unwrap(), line["weighted_rms_error"].as_f64().unwrap());
    assert!((weighted - (errors / squares).sqrt()).abs() < 1e-9, "{weighted}");
    assert!(weighted < plain, "{weighted} {plain}");
    assert_eq!(report["tensors"][0]["weighted_rms_error"], serde_json::Value::Null);
    // A layer that is numbered anew is weighed by what was seen of it under its old number.
    let made = |more: &[&str]| {
        let plain = ["--pure", "--output-tensor-type", "q8_0", "--token-embedding-type", "q8_0", "--imatrix", &file];
        oxcart(&[&["quantize"], &plain[..], more, &[&from, &to, "IQ2_XS"]].concat()).assert().success();
        Gguf::open(Path::new(&to)).unwrap()
    };
    let bytes = |g: &Gguf, i: usize| g.tensor(&format!("blk.{i}.attn_q.weight")).unwrap().bytes().to_vec();
    let whole = bytes(&made(&[]), 1);
    assert!(bytes(&made(&["--prune-layers", "0"]), 0) == whole);
}

#[test]
fn what_needs_importance_is_not_made_without() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_string();
    let (from, to, file, short, none) =
        (path("from.gguf"), path("to.gguf"), path("m.gguf"), path("short.gguf"), path("from.txt"));
    let (_, mut m) = model(Path::new(&from));
    m.write(Path::new(&file), FileFormat::Gguf).unwrap();
    m.entries.get_mut("blk.1.attn_q.weight").unwrap().sums.pop();
    m.write(Path::new(&short), FileFormat::Gguf).unwrap();
    std::fs::write(&none, "no matrix").unwrap();
    let cases: &[(&[&str], &str)] = &[
        (&["IQ2_XXS"], "tensor blk.0.attn_q.weight: iq2_xxs needs an importance matrix (--imatrix"),
        (&["Q2_K_S"], "tensor blk.0.attn_q.weight: q2_K needs an importance matrix"),
        (&["IQ3_XXS", "--imatrix", &file, "--include-weights", "blk.0."], "tensor blk.1.attn_q.weight: iq2_s needs an"),
        (
            &["IQ1_S", "--imatrix", &file, "--exclude-weights", "_exps"],
            "tensor blk.0.ffn_down_exps.weight: iq1_s needs",
        ),
        (
            &["Q4_K_M", "--token-embedding-type", "iq2_xs"],
            "tensor token_embd.weight: iq2_xs needs an importance matrix",
        ),
        (&["Q4_K_M", "--imatrix", &short], "short.gguf has 255 columns for it, expected 256"),
        (&["Q4_K_M", "--imatrix", &from], "imatrix.datasets: missing"),
        (&["Q4_K_M", "--imatrix", &none], "from.txt: entry 0: name: "),
        (&["Q4_K_M", "--imatrix", &path("gone")], "gone: open: No such file"),
    ];
    let mut wrong = Vec::new();
    for (args, want) in cases {
        let out = oxcart(&[&["quantize", &from, &to], *args].concat()).assert().failure().get_output().clone();
        let said = String::from_utf8_lossy(&out.stderr);
        if !said.contains(want) {
            wrong.push(format!("{args:?}: {said}"));
        }
        assert!(!Path::new(&to).exists(), "{args:?}");
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
    oxcart(&["quantize", &from, &to, "IQ1_S", "--imatrix", &file]).assert().success();
    // What can do without does.
    oxcart(&["quantize", &from, &to, "IQ3_S", "--imatrix", &file, "--include-weights", "none"]).assert().success();
    assert!(Gguf::open(Path::new(&to)).unwrap().value("quantize.imatrix.file").is_none());
    oxcart(&["quantize", &from, &to, "IQ2_XXS", "--dry-run"]).assert().success();
}
