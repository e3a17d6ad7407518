//! The edge: generation loop, OpenAI-compatible API, web page, offline behaviour.
//!
//! The way of a request: [`api`] → [`node`] → [`mod@generate`] (one task per answer), which waits for
//! the engine thread, the cloud and the client at once. What tasks share is the `context`, below both.

mod account;
pub mod admission;
pub mod api;
mod choice;
mod cloud_watch;
mod context;
pub mod cool_down;
pub mod diagnosis;
mod embed;
mod explained;
mod generate;
pub mod http;
pub mod metric_definitions;
pub mod node;
pub mod pacing;
pub mod page;
pub mod request;
pub mod serve;
pub mod settings;
pub mod uplinks;
