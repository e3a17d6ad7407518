//! GGUF models in several files: `name-00001-of-00003.gguf`. The first part has the metadata, every
//! part its own tensors, and each says which one it is (`split.no`, `split.count`).

use std::path::{Path, PathBuf};

use super::gguf::Gguf;
use crate::error::EngineError;

/// Most parts of one model.
const PARTS_MAX: u64 = 1024;
/// Digits of a part's number in a file name.
const DIGITS: usize = 5;
/// Tensors of all parts together.
const TENSORS: &str = "split.tensors.count";

/// What the name of one file of a split model says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SplitPart<'a> {
    /// What all files of the model have in common at the front, folders included.
    pub base: &'a str,
    /// Which one this is, from 1.
    pub part: u64,
    /// How many there are.
    pub parts: u64,
}

/// Reads `base-00002-of-00003`, with or without `.gguf`; none for the name of a whole model.
#[must_use]
pub fn split_part(name: &str) -> Option<SplitPart<'_>> {
    let (rest, parts) = name.strip_suffix(".gguf").unwrap_or(name).rsplit_once("-of-")?;
    let (base, part) = rest.rsplit_once('-')?;
    let number = |text: &str| {
        (text.len() == DIGITS && text.bytes().all(|b| b.is_ascii_digit())).then(|| text.parse().ok()).flatten()
    };
    Some(SplitPart { base, part: number(part)?, parts: number(parts)? })
}

/// The part that a path leads to; only a `.gguf` file is one.
fn named(path: &Path) -> Option<SplitPart<'_>> {
    path.file_name()?.to_str().filter(|name| name.ends_with(".gguf")).and_then(split_part)
}

fn sibling(path: &Path, base: &str, part: u64, count: u64) -> PathBuf {
    path.with_file_name(format!("{base}-{part:0DIGITS$}-of-{count:0DIGITS$}.gguf"))
}

/// The file with the metadata: the first part of a split model, else the file itself.
pub(crate) fn first(path: &Path) -> PathBuf {
    match named(path) {
        Some(SplitPart { base, part, parts }) if part != 1 => sibling(path, base, 1, parts),
        _ => path.to_owned(),
    }
}

/// The other parts of the model whose first part is `path`.
pub(super) fn others(path: &Path, file: &Gguf<'_>) -> Result<Vec<PathBuf>, EngineError> {
    let count = count(file)?;
    check(file, 0, count)?;
    if count == 1 {
        return Ok(Vec::new());
    }
    match named(path) {
        Some(SplitPart { base, part: 1, parts }) if parts == count => {
            Ok((2..=count).map(|part| sibling(path, base, part, count)).collect())
        }
        _ => {
            let name = format!("NAME-{:0DIGITS$}-of-{count:0DIGITS$}.gguf", 1);
            Err(EngineError::spec("split.count", format!("is {count}, but the file is not called {name}")))
        }
    }
}

/// Parts that a file belongs to; 1 for a whole model.
pub(super) fn count(file: &Gguf<'_>) -> Result<u64, EngineError> {
    match file.meta.get("split.count") {
        // Writers also mark models of one file with 0.
        None => Ok(1),
        Some(_) => match file.unsigned("split.count") {
            Some(n @ 0..=PARTS_MAX) => Ok(n.max(1)),
            _ => Err(EngineError::spec("split.count", format!("is not a number of at most {PARTS_MAX}"))),
        },
    }
}

/// Checks that a file is the part `index` (from 0) of `parts`.
pub(super) fn check(file: &Gguf<'_>, index: u64, parts: u64) -> Result<(), EngineError> {
    let own = count(file)?;
    if own != parts {
        return Err(EngineError::spec("split.count", format!("is {own} in part {}, {parts} in the first", index + 1)));
    }
    match file.unsigned("split.no") {
        Some(no) if no != index => {
            Err(EngineError::spec("split.no", format!("is {no} in the file of part {}", index + 1)))
        }
        None if parts > 1 => Err(EngineError::spec("split.no", format!("is missing in part {}", index + 1))),
        _ => Ok(()),
    }
}

/// Checks that no part's tensors are missing.
pub(super) fn check_tensors(first: &Gguf<'_>, found: usize) -> Result<(), EngineError> {
    match first.unsigned(TENSORS) {
        Some(wanted) if wanted != found as u64 => {
            Err(EngineError::spec(TENSORS, format!("is {wanted}, the parts have {found}")))
        }
        _ => Ok(()),
    }
}
