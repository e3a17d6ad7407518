//! The conversation of a chat request, tool calls and their results included.

use serde_json::{Value, json};

use super::call_syntax::Past;
use super::error::ApiError;
use super::fields::{Fields, short, type_error, unsupported};
use super::tools::{function_only, take_name};

/// Most messages of a conversation.
pub(crate) const MESSAGES_MAX: usize = 2048;
/// Most parts of one message's content.
pub(crate) const PARTS_MAX: usize = 256;
/// Most tool calls of one message.
pub(crate) const CALLS_MAX: usize = 128;

/// A call that the assistant made earlier.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct PastCall {
    pub(crate) id: String,
    pub(crate) name: String,
    /// The arguments as they were sent: JSON text.
    pub(crate) arguments: String,
}

/// One message; `developer` has become `system`.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct ChatMessage {
    pub(crate) role: &'static str,
    pub(crate) content: String,
    /// What an assistant said to itself before.
    pub(crate) reasoning: Option<String>,
    /// Calls of an assistant's message.
    pub(crate) calls: Vec<PastCall>,
    /// The call that a tool's message answers.
    pub(crate) answers: Option<String>,
}

impl ChatMessage {
    /// True if only a template that knows tools can write the message.
    pub(crate) fn needs_tools(&self) -> bool {
        !self.calls.is_empty() || self.answers.is_some()
    }

    /// Text that goes into the prompt, bytes.
    pub(crate) fn bytes(&self) -> usize {
        self.content.len()
            + self.reasoning.as_ref().map_or(0, String::len)
            + self.calls.iter().map(|c| c.name.len() + c.arguments.len()).sum::<usize>()
    }

    /// The message as templates take it. `name` is the function whose result a tool's message is.
    pub(crate) fn for_template(&self, past: Past, name: Option<&str>) -> Value {
        let mut message = json!({ "role": self.role, "content": self.content });
        if let Some(reasoning) = &self.reasoning {
            message["reasoning_content"] = reasoning.as_str().into();
            if past.thinking {
                message["thinking"] = reasoning.as_str().into();
                if !self.calls.is_empty() && !self.content.is_empty() {
                    message["thinking"] = format!("{reasoning}\n{}", self.content).into();
                    message["content"] = "".into();
                }
            }
        }
        if !self.calls.is_empty() {
            let call = |call: &PastCall| {
                // Checked to be JSON when it was taken.
                let parsed = || serde_json::from_str(&call.arguments).unwrap_or_default();
                let arguments = if past.arguments_as_text { Value::String(call.arguments.clone()) } else { parsed() };
                json!({ "id": call.id, "type": "function", "function": { "name": call.name, "arguments": arguments } })
            };
            message["tool_calls"] = self.calls.iter().map(call).collect();
        }
        if let Some(id) = &self.answers {
            message["tool_call_id"] = id.as_str().into();
            if let Some(name) = name {
                message["name"] = name.into();
            }
        }
        message
    }
}

/// The conversation with at most one call per message and its results right after it: the other calls of
/// a message become messages of their own.
pub(crate) fn one_call_each(messages: Vec<ChatMessage>) -> Vec<ChatMessage> {
    let mut out = Vec::with_capacity(messages.len());
    let mut rest = messages.into_iter().peekable();
    while let Some(mut message) = rest.next() {
        if message.calls.len() < 2 {
            out.push(message);
            continue;
        }
        let mut results = Vec::new();
        while let Some(result) = rest.next_if(|m| m.answers.is_some()) {
            results.push(result);
        }
        for call in std::mem::take(&mut message.calls) {
            let (own, others) = results.into_iter().partition(|r| r.answers.as_ref() == Some(&call.id));
            results = others;
            let empty = ChatMessage { content: String::new(), reasoning: None, calls: Vec::new(), ..message.clone() };
            out.push(ChatMessage { calls: vec![call], ..std::mem::replace(&mut message, empty) });
            out.extend::<Vec<_>>(own);
        }
        out.extend(results);
    }
    out
}

/// Takes `messages`.
pub(crate) fn take(fields: &mut Fields) -> Result<Vec<ChatMessage>, ApiError> {
    let list = match fields.take("messages") {
        None => return Err(fields.missing("messages")),
        Some(Value::Array(list)) => list,
        Some(other) => return Err(type_error("messages", "an array", &other)),
    };
    if list.is_empty() || list.len() > MESSAGES_MAX {
        let message = format!("`messages` must have from 1 to {MESSAGES_MAX} entries, not {}", list.len());
        return Err(ApiError::invalid("messages", message));
    }
    list.into_iter().enumerate().map(|(i, message)| take_message(&format!("messages[{i}]"), message)).collect()
}

fn take_message(path: &str, value: Value) -> Result<ChatMessage, ApiError> {
    let mut fields = Fields::from_value(path, value)?;
    let Some(role) = fields.string("role")? else { return Err(fields.missing("role")) };
    let role = match role.as_str() {
        "system" | "developer" => "system",
        "user" => "user",
        "assistant" => "assistant",
        "tool" => "tool",
        "function" => {
            let message = format!("`{path}.role`: `function` messages are not supported; use `tool`");
            return Err(ApiError::bad_request("unsupported_field", message).about(format!("{path}.role")));
        }
        _ => {
            let message = format!(
                "`{path}.role` must be `system`, `developer`, `user`, `assistant` or `tool`, not `{}`",
                short(&role)
            );
            return Err(ApiError::invalid(format!("{path}.role"), message));
        }
    };
    let (mut calls, mut reasoning) = (Vec::new(), None);
    if role == "assistant" {
        // A client sends the message back as it came, with what was empty in it.
        drop_empty_lists(&mut fields, &["annotations"])?;
        calls = take_calls(path, &mut fields)?;
        reasoning = fields.string("reasoning_content")?;
    }
    let answers = if role == "tool" {
        Some(fields.string("tool_call_id")?.ok_or_else(|| fields.missing("tool_call_id"))?)
    } else {
        None
    };
    fields.refuse(&["tool_calls", "tool_call_id", "function_call", "audio", "refusal", "annotations", "name"])?;
    let content = match fields.take("content") {
        Some(Value::String(text)) => text,
        Some(Value::Array(parts)) => take_parts(&format!("{path}.content"), parts)?,
        Some(other) => {
            return Err(type_error(&format!("{path}.content"), "a string or an array of text parts", &other));
        }
        None if !calls.is_empty() => String::new(),
        None => return Err(fields.missing("content")),
    };
    fields.finish()?;
    Ok(ChatMessage { role, content, reasoning: reasoning.filter(|text| !text.is_empty()), calls, answers })
}

fn take_calls(path: &str, fields: &mut Fields) -> Result<Vec<PastCall>, ApiError> {
    let path = format!("{path}.tool_calls");
    match fields.take("tool_calls") {
        None => Ok(Vec::new()),
        Some(Value::Array(list)) if list.len() <= CALLS_MAX => {
            list.into_iter().enumerate().map(|(i, call)| take_call(&format!("{path}[{i}]"), call)).collect()
        }
        Some(Value::Array(list)) => {
            let message = format!("`{path}` takes at most {CALLS_MAX} calls, not {}", list.len());
            Err(ApiError::invalid(path, message))
        }
        Some(other) => Err(type_error(&path, "an array", &other)),
    }
}

fn take_call(path: &str, value: Value) -> Result<PastCall, ApiError> {
    let mut fields = Fields::from_value(path, value)?;
    let id = fields.string("id")?.ok_or_else(|| fields.missing("id"))?;
    function_only(&mut fields)?;
    // Clients that put a stream together send the position back.
    fields.ignore(&["index"]);
    let mut function = fields.object("function")?.ok_or_else(|| fields.missing("function"))?;
    fields.finish()?;
    let name = take_name(&mut function)?;
    let arguments = take_arguments(&mut function)?;
    // The parsed-arguments field of the client's own helpers.
    function.ignore(&["parsed_arguments"]);
    function.finish()?;
    Ok(PastCall { id, name, arguments })
}

/// Takes the arguments of a call that the assistant made earlier.
pub(crate) fn take_arguments(function: &mut Fields) -> Result<String, ApiError> {
    let arguments = function.string("arguments")?.ok_or_else(|| function.missing("arguments"))?;
    if matches!(serde_json::from_str(&arguments), Ok(Value::Object(_))) {
        return Ok(arguments);
    }
    let path = function.path("arguments");
    Err(ApiError::invalid(&path, format!("`{path}` must be the text of a JSON object")))
}

fn drop_empty_lists(fields: &mut Fields, names: &[&str]) -> Result<(), ApiError> {
    for name in names {
        match fields.take(name) {
            None => {}
            Some(Value::Array(list)) if list.is_empty() => {}
            Some(_) => return Err(unsupported(&fields.path(name))),
        }
    }
    Ok(())
}

fn take_parts(path: &str, parts: Vec<Value>) -> Result<String, ApiError> {
    if parts.is_empty() || parts.len() > PARTS_MAX {
        let message = format!("`{path}` must have from 1 to {PARTS_MAX} parts, not {}", parts.len());
        return Err(ApiError::invalid(path, message));
    }
    let mut text = String::new();
    for (i, part) in parts.into_iter().enumerate() {
        let path = format!("{path}[{i}]");
        let mut fields = Fields::from_value(&path, part)?;
        match fields.string("type")?.as_deref() {
            Some("text") => {}
            Some(other) => {
                let message = format!("`{path}.type`: `{}` parts are not supported; only `text` is", short(other));
                return Err(ApiError::bad_request("unsupported_field", message).about(format!("{path}.type")));
            }
            None => return Err(fields.missing("type")),
        }
        text.push_str(&fields.string("text")?.ok_or_else(|| fields.missing("text"))?);
        fields.finish()?;
    }
    Ok(text)
}
