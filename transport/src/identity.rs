//! Who a node is: a certificate with a SPIFFE-style name, its key, and the CA it trusts.
//!
//! Every connection is mutual TLS. [`DevCa`] is the development CA under a state folder; a fleet
//! issues the same kind of certificates through the router's enrolment, so nothing else changes.

mod ca;
mod files;
mod reset;
mod verify;

use std::{fmt, path::PathBuf, str::FromStr, sync::Arc, time::SystemTime};

use rustls::{
    ClientConfig, RootCertStore, ServerConfig,
    pki_types::{CertificateDer, PrivateKeyDer},
};
use tandem_proto::{block::tenant_key, limits::ALPN};

pub use self::ca::{CA_CERT_FILE, CA_KEY_FILE, DEV_TENANT, DevCa};
use self::files::{read_text, write_private};
pub(crate) use self::{reset::ResetKey, verify::not_after};

/// Name of the certificate file of an [`Identity`] on disk.
pub const CERT_FILE: &str = "cert.pem";
/// Name of the key file of an [`Identity`] on disk.
pub const KEY_FILE: &str = "key.pem";
/// Name of the trusted CA's file of an [`Identity`] on disk.
pub const TRUST_FILE: &str = "trust.pem";
/// Longest tenant or node name, bytes: it is also a DNS label.
pub const NODE_NAME_BYTES_MAX: usize = 63;
/// Trust domain in every SPIFFE id.
pub const TRUST_DOMAIN: &str = "tandem";

/// Why an identity cannot be made, read or used.
#[derive(Debug, Clone, thiserror::Error)]
pub enum IdentityError {
    /// A file cannot be read.
    #[error("cannot read {}: {reason}; check the path and its permissions", path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// The system's words.
        reason: String,
    },
    /// A file cannot be written.
    #[error("cannot write {}: {reason}; check that the folder is writable and not full", path.display())]
    Unwritable {
        /// The file.
        path: PathBuf,
        /// The system's words.
        reason: String,
    },
    /// PEM or DER that does not parse.
    #[error("{what} is malformed: {reason}")]
    Malformed {
        /// Which part.
        what: &'static str,
        /// The parser's words.
        reason: String,
    },
    /// The validity has ended.
    #[error("the certificate of {name} has expired; issue a new one")]
    Expired {
        /// SPIFFE id of the certificate.
        name: String,
    },
    /// The validity has not begun.
    #[error("the certificate of {name} is not valid yet; check this machine's clock")]
    NotYetValid {
        /// SPIFFE id of the certificate.
        name: String,
    },
    /// Signed by another CA than the one beside it.
    #[error("the certificate of {name} is not signed by the CA it came with; issue it again")]
    WrongCa {
        /// SPIFFE id of the certificate.
        name: String,
    },
    /// Certificate and key do not belong together.
    #[error("the private key does not belong to the certificate of {name}; issue it again")]
    KeyMismatch {
        /// SPIFFE id of the certificate.
        name: String,
    },
    /// The certificate carries no SPIFFE id of this kind.
    #[error("the certificate names no node: expected a SAN like spiffe://tandem/default/edge/phone, found {found}")]
    NoSpiffeId {
        /// URIs found.
        found: String,
    },
    /// A tenant or node name that cannot stand in a certificate.
    #[error("{name:?} is not a node name: 1 to 63 of a-z, 0-9 and '-', not at the ends")]
    BadName {
        /// The name.
        name: String,
    },
    /// The TLS library refuses.
    #[error("TLS set-up failed: {reason}")]
    Tls {
        /// Its words.
        reason: String,
    },
}

/// Kind of a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Role {
    /// A device.
    Edge,
    /// A node with the large model.
    Cloud,
    /// A member of the control plane.
    Router,
    /// A person's command-line tool.
    Operator,
}

impl Role {
    /// Every role.
    pub const ALL: &'static [Self] = &[Self::Edge, Self::Cloud, Self::Router, Self::Operator];

    /// The word in the SPIFFE id.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Edge => "edge",
            Self::Cloud => "cloud",
            Self::Router => "router",
            Self::Operator => "operator",
        }
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Who a certificate says its holder is.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PeerIdentity {
    /// Tenant the node belongs to.
    pub tenant: String,
    /// Kind of the node.
    pub role: Role,
    /// Name of the node, unique in its tenant and role.
    pub name: String,
}

impl fmt::Display for PeerIdentity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "spiffe://{TRUST_DOMAIN}/{}/{}/{}", self.tenant, self.role, self.name)
    }
}

fn is_label(text: &str) -> bool {
    let inner = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-';
    (1..=NODE_NAME_BYTES_MAX).contains(&text.len())
        && text.bytes().all(inner)
        && !text.starts_with('-')
        && !text.ends_with('-')
}

impl PeerIdentity {
    /// A checked identity.
    ///
    /// # Errors
    /// [`IdentityError::BadName`] if tenant or name could not stand in a certificate.
    pub fn new(tenant: &str, role: Role, name: &str) -> Result<Self, IdentityError> {
        if let Some(bad) = [tenant, name].into_iter().find(|text| !is_label(text)) {
            return Err(IdentityError::BadName { name: bad.to_owned() });
        }
        Ok(Self { tenant: tenant.to_owned(), role, name: name.to_owned() })
    }

    /// Reads the SPIFFE id out of a certificate. Says nothing about who signed it.
    ///
    /// # Errors
    /// [`IdentityError::Malformed`] or [`IdentityError::NoSpiffeId`].
    pub fn of(cert: &CertificateDer<'_>) -> Result<Self, IdentityError> {
        verify::spiffe_id(cert)
    }

    /// DNS name in the node's certificate; what a client asks for.
    #[must_use]
    pub fn dns_name(&self) -> String {
        format!("{}.{TRUST_DOMAIN}", self.name)
    }
}

impl FromStr for PeerIdentity {
    type Err = IdentityError;

    fn from_str(uri: &str) -> Result<Self, IdentityError> {
        let none = || IdentityError::NoSpiffeId { found: uri.to_owned() };
        let path = uri.strip_prefix("spiffe://").ok_or_else(none)?;
        let mut parts = path.split('/');
        let (Some(TRUST_DOMAIN), Some(tenant), Some(role), Some(name), None) =
            (parts.next(), parts.next(), parts.next(), parts.next(), parts.next())
        else {
            return Err(none());
        };
        let role = *Role::ALL.iter().find(|r| r.as_str() == role).ok_or_else(none)?;
        Self::new(tenant, role, name)
    }
}

/// A node's certificate chain, private key and trusted CA; checked when made.
pub struct Identity {
    cert_pem: String,
    key_pem: String,
    ca_pem: String,
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
    roots: Arc<RootCertStore>,
    id: PeerIdentity,
    not_before: SystemTime,
    not_after: SystemTime,
    reset_key: ResetKey,
}

impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Never the key.
        f.debug_struct("Identity").field("id", &self.id).finish_non_exhaustive()
    }
}

impl Clone for Identity {
    fn clone(&self) -> Self {
        Self {
            cert_pem: self.cert_pem.clone(),
            key_pem: self.key_pem.clone(),
            ca_pem: self.ca_pem.clone(),
            chain: self.chain.clone(),
            key: self.key.clone_key(),
            roots: Arc::clone(&self.roots),
            id: self.id.clone(),
            not_before: self.not_before,
            not_after: self.not_after,
            reset_key: self.reset_key,
        }
    }
}

impl Identity {
    /// Parses and checks the three parts: the certificate (chain) is valid now, signed by the CA,
    /// fits the key and names a node.
    ///
    /// # Errors
    /// Any [`IdentityError`] about certificates.
    pub fn from_pem(cert_pem: &str, key_pem: &str, ca_pem: &str) -> Result<Self, IdentityError> {
        let parsed = verify::check(cert_pem, key_pem, ca_pem)?;
        Ok(Self {
            cert_pem: cert_pem.to_owned(),
            key_pem: key_pem.to_owned(),
            ca_pem: ca_pem.to_owned(),
            chain: parsed.chain,
            key: parsed.key,
            roots: parsed.roots,
            id: parsed.id,
            not_before: parsed.not_before,
            not_after: parsed.not_after,
            // The same after every start with this key.
            reset_key: ResetKey::derive(key_pem.as_bytes(), ""),
        })
    }

    /// Reads `cert.pem`, `key.pem` and `trust.pem` from `dir`.
    ///
    /// # Errors
    /// [`IdentityError::Unreadable`] or as [`Identity::from_pem`].
    pub fn load(dir: impl Into<PathBuf>) -> Result<Self, IdentityError> {
        let dir = dir.into();
        let read = |name| read_text(&dir.join(name));
        Self::from_pem(&read(CERT_FILE)?, &read(KEY_FILE)?, &read(TRUST_FILE)?)
    }

    /// Writes the three files into `dir`, each atomically, readable by the owner only.
    ///
    /// # Errors
    /// [`IdentityError::Unwritable`].
    pub fn save(&self, dir: impl Into<PathBuf>) -> Result<(), IdentityError> {
        let dir = dir.into();
        write_private(&dir.join(TRUST_FILE), &self.ca_pem)?;
        write_private(&dir.join(KEY_FILE), &self.key_pem)?;
        write_private(&dir.join(CERT_FILE), &self.cert_pem)
    }

    /// Who this is.
    #[must_use]
    pub fn id(&self) -> &PeerIdentity {
        &self.id
    }

    /// Key of the block ids of this node's tenant ([`tandem_proto::block::tenant_key`]).
    #[must_use]
    pub fn tenant_key(&self) -> [u8; 32] {
        tenant_key(&self.authority(), &self.id.tenant)
    }

    /// Public key of the first authority it trusts. A renewed certificate of an authority has the same one.
    pub(crate) fn authority(&self) -> Arc<[u8]> {
        self.roots.roots.first().map(|root| root.subject_public_key_info.as_ref().into()).unwrap_or_default()
    }

    /// When the certificate ends; renew at half-life.
    #[must_use]
    pub fn not_after(&self) -> SystemTime {
        self.not_after
    }

    /// Whether it is time for the next certificate at `now`: half of this one's time has passed, or a clock
    /// that was set back has not reached its beginning.
    #[must_use]
    pub fn renewal_is_due(&self, now: SystemTime) -> bool {
        let lifetime = self.not_after.duration_since(self.not_before).unwrap_or_default();
        now < self.not_before || now >= self.not_before + lifetime / 2
    }

    /// Of the connections of this node, over its restarts.
    pub(crate) fn reset_key(&self) -> &ResetKey {
        &self.reset_key
    }

    /// Certificate chain, PEM (for tonic's TLS).
    #[must_use]
    pub fn cert_pem(&self) -> &str {
        &self.cert_pem
    }

    /// Private key, PEM (for tonic's TLS). Never log it.
    #[must_use]
    pub fn key_pem(&self) -> &str {
        &self.key_pem
    }

    /// Trusted CA, PEM (for tonic's TLS).
    #[must_use]
    pub fn ca_pem(&self) -> &str {
        &self.ca_pem
    }

    pub(crate) fn server_tls(&self) -> Result<ServerConfig, IdentityError> {
        let provider = verify::provider();
        let tls = |e: &dyn fmt::Display| IdentityError::Tls { reason: e.to_string() };
        let verifier =
            rustls::server::WebPkiClientVerifier::builder_with_provider(Arc::clone(&self.roots), Arc::clone(&provider))
                .build()
                .map_err(|e| tls(&e))?;
        let mut config = ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(|e| tls(&e))?
            .with_client_cert_verifier(verifier)
            .with_single_cert(self.chain.clone(), self.key.clone_key())
            .map_err(|e| tls(&e))?;
        config.alpn_protocols = vec![ALPN.to_vec()];
        // A resumed session would not look at the certificate again: every connect is a full one.
        config.session_storage = Arc::new(rustls::server::NoServerSessionStorage {});
        config.send_tls13_tickets = 0;
        // 0-RTT data is replayable and precedes client authentication.
        config.max_early_data_size = 0;
        Ok(config)
    }

    pub(crate) fn client_tls(&self) -> Result<ClientConfig, IdentityError> {
        let tls = |e: &dyn fmt::Display| IdentityError::Tls { reason: e.to_string() };
        let mut config = ClientConfig::builder_with_provider(verify::provider())
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(|e| tls(&e))?
            .with_root_certificates(Arc::clone(&self.roots))
            .with_client_auth_cert(self.chain.clone(), self.key.clone_key())
            .map_err(|e| tls(&e))?;
        config.alpn_protocols = vec![ALPN.to_vec()];
        config.resumption = rustls::client::Resumption::disabled();
        config.enable_early_data = false;
        Ok(config)
    }
}

#[cfg(test)]
mod tests;
