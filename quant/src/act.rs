//! Encodings of activations: what a column of x looks like to a kernel.
//!
//! Integer weights meet bytes with one f32 scale for every 32 values. llama.cpp's Q8_K spends one scale on 256 values; on
//! activations with outliers (every real model's) its rounding noise is 2.6 % where this one's is 1.0 %.
//! No encoded value is ever -128, which AVX2's `vpsignb` cannot negate.
//!
//! Blocks lie slab-major, `[slab][column]`: all columns of the 256 positions that a weight slab meets are neighbours.
//! AMX wants bf16, 16 columns interleaved as its tiles are: `[slab][column / 16][k / 2][column % 16]`, pairs of neighbouring
//! values in a number.

use crate::format::SLAB;
use crate::ggml::Rounding;
use crate::isa::Isa;
use crate::kernels::{Arithmetic, Kernels};
use crate::panel::Shared;

/// An encoding of activations.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Act {
    /// [`Q8Block`]s.
    Q8,
    /// [`F32Block`]s: the values themselves.
    F32,
    /// Blocks of [`COLUMNS`] columns in bf16.
    Bf16,
    /// [`F32Block`]s, of values that ggml's encodings leave.
    Ggml(Rounding),
}

/// Columns that lie interleaved in bf16: who encodes them shares cache lines.
pub const COLUMNS: usize = 16;

/// 256 values of 16 columns in bf16: `[k / 2][column]`, the even k in the low half.
pub(crate) type Bf16Block = [u32; SLAB / 2 * COLUMNS];

/// 256 activations as bytes: `x[i] = d[i / 32] * q[i]`.
#[derive(Clone, Copy, Debug, bytemuck::Zeroable, bytemuck::Pod)]
#[repr(C, align(64))]
pub struct Q8Block {
    /// The values, in -127..=127.
    pub q: [i8; SLAB],
    /// The scale of each 32.
    pub d: [f32; 8],
    /// The sum of each 16 of `q`.
    pub sums: [i16; 16],
}

/// 256 activations as they are.
#[derive(Clone, Copy, Debug, bytemuck::Zeroable, bytemuck::Pod)]
#[repr(C, align(64))]
pub struct F32Block(pub [f32; SLAB]);

impl F32Block {
    /// Up to 256 values, and zeros behind them.
    fn set(&mut self, x: &[f32]) {
        self.0[..x.len()].copy_from_slice(x);
        self.0[x.len()..].fill(0.0);
    }
}

/// The encoded columns that a matrix is multiplied by: a view of `n` columns of an [`ActBuf`].
#[derive(Clone, Copy)]
pub struct Acts<'a> {
    q8: &'a [Q8Block],
    f32: &'a [F32Block],
    bf16: &'a [u32],
    ggml: [&'a [F32Block]; Rounding::ALL.len()],
    stride: usize, // columns of the whole buffer
    at: usize,     // first column of the view
    n: usize,
}

impl<'a> Acts<'a> {
    /// Number of columns.
    pub fn n(&self) -> usize {
        self.n
    }

    /// The columns `at..at + n` of this view.
    pub fn columns(&self, at: usize, n: usize) -> Acts<'a> {
        assert!(at + n <= self.n);
        Acts { at: self.at + at, n, ..*self }
    }

    /// The columns' blocks of slab `s`.
    pub(crate) fn q8(&self, s: usize) -> &'a [Q8Block] {
        &self.q8[s * self.stride + self.at..][..self.n]
    }

    /// The blocks of slab `s` that hold the columns, the first of which begins one.
    pub(crate) fn bf16(&self, s: usize) -> &'a [Bf16Block] {
        assert!(self.at.is_multiple_of(COLUMNS), "columns from {} on, not a multiple of {COLUMNS}", self.at);
        let first = s * self.stride.div_ceil(COLUMNS) + self.at / COLUMNS;
        let blocks = bytemuck::cast_slice(&self.bf16[first * size_of::<Bf16Block>() / 4..]);
        &blocks[..self.n.div_ceil(COLUMNS)]
    }

    /// The same columns, with the f32 view replaced by `act`'s rounded values where `act` is [`Act::Ggml`].
    pub(crate) fn read_as(&self, act: Act) -> Acts<'a> {
        match act {
            Act::Ggml(r) => Acts { f32: self.ggml[r as usize], ..*self },
            _ => *self,
        }
    }

    /// The columns' blocks of slab `s`: the values themselves, where the encoding was wanted.
    pub fn f32(&self, s: usize) -> &'a [F32Block] {
        &self.f32[s * self.stride + self.at..][..self.n]
    }
}

/// Which encodings a set of matrices wants of their common input.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
pub struct Wants {
    /// Some matrix eats [`Act::Q8`].
    pub q8: bool,
    /// Some matrix eats [`Act::F32`].
    pub f32: bool,
    /// Some matrix eats [`Act::Bf16`].
    pub bf16: bool,
    /// Some matrix eats [`Act::Ggml`].
    pub ggml: [bool; Rounding::ALL.len()],
}

impl Wants {
    /// What these encodings ask for together.
    pub fn of(acts: impl IntoIterator<Item = Act>) -> Wants {
        let mut w = Wants::default();
        for a in acts {
            match a {
                Act::Q8 => w.q8 = true,
                Act::F32 => w.f32 = true,
                Act::Bf16 => w.bf16 = true,
                Act::Ggml(r) => w.ggml[r as usize] = true,
            }
        }
        w
    }

    /// Columns that one task should encode: those that share cache lines.
    pub fn together(self) -> usize {
        if self.bf16 { COLUMNS } else { 1 }
    }
}

/// A buffer for the encoded columns of one matrix input, shared by the workers of a team.
pub struct ActBuf {
    q8: Shared<Q8Block>,
    f32: Shared<F32Block>,
    bf16: Shared<u32>,
    ggml: [Shared<F32Block>; Rounding::ALL.len()],
    slabs: usize,
}

impl ActBuf {
    /// Room for `cols` columns of `k` values.
    pub fn new(k: usize, cols: usize) -> std::io::Result<ActBuf> {
        let slabs = k.div_ceil(SLAB);
        let room = || Shared::new(slabs * cols);
        // Every encoding has its room; pages of those that no matrix wants are never touched.
        Ok(ActBuf {
            q8: Shared::new(slabs * cols)?,
            f32: room()?,
            bf16: Shared::new(slabs * cols.div_ceil(COLUMNS) * size_of::<Bf16Block>() / 4)?,
            ggml: [room()?, room()?, room()?, room()?],
            slabs,
        })
    }

    /// Bytes when every column is written in the encoding that the kernels want beside quantized weights. (Beside floats it may
    /// be [`F32Block`]s, also natively.)
    pub fn n_bytes(&self, k: &Kernels) -> usize {
        let block = match (k.arithmetic, k.isa) {
            (Arithmetic::Native, Isa::Amx) => size_of::<Bf16Block>() / COLUMNS,
            (Arithmetic::Native, _) => size_of::<Q8Block>(),
            (Arithmetic::Exact | Arithmetic::Ggml, _) => size_of::<F32Block>(),
        };
        self.q8.len() * block
    }

    /// Encodes `x` as column `col` of `stride`; what lies past its end in the last slab becomes zero.
    ///
    /// # Safety
    /// In this phase, column `col` belongs to the caller alone.
    #[allow(unsafe_code)]
    pub unsafe fn encode(&self, kernels: &Kernels, wants: Wants, stride: usize, col: usize, x: &[f32]) {
        for (s, part) in x.chunks(SLAB).enumerate() {
            // SAFETY: the caller's promise.
            unsafe { self.encode_slab(kernels, wants, stride, col, s, part) };
        }
    }

    /// Encodes up to 256 values as slab `slab` of column `col`; the rest of the slab becomes zero.
    ///
    /// # Safety
    /// In this phase, that slab of that column belongs to the caller alone.
    #[allow(unsafe_code)]
    pub unsafe fn encode_slab(
        &self,
        kernels: &Kernels,
        wants: Wants,
        stride: usize,
        col: usize,
        slab: usize,
        x: &[f32],
    ) {
        assert!(col < stride && slab < self.slabs);
        let at = slab * stride + col;
        if wants.q8 {
            // SAFETY: the caller's promise.
            kernels.ops.encode_q8(x, &mut unsafe { self.q8.write(at..at + 1) }[0]);
        }
        if wants.f32 {
            // SAFETY: the caller's promise.
            let b = &mut unsafe { self.f32.write(at..at + 1) }[0];
            b.set(x);
        }
        for r in Rounding::ALL.into_iter().filter(|&r| wants.ggml[r as usize]) {
            // SAFETY: the caller's promise.
            let b = &mut unsafe { self.ggml[r as usize].write(at..at + 1) }[0];
            b.set(x);
            r.round(&mut b.0[..x.len()]);
        }
        if wants.bf16 {
            let mut pairs = [0; SLAB / 2];
            kernels.ops.encode_bf16(x, &mut pairs);
            // SAFETY: the caller's promise.
            unsafe { self.bf16.scatter(bf16_at(stride, col, slab), COLUMNS, &pairs) };
        }
    }

    /// Copies column `from_col` of another buffer (of `from_stride` columns) to column `col`.
    ///
    /// # Safety
    /// In this phase, column `col` belongs to the caller alone, and nobody writes to the other buffer.
    #[allow(unsafe_code)]
    pub unsafe fn gather(
        &self,
        wants: Wants,
        stride: usize,
        col: usize,
        other: &ActBuf,
        from_stride: usize,
        from_col: usize,
    ) {
        for s in 0..other.slabs.min(self.slabs) {
            let (to, from) = (s * stride + col, s * from_stride + from_col);
            if wants.q8 {
                // SAFETY: the caller's promise.
                unsafe { self.q8.write(to..to + 1)[0] = other.q8.read(from..from + 1)[0] };
            }
            if wants.f32 {
                // SAFETY: the caller's promise.
                unsafe { self.f32.write(to..to + 1)[0] = other.f32.read(from..from + 1)[0] };
            }
            for r in Rounding::ALL.into_iter().filter(|&r| wants.ggml[r as usize]) {
                // SAFETY: the caller's promise.
                unsafe {
                    self.ggml[r as usize].write(to..to + 1)[0] = other.ggml[r as usize].read(from..from + 1)[0];
                }
            }
            if wants.bf16 {
                let (to, from) = (bf16_at(stride, col, s), bf16_at(from_stride, from_col, s));
                let mut pairs = [0; SLAB / 2];
                // SAFETY: the caller's promise.
                unsafe {
                    other.bf16.gather(from, COLUMNS, &mut pairs);
                    self.bf16.scatter(to, COLUMNS, &pairs);
                }
            }
        }
    }

    /// The first `n` columns, of which the buffer holds `stride`.
    ///
    /// # Safety
    /// Nobody encodes into them while the view lives.
    #[allow(unsafe_code)]
    pub unsafe fn view(&self, k: usize, stride: usize, n: usize) -> Acts<'_> {
        let slabs = k.div_ceil(SLAB);
        let (blocks, pairs) = (slabs * stride, bf16_at(stride, 0, slabs));
        // SAFETY: the caller's promise.
        let (q8, f32, bf16) = unsafe { (self.q8.read(0..blocks), self.f32.read(0..blocks), self.bf16.read(0..pairs)) };
        // SAFETY: the caller's promise.
        let ggml = std::array::from_fn(|r| unsafe { self.ggml[r].read(0..blocks) });
        Acts { q8, f32, bf16, ggml, stride, at: 0, n }
    }
}

/// Where a column's first pair of a slab lies in bf16, of `stride` columns.
fn bf16_at(stride: usize, col: usize, slab: usize) -> usize {
    (slab * stride.div_ceil(COLUMNS) + col / COLUMNS) * size_of::<Bf16Block>() / 4 + col % COLUMNS
}

/// What a gemm needs of each column's sums over groups of `G`: `-offset * sum` as integers, or `d * sum` as floats where the
/// format has minimums.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
pub(crate) fn column_sums<const G: usize, const MIN: bool>(offset: i32, x: &[Q8Block], to: &mut [[u32; 16]]) {
    for (x, to) in x.iter().zip(to) {
        for g in 0..SLAB / G {
            let s: i32 = x.sums[g * G / 16..(g + 1) * G / 16].iter().map(|&s| s as i32).sum();
            to[g] = if MIN { (x.d[g * G / 32] * s as f32).to_bits() } else { (-offset * s) as u32 };
        }
    }
}
