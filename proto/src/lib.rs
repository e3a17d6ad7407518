//! What crosses the wire and what both sides believe about it, without I/O: identifiers, limits,
//! frames, the edge and cloud session state machines and the KV exchange.
//!
//! Non-goals: no clock, socket, thread or randomness lives here; time is a number passed in. The
//! crate is `no_std` + `alloc`, so the build refuses them. The tonic types of the control plane sit
//! behind the feature `rpc`.
// Generated tonic code needs the std prelude; without `rpc` the build proves purity.
#![cfg_attr(not(feature = "rpc"), no_std)]

extern crate alloc;

pub mod block;
pub mod exchange;
pub mod frame;
pub mod ids;
pub mod limits;
pub mod message;
#[cfg(feature = "rpc")]
pub mod rpc;
pub mod session;
