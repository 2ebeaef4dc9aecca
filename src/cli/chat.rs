//! `oxcart chat`: a conversation, on the full screen of a terminal or line by line.

use super::drafting::DraftArgs;
use super::engine::{EngineArgs, SessionArgs, facts, session, tell_facts};
use super::interrupt::{ended, interruptible};
use super::kept::{Dialogue, KeepArgs, lasting_name};
use super::sampling::SamplingArgs;
use super::text::EscapeArgs;
use crate::catalog;
use crate::chat::history::{Conversation, TurnState};
use crate::chat::{self, Message, Template};
use crate::config::Config;
use crate::disk;
use crate::generate::{End, Event, generate_with};
use crate::sample::Sampler;
use crate::tui::{self, Chat, Opening, Scheme};
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
    #[command(flatten)]
    draft: DraftArgs,
    /// System prompt
    #[arg(long, visible_alias = "sys", value_name = "TEXT")]
    system_prompt: Option<String>,
    /// Chat template: a file, instead of the model's own
    #[arg(long, value_name = "FILE")]
    chat_template_file: Option<PathBuf>,
    /// The first question
    #[arg(short, long, value_name = "TEXT")]
    prompt: Option<String>,
    #[command(flatten)]
    escapes: EscapeArgs,
    /// Tokens of an answer, at most
    #[arg(short = 'n', long, visible_alias = "predict", value_name = "N", allow_negative_numbers = true)]
    n_predict: Option<i64>,
    /// Tokens of context; 0: what the model was trained for [default: config.toml's, or that]
    #[arg(short, long, value_name = "N", value_parser = super::engine::context)]
    ctx_size: Option<usize>,
    /// Print the figures of every answer, with --line
    #[arg(long)]
    show_timings: bool,
    #[command(flatten)]
    keep: KeepArgs,
    /// Line by line instead of full screen; the default without a terminal
    #[arg(long)]
    line: bool,
    /// Colours: dark, light, none [default: as NO_COLOR and COLORFGBG say]
    #[arg(long, value_name = "THEME", value_parser = theme)]
    theme: Option<Scheme>,
    /// Leave the mouse to the terminal
    #[arg(long)]
    no_mouse: bool,
}

fn theme(name: &str) -> Result<Scheme, String> {
    Scheme::named(name).ok_or_else(|| "expected dark, light or none".into())
}

const HELP: &str = "/clear forgets the conversation, /regen answers again, /exit ends; Ctrl-C stops an answer";

pub fn run(mut a: Args) -> anyhow::Result<()> {
    let config = Config::load()?;
    let terminal = std::io::stdin().is_terminal() && std::io::stdout().is_terminal();
    let file = match a.keep.keeps(terminal) {
        true => a.keep.file(&config.conversations_dir()?)?,
        false => None,
    };
    // A conversation goes on with its own model, unless another one is named.
    let begun = file.as_ref().map(|p| Conversation::read(p)).transpose()?;
    let own_model = begun.map(|c| c.model().to_string()).filter(|m| !m.is_empty());
    a.engine.model = a.engine.model.or(own_model).or_else(|| config.model.clone());
    a.engine.threads = a.engine.threads.or(config.threads);
    a.draft.model_draft = a.draft.model_draft.or_else(|| config.model_draft.clone());
    a.prompt = a.prompt.map(|t| a.escapes.text(&t));
    a.system_prompt = a.system_prompt.map(|t| a.escapes.text(&t)).or_else(|| config.system_prompt.clone());
    let dumb = std::env::var_os("TERM").is_some_and(|t| t == "dumb");
    match terminal && !a.line && !dumb {
        true => screen(a, &config, file),
        false => lines(a, &config, file, terminal),
    }
}

/// On the full screen.
fn screen(a: Args, config: &Config, resume: Option<PathBuf>) -> anyhow::Result<()> {
    // A conversation that another program has open is told of before the screen is taken.
    resume.as_ref().map(|p| Conversation::open(p)).transpose()?;
    // What has to be fetched is announced and fetched as well.
    catalog::resolve(a.engine.model.as_deref())?;
    if let Some(small) = a.draft.model() {
        catalog::resolve(Some(small))?;
    }
    let template = match &a.chat_template_file {
        Some(f) => Some(disk::read_text(f, disk::MOST_SETTINGS).with_context(|| f.display().to_string())?),
        None => None,
    };
    let scheme = a.theme.or_else(|| Scheme::named(config.theme.as_ref()?));
    let keep = a.keep.keeps(true);
    let (sampling, configured) = (a.sampling.clone(), config.sampling.clone());
    tui::run(Chat {
        opening: Opening {
            engine: a.engine.options()?,
            session: a.session.options(0, 1),
            context: a.ctx_size.or(config.ctx_size).filter(|&n| n > 0),
            template,
            draft_max: a.draft.draft_max,
            model_draft: a.draft.model().map(str::to_string),
            describe: facts,
            kv_limit: if keep { config.kv_cache_bytes() } else { 0 },
        },
        model: a.engine.model,
        set_params: Box::new(move |base| sampling.params(configured.over(base))),
        system: a.system_prompt.unwrap_or_default(),
        prompt: a.prompt,
        limit: a.n_predict.and_then(|n| usize::try_from(n).ok()),
        dir: if keep { Some(config.conversations_dir()?) } else { None },
        resume,
        scheme,
        mouse: !a.no_mouse,
    })?;
    Ok(())
}

/// Whether a line that is no command was meant as one: a path is not, and in a pipe, where nobody can say it again, only a
/// word alone is.
fn unknown_command(line: &str, terminal: bool) -> bool {
    let (word, rest) = line.split_once(char::is_whitespace).unwrap_or((line, ""));
    let name = word.strip_prefix('/').unwrap_or_default();
    !name.is_empty() && name.bytes().all(|b| b.is_ascii_alphabetic()) && (terminal || rest.trim().is_empty())
}

/// Line by line.
fn lines(a: Args, config: &Config, file: Option<PathBuf>, terminal: bool) -> anyhow::Result<()> {
    let file = file.map(|p| Conversation::open(&p)).transpose()?;
    let e = a.engine.open_aside()?;
    let context = a.ctx_size.or(config.ctx_size).filter(|&n| n > 0).unwrap_or(e.model.config.n_context);
    let options = a.session.options(context, 1);
    let mut session = session(&e, &options)?;
    let mut drafter = a.draft.drafter(&e, &a.engine, &options)?;
    let template = match &a.chat_template_file {
        Some(f) => {
            let named = || f.display().to_string();
            let source = disk::read_text(f, disk::MOST_SETTINGS).with_context(named)?;
            Template::from_source(&source, &e.tokenizer).with_context(named)?.of(named())
        }
        None => Template::from_gguf(&e.gguf, &e.tokenizer)?,
    };
    let mut sampler = Sampler::new(a.sampling.params(config.sampling.over(e.recommended.clone())));
    let limit = a.n_predict.and_then(|n| usize::try_from(n).ok());
    tell_facts(&e, context);
    if terminal {
        tell!("{HELP}");
    }
    let opening: Vec<Message> = a.system_prompt.iter().map(|t| Message::new("system", t)).collect();
    let keep = a.keep.keeps(terminal);
    let mut talk = Dialogue::new(opening, file, keep, config, lasting_name(a.engine.model.as_deref()))?;
    let mut left_out = 0;
    let mut first = a.prompt.clone();
    let mut lines = std::io::stdin().lock().lines();
    loop {
        let line = match first.take() {
            Some(p) => p,
            None => {
                if terminal {
                    say_part!("\n> ")?;
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
                tell!("{HELP}");
                continue;
            }
            "/clear" => {
                talk.clear();
                left_out = 0;
                continue;
            }
            "/regen" => {
                if !talk.reopen() {
                    tell!("there is no answer to give again");
                    continue;
                }
            }
            text if unknown_command(text, terminal) => {
                tell!("no command {text}: {HELP}; // sends a line that begins with /");
                continue;
            }
            text if text.starts_with("//") => talk.ask(line.replacen("//", "/", 1))?,
            _ => talk.ask(line)?,
        }
        let encode = |kept: &[chat::Message]| chat::encode(&e.tokenizer, &template, kept, true);
        let before = left_out;
        let prompt;
        (prompt, left_out) = chat::within(&talk.turns, context, left_out, encode, Vec::len)?;
        if before != left_out {
            tell!("(the context of {context} tokens is full: the {left_out} oldest messages are not read any more)");
        }
        talk.restore(&mut session, &prompt);
        let mut answer = String::new();
        let work = interruptible()?;
        let mut failed: Option<anyhow::Error> = None;
        let result = generate_with(&mut session, &mut sampler, &mut drafter, &prompt, limit, |session, event| {
            if let Event::Text { text: t, .. } = event {
                answer.push_str(t);
                // On disk before it is seen.
                let kept = talk.hear(t);
                let mut out = std::io::stdout().lock();
                let t = if terminal { tui::clean(t) } else { t.into() };
                let shown = out.write_all(t.as_bytes()).and_then(|()| out.flush());
                failed = kept.and(shown.map_err(Into::into)).err().or(failed.take());
            }
            talk.save(session, false);
            if work.asked() || failed.is_some() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        });
        drop(work);
        if let Some(e) = failed {
            return Err(e);
        }
        say!()?;
        let ended = ended();
        match result {
            Ok(report) => {
                match report.end {
                    End::Stopped => tell!("(stopped)"),
                    End::Context => {
                        tell!("(cut off: the context of {context} tokens is full, -c sets it)")
                    }
                    End::Eog | End::Length => (),
                }
                if a.show_timings {
                    tell!("{}", report.lines());
                }
                let state = match report.end {
                    End::Eog => TurnState::Whole,
                    End::Stopped => TurnState::Stopped,
                    End::Context | End::Length => TurnState::Partial,
                };
                // Stopped before the first word, the question stands open.
                if !answer.is_empty() || state != TurnState::Stopped {
                    talk.answered(answer, state)?;
                }
                talk.save(&session, true);
                if let Some(status) = ended {
                    drop(talk);
                    std::process::exit(status);
                }
            }
            // The question that did not fit is taken back; the conversation goes on.
            Err(error) => {
                talk.take_back()?;
                if !terminal {
                    return Err(error.into());
                }
                tell!("oxcart: {error}");
            }
        }
    }
    Ok(())
}
