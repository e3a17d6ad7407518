//! A model made ready: weights in the engine, tokenizer, chat template, and what it is called on the
//! wire.

use std::path::Path;
use std::sync::Arc;

use tandem_engine::chat::ChatTemplate;
use tandem_engine::tokenizer::{GenerationConfig, Tokenizer, gguf_sampling, gguf_stop_tokens};
use tandem_engine::{DecoderSpec, EngineError, LoadOptions, Model, inspect};
use tandem_proto::message::{Exactness, ModelCard, SamplingParams};

use crate::EmbeddedModel;
use crate::resolve::{Found, Place};

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
    /// Sampling where a request says nothing.
    pub sampling: SamplingParams,
    /// Name and digests.
    pub card: ModelCard,
}

/// What makes tokens of text and text of tokens.
struct Text {
    tokenizer: Tokenizer,
    chat: ChatTemplate,
    stop_tokens: Vec<u32>,
    sampling: SamplingParams,
}

impl Text {
    fn embedded(files: &EmbeddedModel, spec: &DecoderSpec) -> Result<Self, EngineError> {
        let tokenizer = Tokenizer::from_json(files.tokenizer)?;
        let token = |id: Option<u32>| id.and_then(|id| tokenizer.token(id)).unwrap_or_default().to_owned();
        let (bos, eos) = (token(spec.bos_token), token(spec.eos_tokens.first().copied()));
        let chat = ChatTemplate::new(files.chat_template, &bos, &eos)?;
        let config = GenerationConfig::parse(files.generation_config)?;
        Ok(Self { chat, stop_tokens: config.stop_tokens(spec, &tokenizer)?, sampling: config.sampling(), tokenizer })
    }

    fn folder(dir: &Path, spec: &DecoderSpec) -> Result<Self, EngineError> {
        let config = GenerationConfig::from_dir(dir)?;
        let tokenizer = Tokenizer::from_dir(dir)?;
        Ok(Self {
            chat: ChatTemplate::from_dir(dir)?,
            stop_tokens: config.stop_tokens(spec, &tokenizer)?,
            sampling: config.sampling(),
            tokenizer,
        })
    }

    fn gguf(path: &Path, spec: &DecoderSpec) -> Result<Self, EngineError> {
        Ok(Self {
            tokenizer: Tokenizer::from_gguf(path)?,
            chat: ChatTemplate::from_gguf(path)?,
            stop_tokens: gguf_stop_tokens(path, spec)?,
            sampling: gguf_sampling(path)?,
        })
    }
}

impl EmbeddedModel {
    /// Loads the model to run on `threads` threads (0 for one per core). Takes a noticeable time:
    /// not for a runtime's thread.
    ///
    /// # Errors
    /// As [`Model::load`]; the embedded files are sound, so memory is the likely one.
    pub fn load(&'static self, threads: usize) -> Result<LoadedModel, EngineError> {
        Found { name: self.name.to_owned(), place: Place::Embedded(self) }.load(threads)
    }
}

impl Found {
    /// Its tokenizer, without the weights: a folder needs no more than `tokenizer.json`.
    ///
    /// # Errors
    /// What is wrong with the files.
    pub fn tokenizer(&self) -> Result<Tokenizer, EngineError> {
        match &self.place {
            Place::Embedded(files) => Tokenizer::from_json(files.tokenizer),
            Place::Folder(dir) => Tokenizer::from_dir(dir),
            Place::Gguf(path) => Tokenizer::from_gguf(path),
        }
    }

    /// Loads the model to run on `threads` threads (0 for one per core). Takes a noticeable time:
    /// not for a runtime's thread.
    ///
    /// # Errors
    /// What is wrong with the files.
    pub fn load(&self, threads: usize) -> Result<LoadedModel, EngineError> {
        let files = self.files();
        // A tokenizer that is missing is told before gigabytes of weights are read.
        let spec = inspect(&files)?.spec;
        let mut text = match &self.place {
            Place::Embedded(files) => Text::embedded(files, &spec)?,
            Place::Folder(dir) => Text::folder(dir, &spec)?,
            Place::Gguf(path) => Text::gguf(path, &spec)?,
        };
        // What ends an answer is no part of it, whatever the file says of the token.
        text.tokenizer.hide(&text.stop_tokens);
        let model = Model::load(&files, &LoadOptions { threads, ..LoadOptions::default() })?;
        let card = ModelCard {
            name: self.name.clone(),
            digest: model.digest(),
            tokenizer: text.tokenizer.digest(),
            tokenizer_marks: text.tokenizer.marks().to_vec(),
            layers: model.layer_digests().to_vec(),
            numerics: model.numerics().to_owned(),
            hidden_size: u32::try_from(spec.hidden_size).unwrap_or(u32::MAX),
            context_tokens: u32::try_from(spec.context_tokens).unwrap_or(u32::MAX),
            exactness: Exactness::Bitwise,
        };
        Ok(LoadedModel {
            model: Arc::new(model),
            tokenizer: text.tokenizer,
            chat: text.chat,
            stop_tokens: text.stop_tokens,
            sampling: text.sampling,
            card,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::EDGE;

    #[test]
    fn what_is_small_is_checked_before_the_weights() {
        let dir = tempfile::tempdir().expect("a folder");
        std::fs::write(dir.path().join("config.json"), EDGE.config).expect("a file");
        // Weights without a single tensor that the model needs.
        let header = r#"{"x":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}"#;
        let weights = [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &[0; 4]].concat();
        std::fs::write(dir.path().join("model.safetensors"), weights).expect("a file");
        let load = || {
            let place = Place::Folder(dir.path().to_owned());
            Found { name: "tiny".into(), place }.load(1).err().expect("refused")
        };
        let missing = load();
        assert!(matches!(&missing, EngineError::Io { path, .. } if path.ends_with("tokenizer.json")), "{missing}");
        std::fs::write(dir.path().join("tokenizer.json"), EDGE.tokenizer).expect("a file");
        std::fs::write(dir.path().join("chat_template.jinja"), "{% if %}").expect("a file");
        let template = load();
        assert!(matches!(&template, EngineError::Template(_)), "{template}");
        std::fs::write(dir.path().join("chat_template.jinja"), EDGE.chat_template).expect("a file");
        let weights = load();
        assert!(matches!(&weights, EngineError::Tensor { .. }), "{weights}");
    }
}
