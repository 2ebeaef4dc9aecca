//! `llama`: Llama 2 and 3, SmolLM2, Mistral, and Mixtral as their mixture of experts. No biases; neighbouring dimensions
//! rotate together, for which converters permute the rows of Q and K; Llama 3.1 brings a tensor of frequency factors.

use super::Arch;

pub(super) const ARCH: Arch = Arch { name: "llama", configure: |_, _| Ok(()) };
