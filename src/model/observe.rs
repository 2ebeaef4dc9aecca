//! A look at the activations that enter the matrices, for importance matrices.
//!
//! Without an observer nothing of this happens. With one, inputs are kept as f32 beside their encoding, and after they are
//! complete the workers show them, a slab of 256 values each, in one more phase.
#![allow(unsafe_code)]

use super::decoder::Pass;
use oxcart_quant::ActBuf;
use oxcart_quant::act::F32Block;
use oxcart_quant::format::SLAB;
use std::ops::Range;

/// Which matrices of a layer an input enters.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Input {
    /// Those of queries, keys and values.
    Qkv,
    /// Attention's output.
    AttnOutput,
    /// The router of a mixture of experts: every token, before it is sent to some of them.
    Router,
    /// Gate and up.
    GateUp,
    /// Down.
    Down,
    /// The output of the model, whose `layer` is the number of layers.
    Output,
}

/// A slab of an input: up to 256 values of each of several tokens.
pub struct Seen<'a> {
    /// The layer.
    pub layer: usize,
    /// The matrices.
    pub input: Input,
    /// Which expert's; 0 where there are none.
    pub expert: usize,
    /// The values are `256 * slab` and what follows; what lies past the last is zero.
    pub slab: usize,
    /// A block for each token, in the order of the batch.
    pub tokens: &'a [F32Block],
}

/// Is shown every input. Called by several workers at once, never for the same slab of the same input.
pub type Observer = dyn Fn(&Seen<'_>) + Send + Sync;

impl Pass<'_, '_> {
    /// Shows the observer, if there is one, an input of `k` values: for each expert, its columns of `stride`.
    pub fn observe(
        &mut self,
        (layer, input): (usize, Input),
        acts: &ActBuf,
        k: usize,
        stride: usize,
        experts: &[(usize, Range<usize>)],
    ) {
        let Some(observer) = self.plan.observer else { return };
        let slabs = k.div_ceil(SLAB);
        self.w.split(experts.len() * slabs, |task| {
            let ((expert, columns), slab) = (&experts[task / slabs], task % slabs);
            // SAFETY: the input is not written in this phase.
            let acts = unsafe { acts.view(k, stride, stride) }.columns(columns.start, columns.len());
            observer(&Seen { layer, input, expert: *expert, slab, tokens: acts.f32(slab) });
        });
        self.w.sync();
    }
}
