//! The body of `POST /v1/responses`: becomes the fields of a chat request, with what the answer repeats.

use std::sync::Arc;

use serde_json::{Map, Value, json};
use tandem_proto::limits::TOP_LOGPROBS_MAX;

use super::items::Conversation;
use super::store::ResponseStore;
use crate::api::answer_fields::{AnswerFields, Limits, TOKENS_MAX};
use crate::api::chat_fields::ChatFields;
use crate::api::error::ApiError;
use crate::api::fields::{Fields, short, type_error, unsupported};
use crate::api::grammar::{Format, take_schema};
use crate::api::messages::{ChatMessage, Role};
use crate::api::template_fields;
use crate::api::tools::{Described, Tools};

/// Fields of the API that this node does not have, and those of the chat API that have other names here.
const UNSUPPORTED: [&str; 12] = [
    "conversation",
    "prompt",
    "context_management",
    "moderation",
    "max_tool_calls",
    "n",
    "stop",
    "max_tokens",
    "max_completion_tokens",
    "messages",
    "response_format",
    "logprobs",
];

/// What can be asked for beside the answer. Most of it concerns tools that this node does not have.
const INCLUDES: [&str; 8] = [
    LOGPROBS,
    "reasoning.encrypted_content",
    "file_search_call.results",
    "web_search_call.results",
    "web_search_call.action.sources",
    "message.input_image.image_url",
    "computer_call_output.output.image_url",
    "code_interpreter_call.outputs",
];
const LOGPROBS: &str = "message.output_text.logprobs";

/// The body, checked.
#[derive(Debug)]
pub(crate) struct ResponsesFields {
    /// The request.
    pub(crate) chat: ChatFields,
    /// The conversation without instructions, to be kept with the answer; none if it is not to be kept.
    pub(crate) kept: Option<Vec<ChatMessage>>,
    /// Fields of the request that the response object repeats.
    pub(crate) echo: Map<String, Value>,
}

impl ResponsesFields {
    /// Checks a body.
    pub(crate) fn parse(body: &[u8], limits: &Limits, store: &ResponseStore) -> Result<Self, ApiError> {
        let mut fields = Fields::from_body(body)?;
        fields.refuse(&UNSUPPORTED)?;
        if fields.boolean("background")? == Some(true) {
            return Err(unsupported("background"));
        }
        if fields.choice("truncation", &["auto", "disabled"])? == Some("auto") {
            let message = "`truncation`: `auto` is not supported by this node; shorten the input";
            return Err(ApiError::bad_request("unsupported_field", message).about("truncation"));
        }
        let keep = fields.boolean("store")?.unwrap_or(true);
        let include_logprobs = take_include(&mut fields)?;
        let top_logprobs = fields.integer("top_logprobs", 0..=TOP_LOGPROBS_MAX as i64)?;
        let previous_id = fields.string("previous_response_id")?;
        let previous = previous_id.as_deref().map(|id| previous(id, store)).transpose()?;
        let instructions = fields.string("instructions")?;
        let max_output_tokens = fields.integer("max_output_tokens", 1..=TOKENS_MAX)?;

        let mut echo = echo(&fields);
        let given = [
            ("instructions", instructions.clone().map_or(Value::Null, Value::from)),
            ("max_output_tokens", max_output_tokens.map_or(Value::Null, Value::from)),
            ("previous_response_id", previous_id.map_or(Value::Null, Value::from)),
            ("store", keep.into()),
            ("top_logprobs", top_logprobs.unwrap_or(0).into()),
        ];
        echo.extend(given.map(|(name, value)| (name.to_owned(), value)));

        take_reasoning(&mut fields)?;
        let format = take_text(&mut fields)?;
        let tools = take_tools(&mut fields)?;
        // From here on it is a chat request, whose fields have other names in two places.
        if let Some(tokens) = max_output_tokens {
            fields.put("max_completion_tokens", tokens.into());
        }
        let answer = AnswerFields::take(&mut fields, limits)?;
        let variables = template_fields::take(&mut fields)?;
        let mut conversation = Conversation::after(previous.unwrap_or_default());
        conversation.take(&mut fields, store)?;
        fields.finish()?;

        let conversation = conversation.into_messages();
        let kept = keep.then(|| conversation.clone());
        let instructions = instructions.filter(|text| !text.is_empty());
        let messages = instructions.map(system).into_iter().chain(conversation).collect();
        let logprobs = include_logprobs || top_logprobs.is_some_and(|top| top > 0);
        let top_logprobs = top_logprobs.unwrap_or(0) as u32;
        Ok(Self {
            chat: ChatFields { answer, messages, format, tools, variables, tokens_min: 0, logprobs, top_logprobs },
            kept,
            echo,
        })
    }
}

fn system(content: String) -> ChatMessage {
    ChatMessage { role: Role::System, content, ..ChatMessage::default() }
}

fn previous(id: &str, store: &ResponseStore) -> Result<Vec<ChatMessage>, ApiError> {
    let found: Option<Arc<_>> = store.get(id);
    found.map(|stored| stored.messages.clone()).ok_or_else(|| {
        let message = format!(
            "no response `{}` is kept (any more): `store: false`, too long ago, or before the node started; send the \
             conversation as `input`",
            short(id)
        );
        ApiError::bad_request("previous_response_not_found", message).about("previous_response_id")
    })
}

/// Fields that the response object repeats as they came.
fn echo(fields: &Fields) -> Map<String, Value> {
    let or = |name: &str, otherwise: Value| (name.to_owned(), fields.peek(name).cloned().unwrap_or(otherwise));
    let text = json!({ "format": { "type": "text" } });
    Map::from_iter([
        or("parallel_tool_calls", true.into()),
        or("reasoning", json!({ "effort": null, "summary": null })),
        or("text", text),
        or("tool_choice", "auto".into()),
        or("tools", json!([])),
        or("metadata", json!({})),
        or("user", Value::Null),
        ("background".to_owned(), false.into()),
        ("truncation".to_owned(), "disabled".into()),
        ("service_tier".to_owned(), "default".into()),
    ])
}

fn take_include(fields: &mut Fields) -> Result<bool, ApiError> {
    let list = match fields.take("include") {
        None => return Ok(false),
        Some(Value::Array(list)) => list,
        Some(other) => return Err(type_error("include", "an array of strings", &other)),
    };
    let mut logprobs = false;
    for (i, value) in list.iter().enumerate() {
        let path = format!("include[{i}]");
        let Value::String(name) = value else { return Err(type_error(&path, "a string", value)) };
        if !INCLUDES.contains(&name.as_str()) {
            let message = format!("`{path}`: `{}` is not known; `{LOGPROBS}` is", short(name));
            return Err(ApiError::invalid(path, message));
        }
        logprobs |= name == LOGPROBS;
    }
    Ok(logprobs)
}

/// Takes `reasoning`. How much to reason is the chat request's affair; reasoning is always given in full,
/// so that a summary of any kind asks for nothing more.
fn take_reasoning(fields: &mut Fields) -> Result<(), ApiError> {
    let Some(mut reasoning) = fields.object("reasoning")? else { return Ok(()) };
    let effort = reasoning.string("effort")?;
    reasoning.choice("summary", &["auto", "concise", "detailed"])?;
    reasoning.choice("generate_summary", &["auto", "concise", "detailed"])?;
    reasoning.finish()?;
    if let Some(effort) = effort {
        fields.put("reasoning_effort", effort.into());
    }
    Ok(())
}

/// Takes `text`: the form of the answer.
fn take_text(fields: &mut Fields) -> Result<Option<Format>, ApiError> {
    let Some(mut text) = fields.object("text")? else { return Ok(None) };
    let verbosity = text.string("verbosity")?;
    let format = match text.object("format")? {
        None => None,
        Some(mut format) => {
            let taken = match format.string("type")?.as_deref() {
                Some("text") => None,
                Some("json_object") => Some(Format::JsonObject),
                Some("json_schema") => Some(Format::JsonSchema(take_schema(&mut format)?)),
                Some(other) => {
                    let message = format!(
                        "`text.format` of type `{}` is not supported; `text`, `json_object` and `json_schema` are",
                        short(other)
                    );
                    return Err(ApiError::bad_request("unsupported_field", message).about("text.format"));
                }
                None => return Err(format.missing("type")),
            };
            format.finish()?;
            taken
        }
    };
    text.finish()?;
    if let Some(verbosity) = verbosity {
        fields.put("verbosity", verbosity.into());
    }
    Ok(format)
}

fn take_tools(fields: &mut Fields) -> Result<Option<Tools>, ApiError> {
    Tools::take(fields, Described::Flat)
}
