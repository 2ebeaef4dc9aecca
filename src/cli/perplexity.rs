//! `oxcart perplexity`: how well a model predicts a text, how far it is from a reference, how it answers questions; with
//! llama-perplexity's flags and lines.

mod divergence;
mod estimate;
pub(super) mod run;
mod stride;
mod task;

use super::engine::{EngineArgs, SessionArgs};
use super::text::{note_bytes, without_line_break};
use super::units::size;
use crate::disk;
use crate::engine::{Engine, Session, SessionOptions};
use crate::machine::Machine;
use anyhow::{Context, bail};
use std::path::PathBuf;
use std::sync::Arc;

const FIELDS: &str = "\
--json prints one object. Errors are standard errors, divergences and scores nats, shares and probabilities fractions of 1:
  text                model, file, n_ctx, chunks, tokens_scored, ppl, ppl_error, seconds; chunk_nll: nats a token, by chunk
  --ppl-stride        the same with stride, windows and window_nll in place of chunks and chunk_nll
  --kl-divergence     model, base, compact (tokens kept of a row), n_ctx, chunks, tokens_scored, seconds; each a value with
                      its error: ppl, ppl_base, ln_ratio, ratio, difference, kld, p_diff, rms_p_diff, same_top;
                      correlation; kld_percentiles, p_diff_percentiles; each_chunk: ppl, ppl_base, kld, same_top
  questions           model, file, questions, correct, accuracy, error, interval_95 (Wilson), chance, seconds;
                      each_question: at (its line or number), scores (of its answers), chosen (from 0), right

JSONL data sets have an object on every line: question, choices, answer (MMLU); question or question.stem, choices with
text and label, answerKey (ARC); question, mc1_targets (TruthfulQA); activity_label, ctx, endings, label (HellaSwag);
sentence, option1, option2, answer (Winogrande).";

/// Flags as llama-perplexity has them.
#[derive(clap::Args)]
#[command(after_long_help = FIELDS)]
#[command(group(clap::ArgGroup::new("measure").args([
    "kl_divergence", "hellaswag", "winogrande", "multiple_choice", "ppl_stride",
])))]
pub struct Args {
    #[command(flatten)]
    engine: EngineArgs,
    #[command(flatten)]
    session: SessionArgs,
    /// The text or data set. Optional with --kl-divergence: the base file holds the tokens; a text given as well must match
    /// them
    #[arg(
        short,
        long,
        visible_alias = "bf",
        alias = "binary-file",
        value_name = "FILE",
        required_unless_present = "kl_divergence"
    )]
    file: Option<PathBuf>,
    /// Chunk size in tokens [default: 512, or that of the base file]
    #[arg(short, long, value_name = "N", value_parser = super::engine::chunk)]
    ctx_size: Option<usize>,
    /// Batch size in tokens; as many chunks as fit are evaluated together
    #[arg(short, long, value_name = "N", default_value_t = 2048, value_parser = super::engine::batch)]
    batch_size: usize,
    /// Score only the first N chunks; -1 for all
    #[arg(long, value_name = "N", value_parser = super::engine::limit, allow_negative_numbers = true)]
    chunks: Option<usize>,
    /// Sliding window with stride N: each window scores its last N tokens; 0: disjoint chunks
    #[arg(long, value_name = "N")]
    ppl_stride: Option<u32>,
    /// 0: running perplexity on one line; 1: one line per chunk, with the mean and its error in nats
    #[arg(long, value_name = "0|1", default_value_t = 0, value_parser = clap::value_parser!(u8).range(0..=1))]
    ppl_output_type: u8,
    /// Base file: written, or read with --kl-divergence
    #[arg(long, visible_alias = "save-all-logits", value_name = "FILE")]
    kl_divergence_base: Option<PathBuf>,
    /// Write a compact base file: per row, the K most probable tokens and the mass of the rest. To read one takes no flag
    /// [default of K: 1/72 of the vocabulary, a file 24 times smaller]
    #[arg(long, value_name = "K", num_args = 0..=1, default_missing_value = "0",
          requires = "kl_divergence_base", conflicts_with = "measure")]
    kl_divergence_base_compact: Option<usize>,
    /// Measure the divergence from the model that wrote the base file
    #[arg(long, requires = "kl_divergence_base")]
    kl_divergence: bool,
    /// HellaSwag: llama.cpp's text file, or JSONL
    #[arg(long, requires = "file")]
    hellaswag: bool,
    /// Number of HellaSwag questions; 0: all
    #[arg(long, value_name = "N", default_value_t = 400, requires = "hellaswag")]
    hellaswag_tasks: usize,
    /// Winogrande: llama.cpp's CSV, or JSONL
    #[arg(long, requires = "file")]
    winogrande: bool,
    /// Number of Winogrande sentences; 0: all
    #[arg(long, value_name = "N", default_value_t = 0, requires = "winogrande")]
    winogrande_tasks: usize,
    /// Multiple choice (MMLU, ARC, TruthfulQA): llama.cpp's binary file, or JSONL
    #[arg(long, requires = "file")]
    multiple_choice: bool,
    /// Number of multiple-choice questions; 0: all
    #[arg(long, value_name = "N", default_value_t = 0, requires = "multiple_choice")]
    multiple_choice_tasks: usize,
    /// Stop once the standard error is at most X: of the perplexity; with --kl-divergence of the mean divergence, in nats;
    /// with questions of the score, in percent
    #[arg(long, value_name = "X", value_parser = positive)]
    until_error: Option<f64>,
    /// Resume an interrupted run with the same model, text and settings
    #[arg(long)]
    resume: bool,
    /// Print one JSON object, with the values of every chunk or question
    #[arg(long)]
    json: bool,
}

fn positive(s: &str) -> Result<f64, String> {
    s.parse().ok().filter(|x: &f64| x.is_finite() && *x > 0.0).ok_or_else(|| "expected a number above 0".into())
}

pub fn run(a: Args) -> anyhow::Result<()> {
    if a.hellaswag || a.winogrande || a.multiple_choice {
        task::run(&a)
    } else if a.kl_divergence {
        divergence::run(&a)
    } else if let Some(stride) = a.ppl_stride.filter(|&n| n > 0) {
        stride::run(&a, stride as usize)
    } else {
        estimate::run(&a)
    }
}

impl Args {
    fn context(&self) -> usize {
        self.ctx_size.unwrap_or(512)
    }

    /// Chunks that a batch holds.
    fn n_seq(&self, context: usize) -> usize {
        (self.batch_size / context).max(1)
    }

    /// Chunks that are computed, told and saved together: those of a batch, or each by itself where it fills forward passes
    /// alone and would gain nothing from company. Where weights come from the disk, it would: they are read once for all.
    fn together(&self, e: &Engine, context: usize) -> usize {
        let alone = context.is_multiple_of(self.ubatch()) && e.stream().is_none();
        if alone { 1 } else { self.n_seq(context) }
    }

    /// Tokens of a forward pass.
    fn ubatch(&self) -> usize {
        self.session.ubatch_size.min(self.batch_size)
    }

    /// The file's name, for errors.
    fn name(&self) -> String {
        self.file.as_ref().map_or(String::new(), |f| f.display().to_string())
    }

    /// The file's bytes.
    fn bytes(&self) -> anyhow::Result<Vec<u8>> {
        let Some(file) = &self.file else { bail!("--file: expected a text") };
        let bytes = disk::read(file, disk::MOST_TEXT).with_context(|| file.display().to_string())?;
        if bytes.is_empty() {
            bail!("{}: empty, expected a text or a data set", file.display());
        }
        Ok(bytes)
    }

    /// The text's tokens; without its last line break, as llama-perplexity reads files.
    fn tokens(&self, e: &Engine) -> anyhow::Result<Vec<u32>> {
        let bytes = self.bytes()?;
        note_bytes(&self.name(), &bytes);
        tokens("perplexity", e, &bytes, false).with_context(|| self.name())
    }

    /// A session of so many sequences, if there is memory for it.
    fn session(&self, e: &Arc<Engine>, context: usize, sequences: usize) -> anyhow::Result<Session> {
        let o = SessionOptions { ubatch: self.ubatch(), ..self.session.options(context, sequences) };
        let s = e.session(&o)?;
        check_memory(&[e], s.cache_bytes() as u64)?;
        Ok(s)
    }
}

/// The tokens of a text that something is measured on, by `verb`; without its last line break, as llama.cpp's tools read
/// files. `special`: those that it names (<|im_end|>) are taken as such.
pub(super) fn tokens(verb: &str, e: &Engine, bytes: &[u8], special: bool) -> anyhow::Result<Vec<u32>> {
    let bytes = without_line_break(bytes);
    if let Some(at) = bytes.iter().position(|&b| b == 0) {
        bail!("line {}: a zero byte, expected a text", disk::line_of(bytes, at));
    }
    let start = std::time::Instant::now();
    tell!("{verb}: tokenizing the input ..");
    let tokens = e.tokenizer.encode(bytes, true, special)?;
    tell!("{verb}: tokenization took {:.3} ms", start.elapsed().as_secs_f64() * 1e3);
    Ok(tokens)
}

/// Refuses to begin what there is no memory for: `needed` bytes beside the models, which the system may drop and read again.
pub(super) fn check_memory(models: &[&Arc<Engine>], needed: u64) -> anyhow::Result<()> {
    let Some(free) = Machine::here().available else { return Ok(()) };
    if needed > free {
        bail!("memory: {} needed beside the model, {} available", size(needed), size(free));
    }
    let files = dropped(models);
    if files > free - needed {
        let (files, free) = (size(files), size(free - needed));
        tell!("memory: {files} of weights, {free} available: they are read again for every batch");
    }
    Ok(())
}

/// Bytes of the files that the system drops where memory is short. Of those that are streamed, their facts tell; those that
/// stay no longer count as available.
fn dropped(models: &[&Arc<Engine>]) -> u64 {
    models.iter().filter(|e| e.stream().is_none() && !e.stays()).map(|e| e.gguf.file_size()).sum()
}

#[cfg(test)]
mod tests {
    use super::dropped;
    use crate::engine::{Engine, EngineOptions};
    use crate::load::Residence;
    use std::sync::Arc;

    #[test]
    fn weights_that_stay_are_not_read_again() {
        let path = crate::catalog::default_model().unwrap();
        let open = |copy: bool| {
            let residence = Residence { copy, ..Residence::default() };
            Arc::new(Engine::open(&path, &EngineOptions { threads: 1, residence, ..EngineOptions::default() }).unwrap())
        };
        let (mapped, copied) = (open(false), open(true));
        assert_eq!(dropped(&[&mapped, &copied]), mapped.gguf.file_size());
    }
}
