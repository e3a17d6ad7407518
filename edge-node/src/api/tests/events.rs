//! What a client puts together from the events of the Responses and Messages APIs.

use serde_json::json;

use super::*;

/// The events of a stream, after checking that each has its own name.
pub(super) fn events(reply: &Reply) -> Vec<Value> {
    assert_eq!(reply.header("content-type"), Some("text/event-stream"), "{}", String::from_utf8_lossy(&reply.body));
    let text = String::from_utf8(reply.body.clone()).unwrap();
    let event = |block: &str| {
        let (name, data) = block.split_once('\n').unwrap_or_else(|| panic!("{block}"));
        let data: Value = serde_json::from_str(data.strip_prefix("data: ").unwrap()).unwrap();
        assert_eq!(data["type"], json!(name.strip_prefix("event: ").unwrap()), "{block}");
        data
    };
    text.split("\n\n").filter(|block| !block.is_empty() && !block.starts_with(':')).map(event).collect()
}

/// The response that a client puts together from events, after checking their order and numbers.
pub(super) fn responses_of(events: &[Value]) -> Value {
    let mut output: Vec<Value> = Vec::new();
    let mut open: Option<Value> = None;
    for (i, event) in events.iter().enumerate() {
        assert_eq!(event["sequence_number"], json!(i));
        let kind = event["type"].as_str().unwrap();
        if let Some(at) = event.get("output_index") {
            assert_eq!(*at, json!(output.len()), "{event}");
        }
        if let (Some(id), Some(item)) = (event.get("item_id"), &open) {
            assert_eq!(*id, item["id"], "{event}");
        }
        let item = open.as_mut();
        let append = |value: &mut Value| {
            *value = json!(value.as_str().unwrap().to_owned() + event["delta"].as_str().unwrap());
        };
        match kind {
            "response.created" => assert_eq!((i, &event["response"]["output"]), (0, &json!([]))),
            "response.in_progress" => assert_eq!((i, &event["response"]["status"]), (1, &json!("in_progress"))),
            "response.output_item.added" => {
                assert!(item.is_none());
                open = Some(event["item"].clone());
            }
            "response.content_part.added" => {
                let parts = item.unwrap()["content"].as_array_mut().unwrap();
                assert_eq!(event["content_index"], json!(parts.len()));
                parts.push(event["part"].clone());
            }
            "response.output_text.delta" | "response.reasoning_text.delta" => {
                let part = &mut item.unwrap()["content"][0];
                append(&mut part["text"]);
                if let (Some(all), Some(more)) = (part.get_mut("logprobs"), event["logprobs"].as_array()) {
                    all.as_array_mut().unwrap().extend(more.iter().cloned());
                }
            }
            "response.output_text.done" | "response.reasoning_text.done" => {
                assert_eq!(item.unwrap()["content"][0]["text"], event["text"]);
            }
            "response.content_part.done" => assert_eq!(item.unwrap()["content"][0], event["part"]),
            "response.function_call_arguments.delta" => append(&mut item.unwrap()["arguments"]),
            "response.function_call_arguments.done" => {
                assert_eq!(item.unwrap()["arguments"], event["arguments"]);
            }
            "response.output_item.done" => {
                let mut item = open.take().unwrap();
                item["status"] = event["item"]["status"].clone();
                assert_eq!(item, event["item"]);
                output.push(item);
            }
            "response.completed" | "response.incomplete" => {
                assert_eq!(i, events.len() - 1, "nothing follows the end");
                assert_eq!(event["response"]["output"], json!(output));
                assert_eq!(kind.strip_prefix("response."), event["response"]["status"].as_str());
                return event["response"].clone();
            }
            _ => panic!("{event}"),
        }
    }
    panic!("no end: {events:?}");
}

/// The message that a client puts together from events, after checking their order.
pub(super) fn message_of(events: &[Value]) -> Value {
    let mut message = events[0]["message"].clone();
    assert_eq!((&message["content"], &message["stop_reason"]), (&json!([]), &json!(null)));
    let mut open = None;
    for event in &events[1..] {
        let blocks = message["content"].as_array_mut().unwrap();
        match event["type"].as_str().unwrap() {
            "ping" => {}
            "content_block_start" => {
                assert_eq!((open, &event["index"]), (None, &json!(blocks.len())));
                let mut block = event["content_block"].clone();
                if block["type"] == "tool_use" {
                    assert_eq!(block["input"], json!({}));
                    block["input"] = json!("");
                }
                open = Some(block["type"].as_str().unwrap().to_owned());
                blocks.push(block);
            }
            "content_block_delta" => {
                assert_eq!(event["index"], json!(blocks.len() - 1));
                let delta = &event["delta"];
                let (name, more) = match (delta["type"].as_str().unwrap(), open.as_deref().unwrap()) {
                    ("text_delta", "text") => ("text", &delta["text"]),
                    ("thinking_delta", "thinking") => ("thinking", &delta["thinking"]),
                    ("signature_delta", "thinking") => ("signature", &delta["signature"]),
                    ("input_json_delta", "tool_use") => ("input", &delta["partial_json"]),
                    other => panic!("{other:?}"),
                };
                let field = &mut blocks.last_mut().unwrap()[name];
                *field = json!(field.as_str().unwrap().to_owned() + more.as_str().unwrap());
            }
            "content_block_stop" => {
                assert_eq!(event["index"], json!(blocks.len() - 1));
                let block = blocks.last_mut().unwrap();
                if open.take().unwrap() == "tool_use" {
                    block["input"] = serde_json::from_str(block["input"].as_str().unwrap()).unwrap();
                }
            }
            "message_delta" => {
                assert_eq!(open, None);
                for name in ["stop_reason", "stop_sequence"] {
                    message[name] = event["delta"][name].clone();
                }
                message["usage"] = event["usage"].clone();
            }
            "message_stop" => {
                assert_eq!(event, events.last().unwrap());
                return message;
            }
            _ => panic!("{event}"),
        }
    }
    panic!("no end: {events:?}");
}

/// Without what differs from one answer to the next.
pub(super) fn steady(mut value: Value) -> Value {
    for name in ["id", "created_at", "completed_at"] {
        value.as_object_mut().unwrap().shift_remove(name);
    }
    let items = value.as_object_mut().unwrap().values_mut().filter_map(Value::as_array_mut).flatten();
    for item in items.filter_map(Value::as_object_mut) {
        item.shift_remove("id");
        item.shift_remove("call_id");
    }
    value
}
