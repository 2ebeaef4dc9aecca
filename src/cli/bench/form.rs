//! Rows of measurements as they are printed.

use clap::ValueEnum;
use serde_json::Value;
use std::io::{self, Write};

/// A row: names and values, in order.
pub type Row = Vec<(&'static str, Value)>;

/// How rows are printed.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Form {
    Md,
    Csv,
    Json,
    Jsonl,
    Sql,
}

/// Prints rows as they come; what is one JSON list, at the end.
pub struct Printer<W> {
    form: Form,
    out: W,
    rows: Vec<Row>,
}

impl<W: Write> Printer<W> {
    /// Of no rows yet.
    pub fn new(form: Form, out: W) -> Printer<W> {
        Printer { form, out, rows: Vec::new() }
    }

    /// A row more.
    pub fn row(&mut self, row: &Row) -> io::Result<()> {
        let (out, first) = (&mut self.out, self.rows.is_empty());
        match self.form {
            Form::Md => markdown(out, row, first)?,
            Form::Csv => csv(out, row, first)?,
            Form::Jsonl => writeln!(out, "{}", object(row))?,
            Form::Sql => sql(out, row, first)?,
            Form::Json => (),
        }
        self.rows.push(row.clone());
        self.out.flush()
    }

    /// There are no more.
    pub fn finish(mut self) -> io::Result<()> {
        if self.form == Form::Json {
            let rows: Vec<Value> = self.rows.iter().map(object).collect();
            writeln!(self.out, "{:#}", Value::Array(rows))?;
        }
        self.out.flush()
    }
}

fn object(row: &Row) -> Value {
    Value::Object(row.iter().map(|(k, v)| (k.to_string(), v.clone())).collect())
}

/// The cells of forms that hold one value in each: the samples stay out, as llama-bench's do.
fn cells(row: &Row) -> impl Iterator<Item = (&'static str, &Value)> {
    row.iter().filter(|(_, v)| !v.is_array()).map(|(k, v)| (*k, v))
}

fn names(row: &Row, between: &str) -> String {
    cells(row).map(|(k, _)| k).collect::<Vec<_>>().join(between)
}

/// A value between quotes, which are doubled within.
fn quoted(v: &Value, quote: &str) -> String {
    let text = v.as_str().map_or_else(|| v.to_string(), |s| s.replace(quote, &quote.repeat(2)));
    format!("{quote}{text}{quote}")
}

fn csv(out: &mut impl Write, row: &Row, first: bool) -> io::Result<()> {
    if first {
        writeln!(out, "{}", names(row, ","))?;
    }
    writeln!(out, "{}", cells(row).map(|(_, v)| quoted(v, "\"")).collect::<Vec<_>>().join(","))
}

/// llama-bench's table, with columns of ours.
fn sql(out: &mut impl Write, row: &Row, first: bool) -> io::Result<()> {
    if first {
        let column = |(name, v): (&str, &Value)| match v {
            Value::String(_) => format!("  {name} TEXT"),
            v if v.is_f64() => format!("  {name} REAL"),
            _ => format!("  {name} INTEGER"),
        };
        let columns: Vec<String> = cells(row).map(column).collect();
        writeln!(out, "CREATE TABLE IF NOT EXISTS llama_bench (\n{}\n);\n", columns.join(",\n"))?;
    }
    let values: Vec<String> = cells(row).map(|(_, v)| quoted(v, "'")).collect();
    writeln!(out, "INSERT INTO llama_bench ({}) VALUES ({});", names(row, ", "), values.join(", "))
}

fn number(row: &Row, key: &str) -> f64 {
    row.iter().find(|(k, _)| *k == key).and_then(|(_, v)| v.as_f64()).unwrap_or(0.0)
}

fn text<'a>(row: &'a Row, key: &str) -> &'a str {
    row.iter().find(|(k, _)| *k == key).and_then(|(_, v)| v.as_str()).unwrap_or("")
}

/// A number in a unit of so many, and below one in the next smaller unit.
fn scaled(n: f64, (large, name): (f64, &str), (small, below): (f64, &str)) -> String {
    let (unit, name) = if n < large { (small, below) } else { (large, name) };
    format!("{:.2} {name}", n / unit)
}

fn markdown(out: &mut impl Write, row: &Row, first: bool) -> io::Result<()> {
    if first {
        writeln!(
            out,
            "| {:<30} | {:>10} | {:>10} | {:<7} | {:>7} | {:>6} | {:>9} | {:>15} | {:>16} | {:>6} | {:>6} | {:>6} | {:>6} |",
            "model",
            "size",
            "params",
            "backend",
            "threads",
            "ubatch",
            "kv",
            "test",
            "t/s",
            "GB/s",
            "% read",
            "TFLOPS",
            "% peak"
        )?;
        writeln!(
            out,
            "| {:-<30} | {:->9}: | {:->9}: | {:-<7} | {:->6}: | {:->5}: | {:->8}: | {:->14}: | {:->15}: | {:->5}: | {:->5}: | {:->5}: | {:->5}: |",
            "", "", "", "", "", "", "", "", "", "", "", "", ""
        )?;
    }
    let (k, v) = (text(row, "type_k"), text(row, "type_v"));
    let kv = if k == v { k.to_string() } else { format!("{k}/{v}") };
    writeln!(
        out,
        "| {:<30} | {:>10} | {:>10} | {:<7} | {:>7} | {:>6} | {kv:>9} | {:>15} | {:>7.2} ± {:>6.2} | {:>6.2} | {:>6.1} | {:>6.3} | {:>6.1} |",
        text(row, "model_type"),
        scaled(number(row, "model_size"), (f64::from(1 << 30), "GiB"), (f64::from(1 << 20), "MiB")),
        scaled(number(row, "model_n_params"), (1e9, "B"), (1e6, "M")),
        text(row, "isa"),
        number(row, "n_threads"),
        number(row, "n_ubatch"),
        text(row, "test"),
        number(row, "avg_ts"),
        number(row, "stddev_ts"),
        number(row, "gb_per_s"),
        100.0 * number(row, "gb_per_s") / number(row, "read_probe_gb_per_s"),
        number(row, "tflops"),
        100.0 * number(row, "tflops") / number(row, "peak_tflops"),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_stay_under_their_names() {
        for (k, v) in [("f16", "f16"), ("bf16", "bf16"), ("q8_0", "bf16"), ("f16", "q8_0")] {
            let row: Row = vec![("type_k", k.into()), ("type_v", v.into())];
            let mut table = Vec::new();
            markdown(&mut table, &row, true).expect("memory takes all");
            let table = String::from_utf8(table).expect("UTF-8");
            let bars = |line: &str| line.chars().enumerate().filter(|c| c.1 == '|').map(|c| c.0).collect::<Vec<_>>();
            let bars: Vec<_> = table.lines().map(bars).collect();
            assert!(bars[0] == bars[1] && bars[1] == bars[2], "{table}");
        }
    }

    #[test]
    fn sizes_are_in_llama_bench_s_units() {
        for (bytes, params, want) in [
            (91_727_424u64, 134_515_008u64, "87.48 MiB |   134.52 M |"),
            (67_164_897_280, 111_209_914_368, "62.55 GiB |   111.21 B |"),
        ] {
            let row: Row = vec![("model_size", bytes.into()), ("model_n_params", params.into())];
            let mut table = Vec::new();
            markdown(&mut table, &row, false).expect("memory takes all");
            let table = String::from_utf8(table).expect("UTF-8");
            assert!(table.contains(want), "{table}");
        }
    }

    #[test]
    fn quotes_within_values_are_doubled() {
        let row: Row = vec![("a", "it's \"so\"".into()), ("n", 3.into()), ("x", 0.5.into()), ("all", vec![1].into())];
        let mut out = Vec::new();
        sql(&mut out, &row, true).expect("memory takes all");
        let want = "CREATE TABLE IF NOT EXISTS llama_bench (\n  a TEXT,\n  n INTEGER,\n  x REAL\n);\n\n\
            INSERT INTO llama_bench (a, n, x) VALUES ('it''s \"so\"', '3', '0.5');\n";
        assert_eq!(String::from_utf8_lossy(&out), want);
        let mut out = Vec::new();
        csv(&mut out, &row, true).expect("memory takes all");
        assert_eq!(String::from_utf8_lossy(&out), "a,n,x\n\"it's \"\"so\"\"\",\"3\",\"0.5\"\n");
    }
}
