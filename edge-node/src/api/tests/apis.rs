//! The Responses and Messages APIs: each is the chat API in other words, so what reaches the node and what it
//! answers is compared with that of a chat request.

use std::sync::Arc;

use serde_json::json;

use super::events::{events, message_of, responses_of, steady};
use super::replay::{Ending, Replay};
use super::tools::{HERMES, follows, weather};
use super::*;
use crate::api::Backend as _;

const RESPONSES: &str = "/v1/responses";
const MESSAGES: &str = "/v1/messages";

/// Reasoning, words and two calls, in the manner of gpt-oss.
const THOUGHT: &str = "<|channel|>analysis<|message|>I must look.<|end|><|start|>assistant<|channel|>commentary<|message|>First I look.<|end|><|start|>assistant<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>{\"city\": \"Lima\"}<|call|>";
const CHANNELS: &str = "{%- for m in messages %}[{{ m.role }} {{ m.content }}]{% endfor %}{% for t in tools or [] %}{% endfor %}<|start|>assistant{# <|channel|>final<|message|> #}";

fn plain(answer: &str) -> Arc<Replay> {
    Arc::new(Replay::of(answer))
}

fn hermes(answer: &str) -> Arc<Replay> {
    let mut replay = Replay::of(answer).with_template(HERMES);
    replay.context_tokens = 1024;
    Arc::new(replay)
}

fn thinker() -> Arc<Replay> {
    let markers = ["<|start|>", "<|channel|>", "<|constrain|>", "<|message|>", "<|end|>", "<|call|>", "<|return|>"];
    let mut replay = Replay::of(THOUGHT).with_template(CHANNELS).with_special_tokens(&markers);
    replay.context_tokens = 1024;
    Arc::new(replay)
}

fn responses(extra: &Value) -> Value {
    with(json!({ "model": "tandem", "input": "capital of Peru?" }), extra)
}

fn messages(extra: &Value) -> Value {
    let turn = json!({ "role": "user", "content": "capital of Peru?" });
    with(json!({ "model": "tandem", "max_tokens": 500, "messages": [turn] }), extra)
}

fn flat_weather() -> Value {
    with(weather()["function"].clone(), &json!({ "type": "function", "strict": true }))
}

fn messages_weather() -> Value {
    let function = &weather()["function"];
    json!({ "name": function["name"], "description": function["description"], "input_schema": function["parameters"] })
}

#[tokio::test]
async fn a_stream_of_events_is_the_whole_answer() {
    let tools = |tool: Value| json!({ "tools": [tool] });
    let table = [
        (plain("Lima. 🦀é"), json!({}), json!({})),
        (plain("Lima. 🦀é"), json!({ "max_output_tokens": 3 }), json!({ "max_tokens": 3 })),
        (plain("one two three"), json!({ "top_logprobs": 2 }), json!({ "stop_sequences": ["zz", "two"] })),
        (plain(""), json!({ "max_output_tokens": 4 }), json!({})),
        (thinker(), tools(flat_weather()), tools(messages_weather())),
        (
            hermes(
                "Hm.\n<tool_call>\n{\"name\": \"get_weather\", \"arguments\": {\"city\": \"Lima\"}}\n</tool_call><tool_call>{\"name\": \"get_weather\", \"arguments\": {}}</tool_call>",
            ),
            tools(flat_weather()),
            tools(messages_weather()),
        ),
    ];
    for (node, for_responses, for_messages) in table {
        let stream = json!({ "stream": true });
        let body = responses(&for_responses);
        let whole = post(app(&node), RESPONSES, &body).await;
        assert_eq!(whole.status, 200, "{}", whole.json());
        let streamed = responses_of(&events(&post(app(&node), RESPONSES, &with(body, &stream)).await));
        assert_eq!(steady(streamed), steady(whole.json()));
        let body = messages(&for_messages);
        let whole = post(app(&node), MESSAGES, &body).await;
        assert_eq!(whole.status, 200, "{}", whole.json());
        let streamed = message_of(&events(&post(app(&node), MESSAGES, &with(body, &stream)).await));
        assert_eq!(steady(streamed), steady(whole.json()));
    }
}

#[tokio::test]
async fn a_response() {
    let node = plain("Lima.");
    let extra =
        json!({ "instructions": "Be short.", "metadata": { "a": "b" }, "include": ["message.output_text.logprobs"] });
    let reply = post(app(&node), RESPONSES, &responses(&extra)).await;
    let body = reply.json();
    let id = reply.header("x-request-id").unwrap();
    assert_eq!((&body["id"], &body["object"]), (&json!(format!("resp_{id}")), &json!("response")));
    assert_eq!(
        (&body["status"], &body["error"], &body["incomplete_details"]),
        (&json!("completed"), &json!(null), &json!(null))
    );
    let message = &body["output"][0];
    assert_eq!(
        (&message["type"], &message["role"], &message["status"]),
        (&json!("message"), &json!("assistant"), &json!("completed"))
    );
    assert_eq!(
        (&message["content"][0]["type"], &message["content"][0]["text"]),
        (&json!("output_text"), &json!("Lima."))
    );
    assert_eq!(message["content"][0]["annotations"], json!([]));
    let scores = message["content"][0]["logprobs"].as_array().unwrap();
    assert_eq!((scores.len(), &scores[0]["logprob"]), (node.script_tokens(), &json!(-0.1f32)));
    assert_eq!((&body["instructions"], &body["metadata"]), (&json!("Be short."), &json!({ "a": "b" })));
    for (name, value) in [
        ("tools", json!([])),
        ("tool_choice", json!("auto")),
        ("parallel_tool_calls", json!(true)),
        ("previous_response_id", json!(null)),
        ("store", json!(true)),
        ("text", json!({ "format": { "type": "text" } })),
        ("truncation", json!("disabled")),
    ] {
        assert_eq!(body[name], value, "{name}");
    }
    let usage = &body["usage"];
    assert_eq!(usage["input_tokens"], json!(node.requests.lock().unwrap()[0].prompt.len()));
    assert_eq!(
        (&usage["output_tokens"], &usage["output_tokens_details"]["reasoning_tokens"]),
        (&json!(node.script_tokens()), &json!(0))
    );
    assert_eq!(usage["tandem"]["bytes_up"], json!(120));
}

#[tokio::test]
async fn reasoning_and_calls_are_items_and_blocks() {
    let body = post(app(&thinker()), RESPONSES, &responses(&json!({ "tools": [flat_weather()] }))).await.json();
    let kinds: Vec<&str> = body["output"].as_array().unwrap().iter().map(|i| i["type"].as_str().unwrap()).collect();
    assert_eq!(kinds, ["reasoning", "message", "function_call"]);
    assert_eq!(body["output"][0]["content"], json!([{ "type": "reasoning_text", "text": "I must look." }]));
    assert_eq!(body["output"][0]["summary"], json!([]));
    let call = &body["output"][2];
    assert_eq!((&call["name"], &call["arguments"]), (&json!("get_weather"), &json!("{\"city\": \"Lima\"}")));
    assert!(call["call_id"].as_str().unwrap().starts_with("call_") && call["id"].as_str().unwrap().starts_with("fc_"));
    assert!(body["usage"]["output_tokens_details"]["reasoning_tokens"].as_u64().unwrap() > 1, "{}", body["usage"]);

    let request = messages(&json!({ "tools": [messages_weather()] }));
    let body = post(app(&thinker()), MESSAGES, &request).await.json();
    let mut blocks = body["content"].clone();
    assert!(blocks[2]["id"].as_str().is_some_and(|id| !id.is_empty()));
    blocks[2]["id"] = json!("x");
    let wanted = json!([
        { "type": "thinking", "thinking": "I must look.", "signature": "" },
        { "type": "text", "text": "First I look." },
        { "type": "tool_use", "id": "x", "name": "get_weather", "input": { "city": "Lima" } },
    ]);
    assert_eq!((blocks, &body["stop_reason"]), (wanted, &json!("tool_use")));
    let request = with(request, &json!({ "thinking": { "type": "adaptive", "display": "omitted" } }));
    let body = post(app(&thinker()), MESSAGES, &request).await.json();
    assert_eq!((&body["content"][0]["type"], body["content"].as_array().unwrap().len()), (&json!("text"), 2));
}

/// Three bodies that say the same reach the node as the same prompt.
#[tokio::test]
async fn all_apis_ask_the_same_of_the_node() {
    let call = |arguments: &str| json!({ "id": "c1", "type": "function", "function": { "name": "get_weather", "arguments": arguments } });
    let table = [
        (
            json!({ "messages": [{ "role": "system", "content": "Be short." }, { "role": "user", "content": "hi" }] }),
            json!({ "instructions": "Be short.", "input": "hi" }),
            json!({ "system": [{ "type": "text", "text": "Be short.", "cache_control": { "type": "ephemeral" } }], "messages": [{ "role": "user", "content": "hi" }] }),
        ),
        (
            json!({ "temperature": 0.7, "top_p": 0.5, "seed": 3, "max_tokens": 9, "messages": [
                { "role": "user", "content": "hi" }, { "role": "assistant", "content": "ho" }, { "role": "user", "content": "ab" },
            ] }),
            json!({ "temperature": 0.7, "top_p": 0.5, "seed": 3, "max_output_tokens": 9, "input": [
                { "role": "user", "content": [{ "type": "input_text", "text": "hi" }] },
                { "type": "message", "id": "msg_1", "status": "completed", "role": "assistant", "content": [
                    { "type": "output_text", "text": "ho", "annotations": [], "logprobs": [] },
                ] },
                { "type": "message", "role": "user", "content": [{ "type": "input_text", "text": "a" }, { "type": "input_text", "text": "b" }] },
            ] }),
            json!({ "temperature": 0.7, "top_p": 0.5, "seed": 3, "max_tokens": 9, "messages": [
                { "role": "user", "content": [{ "type": "text", "text": "hi" }] }, { "role": "assistant", "content": "ho" },
                { "role": "user", "content": [{ "type": "text", "text": "a" }, { "type": "text", "text": "b" }] },
            ] }),
        ),
        (
            json!({ "tools": [weather()], "messages": [
                { "role": "user", "content": "weather?" },
                { "role": "assistant", "content": "I look.", "reasoning_content": "Hm.", "tool_calls": [call("{\"city\":\"Lima\"}")] },
                { "role": "tool", "tool_call_id": "c1", "content": "sun" },
                { "role": "user", "content": "thanks" },
            ] }),
            json!({ "tools": [flat_weather()], "input": [
                { "role": "user", "content": "weather?" },
                { "type": "reasoning", "id": "rs_1", "summary": [], "content": [{ "type": "reasoning_text", "text": "Hm." }], "encrypted_content": null },
                { "role": "assistant", "content": "I look." },
                { "type": "function_call", "id": "fc_1", "call_id": "c1", "name": "get_weather", "arguments": "{\"city\":\"Lima\"}", "status": "completed" },
                { "type": "function_call_output", "call_id": "c1", "output": "sun" },
                { "role": "user", "content": "thanks" },
            ] }),
            json!({ "tools": [messages_weather()], "messages": [
                { "role": "user", "content": "weather?" },
                { "role": "assistant", "content": [
                    { "type": "thinking", "thinking": "Hm.", "signature": "" }, { "type": "text", "text": "I look." },
                    { "type": "tool_use", "id": "c1", "name": "get_weather", "input": { "city": "Lima" } },
                ] },
                { "role": "user", "content": [
                    { "type": "tool_result", "tool_use_id": "c1", "content": [{ "type": "text", "text": "sun" }], "is_error": false },
                    { "type": "text", "text": "thanks" },
                ] },
            ] }),
        ),
    ];
    for (as_chat, as_responses, as_messages) in table {
        let node = hermes("x");
        let mut wanted = None;
        for (path, body) in
            [(CHAT, chat(&as_chat)), (RESPONSES, responses(&as_responses)), (MESSAGES, messages(&as_messages))]
        {
            let reply = post(app(&node), path, &body).await;
            assert_eq!(reply.status, 200, "{path}: {}", reply.json());
            let request = node.requests.lock().unwrap().pop().unwrap();
            let got = (
                node.tokenizer().decode(&request.prompt).unwrap(),
                request.sampling.temperature,
                request.sampling.top_p,
            );
            if as_chat.get("seed").is_some() {
                assert_eq!((request.sampling.seed, request.tokens_max), (3, 9), "{path}");
            }
            assert_eq!(&got, wanted.get_or_insert(got.clone()), "{path}");
        }
        let mut body = messages(&as_messages);
        body.as_object_mut().unwrap().remove("max_tokens");
        let tokens = post(app(&node), "/v1/messages/count_tokens", &body).await.json();
        let prompt = node.tokenizer().encode(&wanted.unwrap().0).unwrap();
        assert_eq!(tokens, json!({ "input_tokens": prompt.len() }));
    }
}

#[tokio::test]
async fn forms_and_forced_calls_reach_the_node_as_grammars() {
    let schema = json!({ "type": "object", "properties": { "n": { "type": "integer" } }, "required": ["n"], "additionalProperties": false });
    let table = [
        (
            RESPONSES,
            responses(
                &json!({ "text": { "format": { "type": "json_schema", "name": "n", "schema": schema, "strict": true } } }),
            ),
            "{\"n\":3}",
        ),
        (
            RESPONSES,
            responses(&json!({ "text": { "format": { "type": "json_object" }, "verbosity": null } })),
            "{\"m\":[]}",
        ),
        (
            RESPONSES,
            responses(
                &json!({ "tools": [flat_weather()], "tool_choice": { "type": "function", "name": "get_weather" } }),
            ),
            "{\"name\": \"get_weather\", \"arguments\": {\"city\":\"a\"}}",
        ),
        (
            RESPONSES,
            responses(&json!({ "tools": [flat_weather()], "tool_choice": "required" })),
            "{\"name\": \"get_weather\", \"arguments\": {\"city\":\"a\"}}",
        ),
        (
            MESSAGES,
            messages(&json!({ "output_config": { "format": { "type": "json_schema", "schema": schema } } })),
            "{\"n\":3}",
        ),
        (
            MESSAGES,
            messages(&json!({ "tools": [messages_weather()], "tool_choice": { "type": "any" } })),
            "{\"name\": \"get_weather\", \"arguments\": {\"city\":\"a\"}}",
        ),
        (
            MESSAGES,
            messages(
                &json!({ "tools": [messages_weather()], "tool_choice": { "type": "tool", "name": "get_weather", "disable_parallel_tool_use": true } }),
            ),
            "{\"name\": \"get_weather\", \"arguments\": {\"city\":\"a\"}}",
        ),
    ];
    for (path, body, wanted) in table {
        let node = plain("x");
        assert_eq!(post(app(&node), path, &body).await.status, 200, "{body}");
        assert!(follows(&node, wanted) && !follows(&node, "x"), "{body}");
    }
}

#[tokio::test]
async fn a_conversation_goes_on_from_a_response_that_is_kept() {
    let node = hermes("<tool_call>{\"name\": \"get_weather\", \"arguments\": {\"city\": \"Lima\"}}</tool_call>");
    let app = app(&node);
    let tools = json!([flat_weather()]);
    let first =
        post(app.clone(), RESPONSES, &responses(&json!({ "tools": tools, "instructions": "not kept" }))).await.json();
    let (id, call) = (first["id"].as_str().unwrap(), &first["output"][0]);
    let output = json!({ "type": "function_call_output", "call_id": call["call_id"], "output": "sun" });
    let ways = [
        json!({ "previous_response_id": id, "input": [output] }),
        json!({ "input": [{ "role": "user", "content": "capital of Peru?" }, { "type": "item_reference", "id": call["id"] }, output] }),
        json!({ "input": [{ "role": "user", "content": "capital of Peru?" }, call, output] }),
    ];
    let mut prompts = Vec::new();
    let mut second = Value::Null;
    for way in ways {
        second = post(app.clone(), RESPONSES, &responses(&with(way, &json!({ "tools": tools })))).await.json();
        assert_eq!(second["status"], "completed", "{second}");
        prompts.push(node.requests.lock().unwrap().last().unwrap().prompt.clone());
    }
    assert!(prompts.iter().all(|prompt| *prompt == prompts[0]));
    let prompt = node.tokenizer().decode(&prompts[0]).unwrap();
    assert!(
        prompt.contains("[user]capital of Peru?[assistant]<tool_call>") && prompt.contains("[tool get_weather]sun"),
        "{prompt}"
    );
    assert!(!prompt.contains("not kept"), "{prompt}");

    let path = format!("{RESPONSES}/{id}");
    assert_eq!(get(app.clone(), &path).await.json(), first);
    let request = Request::delete(&path).body(Body::empty()).unwrap();
    assert_eq!(send(app.clone(), request).await.json(), json!({ "id": id, "object": "response", "deleted": true }));
    assert_eq!(get(app.clone(), &path).await.error().1, "response_not_found");
    let gone = post(app.clone(), RESPONSES, &responses(&json!({ "previous_response_id": id }))).await.error();
    assert_eq!(gone, (400, "previous_response_not_found".into(), Some("previous_response_id".into())));
    let third = json!({ "previous_response_id": second["id"], "input": "and Chile?", "store": false, "stream": true });
    let third = responses_of(&events(&post(app.clone(), RESPONSES, &responses(&third)).await));
    assert_eq!((&third["store"], &third["previous_response_id"]), (&json!(false), &second["id"]));
    let unkept = get(app.clone(), &format!("{RESPONSES}/{}", third["id"].as_str().unwrap())).await;
    assert_eq!(unkept.status, 404);
    let streamed = responses_of(&events(&post(app.clone(), RESPONSES, &responses(&json!({ "stream": true }))).await));
    assert_eq!(get(app, &format!("{RESPONSES}/{}", streamed["id"].as_str().unwrap())).await.json(), streamed);
}

#[tokio::test]
async fn failures_end_a_stream() {
    let node = || {
        let mut replay = Replay::of("Lima is the capital");
        replay.ending = Ending::Fails(2);
        Arc::new(replay)
    };
    let events_of = events(&post(app(&node()), RESPONSES, &responses(&json!({ "stream": true }))).await);
    let [.., error, failed] = events_of.as_slice() else { panic!("{events_of:?}") };
    assert_eq!((&error["type"], &error["code"]), (&json!("error"), &json!("generation_failed")));
    assert_eq!((&failed["type"], &failed["response"]["status"]), (&json!("response.failed"), &json!("failed")));
    assert_eq!(failed["response"]["error"]["code"], "server_error");
    let sent = events(&post(app(&node()), MESSAGES, &messages(&json!({ "stream": true }))).await);
    let last = sent.last().unwrap();
    assert_eq!((&last["type"], &last["error"]["type"]), (&json!("error"), &json!("api_error")));
}

#[tokio::test]
async fn ends_are_told_apart() {
    let table = [
        (json!({}), "end_turn", json!(null)),
        (json!({ "max_tokens": 2 }), "max_tokens", json!(null)),
        (json!({ "stop_sequences": ["never", "the"] }), "stop_sequence", json!("the")),
    ];
    for (extra, reason, sequence) in table {
        let body = post(app(&plain("Lima is the capital.")), MESSAGES, &messages(&extra)).await.json();
        assert_eq!((&body["stop_reason"], &body["stop_sequence"]), (&json!(reason), &sequence), "{body}");
    }
    let body = post(app(&plain("Lima is it.")), RESPONSES, &responses(&json!({ "max_output_tokens": 2 }))).await.json();
    assert_eq!(
        (&body["status"], &body["incomplete_details"]["reason"]),
        (&json!("incomplete"), &json!("max_output_tokens"))
    );
    assert_eq!(body["output"][0]["status"], "incomplete");
}

#[tokio::test]
async fn what_cannot_be_done_is_named() {
    let item = |item: Value| json!({ "input": [item] });
    let block = |role: &str, block: Value| json!({ "messages": [{ "role": role, "content": [block] }] });
    let unique = json!({ "type": "array", "uniqueItems": true });
    let table = [
        (RESPONSES, json!({ "input": null }), "missing_field", "input"),
        (RESPONSES, json!({ "input": [] }), "invalid_value", "input"),
        (RESPONSES, json!({ "input": 7 }), "invalid_type", "input"),
        (RESPONSES, item(json!({ "type": "web_search_call" })), "unsupported_field", "input[0].type"),
        (
            RESPONSES,
            item(json!({ "role": "user", "content": [{ "type": "input_image" }] })),
            "unsupported_field",
            "input[0].content[0].type",
        ),
        (RESPONSES, item(json!({ "role": "tool", "content": "x" })), "invalid_value", "input[0].role"),
        (RESPONSES, item(json!({ "role": "user", "content": "x", "typo": 1 })), "unknown_field", "input[0].typo"),
        (
            RESPONSES,
            item(json!({ "type": "function_call", "call_id": "c", "name": "f", "arguments": "[" })),
            "invalid_value",
            "input[0].arguments",
        ),
        (RESPONSES, item(json!({ "type": "item_reference", "id": "msg_x_0" })), "item_not_found", "input[0].id"),
        (RESPONSES, json!({ "background": true }), "unsupported_field", "background"),
        (RESPONSES, json!({ "truncation": "auto" }), "unsupported_field", "truncation"),
        (RESPONSES, json!({ "conversation": "c" }), "unsupported_field", "conversation"),
        (RESPONSES, json!({ "n": 2 }), "unsupported_field", "n"),
        (RESPONSES, json!({ "include": ["x"] }), "invalid_value", "include[0]"),
        (RESPONSES, json!({ "max_output_tokens": 0 }), "invalid_value", "max_output_tokens"),
        (RESPONSES, json!({ "tools": [{ "type": "web_search" }] }), "unsupported_field", "tools[0].type"),
        (
            RESPONSES,
            json!({ "tools": [{ "type": "function", "name": "f", "parameters": { "type": "array" } }] }),
            "invalid_value",
            "tools[0].parameters.type",
        ),
        (
            RESPONSES,
            json!({ "tool_choice": "required", "tools": [{ "type": "function", "name": "f", "parameters": { "type": "object", "properties": { "a": unique } } }] }),
            "invalid_json_schema",
            "tools[0].parameters",
        ),
        (
            RESPONSES,
            json!({ "text": { "format": { "type": "json_schema", "name": "x", "schema": unique } } }),
            "invalid_json_schema",
            "text.format.schema",
        ),
        (RESPONSES, json!({ "text": { "format": { "type": "lark" } } }), "unsupported_field", "text.format"),
        (RESPONSES, json!({ "input": "word ".repeat(500) }), "context_length_exceeded", "input"),
        (RESPONSES, json!({ "model": "gpt-4o" }), "model_not_found", "model"),
    ];
    for (path, extra, code, param) in table {
        let reply = post(app(&plain("x")), path, &responses(&extra)).await;
        let (status, got, about) = reply.error();
        assert_eq!((got.as_str(), about.as_deref()), (code, Some(param)), "{extra}: {}", reply.json());
        assert!(
            reply.json()["error"]["message"].as_str().unwrap().contains(&format!("`{param}`"))
                || status == 404
                || code == "context_length_exceeded",
            "{}",
            reply.json()
        );
    }
    let table = [
        (json!({ "max_tokens": null }), "`max_tokens`"),
        (json!({ "messages": [{ "role": "assistant", "content": "Sure:" }] }), "`messages`"),
        (block("user", json!({ "type": "image", "source": {} })), "`messages[0].content[0].type`"),
        (
            block("user", json!({ "type": "tool_use", "id": "a", "name": "f", "input": {} })),
            "`messages[0].content[0].type`",
        ),
        (block("user", json!({ "type": "text", "text": "x", "typo": 1 })), "`messages[0].content[0].typo`"),
        (json!({ "tools": [{ "type": "bash_20250124", "name": "bash" }] }), "`tools[0].type`"),
        (
            json!({ "tool_choice": { "type": "any" }, "tools": [{ "name": "f", "input_schema": { "type": "object", "properties": { "a": unique } } }] }),
            "`tools[0].input_schema`",
        ),
        (
            json!({ "output_config": { "format": { "type": "json_schema", "schema": unique } } }),
            "`output_config.format.schema`",
        ),
        (json!({ "stop_sequences": [7] }), "`stop_sequences[0]`"),
        (json!({ "mcp_servers": [{}] }), "`mcp_servers`"),
    ];
    for (extra, named) in table {
        let reply = post(app(&plain("x")), MESSAGES, &messages(&extra)).await;
        assert_eq!(reply.status, 400, "{extra}: {}", reply.json());
        let body = reply.json();
        assert_eq!(
            (&body["type"], &body["error"]["type"]),
            (&json!("error"), &json!("invalid_request_error")),
            "{body}"
        );
        assert!(body["error"]["message"].as_str().unwrap().contains(named), "{body}");
    }
}

#[tokio::test]
async fn errors_of_the_messages_api_have_its_shape_wherever_they_come_from() {
    let options = ApiOptions { api_key: Some("secret".into()), ..ApiOptions::default() };
    let node = plain("x");
    let key = |request: axum::http::request::Builder| {
        request.header("x-api-key", "secret").header("content-type", "application/json")
    };
    let body = || Body::from(messages(&json!({ "model": "claude" })).to_string());
    let table = [
        (Request::post(MESSAGES).body(body()).unwrap(), 401, "authentication_error"),
        (key(Request::post(MESSAGES)).body(body()).unwrap(), 404, "not_found_error"),
        (key(Request::get(MESSAGES)).body(Body::empty()).unwrap(), 405, "invalid_request_error"),
        (key(Request::post(MESSAGES)).body(Body::from("{")).unwrap(), 400, "invalid_request_error"),
    ];
    for (request, status, kind) in table {
        let reply = send(app_with(&node, options.clone()), request).await;
        let body = reply.json();
        assert_eq!((reply.status.as_u16(), &body["error"]["type"]), (status, &json!(kind)), "{body}");
        assert_eq!((&body["type"], body["request_id"].as_str()), (&json!("error"), reply.header("request-id")));
        assert_eq!(reply.header("request-id"), reply.header("x-request-id"));
    }
}
