//! The edge: generation loop, OpenAI-compatible API, web page, offline behaviour.

pub mod page;
pub mod request;
