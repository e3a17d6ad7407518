//! The control plane's gRPC messages, client and server, generated from `control.proto`.
//! Needs std, so it sits behind the feature `rpc`.

// Generated code answers to its generator's style, not to ours.
#![allow(missing_docs, unreachable_pub, clippy::all, clippy::pedantic)]

tonic::include_proto!("tandem.control.v1");
