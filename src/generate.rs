//! Generation: the one place where session, sampler and tokenizer meet.

use crate::draft::Drafter;
use crate::engine::{EngineError, Session};
use crate::model::Batch;
use crate::sample::Sampler;
use crate::tokenizer::TextDecoder;
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
    let mut report = Report {
        reused: s.reuse(0, prompt),
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
    let Some(logits) = read(s, prompt, &mut report, &mut listen)? else { return Ok(report) };
    drafter.begin(prompt);
    let mut a = Answer { s, sampler, drafter, guesses: Vec::new(), rows: vec![logits], report };
    a.go_on(limit, &mut listen)?;
    Ok(a.report)
}

/// Feeds the prompt. Returns the logits behind it, or none if that was stopped.
fn read(
    s: &mut Session,
    prompt: &[u32],
    report: &mut Report,
    listen: &mut impl FnMut(&Session, Event<'_>) -> ControlFlow<()>,
) -> Result<Option<Vec<f32>>, GenerateError> {
    let start = Instant::now();
    let of = prompt.len() - report.reused;
    let mut logits = None;
    for part in prompt[report.reused..].chunks(s.walk()) {
        let at = s.len(0);
        logits = match s.forward(&Batch::of(part, at, 0)) {
            Err(EngineError::Stopped) => None,
            logits => Some(logits?),
        };
        report.fed = s.len(0) - report.reused;
        if logits.is_none() || listen(s, Event::Prompt { done: report.fed, of }).is_break() {
            logits = None;
            break;
        }
    }
    report.prompt_time = start.elapsed();
    Ok(logits)
}

/// What is generated behind a prompt.
struct Answer<'a> {
    s: &'a mut Session,
    sampler: &'a mut Sampler,
    drafter: &'a mut Drafter,
    // What was fed last: a token that is certain (the prompt's last at first), guesses behind it, and the logits after each.
    guesses: Vec<u32>,
    rows: Vec<Vec<f32>>,
    report: Report,
}

impl Answer<'_> {
    /// Generates to the end, and says in the report why that is one.
    fn go_on(
        &mut self,
        limit: Option<usize>,
        listen: &mut impl FnMut(&Session, Event<'_>) -> ControlFlow<()>,
    ) -> Result<(), GenerateError> {
        let start = Instant::now();
        let engine = self.s.engine().clone();
        let mut text = engine.tokenizer.decoder();
        self.report.end = loop {
            let left = limit.map_or(usize::MAX, |l| l.saturating_sub(self.report.generated.len()));
            if left == 0 {
                break End::Length;
            }
            let ids = self.draw(left)?;
            if let Some(end) = self.say(&ids, &mut text, listen) {
                break end;
            }
            let left = left - ids.len();
            if left == 0 {
                break End::Length;
            }
            if !self.s.make_room(0) {
                break End::Context;
            }
            if !self.feed(ids[ids.len() - 1], left)? {
                break End::Stopped;
            }
        };
        self.report.time = start.elapsed();
        // What was broken off may be gone on with.
        let rest = if self.report.end == End::Stopped { String::new() } else { text.finish() };
        if !rest.is_empty() {
            // The generation is over; a listener has nothing left to break off.
            let _ = listen(self.s, self.report.text(&rest));
        }
        Ok(())
    }

    /// Draws at most `left` tokens from the logits, of which those hold whose guesses are what the model says. The session
    /// is left with all of them but the last, which is not fed yet, as far as anybody can tell.
    fn draw(&mut self, left: usize) -> Result<Vec<u32>, GenerateError> {
        let engine = self.s.engine().clone();
        let (certain, mut ids) = (self.s.len(0) - self.guesses.len(), Vec::new());
        for (i, row) in self.rows.iter().enumerate().take(left) {
            if !row.iter().all(|l| l.is_finite()) {
                let (file, behind) = (engine.gguf.path().to_path_buf(), certain + i);
                return Err(GenerateError::NotFinite { file, behind });
            }
            let id = self.sampler.sample(row);
            self.sampler.accept(id);
            self.drafter.told(id);
            ids.push(id);
            let right = self.guesses.get(i) == Some(&id);
            self.report.accepted += usize::from(right);
            if !right || engine.tokenizer.is_eog(id) {
                break;
            }
        }
        self.s.truncate(0, certain + ids.len() - 1);
        Ok(ids)
    }

    /// Tells of what was drawn; why it ends there, if it does.
    fn say(
        &mut self,
        ids: &[u32],
        text: &mut TextDecoder<'_>,
        listen: &mut impl FnMut(&Session, Event<'_>) -> ControlFlow<()>,
    ) -> Option<End> {
        let before = self.s.len(0) + 1 - ids.len();
        for (i, &id) in ids.iter().enumerate() {
            self.report.generated.push(id);
            if self.s.engine().tokenizer.is_eog(id) {
                return Some(End::Eog);
            }
            // Without text, too: a model that says none must be stopped as well.
            if listen(self.s, self.report.text(&text.push(id))).is_break() {
                self.s.truncate(0, before + i);
                return Some(End::Stopped);
            }
        }
        None
    }

    /// Feeds the last token that was drawn, and guesses at the `left` ones behind it. Whether it came to its end.
    fn feed(&mut self, last: u32, left: usize) -> Result<bool, GenerateError> {
        let (room, together) = (self.s.context() - self.s.len(0) - 1, self.s.engine().alike());
        self.guesses = self.drafter.guess((left - 1).min(room).min(together - 1))?;
        let mut batch = Batch::of(&[&[last], &self.guesses[..]].concat(), self.s.len(0), 0);
        batch.logits.fill(true);
        let begun = Instant::now();
        self.rows = match self.s.forward_all(&batch) {
            Err(EngineError::Stopped) => return Ok(false),
            rows => rows?,
        };
        self.drafter.took(batch.len(), begun.elapsed());
        self.report.drafted += self.guesses.len();
        self.report.passes += 1;
        Ok(true)
    }
}

impl Report {
    /// A text that comes with the last token.
    fn text<'a>(&self, text: &'a str) -> Event<'a> {
        Event::Text { text, tokens: self.generated.len(), passes: self.passes }
    }

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
