//! The chat page: static assets compiled into the binary, served under a policy that forbids every
//! request to another host.

use axum::Router;
use axum::body::Body;
use axum::extract::Path;
use axum::http::header::{
    ALLOW, CACHE_CONTROL, CONTENT_SECURITY_POLICY, CONTENT_TYPE, ETAG, IF_NONE_MATCH, REFERRER_POLICY,
    X_CONTENT_TYPE_OPTIONS,
};
use axum::http::{HeaderMap, HeaderValue, Method, StatusCode};
use axum::response::Response;
use axum::routing::get;
use rust_embed::{EmbeddedFile, RustEmbed};

/// Everything comes from this node: no inline script or style, no other host, no framing.
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; \
    connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

/// Names carry no hash, so a browser asks each time and gets a 304 while nothing changed.
const CACHE: &str = "no-cache";

#[derive(RustEmbed)]
#[folder = "assets/"]
struct Assets;

/// Routes of the page: `/` and `/assets/{path}`, `GET` and `HEAD`.
pub fn routes() -> Router {
    Router::new()
        .route("/", get(index).fallback(not_allowed))
        .route("/assets/{*path}", get(asset).fallback(not_allowed))
}

async fn index(headers: HeaderMap) -> Response {
    serve("index.html", &headers)
}

async fn asset(Path(path): Path<String>, headers: HeaderMap) -> Response {
    serve(&path, &headers)
}

async fn not_allowed(method: Method) -> Response {
    let mut response = plain(StatusCode::METHOD_NOT_ALLOWED, format!("{method} is not allowed here; use GET\n"));
    response.headers_mut().insert(ALLOW, HeaderValue::from_static("GET, HEAD"));
    response
}

/// The file at `path` inside the assets, 304 if the browser already has it, 404 if there is none.
fn serve(path: &str, headers: &HeaderMap) -> Response {
    let Some(file) = Assets::get(path) else {
        return plain(StatusCode::NOT_FOUND, format!("no page asset is called \"{path}\"\n"));
    };
    let tag = entity_tag(&file);
    let mut response = if holds(headers, &tag) {
        let mut response = Response::new(Body::empty());
        *response.status_mut() = StatusCode::NOT_MODIFIED;
        response
    } else {
        let mut response = Response::new(Body::from(file.data));
        response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(content_type(path)));
        response
    };
    let fields = response.headers_mut();
    if let Ok(tag) = HeaderValue::from_str(&tag) {
        fields.insert(ETAG, tag);
    }
    fields.insert(CACHE_CONTROL, HeaderValue::from_static(CACHE));
    protect(fields);
    response
}

fn plain(status: StatusCode, text: String) -> Response {
    let mut response = Response::new(Body::from(text));
    *response.status_mut() = status;
    let fields = response.headers_mut();
    fields.insert(CONTENT_TYPE, HeaderValue::from_static("text/plain; charset=utf-8"));
    protect(fields);
    response
}

fn protect(fields: &mut HeaderMap) {
    fields.insert(CONTENT_SECURITY_POLICY, HeaderValue::from_static(POLICY));
    fields.insert(X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    fields.insert(REFERRER_POLICY, HeaderValue::from_static("no-referrer"));
}

/// Strong tag: the first 16 bytes of the content's SHA-256, quoted hex.
fn entity_tag(file: &EmbeddedFile) -> String {
    let hex: String = file.metadata.sha256_hash().iter().take(16).map(|b| format!("{b:02x}")).collect();
    format!("\"{hex}\"")
}

/// True if `If-None-Match` names `tag` (weak comparison, RFC 9110 § 13.1.2).
fn holds(headers: &HeaderMap, tag: &str) -> bool {
    headers.get_all(IF_NONE_MATCH).iter().filter_map(|v| v.to_str().ok()).flat_map(|v| v.split(',')).any(|held| {
        let held = held.trim();
        held == "*" || held.strip_prefix("W/").unwrap_or(held) == tag
    })
}

fn content_type(path: &str) -> &'static str {
    match path.rsplit_once('.').map(|(_, extension)| extension) {
        Some("html") => "text/html; charset=utf-8",
        Some("css") => "text/css; charset=utf-8",
        Some("js") => "text/javascript; charset=utf-8",
        Some("svg") => "image/svg+xml",
        Some("png") => "image/png",
        _ => "application/octet-stream",
    }
}

#[cfg(test)]
mod tests;
