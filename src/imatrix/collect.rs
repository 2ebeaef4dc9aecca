//! Summing what enters the matrices of a model while a session reads a text.

use super::{Entry, Imatrix, ImatrixError};
use crate::engine::{EngineError, Session};
use crate::model::observe::{Input, Seen};
use crate::model::{Batch, Config};
use oxcart_quant::format::SLAB;
use std::sync::Mutex;

/// Inputs of a layer, and the matrices that each enters, without and with experts.
const INPUTS: [(Input, &[&str], &[&str]); 5] = [
    (Input::Qkv, &["attn_q", "attn_k", "attn_v"], &["attn_q", "attn_k", "attn_v"]),
    (Input::AttnOutput, &["attn_output"], &["attn_output"]),
    (Input::Router, &[], &["ffn_gate_inp"]),
    (Input::GateUp, &["ffn_gate", "ffn_up"], &["ffn_gate_exps", "ffn_up_exps"]),
    (Input::Down, &["ffn_down"], &["ffn_down_exps"]),
];

/// Sums over one slab of one input.
#[derive(Default)]
struct Sum {
    squares: Vec<f64>, // (256); empty until something was seen
    count: u64,
}

/// The columns of one input, and its sums: (experts, slabs).
struct Site {
    columns: usize,
    sums: Vec<Mutex<Sum>>,
}

/// Sums over everything that it was shown.
pub struct Collector {
    layers: Vec<[Site; INPUTS.len()]>,
    output: Site,
    experts: usize,
    with_output: bool,
}

impl Collector {
    /// For a model; `with_output` asks also for its output matrix, where that is a matrix of its own.
    pub fn new(c: &Config, with_output: bool) -> Collector {
        let experts = c.experts.map_or(1, |e| e.count);
        let site = |columns: usize, experts: usize| Site {
            columns,
            sums: (0..experts * columns.div_ceil(SLAB)).map(|_| Mutex::default()).collect(),
        };
        let layer = |_| {
            INPUTS.map(|(input, ..)| match input {
                Input::AttnOutput => site(c.q_dim(), 1),
                Input::GateUp => site(c.dim, experts),
                Input::Down => site(c.ffn_dim, experts),
                _ => site(c.dim, 1),
            })
        };
        let experts = if c.experts.is_some() { experts } else { 0 };
        Collector { layers: (0..c.n_layers).map(layer).collect(), output: site(c.dim, 1), experts, with_output }
    }

    /// Adds what a session shows.
    pub fn see(&self, seen: &Seen<'_>) {
        let site = match INPUTS.iter().position(|(input, ..)| *input == seen.input) {
            Some(i) => &self.layers[seen.layer][i],
            None if self.with_output => &self.output,
            None => return,
        };
        let slabs = site.columns.div_ceil(SLAB);
        let mut sum = site.sums[seen.expert * slabs + seen.slab].lock().unwrap_or_else(|e| e.into_inner());
        sum.squares.resize(SLAB, 0.0);
        sum.count += seen.tokens.len() as u64;
        for token in seen.tokens {
            for (sum, &x) in sum.squares.iter_mut().zip(&token.0) {
                *sum += x as f64 * x as f64;
            }
        }
    }

    /// What it has seen so far, without datasets. An error names the tensor that met what is no number.
    pub fn imatrix(&self, chunk_size: u32) -> Result<Imatrix, ImatrixError> {
        let mut m = Imatrix { chunk_size, ..Imatrix::default() };
        for (i, layer) in self.layers.iter().enumerate() {
            for ((_, dense, sparse), site) in INPUTS.iter().zip(layer) {
                let entry = site.entry();
                for name in if self.experts > 0 { sparse } else { dense }.iter() {
                    m.entries.insert(format!("blk.{i}.{name}.weight"), entry.clone());
                }
            }
        }
        if self.with_output {
            m.entries.insert("output.weight".into(), self.output.entry());
        }
        if let Some((name, _)) = m.entries.iter().find(|(_, e)| e.sums.iter().any(|s| !s.is_finite())) {
            return Err(ImatrixError::NotFinite(name.clone()));
        }
        let most = m.entries.values().flat_map(|e| &e.counts).max().copied().unwrap_or(0);
        m.chunks = (most / chunk_size.max(1) as u64) as u32;
        Ok(m)
    }
}

impl Site {
    fn entry(&self) -> Entry {
        let slabs = self.columns.div_ceil(SLAB);
        let mut e = Entry { sums: Vec::new(), counts: Vec::new() };
        for matrix in self.sums.chunks(slabs) {
            for (i, sum) in matrix.iter().enumerate() {
                let sum = sum.lock().unwrap_or_else(|e| e.into_inner());
                let n = SLAB.min(self.columns - i * SLAB);
                e.sums.extend((0..n).map(|j| sum.squares.get(j).map_or(0.0, |&s| s as f32)));
                if i == 0 {
                    e.counts.push(sum.count);
                }
            }
        }
        e
    }
}

/// Reads `count` chunks from chunk `first` on, each its own sequence, without asking for logits.
pub fn read(s: &mut Session, tokens: &[u32], first: usize, count: usize) -> Result<(), EngineError> {
    let context = s.context();
    let mut batch = Batch::default();
    for c in 0..count {
        s.begin_chunk(&mut batch, c, &tokens[(first + c) * context..][..context], |_| false);
    }
    s.forward_each(&batch, &|_, _| ())
}
