//! The flags of sampling, named as llama.cpp's.

use crate::sample::SampleParams;

/// How the next token is chosen.
#[derive(clap::Args)]
pub struct SamplingArgs {
    /// Temperature; 0 always takes the most likely token
    #[arg(long, value_name = "T", value_parser = number::<0, 100>)]
    temp: Option<f32>,
    /// Keep the K most likely tokens; 0 for all
    #[arg(long, value_name = "K")]
    top_k: Option<usize>,
    /// Keep the most likely tokens up to a sum of P
    #[arg(long, value_name = "P", value_parser = number::<0, 1>)]
    top_p: Option<f32>,
    /// Keep tokens at least P times as likely as the most likely
    #[arg(long, value_name = "P", value_parser = number::<0, 1>)]
    min_p: Option<f32>,
    /// Locally typical sampling up to a sum of P
    #[arg(long, value_name = "P", value_parser = number::<0, 1>)]
    typical: Option<f32>,
    /// Penalty for recent tokens; 1 for none
    #[arg(long, value_name = "X", value_parser = number::<0, 100>)]
    repeat_penalty: Option<f32>,
    /// How many tokens are recent
    #[arg(long, value_name = "N")]
    repeat_last_n: Option<usize>,
    /// Subtracted from the logits of recent tokens
    #[arg(long, value_name = "X", allow_negative_numbers = true)]
    presence_penalty: Option<f32>,
    /// Subtracted from logits for each recent occurrence
    #[arg(long, value_name = "X", allow_negative_numbers = true)]
    frequency_penalty: Option<f32>,
    /// Add to a token's logit: ID+BIAS or ID-BIAS
    #[arg(long, value_name = "ID+BIAS", value_parser = bias)]
    logit_bias: Vec<(u32, f32)>,
    /// Seed of the random numbers [default: random]
    #[arg(short, long, value_name = "N")]
    seed: Option<u64>,
}

fn number<const MIN: i32, const MAX: i32>(s: &str) -> Result<f32, String> {
    match s.parse::<f32>() {
        Ok(x) if (MIN as f32..=MAX as f32).contains(&x) => Ok(x),
        _ => Err(format!("expected a number from {MIN} to {MAX}")),
    }
}

fn bias(s: &str) -> Result<(u32, f32), String> {
    let expected = || "expected ID+BIAS or ID-BIAS, e.g. 15043-1.5".to_string();
    let at = s.find(['+', '-']).ok_or_else(expected)?;
    let value: f32 = s[at..].parse().map_err(|_| expected())?;
    Ok((s[..at].parse().map_err(|_| expected())?, value))
}

impl SamplingArgs {
    /// The parameters: what was given, over `base`.
    pub fn params(&self, base: SampleParams) -> SampleParams {
        let mut bias = base.logit_bias;
        bias.extend(&self.logit_bias);
        SampleParams {
            temp: self.temp.unwrap_or(base.temp),
            top_k: self.top_k.unwrap_or(base.top_k),
            top_p: self.top_p.unwrap_or(base.top_p),
            min_p: self.min_p.unwrap_or(base.min_p),
            typical_p: self.typical.unwrap_or(base.typical_p),
            repeat_penalty: self.repeat_penalty.unwrap_or(base.repeat_penalty),
            repeat_last_n: self.repeat_last_n.unwrap_or(base.repeat_last_n),
            presence_penalty: self.presence_penalty.unwrap_or(base.presence_penalty),
            frequency_penalty: self.frequency_penalty.unwrap_or(base.frequency_penalty),
            logit_bias: bias,
            seed: self.seed.or(base.seed),
        }
    }
}
