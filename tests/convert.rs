//! `oxcart quantize` from checkpoint folders: what becomes of metadata, names and weights, and what is refused.

#[path = "common/checkpoint.rs"]
mod checkpoint;

use assert_cmd::Command;
use checkpoint::*;
use oxcart::engine::{Engine, EngineOptions, SessionOptions};
use oxcart::gguf::Gguf;
use oxcart::model::Batch;
use oxcart::quantize::recipe::MIXES;
use oxcart_quant::{Format, Kernels};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

const CLASSES: [&str; 3] = ["Qwen2ForCausalLM", "LlamaForCausalLM", "MixtralForCausalLM"];

fn quantize(from: &Path, to: &Path, args: &[&str]) -> Command {
    let mut c = Command::cargo_bin("oxcart").unwrap();
    c.arg("quantize").arg(from).arg(to).args(args);
    c
}

/// A folder and a file of the same name in `dir`.
fn written(dir: &Path, name: &str, m: &Model, shards: usize, args: &[&str]) -> PathBuf {
    let (from, to) = (dir.join(name), dir.join(format!("{name}-{}.gguf", args[0])));
    m.write(&from, shards);
    quantize(&from, &to, args).assert().success();
    to
}

/// Weights of a tensor.
fn weights(g: &Gguf, name: &str) -> Vec<f32> {
    let t = g.tensor(name).unwrap_or_else(|| panic!("no tensor {name}"));
    let mut out = vec![0.0; t.n_elements() as usize];
    t.format().unwrap().dequant(t.bytes(), &mut out);
    out
}

#[test]
fn metadata_is_what_the_converter_writes() {
    let dir = tempfile::tempdir().unwrap();
    let common = |arch: &str, name: &str, size: &str| {
        format!(
            "general.architecture={arch} general.type=model general.name={name} general.size_label={size} \
             {arch}.block_count=5 {arch}.context_length=512 {arch}.embedding_length=192 \
             {arch}.feed_forward_length=352 {arch}.attention.head_count=6 {arch}.attention.head_count_kv=3 "
        )
    };
    let tokenizer = "tokenizer.ggml.model=gpt2 tokenizer.ggml.pre=gpt-2 tokenizer.ggml.tokens=[264] \
        tokenizer.ggml.token_type=[264] tokenizer.ggml.merges=[1] tokenizer.ggml.bos_token_id=256 \
        tokenizer.ggml.eos_token_id=257 tokenizer.ggml.add_bos_token=true \
        tokenizer.chat_template={{ messages[0].content }} general.quantization_version=2 general.file_type=0";
    let numbers = |arch: &str| format!("{arch}.rope.freq_base=10000 {arch}.attention.layer_norm_rms_epsilon=0.00001 ");
    let llama = "llama.attention.key_length=32 llama.attention.value_length=32 llama.vocab_size=264 \
        llama.rope.dimension_count=32 ";
    let experts = "llama.expert_count=4 llama.expert_used_count=2 ";
    let cases = [
        (0, [&common("qwen2", "Q", "1.7M"), &numbers("qwen2"), tokenizer].concat()),
        (1, [&common("llama", "L", "1.7M"), &numbers("llama"), llama, tokenizer].concat()),
        (2, [&common("llama", "M", "4x1.7M"), &numbers("llama"), experts, llama, tokenizer].concat()),
    ];
    let mut wrong = Vec::new();
    for (i, want) in cases {
        let path = written(dir.path(), ["q", "l", "m"][i], &model(CLASSES[i], "F32", 1), 2, &["F32"]);
        let g = Gguf::open(&path).unwrap();
        let text = |(k, v): (&str, &oxcart::gguf::Value)| match v.array_len() {
            Some(n) => format!("{k}=[{n}]"),
            None => format!("{k}={v}"),
        };
        let found = g.metadata().map(text).collect::<Vec<_>>().join(" ");
        if found != want {
            wrong.push(format!("{}:\n  found {found}\nexpected {want}", CLASSES[i]));
        }
        let tokens: Vec<String> =
            g.strings("tokenizer.ggml.tokens").unwrap().unwrap().iter().map(String::from).collect();
        let kinds = g.ints("tokenizer.ggml.token_type").unwrap().unwrap();
        for (id, text, kind) in
            [(97, "a", 1), (256, "<|begin|>", 3), (258, "th", 1), (259, "<tool>", 4), (263, "[PAD263]", 5)]
        {
            assert_eq!((tokens[id].as_str(), kinds[id]), (text, kind));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// The logits of a few tokens, in exact arithmetic.
fn logits(path: &Path) -> Vec<f32> {
    let o = EngineOptions { threads: 1, kernels: Kernels::exact(), ..EngineOptions::default() };
    let e = Arc::new(Engine::open(path, &o).unwrap());
    let mut batch = Batch::default();
    (0..).zip([256, 84, 104, 258, 9, 200]).for_each(|(i, t)| batch.push(t, i, 0, true));
    let rows = Mutex::new(BTreeMap::new());
    let mut s = e.session(&SessionOptions { context: 64, ..SessionOptions::default() }).unwrap();
    s.forward_each(&batch, &|i, row| drop(rows.lock().unwrap().insert(i, row.to_vec()))).unwrap();
    rows.into_inner().unwrap().into_values().flatten().collect()
}

/// qwen2 without biases, llama, and mixtral whose experts are all the same are one function, written in three ways: rows of
/// q and k as they are, in pairs, and experts side by side.
#[test]
fn three_ways_to_write_a_model_compute_the_same() {
    let dir = tempfile::tempdir().unwrap();
    let llama = model(CLASSES[1], "F32", 7);
    let mut qwen2 = llama.clone();
    qwen2.config["architectures"] = json!([CLASSES[0]]);
    let mut mixtral = model(CLASSES[2], "F32", 8);
    let w = |n: &str| ["gate", "down", "up"][n.as_bytes()[1] as usize - b'1' as usize];
    for (name, t) in &mut mixtral.tensors {
        match name.split_once("block_sparse_moe.experts.") {
            Some((layer, rest)) => *t = llama.tensors[&format!("{layer}mlp.{}_proj.weight", w(&rest[2..4]))].clone(),
            None if name.contains("block_sparse_moe") => {}
            None => *t = llama.tensors[name].clone(),
        }
    }
    for i in 0..LAYERS {
        for (n, rows) in [("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS)] {
            let rows = rows * HEAD_DIM;
            let bias = Tensor { dtype: "F32".into(), shape: vec![rows], values: vec![0.0; rows] };
            qwen2.tensors.insert(format!("model.layers.{i}.self_attn.{n}_proj.bias"), bias);
        }
    }
    let want = logits(&written(dir.path(), "qwen2", &qwen2, 1, &["F32"]));
    let largest = want.iter().fold(0f32, |m, x| m.max(x.abs()));
    assert!(largest > 1.0);
    for (name, m) in [("llama", &llama), ("mixtral", &mixtral)] {
        let got = logits(&written(dir.path(), name, m, 2, &["F32"]));
        let off = got.iter().zip(&want).fold(0f32, |m, (a, b)| m.max((a - b).abs()));
        assert!(off < 2e-4 * largest, "{name}: off by {off} of {largest}");
    }
}

/// What biases add, wherever they stand, can also stand elsewhere: weights of attention add up to one, so that a bias of V
/// is one of attention's output; hidden values made of biases alone are a bias of down; and where a layer does nothing
/// else, its two outputs' biases are one.
#[test]
fn biases_count_wherever_they_stand() {
    let dir = tempfile::tempdir().unwrap();
    let plain = model(CLASSES[1], "F32", 9);
    let mut random = checkpoint::Random(10);
    let mut vector = |n: usize| (0..n).map(|_| 2.0 * random.next()).collect::<Vec<f32>>();
    let name = |part: &str| format!("model.layers.1.{part}");
    let bias = |m: &mut Model, part: &str, values: Vec<f32>| {
        m.tensors
            .insert(name(&format!("{part}.bias")), Tensor { dtype: "F32".into(), shape: vec![values.len()], values });
    };
    let product = |m: &Model, part: &str, x: &[f32]| -> Vec<f32> {
        let w = &m.tensors[&name(&format!("{part}.weight"))].values;
        w.chunks_exact(x.len()).map(|row| row.iter().zip(x).map(|(a, b)| a * b).sum()).collect()
    };
    let mut cases = Vec::new();

    let v = vector(KV_HEADS * HEAD_DIM);
    let (mut left, mut right) = (plain.clone(), plain.clone());
    for n in ["q", "k"] {
        bias(&mut left, &format!("self_attn.{n}_proj"), vec![0.0; if n == "q" { HEADS } else { KV_HEADS } * HEAD_DIM]);
    }
    bias(&mut left, "self_attn.v_proj", v.clone());
    let of_head = |h: usize| v[h / (HEADS / KV_HEADS) * HEAD_DIM..][..HEAD_DIM].to_vec();
    let attended: Vec<f32> = (0..HEADS).flat_map(of_head).collect();
    let o = product(&plain, "self_attn.o_proj", &attended);
    bias(&mut right, "self_attn.o_proj", o);
    cases.push(("value and output", left, right));

    // The last 90 hidden values see nothing of the token.
    let mut blind = plain.clone();
    for part in ["mlp.gate_proj", "mlp.up_proj"] {
        let w = blind.tensors.get_mut(&name(&format!("{part}.weight"))).unwrap();
        w.values[(FFN - 90) * DIM..].fill(0.0);
    }
    let (mut left, mut right) = (blind.clone(), blind.clone());
    let last = |x: Vec<f32>| [vec![0.0; FFN - 90], x].concat();
    let (gate, up) = (last(vector(90)), last(vector(90)));
    let hidden: Vec<f32> = gate.iter().zip(&up).map(|(g, u)| g / (1.0 + (-g).exp()) * u).collect();
    bias(&mut right, "mlp.down_proj", product(&blind, "mlp.down_proj", &hidden));
    bias(&mut left, "mlp.gate_proj", gate);
    bias(&mut left, "mlp.up_proj", up);
    cases.push(("gate, up and down", left, right));

    let mut idle = plain.clone();
    for part in ["self_attn.o_proj", "mlp.down_proj"] {
        idle.tensors.get_mut(&name(&format!("{part}.weight"))).unwrap().values.fill(0.0);
    }
    let (mut left, mut right, b) = (idle.clone(), idle, vector(DIM));
    bias(&mut left, "self_attn.o_proj", b.clone());
    bias(&mut right, "mlp.down_proj", b);
    cases.push(("output and down", left, right));

    for (what, left, right) in cases {
        let without = |m: &Model| {
            let mut m = m.clone();
            m.tensors.retain(|name, _| !name.ends_with(".bias"));
            m
        };
        let all = [("left", &left), ("right", &right), ("none", &without(&left))];
        let [a, b, none] = all.map(|(side, m)| logits(&written(dir.path(), &format!("{what} {side}"), m, 1, &["F32"])));
        let off = |x: &[f32], y: &[f32]| x.iter().zip(y).fold(0f32, |m, (a, b)| m.max((a - b).abs()));
        assert!(off(&a, &b) < 0.01 * off(&a, &none), "{what}: off by {} of {}", off(&a, &b), off(&a, &none));
    }
}

/// Straight from the checkpoint, and by way of a GGUF of 16 or 32 bits: the same bytes for every mixture. And no weight is
/// further from its origin than its format allows.
#[test]
fn the_way_to_a_mixture_does_not_matter() {
    let dir = tempfile::tempdir().unwrap();
    let mut wrong = Vec::new();
    for (class, dtype) in CLASSES.into_iter().zip(["BF16", "F16", "F32"]) {
        let m = model(class, dtype, 3);
        let exact = written(dir.path(), "f32", &m, 2, &["F32"]);
        let lossless = written(dir.path(), "same", &m, 1, &[dtype]);
        let source = Gguf::open(&exact).unwrap();
        let (from, direct, by_way) = (dir.path().join("f32"), dir.path().join("a.gguf"), dir.path().join("b.gguf"));
        let mixes = MIXES.iter().filter(|m| oxcart_quant::Quantizer::new(m.format).is_some());
        for (mix, way) in mixes.zip([&exact, &lossless].into_iter().cycle()) {
            let case = format!("{class} {dtype} {}", mix.name);
            quantize(&from, &direct, &[mix.name]).assert().success();
            quantize(way, &by_way, &[mix.name]).assert().success();
            let (direct, by_way) = (Gguf::open(&direct).unwrap(), Gguf::open(&by_way).unwrap());
            for t in by_way.tensors() {
                let d = direct.tensor(&t.name).unwrap();
                if d.kind != t.kind || **d.bytes() != **t.bytes() {
                    wrong.push(format!("{case}: {} by way of {}", t.name, way.display()));
                }
            }
            for t in direct.tensors() {
                let (is, was) = (weights(&direct, &t.name), weights(&source, &t.name));
                let norm: f64 = was.iter().map(|&x| (x as f64).powi(2)).sum();
                let error: f64 = is.iter().zip(&was).map(|(a, b)| (*a as f64 - *b as f64).powi(2)).sum();
                // Of weights with long tails; about half as large again as what is seen.
                let most = match t.format().unwrap() {
                    Format::F32 => 0.0,
                    Format::F16 => 4e-4,
                    Format::BF16 => 3e-3,
                    Format::Q8_0 => 0.008,
                    Format::Q6_K => 0.03,
                    Format::Q5_0 | Format::Q5_1 | Format::Q5_K => 0.06,
                    Format::Q4_0 | Format::Q4_1 | Format::Q4_K | Format::IQ4_NL | Format::IQ4_XS => 0.12,
                    Format::Q3_K => 0.25,
                    _ => 0.6,
                };
                let error = (error / norm).sqrt();
                if error > most {
                    wrong.push(format!("{case}: {} {}: off by {error}, expected {most} at most", t.name, t.kind));
                }
            }
        }
    }
    assert!(wrong.is_empty(), "{} wrong: {:#?}", wrong.len(), &wrong[..wrong.len().min(12)]);
}

#[test]
fn llama_3_1_divides_its_low_frequencies() {
    let dir = tempfile::tempdir().unwrap();
    let mut m = model(CLASSES[1], "BF16", 4);
    m.config["tie_word_embeddings"] = true.into();
    m.tensors.remove("lm_head.weight");
    m.config["rope_theta"] = 500_000.0.into();
    m.config["rope_scaling"] = json!({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 8192});
    let g = Gguf::open(&written(dir.path(), "m", &m, 1, &["Q8_0"])).unwrap();
    assert!(g.tensor("output.weight").is_none());
    let found = weights(&g, "rope_freqs.weight");
    assert_eq!(found.len(), HEAD_DIM / 2);
    for (i, &f) in found.iter().enumerate() {
        // The paper's formula, in f64.
        let wavelength = 2.0 * std::f64::consts::PI * 500_000f64.powf(2.0 * i as f64 / HEAD_DIM as f64);
        let smooth = ((8192.0 / wavelength - 1.0) / 3.0).clamp(0.0, 1.0);
        let want = 1.0 / (smooth + (1.0 - smooth) / 8.0);
        assert!((f as f64 - want).abs() < 1e-5 * want, "{i}: {f}, expected {want}");
    }
    assert!(found[0] == 1.0 && found[15] == 8.0 && found.iter().any(|f| (1.1..7.9).contains(f)));
}

/// YaRN's parameters are written as they stand in the file, those only, and computed.
#[test]
fn yarn_keeps_its_parameters() {
    let dir = tempfile::tempdir().unwrap();
    let begin = "type=yarn factor=4 original_context_length=128";
    let cases = [
        (yarn(json!({})), begin.to_string()),
        (
            yarn(json!({"extrapolation_factor": 0.75, "attn_factor": 1.0, "beta_fast": 64, "beta_slow": 2.5})),
            format!("{begin} yarn_ext_factor=0.75 yarn_attn_factor=1 yarn_beta_fast=64 yarn_beta_slow=2.5"),
        ),
        // Older files call the type so; null is none; one mscale alone has no effect.
        (
            json!({"type": "yarn", "factor": 4.0, "attention_factor": 1.1386, "beta_fast": null, "mscale": 0.7,
                "truncate": true}),
            format!("{begin} yarn_attn_factor=1.1386"),
        ),
    ];
    let mut m = model(CLASSES[0], "F32", 4);
    let mut computed = Vec::new();
    for (i, (scaling, want)) in cases.into_iter().enumerate() {
        if scaling.get("original_max_position_embeddings").is_none() {
            m.config["original_max_position_embeddings"] = 128.into();
        }
        m.config["rope_scaling"] = scaling;
        let path = written(dir.path(), &format!("{i}"), &m, 1, &["F32"]);
        let g = Gguf::open(&path).unwrap();
        let of_rope = |(k, v): (&str, &_)| k.strip_prefix("qwen2.rope.scaling.").map(|k| format!("{k}={v}"));
        assert_eq!(g.metadata().filter_map(of_rope).collect::<Vec<_>>().join(" "), want);
        computed.push(logits(&path));
    }
    assert!(computed[0] != computed[1], "other betas, other logits");
    assert!(computed[0] == computed[2], "the same values, told or not");
}

/// Mistral's first model attends to a window, without saying so as others do; full attention is noted.
#[test]
fn a_window_of_mistral_s_is_noted() {
    let dir = tempfile::tempdir().unwrap();
    let mut m = model(CLASSES[1], "F32", 4);
    let note = "config.json: sliding_window: found 256, but attention goes to all 512 positions";
    for (class, window, noted) in [
        ("MistralForCausalLM", json!(256), true),
        ("MistralForCausalLM", json!(512), false),
        ("MistralForCausalLM", Value::Null, false),
        ("LlamaForCausalLM", json!(256), false),
    ] {
        (m.config["architectures"], m.config["sliding_window"]) = (json!([class]), window.clone());
        let (from, to) = (dir.path().join("m"), dir.path().join("m.gguf"));
        m.write(&from, 1);
        let out = quantize(&from, &to, &["F32"]).assert().success().get_output().stderr.clone();
        assert_eq!(String::from_utf8_lossy(&out).contains(note), noted, "{class} {window}");
    }
}

#[test]
fn a_sentencepiece_vocabulary_keeps_its_scores() {
    let dir = tempfile::tempdir().unwrap();
    let (from, to) = (dir.path().join("m"), dir.path().join("m.gguf"));
    model(CLASSES[1], "BF16", 5).write(&from, 1);
    let mut bytes = Vec::new();
    for (i, (text, kind)) in [("<unk>", 2), ("<s>", 3), ("</s>", 3), ("<0x0A>", 6), ("▁the", 1)].into_iter().enumerate()
    {
        let mut piece = vec![0x0a, text.len() as u8];
        piece.extend(text.as_bytes());
        piece.push(0x15);
        piece.extend((-(i as f32)).to_le_bytes());
        piece.extend([0x18, kind]);
        bytes.extend([0x0a, piece.len() as u8]);
        bytes.extend(piece);
    }
    fs::write(from.join("tokenizer.model"), bytes).unwrap();
    quantize(&from, &to, &["Q8_0"]).assert().success();
    let g = Gguf::open(&to).unwrap();
    assert_eq!(g.str("tokenizer.ggml.model").unwrap(), Some("llama"));
    assert_eq!(g.str("tokenizer.ggml.pre").unwrap(), Some("default"));
    assert_eq!(g.ints("tokenizer.ggml.token_type").unwrap().unwrap()[..6], [2, 3, 3, 6, 1, 5]);
    assert_eq!(g.floats("tokenizer.ggml.scores").unwrap().unwrap()[..6], [0.0, -1.0, -2.0, -3.0, -4.0, -10_000.0]);
}

/// Without that file, ranks of merges serve as scores: the pair that merges first is the best.
#[test]
fn merges_give_scores_where_there_are_none() {
    let dir = tempfile::tempdir().unwrap();
    let mut m = model(CLASSES[1], "F16", 5);
    let special = |id: u32, text: &str| json!({"id": id, "content": text, "special": true});
    m.tokenizer = json!({
        "added_tokens": [special(0, "<unk>"), special(1, "<s>")],
        "model": {"type": "BPE", "byte_fallback": true, "merges": ["t h", "▁ th"],
                  "vocab": {"<unk>": 0, "<s>": 1, "<0x0A>": 2, "▁": 3, "t": 4, "h": 5, "th": 6, "▁th": 7}},
    });
    let g = Gguf::open(&written(dir.path(), "m", &m, 1, &["Q8_0"])).unwrap();
    assert_eq!(g.str("tokenizer.ggml.model").unwrap(), Some("llama"));
    assert_eq!(g.ints("tokenizer.ggml.token_type").unwrap().unwrap()[..9], [2, 3, 6, 1, 1, 1, 1, 1, 5]);
    let scores = g.floats("tokenizer.ggml.scores").unwrap().unwrap();
    assert!(scores[6] == 0.0 && scores[7] == -1.0 && scores[3..6].iter().all(|s| *s < -2.0), "{:?}", &scores[..9]);
}

/// The value of every key that begins so, without its beginning.
fn keys(g: &Gguf, begin: &str) -> String {
    let of = |(k, v): (&str, &oxcart::gguf::Value)| k.strip_prefix(begin).map(|k| format!("{k}={v}"));
    g.metadata().filter_map(of).collect::<Vec<_>>().join(" ")
}

/// Special tokens by what the settings say and what the post-processor puts around one text and between two.
#[test]
fn special_tokens_are_those_of_the_converter() {
    let dir = tempfile::tempdir().unwrap();
    let (begin, end) = (json!({"SpecialToken": {"id": "<|begin|>"}}), json!({"SpecialToken": {"id": "<|end|>"}}));
    let (a, b) = (json!({"Sequence": {"id": "A"}}), json!({"Sequence": {"id": "B"}}));
    let around = |single: Value, pair: Value| json!({"type": "TemplateProcessing", "single": single, "pair": pair});
    let settings = json!({"bos_token": "<|begin|>", "eos_token": "<|end|>"});
    let cases = [
        // Llama 3's.
        (
            json!({"type": "Sequence", "processors": [{"type": "ByteLevel"}, around(json!([begin, a]), json!([begin, a, begin, b]))]}),
            settings.clone(),
            "bos_token_id=256 eos_token_id=257 add_bos_token=true add_eos_token=false add_sep_token=false",
        ),
        // What begins a text is not called BOS.
        (
            around(json!([begin, a]), json!([begin, a, b])),
            json!({"bos_token": "<|end|>", "eos_token": "<|end|>"}),
            "bos_token_id=257 eos_token_id=257 add_bos_token=true",
        ),
        (
            around(json!([begin, a]), json!([begin, a, b])),
            json!({"bos_token": "<|end|>", "eos_token": "<|end|>", "cls_token": "<tool>"}),
            "bos_token_id=257 eos_token_id=257 add_bos_token=false",
        ),
        (around(json!([begin, a]), Value::Null), json!({}), "bos_token_id=256 eos_token_id=257 add_bos_token=true"),
        // What ends it is not called EOS.
        (
            around(json!([a, end]), json!([a, end, b, end])),
            json!({"eos_token": "<tool>", "add_bos_token": false}),
            "bos_token_id=256 eos_token_id=257 eot_token_id=259 add_eos_token=true add_sep_token=false add_bos_token=false",
        ),
        // A separator, which has no other name.
        (
            around(json!([begin, a]), json!([begin, a, end, b])),
            settings.clone(),
            "bos_token_id=256 eos_token_id=257 seperator_token_id=257 add_bos_token=true add_sep_token=true",
        ),
        (
            around(json!([begin, a, end]), json!([begin, a, end, end, b, end])),
            settings.clone(),
            "bos_token_id=256 eos_token_id=257 seperator_token_id=257 add_bos_token=true add_eos_token=true \
             add_sep_token=true",
        ),
        // BERT's names.
        (
            Value::Null,
            json!({"cls_token": "<|begin|>", "sep_token": "<|end|>"}),
            "bos_token_id=256 eos_token_id=257 seperator_token_id=257",
        ),
    ];
    let mut m = model(CLASSES[0], "F16", 5);
    let mut wrong = Vec::new();
    for (i, (post, settings, want)) in cases.into_iter().enumerate() {
        m.tokenizer["post_processor"] = post;
        m.settings = settings;
        let g = Gguf::open(&written(dir.path(), &format!("{i}"), &m, 1, &["Q8_0"])).unwrap();
        let found = keys(&g, "tokenizer.ggml.");
        let found = found.split_once("merges=[\"t h\"] ").map_or("", |(_, rest)| rest);
        if found != want {
            wrong.push(format!("{i}: {found}, expected {want}"));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// CodeLlama is told by its vocabulary.
#[test]
fn code_llama_ends_what_it_fills_in() {
    let dir = tempfile::tempdir().unwrap();
    let mut m = model(CLASSES[1], "F16", 5);
    (m.config["vocab_size"], m.config["tie_word_embeddings"]) = (32016.into(), true.into());
    m.tensors.remove("lm_head.weight");
    let embeddings = m.tensors.get_mut("model.embed_tokens.weight").unwrap();
    (embeddings.shape[0], embeddings.values) = (32016, vec![0.5; 32016 * DIM]);
    let g = Gguf::open(&written(dir.path(), "m", &m, 1, &["F16"])).unwrap();
    assert_eq!(g.uint("tokenizer.ggml.eot_token_id").unwrap(), Some(32010));
}

#[test]
fn chat_templates_have_files_of_their_own() {
    let dir = tempfile::tempdir().unwrap();
    let (from, to) = (dir.path().join("m"), dir.path().join("m.gguf"));
    let mut m = model(CLASSES[0], "F16", 5);
    m.settings.as_object_mut().unwrap().remove("chat_template");
    m.write(&from, 1);
    let mut cases = vec![("chat_template.json", r#"{"chat_template": "old"}"#, "chat_template=old")];
    cases.push(("chat_template.jinja", "new", "chat_template=new"));
    cases.push((
        "additional_chat_templates/tool-use.jinja",
        "tools",
        r#"chat_template.tool_use=tools chat_templates=["tool_use"] chat_template=new"#,
    ));
    fs::create_dir(from.join("additional_chat_templates")).unwrap();
    for (file, text, want) in cases {
        fs::write(from.join(file), text).unwrap();
        quantize(&from, &to, &["Q8_0"]).assert().success();
        assert_eq!(
            keys(&Gguf::open(&to).unwrap(), "tokenizer.").split_once("chat_").unwrap().1,
            &want["chat_".len()..]
        );
    }
    fs::write(from.join("chat_template.jinja"), b"\xFF").unwrap();
    let out = quantize(&from, &to, &["Q8_0"]).assert().code(1).get_output().stderr.clone();
    assert!(String::from_utf8_lossy(&out).contains("chat_template.jinja: text: invalid utf-8"));
}

/// What may be wrong with a folder: what is done to it, and what is said.
type Damage = (&'static str, Box<dyn Fn(&Path)>, &'static str);

/// A damage that is done by `f`.
fn by(f: impl Fn(&Path) + 'static) -> Box<dyn Fn(&Path)> {
    Box::new(f)
}

/// Sets two values of a tensor.
fn set(tensors: &mut BTreeMap<String, Tensor>, name: &str, x: f32) {
    let t = tensors.get_mut(name).unwrap();
    (t.values[1], t.values[7]) = (x, x);
}

/// YaRN, four times 128 positions, and something more.
fn yarn(more: Value) -> Value {
    let mut scaling = json!({"rope_type": "yarn", "factor": 4, "original_max_position_embeddings": 128});
    scaling.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    scaling
}

#[test]
fn hostile_folders_are_refused_in_one_line() {
    let dir = tempfile::tempdir().unwrap();
    let good = model(CLASSES[1], "BF16", 6);
    let config = |change: &'static dyn Fn(&mut Value)| {
        let good = good.config.clone();
        by(move |d| {
            let mut c = good.clone();
            change(&mut c);
            fs::write(d.join("config.json"), c.to_string()).unwrap();
        })
    };
    let tokenizer = |change: &'static dyn Fn(&mut Value)| {
        let good = good.tokenizer.clone();
        by(move |d| {
            let mut t = good.clone();
            change(&mut t);
            fs::write(d.join("tokenizer.json"), t.to_string()).unwrap();
        })
    };
    let tensor = |change: &'static dyn Fn(&mut BTreeMap<String, Tensor>)| {
        let good = good.tensors.clone();
        by(move |d| {
            let mut t = good.clone();
            change(&mut t);
            fs::write(d.join("model.safetensors"), shard(&t)).unwrap();
        })
    };
    let header = |header: &'static str, data: usize| {
        by(move |d| fs::write(d.join("model.safetensors"), raw(header, &vec![0; data])).unwrap())
    };
    let text = |name: &'static str, text: &'static str| by(move |d| fs::write(d.join(name), text).unwrap());
    let index = |json: &'static str| text("model.safetensors.index.json", json);
    let cases: Vec<Damage> = vec![
        ("no config", by(|d| fs::remove_file(d.join("config.json")).unwrap()), "config.json: open: is missing"),
        (
            "no weights",
            by(|d| fs::remove_file(d.join("model.safetensors")).unwrap()),
            "weights: 0 files model*.safetensors",
        ),
        (
            "no vocabulary",
            by(|d| fs::remove_file(d.join("tokenizer.json")).unwrap()),
            "is missing, and so is tokenizer.model",
        ),
        ("empty", text("model.safetensors", ""), "open: the file is empty"),
        ("short", text("model.safetensors", "1234"), "header: a file of 4 bytes, expected 8 or more"),
        ("pointer", text("model.safetensors", "version https://git-lfs.github.com/spec/v1"), "a git-lfs pointer"),
        ("header lies", text("model.safetensors", "\0\0\0\x05\0\0\0\0{}"), "header: said to have 83886080 bytes"),
        (
            "header is huge",
            text("model.safetensors", "\x7f\x7f\x7f\x7f\x7f\x7f\x7f\x7f{}"),
            "header: said to have 9187",
        ),
        ("no JSON", header("{", 0), "header: EOF while parsing"),
        (
            "overlap",
            header(
                r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"b":{"dtype":"F32","shape":[2],"data_offsets":[4,12]}}"#,
                12,
            ),
            "tensor b: its range does not begin where the one before it ends",
        ),
        (
            "gap",
            header(r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}"#, 8),
            "tensor a: its range does not begin",
        ),
        (
            "tail",
            header(r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}"#, 8),
            "not where the last tensor ends",
        ),
        (
            "cut short",
            header(r#"{"a":{"dtype":"F32","shape":[9],"data_offsets":[0,36]}}"#, 8),
            "not where the last tensor ends",
        ),
        (
            "wrong size",
            header(r#"{"a":{"dtype":"F32","shape":[3],"data_offsets":[0,8]}}"#, 8),
            "range is not the size of its shape",
        ),
        (
            "overflow",
            header(r#"{"a":{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,8]}}"#, 8),
            "overflows",
        ),
        (
            "unknown dtype",
            header(r#"{"a":{"dtype":"F9","shape":[2],"data_offsets":[0,8]}}"#, 8),
            "unknown variant `F9`",
        ),
        (
            "index without shard",
            index(r#"{"weight_map":{"a":"model-7.safetensors"}}"#),
            "model-7.safetensors: open: No such file",
        ),
        (
            "index leaves the folder",
            index(r#"{"weight_map":{"a":"../x.safetensors"}}"#),
            "expected one in the same folder",
        ),
        ("index leaves absolutely", index(r#"{"weight_map":{"a":"/etc/passwd"}}"#), "expected one in the same folder"),
        (
            "index promises more",
            index(r#"{"weight_map":{"a":"model.safetensors"}}"#),
            "tensor a: should be in model.safetensors",
        ),
        ("index is no map", index("[]"), "index.json: JSON: "),
        (
            "a part is missing",
            by(|d| fs::rename(d.join("model.safetensors"), d.join("model-00001-of-00002.safetensors")).unwrap()),
            "found 1 of 2 files model-*.safetensors",
        ),
        (
            "integers",
            tensor(&|t| t.get_mut("model.norm.weight").unwrap().dtype = "I32".into()),
            "model.safetensors: tensor model.norm.weight: found I32, expected F32, F16 or BF16",
        ),
        (
            "missing tensor",
            tensor(&|t| drop(t.remove("model.layers.3.mlp.up_proj.weight"))),
            "tensor model.layers.3.mlp.up_proj.weight: missing",
        ),
        (
            "strange tensor",
            tensor(&|t| drop(t.insert("model.layers.9.x".into(), t["model.norm.weight"].clone()))),
            "tensor model.layers.9.x: has no place in a model of this config.json",
        ),
        (
            "other shape",
            config(&|c| c["intermediate_size"] = 353.into()),
            "shape [352, 192], expected [353, 192] by config.json",
        ),
        (
            "other layers",
            config(&|c| c["num_hidden_layers"] = 4096.into()),
            "tensor model.layers.5.input_layernorm.weight: missing",
        ),
        (
            "too many layers",
            config(&|c| c["num_hidden_layers"] = 4_000_000_000u64.into()),
            "num_hidden_layers: found 4000000000, expected 1 to 4096",
        ),
        (
            "absurd width",
            config(&|c| c["hidden_size"] = u64::MAX.into()),
            "hidden_size: found 18446744073709551615, expected 1 to",
        ),
        (
            "negative heads",
            config(&|c| c["num_attention_heads"] = (-6).into()),
            "num_attention_heads: found -6, expected 1 to",
        ),
        (
            "no KV heads",
            config(&|c| c["num_key_value_heads"] = 0.into()),
            "num_key_value_heads: found 0, expected 1 to",
        ),
        (
            "KV heads do not divide",
            config(&|c| c["num_key_value_heads"] = 4.into()),
            "num_key_value_heads: found 4, which does not divide 6",
        ),
        (
            "a text for a number",
            config(&|c| c["vocab_size"] = "264".into()),
            r#"vocab_size: found "264", expected 1 to"#,
        ),
        ("vocabulary too small", config(&|c| c["vocab_size"] = 100.into()), "expected [100, 192] by config.json"),
        ("epsilon", config(&|c| c["rms_norm_eps"] = 0.into()), "rms_norm_eps: found 0, expected a number above 0"),
        (
            "other model",
            config(&|c| c["architectures"] = json!(["Mamba"])),
            r#"architectures: found "Mamba", expected one of Qwen2"#,
        ),
        ("other scaling", config(&|c| c["rope_scaling"] = json!({"type": "su"})), r#"rope_scaling.type: found "su""#),
        (
            "YaRN from nowhere",
            config(&|c| c["rope_scaling"] = json!({"type": "yarn", "factor": 4})),
            "config.json: rope_scaling.original_max_position_embeddings: missing",
        ),
        (
            "another magnitude",
            config(&|c| c["rope_scaling"] = yarn(json!({"attention_factor": 1.0}))),
            "config.json: rope_scaling.attention_factor: found 1, expected 1.1386",
        ),
        (
            "another magnitude, first implementation",
            config(&|c| c["rope_scaling"] = yarn(json!({"attn_factor": 1.1386}))),
            "config.json: rope_scaling.attn_factor: found 1.1386, expected 1.0000",
        ),
        (
            "a magnitude of two",
            config(&|c| c["rope_scaling"] = yarn(json!({"mscale": 0.5, "mscale_all_dim": 1}))),
            "config.json: rope_scaling.mscale: found 0.5 beside mscale_all_dim",
        ),
        (
            "a ramp between frequencies",
            config(&|c| c["rope_scaling"] = yarn(json!({"truncate": false}))),
            "config.json: rope_scaling.truncate: found false, expected true",
        ),
        (
            "more than extrapolation",
            config(&|c| c["rope_scaling"] = yarn(json!({"extrapolation_factor": 1.5}))),
            "config.json: rope_scaling.extrapolation_factor: found 1.5, expected 0 to 1",
        ),
        (
            "quantized already",
            config(&|c| c["quantization_config"] = json!({"quant_method": "gptq"})),
            "quantized already (gptq)",
        ),
        ("no object", text("config.json", "7"), "config.json: JSON: invalid type"),
        ("nested", by(|d| fs::write(d.join("config.json"), "[".repeat(100_000)).unwrap()), "config.json: JSON: "),
        (
            "large",
            by(|d| fs::write(d.join("config.json"), " ".repeat(5 << 20)).unwrap()),
            "config.json: open: larger than 4194304 bytes",
        ),
        (
            "other activation",
            config(&|c| c["hidden_act"] = "gelu".into()),
            r#"config.json: hidden_act: found "gelu", expected silu"#,
        ),
        (
            "RoPE of a part",
            config(&|c| c["partial_rotary_factor"] = 0.5.into()),
            "config.json: partial_rotary_factor: found 0.5, expected 1",
        ),
        (
            "RoPE of a part, newer",
            config(&|c| c["rope_parameters"] = json!({"partial_rotary_factor": 0.25})),
            "config.json: rope_parameters.partial_rotary_factor: found 0.25, expected 1",
        ),
        (
            "a window",
            config(&|c| (c["use_sliding_window"], c["sliding_window"]) = (true.into(), 256.into())),
            "config.json: use_sliding_window: found true, expected attention to all",
        ),
        (
            "a text for a truth",
            config(&|c| c["tie_word_embeddings"] = "false".into()),
            r#"config.json: tie_word_embeddings: found "false", expected true or false"#,
        ),
        (
            "too many positions",
            config(&|c| c["max_position_embeddings"] = (1u64 << 31).into()),
            "config.json: max_position_embeddings: found 2147483648, expected 1 to 268435456",
        ),
        (
            "a merge of one",
            tokenizer(&|t| t["model"]["merges"] = json!(["t h", "th"])),
            "tokenizer.json: model.merges: merge 1 is th, expected two pieces and a space",
        ),
        ("no tokens", tokenizer(&|t| t["model"]["vocab"] = json!({})), "tokenizer.json: model.vocab: no tokens"),
        (
            "two of one id",
            tokenizer(&|t| (t["model"]["vocab"]["xx"], t["model"]["vocab"]["yy"]) = (5.into(), 5.into())),
            " and xx have the same id 5",
        ),
        (
            "two added of one id",
            tokenizer(&|t| t["added_tokens"][0]["id"] = 257.into()),
            "tokenizer.json: added_tokens: tokens <|begin|> and <|end|> have the same id 257",
        ),
        (
            "a long token",
            tokenizer(&|t| t["added_tokens"][2]["content"] = "x".repeat(4097).into()),
            "tokenizer.json: added_tokens: token 259 of 4097 bytes, expected at most 4096",
        ),
        (
            "other splits",
            text("tokenizer.json", r#"{"pre_tokenizer":{"type":"Whitespace"},"model":{"vocab":{}}}"#),
            "name it with --pre",
        ),
        (
            "ids beyond",
            text(
                "tokenizer.json",
                r#"{"pre_tokenizer":{"type":"ByteLevel","use_regex":true},"model":{"vocab":{"a":264}}}"#,
            ),
            "token a: id 264, expected below 264",
        ),
        ("no SentencePiece", text("tokenizer.model", "x"), "tokenizer.model: pieces: byte 0: no field"),
        (
            "NaN",
            tensor(&|t| set(t, "model.layers.2.mlp.up_proj.weight", f32::NAN)),
            "tensor blk.2.ffn_up.weight: 2 of 67584 weights are NaN or infinite",
        ),
        (
            "infinity",
            tensor(&|t| set(t, "model.layers.4.self_attn.k_proj.weight", f32::INFINITY)),
            "tensor blk.4.attn_k.weight: 2 of 18432 weights are NaN or infinite",
        ),
        (
            "NaN in a norm",
            tensor(&|t| set(t, "model.norm.weight", f32::NAN)),
            "tensor output_norm.weight: 2 of 192 weights are NaN",
        ),
    ];
    let mut wrong = Vec::new();
    for (i, (name, damage, want)) in cases.iter().enumerate() {
        let (from, to) = (dir.path().join(format!("{i}")), dir.path().join(format!("{i}.gguf")));
        good.write(&from, 1);
        damage(&from);
        let out = quantize(&from, &to, &["Q4_K_M"]).output().unwrap();
        let said = String::from_utf8_lossy(&out.stderr);
        let last = said.lines().last().unwrap_or_default();
        if out.status.code() != Some(1) || !last.starts_with("oxcart: ") || !last.contains(want) {
            wrong.push(format!("{name}: {:?} {last:?}, expected {want:?}", out.status.code()));
        }
        let left = fs::read_dir(dir.path())
            .unwrap()
            .filter(|e| e.as_ref().unwrap().path().to_string_lossy().contains(".gguf"));
        if left.count() > 0 {
            wrong.push(format!("{name}: something was written"));
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn a_pre_tokenizer_can_be_named() {
    let dir = tempfile::tempdir().unwrap();
    let mut m = model(CLASSES[0], "F16", 9);
    m.tokenizer["pre_tokenizer"] = json!({"type": "Whitespace"});
    let g = Gguf::open(&written(dir.path(), "m", &m, 1, &["Q4_0", "--pre", "qwen2"])).unwrap();
    assert_eq!(g.str("tokenizer.ggml.pre").unwrap(), Some("qwen2"));
}
