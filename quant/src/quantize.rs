//! Rows of f32 to blocks, byte for byte as ggml's `quantize_*` make them, with and without an importance matrix.
//!
//! [`search`] finds scales and codes for sixteen groups at once; the files beside it lay them out as blocks. The bodies are
//! generic over the vector and compiled once for every rung of the ladder; results are the same bits on each.

mod float;
mod grid;
mod iq;
mod iq1;
mod iq4;
mod kquant;
mod legacy;
mod mxfp4;
mod search;
mod ternary;

use crate::format::Format;
use crate::isa::Isa;
use crate::lanes::{Lanes, Scalar};

/// Quantizes rows to one format with one instruction set. Holding one is the proof that both are possible.
#[derive(Clone, Copy)]
pub struct Quantizer {
    format: Format,
    isa: Isa,
}

/// Whether [`row`] knows the format: all but Q8_K, which no file holds.
fn is_known(format: Format) -> bool {
    format != Format::Q8_K
}

#[inline(always)]
fn row<V: Lanes>(format: Format, x: &[f32], importance: Option<&[f32]>, out: &mut [u8]) {
    match format {
        Format::F32 => float::f32(x, out),
        Format::F16 => float::f16(x, out),
        Format::BF16 => float::bf16(x, out),
        Format::Q4_0 => legacy::q4_0::<V>(x, importance, out),
        Format::Q4_1 => legacy::q4_1::<V>(x, importance, out),
        Format::Q5_0 => legacy::q5_0::<V>(x, importance, out),
        Format::Q5_1 => legacy::q5_1::<V>(x, importance, out),
        Format::Q8_0 => legacy::q8_0::<V>(x, out),
        Format::Q2_K => kquant::q2::<V>(x, importance, out),
        Format::Q3_K => kquant::q3::<V>(x, importance, out),
        Format::Q4_K => kquant::q4::<V>(x, importance, out),
        Format::Q5_K => kquant::q5::<V>(x, importance, out),
        Format::Q6_K => kquant::q6::<V>(x, importance, out),
        Format::IQ1_S => iq1::s::<V>(x, importance, out),
        Format::IQ1_M => iq1::m::<V>(x, importance, out),
        Format::IQ2_XXS => iq::xxs2::<V>(x, importance, out),
        Format::IQ2_XS => iq::xs2::<V>(x, importance, out),
        Format::IQ2_S => iq::s2::<V>(x, importance, out),
        Format::IQ3_XXS => iq::xxs3::<V>(x, importance, out),
        Format::IQ3_S => iq::s3::<V>(x, importance, out),
        Format::IQ4_NL => iq4::nl::<V>(x, importance, out),
        Format::IQ4_XS => iq4::xs::<V>(x, importance, out),
        Format::TQ1_0 => ternary::tq1(x, out),
        Format::TQ2_0 => ternary::tq2(x, out),
        Format::MXFP4 => mxfp4::mxfp4::<V>(x, out),
        Format::Q8_K => unreachable!("a Quantizer is made for the formats of `is_known`"),
    }
}

#[cfg(target_arch = "x86_64")]
crate::isa::avx2! {
    fn row_avx2(format: Format, x: &[f32], importance: Option<&[f32]>, out: &mut [u8]) {
        row::<crate::lanes::Avx2>(format, x, importance, out)
    }
}

#[cfg(target_arch = "x86_64")]
crate::isa::avx512! {
    fn row_avx512(format: Format, x: &[f32], importance: Option<&[f32]>, out: &mut [u8]) {
        row::<crate::lanes::Avx512>(format, x, importance, out)
    }
}

impl Quantizer {
    /// The quantizer of a format, on this machine's best instruction set; `None` where oxcart can only read the format.
    pub fn new(format: Format) -> Option<Quantizer> {
        Quantizer::for_isa(format, Isa::best())
    }

    /// The same on a given instruction set; `None` also where the machine lacks it.
    pub fn for_isa(format: Format, isa: Isa) -> Option<Quantizer> {
        (isa.is_supported() && is_known(format)).then_some(Quantizer { format, isa })
    }

    /// The format.
    pub fn format(&self) -> Format {
        self.format
    }

    /// Whether rows cannot be quantized without knowing which columns matter: so few bits are left that the search has to.
    pub fn needs_importance(&self) -> bool {
        matches!(self.format, Format::IQ1_S | Format::IQ2_XXS | Format::IQ2_XS)
    }

    /// Quantizes one row of finite weights. `importance` weighs each column's error, as llama.cpp's imatrix does; floats,
    /// Q8_0, MXFP4 and the ternary formats do not use it.
    ///
    /// Panics where the lengths do not fit each other, or importance is needed and missing.
    #[allow(unsafe_code)]
    pub fn row(&self, x: &[f32], importance: Option<&[f32]>, out: &mut [u8]) {
        assert_eq!(
            self.format.row_bytes(x.len()),
            Some(out.len()),
            "{}: weights and blocks differ",
            self.format.name()
        );
        assert!(importance.is_none_or(|i| i.len() == x.len()));
        assert!(importance.is_some() || !self.needs_importance(), "{}: needs importance", self.format.name());
        match self.isa {
            Isa::Scalar => row::<Scalar>(self.format, x, importance, out),
            // SAFETY: `for_isa` found the rung supported.
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 | Isa::AvxVnni => unsafe { row_avx2(self.format, x, importance, out) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 | Isa::Amx => unsafe { row_avx512(self.format, x, importance, out) },
            #[cfg(not(target_arch = "x86_64"))]
            _ => unreachable!("not supported here"),
        }
    }
}

/// A number as the two bytes of an f16.
#[inline(always)]
fn f16_bytes(x: f32) -> [u8; 2] {
    half::f16::from_f32(x).to_le_bytes()
}

/// A number as f16 and back: what a reader will see.
#[inline(always)]
fn through_f16(x: f32) -> f32 {
    half::f16::from_f32(x).to_f32()
}

/// The sum of squares, in order.
#[inline(always)]
fn sum_of_squares(x: &[f32]) -> f32 {
    let mut sum = 0.0;
    for x in x {
        sum += x * x;
    }
    sum
}
