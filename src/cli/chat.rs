//! `oxcart chat`: a conversation, line by line.

use super::engine::{EngineArgs, SessionArgs, facts};
use super::interrupt::interruptible;
use super::sampling::SamplingArgs;
use crate::chat::{self, Message, Template};
use crate::generate::{End, Event, generate};
use crate::sample::Sampler;
use anyhow::Context;
use std::io::{BufRead, IsTerminal, Write};
use std::ops::ControlFlow;
use std::path::PathBuf;

/// Flags as llama-cli has them.
#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    engine: EngineArgs,
    #[command(flatten)]
    session: SessionArgs,
    #[command(flatten)]
    sampling: SamplingArgs,
    /// System prompt
    #[arg(long, visible_alias = "sys", value_name = "TEXT")]
    system_prompt: Option<String>,
    /// Chat template: a file, instead of the model's own
    #[arg(long, value_name = "FILE")]
    chat_template_file: Option<PathBuf>,
    /// The first question
    #[arg(short, long, value_name = "TEXT")]
    prompt: Option<String>,
    /// Tokens of an answer, at most
    #[arg(short = 'n', long, visible_alias = "predict", value_name = "N", allow_negative_numbers = true)]
    n_predict: Option<i64>,
    /// Tokens of context [default: what the model was trained for]
    #[arg(short, long, value_name = "N")]
    ctx_size: Option<usize>,
    /// Print the figures of every answer
    #[arg(long)]
    show_timings: bool,
}

const HELP: &str = "/clear forgets the conversation, /regen answers again, /exit ends; Ctrl-C stops an answer";

pub fn run(a: Args) -> anyhow::Result<()> {
    let e = a.engine.open()?;
    let context = a.ctx_size.unwrap_or(e.model.config.n_context);
    let mut session = e.session(&a.session.options(context, 1))?;
    let template = match &a.chat_template_file {
        Some(f) => {
            let source = std::fs::read_to_string(f).with_context(|| f.display().to_string())?;
            Template::from_source(&source, &e.tokenizer)?
        }
        None => Template::from_gguf(&e.gguf, &e.tokenizer)?,
    };
    let mut sampler = Sampler::new(a.sampling.params(e.recommended.clone()));
    let limit = a.n_predict.and_then(|n| usize::try_from(n).ok());
    let terminal = std::io::stdin().is_terminal() && std::io::stdout().is_terminal();
    eprintln!("{}", facts(&e, context));
    if terminal {
        eprintln!("{HELP}");
    }
    let opening: Vec<Message> = a.system_prompt.iter().map(|t| Message::new("system", t)).collect();
    let mut messages = opening.clone();
    let mut first = a.prompt.clone();
    let mut lines = std::io::stdin().lock().lines();
    loop {
        let line = match first.take() {
            Some(p) => p,
            None => {
                if terminal {
                    print!("\n> ");
                    std::io::stdout().flush()?;
                }
                match lines.next() {
                    Some(line) => line.context("stdin")?,
                    None => break,
                }
            }
        };
        match line.trim() {
            "" => continue,
            "/exit" | "/bye" | "/quit" => break,
            "/help" | "/?" => {
                eprintln!("{HELP}");
                continue;
            }
            "/clear" => {
                messages = opening.clone();
                continue;
            }
            "/regen" => {
                if messages.last().is_none_or(|m| m.role != "assistant") {
                    eprintln!("there is no answer to give again");
                    continue;
                }
                messages.pop();
            }
            text if text.starts_with('/') => {
                eprintln!("no command {text}: {HELP}");
                continue;
            }
            _ => messages.push(Message::new("user", line)),
        }
        let prompt = chat::encode(&e.tokenizer, &template, &messages, true)?;
        let mut answer = String::new();
        let work = interruptible()?;
        let mut failed = None;
        let result = generate(&mut session, &mut sampler, &prompt, limit, |event| {
            if let Event::Text(t) = event {
                answer.push_str(t);
                let mut out = std::io::stdout().lock();
                if let Err(e) = out.write_all(t.as_bytes()).and_then(|()| out.flush()) {
                    failed = Some(e);
                }
            }
            if work.asked() || failed.is_some() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        });
        drop(work);
        if let Some(e) = failed {
            return Err(e.into());
        }
        println!();
        match result {
            Ok(report) => {
                match report.end {
                    End::Stopped => eprintln!("(stopped)"),
                    End::Context => {
                        eprintln!("(the context of {context} tokens is full: /clear starts anew, -c sets it)")
                    }
                    End::Eog | End::Length => (),
                }
                if a.show_timings {
                    eprintln!("{}", report.lines());
                }
                messages.push(Message::new("assistant", answer));
            }
            // The question that did not fit is taken back; the conversation goes on.
            Err(error) => {
                eprintln!("oxcart: {error}");
                messages.pop();
                if !terminal {
                    return Err(error.into());
                }
            }
        }
    }
    Ok(())
}
