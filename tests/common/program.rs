//! The program as a person runs it.

use assert_cmd::Command;

/// The program with these words, to be spoken with while it runs.
pub fn process(args: &[&str]) -> std::process::Command {
    let mut c = std::process::Command::new(assert_cmd::cargo::cargo_bin!("oxcart"));
    // Whoever runs the tests may have a configuration.
    c.env("OXCART_CONFIG", "/dev/null").args(args);
    c
}

/// The program with these words.
pub fn oxcart(args: &[&str]) -> Command {
    Command::from_std(process(args))
}

/// stdout, stderr and exit status.
pub fn ends(c: &mut Command) -> (String, String, Option<i32>) {
    let o = c.output().expect("it runs");
    let text = |b: Vec<u8>| String::from_utf8(b).expect("UTF-8");
    (text(o.stdout), text(o.stderr), o.status.code())
}
