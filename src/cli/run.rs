//! `oxcart run`: continues a text. Text to stdout, figures to stderr.

use super::drafting::DraftArgs;
use super::engine::{EngineArgs, SessionArgs, session, tell_facts};
use super::interrupt::interruptible;
use super::progress::reading;
use super::sampling::SamplingArgs;
use super::text::{EscapeArgs, note_bytes, without_line_break};
use crate::chat::{self, Message, Template};
use crate::disk;
use crate::generate::{End, Event, fits, generate};
use crate::sample::Sampler;
use anyhow::{Context, bail};
use std::io::{IsTerminal, Write};
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
    /// With --context-shift: number of initial prompt tokens kept when the context shifts; -1 for all
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
    let text = match (&a.prompt, &a.file) {
        (Some(p), _) => a.escapes.bytes(p),
        (None, Some(f)) => {
            let name = f.display().to_string();
            let bytes = disk::read(f, disk::MOST_TEXT).with_context(|| name.clone())?;
            note_bytes(&name, &bytes);
            without_line_break(&bytes).to_vec()
        }
        (None, None) => {
            if std::io::stdin().is_terminal() {
                bail!("no prompt: give -p TEXT, -f FILE, or text on stdin");
            }
            let bytes = disk::read_from(std::io::stdin(), disk::MOST_TEXT).context("stdin")?;
            note_bytes("stdin", &bytes);
            without_line_break(&bytes).to_vec()
        }
    };
    let e = a.engine.open()?;
    let context = a.ctx_size.filter(|&n| n > 0).unwrap_or(e.model.config.n_context);
    let options = a.session.options(context, 1);
    let mut s = session(&e, &options)?;
    let mut drafter = a.draft.drafter(&e, &a.engine, &options)?;
    tell_facts(&e, context);
    let prompt = if a.chat {
        let mut messages: Vec<Message> =
            a.system_prompt.iter().map(|t| Message::new("system", a.escapes.text(t))).collect();
        messages.push(Message::new("user", String::from_utf8_lossy(&text)));
        let template = Template::from_gguf(&e.gguf, &e.tokenizer)?;
        chat::encode(&e.tokenizer, &template, &messages, true)?
    } else {
        e.tokenizer.encode(&text, true, true)?
    };
    // Before it is printed.
    fits(&s, &prompt)?;
    if a.context_shift {
        // A text's beginning is marked by its first token, where the model has such a mark.
        let least = e.tokenizer.add_bos() as usize;
        s.shift_when_full(usize::try_from(a.keep).unwrap_or(usize::MAX).max(least).min(prompt.len()));
    }
    let mut params = a.sampling.params(e.recommended.clone());
    let mut told = params.to_string();
    if a.ignore_eos {
        let ends = (0..e.tokenizer.n_vocab() as u32).filter(|&id| e.tokenizer.is_eog(id));
        params.logit_bias.extend(ends.map(|id| (id, f32::NEG_INFINITY)));
        told += " ignore-eos";
    }
    let mut sampler = Sampler::new(params);
    tell!("seed {} · {told}", sampler.seed());
    let stops: Vec<Vec<u8>> = a.reverse_prompt.iter().map(|t| a.escapes.bytes(t)).filter(|t| !t.is_empty()).collect();
    let limit = a.n_predict.and_then(|n| usize::try_from(n).ok());
    let work = interruptible()?;
    let (mut out, mut whole, mut stopped, mut failed) = (std::io::stdout().lock(), String::new(), false, None);
    let mut say = |t: &[u8]| out.write_all(t).and_then(|()| out.flush());
    let mut begun: &[u8] = if a.json || a.chat || a.no_display_prompt { b"" } else { &text };
    let bar = reading(&mut s, prompt.len());
    if bar.is_hidden() {
        say(std::mem::take(&mut begun))?;
    }
    let report = generate(&mut s, &mut sampler, &mut drafter, &prompt, limit, |event| {
        let said = match event {
            Event::Prompt { done, of } if done == of => {
                // It shares a line of the terminal with the text.
                bar.finish_and_clear();
                say(std::mem::take(&mut begun))
            }
            Event::Prompt { .. } => Ok(()),
            Event::Text { .. } if stopped => Ok(()),
            Event::Text { text: t, .. } => {
                let before = whole.len();
                whole.push_str(t);
                if let Some(end) = stop(&whole, before, &stops) {
                    whole.truncate(end);
                    stopped = true;
                }
                if a.json { Ok(()) } else { say(&whole.as_bytes()[before..]) }
            }
        };
        if let Err(e) = said {
            failed = Some(e);
        }
        if work.asked() || stopped || failed.is_some() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    });
    bar.finish_and_clear();
    let report = report?;
    if let Some(e) = failed {
        return Err(e.into());
    }
    if a.json {
        let result = serde_json::json!({
            "prompt_tokens": prompt, "tokens": report.generated, "text": whole, "seed": sampler.seed(),
            "drafted": report.drafted, "accepted": report.accepted,
            "prompt_seconds": report.prompt_time.as_secs_f64(), "seconds": report.time.as_secs_f64(),
            "end": if stopped { "reverse-prompt".to_string() } else { format!("{:?}", report.end).to_lowercase() },
        });
        writeln!(out, "{result}")?;
    } else {
        writeln!(out)?;
    }
    if report.end == End::Context {
        tell!("(cut off: the context of {context} tokens is full; -c sets it, --context-shift goes on)");
    }
    tell!("{}", report.lines());
    Ok(())
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
    use super::stop;

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
