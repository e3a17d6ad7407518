//! A folder of KV blocks that outlive the process, and the thread that reads and writes them. Which blocks lie
//! there is the caller's to know (an index of prefixes); here are the files (`block_file`).

use std::fs::{self, File, TryLockError};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};

use tandem_proto::block::BlockChain;
use tandem_proto::ids::Digest;
use tandem_proto::limits::KV_BLOCK_TOKENS;

use super::KvLayout;
use super::block_file::{self, BlockFileError, Place};
use super::prefix::{Held, PrefixIndex};

/// Most blocks of a folder: each is a file.
const BLOCKS_MAX: usize = 8192;
/// Most blocks that wait to be written.
const WRITES_MAX: usize = 4;
/// Most blocks that are being read.
const READS_MAX: usize = 4;
/// Requests that may wait; only where a damaged block takes what continues it along are there more, which wait to ask:
/// a write gives up two blocks at most.
const REQUESTS_MAX: usize = 3 * WRITES_MAX + 2 * READS_MAX + 1;
/// Held by the process that uses the folder.
const LOCK_FILE: &str = "lock";

/// Why a folder of blocks cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum BlockStoreError {
    /// Another process has it.
    #[error("{} is used by another process; give this one a state folder of its own", .0.display())]
    InUse(PathBuf),
    /// The bound leaves room for nothing.
    #[error("a KV block of this model takes {block_bytes} bytes, more than the {bytes_max} that may be kept on disk")]
    TooSmall {
        /// Bytes of a block.
        block_bytes: u64,
        /// The bound.
        bytes_max: u64,
    },
    /// The folder cannot be read or written.
    #[error("{}: {source}", path.display())]
    Io {
        /// The folder.
        path: PathBuf,
        /// What the operating system said.
        source: std::io::Error,
    },
}

enum Request {
    Write(Place, Vec<f32>),
    Read(Place),
    Remove(Digest),
    Flush(Box<dyn FnOnce() + Send>),
}

#[derive(Debug, Default)]
struct Shared {
    /// Blocks that wait to be written.
    writes: AtomicUsize,
    /// A write has failed: nothing more is written.
    failed: AtomicBool,
    /// Bytes of the files there are or are about to be.
    bytes: AtomicU64,
}

/// A block on disk, as an index holds it; given up, its file goes.
#[derive(Debug)]
pub(crate) struct OnDisk {
    bytes: u64,
    shared: Arc<Shared>,
    requests: SyncSender<Request>,
}

impl Held for OnDisk {
    fn is_in_use(&self) -> bool {
        false
    }

    fn given_up(self, id: Digest) {
        self.shared.bytes.fetch_sub(self.bytes, Ordering::Relaxed);
        // If the thread is gone, the next start finds what is too much.
        let _ = self.requests.send(Request::Remove(id));
    }
}

/// See the module's text.
#[derive(Debug)]
pub struct BlockStore {
    key: BlockChain,
    numbers: usize,
    blocks_max: usize,
    found: Vec<Place>,
    shared: Arc<Shared>,
    requests: SyncSender<Request>,
    results: Receiver<(Digest, Option<Vec<f32>>)>,
}

fn lock(dir: &Path) -> Result<File, BlockStoreError> {
    let io = |source| BlockStoreError::Io { path: dir.to_owned(), source };
    let mut builder = fs::DirBuilder::new();
    builder.recursive(true);
    #[cfg(unix)]
    std::os::unix::fs::DirBuilderExt::mode(&mut builder, 0o700);
    builder.create(dir).map_err(io)?;
    let file = File::options().create(true).truncate(false).write(true).open(dir.join(LOCK_FILE)).map_err(io)?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => Err(BlockStoreError::InUse(dir.to_owned())),
        Err(TryLockError::Error(e)) => Err(io(e)),
    }
}

impl BlockStore {
    /// Opens a folder for blocks of this layout under `key` and starts its thread. Blocks of other models or
    /// tenants, and files that are none, are removed.
    ///
    /// # Errors
    /// The folder cannot be written or another process uses it, no block fits, or there is no thread.
    pub fn open(dir: &Path, key: BlockChain, layout: KvLayout, bytes_max: u64) -> Result<Self, BlockStoreError> {
        let io = |source| BlockStoreError::Io { path: dir.to_owned(), source };
        let numbers = layout.layers * layout.width;
        let block_bytes = block_file::file_bytes(KV_BLOCK_TOKENS, numbers);
        let blocks_max = usize::try_from(bytes_max / block_bytes).unwrap_or(usize::MAX).min(BLOCKS_MAX);
        if blocks_max == 0 {
            return Err(BlockStoreError::TooSmall { block_bytes, bytes_max });
        }
        let held = lock(dir)?;
        let mut found = Vec::new();
        for path in block_file::list(dir).map_err(io)? {
            let place = block_file::read_place(&path)
                .and_then(|place| if place.root == key.id() { Ok(place) } else { Err(BlockFileError::Foreign) });
            match place {
                Ok(place) => found.push(place),
                Err(why) => {
                    tracing::info!(file = %path.display(), %why, "a KV block on disk is not used, and removed");
                    fs::remove_file(&path).map_err(io)?;
                }
            }
        }
        let (requests, inbox) = sync_channel(REQUESTS_MAX);
        let (done, results) = sync_channel(READS_MAX);
        let shared = Arc::new(Shared::default());
        let thread = Files { dir: dir.to_owned(), numbers, shared: shared.clone(), _lock: held };
        let spawned = std::thread::Builder::new().name("kv-files".into()).spawn(move || thread.run(&inbox, &done));
        spawned.map_err(io)?;
        Ok(Self { key, numbers, blocks_max, found, shared, requests, results })
    }

    /// Removes all blocks from a folder, if there is one that no process uses.
    ///
    /// # Errors
    /// The folder cannot be written.
    pub fn clear(dir: &Path) -> Result<(), BlockStoreError> {
        if !dir.exists() {
            return Ok(());
        }
        let _lock = lock(dir)?;
        let clear = || block_file::list(dir)?.iter().try_for_each(fs::remove_file);
        clear().map_err(|source| BlockStoreError::Io { path: dir.to_owned(), source })
    }

    /// The key of the sequences whose blocks these are.
    pub(crate) fn key(&self) -> &BlockChain {
        &self.key
    }

    /// Bytes of the files.
    pub(crate) fn bytes(&self) -> u64 {
        self.shared.bytes.load(Ordering::Relaxed)
    }

    /// An index of the blocks that were found; those that pass the bound are given up.
    pub(crate) fn index(&mut self) -> PrefixIndex<OnDisk> {
        let mut index = PrefixIndex::new(self.blocks_max);
        for place in std::mem::take(&mut self.found) {
            let held = index.put(place.parent, place.id, &place.tokens, || self.on_disk(place.tokens.len()));
            if held != Some(place.id) {
                let _ = self.requests.send(Request::Remove(place.id));
            }
        }
        index
    }

    /// A block of `tokens` tokens, to be held by an index.
    pub(crate) fn on_disk(&self, tokens: usize) -> OnDisk {
        let bytes = block_file::file_bytes(tokens, self.numbers);
        self.shared.bytes.fetch_add(bytes, Ordering::Relaxed);
        OnDisk { bytes, shared: self.shared.clone(), requests: self.requests.clone() }
    }

    /// Whether blocks can be written at all.
    pub(crate) fn writes(&self) -> bool {
        !self.shared.failed.load(Ordering::Relaxed)
    }

    /// Whether a block can be written now.
    pub(crate) fn has_room(&self) -> bool {
        self.shared.writes.load(Ordering::Relaxed) < WRITES_MAX
    }

    /// Has a block written; there must be room.
    pub(crate) fn write(&self, place: Place, numbers: Vec<f32>) {
        self.shared.writes.fetch_add(1, Ordering::Relaxed);
        let _ = self.requests.send(Request::Write(place, numbers));
    }

    /// Has a block read.
    pub(crate) fn read(&self, place: Place) {
        let _ = self.requests.send(Request::Read(place));
    }

    /// Most blocks that may be read at a time.
    pub(crate) const READS_MAX: usize = READS_MAX;

    /// A block that has been read; no numbers if they cannot be had.
    pub(crate) fn arrived(&self) -> Option<(Digest, Option<Vec<f32>>)> {
        self.results.try_recv().ok()
    }

    /// Calls `done` on the thread when all that was asked for before is done.
    pub(crate) fn flush(&self, done: impl FnOnce() + Send + 'static) {
        let _ = self.requests.send(Request::Flush(Box::new(done)));
    }
}

/// What the thread has.
struct Files {
    dir: PathBuf,
    numbers: usize,
    shared: Arc<Shared>,
    _lock: File,
}

impl Files {
    /// Runs until the last sender of requests is dropped.
    fn run(self, inbox: &Receiver<Request>, done: &SyncSender<(Digest, Option<Vec<f32>>)>) {
        for request in inbox {
            match request {
                Request::Write(place, numbers) => {
                    if let Err(why) = block_file::write(&self.dir, &place, &numbers) {
                        let dir = self.dir.display();
                        if !self.shared.failed.swap(true, Ordering::Relaxed) {
                            tracing::warn!(%dir, %why, "KV blocks cannot be kept on disk; none are until the next start");
                        }
                    }
                    self.shared.writes.fetch_sub(1, Ordering::Relaxed);
                }
                Request::Read(place) => {
                    let read = block_file::read(&self.dir, &place, self.numbers);
                    if let Err(why) = &read {
                        tracing::warn!(block = %place.id, %why, "a KV block on disk is not used; its rows are computed");
                    }
                    // As many are asked for as there is room for.
                    let _ = done.send((place.id, read.ok()));
                }
                Request::Remove(id) => {
                    if let Err(why) = block_file::remove(&self.dir, id) {
                        tracing::warn!(block = %id, %why, "a KV block on disk cannot be removed");
                    }
                }
                Request::Flush(done) => done(),
            }
        }
    }
}
