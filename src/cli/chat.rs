//! `oxcart chat`: a conversation, on the full screen of a terminal or line by line.

mod lines;

use super::drafting::DraftArgs;
use super::engine::{EngineArgs, SessionArgs, facts};
use super::kept::KeepArgs;
use super::sampling::SamplingArgs;
use super::text::EscapeArgs;
use crate::catalog;
use crate::chat::history::Conversation;
use crate::config::Config;
use crate::disk;
use crate::tui::{self, Chat, Opening, Scheme};
use anyhow::Context;
use std::io::IsTerminal;
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
    /// Read the chat template from a file instead of the model
    #[arg(long, value_name = "FILE")]
    chat_template_file: Option<PathBuf>,
    /// The first question
    #[arg(short, long, value_name = "TEXT")]
    prompt: Option<String>,
    #[command(flatten)]
    escapes: EscapeArgs,
    /// Maximum tokens per answer
    #[arg(short = 'n', long, visible_alias = "predict", value_name = "N", allow_negative_numbers = true)]
    n_predict: Option<i64>,
    /// Context size in tokens; 0: the training context [default: as in config.toml, else 0]
    #[arg(short, long, value_name = "N", value_parser = super::engine::context)]
    ctx_size: Option<usize>,
    /// With --line: print timings after every answer
    #[arg(long)]
    show_timings: bool,
    #[command(flatten)]
    keep: KeepArgs,
    /// Line by line instead of full screen; the default without a terminal
    #[arg(long)]
    line: bool,
    /// Colours: dark, light, none [default: by NO_COLOR and COLORFGBG]
    #[arg(long, value_name = "THEME", value_parser = theme)]
    theme: Option<Scheme>,
    /// Do not capture the mouse
    #[arg(long)]
    no_mouse: bool,
}

fn theme(name: &str) -> Result<Scheme, String> {
    Scheme::named(name).ok_or_else(|| "expected dark, light or none".into())
}

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
        false => lines::run(a, &config, file, terminal),
    }
}

impl Args {
    /// The source of the chat template that is to be used instead of the model's own, and its file.
    fn template(&self) -> anyhow::Result<Option<(String, String)>> {
        let Some(f) = &self.chat_template_file else { return Ok(None) };
        let name = f.display().to_string();
        let source = disk::read_text(f, disk::MOST_SETTINGS).with_context(|| name.clone())?;
        Ok(Some((source, name)))
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
    let template = a.template()?;
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
