//! What a weight is, and how to multiply by it.
//!
//! A GGUF stores a weight matrix as rows of *blocks*: 32 or 256 small integers (the *codes*) that share a few scales.
//! Every integer format, from `Q8_0` to `IQ1_S`, is the same thing seen from far enough away:
//!
//! ```text
//! w[i] = scale[i / group] * (code[i] - offset) - min[i / group]        code in 0..=255, group = 16 or 32
//! ```
//!
//! so that is the one form ([`Codes`]) to which [`mod@format`] unpacks them, and the one form that the matrix kernels know.
//! The other factor, the *activations*, is encoded to signed bytes with one scale for every 32 values ([`act`]). The product
//! of a row and a column is then integer arithmetic inside a group and f32 arithmetic between groups:
//!
//! ```text
//! y = sum over groups g of  scale[g] * d[g] * (dot(code, x) - offset * sum(x))  -  min[g] * d[g] * sum(x)
//! ```
//!
//! Finer than llama.cpp's Q8_K (one scale for 256 values), this keeps an outlier's damage to its own 32 neighbours.
//! Weights that are floats already (F32, F16, BF16) meet activations that stay f32. Where there are AMX tiles, many columns
//! at once are multiplied in bf16 instead, whatever the format (but F32): there a group's scale costs nothing.
//!
//! Who does what:
//!
//! * [`mod@format`]: the list of formats, and a file for each: layout, dequantization, codes;
//! * [`quantize`]: rows of f32 to blocks, byte for byte as ggml;
//! * [`act`]: the encodings of activations, [`ggml`]: as llama.cpp rounds them;
//! * [`isa`]: the ladder of instruction sets and what this machine climbs of it;
//! * [`kernels`]: the dispatch: a table with a kernel for every format, built by letting each rung overwrite what it
//!   improves. Holding a [`kernels::Kernels`] is the proof that the machine can run it;
//! * `scalar`, `avx2`, `avx512`, `amx`: the kernels. `scalar` is the plain one, for every machine; the tests compare all
//!   of them with f64 arithmetic on dequantized weights;
//! * [`f32ops`], [`attention`]: what happens between the matrices;
//! * [`panel`]: the pointers: panels of rows, strided outputs, buffers that a team shares;
//! * [`team`]: the threads. A forward pass is one region in which every worker runs the same code.
//!
//! Nothing in this crate knows a file, a token or a model.
#![deny(unsafe_code)]

pub mod act;
#[cfg(target_arch = "x86_64")]
#[allow(unsafe_code)] // instructions, and the system call that permits them
mod amx;
pub mod attention;
#[cfg(target_arch = "x86_64")]
#[allow(unsafe_code)] // intrinsics
mod avx2;
#[cfg(target_arch = "x86_64")]
#[allow(unsafe_code)] // intrinsics
mod avx512;
#[cfg(all(target_arch = "x86_64", any(test, feature = "emulate-amx")))]
#[allow(unsafe_code)] // a signal handler that executes instructions
mod emulate;
pub mod f32ops;
mod float_matrix;
pub mod format;
pub mod ggml;
pub mod isa;
pub mod kernels;
mod lanes;
pub mod panel;
pub mod quantize;
mod scalar;
#[cfg(target_arch = "x86_64")]
mod slabs;
pub mod team;

pub use act::{Act, ActBuf, Acts, Wants};
pub use format::{Codes, Format};
pub use isa::Isa;
pub use kernels::{Arithmetic, Kernels, Matrix};
pub use panel::{Out, Panel, Scratch, Shared};
pub use quantize::Quantizer;
pub use team::{Team, Worker};
