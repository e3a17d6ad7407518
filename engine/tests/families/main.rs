//! Every family against its reference: logits, greedy text, and the same bits however a text is cut.
//! `goldens/make_families.py` says where the numbers come from. The table of `docs/parity.md` is
//! written by this test: `TANDEM_WRITE_PARITY=1 cargo test --workspace --test families`.

mod checkpoint;
mod digests;

use std::fmt::Write;
use std::path::Path;

use checkpoint::{Files, Golden};
use serde_json::{Value, json};
use tandem_engine::{BackendKind, Hidden, KvPool, LoadOptions, Model, ModelFiles, Rows, Sequence};

/// Largest difference of any logit from the reference.
const TOLERANCE: f32 = 1e-3;
/// Column of the table that holds the difference.
const DELTA_COLUMN: usize = 5;
/// Smallest change of some logit that shows that a field of the configuration is used.
const CHANGE_MIN: f32 = 1e-2;

fn load(files: &ModelFiles, backend: BackendKind) -> Model {
    Model::load(files, &LoadOptions { threads: 2, backend }).unwrap_or_else(|e| panic!("{files:?}: {e}"))
}

/// A model with one sequence.
struct Text<'a> {
    model: &'a Model,
    pool: KvPool,
    seq: Sequence,
}

impl<'a> Text<'a> {
    fn new(model: &'a Model) -> Self {
        let pool = KvPool::new(model.kv_layout(), 0..model.spec().layers, 16).expect("pool");
        let seq = pool.sequence();
        Self { model, pool, seq }
    }

    fn forward(&mut self, ids: &[u32]) -> Hidden {
        let h = self.model.embed(ids).expect("embed");
        let items = &mut [Rows { seq: &mut self.seq, rows: ids.len() }];
        self.model.layers(0..self.model.spec().layers, &mut self.pool, items, h).expect("layers")
    }

    fn logits(&mut self, ids: &[u32]) -> Vec<f32> {
        let h = self.forward(ids);
        self.model.head(&h, &(0..ids.len()).collect::<Vec<_>>()).expect("head").data
    }
}

fn largest_difference(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).fold(0.0, |m, (a, b)| if (a - b).abs() <= m { m } else { (a - b).abs() })
}

/// A row of the table.
struct Row {
    case: String,
    format: &'static str,
    delta: f32,
    positions: usize,
    equal: usize,
    greedy: bool,
}

/// Compares a model with the golden logits, and its own greedy text with the golden one.
fn compare(golden: &Golden, format: &'static str, model: &Model) -> Row {
    let vocab = golden.vocab;
    let logits = Text::new(model).logits(&golden.ids);
    let choices = |l: &[f32]| -> Vec<u32> { l.chunks_exact(vocab).map(tandem_engine::sampling::argmax).collect() };
    let (mine, theirs) = (choices(&logits), choices(&golden.logits));
    let (prompt, rest) = golden.ids.split_at(golden.prompt);
    let mut text = Text::new(model);
    let mut last = text.logits(prompt);
    let mut greedy = Vec::new();
    while greedy.len() < rest.len() {
        let id = tandem_engine::sampling::argmax(&last[last.len() - vocab..]);
        greedy.push(id);
        last = text.logits(&[id]);
    }
    Row {
        case: golden.case.clone(),
        format,
        delta: largest_difference(&logits, &golden.logits),
        positions: mine.len(),
        equal: mine.iter().zip(&theirs).filter(|(a, b)| a == b).count(),
        greedy: greedy == rest,
    }
}

#[test]
fn every_family_computes_what_its_reference_computes() {
    let mut table = String::from(
        "# Parity\n\nWritten by the engine's test `families`; do not edit. Tiny seeded checkpoints (`engine/tests/goldens/`) against their\n\
         reference in f32: transformers, or for MiniCPM 1/2/4 its published formulas. Every position of the text\n\
         is compared. `max |Δlogit|` is rounded up to a power of ten. GGUF files hold the same weights; llama.cpp\n\
         read them and its own distance from the reference stands beside.\n\n\
         | case | family | format | kernels | max \\|Δlogit\\| | argmax equal | greedy text equal | llama.cpp's max \\|Δlogit\\| |\n\
         |---|---|---|---|---|---|---|---|\n",
    );
    let goldens = checkpoint::all();
    for golden in &goldens {
        for (format, files) in golden.files() {
            for (backend, name) in [(BackendKind::Cpu, "own"), (BackendKind::Candle, "candle")] {
                let row = compare(golden, format, &load(&files.source, backend));
                println!(
                    "{} {format} {name}: max |Δlogit| {:e}, argmax {} of {}, greedy {}, margin {}",
                    row.case, row.delta, row.equal, row.positions, row.greedy, golden.margin
                );
                assert!(row.positions >= 64, "{} is too short", row.case);
                assert!(row.delta <= TOLERANCE, "{} {format} {name}: {}", row.case, row.delta);
                assert_eq!(row.equal, row.positions, "{} {format} {name}", row.case);
                assert!(row.greedy, "{} {format} {name}", row.case);
                let peer = golden.llama_cpp_delta.filter(|_| row.format == "GGUF");
                let peer = peer.map_or_else(|| "–".to_owned(), decade);
                writeln!(
                    table,
                    "| {} | {} | {format} | {name} | {} | {} of {} | yes | {peer} |",
                    row.case,
                    golden.model_type(),
                    decade(row.delta),
                    row.equal,
                    row.positions,
                )
                .expect("string");
            }
        }
    }
    for golden in &goldens {
        if let Some(rounding) = golden.rounding {
            writeln!(
                table,
                "\n{}: the reference has the FP8 weights rounded to f16, as the engine keeps them; without that rounding its\n\
                 logits differ by at most {rounding:.3} of {:.1}, with the same choice at every position.",
                golden.case,
                golden.logits.iter().fold(0f32, |a, v| a.max(v.abs())),
            )
            .expect("string");
        }
    }
    table.push_str(
        "\ngpt_oss: the configuration says `truncate: false`; llama.cpp rounds the ramp of YaRN to whole pairs, which on a head of\n\
         eight pairs is another model (with the same rounding the engine is as far from the reference).\n",
    );
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/parity.md");
    if std::env::var_os("TANDEM_WRITE_PARITY").is_some() {
        std::fs::write(&path, &table).expect("written");
    }
    let there = std::fs::read_to_string(&path).unwrap_or_default();
    let same = there.lines().count() == table.lines().count();
    let same = same && there.lines().zip(table.lines()).all(|(there, now)| agrees(there, now));
    assert!(same, "docs/parity.md is not up to date; run this test with TANDEM_WRITE_PARITY=1");
}

/// Whether a line of the page says what has been measured now. Another machine's candle may land on
/// the other side of a power of ten.
fn agrees(there: &str, now: &str) -> bool {
    let (there, now): (Vec<&str>, Vec<&str>) = (there.split('|').collect(), now.split('|').collect());
    let delta = |line: &[&str]| line.get(DELTA_COLUMN).and_then(|v| v.trim().parse::<f32>().ok());
    there.len() == now.len()
        && there.iter().zip(&now).enumerate().all(|(i, (a, b))| i == DELTA_COLUMN || a == b)
        && delta(&there).is_none_or(|d| delta(&now).is_some_and(|n| n <= 10.0 * d))
}

/// The next power of ten.
fn decade(v: f32) -> String {
    if v == 0.0 { "0".into() } else { format!("1e{}", v.log10().ceil() as i32) }
}

/// In one shot, in chunks, token by token, and between strangers in a ragged batch.
#[test]
fn bits_do_not_depend_on_how_a_text_is_computed() {
    for golden in checkpoint::all() {
        let files = Files::safetensors(&golden, &golden.config);
        let model = load(&files.source, BackendKind::Cpu);
        let ids = &golden.ids;
        let whole = Text::new(&model).forward(ids);
        for chunk in [1, 7, 33] {
            let mut text = Text::new(&model);
            let data: Vec<f32> = ids.chunks(chunk).flat_map(|part| text.forward(part).data).collect();
            assert_eq!(data, whole.data, "{} in chunks of {chunk}", golden.case);
        }
        let mut pool = KvPool::new(model.kv_layout(), 0..model.spec().layers, 16).expect("pool");
        let (mut a, mut b, mut c) = (pool.sequence(), pool.sequence(), pool.sequence());
        for (from, to) in [(0, 20), (20, 21), (21, ids.len())] {
            a.truncate(0);
            let (before, mine, after) = (&ids[30..47], &ids[from..to], &ids[to - 1..to]);
            let h = model.embed(&[before, mine, after].concat()).expect("embed");
            let mut items = [
                Rows { seq: &mut a, rows: before.len() },
                Rows { seq: &mut b, rows: mine.len() },
                Rows { seq: &mut c, rows: after.len() },
            ];
            let h = model.layers(0..model.spec().layers, &mut pool, &mut items, h).expect("layers");
            let mine = h.slice(before.len()..before.len() + mine.len()).expect("rows");
            assert_eq!(mine.data, whole.slice(from..to).expect("rows").data, "{} in a batch", golden.case);
        }
    }
}

/// A golden proves a mechanism only if the logits move without it: every field that the golden lists
/// is changed, and the logits must leave the reference, the fingerprint of the layers too.
#[test]
fn every_mechanism_shows_in_the_logits() {
    for golden in checkpoint::all() {
        let digest = |m: &Model| *m.layer_digests().last().expect("layers");
        let model = load(&Files::safetensors(&golden, &golden.config).source, BackendKind::Cpu);
        let (as_is, whole) = (digest(&model), model.digest());
        for (field, value) in &golden.changes {
            let mut config = golden.config.clone();
            config[field] = value.clone();
            let files = Files::safetensors(&golden, &config);
            let model = load(&files.source, BackendKind::Cpu);
            let delta = largest_difference(&Text::new(&model).logits(&golden.ids), &golden.logits);
            println!("{} {field} = {value}: {delta}", golden.case);
            assert!(delta >= CHANGE_MIN, "{}: {field} = {value} changes logits by {delta} only", golden.case);
            let of_head = ["final_logit_softcapping", "dim_model_base"].contains(&field.as_str());
            assert!(of_head || digest(&model) != as_is, "{}: {field} is not in the fingerprint", golden.case);
            assert_ne!(model.digest(), whole, "{}: {field} is not in the model's fingerprint", golden.case);
        }
    }
}

/// Fields that shape numbers in some family, with values that change what any model computes that uses them.
fn shaping_fields() -> Vec<Value> {
    let rope = |rope: Value| json!({ "rope_scaling": rope });
    vec![
        json!({ "sliding_window": 5, "use_sliding_window": true, "max_window_layers": 0, "layer_types": null }),
        json!({ "layer_types": ["linear_attention", "linear_attention"] }),
        json!({ "attention_bias": true }),
        json!({ "mlp_bias": true }),
        json!({ "qkv_bias": true }),
        json!({ "use_bias": true }),
        json!({ "use_qk_norm": true }),
        json!({ "clip_qkv": 0.5 }),
        json!({ "attn_logit_softcapping": 0.7 }),
        json!({ "final_logit_softcapping": 0.7 }),
        json!({ "attention_multiplier": 0.3 }),
        json!({ "query_pre_attn_scalar": 7 }),
        json!({ "embedding_multiplier": 3 }),
        json!({ "residual_multiplier": 0.5 }),
        json!({ "logits_scaling": 3 }),
        json!({ "logit_scale": 0.25 }),
        json!({ "scale_emb": 3 }),
        json!({ "scale_depth": 3 }),
        json!({ "dim_model_base": 7 }),
        json!({ "partial_rotary_factor": 0.5 }),
        json!({ "rotary_pct": 0.25 }),
        json!({ "rope_theta": 77.0, "rope_parameters": null }),
        json!({ "rms_norm_eps": 0.5 }),
        rope(json!({ "rope_type": "linear", "factor": 9.0 })),
        rope(json!({ "rope_type": "linear", "factor": 9.0, "attention_factor": 2.0 })),
        rope(json!({ "rope_type": "default", "attention_factor": 2.0 })),
        rope(json!({ "rope_type": "dynamic", "factor": 2.0 })),
        rope(
            json!({ "rope_type": "yarn", "factor": 9.0, "original_max_position_embeddings": 16, "attention_factor": 3.0 }),
        ),
        rope(json!({ "rope_type": "yarn", "factor": 9.0, "original_max_position_embeddings": 16, "of_next_year": 3 })),
        rope(json!({ "full_attention": { "rope_type": "linear", "factor": 9.0 } })),
        json!({ "no_rope_layers": [1, 0] }),
        json!({ "position_embedding_type": "alibi" }),
        json!({ "use_bidirectional_attention": true }),
        json!({ "is_causal": false }),
        json!({ "attention_chunk_size": 4 }),
        json!({ "index_topk": 4 }),
        json!({ "n_shared_experts": 3 }),
        json!({ "shared_expert_intermediate_size": 17 }),
        json!({ "num_experts": 6, "num_local_experts": 7, "n_routed_experts": 5 }),
        json!({ "routed_scaling_factor": 3.5 }),
        json!({ "first_k_dense_replace": 2, "decoder_sparse_step": 2 }),
        json!({ "mlp_only_layers": [0] }),
        json!({ "swiglu_limit": 0.1 }),
    ]
}

/// A field that shapes numbers moves the logits of a family or is refused, never dropped.
#[test]
fn a_field_that_shapes_numbers_is_used_or_refused() {
    let (mut used, mut refused, mut dropped) = (0, 0, Vec::new());
    for golden in checkpoint::all() {
        let as_is = load(&Files::safetensors(&golden, &golden.config).source, BackendKind::Cpu).digest();
        for mut fields in shaping_fields() {
            // Where a family's files leave a bias out, it is there.
            let there = [("gpt_oss", "attention_bias"), ("qwen2_moe", "qkv_bias")];
            for (name, value) in fields.as_object_mut().expect("an object") {
                if there.iter().any(|(kind, field)| golden.model_type() == *kind && name == field) {
                    *value = false.into();
                }
            }
            let mut config = golden.config.clone();
            for (name, value) in fields.as_object().expect("an object") {
                config[name] = value.clone();
            }
            let spec = tandem_engine::DecoderSpec::from_hf(config.to_string().as_bytes());
            if config == golden.config {
                continue;
            }
            let files = spec.ok().map(|_| Files::safetensors(&golden, &config));
            let options = LoadOptions { threads: 2, backend: BackendKind::Cpu };
            let Some(Ok(model)) = files.as_ref().map(|files| Model::load(&files.source, &options)) else {
                refused += 1;
                continue;
            };
            assert_ne!(model.digest(), as_is, "{}: {fields} is not in the fingerprint", golden.case);
            match largest_difference(&Text::new(&model).logits(&golden.ids), &golden.logits) {
                moved if moved > TOLERANCE => used += 1,
                moved => dropped.push(format!("{} {fields}: {moved}", golden.case)),
            }
        }
    }
    println!("{used} used, {refused} refused");
    assert!(dropped.is_empty() && used > 0 && refused > 0, "{}", dropped.join("\n"));
}
