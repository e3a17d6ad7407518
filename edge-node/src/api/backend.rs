//! What the API needs of an edge node. The node implements it; tests of the API's shape replay
//! recorded tokens through it.

use std::fmt;

use futures::future::BoxFuture;
use serde_json::Value;
use tandem_engine::chat::ChatTemplate;
use tandem_engine::constraint::Constraints;
use tandem_engine::tokenizer::Tokenizer;
use tandem_proto::message::SamplingParams;
use tokio::sync::oneshot;

use crate::admission::{Slot, Slots};
use crate::request::{Controls, GenerateError, GenerateRequest, Generation, Mode, NodeStatus, Scored};

/// A node that answers prompts. Calls but [`Backend::admit`] return at once; work happens behind
/// [`Generation`].
pub trait Backend: Send + Sync + 'static {
    /// Slots for `answers` answers, when it is this request's turn; an error if that takes too long.
    fn admit(&self, answers: usize) -> BoxFuture<'_, Result<Slots, GenerateError>>;

    /// Begins an answer that was admitted.
    ///
    /// # Errors
    /// Says why the request cannot be served; nothing was started then.
    fn submit(&self, request: GenerateRequest, slot: Slot) -> Result<Generation, GenerateError>;

    /// Scores the tokens of a prompt but the first on the edge's model, each with so many alternatives.
    ///
    /// # Errors
    /// Says why the prompt cannot be scored; nothing was started then.
    fn score(
        &self,
        prompt: Vec<u32>,
        alternatives: u32,
    ) -> Result<oneshot::Receiver<Result<Vec<Scored>, GenerateError>>, GenerateError>;

    /// The embedding of a text's tokens by the device's model: the hidden state of the last token after the
    /// final norm, of length 1.
    fn embed(&self, tokens: Vec<u32>) -> BoxFuture<'static, Result<Vec<f32>, GenerateError>>;

    /// What the node is doing.
    fn status(&self) -> NodeStatus;

    /// Changes the operator's controls and returns the status after it.
    ///
    /// # Errors
    /// Names the control that is out of range; nothing was changed then.
    fn set_controls(&self, controls: Controls) -> Result<NodeStatus, ControlsError>;

    /// Tokenizer of the model pair; called only while [`Backend::ready`] is [`Readiness::Ready`].
    fn tokenizer(&self) -> &Tokenizer;

    /// Tokens that end an answer; called only while ready.
    fn stop_tokens(&self) -> Vec<u32>;

    /// Grammars over the tokenizer's tokens; called only while ready.
    fn constraints(&self) -> &Constraints;

    /// Chat template of the model pair; called only while ready.
    fn chat_template(&self) -> &ChatTemplate;

    /// Longest prompt plus answer, tokens.
    fn context_tokens(&self) -> usize;

    /// The loaded models by their own names. `tandem` and the names with a mode's suffix are the
    /// API's doing and are not in the list.
    fn models(&self) -> Vec<ModelEntry>;

    /// Whether requests can be served.
    fn ready(&self) -> Readiness;

    /// Why each token of an answer stayed or went: of the answer with this request id, or of the
    /// last one. `None` if it is not (or no longer) known.
    fn explain(&self, id: Option<&str>) -> Option<Value>;

    /// All metrics in the Prometheus text format.
    fn render_metrics(&self) -> String;

    /// Sampling used where a request says nothing, from the model's `generation_config.json`.
    /// The embedded pair has `do_sample: false`, hence greedy, unlike OpenAI's temperature 1.
    fn sampling_defaults(&self) -> SamplingParams {
        SamplingParams::default()
    }

    /// True if what a schema leaves open is kept short, for a model that goes on until its context is full.
    fn short_json(&self) -> bool {
        false
    }
}

/// One loaded model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ModelEntry {
    /// Name, e.g. `demo-edge`.
    pub id: String,
    /// Seconds since the Unix epoch.
    pub created: u64,
    /// Who made it or where it comes from.
    pub owned_by: String,
    /// Mode of requests that give this name without a suffix; `None` for the node's default.
    pub mode: Option<Mode>,
}

/// Whether requests can be served.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Readiness {
    /// Models are being loaded; says what is under way.
    Loading(String),
    /// Requests are served.
    Ready,
    /// The node is shutting down and finishes what it has.
    Draining,
    /// Loading failed; says why.
    Failed(String),
}

impl fmt::Display for Readiness {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Loading(what) => write!(f, "the node is loading: {what}; retry soon"),
            Self::Ready => f.write_str("the node is ready"),
            Self::Draining => f.write_str("the node is shutting down; send the request to another"),
            Self::Failed(why) => write!(f, "the node could not load its models: {why}"),
        }
    }
}

/// Why controls are refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ControlsError {
    /// A value is not acceptable.
    #[error("{message}")]
    Invalid {
        /// Field of [`Controls`].
        param: &'static str,
        /// What is wrong and what would be right.
        message: String,
    },
}
