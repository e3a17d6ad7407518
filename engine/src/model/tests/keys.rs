//! Keys of GGUF metadata: one that shapes numbers is used or refused, never dropped; one that says nothing
//! keeps no model from loading.

use super::formats::{difference, logits};
use super::{FF, Random, VOCAB, Writer, llama, numbers};
use crate::BackendKind;
use crate::model::check_gguf;

/// A metadata value: its type and bytes.
type Entry = (u32, Vec<u8>);

fn number(v: u32) -> Entry {
    (4, v.to_le_bytes().to_vec())
}

fn float(v: f32) -> Entry {
    (6, v.to_le_bytes().to_vec())
}

fn flag(v: bool) -> Entry {
    (7, vec![u8::from(v)])
}

fn list(values: &[u32]) -> Entry {
    let mut bytes = 4u32.to_le_bytes().to_vec();
    bytes.extend((values.len() as u64).to_le_bytes());
    bytes.extend(values.iter().flat_map(|v| v.to_le_bytes()));
    (9, bytes)
}

/// Writes the key in the place of what the file has under it.
fn with(keys: &[(&str, Entry)]) -> Vec<u8> {
    let mut w = llama(0);
    for (key, (ty, value)) in keys {
        let key = format!("llama.{key}");
        let mut name = Vec::new();
        super::text(&mut name, &key);
        if let Some(at) = w.meta.windows(name.len()).position(|part| part == name) {
            // What is there is a number of four bytes.
            w.meta.drain(at..at + name.len() + 8);
            w.entries -= 1;
        }
        w.key(&key, *ty, value);
    }
    // Sharp attention, so that what shapes it shows.
    for (name, .., data) in &mut w.tensors {
        if name.contains("attn_q") || name.contains("attn_k") {
            for v in data.as_chunks_mut().0 {
                *v = (f32::from_le_bytes(*v) * 40.0).to_le_bytes();
            }
        }
    }
    w.finish()
}

fn computed(bytes: &[u8]) -> Vec<f32> {
    let dir = tempfile::tempdir().expect("folder");
    let path = dir.path().join("keys.gguf");
    std::fs::write(&path, bytes).expect("written");
    logits(&path, BackendKind::Cpu)
}

#[test]
fn a_key_that_shapes_numbers_is_used_or_refused() {
    let plain = computed(&with(&[]));
    let window = ("attention.sliding_window", number(3));
    let shaping: Vec<Vec<(&str, Entry)>> = vec![
        vec![window.clone()],
        vec![window, ("attention.sliding_window_pattern", number(2))],
        vec![("attention.max_alibi_bias", float(8.0))],
        vec![("attention.clamp_kqv", float(1.0))],
        vec![("attention.scale", float(0.5))],
        vec![("attention.causal", flag(false))],
        vec![("attention.output_scale", float(2.0))],
        vec![("attention.temperature_scale", float(0.1))],
        vec![("attention.shared_kv_layers", number(1))],
        vec![("attention.indexer.top_k", number(2))],
        vec![("attention.layer_norm_rms_epsilon", float(0.5))],
        vec![("attn_logit_softcapping", float(0.5))],
        vec![("final_logit_softcapping", float(0.01))],
        vec![("router_logit_softcapping", float(1.0))],
        vec![("logit_scale", float(3.0))],
        vec![("embedding_scale", float(3.0))],
        vec![("residual_scale", float(3.0))],
        vec![("use_parallel_residual", flag(true))],
        vec![("rope.freq_base", float(100.0))],
        vec![("rope.freq_base_swa", float(100.0))],
        vec![("rope.scale_linear", float(4.0))],
        vec![("rope.scaling.factor", float(4.0))],
        vec![("rope.scaling.attn_factor", float(0.7))],
        vec![("rope.scaling.yarn_attn_factor", float(0.7))],
        vec![("rope.scaling.yarn_ext_factor", float(0.5))],
        vec![("rope.scaling.yarn_log_multiplier", float(0.5))],
        vec![("rope.scaling.alpha", float(2.0))],
        vec![("rope.dimension_sections", list(&[2, 2, 4, 0]))],
        vec![("rope.dimension_count_swa", number(8))],
        vec![("expert_count", number(4))],
        vec![("expert_shared_count", number(1))],
        vec![("expert_weights_scale", float(2.0))],
        vec![("expert_gating_func", number(2))],
        vec![("leading_dense_block_count", number(1))],
        vec![("interleave_moe_layer_step", number(2))],
        vec![("nextn_predict_layers", number(1))],
        vec![("feed_forward_length", list(&[FF as u32, 32]))],
        vec![("attention.head_count_kv", list(&[2, 1]))],
        vec![("ssm.state_size", number(16))],
        vec![("of_next_year", float(0.5))],
    ];
    let mut dropped = Vec::new();
    for keys in shaping {
        let (bytes, last) = (with(&keys), keys.last().expect("a key").0);
        match check_gguf(&bytes) {
            Ok(_) if difference(&computed(&bytes), &plain).0 > 0.0 => println!("{last}: used"),
            Ok(_) => dropped.push(last),
            Err(e) => println!("{last}: {e}"),
        }
    }
    assert!(dropped.is_empty(), "{dropped:?}");
}

#[test]
fn a_key_that_says_nothing_changes_nothing() {
    let plain = computed(&with(&[]));
    for keys in [
        vec![("expert_count", number(0)), ("expert_used_count", number(0))],
        vec![("attention.head_count_kv", list(&[2, 2]))],
        vec![("feed_forward_length", list(&[FF as u32, FF as u32]))],
        vec![("attention.head_count", list(&[4, 4])), ("vocab_size", number(7))],
        vec![("context_length", number(4_194_304))],
        vec![("attention.causal", flag(true)), ("use_parallel_residual", flag(false))],
        vec![("attention.sliding_window", number(0)), ("attention.clamp_kqv", float(0.0))],
        vec![("attention.scale", float(0.25)), ("logit_scale", float(1.0)), ("rope.scaling.factor", float(0.0))],
        vec![("rope.scaling.yarn_beta_fast", float(32.0)), ("rope.scaling.finetuned", flag(true))],
        vec![("vision.block_count", number(12)), ("rope.dimension_sections", list(&[0, 0]))],
    ] {
        assert_eq!(computed(&with(&keys)), plain, "{keys:?}");
    }
}

/// Windows and ropes of Gemma 3 without a window: every layer sees everything, at the same base.
#[test]
fn gemma3_may_have_no_window() {
    let sizes = [
        ("block_count", 7),
        ("context_length", 64),
        ("embedding_length", 32),
        ("feed_forward_length", 32),
        ("attention.head_count", 2),
    ];
    let reach = |window: Option<u32>| {
        let mut w = Writer::new("gemma3", &sizes);
        if let Some(window) = window {
            w.number("gemma3.attention.sliding_window", window);
        }
        w.tensor(&mut Random(1), "token_embd.weight", &[VOCAB, 32], 0);
        let file = crate::checkpoint::Checkpoint::of_gguf(w.finish()).expect("a spec");
        file.spec.reach.iter().map(|r| (r.window, r.rope)).collect::<Vec<_>>()
    };
    assert_eq!(reach(None), [(None, 0); 7]);
    assert_eq!(reach(Some(0)), [(None, 0); 7]);
    let local = (Some(8), 1);
    assert_eq!(reach(Some(8)), [local, local, local, local, local, (None, 0), local]);
}

/// Several tokens without text, as some converters leave them.
#[test]
fn tokens_without_text_are_no_tokens() {
    let mut w = Writer::default();
    w.string("tokenizer.ggml.model", "gpt2");
    w.string("tokenizer.ggml.pre", "smollm");
    w.texts("tokenizer.ggml.tokens", &["a", "", "b", "", "ab"]);
    w.texts("tokenizer.ggml.merges", &["a b"]);
    numbers(&mut w, "x", &[0.0]);
    let t = crate::tokenizer::from_gguf_bytes(&w.finish()).expect("a tokenizer");
    assert_eq!(t.encode("aba").expect("encodes"), [4, 0]);
    assert_eq!(t.decode(&[0, 1, 2, 3, 4]).expect("decodes"), "abab");
}
