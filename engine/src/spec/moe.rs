//! Llama-shaped decoders with experts: Mixtral, OLMoE.

use super::fields::Fields;
use super::gguf::Metadata;
use super::{DecoderSpec, EXPERTS_MAX, ExpertsSpec, Family, FeedForward, HeadNorm, WIDTH_MAX, hf};
use crate::error::EngineError;

/// Mixtral. A window, which later releases switched off, holds in every layer.
pub(super) fn mixtral(c: &Fields<'_>) -> Result<DecoderSpec, EngineError> {
    let mut spec = all_experts(c, Family::Mixtral, "num_local_experts", true)?;
    if c.has("sliding_window") {
        hf::windows(c, &mut spec, |_| true)?;
    }
    Ok(spec)
}

/// OLMoE: queries and keys are normed over their full width.
pub(super) fn olmoe(c: &Fields<'_>) -> Result<DecoderSpec, EngineError> {
    c.refuse_true("attention_bias")?;
    if c.has("clip_qkv") {
        return Err(EngineError::spec("clip_qkv", "is not supported"));
    }
    let experts = if c.has("num_experts") { "num_experts" } else { "num_local_experts" };
    let normalise = c.flag_or("norm_topk_prob", false)?;
    let mut spec = all_experts(c, Family::Llama, experts, normalise)?;
    spec.rules.head_norm = HeadNorm::Whole;
    Ok(spec)
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
    let mut e = m.experts()?;
    e.normalise = false;
    spec.feed_forward = vec![FeedForward::Experts(e); spec.layers];
    Ok(spec)
}
