//! The development CA: made on first use under a state folder.

use std::{
    path::PathBuf,
    time::{Duration, SystemTime},
};

use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose,
    SanType,
};

use super::{
    Identity, IdentityError, PeerIdentity, ResetKey, Role,
    files::{create_private, read_text},
};

/// Certificate of the CA in its folder.
pub const CA_CERT_FILE: &str = "ca.pem";
/// Private key of the CA in its folder.
pub const CA_KEY_FILE: &str = "ca.key";
/// Tenant of everything a development CA issues by [`DevCa::issue`].
pub const DEV_TENANT: &str = "default";

const DAY: Duration = Duration::from_secs(24 * 60 * 60);
/// Development certificates are issued anew at every start and, in a long run, at half of this.
const DEV_VALIDITY: Duration = DAY.saturating_mul(30);
const CA_VALIDITY: Duration = DAY.saturating_mul(3650);
/// Clocks of two machines may differ by this much, and one that was ahead may be set right.
const CLOCK_SKEW: Duration = DAY;

/// A certificate authority whose key lies in a folder of this machine. For development: who can
/// read the folder can become any node.
pub struct DevCa {
    ca_pem: String,
    issuer: Issuer<'static, KeyPair>,
}

impl std::fmt::Debug for DevCa {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("DevCa").finish_non_exhaustive()
    }
}

fn malformed(what: &'static str) -> impl Fn(rcgen::Error) -> IdentityError {
    move |e| IdentityError::Malformed { what, reason: e.to_string() }
}

impl DevCa {
    /// Loads the CA in `dir`, or makes one there (`ca.pem`, `ca.key`, both mode 0600). Two processes
    /// that start at once end with the same CA.
    ///
    /// # Errors
    /// [`IdentityError::Unreadable`], [`IdentityError::Unwritable`], [`IdentityError::Malformed`].
    pub fn open_or_create(dir: impl Into<PathBuf>) -> Result<Self, IdentityError> {
        let dir = dir.into();
        let (key_path, cert_path) = (dir.join(CA_KEY_FILE), dir.join(CA_CERT_FILE));
        let key_pem = if key_path.exists() {
            read_text(&key_path)?
        } else {
            let fresh = KeyPair::generate().map_err(malformed("the new CA key"))?;
            create_private(&key_path, &fresh.serialize_pem())?
        };
        let key = KeyPair::from_pem(&key_pem).map_err(malformed("the CA key"))?;
        // The key is the authority: whichever process signs its certificate first, all such certificates are equal
        // as a trust anchor (same subject, same key).
        let ca_pem =
            if cert_path.exists() { read_text(&cert_path)? } else { create_private(&cert_path, &self_signed(&key)?)? };
        let issuer = Issuer::from_ca_cert_pem(&ca_pem, key).map_err(malformed("the CA certificate"))?;
        Ok(Self { ca_pem, issuer })
    }

    /// Certificate of the CA, PEM.
    #[must_use]
    pub fn ca_pem(&self) -> &str {
        &self.ca_pem
    }

    /// A fresh identity of the tenant `default`, valid for 30 days: issue one at every start,
    /// and when [`Identity::renewal_is_due`].
    ///
    /// # Errors
    /// [`IdentityError::BadName`].
    pub fn issue(&self, role: Role, name: &str) -> Result<Identity, IdentityError> {
        self.issue_for(&PeerIdentity::new(DEV_TENANT, role, name)?, DEV_VALIDITY)
    }

    /// A fresh identity for `id`, valid from a day ago (clock skew) until `validity` from now.
    ///
    /// # Errors
    /// [`IdentityError::BadName`], [`IdentityError::Expired`] for a zero validity.
    pub fn issue_for(&self, id: &PeerIdentity, validity: Duration) -> Result<Identity, IdentityError> {
        let (cert_pem, key_pem) = self.sign(id, SystemTime::now() + validity)?;
        let mut identity = Identity::from_pem(&cert_pem, &key_pem, &self.ca_pem)?;
        // The node's own key is another one after every start.
        identity.reset_key = ResetKey::derive(self.issuer.key().serialize_pem().as_bytes(), &id.to_string());
        Ok(identity)
    }

    /// Certificate and key of `id`, PEM, not checked for usefulness.
    pub(super) fn sign(&self, id: &PeerIdentity, not_after: SystemTime) -> Result<(String, String), IdentityError> {
        let params = leaf_params(id, not_after)?;
        let key = KeyPair::generate().map_err(malformed("the new key"))?;
        let cert = params.signed_by(&key, &self.issuer).map_err(malformed("the new certificate"))?;
        Ok((cert.pem(), key.serialize_pem()))
    }
}

fn self_signed(key: &KeyPair) -> Result<String, IdentityError> {
    let mut params = CertificateParams::default();
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params.distinguished_name.push(DnType::CommonName, "Tandem development CA");
    params.not_before = (SystemTime::now() - CLOCK_SKEW).into();
    params.not_after = (SystemTime::now() + CA_VALIDITY).into();
    Ok(params.self_signed(key).map_err(malformed("the new CA certificate"))?.pem())
}

fn leaf_params(id: &PeerIdentity, not_after: SystemTime) -> Result<CertificateParams, IdentityError> {
    let bad = malformed("a name of the new certificate");
    let dns = vec![id.dns_name(), "localhost".into(), "127.0.0.1".into(), "::1".into()];
    let mut params = CertificateParams::new(dns).map_err(&bad)?;
    let uri = id.to_string().try_into().map_err(&bad)?;
    params.subject_alt_names.push(SanType::URI(uri));
    params.distinguished_name = rcgen::DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, id.name.as_str());
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
    params.use_authority_key_identifier_extension = true;
    params.not_before = (SystemTime::now() - CLOCK_SKEW).into();
    params.not_after = not_after.into();
    Ok(params)
}
