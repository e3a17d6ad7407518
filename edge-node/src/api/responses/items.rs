//! The items of a conversation: those of a request become messages for the chat template, those of an
//! answer are written back as JSON.

use serde_json::{Value, json};

use super::store::ResponseStore;
use crate::api::error::ApiError;
use crate::api::fields::{Fields, short, type_error};
use crate::api::messages::{CALLS_MAX, ChatMessage, MESSAGES_MAX, PARTS_MAX, PastCall, Role, take_arguments};
use crate::api::tools::take_name;

/// An item of an answer.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Item {
    pub(crate) id: String,
    pub(crate) status: &'static str,
    pub(crate) said: Spoken,
}

/// What an item says.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Spoken {
    Message { text: String, logprobs: Vec<Value> },
    Reasoning { text: String },
    Call { call_id: String, name: String, arguments: String },
}

impl Item {
    /// The item as the API writes it; `empty`: before its first word.
    pub(crate) fn to_json(&self, empty: bool) -> Value {
        let (id, status) = (&self.id, self.status);
        let said = |value: Value| if empty { json!([]) } else { json!([value]) };
        match &self.said {
            Spoken::Message { .. } => json!({
                "id": id, "type": "message", "status": status, "role": "assistant", "content": said(self.part()),
            }),
            Spoken::Reasoning { .. } => json!({
                "id": id, "type": "reasoning", "status": status, "summary": [], "content": said(self.part()),
            }),
            Spoken::Call { call_id, name, arguments } => json!({
                "id": id, "type": "function_call", "status": status, "call_id": call_id, "name": name,
                "arguments": if empty { "" } else { arguments.as_str() },
            }),
        }
    }

    /// The one part of a message or of reasoning.
    pub(crate) fn part(&self) -> Value {
        match &self.said {
            Spoken::Message { text, logprobs } => text_part(text, logprobs),
            Spoken::Reasoning { text } => json!({ "type": "reasoning_text", "text": text }),
            Spoken::Call { .. } => Value::Null,
        }
    }
}

/// A part with text of an answer.
pub(crate) fn text_part(text: &str, logprobs: &[Value]) -> Value {
    json!({ "type": "output_text", "text": text, "annotations": [], "logprobs": logprobs })
}

/// Puts a conversation together: what an assistant says between two messages of others is one message.
#[derive(Debug, Default)]
pub(crate) struct Conversation {
    messages: Vec<ChatMessage>,
    /// The last message is the assistant's and more may be added to it.
    open: bool,
}

impl Conversation {
    /// The messages.
    pub(crate) fn into_messages(self) -> Vec<ChatMessage> {
        self.messages
    }

    /// Goes on after these.
    pub(crate) fn after(messages: Vec<ChatMessage>) -> Self {
        Self { messages, open: false }
    }

    fn other(&mut self, role: Role, content: String, answers: Option<String>) {
        self.open = false;
        self.messages.push(ChatMessage { role, content, answers, ..ChatMessage::default() });
    }

    /// The assistant's message under way, if `fits` says that it takes more, or a new one.
    fn assistant(&mut self, fits: impl Fn(&ChatMessage) -> bool) -> &mut ChatMessage {
        if !self.open || !self.messages.last().is_some_and(fits) {
            self.other(Role::Assistant, String::new(), None);
            self.open = true;
        }
        let last = self.messages.len() - 1;
        &mut self.messages[last]
    }

    /// Adds an item that an answer had. A call that was cut short is left out: no template can write it.
    pub(crate) fn add(&mut self, item: &Item) {
        match &item.said {
            Spoken::Reasoning { text } => {
                self.assistant(|m| m.content.is_empty() && m.calls.is_empty() && m.reasoning.is_none()).reasoning =
                    Some(text.clone());
            }
            Spoken::Message { text, .. } => {
                let message = self.assistant(|m| m.content.is_empty() && m.calls.is_empty());
                message.content.clone_from(text);
            }
            Spoken::Call { call_id, name, arguments } => {
                if matches!(serde_json::from_str(arguments), Ok(Value::Object(_))) {
                    let call = PastCall { id: call_id.clone(), name: name.clone(), arguments: arguments.clone() };
                    self.assistant(|m| m.calls.len() < CALLS_MAX).calls.push(call);
                }
            }
        }
    }

    /// Takes `input`: text or items.
    pub(crate) fn take(&mut self, fields: &mut Fields, store: &ResponseStore) -> Result<(), ApiError> {
        match fields.take("input") {
            None => Err(fields.missing("input")),
            Some(Value::String(text)) => {
                self.other(Role::User, text, None);
                Ok(())
            }
            Some(Value::Array(list)) if list.is_empty() || list.len() > MESSAGES_MAX => {
                let message = format!("`input` must have from 1 to {MESSAGES_MAX} items, not {}", list.len());
                Err(ApiError::invalid("input", message))
            }
            Some(Value::Array(list)) => list
                .into_iter()
                .enumerate()
                .try_for_each(|(i, item)| self.take_item(&format!("input[{i}]"), item, store)),
            Some(other) => Err(type_error("input", "a string or an array of items", &other)),
        }
    }

    fn take_item(&mut self, path: &str, value: Value, store: &ResponseStore) -> Result<(), ApiError> {
        let mut fields = Fields::from_value(path, value)?;
        let kind = fields.string("type")?;
        let id = if kind.as_deref() == Some("item_reference") { None } else { fields.string("id")? };
        // Of no consequence for the next turn.
        fields.choice("status", &["in_progress", "completed", "incomplete"])?;
        match kind.as_deref() {
            None | Some("message") => self.take_message(path, &mut fields)?,
            Some("function_call") => {
                fields.ignore(&["namespace", "caller", "parsed_arguments"]);
                let call_id = fields.string("call_id")?.ok_or_else(|| fields.missing("call_id"))?;
                let name = take_name(&mut fields)?;
                let arguments = take_arguments(&mut fields)?;
                self.assistant(|m| m.calls.len() < CALLS_MAX).calls.push(PastCall { id: call_id, name, arguments });
            }
            Some("function_call_output") => {
                fields.ignore(&["name", "namespace", "caller"]);
                let call_id = fields.string("call_id")?.ok_or_else(|| fields.missing("call_id"))?;
                let output = take_text(&mut fields, "output")?.ok_or_else(|| fields.missing("output"))?;
                self.other(Role::Tool, output, Some(call_id));
            }
            Some("reasoning") => {
                let summary = take_text(&mut fields, "summary")?.unwrap_or_default();
                let content = take_text(&mut fields, "content")?.unwrap_or_default();
                fields.ignore(&["encrypted_content"]);
                let text = if content.is_empty() { summary } else { content };
                if !text.is_empty() {
                    let item =
                        Item { id: id.unwrap_or_default(), status: "completed", said: Spoken::Reasoning { text } };
                    self.add(&item);
                }
            }
            Some("item_reference") => {
                let id = fields.string("id")?.ok_or_else(|| fields.missing("id"))?;
                let item = store.item(&id).ok_or_else(|| {
                    let message =
                        format!("`{path}.id`: no item `{}` is kept (any more); send the item itself", short(&id));
                    ApiError::not_found("item_not_found", message).about(format!("{path}.id"))
                })?;
                self.add(&item);
            }
            Some(other) => {
                let message = format!(
                    "`{path}.type`: `{}` items are not supported; `message`, `function_call`, \
                     `function_call_output`, `reasoning` and `item_reference` are",
                    short(other)
                );
                return Err(ApiError::bad_request("unsupported_field", message).about(format!("{path}.type")));
            }
        }
        fields.finish()
    }

    fn take_message(&mut self, path: &str, fields: &mut Fields) -> Result<(), ApiError> {
        let role = fields.string("role")?.ok_or_else(|| fields.missing("role"))?;
        fields.ignore(&["phase"]);
        let content = take_text(fields, "content")?.ok_or_else(|| fields.missing("content"))?;
        match role.as_str() {
            "user" => self.other(Role::User, content, None),
            "system" | "developer" => self.other(Role::System, content, None),
            "assistant" => self.assistant(|m| m.content.is_empty() && m.calls.is_empty()).content = content,
            _ => {
                let message = format!(
                    "`{path}.role` must be `user`, `assistant`, `system` or `developer`, not `{}`",
                    short(&role)
                );
                return Err(ApiError::invalid(format!("{path}.role"), message));
            }
        }
        Ok(())
    }
}

/// Takes text: a string, or parts that have text.
fn take_text(fields: &mut Fields, name: &str) -> Result<Option<String>, ApiError> {
    let path = fields.path(name);
    let parts = match fields.take(name) {
        None => return Ok(None),
        Some(Value::String(text)) => return Ok(Some(text)),
        Some(Value::Array(parts)) if parts.len() <= PARTS_MAX => parts,
        Some(Value::Array(parts)) => {
            let message = format!("`{path}` takes at most {PARTS_MAX} parts, not {}", parts.len());
            return Err(ApiError::invalid(path, message));
        }
        Some(other) => return Err(type_error(&path, "a string or an array of text parts", &other)),
    };
    let mut text = String::new();
    for (i, part) in parts.into_iter().enumerate() {
        let mut part = Fields::from_value(&format!("{path}[{i}]"), part)?;
        let field = match part.string("type")?.as_deref() {
            Some("input_text" | "output_text" | "reasoning_text" | "summary_text" | "text") => "text",
            Some("refusal") => "refusal",
            Some(other) => {
                let path = part.path("type");
                let message = format!("`{path}`: `{}` parts are not supported; only text is", short(other));
                return Err(ApiError::bad_request("unsupported_field", message).about(path));
            }
            None => return Err(part.missing("type")),
        };
        part.ignore(&["annotations", "logprobs", "parsed", "prompt_cache_breakpoint"]);
        text.push_str(&part.string(field)?.ok_or_else(|| part.missing(field))?);
        part.finish()?;
    }
    Ok(Some(text))
}
