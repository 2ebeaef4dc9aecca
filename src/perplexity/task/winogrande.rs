//! Winogrande: which of two words fills the blank of a sentence.
//!
//! llama.cpp's data file is CSV without a header: `index,sentence,word 1,word 2,answer` with the blank `_` in the sentence and
//! the answer 1 or 2. A sentence with commas stands in quotation marks. A score is the mean over the tokens behind the word,
//! without the last one (the full stop). Where fewer than four tokens differ, the word is scored with them.

use super::{Ask, Place, Question, TaskError, choice, encode, jsonl, select};
use crate::gguf::one_line;
use crate::tokenizer::Tokenizer;

/// Tokens from the first difference on, up to which the word itself is scored.
const SHORT: usize = 3;

/// A sentence with a blank.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Blank {
    /// Where it stands.
    pub place: Place,
    /// What is before the blank.
    pub before: String,
    /// What is behind it.
    pub behind: String,
    /// What might fill it.
    pub words: [String; 2],
    /// Which of them does, from 0.
    pub right: usize,
}

impl Blank {
    /// A sentence, cut at its first `_`.
    pub(super) fn new(place: Place, sentence: &str, words: [&str; 2], right: usize) -> Result<Blank, TaskError> {
        let Some((before, behind)) = sentence.split_once('_') else {
            let found = one_line(sentence, 100);
            return Err(place.error(format!("\"{found}\", expected a sentence with a blank, _")));
        };
        let words = words.map(str::to_string);
        Ok(Blank { place, before: before.to_string(), behind: behind.to_string(), words, right })
    }

    /// Its tokens.
    pub fn question(&self, t: &Tokenizer) -> Result<Question, TaskError> {
        let whole = self.words.iter().map(|w| encode(t, &format!("{}{w}{}", self.before, self.behind)));
        let right = (0..2).map(|i| i == self.right).collect();
        let mut q = Question::new(self.place, whole.collect::<Result<_, _>>()?, right)?;
        let long = q.tails.iter().all(|t| t.len() > SHORT);
        for (i, word) in self.words.iter().enumerate() {
            let n = q.tails[i].len();
            let mut from = 0;
            if long {
                let given = encode(t, &format!("{}{word}", self.before))?;
                from = given.len().saturating_sub(q.prefix.len()).min(n);
            }
            let last = (n - from > 1) as usize;
            q.ask(i, from..n - last)?;
        }
        if !long && let Some(first) = q.asks[1].first_mut().filter(|a| a.after.is_none()) {
            // llama-perplexity looks the second word's first token up behind the end of the first sentence. It is not what
            // was meant, but what its scores are made of, and figures shall compare.
            *first = Ask { after: Some((0, q.tails[0].len() - 1)), ..*first };
        }
        Ok(q)
    }
}

/// The sentences of a data file, llama.cpp's CSV or JSONL: `tasks` of them (0: all), in llama-perplexity's order. It leaves
/// out the last line of a file, even of one that ends in a line break: here every line counts, but the same are drawn.
pub fn winogrande(bytes: &[u8], tasks: usize) -> Result<Vec<Blank>, TaskError> {
    let text = choice::text(bytes)?;
    let jsonl = jsonl::is_jsonl(bytes)?;
    let all = if jsonl { jsonl::blanks(text)? } else { csv(text)? };
    let drawn = (1..all.len()).contains(&tasks);
    let from = if drawn && !jsonl { all.len() - 1 } else { all.len() };
    Ok(select::sampled(from, tasks).into_iter().map(|i| all[i].clone()).collect())
}

fn csv(text: &str) -> Result<Vec<Blank>, TaskError> {
    let mut all = Vec::new();
    for (i, line) in text.lines().enumerate() {
        let place = Place::Line(i + 1);
        let mut quoted = false;
        let commas = line.match_indices([',', '"']).filter(|(_, c)| {
            quoted ^= *c == "\"";
            *c == "," && !quoted
        });
        let commas: Vec<usize> = commas.map(|(at, _)| at).take(4).collect();
        let [a, b, c, d] = commas[..] else {
            return Err(place.error(format!("{} columns, expected index,sentence,word,word,answer", commas.len() + 1)));
        };
        let sentence = &line[a + 1..b];
        let sentence = sentence.strip_prefix('"').map_or(sentence, |s| s.strip_suffix('"').unwrap_or(s));
        let right = match line[d + 1..].trim() {
            "1" => 0,
            "2" => 1,
            other => return Err(place.error(format!("answer \"{}\", expected 1 or 2", one_line(other, 100)))),
        };
        all.push(Blank::new(place, sentence, [&line[b + 1..c], &line[c + 1..d]], right)?);
    }
    if all.is_empty() {
        return Err(TaskError::File("empty, expected index,sentence,word,word,answer".into()));
    }
    Ok(all)
}
