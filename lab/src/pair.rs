//! The embedded pair, loaded in one process.

use std::sync::Arc;

use tandem_engine::chat::{ChatTemplate, Message};
use tandem_engine::tokenizer::Tokenizer;
use tandem_engine::{Model, trunk_layers};
use tandem_models::{CLOUD, EDGE};

use crate::error::LabError;

/// Two models that answer as one.
pub struct Pair {
    /// The model on the device.
    pub edge: Arc<Model>,
    /// The model in the cloud.
    pub cloud: Arc<Model>,
    /// Tokenizer of both.
    pub tokenizer: Tokenizer,
    /// Chat template of both.
    pub chat: ChatTemplate,
    /// Token ids that end an answer.
    pub stop_tokens: Vec<u32>,
    /// Leading layers that the two share; 0 for none.
    pub trunk: usize,
}

impl Pair {
    /// Loads the embedded pair; each model runs on `threads` threads (0 for one per core).
    ///
    /// # Errors
    /// What is wrong with the embedded files.
    pub fn embedded(threads: usize) -> Result<Self, LabError> {
        let (small, big) = (EDGE.load(threads)?, CLOUD.load(threads)?);
        let (edge, cloud) = (small.model, big.model);
        let same_numbers = edge.numerics() == cloud.numerics();
        let trunk = if same_numbers { trunk_layers(edge.layer_digests(), cloud.layer_digests()) } else { 0 };
        Ok(Self { edge, cloud, tokenizer: small.tokenizer, chat: small.chat, stop_tokens: small.stop_tokens, trunk })
    }

    /// Prompt tokens of one question through the chat template.
    ///
    /// # Errors
    /// The template or the tokenizer refuses it.
    pub fn prompt(&self, question: &str) -> Result<Vec<u32>, LabError> {
        let text = self.chat.render(&[Message::new("user", question)], true, 0)?;
        Ok(self.tokenizer.encode(&text)?)
    }

    /// Text of answer tokens.
    ///
    /// # Errors
    /// A token has no text.
    pub fn text(&self, tokens: &[u32]) -> Result<String, LabError> {
        Ok(self.tokenizer.decode(tokens)?)
    }

    /// True if `token` ends an answer.
    #[must_use]
    pub fn is_stop(&self, token: u32) -> bool {
        self.stop_tokens.contains(&token)
    }
}
