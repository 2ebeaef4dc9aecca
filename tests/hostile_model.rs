//! Models that a GGUF can hold and that cannot be computed: refused when they are opened, or where the first number is none.

#[allow(dead_code)] // what other tests need of it
#[path = "common/checkpoint.rs"]
mod checkpoint;

use assert_cmd::Command;
use oxcart::chat::Template;
use oxcart::chat::history::{Conversation, list};
use oxcart::engine::{Engine, EngineOptions};
use oxcart::gguf::{Gguf, GgufWriter, MetadataValue, NewTensor, Parts, Strings, TensorKind, Value};
use oxcart::tokenizer::Tokenizer;
use std::fs;
use std::path::{Path, PathBuf};

/// A model as a file, whose metadata and tensors (name, extents, numbers) may be changed before it is written.
struct Model {
    metadata: Vec<(String, Value)>,
    tensors: Vec<(NewTensor, Vec<u8>)>,
}

impl Model {
    fn new(dir: &Path, class: &str) -> Model {
        let (folder, file) = (dir.join("folder"), dir.join("whole.gguf"));
        checkpoint::model(class, "F32", 5).write(&folder, 1);
        oxcart(&["quantize"], &[&folder, &file], &["F32", "1"]).assert().success();
        let g = Gguf::open(&file).unwrap();
        let tensor = |t: &oxcart::gguf::Tensor| {
            (NewTensor { name: t.name.clone(), dims: t.dims.clone(), kind: t.kind }, t.bytes().to_vec())
        };
        Model {
            metadata: g.metadata().map(|(k, v)| (k.to_string(), v.clone())).collect(),
            tensors: g.tensors().iter().map(tensor).collect(),
        }
    }

    fn set(&mut self, key: &str, value: Value) {
        self.metadata.retain(|(k, _)| k != key);
        self.metadata.push((key.into(), value));
    }

    /// Puts a number at the place `at` of a tensor.
    fn put(&mut self, tensor: &str, at: usize, x: f32) {
        let (_, bytes) = self.tensors.iter_mut().find(|(t, _)| t.name == tensor).unwrap();
        bytes[4 * at..4 * at + 4].copy_from_slice(&x.to_le_bytes());
    }

    fn add(&mut self, name: &str, numbers: &[f32]) {
        let (dims, kind) = (vec![numbers.len() as u64], TensorKind::from_id(0).unwrap());
        let bytes = numbers.iter().flat_map(|x| x.to_le_bytes()).collect();
        self.tensors.push((NewTensor { name: name.into(), dims, kind }, bytes));
    }

    fn write(&self, path: &Path) {
        let tensors = self.tensors.iter().map(|(t, _)| t.clone()).collect();
        let mut w = GgufWriter::create(path, self.metadata.clone(), tensors, &Parts::One).unwrap();
        self.tensors.iter().for_each(|(_, bytes)| w.push(bytes).unwrap());
        w.finish().unwrap();
    }
}

fn oxcart(before: &[&str], paths: &[&Path], behind: &[&str]) -> Command {
    let mut c = Command::cargo_bin("oxcart").unwrap();
    c.args(before).args(paths).args(behind);
    c
}

#[test]
fn models_that_cannot_be_computed_are_not_opened() {
    type Change = fn(&mut Model);
    let cases: [(&str, &str, Change); 19] = [
        ("Qwen2ForCausalLM", "tensor output_norm.weight: 1 of 192 numbers are NaN or infinite", |m| {
            m.put("output_norm.weight", 7, f32::NAN)
        }),
        ("Qwen2ForCausalLM", "tensor blk.1.attn_k.bias: 1 of 96 numbers are NaN or infinite", |m| {
            m.put("blk.1.attn_k.bias", 0, f32::NEG_INFINITY)
        }),
        ("LlamaForCausalLM", "tensor rope_freqs.weight: found 0, expected numbers above 0", |m| {
            m.add("rope_freqs.weight", &[0.0; 16])
        }),
        ("LlamaForCausalLM", "tensor rope_freqs.weight: found -1, expected numbers above 0", |m| {
            m.add("rope_freqs.weight", &[-1.0; 16])
        }),
        ("MixtralForCausalLM", "tensor blk.0.ffn_gate_inp.weight: 1 of 768 numbers are NaN", |m| {
            m.put("blk.0.ffn_gate_inp.weight", 3, f32::NAN)
        }),
        ("LlamaForCausalLM", "tokenizer.ggml.tokens: 270 tokens, the model has embeddings of 264", |m| {
            m.set("tokenizer.ggml.tokens", Value::Strings((0..270).map(|i| i.to_string()).collect::<Strings>()));
            m.metadata.retain(|(k, _)| k != "tokenizer.ggml.token_type");
        }),
        ("MixtralForCausalLM", "llama.expert_used_count: missing, expected 1 to 4", |m| {
            m.metadata.retain(|(k, _)| k != "llama.expert_used_count")
        }),
        ("MixtralForCausalLM", "llama.expert_used_count: found 5, expected 1 to 4", |m| {
            m.set("llama.expert_used_count", MetadataValue::U32(5).into())
        }),
        ("LlamaForCausalLM", "llama.attention.head_count_kv: 4 key heads do not divide 6 query heads", |m| {
            m.set("llama.attention.head_count_kv", MetadataValue::U32(4).into())
        }),
        ("Qwen2ForCausalLM", "qwen2.attention.head_count: 5 heads do not divide a width of 192", |m| {
            m.metadata.retain(|(k, _)| k != "qwen2.attention.key_length");
            m.set("qwen2.attention.head_count", MetadataValue::U32(5).into())
        }),
        ("LlamaForCausalLM", "llama.attention.key_length: heads of 24 and 24, expected both the same multiple", |m| {
            m.set("llama.attention.key_length", MetadataValue::U32(24).into());
            m.set("llama.attention.value_length", MetadataValue::U32(24).into())
        }),
        ("LlamaForCausalLM", "llama.attention.key_length: heads of 32 and 16, expected both the same multiple", |m| {
            m.set("llama.attention.value_length", MetadataValue::U32(16).into())
        }),
        ("LlamaForCausalLM", "llama.rope.dimension_count: found 34, expected an even number up to 32", |m| {
            m.set("llama.rope.dimension_count", MetadataValue::U32(34).into())
        }),
        ("LlamaForCausalLM", "llama.rope.dimension_count: found 31, expected an even number up to 32", |m| {
            m.set("llama.rope.dimension_count", MetadataValue::U32(31).into())
        }),
        ("LlamaForCausalLM", "llama.rope.scaling.type: found \"longrope\", oxcart runs none, linear, yarn", |m| {
            m.set("llama.rope.scaling.type", MetadataValue::String("longrope".into()).into())
        }),
        ("LlamaForCausalLM", "llama.block_count: found 4097, expected at most 4096", |m| {
            m.set("llama.block_count", MetadataValue::U32(4097).into())
        }),
        ("LlamaForCausalLM", "tensor token_embd.weight: missing", |m| {
            m.tensors.retain(|(t, _)| t.name != "token_embd.weight")
        }),
        ("LlamaForCausalLM", "general.architecture: found \"", |m| {
            m.set("general.architecture", Value::from(MetadataValue::String("x".repeat(100_000))))
        }),
        ("LlamaForCausalLM", "tokenizer.ggml.pre: found \"", |m| {
            m.set("tokenizer.ggml.pre", Value::from(MetadataValue::String("x".repeat(100_000))))
        }),
    ];
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("m.gguf");
    let mut wrong = Vec::new();
    for (class, want, change) in cases {
        let mut m = Model::new(dir.path(), class);
        change(&mut m);
        m.write(&path);
        match Engine::open(&path, &EngineOptions { threads: 1, ..EngineOptions::default() }) {
            Ok(_) => wrong.push(format!("{want}: opened")),
            Err(e) => {
                let e = e.to_string();
                if !e.starts_with(&format!("{}: {want}", path.display())) || e.len() > 700 {
                    wrong.push(format!("{want}: {e:.1000}"));
                }
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// A matrix may hold anything; what comes of it is looked at.
#[test]
fn figures_of_what_is_no_number_are_errors() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    let (sound, nan) = (path("sound.gguf"), path("nan.gguf"));
    let mut m = Model::new(dir.path(), "LlamaForCausalLM");
    m.write(&sound);
    m.put("blk.2.attn_v.weight", 0, f32::NAN);
    m.write(&nan);
    let (text, tasks, base) = (path("text"), path("tasks"), path("base"));
    fs::write(&text, "the ox and the cart ".repeat(40)).unwrap();
    fs::write(&tasks, "{\"question\":\"An ox\",\"choices\":[\"pulls\",\"sings\"],\"answer\":0}\n".repeat(3)).unwrap();
    let said = |words: &[&str], paths: &[&Path], behind: &[&str]| {
        let mut c = oxcart(words, paths, behind);
        let out = c.env("XDG_CACHE_HOME", dir.path().join("cache")).output().unwrap();
        (out.status.code(), String::from_utf8_lossy(&out.stderr).lines().last().unwrap_or_default().to_string())
    };
    let made = said(
        &["perplexity", "-c", "32", "-m"],
        &[&sound, "-f".as_ref(), &text, "--kl-divergence-base".as_ref(), &base],
        &[],
    );
    assert_eq!(made.0, Some(0), "{}", made.1);
    let before = fs::read_dir(dir.path()).unwrap().count();
    let other: PathBuf = path("other");
    type Case<'a> = (&'a [&'a str], &'a [&'a Path], &'a [&'a str], &'a str);
    let cases: &[Case<'_>] = &[
        (
            &["run", "-n", "4", "-p", "the ox", "-m"],
            &[&nan],
            &[],
            "nan.gguf: logits that are NaN or infinite behind 6 tokens",
        ),
        (
            &["perplexity", "-c", "32", "-m"],
            &[&nan, "-f".as_ref(), &text],
            &[],
            "nan.gguf: chunk 1: logits that are NaN",
        ),
        (
            &["perplexity", "-c", "32", "-m"],
            &[&nan, "-f".as_ref(), &text],
            &["--ppl-stride", "16"],
            "nan.gguf: window 1: logits",
        ),
        (
            &["perplexity", "-c", "32", "-m"],
            &[&nan, "-f".as_ref(), &text, "--kl-divergence-base".as_ref(), &other],
            &[],
            "nan.gguf: chunk 1: logits that are NaN",
        ),
        (
            &["perplexity", "--kl-divergence", "-m"],
            &[&nan, "--kl-divergence-base".as_ref(), &base],
            &[],
            "nan.gguf: chunk 1: logits that are NaN",
        ),
        (
            &["perplexity", "--multiple-choice", "-m"],
            &[&nan, "-f".as_ref(), &tasks],
            &[],
            "nan.gguf: question 1: logits that",
        ),
        (&["compare", "-c", "32", "-f"], &[&text, &sound, &nan], &[], "nan.gguf: chunk 1: logits that are NaN"),
        (&["compare", "-c", "32", "-f"], &[&text, &nan, &sound], &[], "nan.gguf: chunk 1: logits that are NaN"),
        (&["compare", "-c", "32", "-f"], &[&text, &sound, &sound, &nan], &[], "nan.gguf: chunk 1: logits"),
        (&["imatrix", "-c", "32", "-m"], &[&nan, "-f".as_ref(), &text, "-o".as_ref(), &other], &[], "chunk 1: logits"),
        (
            &["imatrix", "-c", "32", "-m"],
            &[&nan, "-f".as_ref(), &text, "-o".as_ref(), &other],
            &["--no-ppl"],
            "nan.gguf: blk.2.attn_output.weight: activations that are NaN or infinite",
        ),
    ];
    let mut wrong = Vec::new();
    for (words, paths, behind, want) in cases {
        let (status, last) = said(words, paths, behind);
        if status != Some(1) || !last.contains(want) {
            wrong.push(format!("{words:?} {behind:?}: {status:?} {last}"));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), before, "files were left");
}

/// A question is on disk as soon as it is asked, whatever becomes of its answer.
#[test]
fn a_question_that_has_no_answer_is_kept() {
    let dir = tempfile::tempdir().unwrap();
    let (nan, config, kept) = (dir.path().join("nan.gguf"), dir.path().join("config.toml"), dir.path().join("kept"));
    let mut m = Model::new(dir.path(), "LlamaForCausalLM");
    m.put("blk.2.attn_v.weight", 0, f32::NAN);
    m.write(&nan);
    let name = toml::Value::from(kept.to_str().unwrap());
    fs::write(&config, format!("[conversations]\ndir = {name}\n")).unwrap();
    let chat = |flag: &str, input: &str| {
        let mut c = oxcart(&["chat", "--line", flag, "-c", "256", "-m"], &[&nan], &[]);
        c.env("OXCART_CONFIG", &config).write_stdin(input);
        let out = c.assert().code(1).get_output().clone();
        String::from_utf8_lossy(&out.stderr).into_owned()
    };
    let said = chat("--save", "What is an ox?\n");
    assert!(said.contains("nan.gguf: logits that are NaN or infinite"), "{said}");
    let said = chat("--continue", "/regen\n");
    assert!(said.contains("the last question has no answer yet: /regen gives one"), "{said}");
    let found = list(&kept);
    let turns = |c: &Conversation| c.turns().iter().map(|t| t.content.clone()).collect::<Vec<_>>();
    assert_eq!(found.len(), 1);
    assert_eq!(turns(&Conversation::read(&found[0].path).unwrap()), ["What is an ox?"]);
}

#[test]
fn errors_name_the_file_once() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("m.gguf");
    let named = |said: &str| said.matches(path.to_str().unwrap()).count();
    let mut m = Model::new(dir.path(), "LlamaForCausalLM");
    let source = "{{ raise_exception('no such role') }}".to_string();
    m.set("tokenizer.chat_template", MetadataValue::String(source).into());
    m.write(&path);
    let g = Gguf::open(&path).unwrap();
    let template = Template::from_gguf(&g, &Tokenizer::from_gguf(&g).unwrap()).unwrap();
    let said = template.render(&[], true).unwrap_err().to_string();
    assert!(said.contains("no such role") && named(&said) == 1, "{said}");
    let out = dir.path().join("out.gguf");
    let o = oxcart(&["quantize", "--override-kv", "llama.block_count=str:x"], &[&path, &out], &["Q4_0"]);
    let said = last_line(o);
    assert!(said.contains("llama.block_count: found string x") && named(&said) == 1, "{said}");
    for (verb, behind) in [("run", &["-p", "x"][..]), ("tokenize", &["-p", "x"])] {
        for (spec, problem) in [("tokens=str:x", "found string x"), ("eos_token_id=int:99999", "found 99999")] {
            let spec = format!("tokenizer.ggml.{spec}");
            let said = last_line(oxcart(&[verb, "--override-kv", &spec, "-m"], &[&path], behind));
            assert!(said.contains(problem) && named(&said) == 1, "{verb}: {said}");
        }
    }
    m.set("llama.feed_forward_length", MetadataValue::U64(1 << 40).into());
    m.write(&path);
    let said = last_line(oxcart(&["plan", "--no-probe"], &[&path], &[]));
    assert!(said.contains("more than 2^64 bytes") && named(&said) == 1, "{said}");
    m.set("llama.feed_forward_length", MetadataValue::U64(1 << 60).into());
    m.set("llama.expert_used_count", MetadataValue::U32(1024).into());
    m.write(&path);
    for verb in [&["plan", "--no-probe"][..], &["inspect"]] {
        let said = last_line(oxcart(verb, &[&path], &[]));
        let problem = "llama.feed_forward_length: found 1152921504606846976, expected at most 18014398509481983";
        assert!(said.contains(problem) && named(&said) == 1, "{said}");
    }
}

#[test]
fn a_model_s_name_does_not_command_the_terminal() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("m.gguf");
    let mut m = Model::new(dir.path(), "LlamaForCausalLM");
    m.set("general.name", Value::from(MetadataValue::String("evil\u{1b}]0;x\u{7}\nname".into())));
    m.write(&path);
    for (words, behind) in [(&["plan"][..], &["--no-probe"][..]), (&["run", "-n", "1", "-p", "x", "-m"], &[])] {
        let out = oxcart(words, &[&path], behind).assert().success().get_output().clone();
        let said = [out.stdout, out.stderr].map(|b| String::from_utf8_lossy(&b).into_owned()).concat();
        assert!(said.contains(r"evil\u{1b}]0;x\u{7}\nname") && !said.contains('\u{1b}'), "{words:?}: {said:?}");
    }
}

/// Of a program that fails, the last line of what it says.
fn last_line(mut c: Command) -> String {
    let out = c.assert().failure().get_output().clone();
    String::from_utf8_lossy(&out.stderr).lines().last().unwrap_or_default().to_string()
}
