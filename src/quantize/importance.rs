//! The importance matrix as quantization takes it: for each tensor, how much the errors of its columns matter.

use crate::gguf::{MetadataValue, Value};
use crate::imatrix::{Imatrix, ImatrixError};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// The largest mean: of activations of a million, which F16 does not hold. The search for scales squares products with it.
const MOST: f32 = 1e12;

/// Means of squared activations, by tensor.
pub struct Importance {
    file: PathBuf,
    dataset: Option<String>,
    chunks: u32,
    selection: [Vec<String>; 2],       // parts of names: of those wanted, of those not
    means: BTreeMap<String, Vec<f32>>, // (experts, columns)
}

impl Importance {
    /// Reads a file; keeps the tensors whose names contain one of `include`, if there are any, and none of `exclude`.
    pub fn read(file: &Path, include: &[String], exclude: &[String]) -> Result<Importance, ImatrixError> {
        let m = Imatrix::read(file)?;
        let named = |name: &str, by: &[String]| by.iter().any(|part| name.contains(part.as_str()));
        let wanted = |name: &str| (include.is_empty() || named(name, include)) && !named(name, exclude);
        let means: BTreeMap<_, _> =
            m.entries.iter().filter(|(n, _)| wanted(n)).map(|(n, e)| (n.clone(), e.means())).collect();
        for (name, of_columns) in &means {
            if let Some(mean) = of_columns.iter().find(|m| **m > MOST) {
                let (field, problem) =
                    (format!("entry {name}"), format!("a mean of {mean:e}, expected at most {MOST:e}"));
                return Err(ImatrixError::Unfit { file: file.to_path_buf(), field, problem });
            }
        }
        Ok(Importance {
            file: file.to_path_buf(),
            dataset: m.datasets.first().cloned(),
            chunks: m.chunks,
            selection: [include.to_vec(), exclude.to_vec()],
            means,
        })
    }

    /// The file.
    pub fn file(&self) -> &Path {
        &self.file
    }

    /// What was asked of the names: to contain one of these, and none of those.
    pub(super) fn selection(&self) -> &[Vec<String>; 2] {
        &self.selection
    }

    /// Number of tensors.
    pub fn len(&self) -> usize {
        self.means.len()
    }

    /// Whether it knows none.
    pub fn is_empty(&self) -> bool {
        self.means.is_empty()
    }

    /// Of a tensor of these extents, if it knows it: a mean for each column, or for each of every expert. An error says
    /// what is wrong with their number.
    pub(super) fn of(&self, name: &str, dims: &[u64]) -> Result<Option<&[f32]>, String> {
        let Some(means) = self.means.get(name) else { return Ok(None) };
        let expected = dims[0] * dims.iter().skip(2).product::<u64>();
        match means.len() as u64 == expected {
            true => Ok(Some(means)),
            // llama.cpp lets that of the token embeddings pass, which are looked up, not multiplied.
            false if name == "token_embd.weight" => Ok(None),
            false => Err(format!("{} has {} columns for it, expected {expected}", self.file.display(), means.len())),
        }
    }

    /// What the output says of it, in llama.cpp's keys.
    pub(super) fn metadata(&self) -> Vec<(String, Value)> {
        let text = |s: String| Value::from(MetadataValue::String(s));
        let number = |n: u32| Value::from(MetadataValue::U32(n));
        let all = [
            ("file", Some(text(self.file.display().to_string()))),
            ("dataset", self.dataset.clone().map(text)),
            ("entries_count", Some(number(self.means.len() as u32))),
            ("chunks_count", (self.chunks > 0).then(|| number(self.chunks))),
        ];
        all.into_iter().filter_map(|(key, v)| Some((format!("{PREFIX}{key}"), v?))).collect()
    }
}

/// What the keys of [`Importance::metadata`] begin with.
pub(super) const PREFIX: &str = "quantize.imatrix.";
