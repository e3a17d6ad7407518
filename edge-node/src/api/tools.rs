//! `tools`, `tool_choice` and `parallel_tool_calls`.

use serde_json::{Value, json};

use super::error::ApiError;
use super::fields::{Fields, short, type_error};

/// Most tools of a request.
pub(crate) const TOOLS_MAX: usize = 128;
/// Longest name of a tool or a schema, bytes.
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
    /// Nobody calls; the tools are left out of the prompt.
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
    /// Where the request has what of a tool.
    pub(crate) described: Described,
}

impl Tools {
    /// Takes the fields; none if the request has no tools.
    pub(crate) fn take(fields: &mut Fields, described: Described) -> Result<Option<Self>, ApiError> {
        let list = match fields.take("tools") {
            None => Vec::new(),
            Some(Value::Array(list)) if (1..=TOOLS_MAX).contains(&list.len()) => list,
            Some(Value::Array(list)) => {
                let message = format!("`tools` must have from 1 to {TOOLS_MAX} entries, not {}", list.len());
                return Err(ApiError::invalid("tools", message));
            }
            Some(other) => return Err(type_error("tools", "an array", &other)),
        };
        let (choice, parallel) = if described == Described::Messages {
            take_messages_choice(fields)?
        } else {
            (take_choice(fields, described)?, fields.boolean("parallel_tool_calls")?)
        };
        if list.is_empty() {
            let given = [("tool_choice", choice.is_some()), ("parallel_tool_calls", parallel.is_some())];
            return match given.iter().find(|(_, is)| *is) {
                Some((name, _)) => Err(ApiError::invalid(*name, format!("`{name}` is only allowed with `tools`"))),
                None => Ok(None),
            };
        }
        let mut tools: Vec<Tool> = Vec::with_capacity(list.len());
        for (i, tool) in list.into_iter().enumerate() {
            let tool = take_tool(&format!("tools[{i}]"), tool, described)?;
            if tools.iter().any(|t| t.name == tool.name) {
                let path = if described == Described::Nested { "function.name" } else { "name" };
                let path = format!("tools[{i}].{path}");
                let message = format!("`{path}`: there is another tool called `{}`", tool.name);
                return Err(ApiError::invalid(path, message));
            }
            tools.push(tool);
        }
        let choice = choice.unwrap_or(ToolChoice::Auto);
        if let ToolChoice::Named(name) = &choice
            && tools.iter().all(|t| t.name != *name)
        {
            let path = if described == Described::Nested { "tool_choice.function.name" } else { "tool_choice.name" };
            return Err(ApiError::invalid(path, format!("`{path}`: no tool is called `{}`", short(name))));
        }
        Ok(Some(Self { list: tools, choice, parallel: parallel.unwrap_or(true), described }))
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

fn take_tool(path: &str, value: Value, described: Described) -> Result<Tool, ApiError> {
    let mut fields = Fields::from_value(path, value)?;
    match described {
        Described::Nested => {
            function_only(&mut fields)?;
            let function = fields.object("function")?.ok_or_else(|| fields.missing("function"))?;
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
                return Err(unsupported_type(&fields, &kind, "custom"));
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
        None => parameters["type"] = "object".into(),
        Some(_) => {
            let message = format!("`{parameters_path}.type` must be `object`");
            return Err(ApiError::invalid(format!("{parameters_path}.type"), message));
        }
    }
    Ok(Tool { name, parameters, described })
}

fn take_choice(fields: &mut Fields, described: Described) -> Result<Option<ToolChoice>, ApiError> {
    match fields.take("tool_choice") {
        None => Ok(None),
        Some(Value::String(word)) => match word.as_str() {
            "none" => Ok(Some(ToolChoice::None)),
            "auto" => Ok(Some(ToolChoice::Auto)),
            "required" => Ok(Some(ToolChoice::Required)),
            _ => {
                let message = format!(
                    "`tool_choice` must be `none`, `auto`, `required` or name a function, not `{}`",
                    short(&word)
                );
                Err(ApiError::invalid("tool_choice", message))
            }
        },
        Some(Value::Object(map)) => {
            let mut choice = Fields::from_value("tool_choice", Value::Object(map))?;
            function_only(&mut choice)?;
            if described == Described::Nested {
                let function = choice.object("function")?.ok_or_else(|| choice.missing("function"))?;
                choice.finish()?;
                choice = function;
            }
            let name = take_name(&mut choice)?;
            choice.finish()?;
            Ok(Some(ToolChoice::Named(name)))
        }
        Some(other) => Err(type_error("tool_choice", "a string or an object", &other)),
    }
}

/// Takes the `tool_choice` of Anthropic's Messages, which also says whether several calls are fine.
fn take_messages_choice(fields: &mut Fields) -> Result<(Option<ToolChoice>, Option<bool>), ApiError> {
    let Some(mut choice) = fields.object("tool_choice")? else { return Ok((None, None)) };
    let kind = choice.choice("type", &["auto", "any", "tool", "none"])?.ok_or_else(|| choice.missing("type"))?;
    let single = choice.boolean("disable_parallel_tool_use")?;
    let taken = match kind {
        "auto" => ToolChoice::Auto,
        "any" => ToolChoice::Required,
        "none" => ToolChoice::None,
        _ => ToolChoice::Named(take_name(&mut choice)?),
    };
    choice.finish()?;
    Ok((Some(taken), single.map(|single| !single)))
}

/// Takes `type`, which must be `function`.
pub(crate) fn function_only(fields: &mut Fields) -> Result<(), ApiError> {
    match fields.string("type")?.as_deref() {
        Some("function") => Ok(()),
        Some(other) => Err(unsupported_type(fields, other, "function")),
        None => Err(fields.missing("type")),
    }
}

fn unsupported_type(fields: &Fields, kind: &str, only: &str) -> ApiError {
    let path = fields.path("type");
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
