//! Where the bytes of a file are, and how files are read.

use std::fs::File;
use std::path::Path;

use crate::error::EngineError;

/// Largest JSON file read, bytes (tokenizers of large vocabularies have tens of MiB).
pub(crate) const JSON_BYTES_MAX: u64 = 256 << 20;

/// The bytes of one file.
pub(super) enum Storage {
    Static(&'static [u8]),
    Mapped(memmap2::Mmap),
    Owned(Vec<u8>),
}

impl Storage {
    pub(super) fn map(path: &Path) -> Result<Self, EngineError> {
        Ok(Self::Mapped(map_file(path)?))
    }

    pub(super) fn bytes(&self) -> &[u8] {
        match self {
            Self::Static(b) => b,
            Self::Mapped(m) => m,
            Self::Owned(v) => v,
        }
    }

    /// Gives the pages of a mapped file that were read back to the system; reading maps them again.
    pub(super) fn release(&self) {
        #[cfg(unix)]
        if let Self::Mapped(m) = self {
            // SAFETY: the map is read-only and backed by a file, so later reads find the same
            // bytes.
            #[allow(unsafe_code)]
            let _ = unsafe { m.unchecked_advise_range(memmap2::UncheckedAdvice::DontNeed, 0, m.len()) };
        }
    }
}

/// Reads a whole small file (JSON, templates).
pub(crate) fn read_small(path: &Path) -> Result<Vec<u8>, EngineError> {
    let io = |source| EngineError::Io { path: path.to_owned(), source };
    let bytes = std::fs::metadata(path).map_err(io)?.len();
    if bytes > JSON_BYTES_MAX {
        let problem = format!("{} has {bytes} bytes, more than {JSON_BYTES_MAX}", path.display());
        return Err(EngineError::Format { format: "json", problem });
    }
    std::fs::read(path).map_err(io)
}

/// Maps a file for reading.
pub(crate) fn map_file(path: &Path) -> Result<memmap2::Mmap, EngineError> {
    let io = |source| EngineError::Io { path: path.to_owned(), source };
    let file = File::open(path).map_err(io)?;
    // SAFETY: the map is read-only and private. A file that shrinks under it raises SIGBUS, which no
    // check can exclude; weights are expected not to be rewritten in place while they are loaded.
    #[allow(unsafe_code)]
    let map = unsafe { memmap2::Mmap::map(&file) };
    map.map_err(io)
}
