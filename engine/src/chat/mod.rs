//! Chat templates: the model's own Jinja template, rendered as `transformers` does.

mod json;
#[cfg(test)]
mod tests;
mod time;

use std::borrow::Cow;
use std::fmt::Write as _;
use std::path::Path;

use minijinja::syntax::SyntaxConfig;
use minijinja::value::Serde;
use minijinja::{Environment, Error, ErrorKind, Value};
use serde::{Deserialize, Serialize};

use crate::error::EngineError;
use crate::load::{gguf::Gguf, map_file, read_small, split};

/// Longest template source, bytes.
pub const TEMPLATE_BYTES_MAX: usize = 1 << 20;
/// Most template instructions of one rendering.
const FUEL: u64 = 20_000_000;
const NAME: &str = "chat";
/// What a model without a template says.
const NO_TEMPLATE: &str = "the model has none; use /v1/completions, or add a chat_template.jinja";

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
        // None is not iterable in Python.
        env.add_test("iterable", |value: &Value| {
            !value.is_none() && (value.is_undefined() || value.try_iter().is_ok() || value.as_str().is_some())
        });
        env.add_filter("tojson", json::to_json);
        env.add_template_owned(NAME, without_generation(source).into_owned()).map_err(|e| refused(&e))?;
        let takes_tools =
            env.get_template(NAME).map_err(|e| refused(&e))?.undeclared_variables(false).contains("tools");
        Ok(Self { env, bos: bos.to_owned(), eos: eos.to_owned(), source: source.to_owned(), takes_tools })
    }

    /// For a model without a template: refuses every conversation and says what to use instead.
    ///
    /// # Errors
    /// None in practice.
    pub fn none() -> Result<Self, EngineError> {
        Self::new(&format!("{{{{ raise_exception('{NO_TEMPLATE}') }}}}"), "", "")
    }

    /// From a folder in Hugging Face layout: `chat_template.jinja`, else `tokenizer_config.json`.
    ///
    /// # Errors
    /// What is wrong with the files; one without a template is [`ChatTemplate::none`].
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
        match source.or(inside) {
            Some(source) => Self::new(source, &token("bos_token"), &token("eos_token")),
            None => Self::none(),
        }
    }

    /// From the metadata of a GGUF file.
    ///
    /// # Errors
    /// What is wrong with the file; one without a template is [`ChatTemplate::none`].
    pub fn from_gguf(path: &Path) -> Result<Self, EngineError> {
        from_gguf_bytes(&map_file(&split::first(path))?)
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
        self.render_with(&Inputs { add_generation_prompt, now_unix_s, ..Inputs::new(Value::from(Serde(messages))) })
    }

    /// As [`ChatTemplate::render`], for messages of any shape, with tool descriptions and with further
    /// variables, e.g. `enable_thinking`.
    ///
    /// # Errors
    /// [`EngineError::Template`] if the template refuses the messages.
    pub fn render_json(
        &self,
        messages: &serde_json::Value,
        tools: Option<&serde_json::Value>,
        variables: &serde_json::Map<String, serde_json::Value>,
        add_generation_prompt: bool,
        now_unix_s: u64,
    ) -> Result<String, EngineError> {
        let tools = tools.map(|tools| Value::from(Serde(tools)));
        let more = (!variables.is_empty()).then(|| Value::from(Serde(variables)));
        let messages = Value::from(Serde(messages));
        self.render_with(&Inputs { tools, more, add_generation_prompt, now_unix_s, ..Inputs::new(messages) })
    }

    /// The prompt of everything a template may look at.
    ///
    /// # Errors
    /// [`EngineError::Template`] if the template refuses it.
    pub fn render_with(&self, inputs: &Inputs) -> Result<String, EngineError> {
        let template = self.env.get_template(NAME).map_err(|e| refused(&e))?;
        let now_unix_s = inputs.now_unix_s;
        let strftime_now = Value::from_function(move |format: String| time::strftime(&format, now_unix_s));
        let own = minijinja::context! {
            messages => inputs.messages.clone(),
            tools => inputs.tools.clone(),
            documents => inputs.documents.clone(),
            add_generation_prompt => inputs.add_generation_prompt,
            bos_token => self.bos.as_str(),
            eos_token => self.eos.as_str(),
            strftime_now => strftime_now,
        };
        let context = match &inputs.more {
            Some(more) => minijinja::context! { ..own, ..more.clone() },
            None => own,
        };
        template.render(context).map_err(|e| refused(&e))
    }
}

/// The template of a whole GGUF file.
pub(crate) fn from_gguf_bytes(bytes: &[u8]) -> Result<ChatTemplate, EngineError> {
    let file = Gguf::parse(bytes)?;
    if !file.meta.contains_key("tokenizer.chat_template") {
        return ChatTemplate::none();
    }
    let tokens = file.texts("tokenizer.ggml.tokens")?;
    let token = |key: &str| file.token(key).and_then(|id| tokens.get(id as usize)).copied().unwrap_or_default();
    ChatTemplate::new(
        file.text("tokenizer.chat_template")?,
        token("tokenizer.ggml.bos_token_id"),
        token("tokenizer.ggml.eos_token_id"),
    )
}

/// What a template is rendered with.
#[derive(Clone, Debug, Default)]
pub struct Inputs {
    /// The conversation: a list of messages, with what fields the template knows (`content` as text or
    /// parts, `tool_calls`, `reasoning_content`, …).
    pub messages: Value,
    /// Descriptions of tools.
    pub tools: Option<Value>,
    /// Documents to answer from.
    pub documents: Option<Value>,
    /// Further variables, e.g. `enable_thinking`; those above win.
    pub more: Option<Value>,
    /// End with the beginning of the assistant's turn.
    pub add_generation_prompt: bool,
    /// What `strftime_now` sees (UTC).
    pub now_unix_s: u64,
}

impl Inputs {
    /// A conversation and nothing else.
    #[must_use]
    pub fn new(messages: Value) -> Self {
        Self { messages, ..Self::default() }
    }
}

/// The template with `{% generation %}` blocks, which mark the assistant's text for training, as blocks
/// that are always taken.
fn without_generation(source: &str) -> Cow<'_, str> {
    if !source.contains("generation") {
        return source.into();
    }
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(at) = rest.find("{%") {
        let (before, tag) = rest.split_at(at + 2);
        out.push_str(before);
        let word = tag.trim_start_matches(['-', '+']).trim_start();
        let name = if word.starts_with("endgeneration") { "endgeneration" } else { "generation" };
        let after = word.strip_prefix(name).map(|after| (after, after.trim_start().trim_start_matches(['-', '+'])));
        match after {
            Some((after, end)) if end.starts_with("%}") => {
                out.push_str(&tag[..tag.len() - word.len()]);
                out.push_str(if name == "generation" { "if true" } else { "endif" });
                rest = after;
            }
            _ => rest = tag,
        }
    }
    out.push_str(rest);
    out.into()
}
