//! The feed-forward layer: SwiGLU, dense or as a mixture of experts.
//!
//! A task computes 256 rows of gate and up for all its columns, and encodes their product as the block that the down
//! projection reads: hidden values of many columns never lie in memory as f32. Of few columns, tasks divide the rows, hand
//! them over in `Buffers::hidden`, and the last to be done encodes the block.
#![allow(unsafe_code)]

use super::config::Experts;
use super::decoder::{Local, Pass, split_runs};
use super::matmul::Panels;
use super::observe::Input;
use super::weights::{Ffn, Layer};
use super::{Halt, Stream};
use oxcart_quant::act::{COLUMNS, Wants};
use oxcart_quant::attention::FEW;
use oxcart_quant::format::SLAB;
use oxcart_quant::{ActBuf, Acts, Out};
use std::ops::Range;
use std::sync::atomic::Ordering;

/// Minimum rows per task for small batches: every task re-packs its activation columns.
const LEAST_ROWS: usize = 32;
/// Columns of a task at least, of many: each unpacks its rows once.
const LEAST_SLOTS: usize = 64;

/// Slots for the choices of `n` tokens at most: those of an expert may begin a block of columns.
pub(super) fn slots(n: usize, e: Experts) -> usize {
    n * e.used + e.count.min(n * e.used) * (COLUMNS - 1)
}

/// Columns of `ffn_acts` that go through one expert: its tokens' slots.
struct Share {
    expert: usize,
    slots: Range<usize>,
}

/// Into how many tasks 256 hidden values of all their columns are divided: where there would be too few tasks for the
/// workers, by rows if there are few columns, by columns if there are many.
#[derive(Clone, Copy)]
enum Division {
    Rows(usize),
    Slots(usize),
}

impl Division {
    /// Of so many slabs, of all experts, each with `n` columns at most.
    fn of(slabs: usize, n: usize, threads: usize) -> Division {
        // At least four tasks a worker, so that the last to finish is not waited for long.
        let wanted = if threads > 1 { (4 * threads).div_ceil(slabs) } else { 1 };
        match n <= FEW && wanted > 1 {
            true => Division::Rows(wanted.next_power_of_two().min(SLAB / LEAST_ROWS)),
            false => Division::Slots(wanted.min(n / LEAST_SLOTS).max(1)),
        }
    }

    fn tasks(self) -> usize {
        match self {
            Division::Rows(n) | Division::Slots(n) => n,
        }
    }

    /// The rows and slots of a task, of all; of either there may be none.
    fn of_task(self, task: usize, rows: Range<usize>, slots: Range<usize>) -> (Range<usize>, Range<usize>) {
        match self {
            Division::Rows(n) => {
                let [start, end] = [task, task + 1].map(|t| (rows.start + t * (SLAB / n)).min(rows.end));
                (start..end, slots)
            }
            Division::Slots(n) => {
                // An expert has fewer columns than all have together; the last task takes what is left over.
                let n = n.min(slots.len() / LEAST_SLOTS).max(1);
                let each = slots.len() / n / COLUMNS * COLUMNS;
                let at = |t: usize| if t >= n { slots.end } else { slots.start + t * each };
                (rows, at(task)..at(task + 1))
            }
        }
    }
}

impl Pass<'_, '_> {
    /// `x += ffn(rmsnorm(x))`.
    pub fn feed_forward(&mut self, i: usize, l: &Layer) -> Result<(), Halt> {
        let (f, b, c, n) = (&l.ffn, self.b, self.c, self.n());
        // An expert gets between one and all of the tokens.
        let columns = if c.experts.is_some() { 1..=n } else { n..=n };
        let (inner, outer) = (self.wants([&f.gate, &f.up], columns.clone()), self.wants([&f.down], columns));
        match c.experts {
            None => {
                self.norm(&l.ffn_norm, inner);
                self.observe((i, Input::GateUp), &b.norm_acts, c.dim, n, &[(0, 0..n)]);
                self.gate_up(f, outer, &b.norm_acts, &[Share { expert: 0, slots: 0..n }], n);
                self.observe((i, Input::Down), &b.ffn_acts, c.ffn_dim, n, &[(0, 0..n)]);
                self.add_product(f.down.matrix(), &b.ffn_acts, c.ffn_dim, &f.down_bias);
                Ok(())
            }
            Some(_) => self.experts(i, l, inner, outer),
        }
    }

    /// `ffn_acts = encode(silu(gate * acts + bias) * (up * acts + bias))`, for the columns of each expert.
    fn gate_up(&mut self, f: &Ffn, wants: Wants, acts: &ActBuf, shares: &[Share], stride: usize) {
        let (c, b, k) = (self.c, self.b, self.k);
        let slabs = c.ffn_dim.div_ceil(SLAB);
        let division = Division::of(shares.len() * slabs, stride, self.w.threads());
        let Local { scratch, out, more, .. } = &mut *self.local;
        self.w.split(shares.len() * slabs * division.tasks(), |task| {
            let (unit, part) = (task / division.tasks(), task % division.tasks());
            let (share, slab) = (&shares[unit / slabs], unit % slabs);
            let whole = slab * SLAB..((slab + 1) * SLAB).min(c.ffn_dim);
            let (rows, slots) = division.of_task(part, whole.clone(), share.slots.clone());
            let (height, n) = (rows.len(), slots.len());
            // There may be none: rows of a slab that is not whole, columns of an expert that has few.
            if height > 0 && n > 0 {
                let panel = share.expert * c.ffn_dim + rows.start..share.expert * c.ffn_dim + rows.end;
                // SAFETY: the input is not written in this phase.
                let x: Acts<'_> = unsafe { acts.view(c.dim, stride, stride) }.columns(slots.start, n);
                for (w, bias, to) in [(&f.gate, &f.gate_bias, &mut *out), (&f.up, &f.up_bias, &mut *more)] {
                    to.resize(to.len().max(n * height), 0.0);
                    k.matmul(w.matrix().panel(panel.clone()), x, &mut Out::new(to, height, height, n), scratch);
                    if !bias.is_empty() {
                        to.chunks_exact_mut(height).take(n).for_each(|y| k.ops.add(y, &bias[rows.clone()]));
                    }
                }
                for (h, up) in out.chunks_exact_mut(height).zip(more.chunks_exact(height)).take(n) {
                    k.ops.silu_mul(h, up);
                }
            }
            let hidden = |slot: usize, rows: &Range<usize>| slot * c.ffn_dim + rows.start..slot * c.ffn_dim + rows.end;
            if let Division::Rows(parts) = division {
                for (i, slot) in slots.clone().enumerate() {
                    // SAFETY: these rows of these slots are this task's.
                    let to = unsafe { b.hidden.write(hidden(slot, &rows)) };
                    to.copy_from_slice(&out[i * height..(i + 1) * height]);
                }
                // Whoever ends the slab encodes it, and has seen what the others wrote.
                if b.parts[unit].fetch_add(1, Ordering::AcqRel) + 1 < parts {
                    return;
                }
                b.parts[unit].store(0, Ordering::Relaxed);
            }
            for (i, slot) in slots.enumerate() {
                // SAFETY: all of this slab of these slots is computed; encoding it is this task's.
                unsafe {
                    let h = match division {
                        Division::Rows(_) => b.hidden.read(hidden(slot, &whole)),
                        Division::Slots(_) => &out[i * height..(i + 1) * height],
                    };
                    b.ffn_acts.encode_slab(k, wants, stride, slot, slab, h);
                }
            }
        });
        self.w.sync();
    }

    fn experts(&mut self, i: usize, l: &Layer, inner: Wants, outer: Wants) -> Result<(), Halt> {
        let e = self.c.experts.expect("called for mixtures");
        let (n, dim, used) = (self.n(), self.c.dim, e.used);
        self.route(l, inner, used);
        self.observe((i, Input::Router), &self.b.norm_acts, dim, n, &[(0, 0..n)]);
        // Every worker lays the slots out alike: expert by expert, tokens in order.
        // SAFETY: the choices are not written in this phase.
        let (chosen, shares) = unsafe { (self.b.chosen.read(0..n * used), self.b.shares.read(0..n * used)) };
        let mut order: Vec<usize> = (0..n * used).collect();
        order.sort_by_key(|&i| (chosen[i], i));
        let together = inner.together().max(outer.together());
        let mut slots: Vec<Option<usize>> = Vec::new(); // which choice; none where a gap is left
        let mut parts: Vec<Share> = Vec::new();
        for i in order {
            let expert = chosen[i] as usize;
            if parts.last().is_none_or(|p| p.expert != expert) {
                slots.resize(slots.len().next_multiple_of(together), None);
                parts.push(Share { expert, slots: slots.len()..slots.len() });
            }
            slots.push(Some(i));
            parts.last_mut().expect("pushed above").slots.end += 1;
        }
        let b = self.b;
        if let Some(stream) = self.fetch.filter(|_| self.w.index() == 0) {
            stream.fetch(i, parts.iter().map(|p| p.expert));
        }
        split_runs(self.w, slots.len(), together, |slot| {
            let Some(i) = slots[slot] else { return };
            // SAFETY: the source is not written in this phase; this slot is this task's.
            unsafe { b.slot_acts.gather(inner, slots.len(), slot, &b.norm_acts, n, i / used) };
        });
        self.w.sync();
        self.fetch.map_or(Ok(()), Stream::halted)?;
        let seen: Vec<_> = match self.plan.observer {
            Some(_) => parts.iter().map(|p| (p.expert, p.slots.clone())).collect(),
            None => Vec::new(),
        };
        self.observe((i, Input::GateUp), &b.slot_acts, dim, slots.len(), &seen);
        self.gate_up(&l.ffn, outer, &b.slot_acts, &parts, slots.len());
        self.observe((i, Input::Down), &b.ffn_acts, self.c.ffn_dim, slots.len(), &seen);

        // A task takes its rows of all experts, in order, so that sums do not depend on who computes them.
        let down = l.ffn.down.matrix();
        let panels = Panels::new(self.k, [down.rows_of(0..dim)], n, self.w.threads());
        let Local { scratch, out, .. } = &mut *self.local;
        self.w.split(panels.tasks(), |task| {
            let (_, rows) = panels.task(task);
            let height = rows.len();
            for p in &parts {
                let n = p.slots.len();
                out.resize(out.len().max(n * height), 0.0);
                let panel = down.panel(p.expert * dim + rows.start..p.expert * dim + rows.end);
                // SAFETY: the input is not written in this phase.
                let x = unsafe { b.ffn_acts.view(self.c.ffn_dim, slots.len(), slots.len()) }.columns(p.slots.start, n);
                self.k.matmul(panel, x, &mut Out::new(out, height, height, n), scratch);
                for (i, y) in slots[p.slots.clone()].iter().flatten().zip(out.chunks_exact(height)) {
                    let at = self.plan.row(i / used, dim).start;
                    // SAFETY: these rows of x are this task's.
                    let x = unsafe { b.x.write(at + rows.start..at + rows.end) };
                    self.k.ops.axpy(x, shares[*i], y);
                }
            }
        });
        self.w.sync();
        Ok(())
    }

    /// Normalises, and chooses each token's experts: the `used` largest of the router's softmax, made to sum to one
    /// (Jiang et al., 2024).
    fn route(&mut self, l: &Layer, wants: Wants, used: usize) {
        let (n, c, b) = (self.n(), self.c, self.b);
        let (w, out) = (self.w, &mut self.local.out);
        out.resize(c.dim, 0.0);
        split_runs(w, n, wants.together(), |t| {
            // SAFETY: x is not written in this phase; the column and the choices are this task's token's.
            let (x, chosen, shares) = unsafe {
                let token = t * used..(t + 1) * used;
                (b.x.read(self.plan.row(t, c.dim)), b.chosen.write(token.clone()), b.shares.write(token))
            };
            self.k.ops.rmsnorm(x, &l.ffn_norm, c.norm_eps, &mut out[..c.dim]);
            // SAFETY: as above.
            unsafe { b.norm_acts.encode(self.k, wants, n, t, &out[..c.dim]) };
            let mut scores: Vec<(f32, u32)> =
                l.ffn.router.chunks_exact(c.dim).map(|row| self.k.ops.dot(row, &out[..c.dim])).zip(0..).collect();
            scores.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
            let mut total = 0.0;
            for (i, &(score, expert)) in scores[..used].iter().enumerate() {
                chosen[i] = expert;
                shares[i] = (score - scores[0].0).exp();
                total += shares[i];
            }
            shares.iter_mut().for_each(|s| *s /= total);
        });
        w.sync();
    }
}
