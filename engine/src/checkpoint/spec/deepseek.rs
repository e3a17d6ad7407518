//! Latent attention: DeepSeek-V2, V3 and R1, MiniCPM3.

use super::fields::Fields;
use super::gguf::Metadata;
use super::{
    Attention, DecoderSpec, EXPERTS_MAX, ExpertsSpec, Family, FeedForward, Gate, GroupWorth, LAYERS_MAX, RopeScaling,
    WIDTH_MAX, hf,
};
use crate::error::EngineError;

/// Epsilon of the bottlenecks' norms; the configuration has no field for it.
const LATENT_EPS: f32 = 1e-6;

/// DeepSeek-V3 and R1: sigmoid gate with a correction bias.
pub(super) fn v3(c: &Fields<'_>) -> Result<DecoderSpec, EngineError> {
    c.expect("scoring_func", "sigmoid")?;
    c.expect("topk_method", "noaux_tc")?;
    let interleaved = c.flag_or("rope_interleave", true)?;
    mixture(c, interleaved, |e| {
        e.gate = Gate::Sigmoid;
        e.correction = true;
        e.group_worth = GroupWorth::TwoBest;
        e.normalise = c.flag_or("norm_topk_prob", true)?;
        Ok(())
    })
}

/// DeepSeek-V2: softmax gate, groups chosen by their best expert.
pub(super) fn v2(c: &Fields<'_>) -> Result<DecoderSpec, EngineError> {
    c.expect("scoring_func", "softmax")?;
    c.refuse_true("norm_topk_prob")?;
    let grouped = match c.text("topk_method")? {
        "greedy" => false,
        "group_limited_greedy" => true,
        other => {
            let problem = format!("`{other}` is not supported; supported: greedy, group_limited_greedy");
            return Err(EngineError::spec("topk_method", problem));
        }
    };
    let interleaved = c.flag_or("rope_interleave", true)?;
    mixture(c, interleaved, |e| {
        if !grouped {
            (e.groups, e.groups_chosen) = (1, 1);
        }
        e.normalise = false;
        Ok(())
    })
}

/// `deepseek2` in GGUF: V2, V3 and R1.
pub(super) fn gguf(m: &Metadata<'_>) -> Result<DecoderSpec, EngineError> {
    let rope_dim = m.count("rope.dimension_count", WIDTH_MAX)?;
    // All heads share the latent.
    m.has("attention.head_count_kv");
    // Files that keep the latent as one key head name the real widths apart.
    let width = |name: &str| {
        let apart = format!("attention.{name}_mla");
        let one = m.count(&format!("attention.{name}"), WIDTH_MAX)?;
        m.count_or(&apart, one, WIDTH_MAX)
    };
    let key = width("key_length")?;
    let Some(nope_dim) = key.checked_sub(rope_dim).filter(|&n| n > 0) else {
        return Err(EngineError::spec("deepseek2.attention.key_length", format!("{key} is not above {rope_dim}")));
    };
    let attention = Attention::Latent {
        heads: m.count("attention.head_count", WIDTH_MAX)?,
        q_rank: if m.has("attention.q_lora_rank") { Some(m.count("attention.q_lora_rank", WIDTH_MAX)?) } else { None },
        kv_rank: m.count("attention.kv_lora_rank", WIDTH_MAX)?,
        nope_dim,
        rope_dim,
        v_dim: width("value_length")?,
        eps: m.positive("attention.layer_norm_rms_epsilon")?,
    };
    let mut spec = m.plain(Family::Deepseek, attention, true)?;
    if let RopeScaling::Yarn { factor, magnitude, .. } = spec.ropes[0].scaling.last_mut() {
        if m.positive_or("rope.scaling.attn_factor", 1.0)? != 1.0 {
            return Err(EngineError::spec("deepseek2.rope.scaling.attn_factor", "beside YaRN is not supported"));
        }
        // DeepSeek corrects the temperature of the scores instead of the rotation.
        *magnitude = 1.0;
        let m = m.positive_or("rope.scaling.yarn_log_multiplier", 0.0)?.mul_add(libm::logf(*factor), 1.0);
        spec.rules.scale *= m * m;
    }
    let dense_layers = m.count_if("leading_dense_block_count", LAYERS_MAX)?.unwrap_or(0);
    if dense_layers < spec.layers {
        let mut e = m.experts(false)?;
        e.shared_width = e.width * m.count_if("expert_shared_count", EXPERTS_MAX)?.unwrap_or(0);
        e.correction = m.has_tensor(&format!("blk.{dense_layers}.exp_probs_b.bias"));
        spec.feed_forward[dense_layers..].fill(FeedForward::Experts(e));
    } else {
        m.experts_idle();
    }
    Ok(spec)
}

fn mixture(
    c: &Fields<'_>,
    interleaved: bool,
    gate: impl FnOnce(&mut ExpertsSpec) -> Result<(), EngineError>,
) -> Result<DecoderSpec, EngineError> {
    let mut spec = latent(c, interleaved, "v_head_dim")?;
    let dense_layers = c.count_or("first_k_dense_replace", 0, 0, LAYERS_MAX)?;
    let every = c.count_or("moe_layer_freq", 1, 1, LAYERS_MAX)?;
    if dense_layers < spec.layers {
        let width = c.count("moe_intermediate_size", WIDTH_MAX)?;
        let chosen = c.count("num_experts_per_tok", EXPERTS_MAX)?;
        let mut e = ExpertsSpec::plain(c.count("n_routed_experts", EXPERTS_MAX)?, chosen, width);
        e.shared_width = width * c.count_or("n_shared_experts", 0, 0, EXPERTS_MAX)?;
        e.groups = c.count_or("n_group", 1, 1, EXPERTS_MAX)?;
        e.groups_chosen = c.count_or("topk_group", 1, 1, EXPERTS_MAX)?;
        e.scale = c.positive("routed_scaling_factor")?;
        gate(&mut e)?;
        let e = e.checked(hf::EXPERT_FIELDS)?;
        for (i, f) in spec.feed_forward.iter_mut().enumerate().skip(dense_layers) {
            if i.is_multiple_of(every) {
                *f = FeedForward::Experts(e);
            }
        }
    } else {
        // What is said of experts is said of none.
        for idle in ["n_routed_experts", "n_shared_experts", "n_group", "topk_group", "routed_scaling_factor"] {
            c.has(idle);
        }
    }
    Ok(spec)
}

/// A plain decoder with latent attention; `value_field` has the numbers per value head.
pub(super) fn latent(c: &Fields<'_>, interleaved: bool, value_field: &str) -> Result<DecoderSpec, EngineError> {
    c.expect("hidden_act", "silu")?;
    c.refuse_true("attention_bias")?;
    c.refuse_true("mlp_bias")?;
    let attention = Attention::Latent {
        heads: c.count("num_attention_heads", WIDTH_MAX)?,
        q_rank: if c.has("q_lora_rank") { Some(c.count("q_lora_rank", WIDTH_MAX)?) } else { None },
        kv_rank: c.count("kv_lora_rank", WIDTH_MAX)?,
        nope_dim: c.count("qk_nope_head_dim", WIDTH_MAX)?,
        rope_dim: c.count("qk_rope_head_dim", WIDTH_MAX)?,
        v_dim: c.count(value_field, WIDTH_MAX)?,
        eps: LATENT_EPS,
    };
    let mut spec = hf::plain(c, Family::Deepseek, attention, interleaved)?;
    spec.rules.scale *= hf::yarn_score_factor(c)?;
    Ok(spec)
}
