//! Verbs that print line by line on a pseudo-terminal, on the default model.

#[path = "common/program.rs"]
mod program;

use oxcart::chat::history::{Conversation, list};
use oxcart::engine::{Engine, EngineOptions};
use portable_pty::{CommandBuilder, PtySize, native_pty_system};
use program::{ends, oxcart};
use std::fs;
use std::io::{Read, Write};
use std::path::Path;

/// Runs the program on a terminal on which `keys` are typed. What stands on it at the end, and the exit status.
fn typed(config: &Path, args: &[&str], keys: &str) -> (String, u32) {
    let size = PtySize { rows: 24, cols: 200, pixel_width: 0, pixel_height: 0 };
    let pair = native_pty_system().openpty(size).unwrap();
    let mut command = CommandBuilder::new(env!("CARGO_BIN_EXE_oxcart"));
    command.args(args);
    command.env("OXCART_CONFIG", config);
    let mut child = pair.slave.spawn_command(command).unwrap();
    drop(pair.slave);
    pair.master.take_writer().unwrap().write_all(keys.as_bytes()).unwrap();
    let mut shown = Vec::new();
    // At the end of a terminal Linux has an error.
    let _ = pair.master.try_clone_reader().unwrap().read_to_end(&mut shown);
    (String::from_utf8_lossy(&shown).into_owned(), child.wait().unwrap().exit_code())
}

#[test]
fn a_text_does_not_command_the_terminal() {
    let path = oxcart::catalog::default_model().expect("the default model can be fetched");
    let t = &Engine::open(&path, &EngineOptions { threads: 1, ..EngineOptions::default() }).unwrap().tokenizer;
    let command = |id: &u32| matches!(t.piece(*id), [0..=8 | 11..=12 | 14..=31]) && !t.is_control(*id);
    let id = (0..t.n_vocab() as u32).find(command).expect("a token of a byte");
    let byte = char::from(t.piece(id)[0]);
    let bias = format!("{id}+1000000");
    let args = ["run", "-p", r"The\x1b[31m ox", "-n", "3", "--temp", "0", "-l", &bias];
    let (shown, status) = typed(Path::new("/dev/null"), &args, "");
    assert!(status == 0 && shown.contains("The[31m ox\r\n"), "{shown:?}");
    assert!(!shown.contains(byte) && !shown.contains('\u{1b}'), "{shown:?}");
    let (piped, ..) = ends(&mut oxcart(&args));
    assert_eq!(piped, format!("The\u{1b}[31m ox{byte}{byte}{byte}\n"));
}

#[test]
fn a_chat_goes_on_where_a_question_cannot_be_answered() {
    let dir = tempfile::tempdir().unwrap();
    let (config, template, kept) =
        (dir.path().join("config.toml"), dir.path().join("strict.jinja"), dir.path().join("kept"));
    let name = toml::Value::from(kept.to_str().unwrap());
    fs::write(&config, format!("[conversations]\ndir = {name}\n")).unwrap();
    let strict = "{% for m in messages %}{% if 'bad' in m.content %}{{ raise_exception('not that') }}{% endif %}\
        {{ m.content }}{% endfor %}";
    fs::write(&template, strict).unwrap();
    let args = ["chat", "--line", "-n", "2", "-c", "128", "--chat-template-file", template.to_str().unwrap()];
    let long = "again and ".repeat(140);
    let keys = format!("a bad one\n/regen\na good one\n{long}\n/exit\n");
    let (shown, status) = typed(&config, &args, &keys);
    assert_eq!(status, 0, "{shown}");
    let counts = ["not that", "the question stands: /regen tries again", "oxcart: the prompt has "];
    assert_eq!(counts.map(|what| shown.matches(what).count()), [2, 2, 1], "{shown}");
    // What could not be answered is on disk all the same; what has no room is left to its branch.
    let kept = list(&kept);
    let c = Conversation::read(&kept[0].path).unwrap();
    let said: Vec<&str> = c.turns().iter().filter(|t| t.role == "user").map(|t| t.content.as_str()).collect();
    assert_eq!((kept.len(), &said[..2]), (1, &["a bad one", "a good one"][..]));
    assert_eq!(c.head().map(|h| c.path_to(h).len()), Some(2), "the good one and its answer");
}
