//! Settings of a cloud node.

use serde::{Deserialize, Serialize};
use tandem_router::exchange::Exchange;

use crate::admission::Bounds;

/// Settings of a cloud node.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct CloudSettings {
    /// Name of the node, unique in the fleet.
    pub name: String,
    /// Name of the model as sessions ask for it.
    pub model: String,
    /// Most leading layers whose hidden states and KV may come from an edge; unset for as many as are equal in both
    /// models, 0 for none.
    pub trunk_layers: Option<usize>,
    /// URLs of engines that run the model instead of this process, such as `["http://gpu-1:8000"]`; of several,
    /// all serve the same model. `cloud.model` is then the name that sessions ask for.
    pub upstream: Vec<String>,
    /// Whose tokenizer the upstream has: a GGUF file, a folder with `tokenizer.json`, or a name in the store.
    pub upstream_tokenizer: String,
    /// Bearer key that the upstream wants.
    pub upstream_key: Option<String>,
    /// Bounds of the node.
    pub bounds: Bounds,
    /// Most rows of a forward pass.
    pub batch_rows_max: usize,
    /// Most sequences of a forward pass.
    pub batch_sequences_max: usize,
    /// Most rows of one prompt in a pass.
    pub prefill_chunk: usize,
    /// Pull the trunk's KV from the edge when the cloud decodes by itself.
    pub pull_trunk: Exchange,
}

impl Default for CloudSettings {
    fn default() -> Self {
        Self {
            name: "cloud-1".into(),
            model: "demo-cloud".into(),
            trunk_layers: None,
            upstream: Vec::new(),
            upstream_tokenizer: String::new(),
            upstream_key: None,
            bounds: Bounds::default(),
            batch_rows_max: 256,
            batch_sequences_max: 64,
            prefill_chunk: 128,
            pull_trunk: Exchange::Auto,
        }
    }
}
