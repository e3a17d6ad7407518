//! What the node says about itself, and the operator's controls.

use std::sync::Arc;

use axum::Json;
use axum::extract::{Path, Request, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};

use super::Api;
use super::backend::{ModelEntry, Readiness};
use super::error::ApiError;
use super::fields::{Fields, short};
use super::model_name::{self, MODES, TANDEM};
use crate::diagnosis::{LinkState, TOKENIZERS_DIFFER};
use crate::request::{Controls, GenerateError, Mode, NodeStatus};

/// Id that stands for the last answer in `/tandem/explain/{id}`.
const LAST: &str = "last";

/// The modes that can be served: all, or `local` where there is no cloud or none that can take part. A cloud
/// that is away may come back, and answers say that they went without it.
fn modes(status: &NodeStatus) -> &'static [Mode] {
    if without_cloud(status).is_some() { &[Mode::Local] } else { &MODES }
}

/// Why no answer can be the cloud's, whatever one waits for.
fn without_cloud(status: &NodeStatus) -> Option<String> {
    match (status.cloud.state, status.cloud.code.as_deref()) {
        (LinkState::None, _) => Some(GenerateError::NO_CLOUD.to_owned()),
        (LinkState::Failed, Some(TOKENIZERS_DIFFER)) => status.cloud.failure(),
        _ => None,
    }
}

/// `GET /v1/models`: every model with the modes that can be served.
pub(crate) async fn models(State(api): State<Arc<Api>>) -> Json<Value> {
    let models = api.backend.models();
    let modes = modes(&api.backend.status());
    let mut data = Vec::new();
    for base in model_name::base_names(&models) {
        // A model that stands for one mode goes with it.
        let own = models.iter().find(|model| model.id == base).and_then(|model| model.mode);
        if own.is_some_and(|mode| !modes.contains(&mode)) {
            continue;
        }
        data.push(describe(base, base, &models));
        data.extend(modes.iter().map(|mode| describe(&format!("{base}:{}", mode.name()), base, &models)));
    }
    Json(json!({ "object": "list", "data": data }))
}

/// `GET /v1/models/{id}`.
pub(crate) async fn model(State(api): State<Arc<Api>>, Path(id): Path<String>) -> Result<Json<Value>, ApiError> {
    let models = api.backend.models();
    // No alias here: the name is either in the list or it is not.
    let target = model_name::resolve(&id, &models, None)?;
    let status = api.backend.status();
    if let Some(mode) = target.mode.filter(|mode| !modes(&status).contains(mode)) {
        let why = without_cloud(&status).unwrap_or_default();
        let message = format!("model `{}` stands for mode `{}`, which {why}", short(&id), mode.name());
        return Err(ApiError::not_found("model_not_found", message).about("model"));
    }
    Ok(Json(describe(&target.name, &target.name, &models)))
}

fn describe(id: &str, base: &str, models: &[ModelEntry]) -> Value {
    let entry = models.iter().find(|model| base.strip_prefix(model.id.as_str()).is_some_and(is_suffix));
    json!({
        "id": id,
        "object": "model",
        "created": entry.or(models.first()).map_or(0, |model| model.created),
        "owned_by": entry.map_or(TANDEM, |model| model.owned_by.as_str()),
    })
}

fn is_suffix(rest: &str) -> bool {
    rest.is_empty() || rest.strip_prefix(':').is_some_and(|mode| Mode::parse(mode).is_some())
}

/// `GET /health`: 503 until the models are loaded.
pub(crate) async fn health(State(api): State<Arc<Api>>) -> Response {
    let readiness = api.backend.ready();
    report(&readiness, matches!(readiness, Readiness::Ready | Readiness::Draining))
}

/// `GET /ready`: 503 whenever requests should go elsewhere; else the modes that can be asked for, how the
/// cloud stands, and what to do about it.
pub(crate) async fn ready(State(api): State<Arc<Api>>) -> Response {
    let readiness = api.backend.ready();
    if readiness != Readiness::Ready {
        return report(&readiness, false);
    }
    let status = api.backend.status();
    let modes: Vec<&str> = modes(&status).iter().map(|mode| mode.name()).collect();
    Json(json!({ "status": "ok", "modes": modes, "cloud": status.cloud, "cloud_problem": status.cloud_problem }))
        .into_response()
}

fn report(readiness: &Readiness, fine: bool) -> Response {
    if !fine {
        return ApiError::not_ready(readiness).into_response();
    }
    let status = if *readiness == Readiness::Ready { "ok" } else { "draining" };
    Json(json!({ "status": status })).into_response()
}

/// `GET /version`.
pub(crate) async fn version() -> Json<Value> {
    Json(json!({ "name": TANDEM, "version": env!("CARGO_PKG_VERSION") }))
}

/// `GET /metrics`, Prometheus text.
pub(crate) async fn metrics(State(api): State<Arc<Api>>) -> Response {
    let headers = [(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")];
    (StatusCode::OK, headers, api.backend.render_metrics()).into_response()
}

/// `GET /tandem/status`.
pub(crate) async fn status(State(api): State<Arc<Api>>) -> Json<NodeStatus> {
    Json(api.backend.status())
}

/// `POST /tandem/controls {cut, threshold, default_mode}`: absent fields stay as they are.
pub(crate) async fn controls(State(api): State<Arc<Api>>, request: Request) -> Result<Json<NodeStatus>, ApiError> {
    let body = api.heavy.read_json(request).await?;
    let (mut fields, _) = body.parse(&api.heavy, Fields::from_body).await?;
    let controls = Controls {
        cut: fields.boolean("cut")?,
        threshold: fields.number("threshold", 0.0..=f32::MAX)?,
        default_mode: fields.choice("default_mode", &["local", "auto", "exact", "cloud"])?.and_then(Mode::parse),
    };
    fields.finish()?;
    match api.backend.ready() {
        Readiness::Ready => Ok(Json(api.backend.set_controls(controls)?)),
        other => Err(ApiError::not_ready(&other)),
    }
}

/// `GET /tandem/explain/{id}`: `id` is a request id, the id of a completion, or `last`.
pub(crate) async fn explain(State(api): State<Arc<Api>>, Path(id): Path<String>) -> Result<Json<Value>, ApiError> {
    let request_id =
        ["chatcmpl-", "cmpl-", "resp_", "msg_"].iter().find_map(|prefix| id.strip_prefix(prefix)).unwrap_or(&id);
    let wanted = (id != LAST).then_some(request_id);
    api.backend.explain(wanted).map(Json).ok_or_else(|| {
        let message = match wanted {
            None => "no answer has been given yet; ask something first".to_owned(),
            Some(id) => format!("no answer `{}` is known (any more); try `last`", short(id)),
        };
        ApiError::not_found("answer_not_found", message)
    })
}
