//! HellaSwag: which of four endings continues a text best.
//!
//! llama.cpp's data file has six lines a question: the text, the number of the right ending from 0, the endings. Questions
//! come in a drawn order; a score is the mean over an ending's tokens ("acc_norm").

use super::choice::{Choice, text};
use super::{Place, TaskError, jsonl, select};
use crate::gguf::one_line;

/// The questions of a data file, llama.cpp's text or JSONL: `tasks` of them, in llama-perplexity's order.
pub fn hellaswag(bytes: &[u8], tasks: usize) -> Result<Vec<Choice>, TaskError> {
    let text = text(bytes)?;
    let all = if jsonl::is_jsonl(bytes)? { jsonl::choices(text)? } else { lines(text)? };
    Ok(select::drawn(all.len(), tasks).into_iter().map(|i| all[i].clone()).collect())
}

fn lines(text: &str) -> Result<Vec<Choice>, TaskError> {
    let lines: Vec<&str> = text.lines().collect();
    let mut all = Vec::new();
    for (i, six) in lines.chunks(6).enumerate() {
        let place = |k: usize| Place::Line(6 * i + k + 1);
        let [question, right, endings @ ..] = six else {
            return Err(place(0).error("1 line of a question, expected 6: text, number, 4 endings"));
        };
        if endings.len() != 4 {
            let problem = format!("{} lines of a question, expected 6: text, number, 4 endings", six.len());
            return Err(place(0).error(problem));
        }
        if let Some(k) = six.iter().position(|l| l.trim().is_empty()) {
            return Err(place(k).error("empty, expected a text"));
        }
        let right = match right.trim().parse::<usize>() {
            Ok(n) if n < 4 => n,
            _ => {
                let found = one_line(right, 100);
                return Err(place(1).error(format!("\"{found}\", expected the right ending's number, 0 to 3")));
            }
        };
        let answers = endings.iter().map(|e| e.to_string()).collect();
        let right = (0..4).map(|k| k == right).collect();
        all.push(Choice { place: place(0), question: question.to_string(), answers, right });
    }
    if all.is_empty() {
        return Err(TaskError::File("empty, expected 6 lines a question".into()));
    }
    Ok(all)
}
