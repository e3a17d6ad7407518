//! The key material of the control plane's mutual TLS.

use std::fmt;

/// PEM texts for one end of a mutual TLS connection.
#[derive(Clone)]
pub struct TlsPem {
    /// This end's certificate chain.
    pub certificate: String,
    /// This end's private key.
    pub key: String,
    /// The fleet's CA, which the other end's certificate must come from.
    pub ca: String,
}

impl fmt::Debug for TlsPem {
    /// Without the key.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TlsPem").finish_non_exhaustive()
    }
}
