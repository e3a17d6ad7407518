//! The body of `POST /v1/messages`: becomes the fields of a chat request.

use super::blocks;
use crate::api::answer_fields::{AnswerFields, Limits};
use crate::api::chat_fields::ChatFields;
use crate::api::error::ApiError;
use crate::api::fields::{Fields, short};
use crate::api::grammar::Format;
use crate::api::template_fields;
use crate::api::tools::{Described, Tools};

/// Fields of the API that this node does not have, and those of the chat API that have other names here.
const UNSUPPORTED: [&str; 8] = [
    "container",
    "mcp_servers",
    "context_management",
    "n",
    "stop",
    "max_completion_tokens",
    "functions",
    "response_format",
];

/// Without effect on the answer: hints for a cache, labels, and where and how fast it is to be computed.
const HINTS: [&str; 6] = ["cache_control", "inference_geo", "user_profile_id", "workspace_id", "diagnostics", "speed"];

/// What the body is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Purpose {
    /// An answer, whose length must be given.
    Answer,
    /// The number of its tokens.
    Count,
}

/// The body, checked.
#[derive(Debug)]
pub(super) struct MessagesFields {
    pub(super) chat: ChatFields,
    /// Leave out what the model says to itself.
    pub(super) hide_thinking: bool,
}

impl MessagesFields {
    /// Checks a body.
    pub(super) fn parse(body: &[u8], limits: &Limits, purpose: Purpose) -> Result<Self, ApiError> {
        let mut fields = Fields::from_body(body)?;
        fields.refuse(&UNSUPPORTED)?;
        fields.ignore(&HINTS);
        fields.choice("service_tier", &["auto", "standard_only"])?;
        if purpose == Purpose::Answer && fields.peek("max_tokens").is_none() {
            return Err(fields.missing("max_tokens"));
        }
        let hide_thinking = take_thinking(&mut fields)?;
        let format = take_format(&mut fields)?;
        let tools = Tools::take(&mut fields, Described::Messages)?;
        if let Some(stops) = fields.take("stop_sequences") {
            fields.put("stop", stops);
        }
        let answer = AnswerFields::take(&mut fields, limits)?;
        let system = blocks::take_system(&mut fields)?;
        let messages = system.into_iter().chain(blocks::take_messages(&mut fields)?).collect();
        let variables = template_fields::take(&mut fields)?;
        fields.finish()?;
        let (tokens_min, logprobs, top_logprobs) = (0, false, 0);
        let chat = ChatFields { answer, messages, format, tools, variables, tokens_min, logprobs, top_logprobs };
        Ok(Self { chat, hide_thinking })
    }
}

/// Takes `thinking`; true if it is not to be shown. How long a model thinks is its own affair here.
fn take_thinking(fields: &mut Fields) -> Result<bool, ApiError> {
    let Some(mut thinking) = fields.object("thinking")? else { return Ok(false) };
    let kinds = ["enabled", "disabled", "adaptive", "between_tools"];
    let kind = thinking.choice("type", &kinds)?.ok_or_else(|| thinking.missing("type"))?;
    thinking.integer("budget_tokens", 1..=i64::from(i32::MAX))?;
    let display = thinking.choice("display", &["summarized", "omitted"])?;
    thinking.finish()?;
    if kind != "adaptive" {
        fields.put("enable_thinking", (kind != "disabled").into());
    }
    Ok(display == Some("omitted"))
}

/// Takes `output_config`, or `output_format` as it was called before.
fn take_format(fields: &mut Fields) -> Result<Option<Format>, ApiError> {
    let config = fields.object("output_config")?;
    let (mut format, effort) = match config {
        None => (None, None),
        Some(mut config) => {
            let (format, effort) = (config.object("format")?, config.string("effort")?);
            config.finish()?;
            (format, effort)
        }
    };
    if let Some(effort) = effort {
        fields.put("reasoning_effort", effort.into());
    }
    if let Some(before) = fields.object("output_format")? {
        format.get_or_insert(before);
    }
    let Some(mut format) = format else { return Ok(None) };
    match format.string("type")?.as_deref() {
        Some("json_schema") => {}
        Some(other) => {
            let path = format.path("type");
            let message = format!("`{path}`: `{}` is not supported; only `json_schema` is", short(other));
            return Err(ApiError::bad_request("unsupported_field", message).about(path));
        }
        None => return Err(format.missing("type")),
    }
    let schema = format.take("schema").ok_or_else(|| format.missing("schema"))?;
    format.finish()?;
    Ok(Some(Format::JsonSchema(schema)))
}
