//! Where a long text can be cut so that the tokens of its parts are its own.
//!
//! Tokens do not reach across the pieces into which a pre-tokenizer cuts. So a cut must be where a piece ends in the whole
//! text, whatever is behind it, and where the pieces before it do not change when the text ends there. Patterns have no look
//! behind, and one look ahead: `\s+(?!\S)`, white space without its last character where something else follows.
//!
//! ```text
//! "the| ox"    before a space and a letter: every rule takes the space with the letter, or by itself
//! "end.\n|So"  behind a line: where a rule takes line breaks together with what is before them
//! "end.|\nSo"  before its break: where breaks are white space like any other, of which the last stands alone
//! "an|,ox"     before a mark between letters: no rule takes it with what is before it
//! ```
//!
//! SentencePiece merges what its vocabulary has merged, so that it depends on the tokens.

use crate::gguf::Strings;
use regex::Regex;

/// Finds cuts.
pub(super) struct Cuts {
    /// Each way is a group, at whose end the cut is. `None`: no text is cut.
    ways: Option<Regex>,
}

impl Cuts {
    /// Behind these pre-tokenizers' patterns.
    pub fn of_rule(patterns: &[&str]) -> Cuts {
        // `\s*[\r\n]+`, or each break by itself.
        let lines =
            if patterns.iter().any(|p| p.contains(r"[\r\n]")) { r"() \p{L}|(\n)\S" } else { r"()[ \n]\p{L}|(\S)\n\S" };
        Cuts::new(&format!(r"{lines}|(\p{{L}})\p{{P}}\p{{L}}"))
    }

    /// By the tokens of a SentencePiece vocabulary.
    pub fn of_pieces(tokens: &Strings) -> Cuts {
        let mut ways = Vec::new();
        if !tokens.iter().any(|t| t.len() > 1 && t.contains('\n')) {
            ways.push(r"(\n)");
        }
        let joins = |t: &str| t.trim_start_matches('\u{2581}').contains('\u{2581}');
        if !tokens.iter().any(joins) {
            ways.push("([^\u{2581}])\u{2581}");
        }
        if ways.is_empty() { Cuts { ways: None } } else { Cuts::new(&ways.join("|")) }
    }

    fn new(ways: &str) -> Cuts {
        Cuts { ways: Some(Regex::new(ways).expect("written here")) }
    }

    /// The first cut that leaves at least `least` bytes before it; the end where there is none.
    pub fn first(&self, text: &str, least: usize) -> usize {
        let Some(start) = (least..text.len()).find(|&i| text.is_char_boundary(i)) else { return text.len() };
        let found = self.ways.as_ref().and_then(|w| w.captures_at(text, start));
        let group = found.and_then(|c| c.iter().skip(1).flatten().next());
        group.map_or(text.len(), |g| g.end())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_are_cut_where_no_token_reaches_across() {
        let qwen = Cuts::of_rule(&[r"\p{L}+|\s*[\r\n]+|\s+(?!\S)|\s+"]);
        let gpt2 = Cuts::of_rule(&[r" ?\p{L}+|\s+(?!\S)|\s+"]);
        let pieces =
            |more: &'static str| Cuts::of_pieces(&["\n", "\u{2581}", "\u{2581}\u{2581}a", more].into_iter().collect());
        let (spm, odd) = (pieces("a"), pieces("a\u{2581}b"));
        let cases = [
            (&qwen, "the ox", "the"),
            (&qwen, "end. \n\n  \n牛", "end. \n\n  \n"),
            (&qwen, "end.\n\n  ox", "end.\n\n "),
            (&qwen, "牛牛。牛", "牛牛"),
            (&qwen, "1 2  \u{301}", "1 2  \u{301}"),
            (&gpt2, "the ox", "the"),
            (&gpt2, "end.\n\nSo", "end.\n"),
            (&gpt2, "1.\n(2", "1."),
            (&gpt2, "1.\n\n(2", "1.\n\n(2"),
            (&spm, "aa\u{2581}\u{2581}a", "aa"),
            (&spm, "\u{2581}\n\na", "\u{2581}\n"),
            (&odd, "a\u{2581}\u{2581}a\na", "a\u{2581}\u{2581}a\n"),
        ];
        for (cuts, text, want) in cases {
            assert_eq!(&text[..cuts.first(text, 1)], want, "{text:?}");
        }
        assert_eq!(qwen.first("牛 ox 牛 ox", 2), "牛".len());
        assert_eq!(qwen.first("牛 ox 牛 ox", 4), "牛 ox".len());
        assert_eq!(Cuts::of_pieces(&["a\n"].into_iter().collect()).first("a\na\na", 1), 5);
    }
}
