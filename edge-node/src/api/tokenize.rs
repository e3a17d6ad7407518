//! `POST /tokenize` and `POST /detokenize`, which take what llama-server's clients and vLLM's send and
//! answer in the words of both.

use std::sync::Arc;

use axum::Json;
use axum::extract::{Request, State};
use serde_json::{Value, json};
use tandem_engine::tokenizer::Tokenizer;

use super::Api;
use super::completion_fields::take_tokens;
use super::endpoints::{limits, render, resolve};
use super::error::ApiError;
use super::fields::{Fields, type_error};
use super::messages;
use super::prompt;
use super::tools::{Described, Tools};

/// `POST /tokenize`: `content` (llama-server), `prompt` or `messages` (vLLM).
pub(crate) async fn tokenize(State(api): State<Arc<Api>>, request: Request) -> Result<Json<Value>, ApiError> {
    limits(api.backend.as_ref())?;
    let body = api.heavy.read_json(request).await?;
    let (mut fields, _weight) = body.parse(&api.heavy, Fields::from_body).await?;
    take_model(&api, &mut fields)?;
    let pieces = fields.boolean("with_pieces")?.unwrap_or(false);
    let strings = fields.boolean("return_token_strs")?.unwrap_or(false);
    let (content, text) = (fields.string("content")?, fields.string("prompt")?);
    let tokens = if fields.peek("messages").is_some() {
        if content.is_some() || text.is_some() {
            return Err(ApiError::invalid("messages", "`messages`, `prompt` and `content` exclude each other"));
        }
        let tools = Tools::take(&mut fields, Described::Nested)?;
        let messages = messages::take(&mut fields)?;
        if fields.boolean("add_generation_prompt")? == Some(false) {
            let message = "`add_generation_prompt`: `false` is not supported by this node; remove it";
            return Err(ApiError::bad_request("unsupported_field", message).about("add_generation_prompt"));
        }
        fields.finish()?;
        render(&api, messages, tools).await?
    } else {
        // The two differ in what they do if not told.
        let special = match (&content, fields.boolean("add_special")?, fields.boolean("add_special_tokens")?) {
            (_, Some(given), _) | (_, None, Some(given)) => given,
            (content, None, None) => content.is_none(),
        };
        if fields.boolean("parse_special")? == Some(false) {
            let message = "`parse_special`: `false` is not supported by this node; remove it";
            return Err(ApiError::bad_request("unsupported_field", message).about("parse_special"));
        }
        fields.finish()?;
        let text = match (content, text) {
            (Some(text), None) | (None, Some(text)) => text,
            (Some(_), Some(_)) => return Err(ApiError::invalid("prompt", "`prompt` and `content` exclude each other")),
            (None, None) => return Err(missing("prompt")),
        };
        prompt::of_text(&api, text, special).await?
    };
    let tokenizer = api.backend.tokenizer();
    let strings = strings.then(|| tokens.iter().map(|id| tokenizer.token(*id).unwrap_or_default()).collect::<Vec<_>>());
    let count = tokens.len();
    let tokens = if pieces { tokens.iter().map(|id| piece(tokenizer, *id)).collect() } else { json!(tokens) };
    let length = api.backend.context_tokens();
    Ok(Json(json!({ "tokens": tokens, "count": count, "max_model_len": length, "token_strs": strings })))
}

/// `POST /detokenize`.
pub(crate) async fn detokenize(State(api): State<Arc<Api>>, request: Request) -> Result<Json<Value>, ApiError> {
    let limits = limits(api.backend.as_ref())?;
    let body = api.heavy.read_json(request).await?;
    let (mut fields, _weight) = body.parse(&api.heavy, Fields::from_body).await?;
    take_model(&api, &mut fields)?;
    let tokens = match fields.take("tokens") {
        Some(Value::Array(list)) => take_tokens("tokens", &list, &limits)?,
        Some(other) => return Err(type_error("tokens", "an array of token ids", &other)),
        None => return Err(missing("tokens")),
    };
    fields.finish()?;
    let text = prompt::text_of(&api, tokens).await?;
    // llama-server calls it content, vLLM prompt.
    Ok(Json(json!({ "content": text, "prompt": text })))
}

fn missing(name: &str) -> ApiError {
    ApiError::bad_request("missing_field", format!("`{name}` is required")).about(name)
}

/// Takes `model`, which may be left out: there is one tokenizer.
fn take_model(api: &Api, fields: &mut Fields) -> Result<(), ApiError> {
    fields.string("model")?.map_or(Ok(()), |model| resolve(api, Some(&model)).map(drop))
}

/// A token with its text, or its bytes where they are part of a character.
fn piece(tokenizer: &Tokenizer, id: u32) -> Value {
    let bytes = tokenizer.token_bytes(id).unwrap_or_default();
    match String::from_utf8(bytes) {
        Ok(text) => json!({ "id": id, "piece": text }),
        Err(error) => json!({ "id": id, "piece": error.as_bytes() }),
    }
}
