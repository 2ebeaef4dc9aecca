//! Data sets as JSON, one object a line, the form in which their makers publish them.
//!
//! ```text
//! {"question": "…", "choices": ["…", …], "answer": 2}                                  MMLU; from 0, or "C"
//! {"question": "…", "choices": {"text": […], "label": ["A", …]}, "answerKey": "C"}     ARC
//! {"activity_label": "…", "ctx": "…", "endings": ["…", …], "label": "3"}               HellaSwag; from 0
//! {"sentence": "… _ …", "option1": "…", "option2": "…", "answer": "2"}                 Winogrande; from 1
//! ```

use super::choice::Choice;
use super::winogrande::Blank;
use super::{Place, TaskError};
use serde::Deserialize;

/// Whether a file is JSONL rather than one of llama.cpp's formats.
pub fn is_jsonl(bytes: &[u8]) -> bool {
    let text = bytes.trim_ascii_start();
    // A binary file whose first number begins with the letter { has a zero within that number.
    text.first() == Some(&b'{') && !text[..text.len().min(4)].contains(&0)
}

#[derive(Deserialize)]
struct Line {
    #[serde(alias = "ctx")]
    question: String,
    #[serde(alias = "endings")]
    choices: Choices,
    #[serde(alias = "answerKey", alias = "label")]
    answer: Answer,
    activity_label: Option<String>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Choices {
    Texts(Vec<String>),
    Labelled { text: Vec<String>, label: Vec<String> },
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Answer {
    Number(usize),
    Text(String),
}

/// The objects of a file, each with its line.
fn objects<T: for<'a> Deserialize<'a>>(text: &str) -> Result<Vec<(Place, T)>, TaskError> {
    let lines = text.lines().enumerate().filter(|(_, l)| !l.trim().is_empty());
    let read = |(i, line): (usize, &str)| {
        let place = Place::Line(i + 1);
        // The line that serde tells is always its first.
        let problem = |e: serde_json::Error| place.error(e.to_string().replace(" at line 1 column", " at column"));
        Ok((place, serde_json::from_str(line).map_err(problem)?))
    };
    lines.map(read).collect()
}

/// Questions with answers.
pub fn choices(text: &str) -> Result<Vec<Choice>, TaskError> {
    let of = |(place, line): (Place, Line)| {
        let (answers, labels) = match line.choices {
            Choices::Texts(texts) => (texts, None),
            Choices::Labelled { text, label } => (text, Some(label)),
        };
        let right = position(&line.answer, labels.as_deref(), answers.len())
            .ok_or_else(|| place.error(format!("an answer that is none of the {} choices", answers.len())))?;
        let question = match line.activity_label {
            None => line.question,
            Some(label) => plain(&format!("{label}: {}", line.question)),
        };
        let right = (0..answers.len()).map(|i| i == right).collect();
        Choice { place, question, answers, right }.check()
    };
    objects(text)?.into_iter().map(of).collect()
}

/// Which choice an answer names: by its label, its number from 0, or its letter.
fn position(answer: &Answer, labels: Option<&[String]>, n: usize) -> Option<usize> {
    let at = match (answer, labels) {
        (Answer::Text(t), Some(labels)) => labels.iter().position(|l| l == t)?,
        (Answer::Number(i), Some(labels)) => labels.iter().position(|l| *l == i.to_string()).unwrap_or(*i),
        (Answer::Number(i), None) => *i,
        (Answer::Text(t), None) => match t.trim().as_bytes() {
            [letter @ b'A'..=b'Z'] => (letter - b'A') as usize,
            [letter @ b'a'..=b'z'] => (letter - b'a') as usize,
            _ => t.trim().parse().ok()?,
        },
    };
    (at < n).then_some(at)
}

/// HellaSwag's text without its marks, as lm-evaluation-harness reads it: `[title]` ends a sentence, other marks go.
fn plain(text: &str) -> String {
    let text = text.trim().replace(" [title]", ". ");
    let mut out = String::with_capacity(text.len());
    let mut rest = &text[..];
    while let Some(open) = rest.find('[') {
        let Some(close) = rest[open..].find(']') else { break };
        out.push_str(&rest[..open]);
        rest = &rest[open + close + 1..];
    }
    out.push_str(rest);
    out.replace("  ", " ")
}

#[derive(Deserialize)]
struct Sentence {
    sentence: String,
    option1: String,
    option2: String,
    answer: Answer,
}

/// Sentences with a blank.
pub fn blanks(text: &str) -> Result<Vec<Blank>, TaskError> {
    let of = |(place, s): (Place, Sentence)| {
        let right = match s.answer {
            Answer::Number(n @ 1..=2) => n - 1,
            Answer::Text(t) if t.trim() == "1" => 0,
            Answer::Text(t) if t.trim() == "2" => 1,
            _ => return Err(place.error("an answer that is neither 1 nor 2")),
        };
        Blank::new(place, &s.sentence, [&s.option1, &s.option2], right)
    };
    objects(text)?.into_iter().map(of).collect()
}
