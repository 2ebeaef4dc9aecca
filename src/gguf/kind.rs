//! ggml's tensor types by their ids: those that are known, and the names of those that are not.

use gguf_rs_lib::format::GGUFTensorType;
use oxcart_quant::Format;
use std::fmt;

/// How a tensor is stored: ggml's type (`enum ggml_type`).
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct TensorKind(GGUFTensorType);

impl TensorKind {
    /// The type with this id; the error names what the id was or is elsewhere.
    pub fn from_id(id: u32) -> Result<TensorKind, ForeignKind> {
        GGUFTensorType::from_u32(id).map(TensorKind).map_err(|_| ForeignKind(id))
    }

    /// The id in the file.
    pub fn id(self) -> u32 {
        self.0 as u32
    }

    /// ggml's name, e.g. `q4_K`.
    pub fn name(self) -> String {
        let name = self.0.name().to_lowercase();
        match name.strip_suffix("_k") {
            Some(stem) => format!("{stem}_K"),
            None => name,
        }
    }

    /// The format with which oxcart computes, if it does.
    pub fn format(self) -> Option<Format> {
        Format::from_id(self.id())
    }

    /// Weights in a block; rows are whole blocks.
    pub fn block_len(self) -> u64 {
        self.0.block_size() as u64
    }

    /// Bytes of a tensor with these dimensions; `None` where the numbers overflow.
    pub fn n_bytes(self, dims: &[u64]) -> Option<u64> {
        let n = dims.iter().try_fold(1u64, |n, &d| n.checked_mul(d)).filter(|&n| n <= i64::MAX as u64)?;
        self.0.checked_calculate_size(n)
    }
}

impl From<Format> for TensorKind {
    fn from(f: Format) -> TensorKind {
        TensorKind::from_id(f.spec().id).expect("every format is a type of ggml")
    }
}

impl fmt::Display for TensorKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.name())
    }
}

/// A type id that no current ggml has.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ForeignKind(pub u32);

impl fmt::Display for ForeignKind {
    /// The id, its name, and where it is from.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // `enum ggml_type` of ggml keeps the ids of what it removed; ik_llama.cpp counts on from 133, and from 202 for
        // its interleaved layouts. 36 means something in both.
        let name = match self.0 {
            4 => "q4_2, which ggml removed in 2023",
            5 => "q4_3, which ggml removed in 2023",
            31 => "q4_0_4_4, which ggml removed in 2024: requantize as q4_0",
            32 => "q4_0_4_8, which ggml removed in 2024: requantize as q4_0",
            33 => "q4_0_8_8, which ggml removed in 2024: requantize as q4_0",
            36 => "iq4_nl_4_4, which ggml removed in 2024, or i2_s of ik_llama.cpp",
            37 => "iq4_nl_4_8, which ggml removed in 2024: requantize as iq4_nl",
            38 => "iq4_nl_8_8, which ggml removed in 2024: requantize as iq4_nl",
            133 => "q6_0 of ik_llama.cpp",
            134 => "iq1_bn of ik_llama.cpp",
            135 => "iq2_bn of ik_llama.cpp",
            137 => "iq2_k of ik_llama.cpp",
            138 => "iq3_k of ik_llama.cpp",
            139 => "iq4_k of ik_llama.cpp",
            140 => "iq5_k of ik_llama.cpp",
            141 => "iq6_k of ik_llama.cpp",
            144 => "iq4_ks of ik_llama.cpp",
            145 => "iq2_ks of ik_llama.cpp",
            146 => "iq4_kss of ik_llama.cpp",
            151 => "q8_kv of ik_llama.cpp",
            152 => "iq5_ks of ik_llama.cpp",
            153 => "iq2_kt of ik_llama.cpp",
            154 => "iq3_kt of ik_llama.cpp",
            155 => "iq4_kt of ik_llama.cpp",
            156 => "iq3_ks of ik_llama.cpp",
            157 => "iq2_kl of ik_llama.cpp",
            158 => "iq1_kt of ik_llama.cpp",
            136 | 142 | 143 | 147..=150 => "a type of ik_llama.cpp",
            202..=399 => "an interleaved type of ik_llama.cpp",
            _ => return write!(f, "{}, which ggml does not have", self.0),
        };
        write!(f, "{} ({name})", self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use oxcart_quant::format::FORMATS;

    /// Every format of the kernels is a type of the file, with the same name and size.
    #[test]
    fn formats_are_kinds() {
        for s in FORMATS {
            let k = TensorKind::from(s.format);
            assert_eq!((k.id(), k.name().as_str(), k.block_len()), (s.id, s.name, s.block_len as u64));
            assert_eq!(k.n_bytes(&[s.block_len as u64, 3]), Some(3 * s.block_bytes as u64), "{}", s.name);
            assert_eq!(k.format(), Some(s.format));
        }
    }

    #[test]
    fn ids_that_ggml_lacks_are_named() {
        for (id, want) in
            [(4, "q4_2"), (31, "q4_0_4_4"), (36, "i2_s"), (139, "iq4_k"), (142, "ik_llama"), (212, "interl")]
        {
            let text = TensorKind::from_id(id).unwrap_err().to_string();
            assert!(text.starts_with(&id.to_string()) && text.contains(want), "{text}");
        }
        assert_eq!(TensorKind::from_id(9999).unwrap_err().to_string(), "9999, which ggml does not have");
        // Known to ggml, not to the kernels.
        let k = TensorKind::from_id(24).unwrap();
        assert_eq!((k.name().as_str(), k.format(), k.n_bytes(&[66])), ("i8", None, Some(66)));
        assert_eq!(TensorKind::from_id(15).unwrap().name(), "q8_K");
    }
}
