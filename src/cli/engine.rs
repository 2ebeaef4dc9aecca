//! The flags that every verb with a model has, and the opening of it.

use super::interrupt::asked;
use super::progress::Reading;
use super::units::size;
use crate::catalog;
use crate::engine::{Engine, EngineError, EngineOptions, Session, SessionOptions, default_threads};
use crate::gguf::one_line;
use crate::load::Residence;
use crate::placement::{Here, Numa, Placement, parse_mask, parse_range};
use crate::quantize::recipe::MIXES;
use anyhow::{Context, anyhow};
use clap::ArgAction;
use oxcart_quant::attention::KvType;
use oxcart_quant::isa::IsaError;
use oxcart_quant::{Format, Isa, Kernels};
use std::collections::{BTreeMap, BTreeSet};
use std::ops::ControlFlow;
use std::path::PathBuf;
use std::sync::Arc;

/// Which model, and how it computes.
#[derive(Default, clap::Args)]
pub struct EngineArgs {
    /// Model: a GGUF file (any part of a split one), or a name from the catalogue, NAME[:QUANT], fetched on first use
    /// [default: SmolLM2-135M-Instruct]
    #[arg(short, long, value_name = "MODEL")]
    pub model: Option<String>,
    /// Worker threads; 0 or less: the default [default: all available processors, or those that the flags below choose]
    #[arg(short, long, value_name = "N", value_parser = threads, allow_negative_numbers = true)]
    pub threads: Option<usize>,
    #[command(flatten)]
    pub compute: ComputeArgs,
}

/// How it computes, without the number of workers.
#[derive(Clone, Default, clap::Args)]
pub struct ComputeArgs {
    /// Instruction set: scalar, avx2, avxvnni, avx512, amx; exact: f32 throughout; ggml: f32 with activations quantized as
    /// in llama.cpp, to reproduce its figures [default: the best this machine has]
    #[arg(long, value_name = "ISA", env = "OXCART_ISA")]
    pub isa: Option<String>,
    /// Keep at most SIZE bytes of weights resident (K, M, G: powers of 1024) and stream the rest from disk on every pass
    /// (for MoE, only the experts used) [default: what fits in the available memory]
    #[arg(long, value_name = "SIZE", value_parser = memory)]
    pub resident_memory: Option<u64>,
    /// Lock the weights in memory, so that the system cannot page them out; all must fit
    #[arg(long, conflicts_with = "resident_memory")]
    pub mlock: bool,
    /// Read all weights into memory before starting (chat: in the background); all must fit
    #[arg(long, conflicts_with = "resident_memory")]
    pub prefault: bool,
    /// Copy the weights into anonymous memory, with huge pages, instead of mapping the file; all must fit
    #[arg(long, conflicts_with = "resident_memory")]
    pub no_mmap: bool,
    /// Pin workers to the processors in a hexadecimal mask; the lowest bit is processor 0 [default: workers are not pinned]
    #[arg(short = 'C', long, value_name = "HEX", value_parser = Processors::mask)]
    pub cpu_mask: Option<Processors>,
    /// Pin workers to a range of processors; adds to --cpu-mask
    #[arg(long, visible_alias = "Cr", value_name = "LO-HI", value_parser = Processors::range)]
    pub cpu_range: Option<Processors>,
    /// Pin each worker to a single processor (1), or to all of those chosen (0)
    #[arg(long, value_name = "0|1", action = ArgAction::Set, value_parser = zero_or_one, default_value = "0")]
    pub cpu_strict: bool,
    /// NUMA policy: distribute spreads workers and weight pages over all nodes (start with a cold page cache), isolate
    /// keeps workers on the node where the program starts, numactl keeps the placement that numactl set
    #[arg(long, value_name = "HOW", value_parser = numa, conflicts_with_all = ["cpu_mask", "cpu_range"])]
    pub numa: Option<Numa>,
    /// Override metadata: KEY=TYPE:VALUE with TYPE int, float, bool or str; several are separated by commas, and one with
    /// commas in it stands in double quotes; may be repeated
    #[arg(long, value_name = "KEY=TYPE:VALUE,..")]
    pub override_kv: Vec<String>,
}

/// The KV cache and the batches of a session.
#[derive(clap::Args)]
pub struct SessionArgs {
    /// Physical batch size: maximum tokens per forward pass
    #[arg(long, visible_alias = "ub", value_name = "N", default_value_t = 512, value_parser = batch)]
    pub ubatch_size: usize,
    /// KV cache type for keys: f16, bf16, q8_0
    #[arg(long, visible_alias = "ctk", value_name = "TYPE", default_value = "f16", value_parser = kv_type)]
    pub cache_type_k: KvType,
    /// KV cache type for values: f16, bf16, q8_0
    #[arg(long, visible_alias = "ctv", value_name = "TYPE", default_value = "f16", value_parser = kv_type)]
    pub cache_type_v: KvType,
}

/// Numbers of processors.
#[derive(Clone)]
pub struct Processors(Vec<usize>);

impl Processors {
    fn mask(text: &str) -> Result<Processors, String> {
        parse_mask(text).map(Processors)
    }

    fn range(text: &str) -> Result<Processors, String> {
        parse_range(text).map(Processors)
    }
}

fn zero_or_one(s: &str) -> Result<bool, String> {
    match s {
        "0" => Ok(false),
        "1" => Ok(true),
        _ => Err("expected 0 or 1".into()),
    }
}

fn numa(s: &str) -> Result<Numa, String> {
    match s {
        "distribute" => Ok(Numa::Distribute),
        "isolate" => Ok(Numa::Isolate),
        "numactl" => Ok(Numa::Numactl),
        _ => Err("expected distribute, isolate or numactl".into()),
    }
}

/// A cache type by its name.
pub fn kv_type(s: &str) -> Result<KvType, String> {
    KvType::ALL.into_iter().find(|t| t.name() == s).ok_or_else(|| "expected f16, bf16 or q8_0".into())
}

/// A context size in tokens; 0 is the training context, as in llama.cpp.
pub fn context(s: &str) -> Result<usize, String> {
    tokens(s).map_err(|_| "expected 0 (the model's own) to 2^31".into())
}

/// A batch size in tokens, logical or physical.
pub fn batch(s: &str) -> Result<usize, String> {
    tokens(s).ok().filter(|&n| n > 0).ok_or_else(|| "expected 1 to 2^31 tokens".into())
}

/// Tokens of a chunk of a text.
pub fn chunk(s: &str) -> Result<usize, String> {
    s.parse().ok().filter(|n| (4..=1 << 24).contains(n)).ok_or_else(|| "expected 4 to 2^24 tokens".into())
}

/// A number of workers; 0 where it is left to the program.
pub fn threads(s: &str) -> Result<usize, String> {
    let n = s.parse::<i64>().ok().filter(|&n| n <= 4096).ok_or("expected 1 to 4096, or 0 for the default")?;
    Ok(usize::try_from(n).unwrap_or(0))
}

/// How many chunks at most; -1 for all of them.
pub fn limit(s: &str) -> Result<usize, String> {
    match s.parse::<i64>() {
        Ok(n) if n < 0 => Ok(usize::MAX),
        Ok(n) if n > 0 => Ok(n as usize),
        _ => Err("expected 1 or more, or -1 for all".into()),
    }
}

/// The items of a comma-separated list, as llama.cpp reads it: within double quotes, commas and doubled quotes are literal.
pub fn items(list: &str) -> Vec<String> {
    let (mut all, mut item, mut quoted, mut chars) = (Vec::new(), String::new(), false, list.chars().peekable());
    while let Some(c) = chars.next() {
        match c {
            '"' if quoted && chars.next_if_eq(&'"').is_some() => item.push('"'),
            '"' => quoted = !quoted,
            ',' if !quoted => all.push(std::mem::take(&mut item)),
            c => item.push(c),
        }
    }
    all.push(item);
    all
}

/// A token count, at most 2^31 so that sums of a few do not overflow.
pub fn tokens(s: &str) -> Result<usize, String> {
    s.parse().ok().filter(|n| (0..=1 << 31).contains(n)).ok_or_else(|| "expected 0 to 2^31 tokens".into())
}

/// A number of bytes, with a suffix K, M or G for powers of 1024.
fn memory(s: &str) -> Result<u64, String> {
    let (digits, shift) = match s.as_bytes().last().map(u8::to_ascii_uppercase) {
        Some(b'K') => (&s[..s.len() - 1], 10),
        Some(b'M') => (&s[..s.len() - 1], 20),
        Some(b'G') => (&s[..s.len() - 1], 30),
        _ => (s, 0),
    };
    let n = digits.parse::<u64>().ok().and_then(|n| n.checked_mul(1 << shift));
    n.ok_or_else(|| "expected a number of bytes, as 18G, 500M or 0".into())
}

/// The file that a path or a name from the catalogue refers to; nothing is fetched, as it is only inspected.
pub fn file_here(name_or_path: &str) -> anyhow::Result<PathBuf> {
    if let Some(path) = catalog::path(name_or_path) {
        return Ok(path);
    }
    // What looks like a file and is none is told of by who opens it.
    if name_or_path.ends_with(".gguf") {
        return Ok(PathBuf::from(name_or_path));
    }
    let (model, file) = catalog::find(Some(name_or_path))?;
    let first = model.local(file)?.and_then(|here| here.parts.into_iter().next());
    first.with_context(|| format!("{name_or_path}: not on this machine; oxcart pull {name_or_path} fetches it"))
}

/// The kernels that `--isa` names.
pub fn kernels(isa: Option<&str>) -> anyhow::Result<&'static Kernels> {
    match isa {
        None => Ok(Kernels::best()),
        Some("exact") => Ok(Kernels::exact()),
        Some("ggml") => Ok(Kernels::ggml()),
        Some(name) => {
            let isa = name.parse::<Isa>().map_err(|e| match e {
                IsaError::Unknown(_) => anyhow!("--isa: {e}, exact, ggml"),
                _ => anyhow!("--isa: {e}"),
            })?;
            Kernels::for_isa(isa).with_context(|| format!("--isa {isa}"))
        }
    }
}

impl EngineArgs {
    /// How models are to be opened.
    pub fn options(&self) -> anyhow::Result<EngineOptions> {
        self.compute.options(self.threads)
    }

    /// Opens the model, with all its weights in memory if that is requested.
    pub fn open(&self) -> anyhow::Result<Arc<Engine>> {
        self.compute.open(self.model.as_deref(), self.threads)
    }

    /// Opens the model; its weights are read into memory, if that is requested, in the background of a chat.
    pub fn open_aside(&self) -> anyhow::Result<Arc<Engine>> {
        let e = self.compute.open_for_talk(self.model.as_deref(), self.threads)?;
        if e.wants_prefault() {
            let of = e.clone();
            let read = move || {
                if let Err(e) = of.prefault(true, &|_, _| ControlFlow::Continue(())) {
                    tell!("oxcart: {e}");
                }
            };
            std::thread::Builder::new().name("oxcart-prefault".into()).spawn(read).context("--prefault")?;
        }
        Ok(e)
    }
}

impl ComputeArgs {
    fn options(&self, threads: Option<usize>) -> anyhow::Result<EngineOptions> {
        let placement = self.placement();
        let threads = match threads.filter(|&n| n > 0) {
            Some(n) => n,
            None if placement.is_some() => {
                let chosen =
                    Here::find().and_then(|here| placement.n_processors(&here)).context("--cpu-mask, --cpu-range")?;
                // A quota of time is less than the processors that it is taken from.
                chosen.min(default_threads())
            }
            None => default_threads(),
        };
        let kernels = kernels(self.isa.as_deref())?;
        Ok(EngineOptions {
            threads,
            kernels,
            overrides: self.override_kv.iter().flat_map(|list| items(list)).collect(),
            resident: self.resident_memory,
            placement,
            residence: Residence { copy: self.no_mmap, lock: self.mlock, prefault: self.prefault },
            ..EngineOptions::default()
        })
    }

    fn placement(&self) -> Placement {
        let chosen: BTreeSet<usize> =
            [&self.cpu_mask, &self.cpu_range].into_iter().flatten().flat_map(|p| &p.0).copied().collect();
        Placement {
            processors: (!chosen.is_empty()).then(|| chosen.into_iter().collect()),
            strict: self.cpu_strict,
            numa: self.numa,
        }
    }

    /// Opens a model with that many workers.
    pub fn open(&self, model: Option<&str>, threads: Option<usize>) -> anyhow::Result<Arc<Engine>> {
        let e = self.open_for_talk(model, threads)?;
        if e.wants_prefault() {
            let reading = Reading::new();
            e.prefault(false, &|done, of| told(&reading, done, of))?;
            reading.finish();
        }
        Ok(e)
    }

    /// Opens the model; weights to be prefaulted are not yet read.
    fn open_for_talk(&self, model: Option<&str>, threads: Option<usize>) -> anyhow::Result<Arc<Engine>> {
        let o = self.options(threads)?;
        let found = catalog::resolve(model)?;
        let o = EngineOptions { recommended: found.sampling, ..o };
        let reading = Reading::new();
        let e = Engine::open_watched(&found.path, &o, &|done, of| told(&reading, done, of))?;
        if self.no_mmap {
            reading.finish();
        }
        e.notes().iter().for_each(|n| tell!("{n}"));
        Ok(Arc::new(e))
    }
}

/// Only Ctrl-C ends the reading, and the program with it.
fn told(reading: &Reading, done: u64, of: u64) -> ControlFlow<()> {
    reading.done(done, of);
    ControlFlow::Continue(())
}

/// What the file says it is, in llama.cpp's words, e.g. `qwen2 Q4_K - Medium`: architecture and mixture; where it says no
/// mixture, the format of most of its weights.
pub fn model_type(e: &Engine) -> String {
    let file_type = e.gguf.uint("general.file_type").ok().flatten();
    if let Some(mix) = MIXES.iter().find(|m| Some(u64::from(m.file_type)) == file_type) {
        return format!("{} {}", e.model.config.arch, mix.words());
    }
    let mut bytes: BTreeMap<Format, u64> = BTreeMap::new();
    for t in e.gguf.tensors() {
        if let Some(f) = t.format() {
            *bytes.entry(f).or_default() += t.n_elements();
        }
    }
    let most = bytes.into_iter().max_by_key(|&(_, n)| n).map_or("", |(f, _)| f.name());
    format!("{} {most}", e.model.config.arch)
}

/// One line of facts: name, types, size, instruction set, threads, context, and where the weights are if not in memory.
pub fn facts(e: &Engine, context: usize) -> String {
    let name = one_line(e.gguf.str("general.name").ok().flatten().unwrap_or("unnamed"), 100);
    let isa = e.kernels.label();
    let facts = format!(
        "{name} | {} {} | {isa} | {} threads | ctx {context}",
        model_type(e),
        size(e.gguf.file_size()),
        e.threads()
    );
    match beyond_memory(e) {
        None => facts,
        Some(divided) => format!("{facts} | {divided}"),
    }
}

/// Prints them on stderr, and a note on contexts beyond the training context.
pub fn tell_facts(e: &Engine, context: usize) {
    tell!("{}", facts(e, context));
    e.model.config.note_on(context).iter().for_each(|note| tell!("{note}"));
}

/// A session whose passes Ctrl-C ends within a layer where weights come from the disk and a pass takes long.
pub fn session(e: &Arc<Engine>, o: &SessionOptions) -> Result<Session, EngineError> {
    let mut s = e.session(o)?;
    if e.stream().is_some() {
        s.watch(Some(Arc::new(|_, _| if asked() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) })));
    }
    Ok(s)
}

/// How the weights are divided between memory and disk, if they are; known once there is a session.
pub fn beyond_memory(e: &Engine) -> Option<String> {
    let (stay, go) = e.stream()?.bytes();
    Some(match e.model.config.experts {
        None => format!("{} of weights in memory, {} from the disk for every pass", size(stay), size(go)),
        Some(_) => format!("{} of weights in memory, up to {} from the disk for every token", size(stay), size(go)),
    })
}

impl SessionArgs {
    /// The options of a session of that many sequences of that many tokens.
    pub fn options(&self, context: usize, sequences: usize) -> SessionOptions {
        SessionOptions {
            context,
            sequences,
            ubatch: self.ubatch_size,
            k_type: self.cache_type_k,
            v_type: self.cache_type_v,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{items, limit, memory, threads};

    #[test]
    fn defaults_have_llama_cpp_s_numbers() {
        for (text, want) in [("-1", Some(0)), ("0", Some(0)), ("8", Some(8)), ("4097", None), ("", None), ("x", None)] {
            assert_eq!(threads(text).ok(), want, "{text:?}");
        }
        for (text, want) in [("-1", Some(usize::MAX)), ("3", Some(3)), ("0", None), ("x", None)] {
            assert_eq!(limit(text).ok(), want, "{text:?}");
        }
    }

    #[test]
    fn lists_have_commas_and_quotes() {
        let cases: &[(&str, &[&str])] = &[
            ("a=bool:true", &["a=bool:true"]),
            ("a=bool:true,b=int:2", &["a=bool:true", "b=int:2"]),
            (r#""a=str:x,y",b=int:2"#, &["a=str:x,y", "b=int:2"]),
            (r#""a ""b""""#, &[r#"a "b""#]),
            ("a,,b", &["a", "", "b"]),
        ];
        for (list, want) in cases {
            assert_eq!(items(list), *want, "{list}");
        }
    }

    #[test]
    fn sizes_of_memory() {
        let cases =
            [("0", Some(0)), ("18G", Some(18 << 30)), ("5m", Some(5 << 20)), ("3K", Some(3072)), ("99", Some(99))];
        for (text, want) in cases.into_iter().chain(["", "G", "1.5G", "-1", "17179869184G", "1T"].map(|t| (t, None))) {
            assert_eq!(memory(text).ok(), want, "{text:?}");
        }
    }
}
