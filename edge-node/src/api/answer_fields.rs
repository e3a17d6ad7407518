//! The fields that chat and text completions share: who answers, how tokens are drawn, when to
//! stop, and what to report.

use serde_json::Value;
use tandem_proto::limits::LOGIT_BIAS_MAX;
use tandem_proto::message::SamplingParams;

use super::error::ApiError;
use super::fields::{Fields, number, short, type_error};
use crate::request::Mode;

/// Most choices per prompt (`n`).
pub(crate) const CHOICES_MAX: usize = 8;
/// Most stop strings. OpenAI takes 4, editors' clients send a dozen.
pub(crate) const STOPS_MAX: usize = 32;
/// Longest stop string, bytes.
pub(crate) const STOP_BYTES_MAX: usize = 256;
/// Longest model name, bytes.
pub(crate) const MODEL_NAME_BYTES_MAX: usize = 256;
/// Largest `max_tokens`; answers end earlier at the context's end.
pub(crate) const TOKENS_MAX: i64 = i32::MAX as i64;

/// Accepted and without effect, because no token of the answer depends on them: labels and hints for
/// the operator. The second line is OpenAI's, the third that of vLLM's and llama.cpp's clients.
const HINTS: [&str; 14] = [
    "user",
    "metadata",
    "safety_identifier",
    "prompt_cache_key",
    "prompt_cache_retention",
    "prediction",
    "verbosity",
    "cache_prompt",
    "id_slot",
    "timings_per_token",
    "return_progress",
    "priority",
    "cache_salt",
    "keep_alive",
];
/// Tiers of service at OpenAI; there is one here.
const SERVICE_TIERS: [&str; 6] = ["auto", "default", "flex", "priority", "scale", "standard_only"];

/// Largest `min_tokens`.
pub(crate) const TOKENS_MIN_MAX: i64 = 4096;

/// Bias of a token that is never to be drawn: far below what any model's logits make up for.
const BANNED: f32 = -1e4;

/// What the node lets the fields refer to.
#[derive(Clone, Debug)]
pub(crate) struct Limits {
    /// Sampling where the request says nothing.
    pub(crate) sampling: SamplingParams,
    /// Token ids are below this.
    pub(crate) vocabulary: usize,
    /// Tokens that end an answer.
    pub(crate) stop_tokens: Vec<u32>,
    /// Largest threshold of the policy in use.
    pub(crate) threshold_max: f32,
}

/// The shared fields, checked.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct AnswerFields {
    /// Name of the model; none if the node's default is to answer.
    pub(crate) model: Option<String>,
    /// Mode in the extension object `tandem`.
    pub(crate) mode: Option<Mode>,
    pub(crate) threshold: Option<f32>,
    /// Report origin and scores of each token.
    pub(crate) tokens: bool,
    pub(crate) stream: bool,
    pub(crate) stream_options: StreamOptions,
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

/// What the chunks of a stream carry beside the text.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct StreamOptions {
    /// A last chunk says what the request took.
    pub(crate) include_usage: bool,
    /// So does every chunk, as far as it has come.
    pub(crate) continuous_usage: bool,
    /// Chunks are padded, so that their lengths say little of the text.
    pub(crate) obfuscated: bool,
}

impl AnswerFields {
    /// Takes the shared fields out of the body.
    pub(crate) fn take(fields: &mut Fields, limits: &Limits) -> Result<Self, ApiError> {
        fields.ignore(&HINTS);
        // Nothing is stored in either case: an answer is handed out and forgotten.
        fields.boolean("store")?;
        fields.choice("service_tier", &SERVICE_TIERS)?;
        let model = fields.string("model")?.filter(|name| !name.is_empty());
        if model.as_ref().is_some_and(|name| name.len() > MODEL_NAME_BYTES_MAX) {
            let message = format!("`model` is longer than {MODEL_NAME_BYTES_MAX} bytes");
            return Err(ApiError::invalid("model", message));
        }
        let (mode, threshold, tokens) = take_extension(fields, limits)?;
        let stream = fields.boolean("stream")?.unwrap_or(false);
        let stream_options = take_stream_options(fields)?;
        let n = fields.integer("n", 1..=CHOICES_MAX as i64)?.map_or(1, |n| n as usize);
        let seed = fields.integer("seed", i64::MIN..=i64::MAX)?.map(i64::cast_unsigned);
        let tokens_max = take_tokens_max(fields)?;
        let stop = take_stop(fields)?;
        let mut sampling = take_sampling(fields, limits)?;
        if fields.boolean("ignore_eos")? == Some(true) {
            never_end(&mut sampling, limits)?;
        }
        Ok(Self { model, mode, threshold, tokens, stream, stream_options, n, stop, sampling, seed, tokens_max })
    }
}

/// Takes `min_tokens`, within what the answer may have.
pub(crate) fn take_tokens_min(fields: &mut Fields, answer: &AnswerFields) -> Result<usize, ApiError> {
    const FIELD: &str = "min_tokens";
    let min = fields.integer(FIELD, 0..=TOKENS_MIN_MAX)?.map_or(0, |tokens| tokens as usize);
    match answer.tokens_max {
        Some(max) if min > max => Err(ApiError::invalid(
            FIELD,
            format!("`{FIELD}` ({min}) is more than the most tokens of the answer ({max})"),
        )),
        _ => Ok(min),
    }
}

fn take_extension(fields: &mut Fields, limits: &Limits) -> Result<(Option<Mode>, Option<f32>, bool), ApiError> {
    let Some(mut extension) = fields.object("tandem")? else { return Ok((None, None, false)) };
    let mode = extension.choice("mode", &["local", "auto", "exact", "cloud"])?.and_then(Mode::parse);
    let threshold = extension.number("threshold", 0.0..=limits.threshold_max)?;
    let tokens = extension.boolean("tokens")?.unwrap_or(false);
    extension.finish()?;
    Ok((mode, threshold, tokens))
}

/// Takes `stream_options`. Answers that are not streamed take them too: they say nothing of those.
fn take_stream_options(fields: &mut Fields) -> Result<StreamOptions, ApiError> {
    let Some(mut options) = fields.object("stream_options")? else { return Ok(StreamOptions::default()) };
    let mut flag = |name| Ok::<_, ApiError>(options.boolean(name)?.unwrap_or(false));
    let taken = StreamOptions {
        include_usage: flag("include_usage")?,
        continuous_usage: flag("continuous_usage_stats")?,
        obfuscated: flag("include_obfuscation")?,
    };
    options.finish()?;
    Ok(taken)
}

/// Takes the most tokens of an answer; -1 is how several clients write "as many as fit".
fn take_tokens_max(fields: &mut Fields) -> Result<Option<usize>, ApiError> {
    let [mut old, mut new] = [None; 2];
    for (name, taken) in [("max_tokens", &mut old), ("max_completion_tokens", &mut new)] {
        *taken = fields.integer(name, -1..=TOKENS_MAX)?;
        if *taken == Some(0) {
            return Err(ApiError::invalid(
                name,
                format!("`{name}` must be from 1 to {TOKENS_MAX}, or -1 for no limit"),
            ));
        }
    }
    if let (Some(old), Some(new)) = (old, new)
        && old != new
    {
        let message = format!("`max_tokens` ({old}) and `max_completion_tokens` ({new}) differ; give one");
        return Err(ApiError::invalid("max_tokens", message));
    }
    Ok(new.or(old).and_then(|tokens| usize::try_from(tokens).ok()))
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
        repetition_penalty: take_repetition_penalty(fields)?.unwrap_or(base.repetition_penalty),
        logit_bias: take_logit_bias(fields, limits)?,
        seed: 0,
    })
}

/// Takes the penalty under its two names.
fn take_repetition_penalty(fields: &mut Fields) -> Result<Option<f32>, ApiError> {
    const RANGE: std::ops::RangeInclusive<f32> = 0.01..=100.0;
    let (long, short) = (fields.number("repetition_penalty", RANGE)?, fields.number("repeat_penalty", RANGE)?);
    match (long, short) {
        (Some(long), Some(short)) if long != short => {
            let message = format!("`repetition_penalty` ({long}) and `repeat_penalty` ({short}) differ; give one");
            Err(ApiError::invalid("repeat_penalty", message))
        }
        _ => Ok(long.or(short)),
    }
}

/// Bans the tokens that end an answer. As biases they reach the cloud with the other parameters, so the
/// modes agree. Where a grammar leaves nothing but the end, the answer ends all the same.
fn never_end(sampling: &mut SamplingParams, limits: &Limits) -> Result<(), ApiError> {
    sampling.logit_bias.retain(|(id, _)| !limits.stop_tokens.contains(id));
    sampling.logit_bias.extend(limits.stop_tokens.iter().map(|id| (*id, BANNED)));
    sampling.logit_bias.sort_by_key(|(id, _)| *id);
    if sampling.logit_bias.len() > LOGIT_BIAS_MAX {
        let message = format!("`ignore_eos` and `logit_bias` together take at most {LOGIT_BIAS_MAX} tokens");
        return Err(ApiError::invalid("ignore_eos", message));
    }
    Ok(())
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
