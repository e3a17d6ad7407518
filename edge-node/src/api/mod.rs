//! HTTP API of an edge node, compatible with OpenAI's and Anthropic's clients, with the routes of the page
//! and of the operator. [`responses`] and [`anthropic`] make chat requests of theirs.
//!
//! The way of a request: [`guard`] → [`body`] → [`chat_fields`] or [`completion_fields`] →
//! [`model_name`] → [`tooling`] → [`prompt`] → [`respond`] → [`answers`] → [`pieces`] →
//! [`reading`] → [`writer`] → [`reply`].
//!
//! What is not supported is refused with a 400 that names the field; nothing is ignored but what no token
//! of the answer depends on (`user`, `metadata`, …). Where a request gives no
//! `temperature`, the model's own default applies ([`Backend::sampling_defaults`]), which is greedy
//! for the embedded pair.

mod answer_fields;
mod answers;
mod anthropic;
mod backend;
mod bind;
mod body;
mod call_grammar;
mod call_object;
mod call_params;
mod call_syntax;
mod channels;
mod chat_fields;
mod completion_fields;
mod completion_writer;
mod echo;
mod embeddings;
mod endpoints;
mod error;
mod fields;
mod grammar;
mod guard;
mod info;
mod json_bounds;
mod messages;
mod meter;
mod model_name;
mod observe;
mod openapi;
mod origins;
mod param_types;
mod partial;
mod paths;
mod pieces;
mod prompt;
mod reading;
mod reply;
mod request_id;
mod respond;
mod responses;
pub(crate) mod short_json;
mod stop;
mod template_fields;
mod thoughts;
mod tokenize;
mod tool_calls;
mod tooling;
mod tools;
mod untaught;
mod writer;

use std::sync::Arc;

use axum::Router;
use axum::extract::Request;
use axum::middleware::{from_fn, from_fn_with_state};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};

pub use backend::{Backend, ControlsError, ModelEntry, Readiness};
pub use bind::{API_KEY_BYTES_MAX, BindError, check_bind};
pub use body::{BODY_BYTES_MAX, BODY_READ_S_MAX};
pub use origins::{Hosts, OriginError, Origins};

use error::ApiError;

/// What the operator decides about the API.
#[derive(Clone, Debug, Default)]
pub struct ApiOptions {
    /// Bearer key that requests must carry; `None` lets everyone in who addresses the node by IP
    /// address or as `localhost`.
    pub api_key: Option<String>,
    /// Without a key, serve requests for any host name too (`--insecure`).
    pub any_host: bool,
    /// Without a key, serve requests for these names too.
    pub hosts: Hosts,
    /// Pages that may use the API although they come from elsewhere.
    pub origins: Origins,
    /// Model that unknown model names stand for, e.g. `tandem`; `None` makes them a 404. It also answers requests
    /// that name none, else the pair does.
    pub default_alias: Option<String>,
}

/// Everything the handlers share.
pub(crate) struct Api {
    pub(crate) backend: Arc<dyn Backend>,
    pub(crate) options: ApiOptions,
    pub(crate) ids: request_id::RequestIds,
    /// Turns for compiling grammars.
    pub(crate) turns: grammar::Turns,
    /// Answers of the Responses API that are kept.
    pub(crate) responses: Arc<responses::ResponseStore>,
    /// What large requests share.
    pub(crate) heavy: body::Heavy,
}

/// The API and the page over `backend`, without a key.
pub fn router(backend: Arc<dyn Backend>) -> Router {
    router_with(backend, ApiOptions::default())
}

/// The API and the page over `backend`. Call [`check_bind`] before listening.
pub fn router_with(backend: Arc<dyn Backend>, options: ApiOptions) -> Router {
    let api = Arc::new(Api {
        backend,
        options,
        ids: request_id::RequestIds::default(),
        turns: grammar::Turns::default(),
        responses: Arc::default(),
        heavy: body::Heavy::default(),
    });
    let guarded = Router::new()
        .route("/v1/chat/completions", post(endpoints::chat))
        .route("/v1/completions", post(endpoints::completions))
        .route("/v1/embeddings", post(embeddings::embeddings))
        .route("/tokenize", post(tokenize::tokenize))
        .route("/detokenize", post(tokenize::detokenize))
        .route("/v1/responses", post(responses::create))
        .route("/v1/responses/{id}", get(responses::retrieve).delete(responses::delete))
        .route("/v1/models", get(info::models))
        .route("/v1/models/{*id}", get(info::model))
        .route("/metrics", get(info::metrics))
        .route("/tandem/status", get(info::status))
        .route("/tandem/controls", post(info::controls))
        .route("/tandem/explain/{id}", get(info::explain))
        .method_not_allowed_fallback(method_not_allowed)
        .route_layer(from_fn_with_state(Arc::clone(&api), guard::check));
    let anthropic = Router::new()
        .route("/v1/messages", post(anthropic::create))
        .route("/v1/messages/count_tokens", post(anthropic::count_tokens))
        .method_not_allowed_fallback(method_not_allowed)
        .route_layer(from_fn_with_state(Arc::clone(&api), guard::check))
        .layer(from_fn(anthropic::errors::reshape));
    let open = Router::new()
        .route("/health", get(info::health))
        .route("/ready", get(info::ready))
        .route("/version", get(info::version))
        .route("/openapi.json", get(openapi::openapi))
        .method_not_allowed_fallback(method_not_allowed);
    let cors = api.options.origins.layer();
    let routes = guarded
        .merge(anthropic)
        .merge(open)
        .with_state(Arc::clone(&api))
        .merge(crate::page::routes())
        .fallback(no_such_path)
        .layer(from_fn(observe::count))
        .layer(from_fn_with_state(Arc::clone(&api), observe::identify));
    // Outermost: browsers ask before they send a key.
    paths::with_slashes(match cors {
        Some(cors) => routes.layer(cors),
        None => routes,
    })
}

async fn no_such_path(request: Request) -> Response {
    ApiError::no_such_path(request.method().as_str(), request.uri().path()).into_response()
}

async fn method_not_allowed(request: Request) -> Response {
    ApiError::method_not_allowed(request.method().as_str(), request.uri().path()).into_response()
}

#[cfg(test)]
mod tests;
