//! What bodies look like. Fields of requests may be `null`, which is the same as absent.

use serde_json::{Map, Value, json};
use tandem_proto::limits::TOP_LOGPROBS_MAX;

use crate::api::answer_fields::{CHOICES_MAX, MODEL_NAME_BYTES_MAX, STOP_BYTES_MAX, STOPS_MAX, TOKENS_MAX};
use crate::api::completion_fields::{LOGPROBS_MAX, PROMPTS_MAX};
use crate::api::embeddings::INPUTS_MAX;
use crate::api::messages::{CALLS_MAX, MESSAGES_MAX, PARTS_MAX};
use crate::api::tools::TOOLS_MAX;

/// A reference to a schema.
pub(super) fn reference(name: &str) -> Value {
    json!({ "$ref": format!("#/components/schemas/{name}") })
}

fn string() -> Value {
    json!({ "type": "string" })
}

fn one_of(words: &[&str]) -> Value {
    json!({ "type": "string", "enum": words })
}

fn boolean() -> Value {
    json!({ "type": "boolean" })
}

fn integer(min: i64, max: i64) -> Value {
    json!({ "type": "integer", "minimum": min, "maximum": max })
}

fn count() -> Value {
    json!({ "type": "integer", "minimum": 0 })
}

fn number(min: f64, max: f64) -> Value {
    json!({ "type": "number", "minimum": min, "maximum": max })
}

fn list(items: &Value, min: usize, max: usize) -> Value {
    json!({ "type": "array", "items": items, "minItems": min, "maxItems": max })
}

fn any(ways: &[Value]) -> Value {
    json!({ "anyOf": ways })
}

fn name() -> Value {
    json!({ "type": "string", "pattern": "^[a-zA-Z0-9_-]{1,64}$" })
}

fn model() -> Value {
    json!({ "type": "string", "maxLength": MODEL_NAME_BYTES_MAX })
}

/// A request: these fields, of which `required` must be there. Some have further fields, of less use.
fn request(fields: impl IntoIterator<Item = (&'static str, Value)>, required: &[&str]) -> Value {
    let null = json!({ "type": "null" });
    let field = |(name, schema): (&'static str, Value)| {
        let schema = if required.contains(&name) { schema } else { any(&[schema, null.clone()]) };
        (name.to_owned(), schema)
    };
    let fields: Map<String, Value> = fields.into_iter().map(field).collect();
    json!({ "type": "object", "properties": fields, "required": required })
}

/// An answer: these fields are there, and maybe more.
fn answer(fields: &Value) -> Value {
    let names: Vec<&String> = fields.as_object().into_iter().flat_map(Map::keys).collect();
    json!({ "type": "object", "required": names, "properties": fields })
}

fn sampling() -> Vec<(&'static str, Value)> {
    vec![
        ("model", model()),
        ("stream", boolean()),
        ("temperature", number(0.0, 2.0)),
        ("top_p", number(0.0, 1.0)),
        ("top_k", integer(-1, i64::from(i32::MAX))),
        ("min_p", number(0.0, 1.0)),
        ("presence_penalty", number(-2.0, 2.0)),
        ("frequency_penalty", number(-2.0, 2.0)),
        ("seed", json!({ "type": "integer" })),
        ("tandem", reference("Tandem")),
    ]
}

fn text_content(part: &str) -> Value {
    any(&[string(), list(&reference(part), 1, PARTS_MAX)])
}

fn texts(max: usize) -> Value {
    let ids = list(&count(), 1, i32::MAX as usize);
    any(&[string(), list(&string(), 1, max), ids.clone(), list(&ids, 1, max)])
}

/// Every schema by name.
pub(super) fn all() -> Value {
    let mut all = Map::new();
    for (name, schema) in requests().into_iter().chain(answers()) {
        all.insert(name.to_owned(), schema);
    }
    all.into()
}

fn requests() -> Vec<(&'static str, Value)> {
    let stop = json!({ "type": "string", "minLength": 1, "maxLength": STOP_BYTES_MAX });
    let stops = list(&stop, 0, STOPS_MAX);
    let object = json!({ "type": "object" });
    let function = [("name", name()), ("description", string()), ("parameters", object.clone()), ("strict", boolean())];
    let choice = any(&[one_of(&["none", "auto", "required"]), object.clone()]);
    let tools = list(&reference("Tool"), 0, TOOLS_MAX);
    let messages = list(&reference("ChatMessage"), 1, MESSAGES_MAX);
    let logprobs = integer(0, TOP_LOGPROBS_MAX as i64);
    let modes = one_of(&["local", "auto", "exact", "cloud"]);
    let answered = [
        ("n", integer(1, CHOICES_MAX as i64)),
        ("stop", any(&[stop, stops.clone()])),
        ("max_tokens", integer(-1, TOKENS_MAX)),
        ("max_completion_tokens", integer(1, TOKENS_MAX)),
        ("logit_bias", json!({ "type": "object", "additionalProperties": number(-100.0, 100.0) })),
    ];
    let with = |more: Vec<(&'static str, Value)>| sampling().into_iter().chain(more);
    let turn = request(
        [("role", one_of(&["user", "assistant", "system"])), ("content", text_content("Block"))],
        &["role", "content"],
    );
    let anthropic = || {
        with(vec![
            ("max_tokens", integer(1, TOKENS_MAX)),
            ("messages", list(&turn, 1, MESSAGES_MAX)),
            ("system", text_content("TextPart")),
            ("stop_sequences", stops.clone()),
            ("tools", list(&request([("name", name()), ("input_schema", object.clone())], &["name"]), 0, TOOLS_MAX)),
            ("tool_choice", request([("type", one_of(&["auto", "any", "tool", "none"]))], &["type"])),
        ])
    };
    vec![
        ("Tandem", request([("mode", modes.clone()), ("threshold", number(0.0, 1.0)), ("tokens", boolean())], &[])),
        ("TextPart", request([("type", one_of(&["text"])), ("text", string())], &["type", "text"])),
        (
            "Block",
            request(
                [("type", one_of(&["text", "tool_use", "tool_result", "thinking"])), ("text", string())],
                &["type"],
            ),
        ),
        (
            "Tool",
            request(
                [("type", one_of(&["function"])), ("function", request(function.clone(), &["name"]))],
                &["type", "function"],
            ),
        ),
        (
            "ToolCall",
            request(
                [
                    ("id", string()),
                    ("type", one_of(&["function"])),
                    ("function", request([("name", name()), ("arguments", string())], &["name", "arguments"])),
                ],
                &["id", "type", "function"],
            ),
        ),
        (
            "ChatMessage",
            request(
                [
                    ("role", one_of(&["system", "developer", "user", "assistant", "tool"])),
                    ("content", text_content("TextPart")),
                    ("tool_calls", list(&reference("ToolCall"), 0, CALLS_MAX)),
                    ("tool_call_id", string()),
                ],
                &["role"],
            ),
        ),
        (
            "ChatRequest",
            request(
                with(vec![
                    ("messages", messages.clone()),
                    ("tools", tools.clone()),
                    ("tool_choice", choice.clone()),
                    ("parallel_tool_calls", boolean()),
                    ("response_format", object.clone()),
                    ("logprobs", boolean()),
                    ("top_logprobs", logprobs.clone()),
                ])
                .chain(answered.clone()),
                &["messages"],
            ),
        ),
        (
            "CompletionRequest",
            request(
                with(vec![("prompt", texts(PROMPTS_MAX)), ("logprobs", integer(0, LOGPROBS_MAX))]).chain(answered),
                &["prompt"],
            ),
        ),
        (
            "Item",
            request(
                [
                    (
                        "type",
                        one_of(&["message", "function_call", "function_call_output", "reasoning", "item_reference"]),
                    ),
                    ("role", one_of(&["user", "assistant", "system", "developer"])),
                ],
                &[],
            ),
        ),
        (
            "ResponsesRequest",
            request(
                with(vec![
                    ("input", any(&[string(), list(&reference("Item"), 1, MESSAGES_MAX)])),
                    ("instructions", string()),
                    ("max_output_tokens", integer(1, TOKENS_MAX)),
                    ("store", boolean()),
                    ("previous_response_id", string()),
                    (
                        "tools",
                        list(
                            &request(
                                std::iter::once(("type", one_of(&["function"]))).chain(function),
                                &["type", "name"],
                            ),
                            0,
                            TOOLS_MAX,
                        ),
                    ),
                    ("tool_choice", choice.clone()),
                    ("parallel_tool_calls", boolean()),
                    ("text", object.clone()),
                    ("reasoning", object.clone()),
                    ("top_logprobs", logprobs),
                    ("truncation", one_of(&["disabled"])),
                ]),
                &["input"],
            ),
        ),
        ("MessagesRequest", request(anthropic(), &["max_tokens", "messages"])),
        ("CountTokensRequest", request(anthropic(), &["messages"])),
        (
            "EmbeddingsRequest",
            request(
                [
                    ("model", model()),
                    ("input", texts(INPUTS_MAX)),
                    ("encoding_format", one_of(&["float", "base64"])),
                    ("dimensions", integer(1, i64::from(i32::MAX))),
                ],
                &["input"],
            ),
        ),
        (
            "TokenizeRequest",
            request(
                [
                    ("model", model()),
                    ("content", string()),
                    ("prompt", string()),
                    ("messages", messages),
                    ("tools", tools),
                    ("tool_choice", choice),
                    ("add_special", boolean()),
                    ("add_special_tokens", boolean()),
                    ("with_pieces", boolean()),
                    ("return_token_strs", boolean()),
                ],
                &[],
            ),
        ),
        (
            "DetokenizeRequest",
            request([("model", model()), ("tokens", list(&count(), 0, i32::MAX as usize))], &["tokens"]),
        ),
        ("Controls", request([("cut", boolean()), ("threshold", number(0.0, 1.0)), ("default_mode", modes)], &[])),
    ]
}

fn answers() -> Vec<(&'static str, Value)> {
    let object = json!({ "type": "object" });
    let text_or_null = json!({ "type": ["string", "null"] });
    let (many, strings) = (|items: Value| json!({ "type": "array", "items": items }), string());
    let usage = answer(&json!({
        "prompt_tokens": count(), "completion_tokens": count(), "total_tokens": count(),
        "prompt_tokens_details": answer(&json!({ "cached_tokens": count() })), "tandem": object,
    }));
    let whole = |kind: &str, choice: Value| {
        answer(&json!({
            "id": strings, "object": one_of(&[kind]), "created": count(), "model": strings,
            "choices": list(&answer(&choice), 1, CHOICES_MAX), "usage": usage,
        }))
    };
    let message = answer(&json!({ "role": one_of(&["assistant"]), "content": text_or_null }));
    let ends = one_of(&["stop", "length", "tool_calls", "function_call"]);
    let model =
        answer(&json!({ "id": strings, "object": one_of(&["model"]), "created": count(), "owned_by": strings }));
    let item = answer(
        &json!({ "id": strings, "type": one_of(&["message", "reasoning", "function_call"]), "status": strings }),
    );
    let tokens = answer(&json!({ "input_tokens": count(), "output_tokens": count() }));
    let error = answer(&json!({ "message": strings, "type": strings, "param": text_or_null, "code": text_or_null }));
    let piece = answer(&json!({ "id": count(), "piece": any(&[string(), many(count())]) }));
    let embedding = any(&[many(json!({ "type": "number" })), string()]);
    vec![
        (
            "ChatAnswer",
            whole("chat.completion", json!({ "index": count(), "message": message, "finish_reason": ends })),
        ),
        (
            "CompletionAnswer",
            whole("text_completion", json!({ "index": count(), "text": strings, "finish_reason": ends })),
        ),
        (
            "Response",
            answer(&json!({
                "id": strings, "object": one_of(&["response"]), "created_at": count(), "model": strings,
                "status": one_of(&["completed", "incomplete"]), "output": many(item), "usage": tokens, "store": boolean(),
                "previous_response_id": text_or_null,
            })),
        ),
        ("Deleted", answer(&json!({ "id": strings, "object": one_of(&["response"]), "deleted": boolean() }))),
        (
            "Message",
            answer(&json!({
                "id": strings, "type": one_of(&["message"]), "role": one_of(&["assistant"]), "model": strings,
                "content": many(answer(&json!({ "type": one_of(&["text", "thinking", "tool_use"]) }))),
                "stop_reason": one_of(&["end_turn", "max_tokens", "stop_sequence", "tool_use"]),
                "stop_sequence": text_or_null, "usage": tokens,
            })),
        ),
        ("TokenCount", answer(&json!({ "input_tokens": count() }))),
        (
            "Embeddings",
            answer(&json!({
                "object": one_of(&["list"]), "model": strings,
                "data": many(answer(&json!({ "object": one_of(&["embedding"]), "index": count(), "embedding": embedding }))),
                "usage": answer(&json!({ "prompt_tokens": count(), "total_tokens": count() })),
            })),
        ),
        (
            "Tokens",
            answer(&json!({
                "tokens": many(any(&[count(), piece])), "count": count(), "max_model_len": count(),
                "token_strs": { "type": ["array", "null"], "items": strings },
            })),
        ),
        ("Text", answer(&json!({ "content": strings, "prompt": strings }))),
        ("Model", model.clone()),
        ("Models", answer(&json!({ "object": one_of(&["list"]), "data": many(model) }))),
        ("Status", answer(&json!({ "node": strings, "cloud_connected": boolean(), "default_mode": strings }))),
        ("Explained", object.clone()),
        ("Readiness", answer(&json!({ "status": strings }))),
        // Before OpenAPI 3.2 the schema of a stream is that of each event.
        ("StreamEvent", answer(&json!({ "data": strings }))),
        ("Version", answer(&json!({ "name": strings, "version": strings }))),
        ("Document", object),
        ("Error", answer(&json!({ "error": error }))),
        (
            "MessagesError",
            answer(&json!({
                "type": one_of(&["error"]), "error": answer(&json!({ "type": strings, "message": strings })),
            })),
        ),
    ]
}
