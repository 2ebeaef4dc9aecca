//! Whether a model will run here, and how fast: said before a byte of it is read.
//!
//! ```text
//! needs    weights + KV cache + buffers of a model at a context        from a GGUF, or from the catalogue
//! machine  memory that may be taken, processors                        from the system
//! probe    streaming read of memory, byte products                    half a second
//! ```
//!
//! Decoding reads every weight in use once a token, and the cache: `t/s = read / (weights in use + cache)`. Prefill
//! multiplies: `t/s = products / (2 * parameters in use)`. What the kernels reach of either limit is measured
//! ([`DECODE_SHARE`], [`prefill_share`]).

pub mod needs;

use crate::machine::Machine;
pub use needs::{Geometry, Needs};

use crate::catalog;
use crate::engine::most_taken;
use crate::gguf::Gguf;
use crate::model::stream::AHEAD;
use oxcart_quant::f32ops::Ops;
use oxcart_quant::{Isa, Kernels, Shared, Team};
use serde::Serialize;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

/// Of the streaming read, measured on four layers of Qwen1.5-110B in Q4_K_M.
const DECODE_SHARE: f64 = 0.9;
/// Of the products on registers, likewise: tiles wait for the second cache more than vectors do.
fn prefill_share(isa: Isa) -> f64 {
    if isa == Isa::Amx { 0.25 } else { 0.45 }
}

/// What a token goes through.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Active {
    /// Bytes of weights.
    pub bytes: f64,
    /// Parameters.
    pub parameters: f64,
    /// Bytes of all experts of a mixture; 0 for others.
    pub experts: f64,
    /// The share of the experts that a token uses.
    pub share: f64,
    /// Layers.
    pub layers: u64,
}

impl Active {
    /// Of a file: every matrix but the embedding, of the experts those that a token uses.
    pub fn of(g: &Gguf) -> Active {
        let arch = g.str("general.architecture").ok().flatten().unwrap_or_default();
        let count = |key: &str| g.uint(&format!("{arch}.{key}")).ok().flatten().unwrap_or(0);
        let (used, experts) = (count("expert_used_count"), count("expert_count"));
        let share = if used > 0 && experts > used { used as f64 / experts as f64 } else { 1.0 };
        let tied = g.tensor("output.weight").is_none();
        let mut active = Active { bytes: 0.0, parameters: 0.0, experts: 0.0, share, layers: count("block_count") };
        for t in g.tensors().iter().filter(|t| t.dims.len() > 1 && (tied || t.name != "token_embd.weight")) {
            let expert = t.name.contains("_exps.");
            if expert {
                active.experts += t.n_bytes() as f64;
            }
            let share = if expert { share } else { 1.0 };
            active.bytes += t.n_bytes() as f64 * share;
            active.parameters += t.n_elements() as f64 * share;
        }
        active
    }

    /// Of an entry of the catalogue whose file has `bytes`.
    pub fn of_entry(g: &catalog::Geometry, bytes: u64) -> Active {
        let (count, used) = (g.experts.unwrap_or(1), g.experts_used.unwrap_or(1));
        let part = |parameters: f64| bytes as f64 * parameters / self::parameters(g, count);
        let parameters = self::parameters(g, used);
        let experts = if g.experts.is_some() { part(self::parameters(g, count) - self::parameters(g, 0)) } else { 0.0 };
        let share = f64::from(used) / f64::from(count);
        Active { bytes: part(parameters), parameters, experts, share, layers: g.layers.into() }
    }

    /// Bytes that a token reads from the disk where `beyond` bytes of the weights do not fit in memory. Experts are what does
    /// not fit first; how often the chosen ones are there is taken as chance has it. Of the rest, whole layers go, and others
    /// give their room to those that are on their way.
    pub fn from_disk(&self, beyond: u64) -> u64 {
        let experts = self.experts.min(beyond as f64);
        let (rest, layers) = (beyond as f64 - experts, self.layers as f64);
        let layer = (self.bytes - self.experts * self.share) / layers;
        let gone = if rest > 0.0 { ((rest / layer).ceil() + AHEAD as f64).min(layers) } else { 0.0 };
        (experts * self.share + gone * layer) as u64
    }
}

/// Parameters of the matrices, with so many experts.
fn parameters(g: &catalog::Geometry, experts: u32) -> f64 {
    let [layers, dim, heads, kv_heads, ffn, vocab] =
        [g.layers, g.dim, g.heads, g.kv_heads, g.ffn, g.vocab].map(f64::from);
    let attention = 2.0 * dim * dim + 2.0 * dim * dim / heads * kv_heads;
    let outputs = if g.tied { 1.0 } else { 2.0 };
    layers * (attention + 3.0 * dim * ffn * f64::from(experts)) + outputs * vocab * dim
}

/// Bits per weight that llama.cpp's mixtures come to on large models, about.
const MIXTURES: &[(&str, f64)] = &[
    ("Q2_K", 3.0),
    ("Q3_K_S", 3.5),
    ("Q3_K_M", 3.9),
    ("Q3_K_L", 4.2),
    ("Q4_0", 4.6),
    ("Q4_K_S", 4.6),
    ("Q4_K_M", 4.85),
    ("Q5_0", 5.55),
    ("Q5_K_S", 5.55),
    ("Q5_K_M", 5.7),
    ("Q6_K", 6.6),
    ("Q8_0", 8.5),
    ("F16", 16.0),
];

/// Bytes of a file of the catalogue: what it says, or about what its mixture comes to.
pub fn file_bytes(m: &catalog::Model, f: &catalog::ModelFile) -> Option<u64> {
    f.bytes.or_else(|| {
        let bits = MIXTURES.iter().find(|(name, _)| name.eq_ignore_ascii_case(&f.quant))?.1;
        Some((parameters(&m.geometry, m.geometry.experts.unwrap_or(1)) * bits / 8.0) as u64)
    })
}

/// Whether needs meet a machine.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Fit {
    /// All of it stays in memory.
    Memory,
    /// The weights do not: those that find no room are read from the disk for every token, experts where it uses them.
    Disk,
    /// The KV cache and the buffers do not.
    Not,
    /// The machine does not tell what it has.
    Unknown,
}

impl Fit {
    /// Of needs on a machine.
    pub fn of(n: &Needs, m: &Machine) -> Fit {
        match m.available {
            None => Fit::Unknown,
            Some(a) if n.anonymous() > a.saturating_add(m.swap) => Fit::Not,
            Some(a) if n.total > most_taken(a) => Fit::Disk,
            Some(_) => Fit::Memory,
        }
    }
}

/// What the machine does at most.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Probe {
    /// Streaming read, 10^9 bytes a second.
    pub read: f64,
    /// Byte products, 10^12 multiplications and additions (each counted) a second.
    pub tops: f64,
    /// What prefill reaches of them.
    #[serde(skip)]
    prefill: f64,
}

impl Probe {
    /// Measures with so many threads: half a second, a quarter of a gibibyte.
    pub fn run(k: &Kernels, threads: usize) -> std::io::Result<Probe> {
        const PART: usize = 1 << 20;
        let team = Team::new(threads)?;
        let mut memory = Shared::<u8>::new(256 * PART)?;
        let memory = memory.as_mut_slice();
        // Pages that were never written are one page of zeros.
        memory.iter_mut().step_by(4096).for_each(|b| *b = 1);
        let parts: Vec<&[u8]> = memory.chunks(PART).collect();
        let best = |f: &dyn Fn() -> f64| (0..5).map(|_| f()).fold(0.0, f64::max);
        let (read, tops) = (best(&|| read_once(&team, k.ops, &parts)), best(&|| compute_once(&team, k.ops, 1 << 19)));
        Ok(Probe { read, tops, prefill: prefill_share(k.isa) })
    }

    /// Tokens a second: decoding at the end of a context, and prefill.
    pub fn speed(&self, active: Active, n: &Needs) -> (f64, f64) {
        let decode = self.read * 1e9 * DECODE_SHARE / (active.bytes + n.kv_cache as f64);
        (decode, self.tops * 1e12 * self.prefill / (2.0 * active.parameters))
    }
}

/// GB/s at which a team reads all of these parts, once.
pub fn read_once(team: &Team, ops: &Ops, parts: &[&[u8]]) -> f64 {
    let start = Instant::now();
    team.run(|w| w.split(parts.len(), |i| _ = std::hint::black_box(ops.read(parts[i]))));
    parts.iter().map(|p| p.len()).sum::<usize>() as f64 / start.elapsed().as_secs_f64() / 1e9
}

/// 10^12 operations a second of a team whose workers multiply in registers, so many rounds.
pub fn compute_once(team: &Team, ops: &Ops, rounds: u64) -> f64 {
    let (start, products) = (Instant::now(), AtomicU64::new(0));
    team.run(|w| w.split(w.threads(), |_| _ = products.fetch_add(ops.peak(rounds), Ordering::Relaxed)));
    2.0 * products.into_inner() as f64 / start.elapsed().as_secs_f64() / 1e12
}

#[cfg(test)]
mod tests {
    use super::*;

    fn needs(weights: u64, kv_cache: u64) -> Needs {
        Needs {
            context: 1,
            trained_context: None,
            cache_type_k: "f16",
            cache_type_v: "f16",
            weights,
            kv_cache,
            kv_cache_per_token: 1,
            buffers: 1,
            total: weights + kv_cache + 1,
        }
    }

    #[test]
    fn what_fits_where() {
        let m = Machine { available: Some(100), swap: 10, ..Machine::default() };
        for (n, want) in [
            // 94 of them are taken.
            ((50, 43), Fit::Memory),
            ((50, 44), Fit::Disk),
            ((5000, 99), Fit::Disk),
            ((1, 109), Fit::Disk),
            ((1, 110), Fit::Not),
        ] {
            assert_eq!(Fit::of(&needs(n.0, n.1), &m), want, "{n:?}");
        }
        assert_eq!(Fit::of(&needs(1, 1), &Machine::default()), Fit::Unknown);
    }

    /// The sizes that their makers tell.
    #[test]
    fn parameters_of_known_models() {
        for (name, want) in
            [("Qwen1.5-110B-Chat", 111.2e9), ("Llama-3-70B-Instruct", 70.6e9), ("Mixtral-8x22B-Instruct", 140.6e9)]
        {
            let (m, f) = catalog::find(Some(name)).unwrap();
            let all = parameters(&m.geometry, m.geometry.experts.unwrap_or(1));
            assert!((all / want - 1.0).abs() < 0.005, "{name}: {all}");
            let bytes = file_bytes(m, f).unwrap() as f64;
            assert!((3.0..9.0).contains(&(bytes * 8.0 / all)), "{name}: {bytes}");
        }
        let (m, _) = catalog::find(Some("Mixtral-8x22B-Instruct")).unwrap();
        let used = Active::of_entry(&m.geometry, 80 << 30);
        assert!((used.parameters / 39e9 - 1.0).abs() < 0.02, "{used:?}");
        // 56 layers of 8 experts of 3 x 6144 x 16384.
        assert!((used.experts / (80u64 << 30) as f64 - 135.3 / 140.6).abs() < 0.001, "{used:?}");
        let (m, _) = catalog::find(Some("Llama-3-70B-Instruct")).unwrap();
        let dense = Active::of_entry(&m.geometry, 40 << 30);
        assert_eq!((dense.experts, dense.bytes), (0.0, (40u64 << 30) as f64));
    }

    #[test]
    fn what_a_token_reads_from_the_disk() {
        let mixture = Active { bytes: 40.0, parameters: 1.0, experts: 80.0, share: 0.25, layers: 10 };
        // Behind the experts three layers of 2 for one that does not fit; all of them at most.
        for (beyond, want) in [(0, 0), (40, 10), (80, 20), (81, 26), (83, 28), (99, 40), (100, 40)] {
            assert_eq!(mixture.from_disk(beyond), want, "{beyond}");
        }
        let dense = Active { experts: 0.0, share: 1.0, ..mixture };
        for (beyond, want) in [(0, 0), (1, 12), (4, 12), (5, 16), (40, 40)] {
            assert_eq!(dense.from_disk(beyond), want, "{beyond}");
        }
    }
}
