//! Checkpoint folders for tests: small models with random weights, written byte for byte.

use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

/// A tensor: element type, shape, values.
#[derive(Clone)]
pub struct Tensor {
    pub dtype: String,
    pub shape: Vec<usize>,
    pub values: Vec<f32>,
}

/// A model that is not yet written.
#[derive(Clone)]
pub struct Model {
    pub config: Value,
    pub tensors: BTreeMap<String, Tensor>,
    pub tokenizer: Value,
    pub settings: Value,
}

/// Random numbers, the same on every machine.
pub struct Random(pub u64);

impl Random {
    /// In (-1, 1), about as many small as large ones on a logarithmic scale near the ends.
    pub fn next(&mut self) -> f32 {
        self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        let unit = (self.0 >> 40) as f32 / (1u64 << 24) as f32;
        let x = 2.0 * unit - 1.0;
        x * x * x
    }
}

/// Widths and numbers of a model: odd ones, of which hardly any is a multiple of a power of two.
pub const DIM: usize = 192;
pub const FFN: usize = 352;
pub const HEADS: usize = 6;
pub const KV_HEADS: usize = 3;
pub const HEAD_DIM: usize = 32;
pub const LAYERS: usize = 5;
pub const VOCAB: usize = 264;
pub const EXPERTS: usize = 4;

/// A model of a class of Hugging Face's, its weights from `seed`, stored as `dtype`.
pub fn model(class: &str, dtype: &str, seed: u64) -> Model {
    let (qwen2, mixtral) = (class == "Qwen2ForCausalLM", class == "MixtralForCausalLM");
    let mut config = json!({
        "architectures": [class], "hidden_size": DIM, "intermediate_size": FFN, "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS, "num_hidden_layers": LAYERS, "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "vocab_size": VOCAB, "tie_word_embeddings": false,
        "bos_token_id": 256, "eos_token_id": 257,
    });
    if mixtral {
        config["num_local_experts"] = EXPERTS.into();
        config["num_experts_per_tok"] = 2.into();
    }
    let mut m = Model { config, tensors: BTreeMap::new(), tokenizer: tokenizer(), settings: settings() };
    let mut random = Random(seed);
    let mut add = |name: &str, shape: &[usize], scale: f32, offset: f32| {
        let n = shape.iter().product();
        let values = (0..n).map(|_| rounded(dtype, offset + scale * random.next())).collect();
        m.tensors.insert(name.into(), Tensor { dtype: dtype.into(), shape: shape.to_vec(), values });
    };
    add("model.embed_tokens.weight", &[VOCAB, DIM], 1.0, 0.0);
    add("model.norm.weight", &[DIM], 0.2, 1.0);
    add("lm_head.weight", &[VOCAB, DIM], 0.3, 0.0);
    for i in 0..LAYERS {
        let p = format!("model.layers.{i}.");
        for (n, rows, cols) in [
            ("q", HEADS * HEAD_DIM, DIM),
            ("k", KV_HEADS * HEAD_DIM, DIM),
            ("v", KV_HEADS * HEAD_DIM, DIM),
            ("o", DIM, HEADS * HEAD_DIM),
        ] {
            add(&format!("{p}self_attn.{n}_proj.weight"), &[rows, cols], 0.25, 0.0);
            if qwen2 && n != "o" {
                add(&format!("{p}self_attn.{n}_proj.bias"), &[rows], 0.5, 0.0);
            }
        }
        add(&format!("{p}input_layernorm.weight"), &[DIM], 0.2, 1.0);
        add(&format!("{p}post_attention_layernorm.weight"), &[DIM], 0.2, 1.0);
        if !mixtral {
            for (n, rows, cols) in [("gate", FFN, DIM), ("up", FFN, DIM), ("down", DIM, FFN)] {
                add(&format!("{p}mlp.{n}_proj.weight"), &[rows, cols], 0.25, 0.0);
            }
            continue;
        }
        add(&format!("{p}block_sparse_moe.gate.weight"), &[EXPERTS, DIM], 0.1, 0.0);
        for e in 0..EXPERTS {
            for (n, rows, cols) in [("w1", FFN, DIM), ("w3", FFN, DIM), ("w2", DIM, FFN)] {
                add(&format!("{p}block_sparse_moe.experts.{e}.{n}.weight"), &[rows, cols], 0.25, 0.0);
            }
        }
    }
    m
}

/// A value as a type can hold it.
fn rounded(dtype: &str, x: f32) -> f32 {
    match dtype {
        "F16" => half::f16::from_f32(x).to_f32(),
        "BF16" => half::bf16::from_f32(x).to_f32(),
        _ => x,
    }
}

/// The letters that stand for bytes in byte-level vocabularies, a merge, and two special tokens.
fn tokenizer() -> Value {
    let plain = |b: u32| (33..=126).contains(&b) || (161..=172).contains(&b) || (174..=255).contains(&b);
    let mut next = 255;
    let mut vocab = serde_json::Map::new();
    for b in 0..256u32 {
        let letter = if plain(b) {
            b
        } else {
            next += 1;
            next
        };
        vocab.insert(char::from_u32(letter).unwrap().to_string(), b.into());
    }
    vocab.insert("th".into(), 258.into());
    let special = |id: u32, text: &str| json!({"id": id, "content": text, "special": true, "normalized": false});
    json!({
        "version": "1.0",
        "added_tokens": [special(256, "<|begin|>"), special(257, "<|end|>"),
                         {"id": 259, "content": "<tool>", "special": false}],
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "use_regex": true},
        "model": {"type": "BPE", "vocab": vocab, "merges": [["t", "h"]]},
    })
}

fn settings() -> Value {
    json!({"bos_token": "<|begin|>", "eos_token": {"content": "<|end|>"}, "add_bos_token": true,
           "chat_template": "{{ messages[0].content }}"})
}

/// The bytes of a tensor.
pub fn bytes(t: &Tensor) -> Vec<u8> {
    match t.dtype.as_str() {
        "F16" => t.values.iter().flat_map(|&x| half::f16::from_f32(x).to_le_bytes()).collect(),
        "BF16" => t.values.iter().flat_map(|&x| half::bf16::from_f32(x).to_le_bytes()).collect(),
        _ => t.values.iter().flat_map(|&x| x.to_le_bytes()).collect(),
    }
}

/// A safetensors file of these tensors.
pub fn shard<'a>(tensors: impl IntoIterator<Item = (&'a String, &'a Tensor)>) -> Vec<u8> {
    let (mut header, mut data) = (serde_json::Map::new(), Vec::new());
    for (name, t) in tensors {
        let from = data.len();
        data.extend(bytes(t));
        let info = json!({"dtype": t.dtype, "shape": t.shape, "data_offsets": [from, data.len()]});
        header.insert(name.clone(), info);
    }
    raw(&serde_json::to_string(&header).unwrap(), &data)
}

/// A safetensors file with this header.
pub fn raw(header: &str, data: &[u8]) -> Vec<u8> {
    [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), data].concat()
}

impl Model {
    /// Writes the folder, its weights in `shards` files.
    pub fn write(&self, dir: &Path, shards: usize) {
        fs::create_dir_all(dir).unwrap();
        let file = |name: &str, v: &Value| fs::write(dir.join(name), v.to_string()).unwrap();
        file("config.json", &self.config);
        file("tokenizer.json", &self.tokenizer);
        file("tokenizer_config.json", &self.settings);
        if shards == 1 {
            fs::write(dir.join("model.safetensors"), shard(&self.tensors)).unwrap();
            return;
        }
        let all: Vec<_> = self.tensors.iter().collect();
        let mut map = serde_json::Map::new();
        for (i, part) in all.chunks(all.len().div_ceil(shards)).enumerate() {
            let name = format!("model-{:05}-of-{shards:05}.safetensors", i + 1);
            fs::write(dir.join(&name), shard(part.iter().copied())).unwrap();
            part.iter().for_each(|(t, _)| drop(map.insert(t.to_string(), name.clone().into())));
        }
        file("model.safetensors.index.json", &json!({"metadata": {}, "weight_map": map}));
    }
}
