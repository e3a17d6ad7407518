//! Around every request: its id in both directions, and the count of responses.

use std::sync::Arc;

use axum::extract::{Request, State};
use axum::http::HeaderValue;
use axum::middleware::Next;
use axum::response::Response;
use metrics::counter;

use super::Api;
use super::request_id::HEADER;
use super::respond::MODE_HEADER;
use crate::metric_definitions::{LABEL_MODE, LABEL_ROUTE, LABEL_STATUS, MODE_NONE, REQUESTS_TOTAL, route_label};
use crate::request::Mode;

/// Gives the request its id, as an extension and in the response's header.
pub(crate) async fn identify(State(api): State<Arc<Api>>, mut request: Request, next: Next) -> Response {
    let id = api.ids.claim(request.headers());
    request.extensions_mut().insert(id.clone());
    let mut response = next.run(request).await;
    if let Ok(value) = HeaderValue::from_str(id.as_str()) {
        response.headers_mut().insert(HEADER, value);
    }
    response
}

/// Counts the response.
pub(crate) async fn count(request: Request, next: Next) -> Response {
    let route = route_label(request.uri().path());
    let response = next.run(request).await;
    let mode = response.headers().get(MODE_HEADER).and_then(|mode| mode.to_str().ok()).and_then(Mode::parse);
    counter!(
        REQUESTS_TOTAL,
        LABEL_ROUTE => route,
        LABEL_MODE => mode.map_or(MODE_NONE, Mode::name),
        LABEL_STATUS => response.status().as_u16().to_string()
    )
    .increment(1);
    response
}
