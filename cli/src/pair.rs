//! The embedded models, loaded, and what they are called on the wire.

use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use tandem_engine::chat::ChatTemplate;
use tandem_engine::tokenizer::{Tokenizer, stop_tokens};
use tandem_engine::{EngineError, LoadOptions, Model, ModelFiles};
use tandem_models::EmbeddedModel;
use tandem_proto::frame::schema_digest;
use tandem_proto::limits::{MINOR_MAX, MINOR_MIN, PAYLOAD_BYTES_MAX};
use tandem_proto::message::{Hello, ModelCard};

use crate::failure::{Code, Failure, OrFail as _};

/// A model with what belongs to it.
pub(crate) struct Loaded {
    /// The model.
    pub(crate) model: Arc<Model>,
    /// Its tokenizer.
    pub(crate) tokenizer: Tokenizer,
    /// Its chat template.
    pub(crate) chat: ChatTemplate,
    /// Token ids that end an answer.
    pub(crate) stop_tokens: Vec<u32>,
    /// Name and digests.
    pub(crate) card: ModelCard,
}

/// Loads the embedded model called `name` on `threads` threads (0 for one per core). Takes a
/// noticeable time: not for a runtime's thread.
pub(crate) fn load(name: &str, threads: usize) -> Result<Loaded, Failure> {
    let embedded = tandem_models::find(name).ok_or_else(|| {
        let known = tandem_models::ALL.map(|model| model.name).join(", ");
        let message = format!("model `{name}` is not in this binary; there is {known}. Set edge.model or cloud.model to one of them");
        Failure::new(Code::Config, message)
    })?;
    load_embedded(&embedded, threads)
        .map_err(|e| Failure::new(Code::Failed, format!("the embedded model {name} cannot be loaded: {e}")))
}

fn load_embedded(embedded: &EmbeddedModel, threads: usize) -> Result<Loaded, EngineError> {
    let files = ModelFiles::Embedded { config: embedded.config, weights: embedded.weights };
    let model = Model::load(&files, &LoadOptions { threads, ..LoadOptions::default() })?;
    let tokenizer = Tokenizer::from_json(embedded.tokenizer)?;
    let stop_tokens = stop_tokens(Some(embedded.generation_config), model.spec())?;
    let chat = chat_template(embedded, &tokenizer)?;
    let card = ModelCard {
        name: embedded.name.to_owned(),
        digest: model.digest(),
        tokenizer: tokenizer.digest(),
        layers: model.layer_digests().to_vec(),
        numerics: model.numerics().to_owned(),
        hidden_size: u32::try_from(model.spec().hidden_size).unwrap_or(u32::MAX),
        context_tokens: u32::try_from(model.spec().context_tokens).unwrap_or(u32::MAX),
    };
    Ok(Loaded { model: Arc::new(model), tokenizer, chat, stop_tokens, card })
}

fn chat_template(embedded: &EmbeddedModel, tokenizer: &Tokenizer) -> Result<ChatTemplate, EngineError> {
    let config: serde_json::Value = serde_json::from_slice(embedded.config)
        .map_err(|e| EngineError::Json { file: "config.json", problem: e.to_string() })?;
    let token = |field: &str| {
        let id = config[field].as_u64().and_then(|id| u32::try_from(id).ok());
        id.and_then(|id| tokenizer.token(id)).unwrap_or_default().to_owned()
    };
    ChatTemplate::new(embedded.chat_template, &token("bos_token_id"), &token("eos_token_id"))
}

/// Loads on a thread that may block.
pub(crate) async fn load_aside(name: &str, threads: usize) -> Result<Loaded, Failure> {
    let name = name.to_owned();
    tokio::task::spawn_blocking(move || load(&name, threads)).await.or_fail(Code::Failed)?
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
