//! What can go wrong with an engine behind a URL, and what to do about it.

use std::time::{Duration, SystemTime};

use serde_json::Value;

/// Longest text of an engine that is passed on, characters.
const TEXT_CHARS_MAX: usize = 200;

/// Longest wait that an engine may ask for.
const RETRY_AFTER_MAX: Duration = Duration::from_secs(60);

/// Why an engine did not answer.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Fault {
    /// The sequence is longer than the engine's context.
    #[error("the sequence is longer than the upstream's context{}", limit.map(|n| format!(" of {n} tokens")).unwrap_or_default())]
    TooLong {
        /// Its context, tokens, if it said so.
        limit: Option<usize>,
    },
    /// It does not take a request of this shape.
    #[error("the upstream refused the request (HTTP {status}): {text}")]
    Refused {
        /// HTTP status.
        status: u16,
        /// What it said.
        text: String,
    },
    /// The key is missing or wrong.
    #[error("the upstream wants another key (HTTP {status}); set it with --upstream-key-file or TANDEM_UPSTREAM_KEY")]
    Auth {
        /// HTTP status.
        status: u16,
    },
    /// It has no such route, or the route is switched off.
    #[error("the upstream does not serve {path} (HTTP {status}): {text}")]
    NoRoute {
        /// Path of the route.
        path: String,
        /// HTTP status.
        status: u16,
        /// What it said.
        text: String,
    },
    /// It has no room now.
    #[error("the upstream is busy")]
    Busy {
        /// When it wants to be asked again, if it said so.
        retry_after: Option<Duration>,
    },
    /// It cannot be reached, died, or the answer was cut short.
    #[error("the upstream is gone: {0}")]
    Gone(String),
    /// It was silent for too long.
    #[error("the upstream was silent for {} s", .0.as_secs())]
    Silent(Duration),
    /// It answered something else than was asked for.
    #[error("the upstream's answer is not understood: {0}")]
    Unexpected(String),
}

impl Fault {
    /// True if another engine with the same model, or this one later, can do what was asked for.
    #[must_use]
    pub fn passes(&self) -> bool {
        matches!(self, Self::Busy { .. } | Self::Gone(_) | Self::Silent(_))
    }

    /// The fault that an HTTP answer other than 200 stands for. `retry_after` is the header's value: seconds, or a
    /// date (RFC 9110, 10.2.3).
    #[must_use]
    pub fn of_answer(path: &str, status: u16, retry_after: Option<&str>, body: &[u8], now: SystemTime) -> Self {
        let text = text_of(body);
        let lower = text.to_lowercase();
        let context = ["exceed_context_size", "maximum context length", "longer than the maximum model length"];
        match status {
            400 | 413 | 422 if context.iter().any(|words| lower.contains(words)) => {
                Self::TooLong { limit: context_of(body) }
            }
            403 if lower.contains("permissiondenied") || lower.contains("disabled") => {
                Self::NoRoute { path: path.to_owned(), status, text }
            }
            401 | 403 => Self::Auth { status },
            404 | 405 | 501 => Self::NoRoute { path: path.to_owned(), status, text },
            429 | 503 | 529 => Self::Busy { retry_after: retry_after.and_then(|value| wait_of(value, now)) },
            500.. => Self::Gone(format!("HTTP {status}: {text}")),
            _ => Self::Refused { status, text },
        }
    }

    /// The fault that an `error` object in a body stands for, which engines also send with status 200 and inside
    /// of streams.
    #[must_use]
    pub fn of_error(path: &str, error: &Value) -> Self {
        let status = error["code"].as_u64().and_then(|code| u16::try_from(code).ok()).unwrap_or(500);
        let body = serde_json::json!({ "error": error }).to_string();
        Self::of_answer(path, status, None, body.as_bytes(), SystemTime::UNIX_EPOCH)
    }
}

/// What an error's body says in words.
fn text_of(body: &[u8]) -> String {
    let parsed: Option<Value> = serde_json::from_slice(body).ok();
    let text = parsed.as_ref().and_then(|body| {
        let error = body.get("error").unwrap_or(body);
        let message =
            [&error["message"], &body["detail"], &body["message"], error].into_iter().find_map(Value::as_str)?;
        let kind = error["type"].as_str().filter(|kind| !message.contains(kind));
        Some(kind.map_or_else(|| message.to_owned(), |kind| format!("{message} ({kind})")))
    });
    let text = text.unwrap_or_else(|| String::from_utf8_lossy(body).into_owned());
    text.chars().filter(|c| !c.is_control()).take(TEXT_CHARS_MAX).collect()
}

/// The context that a refusal names.
fn context_of(body: &[u8]) -> Option<usize> {
    let parsed: Value = serde_json::from_slice(body).ok()?;
    if let Some(context) = parsed["error"]["n_ctx"].as_u64() {
        return usize::try_from(context).ok();
    }
    // vLLM: "This model's maximum context length is 4096 tokens. However, …"
    let text = text_of(body);
    let after = text.split_once("maximum context length is ")?.1;
    after.split_whitespace().next()?.parse().ok()
}

fn wait_of(value: &str, now: SystemTime) -> Option<Duration> {
    let seconds = value.trim().parse().map(Duration::from_secs).ok();
    let until = || httpdate::parse_http_date(value.trim()).ok()?.duration_since(now).ok();
    seconds.or_else(until).map(|wait| wait.min(RETRY_AFTER_MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_become_faults() {
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(784_111_777);
        let of = |status, retry, body: &str| Fault::of_answer("/x", status, retry, body.as_bytes(), now);
        // llama-server b11549.
        let long = r#"{"error":{"code":400,"message":"request (9 tokens) exceeds the available context size (8 tokens)","type":"exceed_context_size_error","n_prompt_tokens":9,"n_ctx":8}}"#;
        assert_eq!(of(400, None, long), Fault::TooLong { limit: Some(8) });
        let invalid =
            r#"{"error":{"code":400,"message":"Prompt contains invalid tokens","type":"invalid_request_error"}}"#;
        let text = "Prompt contains invalid tokens (invalid_request_error)".to_owned();
        assert_eq!(of(400, None, invalid), Fault::Refused { status: 400, text });
        // vLLM 0.32.
        let long = r#"{"error":{"message":"This model's maximum context length is 4096 tokens. However, you requested 5000","type":"BadRequestError","code":400}}"#;
        assert_eq!(of(400, None, long), Fault::TooLong { limit: Some(4096) });
        let denied = r#"{"error":{"message":"start with --enable-scale-out","type":"PermissionDenied","code":403}}"#;
        assert!(matches!(of(403, None, denied), Fault::NoRoute { status: 403, .. }));
        assert_eq!(of(403, None, "{}"), Fault::Auth { status: 403 });
        assert_eq!(of(401, None, ""), Fault::Auth { status: 401 });
        assert!(
            matches!(of(404, None, r#"{"detail":"Not Found"}"#), Fault::NoRoute { text, .. } if text == "Not Found")
        );
        let busy = |seconds| Fault::Busy { retry_after: Some(Duration::from_secs(seconds)) };
        assert_eq!(of(429, Some("7"), ""), busy(7));
        assert_eq!(of(503, Some("Sun, 06 Nov 1994 08:49:47 GMT"), ""), busy(10));
        assert_eq!(of(503, Some("86400"), ""), busy(60));
        assert_eq!(of(529, Some("soon"), ""), Fault::Busy { retry_after: None });
        assert!(
            matches!(of(502, None, "<html>\nbad gateway"), Fault::Gone(text) if text == "HTTP 502: <html>bad gateway")
        );
        // No more of a body than a line of a log.
        let Fault::Gone(text) = of(500, None, &"é".repeat(5000)) else { panic!("500 is gone") };
        assert!(text.chars().count() < 220);
    }

    #[test]
    fn an_error_inside_a_stream_is_a_fault() {
        let error = serde_json::json!({ "code": 503, "message": "Loading model", "type": "unavailable_error" });
        assert_eq!(Fault::of_error("/x", &error), Fault::Busy { retry_after: None });
        let error = serde_json::json!({ "message": "CUDA out of memory" });
        assert!(matches!(Fault::of_error("/x", &error), Fault::Gone(text) if text.ends_with("CUDA out of memory")));
    }

    #[test]
    fn only_what_passes_is_tried_elsewhere() {
        assert!(Fault::Gone(String::new()).passes() && Fault::Busy { retry_after: None }.passes());
        assert!(!Fault::TooLong { limit: None }.passes() && !Fault::Auth { status: 401 }.passes());
    }
}
