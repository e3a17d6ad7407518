//! A seeded Llama of 80 KB says what llama.cpp says (`goldens/make_tiny_llama.py`), whole and in parts,
//! and a set of parts that disagree is refused.

use std::path::{Path, PathBuf};

use serde_json::Value;
use tandem_engine::tokenizer::{Tokenizer, gguf_stop_tokens};
use tandem_engine::{EngineError, KvPool, LoadOptions, Model, ModelFiles, Rows};

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens").join(name)
}

fn load(path: &Path) -> Result<Model, EngineError> {
    Model::load(&ModelFiles::Gguf(path.to_owned()), &LoadOptions { threads: 1, ..LoadOptions::default() })
}

fn greedy(model: &Model, prompt: &[u32], steps: usize) -> Vec<u32> {
    let layers = 0..model.spec().layers;
    let mut pool = KvPool::new(model.kv_layout(), layers.clone(), 8).expect("a pool");
    let mut seq = pool.sequence();
    let (mut next, mut out) = (prompt.to_vec(), Vec::new());
    while out.len() < steps {
        let hidden = model.embed(&next).expect("embeds");
        let mut rows = [Rows { seq: &mut seq, rows: next.len() }];
        let hidden = model.layers(layers.clone(), &mut pool, &mut rows, hidden).expect("runs");
        let logits = model.head(&hidden, &[next.len() - 1]).expect("logits").data;
        let best = (0..logits.len()).max_by(|&a, &b| logits[a].total_cmp(&logits[b])).expect("a token") as u32;
        out.push(best);
        next = vec![best];
    }
    out
}

#[test]
fn whole_and_split_models_say_what_llama_cpp_says() {
    let answers: Value =
        serde_json::from_slice(&std::fs::read(golden("tiny-llama.json")).expect("goldens")).expect("json");
    for name in ["tiny-llama-f16.gguf", "tiny-llama-split-00001-of-00002.gguf", "tiny-llama-split-00002-of-00002.gguf"]
    {
        let path = golden(name);
        let model = load(&path).expect(name);
        let tokenizer = Tokenizer::from_gguf(&path).expect(name);
        // The start and the end of a turn, and `<|endoftext|>`.
        assert_eq!(gguf_stop_tokens(&path, model.spec()).expect(name), [300, 302]);
        for row in answers["prompts"].as_array().expect("prompts") {
            let ids = |key: &str| -> Vec<u32> { serde_json::from_value(row[key].clone()).expect(key) };
            let text = format!(
                "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n",
                row["prompt"].as_str().expect("a prompt")
            );
            assert_eq!(tokenizer.encode(&text).expect("encodes"), ids("ids"), "{name} {text:?}");
            let wanted = ids("greedy");
            assert_eq!(greedy(&model, &ids("ids"), wanted.len()), wanted, "{name} {text:?}");
        }
    }
}

#[test]
fn parts_that_do_not_belong_together_are_refused() {
    let dir = tempfile::tempdir().expect("a folder");
    let part = |n: u32| dir.path().join(format!("m-0000{n}-of-00002.gguf"));
    let source = |n: u32| golden(&format!("tiny-llama-split-0000{n}-of-00002.gguf"));
    let copy = |from: u32, to: u32| std::fs::copy(source(from), part(to)).expect("copies");
    let refused = |path: &Path, what: &str| {
        let error = load(path).expect_err(what).to_string();
        assert!(error.contains(what), "{error:?} does not name {what:?}");
    };
    copy(1, 1);
    refused(&part(1), "m-00002-of-00002.gguf");
    copy(1, 2);
    refused(&part(1), "split.no");
    std::fs::copy(golden("tiny-llama-f16.gguf"), part(2)).expect("copies");
    refused(&part(1), "split.count");
    copy(2, 2);
    assert!(load(&part(2)).is_ok(), "any part names the model");
    let mut bytes = std::fs::read(part(2)).expect("reads");
    bytes.truncate(bytes.len() - 100);
    std::fs::write(part(2), &bytes).expect("writes");
    refused(&part(1), "does not fit a file of");
    let other = dir.path().join("other.gguf");
    std::fs::copy(source(1), &other).expect("copies");
    refused(&other, "split.count");
    // The second part alone has no metadata.
    std::fs::copy(source(2), &other).expect("copies");
    assert!(load(&other).is_err());
}
