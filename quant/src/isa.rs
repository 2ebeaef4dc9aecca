//! The ladder of instruction sets, and how far up this machine climbs.
//!
//! A rung's features are written once, in the `rung!` line that makes both the attribute macro with which a file's
//! functions are compiled and the detection: the two cannot drift apart.

use std::fmt;
use std::str::FromStr;

/// A set of instructions for which kernels are written. Ordered: a rung may use everything below it, but for AVX-VNNI, which
/// many machines with AVX-512 lack.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Isa {
    /// Plain Rust, for every machine.
    Scalar,
    /// AVX2, FMA and F16C: x86 since 2013.
    Avx2,
    /// AVX2 and AVX-VNNI: Intel since Alder Lake, desktops included.
    AvxVnni,
    /// AVX-512 F, BW, VL, DQ and VNNI: Intel since Cascade Lake, AMD since Zen 4.
    Avx512,
    /// AVX-512 with VBMI and BF16, and AMX tiles with BF16: Intel's Xeons since Sapphire Rapids.
    Amx,
}

#[cfg(target_arch = "x86_64")]
macro_rules! rung {
    ($d:tt $stamp:ident $detected:ident $($feature:tt)+) => {
        macro_rules! $stamp {
            ($d($d item:item)*) => { $d($(#[target_feature(enable = $feature)])+ $d item)* };
        }
        pub(crate) use $stamp;

        fn $detected() -> bool {
            true $(&& std::arch::is_x86_feature_detected!($feature))+
        }
    };
}

#[cfg(target_arch = "x86_64")]
rung!($ avx2 avx2_detected "avx2" "fma" "f16c" "bmi2");
#[cfg(target_arch = "x86_64")]
rung!($ avxvnni avxvnni_detected "avx2" "fma" "f16c" "bmi2" "avxvnni");
#[cfg(target_arch = "x86_64")]
rung!($ avx512 avx512_detected "avx2" "fma" "f16c" "bmi2" "avx512f" "avx512bw" "avx512vl" "avx512dq" "avx512vnni");
#[cfg(target_arch = "x86_64")]
rung!($ amx below_tiles_detected "avx2" "fma" "f16c" "bmi2" "avx512f" "avx512bw" "avx512vl" "avx512dq" "avx512vnni" "avx512vbmi" "avx512bf16");

/// Whether instructions that the machine lacks are had in software: in tests.
#[cfg(target_arch = "x86_64")]
pub(crate) fn emulated() -> bool {
    #[cfg(any(test, feature = "emulate-amx"))]
    return crate::emulate::install();
    #[cfg(not(any(test, feature = "emulate-amx")))]
    false
}

impl Isa {
    /// Every rung, lowest first.
    pub const ALL: [Isa; 5] = [Isa::Scalar, Isa::Avx2, Isa::AvxVnni, Isa::Avx512, Isa::Amx];

    /// Whether this machine (and its operating system) has the instructions.
    pub fn is_supported(self) -> bool {
        match self {
            Isa::Scalar => true,
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => avx2_detected(),
            #[cfg(target_arch = "x86_64")]
            Isa::AvxVnni => avxvnni_detected() || avx2_detected() && emulated(),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => avx512_detected(),
            #[cfg(target_arch = "x86_64")]
            Isa::Amx => below_tiles_detected() && crate::amx::tiles(),
            #[cfg(not(target_arch = "x86_64"))]
            _ => false,
        }
    }

    /// The highest rung that this machine supports.
    pub fn best() -> Isa {
        Isa::ALL.into_iter().rev().find(|i| i.is_supported()).unwrap_or(Isa::Scalar)
    }

    /// The name by which it is chosen: `scalar`, `avx2`, `avxvnni`, `avx512`, `amx`.
    pub fn name(self) -> &'static str {
        match self {
            Isa::Scalar => "scalar",
            Isa::Avx2 => "avx2",
            Isa::AvxVnni => "avxvnni",
            Isa::Avx512 => "avx512",
            Isa::Amx => "amx",
        }
    }
}

impl fmt::Display for Isa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// The name of an instruction set that is not one, or not one of this machine's.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum IsaError {
    /// No rung has the name.
    #[error("unknown instruction set {0:?}, expected one of scalar, avx2, avxvnni, avx512, amx")]
    Unknown(String),
    /// The rung exists, the machine lacks it.
    #[error("this machine has no {0} (it has {best})", best = Isa::best())]
    Unsupported(Isa),
}

impl FromStr for Isa {
    type Err = IsaError;

    /// Parses a rung's name; one that this machine lacks is an error, not a fallback.
    fn from_str(s: &str) -> Result<Isa, IsaError> {
        let isa = Isa::ALL
            .into_iter()
            .find(|i| i.name() == s)
            .ok_or_else(|| IsaError::Unknown(s.chars().take(32).collect()))?;
        if isa.is_supported() { Ok(isa) } else { Err(IsaError::Unsupported(isa)) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_parse_back() {
        for isa in Isa::ALL {
            let want = if isa.is_supported() { Ok(isa) } else { Err(IsaError::Unsupported(isa)) };
            assert_eq!(isa.name().parse(), want);
        }
        assert!(matches!("avx3".parse::<Isa>(), Err(IsaError::Unknown(_))));
    }
}
