//! Fields of a `config.json` that shape numbers in some family. Where a family's reader has no use for one,
//! it must say nothing: a model that is computed without it would answer, and wrongly.

use serde_json::Value;

use super::fields::Fields;
use super::{DecoderSpec, FeedForward};
use crate::error::EngineError;

/// Such fields, and the number at which each says nothing. All say nothing where they are null, `false`, 0
/// or empty.
const FIELDS: &[(&str, f64)] = &[
    ("activation_sparsity_pattern", 0.0),
    ("add_attention_sink_bias", 0.0),
    ("add_bias_linear", 0.0),
    ("alibi", 0.0),
    ("apply_layernorm_1p", 0.0),
    ("attention_bias", 0.0),
    ("attention_chunk_size", 0.0),
    ("attention_multiplier", 0.0),
    ("attention_out_bias", 0.0),
    ("attention_output_multiplier", 1.0),
    ("attention_value_scale", 1.0),
    ("attn_logit_softcapping", 0.0),
    ("attn_scale", 0.0),
    ("attn_temperature_tuning", 0.0),
    ("bias", 0.0),
    ("clip_qkv", 0.0),
    ("cross_attention_layers", 0.0),
    ("decoder_sparse_step", 1.0),
    ("dim_model_base", 0.0),
    ("embedding_multiplier", 1.0),
    ("embedding_scale", 1.0),
    ("final_logit_softcapping", 0.0),
    ("first_k_dense_replace", 0.0),
    ("floor_scale", 0.0),
    ("head_bias", 0.0),
    ("index_topk", 0.0),
    ("key_multiplier", 1.0),
    ("kv_lora_rank", 0.0),
    ("linear_attn_config", 0.0),
    ("lm_head_bias", 0.0),
    ("lm_head_multiplier", 1.0),
    ("logit_scale", 1.0),
    ("logits_scaling", 1.0),
    ("mlp_bias", 0.0),
    ("mlp_multipliers", 0.0),
    ("mlp_only_layers", 0.0),
    ("moe_layer_freq", 1.0),
    ("moe_router_enable_expert_bias", 0.0),
    ("moe_router_logit_softcapping", 0.0),
    ("n_group", 1.0),
    ("n_shared_experts", 0.0),
    ("no_rope_layer_interval", 0.0),
    ("norm_after_attention", 0.0),
    ("num_kv_shared_layers", 0.0),
    ("num_shared_experts", 0.0),
    ("o_proj_bias", 0.0),
    ("parallel_attn", 0.0),
    ("partial_rotary_factor", 1.0),
    ("q_lora_rank", 0.0),
    ("qk_layernorm", 0.0),
    ("qk_norm", 0.0),
    ("qkv_bias", 0.0),
    ("qkv_clip", 0.0),
    ("query_pre_attn_scalar", 0.0),
    ("residual_multiplier", 1.0),
    ("residual_scale", 1.0),
    ("rope_local_base_freq", 0.0),
    ("rope_percentage", 1.0),
    ("rope_ratio", 1.0),
    ("rotary_dim", 0.0),
    ("rotary_emb_base", 0.0),
    ("rotary_pct", 1.0),
    ("rotary_scaling_factor", 1.0),
    ("routed_scaling_factor", 1.0),
    ("scale_depth", 0.0),
    ("scale_emb", 1.0),
    ("shared_expert_intermediate_size", 0.0),
    ("ssm_multipliers", 0.0),
    ("swiglu_alpha", 0.0),
    ("swiglu_limit", 0.0),
    ("topk_group", 1.0),
    ("use_alibi", 0.0),
    ("use_attention_sink", 0.0),
    ("use_bias", 0.0),
    ("use_bidirectional_attention", 0.0),
    ("use_dynamic_ntk", 0.0),
    ("use_logn_attn", 0.0),
    ("use_mla", 0.0),
    ("use_parallel_residual", 0.0),
    ("use_post_norm", 0.0),
    ("use_qk_layernorm", 0.0),
    ("use_qk_norm", 0.0),
    ("use_qkv_bias", 0.0),
];
/// Such fields that hold texts, and the one that says nothing.
const TEXTS: &[(&str, &str)] =
    &[("hidden_activation", "silu"), ("position_embedding_type", "rope"), ("scoring_func", "softmax")];
/// Fields of a description of a rope that name it, or that its kind has no use for.
const ROPE_IDLE: &[&str] = &["finetuned", "original_max_position_embeddings", "rope_theta", "truncate", "type"];

/// Whether a field says nothing.
fn is_neutral(value: &Value, neutral: f64) -> bool {
    match value {
        Value::Null => true,
        Value::Bool(on) => !on,
        Value::Number(n) => n.as_f64().is_some_and(|n| n == 0.0 || n == neutral),
        Value::String(text) => text.is_empty(),
        Value::Array(list) => list.is_empty(),
        Value::Object(fields) => fields.is_empty(),
    }
}

/// Whether a layer has so many experts.
fn has(part: &FeedForward, experts: u64) -> bool {
    matches!(part, FeedForward::Experts(e) if e.experts as u64 == experts)
}

fn refused(name: &str, value: &Value) -> EngineError {
    EngineError::spec(name, format!("is {value}, which this family is not computed with here"))
}

/// Refuses a configuration that says what its family's reader has not asked for.
pub(super) fn check(c: &Fields<'_>, spec: &DecoderSpec) -> Result<(), EngineError> {
    for (name, value) in c.unread() {
        let fine = match name {
            // A window as long as the longest text hides nothing.
            "sliding_window" => {
                is_neutral(value, -1.0) || value.as_u64().is_some_and(|n| n >= spec.context_tokens as u64)
            }
            "layer_types" => {
                value.as_array().is_some_and(|kinds| kinds.iter().all(|kind| kind == "full_attention"))
                    || value.is_null()
            }
            // One for every layer with a rope.
            "no_rope_layers" => {
                value.as_array().is_some_and(|layers| layers.iter().all(|n| *n == 1)) || value.is_null()
            }
            "is_causal" => value != false,
            // The other name of what the family's reader has asked for.
            "num_experts" | "num_local_experts" | "n_routed_experts" | "moe_num_experts" => {
                is_neutral(value, 0.0)
                    || value.as_u64().is_some_and(|n| spec.feed_forward.iter().any(|part| has(part, n)))
            }
            _ => match (FIELDS.iter().find(|f| f.0 == name), TEXTS.iter().find(|t| t.0 == name)) {
                (Some((_, neutral)), _) => is_neutral(value, *neutral),
                (None, Some((_, neutral))) => value.is_null() || value == neutral,
                (None, None) => true,
            },
        };
        if !fine {
            return Err(refused(name, value));
        }
    }
    Ok(())
}

/// The same for the description of a rope, in which everything shapes numbers.
pub(super) fn check_rope(s: &Fields<'_>) -> Result<(), EngineError> {
    match s.unread().find(|(name, value)| !ROPE_IDLE.contains(name) && !is_neutral(value, 1.0)) {
        None => Ok(()),
        Some((name, value)) => {
            let problem = format!("is {value} in the description of the rope, whose kind is not computed with it here");
            Err(EngineError::spec(name, problem))
        }
    }
}
