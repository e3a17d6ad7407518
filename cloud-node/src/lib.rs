//! The cloud: admission, continuous batching, verification and KV service.
//!
//! A link's sessions arrive in [`node`]; each has a task ([`session`]) that feeds the frames to the
//! session state machine and its jobs to the target model, by whatever engine that runs ([`target`]). What
//! sessions share is the `context`, below both.

pub mod admission;
mod context;
mod grammars;
pub mod metric_definitions;
pub mod node;
mod registry;
mod session;
pub mod settings;
pub mod target;
