//! Building a tokenizer from metadata.

use super::cut::Cuts;
use super::scores::Scores;
use super::{Kind, Pieces, Scheme, Special, Tokenizer, TokenizerError};
use crate::gguf::{Gguf, Strings, one_line};
use ahash::AHashMap;
use aho_corasick::{AhoCorasick, AhoCorasickKind, MatchKind};
use std::collections::BTreeSet;
use tokenizers::models::bpe::BPE;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::digits::Digits;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::{PreTokenizerWrapper, SplitDelimiterBehavior};

/// More tokens than any vocabulary has.
const MOST_TOKENS: usize = 4 << 20;
/// The longest text of a token, in bytes.
pub(crate) const MOST_BYTES: usize = 4096;
/// The texts of all special tokens: what finds them takes some 40 bytes of memory for each.
const MOST_SPECIAL: usize = 4 << 20;
/// Bytes of all tokens: ten times what any vocabulary has, and ends of tokens are counted in 32 bits.
const MOST_TOKEN_BYTES: usize = 64 << 20;

/// Tokens that end generation wherever a vocabulary has them, beside those that metadata names; they are control tokens
/// even where the file calls them plain (as in llama.cpp's llama-vocab.cpp).
const END_TEXTS: &[&str] = &[
    "<|eot_id|>",
    "<|im_end|>",
    "<|end|>",
    "<|return|>",
    "<|call|>",
    "<|flush|>",
    "<|calls|>",
    "<end_of_turn>",
    "<|endoftext|>",
    "</s>",
    "<|eom_id|>",
    "<EOT>",
    "_<EOT>",
    "[EOT]",
    "[EOS]",
    "<|end_of_text|>",
    "<end_of_utterance>",
    "<eos>",
    "<turn|>",
    "<|tool_response>",
    "<｜end▁of▁sentence｜>",
    "[e~[",
];
/// Those of them that end a turn, where metadata names none; the first wins.
const TURN_TEXTS: &[&str] = &[
    "<|eot_id|>",
    "<|im_end|>",
    "<|end|>",
    "<end_of_turn>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<EOT>",
    "_<EOT>",
    "[EOT]",
    "<｜end▁of▁sentence｜>",
    "<end_of_utterance>",
];
/// Marks of fill-in-the-middle training, by their keys; whether a generated one ends the text.
const FILL_TEXTS: &[(&str, &[&str], bool)] = &[
    (
        "fim_pre_token_id",
        &["<|fim_prefix|>", "<fim-prefix>", "<fim_prefix>", "<｜fim▁begin｜>", "<PRE>", "▁<PRE>"],
        false,
    ),
    (
        "fim_suf_token_id",
        &["<|fim_suffix|>", "<fim-suffix>", "<fim_suffix>", "<｜fim▁hole｜>", "<SUF>", "▁<SUF>"],
        false,
    ),
    (
        "fim_mid_token_id",
        &["<|fim_middle|>", "<fim-middle>", "<fim_middle>", "<｜fim▁end｜>", "<MID>", "▁<MID>"],
        false,
    ),
    ("fim_pad_token_id", &["<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]"], true),
    ("fim_rep_token_id", &["<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>"], true),
    ("fim_sep_token_id", &["<|file_sep|>"], true),
];
/// Marks that the format of gpt-oss prints: text, whatever the file says.
const SHOWN_TEXTS: &[&str] = &["<|channel|>", "<|message|>", "<|start|>", "<|constrain|>"];

const QWEN2: &str = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN35: &str = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const LLAMA3: &str = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";

/// How text is cut before merging, and what else hangs on the name of a pre-tokenizer.
struct Rule {
    /// The values of `tokenizer.ggml.pre`.
    names: &'static [&'static str],
    /// Each pattern cuts what the ones before it left whole.
    cuts: &'static [&'static str],
    /// A cut that is a token is that token, whatever the merges would make of it.
    whole: bool,
    /// Whether texts begin with BOS where the file does not say.
    add_bos: bool,
}

/// Names that share a rule are those that llama.cpp maps to the same patterns; each rule was compared with llama.cpp's ids
/// on a vocabulary that uses it.
const RULES: &[Rule] = &[
    Rule {
        names: &["qwen2", "deepseek-r1-qwen", "stablelm2", "megrez", "hunyuan"],
        cuts: &[QWEN2],
        whole: false,
        add_bos: false,
    },
    Rule { names: &["qwen35"], cuts: &[QWEN35], whole: false, add_bos: false },
    Rule {
        names: &["llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral", "lfm2"],
        cuts: &[LLAMA3],
        whole: true,
        add_bos: true,
    },
    Rule { names: &["dbrx", "smaug-bpe"], cuts: &[LLAMA3], whole: false, add_bos: false },
    Rule { names: &["gpt-2", "gpt2", "phi-2", "mpt", "olmo"], cuts: &[GPT2], whole: false, add_bos: false },
    Rule {
        names: &["smollm", "starcoder", "refact", "command-r"],
        cuts: &[r"\p{N}", GPT2],
        whole: false,
        add_bos: false,
    },
    Rule {
        names: &["falcon"],
        cuts: &[r"[\p{P}\$\+<=>\^~\|`]+", GPT2, r"[0-9][0-9][0-9]"],
        whole: false,
        add_bos: false,
    },
    Rule {
        names: &["deepseek-coder"],
        cuts: &[r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-\u{d7ff}]+", r"\p{N}"],
        whole: false,
        add_bos: false,
    },
    // What llama.cpp does for files that name no rule.
    Rule {
        names: &["default"],
        cuts: &[r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"],
        whole: false,
        add_bos: false,
    },
];

fn unfit(key: &str, problem: impl ToString) -> TokenizerError {
    TokenizerError::Unfit { key: format!("tokenizer.ggml.{key}"), problem: problem.to_string() }
}

pub(super) fn tokenizer(g: &Gguf) -> Result<Tokenizer, TokenizerError> {
    let key = |k: &str| format!("tokenizer.ggml.{k}");
    let model = g.str(&key("model"))?.ok_or_else(|| unfit("model", "missing"))?;
    let tokens = g.strings(&key("tokens"))?.ok_or_else(|| unfit("tokens", "missing"))?;
    let n = tokens.len();
    if n == 0 || n > MOST_TOKENS {
        return Err(unfit("tokens", format_args!("{n} tokens, expected 1 to {MOST_TOKENS}")));
    }
    if let Some(t) = tokens.iter().find(|t| t.len() > MOST_BYTES) {
        return Err(unfit("tokens", format_args!("a token of {} bytes, expected at most {MOST_BYTES}", t.len())));
    }
    let bytes: usize = tokens.iter().map(str::len).sum();
    if bytes > MOST_TOKEN_BYTES {
        return Err(unfit("tokens", format_args!("{bytes} bytes, expected at most {MOST_TOKEN_BYTES}")));
    }
    let mut kinds = kinds(g, n)?;
    let mut notes = Vec::new();
    let (scheme, cuts, bos_by_default) = match model {
        "gpt2" => {
            let rule = rule(g, &mut notes)?;
            (Scheme::Bytes(byte_bpe(g, tokens, rule)?.into()), Cuts::of_rule(rule.cuts), rule.add_bos)
        }
        "llama" => {
            let space_prefix = g.bool(&key("add_space_prefix"))?.unwrap_or(true);
            let scores = sentence_piece(g, tokens, &kinds)?;
            (Scheme::SentencePiece { space_prefix, scores }, Cuts::of_pieces(tokens), true)
        }
        other => {
            return Err(unfit(
                "model",
                format_args!("found \"{}\", oxcart knows gpt2 and llama", one_line(other, 100)),
            ));
        }
    };
    let id = |k: &str, default: Option<u32>| -> Result<Option<u32>, TokenizerError> {
        match g.uint(&key(k))? {
            None => Ok(default.filter(|&d| (d as usize) < n)),
            Some(i) if i < n as u64 => Ok(Some(i as u32)),
            // Writers put -1, as all ones, where there is none.
            Some(i) if i >= u32::MAX as u64 => Ok(None),
            Some(i) => Err(unfit(k, format_args!("found {i}, expected below {n}"))),
        }
    };
    let spm = matches!(scheme, Scheme::SentencePiece { .. });
    let bos = id("bos_token_id", Some(if spm { 1 } else { 11 }))?;
    let eos = id("eos_token_id", Some(if spm { 2 } else { 11 }))?;
    let add_bos = g.bool(&key("add_bos_token"))?.unwrap_or(bos_by_default);
    let add_eos = g.bool(&key("add_eos_token"))?.unwrap_or(false);

    // Some files mark tokens that control as plain ones: their texts tell.
    let ids: AHashMap<&str, u32> = tokens.iter().zip(0..).collect();
    let find = |text: &str| ids.get(text).copied();
    let ends: Vec<u32> = END_TEXTS.iter().filter_map(|t| find(t)).collect();
    let eot = id("eot_token_id", None)?.or_else(|| TURN_TEXTS.iter().find_map(|t| find(t)));
    let eom = id("eom_token_id", None)?;
    let mut eog: BTreeSet<u32> = ends.iter().copied().chain([eos, eot, eom].into_iter().flatten()).collect();
    ends.iter().for_each(|&i| kinds[i as usize] = Kind::Control);
    for &(key, texts, ends_text) in FILL_TEXTS {
        let named = id(key, None)?;
        let found = named.or_else(|| texts.iter().find_map(|t| find(t)));
        if let (None, Some(i)) = (named, found) {
            kinds[i as usize] = Kind::Control;
        }
        eog.extend(found.filter(|_| ends_text));
    }
    for i in SHOWN_TEXTS.iter().filter_map(|t| find(t)) {
        kinds[i as usize] = Kind::UserDefined;
    }
    // Where a format has ends of its own, two of the common ones mean something else.
    let has = |text: &str| find(text).is_some();
    let calls = has("<|call|>") || has("<|calls|>");
    for (text, otherwise, kind) in [
        ("<|end|>", calls && (has("<|return|>") || has("<|flush|>")), Kind::UserDefined),
        ("</s>", has("<|tool_response>") || has("<|plamo:eos|>"), Kind::Normal),
    ] {
        if let (true, Some(i)) = (otherwise, find(text)) {
            eog.remove(&i);
            kinds[i as usize] = kind;
        }
    }

    let pieces = pieces(tokens, &kinds, &scheme)?;
    let mut named: Vec<(&str, u32, Kind)> = Vec::new();
    for ((i, t), &kind) in (0..).zip(tokens.iter()).zip(&kinds) {
        if matches!(kind, Kind::Control | Kind::UserDefined | Kind::Unknown) && !t.is_empty() {
            named.push((t, i, kind));
        }
    }
    let special = special(&named)?;
    let eog = eog.into_iter().collect();
    let together = super::TOGETHER;
    Ok(Tokenizer { together, cuts, scheme, pieces, kinds, special, bos, eos, add_bos, add_eos, eog, notes })
}

fn kinds(g: &Gguf, n: usize) -> Result<Vec<Kind>, TokenizerError> {
    let Some(types) = g.ints("tokenizer.ggml.token_type")? else { return Ok(vec![Kind::Normal; n]) };
    if types.len() != n {
        return Err(unfit("token_type", format_args!("{} types of {n} tokens", types.len())));
    }
    Ok(types
        .into_iter()
        .map(|t| match t {
            2 => Kind::Unknown,
            3 => Kind::Control,
            4 => Kind::UserDefined,
            5 => Kind::Unused,
            6 => Kind::Byte,
            _ => Kind::Normal,
        })
        .collect())
}

/// The rule that the file names. A file from before April 2024 names none; llama.cpp then cuts by a default rule that
/// groups digits in threes, which is wrong for Qwen.
fn rule(g: &Gguf, notes: &mut Vec<String>) -> Result<&'static Rule, TokenizerError> {
    let pre = match g.str("tokenizer.ggml.pre")? {
        Some(p) => p,
        None => {
            let qwen = g.str("general.architecture")? == Some("qwen2");
            let (pre, why) =
                if qwen { ("qwen2", "which the architecture implies") } else { ("default", "as llama.cpp does") };
            notes.push(format!(
                "the file names no pre-tokenizer (tokenizer.ggml.pre): taking {pre}, {why}; \
                 --override-kv tokenizer.ggml.pre=str:NAME sets another"
            ));
            pre
        }
    };
    RULES.iter().find(|r| r.names.contains(&pre)).ok_or_else(|| {
        let known: Vec<_> = RULES.iter().flat_map(|r| r.names).copied().collect();
        unfit("pre", format_args!("found \"{}\", oxcart knows {}", one_line(pre, 100), known.join(", ")))
    })
}

fn byte_bpe(g: &Gguf, tokens: &Strings, rule: &Rule) -> Result<tokenizers::Tokenizer, TokenizerError> {
    let lines = g.strings("tokenizer.ggml.merges")?.ok_or_else(|| unfit("merges", "missing"))?;
    let vocab: AHashMap<String, u32> = tokens.iter().map(str::to_string).zip(0..).collect();
    let mut merges = Vec::with_capacity(lines.len());
    let mut whole = String::new();
    for (i, m) in lines.iter().enumerate() {
        let Some((a, b)) = merged(m) else {
            return Err(unfit(
                "merges",
                format_args!("merge {i} is \"{}\", expected two pieces and a space", one_line(m, 100)),
            ));
        };
        // A merge of pieces that the vocabulary lacks can never apply; such lines stand in real files.
        whole.clear();
        whole.extend([a, b]);
        if vocab.contains_key(a) && vocab.contains_key(b) && vocab.contains_key(&whole) {
            merges.push((a.to_string(), b.to_string()));
        }
    }
    let bpe = BPE::builder()
        .vocab_and_merges(vocab, merges)
        .ignore_merges(rule.whole)
        .build()
        .map_err(|e| unfit("merges", e))?;
    let mut t = tokenizers::Tokenizer::new(bpe);
    t.with_pre_tokenizer(Some(pre_tokenizer(rule)?));
    Ok(t)
}

/// The two pieces that a merge is written as.
pub(crate) fn merged(merge: &str) -> Option<(&str, &str)> {
    // The first space that is not the piece itself.
    let at = merge.bytes().skip(1).position(|b| b == b' ')? + 1;
    Some((merge.get(..at)?, merge.get(at + 1..)?))
}

fn pre_tokenizer(rule: &Rule) -> Result<PreTokenizerWrapper, TokenizerError> {
    let mut steps = Vec::new();
    for &pattern in rule.cuts {
        steps.push(if pattern == r"\p{N}" {
            Digits::new(true).into() // the same, without a regex
        } else {
            let pattern = SplitPattern::Regex(pattern.to_string());
            Split::new(pattern, SplitDelimiterBehavior::Isolated, false).map_err(|e| unfit("pre", e))?.into()
        });
    }
    steps.push(ByteLevel::new(false, false, false).into());
    Ok(Sequence::new(steps).into())
}

/// What merges characters to SentencePiece's tokens.
fn sentence_piece(g: &Gguf, tokens: &Strings, kinds: &[Kind]) -> Result<Scores, TokenizerError> {
    let n = tokens.len();
    let scores = g.floats("tokenizer.ggml.scores")?.ok_or_else(|| unfit("scores", "missing"))?;
    if scores.len() != n {
        return Err(unfit("scores", format_args!("{} scores of {n} tokens", scores.len())));
    }
    let unknown = match g.uint("tokenizer.ggml.unknown_token_id")? {
        Some(i) if i < n as u64 => i as u32,
        Some(i) => return Err(unfit("unknown_token_id", format_args!("found {i}, expected below {n}"))),
        None => 0,
    };
    Ok(Scores::new(tokens, kinds, &scores, byte_tokens(tokens, kinds, unknown)))
}

/// The token of each byte; the unknown token where the vocabulary lacks one.
fn byte_tokens(tokens: &Strings, kinds: &[Kind], unknown: u32) -> Box<[u32; 256]> {
    let mut table = Box::new([unknown; 256]);
    for ((i, t), kind) in (0..).zip(tokens.iter()).zip(kinds) {
        if let (Kind::Byte, Some(b)) = (kind, byte_of(t)) {
            table[b as usize] = i;
        }
    }
    table
}

/// The byte that `<0xE4>` stands for.
fn byte_of(t: &str) -> Option<u8> {
    u8::from_str_radix(t.strip_prefix("<0x")?.strip_suffix('>')?, 16).ok()
}

/// The bytes of every token.
fn pieces(tokens: &Strings, kinds: &[Kind], scheme: &Scheme) -> Result<Pieces, TokenizerError> {
    // GPT-2 writes the 256 bytes as printable characters (Radford et al., 2019): this is the way back.
    let mut byte_of_char = [None; 512];
    let mut next = 256;
    for b in 0..=255u8 {
        let printable = matches!(b, 33..=126 | 161..=172 | 174..=255);
        byte_of_char[if printable { b as usize } else { next }] = Some(b);
        next += !printable as usize;
    }
    let mut p = Pieces { bytes: Vec::new(), ends: Vec::with_capacity(tokens.len()) };
    for (t, kind) in tokens.iter().zip(kinds) {
        match (scheme, kind) {
            (_, Kind::Control | Kind::UserDefined | Kind::Unknown) => p.bytes.extend_from_slice(t.as_bytes()),
            // As in llama.cpp: what pads a vocabulary is no text where a model says it nonetheless.
            (_, Kind::Unused) => {}
            (Scheme::Bytes(_), _) => {
                for c in t.chars() {
                    match byte_of_char.get(c as usize).copied().flatten() {
                        Some(b) => p.bytes.push(b),
                        None => p.bytes.extend_from_slice(c.encode_utf8(&mut [0; 4]).as_bytes()),
                    }
                }
            }
            (Scheme::SentencePiece { .. }, Kind::Byte) => match byte_of(t) {
                Some(b) => p.bytes.push(b),
                None => {
                    return Err(unfit(
                        "tokens",
                        format_args!("byte token \"{}\", expected the form <0xE4>", one_line(t, 100)),
                    ));
                }
            },
            (Scheme::SentencePiece { .. }, _) => p.bytes.extend_from_slice(t.replace('\u{2581}', " ").as_bytes()),
        }
        p.ends.push(p.bytes.len() as u32);
    }
    Ok(p)
}

fn special(named: &[(&str, u32, Kind)]) -> Result<Option<Special>, TokenizerError> {
    let bytes: usize = named.iter().map(|n| n.0.len()).sum();
    if bytes > MOST_SPECIAL {
        return Err(unfit("tokens", format!("special tokens of {bytes} bytes, expected at most {MOST_SPECIAL}")));
    }
    if named.is_empty() {
        return Ok(None);
    }
    let of = |all: bool| -> Result<(Option<AhoCorasick>, Vec<u32>), TokenizerError> {
        let picked = named.iter().filter(|n| all || n.2 == Kind::UserDefined);
        let (texts, ids): (Vec<&str>, Vec<u32>) = picked.map(|n| (n.0, n.1)).unzip();
        if texts.is_empty() {
            return Ok((None, ids));
        }
        // Not the table that is taken for few texts, of 256 states for each byte of them.
        let kind = Some(AhoCorasickKind::ContiguousNFA);
        let m = AhoCorasick::builder().kind(kind).match_kind(MatchKind::LeftmostLongest).build(texts);
        Ok((Some(m.map_err(|e| unfit("tokens", e))?), ids))
    };
    let (all, all_ids) = of(true)?;
    let (user, user_ids) = match named.iter().all(|n| n.2 == Kind::UserDefined) {
        true => (all.clone(), all_ids.clone()),
        false => of(false)?,
    };
    Ok(Some(Special { matchers: [user, all], ids: [user_ids, all_ids] }))
}
