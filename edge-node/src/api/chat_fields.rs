//! The body of `POST /v1/chat/completions`.

use serde_json::Value;
use tandem_proto::limits::TOP_LOGPROBS_MAX;

use super::answer_fields::{AnswerFields, Limits};
use super::error::ApiError;
use super::fields::{Fields, short, type_error, unsupported};

/// Most messages of a conversation.
pub(crate) const MESSAGES_MAX: usize = 2048;
/// Most parts of one message's content.
pub(crate) const PARTS_MAX: usize = 256;

/// Fields of the OpenAI API that this node does not have.
const UNSUPPORTED: [&str; 15] = [
    "tools",
    "tool_choice",
    "parallel_tool_calls",
    "functions",
    "function_call",
    "audio",
    "prediction",
    "web_search_options",
    "reasoning_effort",
    "reasoning",
    "verbosity",
    "moderation",
    "best_of",
    "echo",
    "suffix",
];

/// One message; `developer` has become `system`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ChatMessage {
    pub(crate) role: &'static str,
    pub(crate) content: String,
}

/// The body, checked.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct ChatFields {
    pub(crate) answer: AnswerFields,
    pub(crate) messages: Vec<ChatMessage>,
    /// Report the log probability of each token.
    pub(crate) logprobs: bool,
    /// Alternatives to report per token.
    pub(crate) top_logprobs: u32,
}

impl ChatFields {
    /// Checks a body.
    pub(crate) fn parse(body: &[u8], limits: &Limits) -> Result<Self, ApiError> {
        let mut fields = Fields::from_body(body)?;
        fields.refuse(&UNSUPPORTED)?;
        take_response_format(&mut fields)?;
        take_modalities(&mut fields)?;
        let answer = AnswerFields::take(&mut fields, limits)?;
        let messages = take_messages(&mut fields)?;
        let logprobs = fields.boolean("logprobs")?.unwrap_or(false);
        let top_logprobs = fields.integer("top_logprobs", 0..=TOP_LOGPROBS_MAX as i64)?;
        if top_logprobs.is_some() && !logprobs {
            let message = "`top_logprobs` is only allowed with `logprobs: true`";
            return Err(ApiError::invalid("top_logprobs", message));
        }
        fields.finish()?;
        Ok(Self { answer, messages, logprobs, top_logprobs: top_logprobs.unwrap_or(0) as u32 })
    }
}

fn take_response_format(fields: &mut Fields) -> Result<(), ApiError> {
    let Some(mut format) = fields.object("response_format")? else { return Ok(()) };
    match format.string("type")?.as_deref() {
        Some("text") => format.finish(),
        Some(other) => {
            let message = format!("`response_format` of type `{}` is not supported; only `text` is", short(other));
            Err(ApiError::bad_request("unsupported_field", message).about("response_format"))
        }
        None => Err(format.missing("type")),
    }
}

fn take_modalities(fields: &mut Fields) -> Result<(), ApiError> {
    match fields.take("modalities") {
        None => Ok(()),
        Some(Value::Array(list)) if list.len() == 1 && list[0] == "text" => Ok(()),
        Some(Value::Array(_)) => {
            let message = "`modalities` can only be [\"text\"] here";
            Err(ApiError::bad_request("unsupported_field", message).about("modalities"))
        }
        Some(other) => Err(type_error("modalities", "an array", &other)),
    }
}

fn take_messages(fields: &mut Fields) -> Result<Vec<ChatMessage>, ApiError> {
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
        "tool" | "function" => {
            let message = format!("`{path}.role`: `{role}` messages are not supported by this node");
            return Err(ApiError::bad_request("unsupported_field", message).about(format!("{path}.role")));
        }
        _ => {
            let message =
                format!("`{path}.role` must be `system`, `developer`, `user` or `assistant`, not `{}`", short(&role));
            return Err(ApiError::invalid(format!("{path}.role"), message));
        }
    };
    if role == "assistant" {
        // A client sends the message back as it came, with what was empty in it.
        drop_empty_lists(&mut fields, &["tool_calls", "annotations"])?;
    }
    fields.refuse(&["tool_calls", "tool_call_id", "function_call", "audio", "refusal", "annotations", "name"])?;
    let content = match fields.take("content") {
        Some(Value::String(text)) => text,
        Some(Value::Array(parts)) => take_parts(&format!("{path}.content"), parts)?,
        Some(other) => {
            return Err(type_error(&format!("{path}.content"), "a string or an array of text parts", &other));
        }
        None => return Err(fields.missing("content")),
    };
    fields.finish()?;
    Ok(ChatMessage { role, content })
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
