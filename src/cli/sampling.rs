//! The flags of sampling, named as llama.cpp's.

use crate::sample::SampleParams;
use crate::sample::parse::{Seed, bias, last_n, number, penalty, seed, top_k};

/// How the next token is chosen.
#[derive(Clone, clap::Args)]
pub struct SamplingArgs {
    /// Temperature; 0 or less always takes the most likely token
    #[arg(long, visible_alias = "temperature", value_name = "T", value_parser = number::<-100, 100>, allow_negative_numbers = true)]
    temp: Option<f32>,
    /// Keep the K most likely tokens; 0 or less for all
    #[arg(long, value_name = "K", value_parser = top_k, allow_negative_numbers = true)]
    top_k: Option<usize>,
    /// Keep the most likely tokens up to a sum of P
    #[arg(long, value_name = "P", value_parser = number::<0, 1>)]
    top_p: Option<f32>,
    /// Keep tokens at least P times as likely as the most likely
    #[arg(long, value_name = "P", value_parser = number::<0, 1>)]
    min_p: Option<f32>,
    /// Locally typical sampling up to a sum of P
    #[arg(long, visible_alias = "typical-p", value_name = "P", value_parser = number::<0, 1>)]
    typical: Option<f32>,
    /// Penalty for recent tokens; 1 for none
    #[arg(long, value_name = "X", value_parser = penalty)]
    repeat_penalty: Option<f32>,
    /// How many tokens are recent; -1 for all of the context
    #[arg(long, value_name = "N", value_parser = last_n, allow_negative_numbers = true)]
    repeat_last_n: Option<usize>,
    /// Subtracted from the logits of recent tokens
    #[arg(long, value_name = "X", value_parser = number::<-100, 100>, allow_negative_numbers = true)]
    presence_penalty: Option<f32>,
    /// Subtracted from logits for each recent occurrence
    #[arg(long, value_name = "X", value_parser = number::<-100, 100>, allow_negative_numbers = true)]
    frequency_penalty: Option<f32>,
    /// Add to a token's logit: ID+BIAS or ID-BIAS
    #[arg(long, value_name = "ID+BIAS", value_parser = bias)]
    logit_bias: Vec<(u32, f32)>,
    /// Seed of the random numbers; -1 for a random one [default: -1]
    #[arg(short, long, value_name = "N", value_parser = seed, allow_negative_numbers = true)]
    seed: Option<Seed>,
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
            seed: self.seed.map_or(base.seed, |s| s.0),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        sampling: SamplingArgs,
    }

    fn parse(words: &str) -> Result<SampleParams, String> {
        let line = Line::try_parse_from(std::iter::once("oxcart").chain(words.split_whitespace()));
        line.map(|l| l.sampling.params(SampleParams::default())).map_err(|e| e.to_string())
    }

    #[test]
    fn flags_become_parameters() {
        let d = SampleParams::default;
        let cases = [
            ("", d()),
            ("--temp 0", SampleParams { temp: 0.0, ..d() }),
            ("--temp -1", SampleParams { temp: -1.0, ..d() }),
            ("--top-k -1", SampleParams { top_k: 0, ..d() }),
            ("--top-p 0.5 --min-p 0", SampleParams { top_p: 0.5, min_p: 0.0, ..d() }),
            ("--typical 0.2", SampleParams { typical_p: 0.2, ..d() }),
            (
                "--repeat-penalty 1.1 --repeat-last-n -1",
                SampleParams { repeat_penalty: 1.1, repeat_last_n: usize::MAX, ..d() },
            ),
            ("--presence-penalty -0.5", SampleParams { presence_penalty: -0.5, ..d() }),
            ("--frequency-penalty 0.25", SampleParams { frequency_penalty: 0.25, ..d() }),
            (
                "--logit-bias 5+1.5 --logit-bias 7-inf",
                SampleParams { logit_bias: vec![(5, 1.5), (7, f32::NEG_INFINITY)], ..d() },
            ),
            ("-s 18446744073709551615", SampleParams { seed: Some(u64::MAX), ..d() }),
            ("--seed -1", d()),
        ];
        for (words, want) in cases {
            assert_eq!(parse(words), Ok(want), "{words}");
        }
    }

    #[test]
    fn nonsense_is_refused_with_what_was_expected() {
        let cases = [
            ("--temp nan", "expected a number from -100 to 100"),
            ("--temp hot", "expected a number"),
            ("--top-k 1.5", "expected a whole number"),
            ("--top-p 1.1", "expected a number from 0 to 1"),
            ("--min-p -0.1", "unexpected argument"),
            ("--repeat-penalty 0", "expected a number above 0"),
            ("--repeat-last-n -2", "or -1 for all"),
            ("--presence-penalty inf", "expected a number"),
            ("--logit-bias 5", "expected ID+BIAS"),
            ("--logit-bias 5+nan", "expected ID+BIAS"),
            ("--logit-bias x+1", "expected ID+BIAS"),
            ("--seed -2", "expected 0 to 2^64 - 1"),
        ];
        for (words, want) in cases {
            let e = parse(words).expect_err(words);
            assert!(e.contains(want), "{words}: {e}");
        }
    }
}
