//! Checks a model's files by loading them: what the decoder cannot be made of is found by making it.

use super::backend::cpu::Cpu;
use super::decoder::Weights;
use crate::checkpoint::spec::DecoderSpec;
use crate::checkpoint::{Checkpoint, digest};
use crate::error::EngineError;

/// Checks the bytes of a GGUF file as a load would, tensors included, and returns its spec.
///
/// # Errors
/// What is wrong, naming the field or tensor.
pub fn check_gguf(bytes: &[u8]) -> Result<DecoderSpec, EngineError> {
    check(Checkpoint::of_gguf(bytes.to_vec())?)
}

/// Checks the bytes of a `config.json` and a `model.safetensors` as a load would.
///
/// # Errors
/// What is wrong, naming the field or tensor.
pub fn check_safetensors(config: &[u8], weights: &[u8]) -> Result<DecoderSpec, EngineError> {
    check(Checkpoint::of_safetensors(config, weights.to_vec())?)
}

/// Loads everything and throws it away.
fn check(file: Checkpoint) -> Result<DecoderSpec, EngineError> {
    digest::of(&file);
    Weights::load(&Cpu::new(1)?, &file)?;
    Ok(file.spec)
}
