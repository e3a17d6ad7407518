//! `POST /v1/chat/completions` and `POST /v1/completions`.

use std::sync::Arc;
use std::time::Instant;

use axum::Extension;
use axum::extract::{Request, State};
use axum::response::Response;
use serde_json::Map;
use tandem_engine::constraint::Compiled;

use super::answer_fields::Limits;
use super::backend::{Backend, Readiness};
use super::body::Weight;
use super::chat_fields::ChatFields;
use super::completion_fields::CompletionFields;
use super::completion_writer::CompletionWriter;
use super::error::{ApiError, Params};
use super::grammar::Format;
use super::messages::ChatMessage;
use super::reply::{Kind, Shape};
use super::request_id::RequestId;
use super::respond::{Plan, respond};
use super::tooling::Tooling;
use super::tools::Tools;
use super::writer::Writer;
use super::{Api, echo, grammar, model_name, prompt, short_json};
use crate::admission::Slots;

/// Chat completions.
pub(crate) async fn chat(
    State(api): State<Arc<Api>>,
    Extension(request_id): Extension<RequestId>,
    request: Request,
) -> Result<Response, ApiError> {
    let received = Instant::now();
    let (fields, weight) = read(&api, request, ChatFields::parse).await?;
    let call =
        Call { path: "/v1/chat/completions", request_id, received, prompt_param: "messages", names: &[], weight };
    converse(&api, call, fields, |plan| completion_writer(&api, Kind::Chat, plan)).await
}

/// The body of a request, taken apart by `parse`, with its share of the room for large ones.
pub(crate) async fn read<T: Send + 'static>(
    api: &Api,
    request: Request,
    parse: impl FnOnce(&[u8], &Limits) -> Result<T, ApiError> + Send + 'static,
) -> Result<(T, Weight), ApiError> {
    let limits = limits(api.backend.as_ref())?;
    let body = api.heavy.read_json(request).await?;
    body.parse(&api.heavy, move |body| parse(body, &limits)).await
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
    /// Share of the room for large bodies.
    pub(crate) weight: Weight,
}

/// Answers a conversation, whatever API it came by.
pub(crate) async fn converse(
    api: &Api,
    call: Call,
    fields: ChatFields,
    writer: impl FnOnce(&Plan) -> Box<dyn Writer>,
) -> Result<Response, ApiError> {
    let ChatFields { answer, messages, format, tools, variables, tokens_min, logprobs, top_logprobs } = fields;
    let target = resolve(api, answer.model.as_deref())?;
    let renamed = |error: ApiError| error.renamed(call.names);
    let short = api.backend.short_json();
    let (format, tools) = match (format, tools) {
        (format, tools) if short => (format.map(Format::bounded), tools.map(Tools::bounded)),
        as_given => as_given,
    };
    let tooling = Tooling::of(api.backend.as_ref(), tools);
    let text = prompt::of_chat(api, messages, tooling.told(), variables, call.prompt_param).await.map_err(renamed)?;
    let weight = call.weight.at_most(text.bytes());
    let slots = admit(api, answer.n).await?;
    let (notice, thinks) = (text.notice, text.thinks);
    let grammar = tooling.grammar(api, format.as_ref(), thinks).await.map_err(renamed)?;
    let shortened = (short && grammar.is_some()).then_some(short_json::NOTICE);
    let grammar = with_tokens_min(api, grammar, tokens_min).await?;
    let ids = text.tokenize(api).await.map_err(renamed)?;
    drop(weight);
    let plan = Plan {
        path: call.path,
        request_id: call.request_id,
        received: call.received,
        fields: answer,
        target,
        prompts: vec![ids],
        params: Params { prompt: call.prompt_param, grammar: tooling.grammar_param() },
        logprobs: logprobs.then_some(top_logprobs),
        notice: notice.or_else(|| tooling.notice()).or(shortened),
        grammar,
        reading: Some(tooling.reading(thinks)),
        legacy: tooling.is_legacy(),
        unanswered: false,
    };
    let writer = writer(&plan);
    respond(&api.backend, slots, plan, writer).await.map_err(renamed)
}

/// The prompt of a conversation, without an answer (`/tokenize`).
pub(crate) async fn render(api: &Api, messages: Vec<ChatMessage>, tools: Option<Tools>) -> Result<Vec<u32>, ApiError> {
    let tooling = Tooling::of(api.backend.as_ref(), tools);
    prompt::of_chat(api, messages, tooling.told(), Map::new(), "messages").await?.tokenize(api).await
}

/// Text completions.
pub(crate) async fn completions(
    State(api): State<Arc<Api>>,
    Extension(request_id): Extension<RequestId>,
    request: Request,
) -> Result<Response, ApiError> {
    let received = Instant::now();
    let (fields, weight) = read(&api, request, CompletionFields::parse).await?;
    let CompletionFields { answer, prompts, tokens_min, logprobs, echo } = fields;
    let target = resolve(&api, answer.model.as_deref())?;
    let prompts = prompt::may_fit_all(&api, prompts).await?;
    let weight = weight.at_most(prompt::bytes(&prompts));
    let slots = admit(&api, prompts.len() * answer.n).await?;
    let prompts = prompt::of_texts(&api, prompts).await?;
    drop(weight);
    let grammar = with_tokens_min(&api, None, tokens_min).await?;
    let plan = Plan {
        path: "/v1/completions",
        request_id,
        received,
        fields: answer,
        target,
        prompts,
        params: Params { prompt: "prompt", grammar: "min_tokens" },
        logprobs,
        notice: None,
        grammar,
        reading: None,
        legacy: false,
        unanswered: echo.is_some_and(|echo| echo.alone),
    };
    let mut shape = Shape::of(Kind::Text, &plan);
    if echo.is_some() {
        shape.echoed = echo::of_prompts(&api.backend, &plan).await?;
    }
    respond(&api.backend, slots, plan, Box::new(CompletionWriter::new(Arc::clone(&api.backend), shape))).await
}

/// Slots for the answers of a request, when it is its turn.
async fn admit(api: &Api, answers: usize) -> Result<Slots, ApiError> {
    let nothing = Params { prompt: "", grammar: "" };
    api.backend.admit(answers).await.map_err(|error| ApiError::from_generation(&error, nothing))
}

fn completion_writer(api: &Api, kind: Kind, plan: &Plan) -> Box<dyn Writer> {
    Box::new(CompletionWriter::new(Arc::clone(&api.backend), Shape::of(kind, plan)))
}

/// What requests may refer to; an error while the node is not ready.
pub(crate) fn limits(backend: &dyn Backend) -> Result<Limits, ApiError> {
    match backend.ready() {
        Readiness::Ready => Ok(Limits {
            sampling: backend.sampling_defaults(),
            vocabulary: backend.tokenizer().vocab_size(),
            stop_tokens: backend.stop_tokens(),
            threshold_max: backend.status().threshold_max,
        }),
        other => Err(ApiError::not_ready(&other)),
    }
}

/// The model that a request names, or the one that is to answer where it names none.
pub(crate) fn resolve(api: &Api, name: Option<&str>) -> Result<model_name::Target, ApiError> {
    let (models, alias) = (api.backend.models(), api.options.default_alias.as_deref());
    match name.filter(|name| !model_name::is_placeholder(name, &models)) {
        Some(name) => model_name::resolve(name, &models, alias),
        None => model_name::resolve(alias.unwrap_or(model_name::TANDEM), &models, None),
    }
}

/// The grammar of an answer that has at least so many tokens.
async fn with_tokens_min(
    api: &Api,
    grammar: Option<Arc<Compiled>>,
    tokens_min: usize,
) -> Result<Option<Arc<Compiled>>, ApiError> {
    const FIELD: &str = "min_tokens";
    match grammar {
        grammar if tokens_min == 0 => Ok(grammar),
        Some(_) => {
            let message = format!("`{FIELD}` cannot be held together with a schema or a forced call; give one");
            Err(ApiError::bad_request("unsupported_field", message).about(FIELD))
        }
        None => {
            let (vocabulary, ends) = (api.backend.tokenizer().vocab_size(), api.backend.stop_tokens());
            let longer = grammar::tokens_min(tokens_min, vocabulary, &ends);
            let compiled = api.turns.compile(&api.backend, longer).await?;
            compiled.map(Some).map_err(|e| grammar::refused(&e, FIELD))
        }
    }
}
