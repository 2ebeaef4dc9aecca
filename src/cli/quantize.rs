//! `oxcart quantize`: a smaller model from a larger one, with llama-quantize's names and bytes.

use super::engine::threads;
use super::interrupt::interruptible;
use super::progress::bar;
use super::usage_error;
use crate::convert;
use crate::disk::{self, partial};
use crate::engine::default_threads;
use crate::gguf::{Gguf, MetadataValue, Value, parse_override};
use crate::quantize::importance::Importance;
use crate::quantize::recipe::{MIXES, Mix, Wishes};
use crate::quantize::source::Source;
use crate::quantize::{Event, Loss, Options, Split, Step, files, plan, write};
use anyhow::{Context, bail};
use oxcart_quant::Format;
use oxcart_quant::format::FORMATS;
use regex::{Regex, RegexBuilder};
use std::ffi::OsString;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Instant;

/// Flags as llama-quantize has them.
#[derive(clap::Args)]
#[command(override_usage = "oxcart quantize [OPTIONS] IN [OUT] TYPE [THREADS]")]
pub struct Args {
    /// Input: a GGUF in F32, F16 or BF16 (any part of a split one), or a checkpoint folder (config.json and *.safetensors)
    #[arg(value_name = "IN")]
    input: PathBuf,
    /// OUT: output file [default: ggml-model-TYPE.gguf next to IN]. TYPE: the mixture of formats, e.g. Q4_K_M, or COPY to
    /// leave tensors as they are. THREADS: 0 or none: one per core
    #[arg(value_name = "[OUT] TYPE [THREADS]", num_args = 1..=3, required = true)]
    target: Vec<OsString>,
    /// Also requantize quantized tensors; this loses quality twice
    #[arg(long)]
    allow_requantize: bool,
    /// Leave the output matrix as it is
    #[arg(long)]
    leave_output_tensor: bool,
    /// Use one format for all matrices
    #[arg(long)]
    pure: bool,
    /// Importance matrix (from oxcart imatrix or llama-imatrix), used to weight the quantization error
    #[arg(long, value_name = "FILE")]
    imatrix: Option<PathBuf>,
    /// Use the importance matrix only for tensors whose names contain this; may be repeated
    #[arg(long, value_name = "NAME", requires = "imatrix", conflicts_with = "exclude_weights")]
    include_weights: Vec<String>,
    /// Do not use the importance matrix for tensors whose names contain this; may be repeated
    #[arg(long, value_name = "NAME", requires = "imatrix")]
    exclude_weights: Vec<String>,
    /// Format of the output matrix
    #[arg(long, value_name = "FORMAT", value_parser = format)]
    output_tensor_type: Option<Format>,
    /// Format of the token embeddings
    #[arg(long, value_name = "FORMAT", value_parser = format)]
    token_embedding_type: Option<Format>,
    /// Format of the tensors whose names match a regular expression, e.g. 'ffn_down=q6_k'; may be repeated, the first match
    /// decides
    #[arg(long, value_name = "REGEX=FORMAT", value_parser = named_format)]
    tensor_type: Vec<(Regex, Format)>,
    /// File of whitespace-separated REGEX=FORMAT rules, applied after --tensor-type
    #[arg(long, value_name = "FILE")]
    tensor_type_file: Option<PathBuf>,
    /// Override a metadata value, KEY=TYPE:VALUE with the types int, float, bool and str; may be repeated
    #[arg(long, value_name = "KEY=TYPE:VALUE", value_parser = overriding)]
    override_kv: Vec<(String, MetadataValue)>,
    /// Remove these layers, e.g. 5,6,7, and renumber those that follow
    #[arg(long, value_name = "N,..", value_delimiter = ',')]
    prune_layers: Vec<u64>,
    /// Name of the checkpoint's pre-tokenizer (tokenizer.ggml.pre), where it is not recognized
    #[arg(long, value_name = "NAME")]
    pre: Option<String>,
    /// Resume an interrupted run of the same command
    #[arg(long)]
    resume: bool,
    /// Split the output into files of at most this size, e.g. 4G or 500M
    #[arg(long, value_name = "SIZE", value_parser = size)]
    split_max_size: Option<u64>,
    /// Split the output as the input is split, with the same tensors in each file
    #[arg(long, conflicts_with = "split_max_size")]
    keep_split: bool,
    /// Print the format of each tensor and the size of the file; write nothing
    #[arg(long)]
    dry_run: bool,
    /// Measure the error of each tensor, unweighted and weighted by the importance matrix, and list the worst first
    #[arg(long)]
    report: bool,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// What `[OUT] TYPE [THREADS]` asks for.
struct Target {
    output: PathBuf,
    mix: Option<&'static Mix>, // none: COPY
    threads: usize,
}

impl Target {
    fn of(input: &Path, words: &[OsString]) -> Result<Target, String> {
        let mix = |word: &OsString| {
            let word = word.to_str()?;
            if word.eq_ignore_ascii_case("COPY") { Some(None) } else { Mix::named(word).map(Some) }
        };
        let (output, kind, rest) = match words {
            [kind, rest @ ..] if mix(kind).is_some() => (None, kind, rest),
            [output, kind, rest @ ..] => (Some(PathBuf::from(output)), kind, rest),
            _ => return Err("TYPE is missing".into()),
        };
        let Some(mix) = mix(kind) else {
            let names: Vec<_> = MIXES.iter().map(|m| m.name).collect();
            return Err(format!("TYPE: found {kind:?}, expected one of {} COPY", names.join(" ")));
        };
        let threads = match rest {
            [] => 0,
            [n] => threads(&n.to_string_lossy()).map_err(|e| format!("THREADS: found {n:?}, {e}"))?,
            [_, more, ..] => return Err(format!("found {more:?} behind THREADS")),
        };
        let threads = if threads == 0 { default_threads() } else { threads };
        let output = output.unwrap_or_else(|| {
            let folder = if input.is_dir() { input } else { input.parent().unwrap_or(Path::new("")) };
            folder.join(format!("ggml-model-{}.gguf", mix.map_or("COPY", |m| m.name)))
        });
        Ok(Target { output, mix, threads })
    }
}

fn format(s: &str) -> Result<Format, String> {
    let known = || FORMATS.iter().filter(|f| oxcart_quant::Quantizer::new(f.format).is_some());
    known().find(|f| f.name.eq_ignore_ascii_case(s)).map(|f| f.format).ok_or_else(|| {
        let names: Vec<_> = known().map(|f| f.name).collect();
        format!("expected one of {}", names.join(" "))
    })
}

/// `REGEX=FORMAT`
fn named_format(s: &str) -> Result<(Regex, Format), String> {
    let (name, f) = s.rsplit_once('=').filter(|(name, _)| !name.is_empty()).ok_or("expected REGEX=FORMAT")?;
    let name = RegexBuilder::new(name).case_insensitive(true).build().map_err(|e| e.to_string())?;
    Ok((name, format(f)?))
}

/// `KEY=TYPE:VALUE`, with numbers in the types that llama-quantize gives them.
fn overriding(spec: &str) -> Result<(String, MetadataValue), String> {
    let (key, value) = parse_override(spec)?;
    let value = match value {
        MetadataValue::I64(n) => {
            let n = n.try_into().map_err(|_| format!("{key}: found {n}, expected 0 to {}", u32::MAX))?;
            MetadataValue::U32(n)
        }
        MetadataValue::F64(x) => MetadataValue::F32(x as f32),
        v => v,
    };
    Ok((key.to_string(), value))
}

/// The `REGEX=FORMAT` of a file.
fn named_formats(file: &Path) -> anyhow::Result<Vec<(Regex, Format)>> {
    const MOST_BYTES: u64 = 16 << 20;
    let text = disk::read_text(file, MOST_BYTES).with_context(|| file.display().to_string())?;
    let lines = text.lines().enumerate().flat_map(|(i, line)| line.split_whitespace().map(move |word| (i + 1, word)));
    let parse = |(line, word)| {
        named_format(word).map_err(|e| anyhow::anyhow!("{}: line {line}: {word:?}: {e}", file.display()))
    };
    lines.map(parse).collect()
}

/// A size as gguf-split has it: a number and M or G, thousands.
fn size(s: &str) -> Result<u64, String> {
    let (number, unit) = match s.as_bytes().last() {
        Some(b'M' | b'm') => (&s[..s.len() - 1], 1_000_000),
        Some(b'G' | b'g') => (&s[..s.len() - 1], 1_000_000_000),
        _ => (s, 1),
    };
    let n = number.parse::<u64>().ok().and_then(|n| n.checked_mul(unit)).filter(|&n| n > 0);
    n.ok_or_else(|| "expected a number of bytes, or one with M or G".to_string())
}

pub fn run(a: Args) -> anyhow::Result<()> {
    let target = Target::of(&a.input, &a.target).unwrap_or_else(|e| usage_error(&e));
    let mut g = match a.input.is_dir() {
        true if a.keep_split => bail!("{}: a folder, expected a split GGUF (--keep-split)", a.input.display()),
        true => convert::open(&a.input, &convert::Options { pre: a.pre.clone() })?,
        false => Source::from(Gguf::open(&a.input)?),
    };
    for remark in g.remarks() {
        tell!("{remark}");
    }
    if !a.prune_layers.is_empty() {
        g.prune(&a.prune_layers)?;
    }
    let overrides = overridden(&mut g, &a.override_kv);
    let o = options(&a, &g, &target, overrides)?;
    let steps = plan(&g, &o)?;
    let files = files(&g, &steps, &o, &target.output)?;
    let start = Instant::now();
    let errors = if a.dry_run {
        if let Some(s) = steps.iter().find(|s| s.lacks_importance) {
            tell!("tensor {}: {} will need an importance matrix (--imatrix)", s.new.name, s.new.kind);
        }
        vec![None; steps.len()]
    } else {
        let read: Vec<PathBuf> = g.files().iter().chain(&a.imatrix).chain(&a.tensor_type_file).cloned().collect();
        if let Some(file) = overwritten(&files, &read) {
            bail!("{}: is also an input, expected another file", file.display());
        }
        written(&g, &steps, &o, &target.output)?
    };
    let name = target.mix.map_or("COPY", |m| m.name);
    print(&a, name, &steps, &errors, &files, start.elapsed().as_secs_f64())
}

/// Sets metadata as `--override-kv` says. Returns each key's last value.
fn overridden(g: &mut Source, flags: &[(String, MetadataValue)]) -> Vec<(String, Value)> {
    let mut overrides: Vec<(String, Value)> = Vec::new();
    for (key, value) in flags {
        if let MetadataValue::String(text) = value
            && let Some(other) = text.split(',').skip(1).find(|part| parse_override(part).is_ok())
        {
            tell!("--override-kv {key}: its text has {other:?} in it; each override has a flag of its own here");
        }
        g.set(key, value.clone().into());
        overrides.retain(|(k, _)| k != key);
        overrides.push((key.clone(), value.clone().into()));
    }
    overrides
}

/// What the flags and the files that they name ask for.
fn options(a: &Args, g: &Source, target: &Target, overrides: Vec<(String, Value)>) -> anyhow::Result<Options> {
    let mut tensors = a.tensor_type.clone();
    tensors.extend(a.tensor_type_file.as_deref().map(named_formats).transpose()?.into_iter().flatten());
    for (name, _) in tensors.iter().filter(|(name, _)| !g.tensors().iter().any(|t| name.is_match(&t.name))) {
        tell!("--tensor-type {name}: no tensor has such a name");
    }
    let importance = match &a.imatrix {
        None => None,
        Some(file) => {
            let i = Importance::read(file, &a.include_weights, &a.exclude_weights)?;
            tell!("{}: importance of {} tensors", file.display(), i.len());
            Some(i).filter(|i| !i.is_empty())
        }
    };
    Ok(Options {
        importance,
        mix: target.mix,
        wishes: Wishes {
            pure: a.pure,
            leave_output: a.leave_output_tensor,
            output: a.output_tensor_type,
            embedding: a.token_embedding_type,
            tensors,
        },
        allow_requantize: a.allow_requantize,
        overrides,
        split: match (a.keep_split, a.split_max_size) {
            (true, _) => Split::Same,
            (false, Some(most)) => Split::Size(most),
            (false, None) => Split::Whole,
        },
        threads: target.threads,
        report: a.report,
        resume: a.resume,
    })
}

/// Takes all steps, and tells how far they are. Returns what each tensor lost.
fn written(g: &Source, steps: &[Step<'_>], o: &Options, to: &Path) -> anyhow::Result<Vec<Option<Loss>>> {
    let mut errors = vec![None; steps.len()];
    let stop = interruptible()?;
    let bytes = steps.iter().map(|s| s.tensor.n_bytes()).sum();
    let bar = bar(Some(bytes), "{bar:30} {bytes}/{total_bytes} {bytes_per_sec} {eta} {msg}");
    let next = |i: usize| bar.set_message(steps.get(i).map_or(String::new(), |s| s.new.name.clone()));
    next(0);
    let watch = |event: Event<'_>| match event {
        Event::Resumed(whole) => {
            tell!("{whole} of {} tensors are there already", steps.len());
            let there: u64 = steps[..whole].iter().map(|s| s.tensor.n_bytes()).sum();
            bar.set_length(bar.length().unwrap_or(0).saturating_sub(there));
            next(whole);
        }
        Event::Read(bytes) => bar.inc(bytes),
        Event::Done(i, done) => {
            let s = &steps[i];
            errors[i] = done.error;
            if bar.is_hidden() {
                let speed = s.tensor.n_bytes() as f64 / 1e6 / done.time.as_secs_f64().max(1e-9);
                let (no, all, name) = (i + 1, steps.len(), &s.new.name);
                tell!("[{no}/{all}] {name}: {} to {}, {speed:.0} MB/s", s.tensor.kind, s.new.kind);
            }
            next(i + 1);
        }
    };
    write(g, steps, o, to, watch, || !stop.asked())?;
    bar.finish_and_clear();
    Ok(errors)
}

/// What is written in the place of something that is read: a part of the output, or what it is called until it is whole.
fn overwritten(files: &[(PathBuf, u64)], read: &[PathBuf]) -> Option<PathBuf> {
    let read: Vec<PathBuf> = read.iter().filter_map(|p| p.canonicalize().ok()).collect();
    let mut written = files.iter().flat_map(|(file, _)| [file.clone(), partial(file)]);
    written.find(|p| p.canonicalize().is_ok_and(|p| read.contains(&p)))
}

/// A line for every tensor, and totals.
fn print(
    a: &Args,
    name: &str,
    steps: &[Step<'_>],
    errors: &[Option<Loss>],
    files: &[(PathBuf, u64)],
    seconds: f64,
) -> anyhow::Result<()> {
    let out = &mut std::io::stdout().lock();
    let new_bytes = |s: &Step<'_>| s.new.n_bytes().with_context(|| format!("tensor {}: too large", s.new.name));
    let (mut before, mut after, mut weights) = (0u64, 0u64, 0u64);
    let mut rows = Vec::new();
    let mut order: Vec<usize> = (0..steps.len()).collect();
    if a.report && !a.json {
        let by = |i: &usize| errors[*i].map_or(-1.0, |e| e.weighted.unwrap_or(e.plain));
        order.sort_by(|i, j| by(j).total_cmp(&by(i)));
    }
    for i in order {
        let (s, error) = (&steps[i], errors[i]);
        let (bytes, n) = (new_bytes(s)?, s.tensor.n_elements());
        (before, after, weights) = (before + s.tensor.n_bytes(), after + bytes, weights + n);
        if a.json {
            rows.push(serde_json::json!({
                "name": s.new.name, "dims": s.new.dims, "from": s.tensor.kind.name(), "to": s.new.kind.name(),
                "bytes": bytes, "bits_per_weight": bytes as f64 * 8.0 / n as f64, "relative_rms_error": error.map(|e| e.plain),
                "weighted_rms_error": error.and_then(|e| e.weighted),
            }));
        } else {
            let bits = bytes as f64 * 8.0 / n as f64;
            write!(out, "{:32} {:>7} -> {:7} {bits:6.3} bits", s.new.name, s.tensor.kind.name(), s.new.kind.name())?;
            match error {
                Some(Loss { plain, weighted: None }) => writeln!(out, "  error {:8.4} %", 100.0 * plain)?,
                Some(Loss { plain, weighted: Some(w) }) => {
                    writeln!(out, "  error {:8.4} %, weighted {:8.4} %", 100.0 * plain, 100.0 * w)?;
                }
                None => writeln!(out)?,
            }
        }
    }
    if a.json {
        let paths: Vec<_> = files.iter().map(|(path, _)| path).collect();
        let file_bytes: u64 = files.iter().map(|(_, bytes)| bytes).sum();
        let whole = serde_json::json!({
            "model": a.input, "type": name, "dry_run": a.dry_run, "files": paths, "file_bytes": file_bytes, "bytes_before": before, "bytes": after,
            "bits_per_weight": after as f64 * 8.0 / weights as f64, "seconds": seconds, "tensors": rows,
        });
        writeln!(out, "{whole}")?;
        return Ok(());
    }
    let mib = |b: u64| b as f64 / (1 << 20) as f64;
    let bits = |b: u64| b as f64 * 8.0 / weights.max(1) as f64;
    writeln!(out, "{}: {:.2} MiB, {:.2} bits per weight", a.input.display(), mib(before), bits(before))?;
    writeln!(out, "{name}: {:.2} MiB, {:.2} bits per weight", mib(after), bits(after))?;
    for (file, bytes) in files {
        let size = if a.dry_run { "would have" } else { "has" };
        writeln!(out, "{} {size} {bytes} bytes", file.display())?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::size;

    #[test]
    fn sizes_have_units() {
        let cases = [
            ("7", Ok(7)),
            ("500M", Ok(500_000_000)),
            ("4G", Ok(4_000_000_000)),
            ("0", Err(())),
            ("G", Err(())),
            ("", Err(())),
        ];
        for (text, want) in cases {
            assert_eq!(size(text).map_err(|_| ()), want, "{text:?}");
        }
    }
}
