//! Configurations whose meaning no golden shows.

use serde_json::json;

use super::{Attention, DecoderSpec};
use crate::error::EngineError;

fn hf_spec(kind: &str, more: &serde_json::Value) -> Result<DecoderSpec, EngineError> {
    let mut config = json!({
        "model_type": kind, "num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "vocab_size": 48,
        "intermediate_size": 32, "rms_norm_eps": 1e-5, "max_position_embeddings": 64,
    });
    for (field, value) in more.as_object().expect("an object") {
        config[field] = value.clone();
    }
    DecoderSpec::from_hf(config.to_string().as_bytes())
}

/// What files leave out or say in another way.
#[test]
fn configurations_are_read_as_their_families_mean_them() {
    let mut latent = json!({ "q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8,
        "scale_emb": 12, "scale_depth": 1.4, "dim_model_base": 32 });
    let v_dim = |more: &serde_json::Value| match hf_spec("minicpm3", more).expect("a spec").attention {
        Attention::Latent { v_dim, .. } => v_dim,
        Attention::Grouped { .. } => panic!("not latent"),
    };
    assert_eq!(v_dim(&latent), 16);
    latent["v_head_dim"] = json!(12);
    assert_eq!(v_dim(&latent), 12);

    let llama = hf_spec("llama", &json!({})).expect("a spec");
    assert_eq!(hf_spec("mistral", &json!({ "sliding_window": null })).expect("a spec"), llama);
    let windowed = hf_spec("mistral", &json!({ "sliding_window": 8 })).expect("a spec");
    assert!(windowed.reach.iter().all(|reach| reach.window == Some(8)));
    assert_eq!(DecoderSpec { reach: llama.reach.clone(), ..windowed }, llama);

    let fields = [("partial_rotary_factor", json!(0.5)), ("bos_token_id", json!(48)), ("eos_token_id", json!([2, 48]))];
    for (field, value) in fields {
        let e = hf_spec("llama", &json!({ field: value }));
        assert!(matches!(&e, Err(EngineError::Spec { field: named, .. }) if named == field), "{field}: {e:?}");
    }
    let layers = json!({ "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
        "mlp_only_layers": ["first"] });
    let e = hf_spec("qwen3_moe", &layers).expect_err("no number").to_string();
    assert!(e.contains("`mlp_only_layers`: is not a list of layers"), "{e}");
}
