//! The body of `POST /v1/chat/completions`.

use serde_json::{Map, Value};
use tandem_proto::limits::TOP_LOGPROBS_MAX;

use super::answer_fields::{self, AnswerFields, Limits};
use super::error::ApiError;
use super::fields::{Fields, type_error};
use super::grammar::Format;
use super::messages::{self, ChatMessage};
use super::template_fields;
use super::tools::{Described, Tools};

/// Fields of the OpenAI API that this node does not have.
const UNSUPPORTED: [&str; 5] = ["audio", "web_search_options", "moderation", "best_of", "suffix"];

/// The body, checked.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct ChatFields {
    pub(crate) answer: AnswerFields,
    pub(crate) messages: Vec<ChatMessage>,
    /// The form of the answer, if it is not plain text.
    pub(crate) format: Option<Format>,
    pub(crate) tools: Option<Tools>,
    /// Variables for the chat template.
    pub(crate) variables: Map<String, Value>,
    /// At least so many tokens come before the answer ends.
    pub(crate) tokens_min: usize,
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
        let format = Format::take(&mut fields)?;
        let tools = Tools::take(&mut fields, Described::Nested)?;
        take_modalities(&mut fields)?;
        let answer = AnswerFields::take(&mut fields, limits)?;
        let tokens_min = answer_fields::take_tokens_min(&mut fields, &answer)?;
        let variables = template_fields::take(&mut fields)?;
        let messages = messages::take(&mut fields)?;
        // The answer is a message of its own; vLLM's clients ask for nothing else by default.
        fields.only("echo", false)?;
        fields.only("add_generation_prompt", true)?;
        fields.only("continue_final_message", false)?;
        let logprobs = fields.boolean("logprobs")?.unwrap_or(false);
        let top_logprobs = fields.integer("top_logprobs", 0..=TOP_LOGPROBS_MAX as i64)?;
        if top_logprobs.is_some_and(|top| top > 0) && !logprobs {
            let message = "`top_logprobs` is only allowed with `logprobs: true`";
            return Err(ApiError::invalid("top_logprobs", message));
        }
        fields.finish()?;
        let top_logprobs = top_logprobs.unwrap_or(0) as u32;
        Ok(Self { answer, messages, format, tools, variables, tokens_min, logprobs, top_logprobs })
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
