//! Metadata values: what is decoded when the file is opened, what stays in it, and reading them by the type wanted.

use super::parts::Cursor;
use super::{Blame, Gguf, GgufError};
use crate::mmap::Bytes;
use gguf_rs_lib::format::{GGUFValueType, MetadataArray, MetadataValue};
use std::fmt::{self, Write};
use std::io::Read;

/// The most elements of an array, some sixty vocabularies; it bounds what those who collect them take.
const MOST_ELEMENTS: u64 = 1 << 24;
/// What a byte of a nested array takes decoded, at most: an element is a [`MetadataValue`], a byte in the file at least.
const NESTED_COST: u64 = 32;
/// How many elements of an array are shown.
const SHOWN: usize = 6;
/// How many characters of a string are shown.
const SHOWN_CHARS: usize = 120;

/// A value. Arrays of strings and of numbers, such as vocabularies and scores of 150,000 tokens, stay in the file and are
/// decoded as they are walked.
#[derive(Clone)]
pub enum Value {
    /// A number, a truth value, a string, or an array of arrays.
    Plain(MetadataValue),
    /// An array of strings.
    Strings(Strings),
    /// An array of numbers or truth values.
    Numbers(Numbers),
}

/// An array of strings: checked once, then read in place.
#[derive(Clone)]
pub struct Strings {
    bytes: Bytes,
    len: usize,
}

impl Strings {
    /// How many there are.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// As the file has them: each its length, then its bytes.
    pub(super) fn encoded(&self) -> &[u8] {
        &self.bytes
    }

    /// The strings in order.
    pub fn iter(&self) -> impl Iterator<Item = &str> {
        let mut rest: &[u8] = &self.bytes;
        std::iter::from_fn(move || {
            let (n, tail) = rest.split_first_chunk::<8>()?;
            let (s, tail) = tail.split_at_checked(u64::from_le_bytes(*n) as usize)?;
            rest = tail;
            // Lengths and UTF-8 were checked when the file was opened.
            std::str::from_utf8(s).ok()
        })
    }
}

impl<S: AsRef<str>> FromIterator<S> for Strings {
    fn from_iter<I: IntoIterator<Item = S>>(strings: I) -> Strings {
        let (mut bytes, mut len) = (Vec::new(), 0);
        for s in strings {
            bytes.extend((s.as_ref().len() as u64).to_le_bytes());
            bytes.extend(s.as_ref().as_bytes());
            len += 1;
        }
        Strings { bytes: Bytes::owned(bytes), len }
    }
}

/// An array of numbers or truth values, read in place.
#[derive(Clone)]
pub struct Numbers {
    bytes: Bytes,
    element: GGUFValueType,
    len: usize,
}

impl Numbers {
    /// How many there are.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Their type.
    pub fn element(&self) -> GGUFValueType {
        self.element
    }

    /// As the file has them.
    pub(super) fn encoded(&self) -> &[u8] {
        &self.bytes
    }

    /// The numbers in order.
    pub fn iter(&self) -> impl Iterator<Item = MetadataValue> {
        let mut rest: &[u8] = &self.bytes;
        (0..self.len).map_while(move |_| MetadataValue::read_from(&mut rest, self.element).ok())
    }
}

/// An integer of any type, not a truth value.
fn int(v: &MetadataValue) -> Option<i128> {
    match v {
        MetadataValue::Bool(_) => None,
        _ => v.as_u64().map(i128::from).or_else(|| v.as_i64().map(i128::from)),
    }
}

/// A number of any type.
fn float(v: &MetadataValue) -> Option<f64> {
    v.as_f64().or_else(|| int(v).map(|i| i as f64))
}

impl Value {
    /// An integer of any integer type, if it is not negative.
    pub fn uint(&self) -> Option<u64> {
        match self {
            Value::Plain(v) => int(v)?.try_into().ok(),
            _ => None,
        }
    }

    /// A number.
    pub fn float(&self) -> Option<f64> {
        match self {
            Value::Plain(v) => float(v),
            _ => None,
        }
    }

    /// The GGUF type, e.g. `u32`, `array of strings`.
    pub fn type_name(&self) -> String {
        match self {
            Value::Strings(_) => "array of strings".into(),
            Value::Numbers(n) => format!("array of {}", n.element.name()),
            Value::Plain(MetadataValue::Array(_)) => "array of arrays".into(),
            Value::Plain(v) => v.value_type().name().to_lowercase(),
        }
    }

    /// Bytes of the value in a file, without its type.
    pub(super) fn encoded_len(&self) -> u64 {
        match self {
            Value::Plain(v) => v.serialized_size() as u64,
            Value::Strings(s) => 12 + s.bytes.len() as u64,
            Value::Numbers(n) => 12 + n.bytes.len() as u64,
        }
    }

    /// How many elements an array has; `None` where it is none.
    pub fn array_len(&self) -> Option<usize> {
        match self {
            Value::Strings(s) => Some(s.len()),
            Value::Numbers(n) => Some(n.len()),
            Value::Plain(MetadataValue::Array(a)) => Some(a.len()),
            Value::Plain(_) => None,
        }
    }
}

impl From<MetadataValue> for Value {
    fn from(v: MetadataValue) -> Value {
        let MetadataValue::Array(a) = &v else { return Value::Plain(v) };
        match a.element_type {
            GGUFValueType::Array => Value::Plain(v),
            GGUFValueType::String => Value::Strings(a.iter().filter_map(MetadataValue::as_str).collect()),
            element => {
                let mut bytes = Vec::new();
                for v in a.iter() {
                    v.write_to(&mut bytes).expect("a number is written to memory");
                }
                Value::Numbers(Numbers { bytes: Bytes::owned(bytes), element, len: a.len() })
            }
        }
    }
}

/// A string on one line of about `most` characters: what would move the cursor or break the line is escaped.
pub(crate) fn one_line(text: &str, most: usize) -> String {
    // Marks that turn the direction of text, and separators of lines.
    let unseen = |c| matches!(c, '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
    let (mut out, mut len) = (String::new(), 0);
    for c in text.chars() {
        if len >= most {
            let _ = write!(out, "… ({} bytes)", text.len()); // a String takes everything
            break;
        }
        let from = out.len();
        match c {
            '\n' => out.push_str("\\n"),
            '\t' => out.push_str("\\t"),
            c if c.is_control() || unseen(c) => out.extend(c.escape_unicode()),
            c => out.push(c),
        }
        len += out[from..].chars().count();
    }
    out
}

fn plain(f: &mut fmt::Formatter<'_>, v: &MetadataValue) -> fmt::Result {
    match v {
        MetadataValue::String(s) => f.write_str(&one_line(s, SHOWN_CHARS)),
        MetadataValue::Bool(b) => write!(f, "{b}"),
        MetadataValue::F32(x) => write!(f, "{x}"),
        MetadataValue::F64(x) => write!(f, "{x}"),
        MetadataValue::Array(a) => list(f, a.iter().take(SHOWN).map(|v| Value::Plain(v.clone()).to_string()), a.len()),
        _ => write!(f, "{}", int(v).unwrap_or_default()),
    }
}

/// The first elements of an array, and how many there are if that is not all.
fn list(f: &mut fmt::Formatter<'_>, shown: impl Iterator<Item = String>, len: usize) -> fmt::Result {
    let shown: Vec<String> = shown.take(SHOWN).collect();
    let more = if len > shown.len() { format!(", … {len} in all") } else { String::new() };
    write!(f, "[{}{more}]", shown.join(", "))
}

impl fmt::Display for Value {
    /// The value on one line; long arrays by their first elements and their length, long strings by their beginning.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Value::Plain(v) => plain(f, v),
            Value::Strings(s) => {
                list(f, s.iter().map(|s| format!("\"{}\"", one_line(s, SHOWN_CHARS / SHOWN))), s.len())
            }
            Value::Numbers(n) => list(f, n.iter().map(|v| Value::Plain(v).to_string()), n.len()),
        }
    }
}

/// Reads the value of `key`.
pub(super) fn read(r: &mut Cursor<'_>, key: &str) -> Result<Value, GgufError> {
    let kind = value_type(r, key, "value type")?;
    match kind {
        GGUFValueType::String => {
            let s = r.str(key, r.budget())?;
            r.charge(key, s.len() as u64)?;
            Ok(Value::Plain(MetadataValue::String(s.into_owned())))
        }
        GGUFValueType::Array => array(r, key),
        _ => decode(r, key, |r| MetadataValue::read_from(r, kind)).map(Value::Plain),
    }
}

fn value_type(r: &mut Cursor<'_>, key: &str, what: &str) -> Result<GGUFValueType, GgufError> {
    let id = r.u32(key)?;
    GGUFValueType::from_u32(id).map_err(|_| r.error(key, format_args!("{what} {id}, expected 0 to 12")))
}

/// Lets the crate decode; what it finds wrong is told as ours.
fn decode<T>(
    r: &mut Cursor<'_>,
    key: &str,
    read: impl FnOnce(&mut Cursor<'_>) -> gguf_rs_lib::Result<T>,
) -> Result<T, GgufError> {
    match read(r) {
        Ok(v) => Ok(v),
        Err(gguf_rs_lib::GGUFError::Io(_)) => Err(r.end(key)),
        Err(e) => Err(r.error(key, e.to_string().to_lowercase())),
    }
}

fn array(r: &mut Cursor<'_>, key: &str) -> Result<Value, GgufError> {
    let start = r.position();
    let element = value_type(r, key, "element type")?;
    let count = r.u64(key)?;
    // In the file a string takes 8 bytes at least, an array 12.
    let least = match element {
        GGUFValueType::String => 8,
        GGUFValueType::Array => 12,
        _ => element.size_in_bytes().unwrap_or(1) as u64,
    };
    if count > r.left() / least {
        return Err(r.error(key, format_args!("an array of {count}, more than the {} bytes left hold", r.left())));
    }
    if count > MOST_ELEMENTS {
        return Err(r.error(key, format_args!("an array of {count}, expected at most {MOST_ELEMENTS}")));
    }
    let from = r.position();
    match element {
        GGUFValueType::String => {
            for i in 0..count {
                r.str(format_args!("{key}[{i}]"), u64::MAX)?;
            }
            Ok(Value::Strings(Strings { bytes: r.since(key, from)?, len: count as usize }))
        }
        GGUFValueType::Array => {
            // Decoded at once, which multiplies its size: only as much of the file as the budget has room for.
            r.seek(start);
            let most = r.budget() / NESTED_COST;
            let left = r.left();
            let a = decode(r, key, |r| MetadataArray::read_from(&mut r.take(most)));
            let used = r.position() - start;
            match a {
                Ok(a) => {
                    r.charge(key, used * NESTED_COST)?;
                    Ok(Value::Plain(MetadataValue::Array(Box::new(a))))
                }
                Err(_) if used == most && most < left => {
                    Err(r.error(key, format_args!("nested arrays of more than {most} bytes")))
                }
                Err(e) => Err(e),
            }
        }
        _ => {
            r.seek(from + count * least);
            let n = Numbers { bytes: r.since(key, from)?, element, len: count as usize };
            if element == GGUFValueType::Bool
                && let Some(i) = n.bytes.iter().position(|&b| b > 1)
            {
                return Err(r.error(format_args!("{key}[{i}]"), format_args!("bool {}, expected 0 or 1", n.bytes[i])));
            }
            Ok(Value::Numbers(n))
        }
    }
}

/// Values by the type that is wanted: absent is `None`, another type is an error that names both.
impl Gguf {
    fn typed<T>(&self, key: &str, want: &str, get: impl FnOnce(&Value) -> Option<T>) -> Result<Option<T>, GgufError> {
        let Some(v) = self.values.get(key) else { return Ok(None) };
        match get(v) {
            Some(t) => Ok(Some(t)),
            None => Err(Blame(&self.path).at(key, format_args!("found {} {v}, expected {want}", v.type_name()))),
        }
    }

    /// A string.
    pub fn str(&self, key: &str) -> Result<Option<&str>, GgufError> {
        // Not through `typed`: its closure cannot lend what it was given.
        match self.values.get(key) {
            Some(Value::Plain(MetadataValue::String(s))) => Ok(Some(s)),
            _ => self.typed(key, "a string", |_| None),
        }
    }

    /// An integer of any type, not negative.
    pub fn uint(&self, key: &str) -> Result<Option<u64>, GgufError> {
        self.typed(key, "a non-negative integer", Value::uint)
    }

    /// An integer of any type.
    pub fn int(&self, key: &str) -> Result<Option<i64>, GgufError> {
        self.typed(key, "an integer", |v| match v {
            Value::Plain(v) => int(v)?.try_into().ok(),
            _ => None,
        })
    }

    /// A number of any type.
    pub fn float(&self, key: &str) -> Result<Option<f32>, GgufError> {
        self.typed(key, "a number", |v| v.float().map(|f| f as f32))
    }

    /// A truth value.
    pub fn bool(&self, key: &str) -> Result<Option<bool>, GgufError> {
        self.typed(key, "a bool", |v| match v {
            Value::Plain(v) => v.as_bool(),
            _ => None,
        })
    }

    /// An array of strings.
    pub fn strings(&self, key: &str) -> Result<Option<&Strings>, GgufError> {
        match self.values.get(key) {
            Some(Value::Strings(s)) => Ok(Some(s)),
            _ => self.typed(key, "an array of strings", |_| None),
        }
    }

    /// An array of integers.
    pub fn ints(&self, key: &str) -> Result<Option<Vec<i64>>, GgufError> {
        self.typed(key, "an array of integers", |v| match v {
            Value::Numbers(n) => n.iter().map(|v| int(&v)?.try_into().ok()).collect(),
            _ => None,
        })
    }

    /// An array of numbers.
    pub fn floats(&self, key: &str) -> Result<Option<Vec<f32>>, GgufError> {
        self.typed(key, "an array of numbers", |v| match v {
            Value::Numbers(n) => n.iter().map(|v| float(&v).map(|f| f as f32)).collect(),
            _ => None,
        })
    }
}
