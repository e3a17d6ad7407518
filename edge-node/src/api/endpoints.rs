//! `POST /v1/chat/completions` and `POST /v1/completions`.

use std::sync::Arc;
use std::time::Instant;

use axum::Extension;
use axum::extract::{Request, State};
use axum::response::Response;

use super::answer_fields::Limits;
use super::backend::{Backend, Readiness};
use super::body::read_json;
use super::chat_fields::ChatFields;
use super::completion_fields::CompletionFields;
use super::error::{ApiError, Params};
use super::reply::Kind;
use super::request_id::RequestId;
use super::respond::{Plan, respond};
use super::tooling::Tooling;
use super::{Api, model_name, prompt};

/// Chat completions.
pub(crate) async fn chat(
    State(api): State<Arc<Api>>,
    Extension(request_id): Extension<RequestId>,
    request: Request,
) -> Result<Response, ApiError> {
    let received = Instant::now();
    let limits = limits(api.backend.as_ref())?;
    let ChatFields { answer, messages, format, tools, logprobs, top_logprobs } =
        ChatFields::parse(&read_json(request).await?, &limits)?;
    let target = resolve(&api, &answer.model)?;
    let tooling = Tooling::of(api.backend.as_ref(), tools, &messages)?;
    let grammar = tooling.grammar(&api, format.as_ref()).await?;
    let (prompt, notice) = prompt::of_chat(&api.backend, messages, tooling.told()).await?;
    let plan = Plan {
        kind: Kind::Chat,
        path: "/v1/chat/completions",
        request_id,
        received,
        fields: answer,
        target,
        prompts: vec![prompt],
        params: Params { prompt: "messages", grammar: tooling.grammar_param() },
        logprobs: logprobs.then_some(top_logprobs),
        notice: notice.or_else(|| tooling.notice()),
        grammar,
        reading: tooling.reading(),
    };
    respond(&api.backend, plan).await
}

/// Text completions.
pub(crate) async fn completions(
    State(api): State<Arc<Api>>,
    Extension(request_id): Extension<RequestId>,
    request: Request,
) -> Result<Response, ApiError> {
    let received = Instant::now();
    let limits = limits(api.backend.as_ref())?;
    let CompletionFields { answer, prompts, logprobs } = CompletionFields::parse(&read_json(request).await?, &limits)?;
    let target = resolve(&api, &answer.model)?;
    let prompts = prompt::of_texts(&api.backend, prompts).await?;
    let plan = Plan {
        kind: Kind::Text,
        path: "/v1/completions",
        request_id,
        received,
        fields: answer,
        target,
        prompts,
        params: Params { prompt: "prompt", grammar: "response_format" },
        logprobs,
        notice: None,
        grammar: None,
        reading: None,
    };
    respond(&api.backend, plan).await
}

/// What requests may refer to; an error while the node is not ready.
fn limits(backend: &dyn Backend) -> Result<Limits, ApiError> {
    match backend.ready() {
        Readiness::Ready => {
            Ok(Limits { sampling: backend.sampling_defaults(), vocabulary: backend.tokenizer().vocab_size() })
        }
        other => Err(ApiError::not_ready(&other)),
    }
}

fn resolve(api: &Api, name: &str) -> Result<model_name::Target, ApiError> {
    model_name::resolve(name, &api.backend.models(), api.options.default_alias.as_deref())
}
