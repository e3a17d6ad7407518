//! SmolLM2-135M-Instruct against llama.cpp, in Q4_1, Q8_0 and F16: token ids of texts, greedy text.
//!
//! Needs the files, which are not in the repository: set `TANDEM_SMOLLM2_GGUF` to one of them or to
//! their folder (`goldens/make_smollm2.py` says where they come from). Without it, nothing is checked
//! and the test says so.

use std::path::{Path, PathBuf};

use serde::Deserialize;
use tandem_engine::chat::{ChatTemplate, Message};
use tandem_engine::tokenizer::Tokenizer;
use tandem_engine::{BackendKind, KvPool, LoadOptions, Model, ModelFiles, Rows};

/// A difference from llama.cpp is a near-tie if both sides had the two tokens this close (logits).
/// Both quantise activations to 8 bit, with differently rounded scales.
const NEAR_TIE: f32 = 0.35;
/// Steps that may differ at all, per file, of about 900.
const DIFFERENCES_MAX: usize = 20;

#[derive(Deserialize)]
struct Golden {
    prompts: Vec<Prompt>,
    texts: Vec<Text>,
    files: std::collections::BTreeMap<String, Vec<Greedy>>,
}

#[derive(Deserialize)]
struct Prompt {
    prompt: String,
    ids: Vec<u32>,
}

#[derive(Deserialize)]
struct Text {
    text: String,
    ids: Vec<u32>,
}

#[derive(Deserialize)]
struct Greedy {
    ids: Vec<u32>,
    margins: Vec<f32>,
}

fn golden() -> Golden {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens/smollm2_greedy.json");
    serde_json::from_slice(&std::fs::read(path).expect("the golden is in the repository")).expect("valid golden")
}

/// The files to check, with the name of their number format.
fn files() -> Vec<(String, PathBuf)> {
    let Some(path) = std::env::var_os("TANDEM_SMOLLM2_GGUF").map(PathBuf::from) else {
        println!("SKIPPED: TANDEM_SMOLLM2_GGUF is not set");
        return Vec::new();
    };
    let all: Vec<PathBuf> = if path.is_dir() {
        std::fs::read_dir(&path).expect("folder").map(|e| e.expect("entry").path()).collect()
    } else {
        vec![path]
    };
    let name = |p: &Path| p.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
    golden()
        .files
        .into_keys()
        .filter_map(|kind| {
            let path = all.iter().find(|p| name(p).contains(&kind) && name(p).ends_with(".gguf"))?;
            Some((kind, path.clone()))
        })
        .collect()
}

fn load(path: &Path, backend: BackendKind) -> Model {
    Model::load(&ModelFiles::Gguf(path.to_owned()), &LoadOptions { threads: 0, backend }).expect("loads")
}

/// Logits after each of `ids[from..]`, the whole as one pass.
fn logits(model: &Model, ids: &[u32], from: usize) -> Vec<Vec<f32>> {
    let mut pool = KvPool::new(model, 0..model.spec().layers, 16).expect("pool");
    let mut seq = pool.sequence();
    let h = model.embed(ids).expect("embed");
    let layers = 0..model.spec().layers;
    let h = model.layers(layers, &mut pool, &mut [Rows { seq: &mut seq, rows: ids.len() }], h).expect("layers");
    let rows: Vec<usize> = (from..ids.len()).collect();
    let l = model.head(&h, &rows).expect("head");
    l.data.chunks_exact(l.vocab).map(<[f32]>::to_vec).collect()
}

fn argmax(l: &[f32]) -> u32 {
    tandem_engine::sampling::argmax(l)
}

#[test]
fn token_ids_and_template_equal_llama_cpp() {
    for (kind, path) in files() {
        let tokenizer = Tokenizer::from_gguf(&path).expect("tokenizer");
        let golden = golden();
        for t in &golden.texts {
            assert_eq!(tokenizer.encode(&t.text).expect("encodes"), t.ids, "{kind}: {:?}", t.text);
            let special = t.ids.iter().any(|&id| tokenizer.is_special(id));
            assert!(special || tokenizer.decode(&t.ids).expect("decodes") == t.text, "{:?}", t.text);
        }
        let template = ChatTemplate::from_gguf(&path).expect("template");
        for p in &golden.prompts {
            let text = template.render(&[Message::new("user", &p.prompt)], true, 0).expect("renders");
            assert_eq!(tokenizer.encode(&text).expect("encodes"), p.ids, "{kind}: {:?}", p.prompt);
        }
    }
}

#[test]
fn greedy_text_equals_llama_cpp() {
    for (kind, path) in files() {
        let model = load(&path, BackendKind::Cpu);
        let golden = golden();
        let rows = &golden.files[&kind];
        let (mut steps, mut differences, mut equal) = (0, 0, 0);
        for (p, row) in golden.prompts.iter().zip(rows) {
            // llama.cpp's own text is fed, so that one near-tie does not hide the rest.
            let ids: Vec<u32> = [&p.ids[..], &row.ids[..row.ids.len() - 1]].concat();
            let mut same = true;
            for (step, l) in logits(&model, &ids, p.ids.len() - 1).iter().enumerate() {
                steps += 1;
                let (theirs, mine) = (row.ids[step], argmax(l));
                if mine != theirs {
                    same = false;
                    differences += 1;
                    let margin = l[mine as usize] - l[theirs as usize];
                    println!(
                        "{kind} {:?} step {step}: {mine} here, {theirs} there; margin {margin:.4} here, {:.4} there",
                        p.prompt, row.margins[step]
                    );
                    assert!(margin < NEAR_TIE && row.margins[step] < NEAR_TIE, "not a near-tie");
                }
            }
            equal += usize::from(same);
        }
        println!("{kind}: {equal} of {} texts equal, {differences} near-ties in {steps} steps", rows.len());
        assert!(differences <= DIFFERENCES_MAX);
    }
}

/// The same prompts on candle's operators in f32: the largest difference of any logit shows what the
/// 8-bit activations cost; F16 weights have none.
#[test]
fn candle_agrees() {
    for (kind, path) in files() {
        let (own, candle) = (load(&path, BackendKind::Cpu), load(&path, BackendKind::Candle));
        let golden = golden();
        let mut worst = 0.0f32;
        for p in golden.prompts.iter().take(1) {
            let (a, b) = (logits(&own, &p.ids, p.ids.len() - 2), logits(&candle, &p.ids, p.ids.len() - 2));
            for (a, b) in a.iter().flatten().zip(b.iter().flatten()) {
                worst = worst.max((a - b).abs());
            }
        }
        println!("{kind}: max |Δlogit| against candle in f32 = {worst:e}");
        let tolerance = if kind == "F16" { 2e-3 } else { 2.0 };
        assert!(worst <= tolerance);
    }
}
