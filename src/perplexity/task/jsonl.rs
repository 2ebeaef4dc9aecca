//! Data sets as JSON, one object a line, the forms in which their makers and the Hugging Face hub publish them.
//!
//! ```text
//! {"question": "…", "choices": ["…", …], "answer": 2}                                  MMLU; from 0, or "C"
//! {"question": "…", "choices": {"text": ["…", …], "label": ["A", …]}, "answerKey": "C"}             ARC
//! {"question": {"stem": "…", "choices": [{"text": "…", "label": "A"}, …]}, "answerKey": "C"}        ARC
//! {"question": "…", "mc1_targets": {"choices": ["…", …], "labels": [1, 0, …]}}         TruthfulQA
//! {"activity_label": "…", "ctx": "…", "endings": ["…", …], "label": "3"}               HellaSwag; from 0
//! {"sentence": "… _ …", "option1": "…", "option2": "…", "answer": "2"}                 Winogrande; from 1
//! ```

use super::choice::Choice;
use super::winogrande::Blank;
use super::{Place, TaskError};
use serde::Deserialize;
use serde_json::{Map, Value};

/// Whether a file is JSONL rather than one of llama.cpp's formats; an error where it is one array of JSON.
pub fn is_jsonl(bytes: &[u8]) -> Result<bool, TaskError> {
    let text = bytes.trim_ascii_start();
    // A binary file whose first number begins with such a letter has a zero within that number.
    let is_text = !text[..text.len().min(4)].contains(&0);
    if is_text && text.strip_prefix(b"[").is_some_and(|t| t.trim_ascii_start().starts_with(b"{")) {
        return Err(TaskError::File("one array of JSON, expected an object on every line".into()));
    }
    Ok(is_text && text.first() == Some(&b'{'))
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
    let of = |(place, line): (Place, Map<String, Value>)| {
        let (question, answers, right) = question(&line).map_err(|problem| place.error(problem))?;
        Choice { place, question, answers, right }.check()
    };
    objects(text)?.into_iter().map(of).collect()
}

/// A question, its answers, which of them are right.
type Parts = (String, Vec<String>, Vec<bool>);

fn question(line: &Map<String, Value>) -> Result<Parts, String> {
    let (name, value) = field(line, &["question", "ctx"])?;
    let stem = value.as_object();
    let question = string(name, stem.map_or(Ok(value), |q| field(q, &["stem"]).map(|f| f.1))?)?;
    if let Some(Value::Object(targets)) = line.get("mc1_targets") {
        let (answers, _) = answers("mc1_targets.choices", field(targets, &["choices"])?.1)?;
        let labels = list("mc1_targets.labels", field(targets, &["labels"])?.1)?;
        if labels.len() != answers.len() {
            return Err(format!("mc1_targets: {} choices, {} labels", answers.len(), labels.len()));
        }
        return Ok((question, answers, labels.iter().map(|l| l.as_u64() == Some(1)).collect()));
    }
    let nested = stem.filter(|q| q.contains_key("choices"));
    let (name, given) = field(nested.unwrap_or(line), &["choices", "endings"])?;
    let (answers, labels) = answers(name, given)?;
    let (key, answer) = field(line, &["answer", "answerKey", "label"])?;
    let right = position(answer, labels.as_deref(), answers.len())
        .ok_or_else(|| format!("{key}: {answer}, an answer that is none of the {} choices", answers.len()))?;
    let right = (0..answers.len()).map(|i| i == right).collect();
    if name != "endings" {
        return Ok((question, answers, right));
    }
    let question = match line.get("activity_label") {
        Some(label) => format!("{}: {question}", string("activity_label", label)?),
        None => question,
    };
    Ok((plain(&question), answers.iter().map(|a| plain(a)).collect(), right))
}

/// The first of these fields that is there.
fn field<'a>(of: &'a Map<String, Value>, names: &[&'static str]) -> Result<(&'static str, &'a Value), String> {
    let found = names.iter().find_map(|name| Some((*name, of.get(*name)?)));
    found.ok_or_else(|| format!("missing field `{}`", names.join("` or `")))
}

fn string(name: &str, value: &Value) -> Result<String, String> {
    value.as_str().map(str::to_string).ok_or_else(|| format!("{name}: {value}, expected a text"))
}

fn list<'a>(name: &str, value: &'a Value) -> Result<&'a Vec<Value>, String> {
    value.as_array().ok_or_else(|| format!("{name}: {value}, expected a list"))
}

/// Answers, with their labels where they have some: texts, `{"text": […], "label": […]}`, or a `{"text", "label"}` for each.
fn answers(name: &str, value: &Value) -> Result<(Vec<String>, Option<Vec<String>>), String> {
    let strings = |name: &str, value| list(name, value)?.iter().map(|v| string(name, v)).collect::<Result<Vec<_>, _>>();
    match value {
        Value::Object(both) => {
            let (texts, labels) = (field(both, &["text"])?.1, field(both, &["label"])?.1);
            Ok((strings("choices.text", texts)?, Some(strings("choices.label", labels)?)))
        }
        Value::Array(all) if all.iter().any(Value::is_object) => {
            let one = |choice: &Value| {
                let choice = choice.as_object().ok_or_else(|| format!("{name}: {choice}, expected an object"))?;
                let part = |part: &'static str| string(part, field(choice, &[part])?.1);
                Ok((part("text")?, part("label")?))
            };
            let both: Vec<(String, String)> = all.iter().map(one).collect::<Result<_, String>>()?;
            let (texts, labels) = both.into_iter().unzip();
            Ok((texts, Some(labels)))
        }
        _ => Ok((strings(name, value)?, None)),
    }
}

/// Which choice an answer names: by its label, its number from 0, or its letter.
fn position(answer: &Value, labels: Option<&[String]>, n: usize) -> Option<usize> {
    let at = match (answer, labels) {
        (Value::String(t), Some(labels)) => labels.iter().position(|l| l == t.trim())?,
        (Value::Number(i), Some(labels)) => labels.iter().position(|l| *l == i.to_string()).or(index(i))?,
        (Value::Number(i), None) => index(i)?,
        (Value::String(t), None) => match t.trim().as_bytes() {
            [letter @ b'A'..=b'Z'] => (letter - b'A') as usize,
            [letter @ b'a'..=b'z'] => (letter - b'a') as usize,
            _ => t.trim().parse().ok()?,
        },
        _ => return None,
    };
    (at < n).then_some(at)
}

fn index(number: &serde_json::Number) -> Option<usize> {
    usize::try_from(number.as_u64()?).ok()
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
    answer: Value,
}

/// Sentences with a blank.
pub fn blanks(text: &str) -> Result<Vec<Blank>, TaskError> {
    let of = |(place, s): (Place, Sentence)| {
        let right = match s.answer.as_str().map_or_else(|| s.answer.to_string(), |t| t.trim().to_string()).as_str() {
            "1" => 0,
            "2" => 1,
            _ => return Err(place.error(format!("answer: {}, expected 1 or 2", s.answer))),
        };
        Blank::new(place, &s.sentence, [&s.option1, &s.option2], right)
    };
    objects(text)?.into_iter().map(of).collect()
}
