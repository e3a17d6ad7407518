//! What a model's files hold, without loading it.

use std::collections::BTreeMap;

use super::spec::{DecoderSpec, FeedForward};
use super::{Checkpoint, ModelFiles};
use crate::error::EngineError;

/// Tensors of one number format.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FormatShare {
    /// Tensors.
    pub tensors: usize,
    /// Numbers.
    pub parameters: u64,
    /// Bytes.
    pub bytes: u64,
}

/// Sizes of a model.
#[derive(Clone, Debug)]
pub struct Inspection {
    /// What the decoder is made of.
    pub spec: DecoderSpec,
    /// All parameters.
    pub parameters: u64,
    /// Parameters that one token uses: of the experts, the chosen ones; of an embedding that is not the
    /// head too, one row.
    pub active_parameters: u64,
    /// All weights, bytes.
    pub weight_bytes: u64,
    /// Weights read for one token, bytes.
    pub token_weight_bytes: u64,
    /// KV state of one token, bytes.
    pub token_kv_bytes: u64,
    /// The tensors by number format.
    pub formats: BTreeMap<String, FormatShare>,
}

/// Opens a model's files and adds up what they hold. The weights are not read.
///
/// # Errors
/// What is wrong with the files.
pub fn inspect(files: &ModelFiles) -> Result<Inspection, EngineError> {
    let file = Checkpoint::open(files)?;
    let spec = file.spec.clone();
    // Of the layers with experts all are alike in every family.
    let chosen = spec.feed_forward.iter().find_map(|part| match part {
        FeedForward::Experts(experts) => Some(experts.chosen as f64 / experts.experts.max(1) as f64),
        FeedForward::Dense { .. } => None,
    });
    let mut sums = Inspection {
        token_kv_bytes: spec.kv_token_bytes(),
        spec,
        parameters: 0,
        active_parameters: 0,
        weight_bytes: 0,
        token_weight_bytes: 0,
        formats: BTreeMap::new(),
    };
    for (name, entry) in file.tensors().entries() {
        let (parameters, bytes) = (entry.shape.iter().product::<usize>() as u64, entry.len() as u64);
        let is_embedding = name.ends_with("embed_tokens.weight") || name == "token_embd.weight";
        let is_routed = name.contains(".experts.") || name.contains("_exps.");
        let share = match chosen {
            Some(chosen) if is_routed => chosen,
            _ if is_embedding && !sums.spec.tied_head => 1.0 / entry.shape.first().copied().unwrap_or(1).max(1) as f64,
            _ => 1.0,
        };
        let part = |n: u64| (n as f64 * share).round() as u64;
        sums.parameters += parameters;
        sums.weight_bytes += bytes;
        sums.active_parameters += part(parameters);
        sums.token_weight_bytes += part(bytes);
        let format = sums.formats.entry(entry.encoding.name().to_owned()).or_default();
        format.tensors += 1;
        format.parameters += parameters;
        format.bytes += bytes;
    }
    Ok(sums)
}
