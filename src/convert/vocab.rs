//! The vocabulary: `tokenizer.model` (SentencePiece) or `tokenizer.json` to the keys under `tokenizer.ggml`.
//!
//! llama.cpp's converter names the pre-tokenizer by a hash of how a test sentence is encoded, which a fine-tune with one
//! token more escapes. Here the name follows from what `tokenizer.json` says about splitting, which is all that the name
//! stands for.

use super::config::{Config, Family};
use super::sentencepiece::pieces;
use super::{Metadata, unfit};
use crate::gguf::{MetadataArray, MetadataValue, Strings, Value as GgufValue};
use crate::safetensors::{Checkpoint, CheckpointError};
use crate::tokenizer;
use serde::Deserialize;
use serde_json::Value;
use std::collections::HashMap;

const JSON: &str = "tokenizer.json";
const MODEL: &str = "tokenizer.model";
const SETTINGS: &str = "tokenizer_config.json";
const ADDED: &str = "added_tokens.json";
/// The most bytes of each of these files; the largest real ones have 33 million.
const MOST_BYTES: u64 = 64 << 20;

/// More chat templates than any model has, and the most bytes of a file of them; real ones have some ten thousand.
const MOST_TEMPLATES: usize = 100;
const MOST_TEMPLATE_BYTES: u64 = 1 << 20;

/// Token types of GGUF.
const NORMAL: i32 = 1;
const UNKNOWN: i32 = 2;
const CONTROL: i32 = 3;
const USER_DEFINED: i32 = 4;
const UNUSED: i32 = 5;
const BYTE: i32 = 6;

/// Special tokens by their names in Hugging Face's files and in GGUF, in the order in which they are written.
const SPECIAL: &[(&str, &str)] =
    &[("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("sep", "seperator"), ("pad", "padding"), ("mask", "mask")];
/// The size of CodeLlama's vocabulary, and its end of what is filled in.
const CODE_LLAMA: (u64, u64) = (32016, 32010);

/// What of `tokenizer.json` is used.
#[derive(Deserialize)]
struct Tokenizer {
    #[serde(default)]
    added_tokens: Vec<Added>,
    #[serde(default)]
    pre_tokenizer: Value,
    #[serde(default)]
    post_processor: Value,
    model: Model,
}

/// A token beside those that merges make.
#[derive(Deserialize, Clone)]
struct Added {
    #[serde(default)]
    id: u32,
    content: String,
    #[serde(default)]
    special: bool,
}

#[derive(Deserialize)]
struct Model {
    #[serde(rename = "type", default)]
    kind: Option<String>,
    #[serde(default)]
    vocab: Value,
    #[serde(default)]
    merges: Vec<Merge>,
    #[serde(default)]
    byte_fallback: Option<bool>,
    #[serde(default)]
    ignore_merges: Option<bool>,
}

/// A merge, as older and as newer versions of tokenizers write it.
#[derive(Deserialize)]
#[serde(untagged)]
enum Merge {
    Text(String),
    Pair(String, String),
}

/// Tokens, their types and their scores, by id.
struct Tokens {
    texts: Vec<String>,
    kinds: Vec<i32>,
    scores: Vec<f32>,
}

impl Tokens {
    fn unused(n: usize) -> Tokens {
        let texts = (0..n).map(|i| format!("[PAD{i}]")).collect();
        Tokens { texts, kinds: vec![UNUSED; n], scores: vec![-10_000.0; n] }
    }

    /// A token that text is searched for before it is merged.
    fn add(&mut self, t: &Added) {
        let Some(at) = self.texts.get_mut(t.id as usize) else { return };
        let control = t.special || looks_special(&t.content);
        *at = if control { t.content.clone() } else { t.content.replace('▁', " ") };
        self.kinds[t.id as usize] = if control { CONTROL } else { USER_DEFINED };
        self.scores[t.id as usize] = -1000.0;
    }
}

/// Some models mark tokens that control as plain ones.
fn looks_special(text: &str) -> bool {
    let between = |open: &str, close: &str| text.starts_with(open) && text.ends_with(close);
    matches!(text, "<pad>" | "<mask>" | "<2mass>" | "[@BOS@]")
        || between("<|", "|>")
        || between("<｜", "｜>")
        || between("<unused", ">")
}

/// Writes the vocabulary's keys.
pub fn write(c: &Checkpoint, config: &Config, pre: Option<&str>, m: &mut Metadata) -> Result<(), CheckpointError> {
    let json: Option<Tokenizer> = c.json(JSON, MOST_BYTES)?;
    let settings: Option<Value> = c.json(SETTINGS, MOST_BYTES)?;
    let settings = settings.unwrap_or(Value::Null);
    let llama = config.family != Family::Qwen2;
    if let Some(Value::Bool(b)) = settings.get("add_prefix_space").filter(|_| llama) {
        m.bool("tokenizer.ggml.add_space_prefix", *b);
    }
    let mut merges = None;
    let (model, pre, tokens) = match (c.read(MODEL, MOST_BYTES)?, &json) {
        (Some(model), _) => {
            ("llama", pre.unwrap_or("default").to_string(), sentence_piece(c, config, &model, &settings)?)
        }
        (None, Some(json)) if llama && json.model.byte_fallback == Some(true) => {
            ("llama", pre.unwrap_or("default").to_string(), byte_fallback(c, config, json)?)
        }
        (None, Some(json)) => {
            let pre = pre.map_or_else(|| pre_tokenizer(c, json), |p| Ok(p.to_string()))?;
            let texts: Vec<String> = json.model.merges.iter().map(Merge::text).collect();
            if let Some(i) = texts.iter().position(|m| tokenizer::merged(m).is_none()) {
                let found = crate::gguf::one_line(&texts[i], 100);
                return Err(unfit(
                    c,
                    JSON,
                    "model.merges",
                    format!("merge {i} is {found}, expected two pieces and a space"),
                ));
            }
            merges = Some(texts.iter().collect::<Strings>());
            ("gpt2", pre, byte_bpe(c, config, json, &settings)?)
        }
        (None, None) => return Err(unfit(c, JSON, "open", "is missing, and so is tokenizer.model")),
    };
    m.str("tokenizer.ggml.model", model);
    m.str("tokenizer.ggml.pre", &pre);
    m.set("tokenizer.ggml.tokens", GgufValue::Strings(tokens.texts.iter().collect()));
    if model == "llama" {
        m.set("tokenizer.ggml.scores", numbers(tokens.scores.iter().map(|&s| MetadataValue::F32(s))));
    }
    m.set("tokenizer.ggml.token_type", numbers(tokens.kinds.iter().map(|&k| MetadataValue::I32(k))));
    if let Some(merges) = merges {
        m.set("tokenizer.ggml.merges", GgufValue::Strings(merges));
    }
    specials(json.as_ref(), &settings, config, tokens.texts.len(), m);
    template(c, &settings, m)?;
    // Granite's and SmolLM's vocabulary; the converter does the same.
    if llama && config.n_vocab == 49152 {
        m.bool("tokenizer.ggml.add_bos_token", false);
    }
    Ok(())
}

fn numbers(values: impl Iterator<Item = MetadataValue>) -> GgufValue {
    let values: Vec<MetadataValue> = values.collect();
    let element = values.first().map_or(MetadataValue::I32(0), Clone::clone).value_type();
    match MetadataArray::new(element, values) {
        Ok(a) => MetadataValue::Array(Box::new(a)).into(),
        Err(_) => unreachable!("all of one type"),
    }
}

impl Merge {
    /// Two texts with a space between them; a space inside is written as byte-level vocabularies write it.
    fn text(&self) -> String {
        match self {
            Merge::Text(t) => t.clone(),
            Merge::Pair(a, b) => format!("{} {}", a.replace(' ', "Ġ"), b.replace(' ', "Ġ")),
        }
    }
}

impl Tokenizer {
    /// Texts and ids of the tokens that merges make, in the order of the file.
    fn vocab(&self, c: &Checkpoint) -> Result<Vec<(&str, u64)>, CheckpointError> {
        let fail = |problem: String| unfit(c, JSON, "model.vocab", problem);
        let vocab = self.model.vocab.as_object().ok_or_else(|| fail("expected an object".into()))?;
        if vocab.is_empty() {
            return Err(fail("no tokens".into()));
        }
        let mut ids = Vec::with_capacity(vocab.len());
        for (t, id) in vocab {
            let number = id.as_u64();
            let number =
                number.ok_or_else(|| fail(format!("token {}: found id {id}", crate::gguf::one_line(t, 100))))?;
            ids.push((t.as_str(), number));
        }
        Ok(ids)
    }

    /// Fills in the tokens that merges make.
    fn fill(&self, c: &Checkpoint, config: &Config) -> Result<Tokens, CheckpointError> {
        match self.model.kind.as_deref() {
            None | Some("BPE") => {}
            Some(other) => {
                let found = crate::gguf::one_line(other, 100);
                return Err(unfit(c, JSON, "model.type", format!("found {found}, expected BPE")));
            }
        }
        let n = config.n_vocab as usize;
        let mut tokens = Tokens::unused(n);
        let vocab = self.vocab(c)?;
        let added = || self.added_tokens.iter().map(|t| (t.content.as_str(), t.id as u64));
        check_tokens(c, JSON, "model.vocab", vocab.iter().copied())?;
        check_tokens(c, JSON, "added_tokens", added())?;
        if let Some((t, id)) = vocab.iter().copied().chain(added()).find(|&(_, id)| id >= n as u64) {
            let t = crate::gguf::one_line(t, 100);
            return Err(unfit(
                c,
                JSON,
                "model.vocab",
                format!("token {t}: id {id}, expected below {n} by config.json"),
            ));
        }
        for (text, id) in vocab {
            tokens.texts[id as usize] = text.to_string();
            tokens.kinds[id as usize] = NORMAL;
        }
        Ok(tokens)
    }
}

/// Refuses tokens that are longer than those of a GGUF, and two of one id, of which either would do.
fn check_tokens<'a>(
    c: &Checkpoint,
    file: &str,
    field: &str,
    tokens: impl Iterator<Item = (&'a str, u64)>,
) -> Result<(), CheckpointError> {
    let (most, shown) = (tokenizer::MOST_BYTES, |t| crate::gguf::one_line(t, 100));
    let mut texts = HashMap::new();
    for (text, id) in tokens {
        if text.len() > most {
            return Err(unfit(c, file, field, format!("token {id} of {} bytes, expected at most {most}", text.len())));
        }
        if let Some(other) = texts.insert(id, text).filter(|&other| other != text) {
            let problem = format!("tokens {} and {} have the same id {id}", shown(other), shown(text));
            return Err(unfit(c, file, field, problem));
        }
    }
    Ok(())
}

/// A vocabulary of bytes in letters, as GPT-2 has it.
fn byte_bpe(c: &Checkpoint, config: &Config, json: &Tokenizer, settings: &Value) -> Result<Tokens, CheckpointError> {
    let mut tokens = json.fill(c, config)?;
    // The settings may know tokens that tokenizer.json does not.
    let known: std::collections::HashSet<u32> = json.added_tokens.iter().map(|t| t.id).collect();
    let more = added_in_settings(c, settings)?;
    for t in json.added_tokens.iter().chain(more.iter().filter(|t| !known.contains(&t.id))) {
        tokens.add(t);
    }
    Ok(tokens)
}

/// `added_tokens_decoder` of the settings.
fn added_in_settings(c: &Checkpoint, settings: &Value) -> Result<Vec<Added>, CheckpointError> {
    let Some(Value::Object(map)) = settings.get("added_tokens_decoder") else { return Ok(Vec::new()) };
    let token = |(id, t): (&String, &Value)| {
        let field = format!("added_tokens_decoder.{}", crate::gguf::one_line(id, 20));
        let number = id.parse().map_err(|_| unfit(c, SETTINGS, &field, "expected a token's id"))?;
        let added = Added::deserialize(t).map_err(|e| unfit(c, SETTINGS, &field, e))?;
        Ok(Added { id: number, ..added })
    };
    let all: Vec<Added> = map.iter().map(token).collect::<Result<_, _>>()?;
    check_tokens(c, SETTINGS, "added_tokens_decoder", all.iter().map(|t| (t.content.as_str(), t.id as u64)))?;
    Ok(all)
}

/// SentencePiece's vocabulary from its own file.
fn sentence_piece(c: &Checkpoint, config: &Config, model: &[u8], settings: &Value) -> Result<Tokens, CheckpointError> {
    let n = config.n_vocab as usize;
    let mut tokens = Tokens::unused(n);
    let pieces = pieces(model, 4 << 20).map_err(|problem| unfit(c, MODEL, "pieces", problem))?;
    check_tokens(c, MODEL, "pieces", (0..).zip(&pieces).map(|(i, p)| (p.text.as_str(), i)))?;
    for (i, p) in pieces.into_iter().take(n).enumerate() {
        tokens.kinds[i] = match p.kind {
            2 => UNKNOWN,
            3 => CONTROL,
            5 => UNUSED,
            6 => BYTE,
            _ => NORMAL,
        };
        (tokens.texts[i], tokens.scores[i]) = (p.text, p.score);
    }
    let added: Option<HashMap<String, u32>> = c.json(ADDED, MOST_BYTES)?;
    check_tokens(c, ADDED, "tokens", added.iter().flatten().map(|(text, &id)| (text.as_str(), id as u64)))?;
    for (text, id) in added.into_iter().flatten().filter(|(_, id)| (*id as usize) < n) {
        tokens.texts[id as usize] = text;
        tokens.kinds[id as usize] = USER_DEFINED;
        tokens.scores[id as usize] = -1000.0;
    }
    added_in_settings(c, settings)?.iter().for_each(|t| tokens.add(t));
    Ok(tokens)
}

/// SentencePiece's vocabulary from `tokenizer.json`, which has merges in the place of scores. A token's score is the rank
/// of the merge that makes it, negated, so that the best pair is the one that merges first; llama.cpp's converter gives all
/// of them -1000, with which llama.cpp merges from the left.
fn byte_fallback(c: &Checkpoint, config: &Config, json: &Tokenizer) -> Result<Tokens, CheckpointError> {
    let mut tokens = json.fill(c, config)?;
    let mut ranks = HashMap::with_capacity(json.model.merges.len());
    for (rank, merge) in json.model.merges.iter().enumerate() {
        let text = match merge {
            Merge::Text(t) => t.replacen(' ', "", 1),
            Merge::Pair(a, b) => format!("{a}{b}"),
        };
        ranks.entry(text).or_insert(rank);
    }
    for ((text, kind), score) in tokens.texts.iter().zip(&mut tokens.kinds).zip(&mut tokens.scores) {
        *score = ranks.get(text).map_or(-1000.0 - ranks.len() as f32, |&r| -(r as f32));
        let hex = text.strip_prefix("<0x").and_then(|t| t.strip_suffix('>'));
        if *kind == NORMAL && hex.is_some_and(|h| h.len() == 2 && h.bytes().all(|b| b.is_ascii_hexdigit())) {
            *kind = BYTE;
        }
    }
    json.added_tokens.iter().for_each(|t| tokens.add(t));
    if let Some(t) = json.added_tokens.iter().find(|t| t.content == "<unk>") {
        tokens.kinds[t.id as usize] = UNKNOWN;
    }
    Ok(tokens)
}

/// Patterns of splits, as `tokenizer.json` writes them.
const QWEN2: &str =
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// The name of the pre-tokenizer.
fn pre_tokenizer(c: &Checkpoint, json: &Tokenizer) -> Result<String, CheckpointError> {
    let whole = std::slice::from_ref(&json.pre_tokenizer);
    let steps = match json.pre_tokenizer.get("pretokenizers") {
        Some(Value::Array(steps)) => steps,
        _ => whole,
    };
    let kind = |step: &Value| step.get("type").and_then(Value::as_str).unwrap_or_default().to_string();
    let flag = |step: &Value, key: &str| step.get(key).and_then(Value::as_bool).unwrap_or(false);
    let pattern =
        |step: &Value| step.get("pattern").and_then(|p| p.get("Regex")).and_then(Value::as_str).map(String::from);
    let names: Vec<String> = steps.iter().map(kind).collect();
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    let name = match names[..] {
        ["Split", "ByteLevel"] if !flag(&steps[1], "use_regex") => match pattern(&steps[0]).as_deref() {
            Some(QWEN2) => Some("qwen2"),
            Some(LLAMA3) if json.model.ignore_merges == Some(true) => Some("llama-bpe"),
            Some(LLAMA3) => Some("smaug-bpe"),
            _ => None,
        },
        ["Digits", "ByteLevel"] if flag(&steps[0], "individual_digits") && flag(&steps[1], "use_regex") => {
            Some("smollm")
        }
        ["ByteLevel"] if flag(&steps[0], "use_regex") => Some("gpt-2"),
        _ => None,
    };
    name.map(String::from).ok_or_else(|| {
        let found = crate::gguf::one_line(&json.pre_tokenizer.to_string(), 300);
        unfit(c, JSON, "pre_tokenizer", format!("found {found}, which is none that oxcart knows; name it with --pre"))
    })
}

/// The text of a special token, which is a string or an object around one.
fn content(v: &Value) -> Option<&str> {
    v.as_str().or_else(|| v.get("content")?.as_str())
}

/// The special token that a template of the post-processor has in a place.
fn special(place: Option<&Value>) -> Option<&str> {
    place?.get("SpecialToken")?.get("id")?.as_str()
}

/// Whether a template of two texts has one of `ends` between them, as its own token: not the end of the first text, where a
/// single text has a `last` token. `None` where nothing is between them, or the template is of another form.
fn separates(pair: &[Value], first: Option<&str>, last: Option<&str>, ends: [Option<&str>; 2]) -> Option<bool> {
    let begin = usize::from(first.is_some() && special(pair.first()) == first);
    let end = pair.len() - usize::from(last.is_some() && special(pair.last()) == last);
    let [a, between @ .., b] = pair.get(begin..end)? else { return None };
    let sequence = |v: &'_ Value, id: &str| v.get("Sequence").and_then(|s| s.get("id")).is_some_and(|s| s == id);
    if between.is_empty() || !sequence(a, "A") || !sequence(b, "B") {
        return None;
    }
    let is_end = |i: usize| special(between.get(i)).is_some_and(|t| ends.contains(&Some(t)));
    Some(is_end(0) && last.is_none() || between.len() == 2 && is_end(1))
}

/// Ids of special tokens, and which of them begin and end a text.
fn specials(json: Option<&Tokenizer>, settings: &Value, config: &Config, n: usize, m: &mut Metadata) {
    let setting = |kind: &str| settings.get(format!("{kind}_token")).and_then(content);
    let (mut cls, mut sep) = (setting("cls"), setting("sep"));
    let (mut bos, mut eos, mut eot) = (setting("bos"), setting("eos"), None);
    // In the order in which they were learnt of.
    let mut adds: Vec<(&str, bool)> = Vec::new();
    if json.is_some() {
        (bos, eos) = (bos.or(cls), eos.or(sep));
    }
    let post = json.map_or(&Value::Null, |j| &j.post_processor);
    let one = std::slice::from_ref(post);
    let steps = post.get("processors").and_then(Value::as_array).map_or(one, Vec::as_slice);
    for step in steps {
        let learn = |adds: &mut Vec<(&str, bool)>, kind, add, again: bool| match adds.iter_mut().find(|a| a.0 == kind) {
            Some(a) if again => a.1 = add,
            Some(_) => {}
            None => adds.push((kind, add)),
        };
        let places = |key: &str| step.get(key).and_then(Value::as_array).map_or(&[][..], Vec::as_slice);
        match step.get("type").and_then(Value::as_str) {
            Some("ByteLevel") => ["bos", "eos"].iter().for_each(|&kind| learn(&mut adds, kind, false, false)),
            Some("TemplateProcessing") => {
                let single = Some(places("single")).filter(|s| s.len() > 1).unwrap_or_default();
                let (first, last) = (special(single.first()), special(single.last()));
                if first.is_some() {
                    // A token that begins texts is one of the two, whichever there is none of yet.
                    if ![bos, cls].contains(&first) {
                        (bos, cls) = (bos.or(first), cls.or(first));
                    }
                    learn(&mut adds, "bos", [bos, cls].contains(&first), true);
                }
                if last.is_some() {
                    if eos != last {
                        (eot, eos) = (eos, last);
                    }
                    learn(&mut adds, "eos", true, true);
                }
                if let Some(add) = separates(places("pair"), first, last, [sep, eos]) {
                    learn(&mut adds, "sep", add, true);
                    sep = sep.or(eos.filter(|_| add));
                }
            }
            _ => {}
        }
    }
    let added = json.map_or(&[][..], |j| j.added_tokens.as_slice());
    let by_text = |text: &str| added.iter().find(|t| t.content == text).map(|t| t.id as u64);
    let by_config = |kind: &str| config.token_ids.get(&format!("{kind}_token_id")).and_then(Value::as_u64);
    for &(kind, name) in SPECIAL {
        let text = match kind {
            "bos" => bos,
            "eos" => eos,
            "sep" => sep,
            _ => setting(kind),
        };
        if let Some(id) = text.and_then(by_text).or_else(|| by_config(kind)).filter(|&id| id < n as u64) {
            m.u32(&format!("tokenizer.ggml.{name}_token_id"), id);
        }
        if let Some(Value::Bool(add)) = settings.get(format!("add_{kind}_token"))
            && !adds.iter().any(|a| a.0 == kind)
        {
            adds.push((kind, *add));
        }
    }
    let code_llama = (config.family != Family::Qwen2 && config.n_vocab == CODE_LLAMA.0).then_some(CODE_LLAMA.1);
    if let Some(id) = eot.and_then(by_text).or(code_llama) {
        m.u32("tokenizer.ggml.eot_token_id", id);
    }
    for (kind, add) in adds.into_iter().filter(|(kind, _)| ["bos", "eos", "sep"].contains(kind)) {
        m.bool(&format!("tokenizer.ggml.add_{kind}_token"), add);
    }
}

/// The chat template, or several by name.
fn template(c: &Checkpoint, settings: &Value, m: &mut Metadata) -> Result<(), CheckpointError> {
    // Like the converter, which reads templates only where there are settings.
    if settings.is_null() {
        return Ok(());
    }
    let template = match settings.get("chat_template") {
        Some(said @ (Value::String(_) | Value::Array(_))) => said.clone(),
        _ => template_file(c)?,
    };
    let named = match &template {
        Value::String(text) => {
            m.str("tokenizer.chat_template", text);
            return Ok(());
        }
        Value::Array(named) => named,
        _ => return Ok(()),
    };
    let mut default = None;
    let mut names = Vec::new();
    for t in named {
        let text = |key: &str| t.get(key).and_then(Value::as_str);
        let (Some(name), Some(text)) = (text("name").filter(|n| !n.is_empty()), text("template")) else { continue };
        if name == "default" {
            default = Some(text);
            continue;
        }
        let name: String = name.chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '_' }).collect();
        m.str(&format!("tokenizer.chat_template.{name}"), text);
        names.push(name);
    }
    if !names.is_empty() {
        m.set("tokenizer.chat_templates", GgufValue::Strings(names.iter().collect()));
    }
    default.into_iter().for_each(|text| m.str("tokenizer.chat_template", text));
    Ok(())
}

/// Templates in files of their own, as newer and older tools store them.
fn template_file(c: &Checkpoint) -> Result<Value, CheckpointError> {
    const MORE: &str = "additional_chat_templates";
    let text = |file: &str| match c.read(file, MOST_TEMPLATE_BYTES)? {
        Some(bytes) => String::from_utf8(bytes).map(Some).map_err(|e| unfit(c, file, "text", e)),
        None => Ok(None),
    };
    let Some(default) = text("chat_template.jinja")? else {
        let json: Option<Value> = c.json("chat_template.json", MOST_TEMPLATE_BYTES)?;
        return Ok(json.and_then(|j| j.get("chat_template").cloned()).unwrap_or_default());
    };
    let names = std::fs::read_dir(c.dir().join(MORE)).into_iter().flatten().flatten();
    let names = names.filter_map(|e| Some(e.file_name().to_str()?.strip_suffix(".jinja")?.to_string()));
    let mut names: Vec<String> = names.take(MOST_TEMPLATES + 1).collect();
    if names.is_empty() {
        return Ok(default.into());
    }
    if names.len() > MOST_TEMPLATES {
        return Err(unfit(c, MORE, "files", format!("more than {MOST_TEMPLATES} templates")));
    }
    names.sort_unstable();
    let mut all = vec![serde_json::json!({ "name": "default", "template": default })];
    for name in names {
        let template = text(&format!("{MORE}/{name}.jinja"))?;
        all.push(serde_json::json!({ "name": name, "template": template }));
    }
    Ok(all.into())
}
