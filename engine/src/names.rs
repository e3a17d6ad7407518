//! What the tensors of a model are called in its file, per family and container.

use crate::spec::Family;

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
    FeedForwardNorm,
    Query,
    Key,
    Value,
    Output,
    QueryDown,
    QueryNorm,
    QueryUp,
    LatentDown,
    LatentNorm,
    LatentUp,
    Gate,
    Up,
    Down,
    Router,
    RouterBias,
    SharedGate,
    SharedUp,
    SharedDown,
    ExpertGate(usize),
    ExpertUp(usize),
    ExpertDown(usize),
}

/// The name of a tensor; `None` if the scheme has none for the family.
pub(crate) fn name(scheme: Scheme, family: Family, layer: usize, role: Role) -> Option<String> {
    match (scheme, family) {
        (Scheme::HuggingFace, _) => Some(hugging_face(layer, role)),
        (Scheme::Gguf, Family::Llama) => gguf_llama(layer, role),
        (Scheme::Gguf, Family::DeepseekV3) => None,
    }
}

fn hugging_face(layer: usize, role: Role) -> String {
    let part = match role {
        Role::Embedding => return "model.embed_tokens.weight".into(),
        Role::FinalNorm => return "model.norm.weight".into(),
        Role::Head => return "lm_head.weight".into(),
        Role::AttentionNorm => "input_layernorm",
        Role::FeedForwardNorm => "post_attention_layernorm",
        Role::Query => "self_attn.q_proj",
        Role::Key => "self_attn.k_proj",
        Role::Value => "self_attn.v_proj",
        Role::Output => "self_attn.o_proj",
        Role::QueryDown => "self_attn.q_a_proj",
        Role::QueryNorm => "self_attn.q_a_layernorm",
        Role::QueryUp => "self_attn.q_b_proj",
        Role::LatentDown => "self_attn.kv_a_proj_with_mqa",
        Role::LatentNorm => "self_attn.kv_a_layernorm",
        Role::LatentUp => "self_attn.kv_b_proj",
        Role::Gate => "mlp.gate_proj",
        Role::Up => "mlp.up_proj",
        Role::Down => "mlp.down_proj",
        Role::Router => "mlp.gate",
        Role::RouterBias => return format!("model.layers.{layer}.mlp.gate.e_score_correction_bias"),
        Role::SharedGate => "mlp.shared_experts.gate_proj",
        Role::SharedUp => "mlp.shared_experts.up_proj",
        Role::SharedDown => "mlp.shared_experts.down_proj",
        Role::ExpertGate(e) => return format!("model.layers.{layer}.mlp.experts.{e}.gate_proj.weight"),
        Role::ExpertUp(e) => return format!("model.layers.{layer}.mlp.experts.{e}.up_proj.weight"),
        Role::ExpertDown(e) => return format!("model.layers.{layer}.mlp.experts.{e}.down_proj.weight"),
    };
    format!("model.layers.{layer}.{part}.weight")
}

fn gguf_llama(layer: usize, role: Role) -> Option<String> {
    let part = match role {
        Role::Embedding => return Some("token_embd.weight".into()),
        Role::FinalNorm => return Some("output_norm.weight".into()),
        Role::Head => return Some("output.weight".into()),
        Role::AttentionNorm => "attn_norm",
        Role::FeedForwardNorm => "ffn_norm",
        Role::Query => "attn_q",
        Role::Key => "attn_k",
        Role::Value => "attn_v",
        Role::Output => "attn_output",
        Role::Gate => "ffn_gate",
        Role::Up => "ffn_up",
        Role::Down => "ffn_down",
        _ => return None,
    };
    Some(format!("blk.{layer}.{part}.weight"))
}
