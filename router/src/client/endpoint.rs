//! Where a router is.

use std::{fmt, str::FromStr, time::Duration};

use tonic::transport::{self, Certificate, Channel, ClientTlsConfig, Identity};

use super::{CALL_TIMEOUT, CONNECT_TIMEOUT, ClientError};
use crate::tls::TlsPem;

/// How often an idle connection is checked.
const KEEPALIVE: Duration = Duration::from_secs(10);

/// A router's address: `host:port`, or `server-name@host:port` where the certificate names
/// something else than the host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Endpoint {
    server_name: Option<String>,
    authority: String,
}

impl FromStr for Endpoint {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let text = text.trim();
        let rest = text.strip_prefix("https://").unwrap_or(text).trim_end_matches('/');
        let (server_name, authority) = match rest.split_once('@') {
            Some((name, authority)) => (Some(name), authority),
            None => (None, rest),
        };
        if server_name.is_some_and(str::is_empty) {
            return Err("has an empty server name".into());
        }
        let parsed = authority.parse::<tonic::codegen::http::uri::Authority>();
        let parsed = parsed.map_err(|error| format!("is no address ({error})"))?;
        if parsed.host().is_empty() || parsed.port_u16().is_none_or(|port| port == 0) {
            return Err("lacks a host or a port".into());
        }
        Ok(Self { server_name: server_name.map(Into::into), authority: authority.into() })
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.server_name {
            Some(name) => write!(f, "{name}@{}", self.authority),
            None => f.write_str(&self.authority),
        }
    }
}

impl Endpoint {
    /// A channel that connects when it is first used, and again after a loss.
    pub(super) fn channel(&self, pem: &TlsPem) -> Result<Channel, ClientError> {
        let mut tls = ClientTlsConfig::new()
            .ca_certificate(Certificate::from_pem(&pem.ca))
            .identity(Identity::from_pem(&pem.certificate, &pem.key))
            .timeout(CONNECT_TIMEOUT);
        if let Some(name) = &self.server_name {
            tls = tls.domain_name(name);
        }
        let problem = |error: transport::Error| {
            let source = std::error::Error::source(&error).map(ToString::to_string);
            ClientError::Tls(source.unwrap_or_else(|| error.to_string()))
        };
        let endpoint = transport::Endpoint::from_shared(format!("https://{}", self.authority)).map_err(problem)?;
        let endpoint = endpoint
            .tls_config(tls)
            .map_err(problem)?
            .connect_timeout(CONNECT_TIMEOUT)
            .timeout(CALL_TIMEOUT)
            .tcp_nodelay(true)
            // A connection that died silently (a NAT that forgot it) would otherwise be used, and
            // time out, until TCP gives up a quarter of an hour later.
            .http2_keep_alive_interval(KEEPALIVE)
            .keep_alive_timeout(KEEPALIVE / 2)
            .keep_alive_while_idle(true);
        Ok(endpoint.connect_lazy())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_with_and_without_a_server_name() {
        for (text, name, authority) in [
            ("127.0.0.1:7400", None, "127.0.0.1:7400"),
            ("https://router.example:7400/", None, "router.example:7400"),
            (" router-a.tandem@10.0.0.1:7400 ", Some("router-a.tandem"), "10.0.0.1:7400"),
            ("[::1]:7400", None, "[::1]:7400"),
        ] {
            let parsed = text.parse::<Endpoint>().unwrap();
            assert_eq!((parsed.server_name.as_deref(), parsed.authority.as_str()), (name, authority));
        }
    }

    #[test]
    fn what_is_no_address_is_refused() {
        for text in ["", "localhost", "localhost:0", "localhost:99999", ":7400", "@localhost:7400", "a b:1", "[::1]"] {
            assert!(text.parse::<Endpoint>().is_err(), "{text:?} was taken");
        }
    }
}
