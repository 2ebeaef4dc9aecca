//! `oxcart pull`: fetches a model of the catalogue. Its path to stdout, talk to stderr.

use crate::catalog;

/// Which model.
#[derive(clap::Args)]
pub struct Args {
    /// A model from the catalogue; without QUANT, its first quantization [default: the default model]
    #[arg(value_name = "NAME[:QUANT]")]
    name: Option<String>,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

pub fn run(a: Args) -> anyhow::Result<()> {
    let r = catalog::pull(a.name.as_deref())?;
    if a.json {
        say!("{}", serde_json::json!({"name": r.name, "path": r.path, "parts": r.parts}))?;
    } else {
        say!("{}", r.path.display())?;
    }
    Ok(())
}
