//! From a checked request to a response: begin the choices, then send them whole or as a stream.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use axum::http::{HeaderMap, HeaderName, HeaderValue, header};
use axum::response::sse::{Event as SseEvent, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use futures::stream::{Stream, unfold};
use tandem_engine::constraint::Compiled;

use super::answer_fields::AnswerFields;
use super::answers::{Answers, Update};
use super::backend::Backend;
use super::error::{ApiError, Params};
use super::meter::Meter;
use super::model_name::Target;
use super::pieces::{Piece, WrittenToken};
use super::reading::{Reader, Reading, Said};
use super::reply::{Body, Kind, Shape, finish_word};
use super::request_id::{RequestId, random_u64};
use crate::request::{FinishReason, GenerateError, GenerateRequest, Mode, NodeStatus, RouteSummary};

/// Silence after which a stream sends a comment, so that proxies keep it open, seconds.
const KEEP_ALIVE_S: u64 = 10;

/// Mode that answers the request.
pub(crate) const MODE_HEADER: &str = "x-tandem-mode";
/// Where the mode comes from: `model` (the name), `request` (`tandem.mode`), `default`, or
/// `tokenizers-differ` where the default needs a cloud that cannot take part.
const REASON_HEADER: &str = "x-tandem-reason";
/// Policy in use.
const POLICY_HEADER: &str = "x-tandem-policy";
/// Why the cloud is missing, if that is known before the first byte.
const DEGRADED_HEADER: &str = "x-tandem-degraded";
/// Something about the prompt that the caller should know.
const NOTICE_HEADER: &str = "x-tandem-notice";

/// A request ready to run.
pub(crate) struct Plan {
    pub(crate) kind: Kind,
    /// Path, for metrics.
    pub(crate) path: &'static str,
    pub(crate) request_id: RequestId,
    pub(crate) received: Instant,
    pub(crate) fields: AnswerFields,
    pub(crate) target: Target,
    /// Token ids of each prompt.
    pub(crate) prompts: Vec<Vec<u32>>,
    /// Field that holds the prompt.
    pub(crate) params: Params,
    /// Log probabilities with this many alternatives.
    pub(crate) logprobs: Option<u32>,
    /// For [`NOTICE_HEADER`].
    pub(crate) notice: Option<&'static str>,
    /// What the answer must follow.
    pub(crate) grammar: Option<Arc<Compiled>>,
    /// How the answer is read, if it may be more than text.
    pub(crate) reading: Option<Reading>,
}

/// Runs the request.
pub(crate) async fn respond(backend: &Arc<dyn Backend>, plan: Plan) -> Result<Response, ApiError> {
    let status = backend.status();
    let (mode, reason) = choose_mode(&plan, &status)?;
    let params = plan.params;
    let requests =
        requests(backend.as_ref(), &plan, mode).map_err(|error| ApiError::from_generation(&error, params))?;
    let prompt_tokens = plan.prompts.iter().map(|prompt| prompt.len() as u64).sum();
    let meter = Meter::new(plan.path, mode, plan.received);
    let spelt = plan.reading.as_ref().map(|reading| reading.syntax.special_tokens(backend.tokenizer()));
    let spelt = spelt.unwrap_or_default();
    let answers = Answers::begin(Arc::clone(backend), requests, &plan.fields.stop, spelt, prompt_tokens, meter)
        .map_err(|error| ApiError::from_generation(&error, params))?;

    let mut headers = HeaderMap::new();
    set(&mut headers, MODE_HEADER, mode.name());
    set(&mut headers, REASON_HEADER, reason);
    set(&mut headers, POLICY_HEADER, &status.policy);
    if let Some(notice) = plan.notice {
        set(&mut headers, NOTICE_HEADER, notice);
    }
    if mode != Mode::Local && !status.cloud_connected {
        set(&mut headers, DEGRADED_HEADER, if status.cut { "cut" } else { "cloud-away" });
    }
    let shape = shape(&plan);
    if plan.fields.stream {
        // nginx buffers streams unless told not to.
        set(&mut headers, "x-accel-buffering", "no");
        let keep_alive = KeepAlive::new().interval(Duration::from_secs(KEEP_ALIVE_S));
        let id = plan.request_id;
        let sse = Sse::new(stream(Arc::clone(backend), answers, shape, params, id)).keep_alive(keep_alive);
        return Ok((headers, sse).into_response());
    }
    let (body, route) = whole(backend.as_ref(), answers, &shape, params).await?;
    if route.degraded {
        set(&mut headers, DEGRADED_HEADER, route.degraded_reason.as_deref().unwrap_or("cloud-away"));
    }
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    Ok((headers, body).into_response())
}

/// The mode of the request and where it comes from. A mode in the model's name is a promise that
/// `tandem.mode` cannot loosen.
fn choose_mode(plan: &Plan, status: &NodeStatus) -> Result<(Mode, &'static str), ApiError> {
    match (plan.target.mode, plan.fields.mode) {
        (Some(named), Some(asked)) if named != asked => {
            let message = format!(
                "`tandem.mode` is `{}`, but the model's name asks for `{}`; give one of the two",
                asked.name(),
                named.name()
            );
            Err(ApiError::invalid("tandem.mode", message))
        }
        (Some(named), _) => Ok((named, "model")),
        (None, Some(asked)) => Ok((asked, "request")),
        // Nobody promised a cloud: the device answers alone rather than not at all.
        (None, None) if status.cloud_problem.is_some() => Ok((Mode::Local, "tokenizers-differ")),
        (None, None) => Ok((status.default_mode, "default")),
    }
}

/// One request to the node per choice: prompt by prompt, `n` of each.
fn requests(backend: &dyn Backend, plan: &Plan, mode: Mode) -> Result<Vec<GenerateRequest>, GenerateError> {
    let context = backend.context_tokens();
    let fields = &plan.fields;
    let seed = fields.seed.unwrap_or_else(random_u64);
    let mut requests = Vec::with_capacity(plan.prompts.len() * fields.n);
    for prompt in &plan.prompts {
        if prompt.is_empty() {
            return Err(GenerateError::EmptyPrompt);
        }
        if prompt.len() >= context {
            return Err(GenerateError::TooLong { prompt: prompt.len(), context });
        }
        let room = context - prompt.len();
        for choice in 0..fields.n {
            let id = plan.request_id.as_str();
            let request_id = if requests.is_empty() { id.to_owned() } else { format!("{id}-{}", requests.len()) };
            let mut sampling = fields.sampling.clone();
            sampling.seed = choice_seed(seed, choice as u64);
            requests.push(GenerateRequest {
                request_id,
                prompt: prompt.clone(),
                mode,
                sampling,
                tokens_max: fields.tokens_max.map_or(room, |tokens| tokens.min(room)),
                threshold: fields.threshold,
                top_logprobs: plan.logprobs.unwrap_or(0),
                grammar: plan.grammar.clone(),
            });
        }
    }
    Ok(requests)
}

/// Seed of a choice: the request's own for the first, so that it does not depend on `n`, and
/// independent ones for the others (splitmix64, Steele et al. 2014).
fn choice_seed(seed: u64, choice: u64) -> u64 {
    if choice == 0 {
        return seed;
    }
    let mut z = seed.wrapping_add(choice.wrapping_mul(0x9e37_79b9_7f4a_7c15));
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

fn shape(plan: &Plan) -> Shape {
    let prefix = match plan.kind {
        Kind::Chat => "chatcmpl",
        Kind::Text => "cmpl",
    };
    Shape {
        kind: plan.kind,
        id: format!("{prefix}-{}", plan.request_id.as_str()),
        created: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs()),
        model: plan.target.name.clone(),
        logprobs: plan.logprobs.map(|top| top as usize),
        tokens: plan.fields.tokens,
        include_usage: plan.fields.include_usage,
        reading: plan.reading.clone(),
    }
}

/// Waits for every choice.
async fn whole(
    backend: &dyn Backend,
    mut answers: Answers,
    shape: &Shape,
    params: Params,
) -> Result<(Vec<u8>, RouteSummary), ApiError> {
    let mut parts: Vec<(Piece, FinishReason)> =
        (0..answers.len()).map(|_| (Piece::default(), FinishReason::Stop)).collect();
    while let Some(update) = answers.next().await {
        match update {
            Update::Piece { choice, piece } => {
                let all = &mut parts[choice].0;
                all.text.push_str(&piece.text);
                all.tokens.extend(piece.tokens);
            }
            Update::End { choice, finish, .. } => parts[choice].1 = finish,
            Update::Failed(error) => return Err(ApiError::from_generation(&error, params)),
        }
    }
    let usage = answers.usage();
    let route = usage.tandem.clone();
    let choice = |(index, (piece, finish)): (usize, (Piece, FinishReason))| {
        let Piece { text, tokens } = piece;
        let (said, called) = match &shape.reading {
            Some(reading) => {
                let mut reader = reading.begin();
                let mut said = reader.push(&text);
                said.extend(reader.finish());
                (said, reader.has_calls())
            }
            None => (vec![Said::Content(text)], false),
        };
        shape.whole_choice(index, said, &tokens, finish_word(finish, called), backend.tokenizer())
    };
    let body = shape.whole(parts.into_iter().enumerate().map(choice).collect(), usage);
    Ok((encode(&body)?, route))
}

/// What a stream needs from one event to the next.
struct Streaming {
    backend: Arc<dyn Backend>,
    answers: Answers,
    shape: Shape,
    params: Params,
    /// Readers of the answers that may be more than text, by choice.
    readers: Vec<Reader>,
    ready: VecDeque<String>,
    over: bool,
    /// Keeps the id in use until the stream ends.
    _request_id: RequestId,
}

fn stream(
    backend: Arc<dyn Backend>,
    answers: Answers,
    shape: Shape,
    params: Params,
    request_id: RequestId,
) -> impl Stream<Item = Result<SseEvent, Infallible>> {
    let mut ready = VecDeque::new();
    let mut over = false;
    for body in (0..answers.len()).filter_map(|index| shape.role_chunk(index)) {
        over |= !push(&mut ready, &body);
    }
    let readers = match &shape.reading {
        Some(reading) => (0..answers.len()).map(|_| reading.begin()).collect(),
        None => Vec::new(),
    };
    let state = Streaming { backend, answers, shape, readers, params, ready, over, _request_id: request_id };
    unfold(state, |mut state| async move {
        loop {
            if let Some(data) = state.ready.pop_front() {
                return Some((Ok(SseEvent::default().data(data)), state));
            }
            if state.over {
                return None;
            }
            let update = state.answers.next().await;
            state.take(update);
        }
    })
}

impl Streaming {
    /// Makes chunks of an update.
    fn take(&mut self, update: Option<Update>) {
        let fine = match update {
            Some(Update::Piece { choice, piece }) => {
                let Piece { text, tokens } = piece;
                let said = match self.readers.get_mut(choice) {
                    Some(reader) => reader.push(&text),
                    None => vec![Said::Content(text)],
                };
                self.say(choice, said, &tokens)
            }
            Some(Update::End { choice, finish, route }) => {
                let (rest, called) = match self.readers.get_mut(choice) {
                    Some(reader) => (reader.finish(), reader.has_calls()),
                    None => (Vec::new(), false),
                };
                self.say(choice, rest, &[])
                    && push(&mut self.ready, &self.shape.finish_chunk(choice, finish_word(finish, called), route))
            }
            Some(Update::Failed(error)) => {
                let error = ApiError::from_generation(&error, self.params);
                self.ready.push_back(error.body().to_string());
                false
            }
            None => {
                if self.shape.include_usage {
                    push(&mut self.ready, &self.shape.usage_chunk(self.answers.usage()));
                }
                self.ready.push_back("[DONE]".to_owned());
                false
            }
        };
        self.over |= !fine;
    }
}

impl Streaming {
    /// Queues a chunk with what a choice says, unless it says nothing.
    fn say(&mut self, choice: usize, said: Vec<Said>, tokens: &[WrittenToken]) -> bool {
        let silent = said.iter().all(|s| matches!(s, Said::Content(text) if text.is_empty()));
        if silent && (tokens.is_empty() || !self.shape.reports_tokens()) {
            return true;
        }
        push(&mut self.ready, &self.shape.piece_chunk(choice, said, tokens, self.backend.tokenizer()))
    }
}

/// Queues a chunk; false if it could not be encoded, after queueing the error instead.
fn push(ready: &mut VecDeque<String>, body: &Body<'_>) -> bool {
    match serde_json::to_string(body) {
        Ok(data) => {
            ready.push_back(data);
            true
        }
        Err(error) => {
            ready.push_back(encoding_failed(&error).body().to_string());
            false
        }
    }
}

fn encode(body: &Body<'_>) -> Result<Vec<u8>, ApiError> {
    serde_json::to_vec(body).map_err(|error| encoding_failed(&error))
}

fn encoding_failed(error: &serde_json::Error) -> ApiError {
    ApiError::internal(format!("the answer could not be encoded: {error}"))
}

/// Sets a header; characters that headers cannot hold become `?`.
fn set(headers: &mut HeaderMap, name: &'static str, value: &str) {
    let clean: String = value.chars().map(|c| if c == ' ' || c.is_ascii_graphic() { c } else { '?' }).collect();
    if let Ok(value) = HeaderValue::from_str(&clean) {
        headers.insert(HeaderName::from_static(name), value);
    }
}
