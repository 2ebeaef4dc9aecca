//! Tensors of a checkpoint and what they are in GGUF: one list, by which everything is found, checked and claimed.

use super::config::{Config, Family, Scaling};
use crate::mmap::Bytes;
use crate::quantize::source::{Order, Rows, Tensor};
use crate::safetensors::{Checkpoint, CheckpointError};
use oxcart_quant::Format;
use std::collections::BTreeSet;
use std::f32::consts::PI;

/// Ends of names that are no weights: what some versions of the tools stored of their own.
const NO_WEIGHTS: &[&str] = &[".attention.masked_bias", ".attention.bias", ".rotary_emb.inv_freq"];

/// Collects tensors, each checked against its shape.
struct Builder<'a> {
    checkpoint: &'a Checkpoint,
    claimed: BTreeSet<String>,
    tensors: Vec<Tensor>,
}

impl Builder<'_> {
    /// A tensor of which one or several of the checkpoint (experts, one after another) become one. `shape` is of each, the
    /// slowest extent first.
    fn add(&mut self, name: &str, from: &[String], shape: &[u64], order: Order) -> Result<(), CheckpointError> {
        let c = self.checkpoint;
        let (mut pieces, mut format): (Vec<Bytes>, Option<Format>) = (Vec::with_capacity(from.len()), None);
        for from in from {
            let (t, f) = c.weights(from)?;
            if t.shape.iter().map(|&n| n as u64).ne(shape.iter().copied()) {
                return Err(c.unfit(from, format!("shape {:?}, expected {shape:?} by config.json", t.shape)));
            }
            if *format.get_or_insert(f) != f {
                let first = format.map_or("", Format::name);
                return Err(c.unfit(from, format!("is {}, expected {first} as the experts before it", f.name())));
            }
            pieces.push(t.bytes.clone());
            self.claimed.insert(from.clone());
        }
        let Some(format) = format else { return Ok(()) };
        let mut dims: Vec<u64> = shape.iter().rev().copied().collect();
        if name.contains("_exps.") {
            dims.push(from.len() as u64);
        }
        // The converter keeps norms, biases and the routers of experts in F32.
        let matrix = shape.len() > 1 && !name.ends_with("ffn_gate_inp.weight");
        let plain = if matrix { format } else { Format::F32 };
        self.tensors.push(Tensor::new(name.to_string(), dims, format, plain, Rows::Pieces { pieces, order }));
        Ok(())
    }

    fn has(&self, name: &str) -> bool {
        self.checkpoint.tensors().contains_key(name)
    }

    /// A linear layer (rows, columns), with its bias if there is one or must be one.
    fn linear(
        &mut self,
        name: &str,
        from: &str,
        (rows, cols): (u64, u64),
        order: Order,
        bias: bool,
    ) -> Result<(), CheckpointError> {
        self.add(&format!("{name}.weight"), &[format!("{from}.weight")], &[rows, cols], order)?;
        let own = format!("{from}.bias");
        if !bias && !self.has(&own) {
            return Ok(());
        }
        self.add(&format!("{name}.bias"), &[own], &[rows], Order::Same)?;
        // A bias is one row: its elements move as the rows of the matrix do.
        if let Some(bias) = self.tensors.last_mut().filter(|_| order != Order::Same) {
            bias.reorder(order);
        }
        Ok(())
    }
}

/// Every tensor of the model.
pub fn tensors(checkpoint: &Checkpoint, c: &Config) -> Result<Vec<Tensor>, CheckpointError> {
    let mut b = Builder { checkpoint, claimed: BTreeSet::new(), tensors: Vec::new() };
    if let Some(factors) = rope_factors(c) {
        let bytes = factors.iter().flat_map(|f| f.to_le_bytes()).collect();
        let rows = Rows::Pieces { pieces: vec![Bytes::owned(bytes)], order: Order::Same };
        let dims = vec![factors.len() as u64];
        b.tensors.push(Tensor::new("rope_freqs.weight".into(), dims, Format::F32, Format::F32, rows));
    }
    let one = |name: &str| [name.to_string()];
    b.add("token_embd.weight", &one("model.embed_tokens.weight"), &[c.n_vocab, c.dim], Order::Same)?;
    b.add("output_norm.weight", &one("model.norm.weight"), &[c.dim], Order::Same)?;
    if !c.tied || b.has("lm_head.weight") {
        b.add("output.weight", &one("lm_head.weight"), &[c.n_vocab, c.dim], Order::Same)?;
    }
    let (q_dim, kv_dim) = (c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim);
    let qwen2 = c.family == Family::Qwen2;
    // Qwen's rotation turns halves in both formats.
    let turned = if qwen2 { Order::Same } else { Order::Interleaved { head_dim: c.head_dim as usize } };
    for i in 0..c.n_layers {
        let to = |n: &str| format!("blk.{i}.{n}");
        let from = |n: &str| format!("model.layers.{i}.{n}");
        b.add(&to("attn_norm.weight"), &[from("input_layernorm.weight")], &[c.dim], Order::Same)?;
        b.linear(&to("attn_q"), &from("self_attn.q_proj"), (q_dim, c.dim), turned, qwen2)?;
        b.linear(&to("attn_k"), &from("self_attn.k_proj"), (kv_dim, c.dim), turned, qwen2)?;
        b.linear(&to("attn_v"), &from("self_attn.v_proj"), (kv_dim, c.dim), Order::Same, qwen2)?;
        b.linear(&to("attn_output"), &from("self_attn.o_proj"), (c.dim, q_dim), Order::Same, false)?;
        b.add(&to("ffn_norm.weight"), &[from("post_attention_layernorm.weight")], &[c.dim], Order::Same)?;
        let Some(experts) = c.experts else {
            for (n, shape) in [("gate", (c.ffn_dim, c.dim)), ("up", (c.ffn_dim, c.dim)), ("down", (c.dim, c.ffn_dim))] {
                b.linear(&to(&format!("ffn_{n}")), &from(&format!("mlp.{n}_proj")), shape, Order::Same, false)?;
            }
            continue;
        };
        let router = [from("block_sparse_moe.gate.weight")];
        b.add(&to("ffn_gate_inp.weight"), &router, &[experts.count, c.dim], Order::Same)?;
        for (w, n, shape) in
            [("w1", "gate", [c.ffn_dim, c.dim]), ("w2", "down", [c.dim, c.ffn_dim]), ("w3", "up", [c.ffn_dim, c.dim])]
        {
            let each = |e| from(&format!("block_sparse_moe.experts.{e}.{w}.weight"));
            let all: Vec<String> = (0..experts.count).map(each).collect();
            b.add(&to(&format!("ffn_{n}_exps.weight")), &all, &shape, Order::Same)?;
        }
    }
    let mut rest = checkpoint.tensors().keys().filter(|t| !b.claimed.contains(*t));
    match rest.find(|t| !NO_WEIGHTS.iter().any(|end| t.ends_with(end))) {
        Some(t) => Err(checkpoint.unfit(t, "has no place in a model of this config.json")),
        None => Ok(b.tensors),
    }
}

/// Llama 3.1's divisors of RoPE's frequencies: 1 for short wavelengths, `factor` for long ones, between them a blend. In
/// f32 throughout, as the converter computes them: torch divides a number by a tensor by way of the tensor's reciprocal.
fn rope_factors(c: &Config) -> Option<Vec<f32>> {
    let Some(Scaling::Llama3 { factor, high, low, original }) = c.scaling else { return None };
    let (factor, high, low, original) = (factor as f32, high as f32, low as f32, original as f32);
    let one = |i: u64| {
        let freq = 1.0 / (c.rope_base as f32).powf((2 * i) as f32 / c.head_dim as f32);
        let wavelength = 1.0 / freq * (2.0 * PI);
        if wavelength < original / high {
            return 1.0;
        }
        if wavelength > original / low {
            return factor;
        }
        let smooth = (1.0 / wavelength * original - low) / (high - low);
        1.0 / ((1.0 - smooth) / factor + smooth)
    };
    Some((0..c.head_dim / 2).map(one).collect())
}
