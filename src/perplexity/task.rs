//! Questions with given answers: which of them a model holds most probable.
//!
//! A question is the tokens that all its answers begin with (its prefix) and the rest of each answer (its tails). An answer
//! scores the mean log-probability of the tokens asked for; the highest score is the model's choice, the first of equals.
//!
//! Several questions go through the model together, each a sequence: first all prefixes, then for one answer after another
//! all tails, each sequence cut back to its prefix before. No token is computed twice and nothing in the cache is copied.

pub mod choice;
pub mod hellaswag;
pub mod jsonl;
mod select;
pub mod winogrande;

pub use choice::{Choice, choices};
pub use hellaswag::hellaswag;
pub use winogrande::{Blank, winogrande};

use super::score::nll;
use crate::engine::{EngineError, Session};
use crate::model::Batch;
use crate::tokenizer::{Tokenizer, TokenizerError};
use std::sync::Mutex;

/// A data set that cannot be read, or a question that cannot be asked.
#[derive(Debug, thiserror::Error)]
pub enum TaskError {
    /// A line of a text file.
    #[error("line {line}: {problem}")]
    Line {
        /// Its number, from 1.
        line: usize,
        /// What was found and expected.
        problem: String,
    },
    /// A question of a binary file.
    #[error("task {task}: {problem}")]
    Task {
        /// Its number, from 1.
        task: usize,
        /// What was found and expected.
        problem: String,
    },
    /// The whole file.
    #[error("{0}")]
    File(String),
    /// A text that cannot be encoded.
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
}

/// Where a question stands in its file, for errors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// Line of a text file, from 1.
    Line(usize),
    /// Task of a binary file, from 1.
    Task(usize),
}

impl Place {
    /// An error of this question.
    pub fn error(self, problem: impl Into<String>) -> TaskError {
        let problem = problem.into();
        match self {
            Place::Line(line) => TaskError::Line { line, problem },
            Place::Task(task) => TaskError::Task { task, problem },
        }
    }
}

/// One log-probability that a score needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Ask {
    /// Behind which token of which tail; behind the last of the prefix where there is none.
    after: Option<(usize, usize)>,
    /// The token asked for.
    token: u32,
}

/// A question in tokens.
#[derive(Clone, Debug)]
pub struct Question {
    place: Place,
    prefix: Vec<u32>,
    tails: Vec<Vec<u32>>,
    asks: Vec<Vec<Ask>>, // of each answer
    right: Vec<bool>,
}

impl Question {
    /// Finds what the answers have in common. Each tail keeps at least one token.
    fn new(place: Place, answers: Vec<Vec<u32>>, right: Vec<bool>) -> Result<Question, TaskError> {
        let shortest = answers.iter().map(Vec::len).min().unwrap_or(0);
        let same = |i: usize| answers.iter().all(|a| a[i] == answers[0][i]);
        let common = (0..shortest.saturating_sub(1)).take_while(|&i| same(i)).count();
        if answers.len() < 2 || shortest == 0 {
            return Err(place.error("expected at least two answers, none of them empty"));
        }
        let prefix = answers[0][..common].to_vec();
        let tails: Vec<Vec<u32>> = answers.into_iter().map(|a| a[common..].to_vec()).collect();
        Ok(Question { place, prefix, asks: vec![Vec::new(); tails.len()], tails, right })
    }

    /// Asks for the tokens `range` of an answer's tail. What begins the text can only be given, not asked for.
    fn ask(&mut self, answer: usize, range: std::ops::Range<usize>) -> Result<(), TaskError> {
        let from = if self.prefix.is_empty() { range.start.max(1) } else { range.start };
        let tail = &self.tails[answer];
        let ask = |i: usize| Ask { after: i.checked_sub(1).map(|i| (answer, i)), token: tail[i] };
        self.asks[answer] = (from..range.end).map(ask).collect();
        if self.asks[answer].is_empty() {
            return Err(self.place.error(format!("answer {} leaves nothing to score", answer + 1)));
        }
        Ok(())
    }

    /// Asks for whole tails.
    fn ask_all(mut self) -> Result<Question, TaskError> {
        for a in 0..self.tails.len() {
            self.ask(a, 0..self.tails[a].len())?;
        }
        Ok(self)
    }

    /// Positions that it takes.
    pub fn positions(&self) -> usize {
        self.prefix.len() + self.tails.iter().map(Vec::len).max().unwrap_or(0)
    }

    /// Where it stands in its file.
    pub fn place(&self) -> Place {
        self.place
    }

    /// Answers.
    pub fn n_answers(&self) -> usize {
        self.tails.len()
    }

    /// Whether an answer, by its number from 0, is right.
    pub fn is_right(&self, answer: usize) -> bool {
        self.right[answer]
    }

    /// The right answer of a question that has one, from 0.
    pub fn right(&self) -> usize {
        self.right.iter().position(|&r| r).unwrap_or(0)
    }

    /// Of answers' scores, the one that the model holds best: the first of equals.
    pub fn chosen(scores: &[f64]) -> usize {
        (0..scores.len()).fold(0, |best, i| if scores[i] > scores[best] { i } else { best })
    }
}

/// The tokens of a text, with BOS where the model wants it.
fn encode(t: &Tokenizer, text: &str) -> Result<Vec<u32>, TaskError> {
    Ok(t.encode(text.as_bytes(), true, false)?)
}

/// Scores questions, as many as the session has sequences at most: for each the scores of its answers, in nats a token.
pub fn score(s: &mut Session, questions: &[Question]) -> Result<Vec<Vec<f64>>, EngineError> {
    let values = Mutex::new(
        questions.iter().map(|q| q.asks.iter().map(|a| vec![0.0; a.len()]).collect()).collect::<Vec<Vec<Vec<f64>>>>(),
    );
    let ops = s.engine().kernels.ops;
    let most = questions.iter().map(Question::n_answers).max().unwrap_or(0);
    for pass in std::iter::once(None).chain((0..most).map(Some)) {
        let mut batch = Batch::default();
        let mut wanted: Vec<Vec<(usize, usize, usize)>> = Vec::new(); // of each row: question, answer, ask
        for (i, q) in questions.iter().enumerate() {
            let (start, tokens) = match pass {
                None => (0, &q.prefix[..]),
                Some(a) => (q.prefix.len(), q.tails.get(a).map_or(&[][..], |t| t)),
            };
            s.truncate(i, start);
            for (at, &token) in tokens.iter().enumerate() {
                let here = |k: &Ask| match (pass, k.after) {
                    (None, None) => at + 1 == tokens.len(),
                    (Some(a), after) => after == Some((a, at)),
                    _ => false,
                };
                let asks: Vec<_> = (0..q.n_answers())
                    .flat_map(|a| (0..q.asks[a].len()).map(move |k| (a, k)))
                    .filter(|&(a, k)| here(&q.asks[a][k]))
                    .map(|(a, k)| (i, a, k))
                    .collect();
                batch.push(token, (start + at) as u32, i as u32, !asks.is_empty());
                if !asks.is_empty() {
                    wanted.push(asks);
                }
            }
        }
        s.forward_each(&batch, &|row, logits| {
            for &(i, a, k) in &wanted[row] {
                let v = -nll(ops, logits, questions[i].asks[a][k].token);
                values.lock().unwrap_or_else(|e| e.into_inner())[i][a][k] = v;
            }
        })?;
    }
    let values = values.into_inner().unwrap_or_else(|e| e.into_inner());
    let mean = |v: &Vec<f64>| v.iter().sum::<f64>() / v.len() as f64;
    Ok(values.iter().map(|q| q.iter().map(mean).collect()).collect())
}

/// Questions answered so far.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Tally {
    /// Questions.
    pub count: usize,
    /// Of them right.
    pub correct: usize,
    /// Their answers.
    pub answers: usize,
}

impl Tally {
    /// Adds a question.
    pub fn push(&mut self, q: &Question, scores: &[f64]) {
        self.count += 1;
        self.correct += q.is_right(Question::chosen(scores)) as usize;
        self.answers += scores.len();
    }

    /// The share of right answers.
    pub fn accuracy(&self) -> f64 {
        self.correct as f64 / self.count as f64
    }

    /// What guessing would reach: questions by answers.
    pub fn chance(&self) -> f64 {
        self.count as f64 / self.answers as f64
    }

    /// The standard error of a share among the questions.
    pub fn error(&self, share: f64) -> f64 {
        (share * (1.0 - share) / (self.count as f64 - 1.0)).sqrt()
    }

    /// Wilson's score interval of the accuracy at 95 %: from, to.
    /// Wilson, "Probable inference, the law of succession, and statistical inference", JASA 22 (1927).
    pub fn interval(&self) -> (f64, f64) {
        const Z: f64 = 1.95996398454;
        let (n, p) = (self.count as f64, self.accuracy());
        let z = Z * Z / n;
        let half = z * (n * (4.0 * p * (1.0 - p) + z)).sqrt() / (Z + Z);
        ((p + z * 0.5 - half) / (1.0 + z), (p + z * 0.5 + half) / (1.0 + z))
    }
}
