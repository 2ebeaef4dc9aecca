//! `qwen2`: Qwen 1.5, 2 and 2.5. Biases on queries, keys and values; the halves of a head rotate together.

use super::Arch;
use crate::model::config::Pairs;

pub(super) const ARCH: Arch = Arch {
    name: "qwen2",
    configure: |_, config| {
        config.qkv_bias = true;
        config.rope.pairs = Pairs::Halves;
        Ok(())
    },
};
