//! Models, health, status, controls, explanations, ids.

use std::sync::Arc;

use axum::body::Body;
use axum::http::Request;
use serde_json::json;

use super::replay::Replay;
use super::*;
use crate::diagnosis::{self, CloudState, LinkState};

fn node() -> Arc<Replay> {
    Arc::new(Replay::of("Lima."))
}

#[tokio::test]
async fn models_have_a_name_per_mode() {
    let body = get(app(&node()), "/v1/models").await.json();
    assert_eq!(body["object"], "list");
    let ids: Vec<&str> = body["data"].as_array().unwrap().iter().map(|model| model["id"].as_str().unwrap()).collect();
    assert_eq!(ids.len(), 15);
    assert_eq!(ids[..6], ["tandem", "tandem:local", "tandem:auto", "tandem:exact", "tandem:cloud", "demo-edge"]);
    for (id, model) in ids.iter().zip(body["data"].as_array().unwrap()) {
        let one = get(app(&node()), &format!("/v1/models/{id}")).await;
        assert_eq!(one.json(), *model, "{id}");
        assert_eq!(model["object"], "model");
        assert_eq!(model["created"], json!(1_700_000_000));
        assert_eq!(model["owned_by"], json!(if id.starts_with("demo") { "tests" } else { "tandem" }));
    }
    for id in ["gpt-4o", "tandem:fast", "org/name"] {
        let reply = get(app(&node()), &format!("/v1/models/{id}")).await;
        assert_eq!(reply.error(), (404, "model_not_found".into(), Some("model".into())), "{id}");
    }
}

#[tokio::test]
async fn health_version_metrics_and_page() {
    assert_eq!(get(app(&node()), "/health").await.json(), json!({ "status": "ok" }));
    let modes = ["local", "auto", "exact", "cloud"];
    let ready = json!({ "status": "ok", "modes": modes, "cloud": { "state": "connected" }, "cloud_problem": null });
    assert_eq!(get(app(&node()), "/ready").await.json(), ready);
    assert_eq!(get(app(&node()), "/version").await.json()["version"], env!("CARGO_PKG_VERSION"));
    let metrics = get(app(&node()), "/metrics").await;
    assert!(metrics.header("content-type").unwrap().starts_with("text/plain; version=0.0.4"));
    assert!(metrics.body.starts_with(b"# TYPE"));
    assert_eq!(get(app(&node()), "/").await.status, 200);
}

#[tokio::test]
async fn without_a_cloud_by_choice_only_what_the_edge_can_is_listed() {
    let node = node();
    node.status.lock().unwrap().cloud = CloudState::of(LinkState::None);
    let ready = json!({ "status": "ok", "modes": ["local"], "cloud": { "state": "none" }, "cloud_problem": null });
    assert_eq!(get(app(&node), "/ready").await.json(), ready);
    let body = get(app(&node), "/v1/models").await.json();
    let ids: Vec<&str> = body["data"].as_array().unwrap().iter().map(|model| model["id"].as_str().unwrap()).collect();
    assert_eq!(ids, ["tandem", "tandem:local", "demo-edge", "demo-edge:local"]);
    for id in ["tandem:auto", "tandem:exact", "demo-edge:cloud", "demo-cloud"] {
        let reply = get(app(&node), &format!("/v1/models/{id}")).await;
        assert_eq!(reply.error(), (404, "model_not_found".into(), Some("model".into())), "{id}");
        assert!(reply.json()["error"]["message"].as_str().unwrap().contains("--no-cloud"), "{id}: {}", reply.json());
    }
    for model in ["tandem", "tandem:auto"] {
        let reply = post(app(&node), CHAT, &chat(&json!({ "model": model }))).await;
        let header = |name: &str| reply.header(name).unwrap_or_default().to_owned();
        assert_eq!((header("x-tandem-mode").as_str(), header("x-tandem-reason").as_str()), ("local", "no-cloud"));
        assert_eq!(header("x-tandem-degraded"), "", "{model}");
    }
}

#[tokio::test]
async fn a_cloud_that_cannot_take_part_is_said_with_what_to_do() {
    let node = node();
    let why = diagnosis::unknown_model("big", &["demo-cloud".to_owned()]);
    node.status.lock().unwrap().cloud = CloudState::with(LinkState::Failed, why);
    for path in ["/ready", "/tandem/status"] {
        let cloud = get(app(&node), path).await.json()["cloud"].clone();
        assert_eq!((&cloud["state"], &cloud["code"]), (&json!("failed"), &json!("unknown_model")), "{path}");
        assert!(cloud["what_to_do"].as_str().unwrap().contains("--cloud-model demo-cloud"), "{path}: {cloud}");
    }
}

#[tokio::test]
async fn status_and_controls() {
    let node = node();
    assert_eq!(get(app(&node), "/tandem/status").await.json()["default_mode"], "auto");
    let body = json!({ "cut": true, "threshold": 0.25, "default_mode": "exact" });
    let changed = post(app(&node), "/tandem/controls", &body).await.json();
    assert_eq!((&changed["cut"], &changed["threshold"]), (&json!(true), &json!(0.25)));
    assert_eq!(get(app(&node), "/tandem/status").await.json(), changed);
    assert_eq!(post(app(&node), "/tandem/controls", &json!({ "cut": null })).await.json(), changed);
    let table = [
        (json!({ "threshold": 2 }), 400, "invalid_value", "threshold"),
        (json!({ "threshold": "x" }), 400, "invalid_type", "threshold"),
        (json!({ "default_mode": "fast" }), 400, "invalid_value", "default_mode"),
        (json!({ "cut": 1 }), 400, "invalid_type", "cut"),
        (json!({ "speed": 1 }), 400, "unknown_field", "speed"),
    ];
    for (body, status, code, param) in table {
        let got = post(app(&node), "/tandem/controls", &body).await.error();
        assert_eq!(got, (status, code.into(), Some(param.into())), "{body}");
    }
}

#[tokio::test]
async fn explanations_by_request_by_completion_and_last() {
    let node = node();
    assert_eq!(get(app(&node), "/tandem/explain/last").await.error().0, 404);
    let reply = post(app(&node), CHAT, &chat(&json!({}))).await;
    let id = reply.header("x-request-id").unwrap();
    let completion = reply.json()["id"].as_str().unwrap().to_owned();
    for name in ["last", id, completion.as_str()] {
        assert_eq!(get(app(&node), &format!("/tandem/explain/{name}")).await.json(), json!({ "request_id": id }));
    }
    let error = get(app(&node), "/tandem/explain/other").await.error();
    assert_eq!(error, (404, "answer_not_found".into(), None));
}

#[tokio::test]
async fn every_response_has_an_id() {
    for path in ["/health", "/nothing", "/v1/chat/completions"] {
        let request = Request::get(path).header("x-request-id", "mine-1").body(Body::empty()).unwrap();
        assert_eq!(send(app(&node()), request).await.header("x-request-id"), Some("mine-1"), "{path}");
        let request = Request::get(path).header("x-request-id", "not sane!").body(Body::empty()).unwrap();
        assert_ne!(send(app(&node()), request).await.header("x-request-id"), Some("not sane!"), "{path}");
    }
}
