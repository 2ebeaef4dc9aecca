//! What a person sets once: `oxcart/config.toml` in the platform's folder for configuration. Flags override it.
//!
//! ```toml
//! model = "SmolLM2-135M-Instruct"      # a file, or a name of the catalogue
//! model-draft = "small.gguf"           # a smaller model with the same vocabulary, that guesses ahead
//! ctx-size = 8192                      # tokens of context
//! threads = 16
//! system-prompt = "Be brief."
//! theme = "dark"
//!
//! [sampling]                           # over what the model's file and its makers say
//! temp = 0.7                           # also the other flags of sampling: top-k, min-p, repeat-penalty
//!
//! [conversations]
//! dir = "/home/ada/conversations"      # where they are kept
//! kv-cache = true                      # keep the KV cache beside the text, so that they resume in seconds
//! kv-cache-gib = 20                    # all of them together; the oldest go first
//! ```
//!
//! Keys are named as the flags are. Every key may be left out; an unknown one, or a value that cannot be, is an error.

use crate::disk;
use crate::sample::Overrides;
use etcetera::BaseStrategy;
use serde::Deserialize;
use std::io;
use std::path::{Path, PathBuf};

/// Names of colours ([`crate::tui::Scheme`]).
pub const THEMES: [&str; 3] = ["dark", "light", "none"];
/// GiB of KV caches on disk, where nothing is set.
const KV_CACHE_GIB: f64 = 20.0;

/// The configuration.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub struct Config {
    /// The model where none is named: a file, or a name of the catalogue.
    pub model: Option<String>,
    /// A smaller model that guesses ahead, likewise.
    pub model_draft: Option<String>,
    /// Tokens of context.
    pub ctx_size: Option<usize>,
    /// Worker threads.
    pub threads: Option<usize>,
    /// What conversations begin with.
    pub system_prompt: Option<String>,
    /// Colours of the full-screen interface, by name.
    pub theme: Option<String>,
    /// How the next token is chosen, over what the model's file and its makers say.
    pub sampling: Overrides,
    /// Where conversations are kept, and what of them.
    pub conversations: Conversations,
}

/// What is kept of conversations.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub struct Conversations {
    /// The folder; a platform's usual place where it is not set ([`Config::conversations_dir`]).
    pub dir: Option<PathBuf>,
    /// Whether the KV cache is kept beside the text.
    pub kv_cache: bool,
    /// How much all KV caches may take, in GiB.
    pub kv_cache_gib: f64,
}

impl Default for Conversations {
    fn default() -> Conversations {
        Conversations { dir: None, kv_cache: true, kv_cache_gib: KV_CACHE_GIB }
    }
}

/// What is wrong with a configuration.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file system.
    #[error("{}: {error}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        error: io::Error,
    },
    /// A line that is no TOML, an unknown key, or a value of a wrong type.
    #[error("{}: line {line}: {text}: {problem}", path.display())]
    Line {
        /// The file.
        path: PathBuf,
        /// Which line, from 1.
        line: usize,
        /// The line.
        text: String,
        /// What was found and expected.
        problem: String,
    },
    /// A value out of its range.
    #[error("{}: line {line}: {key}: {problem}", path.display())]
    Value {
        /// The file.
        path: PathBuf,
        /// Which line, from 1.
        line: usize,
        /// The key, with its table.
        key: String,
        /// What was found and expected.
        problem: String,
    },
    /// There is no home folder.
    #[error("no home folder: {0}")]
    Home(String),
}

fn base() -> Result<impl BaseStrategy, ConfigError> {
    etcetera::choose_base_strategy().map_err(|e| ConfigError::Home(e.to_string()))
}

impl Config {
    /// The file: `OXCART_CONFIG`, or `oxcart/config.toml` in the user's folder for configuration.
    pub fn path() -> Result<PathBuf, ConfigError> {
        match std::env::var_os("OXCART_CONFIG").filter(|p| !p.is_empty()) {
            Some(path) => Ok(path.into()),
            None => Ok(base()?.config_dir().join("oxcart/config.toml")),
        }
    }

    /// Reads the user's configuration. Without a file, everything is as if nothing were set; but a file that
    /// `OXCART_CONFIG` names must be there.
    pub fn load() -> Result<Config, ConfigError> {
        let path = Config::path()?;
        let named = std::env::var_os("OXCART_CONFIG").is_some_and(|p| !p.is_empty());
        match disk::read_text(&path, disk::MOST_SETTINGS) {
            Ok(text) => Config::parse(&text, &path),
            Err(e) if e.kind() == io::ErrorKind::NotFound && !named => Ok(Config::default()),
            Err(error) => Err(ConfigError::Io { path, error }),
        }
    }

    /// Reads a configuration; `path` is what errors call it.
    pub fn parse(text: &str, path: &Path) -> Result<Config, ConfigError> {
        let c: Config = toml::from_str(text).map_err(|e| {
            let at = e.span().map_or(0, |s| s.start.min(text.len()));
            let line = disk::line_of(text.as_bytes(), at);
            ConfigError::Line {
                path: path.to_path_buf(),
                line,
                text: crate::gguf::one_line(text.lines().nth(line - 1).unwrap_or_default().trim(), 80),
                problem: e.message().replace('\n', ", "),
            }
        })?;
        c.check(text, path)?;
        Ok(c)
    }

    fn check(&self, text: &str, path: &Path) -> Result<(), ConfigError> {
        let error = |key: &str, problem: String| {
            let name = key.rsplit('.').next().unwrap_or(key);
            // A key is written once, alone or after its table's name.
            let has = |l: &str| l.split('=').next().is_some_and(|k| k.trim().rsplit('.').next() == Some(name));
            let line = text.lines().position(|l| l.contains('=') && has(l)).map_or(1, |i| i + 1);
            Err(ConfigError::Value { path: path.to_path_buf(), line, key: key.to_string(), problem })
        };
        if let Some(name) = self.theme.as_ref().filter(|t| !THEMES.contains(&t.as_str())) {
            return error("theme", format!("{name:?}, expected {}", THEMES.join(", ")));
        }
        if let Some(dir) = self.conversations.dir.as_ref()
            && !disk::home_path(&dir.to_string_lossy()).is_absolute()
        {
            return error("conversations.dir", format!("{dir:?}, expected a path from / or ~/ on"));
        }
        if let Err((key, problem)) = self.sampling.check() {
            return error(&format!("sampling.{key}"), problem);
        }
        let whole = |n: Option<usize>| n.map(|n| n as f64);
        let ranges = [
            ("ctx-size", whole(self.ctx_size), 1.0, 2f64.powi(31)),
            ("threads", whole(self.threads), 1.0, 4096.0),
            ("conversations.kv-cache-gib", Some(self.conversations.kv_cache_gib), 0.0, 1e6),
        ];
        for (key, value, min, max) in ranges {
            if let Some(x) = value.filter(|x| !(min..=max).contains(x)) {
                return error(key, format!("{x}, expected {min} to {max}"));
            }
        }
        Ok(())
    }

    /// The folder of conversations: as set, or `oxcart/conversations` in the user's folder for data.
    pub fn conversations_dir(&self) -> Result<PathBuf, ConfigError> {
        match &self.conversations.dir {
            Some(dir) => Ok(disk::home_path(&dir.to_string_lossy())),
            None => Ok(base()?.data_dir().join("oxcart/conversations")),
        }
    }

    /// Bytes that KV caches may take on disk, all together; 0 where they are switched off.
    pub fn kv_cache_bytes(&self) -> u64 {
        let c = &self.conversations;
        if c.kv_cache { (c.kv_cache_gib * f64::from(1 << 30)) as u64 } else { 0 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sample::SampleParams;

    #[test]
    fn what_is_set_is_read_and_the_rest_stays() {
        let text = "model = \"a.gguf\"\nctx-size = 4096\nthreads = 3\nsystem-prompt = \"Be brief.\"\ntheme = \"light\"\n\
            [sampling]\ntemp = 0.5\ntop-k = 7\n[conversations]\ndir = \"/tmp/c\"\nkv-cache = false\n";
        let c = Config::parse(text, Path::new("c.toml")).unwrap();
        let d = SampleParams::default;
        assert_eq!((c.model.as_deref(), c.ctx_size, c.threads), (Some("a.gguf"), Some(4096), Some(3)));
        assert_eq!((c.system_prompt.as_deref(), c.theme.as_deref()), (Some("Be brief."), Some("light")));
        assert_eq!(c.sampling.over(d()), SampleParams { temp: 0.5, top_k: 7, ..d() });
        assert_eq!((c.conversations_dir().unwrap(), c.kv_cache_bytes()), ("/tmp/c".into(), 0));
        // Numbers that stand for all, as in the flags.
        let c = Config::parse("[sampling]\ntop-k = -1\nrepeat-last-n = -1\n", Path::new("c.toml")).unwrap();
        assert_eq!(c.sampling.over(d()), SampleParams { top_k: 0, repeat_last_n: usize::MAX, ..d() });
        let empty = Config::parse("", Path::new("c.toml")).unwrap();
        assert_eq!((&empty, empty.sampling.over(d())), (&Config::default(), d()));
        assert_eq!(empty.kv_cache_bytes(), 20 << 30);
    }

    #[test]
    fn errors_name_file_line_and_key() {
        let cases = [
            ("colour = 1", "c.toml: line 1: colour = 1: unknown field `colour`"),
            (
                "\n[sampling]\ntemp = \"hot\"",
                "c.toml: line 3: temp = \"hot\": invalid type: string \"hot\", expected f32",
            ),
            (
                "[sampling]\ntop_k = 1",
                "c.toml: line 2: top_k = 1: unknown field `top_k`, expected one of `temp`, `top-k`",
            ),
            ("model = ", "c.toml: line 1: model =: "),
            ("threads = -1", "c.toml: line 1: threads = -1: "),
            ("threads = 0", "c.toml: line 1: threads: 0, expected 1 to 4096"),
            ("[sampling]\ntop-p = 1.5", "c.toml: line 2: sampling.top-p: 1.5, expected 0 to 1"),
            (
                "[sampling]\nrepeat-last-n = -2",
                "c.toml: line 2: repeat-last-n = -2: expected a number of tokens, or -1 for all of the context",
            ),
            ("\nsampling.temp = nan", "c.toml: line 2: sampling.temp: NaN, expected -100 to 100"),
            ("[conversations]\nkv-cache-gib = -1", "c.toml: line 2: conversations.kv-cache-gib: -1, expected 0 to"),
            ("theme = \"blue\"", "c.toml: line 1: theme: \"blue\", expected dark, light, none"),
            ("[conversations]\nkv-cache = 1", "c.toml: line 2: kv-cache = 1: invalid type"),
        ];
        let mut wrong = Vec::new();
        for (text, want) in cases {
            match Config::parse(text, Path::new("c.toml")) {
                Err(e) if e.to_string().starts_with(want) && !e.to_string().contains('\n') => {}
                other => wrong.push(format!("{text:?}: {other:?}")),
            }
        }
        assert!(wrong.is_empty(), "{wrong:#?}");
    }
}
