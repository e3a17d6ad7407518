//! What a front end (API, command line, lab) asks of an edge node and what it gets back.

use std::borrow::Cow;
use std::fmt;
use std::future::poll_fn;
use std::sync::Arc;
use std::task::{Context, Poll};

use serde::{Deserialize, Serialize};
use tandem_engine::constraint::Compiled;
use tandem_proto::message::{Alternative, SamplingParams};
use tokio::sync::{mpsc, oneshot};

use crate::diagnosis::CloudState;

/// Who may write the answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, Default, schemars::JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// The edge model alone; nothing leaves the device.
    Local,
    /// Edge tokens where the edge is sure, cloud tokens where it is not.
    #[default]
    Auto,
    /// Token for token what the cloud model alone would have written.
    Exact,
    /// The cloud writes, the edge streams.
    Cloud,
}

impl Mode {
    /// Name as used in model suffixes and headers.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Local => "local",
            Self::Auto => "auto",
            Self::Exact => "exact",
            Self::Cloud => "cloud",
        }
    }

    /// The mode called `name`.
    #[must_use]
    pub fn parse(name: &str) -> Option<Self> {
        [Self::Local, Self::Auto, Self::Exact, Self::Cloud].into_iter().find(|m| m.name() == name)
    }
}

/// One answer to generate.
#[derive(Clone, Debug)]
pub struct GenerateRequest {
    /// Id shown in headers and in the logs of both sides.
    pub request_id: String,
    /// Prompt token ids.
    pub prompt: Vec<u32>,
    /// Who may write.
    pub mode: Mode,
    /// Sampling parameters, the seed included.
    pub sampling: SamplingParams,
    /// Most tokens of the answer.
    pub tokens_max: usize,
    /// Replaces the policy's threshold on the risk for this request (`auto` only), 0 … 1.
    pub threshold: Option<f32>,
    /// Alternatives to report per token.
    pub top_logprobs: u32,
    /// The grammar that the answer must follow.
    pub grammar: Option<Arc<Compiled>>,
}

/// A token of a prompt, as the edge's model sees it after the tokens before it.
#[derive(Clone, Debug, PartialEq)]
pub struct Scored {
    /// Natural log of its probability.
    pub logprob: f32,
    /// Alternatives, likeliest first, if asked for.
    pub alternatives: Vec<Alternative>,
}

/// Whose decision a token is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Origin {
    /// Written by the edge model, never judged by the cloud before it was sent.
    Edge,
    /// Drafted by the edge, judged and accepted by the cloud before it was sent.
    Verified,
    /// Chosen by the cloud model.
    Cloud,
}

/// One token of an answer. Indices run 0..n, once each, whatever fails on the way.
#[derive(Clone, Debug, Serialize)]
pub struct TokenEvent {
    /// Index in the answer.
    pub index: u32,
    /// Token id.
    pub id: u32,
    /// Whose decision it is.
    pub origin: Origin,
    /// Natural log of its probability under the model that decided.
    pub logprob: f32,
    /// Probability the edge model gave its own first choice; absent in `cloud` mode.
    pub edge_top1: Option<f32>,
    /// Entropy of the edge model's distribution, nats.
    pub edge_entropy: Option<f32>,
    /// Score of the policy: for the fitted rule a probability, see `tandem_router::policy::Predicts`.
    pub risk: Option<f32>,
    /// Why it was decided there, e.g. `risk`, `sure`, `exact`, `cloud-away`.
    pub reason: &'static str,
    /// Alternatives, if asked for.
    #[serde(skip)]
    pub alternatives: Vec<Alternative>,
}

/// Why an answer ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum FinishReason {
    /// The model ended it.
    Stop,
    /// `tokens_max` or the context length was reached.
    Length,
}

/// What an answer took.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct RouteSummary {
    /// Tokens written by the edge alone.
    pub edge_tokens: u32,
    /// Tokens drafted by the edge and accepted by the cloud.
    pub accepted: u32,
    /// Tokens chosen by the cloud.
    pub cloud_tokens: u32,
    /// Times the answer asked the cloud and got a verdict or a span of tokens.
    pub round_trips: u32,
    /// Bytes sent to the cloud, frames with headers.
    pub bytes_up: u64,
    /// Bytes received from the cloud.
    pub bytes_down: u64,
    /// Drafts thrown away after a rejection.
    pub rolled_back: u32,
    /// Tokens of the prompt that were not computed for this answer, as the model that began it held their
    /// state from earlier ones.
    #[serde(default)]
    pub cached_tokens: u32,
    /// Tokens that became final and were not read: past a stop string, or of a client that left. The
    /// counts above are of the others.
    #[serde(default)]
    pub discarded: u32,
    /// What the choices of the cloud that took part may be relied upon for: `bitwise`, `up_to_ties`
    /// ([`tandem_proto::message::Exactness`]), or `none` if the edge finished without it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exact: Option<Cow<'static, str>>,
    /// True if the cloud was wanted and not to be had for part of the answer.
    pub degraded: bool,
    /// Why, if so.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub degraded_reason: Option<String>,
}

impl RouteSummary {
    /// Adds another answer's counts.
    pub fn add(&mut self, other: &Self) {
        self.edge_tokens += other.edge_tokens;
        self.accepted += other.accepted;
        self.cloud_tokens += other.cloud_tokens;
        self.round_trips += other.round_trips;
        self.bytes_up += other.bytes_up;
        self.bytes_down += other.bytes_down;
        self.rolled_back += other.rolled_back;
        self.cached_tokens += other.cached_tokens;
        self.discarded += other.discarded;
        // The weakest promise holds for all.
        let weight = |exact: &str| ["bitwise", "up_to_ties", "none"].iter().position(|name| *name == exact);
        if other.exact.as_deref().map(weight) > self.exact.as_deref().map(weight) {
            self.exact.clone_from(&other.exact);
        }
        self.degraded |= other.degraded;
        if self.degraded_reason.is_none() {
            self.degraded_reason.clone_from(&other.degraded_reason);
        }
    }

    /// Share of tokens that the cloud decided, 0 … 1: its own and those it judged.
    #[must_use]
    pub fn cloud_share(&self) -> f64 {
        let decided = f64::from(self.accepted) + f64::from(self.cloud_tokens);
        decided / (decided + f64::from(self.edge_tokens)).max(1.0)
    }
}

/// The end of an answer.
#[derive(Clone, Debug)]
pub struct Done {
    /// Why it ended.
    pub finish: FinishReason,
    /// What it took.
    pub route: RouteSummary,
}

/// What happens while an answer is generated.
#[derive(Clone, Debug)]
pub enum Event {
    /// The next token.
    Token(TokenEvent),
    /// The end; nothing follows.
    Done(Done),
    /// Generation failed; nothing follows.
    Failed(GenerateError),
}

/// Why a request is refused or fails.
#[derive(Clone, Debug, thiserror::Error)]
pub enum GenerateError {
    /// Too many requests are under way.
    #[error("the node is at its limit of {limit} requests; retry after {retry_after_ms} ms")]
    Busy {
        /// The bound.
        limit: usize,
        /// When to try again.
        retry_after_ms: u64,
    },
    /// One request wants more answers than may be under way.
    #[error("{answers} answers of one request are more than the node's limit of {limit} (`edge.requests_max`)")]
    TooManyAnswers {
        /// Wanted.
        answers: usize,
        /// The bound.
        limit: usize,
    },
    /// The prompt does not fit.
    #[error("the prompt has {prompt} tokens, the model's context is {context}; shorten the prompt")]
    TooLong {
        /// Tokens of the prompt.
        prompt: usize,
        /// The model's context length.
        context: usize,
    },
    /// The model has no embedding for a token that its tokenizer makes of the prompt.
    #[error(
        "token {token} (`{text}`) of the prompt is past the model's {vocabulary} embeddings: its tokenizer was given tokens that its weights do not have; leave that text out"
    )]
    UnknownToken {
        /// The token.
        token: u32,
        /// As the vocabulary spells it.
        text: String,
        /// Rows of the embedding.
        vocabulary: usize,
    },
    /// The prompt is empty.
    #[error("the prompt is empty; give at least one token")]
    EmptyPrompt,
    /// `cloud` or `exact` was asked for on a node that has no cloud configured.
    #[error("mode `{0}` {no_cloud}", no_cloud = Self::NO_CLOUD)]
    NoCloud(&'static str),
    /// The cloud cannot use the grammar of the answer.
    #[error("{0}")]
    Grammar(String),
    /// The cloud's model has another tokenizer.
    #[error("mode `{mode}` is impossible here: {problem}")]
    ForeignCloud {
        /// The mode.
        mode: &'static str,
        /// Which models, and what to do.
        problem: String,
    },
    /// The node is shut down while it answers.
    #[error("the node is shutting down; ask again, or ask another node")]
    Closing,
    /// The model failed.
    #[error("generation failed: {0}")]
    Engine(String),
}

impl GenerateError {
    /// Why there is no other mode than `local` on a node without a cloud.
    pub(crate) const NO_CLOUD: &'static str = "needs a cloud node, and this node was started without one \
        (`up --no-cloud`, or `edge` with neither --cloud nor --router); use mode `local`, or start it with a cloud";
}

/// The events of an answer as its reader takes them: tokens in order, then [`Event::Done`] or
/// [`Event::Failed`]. Dropping it stops the work on the edge, on the wire and in the cloud.
pub struct Events {
    receiver: mpsc::Receiver<Event>,
    taken: usize,
    on_end: Option<Box<dyn FnOnce(usize) + Send>>,
}

impl Events {
    /// `on_end` gets the number of tokens taken, once the reader has the end of the answer or wants no more.
    pub fn new(receiver: mpsc::Receiver<Event>, on_end: impl FnOnce(usize) + Send + 'static) -> Self {
        Self { receiver, taken: 0, on_end: Some(Box::new(on_end)) }
    }

    /// The next event; `None` after the end.
    pub async fn recv(&mut self) -> Option<Event> {
        poll_fn(|cx| self.poll_recv(cx)).await
    }

    /// As [`Events::recv`], without waiting.
    pub fn poll_recv(&mut self, cx: &mut Context<'_>) -> Poll<Option<Event>> {
        let polled = self.receiver.poll_recv(cx);
        match &polled {
            Poll::Pending => {}
            Poll::Ready(Some(Event::Token(_))) => self.taken += 1,
            // Booked before the reader gets the end of the stream, as it may ask for the account at once.
            Poll::Ready(_) => self.end(),
        }
        polled
    }

    fn end(&mut self) {
        if let Some(on_end) = self.on_end.take() {
            on_end(self.taken);
        }
    }
}

impl Drop for Events {
    fn drop(&mut self) {
        self.end();
    }
}

impl fmt::Debug for Events {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Events").field("taken", &self.taken).finish_non_exhaustive()
    }
}

/// An answer under way. Dropping it stops the work.
#[derive(Debug)]
pub struct Generation {
    /// What happens.
    pub events: Events,
    /// What the answer took, once its work has wound down and the reader wants no more.
    pub route: oneshot::Receiver<RouteSummary>,
}

/// What the page's live strip and `tandem explain` show.
#[derive(Clone, Debug, Serialize, Deserialize, Default)]
pub struct NodeStatus {
    /// Name of the node.
    pub node: String,
    /// Edge model.
    pub edge_model: String,
    /// Cloud model, when a cloud node is connected.
    pub cloud_model: Option<String>,
    /// True while a cloud node is connected and not cut off.
    pub cloud_connected: bool,
    /// How the cloud stands, and what to do about it.
    #[serde(default)]
    pub cloud: CloudState,
    /// Why the cloud cannot take part, if it cannot, with what to do: the problem of `cloud` on one line.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cloud_problem: Option<String>,
    /// True while the operator has cut the cloud off.
    pub cut: bool,
    /// Smoothed round-trip time to the cloud, milliseconds.
    pub rtt_ms: Option<f64>,
    /// Goodput estimate of the link, bytes per second.
    pub goodput_bytes_per_s: Option<f64>,
    /// Threshold on the risk in use for `auto`, in the unit of `threshold_unit`; so are the one of the
    /// controls and that of the setting `edge.threshold`.
    pub threshold: f32,
    /// What the policy in use scores in: `probability`, or `nats` of the entropy baseline.
    #[serde(default)]
    pub threshold_unit: String,
    /// Largest threshold that makes sense.
    #[serde(default)]
    pub threshold_max: f32,
    /// Mode used when a request does not name one.
    pub default_mode: Mode,
    /// Policy in use, for the header `x-tandem-policy`.
    pub policy: String,
    /// Why that is not the configured policy: its parameters were fitted for another cloud model.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub policy_note: Option<String>,
    /// Leading layers that the edge and the cloud model have in common; 0 for none.
    pub trunk_layers: usize,
    /// Why there are none; none without a link as well.
    pub trunk_note: Option<String>,
    /// Requests under way.
    pub active_requests: usize,
    /// Totals since the node started.
    pub totals: RouteSummary,
    /// Answers ended since the node started, those whose client left included.
    pub answers: u64,
    /// Tokens per second over the last answer.
    pub tokens_per_s: Option<f64>,
}

/// Controls of the page and of `tandem config`; absent fields stay as they are.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Controls {
    /// Cut the cloud off (true) or let it back (false).
    pub cut: Option<bool>,
    /// Threshold on the risk for `auto`, from 0 to `threshold_max` of the status, in its unit.
    pub threshold: Option<f32>,
    /// Mode used when a request does not name one.
    pub default_mode: Option<Mode>,
}
