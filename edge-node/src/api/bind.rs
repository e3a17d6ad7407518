//! Where the API may listen.

use std::net::SocketAddr;

/// Why an address is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BindError {
    /// Anyone on the network could use the node.
    #[error(
        "{0} can be reached from other machines and no API key is set; set one (`--api-key` or TANDEM_API_KEY), \
         listen on 127.0.0.1, or accept the risk with `--insecure`"
    )]
    OpenToNetwork(SocketAddr),
    /// A key that no client can send, or that is as good as none.
    #[error("the API key must have from 1 to {0} visible ASCII characters")]
    BadKey(usize),
}

/// Longest API key, bytes.
pub const API_KEY_BYTES_MAX: usize = 512;

/// Checks the bind rule: loopback is always fine, anything else needs a key or an explicit
/// `insecure`.
///
/// # Errors
/// Says what to change.
pub fn check_bind(addr: SocketAddr, api_key: Option<&str>, insecure: bool) -> Result<(), BindError> {
    if api_key.is_some_and(|key| {
        key.is_empty() || key.len() > API_KEY_BYTES_MAX || !key.bytes().all(|byte| byte.is_ascii_graphic())
    }) {
        return Err(BindError::BadKey(API_KEY_BYTES_MAX));
    }
    if addr.ip().to_canonical().is_loopback() || api_key.is_some() || insecure {
        return Ok(());
    }
    Err(BindError::OpenToNetwork(addr))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loopback_or_a_key_or_insecure() {
        let table = [
            ("127.0.0.1:8080", None, false, true),
            ("127.9.9.9:1", None, false, true),
            ("[::1]:8080", None, false, true),
            ("[::ffff:127.0.0.1]:8080", None, false, true),
            ("0.0.0.0:8080", None, false, false),
            ("[::]:8080", None, false, false),
            ("192.168.1.4:8080", None, false, false),
            ("192.168.1.4:8080", Some("secret"), false, true),
            ("192.168.1.4:8080", None, true, true),
            ("192.168.1.4:8080", Some(""), true, false),
            ("127.0.0.1:8080", Some("a b"), false, false),
        ];
        for (addr, key, insecure, fine) in table {
            let result = check_bind(addr.parse().unwrap(), key, insecure);
            assert_eq!(result.is_ok(), fine, "{addr} {key:?} {insecure}: {result:?}");
        }
    }
}
