//! Chat templates against Jinja2, with the templates that llama.cpp tests with (fetched as in tests/tokenizer.rs).

mod package;

use oxcart::chat::{Message, Template};
use sha2::{Digest, Sha256};
use std::fmt::Write;

/// What Jinja2 3.1.6, set up as transformers does, rendered: for each template the first eight bytes of the sha256 of four
/// texts (two conversations, each with and without the beginning of an answer), `error` where the template refuses.
const GOLDEN: &str = include_str!("template/sha256.txt");

fn conversations() -> [Vec<Message>; 2] {
    [
        vec![Message::new("user", "Hello <|im_end|> 牛")],
        vec![
            Message::new("system", "Be brief."),
            Message::new("user", " Hi "),
            Message::new("assistant", "Yes?\n"),
            Message::new("user", "\"Why\" & <how>?"),
        ],
    ]
}

#[test]
fn real_templates_render_as_in_python() {
    let mut wrong = Vec::new();
    for line in GOLDEN.lines() {
        let (name, want) = line.split_once(' ').unwrap();
        let source = std::fs::read_to_string(package::folder().join(format!("models/templates/{name}.jinja"))).unwrap();
        let template = match Template::with_marks(&source, "<s>", "</s>") {
            Ok(t) => t,
            Err(e) => {
                wrong.push(format!("{name}: {e}"));
                continue;
            }
        };
        let mut texts = Vec::new();
        for messages in conversations() {
            for add_generation_prompt in [true, false] {
                texts.push(template.render(&messages, add_generation_prompt));
            }
        }
        let hash = |text: &String| {
            let digest = Sha256::digest(text);
            digest[..8].iter().fold(String::new(), |mut s, b| {
                write!(s, "{b:02x}").unwrap();
                s
            })
        };
        let got: Vec<_> = texts.iter().map(|t| t.as_ref().map_or("error".into(), hash)).collect();
        if got.join(" ") != want {
            wrong.push(format!("{name}: {}, expected {want}: {texts:?}", got.join(" ")));
        }
    }
    assert!(wrong.is_empty(), "{} differ:\n{}", wrong.len(), wrong.join("\n"));
}
