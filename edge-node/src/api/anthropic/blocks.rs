//! The turns of a conversation: content blocks become messages for the chat template.

use serde_json::Value;

use crate::api::error::ApiError;
use crate::api::fields::{Fields, short, type_error};
use crate::api::messages::{CALLS_MAX, ChatMessage, MESSAGES_MAX, PARTS_MAX, PastCall, Role};
use crate::api::tools::take_name;

/// On every block, without effect: hints for a cache, and what only tools of Anthropic's servers have.
const HINTS: [&str; 4] = ["cache_control", "citations", "caller", "toolset_name"];

/// Takes `system`: text, or blocks of text.
pub(super) fn take_system(fields: &mut Fields) -> Result<Option<ChatMessage>, ApiError> {
    let content = take_text(fields, "system")?.filter(|text| !text.is_empty());
    Ok(content.map(|content| message(Role::System, content)))
}

/// Takes `messages`.
pub(super) fn take_messages(fields: &mut Fields) -> Result<Vec<ChatMessage>, ApiError> {
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
    for (i, value) in list.into_iter().enumerate() {
        take_message(&format!("messages[{i}]"), value, &mut messages)?;
    }
    if messages.last().is_some_and(|m| m.role == Role::Assistant) {
        let message = "`messages`: the last one must be the user's; beginning the assistant's answer for it is not \
                       supported by this node";
        return Err(ApiError::bad_request("unsupported_field", message).about("messages"));
    }
    Ok(messages)
}

fn message(role: Role, content: String) -> ChatMessage {
    ChatMessage { role, content, ..ChatMessage::default() }
}

fn take_message(path: &str, value: Value, messages: &mut Vec<ChatMessage>) -> Result<(), ApiError> {
    let mut fields = Fields::from_value(path, value)?;
    let role = fields.choice("role", &["user", "assistant", "system"])?.ok_or_else(|| fields.missing("role"))?;
    let speaker = match role {
        "user" => Role::User,
        "assistant" => Role::Assistant,
        _ => Role::System,
    };
    let content = fields.take("content").ok_or_else(|| fields.missing("content"))?;
    fields.finish()?;
    let path = format!("{path}.content");
    let blocks = match content {
        Value::String(text) => {
            messages.push(message(speaker, text));
            return Ok(());
        }
        Value::Array(blocks) => blocks,
        other => return Err(type_error(&path, "a string or an array of content blocks", &other)),
    };
    if blocks.is_empty() || blocks.len() > PARTS_MAX {
        let message = format!("`{path}` must have from 1 to {PARTS_MAX} blocks, not {}", blocks.len());
        return Err(ApiError::invalid(path, message));
    }
    let mut turn = message(speaker, String::new());
    // A turn of results alone says nothing more.
    let mut spoken = role != "user";
    for (i, block) in blocks.into_iter().enumerate() {
        let mut block = Fields::from_value(&format!("{path}[{i}]"), block)?;
        block.ignore(&HINTS);
        let kind = block.string("type")?.ok_or_else(|| block.missing("type"))?;
        match (kind.as_str(), role) {
            ("text", _) => {
                turn.content.push_str(&block.string("text")?.ok_or_else(|| block.missing("text"))?);
                spoken = true;
            }
            ("tool_result", "user") => {
                if !turn.content.is_empty() {
                    messages.push(std::mem::replace(&mut turn, message(speaker, String::new())));
                    spoken = false;
                }
                messages.push(take_result(&mut block)?);
            }
            ("tool_use", "assistant") => {
                turn.calls.push(take_call(&mut block)?);
                if turn.calls.len() > CALLS_MAX {
                    let message = format!("`{path}` takes at most {CALLS_MAX} calls");
                    return Err(ApiError::invalid(path, message));
                }
            }
            ("thinking", "assistant") => {
                block.ignore(&["signature"]);
                let text = block.string("thinking")?.ok_or_else(|| block.missing("thinking"))?;
                if !text.is_empty() {
                    turn.reasoning.get_or_insert_default().push_str(&text);
                }
            }
            // Nobody but Anthropic can read it.
            ("redacted_thinking", "assistant") => block.ignore(&["data"]),
            (other, _) => {
                let path = block.path("type");
                let message = format!(
                    "`{path}`: `{}` blocks are not supported in a message of the {role}; `text` is, `tool_result` of \
                     the user, `tool_use` and `thinking` of the assistant",
                    short(other)
                );
                return Err(ApiError::bad_request("unsupported_field", message).about(path));
            }
        }
        block.finish()?;
    }
    if spoken {
        messages.push(turn);
    }
    Ok(())
}

fn take_result(block: &mut Fields) -> Result<ChatMessage, ApiError> {
    let id = block.string("tool_use_id")?.ok_or_else(|| block.missing("tool_use_id"))?;
    // The result says itself what went wrong.
    block.boolean("is_error")?;
    let content = take_text(block, "content")?.unwrap_or_default();
    Ok(ChatMessage { answers: Some(id), ..message(Role::Tool, content) })
}

fn take_call(block: &mut Fields) -> Result<PastCall, ApiError> {
    let id = block.string("id")?.ok_or_else(|| block.missing("id"))?;
    let name = take_name(block)?;
    let arguments = match block.take("input") {
        None => return Err(block.missing("input")),
        Some(Value::Object(input)) => Value::Object(input).to_string(),
        Some(other) => return Err(type_error(&block.path("input"), "an object", &other)),
    };
    Ok(PastCall { id, name, arguments })
}

/// Takes text: a string, or blocks of text.
fn take_text(fields: &mut Fields, name: &str) -> Result<Option<String>, ApiError> {
    let path = fields.path(name);
    let blocks = match fields.take(name) {
        None => return Ok(None),
        Some(Value::String(text)) => return Ok(Some(text)),
        Some(Value::Array(blocks)) if blocks.len() <= PARTS_MAX => blocks,
        Some(Value::Array(blocks)) => {
            let message = format!("`{path}` takes at most {PARTS_MAX} blocks, not {}", blocks.len());
            return Err(ApiError::invalid(path, message));
        }
        Some(other) => return Err(type_error(&path, "a string or an array of text blocks", &other)),
    };
    let mut text = String::new();
    for (i, block) in blocks.into_iter().enumerate() {
        let mut block = Fields::from_value(&format!("{path}[{i}]"), block)?;
        block.ignore(&HINTS);
        match block.string("type")?.as_deref() {
            Some("text") => text.push_str(&block.string("text")?.ok_or_else(|| block.missing("text"))?),
            Some(other) => {
                let path = block.path("type");
                let message = format!("`{path}`: `{}` blocks are not supported; only `text` is", short(other));
                return Err(ApiError::bad_request("unsupported_field", message).about(path));
            }
            None => return Err(block.missing("type")),
        }
        block.finish()?;
    }
    Ok(Some(text))
}
