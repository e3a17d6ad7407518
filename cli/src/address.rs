//! Addresses to listen on: `127.0.0.1:8080`, `[::1]:8080`, `localhost:8080`.

use std::net::{SocketAddr, ToSocketAddrs as _};

use serde::{Deserialize as _, Deserializer};

/// Reads an address, and looks a name up.
///
/// # Errors
/// Says what is wrong and what would be right.
pub(crate) fn listen(text: &str) -> Result<SocketAddr, String> {
    let text = text.trim();
    if let Ok(address) = text.parse() {
        return Ok(address);
    }
    let bad =
        |why: &str| format!("`{text}` is no address ({why}); write host:port, e.g. 127.0.0.1:8080 or localhost:0");
    let (host, port) = text.rsplit_once(':').ok_or_else(|| bad("it has no port"))?;
    let port: u16 = port.parse().map_err(|_| bad("its port is no number up to 65535"))?;
    if host.is_empty() || host.contains([':', '/', '[', ']']) {
        return Err(bad("its host is none"));
    }
    let found: Vec<SocketAddr> = (host, port).to_socket_addrs().map_err(|e| bad(&e.to_string()))?.collect();
    // What is printed for people and other programs is IPv4 where there is a choice.
    let first = found.iter().find(|address| address.is_ipv4()).or(found.first());
    first.copied().ok_or_else(|| bad("the name has no address"))
}

/// [`listen`], for a setting.
pub(crate) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<SocketAddr, D::Error> {
    listen(&String::deserialize(deserializer)?).map_err(serde::de::Error::custom)
}

/// [`listen`], for a setting that may be absent.
pub(crate) fn deserialize_some<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<SocketAddr>, D::Error> {
    deserialize(deserializer).map(Some)
}

/// The address at which a program on this machine reaches one that listens on `address`.
pub(crate) fn reachable(mut address: SocketAddr) -> SocketAddr {
    if address.ip().is_unspecified() {
        address.set_ip(match address {
            SocketAddr::V4(_) => std::net::Ipv4Addr::LOCALHOST.into(),
            SocketAddr::V6(_) => std::net::Ipv6Addr::LOCALHOST.into(),
        });
    }
    address
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_and_names() {
        for (text, expected) in [
            ("127.0.0.1:8080", "127.0.0.1:8080"),
            ("localhost:8080", "127.0.0.1:8080"),
            (" localhost:0 ", "127.0.0.1:0"),
            ("[::1]:80", "[::1]:80"),
            ("0.0.0.0:1", "0.0.0.0:1"),
        ] {
            assert_eq!(listen(text).map(|address| address.to_string()).as_deref(), Ok(expected), "{text}");
        }
        for text in
            ["localhost", "8080", ":8080", "localhost:http", "localhost:99999", "http://localhost:80", "::1:x", ""]
        {
            let problem = listen(text).unwrap_err();
            assert!(problem.contains("host:port"), "{text}: {problem}");
        }
    }

    #[test]
    fn what_listens_everywhere_is_reached_on_this_machine() {
        for (address, expected) in
            [("0.0.0.0:80", "127.0.0.1:80"), ("[::]:80", "[::1]:80"), ("10.0.0.7:80", "10.0.0.7:80")]
        {
            assert_eq!(reachable(address.parse().unwrap()).to_string(), expected);
        }
    }
}
