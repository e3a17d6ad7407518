//! The node as the API sees it: present from the first moment, ready once its models are loaded.

use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use futures::future::BoxFuture;
use metrics_exporter_prometheus::PrometheusHandle;
use serde_json::Value;
use tandem_engine::chat::ChatTemplate;
use tandem_engine::constraint::Constraints;
use tandem_engine::tokenizer::Tokenizer;
use tandem_proto::message::SamplingParams;
use tokio::sync::oneshot;

use crate::admission::{Slot, Slots};
use crate::api::{Backend, ControlsError, ModelEntry, Readiness};
use crate::node::EdgeNode;
use crate::request::{Controls, GenerateError, GenerateRequest, Generation, NodeStatus, Scored};

/// A node that may still be loading. The API is up at once and says so.
pub struct NodeBackend {
    node: OnceLock<EdgeNode>,
    state: Mutex<Readiness>,
    metrics: Option<PrometheusHandle>,
    created: u64,
}

impl NodeBackend {
    /// A backend whose node is being loaded. `metrics` renders what the process has recorded.
    #[must_use]
    pub fn loading(metrics: Option<PrometheusHandle>) -> Arc<Self> {
        let created = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
        Arc::new(Self {
            node: OnceLock::new(),
            state: Mutex::new(Readiness::Loading("the models are being loaded".into())),
            metrics,
            created,
        })
    }

    fn set(&self, state: Readiness) {
        *self.state.lock().unwrap_or_else(PoisonError::into_inner) = state;
    }

    /// The node is there; requests are served from now on.
    pub fn loaded(&self, node: EdgeNode) {
        if self.node.set(node).is_ok() {
            self.set(Readiness::Ready);
        }
    }

    /// Loading failed.
    pub fn failed(&self, why: String) {
        self.set(Readiness::Failed(why));
    }

    /// No new answers are begun.
    pub fn drain(&self) {
        self.set(Readiness::Draining);
    }

    /// Ends the answers under way: their clients are told why.
    pub fn close(&self) {
        if let Some(node) = self.node.get() {
            node.close();
        }
    }

    /// Writes the state that the next start is to find, when answers have ended.
    pub async fn save(&self) {
        if let Some(node) = self.node.get() {
            node.save().await;
        }
    }

    /// The node, once it is loaded.
    #[must_use]
    pub fn node(&self) -> Option<&EdgeNode> {
        self.node.get()
    }

    fn ready_node(&self) -> &EdgeNode {
        // The contract of `Backend`: asked only while ready, and readiness is set after the node.
        self.node.get().expect("a ready backend has its node")
    }
}

impl Backend for NodeBackend {
    fn admit(&self, answers: usize) -> BoxFuture<'_, Result<Slots, GenerateError>> {
        Box::pin(self.ready_node().admit(answers))
    }

    fn submit(&self, request: GenerateRequest, slot: Slot) -> Result<Generation, GenerateError> {
        match self.ready() {
            Readiness::Ready => self.ready_node().begin(request, slot),
            other => Err(GenerateError::Engine(other.to_string())),
        }
    }

    fn score(
        &self,
        prompt: Vec<u32>,
        alternatives: u32,
    ) -> Result<oneshot::Receiver<Result<Vec<Scored>, GenerateError>>, GenerateError> {
        match self.ready() {
            Readiness::Ready => self.ready_node().score(prompt, alternatives),
            other => Err(GenerateError::Engine(other.to_string())),
        }
    }

    fn embed(&self, tokens: Vec<u32>) -> BoxFuture<'static, Result<Vec<f32>, GenerateError>> {
        let node = match self.ready() {
            Readiness::Ready => self.ready_node().clone(),
            other => return Box::pin(async move { Err(GenerateError::Engine(other.to_string())) }),
        };
        Box::pin(async move { node.embed(tokens).await })
    }

    fn status(&self) -> NodeStatus {
        self.node.get().map(EdgeNode::status).unwrap_or_default()
    }

    fn set_controls(&self, controls: Controls) -> Result<NodeStatus, ControlsError> {
        let Some(node) = self.node.get() else {
            return Err(ControlsError::Invalid { param: "controls", message: self.ready().to_string() });
        };
        let NodeStatus { threshold_max: max, threshold_unit: unit, .. } = node.status();
        if let Some(threshold) = controls.threshold
            && !(0.0..=max).contains(&threshold)
        {
            let message = format!(
                "`threshold` is {threshold}; give a number from 0 (always ask) to {max} (never ask), in {unit}"
            );
            return Err(ControlsError::Invalid { param: "threshold", message });
        }
        node.set_controls(&controls);
        Ok(node.status())
    }

    fn tokenizer(&self) -> &Tokenizer {
        self.ready_node().tokenizer()
    }

    fn stop_tokens(&self) -> Vec<u32> {
        self.ready_node().stop_tokens().to_vec()
    }

    fn constraints(&self) -> &Constraints {
        self.ready_node().constraints()
    }

    fn chat_template(&self) -> &ChatTemplate {
        self.ready_node().chat_template()
    }

    fn sampling_defaults(&self) -> SamplingParams {
        self.node.get().map(|node| node.sampling().clone()).unwrap_or_default()
    }

    fn short_json(&self) -> bool {
        self.node.get().is_some_and(EdgeNode::short_json)
    }

    fn context_tokens(&self) -> usize {
        self.node.get().map_or(0, EdgeNode::context_tokens)
    }

    fn models(&self) -> Vec<ModelEntry> {
        let Some(node) = self.node.get() else { return Vec::new() };
        let entry =
            |id: &str, mode| ModelEntry { id: id.to_owned(), created: self.created, owned_by: "tandem".into(), mode };
        let settings = node.settings();
        let mut models = vec![entry(&settings.model, None)];
        if node.has_cloud() && settings.cloud_model != settings.model {
            models.push(entry(&settings.cloud_model, Some(crate::request::Mode::Cloud)));
        }
        models
    }

    fn ready(&self) -> Readiness {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn explain(&self, id: Option<&str>) -> Option<Value> {
        self.node.get()?.explain(id)
    }

    fn render_metrics(&self) -> String {
        if let Some(node) = self.node.get() {
            node.record_engine();
        }
        self.metrics.as_ref().map(PrometheusHandle::render).unwrap_or_default()
    }
}
