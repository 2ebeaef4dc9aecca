//! `oxcart plan`: whether a model fits this machine and how fast it will be, before anything is fetched or read.

use super::engine::{SessionArgs, kernels};
use super::units::size;
use crate::catalog::{self, Model};
use crate::engine::{WALK, default_threads, most_taken};
use crate::gguf::{Gguf, one_line};
use crate::machine::Machine;
use crate::plan::{self, Active, Fit, Geometry, Needs, Probe};
use anyhow::{Context, bail};
use serde_json::json;
use std::path::{Path, PathBuf};

/// Which model, at which context.
#[derive(clap::Args)]
pub struct Args {
    /// A GGUF file, or a name from the catalogue, NAME[:QUANT]; nothing is fetched [default: SmolLM2-135M-Instruct]
    #[arg(value_name = "MODEL")]
    model: Option<String>,
    /// Context size in tokens; 0: the training context [default: the training context, at most 4096]
    #[arg(short, long, value_name = "N", value_parser = super::engine::context)]
    ctx_size: Option<usize>,
    #[command(flatten)]
    session: SessionArgs,
    /// Worker threads [default: all available processors]
    #[arg(short, long, value_name = "N", value_parser = super::engine::threads, allow_negative_numbers = true)]
    threads: Option<usize>,
    /// Instruction set to measure: scalar, avx2, avxvnni, avx512, amx [default: the best this machine has]
    #[arg(long, value_name = "ISA", env = "OXCART_ISA")]
    isa: Option<String>,
    /// Do not measure the machine; no speeds are given
    #[arg(long)]
    no_probe: bool,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// A model as far as a plan knows it.
struct Subject {
    file: Option<PathBuf>,
    name: String,
    weights: u64,
    about: bool, // the size is an estimate
    geometry: Geometry,
    active: Active,
    entry: Option<&'static Model>,
}

impl Subject {
    fn of_file(path: &Path) -> anyhow::Result<Subject> {
        let g = Gguf::open(path)?;
        let Some(geometry) = Geometry::of(&g)? else {
            bail!("{}: its metadata describes no attention layers: nothing to plan", path.display());
        };
        let weights = g.tensors().iter().map(|t| t.n_bytes()).fold(0, u64::saturating_add);
        let name = g.str("general.name")?.unwrap_or("unnamed").chars().take(60).collect();
        let file = Some(path.to_path_buf());
        Ok(Subject { file, name, weights, about: false, geometry, active: Active::of(&g), entry: None })
    }

    fn find(name: Option<&str>) -> anyhow::Result<Subject> {
        if let Some(path) = name.and_then(catalog::path) {
            return Subject::of_file(&path);
        }
        let (model, file) = catalog::find(name)?;
        if let Some(here) = model.local(file)?
            && let Some(first) = here.parts.first()
        {
            return Ok(Subject { entry: Some(model), ..Subject::of_file(first)? });
        }
        let weights = plan::file_bytes(model, file)
            .with_context(|| format!("{}: the size of {} is not known", model.name, file.quant))?;
        Ok(Subject {
            file: None,
            name: format!("{} {}", model.name, file.quant),
            weights,
            about: file.bytes.is_none(),
            geometry: Geometry::of_entry(&model.geometry),
            active: Active::of_entry(&model.geometry, weights),
            entry: Some(model),
        })
    }

    fn needs(&self, context: u64, session: &SessionArgs) -> anyhow::Result<Needs> {
        let o = session.options(usize::try_from(context)?, 1);
        Needs::of(&self.geometry, self.weights, context, &o).with_context(|| {
            let name = self.file.as_ref().map_or(self.name.clone(), |f| f.display().to_string());
            format!("{name}: memory at a context of {context}: more than 2^64 bytes")
        })
    }
}

pub fn run(a: Args) -> anyhow::Result<()> {
    let threads = a.threads.filter(|&n| n > 0).unwrap_or_else(default_threads);
    let kernels = kernels(a.isa.as_deref())?;
    let subject = Subject::find(a.model.as_deref())?;
    let context = subject.geometry.context(a.ctx_size.map(|n| n as u64));
    let needs = subject.needs(context, &a.session)?;
    let machine = Machine::here();
    let fit = Fit::of(&needs, &machine);
    let probe = if a.no_probe { None } else { Some(Probe::run(kernels, threads).context("probe")?) };
    let longest = machine.available.map(|m| needs.longest(m));
    let smaller = smaller(&subject, &needs, &machine);
    let advice = machine.advice(threads);
    // What finds no room.
    let beyond = match (fit, machine.available) {
        (Fit::Disk, Some(available)) => needs.beyond(available),
        _ => 0,
    };
    // Of weights in memory; from the disk it is the disk's.
    let speed = probe.filter(|_| matches!(fit, Fit::Memory | Fit::Unknown)).map(|p| p.speed(subject.active, &needs));
    if a.json {
        let report = json!({
            "model": subject.name, "size_is_estimate": subject.about, "needs": needs, "active": subject.active,
            "machine": machine, "threads": threads, "fit": fit, "longest_context": longest, "fits_instead": smaller,
            "probe": probe, "decode_tokens_per_second": speed.map(|s| s.0),
            "prefill_tokens_per_second": speed.map(|s| s.1), "disk_bytes_per_token": subject.active.from_disk(beyond),
            "advice": advice,
        });
        say!("{report:#}")?;
        return Ok(());
    }
    let about = if subject.about { "about, by its mixture" } else { "mapped from the file" };
    say!("{}", one_line(&subject.name, usize::MAX))?;
    say!("  weights    {:>11}  {about}", size(needs.weights))?;
    say!(
        "  KV cache   {:>11}  {context} tokens, keys {}, values {}: {} a token",
        size(needs.kv_cache),
        needs.cache_type_k,
        needs.cache_type_v,
        size(needs.kv_cache_per_token)
    )?;
    say!("  buffers    {:>11}  about", size(needs.buffers))?;
    say!("  all        {:>11}", size(needs.total))?;
    say!("this machine")?;
    let told = |n: Option<u64>| n.map_or("unknown".into(), size);
    let limit = machine.limit.map_or(String::new(), |l| format!(", a control group allows {}", size(l)));
    say!("  memory     {:>11}  {} available{limit}", told(machine.memory), told(machine.available))?;
    say!("  processors {:>11}  {} cores", machine.processors, machine.cores.map_or("?".into(), |c| c.to_string()))?;
    if let Some(p) = probe {
        say!("  reads      {:>6.1} GB/s, multiplies bytes at {:.2} TOPS ({threads} threads)", p.read, p.tops)?;
    }
    say!("{}", verdict(fit, &needs, &machine, beyond, subject.active))?;
    if let Some(n) = longest.filter(|&n| n > 0 && fit == Fit::Memory) {
        say!("  a context of up to {n} tokens stays in memory")?;
    }
    if let Some(s) = &smaller {
        say!("  {s}")?;
    }
    if let Some((decode, prefill)) = speed {
        say!("  expect {decode:.2} tokens/s of answer with the context full, {prefill:.1} tokens/s of prompt")?;
    }
    for line in &advice {
        say!("  {line}")?;
    }
    Ok(())
}

fn verdict(fit: Fit, n: &Needs, m: &Machine, beyond: u64, active: Active) -> String {
    let available = size(m.available.unwrap_or(0));
    match fit {
        Fit::Memory => format!("fits: {} of {available} available", size(n.total)),
        Fit::Disk => {
            let (all, go, walk) = (size(n.total), active.from_disk(beyond), WALK);
            let seconds = go as f64 / 1e9;
            let (read, once) = match active.experts > 0.0 {
                true => (format!("about {} of the experts", size(go)), size(beyond) + " "),
                false => (format!("about {} of the weights", size(go)), String::new()),
            };
            format!(
                "does not fit in memory: {all} of {available} available, of which a sixteenth is left to others; {read} are read from the disk for every token, \
                 {seconds:.1} s at 1 GB/s, and {once}once for up to {walk} tokens of a prompt"
            )
        }
        Fit::Not => format!(
            "does not fit: the KV cache and buffers alone take {} of {available} available; a smaller -c, or -ctk q8_0 \
             -ctv q8_0, takes less",
            size(n.anonymous())
        ),
        Fit::Unknown => "this system does not tell how much memory it has".into(),
    }
}

/// The largest other quantization of the catalogue's entry that fits, where the one asked for does not.
fn smaller(s: &Subject, n: &Needs, m: &Machine) -> Option<String> {
    let (entry, memory) = (s.entry?, most_taken(m.available?));
    if n.total <= memory {
        return None;
    }
    let rest = n.total - n.weights;
    let sizes = entry.files.iter().filter_map(|f| Some((plan::file_bytes(entry, f)?, f)));
    let best = sizes.filter(|(bytes, _)| bytes.saturating_add(rest) <= memory).max_by_key(|&(bytes, _)| bytes);
    Some(match best {
        Some((bytes, f)) => format!("fits instead: {}:{} ({})", entry.name, f.quant, size(bytes)),
        None => format!("no quantization of {} in the catalogue fits", entry.name),
    })
}
