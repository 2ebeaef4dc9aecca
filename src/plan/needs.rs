//! What a model needs: bytes of weights, of KV cache, of buffers.

use crate::catalog;
use crate::engine::{SessionOptions, most_taken};
use crate::gguf::{Gguf, GgufError, Value};
use oxcart_quant::attention::{BLOCK, KvType};
use serde::Serialize;

/// The sizes that decide how much memory a session takes.
pub struct Geometry {
    trained: Option<u64>, // context
    layers_kv_heads: Vec<u64>,
    key_len: u64,
    value_len: u64,
    heads: u64,
    dim: u64,
    ffn: u64, // of all experts that a token uses
    vocab: u64,
}

impl Geometry {
    /// From the metadata; `None` where it does not tell of attention layers.
    pub fn of(g: &Gguf) -> Result<Option<Geometry>, GgufError> {
        let Some(arch) = g.str("general.architecture")? else { return Ok(None) };
        let key = |k: &str| format!("{arch}.{k}");
        // A number, or one for each layer: the largest of them.
        let most = |k: &str| -> Result<Option<u64>, GgufError> {
            let k = key(k);
            match g.value(&k) {
                Some(Value::Numbers(_)) => {
                    Ok(g.ints(&k)?.and_then(|n| n.into_iter().max()).and_then(|n| n.try_into().ok()))
                }
                _ => g.uint(&k),
            }
        };
        let (Some(layers), Some(heads), Some(dim)) =
            (g.uint(&key("block_count"))?, most("attention.head_count")?, g.uint(&key("embedding_length"))?)
        else {
            return Ok(None);
        };
        // More layers than tensors is no model; and a head count of 0 none with attention.
        if heads == 0 || layers == 0 || layers > g.tensors().len() as u64 {
            return Ok(None);
        }
        let kv = key("attention.head_count_kv");
        let layers_kv_heads = match g.value(&kv) {
            Some(Value::Numbers(_)) => {
                g.ints(&kv)?.unwrap_or_default().into_iter().map(|n| n.try_into().unwrap_or(0)).collect()
            }
            _ => vec![g.uint(&kv)?.unwrap_or(heads); layers as usize],
        };
        let key_len = g.uint(&key("attention.key_length"))?.unwrap_or(dim / heads);
        // The second key counts for experts of another width than the dense layers.
        let width = most("feed_forward_length")?.unwrap_or(0).max(most("expert_feed_forward_length")?.unwrap_or(0));
        let used = g.uint(&key("expert_used_count"))?.filter(|n| (1..=1024).contains(n)).unwrap_or(1);
        let ffn = width.checked_mul(used).ok_or_else(|| GgufError {
            file: g.path().to_path_buf(),
            field: key("feed_forward_length"),
            problem: format!("found {width}, expected at most {} for {used} experts", u64::MAX / used),
        })?;
        Ok(Some(Geometry {
            trained: g.uint(&key("context_length"))?.filter(|&n| n > 0),
            layers_kv_heads,
            key_len,
            value_len: g.uint(&key("attention.value_length"))?.unwrap_or(key_len),
            heads,
            dim,
            ffn,
            vocab: g.tensor("token_embd.weight").and_then(|t| t.dims.get(1).copied()).unwrap_or(0),
        }))
    }

    /// Of an entry of the catalogue.
    pub fn of_entry(g: &catalog::Geometry) -> Geometry {
        let [dim, heads, kv_heads] = [g.dim, g.heads, g.kv_heads].map(u64::from);
        let used = u64::from(g.experts_used.unwrap_or(1));
        Geometry {
            trained: Some(g.context.into()),
            layers_kv_heads: vec![kv_heads; g.layers as usize],
            key_len: dim / heads,
            value_len: dim / heads,
            heads,
            dim,
            ffn: u64::from(g.ffn) * used,
            vocab: g.vocab.into(),
        }
    }

    /// Tokens of context: those asked for; where that is 0, what the model was trained for; without a wish no more than
    /// 4096 of it.
    pub fn context(&self, asked: Option<u64>) -> u64 {
        let trained = self.trained.unwrap_or(4096);
        match asked {
            None => trained.min(4096),
            Some(0) => trained,
            Some(n) => n,
        }
    }
}

/// Memory in bytes.
#[derive(Clone, Debug, Serialize)]
pub struct Needs {
    /// Tokens.
    pub context: u64,
    /// Tokens that the model was trained for.
    pub trained_context: Option<u64>,
    /// How keys are stored.
    pub cache_type_k: &'static str,
    /// How values are stored.
    pub cache_type_v: &'static str,
    /// Mapped from the file: the system may drop and read it again.
    pub weights: u64,
    /// Of a full context; pages that are not written yet are not taken.
    pub kv_cache: u64,
    /// Of one token.
    pub kv_cache_per_token: u64,
    /// What a forward pass keeps, about.
    pub buffers: u64,
    /// All of it.
    pub total: u64,
}

impl Needs {
    /// Of one sequence. `None` where a number of the file or of the options is beyond all memory.
    pub fn of(geo: &Geometry, weights: u64, context: u64, s: &SessionOptions) -> Option<Needs> {
        // An upper bound for every length that is multiplied below, so that only the products need checks.
        if geo.key_len.max(geo.value_len).max(geo.heads).max(geo.dim).max(geo.ffn).max(geo.vocab) > 1 << 32 {
            return None;
        }
        let row = |t: KvType, len: u64| t.row_bytes(len as usize) as u64;
        let position = row(s.k_type, geo.key_len) + row(s.v_type, geo.value_len);
        let kv_heads = geo.layers_kv_heads.iter().try_fold(0u64, |n, &h| n.checked_add(h))?;
        let kv_cache_per_token = kv_heads.checked_mul(position)?;
        let kv_cache = kv_cache_per_token.checked_mul(context.checked_next_multiple_of(BLOCK as u64)?)?;
        // Of each token of a batch: the stream, queries, keys, values and what attention gives in f32; what is fed to
        // matrices as bytes and again in f32, of which one is in use; and some rows of logits.
        let widest = geo.layers_kv_heads.iter().max().copied().unwrap_or(0);
        let kv = widest.checked_mul(geo.key_len.checked_add(geo.value_len)?)?;
        let q = geo.heads.checked_mul(geo.key_len)?;
        let floats = geo.dim.checked_add(q.checked_mul(2)?)?.checked_add(kv)?;
        let acts = geo.dim.checked_add(q)?.checked_add(geo.ffn)?;
        let token = floats.checked_mul(4)?.checked_add(acts.checked_mul(2)?)?;
        let rows = crate::model::decoder::LOGITS_ROWS as u64;
        let ubatch = (s.ubatch as u64).min(context);
        let buffers = ubatch.checked_mul(token)?.checked_add(rows * geo.vocab * 4)?;
        Some(Needs {
            context,
            trained_context: geo.trained,
            cache_type_k: s.k_type.name(),
            cache_type_v: s.v_type.name(),
            weights,
            kv_cache,
            kv_cache_per_token,
            buffers,
            total: weights.checked_add(kv_cache)?.checked_add(buffers)?,
        })
    }

    /// What no file backs: it must fit in memory, or the system ends a program.
    pub fn anonymous(&self) -> u64 {
        self.kv_cache + self.buffers
    }

    /// Bytes of the weights that find no room where so many bytes are available.
    pub fn beyond(&self, available: u64) -> u64 {
        self.total.saturating_sub(most_taken(available)).min(self.weights)
    }

    /// The longest context for which everything stays in memory, of which so many bytes are available, in whole blocks; 0 where
    /// not even one does.
    pub fn longest(&self, available: u64) -> u64 {
        let left = most_taken(available).saturating_sub(self.weights).saturating_sub(self.buffers);
        let block = BLOCK as u64;
        let most = left.checked_div(self.kv_cache_per_token).unwrap_or(u64::MAX) / block * block;
        most.min(self.trained_context.unwrap_or(u64::MAX))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Qwen1.5-110B: 80 layers, 8 KV heads of 128: 327,680 bytes a token in f16, and 10 GiB at 32768.
    #[test]
    fn cache_of_the_largest_model() {
        let geo = Geometry {
            trained: Some(32768),
            layers_kv_heads: vec![8; 80],
            key_len: 128,
            value_len: 128,
            heads: 64,
            dim: 8192,
            ffn: 49152,
            vocab: 152064,
        };
        let args = |t| SessionOptions { k_type: t, v_type: t, ..SessionOptions::default() };
        let m = Needs::of(&geo, 0, 32768, &args(KvType::F16)).unwrap();
        assert_eq!((m.kv_cache_per_token, m.kv_cache), (327_680, 10 << 30));
        let m = Needs::of(&geo, 0, 32768, &args(KvType::Q8_0)).unwrap();
        assert_eq!(m.kv_cache_per_token, 327_680 * 17 / 32);
        assert!(Needs::of(&geo, 0, u64::MAX, &args(KvType::F16)).is_none());
    }

    #[test]
    fn a_context_is_asked_for_or_the_model_s() {
        let geo = |trained| Geometry {
            trained,
            layers_kv_heads: vec![],
            key_len: 1,
            value_len: 1,
            heads: 1,
            dim: 1,
            ffn: 1,
            vocab: 1,
        };
        let of = |trained| [None, Some(0), Some(9000)].map(|asked| geo(trained).context(asked));
        assert_eq!(of(Some(32768)), [4096, 32768, 9000]);
        assert_eq!(of(Some(512)), [512, 512, 9000]);
        assert_eq!(of(None), [4096, 4096, 9000]);
    }

    #[test]
    fn a_context_that_fits_is_the_longest() {
        let m = Needs {
            context: 4096,
            trained_context: Some(32768),
            cache_type_k: "f16",
            cache_type_v: "f16",
            weights: 1000,
            kv_cache: 4096 * 10,
            kv_cache_per_token: 10,
            buffers: 100,
            total: 1100 + 4096 * 10,
        };
        for (memory, want) in
            [(0, 0), (1100, 0), (1100 + 159, 0), (1100 + 160, 16), (1100 + 339, 32), (u64::MAX, 32768)]
        {
            let available = memory.saturating_add(memory / 15);
            assert!(memory == u64::MAX || most_taken(available) == memory);
            assert_eq!(m.longest(available), want, "{memory}");
        }
    }
}
