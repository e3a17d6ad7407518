//! What clients send by themselves: taken, done where there is something to do, and handed back in their
//! own way.

use std::io::Write as _;
use std::sync::Arc;

use axum::body::Body;
use axum::http::Request;
use flate2::Compression;
use flate2::write::{GzEncoder, ZlibEncoder};
use serde_json::json;

use super::replay::Replay;
use super::tools::{HERMES, follows, weather};
use super::*;
use crate::api::{BODY_BYTES_MAX, Backend as _};

/// Writes names, its own variables, and whatever role there is.
const NAMES: &str = "{{ effort }}{{ reasoning_effort }}{% if enable_thinking is defined %}[think {{ enable_thinking }}]{% endif %}\
    {% for m in messages %}[{{ m.role }}{% if m.name %} {{ m.name }}{% endif %}]{{ m.content }}{% endfor %}[assistant]";

fn node() -> Arc<Replay> {
    Arc::new(Replay::of("Lima."))
}

fn prompt(node: &Replay) -> String {
    node.tokenizer().decode(&node.requests.lock().unwrap().last().unwrap().prompt).unwrap()
}

#[tokio::test]
async fn what_changes_no_token_is_accepted() {
    let plain = post(app(&node()), CHAT, &chat(&json!({}))).await.json()["choices"].clone();
    let table = [
        json!({ "tools": [] }),
        json!({ "tools": [], "tool_choice": "auto", "parallel_tool_calls": false }),
        json!({ "tool_choice": "none", "parallel_tool_calls": true }),
        json!({ "functions": [], "function_call": "none" }),
        json!({ "store": true, "service_tier": "flex", "verbosity": "low", "prediction": { "type": "content", "content": "x" } }),
        json!({ "reasoning_effort": "none" }),
        json!({ "reasoning": { "effort": "low", "summary": "auto" } }),
        json!({ "thinking": { "type": "enabled", "budget_tokens": 1024 }, "enable_thinking": true, "think": false }),
        json!({ "chat_template_kwargs": { "enable_thinking": false, "anything": [1] } }),
        json!({ "stream_options": { "include_usage": true } }),
        json!({ "max_tokens": -1 }),
        json!({ "max_completion_tokens": 64.0, "seed": 7.0 }),
        json!({ "min_tokens": 0, "ignore_eos": false, "echo": false, "add_generation_prompt": true }),
        json!({ "repeat_penalty": 1.0, "repetition_penalty": 1.0 }),
        json!({ "cache_prompt": true, "id_slot": -1, "timings_per_token": false }),
        json!({ "top_logprobs": 0, "logprobs": false }),
        json!({ "response_format": { "type": "text" }, "user": "u", "metadata": {} }),
        json!({ "messages": [{ "role": "user", "name": "ann", "content": "capital of Peru?" }] }),
        json!({ "messages": [{ "role": "user", "content": [
            { "type": "text", "text": "capital of ", "cache_control": { "type": "ephemeral" } },
            { "type": "text", "text": "Peru?" },
        ] }] }),
    ];
    for extra in table {
        let reply = post(app(&node()), CHAT, &chat(&extra)).await;
        assert_eq!(reply.status, 200, "{extra}: {}", reply.json());
        assert_eq!(reply.json()["choices"], plain, "{extra}");
    }
    let reply = post(app(&node()), TEXT, &text(&json!({ "max_tokens": -1, "logprobs": false, "echo": false }))).await;
    assert_eq!((reply.status.as_u16(), &reply.json()["choices"][0]["finish_reason"]), (200, &json!("stop")));
}

#[tokio::test]
async fn names_and_variables_reach_the_template() {
    let node = Arc::new(Replay::of("Lima.").with_template(NAMES));
    let messages = json!([
        { "role": "system", "name": "rules", "content": "Be brief." },
        { "role": "user", "name": "ann", "content": "Hi." },
        { "role": "assistant", "name": "bot", "content": "Ho." },
        { "role": "user", "name": "", "content": "And?" },
    ]);
    let table = [
        (json!({}), ""),
        (json!({ "chat_template_kwargs": { "effort": "much ", "enable_thinking": false } }), "much [think False]"),
        (json!({ "reasoning_effort": "high" }), "high[think True]"),
        (json!({ "reasoning": { "enabled": false } }), "none[think False]"),
        (json!({ "thinking": { "type": "disabled" } }), "[think False]"),
        (
            json!({ "reasoning_effort": "low", "chat_template_kwargs": { "enable_thinking": false } }),
            "low[think False]",
        ),
    ];
    for (extra, head) in table {
        let request = chat(&with(extra.clone(), &json!({ "messages": messages })));
        let reply = post(app(&node), CHAT, &request).await;
        assert_eq!(reply.status, 200, "{extra}: {}", reply.json());
        let wanted = "[system rules]Be brief.[user ann]Hi.[assistant bot]Ho.[user]And?[assistant]";
        assert_eq!(prompt(&node).to_lowercase(), format!("{head}{wanted}").to_lowercase(), "{extra}");
    }
}

#[tokio::test]
async fn schemas_come_in_every_clients_form() {
    let schema = json!({ "type": "object", "properties": { "n": { "type": "integer" } }, "required": ["n"], "additionalProperties": false });
    let table = [
        json!({ "type": "json_object", "value": schema }),
        json!({ "type": "json", "value": schema }),
        json!({ "type": "json_object", "schema": schema }),
        json!({ "type": "json_schema", "json_schema": { "schema": schema } }),
        json!({ "type": "json_schema", "json_schema": { "name": "Answer[int]", "schema": schema, "strict": true } }),
        json!({ "type": "json_schema", "value": { "name": "answer", "schema": schema } }),
    ];
    for format in table {
        let node = node();
        let reply = post(app(&node), CHAT, &chat(&json!({ "response_format": format }))).await;
        assert_eq!(reply.status, 200, "{format}: {}", reply.json());
        assert!(follows(&node, "{\"n\": 4}") && !follows(&node, "{\"m\": 4}"), "{format}");
    }
    let node = node();
    post(app(&node), CHAT, &chat(&json!({ "response_format": { "type": "json_object", "schema": {} } }))).await;
    assert!(follows(&node, "{\"m\": 4}") && !follows(&node, "4"));
}

#[tokio::test]
async fn ends_of_answers_are_put_off() {
    let node = node();
    post(app(&node), CHAT, &chat(&json!({ "ignore_eos": true, "logit_bias": { "1": 5, "7": 2 } }))).await;
    let bias = node.requests.lock().unwrap()[0].sampling.logit_bias.clone();
    assert_eq!(bias, [(1, -1e4), (7, 2.0)]);
    for (path, request) in [(CHAT, chat(&json!({ "min_tokens": 3 }))), (TEXT, text(&json!({ "min_tokens": 3 })))] {
        let reply = post(app(&node), path, &request).await;
        assert_eq!(reply.status, 200, "{}", reply.json());
        let requests = node.requests.lock().unwrap();
        let followed = requests.last().unwrap().grammar.as_ref().unwrap().follow(&[1]);
        let vocabulary = node.tokenizer().vocab_size() as u32;
        for (answer, ends) in [(&[][..], false), (&[9, 300], false), (&[9, 300, 9], true), (&[9, 300, 9, 2, 5], true)] {
            let allowed = followed.allowed(answer).unwrap();
            assert_eq!(allowed.allows(1), ends, "{answer:?}");
            assert!((0..vocabulary).filter(|id| *id != 1).all(|id| allowed.allows(id)), "{answer:?}");
        }
    }
}

fn function(parameters: &Value) -> Value {
    json!({ "functions": [{ "name": "get_weather", "description": "w", "parameters": parameters }] })
}

#[tokio::test]
async fn functions_are_called_as_before_there_were_tools() {
    let call = "I look.\n<tool_call>\n{\"name\": \"get_weather\", \"arguments\": {\"city\": \"Lima\"}}\n</tool_call>";
    let node = Arc::new(Replay::of(call).with_template(HERMES));
    let parameters = json!({ "type": "object", "properties": { "city": { "type": "string" } }, "required": ["city"] });
    for choice in [json!(null), json!("auto"), json!({ "name": "get_weather" })] {
        let request = chat(&with(function(&parameters), &json!({ "function_call": choice })));
        let reply = post(app(&node), CHAT, &request).await;
        assert_eq!(reply.status, 200, "{}", reply.json());
        let wanted = json!({ "name": "get_weather", "arguments": "{\"city\": \"Lima\"}" });
        let answer = &reply.json()["choices"][0];
        assert_eq!((&answer["message"]["function_call"], &answer["finish_reason"]), (&wanted, &json!("function_call")));
        assert!(answer["message"].get("tool_calls").is_none());
        assert_eq!(node.requests.lock().unwrap().last().unwrap().grammar.is_some(), choice.is_object());
        let chunks = post(app(&node), CHAT, &with(request, &json!({ "stream": true }))).await.chunks();
        let deltas: Vec<&Value> = chunks.iter().map(|chunk| &chunk["choices"][0]["delta"]["function_call"]).collect();
        let text = |name: &str| deltas.iter().filter_map(|delta| delta[name].as_str()).collect::<String>();
        assert_eq!((text("name"), text("arguments")), ("get_weather".into(), "{\"city\": \"Lima\"}".into()));
        assert_eq!(chunks.last().unwrap()["choices"][0]["finish_reason"], "function_call");
    }
    let messages = json!([
        { "role": "user", "content": "And?" },
        { "role": "assistant", "content": null, "function_call": { "name": "get_weather", "arguments": "{\"city\":\"Lima\"}" } },
        { "role": "function", "name": "get_weather", "content": "22" },
    ]);
    let request = chat(&with(function(&parameters), &json!({ "messages": messages })));
    assert_eq!(post(app(&node), CHAT, &request).await.status, 200);
    let wanted = "[assistant]<tool_call>{\"name\": \"get_weather\", \"arguments\": {\"city\": \"Lima\"}}</tool_call>[tool get_weather]22[assistant]";
    assert!(prompt(&node).ends_with(wanted), "{}", prompt(&node));
}

#[tokio::test]
async fn tools_may_be_narrowed_to_those_allowed() {
    let other = json!({ "type": "function", "function": { "name": "other" } });
    let only = json!([{ "type": "function", "function": { "name": "other" } }]);
    for (mode, forced) in [("auto", false), ("required", true)] {
        let node = Arc::new(Replay::of("x").with_template(HERMES));
        let choice = json!({ "type": "allowed_tools", "allowed_tools": { "mode": mode, "tools": only } });
        let request = chat(&json!({ "tools": [weather(), other], "tool_choice": choice }));
        assert_eq!(post(app(&node), CHAT, &request).await.status, 200);
        assert!(prompt(&node).contains("other") && !prompt(&node).contains("get_weather"));
        assert_eq!(node.requests.lock().unwrap()[0].grammar.is_some(), forced);
    }
}

#[tokio::test]
async fn a_pair_whose_template_knows_no_tools_answers_in_words() {
    for stream in [false, true] {
        let node = node();
        let reply = post(app(&node), CHAT, &chat(&json!({ "tools": [weather()], "stream": stream }))).await;
        assert_eq!(reply.status, 200);
        assert!(reply.header("x-tandem-notice").unwrap().contains("not described to the model"));
        assert!(!prompt(&node).contains("get_weather"), "the demo pair's template shows no system text");
    }
    // Where system messages are shown, the model is told, and what it calls is a call.
    let call = "{\"name\": \"get_weather\", \"arguments\": {\"city\": \"Lima\"}}";
    for (answer, called) in [(call, true), ("{\"name\": \"Alice\", \"age\": 30}", false), ("It is warm.", false)] {
        let node = Arc::new(Replay::of(answer).with_template(NAMES));
        let system = json!([{ "role": "system", "content": "Be brief." }, { "role": "user", "content": "And?" }]);
        for messages in [json!([{ "role": "user", "content": "And?" }]), system] {
            let request = chat(&json!({ "tools": [weather()], "messages": messages }));
            let reply = post(app(&node), CHAT, &request).await;
            assert_eq!(reply.header("x-tandem-notice"), None, "{}", reply.json());
            assert!(prompt(&node).contains("\"name\":\"get_weather\"") && prompt(&node).contains("[user]And?"));
            let message = &reply.json()["choices"][0]["message"];
            assert_eq!(message["tool_calls"].is_array(), called, "{message}");
            assert_eq!(message["content"].as_str(), (!called).then_some(answer));
        }
    }
}

#[tokio::test]
async fn what_is_handed_out_is_taken_back() {
    let call = |arguments: Value| json!({ "id": "call_1", "type": "function", "function": { "name": "get_weather", "arguments": arguments } });
    let said = |message: Value| with(json!({ "role": "assistant" }), &message);
    let table = [
        // Arguments that the answer's length cut, that were none, or that came as an object.
        (said(json!({ "content": null, "tool_calls": [call(json!("{\"city\": \"Li"))] })), r#"{"city": "Li"}"#),
        (said(json!({ "content": null, "tool_calls": [call(json!("{\"city\": "))] })), "{}"),
        (said(json!({ "content": "", "tool_calls": [call(json!(""))] })), "{}"),
        (said(json!({ "content": [], "tool_calls": [call(json!({ "city": "Li" }))] })), r#"{"city": "Li"}"#),
        (said(json!({ "tool_calls": [{ "function": { "name": "get_weather" } }] })), "{}"),
        // What clients add.
        (
            said(json!({
                "content": null, "refusal": null, "audio": null, "annotations": [], "parsed": { "x": 1 }, "reasoning_content": "Hm.",
                "provider_specific_fields": null, "function_call": null, "tool_calls": [with(call(json!("{}")), &json!({ "index": 0 }))],
            })),
            "{}",
        ),
    ];
    for (message, arguments) in table {
        for template in [HERMES, NAMES] {
            let node = Arc::new(Replay::of("Warm.").with_template(template));
            let result = json!({ "role": "tool", "tool_call_id": "call_1", "name": "get_weather", "content": null });
            let messages =
                json!([{ "role": "user", "content": "And?" }, message, result, { "role": "user", "content": "So?" }]);
            let reply = post(app(&node), CHAT, &chat(&json!({ "messages": messages }))).await;
            assert_eq!(reply.status, 200, "{message}: {}", reply.json());
            let prompt = prompt(&node).replace(": ", ":");
            assert!(prompt.contains(&format!("\"arguments\":{}", arguments.replace(": ", ":"))), "{prompt}");
            if template == NAMES {
                assert!(prompt.ends_with("[user]Result of get_weather:\nSo?[assistant]"), "{prompt}");
            }
        }
    }
    let plain = [
        said(json!({ "content": null, "reasoning_content": "Hm." })),
        said(json!({ "content": "x", "refusal": null, "tool_calls": [], "name": "bot" })),
        said(json!({ "refusal": "No." })),
        said(json!({ "content": [{ "type": "refusal", "refusal": "No." }] })),
    ];
    for message in plain {
        let messages = json!([{ "role": "user", "content": "And?" }, message, { "role": "user", "content": "So?" }]);
        let reply = post(app(&node()), CHAT, &chat(&json!({ "messages": messages }))).await;
        assert_eq!(reply.status, 200, "{message}: {}", reply.json());
    }
}

#[tokio::test]
async fn reasoning_has_its_own_field_whatever_the_template() {
    let think = "{{ messages[0].content }}{% if x %}</think>{% endif %}[assistant]<think>\n";
    let rows = [(NAMES, "<think>\nHm, 3 < 4.\n</think>\n\nLima."), (think, "Hm, 3 < 4.\n</think>\n\nLima.")];
    for (template, answer) in rows {
        for stream in [false, true] {
            let node = Arc::new(Replay::of(answer).with_template(template));
            let reply = post(app(&node), CHAT, &chat(&json!({ "stream": stream }))).await;
            let parts: Vec<Value> = if stream {
                reply.chunks().iter().map(|chunk| chunk["choices"][0]["delta"].clone()).collect()
            } else {
                vec![reply.json()["choices"][0]["message"].clone()]
            };
            let text = |name: &str| parts.iter().filter_map(|part| part[name].as_str()).collect::<String>();
            assert_eq!((text("reasoning_content").as_str(), text("content").as_str()), ("Hm, 3 < 4.", "Lima."));
        }
    }
    // A schema holds for what comes after reasoning that the prompt has opened.
    let node = Arc::new(Replay::of("Hm.</think>\n\n{\"a\": 1}").with_template(think));
    let reply = post(app(&node), CHAT, &chat(&json!({ "response_format": { "type": "json_object" } }))).await;
    let message = &reply.json()["choices"][0]["message"];
    assert_eq!((&message["reasoning_content"], &message["content"]), (&json!("Hm."), &json!("{\"a\": 1}")));
    assert!(follows(&node, "Any {text</think>\n\n{\"a\": 1}") && !follows(&node, "Any</think>Any"));
}

#[tokio::test]
async fn streams_say_what_they_are_asked_for() {
    let ask = |options: Value| chat(&json!({ "stream": true, "stream_options": options }));
    let every = post(app(&node()), CHAT, &ask(json!({ "continuous_usage_stats": true, "include_usage": true }))).await;
    let counts: Vec<u64> =
        every.chunks().iter().filter_map(|chunk| chunk["usage"]["completion_tokens"].as_u64()).collect();
    assert!(counts.len() > 2 && counts.is_sorted() && counts[0] == 1, "{counts:?}");
    let padded = post(app(&node()), CHAT, &ask(json!({ "include_obfuscation": true }))).await.chunks();
    let lengths: Vec<usize> = padded
        .iter()
        .filter_map(|chunk| {
            Some(chunk["obfuscation"].as_str()?.len() + chunk["choices"][0]["delta"]["content"].as_str()?.len())
        })
        .collect();
    assert!(!lengths.is_empty() && lengths.iter().all(|length| length % 16 == 0), "{lengths:?}");
}

#[tokio::test]
async fn prompts_are_echoed() {
    let wanted = "capital of Peru?Lima.";
    let whole = post(app(&node()), TEXT, &text(&json!({ "echo": true, "logprobs": 1 }))).await.json();
    let choice = &whole["choices"][0];
    assert_eq!(choice["text"], wanted);
    let report = &choice["logprobs"];
    let tokens: Vec<&str> = report["tokens"].as_array().unwrap().iter().map(|t| t.as_str().unwrap()).collect();
    let offsets: Vec<usize> =
        report["text_offset"].as_array().unwrap().iter().map(|o| o.as_u64().unwrap() as usize).collect();
    assert_eq!(report["token_logprobs"][0], json!(null));
    assert_eq!(
        (&report["token_logprobs"][1], &report["token_logprobs"][tokens.len() - 1]),
        (&json!(-0.25), &json!(-0.1))
    );
    for (token, offset) in tokens.iter().zip(&offsets).filter(|(token, _)| !token.starts_with("<|")) {
        assert!(wanted[*offset..].starts_with(token), "{token} at {offset}");
    }
    let chunks =
        post(app(&node()), TEXT, &text(&json!({ "echo": true, "logprobs": 1, "stream": true }))).await.chunks();
    let streamed: String = chunks.iter().map(|chunk| chunk["choices"][0]["text"].as_str().unwrap()).collect();
    let places: Vec<usize> = chunks
        .iter()
        .filter_map(|chunk| chunk["choices"][0]["logprobs"]["text_offset"].as_array())
        .flatten()
        .map(|offset| offset.as_u64().unwrap() as usize)
        .collect();
    assert_eq!((streamed.as_str(), places), (wanted, offsets));
    for stream in [false, true] {
        let node = node();
        let request = text(&json!({ "prompt": ["ab", "c"], "echo": true, "max_tokens": 0, "stream": stream }));
        let reply = post(app(&node), TEXT, &request).await;
        let choices: Vec<Value> = if stream {
            reply.chunks().iter().map(|chunk| chunk["choices"][0].clone()).collect()
        } else {
            let body = reply.json();
            assert_eq!(body["usage"]["completion_tokens"], 0);
            body["choices"].as_array().unwrap().clone()
        };
        let of = |index: u64| choices.iter().filter(move |choice| choice["index"] == json!(index));
        let texts = [0, 1].map(|index| of(index).filter_map(|choice| choice["text"].as_str()).collect::<String>());
        assert_eq!(texts, ["ab", "c"]);
        assert_eq!(of(1).next_back().unwrap()["finish_reason"], "length");
        assert!(node.requests.lock().unwrap().is_empty());
    }
}

#[tokio::test]
async fn bodies_may_be_packed() {
    let pack = |name: &str, body: &[u8]| match name {
        "deflate" => {
            let mut packed = ZlibEncoder::new(Vec::new(), Compression::default());
            packed.write_all(body).unwrap();
            packed.finish().unwrap()
        }
        _ => {
            let mut packed = GzEncoder::new(Vec::new(), Compression::default());
            packed.write_all(body).unwrap();
            packed.finish().unwrap()
        }
    };
    let ask = |name: &'static str, body: Vec<u8>| {
        let request = Request::post(CHAT).header("content-type", "application/json").header("content-encoding", name);
        send(app(&node()), request.body(Body::from(body)).unwrap())
    };
    let plain = chat(&json!({})).to_string().into_bytes();
    for name in ["gzip", "x-gzip", "GZIP", "deflate"] {
        let reply = ask(name, pack(&name.to_lowercase(), &plain)).await;
        assert_eq!(reply.status, 200, "{name}: {}", reply.json());
    }
    assert_eq!(ask("identity", plain.clone()).await.status, 200);
    let bomb = pack("gzip", &vec![b' '; BODY_BYTES_MAX + 1]);
    assert!(bomb.len() < BODY_BYTES_MAX / 100);
    assert_eq!(ask("gzip", bomb).await.error().0, 413);
    assert_eq!(ask("gzip", plain.clone()).await.error(), (400, "body_unreadable".into(), None));
    assert_eq!(ask("br", plain).await.error(), (415, "unsupported_content_encoding".into(), None));
}

#[tokio::test]
async fn paths_may_end_with_a_slash_and_requests_lack_a_model() {
    for path in ["/v1/models/", "/v1/models//", "/tandem/status/", "/health/", "/"] {
        assert_eq!(get(app(&node()), path).await.status, 200, "{path}");
    }
    assert_eq!(post(app(&node()), "/v1/chat/completions/", &chat(&json!({}))).await.status, 200);
    // Hugging Face's client sends a placeholder.
    for model in [json!(null), json!(""), json!("dummy")] {
        let body = chat(&json!({ "model": model }));
        let reply = post(app(&node()), CHAT, &body).await;
        assert_eq!((reply.status.as_u16(), reply.json()["model"].as_str()), (200, Some("tandem")));
        let options = ApiOptions { default_alias: Some("tandem:exact".into()), ..ApiOptions::default() };
        let reply = post(app_with(&node(), options), CHAT, &body).await;
        assert_eq!((reply.status.as_u16(), reply.header("x-tandem-mode")), (200, Some("exact")));
    }
}

/// Clients' schemas bound no string. A model that was never taught JSON ends all the same.
#[tokio::test]
async fn a_model_that_was_never_taught_json_has_short_strings() {
    let schema = json!({ "type": "object", "properties": { "city": { "type": "string" } }, "required": ["city"] });
    let form = json!({ "type": "json_schema", "json_schema": { "name": "capital", "schema": schema } });
    let tool = json!({ "type": "function", "function": { "name": "capital", "parameters": schema } });
    for (asked, untaught) in [
        (json!({ "response_format": form }), true),
        (json!({ "tools": [tool], "tool_choice": "required" }), true),
        (json!({ "response_format": form }), false),
    ] {
        let mut replay = Replay::of("Lima.");
        replay.short_json = untaught;
        let node = Arc::new(replay);
        let reply = post(app(&node), CHAT, &chat(&asked)).await;
        assert_eq!(reply.status, 200, "{}", reply.json());
        let requests = node.requests.lock().unwrap();
        let grammar = &requests[0].grammar.as_ref().unwrap().grammar().text;
        assert_eq!(grammar.contains(r#""maxLength":48"#), untaught, "{asked}: {grammar}");
        assert_eq!(reply.header("x-tandem-notice").is_some(), untaught, "{asked}");
    }
}
