//! What a file says about itself: name, size, licence, origin and hints for sampling (`general.*`), as the converter takes
//! them from the model card, `config.json`, `generation_config.json` and the folder's name, in this order.

use super::Metadata;
use super::readme::{self, Readme};
use crate::gguf::{self, MetadataValue};
use crate::quantize::source::Tensor;
use crate::safetensors::{Checkpoint, CheckpointError};
use serde_json::Value;

/// The most bytes of the files that are read here.
const MOST_BYTES: u64 = 4 << 20;

/// Hints for sampling by their keys in `generation_config.json` and under `general.sampling`; whether they are integers.
const SAMPLING: &[(&str, &str, bool)] = &[
    ("top_k", "top_k", true),
    ("top_p", "top_p", false),
    ("min_p", "min_p", false),
    ("xtc_probability", "xtc_probability", false),
    ("xtc_threshold", "xtc_threshold", false),
    ("temperature", "temp", false),
    ("penalty_last_n", "penalty_last_n", true),
    ("repetition_penalty", "penalty_repeat", false),
    ("mirostat", "mirostat", true),
    ("mirostat_tau", "mirostat_tau", false),
    ("mirostat_eta", "mirostat_eta", false),
];

/// Writes the keys. What is wrong with a file that a model can do without becomes a remark.
pub fn write(
    c: &Checkpoint,
    tensors: &[Tensor],
    m: &mut Metadata,
    remarks: &mut Vec<String>,
) -> Result<(), CheckpointError> {
    let hints: Option<Value> = optional(c.json("generation_config.json", MOST_BYTES), remarks);
    for &(from, to, integer) in SAMPLING {
        let Some(v) = hints.as_ref().and_then(|h| h.get(from)) else { continue };
        let key = format!("general.sampling.{to}");
        match v.as_i64().filter(|_| integer).map(i32::try_from) {
            Some(Ok(n)) => m.set(&key, MetadataValue::I32(n)),
            Some(Err(_)) => {}
            None => v.as_f64().filter(|_| !integer).into_iter().for_each(|x| m.f32(&key, x)),
        }
    }
    let card = optional(Readme::read(c), remarks);
    let weights = Weights::of(tensors);
    let config: Option<Value> = c.json("config.json", MOST_BYTES)?;
    let origin = config.as_ref().and_then(|v| v.get("_name_or_path")).and_then(Value::as_str);
    // A path of somebody's machine is no name.
    let origin = origin.filter(|o| !o.is_empty() && o.matches('/').count() <= 1).map(|o| Name::of(o, weights.total));
    let folder = c.dir().canonicalize().unwrap_or_else(|_| c.dir().to_path_buf());
    let folder = folder.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
    let folder = Name::of(&folder, weights.total);
    let said = |keys: &[&str]| card.text(keys);
    let pick = |keys: &[&str], part: fn(&Name) -> &Option<String>| {
        said(keys).or_else(|| origin.as_ref().and_then(|o| part(o).clone())).or_else(|| part(&folder).clone())
    };
    let name = pick(&["name", "model_name"], |n| &n.title).unwrap_or_else(|| "model".into());
    let license = Some(card.texts(&["license"]).join(",")).filter(|l| !l.is_empty());
    for (key, part) in [
        ("name", Some(name)),
        ("author", said(&["author", "model_author", "model_creator"])),
        ("version", pick(&["version", "model_version"], |n| &n.version)),
        ("organization", pick(&["organization", "model_organization"], |n| &n.organization)),
        ("finetune", pick(&["finetune", "model_finetune"], |n| &n.finetune)),
        ("basename", pick(&["basename", "model_basename", "model_type"], |n| &n.basename)),
        ("description", said(&["description", "model_description"])),
        ("size_label", pick(&["size_label", "model_size_label"], |n| &n.size).or_else(|| Some(weights.label()))),
        ("license", license),
        ("license.name", said(&["license_name"])),
        ("license.link", said(&["license_link"])),
        ("source.url", said(&["url", "model_url"])),
        ("source.doi", said(&["doi", "model_doi"])),
        ("source.uuid", said(&["uuid", "model_uuid"])),
        ("source.repo_url", said(&["repo_url", "model_repo_url"])),
    ] {
        if let Some(part) = part {
            m.str(&format!("general.{key}"), &part);
        }
    }
    for (what, keys) in [
        ("base_model", ["base_model", "base_models", "base_model_sources"]),
        ("dataset", ["datasets", "dataset", "dataset_sources"]),
    ] {
        let Some(all) = card.first(&keys).map(readme::items) else { continue };
        m.u32(&format!("general.{what}.count"), all.len() as u64);
        for (i, one) in all.iter().enumerate() {
            for (key, value) in ancestor(one, weights.total) {
                m.str(&format!("general.{what}.{i}.{key}"), &value);
            }
        }
    }
    for (key, texts) in
        [("tags", card.texts(&["tags", "pipeline_tag"])), ("languages", card.texts(&["languages", "language"]))]
    {
        if !texts.is_empty() {
            m.set(&format!("general.{key}"), gguf::Value::Strings(texts.iter().collect()));
        }
    }
    Ok(())
}

/// What a file says that a model can do without; where it cannot be read, a remark says so.
fn optional<T: Default>(read: Result<T, CheckpointError>, remarks: &mut Vec<String>) -> T {
    read.unwrap_or_else(|e| {
        remarks.push(format!("{e}; nothing is taken from it"));
        T::default()
    })
}

/// Keys and values of a model or dataset that a card names: by its name on the hub, its address, or key by key.
fn ancestor(v: &Value, total: u64) -> Vec<(&'static str, String)> {
    const KEYS: [&str; 9] =
        ["name", "author", "version", "organization", "description", "url", "doi", "uuid", "repo_url"];
    const HUB: &str = "https://huggingface.co/";
    if let Value::Object(map) = v {
        return KEYS.into_iter().filter_map(|k| Some((k, readme::text(map.get(k)?)?))).collect();
    }
    let Some(id) = readme::text(v) else { return Vec::new() };
    let is_address = ["http://", "https://", "ssh://"].iter().any(|p| id.starts_with(p));
    let (name, address) = match is_address {
        true => {
            let on_hub = id.strip_prefix(HUB).or_else(|| id.strip_prefix("http://huggingface.co/"));
            let on_hub = on_hub.filter(|n| n.split('/').count() == 2 && n.split('/').all(|part| !part.is_empty()));
            (on_hub.map(|n| Name::of(n, total)), Some(id.clone()))
        }
        false => {
            let name = Name::of(&id, total);
            let address = name.organization.is_some().then(|| format!("{HUB}{id}"));
            (Some(name), address)
        }
    };
    let name = name.unwrap_or_default();
    let all =
        [("name", name.title), ("version", name.version), ("organization", name.organization), ("repo_url", address)];
    all.into_iter().filter_map(|(k, v)| Some((k, v?))).collect()
}

/// How many weights a model has.
struct Weights {
    total: u64,
    /// Those that every token uses, and those of one expert.
    active: u64,
    experts: u64,
}

impl Weights {
    fn of(tensors: &[Tensor]) -> Weights {
        let mut w = Weights { total: 0, active: 0, experts: 0 };
        for t in tensors {
            let n = t.n_elements();
            w.total += n;
            w.active += match t.dims[..] {
                [.., experts] if t.name.contains("_exps.") => {
                    w.experts = experts;
                    n / experts
                }
                _ => n,
            };
        }
        w
    }

    /// `110B`, `8x7B`
    fn label(&self) -> String {
        match self.experts {
            0 => rounded(self.total),
            n => format!("{n}x{}", rounded(self.active)),
        }
    }
}

/// A number of weights in two digits or more.
fn rounded(n: u64) -> String {
    let n = n as f64;
    let (scaled, unit) = match n {
        _ if n > 1e12 => (n * 1e-12, "T"),
        _ if n > 1e9 => (n * 1e-9, "B"),
        _ if n > 1e6 => (n * 1e-6, "M"),
        _ => (n * 1e-3, "K"),
    };
    let digits = scaled.round_ties_even().to_string().trim_start_matches('0').len();
    format!("{scaled:.*}{unit}", 2usize.saturating_sub(digits))
}

/// What the name of a model says, by the habits of the hub: `organization/basename-size-finetune-version`.
#[derive(Default, Debug, PartialEq)]
struct Name {
    title: Option<String>,
    organization: Option<String>,
    basename: Option<String>,
    size: Option<String>,
    finetune: Option<String>,
    version: Option<String>,
}

/// What a part of a name is.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Part {
    Basename,
    Size,
    Finetune,
    Version,
    Kind, // of quantization
}

/// `v1.5`, `iter2`, `0.3`
fn is_version(part: &str) -> bool {
    let lower = part.to_ascii_lowercase();
    let number = ["v", "iter"].iter().find_map(|p| lower.strip_prefix(p)).unwrap_or(&lower).to_string();
    number.split('.').all(is_number)
}

fn is_number(s: &str) -> bool {
    !s.is_empty() && s.bytes().all(|b| b.is_ascii_digit())
}

/// `Q4_K_M`, `bf16`, `fp32`
fn is_kind(part: &str) -> bool {
    let lower = part.to_ascii_lowercase();
    let float = ["bfp", "bf", "fp", "f"].iter().find_map(|p| lower.strip_prefix(p));
    if matches!(float, Some("16" | "32")) {
        return true;
    }
    let Some(rest) = lower.strip_prefix('i').unwrap_or(&lower).strip_prefix('q').map(str::to_string) else {
        return false;
    };
    let mut pieces = rest.split('_');
    pieces.next().is_some_and(|n| n.len() == 1 && is_number(n)) && pieces.all(|p| p.chars().count() == 1)
}

/// The size that a part says in its usual form: `7b` is `7B`, `A2.7b` is `A2.7B`, `8x7B`, `mini`, `7b1` is `7.1B`.
fn size(part: &str) -> Option<String> {
    let lower = part.to_ascii_lowercase();
    if ["small", "mini", "medium", "large", "xl", "xxl"].contains(&lower.as_str()) {
        return Some(part.to_string());
    }
    let mut part = part.replace('_', ".");
    if part.ends_with(|c: char| c.is_ascii_digit()) && part.len() > 2 {
        let (rest, last) = part.split_at_checked(part.len() - 2)?;
        let mut last = last.chars();
        let (unit, digit) = (last.next()?, last.next()?);
        part = format!("{rest}.{digit}{unit}");
    }
    let unit = part.chars().last().filter(|c| "kmbtKMBT".contains(*c))?;
    let number = &part[..part.len() - 1];
    let number = match number.split_once(['x', 'X']) {
        Some((experts, number)) if is_number(experts) => number,
        Some(_) => return None,
        None => number.strip_prefix(['A', 'a']).unwrap_or(number),
    };
    let (whole, fraction) = number.split_once('.').unwrap_or((number, "0"));
    (is_number(whole) && is_number(fraction))
        .then(|| format!("{}{}", &part[..part.len() - 1], unit.to_ascii_uppercase()))
}

impl Name {
    /// What a name of a model with `total` weights says.
    fn of(id: &str, total: u64) -> Name {
        if id.contains(' ') {
            return Name { title: Some(title(id)), ..Name::default() };
        }
        let (organization, full) = id.split_once('/').map_or((None, id), |(o, n)| (Some(o), n));
        let organization = organization.filter(|o| !o.is_empty() && !o.starts_with('.'));
        let mut parts: Vec<(String, Vec<Part>)> = Vec::new();
        for part in full.split('-').filter(|p| !p.is_empty()) {
            let first = parts.is_empty();
            let lower = part.to_ascii_lowercase();
            let mut text = part.to_string();
            let mut kinds = Vec::new();
            if is_version(part) {
                kinds.push(Part::Version);
            } else if is_kind(part) {
                text = part.to_ascii_uppercase();
                kinds.push(Part::Kind);
            } else if let Some(size) = size(part).filter(|_| !first) {
                text = size;
                let unit = text.chars().last().and_then(|u| " KMBT".find(u)).unwrap_or(0);
                // What is far from the model's size is likely the length of its context.
                match text[..text.len() - 1].parse::<f64>().map(|n| n * 1000f64.powi(unit as i32)) {
                    Ok(said) if total > 0 && (said - total as f64).abs() > (7 * total / 8) as f64 => {
                        text = format!("{}{}", &text[..text.len() - 1], text[text.len() - 1..].to_ascii_lowercase());
                        kinds.push(Part::Finetune);
                    }
                    _ => kinds.push(Part::Size),
                }
            } else if !first && ["chat", "instruct", "vision", "lora"].contains(&lower.as_str()) {
                kinds.push(Part::Finetune);
            }
            parts.push((text, kinds));
        }
        let sized = |(text, kinds): &(String, Vec<Part>)| {
            kinds.contains(&Part::Size) && text.contains(|c: char| c.is_numeric())
        };
        if parts.iter().any(sized) {
            let words = parts.iter_mut().filter(|(text, _)| text.chars().all(char::is_alphabetic));
            words.for_each(|(_, kinds)| kinds.retain(|k| *k != Part::Size));
        }
        let mut at_start = true;
        for (text, kinds) in &mut parts {
            let is_word = kinds.is_empty() && text.starts_with(char::is_alphabetic);
            if at_start && (is_word || kinds.contains(&Part::Version)) {
                kinds.push(Part::Basename);
                continue;
            }
            at_start = false;
            if kinds.is_empty() {
                kinds.push(Part::Finetune);
            }
        }
        // A version at the end of the base's name is none of it.
        for (_, kinds) in parts.iter_mut().rev() {
            if !kinds.contains(&Part::Basename) || kinds.len() < 2 {
                break;
            }
            kinds.retain(|k| *k != Part::Basename);
        }
        let join = |wanted: &dyn Fn(&[Part]) -> bool| {
            let mut texts: Vec<&str> = Vec::new();
            parts.iter().filter(|(_, kinds)| wanted(kinds)).for_each(|(text, _)| texts.push(text));
            (!texts.is_empty()).then(|| texts.join("-"))
        };
        let mut name = Name {
            title: (!parts.is_empty()).then(|| title(full)),
            organization: organization.map(title),
            basename: join(&|k| k.contains(&Part::Basename)),
            // Said twice, it is one size.
            size: sizes(&parts),
            finetune: join(&|k| k.contains(&Part::Finetune)),
            version: join(&|k| k.contains(&Part::Version) && !k.contains(&Part::Basename)),
        };
        if name.size.is_none() && name.finetune.is_none() && name.version.is_none() {
            name.basename = None; // it would only say the name again
        }
        name
    }
}

/// The sizes that a name says, each once.
fn sizes(parts: &[(String, Vec<Part>)]) -> Option<String> {
    let mut sizes: Vec<&str> = Vec::new();
    for (text, _) in parts.iter().filter(|(_, kinds)| kinds.contains(&Part::Size)) {
        if !sizes.contains(&text.as_str()) {
            sizes.push(text);
        }
    }
    (!sizes.is_empty()).then(|| sizes.join("-"))
}

/// Words with capitals, except versions and what has capitals of its own.
fn title(text: &str) -> String {
    let word = |w: &str| {
        let lower = w.chars().any(char::is_lowercase) && !w.chars().any(char::is_uppercase);
        if !lower || w.starts_with(|c: char| c.is_ascii_digit()) || (w.starts_with('v') && is_version(w)) {
            return w.to_string();
        }
        let mut after_letter = false;
        let capital = |c: char| {
            let c = if after_letter { c.to_string() } else { c.to_uppercase().collect() };
            after_letter = c.chars().all(char::is_alphabetic);
            c
        };
        w.chars().map(capital).collect()
    };
    text.replace('-', " ").split_whitespace().map(word).collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_say_what_the_hub_means_by_them() {
        let some = |s: &str| (!s.is_empty()).then(|| s.to_string());
        // Name, weights; title, organization, basename, size, finetune, version.
        let cases = [
            ("Qwen/Qwen1.5-110B-Chat", 111_000_000_000, ["Qwen1.5 110B Chat", "Qwen", "Qwen1.5", "110B", "Chat", ""]),
            ("Meta-Llama-3-70B", 70_000_000_000, ["Meta Llama 3 70B", "", "Meta-Llama-3", "70B", "", ""]),
            (
                "mistralai/Mixtral-8x22B-Instruct-v0.1",
                141_000_000_000,
                ["Mixtral 8x22B Instruct v0.1", "Mistralai", "Mixtral", "8x22B", "Instruct", "v0.1"],
            ),
            ("ck-llama", 191_000_000, ["Ck Llama", "", "", "", "", ""]),
            ("smollm2-135m-instruct", 134_000_000, ["Smollm2 135m Instruct", "", "smollm2", "135M", "instruct", ""]),
            ("llama-3-8b-262k", 8_000_000_000, ["Llama 3 8b 262k", "", "llama-3", "8B", "262k", ""]),
            ("A name of words", 5, ["A Name Of Words", "", "", "", "", ""]),
        ];
        for (id, total, [title, organization, basename, size, finetune, version]) in cases {
            let want = Name {
                title: some(title),
                organization: some(organization),
                basename: some(basename),
                size: some(size),
                finetune: some(finetune),
                version: some(version),
            };
            assert_eq!(Name::of(id, total), want, "{id}");
        }
    }

    #[test]
    fn sizes_have_two_digits_or_more() {
        let cases =
            [(191_234_000, "191M"), (7_200_000_000, "7.2B"), (111_200_000_000, "111B"), (999, "1.0K"), (0, "0.00K")];
        for (n, want) in cases {
            assert_eq!(rounded(n), want, "{n}");
        }
    }
}
