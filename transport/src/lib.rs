//! QUIC endpoints with mutual TLS, the frame driver and link estimators.
pub mod close;
pub mod error;
pub mod identity;
