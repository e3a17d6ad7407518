//! Requests over HTTP: kept connections, bounds on what comes back, and on how long it is waited for.

use std::collections::VecDeque;
use std::time::{Duration, SystemTime};

use reqwest::header::{AUTHORIZATION, HeaderMap, HeaderValue, RETRY_AFTER};
use reqwest::{Client, Response, Url};
use serde_json::Value;

use crate::fault::Fault;
use crate::sse::Events;

/// Longest body or event, bytes: a distribution over 250 000 tokens as JSON, with room.
const BODY_BYTES_MAX: usize = 64 << 20;

/// Longest body of an error that is read.
const ERROR_BYTES_MAX: usize = 64 << 10;

const CONNECT_MAX: Duration = Duration::from_secs(5);

/// Waiting for an answer that is not part of a stream, and for the next piece of it.
const ANSWER_MAX: Duration = Duration::from_secs(30);

/// Connections without a request are kept so long: less than servers do, so that a request seldom meets one that
/// the server is just closing.
const IDLE_MAX: Duration = Duration::from_secs(4);

/// A key that an engine wants; shown nowhere.
#[derive(Clone)]
pub struct Key(String);

impl Key {
    /// A key as it stands in a file or an environment variable.
    #[must_use]
    pub fn new(text: &str) -> Self {
        Self(text.trim().to_owned())
    }
}

impl std::fmt::Debug for Key {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Key")
    }
}

/// Where an engine is.
#[derive(Clone)]
pub struct Address {
    client: Client,
    url: Url,
}

impl std::fmt::Debug for Address {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Address").field(&self.shown()).finish()
    }
}

impl Address {
    /// The engine at `url`, whose paths follow after what it says. Proxies are taken from the environment, roots
    /// of trust from the system.
    ///
    /// # Errors
    /// [`Fault::Refused`] for what is no `http` or `https` URL, or a key that no header can carry.
    pub fn new(url: &str, key: Option<&Key>) -> Result<Self, Fault> {
        let refuse = |text: String| Fault::Refused { status: 0, text };
        let mut url = Url::parse(url).map_err(|e| refuse(format!("{url} is no URL: {e}")))?;
        if !matches!(url.scheme(), "http" | "https") || url.host().is_none() {
            return Err(refuse(format!("{url} is no http:// or https:// URL")));
        }
        // People copy the address that OpenAI's clients take.
        let path = url.path().trim_end_matches('/').trim_end_matches("/v1").to_owned();
        url.set_path(&path);
        let mut headers = HeaderMap::new();
        if let Some(Key(key)) = key {
            let mut value = HeaderValue::try_from(format!("Bearer {key}"))
                .map_err(|_| refuse("the key has characters that no header can carry".into()))?;
            value.set_sensitive(true);
            headers.insert(AUTHORIZATION, value);
        }
        let client = Client::builder()
            .default_headers(headers)
            .connect_timeout(CONNECT_MAX)
            .pool_idle_timeout(IDLE_MAX)
            .tcp_nodelay(true)
            .build()
            .map_err(|e| refuse(format!("no HTTP client: {e}")))?;
        Ok(Self { client, url })
    }

    /// The URL, without what may be secret in it.
    #[must_use]
    pub fn shown(&self) -> String {
        let mut url = self.url.clone();
        let _ = url.set_username("").and_then(|()| url.set_password(None));
        url.set_query(None);
        url.to_string().trim_end_matches('/').to_owned()
    }

    fn at(&self, path: &str) -> Url {
        let mut url = self.url.clone();
        url.set_path(&format!("{}{path}", self.url.path().trim_end_matches('/')));
        url
    }

    /// What a route says.
    pub(crate) async fn get(&self, path: &str) -> Result<Value, Fault> {
        let sent = self.client.get(self.at(path)).send();
        let response = within(ANSWER_MAX, sent).await?.map_err(|e| gone(&e))?;
        whole(checked(path, response).await?).await
    }

    /// What a route answers to a body, whole.
    pub(crate) async fn post(&self, path: &str, body: &Value) -> Result<Value, Fault> {
        whole(self.begin(path, body, ANSWER_MAX).await?).await
    }

    /// The events of a route's answer, whose headers come within `limit`.
    pub(crate) async fn stream(&self, path: &str, body: &Value, limit: Duration) -> Result<EventStream, Fault> {
        let response = self.begin(path, body, limit).await?;
        let is_stream = |h: &HeaderValue| h.to_str().is_ok_and(|kind| kind.starts_with("text/event-stream"));
        if !response.headers().get(reqwest::header::CONTENT_TYPE).is_some_and(is_stream) {
            return Err(Fault::Unexpected(format!("{path} answers no event stream")));
        }
        Ok(EventStream { response, events: Events::new(BODY_BYTES_MAX), ready: VecDeque::new() })
    }

    async fn begin(&self, path: &str, body: &Value, limit: Duration) -> Result<Response, Fault> {
        let sent = self.client.post(self.at(path)).json(body).send();
        let response = within(limit, sent).await?.map_err(|e| gone(&e))?;
        checked(path, response).await
    }
}

/// An answer that comes in events. Dropped, it closes the connection, by which engines know that no client waits.
#[derive(Debug)]
pub(crate) struct EventStream {
    response: Response,
    events: Events,
    ready: VecDeque<String>,
}

impl EventStream {
    /// Data of the next event, if it comes within `limit`; none at the end of the body.
    pub(crate) async fn next(&mut self, limit: Duration) -> Result<Option<String>, Fault> {
        loop {
            if let Some(event) = self.ready.pop_front() {
                return Ok(Some(event));
            }
            match within(limit, self.response.chunk()).await?.map_err(|e| gone(&e))? {
                Some(piece) => {
                    let events = self.events.push(&piece);
                    self.ready.extend(events.map_err(|e| Fault::Unexpected(e.to_string()))?);
                }
                None => return Ok(None),
            }
        }
    }
}

async fn within<T>(limit: Duration, work: impl Future<Output = T>) -> Result<T, Fault> {
    tokio::time::timeout(limit, work).await.map_err(|_| Fault::Silent(limit))
}

/// The body of a 200, or the fault that another status stands for.
async fn checked(path: &str, response: Response) -> Result<Response, Fault> {
    let status = response.status();
    if status.is_success() {
        return Ok(response);
    }
    let retry_after = response.headers().get(RETRY_AFTER).and_then(|v| v.to_str().ok()).map(str::to_owned);
    // The status says enough where the body cannot be read.
    let body = bytes_of(response, ERROR_BYTES_MAX).await.unwrap_or_default();
    Err(Fault::of_answer(path, status.as_u16(), retry_after.as_deref(), &body, SystemTime::now()))
}

async fn whole(response: Response) -> Result<Value, Fault> {
    let path = response.url().path().to_owned();
    let body = bytes_of(response, BODY_BYTES_MAX).await?;
    let value: Value = serde_json::from_slice(&body).map_err(|e| Fault::Unexpected(format!("{path}: {e}")))?;
    match value.get("error") {
        Some(error) if !error.is_null() => Err(Fault::of_error(&path, error)),
        _ => Ok(value),
    }
}

async fn bytes_of(mut response: Response, bytes_max: usize) -> Result<Vec<u8>, Fault> {
    let mut body = Vec::new();
    while let Some(piece) = within(ANSWER_MAX, response.chunk()).await?.map_err(|e| gone(&e))? {
        if body.len() + piece.len() > bytes_max {
            return Err(Fault::Unexpected(format!("a body of more than {bytes_max} bytes")));
        }
        body.extend_from_slice(&piece);
    }
    Ok(body)
}

/// Without the URL, which may carry a key.
fn gone(error: &reqwest::Error) -> Fault {
    let mut text = String::new();
    let mut cause: Option<&dyn std::error::Error> = std::error::Error::source(error);
    while let Some(inner) = cause {
        text = inner.to_string();
        cause = inner.source();
    }
    Fault::Gone(if text.is_empty() { "the request failed".into() } else { text })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_what_people_copy() {
        let at = |url: &str| Address::new(url, None).map(|a| a.at("/props").to_string());
        for url in ["http://gpu:8000", "http://gpu:8000/", "http://gpu:8000/v1", "http://gpu:8000/v1/"] {
            assert_eq!(at(url).expect("a URL"), "http://gpu:8000/props");
        }
        assert_eq!(at("https://host/engine/v1").expect("a URL"), "https://host/engine/props");
        for url in ["gpu:8000", "ftp://gpu", "http://", "unix:/x"] {
            assert!(matches!(at(url), Err(Fault::Refused { .. })), "{url}");
        }
    }

    #[test]
    fn nothing_secret_is_shown() {
        let key = Key::new("s3cret\n");
        let address = Address::new("http://me:s3cret@gpu:8000/v1?token=s3cret", Some(&key)).expect("an address");
        assert_eq!(address.shown(), "http://gpu:8000");
        assert!(!format!("{key:?} {address:?}").contains("s3cret"), "{key:?} {address:?}");
        assert!(matches!(Address::new("http://gpu", Some(&Key::new("a\nb"))), Err(Fault::Refused { .. })));
    }
}
