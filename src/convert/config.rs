//! `config.json`: the numbers of a model, each checked, and the keys that they become.

use super::{Metadata, unfit};
use crate::safetensors::{Checkpoint, CheckpointError};
use serde_json::{Map, Value};

const FILE: &str = "config.json";
/// The key of the positions of training, which stands beside those of RoPE or at the top.
const ORIGINAL: &str = "original_max_position_embeddings";
/// The most bytes of a `config.json`; real ones have some thousand.
const MOST_BYTES: u64 = 4 << 20;
/// More than any model has, and little enough that no product of two overflows.
const MOST: u64 = 1 << 28;
/// The most layers, and the most experts of a layer.
const MOST_LAYERS: u64 = 4096;
/// The most tokens.
const MOST_TOKENS: u64 = 4 << 20;

/// The families of models that can be converted.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Family {
    /// Qwen 1.5, 2, 2.5
    Qwen2,
    /// Llama, Mistral
    Llama,
    /// Mixtral
    Mixtral,
}

/// Class names of Hugging Face's and their families; RoPE's base where a file does not say it.
const FAMILIES: &[(&str, Family, f64)] = &[
    ("Qwen2ForCausalLM", Family::Qwen2, 1e4),
    ("LlamaForCausalLM", Family::Llama, 1e4),
    ("LLaMAForCausalLM", Family::Llama, 1e4),
    ("MistralForCausalLM", Family::Llama, 1e4),
    ("MixtralForCausalLM", Family::Mixtral, 1e6),
];

impl Family {
    /// GGUF's `general.architecture`.
    pub fn arch(self) -> &'static str {
        match self {
            Family::Qwen2 => "qwen2",
            Family::Llama | Family::Mixtral => "llama",
        }
    }
}

/// How RoPE is stretched beyond the positions of training.
#[derive(Clone, Copy, PartialEq, Debug)]
pub enum Scaling {
    /// Positions are divided.
    Linear {
        /// By this.
        factor: f64,
    },
    /// YaRN.
    Yarn {
        /// How far.
        factor: f64,
        /// Positions of training.
        original: u64,
        /// Its further parameters, where the file has them, by GGUF's names.
        parameters: [(&'static str, Option<f64>); 4],
    },
    /// Llama 3.1's: every frequency has a divisor of its own.
    Llama3 {
        /// The divisor of the lowest frequencies.
        factor: f64,
        /// Up to which wavelengths nothing is divided, as a share of `original`.
        high: f64,
        /// From which wavelengths on all is divided, as a share of `original`.
        low: f64,
        /// Positions of training.
        original: u64,
    },
}

/// A mixture of experts.
#[derive(Clone, Copy)]
pub struct Experts {
    /// In a layer.
    pub count: u64,
    /// For a token.
    pub used: u64,
}

/// The numbers of a model.
pub struct Config {
    /// Its family.
    pub family: Family,
    /// Layers.
    pub n_layers: u64,
    /// Width of the residual stream.
    pub dim: u64,
    /// Width of the feed-forward layer.
    pub ffn_dim: u64,
    /// Query heads.
    pub n_heads: u64,
    /// Key and value heads.
    pub n_kv_heads: u64,
    /// Width of a head.
    pub head_dim: u64,
    /// Whether `head_dim` is said, not derived.
    explicit_head_dim: bool,
    /// Tokens.
    pub n_vocab: u64,
    /// Positions.
    n_context: u64,
    norm_eps: f64,
    /// The base of RoPE's frequencies.
    pub rope_base: f64,
    /// RoPE's scaling, if there is any.
    pub scaling: Option<Scaling>,
    /// The experts, if there are any.
    pub experts: Option<Experts>,
    /// Whether the embeddings serve as output matrix.
    pub tied: bool,
    /// What is computed otherwise than by the original.
    pub remark: Option<CheckpointError>,
    /// `{bos,eos,…}_token_id`.
    pub token_ids: Map<String, Value>,
}

/// An object of the file, and how errors call it.
struct Keys<'a> {
    checkpoint: &'a Checkpoint,
    prefix: &'static str,
    map: &'a Map<String, Value>,
}

impl Keys<'_> {
    fn fail(&self, key: &str, problem: String) -> CheckpointError {
        unfit(self.checkpoint, FILE, format_args!("{}{key}", self.prefix), problem)
    }

    /// A value; null is none.
    fn get(&self, key: &str) -> Option<&Value> {
        self.map.get(key).filter(|v| !v.is_null())
    }

    fn count(&self, key: &str, most: u64) -> Result<Option<u64>, CheckpointError> {
        match self.get(key) {
            None => Ok(None),
            Some(v) => match v.as_u64() {
                Some(n) if (1..=most).contains(&n) => Ok(Some(n)),
                _ => Err(self.fail(key, format!("found {}, expected 1 to {most}", shown(v)))),
            },
        }
    }

    fn need(&self, key: &str, most: u64) -> Result<u64, CheckpointError> {
        self.count(key, most)?.ok_or_else(|| self.fail(key, "missing".into()))
    }

    fn positive(&self, key: &str) -> Result<Option<f64>, CheckpointError> {
        match self.get(key) {
            None => Ok(None),
            Some(v) => match v.as_f64() {
                Some(x) if x > 0.0 && x.is_finite() && x as f32 > 0.0 && (x as f32).is_finite() => Ok(Some(x)),
                _ => Err(self.fail(key, format!("found {}, expected a number above 0", shown(v)))),
            },
        }
    }

    fn bool(&self, key: &str) -> Result<bool, CheckpointError> {
        match self.get(key) {
            None => Ok(false),
            Some(Value::Bool(b)) => Ok(*b),
            Some(v) => Err(self.fail(key, format!("found {}, expected true or false", shown(v)))),
        }
    }

    /// Refuses RoPE that turns only a part of each head.
    fn check_whole_rope(&self) -> Result<(), CheckpointError> {
        match self.positive("partial_rotary_factor")? {
            Some(x) if x != 1.0 => Err(self.fail("partial_rotary_factor", format!("found {x}, expected 1"))),
            _ => Ok(()),
        }
    }

    fn object(&self, key: &str, prefix: &'static str) -> Result<Option<Keys<'_>>, CheckpointError> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Object(map)) => Ok(Some(Keys { checkpoint: self.checkpoint, prefix, map })),
            Some(v) => Err(self.fail(key, format!("found {}, expected an object", shown(v)))),
        }
    }

    fn str(&self, key: &str) -> Result<Option<&str>, CheckpointError> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::String(s)) => Ok(Some(s)),
            Some(v) => Err(self.fail(key, format!("found {}, expected a string", shown(v)))),
        }
    }
}

/// A value in an error.
fn shown(v: &Value) -> String {
    crate::gguf::one_line(&v.to_string(), 60)
}

impl Config {
    /// Reads and checks it.
    pub fn read(c: &Checkpoint) -> Result<Config, CheckpointError> {
        let map: Map<String, Value> = c.json(FILE, MOST_BYTES)?.ok_or_else(|| unfit(c, FILE, "open", "is missing"))?;
        let k = Keys { checkpoint: c, prefix: "", map: &map };
        let class = map.get("architectures").and_then(|a| a.get(0)).and_then(Value::as_str).unwrap_or_default();
        let Some(&(_, family, base)) = FAMILIES.iter().find(|(name, ..)| *name == class) else {
            let known: Vec<_> = FAMILIES.iter().map(|f| f.0).collect();
            let problem = format!("found {}, expected one of {}", shown(&class.into()), known.join(", "));
            return Err(k.fail("architectures", problem));
        };
        if let Some(q) = k.object("quantization_config", "quantization_config.")? {
            let method = q.str("quant_method")?.unwrap_or("some method");
            let problem = format!("the weights are quantized already ({method}), expected F32, F16 or BF16");
            return Err(k.fail("quantization_config", problem));
        }
        let (dim, n_heads) = (k.need("hidden_size", MOST)?, k.need("num_attention_heads", MOST)?);
        let n_kv_heads = k.count("num_key_value_heads", MOST)?.unwrap_or(n_heads);
        if !n_heads.is_multiple_of(n_kv_heads) {
            let problem = format!("found {n_kv_heads}, which does not divide {n_heads} query heads");
            return Err(k.fail("num_key_value_heads", problem));
        }
        let said = k.count("head_dim", 1 << 16)?;
        let head_dim = match said {
            Some(n) => n,
            None if dim.is_multiple_of(n_heads) => dim / n_heads,
            None => return Err(k.fail("num_attention_heads", format!("{n_heads} heads do not divide {dim}"))),
        };
        if !head_dim.is_multiple_of(2) {
            return Err(k.fail("head_dim", format!("found {head_dim}, expected an even number")));
        }
        let experts = match family {
            Family::Mixtral => {
                let (count, used) = (k.need("num_local_experts", MOST_LAYERS)?, k.need("num_experts_per_tok", MOST)?);
                if used > count {
                    return Err(k.fail("num_experts_per_tok", format!("found {used} of {count} experts")));
                }
                Some(Experts { count, used })
            }
            _ => None,
        };
        // Newer files gather what concerns RoPE in one object.
        let rope = match k.object("rope_parameters", "rope_parameters.")? {
            Some(rope) => Some(rope),
            None => k.object("rope_scaling", "rope_scaling.")?,
        };
        k.check_whole_rope()?;
        rope.as_ref().map_or(Ok(()), Keys::check_whole_rope)?;
        let n_context = k.need("max_position_embeddings", MOST)?;
        // llama.cpp's converter takes no notice of these, and makes a model of another function.
        if let Some(act) = k.str("hidden_act")?.filter(|act| !["silu", "swish"].contains(act)) {
            return Err(k.fail("hidden_act", format!("found {}, expected silu", shown(&act.into()))));
        }
        if k.bool("use_sliding_window")? && k.count("sliding_window", u64::MAX)?.is_some_and(|n| n < n_context) {
            let problem = "found true, expected attention to all positions".to_string();
            return Err(k.fail("use_sliding_window", problem));
        }
        // These classes need no flag. llama.cpp leaves their window out, too, and most texts are shorter.
        let windowed = ["MistralForCausalLM", "MixtralForCausalLM"].contains(&class);
        let window = if windowed { k.count("sliding_window", u64::MAX)? } else { None };
        let remark = window.filter(|&n| n < n_context).map(|n| {
            let problem = format!(
                "found {n}, but attention goes to all {n_context} positions: beyond {n} tokens, results are not the original's"
            );
            k.fail("sliding_window", problem)
        });
        let original = k.count(ORIGINAL, u32::MAX as u64)?;
        let in_rope = rope.as_ref().map(|r| r.positive("rope_theta")).transpose()?.flatten();
        Ok(Config {
            family,
            n_layers: k.need("num_hidden_layers", MOST_LAYERS)?,
            dim,
            ffn_dim: k.need("intermediate_size", MOST)?,
            n_heads,
            n_kv_heads,
            head_dim,
            explicit_head_dim: said.is_some(),
            n_vocab: k.need("vocab_size", MOST_TOKENS)?,
            n_context,
            norm_eps: k.positive("rms_norm_eps")?.ok_or_else(|| k.fail("rms_norm_eps", "missing".into()))?,
            rope_base: in_rope.or(k.positive("rope_theta")?).unwrap_or(base),
            scaling: rope.map(|r| scaling(&r, original)).transpose()?.flatten(),
            experts,
            tied: k.bool("tie_word_embeddings")?,
            remark,
            token_ids: map
                .iter()
                .filter(|(k, _)| k.ends_with("_token_id"))
                .map(|(k, v)| (k.clone(), v.clone()))
                .collect(),
        })
    }

    /// Writes the keys under the architecture's prefix.
    pub fn write(&self, m: &mut Metadata) {
        let arch = self.family.arch();
        let key = |k: &str| format!("{arch}.{k}");
        m.u32(&key("block_count"), self.n_layers);
        m.u32(&key("context_length"), self.n_context);
        m.u32(&key("embedding_length"), self.dim);
        m.u32(&key("feed_forward_length"), self.ffn_dim);
        m.u32(&key("attention.head_count"), self.n_heads);
        m.u32(&key("attention.head_count_kv"), self.n_kv_heads);
        match self.scaling {
            Some(Scaling::Linear { factor }) => {
                m.str(&key("rope.scaling.type"), "linear");
                m.f32(&key("rope.scaling.factor"), factor);
            }
            Some(Scaling::Yarn { factor, original, parameters }) => {
                m.str(&key("rope.scaling.type"), "yarn");
                m.f32(&key("rope.scaling.factor"), factor);
                m.u32(&key("rope.scaling.original_context_length"), original);
                for (name, value) in parameters {
                    value.into_iter().for_each(|x| m.f32(&key(&format!("rope.scaling.{name}")), x));
                }
            }
            // A tensor says it.
            Some(Scaling::Llama3 { .. }) | None => {}
        }
        m.f32(&key("rope.freq_base"), self.rope_base);
        m.f32(&key("attention.layer_norm_rms_epsilon"), self.norm_eps);
        if let Some(e) = self.experts {
            m.u32(&key("expert_count"), e.count);
            m.u32(&key("expert_used_count"), e.used);
        }
        // Configurations of llama and its kin have a width of heads whether the file says it or not.
        if self.explicit_head_dim || self.family != Family::Qwen2 {
            m.u32(&key("attention.key_length"), self.head_dim);
            m.u32(&key("attention.value_length"), self.head_dim);
        }
        if self.family != Family::Qwen2 {
            m.u32(&key("vocab_size"), self.n_vocab);
            m.u32(&key("rope.dimension_count"), self.head_dim);
        }
    }
}

/// RoPE's scaling; `original`: the positions of training as the top of the file has them.
fn scaling(r: &Keys<'_>, original: Option<u64>) -> Result<Option<Scaling>, CheckpointError> {
    let (kind_key, kind) = match r.str("rope_type")? {
        Some(kind) => ("rope_type", kind),
        None => ("type", r.str("type")?.unwrap_or("default")),
    };
    let factor = || r.positive("factor")?.ok_or_else(|| r.fail("factor", "missing".into()));
    let original = r.count(ORIGINAL, u32::MAX as u64)?.or(original);
    match kind {
        "default" => Ok(None),
        "linear" => Ok(Some(Scaling::Linear { factor: factor()? })),
        "yarn" => {
            let factor = factor()?;
            let original = original.ok_or_else(|| r.fail(ORIGINAL, "missing".into()))?;
            Ok(Some(Scaling::Yarn { factor, original, parameters: yarn_parameters(r, factor)? }))
        }
        "llama3" => {
            let (low, high) = (r.positive("low_freq_factor")?, r.positive("high_freq_factor")?);
            let (low, high) = (low.unwrap_or(1.0), high.unwrap_or(4.0));
            if low >= high {
                return Err(r.fail("low_freq_factor", format!("found {low}, expected below high_freq_factor, {high}")));
            }
            let factor = r.positive("factor")?.unwrap_or(8.0);
            Ok(Some(Scaling::Llama3 { factor, high, low, original: original.unwrap_or(8192) }))
        }
        other => {
            let problem = format!("found {}, expected default, linear, yarn or llama3", shown(&other.into()));
            Err(r.fail(kind_key, problem))
        }
    }
}

/// YaRN's parameters that GGUF has keys for; refuses values that would be computed as others.
fn yarn_parameters(r: &Keys<'_>, factor: f64) -> Result<[(&'static str, Option<f64>); 4], CheckpointError> {
    let extrapolation = match r.get("extrapolation_factor") {
        None => None,
        Some(v) => match v.as_f64() {
            Some(x) if (0.0..=1.0).contains(&x) => Some(x),
            _ => return Err(r.fail("extrapolation_factor", format!("found {}, expected 0 to 1", shown(v)))),
        },
    };
    // transformers' `attention_factor` is the whole magnitude, the first implementation's `attn_factor` a factor of it.
    let magnitude = if extrapolation == Some(0.0) { 1.0 } else { 1.0 + 0.1 * factor.max(1.0).ln() };
    let (key, only) =
        if r.map.contains_key("attention_factor") { ("attention_factor", magnitude) } else { ("attn_factor", 1.0) };
    let attention = r.positive(key)?;
    if let Some(x) = attention.filter(|x| (x - only).abs() > 1e-3) {
        return Err(r.fail(key, format!("found {x}, expected {only:.4}")));
    }
    // Of two, the magnitude is their quotient; one alone has no effect.
    if r.positive("mscale_all_dim")?.is_some()
        && let Some(x) = r.positive("mscale")?
    {
        return Err(r.fail("mscale", format!("found {x} beside mscale_all_dim, expected only one of them")));
    }
    if r.get("truncate").is_some() && !r.bool("truncate")? {
        return Err(r.fail("truncate", "found false, expected true".into()));
    }
    Ok([
        ("yarn_ext_factor", extrapolation),
        ("yarn_attn_factor", attention),
        ("yarn_beta_fast", r.positive("beta_fast")?),
        ("yarn_beta_slow", r.positive("beta_slow")?),
    ])
}
