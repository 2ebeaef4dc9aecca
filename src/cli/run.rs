//! `oxcart run`: continues a text. Text to stdout, figures to stderr.

use super::drafting::DraftArgs;
use super::engine::{EngineArgs, SessionArgs, session, tell_facts};
use super::interrupt::{interruptible, stopped_by};
use super::progress::reading;
use super::sampling::SamplingArgs;
use super::text::{EscapeArgs, note_bytes, without_line_break};
use crate::chat::{self, Message, Template};
use crate::disk;
use crate::engine::Engine;
use crate::generate::{End, Event, Report, fits, generate};
use crate::sample::Sampler;
use crate::tui;
use anyhow::{Context, bail};
use std::io::{IsTerminal, StdoutLock, Write};
use std::ops::ControlFlow;
use std::path::PathBuf;

/// Flags as llama.cpp's programs have them.
#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    engine: EngineArgs,
    #[command(flatten)]
    session: SessionArgs,
    #[command(flatten)]
    sampling: SamplingArgs,
    #[command(flatten)]
    draft: DraftArgs,
    /// The text to continue
    #[arg(short, long, value_name = "TEXT", conflicts_with = "file")]
    prompt: Option<String>,
    /// Read the text from a file; without -f and -p, from stdin. A trailing line break is dropped
    #[arg(short, long, value_name = "FILE")]
    file: Option<PathBuf>,
    /// Treat the text as a question: apply the model's chat template
    #[arg(long, visible_alias = "cnv")]
    chat: bool,
    /// System prompt, with --chat
    #[arg(long, visible_alias = "sys", value_name = "TEXT", requires = "chat")]
    system_prompt: Option<String>,
    #[command(flatten)]
    escapes: EscapeArgs,
    /// Stop after generating this string (it is printed); may be repeated
    #[arg(short, long, value_name = "TEXT")]
    reverse_prompt: Vec<String>,
    /// Ignore end-of-generation tokens; stop at -n tokens or a full context
    #[arg(long)]
    ignore_eos: bool,
    /// Maximum tokens to generate [default: until the model ends or the context is full]
    #[arg(short = 'n', long, visible_alias = "predict", value_name = "N", allow_negative_numbers = true)]
    n_predict: Option<i64>,
    /// Context size in tokens; 0 (default): the training context
    #[arg(short, long, value_name = "N", value_parser = super::engine::context)]
    ctx_size: Option<usize>,
    /// When the context is full, discard half of it and continue with the rest shifted; otherwise generation ends
    #[arg(long)]
    context_shift: bool,
    /// With --context-shift: number of initial prompt tokens kept when the context shifts, beside BOS; -1 for all
    #[arg(long, value_name = "N", allow_negative_numbers = true, default_value_t = 0)]
    keep: i64,
    /// Do not print the prompt before its continuation
    #[arg(long)]
    no_display_prompt: bool,
    /// Print one JSON object at the end instead of streaming text
    #[arg(long)]
    json: bool,
}

pub fn run(a: Args) -> anyhow::Result<()> {
    let text = a.text()?;
    let e = a.engine.open()?;
    let context = a.ctx_size.filter(|&n| n > 0).unwrap_or(e.model.config.n_context);
    let options = a.session.options(context, 1);
    let mut s = session(&e, &options)?;
    let mut drafter = a.draft.drafter(&e, &a.engine, &options)?;
    tell_facts(&e, context);
    let prompt = a.tokens(&e, &text)?;
    // Before it is printed.
    fits(&s, &prompt)?;
    if a.context_shift {
        s.shift_when_full(kept(a.keep, e.tokenizer.add_bos(), prompt.len()));
    }
    // Before it is said that it begins: from here on, what stops it is heard.
    let work = interruptible()?;
    let mut sampler = a.sampler(&e);
    let limit = a.n_predict.and_then(|n| usize::try_from(n).ok());
    let mut out = Output::new(&a);
    let mut begun: &[u8] = if a.json || a.chat || a.no_display_prompt { b"" } else { &text };
    let bar = reading(&mut s, prompt.len());
    if bar.is_hidden() {
        out.put(std::mem::take(&mut begun))?;
    }
    let mut failed = None;
    let report = generate(&mut s, &mut sampler, &mut drafter, &prompt, limit, |event| {
        let said = match event {
            Event::Prompt { done, of } if done == of => {
                // It shares a line of the terminal with the text.
                bar.finish_and_clear();
                out.put(std::mem::take(&mut begun))
            }
            Event::Prompt { .. } => Ok(()),
            Event::Text { text, .. } => out.hear(text),
        };
        if let Err(e) = said {
            failed = Some(e);
        }
        if work.asked() || out.stopped || failed.is_some() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    });
    bar.finish_and_clear();
    let report = report?;
    if let Some(e) = failed {
        return Err(e.into());
    }
    out.end(&prompt, sampler.seed(), &report)?;
    if report.end == End::Context {
        tell!("(cut off: the context of {context} tokens is full; -c sets it, --context-shift goes on)");
    }
    tell!("{}", report.lines());
    if report.end == End::Stopped && !out.stopped && work.asked() {
        std::process::exit(stopped_by());
    }
    Ok(())
}

impl Args {
    /// The text to continue, as bytes.
    fn text(&self) -> anyhow::Result<Vec<u8>> {
        let (name, bytes) = match (&self.prompt, &self.file) {
            (Some(p), _) => return Ok(self.escapes.bytes(p)),
            (None, Some(f)) => {
                let name = f.display().to_string();
                let bytes = disk::read(f, disk::MOST_TEXT).with_context(|| name.clone())?;
                (name, bytes)
            }
            (None, None) => {
                if std::io::stdin().is_terminal() {
                    bail!("no prompt: give -p TEXT, -f FILE, or text on stdin");
                }
                ("stdin".into(), disk::read_from(std::io::stdin(), disk::MOST_TEXT).context("stdin")?)
            }
        };
        note_bytes(&name, &bytes);
        Ok(without_line_break(&bytes).to_vec())
    }

    /// Its tokens, or those of a conversation that it begins.
    fn tokens(&self, e: &Engine, text: &[u8]) -> anyhow::Result<Vec<u32>> {
        if !self.chat {
            return Ok(e.tokenizer.encode(text, true, true)?);
        }
        let mut messages: Vec<Message> =
            self.system_prompt.iter().map(|t| Message::new("system", self.escapes.text(t))).collect();
        messages.push(Message::new("user", String::from_utf8_lossy(text)));
        let template = Template::from_gguf(&e.gguf, &e.tokenizer)?;
        Ok(chat::encode(&e.tokenizer, &template, &messages, true)?)
    }

    /// The sampler, of which is told how it samples.
    fn sampler(&self, e: &Engine) -> Sampler {
        let mut params = self.sampling.params(e.recommended.clone());
        let mut told = params.to_string();
        if self.ignore_eos {
            let ends = (0..e.tokenizer.n_vocab() as u32).filter(|&id| e.tokenizer.is_eog(id));
            params.logit_bias.extend(ends.map(|id| (id, f32::NEG_INFINITY)));
            told += " ignore-eos";
        }
        let sampler = Sampler::new(params);
        tell!("seed {} · {told}", sampler.seed());
        sampler
    }
}

/// How many of a prompt's tokens stay: as many as `--keep` says, and the one that marks a text's beginning where the model has
/// such a mark, as in llama.cpp.
fn kept(keep: i64, bos: bool, prompt: usize) -> usize {
    usize::try_from(keep).map_or(prompt, |n| n.saturating_add(bos as usize).min(prompt))
}

/// What comes to stdout.
struct Output {
    out: StdoutLock<'static>,
    terminal: bool,
    json: bool,
    stops: Vec<Vec<u8>>,
    whole: String, // of what was generated
    stopped: bool, // at a word of `stops`
}

impl Output {
    fn new(a: &Args) -> Output {
        let stops = a.reverse_prompt.iter().map(|t| a.escapes.bytes(t)).filter(|t| !t.is_empty()).collect();
        let out = std::io::stdout().lock();
        let terminal = out.is_terminal();
        Output { out, terminal, json: a.json, stops, whole: String::new(), stopped: false }
    }

    /// What a text says must not command the terminal; in a pipe it is itself.
    fn put(&mut self, text: &[u8]) -> std::io::Result<()> {
        match self.terminal {
            true => self.out.write_all(tui::clean(&String::from_utf8_lossy(text)).as_bytes())?,
            false => self.out.write_all(text)?,
        }
        self.out.flush()
    }

    /// More of the text, which may end in it.
    fn hear(&mut self, text: &str) -> std::io::Result<()> {
        if self.stopped {
            return Ok(());
        }
        let before = self.whole.len();
        self.whole.push_str(text);
        if let Some(end) = stop(&self.whole, before, &self.stops) {
            self.whole.truncate(end);
            self.stopped = true;
        }
        if self.json {
            return Ok(());
        }
        let text = self.whole[before..].to_string();
        self.put(text.as_bytes())
    }

    /// The text is over.
    fn end(&mut self, prompt: &[u32], seed: u64, report: &Report) -> std::io::Result<()> {
        if !self.json {
            return writeln!(self.out);
        }
        let end = if self.stopped { "reverse-prompt".to_string() } else { format!("{:?}", report.end).to_lowercase() };
        let result = serde_json::json!({
            "prompt_tokens": prompt, "fed": report.fed, "tokens": report.generated, "text": self.whole, "seed": seed,
            "drafted": report.drafted, "accepted": report.accepted,
            "prompt_seconds": report.prompt_time.as_secs_f64(), "seconds": report.time.as_secs_f64(), "end": end,
        });
        writeln!(self.out, "{result}")
    }
}

/// Where the first of `stops` ends in a text whose part before `from` has none.
fn stop(text: &str, from: usize, stops: &[Vec<u8>]) -> Option<usize> {
    let end = |stop: &Vec<u8>| {
        // It may have begun before.
        let begin = from.saturating_sub(stop.len() - 1);
        let at = text.as_bytes()[begin..].windows(stop.len()).position(|w| w == stop)?;
        Some(begin + at + stop.len())
    };
    // What is no text of whole characters ends nowhere.
    stops.iter().filter_map(end).filter(|&at| text.is_char_boundary(at)).min()
}

#[cfg(test)]
mod tests {
    use super::{kept, stop};

    #[test]
    fn bos_is_kept_beside_what_is_asked_for() {
        for (keep, bos, want) in [
            (0, true, 1),
            (0, false, 0),
            (3, true, 4),
            (3, false, 3),
            (9, true, 10),
            (10, true, 10),
            (i64::MAX, true, 10),
            (-1, true, 10),
            (-1, false, 10),
        ] {
            assert_eq!(kept(keep, bos, 10), want, "{keep} {bos}");
        }
    }

    #[test]
    fn texts_stop_behind_the_first_of_the_words() {
        let stops: Vec<Vec<u8>> = ["\nUser:", "ser", "ä"].map(|s| s.as_bytes().to_vec()).into();
        for (before, fresh, want) in [
            ("a", "b", None),
            ("a\nUs", "er: x", Some(6)),
            ("a", "\nUser: x", Some(6)),
            ("us", "e", None),
            ("x", "yäz", Some(4)),
            ("ser", "x", None),
        ] {
            assert_eq!(stop(&format!("{before}{fresh}"), before.len(), &stops), want, "{before:?} {fresh:?}");
        }
    }
}
