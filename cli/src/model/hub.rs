//! The hub's API: what a repository holds at a revision, and its files' bytes.
//! <https://huggingface.co/docs/hub/api>. Any server that speaks it will do (`HF_ENDPOINT`).

use std::time::Duration;

use reqwest::header::{AUTHORIZATION, HeaderMap, HeaderValue, RANGE};
use reqwest::{Client, Response, StatusCode};
use serde::Deserialize;
use tandem_models::is_file;
use tandem_models::repo::{HubName, RepoId};
use tandem_models::store::FILES_MAX;

use crate::failure::{Code, Failure, OrFail as _};

/// Where the hub is, unless `HF_ENDPOINT` says otherwise.
const ENDPOINT: &str = "https://huggingface.co";
/// Largest answer of the API, bytes.
const ANSWER_BYTES_MAX: usize = 32 << 20;
/// Longest wait for a connection.
const CONNECT_MAX: Duration = Duration::from_secs(15);
/// Longest silence while something is read.
const SILENCE_MAX: Duration = Duration::from_secs(30);

/// A client of one hub.
pub(super) struct Hub {
    client: Client,
    endpoint: String,
}

/// What a repository holds at a revision.
#[derive(Deserialize)]
pub(super) struct Listing {
    /// The commit that the revision stands for.
    pub(super) sha: String,
    /// The files.
    pub(super) siblings: Vec<Remote>,
}

/// A file of a repository.
#[derive(Clone, Debug, Deserialize)]
pub(super) struct Remote {
    /// Path inside the repository.
    #[serde(rename = "rfilename")]
    pub(super) name: String,
    /// Size, bytes.
    pub(super) size: Option<u64>,
    /// Git's id of the content, or of the pointer to it.
    #[serde(rename = "blobId")]
    blob_id: Option<String>,
    /// What large files have.
    lfs: Option<Large>,
}

#[derive(Clone, Debug, Deserialize)]
struct Large {
    sha256: String,
}

/// What a file's bytes must hash to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Checksum {
    /// SHA-256 of the bytes.
    Sha256(String),
    /// Git's SHA-1 of a small file.
    Git(String),
}

impl Checksum {
    /// The name of the blob in the store, which is the hub's etag.
    pub(super) fn etag(&self) -> &str {
        match self {
            Self::Sha256(hex) | Self::Git(hex) => hex,
        }
    }
}

impl Remote {
    /// The file's checksum.
    pub(super) fn checksum(&self) -> Result<Checksum, Failure> {
        let hex = |text: &str, digits: usize| text.len() == digits && text.bytes().all(|b| b.is_ascii_hexdigit());
        match (&self.lfs, &self.blob_id) {
            (Some(large), _) if hex(&large.sha256, 64) => Ok(Checksum::Sha256(large.sha256.to_ascii_lowercase())),
            (None, Some(id)) if hex(id, 40) => Ok(Checksum::Git(id.to_ascii_lowercase())),
            _ => Err(Failure::new(
                Code::Failed,
                format!("the hub gives no checksum for {}; nothing was fetched", self.name),
            )),
        }
    }

    /// The file's size.
    pub(super) fn bytes(&self) -> Result<u64, Failure> {
        self.size.ok_or_else(|| Failure::new(Code::Failed, format!("the hub gives no size for {}", self.name)))
    }
}

/// True if `HF_HUB_OFFLINE` forbids the network.
pub(super) fn is_offline() -> bool {
    std::env::var("HF_HUB_OFFLINE")
        .is_ok_and(|value| matches!(value.to_ascii_uppercase().as_str(), "1" | "ON" | "YES" | "TRUE"))
}

impl Hub {
    /// The hub that the environment names (`HF_ENDPOINT`), with the token it gives (`HF_TOKEN`).
    pub(super) fn from_env() -> Result<Self, Failure> {
        let var = |name: &str| std::env::var(name).ok().filter(|value| !value.is_empty());
        let endpoint = var("HF_ENDPOINT").unwrap_or_else(|| ENDPOINT.into()).trim_end_matches('/').to_owned();
        let mut headers = HeaderMap::new();
        if let Some(token) = var("HF_TOKEN") {
            let bad = |_| Failure::new(Code::Config, "HF_TOKEN holds characters that no token has");
            let mut value = HeaderValue::from_str(&format!("Bearer {token}")).map_err(bad)?;
            // Kept out of logs; redirects to other hosts do not get it.
            value.set_sensitive(true);
            headers.insert(AUTHORIZATION, value);
        }
        let client = Client::builder()
            .user_agent(concat!("tandem/", env!("CARGO_PKG_VERSION")))
            .connect_timeout(CONNECT_MAX)
            .read_timeout(SILENCE_MAX)
            .default_headers(headers)
            .build()
            .or_fail(Code::Failed)?;
        Ok(Self { client, endpoint })
    }

    /// What the repository holds.
    pub(super) async fn listing(&self, hub: &HubName) -> Result<Listing, Failure> {
        let revision = hub.revision.replace('/', "%2F");
        let url = format!("{}/api/models/{}/revision/{revision}?blobs=true", self.endpoint, hub.repo);
        let mut response = self.client.get(&url).send().await.map_err(|e| self.unreachable(&e))?;
        if !response.status().is_success() {
            return Err(refused(&format!("{hub}"), response.status()));
        }
        let mut body = Vec::new();
        while let Some(chunk) = response.chunk().await.map_err(|e| self.unreachable(&e))? {
            body.extend_from_slice(&chunk);
            if body.len() > ANSWER_BYTES_MAX {
                return Err(Failure::new(
                    Code::Failed,
                    format!("the hub's answer has more than {ANSWER_BYTES_MAX} bytes"),
                ));
            }
        }
        let listing: Listing = serde_json::from_slice(&body)
            .map_err(|e| Failure::new(Code::Failed, format!("{} does not speak the hub's API: {e}", self.endpoint)))?;
        let is_commit = listing.sha.len() == 40 && listing.sha.bytes().all(|b| b.is_ascii_hexdigit());
        if !is_commit || listing.siblings.len() > FILES_MAX {
            return Err(Failure::new(Code::Failed, format!("{} gives no usable listing of {hub}", self.endpoint)));
        }
        // The names become paths below the store.
        if let Some(bad) = listing.siblings.iter().find(|file| !is_file(&file.name)) {
            let message = format!(
                "{} lists a file of {hub} as {:?}, which leads out of the store; nothing was fetched, and that server is not to be trusted",
                self.endpoint, bad.name
            );
            return Err(Failure::new(Code::Failed, message));
        }
        Ok(listing)
    }

    /// The bytes of a file from `from` on.
    pub(super) async fn open(&self, repo: &RepoId, commit: &str, file: &str, from: u64) -> Result<Response, Failure> {
        let url = format!("{}/{repo}/resolve/{commit}/{file}", self.endpoint);
        let mut request = self.client.get(&url);
        if from > 0 {
            request = request.header(RANGE, format!("bytes={from}-"));
        }
        let response = request.send().await.map_err(|e| self.unreachable(&e))?;
        match response.status() {
            StatusCode::OK | StatusCode::PARTIAL_CONTENT | StatusCode::RANGE_NOT_SATISFIABLE => Ok(response),
            status => Err(refused(file, status)),
        }
    }

    fn unreachable(&self, error: &reqwest::Error) -> Failure {
        let mut cause: &dyn std::error::Error = error;
        while let Some(source) = cause.source() {
            cause = source;
        }
        Failure::new(Code::NoNode, format!("{} cannot be reached: {cause}", self.endpoint))
    }
}

fn refused(what: &str, status: StatusCode) -> Failure {
    let hint = match status {
        StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => {
            "it is private, gated or does not exist; set HF_TOKEN to a token that may read it"
        }
        StatusCode::NOT_FOUND => "there is no such repository, revision or file; check the name",
        StatusCode::TOO_MANY_REQUESTS => "too many requests; try again later",
        _ => "try again later",
    };
    Failure::new(Code::Refused, format!("the hub refuses {what} ({status}): {hint}"))
}
