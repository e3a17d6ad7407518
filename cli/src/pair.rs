//! The embedded models, loaded off the runtime's threads, and what they are called on the wire.

use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use tandem_models::LoadedModel;
use tandem_proto::frame::schema_digest;
use tandem_proto::limits::{MINOR_MAX, MINOR_MIN, PAYLOAD_BYTES_MAX};
use tandem_proto::message::{Hello, ModelCard};
use tandem_router::policy::PolicyFile;

use crate::failure::{Code, Failure, OrFail as _};

/// Loads the embedded model called `name` on `threads` threads (0 for one per core). Takes a
/// noticeable time: not for a runtime's thread.
pub(crate) fn load(name: &str, threads: usize) -> Result<LoadedModel, Failure> {
    let embedded = tandem_models::find(name).ok_or_else(|| {
        let known = tandem_models::ALL.map(|model| model.name).join(", ");
        let message = format!(
            "model `{name}` is not in this binary; there is {known}. Set edge.model or cloud.model to one of them"
        );
        Failure::new(Code::Config, message)
    })?;
    embedded
        .load(threads)
        .map_err(|e| Failure::new(Code::Failed, format!("the embedded model {name} cannot be loaded: {e}")))
}

/// Loads on a thread that may block.
pub(crate) async fn load_aside(name: &str, threads: usize) -> Result<LoadedModel, Failure> {
    let name = name.to_owned();
    tokio::task::spawn_blocking(move || load(&name, threads)).await.or_fail(Code::Failed)?
}

/// Parameters of the calibrated escalation rule, fitted for the embedded pair; none if this build
/// has none.
pub(crate) fn policy_file() -> Result<Option<Arc<PolicyFile>>, Failure> {
    let Some(bytes) = tandem_models::POLICY else { return Ok(None) };
    PolicyFile::parse(bytes).map(|file| Some(Arc::new(file))).or_fail(Code::Failed)
}

/// What a node says first on a link.
pub(crate) fn hello(node: &str, boot_epoch: u64, models: Vec<ModelCard>) -> Hello {
    Hello {
        minor_min: MINOR_MIN,
        minor_max: MINOR_MAX,
        schema: schema_digest(),
        payload_bytes_max: PAYLOAD_BYTES_MAX as u32,
        boot_epoch,
        node: node.to_owned(),
        models,
    }
}

/// Grows with every start of a process: milliseconds since the Unix epoch.
pub(crate) fn now_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as u64)
}
