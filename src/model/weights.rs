//! The weights: one list of tensors, each checked against the shape that the configuration gives it.

use super::ModelError;
use super::config::Config;
use crate::gguf::{Gguf, Tensor};
use crate::mmap::Bytes;
use oxcart_quant::{Format, Kernels, Matrix, Wants, attention};
use std::cell::RefCell;
use std::collections::HashSet;
use std::ops::RangeInclusive;

/// A matrix in the file.
#[derive(Clone)]
pub struct Weight {
    format: Format,
    rows: usize,
    cols: usize,
    bytes: Bytes,
}

impl Weight {
    /// A view of it.
    pub fn matrix(&self) -> Matrix<'_> {
        Matrix::new(self.format, self.rows, self.cols, &self.bytes).expect("checked when it was loaded")
    }

    /// How it is stored.
    pub fn format(&self) -> Format {
        self.format
    }

    /// Its size in bytes.
    pub fn n_bytes(&self) -> usize {
        self.bytes.len()
    }
}

/// Everything a forward pass multiplies by.
pub struct Weights {
    /// Token embeddings: (n_vocab, dim).
    pub embedding: Weight,
    /// The layers.
    pub layers: Vec<Layer>,
    /// Weight of the last norm: (dim).
    pub output_norm: Vec<f32>,
    /// To logits: (n_vocab, dim). The embeddings again where the model ties them.
    pub output: Weight,
    /// Divisors of RoPE's frequencies (Llama 3.1): (rope.dim / 2).
    pub rope_factors: Option<Vec<f32>>,
}

/// One layer.
pub struct Layer {
    /// Weight of the norm before attention: (dim).
    pub attn_norm: Vec<f32>,
    /// Queries: (n_heads * head_dim, dim).
    pub q: Weight,
    /// Keys: (n_kv_heads * head_dim, dim).
    pub k: Weight,
    /// Values: (n_kv_heads * head_dim, dim).
    pub v: Weight,
    /// Biases of queries, keys and values, one after another; empty where the model has none.
    pub qkv_bias: Vec<f32>,
    /// Attention's output: (dim, n_heads * head_dim).
    pub o: Weight,
    /// Its bias: (dim); empty where the model has none.
    pub o_bias: Vec<f32>,
    /// Weight of the norm before the feed-forward layer: (dim).
    pub ffn_norm: Vec<f32>,
    /// The feed-forward layer.
    pub ffn: Ffn,
}

impl Layer {
    /// Its matrices, in the order in which they are used.
    fn matrices(&self) -> [&Weight; 7] {
        [&self.q, &self.k, &self.v, &self.o, &self.ffn.gate, &self.ffn.up, &self.ffn.down]
    }
}

/// A SwiGLU feed-forward layer, or several with a router. Experts lie one after another in a tensor.
pub struct Ffn {
    /// The router's rows: (experts, dim); empty for a dense layer.
    pub router: Vec<f32>,
    /// (experts * ffn_dim, dim)
    pub gate: Weight,
    /// (experts * ffn_dim, dim)
    pub up: Weight,
    /// (experts * dim, ffn_dim)
    pub down: Weight,
    /// Bias of gate: (ffn_dim). Each is empty where the model has none.
    pub gate_bias: Vec<f32>,
    /// Bias of up: (ffn_dim).
    pub up_bias: Vec<f32>,
    /// Bias of down: (dim).
    pub down_bias: Vec<f32>,
}

/// What a forward pass reads at one place on its way: the matrices of a layer, or the output.
pub(super) struct Unit {
    /// What every token uses.
    pub always: Vec<Bytes>,
    /// Of each expert its rows of gate, up and down; none in a dense layer.
    pub experts: Vec<[Bytes; 3]>,
}

/// Finds tensors and checks them.
struct Finder<'a> {
    gguf: &'a Gguf,
    used: RefCell<HashSet<String>>,
}

impl Finder<'_> {
    /// Names the part in which the tensor is, so that of thirty it is known which to fetch again.
    fn unfit(&self, name: &str, problem: String) -> ModelError {
        let file = self.gguf.tensor(name).and_then(Tensor::file).unwrap_or(self.gguf.path());
        ModelError::Unfit { file: file.to_path_buf(), field: format!("tensor {name}"), problem }
    }

    fn tensor(&self, name: &str, dims: &[usize]) -> Result<(&Tensor, Format), ModelError> {
        let t = self.gguf.tensor(name).ok_or_else(|| self.unfit(name, "missing".into()))?;
        self.used.borrow_mut().insert(name.to_string());
        // Trailing extents of 1 are the same as none.
        let used = t.dims.iter().rposition(|&d| d != 1).map_or(1, |i| i + 1);
        let want: Vec<u64> = dims.iter().map(|&d| d as u64).collect();
        let used_want = want.iter().rposition(|&d| d != 1).map_or(1, |i| i + 1);
        if t.dims[..used] != want[..used_want] {
            return Err(self.unfit(name, format!("dimensions {:?}, expected {want:?}", t.dims)));
        }
        let format = t
            .format()
            .ok_or_else(|| self.unfit(name, format!("type {} is not one that oxcart computes with", t.kind.name())))?;
        Ok((t, format))
    }

    /// `experts` matrices of (rows, cols), one after another.
    fn weight(&self, name: &str, experts: Option<usize>, rows: usize, cols: usize) -> Result<Weight, ModelError> {
        let mut dims = vec![cols, rows];
        dims.extend(experts);
        let (t, format) = self.tensor(name, &dims)?;
        let rows = rows * experts.unwrap_or(1);
        Matrix::new(format, rows, cols, t.bytes()).map_err(|e| self.unfit(name, e.to_string()))?;
        Ok(Weight { format, rows, cols, bytes: t.bytes().clone() })
    }

    fn floats(&self, name: &str, dims: &[usize]) -> Result<Vec<f32>, ModelError> {
        let (t, format) = self.tensor(name, dims)?;
        let mut out = vec![0.0; dims.iter().product()];
        format.dequant(t.bytes(), &mut out);
        // One of them spoils everything that is computed from it, and nothing would tell.
        match out.iter().filter(|x| !x.is_finite()).count() {
            0 => Ok(out),
            n => Err(self.unfit(name, format!("{n} of {} numbers are NaN or infinite", out.len()))),
        }
    }

    /// What angles are divided by.
    fn divisors(&self, name: &str, n: usize) -> Result<Vec<f32>, ModelError> {
        let all = self.floats(name, &[n])?;
        match all.iter().find(|x| **x <= 0.0) {
            None => Ok(all),
            Some(x) => Err(self.unfit(name, format!("found {x}, expected numbers above 0"))),
        }
    }

    /// As [`Finder::floats`]; empty where there is no such tensor.
    fn floats_if_any(&self, name: &str, dims: &[usize]) -> Result<Vec<f32>, ModelError> {
        self.gguf.tensor(name).map_or(Ok(Vec::new()), |_| self.floats(name, dims))
    }

    /// Refuses a file with tensors that nothing was computed from: they would be left out of the model without a word.
    fn all_used(&self) -> Result<(), ModelError> {
        let used = self.used.borrow();
        match self.gguf.tensors().iter().find(|t| !used.contains(&t.name)) {
            Some(t) => Err(self.unfit(&t.name, "has no place in a model of this architecture".into())),
            None => Ok(()),
        }
    }
}

impl Weights {
    /// Finds every tensor of the model.
    pub(super) fn from_gguf(gguf: &Gguf, c: &Config) -> Result<Weights, ModelError> {
        let f = Finder { gguf, used: RefCell::default() };
        let embedding = f.weight("token_embd.weight", None, c.n_vocab, c.dim)?;
        let output = match gguf.tensor("output.weight") {
            Some(_) => f.weight("output.weight", None, c.n_vocab, c.dim)?,
            None => embedding.clone(),
        };
        let layers = (0..c.n_layers).map(|i| layer(&f, c, i)).collect::<Result<_, _>>()?;
        let rope_factors = match gguf.tensor("rope_freqs.weight") {
            Some(_) => Some(f.divisors("rope_freqs.weight", c.rope.dim / 2)?),
            None => None,
        };
        let output_norm = f.floats("output_norm.weight", &[c.dim])?;
        f.all_used()?;
        Ok(Weights { embedding, layers, output_norm, output, rope_factors })
    }

    /// The matrices in the order in which a forward pass uses them: of each layer, then the output.
    pub(super) fn units(&self) -> Vec<Unit> {
        let layer = |l: &Layer| {
            let mut always = [&l.q, &l.k, &l.v, &l.o].map(|w| w.bytes.clone()).to_vec();
            let ffn = [&l.ffn.gate, &l.ffn.up, &l.ffn.down].map(|w| &w.bytes);
            let count = l.ffn.router.len() / l.ffn_norm.len();
            if count == 0 {
                always.extend(ffn.map(Bytes::clone));
            }
            let part = |b: &Bytes, e: usize| b.slice(b.len() / count * e..b.len() / count * (e + 1));
            Unit { always, experts: (0..count).map(|e| ffn.map(|b| part(b, e))).collect() }
        };
        let output = Unit { always: vec![self.output.bytes.clone()], experts: Vec::new() };
        self.layers.iter().map(layer).chain([output]).collect()
    }

    /// Tells the system that of the embedding only the rows of tokens are read, if it is a matrix of its own.
    pub(super) fn embedding_by_rows(&self) {
        if !self.tied() {
            self.embedding.bytes.random();
        }
    }

    /// Whether the embeddings are the output matrix.
    fn tied(&self) -> bool {
        std::ptr::eq(&*self.embedding.bytes, &*self.output.bytes)
    }

    /// The bytes of all matrices, none twice: of the layers, of the output, of the embeddings if they are a matrix of their
    /// own.
    pub fn matrices(&self) -> Vec<Bytes> {
        let layers = self.layers.iter().flat_map(Layer::matrices);
        let embedding = (!self.tied()).then_some(&self.embedding);
        layers.chain([&self.output]).chain(embedding).map(|w| w.bytes.clone()).collect()
    }

    /// Puts copies in the place of what [`Weights::matrices`] gave, in its order.
    pub(crate) fn replace(&mut self, copies: Vec<Bytes>) {
        let tied = self.tied();
        let layers = self
            .layers
            .iter_mut()
            .flat_map(|l| [&mut l.q, &mut l.k, &mut l.v, &mut l.o, &mut l.ffn.gate, &mut l.ffn.up, &mut l.ffn.down]);
        let embedding = (!tied).then_some(&mut self.embedding);
        for (w, copy) in layers.chain([&mut self.output]).chain(embedding).zip(copies) {
            assert_eq!(w.bytes.len(), copy.len(), "a copy of something else");
            w.bytes = copy;
        }
        if tied {
            self.embedding.bytes = self.output.bytes.clone();
        }
    }

    /// Tokens up to which products and attention do not depend on how many others there are, to the last bit.
    pub fn alike(&self, k: &Kernels) -> usize {
        let layers = self.layers.iter().flat_map(Layer::matrices);
        layers.chain([&self.output]).map(|w| k.kernel(w.format).alike_cols()).fold(attention::FEW, usize::min)
    }

    /// Bytes of all matrices that every forward pass may use.
    pub fn n_bytes(&self) -> u64 {
        let units = self.units();
        let bytes = units.iter().flat_map(|u| u.always.iter().chain(u.experts.iter().flatten()));
        bytes.map(|b| b.len() as u64).sum()
    }

    /// The bytes that a pass over so many tokens reads, with the logits of `wanted` of them: all layers, of experts those that
    /// [`Experts::share`] tells, and the output. Only the tokens that are wanted go through the output, and through what the
    /// last layer has behind its keys and values.
    ///
    /// [`Experts::share`]: super::config::Experts::share
    pub fn bytes_per_pass(&self, c: &Config, tokens: usize, wanted: usize) -> f64 {
        let layer = |(i, l): (usize, &Layer)| {
            let behind = if i + 1 == c.n_layers { wanted } else { tokens };
            let share = if behind == 0 { 0.0 } else { c.experts.map_or(1.0, |e| e.share(behind)) };
            let ffn = l.ffn.gate.n_bytes() + l.ffn.up.n_bytes() + l.ffn.down.n_bytes();
            let o = if behind == 0 { 0 } else { l.o.n_bytes() };
            (l.q.n_bytes() + l.k.n_bytes() + l.v.n_bytes() + o) as f64 + ffn as f64 * share
        };
        let output = if wanted == 0 { 0 } else { self.output.n_bytes() };
        self.layers.iter().enumerate().map(layer).sum::<f64>() + output as f64
    }

    /// The weights of a layer that decoding one token multiplies by.
    pub fn parameters_per_layer(&self, c: &Config) -> usize {
        let ffn = 3 * c.dim * c.ffn_dim * c.experts.map_or(1, |e| e.used);
        ffn + 2 * c.dim * (c.q_dim() + c.kv_dim())
    }
}

fn layer(f: &Finder<'_>, c: &Config, i: usize) -> Result<Layer, ModelError> {
    let name = |n: &str| format!("blk.{i}.{n}");
    let norm = |n: &str| f.floats(&name(n), &[c.dim]);
    let linear = |n: &str, rows, cols| f.weight(&name(n), None, rows, cols);
    let mut qkv_bias = Vec::new();
    if c.qkv_bias || f.gguf.tensor(&name("attn_q.bias")).is_some() {
        for (n, dim) in [("attn_q.bias", c.q_dim()), ("attn_k.bias", c.kv_dim()), ("attn_v.bias", c.kv_dim())] {
            qkv_bias.extend(f.floats(&name(n), &[dim])?);
        }
    }
    // Llama's own have no others; its architecture does.
    let bias = |n: &str, dim| f.floats_if_any(&name(n), &[dim]);
    let ffn = match c.experts {
        None => Ffn {
            router: Vec::new(),
            gate: linear("ffn_gate.weight", c.ffn_dim, c.dim)?,
            up: linear("ffn_up.weight", c.ffn_dim, c.dim)?,
            down: linear("ffn_down.weight", c.dim, c.ffn_dim)?,
            gate_bias: bias("ffn_gate.bias", c.ffn_dim)?,
            up_bias: bias("ffn_up.bias", c.ffn_dim)?,
            down_bias: bias("ffn_down.bias", c.dim)?,
        },
        Some(e) => Ffn {
            router: f.floats(&name("ffn_gate_inp.weight"), &[c.dim, e.count])?,
            gate: f.weight(&name("ffn_gate_exps.weight"), Some(e.count), c.ffn_dim, c.dim)?,
            up: f.weight(&name("ffn_up_exps.weight"), Some(e.count), c.ffn_dim, c.dim)?,
            down: f.weight(&name("ffn_down_exps.weight"), Some(e.count), c.dim, c.ffn_dim)?,
            gate_bias: Vec::new(),
            up_bias: Vec::new(),
            down_bias: Vec::new(),
        },
    };
    Ok(Layer {
        attn_norm: norm("attn_norm.weight")?,
        q: linear("attn_q.weight", c.q_dim(), c.dim)?,
        k: linear("attn_k.weight", c.kv_dim(), c.dim)?,
        v: linear("attn_v.weight", c.kv_dim(), c.dim)?,
        qkv_bias,
        o: linear("attn_output.weight", c.dim, c.q_dim())?,
        o_bias: bias("attn_output.bias", c.dim)?,
        ffn_norm: norm("ffn_norm.weight")?,
        ffn,
    })
}

/// The encodings that these matrices want of their common input, of which each is given so many columns at once.
pub(super) fn wants<'a>(
    k: &Kernels,
    weights: impl IntoIterator<Item = &'a Weight>,
    columns: RangeInclusive<usize>,
) -> Wants {
    let ends = [*columns.start(), *columns.end()];
    Wants::of(weights.into_iter().flat_map(|w| ends.map(|n| k.kernel(w.format).act(n))))
}
