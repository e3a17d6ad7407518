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
use super::completion_writer::CompletionWriter;
use super::error::{ApiError, Params};
use super::messages::ChatMessage;
use super::reply::{Kind, Shape};
use super::request_id::RequestId;
use super::respond::{Plan, respond};
use super::tooling::Tooling;
use super::tools::Tools;
use super::writer::Writer;
use super::{Api, model_name, prompt};

/// Chat completions.
pub(crate) async fn chat(
    State(api): State<Arc<Api>>,
    Extension(request_id): Extension<RequestId>,
    request: Request,
) -> Result<Response, ApiError> {
    let received = Instant::now();
    let limits = limits(api.backend.as_ref())?;
    let fields = ChatFields::parse(&read_json(request).await?, &limits)?;
    let call = Call { path: "/v1/chat/completions", request_id, received, prompt_param: "messages", names: &[] };
    converse(&api, call, fields, |plan| completion_writer(&api, Kind::Chat, plan)).await
}

/// What is known of a request before its body.
pub(crate) struct Call {
    /// Path, for metrics.
    pub(crate) path: &'static str,
    pub(crate) request_id: RequestId,
    pub(crate) received: Instant,
    /// Field that holds the conversation.
    pub(crate) prompt_param: &'static str,
    /// Fields of a chat request that have other names in this API.
    pub(crate) names: &'static [(&'static str, &'static str)],
}

/// Answers a conversation, whatever API it came by.
pub(crate) async fn converse(
    api: &Api,
    call: Call,
    fields: ChatFields,
    writer: impl FnOnce(&Plan) -> Box<dyn Writer>,
) -> Result<Response, ApiError> {
    let ChatFields { answer, messages, format, tools, logprobs, top_logprobs } = fields;
    let target = resolve(api, &answer.model)?;
    let renamed = |error: ApiError| error.renamed(call.names);
    let tooling = Tooling::of(api.backend.as_ref(), tools, &messages).map_err(renamed)?;
    let grammar = tooling.grammar(api, format.as_ref()).await.map_err(renamed)?;
    let (prompt, notice) = prompt::of_chat(&api.backend, messages, tooling.told()).await.map_err(renamed)?;
    let plan = Plan {
        path: call.path,
        request_id: call.request_id,
        received: call.received,
        fields: answer,
        target,
        prompts: vec![prompt],
        params: Params { prompt: call.prompt_param, grammar: tooling.grammar_param() },
        logprobs: logprobs.then_some(top_logprobs),
        notice: notice.or_else(|| tooling.notice()),
        grammar,
        reading: tooling.reading(),
    };
    let writer = writer(&plan);
    respond(&api.backend, plan, writer).await.map_err(renamed)
}

/// The prompt of a conversation that nobody is to answer.
pub(crate) async fn render(api: &Api, messages: Vec<ChatMessage>, tools: Option<Tools>) -> Result<Vec<u32>, ApiError> {
    let tooling = Tooling::of(api.backend.as_ref(), tools, &messages)?;
    let (prompt, _) = prompt::of_chat(&api.backend, messages, tooling.told()).await?;
    Ok(prompt)
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
    let writer = completion_writer(&api, Kind::Text, &plan);
    respond(&api.backend, plan, writer).await
}

fn completion_writer(api: &Api, kind: Kind, plan: &Plan) -> Box<dyn Writer> {
    Box::new(CompletionWriter { backend: Arc::clone(&api.backend), shape: Shape::of(kind, plan) })
}

/// What requests may refer to; an error while the node is not ready.
pub(crate) fn limits(backend: &dyn Backend) -> Result<Limits, ApiError> {
    match backend.ready() {
        Readiness::Ready => {
            Ok(Limits { sampling: backend.sampling_defaults(), vocabulary: backend.tokenizer().vocab_size() })
        }
        other => Err(ApiError::not_ready(&other)),
    }
}

/// Looks a model's name up.
pub(crate) fn resolve(api: &Api, name: &str) -> Result<model_name::Target, ApiError> {
    model_name::resolve(name, &api.backend.models(), api.options.default_alias.as_deref())
}
