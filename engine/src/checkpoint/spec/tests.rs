//! Configurations whose meaning no golden shows.

use serde_json::json;

use super::{Attention, DecoderSpec, RopeScaling};
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

    let e = hf_spec("llama", &json!({ "partial_rotary_factor": 0.5 }));
    assert!(matches!(&e, Err(EngineError::Spec { field, .. }) if field == "partial_rotary_factor"), "{e:?}");
    // Ids of the large vocabulary that a small model was cut from, and what some files write for none.
    let cut = hf_spec("llama", &json!({ "bos_token_id": 48, "eos_token_id": [2, 48, -1] })).expect("a spec");
    assert_eq!((cut.bos_token, cut.eos_tokens), (None, vec![2]));
    assert!(hf_spec("llama", &json!({ "eos_token_id": "x" })).is_err());
    let layers = json!({ "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
        "mlp_only_layers": ["first"] });
    let e = hf_spec("qwen3_moe", &layers).expect_err("no number").to_string();
    assert!(e.contains("`mlp_only_layers`: is not a list of layers"), "{e}");
}

/// Longer than any text here: the context is cut, and what is stretched over it is not.
#[test]
fn a_huge_context_is_cut() {
    let yarn = json!({ "max_position_embeddings": 4_194_304, "rope_scaling": { "rope_type": "yarn", "factor": 4.0 } });
    let spec = hf_spec("llama", &yarn).expect("a spec");
    assert_eq!(spec.context_tokens, super::CONTEXT_MAX);
    let RopeScaling::Yarn { original, .. } = spec.ropes[0].scaling else { panic!("{:?}", spec.ropes) };
    assert_eq!(original, 4_194_304.0);
    // Attention that is sparse for long texts is computed as the dense attention that it is for short ones.
    let sparse = json!({ "max_position_embeddings": 64, "scale_emb": 12, "scale_depth": 1.4, "dim_model_base": 32,
        "sparse_config": { "kernel_size": 32, "dense_len": 40 } });
    assert_eq!(hf_spec("minicpm", &sparse).expect("a spec").context_tokens, 40);
}

/// Windows of Gemma: named, left out (the family's own width), or switched off.
#[test]
fn windows_of_gemma_are_those_of_the_family() {
    let reach = |more: serde_json::Value| {
        let mut config = json!({ "query_pre_attn_scalar": 16, "num_hidden_layers": 7 });
        config.as_object_mut().expect("an object").extend(more.as_object().expect("an object").clone());
        let spec = hf_spec("gemma3_text", &config).expect("a spec");
        spec.reach.iter().map(|r| (r.window, r.rope)).collect::<Vec<_>>()
    };
    let pattern = |window: Option<usize>, rope| {
        (0..7).map(|i| if i == 5 { (None, 0) } else { (window, rope) }).collect::<Vec<_>>()
    };
    assert_eq!(reach(json!({ "sliding_window": 8 })), pattern(Some(8), 1));
    assert_eq!(reach(json!({})), pattern(Some(4096), 1));
    assert_eq!(reach(json!({ "sliding_window": null })), pattern(None, 0));
}

/// A file that says a thing twice says the same, or is refused.
#[test]
fn ropes_that_contradict_each_other_are_refused() {
    let linear = json!({ "rope_type": "linear", "factor": 2.0, "rope_theta": 500.0 });
    let both = json!({ "rope_scaling": { "type": "linear", "factor": 2.0 }, "rope_parameters": linear });
    assert_eq!(hf_spec("llama", &both).expect("a spec").ropes[0].theta, 500.0);
    for (more, field) in [
        (json!({ "rope_theta": 600.0, "rope_parameters": linear }), "rope_theta"),
        (json!({ "rope_scaling": { "type": "linear", "factor": 4.0 }, "rope_parameters": linear }), "rope_parameters"),
        (json!({ "rope_scaling": { "type": "linear", "factor": 4.0, "attention_factor": 0.5 } }), "attention_factor"),
        (json!({ "rope_scaling": { "type": "default", "factor": 4.0 } }), "factor"),
    ] {
        let e = hf_spec("llama", &more).expect_err("a contradiction");
        assert!(matches!(&e, EngineError::Spec { field: named, .. } if named == field), "{more}: {e}");
    }
}
