//! Embeddings, tokens of texts and texts of tokens.

use std::sync::Arc;

use serde_json::json;

use super::replay::{Ending, Replay};
use super::*;
use crate::api::Backend as _;

const EMBEDDINGS: &str = "/v1/embeddings";

fn node() -> Arc<Replay> {
    Arc::new(Replay::of("x"))
}

fn embed(extra: &Value) -> Value {
    with(json!({ "model": "tandem", "input": "capital of Peru?" }), extra)
}

#[tokio::test]
async fn embeddings_come_in_the_order_and_form_asked_for() {
    let node = node();
    let ids = node.tokenizer().encode_whole("capital of Peru?").unwrap();
    let (last, count) = (*ids.last().unwrap() as f32, ids.len());
    let body = post(app(&node), EMBEDDINGS, &embed(&json!({ "dimensions": 3, "user": "u" }))).await.json();
    let one = json!({ "object": "embedding", "index": 0, "embedding": [last, count as f32, -0.5] });
    let usage = json!({ "prompt_tokens": count, "total_tokens": count });
    assert_eq!(body, json!({ "object": "list", "data": [one], "model": "tandem", "usage": usage }));

    let several = post(app(&node), EMBEDDINGS, &embed(&json!({ "input": [ids, [3, 4]] }))).await.json();
    assert_eq!(several["data"][0]["embedding"], one["embedding"]);
    assert_eq!((&several["data"][1]["embedding"], &several["data"][1]["index"]), (&json!([4.0, 2.0, -0.5]), &json!(1)));
    assert_eq!(several["usage"]["prompt_tokens"], json!(count + 2));
    let base64 = post(app(&node), EMBEDDINGS, &embed(&json!({ "input": [4, 4], "encoding_format": "base64" }))).await;
    // 4.0, 2.0 and -0.5 as little-endian floats.
    assert_eq!(base64.json()["data"][0]["embedding"], "AACAQAAAAEAAAAC/");
}

#[tokio::test]
async fn embeddings_that_cannot_be_are_refused_by_name() {
    let table = [
        (json!({ "input": [] }), (400, "invalid_value", "input")),
        (json!({ "input": null }), (400, "missing_field", "input")),
        (json!({ "input": [3, 99_999_999] }), (400, "invalid_value", "input[1]")),
        (json!({ "input": "" }), (400, "empty_prompt", "input")),
        (json!({ "dimensions": 2 }), (400, "unsupported_field", "dimensions")),
        (json!({ "encoding_format": "int8" }), (400, "invalid_value", "encoding_format")),
        (json!({ "model": "tandem:cloud" }), (400, "unsupported_field", "model")),
        (json!({ "model": "ada" }), (404, "model_not_found", "model")),
        (json!({ "typo": 1 }), (400, "unknown_field", "typo")),
    ];
    for (extra, (status, code, param)) in table {
        let error = post(app(&node()), EMBEDDINGS, &embed(&extra)).await.error();
        assert_eq!(error, (status, code.into(), Some(param.into())), "{extra}");
    }
    let mut replay = Replay::of("x");
    replay.ending = Ending::Refused(crate::request::GenerateError::Busy { limit: 1, retry_after_ms: 5 });
    assert_eq!(post(app(&Arc::new(replay)), EMBEDDINGS, &embed(&json!({}))).await.status, 429);
}

#[tokio::test]
async fn texts_become_tokens_and_texts_again() {
    let node = node();
    let tokenizer = node.tokenizer();
    let text = "<|bos|>Lima 🦀é <|user|>x";
    let (plain, whole) = (tokenizer.encode(text).unwrap(), tokenizer.encode_whole("Lima").unwrap());
    let chat = tokenizer.encode("<|bos|><|user|>hi<|assistant|>").unwrap();
    let turns = json!([{ "role": "user", "content": "hi" }]);
    for (body, wanted) in [
        (json!({ "content": text }), &plain),
        (json!({ "prompt": text, "add_special_tokens": false, "model": "tandem" }), &plain),
        (json!({ "prompt": "Lima" }), &whole),
        (json!({ "content": "Lima", "add_special": true }), &whole),
        (json!({ "messages": turns, "add_generation_prompt": true }), &chat),
    ] {
        let got = post(app(&node), "/tokenize", &body).await.json();
        let all = json!({ "tokens": wanted, "count": wanted.len(), "max_model_len": 256, "token_strs": null });
        assert_eq!(got, all, "{body}");
    }
    let pieces = post(app(&node), "/tokenize", &json!({ "content": text, "with_pieces": true })).await.json();
    let bytes = |piece: &Value| match piece {
        Value::String(text) => text.as_bytes().to_vec(),
        other => serde_json::from_value(other.clone()).unwrap(),
    };
    let spelt: Vec<u8> = pieces["tokens"].as_array().unwrap().iter().flat_map(|t| bytes(&t["piece"])).collect();
    assert_eq!(String::from_utf8(spelt).unwrap(), text);
    let got = post(app(&node), "/detokenize", &json!({ "tokens": plain })).await.json();
    assert_eq!(got, json!({ "content": text, "prompt": text }));
    for (path, body, param) in [
        ("/tokenize", json!({}), "prompt"),
        ("/tokenize", json!({ "content": "a", "prompt": "b" }), "prompt"),
        ("/tokenize", json!({ "content": "a", "parse_special": false }), "parse_special"),
        ("/detokenize", json!({ "tokens": [99_999_999] }), "tokens[0]"),
        ("/detokenize", json!({ "tokens": "x" }), "tokens"),
    ] {
        let (status, _, about) = post(app(&node), path, &body).await.error();
        assert_eq!((status, about.as_deref()), (400, Some(param)), "{body}");
    }
}
