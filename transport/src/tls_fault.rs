//! Which certificate TLS refused, and why.

use rustls::{AlertDescription, CertificateError};

/// What is wrong with a certificate, seen from this side.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum TlsFault {
    /// The peer's certificate is for other names than the one asked for.
    WrongName,
    /// The peer's certificate is not signed by the CA that is trusted here.
    PeerUntrusted,
    /// The peer does not trust this side's certificate.
    OwnUntrusted,
    /// The peer's certificate has expired or is not valid yet.
    PeerOutOfDate,
    /// The peer finds this side's certificate expired or not valid yet.
    OwnOutOfDate,
    /// Anything else.
    Other,
}

// TLS alerts, RFC 8446 section 6.
const BAD_CERTIFICATE: u64 = 42;
const CERTIFICATE_EXPIRED: u64 = 45;
const UNKNOWN_CA: u64 = 48;
const DECRYPT_ERROR: u64 = 51;
const CERTIFICATE_REQUIRED: u64 = 116;

impl TlsFault {
    /// What an alert stands for; `here` is true if this side raised it.
    #[must_use]
    pub const fn of_alert(alert: u64, here: bool) -> Self {
        match (alert, here) {
            // rustls answers a certificate for another name with "bad certificate".
            (BAD_CERTIFICATE, true) => Self::WrongName,
            // Two CAs of one name differ in their keys only, which shows as a signature that does not fit.
            (UNKNOWN_CA | DECRYPT_ERROR, true) => Self::PeerUntrusted,
            (CERTIFICATE_EXPIRED, true) => Self::PeerOutOfDate,
            (CERTIFICATE_EXPIRED, false) => Self::OwnOutOfDate,
            (BAD_CERTIFICATE | UNKNOWN_CA | DECRYPT_ERROR | CERTIFICATE_REQUIRED, false) => Self::OwnUntrusted,
            _ => Self::Other,
        }
    }

    /// The fault among `error` and its causes, if TLS is one of them.
    #[must_use]
    pub fn of(error: &(dyn std::error::Error + 'static)) -> Option<Self> {
        let mut next = Some(error);
        while let Some(error) = next {
            if let Some(tls) = error.downcast_ref::<rustls::Error>() {
                return Some(tls.into());
            }
            // An `io::Error` hides what it wraps from `source`.
            let inner = error.downcast_ref::<std::io::Error>().and_then(std::io::Error::get_ref);
            if let Some(tls) = inner.and_then(|inner| inner.downcast_ref::<rustls::Error>()) {
                return Some(tls.into());
            }
            next = error.source();
        }
        None
    }
}

impl From<&rustls::Error> for TlsFault {
    fn from(error: &rustls::Error) -> Self {
        use CertificateError as C;
        match error {
            rustls::Error::InvalidCertificate(C::NotValidForName | C::NotValidForNameContext { .. }) => Self::WrongName,
            rustls::Error::InvalidCertificate(C::UnknownIssuer | C::BadSignature) => Self::PeerUntrusted,
            rustls::Error::InvalidCertificate(
                C::Expired | C::ExpiredContext { .. } | C::NotValidYet | C::NotValidYetContext { .. },
            ) => Self::PeerOutOfDate,
            rustls::Error::AlertReceived(alert) => Self::of_alert(u64::from(u8::from(*alert)), false),
            _ => Self::Other,
        }
    }
}

/// An alert in words.
pub(crate) fn words(alert: u64) -> &'static str {
    match u8::try_from(alert).map(AlertDescription::from) {
        Ok(AlertDescription::HandshakeFailure) => "handshake failure",
        Ok(AlertDescription::BadCertificate) => "bad certificate",
        Ok(AlertDescription::UnsupportedCertificate) => "unsupported certificate",
        Ok(AlertDescription::CertificateRevoked) => "revoked certificate",
        Ok(AlertDescription::CertificateExpired) => "expired certificate",
        Ok(AlertDescription::CertificateUnknown) => "certificate unknown",
        Ok(AlertDescription::UnknownCA) => "unknown CA",
        Ok(AlertDescription::DecryptError) => "a signature does not fit its certificate",
        Ok(AlertDescription::CertificateRequired) => "the client sent no certificate",
        _ => "TLS alert",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn alerts_and_errors_name_the_side_that_is_wrong() {
        let table = [
            (42, true, TlsFault::WrongName),
            (48, true, TlsFault::PeerUntrusted),
            (51, true, TlsFault::PeerUntrusted),
            (45, true, TlsFault::PeerOutOfDate),
            (42, false, TlsFault::OwnUntrusted),
            (48, false, TlsFault::OwnUntrusted),
            (116, false, TlsFault::OwnUntrusted),
            (45, false, TlsFault::OwnOutOfDate),
            (40, true, TlsFault::Other),
        ];
        for (alert, here, expected) in table {
            assert_eq!(TlsFault::of_alert(alert, here), expected, "alert {alert}, raised here: {here}");
        }
        for (error, expected) in [
            (rustls::Error::InvalidCertificate(CertificateError::NotValidForName), TlsFault::WrongName),
            (rustls::Error::InvalidCertificate(CertificateError::UnknownIssuer), TlsFault::PeerUntrusted),
            (rustls::Error::InvalidCertificate(CertificateError::BadSignature), TlsFault::PeerUntrusted),
            (rustls::Error::InvalidCertificate(CertificateError::Expired), TlsFault::PeerOutOfDate),
            (rustls::Error::AlertReceived(AlertDescription::UnknownCA), TlsFault::OwnUntrusted),
            (rustls::Error::DecryptError, TlsFault::Other),
        ] {
            let wrapped = std::io::Error::other(error.clone());
            assert_eq!(TlsFault::of(&wrapped), Some(expected), "{error}");
        }
        assert_eq!(TlsFault::of(&std::io::Error::other("refused")), None);
    }
}
