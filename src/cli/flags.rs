//! The words of a command line before clap reads them: llama.cpp's flags of several letters behind one dash, which clap would
//! take for several of one letter, and its flags that change nothing here.
//!
//! As in llama.cpp, what follows a flag with a value is its value, whatever it begins with.

use clap::{Arg, ArgAction, Command};
use std::ffi::OsString;

/// Flags of several letters that verbs have, as names behind two dashes.
const LETTERS: &[&str] = &["-ub", "-bf", "-ctk", "-ctv", "-pg", "-sys", "-cnv", "-ofreq", "-Cr", "-md", "-oe"];

/// What stands behind a flag.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Value {
    None,
    One,
    /// Of llama.cpp's programs, some want it.
    Switch,
}

/// Flags of llama.cpp that change nothing here, where a verb has none of the name.
const IDLE: &[(&[&str], Value)] = &[
    (&["-ngl", "--n-gpu-layers", "--gpu-layers"], Value::One),
    (&["-sm", "--split-mode"], Value::One),
    (&["-ts", "--tensor-split"], Value::One),
    (&["-ot", "--override-tensor"], Value::One),
    (&["-mg", "--main-gpu"], Value::One),
    (&["-dev", "--device"], Value::One),
    (&["-fa", "--flash-attn"], Value::Switch),
    (&["-nkvo", "--no-kv-offload"], Value::Switch),
    (&["-cmoe", "--cpu-moe"], Value::None),
    (&["-ncmoe", "--n-cpu-moe"], Value::One),
    (&["-nopo", "--no-op-offload", "--no-host"], Value::Switch),
    (&["-fit", "--fit"], Value::One),
    (&["-np", "--parallel"], Value::One),
    (&["-kvu", "--kv-unified", "-no-kvu", "--no-kv-unified"], Value::None),
    (&["-mmp", "--mmap"], Value::Switch),
    (&["-lm", "--load-mode"], Value::One),
    (&["--repack"], Value::Switch),
    (&["--no-repack", "-nr"], Value::None),
    (&["--warmup", "--no-warmup"], Value::None),
    (&["-cnv", "--conversation", "-no-cnv", "--no-conversation"], Value::None),
    (&["-st", "--single-turn"], Value::None),
    (&["--poll", "--poll-batch", "--prio", "--prio-batch"], Value::One),
    (&["-tb", "--threads-batch", "-b", "--batch-size"], Value::One),
    (&["--ppl"], Value::None),
    (&["-s", "--seed"], Value::One),
    (&["--max-buffer-size"], Value::One),
];

/// A command line that clap reads as llama.cpp would.
#[derive(Debug, PartialEq)]
pub struct Line {
    /// Its words.
    pub words: Vec<OsString>,
    /// Flags that were left out.
    pub idle: Vec<String>,
}

/// Reads a command line for `cli`. The error tells of a flag that there is not, or that lacks its value.
pub fn read(cli: &Command, line: impl Iterator<Item = OsString>) -> Result<Line, String> {
    let mut line = line.peekable();
    let (mut words, mut idle) = (Vec::from_iter(line.next()), Vec::new());
    let mut verb = cli;
    while let Some(word) = line.next() {
        let Some(text) = word.to_str().filter(|t| t.len() > 1 && t.starts_with('-')) else {
            verb = word.to_str().and_then(|name| verb.find_subcommand(name)).unwrap_or(verb);
            words.push(word);
            continue;
        };
        if text == "--" {
            words.push(word);
            words.extend(line);
            break;
        }
        let (name, given) = text.split_once('=').map_or((text, None), |(name, value)| (name, Some(value)));
        let long = match name {
            _ if LETTERS.contains(&name) => format!("-{name}"),
            // --top_k is --top-k.
            _ if name.starts_with("--") => name.replace('_', "-"),
            _ => name.to_string(),
        };
        let Some(arg) = find(verb, &long) else {
            let is =
                |(names, _): &&(&[&str], Value)| names.iter().any(|n| *n == name || *n == long) && runs_models(verb);
            let Some((_, value)) = IDLE.iter().find(is) else {
                if is_unknown(verb, name) {
                    return Err(format!("unknown flag {name}"));
                }
                words.push(word);
                continue;
            };
            let given = given.map(OsString::from).or_else(|| match value {
                Value::None => None,
                Value::One => line.next(),
                Value::Switch => line.next_if(|w| w.to_str().is_some_and(is_switch)),
            });
            if *value == Value::One && given.is_none() {
                return Err(format!("{name}: its value is missing"));
            }
            let meant: &[&str] = match (long.as_str(), given.as_ref().and_then(|value| value.to_str())) {
                ("-mmp" | "--mmap", Some("0")) | ("-lm" | "--load-mode", Some("none")) => &["--no-mmap"],
                ("-lm" | "--load-mode", Some("mlock")) => &["--no-mmap", "--mlock"],
                ("-lm" | "--load-mode", Some("mmap+mlock")) => &["--mlock"],
                _ => &[],
            };
            if !meant.is_empty() && meant.iter().all(|flag| find(verb, flag).is_some()) {
                words.extend(meant.iter().map(OsString::from));
            } else {
                idle.push(name.to_string());
            }
            continue;
        };
        let mut flag = OsString::from(long);
        if let Some(value) = given {
            flag.push("=");
            flag.push(value);
        } else if takes_one(arg)
            && let Some(value) = line.next_if(|w| w != "--")
        {
            if !value.as_encoded_bytes().starts_with(b"-") {
                words.extend([flag, value]);
                continue;
            }
            flag.push("=");
            flag.push(value);
        }
        words.push(flag);
    }
    Ok(Line { words, idle })
}

/// A flag by its name: `-x`, `--xyz`.
fn find<'a>(verb: &'a Command, name: &str) -> Option<&'a Arg> {
    let is = |a: &&Arg| match name.strip_prefix("--") {
        Some(long) => a.get_long() == Some(long) || a.get_all_aliases().is_some_and(|all| all.contains(&long)),
        None => a.get_short().is_some_and(|c| name.strip_prefix('-') == Some(c.encode_utf8(&mut [0; 4]))),
    };
    verb.get_arguments().find(is)
}

fn takes_one(a: &Arg) -> bool {
    let one = a.get_num_args().is_none_or(|n| (n.min_values(), n.max_values()) == (1, 1));
    one && matches!(a.get_action(), ArgAction::Set | ArgAction::Append)
}

fn runs_models(verb: &Command) -> bool {
    ["tokenize", "quantize"].contains(&verb.get_name()) || verb.get_arguments().any(|a| a.get_id() == "threads")
}

/// `on`, `0`, or several with commas between, as llama-bench has them.
fn is_switch(word: &str) -> bool {
    word.split(',').all(|w| ["on", "off", "auto", "0", "1"].contains(&w))
}

/// Whether a word is no flag, and no flag of one letter with its value behind: such a value does not begin with a letter.
fn is_unknown(verb: &Command, name: &str) -> bool {
    let mut letters = name.chars().skip(1);
    let (Some(first), Some(second)) = (letters.next(), letters.next()) else { return false };
    let value = || find(verb, &format!("-{first}")).is_some_and(takes_one) && !second.is_alphabetic();
    first != '-' && !first.is_ascii_digit() && !value()
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    fn read(line: &str) -> Result<(String, String), String> {
        let words = std::iter::once("oxcart").chain(line.split(' ')).map(OsString::from);
        super::read(&super::super::Cli::command(), words).map(|line| {
            let words: Vec<_> = line.words[1..].iter().map(|w| w.to_str().expect("UTF-8")).collect();
            (words.join(" "), line.idle.join(" "))
        })
    }

    #[test]
    fn flags_of_several_letters_are_flags() {
        let cases = [
            ("run -ub 64 -ctk=q8_0 -ctv f16 -p x", "run --ub 64 --ctk=q8_0 --ctv f16 -p x", ""),
            ("run -p -md -md a.gguf", "run -p=-md --md a.gguf", ""),
            ("run --prompt --json", "run --prompt=--json", ""),
            ("run -p x -- -ub -hf", "run -p x -- -ub -hf", ""),
            ("run -s1 -t8 -c4096 -n-1 -n -1 --temp -1", "run -s1 -t8 -c4096 -n-1 -n=-1 --temp=-1", ""),
            ("run -ngl 99 -fa -p x", "run -p x", "-ngl -fa"),
            ("run -fa on -p x -fa 0", "run -p x", "-fa -fa"),
            ("chat -fa=off -no-cnv -cnv -st", "chat", "-fa -no-cnv -cnv -st"),
            ("run -cnv -no-cnv", "run --cnv", "-no-cnv"),
            ("run -tb 8 -dev none -mg 0 --poll 50 --no-warmup -nkvo", "run", "-tb -dev -mg --poll --no-warmup -nkvo"),
            ("bench -mmp 0 -ngl 0,99 -fa 0,1 -nkvo 1", "bench --no-mmap", "-ngl -fa -nkvo"),
            ("bench -mmp 1", "bench", "-mmp"),
            ("plan -mmp 0", "plan", "-mmp"),
            ("run -lm none -p x", "run --no-mmap -p x", ""),
            ("run -lm mlock --load-mode mmap+mlock", "run --no-mmap --mlock --mlock", ""),
            ("run -lm mmap --load_mode=auto", "run", "-lm --load_mode"),
            ("perplexity -ncmoe 8 -cmoe -np 4 -kvu -fit off -f x", "perplexity -f x", "-ncmoe -cmoe -np -kvu -fit"),
            ("bench -ncmoe 0,8 -nopo 1 --no-host 0", "bench", "-ncmoe -nopo --no-host"),
            ("perplexity -s 7 -f x", "perplexity -f x", "-s"),
            ("run -s 7 -b 2048", "run -s 7", "-b"),
            ("run --top_k 3 --n_gpu_layers 9", "run --top-k 3", "--n_gpu_layers"),
            ("imatrix --ppl -ofreq 5", "imatrix --ofreq 5", "--ppl"),
            ("quantize --max-buffer-size 5 a.gguf Q8_0", "quantize a.gguf Q8_0", "--max-buffer-size"),
            ("sessions list --json", "sessions list --json", ""),
            ("-V", "-V", ""),
        ];
        for (line, words, idle) in cases {
            assert_eq!(read(line), Ok((words.into(), idle.into())), "{line}");
        }
    }

    #[test]
    fn what_is_no_flag_is_told() {
        for (line, flag) in [
            ("run -hf foo", "-hf"),
            ("-hf foo", "-hf"),
            ("run -xyz=3", "-xyz"),
            ("run -temp 1", "-temp"),
            ("list -ngl 0", "-ngl"),
            ("run -ub512", "-ub512"),
        ] {
            assert_eq!(read(line), Err(format!("unknown flag {flag}")), "{line}");
        }
        assert_eq!(read("run -p x -ngl"), Err("-ngl: its value is missing".into()));
    }

    #[test]
    fn every_flag_of_several_letters_is_a_verb_s() {
        let cli = super::super::Cli::command();
        for name in LETTERS {
            let has = cli.get_subcommands().any(|verb| find(verb, &format!("-{name}")).is_some());
            assert!(has, "{name}");
        }
    }
}
