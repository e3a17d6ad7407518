//! `GET /openapi.json`: the API described for programs. Bodies are taken apart field by field and not into
//! types that a macro could read, so the description is written here, with the limits that the code has; a
//! program that makes requests of it (`tests/clients/README.md`) holds the node to it.

mod schemas;

use axum::Json;
use serde_json::{Map, Value, json};

use schemas::reference;

/// A route: path, method, name of the operation, what it does, request, answer.
type Operation = (&'static str, &'static str, &'static str, &'static str, Option<&'static str>, &'static str);

/// The routes that are described.
const OPERATIONS: [Operation; 20] = [
    ("/v1/chat/completions", "post", "chat", "Answers a conversation.", Some("ChatRequest"), "ChatAnswer"),
    ("/v1/completions", "post", "complete", "Goes on with texts.", Some("CompletionRequest"), "CompletionAnswer"),
    (
        "/v1/responses",
        "post",
        "respond",
        "Answers as OpenAI's Responses API does.",
        Some("ResponsesRequest"),
        "Response",
    ),
    ("/v1/responses/{id}", "get", "getResponse", "An answer that is kept.", None, "Response"),
    ("/v1/responses/{id}", "delete", "deleteResponse", "Forgets an answer.", None, "Deleted"),
    ("/v1/messages", "post", "createMessage", "Answers as Anthropic's API does.", Some("MessagesRequest"), "Message"),
    ("/v1/messages/count_tokens", "post", "countTokens", "Counts a prompt.", Some("CountTokensRequest"), "TokenCount"),
    ("/v1/embeddings", "post", "embed", "Embeds texts.", Some("EmbeddingsRequest"), "Embeddings"),
    ("/tokenize", "post", "tokenize", "Tokens of a text or of a conversation.", Some("TokenizeRequest"), "Tokens"),
    ("/detokenize", "post", "detokenize", "The text of tokens.", Some("DetokenizeRequest"), "Text"),
    ("/v1/models", "get", "models", "The models and their modes.", None, "Models"),
    ("/v1/models/{id}", "get", "model", "A model.", None, "Model"),
    ("/tandem/status", "get", "status", "What the node is doing.", None, "Status"),
    ("/tandem/controls", "post", "setControls", "Changes the operator's controls.", Some("Controls"), "Status"),
    ("/tandem/explain/{id}", "get", "explain", "Why each token of an answer stayed or went.", None, "Explained"),
    ("/metrics", "get", "metrics", "Metrics for Prometheus.", None, METRICS),
    ("/health", "get", "health", "200 once the models are loaded.", None, "Readiness"),
    ("/ready", "get", "ready", "200 if requests should come here.", None, "Readiness"),
    ("/version", "get", "version", "Name and version.", None, "Version"),
    ("/openapi.json", "get", "openapi", "This document.", None, "Document"),
];

/// Stands for text where the answer is no JSON.
const METRICS: &str = "text";

/// Answers that can be streams.
const STREAMED: [&str; 4] = ["chat", "complete", "respond", "createMessage"];

/// Paths that need no key.
const OPEN: [&str; 4] = ["/health", "/ready", "/version", "/openapi.json"];

/// The handler.
pub(crate) async fn openapi() -> Json<Value> {
    Json(document())
}

/// The document.
fn document() -> Value {
    let mut paths = Map::new();
    for (path, method, id, summary, request, answer) in OPERATIONS {
        let methods = paths.entry(path).or_insert_with(|| json!({}));
        methods[method] = operation(path, id, summary, request, answer);
    }
    json!({
        "openapi": "3.1.0",
        "info": { "title": "Tandem", "version": env!("CARGO_PKG_VERSION"), "license": { "name": "Apache-2.0" } },
        "security": [{}, { "bearer": [] }, { "key": [] }],
        "paths": paths,
        "components": {
            "securitySchemes": {
                "bearer": { "type": "http", "scheme": "bearer" },
                "key": { "type": "apiKey", "in": "header", "name": "x-api-key" },
            },
            "schemas": schemas::all(),
        },
    })
}

fn operation(path: &str, id: &str, summary: &str, request: Option<&str>, answer: &str) -> Value {
    let mut content = json!({});
    if answer == METRICS {
        content["text/plain"] = json!({ "schema": { "type": "string" } });
    } else {
        content["application/json"] = json!({ "schema": reference(answer) });
    }
    if STREAMED.contains(&id) {
        content["text/event-stream"] = json!({ "schema": reference("StreamEvent") });
    }
    let error = if path.starts_with("/v1/messages") { "MessagesError" } else { "Error" };
    let error = json!({ "application/json": { "schema": reference(error) } });
    let mut operation = json!({
        "operationId": id,
        "summary": summary,
        "responses": {
            "200": { "description": "The answer.", "content": content },
            "default": { "description": "What is wrong and what to do.", "content": error },
        },
    });
    if let Some(request) = request {
        let schema = json!({ "application/json": { "schema": reference(request) } });
        operation["requestBody"] = json!({ "required": true, "content": schema });
    }
    if path.contains("{id}") {
        let id = json!({ "type": "string", "minLength": 1 });
        operation["parameters"] = json!([{ "name": "id", "in": "path", "required": true, "schema": id }]);
    }
    if OPEN.contains(&path) {
        operation["security"] = json!([]);
    }
    operation
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::metric_definitions::{ROUTES, route_label};

    #[test]
    fn every_route_is_described_and_every_reference_leads_somewhere() {
        let document = document();
        let paths = document["paths"].as_object().unwrap();
        // The page is for people.
        let described: BTreeSet<&str> = paths.keys().map(|path| route_label(path)).collect();
        let routes: BTreeSet<&str> = ROUTES.into_iter().filter(|route| *route != "/").collect();
        assert_eq!(described, routes);
        assert_eq!(paths.values().map(|methods| methods.as_object().unwrap().len()).sum::<usize>(), OPERATIONS.len());
        let text = document.to_string();
        for part in text.split("\"#").skip(1) {
            let pointer = part.split('"').next().unwrap();
            assert!(document.pointer(pointer).is_some(), "{pointer}");
        }
    }
}
