//! Llama-shaped decoders with experts: Mixtral, OLMoE, gpt-oss.

use super::fields::Fields;
use super::gguf::Metadata;
use super::{
    Activation, DecoderSpec, EXPERTS_MAX, ExpertsSpec, Family, FeedForward, Gate, HeadNorm, RopeScaling, WIDTH_MAX, hf,
};
use crate::error::EngineError;

/// gpt-oss's SwiGLU.
const ALPHA: f32 = 1.702;
const LIMIT: f32 = 7.0;

/// Mixtral. A window, which later releases switched off, holds in every layer.
pub(super) fn mixtral(c: &Fields<'_>) -> Result<DecoderSpec, EngineError> {
    let mut spec = all_experts(c, Family::Mixtral, "num_local_experts", true)?;
    hf::windows(c, &mut spec, |_| true)?;
    Ok(spec)
}

/// OLMoE: queries and keys are normed over their full width.
pub(super) fn olmoe(c: &Fields<'_>) -> Result<DecoderSpec, EngineError> {
    c.refuse_true("attention_bias")?;
    let experts = if c.has("num_experts") { "num_experts" } else { "num_local_experts" };
    let normalise = c.flag_or("norm_topk_prob", false)?;
    let mut spec = all_experts(c, Family::Llama, experts, normalise)?;
    spec.rules.head_norm = HeadNorm::Whole;
    Ok(spec)
}

/// gpt-oss: sinks, biases everywhere, a window in every other layer, clamped SwiGLU.
pub(super) fn gpt_oss(c: &Fields<'_>) -> Result<DecoderSpec, EngineError> {
    let mut spec = all_experts(c, Family::GptOss, "num_local_experts", true)?;
    let (alpha, limit) = (c.positive_or("swiglu_alpha", ALPHA)?, c.positive_or("swiglu_limit", LIMIT)?);
    let bias = c.flag_or("attention_bias", true)?;
    hf::windows(c, &mut spec, |i| i % 2 == 0)?;
    open_weights(&mut spec, alpha, limit);
    (spec.rules.qkv_bias, spec.rules.output_bias) = (bias, bias);
    Ok(spec)
}

/// What holds for gpt-oss in every container.
fn open_weights(spec: &mut DecoderSpec, alpha: f32, limit: f32) {
    spec.rules.sinks = true;
    (spec.rules.qkv_bias, spec.rules.output_bias, spec.mlp_bias) = (true, true, true);
    spec.activation = Activation::ClampedSwiglu { alpha, limit };
    for f in &mut spec.feed_forward {
        if let FeedForward::Experts(e) = f {
            (e.gate, e.router_bias) = (Gate::SoftmaxOfChosen, true);
        }
    }
}

fn all_experts(c: &Fields<'_>, family: Family, count: &str, normalise: bool) -> Result<DecoderSpec, EngineError> {
    c.expect("hidden_act", "silu")?;
    let mut spec = hf::plain(c, family, hf::grouped(c)?, false)?;
    let width = c.count("intermediate_size", WIDTH_MAX)?;
    let chosen = c.count("num_experts_per_tok", EXPERTS_MAX)?;
    let mut e = ExpertsSpec::plain(c.count(count, EXPERTS_MAX)?, chosen, width);
    e.normalise = normalise;
    let e = e.checked(hf::EXPERT_FIELDS)?;
    spec.feed_forward = vec![FeedForward::Experts(e); spec.layers];
    Ok(spec)
}

pub(super) fn olmoe_gguf(m: &Metadata<'_>) -> Result<DecoderSpec, EngineError> {
    let mut spec = m.plain(Family::Llama, m.grouped()?, false)?;
    spec.rules.head_norm = HeadNorm::Whole;
    let e = m.experts(false)?;
    spec.feed_forward = vec![FeedForward::Experts(e); spec.layers];
    Ok(spec)
}

pub(super) fn gpt_oss_gguf(m: &Metadata<'_>) -> Result<DecoderSpec, EngineError> {
    let mut spec = m.plain(Family::GptOss, m.grouped()?, false)?;
    spec.feed_forward = vec![FeedForward::Experts(m.experts(true)?); spec.layers];
    m.windows(&mut spec, 2)?;
    // GGUF cannot say `truncate: false`, which every release of the family has.
    for rope in &mut spec.ropes {
        if let RopeScaling::Yarn { whole, .. } = rope.scaling.last_mut() {
            *whole = false;
        }
    }
    open_weights(&mut spec, ALPHA, LIMIT);
    Ok(spec)
}
