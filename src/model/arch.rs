//! The architectures: how each one's metadata becomes a [`Config`]. A new one is a file and a line in [`ARCHS`].

mod llama;
mod qwen2;

use super::ModelError;
use super::config::{Config, Experts, Pairs, Rope, Yarn};
use crate::gguf::{Gguf, one_line};

/// An architecture.
pub struct Arch {
    /// GGUF's `general.architecture`.
    pub name: &'static str,
    /// Fills in what is its own.
    pub configure: fn(&Keys<'_>, &mut Config) -> Result<(), ModelError>,
}

/// Every architecture that oxcart runs.
pub const ARCHS: &[Arch] = &[llama::ARCH, qwen2::ARCH];

/// The metadata under an architecture's prefix.
pub struct Keys<'a> {
    gguf: &'a Gguf,
    arch: &'static str,
}

/// More than any model has, and little enough that no product of two overflows.
const MOST: u64 = 1 << 28;

impl Keys<'_> {
    fn unfit(&self, key: &str, problem: String) -> ModelError {
        ModelError::Unfit { file: self.gguf.path().to_path_buf(), field: format!("{}.{key}", self.arch), problem }
    }

    fn unfit_tensor(&self, name: &str, problem: String) -> ModelError {
        ModelError::Unfit { file: self.gguf.path().to_path_buf(), field: format!("tensor {name}"), problem }
    }

    /// An integer of at least 1, if the key is there.
    fn count(&self, key: &str) -> Result<Option<usize>, ModelError> {
        match self.gguf.uint(&format!("{}.{key}", self.arch))? {
            None => Ok(None),
            Some(n) if (1..=MOST).contains(&n) => Ok(Some(n as usize)),
            Some(n) => Err(self.unfit(key, format!("found {n}, expected 1 to {MOST}"))),
        }
    }

    fn need(&self, key: &str) -> Result<usize, ModelError> {
        self.count(key)?.ok_or_else(|| self.unfit(key, "missing".into()))
    }

    /// A finite number above 0, if the key is there.
    fn positive(&self, key: &str) -> Result<Option<f64>, ModelError> {
        match self.gguf.float(&format!("{}.{key}", self.arch))? {
            None => Ok(None),
            Some(x) if x.is_finite() && x > 0.0 => Ok(Some(x as f64)),
            Some(x) => Err(self.unfit(key, format!("found {x}, expected a number above 0"))),
        }
    }

    /// YaRN's share of extrapolation; below 0 is unset, as llama.cpp writes it.
    fn ext_factor(&self) -> Result<f64, ModelError> {
        let key = "rope.scaling.yarn_ext_factor";
        match self.gguf.float(&format!("{}.{key}", self.arch))? {
            None => Ok(1.0),
            Some(x) if (0.0..=1.0).contains(&x) => Ok(x as f64),
            Some(x) if x < 0.0 => Ok(1.0),
            Some(x) => Err(self.unfit(key, format!("found {x}, expected at most 1"))),
        }
    }
}

/// The configuration of the model in a file.
pub fn config(gguf: &Gguf) -> Result<Config, ModelError> {
    let file = || gguf.path().to_path_buf();
    let field = "general.architecture".to_string();
    let Some(name) = gguf.str(&field)? else {
        return Err(ModelError::Unfit { file: file(), field, problem: "missing".into() });
    };
    let Some(arch) = ARCHS.iter().find(|a| a.name == name) else {
        let known: Vec<_> = ARCHS.iter().map(|a| a.name).collect();
        let problem = format!("found \"{}\", oxcart runs {}", one_line(name, 100), known.join(", "));
        return Err(ModelError::Unfit { file: file(), field, problem });
    };
    let k = Keys { gguf, arch: arch.name };
    let (dim, n_heads) = (k.need("embedding_length")?, k.need("attention.head_count")?);
    let n_kv_heads = k.count("attention.head_count_kv")?.unwrap_or(n_heads);
    let head_dim = match k.count("attention.key_length")? {
        Some(n) => n,
        None if dim % n_heads == 0 => dim / n_heads,
        None => return Err(k.unfit("attention.head_count", format!("{n_heads} heads do not divide a width of {dim}"))),
    };
    let value_dim = k.count("attention.value_length")?.unwrap_or(head_dim);
    if n_heads % n_kv_heads != 0 {
        let problem = format!("{n_kv_heads} key heads do not divide {n_heads} query heads");
        return Err(k.unfit("attention.head_count_kv", problem));
    }
    if value_dim != head_dim || head_dim % 16 != 0 || head_dim > 1024 {
        let problem = format!("heads of {head_dim} and {value_dim}, expected both the same multiple of 16 up to 1024");
        return Err(k.unfit("attention.key_length", problem));
    }
    let experts =
        match (k.count("expert_count").or_else(|e| zero_is_none(&k, "expert_count", e))?, k.count("expert_used_count"))
        {
            (None, _) => None,
            (Some(count), used) => match used? {
                Some(used) if used <= count => Some(Experts { count, used }),
                used => {
                    let found = used.map_or("missing".into(), |n| format!("found {n}"));
                    return Err(k.unfit("expert_used_count", format!("{found}, expected 1 to {count}")));
                }
            },
        };
    // The vocabulary's size is told by the embedding; the key is not in every file.
    let n_vocab = match gguf.tensor("token_embd.weight").map(|t| t.dims.as_slice()) {
        Some(&[_, rows]) if rows <= MOST => rows as usize,
        Some(dims) => return Err(k.unfit_tensor("token_embd.weight", format!("dimensions {dims:?}, expected two"))),
        None => return Err(k.unfit_tensor("token_embd.weight", "missing".into())),
    };
    let rope_dim = k.count("rope.dimension_count")?.unwrap_or(head_dim);
    if rope_dim > head_dim || rope_dim % 2 != 0 {
        return Err(
            k.unfit("rope.dimension_count", format!("found {rope_dim}, expected an even number up to {head_dim}"))
        );
    }
    let n_context = k.need("context_length")?;
    let (position_divisor, yarn, magnitude) = scaling(&k, n_context)?;
    let mut config = Config {
        arch: arch.name,
        n_layers: k.need("block_count")?,
        dim,
        n_heads,
        n_kv_heads,
        head_dim,
        ffn_dim: k.need("feed_forward_length")?,
        n_vocab,
        n_context,
        norm_eps: k
            .positive("attention.layer_norm_rms_epsilon")?
            .ok_or_else(|| k.unfit("attention.layer_norm_rms_epsilon", "missing".into()))? as f32,
        rope: Rope {
            dim: rope_dim,
            base: k.positive("rope.freq_base")?.unwrap_or(10_000.0),
            pairs: Pairs::Neighbours,
            position_divisor,
            yarn,
            magnitude,
        },
        experts,
        qkv_bias: false,
    };
    if config.n_layers > 4096 {
        return Err(k.unfit("block_count", format!("found {}, expected at most 4096", config.n_layers)));
    }
    (arch.configure)(&k, &mut config)?;
    Ok(config)
}

/// Dense models of some writers carry an expert count of 0.
fn zero_is_none(k: &Keys<'_>, key: &str, e: ModelError) -> Result<Option<usize>, ModelError> {
    if k.gguf.uint(&format!("{}.{key}", k.arch))? == Some(0) { Ok(None) } else { Err(e) }
}

/// RoPE's scaling: the divisor of positions, what YaRN leaves, and the factor of queries and keys, as llama.cpp computes them
/// (which reads YaRN's betas and its ext_factor for other architectures only, and has the defaults here unless flags say so).
/// Llama 3.1's comes as a tensor of factors.
fn scaling(k: &Keys<'_>, n_context: usize) -> Result<(f64, Option<Yarn>, f64), ModelError> {
    let kind = k.gguf.str(&format!("{}.rope.scaling.type", k.arch))?;
    let divisor = match k.positive("rope.scaling.factor")? {
        Some(factor) => factor,
        None => k.positive("rope.scale_linear")?.unwrap_or(1.0),
    };
    let attention = k.positive("rope.scaling.attn_factor")?.unwrap_or(1.0);
    match kind {
        Some("none") => Ok((1.0, None, attention)),
        None | Some("linear") => Ok((divisor, None, attention)),
        Some("yarn") => {
            let yarn = Yarn {
                original: k.count("rope.scaling.original_context_length")?.unwrap_or(n_context) as f64,
                beta_fast: k.positive("rope.scaling.yarn_beta_fast")?.unwrap_or(32.0),
                beta_slow: k.positive("rope.scaling.yarn_beta_slow")?.unwrap_or(1.0),
                ext_factor: k.ext_factor()?,
            };
            // Attention to stretched positions is sharpened by a lower temperature (Peng et al., 2023, section 3.4).
            let sharper = if yarn.ext_factor == 0.0 { 1.0 } else { 1.0 + 0.1 * divisor.max(1.0).ln() };
            // Some writers mean a further factor, some the whole one: only values that say the same either way.
            let key = "rope.scaling.yarn_attn_factor";
            if let Some(x) = k.positive(key)?.filter(|x| [1.0, sharper].iter().all(|y| (x - y).abs() > 1e-3)) {
                return Err(k.unfit(key, format!("found {}, expected 1 or {sharper:.4}", x as f32)));
            }
            Ok((divisor, Some(yarn), attention * sharper))
        }
        Some(other) => {
            let found = one_line(other, 100);
            let problem = format!("found \"{found}\", oxcart runs none, linear, yarn and rope_freqs tensors");
            Err(k.unfit("rope.scaling.type", problem))
        }
    }
}
