//! When to escalate ([`policy`]), which node takes it ([`placement`]), and the control plane
//! that keeps nodes, tickets and epochs ([`control`]).
//!
//! Without features this crate is pure: no clock, socket, thread or runtime. Time is a number
//! passed in. `client` adds the tonic client, `server` the tonic service.
//!
//! Non-goals: no token text and no KV state passes through here.

#[cfg(feature = "client")]
pub mod client;
pub mod control;
#[cfg(any(feature = "client", feature = "server"))]
mod convert;
pub mod exchange;
#[cfg(feature = "server")]
pub mod metric_definitions;
pub mod node;
pub mod placement;
pub mod policy;
#[cfg(feature = "server")]
pub mod server;
#[cfg(any(feature = "client", feature = "server"))]
pub mod tls;
