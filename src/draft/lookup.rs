//! Guesses from the text itself: what came after the last tokens when they stood there before (prompt lookup: Saxena,
//! 2023). Texts that quote, sum up, translate names, list or rewrite repeat themselves.

use super::Odds;
use std::collections::HashMap;

/// Matches longer than this are as good as this one.
const LONG: usize = 12;
/// Places of the same two tokens that are looked at, the latest first.
const TRIES: usize = 48;
/// No place.
const NONE: u32 = u32::MAX;

/// An index of the text by pairs of tokens, as compressors have it: the latest place of each, and from each place to the one
/// before.
pub struct Lookup {
    text: Vec<u32>,
    pairs: HashMap<(u32, u32), u32>, // where the second of them last stood
    before: Vec<u32>,                // for each place, the one before it with the same pair
    ones: HashMap<u32, u32>,         // where a token last stood
    last: Option<u32>,               // where the text's last token stood before
    found: Option<Match>,
    /// How often the token after a match is the one that comes, by the match's length. It is known of every token whether it
    /// was expected, also where nothing was guessed.
    right: [Odds; LONG + 1],
}

/// The end of the text, found again.
#[derive(Clone, Copy)]
struct Match {
    next: usize, // where the text went on
    len: usize,
}

impl Default for Lookup {
    fn default() -> Lookup {
        // A beginning that the first tokens correct: the longer, the likelier.
        let right = std::array::from_fn(|len| Odds(len as f64 / (len as f64 + 3.0)));
        let (pairs, ones) = (HashMap::new(), HashMap::new());
        Lookup { text: Vec::new(), pairs, before: Vec::new(), ones, last: None, found: None, right }
    }
}

impl Lookup {
    /// The text so far.
    pub fn text(&self) -> &[u32] {
        &self.text
    }

    /// Indexes a text, from where it is another than before.
    pub fn begin(&mut self, text: &[u32]) {
        if !text.starts_with(&self.text) {
            self.text.clear();
            self.before.clear();
            self.pairs.clear();
            self.ones.clear();
            self.last = None;
        }
        (self.text.len()..text.len()).for_each(|i| self.push(text[i]));
        self.find();
    }

    /// Takes the next token, and whether it was expected.
    pub fn told(&mut self, id: u32) {
        if let Some(m) = self.found {
            let right = self.text[m.next] == id;
            self.right[m.len].count(right);
        }
        self.push(id);
        self.find();
    }

    /// The odds of guess `i`, if those before it are right: the match is longer then.
    pub fn odds(&self, i: usize) -> f64 {
        self.found.map_or(0.0, |m| self.right[(m.len + i).min(LONG)].0)
    }

    /// The next `n` tokens; none where nothing matches. A text that repeats itself up to its end goes on doing so.
    pub fn guess(&self, n: usize) -> Vec<u32> {
        let Some(m) = self.found else { return Vec::new() };
        let again = &self.text[m.next..];
        (0..n).map(|i| again[i % again.len()]).collect()
    }

    fn push(&mut self, id: u32) {
        let at = self.text.len() as u32;
        self.text.push(id);
        let pair = at.checked_sub(1).map(|last| (self.text[last as usize], id));
        self.before.push(pair.and_then(|p| self.pairs.insert(p, at)).unwrap_or(NONE));
        self.last = self.ones.insert(id, at);
    }

    /// Finds the longest match of the text's end, of equals the latest.
    fn find(&mut self) {
        let Some(end) = self.text.len().checked_sub(1) else {
            self.found = None;
            return;
        };
        let mut place = self.before[end];
        // A single token is a match, too, where there is no better one.
        let mut best = self.last.map(|at| Match { next: at as usize + 1, len: 1 });
        for _ in 0..TRIES {
            if place == NONE || best.is_some_and(|b| b.len == LONG) {
                break;
            }
            let at = place as usize;
            let len = (0..=at.min(LONG - 1)).take_while(|&i| self.text[at - i] == self.text[end - i]).count();
            if best.is_none_or(|b| len > b.len) {
                best = Some(Match { next: at + 1, len });
            }
            place = self.before[at];
        }
        self.found = best;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(text: &[u32]) -> Lookup {
        let mut l = Lookup::default();
        l.begin(text);
        l
    }

    #[test]
    fn the_longest_match_goes_on() {
        let l = of(&[1, 2, 3, 4, 9, 2, 3, 5, 9, 1, 2, 3]);
        // `2 3` stood there twice, the later time before 5; `1 2 3` once, before 4.
        assert_eq!(l.guess(3), [4, 9, 2]);
        assert_eq!(of(&[7, 2, 3, 4, 9, 2, 3, 5, 9, 1, 2, 3]).guess(2), [5, 9], "of equals the latest");
        assert!(of(&[1, 2, 3]).guess(3).is_empty() && of(&[]).guess(1).is_empty());
    }

    #[test]
    fn a_repetition_goes_on_past_the_end() {
        assert_eq!(of(&[5, 6, 7, 5, 6, 7, 5, 6]).guess(7), [7, 5, 6, 7, 5, 6, 7]);
        assert_eq!(of(&[4, 4, 4]).guess(3), [4, 4, 4]);
    }

    #[test]
    fn another_text_is_another_index() {
        let mut l = of(&[1, 2, 3, 1, 2]);
        assert_eq!(l.guess(1), [3]);
        l.begin(&[1, 2, 3, 1, 2, 8, 1, 2]);
        assert_eq!(l.guess(1), [8], "a longer one");
        l.begin(&[9, 9, 1, 2]);
        assert!(l.guess(1).is_empty(), "what is not in the text any more is not guessed");
        assert_eq!(l.text(), [9, 9, 1, 2]);
    }

    #[test]
    fn odds_follow_what_happens() {
        let cycle: Vec<u32> = (0..30).cycle().take(600).collect();
        let mut l = of(&cycle[..31]);
        let before = l.odds(0);
        cycle[31..].iter().for_each(|&id| l.told(id));
        assert!(l.odds(0) > before && l.odds(0) > 0.95, "{}", l.odds(0));
        // Pairs that never go on as they did.
        let mut l = Lookup::default();
        (0..300).for_each(|i| [1, 2, 1000 + i].iter().for_each(|&id| l.told(id)));
        l.told(1);
        l.told(2);
        assert!(l.guess(1) == [1299] && l.odds(0) < 0.05, "{}", l.odds(0));
    }
}
