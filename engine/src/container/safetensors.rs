//! safetensors files and shards, through the `safetensors` crate's header checks.

use std::ops::Range;
use std::path::{Path, PathBuf};

use safetensors::{Dtype, SafeTensors};

use super::{Encoding, Stored, read_small};
use crate::error::EngineError;

/// Most shards of one model.
const SHARDS_MAX: usize = 1024;

type Item = (String, Encoding, Vec<usize>, Range<usize>);

fn broken(problem: impl std::fmt::Display) -> EngineError {
    EngineError::Format { format: "safetensors", problem: problem.to_string() }
}

/// Name, type, shape and byte range of every tensor.
pub(super) fn index(bytes: &[u8]) -> Result<Vec<Item>, EngineError> {
    let (header, meta) = SafeTensors::read_metadata(bytes).map_err(broken)?;
    let start = header.checked_add(8).ok_or_else(|| broken("header length overflows"))?;
    let data = bytes.len().checked_sub(start).ok_or_else(|| broken("file ends inside the header"))?;
    let mut out = Vec::new();
    for (name, info) in meta.tensors() {
        let (encoding, width) = match info.dtype {
            Dtype::F32 => (Encoding::Plain(Stored::F32), 4),
            Dtype::F16 => (Encoding::Plain(Stored::F16), 2),
            Dtype::BF16 => (Encoding::Plain(Stored::Bf16), 2),
            Dtype::U8 => (Encoding::Bytes, 1),
            Dtype::F8_E4M3 => (Encoding::Fp8, 1),
            other => {
                let problem = format!("has type {other:?}; F32, F16, BF16, F8_E4M3 and the U8 of MXFP4 are supported");
                return Err(EngineError::tensor(name, problem));
            }
        };
        let (from, to) = info.data_offsets;
        let wanted = info.shape.iter().try_fold(width, |a: usize, &d| a.checked_mul(d));
        if from > to || to > data || wanted != Some(to - from) {
            let problem =
                format!("bytes {from}..{to} do not fit shape {:?} in a file of {data} data bytes", info.shape);
            return Err(EngineError::tensor(name, problem));
        }
        out.push((name, encoding, info.shape.clone(), start + from..start + to));
    }
    Ok(out)
}

/// The safetensors files of a folder: those its index names, else `model.safetensors`.
pub(super) fn shards(dir: &Path) -> Result<Vec<PathBuf>, EngineError> {
    let index = dir.join("model.safetensors.index.json");
    if !index.exists() {
        return Ok(vec![dir.join("model.safetensors")]);
    }
    let json = |problem: String| EngineError::Json { file: "model.safetensors.index.json", problem };
    let value: serde_json::Value = serde_json::from_slice(&read_small(&index)?).map_err(|e| json(e.to_string()))?;
    let map = value.get("weight_map").and_then(|m| m.as_object()).ok_or_else(|| json("has no weight_map".into()))?;
    let mut names: Vec<&str> = Vec::new();
    for v in map.values() {
        let name = v.as_str().ok_or_else(|| json("weight_map holds something that is not a file name".into()))?;
        // Shards lie beside the index; a path would let a model name any file of the machine.
        if name.contains(['/', '\\']) || !name.ends_with(".safetensors") {
            return Err(json(format!("`{name}` is not the name of a safetensors file beside it")));
        }
        names.push(name);
    }
    names.sort_unstable();
    names.dedup();
    if names.is_empty() || names.len() > SHARDS_MAX {
        return Err(json(format!("names {} files; 1 to {SHARDS_MAX} are allowed", names.len())));
    }
    Ok(names.into_iter().map(|n| dir.join(n)).collect())
}
