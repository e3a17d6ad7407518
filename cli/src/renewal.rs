//! Keeps the certificate of a long-running process fresh.

use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use tandem_transport::{DevCa, Identity, PeerIdentity, Role};

use crate::failure::{Code, Failure, OrFail as _};

/// How often the wall clock is looked at: it may jump, so no timer of half a month would do.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// Pause after a renewal that failed or brought nothing new.
const RETRY_AFTER: Duration = Duration::from_secs(60);

/// Where a process has its identity from, and gets the next one.
#[derive(Clone, Debug)]
pub(crate) enum Issuer {
    /// The development CA in this folder signs one.
    Dev {
        /// Folder of the CA.
        ca: PathBuf,
        /// Role of the process.
        role: Role,
        /// Name of the node.
        name: String,
    },
    /// Somebody else puts it into this folder, and the next one too.
    Folder {
        /// The folder.
        dir: PathBuf,
        /// Role that it must have.
        role: Role,
    },
}

impl Issuer {
    /// An identity that is valid now.
    pub(crate) fn issue(&self) -> Result<Identity, Failure> {
        match self {
            Self::Dev { ca, role, name } => {
                DevCa::open_or_create(ca).and_then(|ca| ca.issue(*role, name)).or_fail(Code::State)
            }
            Self::Folder { dir, role } => {
                let identity = Identity::load(dir).or_fail(Code::State)?;
                check_role(identity.id(), *role).map_err(|problem| {
                    Failure::new(Code::State, format!("the identity in {} {problem}", dir.display()))
                })?;
                Ok(identity)
            }
        }
    }

    /// The identity to use instead of `present` at `now`; none while that one is good, or there is no newer one.
    fn renew(&self, present: &Identity, now: SystemTime) -> Option<Result<Identity, Failure>> {
        if !present.renewal_is_due(now) {
            return None;
        }
        Some(self.issue().and_then(|next| {
            if next.id() != present.id() {
                let message = format!("the next identity is that of {}, not of {}", next.id(), present.id());
                return Err(Failure::new(Code::State, message));
            }
            if next.cert_pem() == present.cert_pem() {
                let message = "half of the certificate's time has passed and there is no newer one; put one there";
                return Err(Failure::new(Code::State, message));
            }
            Ok(next)
        }))
    }
}

fn check_role(id: &PeerIdentity, role: Role) -> Result<(), String> {
    if id.role == role { Ok(()) } else { Err(format!("is {id}; a {role} certificate is needed here")) }
}

/// Hands a new identity to `apply` whenever one is due, for as long as the process runs. What is under way
/// goes on.
pub(crate) fn keep_fresh<E: std::fmt::Display + 'static>(
    issuer: Issuer,
    mut identity: Identity,
    apply: impl Fn(&Identity) -> Result<(), E> + Send + 'static,
) {
    tokio::spawn(async move {
        loop {
            tokio::time::sleep(LOOK_EVERY).await;
            let Some(next) = issuer.renew(&identity, SystemTime::now()) else { continue };
            let applied = next.and_then(|next| apply(&next).or_fail(Code::State).map(|()| next));
            match applied {
                Ok(next) => {
                    tracing::info!(node = %next.id(), "the certificate is renewed");
                    identity = next;
                }
                Err(error) => {
                    tracing::warn!("the certificate of {} is not renewed: {error}", identity.id());
                    tokio::time::sleep(RETRY_AFTER).await;
                }
            }
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    const DAY: Duration = Duration::from_secs(86_400);

    #[test]
    fn a_development_certificate_is_issued_anew_when_due() {
        let dir = tempfile::tempdir().unwrap();
        let issuer = Issuer::Dev { ca: dir.path().join("ca"), role: Role::Cloud, name: "cloud-7".into() };
        let present = issuer.issue().unwrap();
        assert!(issuer.renew(&present, SystemTime::now()).is_none());
        for now in [SystemTime::now() + 31 * DAY, SystemTime::now() + 16 * DAY, SystemTime::now() - 40 * DAY] {
            let next = issuer.renew(&present, now).unwrap().unwrap();
            assert_eq!(next.id(), present.id());
            assert_ne!(next.cert_pem(), present.cert_pem());
            assert_eq!(next.ca_pem(), present.ca_pem(), "peers go on trusting it");
        }
    }

    #[test]
    fn an_identity_in_a_folder_is_read_again_when_due() {
        let dir = tempfile::tempdir().unwrap();
        let ca = DevCa::open_or_create(dir.path().join("ca")).unwrap();
        let saved = dir.path().join("saved");
        ca.issue(Role::Edge, "phone").unwrap().save(&saved).unwrap();
        let issuer = Issuer::Folder { dir: saved.clone(), role: Role::Edge };
        let present = issuer.issue().unwrap();
        let late = SystemTime::now() + 20 * DAY;
        let failure = issuer.renew(&present, late).unwrap().unwrap_err();
        assert!(failure.to_string().contains("no newer one"), "{failure}");
        ca.issue(Role::Edge, "tablet").unwrap().save(&saved).unwrap();
        let failure = issuer.renew(&present, late).unwrap().unwrap_err();
        assert!(failure.to_string().contains("tablet"), "{failure}");
        ca.issue(Role::Edge, "phone").unwrap().save(&saved).unwrap();
        assert!(issuer.renew(&present, late).unwrap().is_ok());
        let failure = Issuer::Folder { dir: saved, role: Role::Cloud }.issue().unwrap_err();
        assert!(failure.to_string().contains("cloud certificate"), "{failure}");
    }
}
