//! Statistics of divergence in llama-perplexity's lines, and as JSON.

use super::divergence::{Divergence, Estimate};
use serde_json::{Value, json};
use std::fmt::Write;

/// The fractions of which percentiles are told, with their labels; `-` where only probabilities have a line.
const FRACTIONS: [(f64, &str, &str); 13] = [
    (1.0, "Maximum", "Maximum"),
    (0.999, "99.9%  ", "99.9%  "),
    (0.99, "99.0%  ", "99.0%  "),
    (0.95, "95.0%  ", "95.0%  "),
    (0.9, "90.0%  ", "90.0%  "),
    (0.75, "-", "75.0%  "),
    (0.5, "Median ", "Median "),
    (0.25, "-", "25.0%  "),
    (0.1, "10.0%  ", "10.0%  "),
    (0.05, " 5.0%  ", " 5.0%  "),
    (0.01, " 1.0%  ", " 1.0%  "),
    (0.001, " 0.1%  ", " 0.1%  "),
    (0.0, "Minimum", "Minimum"),
];

/// The line above the running lines.
pub const HEADING: &str = "chunk             PPL               ln(PPL(Q)/PPL(base))          KL Divergence              Δp RMS            Same top p";

/// The line of a chunk: statistics of everything up to it.
pub fn running(chunk: usize, d: &Divergence) -> String {
    let (ppl, ln, kld, rms, same) = (d.ppl(), d.ln_ratio(), d.kld(), d.rms_p_diff(), d.same_top());
    format!(
        "{chunk:4}    {:9.4} ± {:9.4}    {:10.5} ± {:10.5}    {:10.5} ± {:10.5}    {:6.3} ± {:6.3} %    {:6.3} ± {:6.3} %",
        ppl.value,
        ppl.error,
        ln.value,
        ln.error,
        kld.value,
        kld.error,
        100.0 * rms.value,
        100.0 * rms.error,
        100.0 * same.value,
        100.0 * same.error
    )
}

/// The closing tables.
pub fn closing(d: &Divergence) -> String {
    let mut out = String::from("====== Perplexity statistics ======\n");
    let wide = |e: Estimate| format!("{:10.6} ± {:10.6}\n", e.value, e.error);
    let percent = |e: Estimate| format!("{:6.3} ± {:5.3} %\n", 100.0 * e.value, 100.0 * e.error);
    let (klds, p_diffs) = (d.klds(), d.p_diffs());
    // Writing to a string cannot fail.
    let _ = write!(out, "Mean PPL(Q)                   : {}", wide(d.ppl()));
    let _ = write!(out, "Mean PPL(base)                : {}", wide(d.ppl_base()));
    let _ = writeln!(out, "Cor(ln(PPL(Q)), ln(PPL(base))): {:6.2}%", 100.0 * d.correlation());
    let _ = write!(out, "Mean ln(PPL(Q)/PPL(base))     : {}", wide(d.ln_ratio()));
    let _ = write!(out, "Mean PPL(Q)/PPL(base)         : {}", wide(d.ratio()));
    let _ = write!(out, "Mean PPL(Q)-PPL(base)         : {}", wide(d.difference()));
    let _ = write!(out, "\n====== KL divergence statistics ======\nMean    KLD: {}", wide(d.kld()));
    for (fraction, label, _) in FRACTIONS.iter().filter(|(_, label, _)| *label != "-") {
        let _ = writeln!(out, "{label} KLD: {:10.6}", klds.at(*fraction));
    }
    let _ = write!(out, "\n====== Token probability statistics ======\nMean    Δp: {}", percent(d.p_diff()));
    for (fraction, _, label) in FRACTIONS {
        let _ = writeln!(out, "{label} Δp: {:6.3}%", 100.0 * p_diffs.at(fraction));
    }
    let _ = write!(out, "RMS Δp    : {}Same top p: {}", percent(d.rms_p_diff()), percent(d.same_top()));
    out
}

/// All of it as one object. Probabilities are fractions, divergences nats.
pub fn object(d: &Divergence) -> Value {
    let both = |e: Estimate| json!({"value": e.value, "error": e.error});
    let (klds, p_diffs) = (d.klds(), d.p_diffs());
    let percentiles = |at: &dyn Fn(f64) -> f64| -> Value {
        FRACTIONS.iter().map(|(fraction, ..)| (fraction.to_string(), json!(at(*fraction)))).collect()
    };
    json!({
        "tokens_scored": d.count(), "ppl": both(d.ppl()), "ppl_base": both(d.ppl_base()),
        "correlation": d.correlation(), "ln_ratio": both(d.ln_ratio()), "ratio": both(d.ratio()),
        "difference": both(d.difference()), "kld": both(d.kld()), "kld_percentiles": percentiles(&|f| klds.at(f)),
        "p_diff": both(d.p_diff()), "p_diff_percentiles": percentiles(&|f| p_diffs.at(f)),
        "rms_p_diff": both(d.rms_p_diff()), "same_top": both(d.same_top()),
    })
}
