//! Errors in the shape that Anthropic's clients parse: `{"type":"error","error":{type,message}}`.

use axum::Json;
use axum::extract::Request;
use axum::http::{HeaderName, HeaderValue, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};

use crate::api::error::ApiError;
use crate::api::request_id::RequestId;

/// Where Anthropic's clients look for the request's id.
const REQUEST_ID: HeaderName = HeaderName::from_static("request-id");

/// Gives errors the shape, whatever part of the node they come from, and the response its id.
pub(crate) async fn reshape(request: Request, next: Next) -> Response {
    let id = request.extensions().get::<RequestId>().cloned();
    let mut response = next.run(request).await;
    let id = id.as_ref().map(RequestId::as_str);
    if let Some(error) = response.extensions_mut().remove::<ApiError>() {
        let (mut parts, _) = response.into_parts();
        for stale in [header::CONTENT_LENGTH, header::CONTENT_TYPE] {
            parts.headers.remove(stale);
        }
        let mut body = shape(&error);
        body["request_id"] = id.into();
        response = (parts.status, parts.headers, Json(body)).into_response();
    }
    if let Some(id) = id.and_then(|id| HeaderValue::from_str(id).ok()) {
        response.headers_mut().insert(REQUEST_ID, id);
    }
    response
}

/// The body of an error.
pub(crate) fn shape(error: &ApiError) -> Value {
    let kind = match error.status.as_u16() {
        401 => "authentication_error",
        403 => "permission_error",
        404 => "not_found_error",
        413 => "request_too_large",
        429 => "rate_limit_error",
        503 => "overloaded_error",
        400..500 => "invalid_request_error",
        _ => "api_error",
    };
    json!({ "type": "error", "error": { "type": kind, "message": error.message } })
}
