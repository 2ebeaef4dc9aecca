//! Chunks of a text: how many there are, and their way through a model.

use super::{PerplexityError, Score, nll};
use crate::engine::{EngineError, Session};
use crate::model::Batch;
use std::sync::Mutex;

/// How many chunks a text of `tokens` has; an error where it is too short.
pub fn chunks(tokens: usize, context: usize) -> Result<usize, PerplexityError> {
    if tokens < 2 * context {
        return Err(PerplexityError::TooShort { found: tokens, expected: 2 * context });
    }
    Ok(tokens / context)
}

/// Tokens of a chunk that are scored.
pub fn rows(context: usize) -> usize {
    (context - context / 2).saturating_sub(1)
}

/// Feeds `count` chunks of `context` tokens, chunk `first` of the text first, each as a sequence of its own. `row` receives
/// the logits of every scored token: its number (`rows(context)` for each chunk, counted from the first that is fed), the
/// token that they should have predicted, the logits. It is called by several workers at once, in no order.
pub fn feed(
    s: &mut Session,
    tokens: &[u32],
    context: usize,
    first: usize,
    count: usize,
    row: &(dyn Fn(usize, u32, &[f32]) + Sync),
) -> Result<(), EngineError> {
    let scored = |i: usize| i >= context / 2 && i + 1 < context;
    let mut batch = Batch::default();
    let mut next = Vec::with_capacity(count * rows(context)); // the token that each row of logits predicts
    for c in 0..count {
        let chunk = &tokens[(first + c) * context..(first + c + 1) * context];
        s.begin_chunk(&mut batch, c, chunk, scored);
        next.extend((0..context).filter(|&i| scored(i)).map(|i| chunk[i + 1]));
    }
    s.forward_each(&batch, &|i, logits| row(i, next[i], logits))
}

/// Feeds chunks as [`feed`] does and returns what `value` makes of every row, in the order of the text whoever computed it;
/// or an error of some row.
pub fn collect<T: Clone + Default + Send, E: From<EngineError> + Send>(
    s: &mut Session,
    tokens: &[u32],
    context: usize,
    first: usize,
    count: usize,
    value: impl Fn(usize, u32, &[f32]) -> Result<T, E> + Sync,
) -> Result<Vec<T>, E> {
    let values = Mutex::new((vec![T::default(); count * rows(context)], None));
    feed(s, tokens, context, first, count, &|i, next, logits| {
        let v = value(i, next, logits);
        let mut values = values.lock().unwrap_or_else(|e| e.into_inner());
        match v {
            Ok(v) => values.0[i] = v,
            Err(e) => values.1 = Some(e),
        }
    })?;
    let (values, failed) = values.into_inner().unwrap_or_else(|e| e.into_inner());
    failed.map_or(Ok(values), Err)
}

/// Scores the chunks that start at `first`, as many as the session has sequences, one a sequence. Returns their scores.
pub fn score(s: &mut Session, tokens: &[u32], first: usize, count: usize) -> Result<Vec<Score>, EngineError> {
    let (context, ops) = (s.context(), s.engine().kernels.ops);
    let nlls: Vec<f64> =
        collect::<_, EngineError>(s, tokens, context, first, count, |_, next, logits| Ok(nll(ops, logits, next)))?;
    Ok(nlls.chunks(rows(context)).map(Score::of).collect())
}
