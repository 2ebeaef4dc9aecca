//! The program: words from the command line to a verb, an error chain to one line.

use std::process::ExitCode;

fn main() -> ExitCode {
    oxcart::cli::main()
}

#[global_allocator]
static ALLOCATOR: oxcart::quota::Allocator = oxcart::quota::Allocator;
