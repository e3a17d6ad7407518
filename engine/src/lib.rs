//! Synchronous inference: one config-driven decoder, KV pool, kernels, tokenizer, sampling.
//!
//! A forward pass is [`Model::embed`] → [`Model::layers`] (any split into ranges, each with its own
//! [`KvPool`]) → [`Model::head`]. A row's bits never depend on what else is in the batch, on how a
//! prompt was cut, or on the number of threads.
//!
//! Modules know what lies below them only: `container` (bytes to tensors) ← `checkpoint` (what they mean) ←
//! `model`, which runs over the pools of `kv`, ← [`runner`]; the table is in ARCHITECTURE.md.
//!
//! Non-goals: no async, no network, no policy, no clock but to measure (`bench`, how long a job of
//! `runner` took, and when a model last got somewhere). KV is an argument, never hidden in a model.

pub mod bench;
pub mod chat;
mod checkpoint;
pub mod constraint;
mod container;
mod error;
mod kernels;
mod kv;
pub mod memory;
mod model;
pub mod perplexity;
pub mod runner;
pub mod sampling;
pub mod tokenizer;
pub mod trunk;
pub mod uncertainty;

pub use checkpoint::spec::{self, DecoderSpec};
pub use checkpoint::{FormatShare, Inspection, ModelFiles, inspect};
pub use container::{SplitPart, split_part};
pub use error::EngineError;
pub use kernels::{instruction_set, numerics};
pub use kv::block_store::{BlockStore, BlockStoreError};
pub use kv::{KvLayout, KvPool, POOL_BLOCKS_MAX, POOL_NUMBERS_MAX, Sequence};
pub use model::{
    BackendKind, Hidden, LoadOptions, Logits, Model, Pulse, ROWS_MAX, Rows, STALL_MIN, check_gguf, check_safetensors,
    trunk_layers,
};

/// Checks the tokenizer and the chat template in the bytes of a GGUF file, as a load would.
///
/// # Errors
/// What is wrong, naming the field.
pub fn check_gguf_text(bytes: &[u8]) -> Result<(), EngineError> {
    tokenizer::from_gguf_bytes(bytes)?;
    chat::from_gguf_bytes(bytes).map(drop)
}
