//! The fields that chat and text completions share: who answers, how tokens are drawn, when to
//! stop, and what to report.

use serde_json::Value;
use tandem_proto::limits::LOGIT_BIAS_MAX;
use tandem_proto::message::SamplingParams;

use super::error::ApiError;
use super::fields::{Fields, number, short, type_error, unsupported};
use crate::request::Mode;

/// Most choices per prompt (`n`).
pub(crate) const CHOICES_MAX: usize = 8;
/// Most stop strings.
pub(crate) const STOPS_MAX: usize = 4;
/// Longest stop string, bytes.
pub(crate) const STOP_BYTES_MAX: usize = 256;
/// Longest model name, bytes.
pub(crate) const MODEL_NAME_BYTES_MAX: usize = 256;
/// Largest `max_tokens`; answers end earlier at the context's end.
pub(crate) const TOKENS_MAX: i64 = i32::MAX as i64;

/// Accepted and without effect, as in OpenAI's own API: labels and hints for the operator.
const HINTS: [&str; 5] = ["user", "metadata", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"];

/// What the node lets the fields refer to.
#[derive(Clone, Debug)]
pub(crate) struct Limits {
    /// Sampling where the request says nothing.
    pub(crate) sampling: SamplingParams,
    /// Token ids are below this.
    pub(crate) vocabulary: usize,
}

/// The shared fields, checked.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct AnswerFields {
    pub(crate) model: String,
    /// Mode in the extension object `tandem`.
    pub(crate) mode: Option<Mode>,
    pub(crate) threshold: Option<f32>,
    /// Report origin and scores of each token.
    pub(crate) tokens: bool,
    pub(crate) stream: bool,
    pub(crate) include_usage: bool,
    /// Choices per prompt.
    pub(crate) n: usize,
    pub(crate) stop: Vec<String>,
    /// Sampling; its seed only counts if `seed` is set.
    pub(crate) sampling: SamplingParams,
    /// Seed, if the request gives one.
    pub(crate) seed: Option<u64>,
    /// Most tokens per choice, if the request gives one.
    pub(crate) tokens_max: Option<usize>,
}

impl AnswerFields {
    /// Takes the shared fields out of the body.
    pub(crate) fn take(fields: &mut Fields, limits: &Limits) -> Result<Self, ApiError> {
        fields.ignore(&HINTS);
        if fields.boolean("store")? == Some(true) {
            return Err(unsupported("store"));
        }
        fields.choice("service_tier", &["auto", "default"])?;
        let model = fields.string("model")?.ok_or_else(|| fields.missing("model"))?;
        if model.len() > MODEL_NAME_BYTES_MAX {
            let message = format!("`model` is longer than {MODEL_NAME_BYTES_MAX} bytes");
            return Err(ApiError::invalid("model", message));
        }
        let (mode, threshold, tokens) = take_extension(fields)?;
        let stream = fields.boolean("stream")?.unwrap_or(false);
        let include_usage = take_stream_options(fields, stream)?;
        let n = fields.integer("n", 1..=CHOICES_MAX as i64)?.map_or(1, |n| n as usize);
        let seed = fields.integer("seed", i64::MIN..=i64::MAX)?.map(i64::cast_unsigned);
        let tokens_max = take_tokens_max(fields)?;
        let stop = take_stop(fields)?;
        let sampling = take_sampling(fields, limits)?;
        Ok(Self { model, mode, threshold, tokens, stream, include_usage, n, stop, sampling, seed, tokens_max })
    }
}

fn take_extension(fields: &mut Fields) -> Result<(Option<Mode>, Option<f32>, bool), ApiError> {
    let Some(mut extension) = fields.object("tandem")? else { return Ok((None, None, false)) };
    let mode = extension.choice("mode", &["local", "auto", "exact", "cloud"])?.and_then(Mode::parse);
    let threshold = extension.number("threshold", 0.0..=1.0)?;
    let tokens = extension.boolean("tokens")?.unwrap_or(false);
    extension.finish()?;
    Ok((mode, threshold, tokens))
}

fn take_stream_options(fields: &mut Fields, stream: bool) -> Result<bool, ApiError> {
    let Some(mut options) = fields.object("stream_options")? else { return Ok(false) };
    if !stream {
        let message = "`stream_options` is only allowed with `stream: true`";
        return Err(ApiError::invalid("stream_options", message));
    }
    let include_usage = options.boolean("include_usage")?.unwrap_or(false);
    if options.boolean("include_obfuscation")? == Some(true) {
        return Err(unsupported("stream_options.include_obfuscation"));
    }
    options.finish()?;
    Ok(include_usage)
}

fn take_tokens_max(fields: &mut Fields) -> Result<Option<usize>, ApiError> {
    let old = fields.integer("max_tokens", 1..=TOKENS_MAX)?;
    let new = fields.integer("max_completion_tokens", 1..=TOKENS_MAX)?;
    if let (Some(old), Some(new)) = (old, new)
        && old != new
    {
        let message = format!("`max_tokens` ({old}) and `max_completion_tokens` ({new}) differ; give one");
        return Err(ApiError::invalid("max_tokens", message));
    }
    Ok(new.or(old).map(|tokens| tokens as usize))
}

fn take_stop(fields: &mut Fields) -> Result<Vec<String>, ApiError> {
    let given = match fields.take("stop") {
        None => return Ok(Vec::new()),
        Some(Value::Array(list)) if list.len() > STOPS_MAX => {
            let message = format!("`stop` takes at most {STOPS_MAX} strings, not {}", list.len());
            return Err(ApiError::invalid("stop", message));
        }
        Some(Value::Array(list)) => list.into_iter().enumerate().map(|(i, v)| (format!("stop[{i}]"), v)).collect(),
        Some(one) => vec![("stop".to_owned(), one)],
    };
    let mut stops = Vec::with_capacity(given.len());
    for (path, value) in given {
        let Value::String(stop) = value else {
            let wanted = if path == "stop" { "a string or an array of strings" } else { "a string" };
            return Err(type_error(&path, wanted, &value));
        };
        if stop.is_empty() || stop.len() > STOP_BYTES_MAX {
            let message = format!("`{path}` must have from 1 to {STOP_BYTES_MAX} bytes, not {}", stop.len());
            return Err(ApiError::invalid(path, message));
        }
        stops.push(stop);
    }
    Ok(stops)
}

fn take_sampling(fields: &mut Fields, limits: &Limits) -> Result<SamplingParams, ApiError> {
    let base = &limits.sampling;
    let top_k = fields.integer("top_k", -1..=i64::from(i32::MAX))?;
    Ok(SamplingParams {
        temperature: fields.number("temperature", 0.0..=2.0)?.unwrap_or(base.temperature),
        // OpenAI takes 0 as "the best token only"; the sampler's range is open there.
        top_p: fields.number("top_p", 0.0..=1.0)?.map_or(base.top_p, |p| p.max(f32::EPSILON)),
        // −1 is how vLLM's clients switch it off.
        top_k: top_k.map_or(base.top_k, |k| k.max(0) as u32),
        min_p: fields.number("min_p", 0.0..=1.0)?.unwrap_or(base.min_p),
        presence_penalty: fields.number("presence_penalty", -2.0..=2.0)?.unwrap_or(base.presence_penalty),
        frequency_penalty: fields.number("frequency_penalty", -2.0..=2.0)?.unwrap_or(base.frequency_penalty),
        repetition_penalty: fields.number("repetition_penalty", 0.01..=100.0)?.unwrap_or(base.repetition_penalty),
        logit_bias: take_logit_bias(fields, limits)?,
        seed: 0,
    })
}

fn take_logit_bias(fields: &mut Fields, limits: &Limits) -> Result<Vec<(u32, f32)>, ApiError> {
    const FIELD: &str = "logit_bias";
    let given = match fields.take(FIELD) {
        None => return Ok(limits.sampling.logit_bias.clone()),
        Some(Value::Object(map)) => map,
        Some(other) => return Err(type_error(FIELD, "an object from token ids to numbers", &other)),
    };
    if given.len() > LOGIT_BIAS_MAX {
        let message = format!("`{FIELD}` takes at most {LOGIT_BIAS_MAX} tokens, not {}", given.len());
        return Err(ApiError::invalid(FIELD, message));
    }
    let mut biases = Vec::with_capacity(given.len());
    for (key, value) in &given {
        let path = format!("{FIELD}.{}", short(key));
        let Some(id) = key.parse::<u32>().ok().filter(|id| (*id as usize) < limits.vocabulary) else {
            let message = format!("`{path}`: keys are token ids below {}", limits.vocabulary);
            return Err(ApiError::invalid(path, message));
        };
        biases.push((id, number(&path, value, -100.0..=100.0)?));
    }
    biases.sort_by_key(|(id, _)| *id);
    // "7" and "07" are two keys of one token.
    biases.dedup_by_key(|(id, _)| *id);
    Ok(biases)
}
