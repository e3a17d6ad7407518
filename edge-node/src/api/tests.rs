//! Tests of the API's shape over recorded tokens. The real node behind it has tests of its own.

mod answers;
mod apis;
mod calls;
mod clients;
mod events;
mod families;
mod info;
mod live;
mod origins;
mod refusals;
mod replay;
mod streams;
mod texts;
mod tools;

use std::sync::Arc;

use axum::Router;
use axum::body::{Body, to_bytes};
use axum::http::{HeaderMap, Request, StatusCode};
use serde_json::{Value, json};
use tower::ServiceExt;

use super::{ApiOptions, router_with};
use replay::Replay;

/// A response, read to its end.
struct Reply {
    status: StatusCode,
    headers: HeaderMap,
    body: Vec<u8>,
}

impl Reply {
    fn json(&self) -> Value {
        serde_json::from_slice(&self.body)
            .unwrap_or_else(|e| panic!("{e} in {:?}", String::from_utf8_lossy(&self.body)))
    }

    fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).map(|value| value.to_str().unwrap())
    }

    /// The error's (status, code, param), after checking its shape.
    fn error(&self) -> (u16, String, Option<String>) {
        let body = self.json();
        let error = &body["error"];
        assert_eq!(body.as_object().unwrap().len(), 1, "{body}");
        let mut names: Vec<&str> = error.as_object().unwrap().keys().map(String::as_str).collect();
        names.sort_unstable();
        assert_eq!(names, ["code", "message", "param", "type"]);
        assert!(error["message"].as_str().is_some_and(|message| !message.is_empty()), "{body}");
        assert!(error["type"].is_string(), "{body}");
        let text = |value: &Value| value.as_str().map(ToOwned::to_owned);
        (self.status.as_u16(), text(&error["code"]).unwrap_or_default(), text(&error["param"]))
    }

    /// The `data:` payloads of a stream, after checking that it carries nothing but those and comments.
    fn data(&self) -> Vec<String> {
        assert_eq!(self.header("content-type"), Some("text/event-stream"));
        let text = String::from_utf8(self.body.clone()).unwrap();
        let lines = text.lines().filter(|line| !line.is_empty() && !line.starts_with(':'));
        lines.map(|line| line.strip_prefix("data: ").unwrap_or_else(|| panic!("{line:?}")).to_owned()).collect()
    }

    /// The chunks of a stream that ends with `[DONE]`.
    fn chunks(&self) -> Vec<Value> {
        let mut data = self.data();
        assert_eq!(data.pop().as_deref(), Some("[DONE]"));
        data.iter().map(|data| serde_json::from_str(data).unwrap()).collect()
    }
}

fn app(replay: &Arc<Replay>) -> Router {
    app_with(replay, ApiOptions::default())
}

fn app_with(replay: &Arc<Replay>, options: ApiOptions) -> Router {
    router_with(Arc::clone(replay) as Arc<dyn super::Backend>, options)
}

async fn send(app: Router, request: Request<Body>) -> Reply {
    let response = app.oneshot(request).await.unwrap();
    let (parts, body) = response.into_parts();
    let body = to_bytes(body, usize::MAX).await.unwrap().to_vec();
    Reply { status: parts.status, headers: parts.headers, body }
}

async fn get(app: Router, path: &str) -> Reply {
    send(app, Request::get(path).body(Body::empty()).unwrap()).await
}

async fn post(app: Router, path: &str, body: &Value) -> Reply {
    post_bytes(app, path, body.to_string().into_bytes()).await
}

async fn post_bytes(app: Router, path: &str, body: Vec<u8>) -> Reply {
    send(app, Request::post(path).header("content-type", "application/json").body(Body::from(body)).unwrap()).await
}

const CHAT: &str = "/v1/chat/completions";
const TEXT: &str = "/v1/completions";

/// A chat request with `extra` on top.
fn chat(extra: &Value) -> Value {
    with(json!({ "model": "tandem", "messages": [{ "role": "user", "content": "capital of Peru?" }] }), extra)
}

/// A text completion with `extra` on top.
fn text(extra: &Value) -> Value {
    with(json!({ "model": "tandem", "prompt": "capital of Peru?", "max_tokens": 64 }), extra)
}

fn with(mut base: Value, extra: &Value) -> Value {
    for (name, value) in extra.as_object().unwrap() {
        base[name] = value.clone();
    }
    base
}
