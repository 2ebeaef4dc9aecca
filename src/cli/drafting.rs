//! The flags of speculative decoding.

use super::engine::EngineArgs;
use crate::catalog;
use crate::draft::{Drafter, MOST};
use crate::engine::{Engine, SessionOptions};

/// Who guesses the tokens to come, and how many.
#[derive(clap::Args)]
pub struct DraftArgs {
    /// Speculative decoding: draft up to N tokens per pass when that is faster (0 disables; output is unchanged)
    #[arg(long, visible_aliases = ["draft", "draft-n", "spec-draft-n-max"], value_name = "N", default_value_t = MOST)]
    pub draft_max: usize,
    /// Draft model with the same vocabulary: a file, or a name from the catalogue
    #[arg(long, visible_alias = "md", value_name = "MODEL")]
    pub model_draft: Option<String>,
}

impl DraftArgs {
    /// The smaller model, where anything is to be guessed.
    pub fn model(&self) -> Option<&str> {
        self.model_draft.as_deref().filter(|_| self.draft_max > 0)
    }

    /// What guesses for `engine`, opened by `a` and run in sessions of `s`.
    pub fn drafter(&self, engine: &Engine, a: &EngineArgs, s: &SessionOptions) -> anyhow::Result<Drafter> {
        let mut drafter = Drafter::new(self.draft_max);
        if let Some(name) = self.model() {
            drafter.add_model(engine, &catalog::resolve(Some(name))?.path, &a.options()?, s)?;
        }
        Ok(drafter)
    }
}
