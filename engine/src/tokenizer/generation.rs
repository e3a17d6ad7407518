//! How a model wants to be sampled and where its answers end: `generation_config.json`, or the
//! metadata of a GGUF file.

use std::path::Path;

use serde_json::Value;
use tandem_proto::limits::STOP_TOKENS_MAX;
use tandem_proto::message::SamplingParams;

use super::Tokenizer;
use super::config::TokenizerConfig;
use crate::checkpoint::spec::DecoderSpec;
use crate::container::gguf::Gguf;
use crate::container::{map_file, read_small, split};
use crate::error::EngineError;

const FILE: &str = "generation_config.json";

/// Tokens that end a turn in some family. A GGUF names at most one of them as its end, and files of the same
/// model differ in which, and in whether they call it a control token (llama.cpp goes by such a list too).
const ENDS_OF_TURN: [&str; 25] = [
    "<|eot_id|>",
    "<|eom_id|>",
    "<|im_end|>",
    "<|end|>",
    "<|return|>",
    "<|call|>",
    "<|calls|>",
    "<|flush|>",
    "<end_of_turn>",
    "<|end_of_turn|>",
    "<|END_OF_TURN_TOKEN|>",
    "<turn|>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<|EOT|>",
    "<EOT>",
    "_<EOT>",
    "< EOT >",
    "_< EOT >",
    "[EOT]",
    "<|end_of_sentence|>",
    "<\u{ff5c}end\u{2581}of\u{2581}sentence\u{ff5c}>",
    "<end_of_utterance>",
    "<eos>",
    "<|eos|>",
];

/// The contents of a `generation_config.json` (empty for a model without one), and the token that ends an
/// answer as `tokenizer_config.json` names it.
#[derive(Clone, Debug, Default)]
pub struct GenerationConfig {
    value: Value,
    eos: Option<String>,
}

impl GenerationConfig {
    /// Reads the file's bytes.
    ///
    /// # Errors
    /// [`EngineError::Json`] if it is not an object.
    pub fn parse(bytes: &[u8]) -> Result<Self, EngineError> {
        let value: Value = serde_json::from_slice(bytes).map_err(|e| json(e.to_string()))?;
        if value.is_object() { Ok(Self { value, eos: None }) } else { Err(json("is not an object")) }
    }

    /// From a folder in Hugging Face layout; either file may be missing.
    ///
    /// # Errors
    /// [`EngineError::Io`], [`EngineError::Json`].
    pub fn from_dir(dir: &Path) -> Result<Self, EngineError> {
        let path = dir.join(FILE);
        let config = if path.exists() { Self::parse(&read_small(&path)?)? } else { Self::default() };
        let eos = TokenizerConfig::from_dir(dir)?.token("eos_token").map(str::to_owned);
        Ok(Self { eos, ..config })
    }

    /// The tokens that end an answer: the files' and the model's own, and those that a vocabulary with
    /// channels (gpt-oss) has for it.
    ///
    /// # Errors
    /// [`EngineError::Json`] if the file's are no token ids, or too many.
    pub fn stop_tokens(&self, spec: &DecoderSpec, tokenizer: &Tokenizer) -> Result<Vec<u32>, EngineError> {
        let mut stops = spec.eos_tokens.clone();
        let ids = match self.value.get("eos_token_id") {
            None | Some(Value::Null) => Vec::new(),
            Some(Value::Array(list)) => list.iter().collect(),
            Some(one) => vec![one],
        };
        // Some files have -1 for none.
        for id in ids.into_iter().filter(|id| id.as_i64().is_none_or(|id| id >= 0)) {
            let id = id.as_u64().and_then(|n| u32::try_from(n).ok());
            stops.push(id.ok_or_else(|| json("eos_token_id is not a token id"))?);
        }
        stops.extend(self.eos.as_ref().and_then(|eos| tokenizer.token_id(eos)));
        of_channels(&mut stops, |word| tokenizer.token_id(word));
        bounded(stops, spec).map_err(json)
    }

    /// Sampling where a request says nothing: the file's if it says `do_sample`, else greedy with its
    /// repetition penalty. Values that cannot be are left out.
    #[must_use]
    pub fn sampling(&self) -> SamplingParams {
        let names = ["temperature", "top_p", "min_p", "top_k", "repetition_penalty"];
        let wish = names.map(|name| self.value.get(name).and_then(Value::as_f64));
        sampling(wish, self.value.get("do_sample").and_then(Value::as_bool) == Some(true))
    }
}

/// Sampling of temperature, top-p, min-p, top-k and repetition penalty as files have them.
fn sampling(wish: [Option<f64>; 5], sampled: bool) -> SamplingParams {
    let number = |i: usize, min: f64, max: f64| wish[i].filter(|n| (min..=max).contains(n)).map(|n| n as f32);
    let penalty = number(4, 0.1, 10.0).unwrap_or(1.0);
    let greedy = SamplingParams { repetition_penalty: penalty, ..SamplingParams::default() };
    if !sampled {
        return greedy;
    }
    SamplingParams {
        temperature: number(0, 0.0, 2.0).unwrap_or(1.0),
        top_p: number(1, 1e-6, 1.0).unwrap_or(1.0),
        min_p: number(2, 0.0, 1.0).unwrap_or(0.0),
        top_k: number(3, 0.0, f64::from(1 << 20)).map_or(0, |k| k as u32),
        ..greedy
    }
}

/// Sampling where a request says nothing, from the `general.sampling.*` keys of a GGUF file; greedy where it
/// has none.
///
/// # Errors
/// What is wrong with the file.
pub fn gguf_sampling(path: &Path) -> Result<SamplingParams, EngineError> {
    let map = map_file(&split::first(path))?;
    let file = Gguf::parse(&map)?;
    let names = ["temp", "top_p", "min_p", "top_k", "penalty_repeat"];
    let wish = names.map(|name| file.number(&format!("general.sampling.{name}")));
    Ok(sampling(wish, wish[..4].iter().any(Option::is_some)))
}

fn json(problem: impl Into<String>) -> EngineError {
    EngineError::Json { file: FILE, problem: problem.into() }
}

/// The tokens that end an answer of a GGUF file's model: its end of text, of turn and of message, and
/// those that are known to end a turn, whatever type the file gives them.
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
    let known = tokens.iter().enumerate().filter(|(_, token)| ENDS_OF_TURN.contains(token));
    stops.extend(known.map(|(id, _)| id as u32));
    of_channels(&mut stops, |word| tokens.iter().position(|token| *token == word).map(|id| id as u32));
    bounded(stops, spec).map_err(|problem| EngineError::spec("tokenizer.ggml.tokens", problem))
}

/// Whether a token can only stand for itself: one that ends a turn, or one in the brackets that families put
/// around what is no text.
pub(super) fn is_control(token: &str) -> bool {
    let inner = |open: &str, close: &str| token.strip_prefix(open).and_then(|rest| rest.strip_suffix(close));
    let name = inner("<|", "|>").or_else(|| inner("<\u{ff5c}", "\u{ff5c}>"));
    ENDS_OF_TURN.contains(&token) || name.is_some_and(|name| !name.is_empty() && !name.contains(char::is_whitespace))
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
