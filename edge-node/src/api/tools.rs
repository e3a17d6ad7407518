//! `tools`, `tool_choice` and `parallel_tool_calls`, and `functions` and `function_call` before them.

use serde_json::{Value, json};

use super::error::ApiError;
use super::fields::{Fields, short, type_error};
use super::short_json;

/// Most tools of a request.
pub(crate) const TOOLS_MAX: usize = 128;
/// Marks of what a server may keep for the next request; nothing here depends on them.
pub(crate) const CACHE_HINTS: [&str; 1] = ["cache_control"];
/// Longest name of a tool, bytes.
const NAME_BYTES_MAX: usize = 64;

/// How an API describes functions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Described {
    /// Chat completions: under `function`.
    Nested,
    /// Responses: beside `type`.
    Flat,
    /// Anthropic's Messages: the schema under `input_schema`, `type` only for a tool that is no function.
    Messages,
}

impl Described {
    /// Path of the schema of tool `i`.
    pub(crate) fn schema_path(self, i: usize) -> String {
        match self {
            Self::Nested => format!("tools[{i}].function.parameters"),
            Self::Flat => format!("tools[{i}].parameters"),
            Self::Messages => format!("tools[{i}].input_schema"),
        }
    }

    fn schema(self) -> &'static str {
        if self == Self::Messages { "input_schema" } else { "parameters" }
    }
}

/// One function that the model may call.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Tool {
    pub(crate) name: String,
    /// Schema of the arguments: an object.
    pub(crate) parameters: Value,
    /// As the chat template takes it.
    pub(crate) described: Value,
}

/// Who decides on a call.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum ToolChoice {
    /// No call is made; the tools are left out of the prompt.
    None,
    /// The model.
    Auto,
    /// The model must call one.
    Required,
    /// The model must call this one.
    Named(String),
}

/// The tools of a request.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Tools {
    pub(crate) list: Vec<Tool>,
    pub(crate) choice: ToolChoice,
    /// Several calls in one answer are fine.
    pub(crate) parallel: bool,
    /// The request speaks of `functions`, so the answer does.
    pub(crate) legacy: bool,
    /// Where the request has what of a tool.
    pub(crate) described: Described,
}

/// Who decides on a call, as a request says it.
struct Choice {
    of: ToolChoice,
    /// The field that says so.
    field: &'static str,
    /// The tools that may be called, if not all.
    only: Option<Vec<String>>,
}

impl Tools {
    /// Takes the fields; none if the request has no tools.
    pub(crate) fn take(fields: &mut Fields, described: Described) -> Result<Option<Self>, ApiError> {
        let mut tools: Vec<Tool> = Vec::new();
        for (i, tool) in take_list(fields, "tools")?.into_iter().enumerate() {
            let name = if described == Described::Nested { "function.name" } else { "name" };
            add(&mut tools, take_tool(&format!("tools[{i}]"), tool, described)?, &format!("tools[{i}].{name}"))?;
        }
        let (mut choice, parallel) = if described == Described::Messages {
            take_messages_choice(fields)?
        } else {
            (take_choice(fields, described)?, fields.boolean("parallel_tool_calls")?)
        };
        let legacy = described == Described::Nested && Self::take_legacy(fields, &mut tools, &mut choice)?;
        if tools.is_empty() {
            // Clients send these with an empty list, too; who must have a call cannot be served.
            return match choice {
                Some(Choice { of: ToolChoice::Required | ToolChoice::Named(_), field, .. }) => {
                    let list = if legacy { "functions" } else { "tools" };
                    Err(ApiError::invalid(field, format!("`{field}` asks for a call, but there are no `{list}`")))
                }
                _ => Ok(None),
            };
        }
        let Choice { of: choice, field, only } =
            choice.unwrap_or(Choice { of: ToolChoice::Auto, field: "tool_choice", only: None });
        let named = if let ToolChoice::Named(name) = &choice { std::slice::from_ref(name) } else { &[] };
        for name in named.iter().chain(only.iter().flatten()) {
            if tools.iter().all(|tool| tool.name != *name) {
                return Err(ApiError::invalid(field, format!("`{field}`: no tool is called `{}`", short(name))));
            }
        }
        if let Some(only) = only {
            tools.retain(|tool| only.contains(&tool.name));
        }
        Ok(Some(Self { list: tools, choice, parallel: parallel.unwrap_or(true) && !legacy, legacy, described }))
    }

    /// Takes `functions` and `function_call`, which `tools` came after. True if the request speaks so.
    fn take_legacy(fields: &mut Fields, tools: &mut Vec<Tool>, choice: &mut Option<Choice>) -> Result<bool, ApiError> {
        const CHOICE: &str = "function_call";
        let functions = take_list(fields, "functions")?;
        let call = match fields.take(CHOICE) {
            None => None,
            Some(Value::String(word)) if word == "none" => Some(ToolChoice::None),
            Some(Value::String(word)) if word == "auto" => Some(ToolChoice::Auto),
            Some(Value::Object(map)) => {
                let mut call = Fields::from_value(CHOICE, Value::Object(map))?;
                let name = take_name(&mut call)?;
                call.finish()?;
                Some(ToolChoice::Named(name))
            }
            Some(_) => {
                let message = format!("`{CHOICE}` must be `none`, `auto` or an object that names a function");
                return Err(ApiError::invalid(CHOICE, message));
            }
        };
        let legacy = !functions.is_empty() || call.is_some();
        if legacy && (!tools.is_empty() || choice.is_some()) {
            let field = if functions.is_empty() { CHOICE } else { "functions" };
            return Err(ApiError::invalid(field, format!("`{field}` came before `tools`; give one of the two")));
        }
        for (i, function) in functions.into_iter().enumerate() {
            let path = format!("functions[{i}]");
            let function = take_function(Fields::from_value(&path, function)?, "parameters")?;
            add(tools, function, &format!("{path}.name"))?;
        }
        if let Some(of) = call {
            *choice = Some(Choice { of, field: CHOICE, only: None });
        }
        Ok(legacy)
    }

    /// The tools with bounds for the strings and lists of their schemas, see [`short_json`].
    pub(crate) fn bounded(mut self) -> Self {
        for tool in &mut self.list {
            tool.parameters = short_json::bounded(std::mem::take(&mut tool.parameters));
        }
        self
    }

    /// The tools that may be called.
    pub(crate) fn callable(&self) -> Vec<&Tool> {
        match &self.choice {
            ToolChoice::None => Vec::new(),
            ToolChoice::Auto | ToolChoice::Required => self.list.iter().collect(),
            ToolChoice::Named(name) => self.list.iter().filter(|t| t.name == *name).collect(),
        }
    }

    /// True if the answer must be a call.
    pub(crate) fn forced(&self) -> bool {
        matches!(self.choice, ToolChoice::Required | ToolChoice::Named(_))
    }

    /// What the chat template is given; `all`: with an empty description where there is none.
    pub(crate) fn described(&self, all: bool) -> Value {
        let described = |tool: &Tool| {
            let mut described = tool.described.clone();
            if all && let Some(function) = described["function"].as_object_mut() {
                function.entry("description").or_insert_with(|| "".into());
                let parameters = function.get_mut("parameters").and_then(|p| p.get_mut("properties"));
                for schema in parameters.and_then(Value::as_object_mut).into_iter().flat_map(|p| p.values_mut()) {
                    if let Some(schema) = schema.as_object_mut() {
                        schema.entry("description").or_insert_with(|| "".into());
                    }
                }
            }
            described
        };
        self.list.iter().map(described).collect()
    }
}

/// Whether OpenAI takes this for a name.
pub(crate) fn name_is_good(name: &str) -> bool {
    let good = |b: u8| b.is_ascii_alphanumeric() || b == b'_' || b == b'-';
    (1..=NAME_BYTES_MAX).contains(&name.len()) && name.bytes().all(good)
}

/// Takes a list of tools, which may be empty.
fn take_list(fields: &mut Fields, name: &'static str) -> Result<Vec<Value>, ApiError> {
    match fields.take(name) {
        None => Ok(Vec::new()),
        Some(Value::Array(list)) if list.len() <= TOOLS_MAX => Ok(list),
        Some(Value::Array(list)) => {
            let message = format!("`{name}` must have at most {TOOLS_MAX} entries, not {}", list.len());
            Err(ApiError::invalid(name, message))
        }
        Some(other) => Err(type_error(name, "an array", &other)),
    }
}

/// Adds a tool; `path` is that of its name.
fn add(tools: &mut Vec<Tool>, tool: Tool, path: &str) -> Result<(), ApiError> {
    if tools.iter().any(|t| t.name == tool.name) {
        let message = format!("`{path}`: there is another tool called `{}`", tool.name);
        return Err(ApiError::invalid(path, message));
    }
    tools.push(tool);
    Ok(())
}

fn take_tool(path: &str, value: Value, described: Described) -> Result<Tool, ApiError> {
    let mut fields = Fields::from_value(path, value)?;
    match described {
        Described::Nested => {
            function_only(&mut fields)?;
            let function = fields.object("function")?.ok_or_else(|| fields.missing("function"))?;
            fields.ignore(&CACHE_HINTS);
            fields.finish()?;
            take_function(function, "parameters")
        }
        Described::Flat => {
            function_only(&mut fields)?;
            // Of consequence only with tools that this node does not have.
            fields.ignore(&["allowed_callers", "defer_loading", "output_schema"]);
            take_function(fields, described.schema())
        }
        Described::Messages => {
            fields.ignore(&[
                "cache_control",
                "allowed_callers",
                "defer_loading",
                "eager_input_streaming",
                "input_examples",
            ]);
            if let Some(kind) = fields.string("type")?
                && kind != "custom"
            {
                return Err(unsupported_type(&fields.path("type"), &kind, "custom"));
            }
            take_function(fields, described.schema())
        }
    }
}

fn take_function(mut function: Fields, schema: &str) -> Result<Tool, ApiError> {
    let name = take_name(&mut function)?;
    let description = function.string("description")?;
    function.boolean("strict")?;
    let parameters_path = function.path(schema);
    let mut parameters = match function.take(schema) {
        None => json!({ "type": "object", "properties": {}, "additionalProperties": false }),
        Some(Value::Object(schema)) => Value::Object(schema),
        Some(other) => return Err(type_error(&parameters_path, "an object", &other)),
    };
    function.finish()?;
    let mut described = json!({ "type": "function", "function": { "name": name } });
    if let Some(description) = description {
        described["function"]["description"] = description.into();
    }
    described["function"]["parameters"] = parameters.clone();
    // Arguments are an object, whether or not the schema says so.
    match parameters.get("type") {
        Some(Value::String(kind)) if kind == "object" => {}
        None | Some(Value::Null) => parameters["type"] = "object".into(),
        Some(_) => {
            let message = format!("`{parameters_path}.type` must be `object`");
            return Err(ApiError::invalid(format!("{parameters_path}.type"), message));
        }
    }
    Ok(Tool { name, parameters, described })
}

fn take_choice(fields: &mut Fields, described: Described) -> Result<Option<Choice>, ApiError> {
    const FIELD: &str = "tool_choice";
    let choice = |of| Ok(Some(Choice { of, field: FIELD, only: None }));
    match fields.take(FIELD) {
        None => Ok(None),
        Some(Value::String(word)) => match mode_of(&word) {
            Some(of) => choice(of),
            None => {
                let message =
                    format!("`{FIELD}` must be `none`, `auto`, `required` or name a function, not `{}`", short(&word));
                Err(ApiError::invalid(FIELD, message))
            }
        },
        Some(Value::Object(map)) if map.get("type").is_some_and(|kind| kind == "allowed_tools") => {
            let mut all = Fields::from_value(FIELD, Value::Object(map))?;
            all.ignore(&["type"]);
            let mut allowed = all.object("allowed_tools")?.ok_or_else(|| all.missing("allowed_tools"))?;
            all.finish()?;
            let mode = allowed.choice("mode", &["auto", "required"])?.ok_or_else(|| allowed.missing("mode"))?;
            let list = take_list(&mut allowed, "tools")?;
            allowed.finish()?;
            let name = |(i, tool)| {
                take_named(Fields::from_value(&format!("{FIELD}.allowed_tools.tools[{i}]"), tool)?, described)
            };
            let only = list.into_iter().enumerate().map(name).collect::<Result<Vec<_>, _>>()?;
            let of = if mode == "required" { ToolChoice::Required } else { ToolChoice::Auto };
            Ok(Some(Choice { of, field: FIELD, only: Some(only) }))
        }
        Some(Value::Object(map)) => {
            let of = ToolChoice::Named(take_named(Fields::from_value(FIELD, Value::Object(map))?, described)?);
            let field = if described == Described::Nested { "tool_choice.function.name" } else { "tool_choice.name" };
            Ok(Some(Choice { of, field, only: None }))
        }
        Some(other) => Err(type_error(FIELD, "a string or an object", &other)),
    }
}

/// Takes the `tool_choice` of Anthropic's Messages, which also says whether several calls are fine.
fn take_messages_choice(fields: &mut Fields) -> Result<(Option<Choice>, Option<bool>), ApiError> {
    let Some(mut choice) = fields.object("tool_choice")? else { return Ok((None, None)) };
    let kind = choice.choice("type", &["auto", "any", "tool", "none"])?.ok_or_else(|| choice.missing("type"))?;
    let single = choice.boolean("disable_parallel_tool_use")?;
    let of = match kind {
        "auto" => ToolChoice::Auto,
        "any" => ToolChoice::Required,
        "none" => ToolChoice::None,
        _ => ToolChoice::Named(take_name(&mut choice)?),
    };
    choice.finish()?;
    let field = if kind == "tool" { "tool_choice.name" } else { "tool_choice" };
    Ok((Some(Choice { of, field, only: None }), single.map(|single| !single)))
}

/// What a word means; `any` is Mistral's `required`.
fn mode_of(word: &str) -> Option<ToolChoice> {
    match word {
        "none" => Some(ToolChoice::None),
        "auto" => Some(ToolChoice::Auto),
        "required" | "any" => Some(ToolChoice::Required),
        _ => None,
    }
}

/// Takes `{"type": "function", "function": {"name": …}}`, or the name beside the type.
fn take_named(mut choice: Fields, described: Described) -> Result<String, ApiError> {
    function_only(&mut choice)?;
    if described == Described::Nested {
        let function = choice.object("function")?.ok_or_else(|| choice.missing("function"))?;
        choice.finish()?;
        choice = function;
    }
    let name = take_name(&mut choice)?;
    choice.finish()?;
    Ok(name)
}

/// Takes `type`, which must be `function`.
pub(crate) fn function_only(fields: &mut Fields) -> Result<(), ApiError> {
    let path = fields.path("type");
    match fields.string("type")?.as_deref() {
        Some("function") => Ok(()),
        Some(other) => Err(unsupported_type(&path, other, "function")),
        None => Err(fields.missing("type")),
    }
}

/// The error for a `type` that is not the only one here.
pub(crate) fn unsupported_type(path: &str, kind: &str, only: &str) -> ApiError {
    let message = format!("`{path}`: `{}` is not supported; only `{only}` is", short(kind));
    ApiError::bad_request("unsupported_field", message).about(path)
}

/// Takes the name of a function.
pub(crate) fn take_name(function: &mut Fields) -> Result<String, ApiError> {
    let name = function.string("name")?.ok_or_else(|| function.missing("name"))?;
    if name_is_good(&name) {
        return Ok(name);
    }
    let path = function.path("name");
    let message =
        format!("`{path}` must have from 1 to {NAME_BYTES_MAX} of a-z, A-Z, 0-9, _ and -, not `{}`", short(&name));
    Err(ApiError::invalid(path, message))
}
