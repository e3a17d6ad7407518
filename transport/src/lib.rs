//! QUIC endpoints with mutual TLS, the frame driver and link estimators.
//!
//! [`Server`] and [`Connector`] make a [`Link`]: two nodes that have checked each other's
//! certificates and HELLOs. A link carries one [`Channel`] per request and bulk frames beside them;
//! what the frames mean is the business of `tandem_proto`'s state machines.
//!
//! Non-goals: no retry of a request (the session machines resume), no policy (who may do what is
//! decided from [`Link::peer_identity`] by the node).

pub mod addresses;
pub mod bulk;
pub mod channel;
pub mod close;
pub mod connector;
pub mod error;
pub mod estimator;
pub mod exchange;
pub mod identity;
pub mod link;
mod meter;
pub mod probe;
#[cfg(feature = "fault-proxy")]
pub mod proxy;
pub mod redial;
pub mod server;
pub mod settings;
mod socket;
pub mod suspects;
pub mod tls_fault;

pub use channel::{Channel, ChannelBytes, FrameReceiver, FrameSender};
pub use close::CloseCode;
pub use connector::Connector;
pub use error::{NoTarget, TransportError};
pub use identity::{DevCa, Identity, PeerIdentity, Role};
pub use link::{Link, LinkStats};
pub use probe::ProbeGuard;
#[cfg(feature = "fault-proxy")]
pub use proxy::{Faults, ProxyHandle, UdpProxy};
pub use redial::{Backoff, DialState, Redial, Target};
pub use server::{Server, ServerRenewal};
pub use settings::{Congestion, Settings};
pub use tls_fault::TlsFault;
