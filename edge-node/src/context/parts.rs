//! What a node is made of, and why it cannot start.

use std::path::PathBuf;
use std::sync::Arc;

use tandem_engine::Model;
use tandem_engine::chat::ChatTemplate;
use tandem_engine::runner::RunnerError;
use tandem_engine::tokenizer::Tokenizer;
use tandem_proto::message::SamplingParams;
use tandem_router::policy::{GoalError, Policy, PolicyFileError};
use tandem_transport::bulk::BulkInbox;

use crate::uplinks::Uplinks;

/// Why a node cannot start.
#[derive(Debug, thiserror::Error)]
pub enum EdgeError {
    /// The engine thread cannot start.
    #[error("the engine cannot start: {0}")]
    Runner(#[from] RunnerError),
    /// The policy's parameters were fitted for another edge model.
    #[error(transparent)]
    Policy(#[from] PolicyFileError),
    /// The settings ask for what the policy cannot give.
    #[error(transparent)]
    Goal(#[from] GoalError),
    /// No random numbers.
    #[error("the system gives no random numbers: {0}")]
    Random(String),
}

/// What a node is made of.
pub struct EdgeParts {
    /// The edge model.
    pub model: Arc<Model>,
    /// Its tokenizer.
    pub tokenizer: Tokenizer,
    /// Its chat template.
    pub chat: ChatTemplate,
    /// Token ids that end an answer.
    pub stop_tokens: Vec<u32>,
    /// Sampling where a request says nothing.
    pub sampling: SamplingParams,
    /// What a schema leaves open is kept short; unset, a model with a small context has it so.
    pub short_json: Option<bool>,
    /// When to ask the cloud.
    pub policy: Arc<dyn Policy>,
    /// The link to the cloud.
    pub uplinks: Uplinks,
    /// Blocks that arrive on it.
    pub bulk: BulkInbox,
    /// Key of the tenant's KV blocks, from the node's certificate.
    pub tenant_key: [u8; 32],
    /// Folder for KV blocks that the next start finds again; none are kept without one.
    pub kv_folder: Option<PathBuf>,
}
