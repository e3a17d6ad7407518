//! What is refused, with which status, code and field.

use std::sync::Arc;

use axum::body::Body;
use axum::http::Request;
use serde_json::{Value, json};

use super::replay::{Ending, Replay};
use super::*;
use crate::api::{BODY_BYTES_MAX, Readiness};
use crate::request::GenerateError;

fn node() -> Arc<Replay> {
    Arc::new(Replay::of("Lima."))
}

async fn refused(path: &str, body: &Value) -> (u16, String, Option<String>) {
    let reply = post(app(&node()), path, body).await;
    assert_ne!(reply.status, 200, "{body}");
    reply.error()
}

/// (fields on top of a good chat request, code, param); all are 400.
fn chat_table() -> Vec<(Value, &'static str, &'static str)> {
    let user = |content: Value| json!({ "messages": [{ "role": "user", "content": content }] });
    let role = |role: &str| json!({ "messages": [{ "role": role, "content": "x" }] });
    let tool = |name: &str, parameters: &Value| json!({ "type": "function", "function": { "name": name, "parameters": parameters } });
    let forced = |tools: &Value| json!({ "tools": tools, "tool_choice": "required" });
    let schema = |schema: &Value| json!({ "response_format": { "type": "json_schema", "json_schema": { "name": "x", "schema": schema } } });
    let called = |arguments: &str| {
        let call = json!({ "id": "1", "type": "function", "function": { "name": "f", "arguments": arguments } });
        json!({ "messages": [{ "role": "assistant", "content": null, "tool_calls": [call] }] })
    };
    vec![
        (json!({ "tools": {} }), "invalid_type", "tools"),
        (json!({ "tools": vec![tool("f", &json!({})); 129] }), "invalid_value", "tools"),
        (json!({ "tools": [{ "type": "function" }] }), "missing_field", "tools[0].function"),
        (json!({ "tools": [{ "type": "custom" }] }), "unsupported_field", "tools[0].type"),
        (json!({ "tools": [tool("a b", &json!({}))] }), "invalid_value", "tools[0].function.name"),
        (forced(&json!([tool("f", &json!({})), tool("f", &json!({}))])), "invalid_value", "tools[1].function.name"),
        (forced(&json!([tool("f", &json!(3))])), "invalid_type", "tools[0].function.parameters"),
        (
            forced(&json!([tool("f", &json!({ "type": "string" }))])),
            "invalid_value",
            "tools[0].function.parameters.type",
        ),
        (
            forced(&json!([
                tool("f", &json!({})),
                tool("g", &json!({ "properties": { "a": { "type": "array", "uniqueItems": true } } })),
            ])),
            "invalid_json_schema",
            "tools[1].function.parameters",
        ),
        (json!({ "tool_choice": 3 }), "invalid_type", "tool_choice"),
        (json!({ "tool_choice": "any", "tools": [] }), "invalid_value", "tool_choice"),
        (json!({ "tool_choice": "some" }), "invalid_value", "tool_choice"),
        (json!({ "tool_choice": { "type": "allowed_tools" } }), "missing_field", "tool_choice.allowed_tools"),
        (json!({ "tool_choice": { "type": "mcp" } }), "unsupported_field", "tool_choice.type"),
        (
            json!({ "tools": [tool("f", &json!({}))], "tool_choice": { "type": "function", "function": { "name": "g" } } }),
            "invalid_value",
            "tool_choice.function.name",
        ),
        (json!({ "function_call": "required" }), "invalid_value", "function_call"),
        (json!({ "function_call": { "name": "f" } }), "invalid_value", "function_call"),
        (json!({ "functions": [{ "name": "f" }], "tools": [tool("g", &json!({}))] }), "invalid_value", "functions"),
        (json!({ "functions": [{ "name": "a b" }] }), "invalid_value", "functions[0].name"),
        (json!({ "echo": true }), "unsupported_field", "echo"),
        (json!({ "continue_final_message": true }), "unsupported_field", "continue_final_message"),
        (json!({ "min_tokens": 9, "max_tokens": 8 }), "invalid_value", "min_tokens"),
        (json!({ "min_tokens": 2, "response_format": { "type": "json_object" } }), "unsupported_field", "min_tokens"),
        (json!({ "chat_template_kwargs": { "messages": [] } }), "invalid_value", "chat_template_kwargs.messages"),
        (json!({ "chat_template_kwargs": [] }), "invalid_type", "chat_template_kwargs"),
        (json!({ "repeat_penalty": 1.2, "repetition_penalty": 1.1 }), "invalid_value", "repeat_penalty"),
        (json!({ "response_format": { "type": "grammar" } }), "unsupported_field", "response_format"),
        (
            json!({ "response_format": { "type": "json_object", "schema": 3 } }),
            "invalid_type",
            "response_format.schema",
        ),
        (json!({ "response_format": { "type": "json_schema" } }), "missing_field", "response_format.json_schema"),
        (
            json!({ "response_format": { "type": "json_schema", "json_schema": {} } }),
            "missing_field",
            "response_format.json_schema.schema",
        ),
        (
            json!({ "response_format": { "type": "json_schema", "json_schema": { "name": "x" } } }),
            "missing_field",
            "response_format.json_schema.schema",
        ),
        (schema(&json!(true)), "invalid_json_schema", "response_format.json_schema.schema"),
        (schema(&json!({ "type": "thing" })), "invalid_json_schema", "response_format.json_schema.schema"),
        (schema(&json!({ "not": { "type": "null" } })), "invalid_json_schema", "response_format.json_schema.schema"),
        (
            schema(&json!({ "const": "long ".repeat(20_000) })),
            "invalid_json_schema",
            "response_format.json_schema.schema",
        ),
        (json!({ "response_format": "text" }), "invalid_type", "response_format"),
        (json!({ "response_format": {} }), "missing_field", "response_format.type"),
        (json!({ "audio": { "voice": "x" } }), "unsupported_field", "audio"),
        (json!({ "modalities": ["text", "audio"] }), "unsupported_field", "modalities"),
        (json!({ "modalities": "text" }), "invalid_type", "modalities"),
        (json!({ "web_search_options": {} }), "unsupported_field", "web_search_options"),
        (json!({ "reasoning_effort": "very" }), "invalid_value", "reasoning_effort"),
        (json!({ "reasoning": { "exclude": true } }), "unsupported_field", "reasoning.exclude"),
        (json!({ "store": "yes" }), "invalid_type", "store"),
        (json!({ "service_tier": "best" }), "invalid_value", "service_tier"),
        (json!({ "temprature": 1 }), "unknown_field", "temprature"),
        (json!({ "guided_json": {}, "zeta": 1 }), "unknown_field", "guided_json"),
        (json!({ "prompt": "x" }), "unknown_field", "prompt"),
        (json!({ "model": 4 }), "invalid_type", "model"),
        (json!({ "model": "m".repeat(300) }), "invalid_value", "model"),
        (json!({ "messages": null }), "missing_field", "messages"),
        (json!({ "messages": "hi" }), "invalid_type", "messages"),
        (json!({ "messages": [] }), "invalid_value", "messages"),
        (json!({ "messages": vec![json!({ "role": "user", "content": "x" }); 2049] }), "invalid_value", "messages"),
        (json!({ "messages": ["hi"] }), "invalid_type", "messages[0]"),
        (json!({ "messages": [{ "content": "x" }] }), "missing_field", "messages[0].role"),
        (role("robot"), "invalid_value", "messages[0].role"),
        (role("tool"), "missing_field", "messages[0].tool_call_id"),
        (role("function"), "missing_field", "messages[0].name"),
        (user(json!(null)), "missing_field", "messages[0].content"),
        (user(json!(7)), "invalid_type", "messages[0].content"),
        (user(json!(["x"])), "invalid_type", "messages[0].content[0]"),
        (user(json!([{ "type": "text" }])), "missing_field", "messages[0].content[0].text"),
        (
            user(json!([{ "type": "text", "text": "a" }, { "type": "image_url", "image_url": {} }])),
            "unsupported_field",
            "messages[0].content[1].type",
        ),
        (user(json!([{ "type": "text", "text": "a", "size": 1 }])), "unknown_field", "messages[0].content[0].size"),
        (json!({ "messages": [{ "role": "user", "content": "x", "name": 3 }] }), "invalid_type", "messages[0].name"),
        (
            json!({ "messages": [{ "role": "user", "content": "x", "mood": "ok" }] }),
            "unknown_field",
            "messages[0].mood",
        ),
        (
            json!({ "messages": [{ "role": "assistant", "content": "x", "tool_calls": [{}] }] }),
            "missing_field",
            "messages[0].tool_calls[0].function",
        ),
        (called("print(1)"), "invalid_value", "messages[0].tool_calls[0].function.arguments"),
        (called("[1]"), "invalid_value", "messages[0].tool_calls[0].function.arguments"),
        (json!({ "stream": "yes" }), "invalid_type", "stream"),
        (json!({ "stream": true, "stream_options": { "every": 1 } }), "unknown_field", "stream_options.every"),
        (json!({ "max_tokens": 0 }), "invalid_value", "max_tokens"),
        (json!({ "max_tokens": 1.5 }), "invalid_type", "max_tokens"),
        (json!({ "max_tokens": "9" }), "invalid_type", "max_tokens"),
        (json!({ "max_tokens": u64::MAX }), "invalid_value", "max_tokens"),
        (json!({ "max_completion_tokens": -2 }), "invalid_value", "max_completion_tokens"),
        (json!({ "max_completion_tokens": 0 }), "invalid_value", "max_completion_tokens"),
        (json!({ "max_tokens": 4, "max_completion_tokens": 5 }), "invalid_value", "max_tokens"),
        (json!({ "temperature": -0.1 }), "invalid_value", "temperature"),
        (json!({ "temperature": 2.1 }), "invalid_value", "temperature"),
        (json!({ "temperature": "1" }), "invalid_type", "temperature"),
        (json!({ "top_p": 1.1 }), "invalid_value", "top_p"),
        (json!({ "top_k": -2 }), "invalid_value", "top_k"),
        (json!({ "min_p": 2 }), "invalid_value", "min_p"),
        (json!({ "presence_penalty": 3 }), "invalid_value", "presence_penalty"),
        (json!({ "frequency_penalty": -3 }), "invalid_value", "frequency_penalty"),
        (json!({ "repetition_penalty": 0 }), "invalid_value", "repetition_penalty"),
        (json!({ "logit_bias": [] }), "invalid_type", "logit_bias"),
        (json!({ "logit_bias": { "x": 1 } }), "invalid_value", "logit_bias.x"),
        (json!({ "logit_bias": { "4096": 1 } }), "invalid_value", "logit_bias.4096"),
        (json!({ "logit_bias": { "7": 101 } }), "invalid_value", "logit_bias.7"),
        (json!({ "logit_bias": { "7": null } }), "invalid_type", "logit_bias.7"),
        (
            json!({ "logit_bias": (0..301).map(|i| (i.to_string(), json!(1))).collect::<serde_json::Map<_, _>>() }),
            "invalid_value",
            "logit_bias",
        ),
        (json!({ "seed": 1.5 }), "invalid_type", "seed"),
        (json!({ "seed": u64::MAX }), "invalid_value", "seed"),
        (json!({ "n": 0 }), "invalid_value", "n"),
        (json!({ "n": 9 }), "invalid_value", "n"),
        (json!({ "stop": "" }), "invalid_value", "stop"),
        (json!({ "stop": 3 }), "invalid_type", "stop"),
        (json!({ "stop": ["a", 3] }), "invalid_type", "stop[1]"),
        (json!({ "stop": vec!["a"; 33] }), "invalid_value", "stop"),
        (json!({ "stop": "s".repeat(257) }), "invalid_value", "stop"),
        (json!({ "logprobs": 2 }), "invalid_type", "logprobs"),
        (json!({ "top_logprobs": 2 }), "invalid_value", "top_logprobs"),
        (json!({ "logprobs": true, "top_logprobs": 21 }), "invalid_value", "top_logprobs"),
        (json!({ "tandem": true }), "invalid_type", "tandem"),
        (json!({ "tandem": { "mode": "fast" } }), "invalid_value", "tandem.mode"),
        (json!({ "tandem": { "threshold": 1.1 } }), "invalid_value", "tandem.threshold"),
        (json!({ "tandem": { "tokens": 1 } }), "invalid_type", "tandem.tokens"),
        (json!({ "tandem": { "colour": 1 } }), "unknown_field", "tandem.colour"),
        (json!({ "model": "tandem:local", "tandem": { "mode": "cloud" } }), "invalid_value", "tandem.mode"),
        (json!({ "best_of": 2 }), "unsupported_field", "best_of"),
    ]
}

#[tokio::test]
async fn bad_chat_fields_are_named() {
    for (extra, code, param) in chat_table() {
        let got = refused(CHAT, &chat(&extra)).await;
        assert_eq!(got, (400, code.to_owned(), Some(param.to_owned())), "{extra}");
    }
}

#[tokio::test]
async fn bad_completion_fields_are_named() {
    let table = [
        (json!({ "prompt": null }), "missing_field", "prompt"),
        (json!({ "prompt": {} }), "invalid_type", "prompt"),
        (json!({ "prompt": [] }), "invalid_value", "prompt"),
        (json!({ "prompt": ["a", 1] }), "invalid_type", "prompt[1]"),
        (json!({ "prompt": [1, "a"] }), "invalid_value", "prompt[1]"),
        (json!({ "prompt": [4096] }), "invalid_value", "prompt[0]"),
        (json!({ "prompt": [-1] }), "invalid_value", "prompt[0]"),
        (json!({ "prompt": [[1], [2.5]] }), "invalid_value", "prompt[1][0]"),
        (json!({ "prompt": vec!["a"; 9] }), "invalid_value", "prompt"),
        (json!({ "prompt": ["a", "b", "c"], "n": 3 }), "invalid_value", "n"),
        (json!({ "prompt": "" }), "empty_prompt", "prompt"),
        (json!({ "prompt": [[]] }), "empty_prompt", "prompt"),
        (json!({ "echo": true, "logprobs": 1, "model": "tandem:exact" }), "unsupported_field", "echo"),
        (json!({ "echo": true, "max_tokens": -2 }), "invalid_value", "max_tokens"),
        (json!({ "suffix": "x" }), "unsupported_field", "suffix"),
        (json!({ "best_of": 3 }), "unsupported_field", "best_of"),
        (json!({ "logprobs": true }), "invalid_type", "logprobs"),
        (json!({ "logprobs": 6 }), "invalid_value", "logprobs"),
        (json!({ "top_logprobs": 1 }), "unknown_field", "top_logprobs"),
        (json!({ "messages": [] }), "unsupported_field", "messages"),
        (json!({ "max_tokens": 0 }), "invalid_value", "max_tokens"),
    ];
    for (extra, code, param) in table {
        let got = refused(TEXT, &text(&extra)).await;
        assert_eq!(got, (400, code.to_owned(), Some(param.to_owned())), "{extra}");
    }
}

#[tokio::test]
async fn null_is_absent() {
    let nulls = json!({
        "tools": null, "tool_choice": null, "response_format": null, "store": null, "stop": null, "n": null,
        "logit_bias": null, "stream": null, "stream_options": null, "tandem": null, "made_up": null,
        "max_tokens": null, "temperature": null, "logprobs": null, "top_logprobs": null, "modalities": null,
    });
    assert_eq!(post(app(&node()), CHAT, &chat(&nulls)).await.status, 200);
    let nulls = json!({ "suffix": null, "echo": null, "best_of": null, "logprobs": null, "stop": null });
    assert_eq!(post(app(&node()), TEXT, &text(&nulls)).await.status, 200);
}

#[tokio::test]
async fn what_openai_ignores_is_accepted() {
    let extra = json!({
        "user": "u", "metadata": { "a": "b" }, "store": false, "service_tier": "auto", "safety_identifier": "s",
        "prompt_cache_key": "k", "modalities": ["text"], "response_format": { "type": "text" },
        "max_tokens": 5, "max_completion_tokens": 5, "top_k": -1, "top_p": 0,
    });
    assert_eq!(post(app(&node()), CHAT, &chat(&extra)).await.status, 200);
    let extra = json!({ "echo": false, "suffix": "", "best_of": 1, "user": "u" });
    assert_eq!(post(app(&node()), TEXT, &text(&extra)).await.status, 200);
}

#[tokio::test]
async fn broken_bodies() {
    for body in ["", "{", "[]", "null", "\"x\"", "{\"model\": \"tandem\",}", "\u{0}"] {
        let reply = post_bytes(app(&node()), CHAT, body.as_bytes().to_vec()).await;
        assert_eq!(reply.error(), (400, "invalid_json".into(), None), "{body:?}");
    }
    let reply = post_bytes(app(&node()), CHAT, vec![0xff, 0xfe, b'{']).await;
    assert_eq!(reply.error().0, 400);
    let deep = "[".repeat(100_000);
    assert_eq!(post_bytes(app(&node()), CHAT, deep.into_bytes()).await.error().0, 400);
}

#[tokio::test]
async fn large_bodies_are_413_announced_or_not() {
    let body = vec![b' '; BODY_BYTES_MAX + 1];
    let reply = post_bytes(app(&node()), CHAT, body.clone()).await;
    assert_eq!(reply.error(), (413, "body_too_large".into(), None));
    let pieces =
        futures::stream::iter(body.chunks(1 << 16).map(|c| Ok::<_, std::io::Error>(c.to_vec())).collect::<Vec<_>>());
    let request =
        Request::post(CHAT).header("content-type", "application/json").body(Body::from_stream(pieces)).unwrap();
    assert_eq!(send(app(&node()), request).await.error(), (413, "body_too_large".into(), None));
    let largest = vec![b' '; BODY_BYTES_MAX];
    assert_eq!(post_bytes(app(&node()), CHAT, largest).await.error().0, 400);
}

#[tokio::test]
async fn other_content_types_are_415() {
    for kind in [None, Some("text/plain"), Some("application/x-www-form-urlencoded"), Some("application/jsonx")] {
        let mut request = Request::post("/tandem/controls");
        if let Some(kind) = kind {
            request = request.header("content-type", kind);
        }
        let reply = send(app(&node()), request.body(Body::from("{\"cut\":true}")).unwrap()).await;
        assert_eq!(reply.error(), (415, "unsupported_media_type".into(), None), "{kind:?}");
    }
    let request = Request::post(CHAT).header("content-type", "Application/JSON; charset=utf-8");
    assert_eq!(send(app(&node()), request.body(Body::from(chat(&json!({})).to_string())).unwrap()).await.status, 200);
}

#[tokio::test]
async fn paths_and_methods() {
    for path in ["/v1", "/v1/audio/speech", "/v2/models", "/nothing", "/v1//models"] {
        assert_eq!(get(app(&node()), path).await.error(), (404, "unknown_url".into(), None), "{path}");
    }
    let reply = get(app(&node()), CHAT).await;
    assert_eq!(reply.error(), (405, "method_not_allowed".into(), None));
    assert_eq!(reply.header("allow"), Some("POST"));
    for path in ["/v1/models", "/health", "/version", "/tandem/status"] {
        let reply = post(app(&node()), path, &json!({})).await;
        assert_eq!(reply.error(), (405, "method_not_allowed".into(), None), "{path}");
        assert_eq!(reply.header("allow"), Some("GET,HEAD"), "{path}");
    }
}

#[tokio::test]
async fn unknown_models_are_404_or_the_alias() {
    let body = chat(&json!({ "model": "gpt-4o" }));
    let reply = post(app(&node()), CHAT, &body).await;
    assert_eq!(reply.error(), (404, "model_not_found".into(), Some("model".into())));
    assert!(reply.json()["error"]["message"].as_str().unwrap().contains("`tandem`, `demo-edge`, `demo-cloud`"));
    let options = ApiOptions { default_alias: Some("tandem:exact".into()), ..ApiOptions::default() };
    let reply = post(app_with(&node(), options), CHAT, &body).await;
    assert_eq!(reply.status, 200);
    assert_eq!((reply.header("x-tandem-mode"), reply.json()["model"].as_str()), (Some("exact"), Some("tandem:exact")));
}

#[tokio::test]
async fn the_nodes_refusals_have_their_status() {
    let refuse = |error| {
        let mut replay = Replay::of("Lima.");
        replay.ending = Ending::Refused(error);
        Arc::new(replay)
    };
    let busy = refuse(GenerateError::Busy { limit: 4, retry_after_ms: 1500 });
    for stream in [false, true] {
        let reply = post(app(&busy), CHAT, &chat(&json!({ "stream": stream }))).await;
        assert_eq!(reply.error(), (429, "busy".into(), None));
        assert_eq!((reply.header("retry-after"), reply.header("retry-after-ms")), (Some("2"), Some("1500")));
    }
    let long = refuse(GenerateError::TooLong { prompt: 9, context: 8 });
    let reply = post(app(&long), TEXT, &text(&json!({}))).await;
    assert_eq!(reply.error(), (400, "context_length_exceeded".into(), Some("prompt".into())));
    let alone = refuse(GenerateError::NoCloud("exact"));
    let reply = post(app(&alone), CHAT, &chat(&json!({ "model": "tandem:exact" }))).await;
    assert_eq!(reply.error(), (400, "no_cloud".into(), Some("model".into())));
    let broken = refuse(GenerateError::Engine("x".into()));
    assert_eq!(post(app(&broken), CHAT, &chat(&json!({}))).await.error(), (500, "generation_failed".into(), None));
}

#[tokio::test]
async fn prompts_longer_than_the_context_are_refused_before_the_node_sees_them() {
    let node = node();
    let reply = post(app(&node), TEXT, &text(&json!({ "prompt": vec![9; 256] }))).await;
    assert_eq!(reply.error(), (400, "context_length_exceeded".into(), Some("prompt".into())));
    let long = json!({ "messages": [{ "role": "user", "content": "word ".repeat(4000) }] });
    let reply = post(app(&node), CHAT, &chat(&long)).await;
    assert_eq!(reply.error(), (400, "context_length_exceeded".into(), Some("messages".into())));
    assert!(node.requests.lock().unwrap().is_empty());
}

#[tokio::test]
async fn a_node_that_is_not_ready_answers_503() {
    let table = [
        (Readiness::Loading("cloud model".into()), "loading", true),
        (Readiness::Draining, "draining", true),
        (Readiness::Failed("no weights".into()), "failed", false),
    ];
    for (readiness, code, retry) in table {
        let mut replay = Replay::of("Lima.");
        replay.readiness = readiness;
        let replay = Arc::new(replay);
        let controls = post(app(&replay), "/tandem/controls", &json!({ "cut": true })).await;
        for reply in [post(app(&replay), CHAT, &chat(&json!({}))).await, get(app(&replay), "/ready").await, controls] {
            assert_eq!(reply.error(), (503, code.into(), None));
            assert_eq!(reply.header("retry-after").is_some(), retry, "{code}");
        }
        let health = get(app(&replay), "/health").await;
        assert_eq!(health.status.as_u16(), if code == "draining" { 200 } else { 503 });
    }
}

#[tokio::test]
async fn keys_and_hosts() {
    let locked = ApiOptions { api_key: Some("secret".into()), ..ApiOptions::default() };
    let ask = |path: &str, header: Option<(&str, &str)>| {
        let mut request = Request::get(path);
        if let Some((name, value)) = header {
            request = request.header(name, value);
        }
        request.body(Body::empty()).unwrap()
    };
    for path in ["/v1/models", "/metrics", "/tandem/status", "/tandem/explain/last"] {
        let reply = send(app_with(&node(), locked.clone()), ask(path, None)).await;
        assert_eq!(reply.error(), (401, "invalid_api_key".into(), None), "{path}");
        assert_eq!(reply.header("www-authenticate"), Some("Bearer"));
        let reply = send(app_with(&node(), locked.clone()), ask(path, Some(("authorization", "Bearer no")))).await;
        assert_eq!(reply.error().0, 401, "{path}");
    }
    let keyed = ask("/v1/models", Some(("authorization", "Bearer secret")));
    assert_eq!(send(app_with(&node(), locked.clone()), keyed).await.status, 200);
    for path in ["/health", "/ready", "/version", "/"] {
        assert_eq!(send(app_with(&node(), locked.clone()), ask(path, None)).await.status, 200, "{path}");
    }
    let reply = send(app(&node()), ask("/v1/models", Some(("host", "evil.example")))).await;
    assert_eq!(reply.error(), (403, "host_not_allowed".into(), None));
    let open = ApiOptions { any_host: true, ..ApiOptions::default() };
    assert_eq!(send(app_with(&node(), open), ask("/v1/models", Some(("host", "edge.lan:80")))).await.status, 200);
    assert_eq!(send(app(&node()), ask("/v1/models", Some(("host", "127.0.0.1:8080")))).await.status, 200);
}
