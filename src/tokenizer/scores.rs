//! SentencePiece's merging, as llama.cpp does it. Files carry a score for each token instead of merges:
//!
//! ```text
//! every character is a symbol; two neighbours that are a token together go into a queue
//! take from the queue the token with the best score, of equal ones the leftmost
//!     if its two symbols are still there, they become one, which goes into the queue with each of its neighbours
//! a symbol that is no token in the end is the tokens of its bytes
//! ```
//!
//! Equal scores are not rare: llama.cpp's converter gives all tokens the same where a checkpoint has no `tokenizer.model`.

use super::Kind;
use crate::gguf::Strings;
use ahash::AHashMap;
use std::collections::BinaryHeap;

/// No symbol.
const NONE: u32 = u32::MAX;

/// Tokens and their scores.
pub(super) struct Scores {
    tokens: AHashMap<Box<str>, (u32, f32)>,
    longest: usize, // bytes of a token
    /// The token of each byte.
    pub bytes: Box<[u32; 256]>,
}

/// A piece of the text; empty once it was merged into the one before it.
struct Symbol {
    start: usize,
    len: usize,
    before: u32,
    behind: u32,
}

/// Two symbols that are a token together.
struct Pair {
    score: f32,
    left: u32,
    right: u32,
    len: usize,
}

impl Ord for Pair {
    fn cmp(&self, other: &Pair) -> std::cmp::Ordering {
        self.score.total_cmp(&other.score).then(other.left.cmp(&self.left))
    }
}

impl PartialOrd for Pair {
    fn partial_cmp(&self, other: &Pair) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Pair {
    fn eq(&self, other: &Pair) -> bool {
        self.cmp(other).is_eq()
    }
}

impl Eq for Pair {}

impl Scores {
    /// Of tokens, their kinds and scores, as many of each, and the token of each byte. Text is made of plain tokens alone.
    pub fn new(tokens: &Strings, kinds: &[Kind], scores: &[f32], bytes: Box<[u32; 256]>) -> Scores {
        let plain = |kind: &Kind| matches!(kind, Kind::Normal | Kind::UserDefined | Kind::Unused);
        let all = (0..).zip(tokens.iter()).zip(kinds.iter().zip(scores)).filter(|(_, (kind, _))| plain(kind));
        // Of tokens of the same text, it is the last. The score -0 is 0.
        let tokens: AHashMap<Box<str>, _> = all.map(|((id, t), (_, score))| (t.into(), (id, score + 0.0))).collect();
        let longest = tokens.keys().map(|t| t.len()).max().unwrap_or(0);
        Scores { tokens, longest, bytes }
    }

    /// The tokens of a text whose spaces are U+2581.
    pub fn encode(&self, text: &str) -> Vec<u32> {
        let starts = text.char_indices().zip(0u32..);
        let mut symbols: Vec<Symbol> = starts
            .map(|((start, c), i)| Symbol {
                start,
                len: c.len_utf8(),
                before: i.checked_sub(1).unwrap_or(NONE),
                behind: i + 1,
            })
            .collect();
        if let Some(last) = symbols.last_mut() {
            last.behind = NONE;
        }
        let pair = |symbols: &[Symbol], left: u32, right: u32| {
            let (a, b) = (symbols.get(left as usize)?, symbols.get(right as usize)?);
            let len = a.len + b.len;
            if len > self.longest {
                return None;
            }
            let &(_, score) = self.tokens.get(&text[a.start..a.start + len])?;
            Some(Pair { score, left, right, len })
        };
        let mut queue: BinaryHeap<Pair> = (1..symbols.len() as u32).filter_map(|i| pair(&symbols, i - 1, i)).collect();
        while let Some(Pair { left, right, len, .. }) = queue.pop() {
            let (l, r) = (left as usize, right as usize);
            if symbols[l].len == 0 || symbols[r].len == 0 || symbols[l].len + symbols[r].len != len {
                continue;
            }
            let behind = symbols[r].behind;
            (symbols[l].len, symbols[l].behind, symbols[r].len) = (len, behind, 0);
            if let Some(behind) = symbols.get_mut(behind as usize) {
                behind.before = left;
            }
            queue.extend(pair(&symbols, symbols[l].before, left));
            queue.extend(pair(&symbols, left, behind));
        }
        let mut ids = Vec::with_capacity(text.len() / 3);
        for s in symbols.iter().filter(|s| s.len > 0) {
            let text = &text[s.start..s.start + s.len];
            match self.tokens.get(text) {
                Some(&(id, _)) => ids.push(id),
                None => ids.extend(text.bytes().map(|b| self.bytes[b as usize])),
            }
        }
        ids
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_best_pair_is_merged_first_and_of_equals_the_leftmost() {
        let tokens = ["a", "b", "ab", "ba", "aba", "bab", "abab"];
        let encode = |scores: &[f32], text: &str| {
            let bytes = Box::new(std::array::from_fn(|b| 1000 + b as u32));
            let s = Scores::new(&tokens.iter().collect(), &[Kind::Normal; 7], scores, bytes);
            let texts = s.encode(text).into_iter().map(|id| match tokens.get(id as usize) {
                Some(t) => t.to_string(),
                None => format!("<{}>", id - 1000),
            });
            texts.collect::<Vec<_>>().join(" ")
        };
        let cases: [([f32; 7], &str, &str); 6] = [
            ([0.0, 0.0, -1.0, -2.0, -3.0, -4.0, -5.0], "bababa", "bab aba"),
            ([0.0, 0.0, -2.0, -1.0, -3.0, -4.0, -5.0], "ababa", "aba ba"),
            // All alike: from the left.
            ([-1000.0; 7], "ababa", "abab a"),
            ([-1000.0; 7], "bababa", "bab aba"),
            ([0.0, 0.0, -0.0, 0.0, 0.0, 0.0, 0.0], "ababa", "abab a"),
            ([0.0; 7], "aéb", "a <195> <169> b"),
        ];
        for (scores, text, want) in cases {
            assert_eq!(encode(&scores, text), want, "{scores:?} {text}");
        }
        assert_eq!(encode(&[0.0; 7], ""), "");
    }
}
