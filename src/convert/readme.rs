//! The model card: what stands between `---` and `---` at the head of README.md, in YAML.

use super::unfit;
use crate::safetensors::{Checkpoint, CheckpointError};
use serde_json::{Map, Value};

const FILE: &str = "README.md";
/// The most bytes of a README.md.
const MOST_BYTES: u64 = 4 << 20;

/// Keys and values of a card; none where there is no card.
#[derive(Default)]
pub struct Readme(Map<String, Value>);

impl Readme {
    /// Reads it.
    pub fn read(c: &Checkpoint) -> Result<Readme, CheckpointError> {
        let Some(bytes) = c.read(FILE, MOST_BYTES)? else { return Ok(Readme::default()) };
        Readme::parse(&String::from_utf8_lossy(&bytes)).map_err(|e| unfit(c, FILE, "front matter", e))
    }

    fn parse(text: &str) -> Result<Readme, String> {
        let mut lines = text.trim_start_matches('\u{feff}').lines();
        if lines.next() != Some("---") {
            return Ok(Readme::default());
        }
        // Tabs, which YAML does not allow, stand in some cards for two spaces.
        let head: String = lines.take_while(|l| *l != "---").map(|l| l.replace('\t', "  ") + "\n").collect();
        if head.trim().is_empty() {
            return Ok(Readme::default());
        }
        // `no` is a language here, not a truth value.
        let options = serde_saphyr::options! { strict_booleans: true };
        match serde_saphyr::from_str_with_options(&head, options)
            .map_err(|e| crate::gguf::one_line(&e.to_string(), 200))?
        {
            Value::Object(map) => Ok(Readme(map)),
            Value::Null => Ok(Readme::default()),
            other => Err(format!("found {}, expected keys with values", crate::gguf::one_line(&other.to_string(), 60))),
        }
    }

    /// The value of the first of these keys that there is.
    pub fn first(&self, keys: &[&str]) -> Option<&Value> {
        keys.iter().find_map(|k| self.0.get(*k))
    }

    /// The first text of these keys.
    pub fn text(&self, keys: &[&str]) -> Option<String> {
        keys.iter().find_map(|k| text(self.0.get(*k)?))
    }

    /// The texts of all these keys, each one or a list.
    pub fn texts(&self, keys: &[&str]) -> Vec<String> {
        keys.iter().filter_map(|k| self.0.get(*k)).flat_map(|v| items(v).iter().filter_map(text)).collect()
    }
}

/// A value, or the values of a list.
pub fn items(v: &Value) -> &[Value] {
    match v {
        Value::Null => &[],
        Value::Array(all) => all,
        one => std::slice::from_ref(one),
    }
}

/// A string, or what is written where YAML sees a number or a truth value.
pub fn text(v: &Value) -> Option<String> {
    match v {
        Value::String(s) => Some(s.clone()),
        Value::Number(n) => Some(n.to_string()),
        Value::Bool(b) => Some(b.to_string()),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn heads_are_read() {
        let text = "---\nlicense: apache-2.0\nversion: 1.5\nlanguage:\n- en\n- no\ntags: [chat, \"a b\"]\nempty:\n---\n# x: y\n";
        let r = Readme::parse(text).unwrap();
        assert_eq!(r.text(&["model_license", "license"]).as_deref(), Some("apache-2.0"));
        assert_eq!(r.text(&["version"]).as_deref(), Some("1.5"));
        assert_eq!(r.texts(&["languages", "language"]), ["en", "no"]);
        assert_eq!(r.texts(&["tags", "license"]), ["chat", "a b", "apache-2.0"]);
        assert!(r.first(&["empty"]).is_some_and(|v| items(v).is_empty()));
        assert!(r.first(&["# x"]).is_none());
        for none in ["", "# A title\n", "---\n---\n", "---\n# nothing\n---\n"] {
            assert!(Readme::parse(none).unwrap().0.is_empty(), "{none:?}");
        }
        // A list that names itself ten times, ten times over.
        let mut bomb = "---\na0: &a0 [x, x, x, x, x, x, x, x, x, x]\n".to_string();
        for i in 1..10 {
            bomb += &format!("a{i}: &a{i} [{}]\n", vec![format!("*a{}", i - 1); 10].join(", "));
        }
        for bad in ["---\n- a\n- b\n---\n", "---\na: [b\n---\n", "---\na: b: c\n---\n", &bomb] {
            assert!(Readme::parse(bad).is_err(), "{}", &bad[..20.min(bad.len())]);
        }
    }
}
