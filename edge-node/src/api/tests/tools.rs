//! Tool calls and formats: what the prompt says, what the node is asked to follow, what the client gets.

use std::sync::Arc;

use serde_json::json;
use tandem_engine::tokenizer::Tokenizer;

use super::replay::Replay;
use super::*;
use crate::api::Backend as _;

/// A template in the manner of Qwen's: describes tools, writes calls and their results.
pub(super) const HERMES: &str = r#"{%- if tools %}TOOLS{% for tool in tools %} {{ tool | tojson }}{% endfor %}
Answer with <tool_call>{"name": <name>, "arguments": <args>}</tool_call>.{% endif %}
{%- for m in messages %}[{{ m.role }}{% if m.name %} {{ m.name }}{% endif %}]{{ m.content }}
{%- for c in m.tool_calls or [] %}<tool_call>{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}</tool_call>{% endfor %}
{%- endfor %}[assistant]"#;

pub(super) fn weather() -> Value {
    json!({
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "The weather now",
            "parameters": { "type": "object", "properties": { "city": { "type": "string" } }, "required": ["city"] },
        },
    })
}

fn node(answer: &str) -> Arc<Replay> {
    Arc::new(Replay::of(answer).with_template(HERMES))
}

fn ids(tokenizer: &Tokenizer, text: &str) -> Vec<u32> {
    tokenizer.encode(text).unwrap()
}

/// Whether the grammar that reached the node takes a text, and then its end.
pub(super) fn follows(node: &Replay, text: &str) -> bool {
    let requests = node.requests.lock().unwrap();
    let grammar = requests.last().unwrap().grammar.as_ref().expect("a grammar");
    let followed = grammar.follow(&[1]);
    let ids = ids(node.tokenizer(), text);
    (0..ids.len()).all(|i| followed.allowed(&ids[..i]).unwrap().allows(ids[i]))
        && followed.allowed(&ids).unwrap().allows(1)
}

const CALL: &str =
    "I look.\n<tool_call>\n{\"name\": \"get_weather\", \"arguments\": {\"city\": \"Lima\"}}\n</tool_call>";

#[tokio::test]
async fn a_call_of_the_models_own_accord() {
    let node = node(CALL);
    let reply = post(app(&node), CHAT, &chat(&json!({ "tools": [weather()] }))).await;
    assert_eq!(reply.status, 200, "{:?}", reply.json());
    let choice = &reply.json()["choices"][0];
    assert_eq!((&choice["finish_reason"], &choice["message"]["content"]), (&json!("tool_calls"), &json!("I look.")));
    let call = &choice["message"]["tool_calls"][0];
    assert_eq!(call["function"], json!({ "name": "get_weather", "arguments": "{\"city\": \"Lima\"}" }));
    assert_eq!(call["type"], "function");
    assert!(call["id"].as_str().unwrap().starts_with("call_"));
    let request = &node.requests.lock().unwrap()[0];
    assert!(request.grammar.is_none(), "the model is free to answer in words");
    let prompt = node.tokenizer().decode(&request.prompt).unwrap();
    let parameters =
        r#""parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}"#;
    assert!(prompt.contains("TOOLS") && prompt.contains(parameters), "{prompt}");
}

#[tokio::test]
async fn a_call_in_a_stream() {
    let node = node(CALL);
    let request = chat(&json!({ "tools": [weather()], "stream": true, "n": 2 }));
    let chunks = post(app(&node), CHAT, &request).await.chunks();
    for choice in 0..2 {
        let deltas: Vec<&Value> =
            chunks.iter().map(|c| &c["choices"][0]).filter(|c| c["index"] == json!(choice)).collect();
        let content: String = deltas.iter().filter_map(|c| c["delta"]["content"].as_str()).collect();
        assert_eq!(content, "I look.");
        let calls: Vec<&Value> = deltas.iter().filter_map(|c| c["delta"]["tool_calls"].as_array()).flatten().collect();
        assert!(calls[0]["id"].is_string() && calls[0]["type"] == "function", "{calls:?}");
        assert_eq!(calls[0]["function"]["name"], "get_weather");
        assert!(calls.len() > 2, "arguments come in fragments: {calls:?}");
        let rest = &calls[1..];
        assert!(
            rest.iter().all(|c| c["index"] == json!(0) && c.get("id").is_none() && c["function"].get("name").is_none())
        );
        let arguments: String = calls.iter().filter_map(|c| c["function"]["arguments"].as_str()).collect();
        assert_eq!(arguments, "{\"city\": \"Lima\"}");
        assert_eq!(deltas.last().unwrap()["finish_reason"], "tool_calls");
    }
}

#[tokio::test]
async fn words_instead_of_a_call() {
    for stream in [false, true] {
        let request = chat(&json!({ "tools": [weather()], "stream": stream }));
        let reply = post(app(&node("It is 3 < 4 there.")), CHAT, &request).await;
        let text: String = if stream {
            reply
                .chunks()
                .iter()
                .filter_map(|c| c["choices"][0]["delta"]["content"].as_str().map(str::to_owned))
                .collect()
        } else {
            assert_eq!(reply.json()["choices"][0]["finish_reason"], "stop");
            assert!(reply.json()["choices"][0]["message"].get("tool_calls").is_none());
            reply.json()["choices"][0]["message"]["content"].as_str().unwrap().to_owned()
        };
        assert_eq!(text, "It is 3 < 4 there.");
    }
}

#[tokio::test]
async fn a_call_that_the_length_cuts_is_no_complete_call() {
    let node = node(CALL);
    let request = chat(&json!({ "tools": [weather()], "max_tokens": node.script_tokens() - 6 }));
    let choice = &post(app(&node), CHAT, &request).await.json()["choices"][0];
    assert_eq!(choice["finish_reason"], "length", "{choice}");
}

#[tokio::test]
async fn forced_calls_reach_the_node_as_a_grammar() {
    let other = json!({ "type": "function", "function": { "name": "other" } });
    let one = "<tool_call>\n{\"name\": \"get_weather\", \"arguments\": {\"city\":\"Lima\"}}\n</tool_call>";
    let two = format!("{one}\n<tool_call>\n{{\"name\": \"other\", \"arguments\": {{}}}}\n</tool_call>");
    let no_city = one.replace("\"city\":\"Lima\"", "");
    let named = json!({ "type": "function", "function": { "name": "get_weather" } });
    let table = [
        (json!("required"), json!(null), [(one, true), (&two, true), (&no_city, false), ("Lima", false)]),
        (json!("required"), json!(false), [(one, true), (&two, false), (&no_city, false), ("", false)]),
        (named, json!(true), [(one, true), (&two, false), (&no_city, false), ("{}", false)]),
    ];
    for (choice, parallel, texts) in table {
        let node = node(one);
        let extra = json!({ "tools": [weather(), other], "tool_choice": choice, "parallel_tool_calls": parallel });
        let reply = post(app(&node), CHAT, &chat(&extra)).await;
        assert_eq!(reply.json()["choices"][0]["finish_reason"], "tool_calls", "{:?}", reply.json());
        assert_eq!(reply.header("x-tandem-notice"), None);
        for (text, good) in texts {
            assert_eq!(follows(&node, text), good, "{extra}: {text}");
        }
    }
}

#[tokio::test]
async fn a_call_can_be_forced_without_a_template_and_the_client_is_told() {
    let answer = "{\"name\": \"get_weather\", \"arguments\": {\"city\":\"Lima\"}}";
    let node = Arc::new(Replay::of(answer));
    let request = chat(&json!({ "tools": [weather()], "tool_choice": "required" }));
    let reply = post(app(&node), CHAT, &request).await;
    assert!(reply.header("x-tandem-notice").unwrap().contains("not described to the model"));
    let message = &reply.json()["choices"][0]["message"];
    assert_eq!(message["content"], json!(null));
    assert_eq!(message["tool_calls"][0]["function"]["arguments"], "{\"city\":\"Lima\"}");
    assert!(follows(&node, answer) && !follows(&node, "Lima"));
    let prompt = node.tokenizer().decode(&node.requests.lock().unwrap()[0].prompt).unwrap();
    assert!(!prompt.contains("get_weather"));
}

#[tokio::test]
async fn tools_that_must_not_be_called_are_not_mentioned() {
    let node = node(CALL);
    let reply = post(app(&node), CHAT, &chat(&json!({ "tools": [weather()], "tool_choice": "none" }))).await;
    assert_eq!(reply.json()["choices"][0]["message"]["content"], CALL);
    let prompt = node.tokenizer().decode(&node.requests.lock().unwrap()[0].prompt).unwrap();
    assert!(!prompt.contains("TOOLS"), "{prompt}");
}

#[tokio::test]
async fn calls_and_results_go_back_into_the_prompt() {
    let node = node("Warm.");
    let messages = json!([
        { "role": "user", "content": "And?" },
        { "role": "assistant", "content": null, "refusal": null, "tool_calls": [
            { "id": "call_1", "type": "function", "function": { "name": "get_weather", "arguments": "{\"city\":\"Lima\"}" } },
        ] },
        { "role": "tool", "tool_call_id": "call_1", "content": [{ "type": "text", "text": "22" }] },
    ]);
    let reply = post(app(&node), CHAT, &chat(&json!({ "messages": messages, "tools": [weather()] }))).await;
    assert_eq!(reply.status, 200, "{:?}", reply.json());
    let prompt = node.tokenizer().decode(&node.requests.lock().unwrap()[0].prompt).unwrap();
    let wanted = "[user]And?[assistant]<tool_call>{\"name\": \"get_weather\", \"arguments\": {\"city\": \"Lima\"}}</tool_call>[tool get_weather]22[assistant]";
    assert!(prompt.ends_with(wanted), "{prompt}");
}

#[tokio::test]
async fn formats_reach_the_node_as_grammars() {
    let node = node("{}");
    let format = |f: Value| chat(&json!({ "response_format": f }));
    post(app(&node), CHAT, &format(json!({ "type": "json_object" }))).await;
    assert!(follows(&node, "{\"a\": [1, {}]}") && !follows(&node, "[1]") && !follows(&node, "yes"));
    let schema = json!({ "type": "object", "properties": { "n": { "type": "integer" } }, "required": ["n"], "additionalProperties": false });
    let spec = json!({ "name": "answer", "description": "a number", "strict": true, "schema": schema });
    let json_schema = json!({ "type": "json_schema", "json_schema": spec });
    post(app(&node), CHAT, &format(json_schema.clone())).await;
    assert!(follows(&node, "{\"n\": 4}") && !follows(&node, "{\"n\": \"4\"}") && !follows(&node, "{}"));
    // Where the model may call as well, both are fine.
    post(app(&node), CHAT, &chat(&json!({ "response_format": json_schema, "tools": [weather()] }))).await;
    let call = "<tool_call>\n{\"name\": \"get_weather\", \"arguments\": {\"city\":\"x\"}}\n</tool_call>";
    assert!(follows(&node, "{\"n\": 4}") && follows(&node, call) && !follows(&node, "words"));
    post(app(&node), CHAT, &format(json!({ "type": "text" }))).await;
    assert!(node.requests.lock().unwrap().last().unwrap().grammar.is_none());
}

#[tokio::test]
async fn where_calls_are_unknown_the_client_is_told() {
    let unknown = "{% for t in tools %}{{ t }}{% endfor %}{{ messages[0].content }}";
    let node = Arc::new(Replay::of("x").with_template(unknown));
    let reply = post(app(&node), CHAT, &chat(&json!({ "tools": [weather()] }))).await;
    assert_eq!(reply.status, 200, "{:?}", reply.json());
    assert!(reply.header("x-tandem-notice").unwrap().contains("not known here"));
    let forced = post(app(&node), CHAT, &chat(&json!({ "tools": [weather()], "tool_choice": "required" }))).await;
    assert_eq!((forced.status.as_u16(), forced.header("x-tandem-notice")), (200, None));
}

#[tokio::test]
async fn a_mark_that_is_a_special_token_is_forced_and_found() {
    let template = "{% for t in tools %}{{ t | tojson }}{% endfor %}{{ messages[0].content }}[TOOL_CALLS]";
    let answer = "[TOOL_CALLS][{\"name\": \"get_weather\", \"arguments\": {\"city\":\"Lima\"}}]";
    let node = Arc::new(Replay::of(answer).with_template(template).with_special_tokens(&["[TOOL_CALLS]"]));
    assert!(node.tokenizer().is_special(ids(node.tokenizer(), answer)[0]));
    for (stream, choice) in [(false, "auto"), (false, "required"), (true, "required")] {
        let request = chat(&json!({ "tools": [weather()], "tool_choice": choice, "stream": stream }));
        let reply = post(app(&node), CHAT, &request).await;
        let calls = if stream {
            let chunks = reply.chunks();
            let deltas = chunks.iter().filter_map(|c| c["choices"][0]["delta"]["tool_calls"].as_array());
            deltas.flatten().cloned().collect()
        } else {
            let message = &reply.json()["choices"][0]["message"];
            assert_eq!(message["content"], json!(null));
            message["tool_calls"].as_array().unwrap().clone()
        };
        assert_eq!(calls[0]["function"]["name"], "get_weather");
        assert_eq!(calls[0]["id"].as_str().unwrap().len(), 9, "Mistral's templates want short ids");
        let arguments: String = calls.iter().filter_map(|c| c["function"]["arguments"].as_str()).collect();
        assert_eq!(arguments, "{\"city\":\"Lima\"}");
    }
    assert!(follows(&node, answer) && !follows(&node, &answer["[TOOL_CALLS]".len()..]));
}
