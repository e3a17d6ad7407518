//! What can go wrong between two nodes, typed, with what to do.

use std::net::SocketAddr;

use tandem_proto::{frame::FrameError, message::RefuseCode};

use crate::{
    close::CloseCode,
    identity::IdentityError,
    tls_fault::{self, TlsFault},
};

/// A failure of an endpoint, a link or a channel.
#[derive(Debug, Clone, thiserror::Error)]
pub enum TransportError {
    /// The own identity cannot be used.
    #[error(transparent)]
    Identity(#[from] IdentityError),
    /// The UDP socket could not be made.
    #[error("cannot bind UDP {addr}: {reason}; choose another address or stop the process that holds it")]
    Bind {
        /// Address asked for.
        addr: SocketAddr,
        /// The system's words.
        reason: String,
    },
    /// The connection attempt itself was not possible.
    #[error("cannot connect to {addr} as {server_name:?}: {reason}")]
    Connect {
        /// Address asked for.
        addr: SocketAddr,
        /// Name the peer's certificate must carry.
        server_name: String,
        /// What is wrong.
        reason: String,
    },
    /// The system of the address says that its port is closed.
    #[error("nobody listens at UDP {addr}; check the address, and that the node runs")]
    NobodyListens {
        /// Address asked for.
        addr: SocketAddr,
    },
    /// TLS refused one of the two sides.
    #[error("the TLS handshake failed: {reason}; both sides need certificates of the same CA that are valid now")]
    Unauthorised {
        /// Which certificate is refused, and why.
        fault: TlsFault,
        /// TLS alert or check that failed.
        reason: String,
    },
    /// The peer is another kind of node than asked for, or its certificate names none.
    #[error("the peer is {found}, expected {expected}; check the address")]
    WrongPeer {
        /// What the certificate says.
        found: String,
        /// What was allowed.
        expected: String,
    },
    /// The two builds do not speak the same protocol.
    #[error("incompatible peer: {what} here {here}, there {there}; update the older of the two")]
    Incompatible {
        /// What differs.
        what: &'static str,
        /// Own value.
        here: String,
        /// The peer's value.
        there: String,
    },
    /// The peer refuses to serve.
    #[error("refused ({code:?}): {reason}")]
    Refused {
        /// Kind of refusal.
        code: RefuseCode,
        /// The peer's words.
        reason: String,
    },
    /// The peer holds as many links as one name may have: other processes use the name of this node.
    #[error("the name of this node is in use: {reason}; give each node a name of its own")]
    NameInUse {
        /// The peer's words.
        reason: String,
    },
    /// There is no address to dial.
    #[error("{reason}")]
    NoTarget {
        /// Why not.
        cause: NoTarget,
        /// The same in words, with what to do.
        reason: String,
    },
    /// Something did not happen in time.
    #[error("{what} took longer than {ms} ms")]
    Timeout {
        /// What was waited for.
        what: &'static str,
        /// Bound, milliseconds.
        ms: u64,
    },
    /// What arrived is not a frame, or what should be sent cannot become one.
    #[error(transparent)]
    Frame(#[from] FrameError),
    /// The stream ended inside a frame: the sender died or gave up.
    #[error("the stream ended inside a frame")]
    Truncated,
    /// The peer gave up the stream without finishing it.
    #[error("the peer reset the stream (code {0})")]
    Reset(u64),
    /// This channel was used again after an error, or after a send that was dropped half-way.
    #[error("the channel is broken by an earlier error; open a new one")]
    Broken,
    /// One side closed the link on purpose.
    #[error("the link was closed ({code:?}): {reason}")]
    Closed {
        /// Why.
        code: CloseCode,
        /// The closer's words.
        reason: String,
    },
    /// The link died.
    #[error("the link is lost: {reason}")]
    Lost {
        /// What was noticed.
        reason: String,
    },
    /// The link is cut on purpose (see `redial`).
    #[error("the link is cut by a switch on this side")]
    Cut,
}

/// Why a resolver has no address (see [`crate::redial`]).
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NoTarget {
    /// A host name has no address.
    UnknownHost {
        /// As it was given.
        address: String,
    },
    /// No router answers.
    RouterUnreachable,
    /// Router and edge do not accept each other's certificates.
    RouterCertificate(TlsFault),
    /// The router does not serve a certificate like ours.
    RouterDenied,
    /// No cloud node serves the model.
    UnknownModel {
        /// What was asked for.
        model: String,
        /// What is served; empty if no node has registered.
        known: Vec<String>,
    },
    /// Nodes serve the model, and none can take this edge now.
    NoNode,
    /// Anything else.
    Other,
}

// QUIC carries a TLS alert as 0x100 + alert (RFC 9001 section 4.8).
const CRYPTO: u64 = 0x100;
const ALERT_NO_APPLICATION_PROTOCOL: u64 = 120;
const CONNECTION_REFUSED: u64 = 0x2;

/// A QUIC error that `here` says this side raised, or the peer.
fn from_transport(code: u64, reason: &str, here: bool) -> TransportError {
    match code {
        CONNECTION_REFUSED => {
            TransportError::Refused { code: RefuseCode::Busy, reason: "the node takes no more connections now".into() }
        }
        code if code == CRYPTO + ALERT_NO_APPLICATION_PROTOCOL => TransportError::Incompatible {
            what: "protocol (ALPN)",
            here: String::from_utf8_lossy(tandem_proto::limits::ALPN).into_owned(),
            there: "another one".into(),
        },
        code if code & !0xff == CRYPTO => {
            let alert = code - CRYPTO;
            let reason = format!("{} ({reason})", tls_fault::words(alert));
            TransportError::Unauthorised { fault: TlsFault::of_alert(alert, here), reason }
        }
        // What fails before the handshake's end carries no words (RFC 9000 section 10.2.3).
        _ => TransportError::Lost { reason: format!("QUIC error {code:#x} ({reason})") },
    }
}

impl From<quinn::ConnectionError> for TransportError {
    fn from(error: quinn::ConnectionError) -> Self {
        use quinn::ConnectionError as E;
        match error {
            E::ApplicationClosed(close) => {
                let reason = String::from_utf8_lossy(&close.reason).into_owned();
                match CloseCode::from_wire(close.error_code.into_inner()) {
                    CloseCode::Busy => Self::Refused { code: RefuseCode::Busy, reason },
                    CloseCode::NameInUse => Self::NameInUse { reason },
                    CloseCode::Unauthorised => Self::Unauthorised { fault: TlsFault::OwnUntrusted, reason },
                    CloseCode::Incompatible => {
                        Self::Incompatible { what: "HELLO", here: "accepted".into(), there: reason }
                    }
                    code => Self::Closed { code, reason },
                }
            }
            E::ConnectionClosed(close) => {
                let reason = String::from_utf8_lossy(&close.reason).into_owned();
                from_transport(close.error_code.into(), &reason, false)
            }
            E::TransportError(error) => from_transport(error.code.into(), &error.reason, true),
            E::LocallyClosed => Self::Closed { code: CloseCode::Done, reason: "closed on this side".into() },
            E::TimedOut => Self::Lost { reason: "the peer is silent past the idle timeout".into() },
            E::VersionMismatch => {
                Self::Incompatible { what: "QUIC version", here: "1".into(), there: "none of those".into() }
            }
            other @ (E::Reset | E::CidsExhausted) => Self::Lost { reason: other.to_string() },
        }
    }
}

impl From<quinn::WriteError> for TransportError {
    fn from(error: quinn::WriteError) -> Self {
        match error {
            quinn::WriteError::Stopped(code) => Self::Reset(code.into_inner()),
            quinn::WriteError::ConnectionLost(error) => error.into(),
            quinn::WriteError::ClosedStream | quinn::WriteError::ZeroRttRejected => Self::Broken,
        }
    }
}

impl From<quinn::ReadError> for TransportError {
    fn from(error: quinn::ReadError) -> Self {
        match error {
            quinn::ReadError::Reset(code) => Self::Reset(code.into_inner()),
            quinn::ReadError::ConnectionLost(error) => error.into(),
            quinn::ReadError::ClosedStream
            | quinn::ReadError::IllegalOrderedRead
            | quinn::ReadError::ZeroRttRejected => Self::Broken,
        }
    }
}
