//! What the tensors of a model are called in its file, per family and container, and which part of a
//! stored tensor a role is.

use super::spec::Family;
use crate::container::Part;

/// Naming scheme of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Scheme {
    /// Hugging Face module paths.
    HuggingFace,
    /// GGUF (llama.cpp).
    Gguf,
}

/// What a tensor is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Role {
    Embedding,
    FinalNorm,
    Head,
    AttentionNorm,
    AttentionPostNorm,
    FeedForwardNorm,
    FeedForwardPostNorm,
    Query,
    Key,
    Value,
    Output,
    QueryBias,
    KeyBias,
    ValueBias,
    OutputBias,
    /// Norm of query heads, or of the query's low-rank bottleneck.
    QueryNorm,
    KeyNorm,
    Sinks,
    QueryDown,
    QueryUp,
    LatentDown,
    LatentNorm,
    LatentUp,
    /// Key part of `LatentUp`, transposed, per head `[kv_rank, nope]` (GGUF).
    LatentKeyUp,
    /// Value part of `LatentUp`, per head `[v, kv_rank]` (GGUF).
    LatentValueUp,
    Gate,
    Up,
    Down,
    GateBias,
    UpBias,
    DownBias,
    Router,
    RouterBias,
    RouterCorrection,
    SharedGate,
    SharedUp,
    SharedDown,
    SharedScore,
    ExpertGate(usize),
    ExpertUp(usize),
    ExpertDown(usize),
    ExpertGateBias(usize),
    ExpertUpBias(usize),
    ExpertDownBias(usize),
}

/// Where a role may be stored.
pub(crate) struct Location {
    pub(crate) name: String,
    pub(crate) part: Part,
}

fn whole(name: impl Into<String>) -> Location {
    Location { name: name.into(), part: Part::Whole }
}

/// Where a tensor may be, best first; empty if the scheme has no name for the role.
pub(crate) fn locations(scheme: Scheme, family: Family, layer: usize, role: Role) -> Vec<Location> {
    match scheme {
        Scheme::HuggingFace => match (family, stacked(layer, role)) {
            (Family::GptOss, stacked) if !stacked.is_empty() => stacked,
            _ => hugging_face(family, layer, role).into_iter().collect(),
        },
        Scheme::Gguf => gguf(layer, role),
    }
}

fn hugging_face(family: Family, layer: usize, role: Role) -> Option<Location> {
    let top = match role {
        Role::Embedding => Some("model.embed_tokens.weight"),
        Role::FinalNorm => Some("model.norm.weight"),
        Role::Head => Some("lm_head.weight"),
        _ => None,
    };
    if let Some(name) = top {
        return Some(whole(name));
    }
    let part: String = match own(family, role) {
        Some(part) => part,
        None => match role {
            Role::AttentionNorm => "input_layernorm.weight".into(),
            Role::FeedForwardNorm => "post_attention_layernorm.weight".into(),
            Role::Query => "self_attn.q_proj.weight".into(),
            Role::Key => "self_attn.k_proj.weight".into(),
            Role::Value => "self_attn.v_proj.weight".into(),
            Role::Output => "self_attn.o_proj.weight".into(),
            Role::QueryBias => "self_attn.q_proj.bias".into(),
            Role::KeyBias => "self_attn.k_proj.bias".into(),
            Role::ValueBias => "self_attn.v_proj.bias".into(),
            Role::OutputBias => "self_attn.o_proj.bias".into(),
            Role::QueryNorm => "self_attn.q_norm.weight".into(),
            Role::KeyNorm => "self_attn.k_norm.weight".into(),
            Role::Gate => "mlp.gate_proj.weight".into(),
            Role::Up => "mlp.up_proj.weight".into(),
            Role::Down => "mlp.down_proj.weight".into(),
            Role::GateBias => "mlp.gate_proj.bias".into(),
            Role::UpBias => "mlp.up_proj.bias".into(),
            Role::DownBias => "mlp.down_proj.bias".into(),
            Role::Router => "mlp.gate.weight".into(),
            Role::ExpertGate(e) => format!("mlp.experts.{e}.gate_proj.weight"),
            Role::ExpertUp(e) => format!("mlp.experts.{e}.up_proj.weight"),
            Role::ExpertDown(e) => format!("mlp.experts.{e}.down_proj.weight"),
            _ => return None,
        },
    };
    Some(whole(format!("model.layers.{layer}.{part}")))
}

/// gpt-oss stacks experts, gate and up in turns: plain ones input-major, MXFP4 output-major.
fn stacked(layer: usize, role: Role) -> Vec<Location> {
    let (matrix, e, offset, step) = match role {
        Role::ExpertGate(e) | Role::ExpertGateBias(e) => ("gate_up_proj", e, 0, 2),
        Role::ExpertUp(e) | Role::ExpertUpBias(e) => ("gate_up_proj", e, 1, 2),
        Role::ExpertDown(e) | Role::ExpertDownBias(e) => ("down_proj", e, 0, 1),
        _ => return Vec::new(),
    };
    let at = format!("model.layers.{layer}.mlp.experts.{matrix}");
    let columns = Part::Columns { slab: e, offset, step };
    if matches!(role, Role::ExpertGateBias(_) | Role::ExpertUpBias(_) | Role::ExpertDownBias(_)) {
        return vec![Location { name: format!("{at}_bias"), part: columns }];
    }
    let rows = Part::Mxfp4Rows { slab: e, offset, step };
    vec![Location { name: at.clone(), part: columns }, Location { name: format!("{at}_blocks"), part: rows }]
}

/// Names that a family has for itself.
fn own(family: Family, role: Role) -> Option<String> {
    let part = match (family, role) {
        (Family::Deepseek, Role::QueryDown) => "self_attn.q_a_proj.weight",
        (Family::Deepseek, Role::QueryNorm) => "self_attn.q_a_layernorm.weight",
        (Family::Deepseek, Role::QueryUp) => "self_attn.q_b_proj.weight",
        (Family::Deepseek, Role::LatentDown) => "self_attn.kv_a_proj_with_mqa.weight",
        (Family::Deepseek, Role::LatentNorm) => "self_attn.kv_a_layernorm.weight",
        (Family::Deepseek, Role::LatentUp) => "self_attn.kv_b_proj.weight",
        (Family::Deepseek, Role::RouterCorrection) => "mlp.gate.e_score_correction_bias",
        (Family::Deepseek, Role::SharedGate) => "mlp.shared_experts.gate_proj.weight",
        (Family::Deepseek, Role::SharedUp) => "mlp.shared_experts.up_proj.weight",
        (Family::Deepseek, Role::SharedDown) => "mlp.shared_experts.down_proj.weight",
        (Family::Gemma, Role::AttentionPostNorm) => "post_attention_layernorm.weight",
        (Family::Gemma, Role::FeedForwardNorm) => "pre_feedforward_layernorm.weight",
        (Family::Gemma, Role::FeedForwardPostNorm) => "post_feedforward_layernorm.weight",
        (Family::GptOss, Role::Sinks) => "self_attn.sinks",
        (Family::GptOss, Role::Router) => "mlp.router.weight",
        (Family::GptOss, Role::RouterBias) => "mlp.router.bias",
        (Family::Mixtral, Role::Router) => "block_sparse_moe.gate.weight",
        (Family::Mixtral, Role::ExpertGate(e)) => return Some(format!("block_sparse_moe.experts.{e}.w1.weight")),
        (Family::Mixtral, Role::ExpertUp(e)) => return Some(format!("block_sparse_moe.experts.{e}.w3.weight")),
        (Family::Mixtral, Role::ExpertDown(e)) => return Some(format!("block_sparse_moe.experts.{e}.w2.weight")),
        (Family::Qwen2Moe, Role::SharedGate) => "mlp.shared_expert.gate_proj.weight",
        (Family::Qwen2Moe, Role::SharedUp) => "mlp.shared_expert.up_proj.weight",
        (Family::Qwen2Moe, Role::SharedDown) => "mlp.shared_expert.down_proj.weight",
        (Family::Qwen2Moe, Role::SharedScore) => "mlp.shared_expert_gate.weight",
        _ => return None,
    };
    Some(part.into())
}

fn gguf(layer: usize, role: Role) -> Vec<Location> {
    let mut more = None;
    let part = match role {
        Role::Embedding => return vec![whole("token_embd.weight")],
        Role::FinalNorm => return vec![whole("output_norm.weight")],
        Role::Head => return vec![whole("output.weight")],
        Role::AttentionNorm => "attn_norm.weight",
        Role::AttentionPostNorm => "post_attention_norm.weight",
        Role::FeedForwardNorm => {
            // gpt-oss names it after what comes before.
            more = Some("post_attention_norm.weight");
            "ffn_norm.weight"
        }
        Role::FeedForwardPostNorm => "post_ffw_norm.weight",
        Role::Query => "attn_q.weight",
        Role::Key => "attn_k.weight",
        Role::Value => "attn_v.weight",
        Role::Output => "attn_output.weight",
        Role::QueryBias => "attn_q.bias",
        Role::KeyBias => "attn_k.bias",
        Role::ValueBias => "attn_v.bias",
        Role::OutputBias => "attn_output.bias",
        Role::QueryNorm => {
            // Of the heads, or of the bottleneck.
            more = Some("attn_q_a_norm.weight");
            "attn_q_norm.weight"
        }
        Role::KeyNorm => "attn_k_norm.weight",
        Role::QueryDown => "attn_q_a.weight",
        Role::QueryUp => "attn_q_b.weight",
        Role::LatentDown => "attn_kv_a_mqa.weight",
        Role::LatentNorm => "attn_kv_a_norm.weight",
        Role::LatentUp => "attn_kv_b.weight",
        Role::LatentKeyUp => "attn_k_b.weight",
        Role::LatentValueUp => "attn_v_b.weight",
        Role::Gate => "ffn_gate.weight",
        Role::Up => "ffn_up.weight",
        Role::Down => "ffn_down.weight",
        Role::GateBias => "ffn_gate.bias",
        Role::UpBias => "ffn_up.bias",
        Role::DownBias => "ffn_down.bias",
        Role::Router => "ffn_gate_inp.weight",
        Role::RouterBias => "ffn_gate_inp.bias",
        Role::Sinks => "attn_sinks.weight",
        Role::RouterCorrection => "exp_probs_b.bias",
        Role::SharedGate => "ffn_gate_shexp.weight",
        Role::SharedUp => "ffn_up_shexp.weight",
        Role::SharedDown => "ffn_down_shexp.weight",
        Role::SharedScore => {
            return vec![Location { name: format!("blk.{layer}.ffn_gate_inp_shexp.weight"), part: Part::Row }];
        }
        Role::ExpertGateBias(e) => return expert_bias(layer, "ffn_gate", e),
        Role::ExpertUpBias(e) => return expert_bias(layer, "ffn_up", e),
        Role::ExpertDownBias(e) => return expert_bias(layer, "ffn_down", e),
        Role::ExpertGate(e) => return expert(layer, "ffn_gate", e),
        Role::ExpertUp(e) => return expert(layer, "ffn_up", e),
        Role::ExpertDown(e) => return expert(layer, "ffn_down", e),
    };
    [Some(part), more].into_iter().flatten().map(|part| whole(format!("blk.{layer}.{part}"))).collect()
}

/// Experts lie stacked; the first converters stored them one by one.
fn expert(layer: usize, part: &str, e: usize) -> Vec<Location> {
    let stacked = Location { name: format!("blk.{layer}.{part}_exps.weight"), part: Part::Slab(e) };
    vec![stacked, whole(format!("blk.{layer}.{part}.{e}.weight"))]
}

fn expert_bias(layer: usize, part: &str, e: usize) -> Vec<Location> {
    vec![Location { name: format!("blk.{layer}.{part}_exps.bias"), part: Part::Slab(e) }]
}
