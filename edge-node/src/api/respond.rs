//! From a checked request to a response: begin the choices, then send them whole or as a stream.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::{Duration, Instant};

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
use super::reading::{Reader, Reading, Said, say};
use super::reply::Usage;
use super::request_id::{RequestId, random_u64};
use super::writer::{Ended, Frames, WholeChoice, Writer};
use crate::admission::Slots;
use crate::diagnosis::{LinkState, TOKENIZERS_DIFFER};
use crate::request::{FinishReason, GenerateError, GenerateRequest, Mode, NodeStatus, RouteSummary};

/// Silence after which a stream sends a comment, so that proxies keep it open, seconds.
const KEEP_ALIVE_S: u64 = 10;

/// Mode that answers the request.
pub(crate) const MODE_HEADER: &str = "x-tandem-mode";
/// Where the mode comes from: `model` (the name), `request` (`tandem.mode`), `default`, `no-cloud` where this
/// node has none by choice, or `tokenizers-differ` where the default needs a cloud that cannot take part.
const REASON_HEADER: &str = "x-tandem-reason";
/// Policy in use.
const POLICY_HEADER: &str = "x-tandem-policy";
/// Why the cloud is missing, if that is known before the first byte.
const DEGRADED_HEADER: &str = "x-tandem-degraded";
/// Something about the prompt that the caller should know.
const NOTICE_HEADER: &str = "x-tandem-notice";

/// A request ready to run.
pub(crate) struct Plan {
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
    /// The one call of an answer is a `function_call`.
    pub(crate) legacy: bool,
    /// Nothing is written: the prompts are all that is handed out.
    pub(crate) unanswered: bool,
}

/// Runs the request in the slots it has been given; `writer` writes what comes of it.
pub(crate) async fn respond(
    backend: &Arc<dyn Backend>,
    slots: Slots,
    plan: Plan,
    writer: Box<dyn Writer>,
) -> Result<Response, ApiError> {
    let status = backend.status();
    let (mode, reason) = choose_mode(&plan, &status)?;
    let params = plan.params;
    let mut requests =
        requests(backend.as_ref(), &plan, mode).map_err(|error| ApiError::from_generation(&error, params))?;
    let choices = requests.len();
    if plan.unanswered {
        requests.clear();
    }
    let prompt_tokens = plan.prompts.iter().map(|prompt| prompt.len() as u64).sum();
    let meter = Meter::new(plan.path, mode, plan.received);
    let spelt = plan.reading.as_ref().map(|reading| reading.special_tokens(backend.tokenizer()));
    let spelt = spelt.unwrap_or_default();
    // A plain text is continued; a conversation's next turn is a text of its own.
    let prompt = (prompt_tokens, plan.params.prompt == "prompt");
    let answers = Answers::begin(Arc::clone(backend), slots, requests, &plan.fields.stop, spelt, prompt, meter)
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
    let readers = Readers::new(plan.reading.as_ref(), choices);
    if plan.fields.stream {
        // nginx buffers streams unless told not to.
        set(&mut headers, "x-accel-buffering", "no");
        let mut keep_alive = KeepAlive::new().interval(Duration::from_secs(KEEP_ALIVE_S));
        if let Some(event) = writer.keep_alive() {
            keep_alive = keep_alive.event(event);
        }
        let stream = stream(answers, readers, writer, choices, params, plan.request_id);
        let sse = Sse::new(stream).keep_alive(keep_alive);
        return Ok((headers, sse).into_response());
    }
    let (body, route) = whole(answers, readers, writer, choices, params).await?;
    if route.degraded {
        set(&mut headers, DEGRADED_HEADER, route.degraded_reason.as_deref().unwrap_or("cloud-away"));
    }
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    Ok((headers, body).into_response())
}

/// The mode of the request and where it comes from. A mode in the model's name is a promise that
/// `tandem.mode` cannot loosen.
pub(crate) fn choose_mode(plan: &Plan, status: &NodeStatus) -> Result<(Mode, &'static str), ApiError> {
    let has_cloud = status.cloud.state != LinkState::None;
    match (plan.target.mode, plan.fields.mode) {
        (Some(named), Some(asked)) if named != asked => {
            let message = format!(
                "`tandem.mode` is `{}`, but the model's name asks for `{}`; give one of the two",
                asked.name(),
                named.name()
            );
            Err(ApiError::invalid("tandem.mode", message))
        }
        // "The edge where it is sure, the cloud where it is not" is the edge where there is no cloud by choice.
        (Some(Mode::Auto), _) | (None, Some(Mode::Auto)) if !has_cloud => Ok((Mode::Local, "no-cloud")),
        (Some(named), _) => Ok((named, "model")),
        (None, Some(asked)) => Ok((asked, "request")),
        // No mode that needs the cloud was asked for: the device answers alone rather than not at all.
        (None, None) if !has_cloud && status.default_mode != Mode::Local => Ok((Mode::Local, "no-cloud")),
        (None, None) if status.cloud.code.as_deref() == Some(TOKENIZERS_DIFFER) => {
            Ok((Mode::Local, "tokenizers-differ"))
        }
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

/// Reads the text of every choice as it comes.
struct Readers {
    /// By choice; none if the answers are text and nothing else.
    readers: Vec<Reader>,
    /// Tokens of pieces that are reasoning alone.
    reasoning_tokens: u64,
}

impl Readers {
    fn new(reading: Option<&Reading>, choices: usize) -> Self {
        let readers = reading.map(|reading| (0..choices).map(|_| reading.begin()).collect());
        Self { readers: readers.unwrap_or_default(), reasoning_tokens: 0 }
    }

    fn read(&mut self, choice: usize, piece: Piece) -> (Vec<Said>, Vec<WrittenToken>) {
        let Piece { text, tokens } = piece;
        let Some(reader) = self.readers.get_mut(choice) else { return (vec![Said::Content(text)], tokens) };
        let said = reader.push(&text);
        if !said.is_empty() && said.iter().all(|s| matches!(s, Said::Reasoning(_))) {
            self.reasoning_tokens += tokens.len() as u64;
        }
        (said, tokens)
    }

    /// What a choice says at its end, and whether it has a call.
    fn finish(&mut self, choice: usize, finish: FinishReason) -> (Vec<Said>, bool) {
        let Some(reader) = self.readers.get_mut(choice) else { return (Vec::new(), false) };
        (reader.finish(finish == FinishReason::Length), reader.has_calls())
    }
}

/// The end of a choice in which nothing is written.
fn unanswered() -> Ended {
    Ended { finish: FinishReason::Length, called: false, stop: None, route: RouteSummary::default() }
}

/// The usage so far.
fn usage(answers: &Answers, readers: &Readers) -> Usage {
    Usage { reasoning_tokens: readers.reasoning_tokens, ..answers.usage() }
}

/// Waits for every choice.
async fn whole(
    mut answers: Answers,
    mut readers: Readers,
    mut writer: Box<dyn Writer>,
    choices: usize,
    params: Params,
) -> Result<(Vec<u8>, RouteSummary), ApiError> {
    let unfinished = unanswered();
    let mut choices: Vec<WholeChoice> =
        (0..choices).map(|_| WholeChoice { said: Vec::new(), tokens: Vec::new(), ended: unfinished.clone() }).collect();
    while let Some(update) = answers.next().await {
        match update {
            Update::Piece { choice, piece } => {
                let (said, tokens) = readers.read(choice, piece);
                let all = &mut choices[choice];
                said.into_iter().for_each(|s| say(&mut all.said, s));
                all.tokens.extend(tokens);
            }
            Update::End { choice, finish, stop, route } => {
                let (rest, called) = readers.finish(choice, finish);
                let all = &mut choices[choice];
                rest.into_iter().for_each(|s| say(&mut all.said, s));
                all.ended = Ended { finish, called, stop, route };
            }
            Update::Failed(error) => return Err(ApiError::from_generation(&error, params)),
        }
    }
    let usage = usage(&answers, &readers);
    let route = usage.tandem.clone();
    Ok((writer.whole(choices, usage)?, route))
}

/// What a stream needs from one event to the next.
struct Streaming {
    answers: Answers,
    readers: Readers,
    writer: Box<dyn Writer>,
    params: Params,
    ready: Frames,
    over: bool,
    /// Keeps the id in use until the stream ends.
    _request_id: RequestId,
}

fn stream(
    answers: Answers,
    readers: Readers,
    mut writer: Box<dyn Writer>,
    choices: usize,
    params: Params,
    request_id: RequestId,
) -> impl Stream<Item = Result<SseEvent, Infallible>> {
    let mut ready = Frames::default();
    let mut begun = writer.begin(choices, &answers.usage(), &mut ready);
    if answers.len() == 0 {
        begun = begun.and_then(|()| (0..choices).try_for_each(|choice| writer.end(choice, unanswered(), &mut ready)));
    }
    let mut state = Streaming { answers, readers, writer, params, ready, over: false, _request_id: request_id };
    state.note(begun);
    unfold(state, |mut state| async move {
        loop {
            if let Some(event) = state.ready.pop() {
                return Some((Ok(event), state));
            }
            if state.over {
                return None;
            }
            let update = state.answers.next().await;
            let written = state.write(update);
            state.note(written);
        }
    })
}

impl Streaming {
    /// Makes events of an update.
    fn write(&mut self, update: Option<Update>) -> Result<(), ApiError> {
        match update {
            Some(Update::Piece { choice, piece }) => {
                let (said, tokens) = self.readers.read(choice, piece);
                self.writer.count(&usage(&self.answers, &self.readers));
                self.writer.say(choice, said, &tokens, &mut self.ready)
            }
            Some(Update::End { choice, finish, stop, route }) => {
                let (rest, called) = self.readers.finish(choice, finish);
                self.writer.say(choice, rest, &[], &mut self.ready)?;
                self.writer.end(choice, Ended { finish, called, stop, route }, &mut self.ready)
            }
            Some(Update::Failed(error)) => Err(ApiError::from_generation(&error, self.params)),
            None => {
                self.over = true;
                self.writer.close(usage(&self.answers, &self.readers), &mut self.ready)
            }
        }
    }

    /// An error is the last thing that a stream says.
    fn note(&mut self, written: Result<(), ApiError>) {
        if let Err(error) = written {
            self.over = true;
            self.writer.fail(&error, &mut self.ready);
        }
    }
}

/// Sets a header; characters that headers cannot hold become `?`.
fn set(headers: &mut HeaderMap, name: &'static str, value: &str) {
    let clean: String = value.chars().map(|c| if c == ' ' || c.is_ascii_graphic() { c } else { '?' }).collect();
    if let Ok(value) = HeaderValue::from_str(&clean) {
        headers.insert(HeaderName::from_static(name), value);
    }
}
