//! What `tokenizer_config.json` says beside `tokenizer.json`: which tokens stand around a text, and which one
//! ends an answer.

use std::path::Path;

use serde_json::Value;

use super::{Ends, Tokenizer};
use crate::chat::text_of;
use crate::container::read_small;
use crate::error::EngineError;

const FILE: &str = "tokenizer_config.json";
/// Holds special tokens that the other file leaves out.
const MAP: &str = "special_tokens_map.json";

/// Both files; empty for a model without them.
#[derive(Clone, Debug, Default)]
pub(super) struct TokenizerConfig {
    config: Value,
    map: Value,
}

impl TokenizerConfig {
    pub(super) fn from_dir(dir: &Path) -> Result<Self, EngineError> {
        let read = |file: &'static str| {
            let path = dir.join(file);
            if !path.exists() {
                return Ok(Value::Null);
            }
            serde_json::from_slice(&read_small(&path)?).map_err(|e| EngineError::Json { file, problem: e.to_string() })
        };
        Ok(Self { config: read(FILE)?, map: read(MAP)? })
    }

    /// The text of a token such as `eos_token`.
    pub(super) fn token(&self, name: &str) -> Option<&str> {
        text_of(&self.config[name]).or_else(|| text_of(&self.map[name]))
    }

    /// What a text begins and ends with, if the file says so.
    pub(super) fn ends(&self, tokenizer: &Tokenizer) -> Option<Ends> {
        let [first, last] = ["add_bos_token", "add_eos_token"].map(|name| self.config[name].as_bool());
        if first.is_none() && last.is_none() {
            return None;
        }
        // Classes that begin a text unless told otherwise.
        let class = self.config["tokenizer_class"].as_str().unwrap_or_default();
        let usual = ["Llama", "CodeLlama", "Gemma", "Cohere"].iter().any(|name| class.starts_with(name));
        let end = |wanted: bool, name: &str| {
            let id = self.token(name).filter(|_| wanted).and_then(|text| tokenizer.token_id(text));
            id.into_iter().collect()
        };
        Some(Ends { before: end(first.unwrap_or(usual), "bos_token"), after: end(last.unwrap_or(false), "eos_token") })
    }
}
