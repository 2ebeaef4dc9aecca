//! What may be set about sampling, and who sets it: the file, then its makers, then a person once, then a person now.

use super::parse::{last_n, number, penalty, top_k};
use crate::gguf::{Gguf, GgufError};
use serde::de::Error;
use serde::{Deserialize, Deserializer, Serialize};
use std::fmt;

/// What a person may set. The defaults are llama.cpp's.
#[derive(Clone, Debug, PartialEq)]
pub struct SampleParams {
    /// 0 or less: always the most likely token, of those that are typical enough.
    pub temp: f32,
    /// Keep the K most likely; 0 for all.
    pub top_k: usize,
    /// Keep the most likely tokens whose probabilities sum to P; 1 for all.
    pub top_p: f32,
    /// Keep tokens at least P times as likely as the most likely; 0 for all.
    pub min_p: f32,
    /// Keep the tokens whose surprise is nearest to the expected, up to a sum of P; 1 for all.
    pub typical_p: f32,
    /// Divides (multiplies, where negative) the logits of recent tokens; 1 for none.
    pub repeat_penalty: f32,
    /// How many tokens are recent.
    pub repeat_last_n: usize,
    /// Subtracted once from the logits of recent tokens.
    pub presence_penalty: f32,
    /// Subtracted for each time a token is among the recent.
    pub frequency_penalty: f32,
    /// Added to logits.
    pub logit_bias: Vec<(u32, f32)>,
    /// The seed; none for a random one.
    pub seed: Option<u64>,
}

impl Default for SampleParams {
    fn default() -> SampleParams {
        SampleParams {
            temp: 0.8,
            top_k: 40,
            top_p: 0.95,
            min_p: 0.05,
            typical_p: 1.0,
            repeat_penalty: 1.0,
            repeat_last_n: 64,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            logit_bias: Vec::new(),
            seed: None,
        }
    }
}

impl fmt::Display for SampleParams {
    /// Those that change something, by their flags. Where the most likely token is taken, only the typical filter does, which
    /// may leave it out, and top-k, which it looks at.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let greedy = self.temp <= 0.0;
        write!(f, "temp {}", if greedy { 0.0 } else { self.temp })?;
        let typical = self.typical_p < 1.0;
        if self.top_k > 0 && (!greedy || typical) {
            write!(f, " top-k {}", self.top_k)?;
        }
        let penalized = self.repeat_penalty != 1.0 || self.presence_penalty != 0.0 || self.frequency_penalty != 0.0;
        for (name, value, shown) in [
            ("typical", self.typical_p, typical),
            ("top-p", self.top_p, self.top_p < 1.0 && !greedy),
            ("min-p", self.min_p, self.min_p > 0.0 && !greedy),
            ("repeat-penalty", self.repeat_penalty, self.repeat_penalty != 1.0),
            ("presence-penalty", self.presence_penalty, self.presence_penalty != 0.0),
            ("frequency-penalty", self.frequency_penalty, self.frequency_penalty != 0.0),
        ] {
            if shown {
                write!(f, " {name} {value}")?;
            }
        }
        match self.repeat_last_n {
            _ if !penalized => {}
            usize::MAX => write!(f, " repeat-last-n -1")?,
            n => write!(f, " repeat-last-n {n}")?,
        }
        match self.logit_bias.len() {
            0 => Ok(()),
            n => write!(f, " logit-bias of {n}"),
        }
    }
}

/// Parameters that were set somewhere: keys of a file, flags. The others stay as they were.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize, clap::Args)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub struct Overrides {
    /// Temperature; 0 or less always takes the most likely token [default: 0.8, or the model's]
    #[arg(long, visible_alias = "temperature", value_name = "T", value_parser = number::<-100, 100>, allow_negative_numbers = true)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub temp: Option<f32>,
    /// Keep the K most likely tokens; 0 or less for all [default: 40, or the model's]
    #[arg(long, value_name = "K", value_parser = top_k, allow_negative_numbers = true)]
    #[serde(deserialize_with = "top_k_of", skip_serializing_if = "Option::is_none")]
    pub top_k: Option<usize>,
    /// Keep the most likely tokens up to a cumulative probability of P [default: 0.95, or the model's]
    #[arg(long, value_name = "P", value_parser = number::<0, 1>)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub top_p: Option<f32>,
    /// Keep tokens at least P times as likely as the most likely [default: 0.05, or the model's]
    #[arg(long, value_name = "P", value_parser = number::<0, 1>)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub min_p: Option<f32>,
    /// Locally typical sampling up to a cumulative probability of P [default: 1, off]
    #[arg(long = "typical", visible_alias = "typical-p", value_name = "P", value_parser = number::<0, 1>)]
    #[serde(rename = "typical", skip_serializing_if = "Option::is_none")]
    pub typical_p: Option<f32>,
    /// Penalty for recent tokens; 1 for none [default: 1, or the model's]
    #[arg(long, value_name = "X", value_parser = penalty)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub repeat_penalty: Option<f32>,
    /// How many recent tokens are penalized; -1: the whole context [default: 64, or the model's]
    #[arg(long, value_name = "N", value_parser = last_n, allow_negative_numbers = true)]
    #[serde(deserialize_with = "last_n_of", skip_serializing_if = "Option::is_none")]
    pub repeat_last_n: Option<usize>,
    /// Subtracted from the logits of recent tokens [default: 0]
    #[arg(long, value_name = "X", value_parser = number::<-100, 100>, allow_negative_numbers = true)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub presence_penalty: Option<f32>,
    /// Subtracted from logits for each recent occurrence [default: 0]
    #[arg(long, value_name = "X", value_parser = number::<-100, 100>, allow_negative_numbers = true)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub frequency_penalty: Option<f32>,
}

/// A whole number of a file, which means what it means as a flag.
fn top_k_of<'a, D: Deserializer<'a>>(d: D) -> Result<Option<usize>, D::Error> {
    top_k(&i64::deserialize(d)?.to_string()).map(Some).map_err(D::Error::custom)
}

/// The same of the recent tokens.
fn last_n_of<'a, D: Deserializer<'a>>(d: D) -> Result<Option<usize>, D::Error> {
    last_n(&i64::deserialize(d)?.to_string()).map(Some).map_err(D::Error::custom)
}

impl Overrides {
    /// What is set here, over `base`.
    pub fn over(&self, base: SampleParams) -> SampleParams {
        SampleParams {
            temp: self.temp.unwrap_or(base.temp),
            top_k: self.top_k.unwrap_or(base.top_k),
            top_p: self.top_p.unwrap_or(base.top_p),
            min_p: self.min_p.unwrap_or(base.min_p),
            typical_p: self.typical_p.unwrap_or(base.typical_p),
            repeat_penalty: self.repeat_penalty.unwrap_or(base.repeat_penalty),
            repeat_last_n: self.repeat_last_n.unwrap_or(base.repeat_last_n),
            presence_penalty: self.presence_penalty.unwrap_or(base.presence_penalty),
            frequency_penalty: self.frequency_penalty.unwrap_or(base.frequency_penalty),
            ..base
        }
    }

    /// The first key whose value cannot be, and why: for files, which no parser of flags has seen.
    pub fn check(&self) -> Result<(), (&'static str, String)> {
        let ranges = [
            ("temp", self.temp, -100.0, 100.0),
            ("top-p", self.top_p, 0.0, 1.0),
            ("min-p", self.min_p, 0.0, 1.0),
            ("typical", self.typical_p, 0.0, 1.0),
            ("repeat-penalty", self.repeat_penalty, 1e-3, 100.0),
            ("presence-penalty", self.presence_penalty, -100.0, 100.0),
            ("frequency-penalty", self.frequency_penalty, -100.0, 100.0),
        ];
        for (key, value, min, max) in ranges {
            if let Some(x) = value.filter(|x| !(min..=max).contains(x)) {
                return Err((key, format!("{x}, expected {min} to {max}")));
            }
        }
        Ok(())
    }

    /// What a file says (`general.sampling.*`), and notes on what it asks for that is not done here.
    pub fn of(g: &Gguf) -> Result<(Overrides, Vec<String>), GgufError> {
        let key = |name: &str| format!("general.sampling.{name}");
        let wrong = |name: &str, problem: String| GgufError { file: g.path().into(), field: key(name), problem };
        let real = |name: &str, min: f32, max: f32| match g.float(&key(name))? {
            Some(x) if !(min..=max).contains(&x) => Err(wrong(name, format!("found {x}, expected {min} to {max}"))),
            x => Ok(x),
        };
        let whole = |name: &str| match g.int(&key(name))? {
            Some(n) if n < -1 => Err(wrong(name, format!("found {n}, expected -1 or more"))),
            n => Ok(n),
        };
        let set = Overrides {
            temp: real("temp", -100.0, 100.0)?,
            top_k: whole("top_k")?.map(|k| usize::try_from(k).unwrap_or(0)),
            top_p: real("top_p", 0.0, 1.0)?,
            min_p: real("min_p", 0.0, 1.0)?,
            repeat_penalty: real("penalty_repeat", 1e-3, 100.0)?,
            repeat_last_n: whole("penalty_last_n")?.map(|n| usize::try_from(n).unwrap_or(usize::MAX)),
            ..Overrides::default()
        };
        let mut foreign = Vec::new();
        if real("xtc_probability", 0.0, 1.0)?.is_some_and(|p| p > 0.0) {
            foreign.push(key("xtc_probability"));
        }
        if whole("mirostat")?.is_some_and(|n| n > 0) {
            foreign.push(key("mirostat"));
        }
        if g.value(&key("sequence")).is_some() {
            foreign.push(key("sequence"));
        }
        let note = |key: String| format!("{key}: requested by the file but not supported; ignored");
        Ok((set, foreign.into_iter().map(note).collect()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_neutral_is_not_told() {
        let d = SampleParams::default;
        for (p, want) in [
            (d(), "temp 0.8 top-k 40 top-p 0.95 min-p 0.05"),
            (SampleParams { temp: -1.0, ..d() }, "temp 0"),
            (SampleParams { temp: 1.0, top_k: 0, top_p: 1.0, min_p: 0.0, ..d() }, "temp 1"),
            (SampleParams { temp: 0.0, repeat_penalty: 1.1, ..d() }, "temp 0 repeat-penalty 1.1 repeat-last-n 64"),
            (SampleParams { temp: 0.0, logit_bias: vec![(1, 1.0)], ..d() }, "temp 0 logit-bias of 1"),
            (SampleParams { temp: 0.0, typical_p: 0.5, ..d() }, "temp 0 top-k 40 typical 0.5"),
        ] {
            assert_eq!(p.to_string(), want);
        }
    }
}
