//! Errors in the shape that OpenAI clients parse: `{"error":{message,type,param,code}}`.

use axum::http::{HeaderName, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use serde_json::{Value, json};

use super::backend::{ControlsError, Readiness};
use crate::request::GenerateError;

/// Seconds a client is asked to wait while the node loads its models or has no room for its connection.
const LOADING_RETRY_S: u64 = 1;

/// Milliseconds to wait before a retry, as the OpenAI clients read it (finer than `Retry-After`).
const RETRY_AFTER_MS: HeaderName = HeaderName::from_static("retry-after-ms");

/// Fields of a request that a failed generation points at.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Params {
    /// Holds the prompt.
    pub(crate) prompt: &'static str,
    /// Asks for the grammar.
    pub(crate) grammar: &'static str,
}

/// What a client did wrong, or what the node could not do.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub(crate) struct ApiError {
    pub(crate) status: StatusCode,
    /// Field `type` of the body.
    pub(crate) kind: &'static str,
    /// Field `param`: path of the offending field, e.g. `messages[0].role`.
    pub(crate) param: Option<String>,
    /// Field `code`: a stable word for programs.
    pub(crate) code: Option<&'static str>,
    pub(crate) message: String,
    /// When to try again, milliseconds.
    pub(crate) retry_after_ms: Option<u64>,
}

#[derive(Serialize)]
struct Body<'a> {
    message: &'a str,
    #[serde(rename = "type")]
    kind: &'a str,
    param: Option<&'a str>,
    code: Option<&'a str>,
}

impl ApiError {
    fn new(status: StatusCode, kind: &'static str, code: Option<&'static str>, message: String) -> Self {
        Self { status, kind, param: None, code, message, retry_after_ms: None }
    }

    /// 400 about the field `param`.
    pub(crate) fn invalid(param: impl Into<String>, message: impl Into<String>) -> Self {
        Self::bad_request("invalid_value", message).about(param)
    }

    /// 400 with a code of its own.
    pub(crate) fn bad_request(code: &'static str, message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "invalid_request_error", Some(code), message.into())
    }

    /// Names the field the error is about.
    #[must_use]
    pub(crate) fn about(mut self, param: impl Into<String>) -> Self {
        self.param = Some(param.into());
        self
    }

    /// With a field's name in place of what it was made into: `names` are prefixes of paths, the first
    /// that fits counts.
    pub(crate) fn renamed(mut self, names: &[(&str, &str)]) -> Self {
        let param = self.param.take();
        self.param = param.map(|param| {
            let renamed = names.iter().find_map(|(from, to)| Some(format!("{to}{}", param.strip_prefix(from)?)));
            let Some(renamed) = renamed else { return param };
            self.message = self.message.replace(&format!("`{param}"), &format!("`{renamed}"));
            renamed
        });
        self
    }

    /// 401.
    pub(crate) fn unauthorized(message: &str) -> Self {
        let code = Some("invalid_api_key");
        Self::new(StatusCode::UNAUTHORIZED, "authentication_error", code, message.to_owned())
    }

    /// 403.
    pub(crate) fn forbidden(code: &'static str, message: impl Into<String>) -> Self {
        Self::new(StatusCode::FORBIDDEN, "permission_error", Some(code), message.into())
    }

    /// 404 for a path.
    pub(crate) fn no_such_path(method: &str, path: &str) -> Self {
        let message = format!("there is no {method} {path}; the API is under /v1, the page is at /");
        Self::new(StatusCode::NOT_FOUND, "invalid_request_error", Some("unknown_url"), message)
    }

    /// 404 for a thing that is asked for by name.
    pub(crate) fn not_found(code: &'static str, message: impl Into<String>) -> Self {
        Self::new(StatusCode::NOT_FOUND, "invalid_request_error", Some(code), message.into())
    }

    /// 405.
    pub(crate) fn method_not_allowed(method: &str, path: &str) -> Self {
        let message = format!("{method} is not allowed on {path}; the header `allow` lists what is");
        Self::new(StatusCode::METHOD_NOT_ALLOWED, "invalid_request_error", Some("method_not_allowed"), message)
    }

    /// 408.
    pub(crate) fn body_too_slow(seconds_max: u64, silence_s_max: u64) -> Self {
        let message =
            format!("the body did not arrive: it may take {seconds_max} s, with no pause over {silence_s_max} s");
        Self::new(StatusCode::REQUEST_TIMEOUT, "invalid_request_error", Some("body_too_slow"), message)
    }

    /// 413.
    pub(crate) fn body_too_large(bytes_max: usize) -> Self {
        let message = format!("the request body is larger than {bytes_max} bytes; shorten the prompt");
        Self::new(StatusCode::PAYLOAD_TOO_LARGE, "invalid_request_error", Some("body_too_large"), message)
    }

    /// 415.
    pub(crate) fn not_json() -> Self {
        let message = "send the body as JSON with the header `content-type: application/json`".to_owned();
        Self::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, "invalid_request_error", Some("unsupported_media_type"), message)
    }

    /// 415 for a body that is packed in an unknown way.
    pub(crate) fn encoding_unknown() -> Self {
        let message = "send the body as it is, or with `content-encoding: gzip` or `deflate`".to_owned();
        let code = Some("unsupported_content_encoding");
        Self::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, "invalid_request_error", code, message)
    }

    /// 429.
    pub(crate) fn busy(message: impl Into<String>, retry_after_ms: u64) -> Self {
        let mut busy = Self::new(StatusCode::TOO_MANY_REQUESTS, "rate_limit_error", Some("busy"), message.into());
        busy.retry_after_ms = Some(retry_after_ms);
        busy
    }

    /// 503 for a connection beyond the bound.
    pub(crate) fn too_many_connections() -> Self {
        let message = "the node has as many connections as it takes; retry soon".to_owned();
        let code = Some("too_many_connections");
        let mut error = Self::new(StatusCode::SERVICE_UNAVAILABLE, "server_error", code, message);
        error.retry_after_ms = Some(LOADING_RETRY_S * 1000);
        error
    }

    /// 500.
    pub(crate) fn internal(message: impl Into<String>) -> Self {
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, "server_error", Some("generation_failed"), message.into())
    }

    /// 503 for a node that does not take requests (yet, or any more).
    pub(crate) fn not_ready(readiness: &Readiness) -> Self {
        let (code, retry_after_ms) = match readiness {
            Readiness::Loading(_) | Readiness::Ready => ("loading", Some(LOADING_RETRY_S * 1000)),
            Readiness::Draining => ("draining", Some(LOADING_RETRY_S * 1000)),
            Readiness::Failed(_) => ("failed", None),
        };
        let mut error = Self::new(StatusCode::SERVICE_UNAVAILABLE, "server_error", Some(code), readiness.to_string());
        error.retry_after_ms = retry_after_ms;
        error
    }

    /// What a refused or failed generation is to the client.
    pub(crate) fn from_generation(error: &GenerateError, params: Params) -> Self {
        let message = error.to_string();
        match error {
            GenerateError::Busy { retry_after_ms, .. } => Self::busy(message, *retry_after_ms),
            GenerateError::TooManyAnswers { .. } => Self::invalid("n", message),
            GenerateError::TooLong { .. } => Self::bad_request("context_length_exceeded", message).about(params.prompt),
            GenerateError::UnknownToken { .. } => Self::bad_request("unknown_token", message).about(params.prompt),
            GenerateError::EmptyPrompt => Self::bad_request("empty_prompt", message).about(params.prompt),
            GenerateError::NoCloud(_) => Self::bad_request("no_cloud", message).about("model"),
            GenerateError::Grammar(_) => Self::bad_request("invalid_grammar", message).about(params.grammar),
            GenerateError::ForeignCloud { .. } => Self::bad_request("tokenizers_differ", message).about("model"),
            GenerateError::Closing => Self::not_ready(&Readiness::Draining),
            GenerateError::Engine(_) => Self::internal(message),
        }
    }

    /// The JSON body; also what a stream carries in its last `data:` line.
    pub(crate) fn body(&self) -> Value {
        json!({ "error": Body {
            message: &self.message,
            kind: self.kind,
            param: self.param.as_deref(),
            code: self.code,
        } })
    }
}

impl From<ControlsError> for ApiError {
    fn from(error: ControlsError) -> Self {
        let message = error.to_string();
        match error {
            ControlsError::Invalid { param, .. } => Self::invalid(param, message),
        }
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = (self.status, axum::Json(self.body())).into_response();
        if let Some(wait_ms) = self.retry_after_ms {
            let fields = response.headers_mut();
            fields.insert(header::RETRY_AFTER, HeaderValue::from(wait_ms.div_ceil(1000).max(1)));
            fields.insert(RETRY_AFTER_MS, HeaderValue::from(wait_ms));
        }
        if self.status == StatusCode::UNAUTHORIZED {
            response.headers_mut().insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        // For APIs whose errors look otherwise.
        response.extensions_mut().insert(self);
        response
    }
}
