//! The numbers of a model. Everything in which architectures differ is a field here.

/// What a forward pass needs to know beside the weights.
#[derive(Clone, Debug)]
pub struct Config {
    /// GGUF's name of the architecture.
    pub arch: &'static str,
    /// Layers.
    pub n_layers: usize,
    /// Width of the residual stream.
    pub dim: usize,
    /// Query heads.
    pub n_heads: usize,
    /// Key and value heads; each serves `n_heads / n_kv_heads` query heads.
    pub n_kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Width of the feed-forward layer (of each expert).
    pub ffn_dim: usize,
    /// Tokens.
    pub n_vocab: usize,
    /// Positions that the model was trained for.
    pub n_context: usize,
    /// What RMSNorm adds to the mean square.
    pub norm_eps: f32,
    /// How positions are told.
    pub rope: Rope,
    /// A mixture of experts, if it is one.
    pub experts: Option<Experts>,
    /// Whether queries, keys and values must have biases.
    pub qkv_bias: bool,
}

/// Rotary position embedding.
#[derive(Clone, Debug)]
pub struct Rope {
    /// How many dimensions of a head are rotated.
    pub dim: usize,
    /// The base of the frequencies, `base^(-2i / dim)`.
    pub base: f64,
    /// Which dimensions turn together.
    pub pairs: Pairs,
    /// Positions are divided by this (linear scaling; 1 for none).
    pub position_divisor: f64,
    /// YaRN: which frequencies are exempt from the divisor.
    pub yarn: Option<Yarn>,
    /// Queries and keys are multiplied by this.
    pub magnitude: f64,
}

/// YaRN (Peng et al., 2023): high frequencies are kept, those with less than one turn in the training context are
/// interpolated, with a linear ramp between.
#[derive(Clone, Copy, Debug)]
pub struct Yarn {
    /// Positions of training.
    pub original: f64,
    /// Turns within them from which on a frequency stays as it is.
    pub beta_fast: f64,
    /// Turns within them up to which it is divided.
    pub beta_slow: f64,
    /// How much of what stays does: 1 all, 0 nothing.
    pub ext_factor: f64,
}

/// Which dimensions RoPE turns together.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Pairs {
    /// `i` and `i + dim / 2`.
    Halves,
    /// `2 i` and `2 i + 1`.
    Neighbours,
}

/// A mixture of experts.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Experts {
    /// In a layer.
    pub count: usize,
    /// For a token.
    pub used: usize,
}

impl Experts {
    /// The share of a layer's experts that so many tokens use, as chance has it.
    pub fn share(&self, tokens: usize) -> f64 {
        let unused = 1.0 - self.used as f64 / self.count as f64;
        1.0 - unused.powi(tokens.min(1 << 16) as i32)
    }
}

impl Config {
    /// What to say of a context that is longer than what the model was trained for.
    pub fn note_on(&self, context: usize) -> Option<String> {
        let trained = self.n_context;
        let note =
            || format!("a context of {context} tokens: the model was trained for {trained} and gets worse beyond");
        (context > trained).then(note)
    }

    /// Width of all queries.
    pub fn q_dim(&self) -> usize {
        self.n_heads * self.head_dim
    }

    /// Width of all keys (or values).
    pub fn kv_dim(&self) -> usize {
        self.n_kv_heads * self.head_dim
    }
}
