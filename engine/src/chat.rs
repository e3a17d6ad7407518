//! Chat templates: the model's own Jinja template, rendered as `transformers` does.

use std::fmt::Write as _;
use std::path::Path;

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Serde};
use minijinja::{Environment, Error, ErrorKind, Value};
use serde::{Deserialize, Serialize};

use crate::error::EngineError;
use crate::load::{gguf::Gguf, map_file, read_small};

/// Longest template source, bytes.
pub const TEMPLATE_BYTES_MAX: usize = 1 << 20;
/// Most template instructions of one rendering.
const FUEL: u64 = 20_000_000;
const NAME: &str = "chat";

/// One message of a conversation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Message {
    /// `system`, `user`, `assistant` or what else the template knows.
    pub role: String,
    /// The text.
    pub content: String,
}

impl Message {
    /// A message of `role` saying `content`.
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Self {
        Self { role: role.into(), content: content.into() }
    }
}

/// A compiled chat template.
#[derive(Debug)]
pub struct ChatTemplate {
    env: Environment<'static>,
    bos: String,
    eos: String,
    source: String,
    takes_tools: bool,
}

fn refused(e: &Error) -> EngineError {
    let mut text = e.to_string();
    let mut source = std::error::Error::source(e);
    while let Some(cause) = source {
        let _ = write!(text, ": {cause}");
        source = cause.source();
    }
    EngineError::Template(text)
}

impl ChatTemplate {
    /// Compiles a template; `bos` and `eos` are the tokens it sees as `bos_token` and `eos_token`.
    ///
    /// # Errors
    /// [`EngineError::Template`] if it is no template.
    pub fn new(source: &str, bos: &str, eos: &str) -> Result<Self, EngineError> {
        if source.len() > TEMPLATE_BYTES_MAX {
            return Err(EngineError::Template(format!("has {} bytes, more than {TEMPLATE_BYTES_MAX}", source.len())));
        }
        let mut env = Environment::new();
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build().map_err(|e| refused(&e))?;
        env.set_syntax(syntax);
        env.set_fuel(Some(FUEL));
        env.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        env.add_function("raise_exception", |text: String| -> Result<Value, Error> {
            Err(Error::new(ErrorKind::InvalidOperation, text))
        });
        env.add_filter("tojson", to_json);
        env.add_template_owned(NAME, source.to_owned()).map_err(|e| refused(&e))?;
        let takes_tools =
            env.get_template(NAME).map_err(|e| refused(&e))?.undeclared_variables(false).contains("tools");
        Ok(Self { env, bos: bos.to_owned(), eos: eos.to_owned(), source: source.to_owned(), takes_tools })
    }

    /// From a folder in Hugging Face layout: `chat_template.jinja`, else `tokenizer_config.json`.
    ///
    /// # Errors
    /// [`EngineError::Template`] if there is none, and what is wrong with the files.
    pub fn from_dir(dir: &Path) -> Result<Self, EngineError> {
        let config = dir.join("tokenizer_config.json");
        let config = if config.exists() { read_small(&config)? } else { b"{}".to_vec() };
        let file = dir.join("chat_template.jinja");
        let source = if file.exists() { Some(read_small(&file)?) } else { None };
        let source = source
            .map(String::from_utf8)
            .transpose()
            .map_err(|_| EngineError::Template("chat_template.jinja is not UTF-8".into()))?;
        Self::from_tokenizer_config(&config, source.as_deref())
    }

    /// From the bytes of `tokenizer_config.json`; `source` takes the place of the template in it.
    ///
    /// # Errors
    /// [`EngineError::Json`], [`EngineError::Template`].
    pub fn from_tokenizer_config(config: &[u8], source: Option<&str>) -> Result<Self, EngineError> {
        let config: serde_json::Value = serde_json::from_slice(config)
            .map_err(|e| EngineError::Json { file: "tokenizer_config.json", problem: e.to_string() })?;
        // A token is text, or an object that holds it.
        let token = |name: &str| {
            let v = &config[name];
            v.as_str().or_else(|| v["content"].as_str()).unwrap_or_default().to_owned()
        };
        let inside = match &config["chat_template"] {
            serde_json::Value::String(s) => Some(s.as_str()),
            serde_json::Value::Array(list) => {
                list.iter().find(|t| t["name"] == "default").and_then(|t| t["template"].as_str())
            }
            _ => None,
        };
        let source = source
            .or(inside)
            .ok_or_else(|| EngineError::Template("the model has none; use the completions endpoint".into()))?;
        Self::new(source, &token("bos_token"), &token("eos_token"))
    }

    /// From the metadata of a GGUF file.
    ///
    /// # Errors
    /// [`EngineError::Spec`] if it has no template, and what is wrong with it.
    pub fn from_gguf(path: &Path) -> Result<Self, EngineError> {
        let map = map_file(path)?;
        let file = Gguf::parse(&map)?;
        let tokens = file.texts("tokenizer.ggml.tokens")?;
        let token = |key: &str| file.token(key).and_then(|id| tokens.get(id as usize)).copied().unwrap_or_default();
        Self::new(
            file.text("tokenizer.chat_template")?,
            token("tokenizer.ggml.bos_token_id"),
            token("tokenizer.ggml.eos_token_id"),
        )
    }

    /// True if the template writes descriptions of tools into the prompt.
    #[must_use]
    pub fn takes_tools(&self) -> bool {
        self.takes_tools
    }

    /// The template as it was given.
    #[must_use]
    pub fn source(&self) -> &str {
        &self.source
    }

    /// The prompt of a conversation. `now_unix_s` is what `strftime_now` sees (UTC).
    ///
    /// # Errors
    /// [`EngineError::Template`] if the template refuses the messages.
    pub fn render(
        &self,
        messages: &[Message],
        add_generation_prompt: bool,
        now_unix_s: u64,
    ) -> Result<String, EngineError> {
        self.render_with(Value::from(Serde(messages)), None, add_generation_prompt, now_unix_s)
    }

    /// As [`ChatTemplate::render`], for messages of any shape and with tool descriptions.
    ///
    /// # Errors
    /// [`EngineError::Template`] if the template refuses the messages.
    pub fn render_json(
        &self,
        messages: &serde_json::Value,
        tools: Option<&serde_json::Value>,
        add_generation_prompt: bool,
        now_unix_s: u64,
    ) -> Result<String, EngineError> {
        let tools = tools.map(|t| Value::from(Serde(t)));
        self.render_with(Value::from(Serde(messages)), tools, add_generation_prompt, now_unix_s)
    }

    fn render_with(
        &self,
        messages: Value,
        tools: Option<Value>,
        add_generation_prompt: bool,
        now_unix_s: u64,
    ) -> Result<String, EngineError> {
        let template = self.env.get_template(NAME).map_err(|e| refused(&e))?;
        let strftime_now = Value::from_function(move |format: String| strftime(&format, now_unix_s));
        template
            .render(minijinja::context! {
                messages => messages,
                tools => tools,
                add_generation_prompt => add_generation_prompt,
                bos_token => self.bos.as_str(),
                eos_token => self.eos.as_str(),
                strftime_now => strftime_now,
            })
            .map_err(|e| refused(&e))
    }
}

/// Python's `json.dumps(value, ensure_ascii=False, indent=indent)`, as `transformers` installs it.
#[allow(clippy::needless_pass_by_value)] // minijinja calls filters with owned keyword arguments.
fn to_json(value: &Value, kwargs: Kwargs) -> Result<Value, Error> {
    let indent: Option<usize> = kwargs.get("indent")?;
    let _: Option<bool> = kwargs.get("ensure_ascii")?;
    let _: Option<bool> = kwargs.get("sort_keys")?;
    kwargs.assert_all_used()?;
    let broken = |e: serde_json::Error| Error::new(ErrorKind::BadSerialization, e.to_string());
    let mut out = Vec::new();
    match indent {
        Some(n) => {
            let spaces = vec![b' '; n.min(16)];
            let formatter = serde_json::ser::PrettyFormatter::with_indent(&spaces);
            value.serialize(&mut serde_json::Serializer::with_formatter(&mut out, formatter)).map_err(broken)?;
        }
        None => value.serialize(&mut serde_json::Serializer::with_formatter(&mut out, Spaced)).map_err(broken)?,
    }
    String::from_utf8(out)
        .map(Value::from_safe_string)
        .map_err(|e| Error::new(ErrorKind::BadSerialization, e.to_string()))
}

/// JSON with a space after `,` and `:`, as Python writes it.
struct Spaced;

impl serde_json::ser::Formatter for Spaced {
    fn begin_array_value<W: ?Sized + std::io::Write>(&mut self, w: &mut W, first: bool) -> std::io::Result<()> {
        if first { Ok(()) } else { w.write_all(b", ") }
    }

    fn begin_object_key<W: ?Sized + std::io::Write>(&mut self, w: &mut W, first: bool) -> std::io::Result<()> {
        if first { Ok(()) } else { w.write_all(b", ") }
    }

    fn begin_object_value<W: ?Sized + std::io::Write>(&mut self, w: &mut W) -> std::io::Result<()> {
        w.write_all(b": ")
    }
}

const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];
const DAYS: [&str; 7] = ["Sunday", "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday"];

/// The directives of `strftime` that chat templates use; others stay as they are.
fn strftime(format: &str, unix_s: u64) -> String {
    // Capped at the year 9999, so that the arithmetic below cannot overflow.
    let unix_s = unix_s.min(253_402_300_799);
    let (days, seconds) = (unix_s / 86_400, unix_s % 86_400);
    // Civil date from days (H. Hinnant, chrono-Compatible Low-Level Date Algorithms).
    let z = days + 719_468;
    let (era, day_of_era) = (z / 146_097, z % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let m = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * m + 2) / 5 + 1;
    let month = if m < 10 { m + 3 } else { m - 9 };
    let year = year_of_era + era * 400 + u64::from(month <= 2);
    let (month_name, day_name) = (MONTHS[month as usize - 1], DAYS[(days as usize + 4) % 7]);
    let mut out = String::new();
    let mut chars = format.chars();
    while let Some(c) = chars.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        let _ = match chars.next() {
            Some('Y') => write!(out, "{year}"),
            Some('m') => write!(out, "{month:02}"),
            Some('d') => write!(out, "{day:02}"),
            Some('H') => write!(out, "{:02}", seconds / 3600),
            Some('M') => write!(out, "{:02}", seconds / 60 % 60),
            Some('S') => write!(out, "{:02}", seconds % 60),
            Some('B') => write!(out, "{month_name}"),
            Some('b') => write!(out, "{}", &month_name[..3]),
            Some('A') => write!(out, "{day_name}"),
            Some('a') => write!(out, "{}", &day_name[..3]),
            Some('%') => write!(out, "%"),
            Some(other) => write!(out, "%{other}"),
            None => write!(out, "%"),
        };
    }
    out
}

#[cfg(test)]
mod tests {
    use super::{ChatTemplate, Message, strftime};
    use crate::error::EngineError;
    use tandem_models::EDGE;

    fn render(source: &str) -> Result<String, EngineError> {
        ChatTemplate::new(source, "<s>", "</s>")?.render(&[Message::new("user", "hi \"é\"")], true, 1_721_000_000)
    }

    #[test]
    fn the_pairs_template() {
        let t = ChatTemplate::new(EDGE.chat_template, "<|bos|>", "<|eos|>").expect("compiles");
        let messages = [Message::new("user", "a"), Message::new("assistant", "b"), Message::new("user", "c")];
        let text = t.render(&messages, true, 0).expect("renders");
        assert_eq!(text, "<|bos|><|user|>a<|assistant|>b<|eos|><|user|>c<|assistant|>");
    }

    #[test]
    fn what_transformers_offers() {
        assert_eq!(render("{{ bos_token }}{{ messages[0].content }}{{ eos_token }}").expect("ok"), "<s>hi \"é\"</s>");
        assert_eq!(render("{{ messages[0] | tojson }}").expect("ok"), r#"{"role": "user", "content": "hi \"é\""}"#);
        assert_eq!(render("{{ [1, 2] | tojson(indent=2) }}").expect("ok"), "[\n  1,\n  2\n]");
        assert_eq!(render("{{ ' x '.strip() + 'ab'.upper() }}").expect("ok"), "xAB");
        assert_eq!(render("{% if true %}\n  a\n{% endif %}\nb").expect("ok"), "  a\nb");
        assert_eq!(render("{{ strftime_now('%d %b %Y') }}").expect("ok"), "14 Jul 2024");
        assert_eq!(render("{% for m in messages %}{{ loop.last }}{% endfor %}").expect("ok"), "True");
    }

    #[test]
    fn refusals_are_typed() {
        let e = render("{{ raise_exception('roles must alternate') }}");
        assert!(matches!(&e, Err(EngineError::Template(t)) if t.contains("roles must alternate")), "{e:?}");
        for bad in ["{% for %}", "{{ messages[0].content.nope() }}", "{{ 1 // 0 }}"] {
            assert!(matches!(render(bad), Err(EngineError::Template(_))), "{bad}");
        }
        let endless = "{% for a in range(9999) %}{% for b in range(9999) %}{{ b }}{% endfor %}{% endfor %}";
        assert!(matches!(render(endless), Err(EngineError::Template(_))));
        assert!(matches!(ChatTemplate::from_tokenizer_config(b"{}", None), Err(EngineError::Template(_))));
        assert!(matches!(ChatTemplate::from_tokenizer_config(b"{", None), Err(EngineError::Json { .. })));
    }

    #[test]
    fn dates() {
        assert_eq!(
            strftime("%Y-%m-%d %H:%M:%S %A %a %B %% %q", 951_827_696),
            "2000-02-29 12:34:56 Tuesday Tue February % %q"
        );
        assert_eq!(strftime("%Y-%m-%d", 0), "1970-01-01");
        assert_eq!(strftime("%Y-%m-%d", u64::MAX), "9999-12-31");
    }
}
