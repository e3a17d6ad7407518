//! Synchronous inference: one config-driven decoder, KV pool, kernels, tokenizer, sampling.
//!
//! A forward pass is [`Model::embed`] → [`Model::layers`] (any split into ranges, each with its own
//! [`KvPool`]) → [`Model::head`]. A row's bits never depend on what else is in the batch, on how a
//! prompt was cut, or on the number of threads.
//!
//! Non-goals: no async, no network, no policy, no clock but to measure (`bench`, how long a job of
//! `runner` took, and when a model last got somewhere). KV is an argument, never hidden in a model.

mod backend;
pub mod bench;
pub mod chat;
pub mod constraint;
mod decoder;
mod digest;
mod error;
mod kernels;
mod kv;
mod load;
pub mod memory;
mod model;
mod names;
pub mod perplexity;
mod pulse;
mod rope;
mod routing;
pub mod runner;
pub mod sampling;
pub mod spec;
pub mod tokenizer;
pub mod trunk;
pub mod uncertainty;

pub use backend::BackendKind;
pub use error::EngineError;
pub use kernels::{instruction_set, numerics};
pub use kv::block_store::{BlockStore, BlockStoreError};
pub use kv::{KvPool, POOL_BLOCKS_MAX, POOL_NUMBERS_MAX, Sequence};
pub use load::{FormatShare, Inspection, ModelFiles, SplitPart, check_gguf, check_safetensors, inspect, split_part};
pub use model::{Hidden, LoadOptions, Logits, Model, ROWS_MAX, Rows, trunk_layers};
pub use pulse::{Pulse, STALL_MIN};
pub use spec::DecoderSpec;

/// Checks the tokenizer and the chat template in the bytes of a GGUF file, as a load would.
///
/// # Errors
/// What is wrong, naming the field.
pub fn check_gguf_text(bytes: &[u8]) -> Result<(), EngineError> {
    tokenizer::from_gguf_bytes(bytes)?;
    chat::from_gguf_bytes(bytes).map(drop)
}
