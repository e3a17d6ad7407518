//! Who may call the API beside its own page and local programs: pages of other origins (CORS), and
//! callers that know the node by a name of its own.

use std::time::Duration;

use axum::http::{HeaderName, HeaderValue, Method, header};
use tower_http::cors::{AllowHeaders, AllowOrigin, AllowPrivateNetwork, CorsLayer};

/// Most origins and most names that settings may list.
const LISTED_MAX: usize = 64;
/// Every origin.
const ANY: &str = "*";
/// How long a browser may remember what it was allowed, seconds.
const REMEMBER_S: u64 = 600;
/// Response headers that a page of another origin may read.
const EXPOSED: [&str; 8] = [
    "x-request-id",
    "x-tandem-mode",
    "x-tandem-reason",
    "x-tandem-policy",
    "x-tandem-degraded",
    "x-tandem-notice",
    "retry-after",
    "retry-after-ms",
];

/// Why a setting is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum OriginError {
    /// Not what browsers send.
    #[error(
        "api.cors_origins: `{0}` is no origin; write it as browsers do, such as `https://app.example:8443`, or `*` for every one"
    )]
    Origin(String),
    /// Not a name.
    #[error("api.hosts: `{0}` is no host name; write it without scheme, port and path, such as `tandem.example`")]
    Host(String),
    /// Too many entries.
    #[error("{0} has more than {LISTED_MAX} entries")]
    TooMany(&'static str),
}

/// Origins whose pages may use the API; none by default.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Origins(Vec<HeaderValue>);

/// Names that callers may know the node by, beside its addresses and `localhost`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Hosts(Vec<String>);

impl Origins {
    /// From a setting.
    ///
    /// # Errors
    /// Names the entry that is no origin.
    pub fn parse(listed: &[String]) -> Result<Self, OriginError> {
        if listed.len() > LISTED_MAX {
            return Err(OriginError::TooMany("api.cors_origins"));
        }
        let origin = |text: &String| {
            let refused = || OriginError::Origin(text.clone());
            let text = text.trim();
            let text = text.strip_suffix('/').unwrap_or(text).to_ascii_lowercase();
            let (scheme, host) = text.split_once("://").unwrap_or_default();
            let is_host = !host.is_empty() && host.bytes().all(|b| b.is_ascii_alphanumeric() || b"-._:[]".contains(&b));
            let is_scheme =
                !scheme.is_empty() && scheme.bytes().all(|b| b.is_ascii_alphanumeric() || b"+-.".contains(&b));
            if text != ANY && !(is_scheme && is_host) {
                return Err(refused());
            }
            HeaderValue::from_str(&text).map_err(|_| refused())
        };
        listed.iter().map(origin).collect::<Result<_, _>>().map(Self)
    }

    /// What answers browsers; nothing where no origin is allowed.
    pub(crate) fn layer(&self) -> Option<CorsLayer> {
        let allowed = match &self.0[..] {
            [] => return None,
            origins if origins.iter().any(|origin| origin == ANY) => AllowOrigin::any(),
            origins => AllowOrigin::list(origins.iter().cloned()),
        };
        Some(
            CorsLayer::new()
                .allow_origin(allowed)
                .allow_methods([Method::GET, Method::POST, Method::DELETE])
                .allow_headers(AllowHeaders::mirror_request())
                .expose_headers(EXPOSED.map(HeaderName::from_static))
                .allow_private_network(AllowPrivateNetwork::yes())
                .max_age(Duration::from_secs(REMEMBER_S))
                .vary([header::ORIGIN, header::ACCESS_CONTROL_REQUEST_METHOD, header::ACCESS_CONTROL_REQUEST_HEADERS]),
        )
    }
}

impl Hosts {
    /// From a setting.
    ///
    /// # Errors
    /// Names the entry that is no host name.
    pub fn parse(listed: &[String]) -> Result<Self, OriginError> {
        if listed.len() > LISTED_MAX {
            return Err(OriginError::TooMany("api.hosts"));
        }
        let host = |text: &String| {
            let name = text.trim().trim_end_matches('.').to_ascii_lowercase();
            let fine = !name.is_empty() && name.bytes().all(|b| b.is_ascii_alphanumeric() || b"-._".contains(&b));
            if fine { Ok(name) } else { Err(OriginError::Host(text.clone())) }
        };
        listed.iter().map(host).collect::<Result<_, _>>().map(Self)
    }

    /// Whether a name, in lower case and without a dot at its end, is listed.
    pub(crate) fn contains(&self, name: &str) -> bool {
        self.0.iter().any(|host| host == name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn listed(texts: &[&str]) -> Vec<String> {
        texts.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn settings_are_origins_and_names_or_refused_by_name() {
        let fine =
            ["https://app.example", "http://localhost:5173/", "HTTP://[::1]:8080", "*", "chrome-extension://abc"];
        assert_eq!(Origins::parse(&listed(&fine)).expect("origins").0[1], "http://localhost:5173");
        for wrong in ["", "app.example", "https://", "https://a/b", "null", "https://a b", "://a"] {
            assert_eq!(Origins::parse(&listed(&[wrong])), Err(OriginError::Origin(wrong.into())));
        }
        let hosts = Hosts::parse(&listed(&["Tandem.Example.", "box"])).expect("names");
        assert!(hosts.contains("tandem.example") && hosts.contains("box") && !hosts.contains("example"));
        for wrong in ["", "http://a", "a:80", "a/b", "*"] {
            assert_eq!(Hosts::parse(&listed(&[wrong])), Err(OriginError::Host(wrong.into())));
        }
        let many = vec!["a".to_owned(); LISTED_MAX + 1];
        assert_eq!(Hosts::parse(&many), Err(OriginError::TooMany("api.hosts")));
    }
}
