//! Every number format: it loads, and the own kernels compute on it what candle's operators compute.

use std::path::Path;

use super::{K_BLOCK, Random, TYPES, VOCAB, Writer, llama, numbers};
use crate::model::check_gguf;
use crate::{BackendKind, KvPool, LoadOptions, Model, ModelFiles, Rows};

/// Largest difference of a logit from candle's, as a share of the largest logit: 8-bit activations cost
/// about 1 % a product.
const QUANTISED: f32 = 0.05;

#[test]
fn every_number_format_loads() {
    for (ty, ..) in TYPES {
        let spec = check_gguf(&llama(ty).finish()).unwrap_or_else(|e| panic!("type {ty}: {e}"));
        assert_eq!((spec.layers, spec.vocab_size, spec.tied_head), (2, VOCAB, true));
    }
}

/// Logits of a prefill, a decode and two tokens at once.
pub(super) fn logits(path: &Path, backend: BackendKind) -> Vec<f32> {
    let m = Model::load(&ModelFiles::Gguf(path.to_owned()), &LoadOptions { threads: 2, backend }).expect("loads");
    let mut pool = KvPool::new(m.kv_layout(), 0..2, 4).expect("pool");
    let mut seq = pool.sequence();
    let mut out = Vec::new();
    for part in [&[1, 5, 9, 40, 3][..], &[7], &[2, 2]] {
        let h = m.embed(part).expect("embed");
        let h = m.layers(0..2, &mut pool, &mut [Rows { seq: &mut seq, rows: part.len() }], h).expect("layers");
        out.extend(m.head(&h, &(0..part.len()).collect::<Vec<_>>()).expect("head").data);
    }
    out
}

/// The largest difference of `a` from `b`, and the largest of `b`.
pub(super) fn difference(a: &[f32], b: &[f32]) -> (f32, f32) {
    assert_eq!(a.len(), b.len());
    let worst = a.iter().zip(b).fold(0f32, |worst, (a, b)| worst.max((a - b).abs()));
    (worst, b.iter().fold(0f32, |size, v| size.max(v.abs())))
}

/// Own kernels against candle's operators, on every number format, prefill and decode.
#[test]
fn every_number_format_computes_what_candle_computes() {
    let dir = tempfile::tempdir().expect("folder");
    for (ty, ..) in TYPES {
        let path = dir.path().join(format!("{ty}.gguf"));
        std::fs::write(&path, llama(ty).finish()).expect("written");
        let (worst, size) = difference(&logits(&path, BackendKind::Cpu), &logits(&path, BackendKind::Candle));
        println!("type {ty}: max |Δlogit| {worst:e} of {size:e}");
        let tolerance = if matches!(ty, 0 | 1 | 30) { 1e-5 * size.max(0.1) } else { QUANTISED * size };
        assert!(size > 0.0 && worst <= tolerance, "type {ty}: {worst} of {size}");
    }
}

/// The same for parts of a model (experts, latents), as a share of what each does to a logit.
const PART_SHARE: f32 = 0.1;

const EXPERTS: usize = 6;

/// A two-layer Qwen2-MoE whose experts, routed and shared, are of GGML type `ty`; everything else is f32.
/// Rows of `silent` experts' last matrices are zero.
fn experts(ty: u32, silent: &str) -> Vec<u8> {
    let (hidden, ff, shared) = (K_BLOCK, K_BLOCK, 2 * K_BLOCK);
    let mut r = Random(11);
    let sizes = [
        ("block_count", 2),
        ("context_length", 64),
        ("embedding_length", hidden),
        ("attention.head_count", 4),
        ("attention.head_count_kv", 2),
        ("expert_count", EXPERTS),
        ("expert_used_count", 2),
        ("expert_feed_forward_length", ff),
        ("expert_shared_feed_forward_length", shared),
    ];
    let mut w = Writer::new("qwen2moe", &sizes);
    w.tensor(&mut r, "token_embd.weight", &[VOCAB, hidden], 0);
    numbers(&mut w, "output_norm.weight", &vec![1.0; hidden]);
    for i in 0..2 {
        for (name, n) in [
            ("attn_norm.weight", hidden),
            ("ffn_norm.weight", hidden),
            ("attn_q.bias", hidden),
            ("attn_k.bias", hidden / 2),
            ("attn_v.bias", hidden / 2),
        ] {
            let value = if name.ends_with("weight") { 1.0 } else { 0.0 };
            numbers(&mut w, &format!("blk.{i}.{name}"), &vec![value; n]);
        }
        for (name, shape, ty) in [
            ("attn_q", vec![hidden, hidden], 0),
            ("attn_k", vec![hidden / 2, hidden], 0),
            ("attn_v", vec![hidden / 2, hidden], 0),
            ("attn_output", vec![hidden, hidden], 0),
            ("ffn_gate_inp", vec![EXPERTS, hidden], 0),
            ("ffn_gate_inp_shexp", vec![hidden], 0),
            ("ffn_gate_exps", vec![EXPERTS, ff, hidden], ty),
            ("ffn_up_exps", vec![EXPERTS, ff, hidden], ty),
            ("ffn_down_exps", vec![EXPERTS, hidden, ff], ty),
            ("ffn_gate_shexp", vec![shared, hidden], ty),
            ("ffn_up_shexp", vec![shared, hidden], ty),
            ("ffn_down_shexp", vec![hidden, shared], ty),
        ] {
            w.tensor(&mut r, &format!("blk.{i}.{name}.weight"), &shape, ty);
            if name == silent {
                w.last().fill(0);
            }
        }
    }
    w.finish()
}

/// As above for experts: rows are gathered by expert, so products begin inside the quantised rows.
#[test]
fn quantised_experts_compute_what_candle_computes() {
    let dir = tempfile::tempdir().expect("folder");
    let path = dir.path().join("experts.gguf");
    let run = |ty, silent, backend| {
        std::fs::write(&path, experts(ty, silent)).expect("written");
        logits(&path, backend)
    };
    let mut wrong = Vec::new();
    for (ty, ..) in TYPES {
        let own = run(ty, "", BackendKind::Cpu);
        let (worst, size) = difference(&own, &run(ty, "", BackendKind::Candle));
        let [routed, shared] = ["ffn_down_exps", "ffn_down_shexp"].map(|silent| {
            let (moved, _) = difference(&run(ty, silent, BackendKind::Cpu), &own);
            moved
        });
        println!("type {ty}: max |Δlogit| {worst:e} of {size:e}; experts move {routed:e}, the shared one {shared:e}");
        // Of what experts do to the logits: the rest of the model could hide them.
        let tolerance = if matches!(ty, 0 | 1 | 30) { 1e-5 * size } else { PART_SHARE * routed.min(shared) };
        if routed.min(shared) < 1e-3 * size || worst > tolerance {
            wrong.push(format!("type {ty}: {worst} of at most {tolerance}"));
        }
    }
    assert!(wrong.is_empty(), "{wrong:?}");
}

/// A two-layer DeepSeek-V2 without experts whose up-projections of latents are of GGML type `ty`, split into
/// keys and values or not; everything else is f32.
fn latents(ty: u32, split: bool, silent: &str) -> Vec<u8> {
    let (hidden, heads, nope, rope, value, rank) = (64, 3, K_BLOCK, 16, 32, K_BLOCK);
    let mut r = Random(13);
    let sizes = [
        ("block_count", 2),
        ("leading_dense_block_count", 2),
        ("context_length", 64),
        ("embedding_length", hidden),
        ("feed_forward_length", hidden),
        ("attention.head_count", heads),
        ("attention.head_count_kv", 1),
        ("attention.kv_lora_rank", rank),
        ("attention.key_length", rank + rope),
        ("attention.value_length", rank),
        ("attention.key_length_mla", nope + rope),
        ("attention.value_length_mla", value),
        ("rope.dimension_count", rope),
    ];
    let mut w = Writer::new("deepseek2", &sizes);
    w.tensor(&mut r, "token_embd.weight", &[VOCAB, hidden], 0);
    numbers(&mut w, "output_norm.weight", &vec![1.0; hidden]);
    for i in 0..2 {
        for (name, n) in [("attn_norm", hidden), ("ffn_norm", hidden), ("attn_kv_a_norm", rank)] {
            numbers(&mut w, &format!("blk.{i}.{name}.weight"), &vec![1.0; n]);
        }
        let mut tensors = vec![
            ("attn_q", vec![heads * (nope + rope), hidden], 0),
            ("attn_kv_a_mqa", vec![rank + rope, hidden], 0),
            ("attn_output", vec![hidden, heads * value], 0),
            ("ffn_gate", vec![hidden, hidden], 0),
            ("ffn_up", vec![hidden, hidden], 0),
            ("ffn_down", vec![hidden, hidden], 0),
        ];
        if split {
            tensors.push(("attn_k_b", vec![heads, rank, nope], ty));
            tensors.push(("attn_v_b", vec![heads, value, rank], ty));
        } else {
            tensors.push(("attn_kv_b", vec![heads * (nope + value), rank], ty));
        }
        for (name, shape, ty) in tensors {
            w.tensor(&mut r, &format!("blk.{i}.{name}.weight"), &shape, ty);
            if name == silent {
                w.last().fill(0);
            } else if name == "attn_q" {
                // Sharp attention, so that keys count as much as values.
                for v in w.last().as_chunks_mut().0 {
                    *v = (f32::from_le_bytes(*v) * 40.0).to_le_bytes();
                }
            }
        }
    }
    w.finish()
}

/// Heads lie one behind the other in the quantised rows; keys of the joint tensor are turned round.
#[test]
fn quantised_latents_compute_what_candle_computes() {
    let dir = tempfile::tempdir().expect("folder");
    let path = dir.path().join("latents.gguf");
    let run = |ty, split, silent, backend| {
        std::fs::write(&path, latents(ty, split, silent)).expect("written");
        logits(&path, backend)
    };
    for (ty, ..) in TYPES {
        for split in [true, false] {
            let own = run(ty, split, "", BackendKind::Cpu);
            let (worst, size) = difference(&own, &run(ty, split, "", BackendKind::Candle));
            // Of what values do to the logits, and keys: the rest of the model could hide them.
            let parts = if split { &["attn_k_b", "attn_v_b"][..] } else { &["attn_kv_b"] };
            let moved = parts.iter().map(|part| difference(&run(ty, split, part, BackendKind::Cpu), &own).0);
            let moved = moved.fold(f32::INFINITY, f32::min);
            println!("type {ty}, split {split}: max |Δlogit| {worst:e} of {size:e}; without a part {moved:e}");
            let tolerance = if matches!(ty, 0 | 1 | 30) { 1e-5 * size } else { PART_SHARE * moved };
            assert!(moved > 1e-3 * size && worst <= tolerance, "type {ty}, split {split}: {worst} of {tolerance}");
        }
    }
}
