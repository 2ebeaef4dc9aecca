//! The forward pass, as one worker of a team runs it.
//!
//! ```text
//! x = embedding of each token
//! for each layer:                                        tasks                      what a task writes
//!     a = encode(rmsnorm(x))                             tokens                     a's column
//!     qkv = [Q K V] a                                    panels of rows             those rows of qkv
//!     rotate q, k; cache k, v                            kv heads x runs            its heads of qkv and of the cache
//!     (last layer: keep the tokens that want logits)     slabs                      its columns of x and qkv
//!     partial attention                                  kv heads x tiles x ranges  its partial results
//!     a = encode(merged attention)                       tokens x slabs             a's blocks
//!     x += O a                                           panels of rows             those rows of x
//!     a = encode(rmsnorm(x))                             tokens                     a's column
//!     h = encode(silu(G a) * (U a))                      slabs of 256 rows x parts  h's blocks
//!     x += D h                                           panels of rows             those rows of x
//!   or, of a mixture of experts, behind attention:
//!     a = encode(rmsnorm(x)); choose experts             tokens                     a's column, its choices and shares
//!     g = columns of a, once for each choice             slots, by expert           g's column
//!     h = encode(silu(G g) * (U g))                      experts x slabs x parts    h's blocks
//!     x += sum over the chosen of share * D h            panels of rows             those rows of x
//! logits = output rmsnorm(x)                             panels of rows             those rows of the logits
//! ```
//!
//! Between any two lines stands a barrier. Each output is summed by one task in a fixed order: results do not depend on the
//! number of workers. An [`observe`](super::observe) phase stands before each product where somebody looks. Every `SAFETY`
//! here, in `attention` and in `ffn` rests on that table: in a phase, tasks write disjoint parts, and what they read was
//! written before the last barrier. There is one exception: parts of a slab are columns of their own if there are many, and
//! rows if there are few. Those write their rows of `hidden` and then count themselves in `parts`; the last one encodes the
//! slab, which acquires what the others released.
//!
//! A batch goes through a layer in parts, which bound the buffers. Where weights come from a [`stream`](super::stream), one
//! walk through the layers serves many parts; otherwise a walk has one.
#![allow(unsafe_code)]

use super::attention::{Run, Tile};
use super::cache::KvCache;
use super::config::Config;
use super::matmul::Panels;
use super::observe::{Input, Observer};
use super::stream::Reading;
use super::weights::{Layer, Weight, wants};
use super::{Halt, Model, Stream, rope};
use oxcart_quant::act::Wants;
use oxcart_quant::attention::FEW;
use oxcart_quant::format::SLAB;
use oxcart_quant::{ActBuf, Kernels, Matrix, Out, Scratch, Shared, Worker};
use std::borrow::Cow;
use std::io;
use std::ops::{ControlFlow, Range, RangeInclusive};
use std::sync::atomic::AtomicUsize;

/// Rows of logits that are computed at once.
pub const LOGITS_ROWS: usize = 64;

/// Tokens to feed: each with its sequence and position, and whether its logits are wanted.
#[derive(Clone, Debug, Default)]
pub struct Batch {
    /// Token ids.
    pub tokens: Vec<u32>,
    /// Positions in their sequences.
    pub pos: Vec<u32>,
    /// Sequences.
    pub seq: Vec<u32>,
    /// Whether the logits of the next token are wanted.
    pub logits: Vec<bool>,
}

impl Batch {
    /// Consecutive tokens of one sequence, with the logits of the last.
    pub fn of(tokens: &[u32], pos: usize, seq: u32) -> Batch {
        let mut b = Batch::default();
        for (i, &t) in tokens.iter().enumerate() {
            b.push(t, (pos + i) as u32, seq, i + 1 == tokens.len());
        }
        b
    }

    /// Adds a token.
    pub fn push(&mut self, token: u32, pos: u32, seq: u32, logits: bool) {
        self.tokens.push(token);
        self.pos.push(pos);
        self.seq.push(seq);
        self.logits.push(logits);
    }

    /// Number of tokens.
    pub fn len(&self) -> usize {
        self.tokens.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.tokens.is_empty()
    }

    /// These tokens of it.
    fn only(&self, which: &[usize]) -> Batch {
        let mut b = Batch::default();
        which.iter().for_each(|&i| b.push(self.tokens[i], self.pos[i], self.seq[i], self.logits[i]));
        b
    }

    /// Some consecutive tokens.
    pub fn part(&self, r: Range<usize>) -> Batch {
        Batch {
            tokens: self.tokens[r.clone()].to_vec(),
            pos: self.pos[r.clone()].to_vec(),
            seq: self.seq[r.clone()].to_vec(),
            logits: self.logits[r].to_vec(),
        }
    }
}

/// What a forward pass writes to, shared by the workers.
pub struct Buffers {
    pub(super) x: Shared<f32>,          // (walk, dim): the residual stream
    pub(super) qkv: Shared<f32>,        // (n, q_dim + 2 kv_dim)
    pub(super) part_m: Shared<f32>,     // (ranges, n, n_heads)
    pub(super) part_s: Shared<f32>,     // (ranges, n, n_heads)
    pub(super) part_o: Shared<f32>,     // (ranges, n, q_dim)
    pub(super) angles: Shared<f32>,     // (walk, rope.dim)
    pub(super) norm_acts: ActBuf,       // (dim)
    pub(super) attn_acts: ActBuf,       // (q_dim)
    pub(super) slot_acts: ActBuf,       // (dim), a column for each token and expert
    pub(super) ffn_acts: ActBuf,        // (ffn_dim), likewise
    pub(super) hidden: Shared<f32>,     // (FEW, ffn_dim): of few columns, until a slab is whole
    pub(super) parts: Vec<AtomicUsize>, // (FEW, slabs of ffn_dim): how much of it is
    pub(super) chosen: Shared<u32>,     // (n, experts used): expert ids
    pub(super) shares: Shared<f32>,     // (n, experts used): their weights
    logits: Shared<f32>,                // (LOGITS_ROWS, n_vocab)
}

impl Buffers {
    /// Room for batches of `walk` tokens in parts of `n`, over caches of `capacity` positions.
    pub fn new(c: &Config, walk: usize, n: usize, capacity: usize) -> io::Result<Buffers> {
        let parts = n.max(super::attention::most_parts(capacity));
        let used = c.experts.map_or(1, |e| e.used);
        let slots = c.experts.map_or(0, |e| super::ffn::slots(n, e));
        Ok(Buffers {
            x: Shared::new(walk * c.dim)?,
            qkv: Shared::new(n * (c.q_dim() + 2 * c.kv_dim()))?,
            part_m: Shared::new(parts * c.n_heads)?,
            part_s: Shared::new(parts * c.n_heads)?,
            part_o: Shared::new(parts * c.q_dim())?,
            angles: Shared::new(walk * c.rope.dim)?,
            norm_acts: ActBuf::new(c.dim, n.max(LOGITS_ROWS))?,
            attn_acts: ActBuf::new(c.q_dim(), n)?,
            slot_acts: ActBuf::new(c.dim, slots)?,
            ffn_acts: ActBuf::new(c.ffn_dim, slots.max(n))?,
            hidden: Shared::new(FEW * c.ffn_dim)?,
            parts: (0..FEW * c.ffn_dim.div_ceil(SLAB)).map(|_| AtomicUsize::new(0)).collect(),
            chosen: Shared::new(n * used)?,
            shares: Shared::new(n * used)?,
            logits: Shared::new(LOGITS_ROWS * c.n_vocab)?,
        })
    }

    /// Bytes when all of it is written by these kernels.
    pub fn n_bytes(&self, k: &Kernels) -> usize {
        let floats =
            [&self.x, &self.qkv, &self.part_m, &self.part_s, &self.part_o, &self.angles, &self.shares, &self.hidden];
        let acts = [&self.norm_acts, &self.attn_acts, &self.slot_acts, &self.ffn_acts];
        4 * (floats.map(Shared::len).iter().sum::<usize>() + self.chosen.len() + self.logits.len())
            + acts.map(|a| a.n_bytes(k)).iter().sum::<usize>()
    }
}

/// What one worker keeps for itself.
#[derive(Default)]
pub struct Local {
    pub(super) scratch: Scratch,
    pub(super) out: Vec<f32>,
    pub(super) more: Vec<f32>,
}

/// A part of a batch, prepared: what is the same for every worker and every layer.
pub struct Plan<'a> {
    pub(super) batch: Cow<'a, Batch>,
    first: usize,        // its first token's number in the whole batch
    first_wanted: usize, // of the tokens whose logits are wanted, likewise
    pub(super) runs: Vec<Run>,
    pub(super) tiles: Vec<Tile>,
    pub(super) ranges: usize,
    pub(super) range_len: usize,
    pub(super) observer: Option<&'a Observer>,
    wanted: Vec<usize>,
    frequencies: Vec<f64>,
    /// The tokens whose logits are wanted, if those are fewer: in the last layer the others give keys and values only.
    last: Option<Box<Plan<'a>>>,
}

impl<'a> Plan<'a> {
    /// Prepares the parts of a batch, whose positions and tokens the caller has checked. `observer` is shown what enters
    /// each matrix.
    pub fn of(k: &Kernels, m: &Model, parts: &'a [Batch], observer: Option<&'a Observer>) -> Vec<Plan<'a>> {
        let (mut first, mut first_wanted) = (0, 0);
        let plan = |batch: &'a Batch| {
            let at = (first, first_wanted);
            let mut p = Plan::new(k, m, Cow::Borrowed(batch), at, observer);
            (first, first_wanted) = (first + batch.len(), first_wanted + p.wanted.len());
            // An observer is shown everything.
            if p.wanted.len() < batch.len() && observer.is_none() {
                p.last = Some(Box::new(Plan::new(k, m, Cow::Owned(batch.only(&p.wanted)), at, None)));
            }
            p
        };
        parts.iter().map(plan).collect()
    }

    fn new(
        k: &Kernels,
        m: &Model,
        batch: Cow<'a, Batch>,
        (first, first_wanted): (usize, usize),
        observer: Option<&'a Observer>,
    ) -> Plan<'a> {
        let (range_len, ranges) = super::attention::ranges(&batch);
        Plan {
            first,
            first_wanted,
            runs: super::attention::runs(&batch),
            tiles: super::attention::tiles(&batch, m.config.n_heads / m.config.n_kv_heads, k.attention.rows),
            ranges,
            range_len,
            observer,
            wanted: (0..batch.len()).filter(|&i| batch.logits[i]).collect(),
            frequencies: rope::frequencies(&m.config.rope, m.weights.rope_factors.as_deref()),
            last: None,
            batch,
        }
    }

    /// Where token `t` of this part has its `width` values, in a buffer of the whole batch.
    pub(super) fn row(&self, t: usize, width: usize) -> Range<usize> {
        (self.first + t) * width..(self.first + t + 1) * width
    }
}

/// One worker's way through a forward pass.
pub(super) struct Pass<'a, 't> {
    pub w: &'a Worker<'t>,
    pub k: &'static Kernels,
    pub c: &'a Config,
    pub plan: &'a Plan<'a>,
    pub cache: &'a KvCache,
    pub b: &'a Buffers,
    pub local: &'a mut Local,
    /// What fetches the experts that are chosen in the layer at hand, where they are not there already.
    pub fetch: Option<&'a Stream>,
}

/// How weights come into memory during a pass.
#[derive(Clone, Copy)]
pub struct Way<'a> {
    /// What reads them.
    pub stream: &'a Stream,
    /// Is told by one worker how many layers of how many are done, and may end the pass.
    pub watch: &'a (dyn Fn(usize, usize) -> ControlFlow<()> + Sync),
}

/// Runs a batch, given its parts. `sink` receives the logits of each token that wants them, with its number among those
/// that do; it is called by several workers at once. All workers return the same.
#[allow(clippy::too_many_arguments)]
pub fn forward(
    w: &Worker<'_>,
    k: &'static Kernels,
    m: &Model,
    way: Option<Way<'_>>,
    plans: &[Plan<'_>],
    cache: &KvCache,
    b: &Buffers,
    local: &mut Local,
    sink: &(dyn Fn(usize, &[f32]) + Sync),
) -> Result<(), Halt> {
    let Some(first) = plans.first() else { return Ok(()) };
    let mut p = Pass { w, k, c: &m.config, plan: first, cache, b, local, fetch: None };
    let lead = way.filter(|_| w.index() == 0);
    let last = |plan: &Plan<'_>| plan.last.as_ref().map_or(plan.batch.len(), |last| last.batch.len());
    let (n, n_last) = (plans.iter().map(|p| p.batch.len()).sum(), plans.iter().map(last).sum());
    let reading = Reading::of(m.config.experts, m.config.n_layers, n, n_last);
    if let Some(way) = lead {
        way.stream.begin(reading);
    }
    for plan in plans {
        p.plan = plan;
        p.embed(m);
    }
    let units = m.weights.layers.len() + 1;
    for i in 0..units {
        if let Some(way) = way {
            lead.into_iter().for_each(|l| l.stream.wait());
            w.sync();
            way.stream.halted()?;
            p.fetch = reading.fetches(i).then_some(way.stream);
        }
        for plan in plans {
            p.plan = plan;
            match m.weights.layers.get(i) {
                Some(layer) => p.layer(i, layer)?,
                None => {
                    p.plan = plan.last.as_deref().unwrap_or(plan);
                    p.logits(m, sink);
                }
            }
        }
        // Every phase ends in a barrier: nobody reads this layer's weights any more.
        if let Some(way) = lead {
            way.stream.done((way.watch)(i + 1, units).is_break() && i + 1 < units);
        }
    }
    Ok(())
}

/// Divides `0..n` among the workers in runs of `run`.
pub(super) fn split_runs(w: &Worker<'_>, n: usize, run: usize, mut f: impl FnMut(usize)) {
    w.split(n.div_ceil(run), |i| (i * run..n.min((i + 1) * run)).for_each(&mut f));
}

impl Pass<'_, '_> {
    /// Tokens of the batch.
    pub fn n(&self) -> usize {
        self.plan.batch.len()
    }

    fn embed(&mut self, m: &Model) {
        self.w.split(self.n(), |t| {
            // SAFETY: this task's token.
            let x = unsafe { self.b.x.write(self.plan.row(t, self.c.dim)) };
            m.weights.embedding.matrix().dequant_row(self.plan.batch.tokens[t] as usize, x);
            // SAFETY: this task's token.
            let row = unsafe { self.b.angles.write(self.plan.row(t, self.c.rope.dim)) };
            rope::angles(&self.plan.frequencies, self.c.rope.magnitude, self.plan.batch.pos[t], row);
        });
        self.w.sync();
    }

    fn layer(&mut self, i: usize, l: &Layer) -> Result<(), Halt> {
        let (mut n, b, c) = (self.n(), self.b, self.c);
        self.norm(&l.attn_norm, self.wants([&l.q, &l.k, &l.v], n..=n));
        self.observe((i, Input::Qkv), &b.norm_acts, c.dim, n, &[(0, 0..n)]);
        self.qkv(l);
        self.rotate_and_store(i, &l.qkv_bias);
        if i + 1 == c.n_layers
            && let Some(last) = &self.plan.last
        {
            if last.batch.is_empty() {
                return Ok(());
            }
            self.keep_wanted();
            self.plan = last;
            n = self.n();
        }
        self.attend(i);
        self.merge(self.wants([&l.o], n..=n));
        self.observe((i, Input::AttnOutput), &b.attn_acts, c.q_dim(), n, &[(0, 0..n)]);
        self.add_product(l.o.matrix(), &b.attn_acts, c.q_dim(), &l.o_bias);
        self.feed_forward(i, l)
    }

    /// Moves the residual stream and the queries of the tokens whose logits are wanted to the front of this part's.
    fn keep_wanted(&mut self) {
        let (b, c, plan) = (self.b, self.c, self.plan);
        let (dim, q_dim, stride) = (c.dim, c.q_dim(), c.q_dim() + 2 * c.kv_dim());
        let slabs = dim.div_ceil(SLAB);
        self.w.split(slabs + q_dim.div_ceil(SLAB), |task| {
            let (buffer, width, slab) = if task < slabs { (&b.x, dim, task) } else { (&b.qkv, q_dim, task - slabs) };
            let columns = slab * SLAB..((slab + 1) * SLAB).min(width);
            let row = |t: usize| if task < slabs { plan.row(t, dim).start } else { t * stride };
            // Upwards: a token is never moved onto one that still has to be moved.
            for (to, &from) in plan.wanted.iter().enumerate().filter(|(to, from)| to != *from) {
                let (to, from) = (row(to), row(from));
                // SAFETY: these columns of all tokens are this task's.
                unsafe {
                    let x = buffer.read(from + columns.start..from + columns.end);
                    buffer.write(to + columns.start..to + columns.end).copy_from_slice(x);
                }
            }
        });
        self.w.sync();
    }

    /// The encodings that matrices want of so many columns of their common input; also the values themselves where somebody
    /// looks at them.
    pub fn wants<'w>(&self, weights: impl IntoIterator<Item = &'w Weight>, columns: RangeInclusive<usize>) -> Wants {
        let mut wants = wants(self.k, weights, columns);
        wants.f32 |= self.plan.observer.is_some();
        wants
    }

    /// `norm_acts = encode(rmsnorm(x) * weight)`.
    pub fn norm(&mut self, weight: &[f32], wants: Wants) {
        let n = self.n();
        let (w, out) = (self.w, &mut self.local.out);
        out.resize(self.c.dim, 0.0);
        split_runs(w, n, wants.together(), |t| {
            // SAFETY: x is not written in this phase; this task's column.
            unsafe {
                let x = self.b.x.read(self.plan.row(t, self.c.dim));
                self.k.ops.rmsnorm(x, weight, self.c.norm_eps, out);
                self.b.norm_acts.encode(self.k, wants, n, t, out);
            }
        });
        w.sync();
    }

    fn qkv(&mut self, l: &Layer) {
        let (n, c) = (self.n(), self.c);
        let panels = Panels::new(self.k, [l.q.matrix(), l.k.matrix(), l.v.matrix()], n, self.w.threads());
        let starts = [0, c.q_dim(), c.q_dim() + c.kv_dim()];
        let stride = c.q_dim() + 2 * c.kv_dim();
        let scratch = &mut self.local.scratch;
        self.w.split(panels.tasks(), |t| {
            let (i, rows) = panels.task(t);
            // SAFETY: acts are read only; the rows are this task's.
            unsafe {
                let acts = self.b.norm_acts.view(c.dim, n, n);
                let at = starts[i];
                let mut out = self.b.qkv.out(0, stride, at + rows.start..at + rows.end, n);
                self.k.matmul(panels.matrix(i).panel(rows), acts, &mut out, scratch);
            }
        });
        self.w.sync();
    }

    /// `x += matrix * acts + bias`; an empty bias is none.
    pub fn add_product(&mut self, matrix: Matrix<'_>, acts: &ActBuf, k: usize, bias: &[f32]) {
        let (n, dim) = (self.n(), self.c.dim);
        let panels = Panels::new(self.k, [matrix], n, self.w.threads());
        let Local { scratch, out, .. } = &mut *self.local;
        self.w.split(panels.tasks(), |t| {
            let (_, rows) = panels.task(t);
            out.resize(out.len().max(n * rows.len()), 0.0);
            // SAFETY: acts are read only; these rows of x are this task's.
            unsafe {
                let mut to = Out::new(out, rows.len(), rows.len(), n);
                self.k.matmul(matrix.panel(rows.clone()), acts.view(k, n, n), &mut to, scratch);
                for (t, y) in out.chunks_exact_mut(rows.len()).take(n).enumerate() {
                    if !bias.is_empty() {
                        self.k.ops.add(y, &bias[rows.clone()]);
                    }
                    let at = self.plan.row(t, dim).start;
                    self.k.ops.add(self.b.x.write(at + rows.start..at + rows.end), y);
                }
            }
        });
        self.w.sync();
    }

    fn logits(&mut self, m: &Model, sink: &(dyn Fn(usize, &[f32]) + Sync)) {
        let (dim, vocab) = (self.c.dim, self.c.n_vocab);
        if self.plan.observer.is_some() {
            // Of all tokens, whether their logits are wanted or not.
            let (n, acts) = (self.n(), &self.b.norm_acts);
            self.norm(&m.weights.output_norm, self.wants([], n..=n));
            self.observe((self.c.n_layers, Input::Output), acts, dim, n, &[(0, 0..n)]);
        }
        let output = m.weights.output.matrix();
        for (chunk, tokens) in self.plan.wanted.chunks(LOGITS_ROWS).enumerate() {
            let n = tokens.len();
            let wants = wants(self.k, [&m.weights.output], n..=n);
            let Local { scratch, out, .. } = &mut *self.local;
            out.resize(dim, 0.0);
            split_runs(self.w, n, wants.together(), |i| {
                // SAFETY: x is not written in this phase; this task's column.
                unsafe {
                    let x = self.b.x.read(self.plan.row(tokens[i], dim));
                    self.k.ops.rmsnorm(x, &m.weights.output_norm, self.c.norm_eps, out);
                    self.b.norm_acts.encode(self.k, wants, n, i, out);
                }
            });
            self.w.sync();
            let panels = Panels::new(self.k, [output], n, self.w.threads());
            self.w.split(panels.tasks(), |t| {
                let (_, rows) = panels.task(t);
                // SAFETY: acts are read only; the rows are this task's.
                unsafe {
                    let mut to = self.b.logits.out(0, vocab, rows.clone(), n);
                    self.k.matmul(output.panel(rows), self.b.norm_acts.view(dim, n, n), &mut to, scratch);
                }
            });
            self.w.sync();
            let first = self.plan.first_wanted + chunk * LOGITS_ROWS;
            // SAFETY: the logits are not written in this phase.
            self.w.split(n, |i| sink(first + i, unsafe { self.b.logits.read(i * vocab..(i + 1) * vocab) }));
            self.w.sync();
        }
    }
}
