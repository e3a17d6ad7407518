//! Loading: small seeded models in every number format, and everything that can be wrong with a file.
//! Whatever the bytes, the answer is a model or a typed error.

mod formats;
mod keys;
mod rope;

use half::f16;
use serde_json::json;

use super::{check_gguf, check_safetensors};
use crate::checkpoint::Checkpoint;
use crate::checkpoint::names::Role;
use crate::container::gguf::Gguf;
use crate::error::EngineError;

const HIDDEN: usize = 64;
const FF: usize = 96;
const VOCAB: usize = 48;

/// Types of the format: F32, F16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2_K … Q6_K, BF16; (id, block, bytes).
const TYPES: [(u32, usize, usize); 13] = [
    (0, 1, 4),
    (1, 1, 2),
    (2, 32, 18),
    (3, 32, 20),
    (6, 32, 22),
    (7, 32, 24),
    (8, 32, 34),
    (10, K_BLOCK, 84),
    (11, K_BLOCK, 110),
    (12, K_BLOCK, 144),
    (13, K_BLOCK, 176),
    (14, K_BLOCK, 210),
    (30, 1, 2),
];

/// Numbers of a block of the k-types.
const K_BLOCK: usize = 256;

/// SplitMix64.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    fn below(&mut self, n: usize) -> usize {
        (self.next() % n.max(1) as u64) as usize
    }
}

#[derive(Default)]
struct Writer {
    meta: Vec<u8>,
    entries: u64,
    tensors: Vec<(String, Vec<usize>, u32, Vec<u8>)>,
}

fn text(out: &mut Vec<u8>, s: &str) {
    out.extend((s.len() as u64).to_le_bytes());
    out.extend(s.as_bytes());
}

impl Writer {
    /// The architecture, its sizes and the norms' epsilon.
    fn new(arch: &str, sizes: &[(&str, usize)]) -> Self {
        let mut w = Self::default();
        w.string("general.architecture", arch);
        for (key, v) in sizes {
            w.number(&format!("{arch}.{key}"), *v as u32);
        }
        w.key(&format!("{arch}.attention.layer_norm_rms_epsilon"), 6, &1e-5f32.to_le_bytes());
        w
    }

    /// Bytes of the tensor written last.
    fn last(&mut self) -> &mut Vec<u8> {
        &mut self.tensors.last_mut().expect("a tensor").3
    }

    fn key(&mut self, key: &str, ty: u32, value: &[u8]) {
        text(&mut self.meta, key);
        self.meta.extend(ty.to_le_bytes());
        self.meta.extend(value);
        self.entries += 1;
    }

    fn number(&mut self, key: &str, v: u32) {
        self.key(key, 4, &v.to_le_bytes());
    }

    fn string(&mut self, key: &str, v: &str) {
        let mut b = Vec::new();
        text(&mut b, v);
        self.key(key, 8, &b);
    }

    fn texts(&mut self, key: &str, list: &[&str]) {
        let mut b = 8u32.to_le_bytes().to_vec();
        b.extend((list.len() as u64).to_le_bytes());
        list.iter().for_each(|t| text(&mut b, t));
        self.key(key, 9, &b);
    }

    /// Shape outermost first; small random numbers of GGML type `ty`.
    fn tensor(&mut self, r: &mut Random, name: &str, shape: &[usize], ty: u32) {
        let (_, block, bytes) = TYPES.into_iter().find(|t| t.0 == ty).expect("known type");
        let n: usize = shape.iter().product();
        let mut data = Vec::new();
        for _ in 0..n / block {
            let mut b: Vec<u8> = (0..bytes).map(|_| r.next() as u8).collect();
            let small = (r.next() % 1000) as f32 * 1e-4 - 0.05;
            match ty {
                0 => b.copy_from_slice(&small.to_le_bytes()),
                1 => b.copy_from_slice(&f16::from_f32(small).to_le_bytes()),
                30 => b.copy_from_slice(&half::bf16::from_f32(small).to_le_bytes()),
                // Factors that make weights of about 0.01; of the types 10, 12 and 13 also of the minima.
                10 => {
                    b[80..82].copy_from_slice(&f16::from_f32(small * 1.5e-2).to_le_bytes());
                    b[82..].copy_from_slice(&f16::from_f32(small * 1.5e-2).to_le_bytes());
                }
                11 => b[108..].copy_from_slice(&f16::from_f32(small * 1e-2).to_le_bytes()),
                12 | 13 => {
                    b[..2].copy_from_slice(&f16::from_f32(small * 1e-3).to_le_bytes());
                    b[2..4].copy_from_slice(&f16::from_f32(small * 5e-3).to_le_bytes());
                }
                14 => b[208..].copy_from_slice(&f16::from_f32(small * 5e-4).to_le_bytes()),
                8 => b[..2].copy_from_slice(&f16::from_f32(small * 6e-3).to_le_bytes()),
                _ => {
                    b[..2].copy_from_slice(&f16::from_f32(small * 0.1).to_le_bytes());
                    if matches!(ty, 3 | 7) {
                        b[2..4].copy_from_slice(&f16::from_f32(small).to_le_bytes());
                    }
                }
            }
            data.extend(b);
        }
        self.tensors.push((name.to_owned(), shape.to_vec(), ty, data));
    }

    fn finish(&self) -> Vec<u8> {
        let mut out = b"GGUF".to_vec();
        out.extend(3u32.to_le_bytes());
        out.extend((self.tensors.len() as u64).to_le_bytes());
        out.extend(self.entries.to_le_bytes());
        out.extend(&self.meta);
        let mut offset = 0u64;
        for (name, shape, ty, data) in &self.tensors {
            text(&mut out, name);
            out.extend((shape.len() as u32).to_le_bytes());
            shape.iter().rev().for_each(|d| out.extend((*d as u64).to_le_bytes()));
            out.extend(ty.to_le_bytes());
            out.extend(offset.to_le_bytes());
            offset += (data.len() as u64).next_multiple_of(32);
        }
        for (.., data) in &self.tensors {
            out.resize(out.len().next_multiple_of(32), 0);
            out.extend(data);
        }
        out
    }
}

/// A two-layer Llama with matrices of GGML type `ty`.
fn llama(ty: u32) -> Writer {
    let mut r = Random(7);
    let (hidden, ff) = if (10..=14).contains(&ty) { (K_BLOCK, K_BLOCK) } else { (HIDDEN, FF) };
    let sizes = [
        ("block_count", 2),
        ("context_length", 64),
        ("embedding_length", hidden),
        ("feed_forward_length", ff),
        ("attention.head_count", 4),
        ("attention.head_count_kv", 2),
        ("rope.dimension_count", hidden / 4),
    ];
    let mut w = Writer::new("llama", &sizes);
    w.number("tokenizer.ggml.eos_token_id", 2);
    w.string("tokenizer.ggml.model", "gpt2");
    w.string("tokenizer.ggml.pre", "smollm");
    w.texts("tokenizer.ggml.tokens", &["a", "b", "ab"]);
    w.texts("tokenizer.ggml.merges", &["a b"]);
    w.tensor(&mut r, "token_embd.weight", &[VOCAB, hidden], ty);
    // Norms of one: what a layer adds is not lost beside what it gets.
    numbers(&mut w, "output_norm.weight", &vec![1.0; hidden]);
    for i in 0..2 {
        for name in ["attn_norm", "ffn_norm"] {
            numbers(&mut w, &format!("blk.{i}.{name}.weight"), &vec![1.0; hidden]);
        }
        for (name, shape, ty) in [
            ("attn_q", vec![hidden, hidden], ty),
            ("attn_k", vec![hidden / 2, hidden], ty),
            ("attn_v", vec![hidden / 2, hidden], ty),
            ("attn_output", vec![hidden, hidden], ty),
            ("ffn_gate", vec![ff, hidden], ty),
            ("ffn_up", vec![ff, hidden], ty),
            ("ffn_down", vec![hidden, ff], ty),
        ] {
            w.tensor(&mut r, &format!("blk.{i}.{name}.weight"), &shape, ty);
        }
    }
    w
}

/// Seeded mutations of a whole file: bytes, extreme counts, truncation, shuffled pieces.
#[test]
fn mutated_gguf_never_panics() {
    let base = llama(8).finish();
    let header = base.len() - 60_000;
    let mut refused = 0;
    for seed in 0..6000 {
        let mut r = Random(seed);
        let mut bytes = base.clone();
        for _ in 0..=r.below(6) {
            // Most mutations hit the header.
            let limit = if r.below(8) == 0 { bytes.len() } else { header.min(bytes.len()) };
            let at = r.below(limit);
            match r.below(5) {
                0 => bytes.truncate(at),
                1 => {
                    let extreme = [0, 1, u64::MAX, 1 << 32, 1 << 62, 0x8000_0000_0000_0000, 255][r.below(7)];
                    let end = (at + 8).min(bytes.len());
                    bytes[at..end].copy_from_slice(&extreme.to_le_bytes()[..end - at]);
                }
                2 => {
                    let n = r.below(64).min(bytes.len() - at);
                    bytes.drain(at..at + n);
                }
                3 => {
                    let from = r.below(limit);
                    let n = r.below(48).min(limit - from);
                    let piece = bytes[from..from + n].to_vec();
                    bytes.splice(at..at, piece);
                }
                _ => bytes[at] ^= 1 << r.below(8),
            }
            if bytes.is_empty() {
                break;
            }
        }
        let result =
            std::panic::catch_unwind(|| check_gguf(&bytes).map(|_| crate::tokenizer::from_gguf_bytes(&bytes).err()));
        let result = result.unwrap_or_else(|_| panic!("panicked at seed {seed}"));
        refused += usize::from(result.is_err());
    }
    println!("{refused} of 6000 mutated files were refused");
    assert!(refused > 2000);
}

#[test]
fn broken_gguf_is_refused_with_the_reason() {
    let refused = |bytes: &[u8], part: &str| {
        let e = check_gguf(bytes).expect_err(part).to_string();
        assert!(e.contains(part), "{e:?} does not name {part:?}");
    };
    let good = llama(0).finish();
    refused(b"", "ends at byte 0");
    refused(b"GGML\x03\0\0\0", "does not begin with `GGUF`");
    refused(b"GGUF\x63\0\0\0", "version 99");
    refused(&good[..good.len() - 1], "does not fit a file of");
    for n in [8, 16] {
        let mut b = good.clone();
        b[n..n + 8].copy_from_slice(&u64::MAX.to_le_bytes());
        refused(&b, "the rest of the file has room for");
    }
    for alignment in [0u32, 1, 3, 1 << 30] {
        let mut w = llama(0);
        w.number("general.alignment", alignment);
        refused(&w.finish(), "general.alignment");
    }
    let with = |f: &dyn Fn(&mut Writer)| {
        let mut w = llama(0);
        f(&mut w);
        w.finish()
    };
    refused(&with(&|w| w.string("general.architecture", "llama")), "appears twice");
    refused(&with(&|w| w.tensors.retain(|t| t.0 != "blk.1.ffn_up.weight")), "blk.1.ffn_up.weight");
    refused(&with(&|w| w.tensors[0].1 = vec![1, usize::MAX]), "token_embd.weight");
    refused(&with(&|w| w.tensors[0].1 = vec![0, 4]), "token_embd.weight");
    refused(&with(&|w| w.tensors[0].2 = 99), "GGML type 99");
    refused(&with(&|w| w.tensors[2].1 = vec![HIDDEN / 2]), "blk.0.attn_norm.weight");
    refused(&with(&|w| w.tensors.push(w.tensors[0].clone())), "stored twice");
    refused(&with(&|w| w.number("llama.expert_count", 8)), "llama.expert_used_count");
    // The norm would lie inside the embedding.
    let mut lying = good.clone();
    let name = b"output_norm.weight";
    let at = good.windows(name.len()).position(|part| part == name).expect("there") + name.len() + 4 + 8 + 4;
    lying[at..at + 8].copy_from_slice(&32u64.to_le_bytes());
    refused(&lying, "tensor `output_norm.weight`: lies on the bytes of tensor `token_embd.weight`");
    // What no part of the decoder uses.
    refused(&with(&|w| numbers(w, "blk.0.attn_q_norm.weight", &[1.0; 16])), "blk.0.attn_q_norm.weight");
    refused(&with(&|w| numbers(w, "output.bias", &[1.0; VOCAB])), "output.bias");
    let mut deep = Vec::new();
    for _ in 0..100 {
        deep.extend(9u32.to_le_bytes());
        deep.extend(1u64.to_le_bytes());
    }
    refused(&with(&|w| w.key("deep", 9, &deep)), "nested too deep");
}

/// The writer above is a GGUF as candle reads it, too.
#[test]
fn candle_reads_the_same_header() {
    let bytes = llama(8).finish();
    let theirs = candle_core::quantized::gguf_file::Content::read(&mut std::io::Cursor::new(&bytes)).expect("reads");
    let own = Gguf::parse(&bytes).expect("parses");
    assert_eq!(own.tensors.len(), theirs.tensor_infos.len());
    for (name, t) in &own.tensors {
        let info = &theirs.tensor_infos[name];
        assert_eq!(info.shape.dims(), t.shape, "{name}");
        assert_eq!((theirs.tensor_data_offset + info.offset) as usize, t.range.start, "{name}");
    }
}

#[test]
fn unknown_pre_tokenizers_are_refused() {
    let mut w = llama(0);
    let key = b"smollm";
    let bytes = w.finish();
    let at = bytes.windows(key.len()).position(|p| p == key).expect("there");
    let mut bytes = bytes;
    bytes[at..at + key.len()].copy_from_slice(b"nonsen");
    let e = crate::tokenizer::from_gguf_bytes(&bytes).expect_err("refused");
    assert!(
        matches!(&e, EngineError::UnknownPreTokenizer { name, known } if name == "nonsen" && known.contains("smollm"))
    );
    w.tensors.clear();
    let t = crate::tokenizer::from_gguf_bytes(&w.finish()).expect("tokenizer");
    assert_eq!(t.encode("ab").expect("encodes"), [2]);
}

/// Adds a vector of these numbers.
fn numbers(w: &mut Writer, name: &str, values: &[f32]) {
    let data = values.iter().flat_map(|v| v.to_le_bytes()).collect();
    w.tensors.push((name.to_owned(), vec![values.len()], 0, data));
}

#[test]
fn biases_of_the_mlp_are_loaded() {
    let mut w = llama(0);
    for i in 0..2 {
        numbers(&mut w, &format!("blk.{i}.ffn_gate.bias"), &[0.1; FF]);
        numbers(&mut w, &format!("blk.{i}.ffn_up.bias"), &[0.2; FF]);
        numbers(&mut w, &format!("blk.{i}.ffn_down.bias"), &[0.3; HIDDEN]);
    }
    assert!(check_gguf(&w.finish()).expect("loads").mlp_bias);
    w.tensors.pop();
    let e = check_gguf(&w.finish()).expect_err("one is missing").to_string();
    assert!(e.contains("blk.1.ffn_down.bias"), "{e}");
}

/// The embedded edge model with more tensors of one number.
fn edge_with(names: &[&str]) -> Vec<u8> {
    let weights = tandem_models::EDGE.weights;
    let start = 8 + u64::from_le_bytes(weights[..8].try_into().expect("8 bytes")) as usize;
    let (mut header, mut data): (serde_json::Map<String, serde_json::Value>, _) =
        (serde_json::from_slice(&weights[8..start]).expect("json"), weights[start..].to_vec());
    for name in names {
        let offsets = [data.len(), data.len() + 4];
        header.insert((*name).to_owned(), json!({ "dtype": "F32", "shape": [1], "data_offsets": offsets }));
        data.extend(1f32.to_le_bytes());
    }
    let header = serde_json::Value::Object(header).to_string();
    [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &data].concat()
}

#[test]
fn tensors_that_nothing_uses_are_refused() {
    let config = tandem_models::EDGE.config;
    // Tables that old files have, and a layer that predicts further tokens.
    let fine = ["model.layers.0.self_attn.rotary_emb.inv_freq", "model.layers.3.shared_head.norm.weight"];
    check_safetensors(config, &edge_with(&fine)).expect("nothing that changes the answer");
    for name in ["model.layers.0.mlp.gate_proj.bias", "model.layers.2.self_attn.q_norm.weight", "lm_head.bias"] {
        let e = check_safetensors(config, &edge_with(&[name]));
        assert!(matches!(&e, Err(EngineError::Tensor { name: named, .. }) if named == name), "{name}: {e:?}");
    }
    let mut tied: serde_json::Value = serde_json::from_slice(config).expect("json");
    tied["tie_word_embeddings"] = json!(true);
    check_safetensors(tied.to_string().as_bytes(), &edge_with(&[])).expect("a head that is stored all the same");
}

fn deepseek() -> (serde_json::Value, Vec<u8>) {
    let e = &tandem_models::CLOUD;
    (serde_json::from_slice(e.config).expect("json"), e.weights.to_vec())
}

#[test]
fn broken_configs_are_refused_with_the_field() {
    let (config, weights) = deepseek();
    for (field, bad) in [
        ("model_type", json!("gpt9")),
        ("hidden_size", json!(0)),
        ("hidden_size", json!(u64::MAX)),
        ("hidden_size", json!("big")),
        ("hidden_size", json!(-4)),
        ("num_hidden_layers", json!(100_000)),
        ("vocab_size", json!(1u64 << 40)),
        ("n_routed_experts", json!(1u64 << 40)),
        ("num_experts_per_tok", json!(17)),
        ("n_group", json!(3)),
        ("topk_group", json!(2)),
        ("rms_norm_eps", json!(-1.0)),
        ("rope_theta", json!(0)),
        ("rope_scaling", json!({"type": "spiral", "factor": 40})),
        ("partial_rotary_factor", json!(0.5)),
        ("hidden_act", json!("gelu")),
        ("scoring_func", json!("softmax")),
        ("attention_bias", json!(true)),
        ("qk_rope_head_dim", json!(15)),
        ("quantization_config", json!({"quant_method": "gptq"})),
        ("quantization_config", json!({"quant_method": "fp8", "weight_block_size": [64, 128]})),
    ] {
        let mut c = config.clone();
        c[field] = bad.clone();
        match check_safetensors(c.to_string().as_bytes(), &weights) {
            Err(EngineError::Spec { field: named, .. })
                if named == field || (field == "qk_rope_head_dim" && named == "head_dim") => {}
            other => panic!("{field} = {bad}: {other:?}"),
        }
        let mut c = config.clone();
        let required = !matches!(
            field,
            "n_group"
                | "topk_group"
                | "rope_scaling"
                | "rope_theta"
                | "partial_rotary_factor"
                | "hidden_act"
                | "scoring_func"
                | "attention_bias"
                | "quantization_config"
        );
        if required {
            c.as_object_mut().expect("object").remove(field);
            let e = check_safetensors(c.to_string().as_bytes(), &weights);
            assert!(
                matches!(&e, Err(EngineError::Spec { field: named, .. }) if named == field),
                "{field} missing: {e:?}"
            );
        }
    }
    assert!(matches!(check_safetensors(b"{", &weights), Err(EngineError::Json { .. })));
    // Shapes that the weights do not have.
    for (field, n) in [("hidden_size", 128), ("num_hidden_layers", 9), ("n_routed_experts", 15), ("vocab_size", 4095)] {
        let mut c = config.clone();
        c[field] = json!(n);
        let e = check_safetensors(c.to_string().as_bytes(), &weights);
        assert!(matches!(e, Err(EngineError::Tensor { .. })), "{field} = {n}: {e:?}");
    }
}

#[test]
fn broken_safetensors_are_refused() {
    let e = &tandem_models::EDGE;
    for n in [0, 7, 8, 100, e.weights.len() / 2, e.weights.len() - 1] {
        let r = check_safetensors(e.config, &e.weights[..n]);
        assert!(matches!(r, Err(EngineError::Format { format: "safetensors", .. })), "{n} bytes: {r:?}");
    }
    let mut long = e.weights.to_vec();
    long[..8].copy_from_slice(&u64::MAX.to_le_bytes());
    assert!(matches!(check_safetensors(e.config, &long), Err(EngineError::Format { .. })));
    let header = u64::from_le_bytes(e.weights[..8].try_into().expect("8 bytes")) as usize;
    let mut loaded = 0;
    for seed in 0..300 {
        let mut r = Random(seed);
        let mut b = e.weights.to_vec();
        for _ in 0..=r.below(4) {
            b[8 + r.below(header)] = b"0123456789,:{}[]\"F326"[r.below(21)];
        }
        let result = std::panic::catch_unwind(|| check_safetensors(e.config, &b).is_ok());
        loaded += usize::from(result.unwrap_or_else(|_| panic!("panicked at seed {seed}")));
    }
    println!("{loaded} of 300 mutated files still load");
}

/// gpt-oss's own files: experts in MXFP4, stacked, with gate and up in turns, scales beside them.
#[test]
fn stacked_experts_in_mxfp4_are_cut_by_row() {
    use safetensors::Dtype::U8;
    use safetensors::tensor::TensorView;

    let config = json!({
        "model_type": "gpt_oss", "vocab_size": 8, "hidden_size": 64, "intermediate_size": 2, "num_hidden_layers": 1,
        "num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 64, "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5, "num_local_experts": 2, "num_experts_per_tok": 1, "sliding_window": 8, "hidden_act": "silu",
        "quantization_config": { "quant_method": "mxfp4" }
    });
    // Of expert e, row r, block b: every value is the code r + 1, the scale 2^(e + b).
    let codes: Vec<u8> = (0..2 * 4 * 2 * 16).map(|i| (i / 32 % 4 + 1) as u8 * 0x11).collect();
    let scales: Vec<u8> = (0..2 * 4 * 2).map(|i| (127 + i / 8 + i % 2) as u8).collect();
    let at = "model.layers.0.mlp.experts.gate_up_proj";
    let open = |scales_shape: Vec<usize>| {
        let tensors = [
            (format!("{at}_blocks"), TensorView::new(U8, vec![2, 4, 2, 16], &codes).expect("fits")),
            (format!("{at}_scales"), TensorView::new(U8, scales_shape, &scales).expect("fits")),
        ];
        let bytes = safetensors::serialize(tensors, None).expect("a file");
        Checkpoint::of_safetensors(config.to_string().as_bytes(), bytes).expect("an index")
    };
    let file = open(vec![2, 4, 2]);
    // Codes 1, 2, 3, 4 are 0.5, 1, 1.5, 2; the gate has rows 0 and 2, the other rows go up.
    for (role, rows, scale) in [
        (Role::ExpertGate(0), [0.5, 1.5], 1.0),
        (Role::ExpertUp(0), [1.0, 2.0], 1.0),
        (Role::ExpertGate(1), [0.5, 1.5], 2.0),
        (Role::ExpertUp(1), [1.0, 2.0], 2.0),
    ] {
        let t = file.find(0, role).expect("reads").expect("is there");
        assert_eq!(t.shape, [2, 64], "{role:?}");
        let wanted: Vec<f32> = rows.iter().flat_map(|v| [[v * scale; 32], [v * scale * 2.0; 32]].concat()).collect();
        assert_eq!(t.to_f32().expect("known"), wanted, "{role:?}");
    }
    assert!(file.find(0, Role::ExpertGate(2)).is_err());
    let e = open(vec![2, 2, 4]).find(0, Role::ExpertGate(0)).err().expect("scales that do not fit").to_string();
    assert!(e.contains("gate_up_proj_scales"), "{e}");
}
