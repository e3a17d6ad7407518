//! Qwen2, Qwen2.5 and Qwen3, dense and with experts.

use super::fields::Fields;
use super::gguf::Metadata;
use super::{DecoderSpec, EXPERTS_MAX, ExpertsSpec, Family, FeedForward, HeadNorm, LAYERS_MAX, WIDTH_MAX, hf};
use crate::error::EngineError;

/// Qwen2 and Qwen2.5: biases on queries, keys and values.
pub(super) fn qwen2(c: &Fields<'_>) -> Result<DecoderSpec, EngineError> {
    dense(c, Family::Llama, true, HeadNorm::No)
}

/// Qwen3: norms on the heads.
pub(super) fn qwen3(c: &Fields<'_>) -> Result<DecoderSpec, EngineError> {
    dense(c, Family::Llama, false, HeadNorm::PerHead)
}

/// Qwen2-MoE: a gated shared expert beside the routed ones.
pub(super) fn qwen2_moe(c: &Fields<'_>) -> Result<DecoderSpec, EngineError> {
    let bias = c.flag_or("qkv_bias", true)?;
    let mut spec = dense(c, Family::Qwen2Moe, bias, HeadNorm::No)?;
    mixture(c, &mut spec, |e| {
        e.shared_width = c.count("shared_expert_intermediate_size", WIDTH_MAX)?;
        e.shared_gated = true;
        Ok(())
    })?;
    Ok(spec)
}

/// Qwen3-MoE.
pub(super) fn qwen3_moe(c: &Fields<'_>) -> Result<DecoderSpec, EngineError> {
    let mut spec = dense(c, Family::Llama, false, HeadNorm::PerHead)?;
    mixture(c, &mut spec, |_| Ok(()))?;
    Ok(spec)
}

fn dense(c: &Fields<'_>, family: Family, qkv_bias: bool, head_norm: HeadNorm) -> Result<DecoderSpec, EngineError> {
    c.expect("hidden_act", "silu")?;
    c.refuse_true("attention_bias")?;
    let mut spec = hf::plain(c, family, hf::grouped(c)?, false)?;
    spec.rules.qkv_bias = qkv_bias;
    spec.rules.head_norm = head_norm;
    if c.flag_or("use_sliding_window", false)? {
        let full = c.count_or("max_window_layers", spec.layers, 0, LAYERS_MAX)?;
        hf::windows(c, &mut spec, |i| i >= full)?;
    } else {
        // Files that have switched it off still name its width.
        c.has("sliding_window");
    }
    Ok(spec)
}

fn mixture(
    c: &Fields<'_>,
    spec: &mut DecoderSpec,
    extra: impl FnOnce(&mut ExpertsSpec) -> Result<(), EngineError>,
) -> Result<(), EngineError> {
    let experts = match c.has("num_experts") {
        true => c.count("num_experts", EXPERTS_MAX)?,
        false => c.count("num_local_experts", EXPERTS_MAX)?,
    };
    let chosen = c.count("num_experts_per_tok", EXPERTS_MAX)?;
    let mut e = ExpertsSpec::plain(experts, chosen, c.count("moe_intermediate_size", WIDTH_MAX)?);
    e.normalise = c.flag_or("norm_topk_prob", false)?;
    extra(&mut e)?;
    let e = e.checked(hf::EXPERT_FIELDS)?;
    let every = c.count_or("decoder_sparse_step", 1, 1, LAYERS_MAX)?;
    let dense = c.layers("mlp_only_layers")?;
    for (i, f) in spec.feed_forward.iter_mut().enumerate() {
        if (i + 1).is_multiple_of(every) && !dense.contains(&(i as u32)) {
            *f = FeedForward::Experts(e);
        }
    }
    Ok(())
}

pub(super) fn qwen2_gguf(m: &Metadata<'_>) -> Result<DecoderSpec, EngineError> {
    let mut spec = m.plain(Family::Llama, m.grouped()?, false)?;
    m.windows(&mut spec, usize::MAX)?;
    spec.rules.qkv_bias = m.has_tensor("blk.0.attn_q.bias");
    Ok(spec)
}

pub(super) fn qwen3_gguf(m: &Metadata<'_>) -> Result<DecoderSpec, EngineError> {
    let mut spec = m.plain(Family::Llama, m.grouped()?, false)?;
    m.windows(&mut spec, usize::MAX)?;
    spec.rules.head_norm = HeadNorm::PerHead;
    Ok(spec)
}

pub(super) fn qwen2_moe_gguf(m: &Metadata<'_>) -> Result<DecoderSpec, EngineError> {
    let mut spec = qwen2_gguf(m)?;
    let mut e = m.experts(false)?;
    e.shared_width = m.count("expert_shared_feed_forward_length", WIDTH_MAX)?;
    e.shared_gated = true;
    spec.feed_forward = vec![FeedForward::Experts(e); spec.layers];
    Ok(spec)
}

pub(super) fn qwen3_moe_gguf(m: &Metadata<'_>) -> Result<DecoderSpec, EngineError> {
    let mut spec = qwen3_gguf(m)?;
    spec.feed_forward = vec![FeedForward::Experts(m.experts(true)?); spec.layers];
    Ok(spec)
}
