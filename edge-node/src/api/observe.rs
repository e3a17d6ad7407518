//! Around every request: its id in both directions, and the count of responses.

use std::sync::Arc;

use axum::extract::{Request, State};
use axum::http::{HeaderValue, StatusCode};
use axum::middleware::Next;
use axum::response::Response;
use metrics::counter;

use super::Api;
use super::request_id::HEADER;
use super::respond::MODE_HEADER;
use crate::metric_definitions::{
    LABEL_MODE, LABEL_ROUTE, LABEL_STATUS, MODE_NONE, REQUESTS_TOTAL, STATUS_LEFT, route_label,
};
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

/// Counts the response, also where the client leaves before it begins.
pub(crate) async fn count(request: Request, next: Next) -> Response {
    let mut counted = Counted { route: route_label(request.uri().path()), response: None };
    let response = next.run(request).await;
    let mode = response.headers().get(MODE_HEADER).and_then(|mode| mode.to_str().ok()).and_then(Mode::parse);
    counted.response = Some((response.status(), mode));
    response
}

struct Counted {
    route: &'static str,
    /// Status, and mode of the answer; none if there was no response.
    response: Option<(StatusCode, Option<Mode>)>,
}

impl Drop for Counted {
    fn drop(&mut self) {
        let (status, mode) = match self.response {
            Some((status, mode)) => (status.as_u16().to_string(), mode),
            None => (STATUS_LEFT.to_owned(), None),
        };
        let mode = mode.map_or(MODE_NONE, Mode::name);
        counter!(REQUESTS_TOTAL, LABEL_ROUTE => self.route, LABEL_MODE => mode, LABEL_STATUS => status).increment(1);
    }
}
