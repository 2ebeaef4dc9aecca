//! The program as a person runs it.

use assert_cmd::Command;

/// The program with these words.
pub fn oxcart(args: &[&str]) -> Command {
    let mut c = Command::cargo_bin("oxcart").expect("the binary is built");
    // Whoever runs the tests may have a configuration.
    c.env("OXCART_CONFIG", "/dev/null").args(args);
    c
}

/// stdout, stderr and exit status.
pub fn ends(c: &mut Command) -> (String, String, Option<i32>) {
    let o = c.output().expect("it runs");
    let text = |b: Vec<u8>| String::from_utf8(b).expect("UTF-8");
    (text(o.stdout), text(o.stderr), o.status.code())
}
