//! The conversation of a chat request, tool calls and their results included.

use serde_json::{Value, json};

use super::call_syntax::Past;
use super::error::ApiError;
use super::fields::{Fields, quoted, short, type_error, unsupported};
use super::partial::whole_object;
use super::tools::{CACHE_HINTS, take_name, unsupported_type};

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

/// Who speaks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Role {
    System,
    #[default]
    User,
    Assistant,
    Tool,
    /// What `tool` was called before there were tools.
    Function,
}

/// Roles by their names.
const ROLES: [(&str, Role); 6] = [
    ("system", Role::System),
    ("developer", Role::System),
    ("user", Role::User),
    ("assistant", Role::Assistant),
    ("tool", Role::Tool),
    ("function", Role::Function),
];

impl Role {
    /// The name that templates know.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::System => "system",
            Self::User => "user",
            Self::Assistant => "assistant",
            Self::Tool | Self::Function => "tool",
        }
    }
}

/// One message; `developer` has become `system`.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct ChatMessage {
    pub(crate) role: Role,
    /// Who of several speaks, for templates that tell them apart.
    pub(crate) name: Option<String>,
    pub(crate) content: String,
    /// What an assistant said to itself before.
    pub(crate) reasoning: Option<String>,
    /// Calls of an assistant's message.
    pub(crate) calls: Vec<PastCall>,
    /// The call that a tool's message answers.
    pub(crate) answers: Option<String>,
}

impl ChatMessage {
    /// Text that goes into the prompt, bytes.
    pub(crate) fn bytes(&self) -> usize {
        self.content.len()
            + self.reasoning.as_ref().map_or(0, String::len)
            + self.calls.iter().map(|c| c.name.len() + c.arguments.len()).sum::<usize>()
    }

    /// The message as templates take it. `called` is the function whose result a tool's message is.
    pub(crate) fn for_template(&self, past: Past, called: Option<&str>) -> Value {
        let mut message = json!({ "role": self.role.name(), "content": self.content });
        if let Some(name) = &self.name {
            message["name"] = name.as_str().into();
        }
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
            if let Some(name) = called {
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
    let mut messages = Vec::with_capacity(list.len());
    for (i, message) in list.into_iter().enumerate() {
        let message = take_message(&format!("messages[{i}]"), message, &messages)?;
        messages.push(message);
    }
    Ok(messages)
}

/// Takes a message. `before` are the messages before it.
fn take_message(path: &str, value: Value, before: &[ChatMessage]) -> Result<ChatMessage, ApiError> {
    let mut fields = Fields::from_value(path, value)?;
    let Some(role) = fields.string("role")? else { return Err(fields.missing("role")) };
    let Some(&(_, role)) = ROLES.iter().find(|(name, _)| *name == role) else {
        let path = fields.path("role");
        let names: Vec<&str> = ROLES.iter().map(|(name, _)| *name).collect();
        let message = format!("`{path}` must be one of {}, not `{}`", quoted(&names), short(&role));
        return Err(ApiError::invalid(path, message));
    };
    let mut message = ChatMessage { role, ..ChatMessage::default() };
    message.name = fields.string("name")?.filter(|name| !name.is_empty());
    let content = fields.take("content");
    match role {
        Role::Assistant => take_assistant(&mut fields, &mut message)?,
        Role::Tool => {
            let id = fields.string("tool_call_id")?.ok_or_else(|| fields.missing("tool_call_id"))?;
            message.answers = Some(id);
        }
        Role::Function => {
            // Its results name the function; ids came later.
            let name = message.name.take().ok_or_else(|| fields.missing("name"))?;
            let called = before.iter().rev().flat_map(|m| &m.calls).find(|call| call.name == name);
            message.answers = Some(called.map_or_else(|| name.clone(), |call| call.id.clone()));
            message.name = Some(name);
        }
        Role::System | Role::User => {}
    }
    fields.ignore(&CACHE_HINTS);
    // What an assistant's message alone may say; lists that are empty say nothing.
    drop_empty_lists(&mut fields, &["tool_calls", "annotations"])?;
    fields.refuse(&["tool_call_id", "function_call", "audio", "refusal"])?;
    match content {
        Some(Value::String(text)) => message.content = text,
        Some(Value::Array(parts)) => take_parts(&format!("{path}.content"), parts, &mut message)?,
        Some(other) => {
            return Err(type_error(&format!("{path}.content"), "a string or an array of text parts", &other));
        }
        // An assistant that only called or thought has said nothing; neither has a function without a result.
        None if !matches!(role, Role::System | Role::User) => {}
        None => return Err(fields.missing("content")),
    }
    fields.finish()?;
    Ok(message)
}

/// Takes what only an assistant's message has. Clients send it back as it came, with what was empty in it
/// and with what their own helpers made of it.
fn take_assistant(fields: &mut Fields, message: &mut ChatMessage) -> Result<(), ApiError> {
    fields.ignore(&[
        "annotations",
        "parsed",
        "provider_specific_fields",
        "reasoning_details",
        "thinking_blocks",
        "images",
        "id",
    ]);
    fields.only("prefix", false)?;
    message.calls = take_calls(fields)?;
    if let Some(mut call) = fields.object("function_call")? {
        message.calls.push(take_function(&mut call, format!("function_call_{}", message.calls.len()))?);
        call.finish()?;
    }
    message.reasoning = fields.string("reasoning_content")?.or(fields.string("reasoning")?).filter(|t| !t.is_empty());
    // A refusal was the assistant's answer.
    if let Some(refusal) = fields.string("refusal")? {
        message.content = refusal;
    }
    Ok(())
}

fn take_calls(fields: &mut Fields) -> Result<Vec<PastCall>, ApiError> {
    let path = fields.path("tool_calls");
    match fields.take("tool_calls") {
        None => Ok(Vec::new()),
        Some(Value::Array(list)) if list.len() <= CALLS_MAX => {
            list.into_iter().enumerate().map(|(i, call)| take_call(&format!("{path}[{i}]"), i, call)).collect()
        }
        Some(Value::Array(list)) => {
            let message = format!("`{path}` takes at most {CALLS_MAX} calls, not {}", list.len());
            Err(ApiError::invalid(path, message))
        }
        Some(other) => Err(type_error(&path, "an array", &other)),
    }
}

fn take_call(path: &str, position: usize, value: Value) -> Result<PastCall, ApiError> {
    let mut fields = Fields::from_value(path, value)?;
    let id = fields.string("id")?.filter(|id| !id.is_empty()).unwrap_or_else(|| format!("call_{position}"));
    match fields.string("type")?.as_deref() {
        None | Some("function") => {}
        Some(other) => return Err(unsupported_type(&fields.path("type"), other, "function")),
    }
    // Clients that put a stream together send the position back.
    fields.ignore(&["index", "extra_content", "provider_specific_fields"]);
    let mut function = fields.object("function")?.ok_or_else(|| fields.missing("function"))?;
    fields.finish()?;
    let call = take_function(&mut function, id)?;
    // The parsed-arguments field of the client's own helpers.
    function.ignore(&["parsed_arguments"]);
    function.finish()?;
    Ok(call)
}

/// Takes the function that was called.
fn take_function(function: &mut Fields, id: String) -> Result<PastCall, ApiError> {
    Ok(PastCall { id, name: take_name(function)?, arguments: take_arguments(function)? })
}

/// Takes the arguments of a call that the assistant made earlier. They come as JSON text, as an object, or
/// not at all; those of an answer that its length cut are the beginning of an object.
pub(crate) fn take_arguments(function: &mut Fields) -> Result<String, ApiError> {
    let path = function.path("arguments");
    match function.take("arguments") {
        None => Ok("{}".to_owned()),
        Some(Value::String(text)) if text.trim().is_empty() => Ok("{}".to_owned()),
        Some(Value::String(text)) => whole_object(&text)
            .ok_or_else(|| ApiError::invalid(&path, format!("`{path}` must be the text of a JSON object"))),
        Some(object @ Value::Object(_)) => Ok(object.to_string()),
        Some(other) => Err(type_error(&path, "a string", &other)),
    }
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

/// Takes the parts of a content: text, and an assistant's refusal or reasoning.
fn take_parts(path: &str, parts: Vec<Value>, message: &mut ChatMessage) -> Result<(), ApiError> {
    if parts.len() > PARTS_MAX {
        let text = format!("`{path}` must have at most {PARTS_MAX} parts, not {}", parts.len());
        return Err(ApiError::invalid(path, text));
    }
    for (i, part) in parts.into_iter().enumerate() {
        let path = format!("{path}[{i}]");
        let mut fields = Fields::from_value(&path, part)?;
        let kind = fields.string("type")?.ok_or_else(|| fields.missing("type"))?;
        let name = match (kind.as_str(), message.role) {
            ("text" | "input_text" | "output_text", _) => "text",
            ("refusal", Role::Assistant) => "refusal",
            _ => {
                let text = format!("`{path}.type`: `{}` parts are not supported; only `text` is", short(&kind));
                return Err(ApiError::bad_request("unsupported_field", text).about(format!("{path}.type")));
            }
        };
        message.content.push_str(&fields.string(name)?.ok_or_else(|| fields.missing(name))?);
        fields.ignore(&CACHE_HINTS);
        fields.ignore(&["annotations"]);
        fields.finish()?;
    }
    Ok(())
}
