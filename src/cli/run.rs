//! `oxcart run`: continues a text. Text to stdout, figures to stderr.

use super::drafting::DraftArgs;
use super::engine::{EngineArgs, SessionArgs, facts, session};
use super::interrupt::interruptible;
use super::progress::reading;
use super::sampling::SamplingArgs;
use crate::chat::{self, Message, Template};
use crate::disk;
use crate::generate::{Event, generate};
use crate::sample::Sampler;
use anyhow::{Context, bail};
use std::io::{IsTerminal, Read, Write};
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
    /// A file with the text; without it and -p, stdin
    #[arg(short, long, value_name = "FILE")]
    file: Option<PathBuf>,
    /// Take the text as a question: put it into the model's chat template
    #[arg(long, visible_alias = "cnv")]
    chat: bool,
    /// System prompt, with --chat
    #[arg(long, visible_alias = "sys", value_name = "TEXT", requires = "chat")]
    system_prompt: Option<String>,
    /// Generate at most N tokens [default: until the model ends or the context is full]
    #[arg(short = 'n', long, visible_alias = "predict", value_name = "N", allow_negative_numbers = true)]
    n_predict: Option<i64>,
    /// Tokens of context; 0: what the model was trained for, as without it
    #[arg(short, long, value_name = "N", value_parser = super::engine::context)]
    ctx_size: Option<usize>,
    /// When the context is full, forget half of it and go on, the text that is left moved up; otherwise generation ends
    #[arg(long)]
    context_shift: bool,
    /// With --context-shift: tokens of the prompt, from the first on, that are never forgotten; -1 for all
    #[arg(long, value_name = "N", allow_negative_numbers = true, default_value_t = 0, requires = "context_shift")]
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
        (Some(p), _) => p.clone(),
        (None, Some(f)) => disk::read_text(f, disk::MOST_TEXT).with_context(|| f.display().to_string())?,
        (None, None) => {
            if std::io::stdin().is_terminal() {
                bail!("no prompt: give -p TEXT, -f FILE, or text on stdin");
            }
            let mut text = String::new();
            std::io::stdin().read_to_string(&mut text).context("stdin")?;
            text
        }
    };
    let e = a.engine.open()?;
    let context = a.ctx_size.filter(|&n| n > 0).unwrap_or(e.model.config.n_context);
    let options = a.session.options(context, 1);
    let mut s = session(&e, &options)?;
    let mut drafter = a.draft.drafter(&e, &a.engine, &options)?;
    tell!("{}", facts(&e, context));
    let prompt = if a.chat {
        let mut messages: Vec<Message> = a.system_prompt.iter().map(|t| Message::new("system", t)).collect();
        messages.push(Message::new("user", &text));
        let template = Template::from_gguf(&e.gguf, &e.tokenizer)?;
        chat::encode(&e.tokenizer, &template, &messages, true)?
    } else {
        e.tokenizer.encode(text.as_bytes(), true, true)?
    };
    if a.context_shift {
        // A text's beginning is marked by its first token, where the model has such a mark.
        let least = e.tokenizer.add_bos() as usize;
        s.shift_when_full(usize::try_from(a.keep).unwrap_or(usize::MAX).max(least).min(prompt.len()));
    }
    let mut sampler = Sampler::new(a.sampling.params(e.recommended.clone()));
    let limit = a.n_predict.and_then(|n| usize::try_from(n).ok());
    let work = interruptible()?;
    let (mut out, mut whole, mut failed) = (std::io::stdout().lock(), String::new(), None);
    let mut say = |t: &str| out.write_all(t.as_bytes()).and_then(|()| out.flush());
    let mut begun = if a.json || a.chat || a.no_display_prompt { "" } else { &text };
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
            Event::Text { text: t, .. } => {
                whole.push_str(t);
                if a.json { Ok(()) } else { say(t) }
            }
        };
        if let Err(e) = said {
            failed = Some(e);
        }
        if work.asked() || failed.is_some() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
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
            "end": format!("{:?}", report.end).to_lowercase(),
        });
        writeln!(out, "{result}")?;
    } else {
        writeln!(out)?;
    }
    tell!("{}", report.lines());
    Ok(())
}
