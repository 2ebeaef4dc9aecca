//! The list of weight formats. A format is a line in [`FORMATS`] and a file in `format/`.
//!
//! Block layouts are those of ggml (`ggml-common.h`); names, ids and sizes are the ones that GGUF files carry.

mod float;
pub(crate) mod iq;
pub(crate) mod iq4;
mod kquant;
mod legacy;
pub(crate) mod mxfp4;
mod ternary;

/// Weights in one slab: the stretch of a row that kernels unpack at once, and the length of a k-quant super-block.
pub const SLAB: usize = 256;

macro_rules! formats {
    ($($variant:ident $name:literal $id:literal $len:literal $bytes:literal $dequant:path, $codes:expr;)*) => {
        /// How the weights of a matrix are stored.
        #[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, PartialOrd, Ord)]
        #[allow(non_camel_case_types)]
        pub enum Format { $(#[doc = $name] $variant),* }

        /// Every format, in the order of [`Format`]'s variants.
        pub const FORMATS: &[Spec] = &[$(Spec {
            format: Format::$variant, name: $name, id: $id, block_len: $len, block_bytes: $bytes, dequant: $dequant, codes: $codes,
        }),*];
    };
}

/// What there is to know about a format.
pub struct Spec {
    /// The format.
    pub format: Format,
    /// ggml's name, as llama.cpp prints it.
    pub name: &'static str,
    /// The type id in a GGUF file (`enum ggml_type`).
    pub id: u32,
    /// Weights in a block.
    pub block_len: usize,
    /// Bytes of a block.
    pub block_bytes: usize,
    /// Whole blocks to f32, bit for bit as ggml's `dequantize_row_*`.
    pub dequant: fn(&[u8], &mut [f32]),
    /// The integer form; `None` for floats.
    pub codes: Option<CodeSpec>,
}

/// How a format's blocks become [`Codes`].
pub struct CodeSpec {
    /// Weights that share a scale: 16 or 32.
    pub group: usize,
    /// What is subtracted from a code.
    pub offset: i32,
    /// Whether `min` is used; where it is, `offset` is 0.
    pub has_min: bool,
    /// Unpacks whole blocks, at most [`SLAB`] weights of them. Groups past the last block are left as they were.
    pub unpack: fn(&[u8], &mut Codes),
}

/// A slab of a row in integer form: `w[i] = scale[i / group] * (q[i] - offset) - min[i / group]`.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub struct Codes {
    /// The codes, in the order of the weights.
    pub q: [u8; SLAB],
    /// A scale for each group; 8 of them for groups of 32, 16 for groups of 16.
    pub scale: [f32; 16],
    /// A minimum for each group, where the format has one.
    pub min: [f32; 16],
}

impl Codes {
    /// No weights: every scale and minimum is zero.
    pub const ZERO: Codes = Codes { q: [0; SLAB], scale: [0.0; 16], min: [0.0; 16] };
}

/// The f16 at a byte of a block, in f32.
fn f16_at(b: &[u8], at: usize) -> f32 {
    half::f16::from_le_bytes(part(b, at)).to_f32()
}

/// Dequantizes super-blocks by unpacking: `scale * (q - offset) - min`, rounded as ggml rounds, the product first.
fn dequant_codes<const BYTES: usize>(
    bytes: &[u8],
    out: &mut [f32],
    unpack: fn(&[u8], &mut Codes),
    group: usize,
    offset: i32,
) {
    for (b, o) in bytes.as_chunks::<BYTES>().0.iter().zip(out.as_chunks_mut::<SLAB>().0) {
        let mut c = Codes::ZERO;
        unpack(b, &mut c);
        for (i, o) in o.iter_mut().enumerate() {
            *o = c.scale[i / group] * (c.q[i] as i32 - offset) as f32 - c.min[i / group];
        }
    }
}

/// `N` bytes of a block.
fn part<const N: usize>(b: &[u8], at: usize) -> [u8; N] {
    b[at..at + N].try_into().expect("of that length")
}

const fn sym(group: usize, offset: i32, unpack: fn(&[u8], &mut Codes)) -> Option<CodeSpec> {
    Some(CodeSpec { group, offset, has_min: false, unpack })
}
const fn min(group: usize, unpack: fn(&[u8], &mut Codes)) -> Option<CodeSpec> {
    Some(CodeSpec { group, offset: 0, has_min: true, unpack })
}

formats! {
    // variant  name    id  len bytes  dequant              codes
    F32      "f32"      0    1    4  float::f32,            None;
    F16      "f16"      1    1    2  float::f16,            None;
    BF16     "bf16"    30    1    2  float::bf16,           None;
    Q4_0     "q4_0"     2   32   18  legacy::q4_0::dequant, sym(32, 8, legacy::q4_0::unpack);
    Q4_1     "q4_1"     3   32   20  legacy::q4_1::dequant, min(32, legacy::q4_1::unpack);
    Q5_0     "q5_0"     6   32   22  legacy::q5_0::dequant, sym(32, 16, legacy::q5_0::unpack);
    Q5_1     "q5_1"     7   32   24  legacy::q5_1::dequant, min(32, legacy::q5_1::unpack);
    Q8_0     "q8_0"     8   32   34  legacy::q8_0::dequant, sym(32, 128, legacy::q8_0::unpack);
    Q2_K     "q2_K"    10  256   84  kquant::q2::dequant,   min(16, kquant::q2::unpack);
    Q3_K     "q3_K"    11  256  110  kquant::q3::dequant,   sym(16, 4, kquant::q3::unpack);
    Q4_K     "q4_K"    12  256  144  kquant::q4::dequant,   min(32, kquant::q4::unpack);
    Q5_K     "q5_K"    13  256  176  kquant::q5::dequant,   min(32, kquant::q5::unpack);
    Q6_K     "q6_K"    14  256  210  kquant::q6::dequant,   sym(16, 32, kquant::q6::unpack);
    Q8_K     "q8_K"    15  256  292  kquant::q8::dequant,   sym(32, 128, kquant::q8::unpack);
    IQ1_S    "iq1_s"   19  256   50  iq::s1::dequant,       sym(32, iq::OFFSET_1, iq::s1::unpack);
    IQ1_M    "iq1_m"   29  256   56  iq::m1::dequant,       sym(16, iq::OFFSET_1, iq::m1::unpack);
    IQ2_XXS  "iq2_xxs" 16  256   66  iq::xxs2::dequant,     sym(32, iq::OFFSET, iq::xxs2::unpack);
    IQ2_XS   "iq2_xs"  17  256   74  iq::xs2::dequant,      sym(16, iq::OFFSET, iq::xs2::unpack);
    IQ2_S    "iq2_s"   22  256   82  iq::s2::dequant,       sym(16, iq::OFFSET, iq::s2::unpack);
    IQ3_XXS  "iq3_xxs" 18  256   98  iq::xxs3::dequant,     sym(32, iq::OFFSET, iq::xxs3::unpack);
    IQ3_S    "iq3_s"   21  256  110  iq::s3::dequant,       sym(32, iq::OFFSET, iq::s3::unpack);
    IQ4_NL   "iq4_nl"  20   32   18  iq4::nl::dequant,      sym(32, 128, iq4::nl::unpack);
    IQ4_XS   "iq4_xs"  23  256  136  iq4::xs::dequant,      sym(32, 128, iq4::xs::unpack);
    TQ1_0    "tq1_0"   34  256   54  ternary::tq1::dequant, sym(32, 1, ternary::tq1::unpack);
    TQ2_0    "tq2_0"   35  256   66  ternary::tq2::dequant, sym(32, 1, ternary::tq2::unpack);
    MXFP4    "mxfp4"   39   32   17  mxfp4::dequant,        sym(32, mxfp4::OFFSET, mxfp4::unpack);
}

impl Format {
    /// Number of formats.
    pub const COUNT: usize = FORMATS.len();

    /// The line of [`FORMATS`] that describes this format.
    pub const fn spec(self) -> &'static Spec {
        &FORMATS[self as usize]
    }

    /// ggml's name, e.g. `q4_K`.
    pub fn name(self) -> &'static str {
        self.spec().name
    }

    /// The format with GGUF type id `id`, if oxcart computes with it.
    pub fn from_id(id: u32) -> Option<Format> {
        FORMATS.iter().find(|s| s.id == id).map(|s| s.format)
    }

    /// Bytes of a row of `cols` weights, or `None` where `cols` is not whole blocks or the count overflows.
    pub fn row_bytes(self, cols: usize) -> Option<usize> {
        let s = self.spec();
        if !cols.is_multiple_of(s.block_len) { None } else { (cols / s.block_len).checked_mul(s.block_bytes) }
    }

    /// Dequantizes whole blocks to f32, as ggml does.
    ///
    /// Panics where `blocks` and `out` do not describe the same number of weights.
    pub fn dequant(self, blocks: &[u8], out: &mut [f32]) {
        assert_eq!(
            self.row_bytes(out.len()),
            Some(blocks.len()),
            "{}: blocks and weights differ in number",
            self.name()
        );
        (self.spec().dequant)(blocks, out);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_follows_the_enum() {
        for (i, s) in FORMATS.iter().enumerate() {
            assert_eq!(s.format as usize, i, "{}", s.name);
            assert!(SLAB.is_multiple_of(s.block_len), "{}: a slab must hold whole blocks", s.name);
            if let Some(c) = &s.codes {
                assert!(c.group == 16 || c.group == 32, "{}", s.name);
                assert!(!c.has_min || c.offset == 0, "{}", s.name);
            }
        }
    }

    /// `unpack` and `dequant` describe the same weights, on random blocks.
    #[test]
    fn codes_equal_dequantized_weights() {
        let mut state = 0x9E37_79B9_7F4A_7C15u64;
        for s in FORMATS {
            let Some(c) = &s.codes else { continue };
            for round in 0..200 {
                let n = SLAB / s.block_len;
                let mut bytes = vec![0u8; n * s.block_bytes];
                for b in &mut bytes {
                    state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                    *b = (state >> 56) as u8;
                }
                let (mut w, mut codes) = ([0.0f32; SLAB], Codes::ZERO);
                (s.dequant)(&bytes, &mut w);
                (c.unpack)(&bytes, &mut codes);
                for (i, &w) in w.iter().enumerate() {
                    let g = i / c.group;
                    let x = codes.scale[g] * (codes.q[i] as i32 - c.offset) as f32 - codes.min[g];
                    // Random bits make random f16 scales, huge and NaN ones among them.
                    let bound = 1e-6 * (codes.scale[g].abs() * 256.0 + codes.min[g].abs());
                    assert!(
                        !bound.is_finite() || (x - w).abs() <= bound,
                        "{} round {round} weight {i}: {x} {w}",
                        s.name
                    );
                }
            }
        }
    }
}
