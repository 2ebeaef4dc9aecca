//! Multiple choice: a question and answers, of which one is right (MMLU, ARC, TruthfulQA).
//!
//! llama.cpp's data file is binary, all numbers u32 in little-endian:
//!
//! ```text
//! n_tasks  position[n_tasks]  tasks
//! task      string question, answers with one right, answers with several right (not used)
//! answers   n (at most 100)  string[n]  label[n] (1: right)
//! string    length  bytes
//! ```

use super::{Place, Question, TaskError, encode, jsonl, select};
use crate::tokenizer::Tokenizer;

/// A question and its answers as texts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Choice {
    /// Where it stands.
    pub place: Place,
    /// What all answers follow, with a space between.
    pub question: String,
    /// The answers.
    pub answers: Vec<String>,
    /// Which of them are right.
    pub right: Vec<bool>,
}

impl Choice {
    /// Its tokens. An answer scores the mean of its tokens behind what all have in common.
    pub fn question(&self, t: &Tokenizer) -> Result<Question, TaskError> {
        let texts = self.answers.iter().map(|a| encode(t, &format!("{} {a}", self.question)));
        Question::new(self.place, texts.collect::<Result<_, _>>()?, self.right.clone())?.ask_all()
    }

    /// What every question must have.
    pub(super) fn check(self) -> Result<Choice, TaskError> {
        let problem = if self.question.is_empty() || self.answers.iter().any(String::is_empty) {
            "an empty question or answer".into()
        } else if self.answers.len() < 2 {
            format!("{} answers, expected at least 2", self.answers.len())
        } else if !self.right.contains(&true) {
            "no answer is labelled right".into()
        } else {
            return Ok(self);
        };
        Err(self.place.error(problem))
    }
}

/// The bytes as text.
pub(super) fn text(bytes: &[u8]) -> Result<&str, TaskError> {
    std::str::from_utf8(bytes).map_err(|e| {
        let line = bytes[..e.valid_up_to()].iter().filter(|&&b| b == b'\n').count() + 1;
        Place::Line(line).error("not UTF-8, expected a text file")
    })
}

/// The questions of a data file, llama.cpp's binary or JSONL: `tasks` of them (0: all), in llama-perplexity's order.
pub fn choices(bytes: &[u8], tasks: usize) -> Result<Vec<Choice>, TaskError> {
    let all = if jsonl::is_jsonl(bytes)? { jsonl::choices(text(bytes)?)? } else { binary(bytes)? };
    Ok(select::sampled(all.len(), tasks).into_iter().map(|i| all[i].clone()).collect())
}

/// Takes numbers and strings off the front of a file.
struct Reader<'a>(&'a [u8]);

impl Reader<'_> {
    fn u32(&mut self) -> Result<u32, String> {
        let (n, rest) = self.0.split_first_chunk::<4>().ok_or("the file ends within a number")?;
        self.0 = rest;
        Ok(u32::from_le_bytes(*n))
    }

    fn string(&mut self, what: &str) -> Result<String, String> {
        let n = self.u32()? as usize;
        if n > self.0.len() {
            return Err(format!("{what} of {n} bytes, the file has {} more", self.0.len()));
        }
        let (text, rest) = self.0.split_at(n);
        self.0 = rest;
        String::from_utf8(text.to_vec()).map_err(|_| format!("{what} is not UTF-8"))
    }

    fn answers(&mut self) -> Result<(Vec<String>, Vec<bool>), String> {
        let n = self.u32()?;
        if n > 100 {
            return Err(format!("{n} answers, expected at most 100"));
        }
        let texts = (0..n).map(|_| self.string("an answer")).collect::<Result<_, _>>()?;
        let labels = (0..n).map(|_| Ok::<bool, String>(self.u32()? == 1)).collect::<Result<_, _>>()?;
        Ok((texts, labels))
    }
}

fn binary(bytes: &[u8]) -> Result<Vec<Choice>, TaskError> {
    let mut r = Reader(bytes);
    let n = r.u32().map_err(TaskError::File)? as usize;
    // A task has at least its position, an empty question and two counts: 16 bytes.
    let most = r.0.len() / 16;
    if n == 0 || n > most {
        return Err(TaskError::File(format!("{n} tasks in {} bytes, expected 1 to {most}", bytes.len())));
    }
    r.0 = &r.0[4 * n..];
    (1..=n)
        .map(|i| {
            let place = Place::Task(i);
            let mut read = || {
                let question = r.string("the question")?;
                let (answers, right) = r.answers()?;
                r.answers()?;
                Ok(Choice { place, question, answers, right })
            };
            read().map_err(|problem: String| place.error(problem))?.check()
        })
        .collect()
}
