//! Colours for code, line by line: comments, strings, numbers, keywords and types.
//!
//! A scanner for the family that a language belongs to, not a grammar: it starts at once, costs nothing, and is right
//! about what the eye looks for.

use super::theme::Theme;
use ratatui::style::Style;
use ratatui::text::Span;

/// A family of languages.
struct Language {
    names: &'static [&'static str],
    line_comments: &'static [&'static str],
    block_comment: Option<(&'static str, &'static str)>,
    /// Longest first.
    quotes: &'static [&'static str],
    keywords: &'static [&'static str],
    /// Whether keywords are meant in any case.
    any_case: bool,
}

const C_LIKE: Language = Language {
    names: &[
        "c", "h", "cpp", "c++", "cc", "hpp", "java", "cs", "csharp", "kotlin", "kt", "swift", "scala", "dart", "php",
        "zig",
    ],
    line_comments: &["//"],
    block_comment: Some(("/*", "*/")),
    quotes: &["\"", "'"],
    keywords: &[
        "auto",
        "bool",
        "boolean",
        "break",
        "case",
        "catch",
        "char",
        "class",
        "const",
        "continue",
        "default",
        "delete",
        "do",
        "double",
        "else",
        "enum",
        "extends",
        "extern",
        "false",
        "final",
        "finally",
        "float",
        "for",
        "func",
        "fun",
        "goto",
        "guard",
        "if",
        "implements",
        "import",
        "in",
        "inline",
        "int",
        "interface",
        "let",
        "long",
        "namespace",
        "new",
        "null",
        "nullptr",
        "override",
        "package",
        "private",
        "protected",
        "public",
        "return",
        "short",
        "signed",
        "sizeof",
        "static",
        "struct",
        "super",
        "switch",
        "template",
        "this",
        "throw",
        "throws",
        "true",
        "try",
        "typedef",
        "typename",
        "union",
        "unsigned",
        "using",
        "val",
        "var",
        "virtual",
        "void",
        "volatile",
        "when",
        "where",
        "while",
    ],
    any_case: false,
};

const LANGUAGES: &[Language] = &[
    Language {
        names: &["rust", "rs"],
        line_comments: &["//"],
        block_comment: Some(("/*", "*/")),
        quotes: &["\""],
        keywords: &[
            "as", "async", "await", "bool", "break", "char", "const", "continue", "crate", "dyn", "else", "enum",
            "extern", "f32", "f64", "false", "fn", "for", "i16", "i32", "i64", "i8", "if", "impl", "in", "isize",
            "let", "loop", "match", "mod", "move", "mut", "pub", "ref", "return", "self", "Self", "static", "str",
            "struct", "super", "trait", "true", "type", "u16", "u32", "u64", "u8", "unsafe", "use", "usize", "where",
            "while",
        ],
        any_case: false,
    },
    Language {
        names: &["python", "py", "ruby", "rb", "r", "elixir", "ex"],
        line_comments: &["#"],
        block_comment: None,
        quotes: &["\"\"\"", "'''", "\"", "'"],
        keywords: &[
            "and", "as", "assert", "async", "await", "begin", "break", "case", "class", "continue", "def", "del", "do",
            "elif", "else", "elsif", "end", "except", "False", "finally", "for", "from", "global", "if", "import",
            "in", "is", "lambda", "match", "module", "nil", "None", "nonlocal", "not", "or", "pass", "raise",
            "require", "return", "self", "then", "True", "try", "unless", "until", "when", "while", "with", "yield",
        ],
        any_case: false,
    },
    Language {
        names: &["javascript", "js", "jsx", "typescript", "ts", "tsx", "go", "golang"],
        line_comments: &["//"],
        block_comment: Some(("/*", "*/")),
        quotes: &["`", "\"", "'"],
        keywords: &[
            "any",
            "as",
            "async",
            "await",
            "boolean",
            "break",
            "case",
            "catch",
            "chan",
            "class",
            "const",
            "continue",
            "default",
            "defer",
            "delete",
            "do",
            "else",
            "enum",
            "export",
            "extends",
            "false",
            "finally",
            "for",
            "from",
            "func",
            "function",
            "go",
            "if",
            "implements",
            "import",
            "in",
            "instanceof",
            "int",
            "interface",
            "let",
            "map",
            "new",
            "nil",
            "null",
            "number",
            "of",
            "package",
            "range",
            "return",
            "select",
            "static",
            "string",
            "struct",
            "super",
            "switch",
            "this",
            "throw",
            "true",
            "try",
            "type",
            "typeof",
            "undefined",
            "var",
            "void",
            "while",
            "yield",
        ],
        any_case: false,
    },
    C_LIKE,
    Language {
        names: &["bash", "sh", "shell", "zsh", "fish", "console", "dockerfile", "make", "makefile"],
        line_comments: &["#"],
        block_comment: None,
        quotes: &["\"", "'"],
        keywords: &[
            "case", "cd", "do", "done", "echo", "elif", "else", "esac", "exit", "export", "fi", "for", "function",
            "if", "in", "local", "return", "set", "sudo", "then", "until", "while",
        ],
        any_case: false,
    },
    Language {
        names: &["json", "jsonc", "toml", "yaml", "yml", "ini", "conf"],
        line_comments: &["#", "//"],
        block_comment: None,
        quotes: &["\"", "'"],
        keywords: &["true", "false", "null", "yes", "no"],
        any_case: false,
    },
    Language {
        names: &["sql", "sqlite", "postgresql", "mysql"],
        line_comments: &["--"],
        block_comment: Some(("/*", "*/")),
        quotes: &["'", "\""],
        keywords: &[
            "all",
            "alter",
            "and",
            "as",
            "asc",
            "begin",
            "between",
            "by",
            "case",
            "commit",
            "create",
            "cross",
            "delete",
            "desc",
            "distinct",
            "drop",
            "else",
            "end",
            "exists",
            "from",
            "full",
            "group",
            "having",
            "in",
            "index",
            "inner",
            "insert",
            "into",
            "is",
            "join",
            "key",
            "left",
            "like",
            "limit",
            "not",
            "null",
            "offset",
            "on",
            "or",
            "order",
            "outer",
            "primary",
            "references",
            "right",
            "select",
            "set",
            "table",
            "then",
            "union",
            "unique",
            "update",
            "values",
            "view",
            "when",
            "where",
            "with",
        ],
        any_case: true,
    },
    Language {
        names: &["html", "xml", "svg"],
        line_comments: &[],
        block_comment: Some(("<!--", "-->")),
        quotes: &["\"", "'"],
        keywords: &[],
        any_case: false,
    },
    Language {
        names: &["lua", "haskell", "hs"],
        line_comments: &["--"],
        block_comment: None,
        quotes: &["\"", "'"],
        keywords: &[
            "and", "break", "case", "class", "data", "do", "else", "elseif", "end", "false", "for", "function", "if",
            "import", "in", "instance", "let", "local", "module", "nil", "not", "of", "or", "repeat", "return", "then",
            "true", "type", "until", "where", "while",
        ],
        any_case: false,
    },
];

/// What goes on from one line to the next.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub enum State {
    /// Nothing.
    #[default]
    Code,
    /// A block comment.
    Comment,
    /// A string that ends with this.
    String(&'static str),
}

/// Colours the lines of one block of code.
pub struct Highlighter {
    language: Option<&'static Language>,
    state: State,
}

impl Highlighter {
    /// For a language by the name on its fence.
    pub fn new(name: &str) -> Highlighter {
        let name = name.split([' ', ',', '{']).next().unwrap_or_default().to_ascii_lowercase();
        let language = LANGUAGES.iter().find(|l| l.names.contains(&name.as_str()));
        Highlighter { language, state: State::Code }
    }

    /// The next line.
    pub fn line(&mut self, line: &str, t: &Theme) -> Vec<Span<'static>> {
        let Some(l) = self.language else { return vec![Span::styled(line.to_string(), t.text)] };
        let mut out: Vec<Span<'static>> = Vec::new();
        let mut put = |text: &str, style: Style| match out.last_mut() {
            Some(last) if last.style == style => last.content.to_mut().push_str(text),
            _ => out.push(Span::styled(text.to_string(), style)),
        };
        let mut rest = line;
        while let Some(c) = rest.chars().next() {
            let (n, style) = match self.state {
                State::Comment => {
                    let end = l.block_comment.map_or("", |b| b.1);
                    let n = rest.find(end).map(|i| i + end.len());
                    if n.is_some() {
                        self.state = State::Code;
                    }
                    (n.unwrap_or(rest.len()), t.comment)
                }
                State::String(quote) => {
                    let n = string_end(rest, quote);
                    if n.is_some() {
                        self.state = State::Code;
                    }
                    (n.unwrap_or(rest.len()), t.string)
                }
                State::Code => {
                    if l.line_comments.iter().any(|c| rest.starts_with(c)) {
                        (rest.len(), t.comment)
                    } else if let Some((open, _)) = l.block_comment.filter(|b| rest.starts_with(b.0)) {
                        self.state = State::Comment;
                        (open.len(), t.comment)
                    } else if let Some(quote) = l.quotes.iter().find(|q| rest.starts_with(**q)) {
                        match string_end(&rest[quote.len()..], quote) {
                            Some(n) => (quote.len() + n, t.string),
                            None if quote.len() == 3 || *quote == "`" => {
                                self.state = State::String(quote);
                                (quote.len(), t.string)
                            }
                            // An apostrophe, or a string still to be finished.
                            None => (quote.len(), t.text),
                        }
                    } else if c.is_ascii_digit() {
                        let part = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == '.';
                        (rest.find(|c| !part(c)).unwrap_or(rest.len()), t.number)
                    } else if c.is_alphabetic() || c == '_' {
                        let n = rest.find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(rest.len());
                        let word = &rest[..n];
                        let known = match l.any_case {
                            true => l.keywords.contains(&word.to_ascii_lowercase().as_str()),
                            false => l.keywords.contains(&word),
                        };
                        let style = match known {
                            true => t.keyword,
                            false if c.is_uppercase() && !l.keywords.is_empty() => t.kind,
                            false => t.text,
                        };
                        (n, style)
                    } else {
                        (c.len_utf8(), t.text)
                    }
                }
            };
            put(&rest[..n], style);
            rest = &rest[n..];
        }
        out
    }
}

/// Where a string ends: after the quote that no backslash stands before.
fn string_end(s: &str, quote: &str) -> Option<usize> {
    let mut at = 0;
    while at < s.len() {
        if s[at..].starts_with(quote) {
            return Some(at + quote.len());
        }
        let c = s[at..].chars().next()?;
        at += c.len_utf8();
        if c == '\\' {
            at += s[at..].chars().next()?.len_utf8();
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::super::theme::Scheme;
    use super::*;

    #[test]
    fn code_is_coloured_and_nothing_is_lost() {
        let t = Theme::new(Scheme::Dark);
        type Case<'a> = (&'a str, &'a str, &'a [(&'a str, Style)]);
        let cases: &[Case] = &[
            (
                "rust",
                "let x = \"a\\\"b\"; // end",
                &[("let", t.keyword), ("\"a\\\"b\"", t.string), ("// end", t.comment)],
            ),
            ("rust", "fn f<'a>(x: &'a Vec<u8>)", &[("fn", t.keyword), ("Vec", t.kind), ("u8", t.keyword)]),
            ("py", "x = '''open", &[("'''", t.string), ("open", t.string)]),
            ("SQL", "Select 1.5 -- c", &[("Select", t.keyword), ("1.5", t.number), ("-- c", t.comment)]),
            ("unknown", "let x", &[("let x", t.text)]),
            ("c", "/* a", &[("/* a", t.comment)]),
        ];
        let mut wrong = Vec::new();
        for (language, line, want) in cases {
            let got = Highlighter::new(language).line(line, &t);
            let text: String = got.iter().map(|s| s.content.as_ref()).collect();
            if text != *line {
                wrong.push(format!("{line:?} became {text:?}"));
            }
            for (part, style) in *want {
                if !got.iter().any(|s| s.content.contains(part) && s.style == *style) {
                    wrong.push(format!("{line:?}: {part:?} is not as expected: {got:?}"));
                }
            }
        }
        assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    }

    #[test]
    fn comments_and_strings_go_over_lines() {
        let t = Theme::new(Scheme::Dark);
        let mut h = Highlighter::new("c");
        for (line, style) in [("/* one", t.comment), ("two", t.comment), ("three */", t.comment), ("x", t.text)] {
            assert_eq!(h.line(line, &t), [Span::styled(line, style)]);
        }
    }
}
