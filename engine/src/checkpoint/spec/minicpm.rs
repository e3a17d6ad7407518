//! MiniCPM 1, 2 and 4 (a Llama with scaled embeddings, residuals and logits) and MiniCPM3 (the same
//! with latent attention).

use super::fields::Fields;
use super::gguf::Metadata;
use super::{Attention, DecoderSpec, Family, Scales, WIDTH_MAX, deepseek, hf};
use crate::error::EngineError;

/// Scales of files that do not name them.
const EMBEDDING: f32 = 12.0;
const DEPTH: f32 = 1.4;
const BASE_WIDTH: f32 = 256.0;

/// MiniCPM 1, 2 and 4. Sparse attention of 4.1, meant for long texts, is computed densely.
pub(super) fn minicpm(c: &Fields<'_>) -> Result<DecoderSpec, EngineError> {
    c.expect("hidden_act", "silu")?;
    c.refuse_true("attention_bias")?;
    if c.count_or("num_experts", 0, 0, WIDTH_MAX)? > 0 {
        return Err(EngineError::spec("num_experts", "MiniCPM-MoE is not supported"));
    }
    let mut spec = hf::plain(c, Family::Llama, hf::grouped(c)?, false)?;
    // The family's own code ties the head unless told otherwise.
    spec.tied_head = c.flag_or("tie_word_embeddings", true)?;
    spec.scales = scales(c, &spec)?;
    Ok(spec)
}

/// MiniCPM3: latent attention with halves paired.
pub(super) fn minicpm3(c: &Fields<'_>) -> Result<DecoderSpec, EngineError> {
    // The published files leave it out: value heads are as wide as the unrotated part of the keys.
    let value_field = if c.has("v_head_dim") { "v_head_dim" } else { "qk_nope_head_dim" };
    let mut spec = deepseek::latent(c, false, value_field)?;
    spec.tied_head = c.flag_or("tie_word_embeddings", true)?;
    spec.scales = scales(c, &spec)?;
    Ok(spec)
}

fn scales(c: &Fields<'_>, spec: &DecoderSpec) -> Result<Scales, EngineError> {
    Ok(Scales {
        embedding: c.positive("scale_emb")?,
        residual: c.positive("scale_depth")? / (spec.layers as f32).sqrt(),
        logits: c.positive("dim_model_base")? / spec.hidden_size as f32,
    })
}

pub(super) fn minicpm_gguf(m: &Metadata<'_>) -> Result<DecoderSpec, EngineError> {
    let mut spec = m.plain(Family::Llama, m.grouped()?, true)?;
    m.windows(&mut spec, usize::MAX)?;
    spec.scales = scales_gguf(m, &spec)?;
    Ok(spec)
}

fn scales_gguf(m: &Metadata<'_>, spec: &DecoderSpec) -> Result<Scales, EngineError> {
    let usual = usual(spec);
    Ok(Scales {
        embedding: m.positive_or("embedding_scale", usual.embedding)?,
        residual: m.positive_or("residual_scale", usual.residual)?,
        // The file has the divisor.
        logits: 1.0 / m.positive_or("logit_scale", 1.0 / usual.logits)?,
    })
}

pub(super) fn minicpm3_gguf(m: &Metadata<'_>) -> Result<DecoderSpec, EngineError> {
    // All heads share the latent.
    m.has("attention.head_count_kv");
    let heads = m.count("attention.head_count", WIDTH_MAX)?;
    let rope_dim = m.count("rope.dimension_count", WIDTH_MAX)?;
    let key = m.count("attention.key_length", WIDTH_MAX)?;
    let Some(nope_dim) = key.checked_sub(rope_dim).filter(|&n| n > 0) else {
        return Err(EngineError::spec("minicpm3.attention.key_length", format!("{key} is not above {rope_dim}")));
    };
    let attention = Attention::Latent {
        heads,
        q_rank: Some(m.count("attention.q_lora_rank", WIDTH_MAX)?),
        kv_rank: m.count("attention.kv_lora_rank", WIDTH_MAX)?,
        nope_dim,
        rope_dim,
        // llama.cpp's files of this architecture leave it out.
        v_dim: m.count_or("attention.value_length", m.count("embedding_length", WIDTH_MAX)? / heads, WIDTH_MAX)?,
        eps: m.positive("attention.layer_norm_rms_epsilon")?,
    };
    let mut spec = m.plain(Family::Deepseek, attention, false)?;
    spec.scales = scales_gguf(m, &spec)?;
    Ok(spec)
}

fn usual(spec: &DecoderSpec) -> Scales {
    Scales {
        embedding: EMBEDDING,
        residual: DEPTH / (spec.layers as f32).sqrt(),
        logits: BASE_WIDTH / spec.hidden_size as f32,
    }
}
