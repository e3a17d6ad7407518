//! Inference engines that run elsewhere and are spoken to over HTTP: llama-server, and what speaks like it. An
//! [`Engine`] is asked for the distributions at the positions of a token sequence ([`Ask`]) and returns them one by
//! one ([`Rows`]); what is chosen from them is the caller's. What an engine can do is found by trying it
//! ([`probe`]), not by its name.

mod ask;
mod engine;
mod fault;
mod http;
mod llama_server;
mod pace;
mod probe;
pub mod sse;

pub use ask::{Ask, Row};
pub use engine::{Abilities, Counters, Engine, Kind, Rows};
pub use fault::Fault;
pub use http::{Address, Key};
pub use probe::probe;
