//! The state folder of a single router: one snapshot file, replaced whole.
//!
//! Write: temporary file, fsync, rename, fsync of the folder. Read: length and CRC-32C are checked;
//! on any doubt the router stops with the reason, because guessing could let epochs go backwards.

use std::{
    fs::{self, File, TryLockError},
    io::{self, Read, Write},
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
};

use serde::{Deserialize, Serialize};

/// Name of the snapshot in the state folder.
const SNAPSHOT_NAME: &str = "control.snapshot";
/// Name of the file that keeps a second router out.
const LOCK_NAME: &str = "control.lock";
/// Format of the snapshot file.
const FORMAT: u32 = 1;
/// Longest header line, bytes.
const HEADER_BYTES_MAX: usize = 256;
/// Largest snapshot that is read, bytes.
const SNAPSHOT_BYTES_MAX: u64 = 256 * 1024 * 1024;

/// Why the state folder cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The system refused.
    #[error("router state {}: {source}", path.display())]
    Io {
        /// File or folder.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// Another router has the folder.
    #[error("router state {} is in use by another router; stop that one or choose another state folder", path.display())]
    InUse {
        /// The folder.
        path: PathBuf,
    },
    /// The snapshot is damaged.
    #[error(
        "router state {} is damaged: {why}; restore it from a backup, or move it away to start with an empty control plane",
        path.display()
    )]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        why: String,
    },
}

/// First line of the file, as JSON. The rest is the state's bytes.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Header {
    tandem_control: u32,
    epoch_reserved: u64,
    bytes: u64,
    crc32c: u32,
}

/// A snapshot as stored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Stored {
    /// No epoch above this one was issued before the next snapshot was on disk.
    pub(super) epoch_reserved: u64,
    /// Bytes of the state.
    pub(super) state: Vec<u8>,
}

/// The locked state folder.
#[derive(Debug)]
pub(super) struct Store {
    folder: PathBuf,
    /// Commands applied in the newest snapshot written. Writers take turns: one whose caller gave up
    /// may still be at work.
    newest: Mutex<u64>,
    // Held for as long as the store lives.
    _lock: File,
}

fn checksum(epoch_reserved: u64, state: &[u8]) -> u32 {
    crc32c::crc32c_append(crc32c::crc32c(&epoch_reserved.to_le_bytes()), state)
}

impl Store {
    /// Makes the folder if needed and locks it.
    pub(super) fn open(folder: &Path) -> Result<Self, StoreError> {
        let io = |source| StoreError::Io { path: folder.to_path_buf(), source };
        fs::create_dir_all(folder).map_err(io)?;
        let lock = File::options().create(true).truncate(false).write(true).open(folder.join(LOCK_NAME)).map_err(io)?;
        match lock.try_lock() {
            Ok(()) => Ok(Self { folder: folder.to_path_buf(), newest: Mutex::new(0), _lock: lock }),
            Err(TryLockError::WouldBlock) => Err(StoreError::InUse { path: folder.to_path_buf() }),
            Err(TryLockError::Error(source)) => Err(io(source)),
        }
    }

    fn path(&self) -> PathBuf {
        self.folder.join(SNAPSHOT_NAME)
    }

    /// The snapshot, `None` if the folder never had one.
    pub(super) fn load(&self) -> Result<Option<Stored>, StoreError> {
        let path = self.path();
        let damaged = |why: String| StoreError::Damaged { path: path.clone(), why };
        let file = match File::open(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(source) => return Err(StoreError::Io { path, source }),
        };
        let mut all = Vec::new();
        file.take(SNAPSHOT_BYTES_MAX + 1)
            .read_to_end(&mut all)
            .map_err(|source| StoreError::Io { path: path.clone(), source })?;
        if all.len() as u64 > SNAPSHOT_BYTES_MAX {
            return Err(damaged(format!("larger than {SNAPSHOT_BYTES_MAX} bytes")));
        }
        let end = all.iter().take(HEADER_BYTES_MAX).position(|byte| *byte == b'\n');
        let end = end.ok_or_else(|| damaged("it has no header line".into()))?;
        let header: Header = serde_json::from_slice(&all[..end])
            .map_err(|error| damaged(format!("its header is unreadable: {error}")))?;
        if header.tandem_control != FORMAT {
            return Err(damaged(format!("format {}, this build reads {FORMAT}", header.tandem_control)));
        }
        let state = all.split_off(end + 1);
        if state.len() as u64 != header.bytes {
            return Err(damaged(format!("{} bytes where {} were written", state.len(), header.bytes)));
        }
        if checksum(header.epoch_reserved, &state) != header.crc32c {
            return Err(damaged("its checksum does not match".into()));
        }
        Ok(Some(Stored { epoch_reserved: header.epoch_reserved, state }))
    }

    /// Replaces the snapshot by one of the state after `applied` commands; a newer one stays. When
    /// this returns `Ok`, what it was given survives a power cut.
    pub(super) fn save(&self, applied: u64, stored: &Stored) -> Result<(), StoreError> {
        let mut newest = self.newest.lock().unwrap_or_else(PoisonError::into_inner);
        if applied < *newest {
            return Ok(());
        }
        let path = self.path();
        self.replace(&path, stored).map_err(|source| StoreError::Io { path, source })?;
        *newest = applied;
        Ok(())
    }

    fn replace(&self, path: &Path, stored: &Stored) -> io::Result<()> {
        let header = Header {
            tandem_control: FORMAT,
            epoch_reserved: stored.epoch_reserved,
            bytes: stored.state.len() as u64,
            crc32c: checksum(stored.epoch_reserved, &stored.state),
        };
        let partial = path.with_extension("partial");
        let mut file = File::create(&partial)?;
        let mut line = serde_json::to_vec(&header)?;
        line.push(b'\n');
        file.write_all(&line)?;
        file.write_all(&stored.state)?;
        file.sync_all()?;
        drop(file);
        fs::rename(&partial, path)?;
        // The rename itself is durable only once the folder is.
        #[cfg(unix)]
        File::open(&self.folder)?.sync_all()?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stored(applied: u64) -> Stored {
        // Longer where newer, so that a mixture of two shows.
        Stored { epoch_reserved: applied, state: vec![applied as u8; 1000 + 100 * applied as usize] }
    }

    /// A caller that gives up leaves its writer at work, and the next one begins.
    #[test]
    fn writers_that_overlap_leave_the_newest_snapshot_whole() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(folder.path()).unwrap();
        std::thread::scope(|scope| {
            for first in 0..4 {
                let store = &store;
                scope.spawn(move || {
                    for applied in (first..40).step_by(4) {
                        store.save(applied, &stored(applied)).unwrap();
                    }
                });
            }
        });
        assert_eq!(store.load().unwrap(), Some(stored(39)));
        store.save(7, &stored(7)).unwrap();
        assert_eq!(store.load().unwrap(), Some(stored(39)), "an older snapshot came last");
    }
}
