//! Chat templates: the model's own Jinja template, rendered as `transformers` does.

mod json;
mod probe;
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

use crate::container::{gguf::Gguf, map_file, read_small, split};
use crate::error::EngineError;

/// Longest template source, bytes.
pub const TEMPLATE_BYTES_MAX: usize = 1 << 20;
/// Most template instructions of one rendering.
const FUEL: u64 = 20_000_000;
const NAME: &str = "chat";
/// Names of the templates that are used where a model has several.
const DEFAULT: &str = "default";
const TOOL_USE: &str = "tool_use";
/// Most templates of one model.
const TEMPLATES_MAX: usize = 64;
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

/// A model's chat template: one, or one for conversations with tools beside one for all others.
#[derive(Debug)]
pub struct ChatTemplate {
    plain: Compiled,
    /// Takes the place of the other where tools are described.
    for_tools: Option<Compiled>,
}

/// One compiled template.
#[derive(Debug)]
struct Compiled {
    env: Environment<'static>,
    bos: String,
    eos: String,
    source: String,
    /// It looks at `tools`.
    takes_tools: bool,
    shows: Shows,
}

/// What a template makes of what is more than text, found out by rendering.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Shows {
    /// Descriptions of tools change the prompt.
    tools: bool,
    /// Calls of earlier turns are in the prompt.
    calls: bool,
    /// So are their results.
    results: bool,
    /// Arguments of calls must be text.
    arguments_as_text: bool,
    /// A message that only calls may have no content at all.
    no_content: bool,
}

/// Templates by name, as files have them; the model's own and those for a purpose.
#[derive(Debug, Default)]
struct Named {
    list: Vec<(String, String)>,
}

impl Named {
    fn add(&mut self, name: &str, source: impl Into<String>) {
        if self.get(name).is_none() {
            self.list.push((name.to_owned(), source.into()));
        }
    }

    fn get(&self, name: &str) -> Option<&str> {
        self.list.iter().find(|(known, _)| known == name).map(|(_, source)| source.as_str())
    }

    /// The templates that are used here: `default` (of several without one, the first) and `tool_use`.
    fn compiled(&self, bos: &str, eos: &str) -> Result<ChatTemplate, EngineError> {
        let tools = self.get(TOOL_USE);
        let Some(plain) = self.get(DEFAULT).or_else(|| self.list.first().map(|(_, source)| source.as_str())) else {
            return ChatTemplate::none();
        };
        let for_tools =
            tools.filter(|tools| *tools != plain).map(|tools| Compiled::new(tools, bos, eos)).transpose()?;
        Ok(ChatTemplate { plain: Compiled::new(plain, bos, eos)?, for_tools })
    }
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

impl Compiled {
    fn new(source: &str, bos: &str, eos: &str) -> Result<Self, EngineError> {
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
        let mut template = Self {
            env,
            bos: bos.to_owned(),
            eos: eos.to_owned(),
            source: source.to_owned(),
            takes_tools,
            shows: Shows::default(),
        };
        template.shows = probe::shows(&template);
        Ok(template)
    }

    fn render(&self, inputs: &Inputs) -> Result<String, EngineError> {
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

impl ChatTemplate {
    /// Compiles a template; `bos` and `eos` are the tokens it sees as `bos_token` and `eos_token`.
    ///
    /// # Errors
    /// [`EngineError::Template`] if it is no template.
    pub fn new(source: &str, bos: &str, eos: &str) -> Result<Self, EngineError> {
        Ok(Self { plain: Compiled::new(source, bos, eos)?, for_tools: None })
    }

    /// For a model without a template: refuses every conversation and says what to use instead.
    ///
    /// # Errors
    /// None in practice.
    pub fn none() -> Result<Self, EngineError> {
        Self::new(&format!("{{{{ raise_exception('{NO_TEMPLATE}') }}}}"), "", "")
    }

    /// From a folder in Hugging Face layout: `chat_template.jinja`, else `tokenizer_config.json`, else
    /// `chat_template.json`; those of `additional_chat_templates/` beside it.
    ///
    /// # Errors
    /// What is wrong with the files; one without a template is [`ChatTemplate::none`].
    pub fn from_dir(dir: &Path) -> Result<Self, EngineError> {
        let read = |name: &str| {
            let path = dir.join(name);
            if path.exists() { read_small(&path).map(Some) } else { Ok(None) }
        };
        let config = read(CONFIG)?.unwrap_or_else(|| b"{}".to_vec());
        let (mut named, bos, eos) = of_config(&config, read("special_tokens_map.json")?.as_deref())?;
        if let Some(source) = read("chat_template.jinja")? {
            named.list.retain(|(name, _)| name != DEFAULT);
            named.add(DEFAULT, utf8(source, "chat_template.jinja")?);
        }
        if named.list.is_empty()
            && let Some(file) = read("chat_template.json")?
        {
            let value: serde_json::Value = serde_json::from_slice(&file)
                .map_err(|e| EngineError::Json { file: "chat_template.json", problem: e.to_string() })?;
            add_templates(&mut named, &value["chat_template"]);
        }
        // Of the names that files may have, the one that is used here.
        let tools = format!("additional_chat_templates/{TOOL_USE}.jinja");
        if let Some(source) = read(&tools)? {
            named.list.retain(|(name, _)| name != TOOL_USE);
            named.add(TOOL_USE, utf8(source, &tools)?);
        }
        named.compiled(&bos, &eos)
    }

    /// From the bytes of `tokenizer_config.json`; `source` takes the place of the template in it.
    ///
    /// # Errors
    /// [`EngineError::Json`], [`EngineError::Template`].
    pub fn from_tokenizer_config(config: &[u8], source: Option<&str>) -> Result<Self, EngineError> {
        let (mut named, bos, eos) = of_config(config, None)?;
        if let Some(source) = source {
            named.list.retain(|(name, _)| name != DEFAULT);
            named.add(DEFAULT, source);
        }
        named.compiled(&bos, &eos)
    }

    /// From the metadata of a GGUF file.
    ///
    /// # Errors
    /// What is wrong with the file; one without a template is [`ChatTemplate::none`].
    pub fn from_gguf(path: &Path) -> Result<Self, EngineError> {
        from_gguf_bytes(&map_file(&split::first(path))?)
    }

    /// The template for conversations with tools.
    fn with_tools(&self) -> &Compiled {
        self.for_tools.as_ref().unwrap_or(&self.plain)
    }

    /// True if the template writes descriptions of tools into the prompt.
    #[must_use]
    pub fn takes_tools(&self) -> bool {
        let Compiled { takes_tools, shows, .. } = self.with_tools();
        *takes_tools || shows.tools
    }

    /// True if the template writes calls of earlier turns into the prompt.
    #[must_use]
    pub fn takes_calls(&self) -> bool {
        self.takes_tools() || self.plain.shows.calls
    }

    /// True if the template writes results of calls into the prompt.
    #[must_use]
    pub fn takes_results(&self) -> bool {
        self.takes_tools() || self.plain.shows.results
    }

    /// True if the template takes the arguments of calls as text only, not as objects.
    #[must_use]
    pub fn wants_arguments_as_text(&self) -> bool {
        self.with_tools().shows.arguments_as_text
    }

    /// The template as it was given; where there is one for tools, that one.
    #[must_use]
    pub fn source(&self) -> &str {
        &self.with_tools().source
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
    /// variables, e.g. `enable_thinking`. A message that calls and says nothing has no content then, unless
    /// the template needs one.
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
        let with_tools =
            tools.is_some() || !self.plain.shows.results && messages.as_array().is_some_and(|m| has_results(m));
        let template = if with_tools { self.with_tools() } else { &self.plain };
        let messages = match messages.as_array() {
            Some(list) if template.shows.no_content && list.iter().any(only_calls) => {
                let mut list = list.clone();
                list.iter_mut().filter(|m| only_calls(m)).for_each(|m| m["content"] = serde_json::Value::Null);
                Value::from(Serde(list))
            }
            _ => Value::from(Serde(messages)),
        };
        let tools = tools.map(|tools| Value::from(Serde(tools)));
        let more = (!variables.is_empty()).then(|| Value::from(Serde(variables)));
        template.render(&Inputs { tools, more, add_generation_prompt, now_unix_s, ..Inputs::new(messages) })
    }

    /// The prompt of everything a template may look at.
    ///
    /// # Errors
    /// [`EngineError::Template`] if the template refuses it.
    pub fn render_with(&self, inputs: &Inputs) -> Result<String, EngineError> {
        let tools = inputs.tools.as_ref().is_some_and(|tools| !tools.is_none());
        if tools { self.with_tools() } else { &self.plain }.render(inputs)
    }
}

/// Whether a message calls tools and says nothing else.
fn only_calls(message: &serde_json::Value) -> bool {
    message["content"] == "" && message["tool_calls"].as_array().is_some_and(|calls| !calls.is_empty())
}

fn has_results(messages: &[serde_json::Value]) -> bool {
    messages.iter().any(|m| m["role"] == "tool")
}

const CONFIG: &str = "tokenizer_config.json";

fn utf8(bytes: Vec<u8>, name: &str) -> Result<String, EngineError> {
    String::from_utf8(bytes).map_err(|_| EngineError::Template(format!("{name} is not UTF-8")))
}

/// Adds what a `chat_template` field holds: one template, or a list of named ones.
fn add_templates(named: &mut Named, field: &serde_json::Value) {
    match field {
        serde_json::Value::String(source) => named.add(DEFAULT, source.as_str()),
        serde_json::Value::Array(list) => {
            for one in list.iter().take(TEMPLATES_MAX) {
                if let (Some(name), Some(source)) = (one["name"].as_str(), one["template"].as_str()) {
                    named.add(name, source);
                }
            }
        }
        _ => {}
    }
}

/// Templates of a `tokenizer_config.json`, and its first and last token; those may stand in the map of
/// special tokens instead.
fn of_config(config: &[u8], map: Option<&[u8]>) -> Result<(Named, String, String), EngineError> {
    let parse = |bytes: &[u8], file| -> Result<serde_json::Value, EngineError> {
        serde_json::from_slice(bytes).map_err(|e| EngineError::Json { file, problem: e.to_string() })
    };
    let config = parse(config, CONFIG)?;
    let map = map.map_or(Ok(serde_json::Value::Null), |map| parse(map, "special_tokens_map.json"))?;
    let token = |name: &str| text_of(&config[name]).or_else(|| text_of(&map[name])).unwrap_or_default().to_owned();
    let mut named = Named::default();
    add_templates(&mut named, &config["chat_template"]);
    Ok((named, token("bos_token"), token("eos_token")))
}

/// The text of a token, which stands as such or in an object.
pub(crate) fn text_of(token: &serde_json::Value) -> Option<&str> {
    token.as_str().or_else(|| token["content"].as_str())
}

/// The template of a whole GGUF file.
pub(crate) fn from_gguf_bytes(bytes: &[u8]) -> Result<ChatTemplate, EngineError> {
    const KEY: &str = "tokenizer.chat_template";
    let file = Gguf::parse(bytes)?;
    let mut named = Named::default();
    for (name, key) in [(DEFAULT, KEY.to_owned()), (TOOL_USE, format!("{KEY}.{TOOL_USE}"))] {
        if file.meta.contains_key(key.as_str()) {
            named.add(name, file.text(&key)?);
        }
    }
    if named.list.is_empty() {
        return ChatTemplate::none();
    }
    let tokens = file.texts("tokenizer.ggml.tokens")?;
    let token = |key: &str| file.token(key).and_then(|id| tokens.get(id as usize)).copied().unwrap_or_default();
    named.compiled(token("tokenizer.ggml.bos_token_id"), token("tokenizer.ggml.eos_token_id"))
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
