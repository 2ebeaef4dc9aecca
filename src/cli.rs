//! The command line. A verb is a line in [`Verb`] and a file in `cli/`: its flags (`Args`) and what it does (`run`).
//!
//! Results go to stdout, talk to stderr. Exit status: 0 done, 1 failed, 2 wrong usage, 128 + n stopped by signal n (130 by
//! Ctrl-C).

mod bench;
mod chat;
mod compare;
mod drafting;
mod engine;
mod flags;
mod imatrix;
mod inspect;
mod interrupt;
mod kept;
mod list;
mod perplexity;
mod plan;
mod progress;
mod pull;
mod quantize;
mod run;
mod sampling;
mod sessions;
mod text;
mod tokenize;
mod units;

use clap::error::ErrorKind;
use clap::{CommandFactory, Parser, Subcommand};
use std::process::ExitCode;

#[derive(Parser)]
#[command(name = "oxcart", version, about, arg_required_else_help = true, args_override_self = true)]
struct Cli {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// Talk with a model
    Chat(chat::Args),
    /// Manage saved conversations: list, show, export, rename, delete
    Sessions(sessions::Args),
    /// Continue a text
    Run(run::Args),
    /// Say whether a model fits this machine, and how fast it will be
    Plan(plan::Args),
    /// Measure how well a model predicts a text
    Perplexity(perplexity::Args),
    /// Compare models on a text: size, perplexity, divergence, speed
    Compare(compare::Args),
    /// Measure speed, and compare it with what this machine can do
    Bench(bench::Args),
    /// Show what is in a GGUF: metadata, tensors, types, bits per weight, memory needed
    Inspect(inspect::Args),
    /// Show the token ids of a text
    Tokenize(tokenize::Args),
    /// Measure which weights matter, on a text, for `quantize --imatrix`
    Imatrix(imatrix::Args),
    /// Make a smaller model from a larger one
    Quantize(quantize::Args),
    /// Fetch a model from the catalogue
    Pull(pull::Args),
    /// List the models in the catalogue and which of them are on this machine
    List(list::Args),
}

/// Runs the program on the process's arguments.
pub fn main() -> ExitCode {
    let watched = crate::mmap::on_fault(|problem| {
        crate::disk::remove_unfinished();
        crate::tui::give_back_terminal();
        tell!("oxcart: {problem}");
        std::process::exit(1);
    });
    if let Err(e) = watched {
        tell!("if a mapped file is truncated, the program will die without a message: {e}");
    }
    let line = flags::read(&Cli::command(), std::env::args_os()).unwrap_or_else(|e| usage_error(&e));
    if !line.idle.is_empty() {
        tell!("ignored, as it changes nothing here: {}", line.idle.join(" "));
    }
    let result = match Cli::parse_from(line.words).verb {
        Verb::Chat(a) => chat::run(a),
        Verb::Sessions(a) => sessions::run(a),
        Verb::Run(a) => run::run(a),
        Verb::Plan(a) => plan::run(a),
        Verb::Perplexity(a) => perplexity::run(a),
        Verb::Compare(a) => compare::run(a),
        Verb::Bench(a) => bench::run(a),
        Verb::Inspect(a) => inspect::run(a),
        Verb::Tokenize(a) => tokenize::run(a),
        Verb::Imatrix(a) => imatrix::run(a),
        Verb::Quantize(a) => quantize::run(a),
        Verb::Pull(a) => pull::run(a),
        Verb::List(a) => list::run(a),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) if is_broken_pipe(&e) => ExitCode::SUCCESS,
        Err(e) => {
            tell!("oxcart: {e:#}");
            ExitCode::FAILURE
        }
    }
}

/// Ends the program as clap does where words are wrong.
fn usage_error(problem: &str) -> ! {
    clap::Error::raw(ErrorKind::ValueValidation, format!("{problem}\n\nFor more information, try '--help'.\n")).exit()
}

/// Whether the reader of stdout went away (`oxcart list | head -1`): no failure of ours.
fn is_broken_pipe(e: &anyhow::Error) -> bool {
    e.chain().any(|c| c.downcast_ref::<std::io::Error>().is_some_and(|e| e.kind() == std::io::ErrorKind::BrokenPipe))
}
