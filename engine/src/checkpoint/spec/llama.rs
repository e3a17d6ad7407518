//! Llama 1–3 and dense decoders that differ from it in a field or two.

use super::fields::Fields;
use super::gguf::Metadata;
use super::{DecoderSpec, Family, FeedForward, hf};
use crate::error::EngineError;

/// Llama 1–3, SmolLM2. A window holds in every layer: Mistral's files go by this name too.
pub(super) fn llama(c: &Fields<'_>) -> Result<DecoderSpec, EngineError> {
    c.expect("hidden_act", "silu")?;
    let mut spec = hf::plain(c, Family::Llama, hf::grouped(c)?, false)?;
    hf::windows(c, &mut spec, |_| true)?;
    spec.rules.qkv_bias = c.flag_or("attention_bias", false)?;
    spec.rules.output_bias = spec.rules.qkv_bias;
    spec.mlp_bias = c.flag_or("mlp_bias", false)?;
    Ok(spec)
}

/// `llama` in GGUF: queries and keys are permuted, so pairs are neighbours.
pub(super) fn gguf(m: &Metadata<'_>) -> Result<DecoderSpec, EngineError> {
    let mut spec = m.plain(Family::Llama, m.grouped()?, true)?;
    // Mistral goes by the same name: a window holds in every layer.
    m.windows(&mut spec, usize::MAX)?;
    if m.has_experts()? {
        // So does Mixtral.
        spec.feed_forward = vec![FeedForward::Experts(m.experts(true)?); spec.layers];
    }
    spec.mlp_bias = m.has_tensor("blk.0.ffn_gate.bias");
    spec.rules.qkv_bias = m.has_tensor("blk.0.attn_q.bias");
    spec.rules.output_bias = m.has_tensor("blk.0.attn_output.bias");
    Ok(spec)
}
