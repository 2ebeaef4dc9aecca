//! Dividing matrices into tasks: which rows a task computes.
//!
//! A task owns its rows over all of the inner dimension and all columns, so how rows are divided does not change results.

use oxcart_quant::{Kernels, Matrix};
use std::ops::Range;

/// Weights that a gemv task reads: streams long enough for the prefetcher, short enough to even out workers.
const GEMV_BYTES: usize = 512 << 10;
/// Rows of a gemv task, for each of up to eight columns, at least and whatever they weigh: a task prepares its columns first.
const GEMV_ROWS: usize = 32;

/// Matrices with one input, divided into panels.
pub(super) struct Panels<'a, const N: usize> {
    matrices: [Matrix<'a>; N],
    rows: [usize; N],
    tasks: usize,
}

impl<'a, const N: usize> Panels<'a, N> {
    /// Panels for `n` columns and so many workers.
    pub fn new(k: &Kernels, matrices: [Matrix<'a>; N], n: usize, threads: usize) -> Panels<'a, N> {
        let total: usize = matrices.iter().map(Matrix::rows).sum();
        // At least four tasks a worker, so that the last to finish is not waited for long.
        let fair = (total / (4 * threads)).max(1);
        let rows = std::array::from_fn(|i| {
            let (m, kernel) = (&matrices[i], k.kernel(matrices[i].format()));
            if n <= kernel.gemv_cols {
                (GEMV_BYTES / m.row_bytes()).max(GEMV_ROWS * n.min(8)).min(fair).next_multiple_of(4)
            } else {
                kernel.gemm_rows.min(fair.next_multiple_of(32))
            }
        });
        let tasks = (0..N).map(|i| matrices[i].rows().div_ceil(rows[i])).sum();
        Panels { matrices, rows, tasks }
    }

    /// How many there are.
    pub fn tasks(&self) -> usize {
        self.tasks
    }

    /// The matrix and the rows of task `t`.
    pub fn task(&self, mut t: usize) -> (usize, Range<usize>) {
        for i in 0..N {
            let n = self.matrices[i].rows().div_ceil(self.rows[i]);
            if t < n {
                return (i, t * self.rows[i]..((t + 1) * self.rows[i]).min(self.matrices[i].rows()));
            }
            t -= n;
        }
        panic!("task {t} past the last");
    }

    /// A matrix of the set.
    pub fn matrix(&self, i: usize) -> &Matrix<'a> {
        &self.matrices[i]
    }
}
