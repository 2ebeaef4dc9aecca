//! A chat line by line: in a pipe, with `--line`, on a terminal that can no more.

use super::super::engine::{session, tell_facts};
use super::super::interrupt::{ended, interruptible};
use super::super::kept::Dialogue;
use super::super::text::Lines;
use super::Args;
use crate::catalog;
use crate::chat::history::{Conversation, TurnState};
use crate::chat::{self, Message, Template};
use crate::config::Config;
use crate::draft::Drafter;
use crate::engine::{Engine, Session};
use crate::generate::{End, Event, GenerateError, Report, generate_with};
use crate::sample::Sampler;
use crate::tui;
use anyhow::Context;
use std::io::Write;
use std::ops::ControlFlow;
use std::path::PathBuf;
use std::sync::Arc;

const HELP: &str = "/clear forgets the conversation, /regen answers again, /exit ends; Ctrl-C stops an answer";

/// What a line means.
#[derive(Debug, PartialEq)]
enum Meaning<'a> {
    Nothing,
    End,
    Help,
    Clear,
    Regenerate,
    Unknown(&'a str),
    Question(&'a str),
}

impl Meaning<'_> {
    fn of(line: &str, terminal: bool) -> Meaning<'_> {
        match line.trim() {
            "" => Meaning::Nothing,
            "/exit" | "/bye" | "/quit" => Meaning::End,
            "/help" | "/?" => Meaning::Help,
            "/clear" => Meaning::Clear,
            "/regen" => Meaning::Regenerate,
            text if text.starts_with("//") => Meaning::Question(&text[1..]),
            text => {
                // A path is no command, and in a pipe, where nobody can say it again, only a word alone is.
                let (word, rest) = text.split_once(char::is_whitespace).unwrap_or((text, ""));
                let name = word.strip_prefix('/').unwrap_or_default();
                match !name.is_empty() && name.bytes().all(|b| b.is_ascii_alphabetic()) && (terminal || rest.is_empty())
                {
                    true => Meaning::Unknown(word),
                    false => Meaning::Question(line),
                }
            }
        }
    }
}

/// Asks and answers until stdin ends.
pub(super) fn run(a: Args, config: &Config, file: Option<PathBuf>, terminal: bool) -> anyhow::Result<()> {
    let file = file.map(|p| Conversation::open(&p)).transpose()?;
    let engine = a.engine.open_aside()?;
    let context = a.ctx_size.or(config.ctx_size).filter(|&n| n > 0).unwrap_or(engine.model.config.n_context);
    let options = a.session.options(context, 1);
    let session = session(&engine, &options)?;
    let drafter = a.draft.drafter(&engine, &a.engine, &options)?;
    let template = match a.template()? {
        Some((source, origin)) => Template::from_source(&source, origin, &engine.tokenizer)?,
        None => Template::from_gguf(&engine.gguf, &engine.tokenizer)?,
    };
    let sampler = Sampler::new(a.sampling.params(config.sampling.over(engine.recommended.clone())));
    let limit = a.n_predict.and_then(|n| usize::try_from(n).ok());
    tell_facts(&engine, context);
    if terminal {
        tell!("{HELP}");
    }
    let opening: Vec<Message> = a.system_prompt.iter().map(|t| Message::new("system", t)).collect();
    let keep = a.keep.keeps(terminal);
    let mut talk = Dialogue::new(opening, file, keep, config, catalog::lasting(a.engine.model.as_deref()))?;
    let timings = a.show_timings;
    let mut answers =
        Answers { engine, session, drafter, template, sampler, context, limit, terminal, timings, left_out: 0 };
    let mut first = a.prompt.clone();
    let mut lines = Lines::new("stdin", std::io::stdin().lock());
    loop {
        let line = match first.take() {
            Some(p) => p,
            None => {
                if terminal {
                    say_part!("\n> ")?;
                    std::io::stdout().flush()?;
                }
                match lines.next().context("stdin")? {
                    Some(line) => line,
                    None => return Ok(()),
                }
            }
        };
        match Meaning::of(&line, terminal) {
            Meaning::Nothing => {}
            Meaning::End => return Ok(()),
            Meaning::Help => tell!("{HELP}"),
            Meaning::Unknown(word) => tell!("no command {word}: {HELP}; // sends a line that begins with /"),
            Meaning::Clear => {
                talk.clear();
                answers.left_out = 0;
            }
            Meaning::Regenerate => match talk.reopen() {
                true => answers.answer(&mut talk)?,
                false => tell!("there is no answer to regenerate"),
            },
            Meaning::Question(text) => {
                talk.ask(text.to_string())?;
                answers.answer(&mut talk)?;
            }
        }
        if let Some(status) = ended() {
            drop(talk);
            std::process::exit(status);
        }
    }
}

/// Who answers.
struct Answers {
    engine: Arc<Engine>,
    session: Session,
    drafter: Drafter,
    template: Template,
    sampler: Sampler,
    context: usize,
    limit: Option<usize>,
    terminal: bool,
    timings: bool,
    left_out: usize, // turns that the model did not read the last time
}

impl Answers {
    /// Answers the last question, on stdout. On a terminal the conversation goes on where there is no answer.
    fn answer(&mut self, talk: &mut Dialogue) -> anyhow::Result<()> {
        let mut answer = String::new();
        let Err(error) = self.generate(talk, &mut answer)? else { return Ok(()) };
        let too_much = matches!(error.downcast_ref(), Some(GenerateError::TooLong { .. } | GenerateError::Empty));
        match too_much {
            true => talk.take_back()?,
            false if answer.is_empty() => {}
            false => talk.answered(answer, TurnState::Partial)?,
        }
        if !self.terminal {
            return Err(error);
        }
        tell!("oxcart: {error:#}");
        if !too_much {
            tell!("the question stands: /regen tries again");
        }
        Ok(())
    }

    /// The inner error is one of the question and this answer; the outer one, of the disk or of stdout, is the end.
    fn generate(&mut self, talk: &mut Dialogue, answer: &mut String) -> anyhow::Result<anyhow::Result<()>> {
        let (context, terminal) = (self.context, self.terminal);
        let encode = |kept: &[Message]| chat::encode(&self.engine.tokenizer, &self.template, kept, true);
        let (prompt, left_out) = match chat::within(&talk.turns, context, self.left_out, encode, Vec::len) {
            Ok(fits) => fits,
            Err(error) => return Ok(Err(error.into())),
        };
        if left_out != self.left_out {
            tell!("(the context of {context} tokens is full: the {left_out} oldest messages are not read any more)");
        }
        self.left_out = left_out;
        talk.restore(&mut self.session, &prompt);
        let mut failed: Option<anyhow::Error> = None;
        let work = interruptible()?;
        let listen = |session: &Session, event: Event<'_>| {
            if let Event::Text { text, .. } = event
                && !text.is_empty()
            {
                answer.push_str(text);
                // On disk before it is seen.
                let kept = talk.hear(text);
                let mut out = std::io::stdout().lock();
                let text = if terminal { tui::clean(text) } else { text.into() };
                let shown = out.write_all(text.as_bytes()).and_then(|()| out.flush());
                failed = kept.and(shown.map_err(Into::into)).err().or(failed.take());
            }
            talk.save(session, false);
            if work.asked() || failed.is_some() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        };
        let report =
            generate_with(&mut self.session, &mut self.sampler, &mut self.drafter, &prompt, self.limit, listen);
        drop(work);
        if let Some(e) = failed {
            return Err(e);
        }
        say!()?;
        match report {
            Ok(report) => self.ended(talk, std::mem::take(answer), &report).map(Ok),
            Err(error) => Ok(Err(error.into())),
        }
    }

    /// Keeps an answer that came to its end, and says what end that was.
    fn ended(&mut self, talk: &mut Dialogue, answer: String, report: &Report) -> anyhow::Result<()> {
        let state = match report.end {
            End::Eog => TurnState::Whole,
            End::Stopped => TurnState::Stopped,
            End::Context | End::Length => TurnState::Partial,
        };
        match report.end {
            End::Stopped => tell!("(stopped)"),
            End::Context => tell!("(cut off: the context of {} tokens is full, -c sets it)", self.context),
            End::Eog | End::Length => {}
        }
        if self.timings {
            tell!("{}", report.lines());
        }
        // Stopped before the first word, the question stands open.
        if !answer.is_empty() || state != TurnState::Stopped {
            talk.answered(answer, state)?;
        }
        talk.save(&self.session, true);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::Meaning::{self, *};

    #[test]
    fn lines_are_commands_or_questions() {
        for (line, on_terminal, in_pipe) in [
            (" ", Nothing, Nothing),
            ("/exit ", End, End),
            ("/regen", Regenerate, Regenerate),
            ("/nonsense", Unknown("/nonsense"), Unknown("/nonsense")),
            ("/stop it now", Unknown("/stop"), Question("/stop it now")),
            ("/etc/passwd is what?", Question("/etc/passwd is what?"), Question("/etc/passwd is what?")),
            ("//exit", Question("/exit"), Question("/exit")),
            ("why?", Question("why?"), Question("why?")),
        ] {
            assert_eq!((Meaning::of(line, true), Meaning::of(line, false)), (on_terminal, in_pipe), "{line}");
        }
    }
}
