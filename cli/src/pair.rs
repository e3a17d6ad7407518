//! The models of a node: found by name, loaded off the runtime's threads, and what they are called on
//! the wire.

use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use tandem_models::store::Store;
use tandem_models::{EmbeddedModel, Found, LoadedModel};
use tandem_router::policy::PolicyFile;

use crate::config::Layers;
use crate::failure::{Code, Failure, OrFail as _};

/// Threshold of the entropy baseline, nats: used for pairs that no rule was fitted to.
const BASELINE_NATS: f32 = 1.0;

/// Finds a model by what was typed or set (see [`tandem_models::resolve()`]); `code` says which.
pub(crate) fn find(model: &str, code: Code) -> Result<Found, Failure> {
    tandem_models::resolve(model, Store::from_env().as_ref()).or_fail(code)
}

/// Finds the model that a setting names.
pub(crate) fn find_set(layers: &Layers, key: &str) -> Result<Found, Failure> {
    let code = if layers.is_typed(key) { Code::Usage } else { Code::Config };
    find(layers.text(key).unwrap_or_default(), code)
}

/// Loads a model on `threads` threads (0 for one per core). Takes a noticeable time: not for a
/// runtime's thread.
pub(crate) fn load(model: &str, threads: usize) -> Result<LoadedModel, Failure> {
    let found = find(model, Code::Config)?;
    found
        .load(threads)
        .map_err(|e| Failure::new(Code::Failed, format!("the model {} cannot be loaded: {e}", found.name)))
}

/// Loads on a thread that may block.
pub(crate) async fn load_aside(model: &str, threads: usize) -> Result<LoadedModel, Failure> {
    let model = model.to_owned();
    tokio::task::spawn_blocking(move || load(&model, threads)).await.or_fail(Code::Failed)?
}

/// Sets the defaults that follow from which models run: what was chosen for or fitted to the embedded
/// pair holds for no other.
pub(crate) fn prefer(layers: &mut Layers) {
    let is = |layers: &Layers, key: &str, model: &EmbeddedModel| layers.text(key) == Some(model.name);
    let edge = is(layers, "edge.model", &tandem_models::EDGE);
    if !edge {
        layers.prefer("engine.edge_threads", 0.into());
    }
    if !(edge && is(layers, "edge.cloud_model", &tandem_models::CLOUD)) {
        let baseline = [("policy".to_owned(), "entropy".into()), ("nats".to_owned(), f64::from(BASELINE_NATS).into())];
        layers.prefer_table("policy", baseline.into_iter().collect());
    }
}

/// Parameters of the calibrated escalation rule, fitted for the embedded pair; none if this build
/// has none.
pub(crate) fn policy_file() -> Result<Option<Arc<PolicyFile>>, Failure> {
    let Some(bytes) = tandem_models::POLICY else { return Ok(None) };
    PolicyFile::parse(bytes).map(|file| Some(Arc::new(file))).or_fail(Code::Failed)
}

/// Grows with every start of a process: milliseconds since the Unix epoch.
pub(crate) fn now_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as u64)
}
