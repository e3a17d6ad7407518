//! Llama 1–3 and dense decoders that differ from it in a field or two.

use super::fields::Fields;
use super::gguf::Metadata;
use super::{DecoderSpec, Family, FeedForward, RopeScaling, hf};
use crate::error::EngineError;

/// Llama 1–3, SmolLM2.
pub(super) fn llama(c: &Fields<'_>) -> Result<DecoderSpec, EngineError> {
    c.expect("hidden_act", "silu")?;
    let mut spec = hf::plain(c, Family::Llama, hf::grouped(c)?, false)?;
    spec.rules.qkv_bias = c.flag_or("attention_bias", false)?;
    spec.rules.output_bias = spec.rules.qkv_bias;
    spec.mlp_bias = c.flag_or("mlp_bias", false)?;
    Ok(spec)
}

/// Mistral. A window, which later releases switched off, holds in every layer.
pub(super) fn mistral(c: &Fields<'_>) -> Result<DecoderSpec, EngineError> {
    let mut spec = llama(c)?;
    if c.has("sliding_window") {
        hf::windows(c, &mut spec, |_| true)?;
    }
    Ok(spec)
}

/// `llama` in GGUF: queries and keys are permuted, so pairs are neighbours.
pub(super) fn gguf(m: &Metadata<'_>) -> Result<DecoderSpec, EngineError> {
    let mut spec = m.plain(Family::Llama, m.grouped()?, true)?;
    if let Some(divisors) = m.floats("rope_freqs.weight")? {
        // Llama 3's scaling, written out by the converter.
        spec.ropes[0].scaling = RopeScaling::Factors { divisors, magnitude: 1.0 };
    }
    if m.has("expert_count") {
        // Mixtral goes by the same name.
        spec.feed_forward = vec![FeedForward::Experts(m.experts()?); spec.layers];
    }
    spec.mlp_bias = m.has_tensor("blk.0.ffn_gate.bias");
    spec.rules.qkv_bias = m.has_tensor("blk.0.attn_q.bias");
    spec.rules.output_bias = m.has_tensor("blk.0.attn_output.bias");
    Ok(spec)
}
