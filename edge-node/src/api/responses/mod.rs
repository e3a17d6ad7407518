//! OpenAI's Responses API over the request path of chat completions: [`fields`] makes a chat request of a
//! body, [`writer`] writes its answer, [`store`] keeps it for the next turn.

mod fields;
pub(crate) mod items;
mod store;
mod writer;

use std::sync::Arc;
use std::time::Instant;

use axum::extract::{Path, Request, State};
use axum::http::header;
use axum::response::{IntoResponse, Response};
use axum::{Extension, Json};
use serde_json::{Value, json};

use super::Api;
use super::answer_fields::Limits;
use super::endpoints::{Call, converse, read};
use super::error::ApiError;
use super::fields::short;
use super::request_id::RequestId;
use fields::ResponsesFields;
pub(crate) use store::ResponseStore;
use writer::{Answer, ResponsesWriter};

/// Fields of a chat request under their names here. Messages are made of items, so that their numbers
/// say nothing.
const NAMES: [(&str, &str); 3] = [
    ("response_format.json_schema.schema", "text.format.schema"),
    ("response_format", "text.format"),
    ("max_completion_tokens", "max_output_tokens"),
];

/// `POST /v1/responses`.
pub(crate) async fn create(
    State(api): State<Arc<Api>>,
    Extension(request_id): Extension<RequestId>,
    request: Request,
) -> Result<Response, ApiError> {
    let received = Instant::now();
    let responses = Arc::clone(&api.responses);
    let parse = move |body: &[u8], limits: &Limits| ResponsesFields::parse(body, limits, &responses);
    let (fields, weight) = read(&api, request, parse).await.map_err(|error| error.renamed(&NAMES))?;
    let ResponsesFields { chat, kept, mut echo } = fields;
    echo.insert("temperature".to_owned(), chat.answer.sampling.temperature.into());
    echo.insert("top_p".to_owned(), chat.answer.sampling.top_p.into());
    let call = Call { path: "/v1/responses", request_id, received, prompt_param: "input", names: &NAMES, weight };
    converse(&api, call, chat, |plan| {
        Box::new(ResponsesWriter {
            backend: Arc::clone(&api.backend),
            store: Arc::clone(&api.responses),
            key: api.responses.key(plan.request_id.as_str()),
            model: plan.target.name.clone(),
            echo,
            kept,
            reading: plan.reading.clone(),
            logprobs: plan.logprobs.map(|top| top as usize),
            answer: Answer::default(),
        })
    })
    .await
}

/// `GET /v1/responses/{id}`.
pub(crate) async fn retrieve(State(api): State<Arc<Api>>, Path(id): Path<String>) -> Result<Response, ApiError> {
    let stored = api.responses.get(&id).ok_or_else(|| not_found(&id))?;
    Ok(([(header::CONTENT_TYPE, "application/json")], stored.response.clone()).into_response())
}

/// `DELETE /v1/responses/{id}`.
pub(crate) async fn delete(State(api): State<Arc<Api>>, Path(id): Path<String>) -> Result<Json<Value>, ApiError> {
    if api.responses.remove(&id) {
        return Ok(Json(json!({ "id": id, "object": "response", "deleted": true })));
    }
    Err(not_found(&id))
}

fn not_found(id: &str) -> ApiError {
    let message = format!("no response `{}` is kept (any more)", short(id));
    ApiError::not_found("response_not_found", message)
}
