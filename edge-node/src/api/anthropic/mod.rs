//! Anthropic's Messages API over the request path of chat completions: [`fields`] makes a chat request of a
//! body, [`writer`] writes its answer, [`errors`] gives every error of these paths Anthropic's shape.

mod blocks;
pub(crate) mod errors;
mod fields;
mod writer;

use std::sync::Arc;
use std::time::Instant;

use axum::extract::{Request, State};
use axum::response::Response;
use axum::{Extension, Json};
use serde_json::{Value, json};

use super::Api;
use super::answer_fields::Limits;
use super::endpoints::{Call, converse, read, render, resolve};
use super::error::ApiError;
use super::request_id::RequestId;
use fields::{MessagesFields, Purpose};
use writer::MessagesWriter;

/// Fields of a chat request under their names here.
const NAMES: [(&str, &str); 3] = [
    ("response_format.json_schema.schema", "output_config.format.schema"),
    ("response_format", "output_config.format"),
    ("stop", "stop_sequences"),
];

/// `POST /v1/messages`.
pub(crate) async fn create(
    State(api): State<Arc<Api>>,
    Extension(request_id): Extension<RequestId>,
    request: Request,
) -> Result<Response, ApiError> {
    let received = Instant::now();
    let parse = |body: &[u8], limits: &Limits| MessagesFields::parse(body, limits, Purpose::Answer);
    let (fields, weight) = read(&api, request, parse).await.map_err(|error| error.renamed(&NAMES))?;
    let MessagesFields { chat, hide_thinking } = fields;
    let call = Call { path: "/v1/messages", request_id, received, prompt_param: "messages", names: &NAMES, weight };
    converse(&api, call, chat, |plan| Box::new(MessagesWriter::new(plan, hide_thinking))).await
}

/// `POST /v1/messages/count_tokens`.
pub(crate) async fn count_tokens(State(api): State<Arc<Api>>, request: Request) -> Result<Json<Value>, ApiError> {
    let parse = |body: &[u8], limits: &Limits| MessagesFields::parse(body, limits, Purpose::Count);
    let (fields, _weight) = read(&api, request, parse).await.map_err(|error| error.renamed(&NAMES))?;
    resolve(&api, fields.chat.answer.model.as_deref())?;
    let prompt = render(&api, fields.chat.messages, fields.chat.tools).await?;
    Ok(Json(json!({ "input_tokens": prompt.len() })))
}
