//! The dispatch: which kernel multiplies which format on this machine.
//!
//! [`Kernels::for_isa`] starts from a table in which `scalar` fills every slot and lets each rung of the ladder, up to the
//! one asked for, overwrite the slots that it improves. This file has the only place that calls a kernel.

use crate::act::{Act, Acts};
use crate::attention::Attention;
use crate::f32ops::Ops;
use crate::format::{Codes, FORMATS, Format};
use crate::ggml::Rounding;
use crate::isa::Isa;
use crate::panel::{Out, Panel, Scratch};
use std::ops::Range;
use std::sync::OnceLock;

/// Multiplies a panel of weight rows by encoded activations.
pub(crate) type Run = unsafe fn(&Kernel, Panel<'_>, Acts<'_>, &mut Out<'_>, &mut Scratch);

/// How one format is multiplied.
#[derive(Clone, Copy)]
pub struct Kernel {
    /// Up to this many columns go to `gemv`, more to `gemm`.
    pub gemv_cols: usize,
    /// Rows of a panel in which `gemm` works best.
    pub gemm_rows: usize,
    pub(crate) gemv: Slot,
    pub(crate) gemm: Slot,
    /// A slab of blocks to codes; what the gemm of integer formats starts from.
    pub(crate) unpack: unsafe fn(&[u8], &mut Codes),
}

/// A function, the rung it was written for, and the encoding of activations that it eats.
#[derive(Clone, Copy)]
pub(crate) struct Slot {
    pub isa: Isa,
    pub act: Act,
    pub run: Run,
}

impl Kernel {
    /// What multiplies `n` columns.
    fn slot(&self, n: usize) -> Slot {
        if n <= self.gemv_cols { self.gemv } else { self.gemm }
    }

    /// Largest batch in which each column's product is bit-identical to that of the column alone.
    pub fn alike_cols(&self) -> usize {
        // Where a single column already goes to the gemm, every batch does.
        if self.gemv_cols > 1 { self.gemv_cols } else { usize::MAX }
    }

    /// The encoding in which it wants `n` columns.
    pub fn act(&self, n: usize) -> Act {
        self.slot(n).act
    }
}

/// What is computed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Arithmetic {
    /// What the instruction set does best.
    Native,
    /// Weights dequantized, activations in f32, nothing rounded to bytes: slow, and nearest to the weights' meaning.
    Exact,
    /// The same with activations rounded as ggml rounds them: to get llama.cpp's own figures.
    Ggml,
}

/// A kernel for every format, and the operations between them, for one instruction set. Holding one is the proof that the
/// machine has it.
pub struct Kernels {
    /// The instruction set.
    pub isa: Isa,
    /// What is computed.
    pub arithmetic: Arithmetic,
    table: Vec<Kernel>,
    /// Norms, rotations, encodings.
    pub ops: &'static Ops,
    /// Attention over a KV cache.
    pub attention: &'static Attention,
}

impl Kernels {
    /// The kernels of an instruction set, `None` where the machine lacks it.
    pub fn for_isa(isa: Isa) -> Option<&'static Kernels> {
        static TABLES: [OnceLock<Kernels>; Isa::ALL.len()] = [const { OnceLock::new() }; Isa::ALL.len()];
        isa.is_supported().then(|| TABLES[isa as usize].get_or_init(|| Kernels::build(isa, Arithmetic::Native)))
    }

    /// The kernels of this machine's best instruction set.
    pub fn best() -> &'static Kernels {
        Kernels::for_isa(Isa::best()).expect("the best supported set is supported")
    }

    /// The reference, [`Arithmetic::Exact`]. Built from the best instruction set.
    pub fn exact() -> &'static Kernels {
        static TABLE: OnceLock<Kernels> = OnceLock::new();
        TABLE.get_or_init(|| Kernels::build(Isa::best(), Arithmetic::Exact))
    }

    /// [`Arithmetic::Ggml`]. Built from the best instruction set.
    pub fn ggml() -> &'static Kernels {
        static TABLE: OnceLock<Kernels> = OnceLock::new();
        TABLE.get_or_init(|| Kernels::build(Isa::best(), Arithmetic::Ggml))
    }

    /// The `--isa` value that selects this table.
    pub fn label(&self) -> &'static str {
        match self.arithmetic {
            Arithmetic::Native => self.isa.name(),
            Arithmetic::Exact => "exact",
            Arithmetic::Ggml => "ggml",
        }
    }

    fn build(isa: Isa, arithmetic: Arithmetic) -> Kernels {
        let floats = arithmetic != Arithmetic::Native;
        let mut table: Vec<Kernel> = FORMATS
            .iter()
            .map(|s| if floats { crate::scalar::float_kernel(s) } else { crate::scalar::kernel(s) })
            .collect();
        #[cfg(target_arch = "x86_64")]
        {
            if isa >= Isa::Avx2 {
                crate::avx2::overlay(&mut table, isa == Isa::AvxVnni);
            }
            if isa >= Isa::Avx512 {
                crate::avx512::overlay(&mut table);
            }
            if isa >= Isa::Amx && !floats {
                crate::amx::overlay(&mut table);
            }
        }
        if arithmetic == Arithmetic::Ggml {
            for (kernel, spec) in table.iter_mut().zip(FORMATS) {
                if let Some(r) = Rounding::of(spec.format) {
                    (kernel.gemv.act, kernel.gemm.act) = (Act::Ggml(r), Act::Ggml(r));
                }
            }
        }
        // Tiles round to bf16.
        let attention = Attention::for_isa(if floats { isa.min(Isa::Avx512) } else { isa });
        Kernels { isa, arithmetic, table, ops: Ops::for_isa(isa), attention }
    }

    /// How `format` is multiplied.
    pub fn kernel(&self, format: Format) -> &Kernel {
        &self.table[format as usize]
    }

    /// `out[r][c] = sum over k of w[r][k] * x[k][c]`, for every row of the panel and every column of `x`.
    ///
    /// Each output is summed over all of k by one call, in an order that depends on the kernel and on the number of columns
    /// alone.
    #[allow(unsafe_code)]
    pub fn matmul(&self, w: Panel<'_>, x: Acts<'_>, out: &mut Out<'_>, scratch: &mut Scratch) {
        assert!(w.rows == out.rows && x.n() == out.cols, "panel and output differ in shape");
        if out.rows == 0 || out.cols == 0 {
            return;
        }
        let k = self.kernel(w.format);
        let slot = k.slot(x.n());
        debug_assert!(slot.isa <= self.isa, "a kernel of a rung above");
        // SAFETY: the slot's rung is at most `self.isa`, which `for_isa` found supported; a panel's rows are whole
        // (`Matrix::new`), and views of activations and outputs check their own bounds.
        unsafe { (slot.run)(k, w, x.read_as(slot.act), out, scratch) }
    }
}

/// A weight matrix: rows of blocks, a view of bytes that somebody else keeps.
#[derive(Clone, Copy)]
pub struct Matrix<'a> {
    format: Format,
    rows: usize,
    cols: usize,
    row_bytes: usize,
    data: &'a [u8],
}

/// A matrix whose bytes do not fit its shape.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum ShapeError {
    /// A row is not whole blocks.
    #[error("{cols} columns, not a multiple of {block} ({format})")]
    Columns {
        /// Columns of the matrix.
        cols: usize,
        /// Weights in a block.
        block: usize,
        /// The format's name.
        format: &'static str,
    },
    /// Too few or too many bytes.
    #[error("{found} bytes, expected {expected}")]
    Bytes {
        /// Bytes given.
        found: usize,
        /// Bytes that the shape takes; the largest number where it overflows.
        expected: usize,
    },
}

impl<'a> Matrix<'a> {
    /// A view of `rows` rows of `cols` weights.
    pub fn new(format: Format, rows: usize, cols: usize, data: &'a [u8]) -> Result<Matrix<'a>, ShapeError> {
        let row_bytes = format.row_bytes(cols).ok_or(ShapeError::Columns {
            cols,
            block: format.spec().block_len,
            format: format.name(),
        })?;
        let expected = rows.saturating_mul(row_bytes);
        if data.len() != expected {
            return Err(ShapeError::Bytes { found: data.len(), expected });
        }
        Ok(Matrix { format, rows, cols, row_bytes, data })
    }

    /// How the weights are stored.
    pub fn format(&self) -> Format {
        self.format
    }

    /// Outputs.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Inputs.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Bytes of one row.
    pub fn row_bytes(&self) -> usize {
        self.row_bytes
    }

    /// Some consecutive rows as a matrix, e.g. one expert of several.
    pub fn rows_of(&self, rows: Range<usize>) -> Matrix<'a> {
        let data = &self.data[rows.start * self.row_bytes..rows.end * self.row_bytes];
        Matrix { rows: rows.len(), data, ..*self }
    }

    /// Some consecutive rows.
    pub fn panel(&self, rows: Range<usize>) -> Panel<'a> {
        Panel {
            format: self.format,
            data: &self.data[rows.start * self.row_bytes..rows.end * self.row_bytes],
            row_bytes: self.row_bytes,
            rows: rows.len(),
            cols: self.cols,
        }
    }

    /// One row to f32, e.g. a token's embedding.
    pub fn dequant_row(&self, row: usize, out: &mut [f32]) {
        assert_eq!(out.len(), self.cols);
        self.format.dequant(self.panel(row..row + 1).data, out);
    }
}

#[cfg(test)]
pub(crate) mod tests;
