//! Whole answers: text, usage, headers, log probabilities, and what reaches the node.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use serde_json::json;
use tandem_proto::message::SamplingParams;

use super::replay::Replay;
use super::*;
use crate::request::{Mode, RouteSummary};

const ANSWER: &str = "Lima is the capital of Peru.";

fn node() -> Arc<Replay> {
    Arc::new(Replay::of(ANSWER))
}

#[tokio::test]
async fn a_chat_completion() {
    let node = node();
    let reply = post(app(&node), CHAT, &chat(&json!({}))).await;
    assert_eq!(reply.status, 200);
    assert_eq!(reply.header("content-type"), Some("application/json"));
    let body = reply.json();
    let tokens = node.script_tokens();
    let requests = node.requests.lock().unwrap();
    let id = reply.header("x-request-id").unwrap();
    assert_eq!(requests[0].request_id, id);
    assert_eq!(body["id"], json!(format!("chatcmpl-{id}")));
    assert_eq!(body["object"], "chat.completion");
    assert_eq!(body["model"], "tandem");
    assert!(body["created"].as_u64().unwrap() > 1_700_000_000);
    assert_eq!(
        body["choices"],
        json!([{
            "index": 0,
            "message": { "role": "assistant", "content": ANSWER, "refusal": null },
            "logprobs": null,
            "finish_reason": "stop",
        }])
    );
    assert_eq!(body["usage"]["prompt_tokens"], json!(requests[0].prompt.len()));
    assert_eq!(body["usage"]["completion_tokens"], json!(tokens));
    assert_eq!(body["usage"]["total_tokens"], json!(requests[0].prompt.len() + tokens));
    let route = &body["usage"]["tandem"];
    let by_origin = ["edge_tokens", "accepted", "cloud_tokens"].map(|name| route[name].as_u64().unwrap());
    assert_eq!(by_origin.iter().sum::<u64>(), tokens as u64);
    assert_eq!((&route["round_trips"], &route["bytes_up"], &route["bytes_down"]), (&json!(2), &json!(120), &json!(80)));
    assert_eq!(route["degraded"], json!(false));
}

#[tokio::test]
async fn the_prompt_is_the_template_of_the_messages() {
    let node = node();
    let messages = json!({ "messages": [
        { "role": "user", "content": [{ "type": "text", "text": "2 + 2" }, { "type": "text", "text": "?" }] },
        { "role": "assistant", "content": "4", "refusal": null, "tool_calls": null, "annotations": [] },
        { "role": "user", "content": "and 3 + 3?" },
    ]});
    let reply = post(app(&node), CHAT, &chat(&messages)).await;
    assert_eq!((reply.status.as_u16(), reply.header("x-tandem-notice")), (200, None));
    let expected = "<|bos|><|user|>2 + 2?<|assistant|>4<|eos|><|user|>and 3 + 3?<|assistant|>";
    let expected = crate::api::Backend::tokenizer(node.as_ref()).encode(expected).unwrap();
    assert_eq!(node.requests.lock().unwrap()[0].prompt, expected);
}

#[tokio::test]
async fn a_system_message_that_the_template_drops_is_noticed() {
    for role in ["system", "developer"] {
        let messages = json!({ "messages": [
            { "role": role, "content": "answer in rhymes" }, { "role": "user", "content": "hi" },
        ]});
        let reply = post(app(&node()), CHAT, &chat(&messages)).await;
        assert_eq!(reply.status, 200);
        assert_eq!(reply.header("x-tandem-notice"), Some("the model's chat template leaves system messages out"));
    }
}

#[tokio::test]
async fn names_and_extension_choose_the_mode() {
    let table = [
        ("tandem", json!(null), Mode::Auto, "default"),
        ("tandem:local", json!(null), Mode::Local, "model"),
        ("tandem:local", json!({ "mode": "local" }), Mode::Local, "model"),
        ("tandem", json!({ "mode": "exact" }), Mode::Exact, "request"),
        ("demo-edge", json!(null), Mode::Local, "model"),
        ("demo-cloud:auto", json!(null), Mode::Auto, "model"),
    ];
    for (model, tandem, mode, reason) in table {
        let node = node();
        let reply = post(app(&node), CHAT, &chat(&json!({ "model": model, "tandem": tandem }))).await;
        assert_eq!(reply.header("x-tandem-mode"), Some(mode.name()), "{model}");
        assert_eq!(reply.header("x-tandem-reason"), Some(reason), "{model}");
        assert_eq!(reply.header("x-tandem-policy"), Some("calibrated@1"));
        assert_eq!(reply.header("x-tandem-degraded"), None);
        assert_eq!(node.requests.lock().unwrap()[0].mode, mode);
        assert_eq!(reply.json()["model"], json!(model));
    }
}

#[tokio::test]
async fn a_missing_cloud_shows_in_a_header() {
    for (cut, word) in [(false, "cloud-away"), (true, "cut")] {
        let node = node();
        node.status.lock().unwrap().cloud_connected = false;
        node.status.lock().unwrap().cut = cut;
        for stream in [false, true] {
            let reply = post(app(&node), CHAT, &chat(&json!({ "stream": stream }))).await;
            assert_eq!(reply.header("x-tandem-degraded"), Some(word));
            let local = chat(&json!({ "stream": stream, "model": "tandem:local" }));
            assert_eq!(post(app(&node), CHAT, &local).await.header("x-tandem-degraded"), None);
        }
    }
    let mut replay = Replay::of(ANSWER);
    replay.route.degraded = true;
    replay.route.degraded_reason = Some("budget\nspent".into());
    let reply = post(app(&Arc::new(replay)), CHAT, &chat(&json!({}))).await;
    assert_eq!(reply.header("x-tandem-degraded"), Some("budget?spent"));
    assert_eq!(reply.json()["usage"]["tandem"]["degraded"], json!(true));
}

#[tokio::test]
async fn sampling_reaches_the_node() {
    let node = node();
    let body = chat(&json!({
        "temperature": 0.7, "top_p": 0.9, "top_k": 40, "min_p": 0.05, "presence_penalty": 0.5,
        "frequency_penalty": -0.5, "repetition_penalty": 1.1, "logit_bias": { "9": -100, "5": 1.5 },
        "seed": -1, "max_completion_tokens": 3, "tandem": { "threshold": 0.25 }, "logprobs": true, "top_logprobs": 2,
    }));
    let reply = post(app(&node), CHAT, &body).await;
    assert_eq!(reply.json()["choices"][0]["finish_reason"], "length");
    let request = node.requests.lock().unwrap()[0].clone();
    let expected = SamplingParams {
        temperature: 0.7,
        top_p: 0.9,
        top_k: 40,
        min_p: 0.05,
        presence_penalty: 0.5,
        frequency_penalty: -0.5,
        repetition_penalty: 1.1,
        logit_bias: vec![(5, 1.5), (9, -100.0)],
        seed: u64::MAX,
    };
    assert_eq!(request.sampling, expected);
    assert_eq!((request.tokens_max, request.threshold, request.top_logprobs), (3, Some(0.25), 2));
}

#[tokio::test]
async fn without_fields_the_models_defaults_apply_and_the_context_bounds_the_answer() {
    let node = node();
    post(app(&node), CHAT, &chat(&json!({}))).await;
    post(app(&node), CHAT, &chat(&json!({ "max_tokens": 100_000 }))).await;
    post(app(&node), TEXT, &json!({ "model": "tandem", "prompt": "x" })).await;
    let requests = node.requests.lock().unwrap();
    for request in &requests[..2] {
        assert_eq!(request.tokens_max, node.context_tokens - request.prompt.len());
    }
    assert_eq!(requests[0].sampling, SamplingParams { seed: requests[0].sampling.seed, ..SamplingParams::default() });
    assert_ne!(requests[0].sampling.seed, requests[1].sampling.seed);
    assert_eq!(requests[2].tokens_max, 16);
}

#[tokio::test]
async fn equal_seeds_give_equal_choices_alone_and_in_a_batch() {
    let node = node();
    let contents = |reply: &Reply| -> Vec<String> {
        let body = reply.json();
        let choices = body["choices"].as_array().unwrap().iter().enumerate();
        choices
            .map(|(i, choice)| {
                assert_eq!(choice["index"], json!(i));
                choice["message"]["content"].as_str().unwrap().to_owned()
            })
            .collect()
    };
    let ask = |n: usize| chat(&json!({ "seed": 7, "temperature": 1, "n": n }));
    let one = contents(&post(app(&node), CHAT, &ask(1)).await);
    let reply = post(app(&node), CHAT, &ask(8)).await;
    let eight = contents(&reply);
    assert_eq!((one.len(), eight.len()), (1, 8));
    assert_eq!(one[0], eight[0]);
    assert_eq!(eight, contents(&post(app(&node), CHAT, &ask(8)).await));
    assert_eq!(eight.iter().collect::<std::collections::HashSet<_>>().len(), 8);
    // The prompt counts once, the answers together.
    let prompt = node.requests.lock().unwrap()[0].prompt.len();
    assert_eq!(reply.json()["usage"]["prompt_tokens"], json!(prompt));
    assert_eq!(reply.json()["usage"]["completion_tokens"], json!(8 * node.script_tokens()));
    assert_eq!(reply.json()["usage"]["tandem"]["round_trips"], json!(16));
    let ids: Vec<String> = node.requests.lock().unwrap()[1..4].iter().map(|r| r.request_id.clone()).collect();
    let id = reply.header("x-request-id").unwrap();
    assert_eq!(ids, [id.to_owned(), format!("{id}-1"), format!("{id}-2")]);
}

#[tokio::test]
async fn stop_strings_span_tokens_and_are_not_in_the_text() {
    let table = [
        (json!("capital"), "Lima is the "),
        (json!(" of Peru"), "Lima is the capital"),
        (json!(["nowhere", "a i"]), "Lim"),
        (json!(["L"]), ""),
        (json!("Peru!"), ANSWER),
    ];
    for (stop, expected) in table {
        let node = node();
        let reply = post(app(&node), CHAT, &chat(&json!({ "stop": stop, "tandem": { "tokens": true } }))).await;
        let body = reply.json();
        let choice = &body["choices"][0];
        assert_eq!(choice["message"]["content"], json!(expected), "{stop}");
        assert_eq!(choice["finish_reason"], "stop");
        let texts = choice["tandem"]["tokens"].as_array().unwrap().iter().map(|token| token["text"].as_str().unwrap());
        assert_eq!(texts.collect::<String>(), expected);
        // Every token that was generated counts, sent or not, and none after the stop.
        let route = &body["usage"]["tandem"];
        let by_origin = ["edge_tokens", "accepted", "cloud_tokens"].map(|name| route[name].as_u64().unwrap());
        assert_eq!(json!(by_origin.iter().sum::<u64>()), body["usage"]["completion_tokens"], "{stop}");
    }
}

#[tokio::test]
async fn a_stop_string_ends_the_work_and_reports_what_the_node_says() {
    let mut replay = Replay::of(&ANSWER.repeat(4));
    replay.route_when_cut_short =
        Some(RouteSummary { edge_tokens: 7, round_trips: 3, bytes_up: 99, ..RouteSummary::default() });
    let node = Arc::new(replay);
    let body = post(app(&node), CHAT, &chat(&json!({ "stop": "Lima" }))).await.json();
    assert_eq!(body["choices"][0]["message"]["content"], "");
    let route = &body["usage"]["tandem"];
    assert_eq!([&route["round_trips"], &route["bytes_up"]], [&json!(3), &json!(99)]);
    // Only tokens up to the stop string count, though the node was ahead of it.
    let by_origin = ["edge_tokens", "accepted", "cloud_tokens"].map(|name| route[name].as_u64().unwrap());
    assert_eq!(json!(by_origin.iter().sum::<u64>()), body["usage"]["completion_tokens"]);
    while node.abandoned.load(Ordering::SeqCst) == 0 {
        tokio::task::yield_now().await;
    }
}

#[tokio::test]
async fn chat_logprobs() {
    let node = node();
    let reply = post(app(&node), CHAT, &chat(&json!({ "logprobs": true, "top_logprobs": 2 }))).await;
    let text = String::from_utf8(reply.body.clone()).unwrap();
    assert!(text.contains("\"logprob\":-0.1,"), "f32 is not widened: {text}");
    let body = reply.json();
    let content = body["choices"][0]["logprobs"]["content"].as_array().unwrap();
    assert_eq!(content.len(), node.script_tokens());
    let mut bytes = Vec::new();
    for entry in content {
        assert_eq!(entry["logprob"], json!(-0.1));
        assert_eq!(entry["top_logprobs"].as_array().unwrap().len(), 2);
        assert_eq!(entry["top_logprobs"][0]["token"], entry["token"]);
        let own: Vec<u8> = serde_json::from_value(entry["bytes"].clone()).unwrap();
        assert_eq!(String::from_utf8(own.clone()).unwrap(), entry["token"].as_str().unwrap());
        bytes.extend(own);
    }
    assert_eq!(String::from_utf8(bytes).unwrap(), ANSWER);
    assert_eq!(body["choices"][0]["logprobs"]["refusal"], json!(null));
    let body = post(app(&node), CHAT, &chat(&json!({ "logprobs": true }))).await.json();
    assert_eq!(body["choices"][0]["logprobs"]["content"][0]["top_logprobs"], json!([]));
}

#[tokio::test]
async fn characters_over_several_tokens() {
    let answer = "a🦀é";
    let node = Arc::new(Replay::of(answer));
    assert!(node.script_tokens() > 3, "the tokenizer has the crab as one token; pick another character");
    let body = post(app(&node), CHAT, &chat(&json!({ "logprobs": true, "tandem": { "tokens": true } }))).await.json();
    let choice = &body["choices"][0];
    assert_eq!(choice["message"]["content"], json!(answer));
    let content = choice["logprobs"]["content"].as_array().unwrap();
    assert_eq!(content.len(), node.script_tokens());
    let bytes = content.iter().flat_map(|entry| serde_json::from_value::<Vec<u8>>(entry["bytes"].clone()).unwrap());
    assert_eq!(String::from_utf8(bytes.collect()).unwrap(), answer);
    assert!(content.iter().any(|entry| entry["token"].as_str().unwrap().starts_with("bytes:\\x")));
    let texts = choice["tandem"]["tokens"].as_array().unwrap().iter().map(|token| token["text"].as_str().unwrap());
    assert_eq!(texts.collect::<String>(), answer);
    // Cut inside the character: what came of it is shown as one replacement character.
    let body = post(app(&node), CHAT, &chat(&json!({ "max_tokens": 2 }))).await.json();
    assert_eq!(body["choices"][0]["message"]["content"], "a\u{fffd}");
    assert_eq!(body["choices"][0]["finish_reason"], "length");
}

#[tokio::test]
async fn tokens_with_origin_and_scores() {
    let body = post(app(&node()), CHAT, &chat(&json!({ "tandem": { "tokens": true } }))).await.json();
    let tokens = body["choices"][0]["tandem"]["tokens"].as_array().unwrap();
    for (index, token) in tokens.iter().enumerate() {
        assert_eq!(token["index"], json!(index));
        assert_eq!(token["origin"], json!(["edge", "verified", "cloud"][index % 3]));
        let mut names: Vec<&str> = token.as_object().unwrap().keys().map(String::as_str).collect();
        names.sort_unstable();
        let expected = ["edge_entropy", "edge_top1", "id", "index", "logprob", "origin", "reason", "risk", "text"];
        assert_eq!(names, expected);
    }
}

#[tokio::test]
async fn text_completions() {
    let node = node();
    let reply = post(app(&node), TEXT, &text(&json!({ "logprobs": 2 }))).await;
    let body = reply.json();
    assert_eq!(body["object"], "text_completion");
    assert!(body["id"].as_str().unwrap().starts_with("cmpl-"));
    let choice = &body["choices"][0];
    assert_eq!((&choice["text"], &choice["finish_reason"]), (&json!(ANSWER), &json!("stop")));
    let report = &choice["logprobs"];
    let tokens: Vec<String> = serde_json::from_value(report["tokens"].clone()).unwrap();
    assert_eq!(tokens.concat(), ANSWER);
    let offsets: Vec<usize> = serde_json::from_value(report["text_offset"].clone()).unwrap();
    for (token, offset) in tokens.iter().zip(&offsets) {
        assert!(ANSWER[*offset..].starts_with(token.as_str()));
    }
    assert_eq!(report["token_logprobs"].as_array().unwrap().len(), tokens.len());
    for (top, token) in report["top_logprobs"].as_array().unwrap().iter().zip(&tokens) {
        assert_eq!(top[token], json!(-0.1));
        assert_eq!(top.as_object().unwrap().len(), 2);
    }
    assert_eq!(choice.get("message"), None);
}

#[tokio::test]
async fn completions_take_texts_and_tokens() {
    let node = node();
    let encode = |text: &str| crate::api::Backend::tokenizer(node.as_ref()).encode(text).unwrap();
    let table = [
        (json!("hello"), vec![encode("hello")]),
        (json!(["hello", "world"]), vec![encode("hello"), encode("world")]),
        (json!([5, 6, 7]), vec![vec![5, 6, 7]]),
        (json!([[5, 6], [7]]), vec![vec![5, 6], vec![7]]),
        (json!(["hello", [7]]), vec![encode("hello"), vec![7]]),
    ];
    for (prompt, expected) in table {
        node.requests.lock().unwrap().clear();
        let body = post(app(&node), TEXT, &text(&json!({ "prompt": prompt, "n": 2, "seed": 3 }))).await.json();
        let requests = node.requests.lock().unwrap();
        let got: Vec<Vec<u32>> = requests.iter().step_by(2).map(|request| request.prompt.clone()).collect();
        assert_eq!(got, expected, "{prompt}");
        assert_eq!(body["choices"].as_array().unwrap().len(), 2 * expected.len());
        let tokens: usize = expected.iter().map(Vec::len).sum();
        assert_eq!(body["usage"]["prompt_tokens"], json!(tokens));
        for pair in requests.chunks(2) {
            assert_eq!(pair[0].sampling.seed, 3);
            assert_ne!(pair[1].sampling.seed, 3);
        }
    }
}

#[tokio::test]
async fn failures_after_the_first_token_are_500() {
    for ending in [super::replay::Ending::Fails(2), super::replay::Ending::Vanishes(0)] {
        let mut replay = Replay::of(ANSWER);
        replay.ending = ending;
        let reply = post(app(&Arc::new(replay)), CHAT, &chat(&json!({}))).await;
        assert_eq!(reply.error(), (500, "generation_failed".into(), None));
    }
}
