//! Who may use the API: the bearer key where one is set; without one, only callers that address
//! the node itself, so that no web page reaches it through a DNS name of its own (rebinding).

use std::net::IpAddr;
use std::sync::Arc;

use axum::extract::{Request, State};
use axum::http::{HeaderMap, Uri, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};

use super::error::ApiError;
use super::fields::short;
use super::{Api, Hosts};
use crate::http::Connection;

/// Holds the key where there is no bearer key.
const API_KEY: &str = "x-api-key";

/// Lets a request through or answers 401 or 403.
pub(crate) async fn check(State(api): State<Arc<Api>>, request: Request, next: Next) -> Response {
    let verdict = match &api.options.api_key {
        Some(key) => check_key(key, request.headers()),
        None if api.options.any_host => Ok(()),
        None => check_host(request.uri(), request.headers(), &api.options.hosts),
    };
    // On a connection beyond the bound only `/health` is answered.
    if request.extensions().get::<Arc<Connection>>().is_some_and(|connection| connection.is_of_reserve()) {
        return ApiError::too_many_connections().into_response();
    }
    match verdict {
        Ok(()) => next.run(request).await,
        Err(error) => error.into_response(),
    }
}

fn check_key(key: &str, headers: &HeaderMap) -> Result<(), ApiError> {
    const HINT: &str = "send the header `authorization: Bearer <key>`";
    // Anthropic's clients have a header of their own.
    let given = match (headers.get(API_KEY), headers.get(header::AUTHORIZATION)) {
        (Some(given), _) => given.as_bytes().trim_ascii(),
        (None, Some(given)) => match given.as_bytes().split_at_checked(7) {
            Some((scheme, token)) if scheme.eq_ignore_ascii_case(b"bearer ") => token.trim_ascii(),
            _ => return Err(ApiError::unauthorized(&format!("the authorization is not a bearer key; {HINT}"))),
        },
        (None, None) => return Err(ApiError::unauthorized(&format!("this node needs an API key; {HINT}"))),
    };
    // Digests compare in constant time, and their length says nothing of the key's.
    if blake3::hash(given) == blake3::hash(key.as_bytes()) {
        Ok(())
    } else {
        Err(ApiError::unauthorized("the API key is not this node's"))
    }
}

fn check_host(uri: &Uri, headers: &HeaderMap, hosts: &Hosts) -> Result<(), ApiError> {
    let named = headers.get(header::HOST).map(|host| String::from_utf8_lossy(host.as_bytes()).into_owned());
    let Some(host) = named.or_else(|| uri.authority().map(ToString::to_string)) else { return Ok(()) };
    let name = name_of(&host);
    if is_own_name(&name) || hosts.contains(&name) {
        return Ok(());
    }
    let message = format!(
        "this node is not called `{}`; use its IP address or localhost, list the name in the setting `api.hosts`, or \
         start it with an API key",
        short(&host)
    );
    Err(ApiError::forbidden("host_not_allowed", message))
}

/// The name in a `host` header: without port, brackets and a dot at its end, in lower case.
fn name_of(host: &str) -> String {
    let name = match host.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
        Some((address, _)) => address,
        None => host.rsplit_once(':').map_or(host, |(name, _)| name),
    };
    name.trim_end_matches('.').to_ascii_lowercase()
}

/// True for IP addresses and `localhost`, names that no DNS server can point elsewhere.
fn is_own_name(name: &str) -> bool {
    name.parse::<IpAddr>().is_ok() || name == "localhost" || name.ends_with(".localhost")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hosts() {
        for host in
            ["127.0.0.1:8080", "localhost", "LOCALHOST:1", "localhost.:1", "[::1]:8080", "10.0.0.7:80", "a.localhost:9"]
        {
            assert!(is_own_name(&name_of(host)), "{host}");
        }
        for host in [
            "evil.example",
            "evil.example:8080",
            "localhost.evil.example",
            "127.0.0.1.evil.example:80",
            "",
            "notlocalhost",
        ] {
            assert!(!is_own_name(&name_of(host)), "{host}");
        }
    }

    #[test]
    fn keys() {
        let with = |value: &str| HeaderMap::from_iter([(header::AUTHORIZATION, value.parse().unwrap())]);
        assert!(check_key("secret", &with("Bearer secret")).is_ok());
        assert!(check_key("secret", &with("bearer  secret ")).is_ok());
        for wrong in ["Bearer secre", "Bearer secrets", "Bearer", "Bearer ", "Basic secret", "secret"] {
            let error = check_key("secret", &with(wrong)).unwrap_err();
            assert_eq!((error.status.as_u16(), error.code), (401, Some("invalid_api_key")), "{wrong}");
        }
        assert!(check_key("secret", &HeaderMap::new()).is_err());
        let own = |value: &str| HeaderMap::from_iter([(API_KEY.parse().unwrap(), value.parse().unwrap())]);
        assert!(check_key("secret", &own("secret")).is_ok());
        assert!(check_key("secret", &own("Bearer secret")).is_err());
    }
}
