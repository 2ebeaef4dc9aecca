//! Metadata values: decoding with a budget, and reading them by the type that is wanted.

use super::parts::Cursor;
use super::{Blame, Gguf, GgufError};
use crate::mmap::Bytes;
use gguf_rs_lib::format::{GGUFValueType, MetadataValue};
use std::fmt;

/// A value. Arrays of strings, the vocabularies of 150,000 tokens, stay in the file and are decoded as they are walked.
#[derive(Clone)]
pub enum Value {
    /// Any other value.
    Plain(MetadataValue),
    /// An array of strings.
    Strings(Strings),
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

    /// The strings in order.
    pub fn iter(&self) -> impl Iterator<Item = &str> {
        let mut rest: &[u8] = &self.bytes;
        std::iter::from_fn(move || {
            let (n, tail) = rest.split_first_chunk::<8>()?;
            let (s, tail) = tail.split_at_checked(u64::from_le_bytes(*n) as usize)?;
            rest = tail;
            // Checked when the file was opened.
            std::str::from_utf8(s).ok()
        })
    }
}

impl Value {
    /// An integer that is not negative, of whatever integer type.
    pub fn uint(&self) -> Option<u64> {
        let Value::Plain(v) = self else { return None };
        match v {
            MetadataValue::Bool(_) => None,
            _ => v.as_u64().or_else(|| v.as_i64().and_then(|i| i.try_into().ok())),
        }
    }

    /// A number.
    pub fn float(&self) -> Option<f64> {
        let Value::Plain(v) = self else { return None };
        v.as_f64().or_else(|| self.uint().map(|u| u as f64)).or_else(|| v.as_i64().map(|i| i as f64))
    }

    /// The elements of an array that is not one of strings.
    fn elements(&self) -> Option<impl Iterator<Item = &MetadataValue>> {
        match self {
            Value::Plain(MetadataValue::Array(a)) => Some(a.iter()),
            _ => None,
        }
    }

    /// What it is, for an error.
    fn kind(&self) -> String {
        match self {
            Value::Strings(_) => "an array of strings".into(),
            Value::Plain(v) => v.value_type().name().to_lowercase(),
        }
    }
}

impl fmt::Display for Value {
    /// The value on one line; long arrays by their first elements and their length.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const SHOWN: usize = 6;
        let list = |f: &mut fmt::Formatter<'_>, shown: Vec<String>, len: usize| {
            let more = if len > shown.len() { format!(", … {len} in all") } else { String::new() };
            write!(f, "[{}{more}]", shown.join(", "))
        };
        match self {
            Value::Strings(s) => list(f, s.iter().take(SHOWN).map(|s| format!("{s:?}")).collect(), s.len()),
            Value::Plain(v) => match v {
                MetadataValue::Array(a) => {
                    list(f, a.iter().take(SHOWN).map(|v| Value::Plain(v.clone()).to_string()).collect(), a.len())
                }
                MetadataValue::String(s) => write!(f, "{s}"),
                MetadataValue::Bool(b) => write!(f, "{b}"),
                MetadataValue::F32(x) => write!(f, "{x}"),
                MetadataValue::F64(x) => write!(f, "{x}"),
                _ => match (v.as_u64(), v.as_i64()) {
                    (Some(u), _) => write!(f, "{u}"),
                    (_, Some(i)) => write!(f, "{i}"),
                    _ => f.write_str(&v.to_string_representation()),
                },
            },
        }
    }
}

/// Reads the value of `key`, taking what it will occupy from the budget first.
pub(super) fn read(r: &mut Cursor<'_>, key: &str, kind: GGUFValueType, budget: &mut u64) -> Result<Value, GgufError> {
    if kind == GGUFValueType::Array {
        // Look ahead at the element type and count, which are what a lie would be about.
        let (at, left) = (r.position(), r.left());
        let element = r.u32(key)?;
        let count = r.u64(key)?;
        let element = GGUFValueType::from_u32(element)
            .map_err(|_| r.error(key, format_args!("element type {element}, expected one of 0 to 12")))?;
        // An empty array inside an array takes 12 bytes, an empty string 8.
        let least = element.size_in_bytes().unwrap_or(if element == GGUFValueType::Array { 12 } else { 8 }) as u64;
        if count > left / least {
            return Err(r.error(key, format_args!("an array of {count} elements in a file with {left} bytes left")));
        }
        if element == GGUFValueType::String {
            return strings(r, key, count);
        }
        let cost = count * size_of::<MetadataValue>() as u64;
        if element == GGUFValueType::Array || cost > *budget {
            return Err(r.error(key, format_args!("an array of {count} elements, larger than any model's or nested")));
        }
        *budget -= cost;
        r.rewind(at);
    }
    if kind == GGUFValueType::String {
        let most = *budget;
        let s = r.string(key, most)?;
        *budget -= s.len() as u64;
        return Ok(Value::Plain(MetadataValue::String(s)));
    }
    MetadataValue::read_from(r, kind).map(Value::Plain).map_err(|e| r.error(key, e))
}

fn strings(r: &mut Cursor<'_>, key: &str, count: u64) -> Result<Value, GgufError> {
    let from = r.position();
    for i in 0..count {
        let n = r.u64(key)?;
        let s = r.take(key, n)?;
        if std::str::from_utf8(&s).is_err() {
            return Err(r.error(key, format_args!("string {i} is not UTF-8")));
        }
    }
    let len = r.position() - from;
    r.rewind(from);
    Ok(Value::Strings(Strings { bytes: r.take(key, len)?, len: count as usize }))
}

/// Values by the type that is wanted: absent is `None`, another type is an error.
impl Gguf {
    fn typed<T>(&self, key: &str, want: &str, get: impl FnOnce(&Value) -> Option<T>) -> Result<Option<T>, GgufError> {
        let Some(v) = self.values.get(key) else { return Ok(None) };
        match get(v) {
            Some(t) => Ok(Some(t)),
            None => Err(Blame(&self.path).at(key, format_args!("found {} ({v}), expected {want}", v.kind()))),
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

    /// An integer, not negative.
    pub fn uint(&self, key: &str) -> Result<Option<u64>, GgufError> {
        self.typed(key, "a non-negative integer", Value::uint)
    }

    /// A number.
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
        let int = |v: &MetadataValue| match v {
            MetadataValue::Bool(_) => None,
            _ => v.as_i64().or_else(|| v.as_u64().and_then(|u| u.try_into().ok())),
        };
        self.typed(key, "an array of integers", |v| v.elements()?.map(int).collect())
    }

    /// An array of numbers.
    pub fn floats(&self, key: &str) -> Result<Option<Vec<f32>>, GgufError> {
        self.typed(key, "an array of numbers", |v| v.elements()?.map(|v| v.as_f64().map(|f| f as f32)).collect())
    }
}
