//! Chat templates: the Jinja that comes with a model, run by minijinja with what Hugging Face's renderer adds to it.
//!
//! A template comes from a stranger's file: it gets a budget of steps, of output, of nesting, of memory and of time, and a
//! stack of its own, as deep as its length can make the recursion of who reads it.

use super::Message;
use crate::gguf::{self, Gguf, GgufError};
use crate::quota::Quota;
use crate::tokenizer::{Tokenizer, TokenizerError};
use jiff::ZonedDateTime;
use jiff::fmt::strtime::{self, BrokenDownTime};
use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Serde, ValueKind};
use minijinja::{Environment, Error, ErrorKind, State, Value, context};
use serde::Serialize;
use std::error::Error as _;
use std::io::Write;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

/// ChatML, for models without a template.
const CHATML: &str = "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}\
    {% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";
/// The longest template. (Those of models with tools have some 20 KB.)
const MOST_SOURCE: usize = 64 << 10;
/// Stack for compiling, for each byte of source, which may be a level of an expression; and for rendering, whose steps may
/// nest values. What is not reached takes no memory.
const STACK_A_BYTE: usize = 64 << 10;
const STACK: usize = 512 << 20;
/// Levels of a value that is written out, and values in it.
const MOST_LEVELS: usize = 64;
const MOST_VALUES: usize = 1 << 20;
/// The longest field that a number in `str.format` may ask for, in digits.
const MOST_WIDTH: usize = 4;
/// Steps of a rendering: some thousands of messages, in the templates that work hardest.
const FUEL: u64 = 1_000_000;
/// Memory that it takes beside the conversation, bytes, and how long it takes.
const MEMORY: usize = 128 << 20;
const TIME: Duration = Duration::from_secs(30);

/// A template that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TemplateError {
    /// The file's key.
    #[error(transparent)]
    Gguf(#[from] GgufError),
    /// The source.
    #[error("chat template: {0}")]
    Source(String),
    /// The rendering: often the template's own refusal of these messages.
    #[error("chat template: {0}")]
    Render(String),
    /// The tokens of what was rendered.
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
}

/// A compiled template.
pub struct Template {
    env: Arc<Environment<'static>>,
    bos: String,
    eos: String,
    /// Where it comes from, for errors.
    origin: Option<String>,
    /// What it was refused for: a template that took more than its quota is not tried again.
    refused: OnceLock<String>,
}

impl Template {
    /// The template of a file; ChatML where it has none.
    pub fn from_gguf(g: &Gguf, t: &Tokenizer) -> Result<Template, TemplateError> {
        let source = g.str("tokenizer.chat_template")?.unwrap_or(CHATML);
        Template::from_source(source, format!("tokenizer.chat_template of {}", g.path().display()), t)
    }

    /// A template of one's own: its source, or `chatml`, and where it comes from, for errors.
    pub fn from_source(source: &str, origin: String, t: &Tokenizer) -> Result<Template, TemplateError> {
        let text = |id: Option<u32>| id.map_or(String::new(), |i| String::from_utf8_lossy(t.piece(i)).into_owned());
        match Template::with_marks(source, &text(t.bos()), &text(t.eos())) {
            Ok(template) => Ok(Template { origin: Some(origin), ..template }),
            Err(TemplateError::Source(problem)) => Err(TemplateError::Source(format!("{problem} ({origin})"))),
            Err(other) => Err(other),
        }
    }

    /// A template for a vocabulary whose BOS and EOS are written so.
    pub fn with_marks(source: &str, bos: &str, eos: &str) -> Result<Template, TemplateError> {
        let source = if source == "chatml" { CHATML } else { source };
        if source.len() > MOST_SOURCE {
            return Err(TemplateError::Source(format!("{} bytes, expected at most {MOST_SOURCE}", source.len())));
        }
        // Hugging Face's marks for training, without meaning here.
        let mut source = source.to_string();
        for mark in ["{% generation %}", "{%- generation %}", "{%- generation -%}", "{% generation -%}"] {
            source = source.replace(mark, "").replace(&mark.replace("generation", "endgeneration"), "");
        }
        let stack = STACK_A_BYTE * source.len() + (1 << 20);
        let quota = Quota { stack, memory: MEMORY, time: TIME };
        let env = within(quota, || compiled(source)).unwrap_or_else(Err).map_err(TemplateError::Source)?;
        let (env, bos, eos) = (Arc::new(env), bos.to_string(), eos.to_string());
        Ok(Template { env, bos, eos, origin: None, refused: OnceLock::new() })
    }

    /// The text of a conversation; with `add_generation_prompt`, up to where the assistant begins to speak.
    pub fn render(&self, messages: &[Message], add_generation_prompt: bool) -> Result<String, TemplateError> {
        if let Some(why) = self.refused.get() {
            return Err(self.failed(why.clone()));
        }
        let size: usize = messages.iter().map(|m| m.content.len() + 1024).sum();
        let mut out = Limited { text: Vec::new(), most: 64 * 1024 + size * 2 };
        // Local time, as transformers takes it. Asked for here: a template's thread may be left behind at any allocation.
        let now = ZonedDateTime::now();
        let values = context! {
            strftime_now => Value::from_function(move |format: String| strftime(&format, &now)),
            messages => Value::from(Serde(messages)),
            add_generation_prompt,
            bos_token => self.bos.as_str(),
            eos_token => self.eos.as_str(),
        };
        let env = self.env.clone();
        let quota = Quota { stack: STACK, memory: MEMORY + size * 16, time: TIME };
        let rendered = within(quota, move || {
            env.get_template("chat")?.render_captured_to(values, &mut out)?;
            Ok(out.text)
        });
        let rendered = rendered.unwrap_or_else(|why| Err(self.refused.get_or_init(|| why).clone()));
        String::from_utf8(rendered.map_err(|why| self.failed(why))?).map_err(|e| self.failed(e.to_string()))
    }

    fn failed(&self, problem: String) -> TemplateError {
        let origin = self.origin.as_ref().map_or(String::new(), |origin| format!(" ({origin})"));
        TemplateError::Render(problem + &origin)
    }
}

/// The environment of a template, which is `chat` there.
fn compiled(source: String) -> Result<Environment<'static>, Error> {
    let mut env = Environment::new();
    // The environment outlives its source, and there is one a process.
    env.set_syntax(SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build()?);
    env.set_unknown_method_callback(method);
    env.set_formatter(|out, state, value| {
        bounded(value)?;
        minijinja::escape_formatter(out, state, value)
    });
    env.set_fuel(Some(FUEL));
    env.set_recursion_limit(64);
    env.add_filter("tojson", tojson);
    env.add_function("raise_exception", |message: String| -> Result<Value, Error> {
        Err(Error::new(ErrorKind::InvalidOperation, message))
    });
    env.add_template_owned("chat", source)?;
    Ok(env)
}

/// Runs `f` within a quota. Its error becomes a text there: it may hold the template's values.
fn within<T: Send + 'static>(
    quota: Quota,
    f: impl FnOnce() -> Result<T, Error> + Send + 'static,
) -> Result<Result<T, String>, String> {
    quota.run("oxcart-template", || f().map_err(|e| one_line(&e))).map_err(|e| e.to_string())
}

/// Methods of Python's strings, lists and dictionaries.
fn method(state: &mut State<'_, '_>, value: &Value, name: &str, args: &[Value]) -> Result<Value, Error> {
    if name == "format"
        && value.as_str().is_some_and(|s| s.split(|c: char| !c.is_ascii_digit()).any(|n| n.len() > MOST_WIDTH))
    {
        let problem = format!("format: a field of more than {MOST_WIDTH} digits");
        return Err(Error::new(ErrorKind::InvalidOperation, problem));
    }
    minijinja_contrib::pycompat::unknown_method_callback(state, value, name, args)
}

/// Refuses a value that holds itself, or more than will be written out.
fn bounded(value: &Value) -> Result<(), Error> {
    let mut left = vec![(value.clone(), 0)];
    let mut values = 0;
    while let Some((value, level)) = left.pop() {
        values += 1;
        if level > MOST_LEVELS || values > MOST_VALUES {
            let problem = format!("a value of more than {MOST_LEVELS} levels or {MOST_VALUES} values");
            return Err(Error::new(ErrorKind::InvalidOperation, problem));
        }
        let by_key = match value.kind() {
            ValueKind::Seq | ValueKind::Iterable => false,
            ValueKind::Map | ValueKind::Plain => true,
            _ => continue,
        };
        for item in value.try_iter().into_iter().flatten().take(MOST_VALUES) {
            left.push((if by_key { value.get_item(&item)? } else { item }, level + 1));
        }
    }
    Ok(())
}

/// Text up to a length: a template must not fill the memory.
struct Limited {
    text: Vec<u8>,
    most: usize,
}

impl Write for Limited {
    fn write(&mut self, b: &[u8]) -> std::io::Result<usize> {
        if self.text.len() + b.len() > self.most {
            return Err(std::io::Error::other(format!("more than {} bytes of output", self.most)));
        }
        self.text.extend_from_slice(b);
        Ok(b.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// JSON as Python's `json.dumps(ensure_ascii=False)` writes it, which models were trained on: spaces after `,` and `:`,
/// nothing escaped for HTML.
fn tojson(value: Value, options: Kwargs) -> Result<String, Error> {
    bounded(&value)?;
    let indent: Option<usize> = options.get("indent")?;
    let bad = |e: serde_json::Error| Error::new(ErrorKind::InvalidOperation, e.to_string());
    let value = serde_json::to_value(&value).map_err(bad)?;
    let mut out = Vec::new();
    match indent {
        Some(n) => {
            let spaces = " ".repeat(n.min(64));
            let pretty = serde_json::ser::PrettyFormatter::with_indent(spaces.as_bytes());
            value.serialize(&mut serde_json::Serializer::with_formatter(&mut out, pretty)).map_err(bad)?;
        }
        None => value.serialize(&mut serde_json::Serializer::with_formatter(&mut out, Spaced)).map_err(bad)?,
    }
    String::from_utf8(out).map_err(|e| Error::new(ErrorKind::InvalidOperation, e.to_string()))
}

/// One line with a space after `,` and `:`.
struct Spaced;

impl serde_json::ser::Formatter for Spaced {
    fn begin_array_value<W: ?Sized + Write>(&mut self, w: &mut W, first: bool) -> std::io::Result<()> {
        if first { Ok(()) } else { w.write_all(b", ") }
    }

    fn begin_object_key<W: ?Sized + Write>(&mut self, w: &mut W, first: bool) -> std::io::Result<()> {
        if first { Ok(()) } else { w.write_all(b", ") }
    }

    fn begin_object_value<W: ?Sized + Write>(&mut self, w: &mut W) -> std::io::Result<()> {
        w.write_all(b": ")
    }
}

fn one_line(e: &Error) -> String {
    let mut text = e.to_string();
    // What went wrong with the output stands behind.
    if let Some(why) = e.source() {
        text = format!("{text}: {why}");
    }
    gguf::one_line(text.lines().next().unwrap_or_default().trim_end_matches('.'), 400)
}

/// A time as a template wants it, by C's format; what is not one stays, as in Python.
fn strftime(format: &str, time: &ZonedDateTime) -> Result<String, Error> {
    let lenient = strtime::Config::new().lenient(true);
    BrokenDownTime::from(time)
        .to_string_with_config(&lenient, format)
        .map_err(|e| Error::new(ErrorKind::InvalidOperation, format!("strftime_now: {e}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn talk() -> Vec<Message> {
        vec![Message::new("system", "Be brief."), Message::new("user", " Hi ")]
    }

    fn render(source: &str) -> Result<String, TemplateError> {
        Template::with_marks(source, "<s>", "</s>")?.render(&talk(), true)
    }

    #[test]
    fn chatml_is_the_fallback() {
        assert_eq!(
            render(CHATML).unwrap(),
            "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n Hi <|im_end|>\n<|im_start|>assistant\n"
        );
    }

    #[test]
    fn what_real_templates_use_works() {
        for (source, want) in [
            ("{{ bos_token }}{{ messages[1].content.strip() }}{{ eos_token }}", "<s>Hi</s>"),
            ("{%- for m in messages if m.role == 'user' %}{{ m['content'] | trim }}{% endfor %}", "Hi"),
            (
                "{% if messages[0]['role'] != 'system' %}x{% else %}{{ messages[0].content.split(' ')[0] }}{% endif %}",
                "Be",
            ),
            (
                "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
                "2",
            ),
            ("{% generation %}a{% endgeneration %}", "a"),
            // As Python's json.dumps writes it.
            ("{{ messages[0] | tojson }}", r#"{"role": "system", "content": "Be brief."}"#),
        ] {
            assert_eq!(render(source).unwrap(), want, "{source}");
        }
    }

    #[test]
    fn a_hostile_template_ends_in_an_error() {
        for source in [
            "{{ raise_exception('roles must alternate') }}",
            "{% for i in range(100000) %}{% for j in range(100000) %}x{% endfor %}{% endfor %}",
            "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
            "{{ 'x' * 1000000000 }}",
            "{% if %}",
            "{{ messages[9].content.strip() }}",
            "{% set ns = namespace() %}{% set ns.ns = ns %}{{ ns|tojson }}",
            "{% set ns = namespace() %}{% set ns.ns = ns %}{{ ns }}",
            "{% set ns = namespace(x=[1]) %}{% for i in range(40) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x|tojson }}",
            "{% set ns = namespace(x=[1]) %}{% for i in range(100000) %}{% set ns.x = [ns.x] %}{% endfor %}{{ ns.x }}",
            "{{ '{:>9999999999}'.format('a') }}",
            "{% set ns = namespace(x='ab') %}{% for i in range(40) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x }}",
            "{% macro f(s) %}{{ f(s ~ s) }}{% endmacro %}{{ f('ab') }}",
            "{{ raise_exception('\u{1b}[2J') }}",
            &("{{ ".to_string() + &"not ".repeat(16_000) + " }}"),
        ] {
            let e = render(source).expect_err(source).to_string();
            assert!(e.starts_with("chat template: ") && !e.contains(char::is_control), "{source}: {e}");
        }
        // What took too much is not tried again.
        let source =
            "{% set ns = namespace(x=[1]) %}{% for i in range(40) %}{% set ns.x = ns.x + ns.x %}{% endfor %}{{ ns.x }}";
        let template = Template::with_marks(source, "", "").unwrap();
        let first = template.render(&talk(), true).unwrap_err().to_string();
        assert!(first.starts_with("chat template: takes more than 1") && first.ends_with(" MB of memory"), "{first}");
        assert_eq!(template.render(&talk(), true).unwrap_err().to_string(), first);
        // As deep as the longest can be: whatever comes out, the program goes on.
        for (first, part, last) in [
            ("{{ ", "not ", "1 }}"),
            ("{{ ", "-", "1 }}"),
            ("{{ 1", "+1", " }}"),
            ("{{ 1", "|string", " }}"),
            ("{{ messages", ".a", " }}"),
        ] {
            let _ = render(&(first.to_string() + &part.repeat((MOST_SOURCE - 32) / part.len()) + last));
        }
        assert!(
            render("{{ raise_exception('roles must alternate') }}").unwrap_err().to_string().contains("roles must")
        );
    }

    #[test]
    fn dates_are_right() {
        let time = "2024-02-09T01:02:03+08:00[Asia/Shanghai]".parse().unwrap();
        let cases = [
            ("%d %b %Y", "09 Feb 2024"),
            ("%B %-d, %A %H:%M:%S", "February 9, Friday 01:02:03"),
            ("%%, %!, 年", "%, %!, 年"),
        ];
        for (format, want) in cases {
            assert_eq!(strftime(format, &time).unwrap(), want);
        }
        let year = render("{{ strftime_now('%Y') }}").unwrap();
        assert!(year.parse::<i32>().is_ok_and(|y| y >= 2026), "{year}");
    }
}
