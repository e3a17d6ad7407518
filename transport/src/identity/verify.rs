//! Checks that PEM parts are a usable identity, with rustls' own verifier.

use std::{
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use rustls::{
    CertificateError, RootCertStore,
    crypto::CryptoProvider,
    pki_types::{CertificateDer, PrivateKeyDer, UnixTime, pem::PemObject},
    server::WebPkiClientVerifier,
    sign::CertifiedKey,
};
use x509_parser::prelude::{FromDer, GeneralName, X509Certificate};

use super::{IdentityError, PeerIdentity};

pub(super) struct Parsed {
    pub(super) chain: Vec<CertificateDer<'static>>,
    pub(super) key: PrivateKeyDer<'static>,
    pub(super) roots: Arc<RootCertStore>,
    pub(super) id: PeerIdentity,
    pub(super) not_before: SystemTime,
    pub(super) not_after: SystemTime,
}

pub(super) fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

fn certificates(what: &'static str, pem: &str) -> Result<Vec<CertificateDer<'static>>, IdentityError> {
    let malformed = |reason: String| IdentityError::Malformed { what, reason };
    let list: Vec<_> = CertificateDer::pem_slice_iter(pem.as_bytes())
        .collect::<Result<_, _>>()
        .map_err(|e| malformed(e.to_string()))?;
    if list.is_empty() {
        return Err(malformed("no CERTIFICATE block".into()));
    }
    Ok(list)
}

fn parse<'a>(cert: &'a CertificateDer<'_>) -> Result<X509Certificate<'a>, IdentityError> {
    X509Certificate::from_der(cert.as_ref())
        .map(|(_, cert)| cert)
        .map_err(|e| IdentityError::Malformed { what: "the certificate", reason: e.to_string() })
}

pub(super) fn spiffe_id(cert: &CertificateDer<'_>) -> Result<PeerIdentity, IdentityError> {
    let cert = parse(cert)?;
    let names = cert
        .subject_alternative_name()
        .map_err(|e| IdentityError::Malformed { what: "the certificate's alternative names", reason: e.to_string() })?;
    let names = names.map_or(&[][..], |extension| &extension.value.general_names);
    let uris: Vec<&str> = names
        .iter()
        .filter_map(|name| match name {
            GeneralName::URI(uri) => Some(*uri),
            _ => None,
        })
        .collect();
    // SPIFFE allows exactly one URI; more could make two checks see two names.
    match uris[..] {
        [uri] => uri.parse(),
        _ => Err(IdentityError::NoSpiffeId { found: format!("{uris:?}") }),
    }
}

fn time(seconds: i64) -> SystemTime {
    UNIX_EPOCH + Duration::from_secs(u64::try_from(seconds).unwrap_or(0))
}

fn not_before(cert: &CertificateDer<'_>) -> Result<SystemTime, IdentityError> {
    Ok(time(parse(cert)?.validity().not_before.timestamp()))
}

pub(crate) fn not_after(cert: &CertificateDer<'_>) -> Result<SystemTime, IdentityError> {
    Ok(time(parse(cert)?.validity().not_after.timestamp()))
}

pub(super) fn check(cert_pem: &str, key_pem: &str, ca_pem: &str) -> Result<Parsed, IdentityError> {
    let chain = certificates("the certificate", cert_pem)?;
    let key = PrivateKeyDer::from_pem_slice(key_pem.as_bytes())
        .map_err(|e| IdentityError::Malformed { what: "the private key", reason: e.to_string() })?;
    let mut store = RootCertStore::empty();
    for root in certificates("the CA certificate", ca_pem)? {
        store.add(root).map_err(|e| IdentityError::Malformed { what: "the CA certificate", reason: e.to_string() })?;
    }
    let roots = Arc::new(store);
    let id = spiffe_id(&chain[0])?;
    let name = id.to_string();
    let tls = |reason: String| IdentityError::Tls { reason };
    let verifier = WebPkiClientVerifier::builder_with_provider(Arc::clone(&roots), provider())
        .build()
        .map_err(|e| tls(e.to_string()))?;
    verifier.verify_client_cert(&chain[0], &chain[1..], UnixTime::now()).map_err(|e| match e {
        rustls::Error::InvalidCertificate(CertificateError::Expired | CertificateError::ExpiredContext { .. }) => {
            IdentityError::Expired { name: name.clone() }
        }
        rustls::Error::InvalidCertificate(
            CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. },
        ) => IdentityError::NotYetValid { name: name.clone() },
        rustls::Error::InvalidCertificate(CertificateError::UnknownIssuer | CertificateError::BadSignature) => {
            IdentityError::WrongCa { name: name.clone() }
        }
        other => IdentityError::Malformed { what: "the certificate", reason: other.to_string() },
    })?;
    CertifiedKey::from_der(chain.clone(), key.clone_key(), &provider()).map_err(|e| match e {
        rustls::Error::InconsistentKeys(_) => IdentityError::KeyMismatch { name: name.clone() },
        other => IdentityError::Malformed { what: "the private key", reason: other.to_string() },
    })?;
    let (not_before, not_after) = (not_before(&chain[0])?, not_after(&chain[0])?);
    Ok(Parsed { chain, key, roots, id, not_before, not_after })
}
