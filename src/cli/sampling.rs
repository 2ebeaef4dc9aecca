//! The flags of sampling, named as llama.cpp's.

use crate::sample::parse::{Seed, bias, seed};
use crate::sample::{Overrides, SampleParams};

/// How the next token is chosen.
#[derive(Clone, clap::Args)]
pub struct SamplingArgs {
    #[command(flatten)]
    overrides: Overrides,
    /// Add a bias to a token's logit: ID+BIAS or ID-BIAS; may be repeated
    #[arg(short, long, value_name = "ID+BIAS", value_parser = bias)]
    logit_bias: Vec<(u32, f32)>,
    /// Random seed; -1: a random one [default: -1]
    #[arg(short, long, value_name = "N", value_parser = seed, allow_negative_numbers = true)]
    seed: Option<Seed>,
}

impl SamplingArgs {
    /// The parameters: what was given, over `base`.
    pub fn params(&self, base: SampleParams) -> SampleParams {
        let mut p = self.overrides.over(base);
        p.logit_bias.extend(&self.logit_bias);
        SampleParams { seed: self.seed.map_or(p.seed, |s| s.0), ..p }
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
