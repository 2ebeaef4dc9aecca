//! Generation: the one place where session, sampler and tokenizer meet.

use crate::draft::Drafter;
use crate::engine::{EngineError, Session};
use crate::model::Batch;
use crate::sample::Sampler;
use std::ops::ControlFlow;
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// Why a generation ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum End {
    /// The model ended its text or turn.
    Eog,
    /// As many tokens as were asked for.
    Length,
    /// The context is full.
    Context,
    /// The listener had enough.
    Stopped,
}

/// What a generation did and took.
#[derive(Clone, Debug)]
pub struct Report {
    /// Tokens of the prompt that the cache held already.
    pub reused: usize,
    /// Tokens of the prompt that were fed.
    pub fed: usize,
    /// Time for that.
    pub prompt_time: Duration,
    /// Tokens generated, the one that ended it included.
    pub generated: Vec<u32>,
    /// Tokens that were guessed and fed.
    pub drafted: usize,
    /// Of those, the ones that were right.
    pub accepted: usize,
    /// Passes that it took, without the prompt's.
    pub passes: usize,
    /// Time for all of them but the first, which came with the prompt.
    pub time: Duration,
    /// Why it ended.
    pub end: End,
}

/// What happens, as it happens.
pub enum Event<'a> {
    /// So many of so many tokens of the prompt are fed.
    Prompt {
        /// Tokens fed.
        done: usize,
        /// Tokens to feed.
        of: usize,
    },
    /// A token more, and at the end what is left of a character.
    Text {
        /// Whole characters; none of a control token, or where a token begins a character.
        text: &'a str,
        /// Tokens so far.
        tokens: usize,
        /// Passes that were made since the prompt's: as often were the weights read.
        passes: usize,
    },
}

/// A prompt that leaves no room.
#[derive(Debug, thiserror::Error)]
pub enum GenerateError {
    /// The model.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// Longer than the context.
    #[error("the prompt has {found} tokens, the context {context} (-c sets it)")]
    TooLong {
        /// Tokens of the prompt.
        found: usize,
        /// Positions.
        context: usize,
    },
    /// A model that says nothing.
    #[error("{}: logits that are NaN or infinite behind {behind} tokens: its weights are damaged or too large", file.display())]
    NotFinite {
        /// The model.
        file: PathBuf,
        /// Tokens of the sequence.
        behind: usize,
    },
    /// Nothing to continue.
    #[error("the prompt has no tokens")]
    Empty,
}

/// Whether a prompt has tokens, and leaves room for one more.
pub fn fits(s: &Session, prompt: &[u32]) -> Result<(), GenerateError> {
    match prompt.len() {
        0 => Err(GenerateError::Empty),
        found if found >= s.context() => Err(GenerateError::TooLong { found, context: s.context() }),
        _ => Ok(()),
    }
}

/// Continues `prompt` (all tokens of sequence 0, those already in the cache included) by at most `limit` tokens.
/// `drafter` makes it faster and changes nothing else. `listen` hears what happens and may break off.
pub fn generate(
    s: &mut Session,
    sampler: &mut Sampler,
    drafter: &mut Drafter,
    prompt: &[u32],
    limit: Option<usize>,
    mut listen: impl FnMut(Event<'_>) -> ControlFlow<()>,
) -> Result<Report, GenerateError> {
    generate_with(s, sampler, drafter, prompt, limit, |_, event| listen(event))
}

/// The same for a listener that looks into the session as it grows, to save what it remembers.
pub fn generate_with(
    s: &mut Session,
    sampler: &mut Sampler,
    drafter: &mut Drafter,
    prompt: &[u32],
    limit: Option<usize>,
    mut listen: impl FnMut(&Session, Event<'_>) -> ControlFlow<()>,
) -> Result<Report, GenerateError> {
    fits(s, prompt)?;
    let engine = s.engine().clone();
    let reused = s.reuse(0, prompt);
    let of = prompt.len() - reused;
    let mut report = Report {
        reused,
        fed: 0,
        prompt_time: Duration::ZERO,
        generated: Vec::new(),
        drafted: 0,
        accepted: 0,
        passes: 0,
        time: Duration::ZERO,
        end: End::Stopped,
    };
    sampler.reset_recent(prompt);

    let start = Instant::now();
    let mut logits = Vec::new();
    for part in prompt[reused..].chunks(s.walk()) {
        let at = s.len(0);
        logits = match s.forward(&Batch::of(part, at, 0)) {
            Err(EngineError::Stopped) => {
                report.prompt_time = start.elapsed();
                return Ok(report);
            }
            logits => logits?,
        };
        report.fed = s.len(0) - reused;
        if listen(s, Event::Prompt { done: report.fed, of }).is_break() {
            report.prompt_time = start.elapsed();
            return Ok(report);
        }
    }
    report.prompt_time = start.elapsed();

    let start = Instant::now();
    let mut text = engine.tokenizer.decoder();
    let together = engine.alike();
    drafter.begin(prompt);
    // What was fed last: a token that is certain (the prompt's last at first), guesses behind it, and the logits after each.
    let (mut guesses, mut rows) = (Vec::new(), vec![logits]);
    report.end = 'text: loop {
        let left = limit.map_or(usize::MAX, |l| l.saturating_sub(report.generated.len()));
        if left == 0 {
            break End::Length;
        }
        // As far as the guesses are what the model says, their logits hold.
        let (certain, mut ids) = (s.len(0) - guesses.len(), Vec::new());
        for (i, row) in rows.iter().enumerate().take(left) {
            if !row.iter().all(|l| l.is_finite()) {
                let (file, behind) = (engine.gguf.path().to_path_buf(), certain + i);
                return Err(GenerateError::NotFinite { file, behind });
            }
            let id = sampler.sample(row);
            sampler.accept(id);
            drafter.told(id);
            ids.push(id);
            let right = guesses.get(i) == Some(&id);
            report.accepted += usize::from(right);
            if !right || engine.tokenizer.is_eog(id) {
                break;
            }
        }
        // The last one is not fed yet, as far as anybody can tell.
        s.truncate(0, certain + ids.len() - 1);
        for (i, &id) in ids.iter().enumerate() {
            report.generated.push(id);
            if engine.tokenizer.is_eog(id) {
                break 'text End::Eog;
            }
            let piece = text.push(id);
            // Without text, too: a model that says none must be stopped as well.
            let (tokens, passes) = (report.generated.len(), report.passes);
            if listen(s, Event::Text { text: &piece, tokens, passes }).is_break() {
                s.truncate(0, certain + i);
                break 'text End::Stopped;
            }
        }
        let left = left - ids.len();
        if left == 0 {
            break End::Length;
        }
        if !s.make_room(0) {
            break End::Context;
        }
        guesses = drafter.guess((left - 1).min(s.context() - s.len(0) - 1).min(together - 1))?;
        let mut batch = Batch::of(&[&ids[ids.len() - 1..], &guesses].concat(), s.len(0), 0);
        batch.logits.fill(true);
        let begun = Instant::now();
        rows = match s.forward_all(&batch) {
            Err(EngineError::Stopped) => break End::Stopped,
            rows => rows?,
        };
        drafter.took(batch.len(), begun.elapsed());
        report.drafted += guesses.len();
        report.passes += 1;
    };
    report.time = start.elapsed();
    // What was broken off may be gone on with.
    let rest = if report.end == End::Stopped { String::new() } else { text.finish() };
    if !rest.is_empty() {
        // The generation is over; a listener has nothing left to break off.
        let (tokens, passes) = (report.generated.len(), report.passes);
        let _ = listen(s, Event::Text { text: &rest, tokens, passes });
    }
    Ok(report)
}

impl Report {
    /// The figures, in llama.cpp's lines.
    pub fn lines(&self) -> String {
        let line = |what: &str, time: Duration, n: usize, unit: &str| {
            let ms = time.as_secs_f64() * 1e3;
            let each = if n > 0 { ms / n as f64 } else { 0.0 };
            let rate = if ms > 0.0 { n as f64 / ms * 1e3 } else { 0.0 };
            format!("{what} time = {ms:10.2} ms / {n:5} {unit} ({each:8.2} ms per token, {rate:8.2} tokens per second)")
        };
        let steps = self.generated.len().saturating_sub(1);
        let mut lines = vec![
            line("prompt eval", self.prompt_time, self.fed, "tokens"),
            line("       eval", self.time, steps, "runs  "),
            format!(
                "      total time = {:10.2} ms / {:5} tokens",
                (self.prompt_time + self.time).as_secs_f64() * 1e3,
                self.fed + self.generated.len()
            ),
        ];
        if self.drafted > 0 {
            let (accepted, drafted) = (self.accepted, self.drafted);
            let rate = accepted as f64 / drafted as f64;
            lines.push(format!("draft acceptance rate = {rate:.5} ({accepted:5} accepted / {drafted:5} generated)"));
        }
        lines.join("\n")
    }
}
