//! A running node over HTTP, as `chat` and `explain` see it.

use std::path::Path;
use std::time::Duration;

use reqwest::{Client, RequestBuilder, Response};
use serde_json::Value;

use crate::args::{Global, NodeArgs};
use crate::config::{self, Flags};
use crate::failure::{Code, Failure, OrFail as _};
use crate::state;

/// Where a node listens by default.
const DEFAULT_URL: &str = "http://127.0.0.1:8080";
/// Longest time to connect.
const CONNECT_S_MAX: u64 = 5;
/// Largest JSON answer read, bytes.
const JSON_BYTES_MAX: usize = 64 << 20;

/// A node that may be running.
#[derive(Clone, Debug)]
pub(crate) struct NodeClient {
    base: String,
    key: Option<String>,
    client: Client,
}

impl NodeClient {
    /// The node that the options, the environment, or an `up` of this state folder name.
    pub(crate) fn new(global: &Global, args: &NodeArgs) -> Result<Self, Failure> {
        let path = state::path(global)?;
        let flags: Flags = args.api_key.iter().map(|key| ("api.key", key.as_str().into(), "--api-key")).collect();
        let base = base(args.url.as_deref(), &path)?;
        let noted =
            || state::running(&path).filter(|running| root(&running.api) == base).and_then(|running| running.key);
        let key = config::load(global, &path, flags)?.api.key.or_else(noted);
        let client = Client::builder()
            .connect_timeout(Duration::from_secs(CONNECT_S_MAX))
            // A node's address is what was typed: no proxy of the environment in between.
            .no_proxy()
            .build()
            .or_fail(Code::Failed)?;
        Ok(Self { base, key, client })
    }

    /// Base address of the node.
    pub(crate) fn url(&self) -> &str {
        &self.base
    }

    /// A GET of `path`.
    pub(crate) fn get(&self, path: &str) -> RequestBuilder {
        self.with_key(self.client.get(format!("{}{path}", self.base)))
    }

    /// A POST of `body` to `path`.
    pub(crate) fn post(&self, path: &str, body: &Value) -> RequestBuilder {
        self.with_key(self.client.post(format!("{}{path}", self.base)).json(body))
    }

    fn with_key(&self, request: RequestBuilder) -> RequestBuilder {
        match &self.key {
            Some(key) => request.bearer_auth(key),
            None => request,
        }
    }

    /// Sends; an answer that is no success becomes a failure with the node's own words.
    pub(crate) async fn send(&self, request: RequestBuilder) -> Result<Response, Failure> {
        let response = request.send().await.map_err(|e| self.unreachable(&e))?;
        let status = response.status();
        if status.is_success() {
            return Ok(response);
        }
        let body = self.json(response).await.unwrap_or_default();
        let words = body["error"]["message"].as_str().map_or_else(|| format!("status {status}"), str::to_owned);
        Err(Failure::new(Code::Refused, words))
    }

    /// The body of an answer.
    pub(crate) async fn json(&self, mut response: Response) -> Result<Value, Failure> {
        let mut body = Vec::new();
        while let Some(piece) = response.chunk().await.map_err(|e| self.unreachable(&e))? {
            if body.len() + piece.len() > JSON_BYTES_MAX {
                return Err(Failure::new(Code::Refused, format!("the answer has more than {JSON_BYTES_MAX} bytes")));
            }
            body.extend_from_slice(&piece);
        }
        serde_json::from_slice(&body).map_err(|e| {
            Failure::new(Code::Refused, format!("{} is no Tandem node: its answer is no JSON ({e})", self.base))
        })
    }

    /// The failure for a node that does not answer.
    pub(crate) fn unreachable(&self, error: &reqwest::Error) -> Failure {
        if error.is_builder() {
            return Failure::new(
                Code::Usage,
                format!("`{}` is no address: {error}; write --url http://host:port", self.base),
            );
        }
        let mut cause: &dyn std::error::Error = error;
        while let Some(source) = cause.source() {
            cause = source;
        }
        let base = &self.base;
        Failure::new(Code::NoNode, format!("no node answers at {base} ({cause}). Try: tandem up"))
    }
}

/// The base address without `/v1` and without a slash at its end.
fn base(url: Option<&str>, state: &Path) -> Result<String, Failure> {
    let noted = state::running(state).map(|running| running.api);
    let url = url.map(str::to_owned).or(noted).unwrap_or_else(|| DEFAULT_URL.to_owned());
    let url = root(&url);
    if url.starts_with("https://") {
        let message = "a node speaks plain HTTP; put a proxy in front of it for TLS, and give --url http://…";
        return Err(Failure::new(Code::Usage, message));
    }
    Ok(if url.contains("://") { url.to_owned() } else { format!("http://{url}") })
}

/// A URL without `/v1` and without a slash at its end.
fn root(url: &str) -> &str {
    let url = url.trim().trim_end_matches('/');
    url.strip_suffix("/v1").unwrap_or(url).trim_end_matches('/')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses() {
        let dir = tempfile::tempdir().unwrap();
        for (url, expected) in [
            (None, "http://127.0.0.1:8080"),
            (Some("http://h:1/v1/"), "http://h:1"),
            (Some("http://h:1/"), "http://h:1"),
            (Some("h:1"), "http://h:1"),
            (Some("localhost:8080"), "http://localhost:8080"),
        ] {
            assert_eq!(base(url, dir.path()).unwrap(), expected);
        }
        assert!(base(Some("https://h"), dir.path()).is_err());
        std::fs::write(dir.path().join("up.json"), r#"{"api":"http://127.0.0.1:9/v1","pid":1}"#).unwrap();
        assert_eq!(base(None, dir.path()).unwrap(), "http://127.0.0.1:9");
    }
}
