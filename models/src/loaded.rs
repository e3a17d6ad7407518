//! An embedded model made ready: weights in the engine, tokenizer, chat template, and what it is
//! called on the wire.

use std::sync::Arc;

use tandem_engine::chat::ChatTemplate;
use tandem_engine::tokenizer::{Tokenizer, stop_tokens};
use tandem_engine::{EngineError, LoadOptions, Model, ModelFiles};
use tandem_proto::message::ModelCard;

use crate::EmbeddedModel;

/// A model with what belongs to it.
pub struct LoadedModel {
    /// The model.
    pub model: Arc<Model>,
    /// Its tokenizer.
    pub tokenizer: Tokenizer,
    /// Its chat template.
    pub chat: ChatTemplate,
    /// Token ids that end an answer.
    pub stop_tokens: Vec<u32>,
    /// Name and digests.
    pub card: ModelCard,
}

impl EmbeddedModel {
    /// Loads the model to run on `threads` threads (0 for one per core). Takes a noticeable time:
    /// not for a runtime's thread.
    ///
    /// # Errors
    /// As [`Model::load`]; the embedded files are sound, so memory is the likely one.
    pub fn load(&self, threads: usize) -> Result<LoadedModel, EngineError> {
        let files = ModelFiles::Embedded { config: self.config, weights: self.weights };
        let model = Model::load(&files, &LoadOptions { threads, ..LoadOptions::default() })?;
        let tokenizer = Tokenizer::from_json(self.tokenizer)?;
        let stop_tokens = stop_tokens(Some(self.generation_config), model.spec())?;
        let spec = model.spec();
        let token = |id: Option<u32>| id.and_then(|id| tokenizer.token(id)).unwrap_or_default().to_owned();
        let chat =
            ChatTemplate::new(self.chat_template, &token(spec.bos_token), &token(spec.eos_tokens.first().copied()))?;
        let card = ModelCard {
            name: self.name.to_owned(),
            digest: model.digest(),
            tokenizer: tokenizer.digest(),
            layers: model.layer_digests().to_vec(),
            numerics: model.numerics().to_owned(),
            hidden_size: u32::try_from(model.spec().hidden_size).unwrap_or(u32::MAX),
            context_tokens: u32::try_from(model.spec().context_tokens).unwrap_or(u32::MAX),
        };
        Ok(LoadedModel { model: Arc::new(model), tokenizer, chat, stop_tokens, card })
    }
}
