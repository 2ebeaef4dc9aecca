//! Building a tokenizer from metadata.

use super::{Kind, Pieces, Scheme, Special, Tokenizer, TokenizerError};
use crate::gguf::{Gguf, Strings};
use ahash::AHashMap;
use aho_corasick::{AhoCorasick, MatchKind};
use std::collections::HashMap;
use tokenizers::models::bpe::BPE;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::digits::Digits;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::{PreTokenizerWrapper, SplitDelimiterBehavior};

/// More tokens than any vocabulary has.
const MOST_TOKENS: usize = 4 << 20;
/// The longest text of a token.
const MOST_BYTES: usize = 4096;

/// Tokens that end generation wherever a vocabulary has them, beside those that metadata names (as in llama.cpp).
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
];
/// Those of them that end a turn, where metadata names none.
const TURN_TEXTS: &[&str] = &["<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>"];

const QWEN2: &str = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const LLAMA3: &str = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";

/// How text is cut before merging.
enum Pre {
    /// By one pattern.
    Pattern(&'static str),
    /// Every digit alone, then as GPT-2.
    DigitsThenGpt2,
    /// By several patterns, one after another: what llama.cpp does for files that name no rule.
    Default,
}

/// The rules by the names of `tokenizer.ggml.pre`. Each was compared with llama.cpp on its own vocabulary.
const RULES: &[(&[&str], Pre)] = &[
    (&["qwen2", "deepseek-r1-qwen", "stablelm2"], Pre::Pattern(QWEN2)),
    (&["llama-bpe", "llama3", "llama-v3"], Pre::Pattern(LLAMA3)),
    (&["gpt-2", "gpt2", "phi-2"], Pre::Pattern(GPT2)),
    (&["smollm", "starcoder", "refact"], Pre::DigitsThenGpt2),
    (&["default"], Pre::Default),
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
    let kinds = kinds(g, n)?;
    let mut notes = Vec::new();
    let (inner, scheme) = match model {
        "gpt2" => {
            let pre = pre_name(g, &mut notes)?;
            (byte_bpe(g, tokens, &pre)?, Scheme::Bytes)
        }
        "llama" => {
            let space_prefix = g.bool(&key("add_space_prefix"))?.unwrap_or(true);
            (
                sentence_piece(g, tokens, &kinds)?,
                Scheme::SentencePiece { space_prefix, bytes: byte_tokens(tokens, &kinds) },
            )
        }
        other => return Err(unfit("model", format_args!("found {other:?}, oxcart knows gpt2 and llama"))),
    };
    let llama3 = matches!(g.str(&key("pre"))?, Some("llama-bpe" | "llama3" | "llama-v3"));
    let spm = matches!(scheme, Scheme::SentencePiece { .. });
    let id = |k: &str, default: Option<u32>| -> Result<Option<u32>, TokenizerError> {
        match g.uint(&key(k))? {
            None => Ok(default.filter(|&d| (d as usize) < n)),
            Some(i) if i < n as u64 => Ok(Some(i as u32)),
            // Writers put -1, as all ones, where there is none.
            Some(i) if i >= u32::MAX as u64 => Ok(None),
            Some(i) => Err(unfit(k, format_args!("found {i}, expected below {n}"))),
        }
    };
    let bos = id("bos_token_id", Some(if spm { 1 } else { 11 }))?;
    let eos = id("eos_token_id", Some(if spm { 2 } else { 11 }))?;
    let add_bos = g.bool(&key("add_bos_token"))?.unwrap_or(spm || llama3);
    let add_eos = g.bool(&key("add_eos_token"))?.unwrap_or(false);

    let pieces = pieces(tokens, &kinds, &scheme)?;
    let mut ids = HashMap::new();
    let mut named: Vec<(&str, u32, Kind)> = Vec::new();
    for ((i, t), &kind) in (0..).zip(tokens.iter()).zip(&kinds) {
        if matches!(kind, Kind::Control | Kind::UserDefined | Kind::Unknown) && !t.is_empty() {
            ids.insert(t.into(), i);
            named.push((t, i, kind));
        }
    }
    // Some files mark the tokens that end a text as plain ones.
    let by_text: HashMap<&str, u32> = tokens.iter().zip(0..).filter(|(t, _)| END_TEXTS.contains(t)).collect();
    let turn = TURN_TEXTS.iter().find_map(|t| by_text.get(t).copied());
    let eot = id("eot_token_id", turn)?;
    let mut eog: Vec<u32> = [eos, eot, id("eom_token_id", None)?].into_iter().flatten().collect();
    eog.extend(by_text.values());
    eog.sort_unstable();
    eog.dedup();

    let special = special(&named)?;
    Ok(Tokenizer { inner, scheme, pieces, kinds, ids, special, bos, eos, eot, add_bos, add_eos, eog, notes })
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

/// The pre-tokenizer's name. A file from before April 2024 has none; llama.cpp then cuts by a default rule that groups
/// digits in threes, which is wrong for Qwen.
fn pre_name(g: &Gguf, notes: &mut Vec<String>) -> Result<String, TokenizerError> {
    if let Some(p) = g.str("tokenizer.ggml.pre")? {
        return Ok(p.to_string());
    }
    let qwen = g.str("general.architecture")? == Some("qwen2");
    let rule = if qwen { "qwen2" } else { "default" };
    notes.push(format!(
        "the file names no pre-tokenizer (tokenizer.ggml.pre): taking {rule}{}; --override-kv tokenizer.ggml.pre=str:NAME sets another",
        if qwen { ", which the architecture implies" } else { ", as llama.cpp does" }
    ));
    Ok(rule.to_string())
}

fn byte_bpe(g: &Gguf, tokens: &Strings, pre: &str) -> Result<tokenizers::Tokenizer, TokenizerError> {
    let Some((_, rule)) = RULES.iter().find(|(names, _)| names.contains(&pre)) else {
        let known: Vec<_> = RULES.iter().flat_map(|r| r.0.iter().copied()).collect();
        return Err(unfit("pre", format_args!("found {pre:?}, oxcart knows {}", known.join(", "))));
    };
    let lines = g.strings("tokenizer.ggml.merges")?.ok_or_else(|| unfit("merges", "missing"))?;
    let vocab: AHashMap<String, u32> = tokens.iter().map(str::to_string).zip(0..).collect();
    let mut merges = Vec::with_capacity(lines.len());
    for (i, m) in lines.iter().enumerate() {
        // The first space that is not the piece itself.
        let at = m.bytes().skip(1).position(|b| b == b' ').map(|p| p + 1);
        let Some((a, b)) = at.and_then(|at| Some((m.get(..at)?, m.get(at + 1..)?))) else {
            return Err(unfit("merges", format_args!("merge {i} is {m:?}, expected two pieces and a space")));
        };
        // A merge of pieces that the vocabulary lacks can never apply; such lines stand in real files.
        if vocab.contains_key(a) && vocab.contains_key(b) && vocab.contains_key([a, b].concat().as_str()) {
            merges.push((a.to_string(), b.to_string()));
        }
    }
    let bpe = BPE::builder()
        .vocab_and_merges(vocab, merges)
        .ignore_merges(matches!(rule, Pre::Pattern(LLAMA3)))
        .build()
        .map_err(|e| unfit("merges", e))?;
    let mut t = tokenizers::Tokenizer::new(bpe);
    t.with_pre_tokenizer(Some(pre_tokenizer(rule)?));
    Ok(t)
}

fn pre_tokenizer(rule: &Pre) -> Result<PreTokenizerWrapper, TokenizerError> {
    let split = |pattern: &str| -> Result<PreTokenizerWrapper, TokenizerError> {
        Split::new(SplitPattern::Regex(pattern.to_string()), SplitDelimiterBehavior::Isolated, false)
            .map(PreTokenizerWrapper::from)
            .map_err(|e| unfit("pre", e))
    };
    let bytes = PreTokenizerWrapper::from(ByteLevel::new(false, false, false));
    let steps = match rule {
        Pre::Pattern(p) => vec![split(p)?, bytes],
        Pre::DigitsThenGpt2 => vec![Digits::new(true).into(), split(GPT2)?, bytes],
        Pre::Default => {
            vec![split(r"[\p{P}\$\+<=>\^~\|]+")?, split(GPT2)?, split(r"\p{N}+")?, split(r"[0-9][0-9][0-9]")?, bytes]
        }
    };
    Ok(Sequence::new(steps).into())
}

/// SentencePiece files carry scores instead of merges: every way to make a piece of two others is a merge, better scores
/// first.
fn sentence_piece(g: &Gguf, tokens: &Strings, kinds: &[Kind]) -> Result<tokenizers::Tokenizer, TokenizerError> {
    let scores = g.floats("tokenizer.ggml.scores")?.ok_or_else(|| unfit("scores", "missing"))?;
    if scores.len() != tokens.len() {
        return Err(unfit("scores", format_args!("{} scores of {} tokens", scores.len(), tokens.len())));
    }
    let texts: Vec<&str> = tokens.iter().collect();
    let usable = |i: usize| matches!(kinds[i], Kind::Normal | Kind::UserDefined | Kind::Unused);
    let ids: HashMap<&str, u32> = (0..texts.len()).filter(|&i| usable(i)).map(|i| (texts[i], i as u32)).collect();
    let mut merges: Vec<(f32, u32, u32, usize, usize)> = Vec::new();
    for (i, t) in texts.iter().enumerate() {
        // A longer piece would make a table of pairs as large as the square of its length.
        if !usable(i) || t.len() > 256 {
            continue;
        }
        for (at, _) in t.char_indices().skip(1) {
            if let (Some(&a), Some(&b)) = (ids.get(&t[..at]), ids.get(&t[at..])) {
                merges.push((scores[i], a, b, i, at));
            }
        }
    }
    merges.sort_by(|x, y| y.0.total_cmp(&x.0).then((x.1, x.2).cmp(&(y.1, y.2))));
    let merges =
        merges.into_iter().map(|(.., i, at)| (texts[i][..at].to_string(), texts[i][at..].to_string())).collect();
    let vocab: AHashMap<String, u32> = texts.iter().map(|t| t.to_string()).zip(0..).collect();
    let unknown = match g.uint("tokenizer.ggml.unknown_token_id")? {
        Some(i) => texts.get(i as usize).ok_or_else(|| unfit("unknown_token_id", format_args!("found {i}")))?,
        None => texts[0],
    };
    let bpe = BPE::builder()
        .vocab_and_merges(vocab, merges)
        .byte_fallback(true)
        .fuse_unk(true)
        .unk_token(unknown.to_string())
        .build()
        .map_err(|e| unfit("tokens", e))?;
    Ok(tokenizers::Tokenizer::new(bpe))
}

/// The token of each byte; 0, the unknown token, where the vocabulary lacks one.
fn byte_tokens(tokens: &Strings, kinds: &[Kind]) -> Box<[u32; 256]> {
    let mut table = Box::new([0; 256]);
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
    let mut byte_of_char = HashMap::new();
    let mut next = 256;
    for b in 0..=255u8 {
        let printable = matches!(b, 33..=126 | 161..=172 | 174..=255);
        let c = if printable { b as u32 } else { next };
        next += !printable as u32;
        byte_of_char.insert(char::from_u32(c).expect("below the surrogates"), b);
    }
    let mut p = Pieces { bytes: Vec::new(), ends: Vec::with_capacity(tokens.len()) };
    for (t, kind) in tokens.iter().zip(kinds) {
        match (scheme, kind) {
            (_, Kind::Control | Kind::UserDefined | Kind::Unknown) => p.bytes.extend_from_slice(t.as_bytes()),
            (Scheme::Bytes, _) => {
                for c in t.chars() {
                    match byte_of_char.get(&c) {
                        Some(&b) => p.bytes.push(b),
                        None => p.bytes.extend_from_slice(c.encode_utf8(&mut [0; 4]).as_bytes()),
                    }
                }
            }
            (Scheme::SentencePiece { .. }, Kind::Byte) => match byte_of(t) {
                Some(b) => p.bytes.push(b),
                None => return Err(unfit("tokens", format_args!("byte token {t:?}, expected the form <0xE4>"))),
            },
            (Scheme::SentencePiece { .. }, _) => p.bytes.extend_from_slice(t.replace('\u{2581}', " ").as_bytes()),
        }
        p.ends.push(p.bytes.len() as u32);
    }
    Ok(p)
}

fn special(named: &[(&str, u32, Kind)]) -> Result<Option<Special>, TokenizerError> {
    if named.is_empty() {
        return Ok(None);
    }
    let of = |all: bool| -> Result<(Option<AhoCorasick>, Vec<u32>), TokenizerError> {
        let picked = named.iter().filter(|n| all || n.2 == Kind::UserDefined);
        let (texts, ids): (Vec<&str>, Vec<u32>) = picked.map(|n| (n.0, n.1)).unzip();
        if texts.is_empty() {
            return Ok((None, ids));
        }
        let m = AhoCorasick::builder().match_kind(MatchKind::LeftmostLongest).build(texts);
        Ok((Some(m.map_err(|e| unfit("tokens", e))?), ids))
    };
    let ((user, user_ids), (all, all_ids)) = (of(false)?, of(true)?);
    Ok(Some(Special { matchers: [user, all], ids: [user_ids, all_ids] }))
}
