//! Settings of an edge node.

use serde::{Deserialize, Serialize};
use tandem_engine::runner::batch::BatchBounds;
use tandem_router::exchange::Exchange;

use crate::pacing::ExactStrategy;
use crate::request::Mode;

/// Settings of an edge node.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct EdgeSettings {
    /// Name of the node, unique in the fleet.
    pub name: String,
    /// Name of the edge model.
    pub model: String,
    /// Name of the cloud model to ask for.
    pub cloud_model: String,
    /// Mode of requests that do not name one.
    pub default_mode: Mode,
    /// Most leading layers that are shared with the cloud model; unset for as many as are equal in both, 0 for none.
    pub trunk_layers: Option<usize>,
    /// Most requests under way.
    pub requests_max: usize,
    /// How long a request waits for its turn when as many are under way, before it is refused (429),
    /// milliseconds; 0 for not at all.
    pub queue_ms_max: u64,
    /// KV blocks of the node; 0 for what the requests can fill and the memory allows.
    pub kv_blocks: usize,
    /// Most memory for the KV state of prompts and answers that is kept for later requests which begin alike,
    /// MiB of the node's KV blocks; requests under way come first. 0 keeps none.
    pub prefix_cache_mib_max: u64,
    /// Most disk space in the state folder for the part of it that the next start of the node finds again, MiB: KV
    /// state and token ids of conversations, readable for the folder's owner only. 0 keeps none, and removes what
    /// there is.
    pub prefix_disk_mib_max: u64,
    /// Threshold on the risk in `auto`, in the policy's unit (a probability, or nats of the entropy
    /// baseline); the policy's own if absent.
    pub threshold: Option<f32>,
    /// Instead of a threshold: share of answers that may fall short of the cloud's, such as 0.1. Needs a
    /// rule fitted for the pair of models.
    pub quality: Option<f32>,
    /// Instead of a threshold: share of the tokens of all `auto` answers that the cloud decides, such as
    /// 0.05; the threshold follows it.
    pub cloud_share: Option<f32>,
    /// Most tokens of one `auto` answer that the cloud decides; no limit if absent.
    pub answer_cloud_tokens_max: Option<u32>,
    /// How `exact` answers are written.
    #[serde(deserialize_with = "ExactStrategy::of_setting")]
    pub exact: ExactStrategy,
    /// Most tokens drafted in `auto` while an answer of the cloud is awaited.
    pub speculate_tokens_max: usize,
    /// `auto` goes on alone when the cloud has not come to its question for this long beyond four round trips;
    /// while the cloud works on it, it waits.
    pub escalation_ms_max: u64,
    /// `exact` and `cloud` go on alone when no cloud has given a sign for this long beyond three round trips.
    pub reconnect_ms_max: u64,
    /// Send the trunk's hidden states with drafts, so that the cloud need not run the trunk.
    pub send_hidden: Exchange,
    /// Let the cloud prefill long prompts and fetch the trunk's state from there.
    pub fetch_prompt: Exchange,
    /// Answers kept for `explain`, as long as they take no more than 4 MiB.
    pub answers_kept: usize,
}

impl Default for EdgeSettings {
    fn default() -> Self {
        Self {
            name: "edge-1".into(),
            model: "demo-edge".into(),
            cloud_model: "demo-cloud".into(),
            default_mode: Mode::Auto,
            trunk_layers: None,
            requests_max: 32,
            queue_ms_max: 10_000,
            kv_blocks: 0,
            prefix_cache_mib_max: 512,
            prefix_disk_mib_max: 512,
            threshold: None,
            quality: None,
            cloud_share: None,
            answer_cloud_tokens_max: None,
            exact: ExactStrategy::Auto,
            speculate_tokens_max: 64,
            escalation_ms_max: 1500,
            reconnect_ms_max: 2000,
            send_hidden: Exchange::Auto,
            fetch_prompt: Exchange::Auto,
            answers_kept: 64,
        }
    }
}

impl EdgeSettings {
    pub(crate) fn batch(&self) -> BatchBounds {
        BatchBounds { rows_max: 256, sequences_max: self.requests_max.max(1), prefill_chunk: 128, prefill_reserve: 32 }
    }
}
