//! The body of `POST /v1/completions`.

use serde_json::Value;

use super::answer_fields::{AnswerFields, CHOICES_MAX, Limits, take_tokens_min};
use super::error::ApiError;
use super::fields::{Fields, type_error, unsupported};

/// Most prompts of one request; prompts times `n` are bounded by [`CHOICES_MAX`].
pub(crate) const PROMPTS_MAX: usize = CHOICES_MAX;
/// Most alternatives per token in the old `logprobs` field, as at OpenAI.
pub(crate) const LOGPROBS_MAX: i64 = 5;
/// Tokens of an answer if the request does not say, as at OpenAI.
pub(crate) const TOKENS_DEFAULT: usize = 16;

/// Fields of the OpenAI API that this node does not have here.
const UNSUPPORTED: [&str; 5] = ["tools", "tool_choice", "functions", "messages", "response_format"];

/// One prompt.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Prompt {
    /// To be tokenized.
    Text(String),
    /// Token ids as they are.
    Tokens(Vec<u32>),
}

/// The body, checked.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct CompletionFields {
    pub(crate) answer: AnswerFields,
    pub(crate) prompts: Vec<Prompt>,
    /// Log probabilities with this many alternatives; `None` for none at all.
    pub(crate) logprobs: Option<u32>,
    /// At least so many tokens come before the answer ends.
    pub(crate) tokens_min: usize,
    /// The prompt comes before the answer.
    pub(crate) echo: Option<Echo>,
}

/// What of a prompt is handed out again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Echo {
    /// Nothing is written after it (`max_tokens: 0`).
    pub(crate) alone: bool,
}

impl CompletionFields {
    /// Checks a body.
    pub(crate) fn parse(body: &[u8], limits: &Limits) -> Result<Self, ApiError> {
        let mut fields = Fields::from_body(body)?;
        fields.refuse(&UNSUPPORTED)?;
        let echo = fields.boolean("echo")?.unwrap_or(false);
        // Nothing but the prompt: how its log probabilities are asked for.
        let alone = echo && fields.take_if("max_tokens", &0.into());
        let unlimited = fields.is("max_tokens", &(-1).into());
        let mut answer = AnswerFields::take(&mut fields, limits)?;
        if !unlimited {
            answer.tokens_max.get_or_insert(TOKENS_DEFAULT);
        }
        let echo = echo.then_some(Echo { alone });
        let tokens_min = take_tokens_min(&mut fields, &answer)?;
        fields.only("add_special_tokens", true)?;
        if fields.string("suffix")?.is_some_and(|suffix| !suffix.is_empty()) {
            return Err(unsupported("suffix"));
        }
        let best_of = fields.integer("best_of", 1..=i64::MAX)?;
        if best_of.is_some_and(|best_of| best_of != answer.n as i64) {
            let message = "`best_of` other than `n` is not supported by this node; remove it";
            return Err(ApiError::bad_request("unsupported_field", message).about("best_of"));
        }
        // `false` is how clients of the chat's field write "none".
        fields.take_if("logprobs", &false.into());
        let logprobs = fields.integer("logprobs", 0..=LOGPROBS_MAX)?.map(|n| n as u32);
        let prompts = take_prompts(&mut fields, "prompt", PROMPTS_MAX, limits)?;
        if prompts.len() * answer.n > CHOICES_MAX {
            let message = format!("prompts times `n` must be at most {CHOICES_MAX}, not {}", prompts.len() * answer.n);
            return Err(ApiError::invalid("n", message));
        }
        fields.finish()?;
        Ok(Self { answer, prompts, logprobs, tokens_min, echo })
    }
}

/// Takes what may be one text or several, as text or token ids, from the field `name`.
pub(crate) fn take_prompts(
    fields: &mut Fields,
    name: &str,
    prompts_max: usize,
    limits: &Limits,
) -> Result<Vec<Prompt>, ApiError> {
    const WANTED: &str = "a string, an array of strings, an array of token ids or an array of such arrays";
    let list = match fields.take(name) {
        None => return Err(fields.missing(name)),
        Some(Value::String(text)) => return Ok(vec![Prompt::Text(text)]),
        Some(Value::Array(list)) => list,
        Some(other) => return Err(type_error(name, WANTED, &other)),
    };
    if let Some(Value::Number(_)) = list.first() {
        return Ok(vec![Prompt::Tokens(take_tokens(name, &list, limits)?)]);
    }
    if list.is_empty() || list.len() > prompts_max {
        let message = format!("`{name}` must have from 1 to {prompts_max} entries, not {}", list.len());
        return Err(ApiError::invalid(name, message));
    }
    let prompt = |(i, value): (usize, Value)| {
        let path = format!("{name}[{i}]");
        match value {
            Value::String(text) => Ok(Prompt::Text(text)),
            Value::Array(tokens) => Ok(Prompt::Tokens(take_tokens(&path, &tokens, limits)?)),
            other => Err(type_error(&path, "a string or an array of token ids", &other)),
        }
    };
    list.into_iter().enumerate().map(prompt).collect()
}

/// The token ids of a list.
pub(crate) fn take_tokens(path: &str, list: &[Value], limits: &Limits) -> Result<Vec<u32>, ApiError> {
    let token = |(i, value): (usize, &Value)| {
        let id = value.as_u64().filter(|id| *id < limits.vocabulary as u64);
        id.map(|id| id as u32).ok_or_else(|| {
            let message = format!("`{path}[{i}]` must be a token id below {}", limits.vocabulary);
            ApiError::invalid(format!("{path}[{i}]"), message)
        })
    };
    list.iter().enumerate().map(token).collect()
}
