//! Sampling by counter-based Gumbel noise: the token at a position is
//! `argmax_v(logit_v / T + Gumbel(seed, position, v))` over the tokens that the masks leave. Keyed by
//! (seed, position, token) and stateless, so two sides with the same logits draw the same token, and
//! a resumed stream repeats itself.
//!
//! Order: logit bias, repetition penalty, presence and frequency penalties, the grammar's mask,
//! temperature, then the masks top-k, top-p, min-p on the tempered distribution, then the noise.

mod noise;
pub mod sparse;
#[cfg(test)]
mod tests;

use tandem_proto::message::{Alternative, SamplingParams};

pub use noise::gumbel;

use crate::constraint::{ConstraintError, TokenMask};
use crate::error::EngineError;
use crate::kernels::{Level, lanes};

/// A chosen token.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Pick {
    /// The token.
    pub token: u32,
    /// Natural log of its probability under the model's own distribution (no temperature, penalties
    /// or masks).
    pub logprob: f32,
}

/// The tokens before a position.
#[derive(Clone, Copy, Debug, Default)]
pub struct Before<'a> {
    /// The prompt: the repetition penalty looks at it too (as HF, vLLM and llama.cpp do).
    pub prompt: &'a [u32],
    /// The answer so far: presence and frequency penalties look at it alone (as OpenAI says).
    pub answer: &'a [u32],
}

/// Chooses the token at `position` (counted from the start of the sequence, prompt included). `allowed` are the
/// tokens that a grammar leaves; none is chosen outside of it.
///
/// # Errors
/// [`EngineError::NotFinite`] for NaN or infinite logits, [`EngineError::Sampling`] for parameters
/// out of range, [`EngineError::Constraint`] if `allowed` has no token of the model.
pub fn pick(
    logits: &[f32],
    allowed: Option<&TokenMask>,
    params: &SamplingParams,
    before: Before<'_>,
    position: u32,
) -> Result<Pick, EngineError> {
    check_params(params)?;
    check_finite(logits)?;
    let mut adjusted = adjust(logits, params, before);
    if let Some(mask) = allowed {
        mask.apply(adjusted.get_or_insert_with(|| logits.to_vec()));
    }
    let scores = adjusted.as_deref().unwrap_or(logits);
    let token = if params.temperature == 0.0 { argmax(scores) } else { draw(scores, params, position) };
    // With no token in the running, the first one comes out.
    if allowed.is_some_and(|mask| !mask.allows(token)) {
        let problem = format!("it leaves no token of the model's {}", logits.len());
        return Err(ConstraintError::Failed(problem).into());
    }
    Ok(Pick { token, logprob: logits[token as usize] - log_sum_exp(logits) })
}

/// Natural log of a token's probability under the model's own distribution.
///
/// # Errors
/// [`EngineError::NotFinite`] for NaN or infinite logits, [`EngineError::Shape`] for a token that has none.
pub fn logprob(logits: &[f32], token: u32) -> Result<f32, EngineError> {
    check_finite(logits)?;
    let own = logits.get(token as usize);
    let own = own.ok_or_else(|| EngineError::Shape(format!("token {token} has none of {} logits", logits.len())))?;
    Ok(own - log_sum_exp(logits))
}

/// The `k` likeliest tokens under the model's own distribution, likeliest first, ties to the lower id.
///
/// # Errors
/// [`EngineError::NotFinite`] for NaN or infinite logits.
pub fn top_alternatives(logits: &[f32], k: usize) -> Result<Vec<Alternative>, EngineError> {
    check_finite(logits)?;
    let norm = log_sum_exp(logits);
    let ids = largest(logits, k);
    Ok(ids.into_iter().map(|id| Alternative { id, logprob: logits[id as usize] - norm }).collect())
}

/// The token with the largest logit; ties go to the lowest id.
#[must_use]
pub fn argmax(logits: &[f32]) -> u32 {
    let mut best = (0, f32::NEG_INFINITY);
    for (i, &v) in logits.iter().enumerate() {
        if v > best.1 {
            best = (i, v);
        }
    }
    best.0 as u32
}

/// Refuses NaN and infinite logits, and none at all.
pub(crate) fn check_finite(logits: &[f32]) -> Result<(), EngineError> {
    if logits.is_empty() {
        return Err(EngineError::Shape("no logits".into()));
    }
    // x·0 is 0 for finite x and NaN otherwise; a sum vectorises where a search does not.
    if logits.iter().map(|v| v * 0.0).sum::<f32>() == 0.0 {
        return Ok(());
    }
    let bad = logits.iter().position(|v| !v.is_finite()).unwrap_or(0);
    Err(EngineError::NotFinite { token: bad, value: logits[bad] })
}

fn check_params(p: &SamplingParams) -> Result<(), EngineError> {
    let within = |field, value: f32, min: f32, max: f32| {
        if value.is_finite() && (min..=max).contains(&value) {
            Ok(())
        } else {
            Err(EngineError::Sampling { field, problem: format!("{value} is outside {min}..={max}") })
        }
    };
    within("temperature", p.temperature, 0.0, 100.0)?;
    within("top_p", p.top_p, f32::MIN_POSITIVE, 1.0)?;
    within("min_p", p.min_p, 0.0, 1.0)?;
    within("presence_penalty", p.presence_penalty, -2.0, 2.0)?;
    within("frequency_penalty", p.frequency_penalty, -2.0, 2.0)?;
    within("repetition_penalty", p.repetition_penalty, f32::MIN_POSITIVE, 100.0)?;
    p.logit_bias.iter().try_for_each(|&(_, bias)| within("logit_bias", bias, -1e4, 1e4))
}

/// What bias and penalties do to the score of one token.
#[derive(Clone, Copy, Debug)]
struct Touch {
    token: u32,
    bias: f32,
    /// It stands in the prompt or the answer, and repetition is penalised.
    repeated: bool,
    /// How often the answer has it, if that is penalised.
    count: u32,
}

impl Touch {
    /// The token's score; the larger `logit`, the larger it is.
    fn apply(self, logit: f32, p: &SamplingParams) -> f32 {
        let mut v = logit + self.bias;
        if self.repeated {
            v = if v > 0.0 { v / p.repetition_penalty } else { v * p.repetition_penalty };
        }
        if self.count > 0 {
            v -= p.presence_penalty + p.frequency_penalty * self.count as f32;
        }
        v
    }
}

/// The tokens that bias and penalties touch, ascending.
fn touched(p: &SamplingParams, Before { prompt, answer }: Before<'_>) -> Vec<Touch> {
    let repeats = p.repetition_penalty != 1.0;
    let counts = p.presence_penalty != 0.0 || p.frequency_penalty != 0.0;
    let mut all: Vec<Touch> =
        p.logit_bias.iter().map(|&(token, bias)| Touch { token, bias, repeated: false, count: 0 }).collect();
    if repeats {
        all.extend(prompt.iter().map(|&token| Touch { token, bias: 0.0, repeated: true, count: 0 }));
    }
    if repeats || counts {
        let count = u32::from(counts);
        all.extend(answer.iter().map(|&token| Touch { token, bias: 0.0, repeated: repeats, count }));
    }
    all.sort_by_key(|touch| touch.token);
    all.dedup_by(|next, kept| {
        let same = next.token == kept.token;
        if same {
            kept.bias += next.bias;
            kept.repeated |= next.repeated;
            kept.count += next.count;
        }
        same
    });
    all
}

/// Logits after bias and penalties; `None` if none applies. Ids outside the vocabulary are ignored.
fn adjust(logits: &[f32], p: &SamplingParams, before: Before<'_>) -> Option<Vec<f32>> {
    let touched = touched(p, before);
    if touched.is_empty() {
        return None;
    }
    let mut out = logits.to_vec();
    for touch in touched {
        if let Some(v) = out.get_mut(touch.token as usize) {
            *v = touch.apply(*v, p);
        }
    }
    Some(out)
}

fn draw(scores: &[f32], p: &SamplingParams, position: u32) -> u32 {
    let noise = noise::Noise::new(p.seed, position);
    let tempered = |v: u32| f64::from(scores[v as usize]) / f64::from(p.temperature);
    // The likeliest token sets a bar that most others cannot reach with any noise.
    let first = argmax(scores);
    let mut best = (first, tempered(first) + noise.gumbel(first));
    let mut try_token = |v: u32| {
        let score = tempered(v);
        if let Some(g) = noise.gumbel_above(v, best.1 - score - BAR_MARGIN) {
            let value = score + g;
            if value > best.1 || (value == best.1 && v < best.0) {
                best = (v, value);
            }
        }
    };
    match allowed(scores, p) {
        None => (0..scores.len() as u32).for_each(&mut try_token),
        Some(tokens) => tokens.into_iter().for_each(&mut try_token),
    }
    best.0
}

/// Covers the rounding of the bar, so that the shortcut never changes a draw.
const BAR_MARGIN: f64 = 1e-6;

/// The tokens that top-k, top-p and min-p leave, in this order; `None` if no mask is on. Never empty.
fn allowed(scores: &[f32], p: &SamplingParams) -> Option<Vec<u32>> {
    let top_k = if p.top_k == 0 { scores.len() } else { p.top_k as usize };
    if top_k >= scores.len() && p.top_p >= 1.0 && p.min_p <= 0.0 {
        return None;
    }
    let mut tokens = largest(scores, top_k);
    let top = scores[tokens[0] as usize];
    let weight = |v: u32| libm::exp(f64::from(scores[v as usize] - top) / f64::from(p.temperature));
    if p.top_p < 1.0 {
        let total: f64 = tokens.iter().map(|&v| weight(v)).sum();
        let goal = f64::from(p.top_p) * total;
        let mut sum = 0.0;
        let mut keep = 0;
        while keep < tokens.len() && sum < goal {
            sum += weight(tokens[keep]);
            keep += 1;
        }
        tokens.truncate(keep.max(1));
    }
    if p.min_p > 0.0 {
        tokens.retain(|&v| weight(v) >= f64::from(p.min_p));
    }
    Some(tokens)
}

/// Ids of the `k` largest values, largest first, ties to the lower id.
fn largest(values: &[f32], k: usize) -> Vec<u32> {
    let order = |a: &u32, b: &u32| values[*b as usize].total_cmp(&values[*a as usize]).then(a.cmp(b));
    let mut ids: Vec<u32> = (0..values.len() as u32).collect();
    let k = k.min(ids.len());
    if k == 0 {
        return Vec::new();
    }
    if k < ids.len() {
        ids.select_nth_unstable_by(k - 1, order);
        ids.truncate(k);
    }
    ids.sort_unstable_by(order);
    ids
}

/// ln Σ e^logit. The same number on every machine, like the rest of sampling.
fn log_sum_exp(logits: &[f32]) -> f32 {
    let top = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let (sum, _) = lanes::softmax_sums(Level::detect(), logits, top);
    (f64::from(top) + libm::log(sum)) as f32
}
