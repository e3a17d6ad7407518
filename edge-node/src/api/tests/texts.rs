//! Tokens of texts and texts of tokens.

use std::sync::Arc;

use serde_json::json;

use super::replay::Replay;
use super::*;
use crate::api::Backend as _;

fn node() -> Arc<Replay> {
    Arc::new(Replay::of("x"))
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
