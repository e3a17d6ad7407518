//! Streams: the same text and usage as whole answers, in chunks that every client understands.

use std::collections::BTreeMap;
use std::sync::Arc;

use serde_json::{Value, json};

use super::replay::{Ending, Replay};
use super::*;

const ANSWERS: [&str; 4] = ["Lima.", "a🦀é over – tokens 日本語", "one\n\ntwo STOP three", "x"];

fn node(text: &str) -> Arc<Replay> {
    Arc::new(Replay::of(text))
}

/// What a client puts together from a stream, by choice.
#[derive(Debug, Default, PartialEq)]
struct Collected {
    text: String,
    finish: Option<Value>,
    logprobs: Vec<Value>,
    tokens: Vec<Value>,
}

/// Checks the order of a stream's chunks and collects them.
fn collect(chunks: &[Value], object: &str) -> (BTreeMap<u64, Collected>, Option<Value>) {
    let mut choices: BTreeMap<u64, Collected> = BTreeMap::new();
    let mut usage = None;
    for (i, chunk) in chunks.iter().enumerate() {
        assert_eq!(chunk["object"], json!(object));
        assert_eq!((&chunk["id"], &chunk["model"]), (&chunks[0]["id"], &chunks[0]["model"]));
        let list = chunk["choices"].as_array().unwrap();
        if list.is_empty() {
            assert_eq!(i, chunks.len() - 1, "only the last chunk has no choices");
            usage = Some(chunk["usage"].clone());
            continue;
        }
        assert_eq!(list.len(), 1);
        let choice = &list[0];
        let known = choices.contains_key(&choice["index"].as_u64().unwrap());
        let collected = choices.entry(choice["index"].as_u64().unwrap()).or_default();
        assert_eq!(collected.finish, None, "nothing follows the end of a choice");
        if object == "chat.completion.chunk" {
            assert_eq!(choice["delta"].get("role").is_some(), !known, "the role comes first and once");
            collected.text.push_str(choice["delta"].get("content").map_or("", |text| text.as_str().unwrap()));
        } else {
            collected.text.push_str(choice["text"].as_str().unwrap());
        }
        if let Some(list) = choice["logprobs"]["content"].as_array() {
            collected.logprobs.extend(list.iter().cloned());
        }
        if let Some(list) = choice["logprobs"]["tokens"].as_array() {
            collected.logprobs.extend(list.iter().cloned());
        }
        if let Some(tandem) = choice.get("tandem") {
            collected.tokens.extend(tandem["tokens"].as_array().unwrap().iter().cloned());
        }
        collected.finish = Some(choice["finish_reason"].clone()).filter(|reason| !reason.is_null());
        assert_eq!(chunk.get("tandem").is_some(), collected.finish.is_some(), "the end says what it took");
    }
    (choices, usage)
}

#[tokio::test]
async fn a_stream_is_the_whole_answer_in_parts() {
    for answer in ANSWERS {
        for extra in [
            json!({}),
            json!({ "stop": ["STOP", "\n\n"] }),
            json!({ "stop": " " }),
            json!({ "n": 3, "temperature": 1, "seed": 11 }),
            json!({ "max_tokens": 3 }),
            json!({ "logprobs": true, "top_logprobs": 1, "tandem": { "tokens": true } }),
            json!({ "logprobs": true, "tandem": { "tokens": true }, "stop": "two" }),
        ] {
            let whole = post(app(&node(answer)), CHAT, &chat(&extra)).await.json();
            let options = json!({ "stream": true, "stream_options": { "include_usage": true } });
            let reply = post(app(&node(answer)), CHAT, &chat(&with(extra.clone(), &options))).await;
            assert_eq!(reply.header("cache-control"), Some("no-cache"));
            let chunks = reply.chunks();
            let (choices, usage) = collect(&chunks, "chat.completion.chunk");
            let expected = whole["choices"].as_array().unwrap();
            assert_eq!(choices.len(), expected.len());
            for (got, expected) in choices.values().zip(expected) {
                assert_eq!(json!(got.text), expected["message"]["content"], "{answer} {extra}");
                assert_eq!(got.finish.as_ref(), Some(&expected["finish_reason"]), "{answer} {extra}");
                let logprobs = expected["logprobs"]["content"].as_array().cloned().unwrap_or_default();
                assert_eq!(got.logprobs, logprobs, "{answer} {extra}");
                let tokens = expected["tandem"]["tokens"].as_array().cloned().unwrap_or_default();
                assert_eq!(got.tokens, tokens, "{answer} {extra}");
            }
            assert_eq!(usage.as_ref(), Some(&whole["usage"]), "{answer} {extra}");
            for chunk in &chunks[..chunks.len() - 1] {
                assert_eq!(chunk["usage"], json!(null));
                assert!(chunk.as_object().unwrap().contains_key("usage"));
            }
        }
    }
}

#[tokio::test]
async fn a_text_stream_is_the_whole_answer_in_parts() {
    for extra in [json!({}), json!({ "logprobs": 1, "n": 2 }), json!({ "prompt": ["a", "b"], "stop": "to" })] {
        let whole = post(app(&node(ANSWERS[1])), TEXT, &text(&extra)).await.json();
        let reply = post(app(&node(ANSWERS[1])), TEXT, &text(&with(extra.clone(), &json!({ "stream": true })))).await;
        let chunks = reply.chunks();
        assert!(chunks.iter().all(|chunk| chunk.get("usage").is_none()));
        let (choices, usage) = collect(&chunks, "text_completion");
        assert_eq!(usage, None);
        for (got, expected) in choices.values().zip(whole["choices"].as_array().unwrap()) {
            assert_eq!(json!(got.text), expected["text"], "{extra}");
            let tokens = expected["logprobs"]["tokens"].as_array().cloned().unwrap_or_default();
            assert_eq!(got.logprobs, tokens, "{extra}");
        }
    }
}

#[tokio::test]
async fn the_last_chunk_of_a_choice_says_what_it_took() {
    let node = node(ANSWERS[0]);
    let chunks = post(app(&node), CHAT, &chat(&json!({ "stream": true, "n": 2 }))).await.chunks();
    let ends: Vec<&Value> = chunks.iter().filter_map(|chunk| chunk.get("tandem")).collect();
    assert_eq!(ends.len(), 2);
    assert!(ends.iter().all(|route| route["round_trips"] == json!(2) && route["bytes_up"] == json!(120)));
}

#[tokio::test]
async fn choices_are_interleaved() {
    let chunks =
        post(app(&node(&ANSWERS[1].repeat(3))), CHAT, &chat(&json!({ "stream": true, "n": 2 }))).await.chunks();
    let order: Vec<u64> = chunks.iter().map(|chunk| chunk["choices"][0]["index"].as_u64().unwrap()).collect();
    let switches = order.windows(2).filter(|pair| pair[0] != pair[1]).count();
    assert!(switches > order.len() / 4, "{order:?}");
}

#[tokio::test]
async fn an_error_in_the_middle_is_data() {
    for ending in [Ending::Fails(2), Ending::Vanishes(2)] {
        let mut replay = Replay::of(ANSWERS[1]);
        replay.ending = ending;
        let reply = post(app(&Arc::new(replay)), CHAT, &chat(&json!({ "stream": true }))).await;
        assert_eq!(reply.status, 200);
        let mut data = reply.data();
        assert_eq!(data.pop().as_deref(), Some("[DONE]"));
        let last: Value = serde_json::from_str(data.last().unwrap()).unwrap();
        assert_eq!(last["error"]["type"], "server_error");
        assert_eq!(last["error"]["code"], "generation_failed");
        assert!(data.iter().all(|data| data != "[DONE]"));
        assert!(data[..data.len() - 1].iter().all(|data| !data.contains("finish_reason\":\"")));
    }
}

#[tokio::test(start_paused = true)]
async fn silence_is_filled_with_comments() {
    let mut replay = Replay::of("Lima");
    replay.pause = std::time::Duration::from_secs(25);
    let reply = post(app(&Arc::new(replay)), CHAT, &chat(&json!({ "stream": true }))).await;
    let text = String::from_utf8(reply.body.clone()).unwrap();
    assert!(text.lines().filter(|line| line.starts_with(':')).count() >= 2, "{text}");
    assert_eq!(collect(&reply.chunks(), "chat.completion.chunk").0[&0].text, "Lima");
}
