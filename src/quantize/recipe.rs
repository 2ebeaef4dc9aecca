//! Which tensor gets which format: llama.cpp's recipes, by the role of a tensor, its layer, and the model's shape.

use super::source::{Source, Tensor};
use crate::gguf::{GgufError, one_line};
use oxcart_quant::Format;
use regex::Regex;

/// A named mixture of formats.
#[derive(Debug, PartialEq, Eq)]
pub struct Mix {
    /// The name by which people ask for it.
    pub name: &'static str,
    /// What `general.file_type` says of it (llama.cpp's `llama_ftype`).
    pub file_type: u32,
    /// What most of its tensors have.
    pub format: Format,
}

const fn mix(name: &'static str, file_type: u32, format: Format) -> Mix {
    Mix { name, file_type, format }
}

/// Every mixture, from the largest to the smallest.
pub const MIXES: &[Mix] = &[
    mix("F32", 0, Format::F32),
    mix("F16", 1, Format::F16),
    mix("BF16", 32, Format::BF16),
    mix("Q8_0", 7, Format::Q8_0),
    mix("Q6_K", 18, Format::Q6_K),
    mix("Q5_1", 9, Format::Q5_1),
    mix("Q5_K_M", 17, Format::Q5_K),
    mix("Q5_0", 8, Format::Q5_0),
    mix("Q5_K_S", 16, Format::Q5_K),
    mix("Q4_1", 3, Format::Q4_1),
    mix("Q4_K_M", 15, Format::Q4_K),
    mix("Q4_0", 2, Format::Q4_0),
    mix("Q4_K_S", 14, Format::Q4_K),
    mix("IQ4_NL", 25, Format::IQ4_NL),
    mix("IQ4_XS", 30, Format::IQ4_XS),
    mix("MXFP4_MOE", 38, Format::MXFP4),
    mix("Q3_K_L", 13, Format::Q3_K),
    mix("Q3_K_M", 12, Format::Q3_K),
    mix("IQ3_M", 27, Format::IQ3_S),
    mix("Q3_K_S", 11, Format::Q3_K),
    mix("IQ3_S", 26, Format::IQ3_S),
    mix("IQ3_XS", 22, Format::IQ3_S),
    mix("IQ3_XXS", 23, Format::IQ3_XXS),
    mix("Q2_K", 10, Format::Q2_K),
    mix("Q2_K_S", 21, Format::Q2_K),
    mix("IQ2_M", 29, Format::IQ2_S),
    mix("IQ2_S", 28, Format::IQ2_XS),
    mix("IQ2_XS", 20, Format::IQ2_XS),
    mix("IQ2_XXS", 19, Format::IQ2_XXS),
    mix("TQ2_0", 37, Format::TQ2_0),
    mix("IQ1_M", 31, Format::IQ1_M),
    mix("TQ1_0", 36, Format::TQ1_0),
    mix("IQ1_S", 24, Format::IQ1_S),
];

impl Mix {
    /// Whether it spends so little that most of its exceptions are others than those of the larger ones.
    fn is_smallest(&self) -> bool {
        matches!(self.name, "IQ1_S" | "IQ1_M" | "IQ2_XXS" | "IQ2_XS" | "IQ2_S" | "IQ2_M")
    }

    /// What llama.cpp calls it where it tells what a file is.
    pub fn words(&self) -> String {
        let bits = match self.name {
            "IQ1_S" => "1.5625",
            "IQ1_M" => "1.75",
            "IQ2_XXS" => "2.0625",
            "IQ2_XS" => "2.3125",
            "IQ2_S" => "2.5",
            "IQ2_M" => "2.7",
            "IQ3_XXS" => "3.0625",
            "IQ3_XS" => "3.3",
            "IQ3_S" => "3.4375",
            "IQ4_XS" => "4.25",
            "IQ4_NL" => "4.5",
            "IQ3_M" => return "IQ3_S mix - 3.66 bpw".into(),
            "TQ1_0" => return "TQ1_0 - 1.69 bpw ternary".into(),
            "TQ2_0" => return "TQ2_0 - 2.06 bpw ternary".into(),
            "MXFP4_MOE" => return "MXFP4 MoE".into(),
            "F32" => return "all F32".into(),
            "Q2_K" => return "Q2_K - Medium".into(),
            name => {
                let sizes = [("_K_S", "_K - Small"), ("_K_M", "_K - Medium"), ("_K_L", "_K - Large")];
                let sized = sizes.iter().find_map(|(end, words)| Some(name.strip_suffix(end)?.to_string() + words));
                return sized.unwrap_or_else(|| name.into());
            }
        };
        format!("{} - {bits} bpw", self.name)
    }

    /// A mixture as llama-quantize is asked for it: by name in any case, by the name of its format where it is the usual one
    /// of several, or by the number of its file type.
    pub fn named(name: &str) -> Option<&'static Mix> {
        const USUAL: [(&str, &str); 3] = [("Q3_K", "Q3_K_M"), ("Q4_K", "Q4_K_M"), ("Q5_K", "Q5_K_M")];
        let name = USUAL.iter().find(|(short, _)| short.eq_ignore_ascii_case(name)).map_or(name, |(_, long)| long);
        let number = name.parse::<u32>().ok();
        MIXES.iter().find(|m| m.name.eq_ignore_ascii_case(name) || number == Some(m.file_type))
    }

    /// The mixture that a model is whose weights have this format, the first of several.
    pub(super) fn of(format: Format) -> Option<&'static Mix> {
        MIXES.iter().find(|m| m.format == format)
    }
}

/// What a person may ask for beside the mixture.
#[derive(Clone, Debug, Default)]
pub struct Wishes {
    /// One format for all, whatever the role.
    pub pure: bool,
    /// The output matrix stays as it is.
    pub leave_output: bool,
    /// A format for the output matrix.
    pub output: Option<Format>,
    /// A format for the token embeddings.
    pub embedding: Option<Format>,
    /// Formats for the tensors whose names match; the first that does decides.
    pub tensors: Vec<(Regex, Format)>,
}

/// What the recipes ask about a model.
struct Shape {
    n_layer: u64,
    gqa: u64, // query heads for each KV head
    n_expert: u64,
    tied: bool, // the embeddings serve as output matrix
    is_70b: bool,
    n_attn_v: u64,
    importance: bool, // an importance matrix is given
}

impl Shape {
    fn of(g: &Source, importance: bool) -> Result<Shape, RecipeError> {
        let arch = g.str("general.architecture")?.unwrap_or_default();
        if !["llama", "qwen2"].contains(&arch) {
            return Err(RecipeError::Architecture(one_line(arch, 100)));
        }
        let need = |key: &str| {
            let key = format!("{arch}.{key}");
            g.uint(&key)?.ok_or(RecipeError::Missing(key))
        };
        let (n_layer, heads) = (need("block_count")?, need("attention.head_count")?);
        let kv = g.uint(&format!("{arch}.attention.head_count_kv"))?.unwrap_or(heads).max(1);
        let n_expert = g.uint(&format!("{arch}.expert_count"))?.unwrap_or(0);
        let n_attn_v = g.tensors().iter().filter(|t| Role::of(&t.name) == Role::AttnV).count() as u64;
        // llama.cpp gives 70B models, told by their depth, more bits for the few KV heads that they have.
        let is_70b = n_layer == 80 && (arch == "qwen2" || heads != kv);
        let tied = g.tensor("output.weight").is_none();
        Ok(Shape { n_layer, gqa: heads / kv, n_expert, tied, is_70b, n_attn_v, importance })
    }

    /// The layers of which mixtures with M in their name keep more bits: the first and last eighth, and every third between.
    fn more_bits(i: u64, n: u64) -> bool {
        i < n / 8 || i >= 7 * n / 8 || (i - n / 8) % 3 == 2
    }
}

/// Why there is no recipe.
#[derive(Debug, thiserror::Error)]
pub enum RecipeError {
    /// The file says something else than it should.
    #[error(transparent)]
    Gguf(#[from] GgufError),
    /// Metadata that is missing.
    #[error("{0}: missing")]
    Missing(String),
    /// A model that oxcart does not know.
    #[error("general.architecture: found {0:?}, expected one of llama, qwen2")]
    Architecture(String),
    /// A tensor whose layer cannot be told.
    #[error("tensor {0}: no layer of this model")]
    Layer(String),
}

/// What a tensor is there for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Role {
    Output,
    Embedding,
    AttnV,
    AttnK,
    AttnQ,
    AttnOutput,
    FfnUp,
    FfnGate,
    FfnDown,
    Other,
}

impl Role {
    fn of(name: &str) -> Role {
        match name {
            "output.weight" => Role::Output,
            "token_embd.weight" => Role::Embedding,
            n if n.contains("attn_v.weight") => Role::AttnV,
            n if n.contains("attn_k.weight") => Role::AttnK,
            n if n.contains("attn_q.weight") => Role::AttnQ,
            n if n.contains("attn_output.weight") => Role::AttnOutput,
            n if n.contains("ffn_up") => Role::FfnUp,
            n if n.contains("ffn_gate") => Role::FfnGate,
            n if n.contains("ffn_down") => Role::FfnDown,
            _ => Role::Other,
        }
    }
}

/// The layer that a tensor's name speaks of.
pub fn layer(name: &str) -> Option<u64> {
    name.strip_prefix("blk.")?.split_once('.')?.0.parse().ok()
}

/// The format of every tensor of a model, in the order of `tensors`; `None` where it stays as it is.
///
/// `tensors` are in llama.cpp's order (layers by number, names in a layer by letter): some recipes count as they go.
/// `importance` tells whether an importance matrix is given.
pub fn recipe(
    g: &Source,
    tensors: &[&Tensor],
    mix: &Mix,
    wishes: &Wishes,
    importance: bool,
) -> Result<Vec<Option<Format>>, RecipeError> {
    let shape = Shape::of(g, importance)?;
    let mut counts = Counts::default();
    let mut formats = Vec::with_capacity(tensors.len());
    for t in tensors {
        if !is_matrix(t) || wishes.leave_output && t.name == "output.weight" {
            formats.push(None);
            continue;
        }
        let role = Role::of(&t.name);
        let wish = match role {
            Role::Embedding => wishes.embedding,
            Role::Output => wishes.output,
            _ => None,
        };
        let named = wishes.tensors.iter().find(|(name, _)| name.is_match(&t.name)).map(|(_, f)| *f);
        let format = match (wish, named) {
            (Some(f), _) => f,
            (None, Some(f)) => narrow(f, t.dims[0]),
            (None, None) if is_float(mix.format) => mix.format,
            (None, None) => {
                let mut f = mix.format;
                if !wishes.pure {
                    f = role_format(&shape, mix, role, t, &mut counts, wishes)?;
                }
                narrow(f, t.dims[0])
            }
        };
        formats.push(Some(format));
    }
    Ok(formats)
}

pub(super) fn is_float(f: Format) -> bool {
    matches!(f, Format::F32 | Format::F16 | Format::BF16)
}

/// Whether a tensor is quantized at all: matrices are, norms, biases and the routers of experts are not.
fn is_matrix(t: &Tensor) -> bool {
    let n_dims = t.dims.iter().rposition(|&d| d != 1).map_or(1, |i| i + 1);
    n_dims >= 2
        && t.name.ends_with("weight")
        && !t.name.contains("_norm.weight")
        && !t.name.contains("ffn_gate_inp.weight")
}

/// Tensors of a role that were met before.
#[derive(Default)]
struct Counts {
    attn_v: u64,
    ffn_up: u64,
    ffn_gate: u64,
    ffn_down: u64,
}

/// The number of this tensor among those of its role, which is that of its layer.
fn next(count: &mut u64, s: &Shape, t: &Tensor) -> Result<u64, RecipeError> {
    let i = *count;
    *count += 1;
    if s.n_expert <= 1 {
        return Ok(i);
    }
    // Names order the experts' tensors; counting would not.
    layer(&t.name).filter(|&i| i < s.n_layer).ok_or_else(|| RecipeError::Layer(t.name.clone()))
}

/// Whether a tensor in this format is garbage without an importance matrix: llama.cpp refuses to make it.
pub(super) fn needs_importance(name: &str, f: Format, mix: &Mix) -> bool {
    use Format::*;
    let multiplied = !matches!(Role::of(name), Role::Embedding | Role::Output);
    multiplied && (matches!(f, IQ1_S | IQ1_M | IQ2_XXS | IQ2_XS | IQ2_S | IQ3_XXS) || f == Q2_K && mix.name == "Q2_K_S")
}

/// The recipe proper.
fn role_format(
    s: &Shape,
    mix: &Mix,
    role: Role,
    t: &Tensor,
    counts: &mut Counts,
    wishes: &Wishes,
) -> Result<Format, RecipeError> {
    use Format::*;
    let f = mix.format;
    match role {
        Role::Output => return Ok(output(mix, t.dims[0])),
        Role::Embedding if s.tied => return Ok(wishes.output.unwrap_or(output(mix, t.dims[0]))),
        _ if mix.name == "MXFP4_MOE" => return Ok(if t.dims.get(2).is_some_and(|&n| n > 1) { MXFP4 } else { Q8_0 }),
        Role::Embedding => {
            return Ok(match mix.name {
                "IQ1_S" | "IQ1_M" | "IQ2_XXS" | "IQ2_XS" => Q2_K,
                "IQ2_S" | "IQ2_M" | "IQ3_XXS" => IQ3_S,
                "TQ1_0" | "TQ2_0" => Q4_K,
                _ => f,
            });
        }
        _ if mix.is_smallest() => return Ok(smallest(s, mix, role, counts)),
        _ => (),
    }
    let (n, eight_experts) = (s.n_layer, s.n_expert == 8);
    Ok(match role {
        Role::AttnV => {
            let i = counts.attn_v;
            counts.attn_v += 1;
            attn_v(s, mix, i)
        }
        Role::AttnK if eight_experts => Q8_0,
        Role::AttnK | Role::AttnQ => match mix.name {
            "IQ3_XS" => IQ3_XXS,
            "IQ3_XXS" => IQ2_S,
            _ => f,
        },
        Role::FfnDown => ffn_down(s, mix, next(&mut counts.ffn_down, s, t)?),
        Role::AttnOutput if eight_experts => match mix.name {
            "Q2_K" | "IQ3_XXS" | "IQ3_XS" | "IQ3_S" | "IQ3_M" | "Q3_K_S" | "Q3_K_M" | "IQ4_NL" | "IQ4_XS"
            | "Q4_K_S" | "Q4_K_M" => Q5_K,
            _ => f,
        },
        Role::AttnOutput => match mix.name {
            "Q2_K" => Q3_K,
            "IQ3_XXS" => IQ3_S,
            "Q3_K_M" | "IQ3_M" => Q4_K,
            "Q3_K_L" => Q5_K,
            _ => f,
        },
        Role::FfnUp | Role::FfnGate => {
            let count = if role == Role::FfnUp { &mut counts.ffn_up } else { &mut counts.ffn_gate };
            let i = next(count, s, t)?;
            if mix.name == "IQ3_XS" && (n / 8..7 * n / 8).contains(&i) { IQ3_XXS } else { f }
        }
        _ => f,
    })
}

/// Of the `i`th `attn_v`.
fn attn_v(s: &Shape, mix: &Mix, i: u64) -> Format {
    use Format::*;
    let few_kv = s.gqa >= 4;
    let f = match mix.name {
        "Q2_K" | "Q2_K_S" | "IQ3_XXS" | "IQ3_XS" | "IQ3_S" if few_kv => Q4_K,
        "Q2_K" => Q3_K,
        "IQ3_XXS" if !s.importance => IQ3_S,
        "IQ3_M" => Q4_K,
        "Q3_K_M" if i < 2 => Q5_K,
        "Q3_K_M" => Q4_K,
        "Q3_K_L" => Q5_K,
        "IQ4_NL" | "IQ4_XS" if few_kv => Q5_K,
        "Q4_K_M" | "Q5_K_M" if Shape::more_bits(i, s.n_attn_v) => Q6_K,
        "Q4_K_S" if i < 4 => Q5_K,
        _ => mix.format,
    };
    match f {
        _ if s.n_expert == 8 => Q8_0,
        Q3_K | Q4_K if s.is_70b => Q5_K,
        f => f,
    }
}

/// Of `ffn_down` of layer `i`.
fn ffn_down(s: &Shape, mix: &Mix, i: u64) -> Format {
    use Format::*;
    let n = s.n_layer;
    match mix.name {
        "Q2_K" => Q3_K,
        "Q2_K_S" if i < n / 8 => Q4_K,
        "IQ3_XXS" if i < n / 8 && !s.importance => Q4_K,
        "IQ3_XXS" if !s.importance => Q3_K,
        "IQ3_M" if i < n / 8 || s.n_expert == 8 && Shape::more_bits(i, n) => Q4_K,
        "Q3_K_M" if i < n / 16 => Q5_K,
        "Q3_K_M" => Q4_K,
        "Q3_K_L" => Q5_K,
        "Q4_K_M" | "Q5_K_M" if Shape::more_bits(i, n) => Q6_K,
        "IQ4_NL" | "IQ4_XS" if i < n / 8 && !s.importance => Q5_K,
        "Q4_K_S" if i < n / 8 => Q5_K,
        "Q4_0" if i < n / 8 && s.importance => Q4_1,
        "Q5_0" if i < n / 8 && s.importance => Q5_1,
        _ => mix.format,
    }
}

/// The recipes of the mixtures of one and two bits.
fn smallest(s: &Shape, mix: &Mix, role: Role, counts: &mut Counts) -> Format {
    use Format::*;
    let larger = matches!(mix.name, "IQ2_S" | "IQ2_M");
    let some_more = if larger { IQ3_S } else { Q2_K };
    match role {
        Role::AttnV if s.gqa >= 4 || s.n_expert >= 4 => Q4_K,
        Role::AttnV => some_more,
        Role::AttnK if s.n_expert == 8 => Q4_K,
        Role::FfnDown => {
            let i = counts.ffn_down;
            counts.ffn_down += 1;
            if i < s.n_layer / 8 { some_more } else { mix.format }
        }
        Role::AttnOutput if s.n_expert == 8 => Q5_K,
        Role::AttnOutput if larger => IQ3_S,
        Role::AttnOutput if matches!(mix.name, "IQ1_S" | "IQ1_M") => IQ2_XXS,
        _ => mix.format,
    }
}

/// The output matrix: it decides the next token alone, so it keeps more bits than the rest.
fn output(mix: &Mix, cols: u64) -> Format {
    let fits = cols.is_multiple_of(mix.format.spec().block_len as u64);
    match mix.name {
        "MXFP4_MOE" | "Q8_0" => Format::Q8_0,
        _ if !fits => Format::Q8_0,
        "IQ3_XXS" => Format::Q5_K,
        _ if mix.is_smallest() => Format::Q5_K,
        _ => Format::Q6_K,
    }
}

/// A format whose blocks fit the width.
fn narrow(f: Format, cols: u64) -> Format {
    use Format::*;
    let fits = |f: Format| cols.is_multiple_of(f.spec().block_len as u64);
    if fits(f) {
        return f;
    }
    let smaller = match f {
        IQ1_S | IQ1_M | IQ2_XXS | IQ2_XS | IQ2_S | IQ3_XXS | IQ3_S | IQ4_XS => IQ4_NL,
        Q2_K | Q3_K | TQ1_0 | TQ2_0 => Q4_0,
        Q4_K => Q5_0,
        Q5_K => Q5_1,
        Q6_K => Q8_0,
        f => f,
    };
    if fits(smaller) { smaller } else { F16 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mixtures_are_found_as_people_name_them() {
        assert_eq!(Mix::named("q4_k_m").map(|m| m.file_type), Some(15));
        assert_eq!(Mix::named("Q4_K").map(|m| m.name), Some("Q4_K_M"));
        assert_eq!(Mix::named("q3_k").map(|m| m.name), Some("Q3_K_M"));
        assert_eq!(Mix::named("30").map(|m| m.name), Some("IQ4_XS"));
        assert_eq!(Mix::named("Q2"), None);
        assert_eq!(Mix::named("4"), None);
    }

    #[test]
    fn widths_that_do_not_fit_take_smaller_blocks() {
        let cases = [
            (Format::Q4_K, 256, Format::Q4_K),
            (Format::Q4_K, 288, Format::Q5_0),
            (Format::Q5_K, 96, Format::Q5_1),
            (Format::Q6_K, 288, Format::Q8_0),
            (Format::IQ4_XS, 288, Format::IQ4_NL),
            (Format::Q2_K, 32, Format::Q4_0),
            (Format::Q8_0, 40, Format::F16),
            (Format::Q3_K, 100, Format::F16),
        ];
        for (from, cols, to) in cases {
            assert_eq!(narrow(from, cols), to, "{} {cols}", from.name());
        }
    }

    #[test]
    fn thirty_layers_have_these_with_more_bits() {
        let more: Vec<u64> = (0..30).filter(|&i| Shape::more_bits(i, 30)).collect();
        assert_eq!(more, [0, 1, 2, 5, 8, 11, 14, 17, 20, 23, 26, 27, 28, 29]);
    }
}
