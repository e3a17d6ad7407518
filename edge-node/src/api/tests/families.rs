//! Families whose calls are not JSON from end to end: gpt-oss, Qwen3-Coder and GLM.

use std::sync::Arc;

use serde_json::json;

use super::replay::Replay;
use super::tools::{follows, weather};
use super::*;
use crate::api::Backend as _;

const MARKERS: [&str; 7] =
    ["<|start|>", "<|channel|>", "<|constrain|>", "<|message|>", "<|end|>", "<|call|>", "<|return|>"];

/// In the manner of gpt-oss: wants descriptions, one call per message, and either content or thinking.
const HARMONY: &str = r#"{%- for t in tools or [] %}[tool {{ t.function.name + " " + t.function.description }}
{%- for name, spec in t.function.parameters.properties.items() %} {{ name + "=" + spec.description }}{% endfor %}]{% endfor %}
{%- for m in messages %}
{%- if m.tool_calls %}
{%- if m.content and m.thinking %}{{ raise_exception("both") }}{% endif %}
{%- if m.content or m.thinking %}[analysis {{ m.content or m.thinking }}]{% endif %}
{%- set call = m.tool_calls[0].function %}[call {{ call.name }} {{ call.arguments | tojson }}]
{%- elif m.role == "tool" %}[result {{ m.content | tojson }}]
{%- else %}[{{ m.role }} {{ m.content }}]{% endif %}
{%- endfor %}<|start|>assistant{# <|channel|>final<|message|> #}"#;

const QWEN: &str = r#"{% for t in tools or [] %}{{ t | tojson }}{% endfor %}
{%- for m in messages %}[{{ m.role }}]{{ m.content }}
{%- for c in m.tool_calls or [] %}<tool_call>
<function={{ c.function.name }}>
{% for k, v in c.function.arguments | items %}<parameter={{ k }}>
{{ v }}
</parameter>
{% endfor %}</function>
</tool_call>{% endfor %}{% endfor %}[assistant]"#;

const GLM: &str = r#"{% for t in tools or [] %}{{ t | tojson }}{% endfor %}
{%- for m in messages %}[{{ m.role }}]{{ m.content }}{{ m.reasoning_content }}
{%- for c in m.tool_calls or [] %}<tool_call>{{ c.function.name }}
{% for k, v in c.function.arguments.items() %}<arg_key>{{ k }}</arg_key>
<arg_value>{{ v }}</arg_value>
{% endfor %}</tool_call>{% endfor %}{% endfor %}[assistant]"#;

fn node(template: &str, answer: &str) -> Arc<Replay> {
    let mut replay = Replay::of(answer).with_template(template).with_special_tokens(&MARKERS);
    replay.context_tokens = 1024;
    Arc::new(replay)
}

/// Reasoning, content, calls and why it ended, from a whole answer or from a stream.
async fn answer(node: &Arc<Replay>, extra: &Value, stream: bool) -> (String, String, Vec<(String, String)>, String) {
    let mut request = chat(extra);
    request["stream"] = json!(stream);
    let reply = post(app(node), CHAT, &request).await;
    assert_eq!(reply.status, 200, "{:?}", String::from_utf8_lossy(&reply.body));
    let choices: Vec<Value> = if stream {
        reply.chunks().iter().map(|chunk| chunk["choices"][0].clone()).collect()
    } else {
        vec![reply.json()["choices"][0].clone()]
    };
    let parts: Vec<&Value> = choices.iter().map(|c| if stream { &c["delta"] } else { &c["message"] }).collect();
    let text = |name: &str| parts.iter().filter_map(|part| part[name].as_str()).collect::<String>();
    let mut calls = Vec::<(String, String)>::new();
    for call in parts.iter().filter_map(|part| part["tool_calls"].as_array()).flatten() {
        let function = &call["function"];
        if let Some(name) = function["name"].as_str() {
            calls.push((name.to_owned(), String::new()));
        }
        calls.last_mut().unwrap().1.push_str(function["arguments"].as_str().unwrap());
    }
    let finish = choices.last().unwrap()["finish_reason"].as_str().unwrap().to_owned();
    (text("reasoning_content"), text("content"), calls, finish)
}

fn prompt(node: &Replay) -> String {
    node.tokenizer().decode(&node.requests.lock().unwrap().last().unwrap().prompt).unwrap()
}

#[tokio::test]
async fn harmony_without_tools_is_reasoning_and_clean_content() {
    let said = "<|channel|>analysis<|message|>The capital is known.<|end|><|start|>assistant<|channel|>final<|message|>Lima, 3 < 4.<|return|>";
    let node = node(HARMONY, said);
    for stream in [false, true] {
        let wanted = ("The capital is known.".to_owned(), "Lima, 3 < 4.".to_owned(), vec![], "stop".to_owned());
        assert_eq!(answer(&node, &json!({}), stream).await, wanted);
        // Tools that must not be called change nothing.
        let none = json!({ "tools": [weather()], "tool_choice": "none" });
        assert_eq!(answer(&node, &none, stream).await, wanted);
        assert!(!prompt(&node).contains("get_weather"));
    }
    let whole = post(app(&node), CHAT, &chat(&json!({}))).await.json();
    assert!(whole["choices"][0]["message"].get("tool_calls").is_none());
    // Other models' answers have no such field.
    let other = post(app(&Arc::new(Replay::of("Lima."))), CHAT, &chat(&json!({}))).await.json();
    assert!(other["choices"][0]["message"].get("reasoning_content").is_none());
}

#[tokio::test]
async fn harmony_calls_whole_and_in_a_stream() {
    let said = "<|channel|>analysis<|message|>I look.<|end|><|start|>assistant<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>{\"city\": \"Lima\"}<|call|>";
    let node = node(HARMONY, said);
    for stream in [false, true] {
        let (reasoning, content, calls, finish) = answer(&node, &json!({ "tools": [weather()] }), stream).await;
        assert_eq!((reasoning.as_str(), content.as_str(), finish.as_str()), ("I look.", "", "tool_calls"));
        assert_eq!(calls, [("get_weather".to_owned(), "{\"city\": \"Lima\"}".to_owned())]);
    }
    // A call that no tool of the request allows is text, not a call.
    let (reasoning, content, calls, finish) = answer(&node, &json!({}), true).await;
    assert_eq!((reasoning.as_str(), content.as_str(), finish.as_str()), ("I look.", "{\"city\": \"Lima\"}", "stop"));
    assert!(calls.is_empty());
}

#[tokio::test]
async fn harmony_is_forced_on_its_channels() {
    let call = "<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>{\"city\":\"Lima\"}";
    let thought = "<|channel|>analysis<|message|>Hm, {\"a\n\n é.<|end|><|start|>assistant";
    let json = "<|channel|>final<|message|>{\"n\": 4}";
    let schema = json!({ "type": "object", "properties": { "n": { "type": "integer" } }, "required": ["n"], "additionalProperties": false });
    let format = json!({ "type": "json_schema", "json_schema": { "name": "answer", "schema": schema } });
    let table = [
        (json!({ "tools": [weather()], "tool_choice": "required" }), true, false),
        (json!({ "tools": [weather()], "response_format": format }), true, true),
        (json!({ "response_format": format }), false, true),
    ];
    for (extra, calls, formats) in table {
        let node = node(HARMONY, if calls { call } else { json });
        answer(&node, &extra, false).await;
        for (text, good) in [(call, calls), (json, formats)] {
            assert_eq!(follows(&node, text), good, "{extra}: {text}");
            assert_eq!(follows(&node, &format!("{thought}{text}")), good, "{extra}: {thought}{text}");
            assert!(!follows(&node, &format!("{thought}{thought}{text}")), "{extra}");
            assert!(!follows(&node, &format!("{text}{text}")), "{extra}");
        }
        for text in ["{\"n\": 4}", "Lima", "<|channel|>final<|message|>Lima", "", thought] {
            assert!(!follows(&node, text), "{extra}: {text}");
        }
        assert!(!follows(&node, &call.replace("Lima\"", "Lima\", \"x\": ")), "{extra}");
    }
}

#[tokio::test]
async fn harmony_sees_earlier_calls_one_by_one() {
    let node = node(HARMONY, "<|channel|>final<|message|>Warm.");
    let call = |id: &str, city: &str| {
        let arguments = format!("{{\"city\":\"{city}\"}}");
        json!({ "id": id, "type": "function", "function": { "name": "get_weather", "arguments": arguments } })
    };
    let messages = json!([
        { "role": "user", "content": "And?" },
        { "role": "assistant", "content": "Two.", "reasoning_content": "I look.", "tool_calls": [call("a", "Lima"), call("b", "Bonn")] },
        { "role": "tool", "tool_call_id": "b", "content": "9" },
        { "role": "tool", "tool_call_id": "a", "content": "22" },
    ]);
    let mut bare = weather();
    bare["function"].as_object_mut().unwrap().remove("description");
    let (_, content, ..) = answer(&node, &json!({ "messages": messages, "tools": [bare] }), false).await;
    assert_eq!(content, "Warm.");
    let wanted = "[tool get_weather  city=][user And?][analysis I look.\nTwo.][call get_weather {\"city\": \"Lima\"}][result \"22\"][call get_weather {\"city\": \"Bonn\"}][result \"9\"]assistant";
    assert_eq!(prompt(&node), wanted);
    // A result without its call, and a call without its result, stay where they are.
    let messages = json!([
        { "role": "assistant", "tool_calls": [call("a", "Lima"), call("b", "Bonn")] },
        { "role": "tool", "tool_call_id": "z", "content": "9" },
        { "role": "tool", "tool_call_id": "a", "content": "22" },
        { "role": "user", "content": "So?" },
    ]);
    answer(&node, &json!({ "messages": messages }), false).await;
    let wanted = "[call get_weather {\"city\": \"Lima\"}][result \"22\"][call get_weather {\"city\": \"Bonn\"}][result \"9\"][user So?]assistant";
    assert_eq!(prompt(&node), wanted);
}

#[tokio::test]
async fn reasoning_goes_back_to_templates_that_read_it() {
    let node = node(GLM, "ok");
    let said = |content: Value| json!([{ "role": "assistant", "content": "A.", "reasoning_content": content }]);
    answer(&node, &json!({ "messages": said(json!("Why?")) }), false).await;
    assert_eq!(prompt(&node), "[assistant]A.Why?[assistant]");
    answer(&node, &json!({ "messages": said(json!(null)) }), false).await;
    assert_eq!(prompt(&node), "[assistant]A.[assistant]");
    let bad = post(app(&node), CHAT, &chat(&json!({ "messages": said(json!(1)) }))).await;
    assert_eq!(bad.error().2, Some("messages[0].reasoning_content".into()));
}

fn note() -> Value {
    let parameters = json!({
        "type": "object",
        "properties": {
            "text": { "type": "string", "description": "What to note" },
            "n": { "$ref": "#/$defs/count" },
            "unit": { "enum": ["m", "km"] },
            "tags": { "type": "array", "items": { "type": "string" } },
            "who": { "anyOf": [{ "type": "string", "maxLength": 3 }, { "type": "null" }], "default": null },
        },
        "required": ["text", "n"],
        "additionalProperties": false,
        "$defs": { "count": { "type": "integer", "minimum": 1 } },
    });
    json!({ "type": "function", "function": { "name": "note", "parameters": parameters } })
}

/// A call in a family's tags, from pairs of key and value.
fn tagged(template: &str, name: &str, arguments: &[(&str, &str)]) -> String {
    let one = |(key, value): &(&str, &str)| match template == QWEN {
        true => format!("<parameter={key}>\n{value}\n</parameter>\n"),
        false => format!("<arg_key>{key}</arg_key>\n<arg_value>{value}</arg_value>\n"),
    };
    let arguments: String = arguments.iter().map(one).collect();
    match template == QWEN {
        true => format!("<tool_call>\n<function={name}>\n{arguments}</function>\n</tool_call>"),
        false => format!("<tool_call>{name}\n{arguments}</tool_call>"),
    }
}

#[tokio::test]
async fn tagged_calls_are_typed_by_the_tools_of_the_request() {
    for template in [QWEN, GLM] {
        let call = tagged(template, "note", &[("text", "12"), ("n", "12"), ("tags", "[\"ü\"]"), ("who", "null")]);
        let node =
            node(template, &format!("I note.\n{call}\n{}", tagged(template, "get_weather", &[("city", "Köln")])));
        for stream in [false, true] {
            let (reasoning, content, calls, finish) =
                answer(&node, &json!({ "tools": [note(), weather()] }), stream).await;
            assert_eq!((reasoning.as_str(), content.as_str(), finish.as_str()), ("", "I note.", "tool_calls"));
            let wanted = [
                ("note", r#"{"text": "12", "n": 12, "tags": ["ü"], "who": null}"#),
                ("get_weather", r#"{"city": "Köln"}"#),
            ];
            assert_eq!(calls, wanted.map(|(name, arguments)| (name.to_owned(), arguments.to_owned())));
        }
    }
}

#[tokio::test]
async fn tagged_calls_are_forced_by_the_schema() {
    for (template, special) in [(QWEN, false), (GLM, false), (GLM, true)] {
        let call = |arguments: &[(&str, &str)]| tagged(template, "note", arguments);
        let good = [
            call(&[("text", "Zeile 1\n  <b> \"2\" é 🦀\n"), ("n", "12")]),
            call(&[("text", ""), ("n", "1"), ("unit", "km"), ("tags", "[\"a\", \"b\"]"), ("who", "ich")]),
            call(&[("text", "x"), ("n", "1"), ("who", "null")]),
        ];
        let bad = [
            call(&[("text", "x")]),
            call(&[("n", "1"), ("text", "x")]),
            call(&[("text", "x"), ("n", "0")]),
            call(&[("text", "x"), ("n", "many")]),
            call(&[("text", "x"), ("n", "1"), ("unit", "cm")]),
            call(&[("text", "x"), ("n", "1"), ("tags", "[1]")]),
            call(&[("text", "x"), ("n", "1"), ("who", "Anna")]),
            call(&[("text", "x"), ("n", "1"), ("what", "1")]),
            call(&[("text", if template == QWEN { "x</parameter> y" } else { "x</arg_value> y" }), ("n", "1")]),
            tagged(template, "other", &[]),
            "words".to_owned(),
            String::new(),
        ];
        let tags = ["<tool_call>", "</tool_call>", "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"];
        let mut replay = Replay::of(&good[0]).with_template(template);
        replay.context_tokens = 1024;
        let node = Arc::new(if special { replay.with_special_tokens(&tags) } else { replay });
        let (_, content, calls, finish) =
            answer(&node, &json!({ "tools": [note(), weather()], "tool_choice": "required" }), true).await;
        assert_eq!((content.as_str(), calls.len(), finish.as_str()), ("", 1, "tool_calls"), "{calls:?}");
        let arguments: Value = serde_json::from_str(&calls[0].1).unwrap();
        assert_eq!(arguments, json!({ "text": "Zeile 1\n  <b> \"2\" é 🦀\n", "n": 12 }));
        for text in &good {
            assert!(follows(&node, text), "{special} {text}");
            assert!(
                follows(&node, &format!("{text}\n{}", tagged(template, "get_weather", &[("city", "Lima")]))),
                "{text}"
            );
        }
        for text in &bad {
            assert!(!follows(&node, text), "{special} {text}");
        }
    }
}

#[tokio::test]
async fn what_cannot_be_forced_as_raw_text_is_forced_as_json() {
    let mut tool = weather();
    tool["function"]["parameters"]["properties"]["city"]["pattern"] = json!("^[A-Z][a-z]+$");
    let forced = "{\"name\": \"get_weather\", \"arguments\": {\"city\":\"Lima\"}}";
    let node = node(QWEN, forced);
    let (_, content, calls, _) = answer(&node, &json!({ "tools": [tool], "tool_choice": "required" }), false).await;
    assert_eq!((content.as_str(), calls.len()), ("", 1));
    assert_eq!(calls[0], ("get_weather".to_owned(), "{\"city\":\"Lima\"}".to_owned()));
    assert!(follows(&node, forced) && !follows(&node, &forced.replace("Lima", "lima")));
    // Where the model may choose, there is but its own syntax.
    let format = json!({ "type": "json_object" });
    let reply = post(app(&node), CHAT, &chat(&json!({ "tools": [tool], "response_format": format }))).await;
    let (status, code, param) = reply.error();
    assert_eq!(
        (status, code.as_str(), param.as_deref()),
        (400, "invalid_json_schema", Some("tools[0].function.parameters"))
    );
}

#[tokio::test]
async fn earlier_tagged_calls_go_back_as_objects() {
    let messages = json!([
        { "role": "assistant", "tool_calls": [
            { "id": "a", "type": "function", "function": { "name": "get_weather", "arguments": "{\"city\":\"Lima\"}" } },
        ] },
        { "role": "tool", "tool_call_id": "a", "content": "22" },
    ]);
    for template in [QWEN, GLM] {
        let node = node(template, "ok");
        answer(&node, &json!({ "messages": messages }), false).await;
        let call = tagged(template, "get_weather", &[("city", "Lima")]);
        assert_eq!(prompt(&node), format!("[assistant]{call}[tool]22[assistant]"));
    }
}
