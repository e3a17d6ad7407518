//! How a model wants to be sampled and where its answers end: `generation_config.json`, or the
//! metadata of a GGUF file.

use std::path::Path;

use serde_json::Value;
use tandem_proto::limits::STOP_TOKENS_MAX;
use tandem_proto::message::SamplingParams;

use super::Tokenizer;
use crate::error::EngineError;
use crate::load::gguf::Gguf;
use crate::load::{map_file, read_small, split};
use crate::spec::DecoderSpec;

const FILE: &str = "generation_config.json";

/// Control tokens that end a turn in some family. A GGUF names at most one of them as its end, and
/// files of the same model differ in which (llama.cpp keeps such a list for the same reason).
const ENDS_OF_TURN: [&str; 14] = [
    "<|eot_id|>",
    "<|eom_id|>",
    "<|im_end|>",
    "<|end|>",
    "<|return|>",
    "<|call|>",
    "<end_of_turn>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<|EOT|>",
    "<|end_of_sentence|>",
    "<\u{ff5c}end\u{2581}of\u{2581}sentence\u{ff5c}>",
    "<end_of_utterance>",
    "<|eos|>",
];

/// The contents of a `generation_config.json`; empty for a model without one.
#[derive(Clone, Debug, Default)]
pub struct GenerationConfig(Value);

impl GenerationConfig {
    /// Reads the file's bytes.
    ///
    /// # Errors
    /// [`EngineError::Json`] if it is not an object.
    pub fn parse(bytes: &[u8]) -> Result<Self, EngineError> {
        let value: Value = serde_json::from_slice(bytes).map_err(|e| json(e.to_string()))?;
        if value.is_object() { Ok(Self(value)) } else { Err(json("is not an object")) }
    }

    /// From a folder in Hugging Face layout; the file may be missing.
    ///
    /// # Errors
    /// [`EngineError::Io`], [`EngineError::Json`].
    pub fn from_dir(dir: &Path) -> Result<Self, EngineError> {
        let path = dir.join(FILE);
        if path.exists() { Self::parse(&read_small(&path)?) } else { Ok(Self::default()) }
    }

    /// The tokens that end an answer: the file's and the model's own, and those that a vocabulary with
    /// channels (gpt-oss) has for it.
    ///
    /// # Errors
    /// [`EngineError::Json`] if the file's are no token ids, or too many.
    pub fn stop_tokens(&self, spec: &DecoderSpec, tokenizer: &Tokenizer) -> Result<Vec<u32>, EngineError> {
        let mut stops = spec.eos_tokens.clone();
        let ids = match self.0.get("eos_token_id") {
            None | Some(Value::Null) => Vec::new(),
            Some(Value::Array(list)) => list.iter().collect(),
            Some(one) => vec![one],
        };
        for id in ids {
            let id = id.as_u64().and_then(|n| u32::try_from(n).ok());
            stops.push(id.ok_or_else(|| json("eos_token_id is not a token id"))?);
        }
        of_channels(&mut stops, |word| tokenizer.token_id(word));
        bounded(stops, spec).map_err(json)
    }

    /// Sampling where a request says nothing: the file's if it says `do_sample`, else greedy. Values
    /// that cannot be are left out.
    #[must_use]
    pub fn sampling(&self) -> SamplingParams {
        let mut params = SamplingParams::default();
        if self.0.get("do_sample").and_then(Value::as_bool) != Some(true) {
            return params;
        }
        let number = |name: &str, min: f64, max: f64| {
            self.0.get(name).and_then(Value::as_f64).filter(|n| (min..=max).contains(n)).map(|n| n as f32)
        };
        params.temperature = number("temperature", 0.0, 2.0).unwrap_or(1.0);
        params.top_p = number("top_p", 1e-6, 1.0).unwrap_or(1.0);
        params.min_p = number("min_p", 0.0, 1.0).unwrap_or(0.0);
        params.repetition_penalty = number("repetition_penalty", 0.1, 10.0).unwrap_or(1.0);
        params.top_k = number("top_k", 0.0, f64::from(1 << 20)).map_or(0, |k| k as u32);
        params
    }
}

fn json(problem: impl Into<String>) -> EngineError {
    EngineError::Json { file: FILE, problem: problem.into() }
}

/// The tokens that end an answer of a GGUF file's model: its end of text, of turn and of message, and
/// control tokens that are known to end a turn.
///
/// # Errors
/// What is wrong with the file.
pub fn gguf_stop_tokens(path: &Path, spec: &DecoderSpec) -> Result<Vec<u32>, EngineError> {
    let map = map_file(&split::first(path))?;
    gguf_stops(&Gguf::parse(&map)?, spec)
}

pub(super) fn gguf_stops(file: &Gguf<'_>, spec: &DecoderSpec) -> Result<Vec<u32>, EngineError> {
    let mut stops = spec.eos_tokens.clone();
    let keys = ["eos", "eot", "eom"].map(|end| format!("tokenizer.ggml.{end}_token_id"));
    stops.extend(keys.iter().filter_map(|key| file.token(key)));
    let tokens = file.texts("tokenizer.ggml.tokens")?;
    let types = file.integers("tokenizer.ggml.token_type")?;
    let known = tokens
        .iter()
        .zip(types)
        .enumerate()
        .filter(|(_, (token, ty))| *ty == super::gguf::CONTROL && ENDS_OF_TURN.contains(token));
    stops.extend(known.map(|(id, _)| id as u32));
    of_channels(&mut stops, |word| tokens.iter().position(|token| *token == word).map(|id| id as u32));
    bounded(stops, spec).map_err(|problem| EngineError::spec("tokenizer.ggml.tokens", problem))
}

/// In a vocabulary with channels, `<|end|>` ends each message of an answer, and the answer ends with one of
/// two others; files of such models leave out the second or name the first.
fn of_channels(stops: &mut Vec<u32>, id: impl Fn(&str) -> Option<u32>) {
    let [Some(done), Some(call), Some(end)] = ["<|return|>", "<|call|>", "<|end|>"].map(id) else { return };
    stops.retain(|stop| *stop != end);
    stops.extend([done, call]);
}

fn bounded(mut stops: Vec<u32>, spec: &DecoderSpec) -> Result<Vec<u32>, String> {
    stops.retain(|&id| (id as usize) < spec.vocab_size);
    stops.sort_unstable();
    stops.dedup();
    if stops.len() > STOP_TOKENS_MAX {
        return Err(format!("has {} end tokens, at most {STOP_TOKENS_MAX} are taken", stops.len()));
    }
    Ok(stops)
}
