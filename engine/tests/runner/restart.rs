//! Rows that an earlier runner has computed and left on disk: the same bits, or none.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering::Relaxed;

use tandem_engine::{BlockStore, BlockStoreError};
use tempfile::TempDir;

use super::prefix::{WITH_PREFIX, other_from, prompt, tenant};
use super::*;

const ROOM: u64 = 64 << 20;

/// When the thread of the runner before has let go of the folder.
fn settled<T>(mut opens: impl FnMut() -> Result<T, BlockStoreError>) -> T {
    let begun = Instant::now();
    loop {
        match opens() {
            Err(BlockStoreError::InUse(_)) if begun.elapsed() < Duration::from_secs(20) => std::thread::yield_now(),
            opened => return opened.expect("opens"),
        }
    }
}

fn open(dir: &Path, name: u8, bytes_max: u64) -> BlockStore {
    settled(|| BlockStore::open(dir, tenant(name).expect("a key"), MODEL.kv_layout(), bytes_max))
}

fn engine(dir: &TempDir, options: RunnerOptions) -> Engine {
    Engine::start_with(MODEL.clone(), options, Some(open(dir.path(), 1, ROOM)))
}

fn files(dir: &Path) -> Vec<PathBuf> {
    let mut files: Vec<_> = fs::read_dir(dir).expect("a folder").map(|entry| entry.expect("an entry").path()).collect();
    files.retain(|path| path.extension().is_some_and(|extension| extension == "kv"));
    files.sort();
    files
}

fn bytes(dir: &Path) -> u64 {
    files(dir).iter().map(|file| fs::metadata(file).expect("a file").len()).sum()
}

impl Engine {
    fn save(&self) {
        let (done, saved) = answer();
        self.runner.save(done).expect("queued");
        saved.recv().expect("answered").expect("saved");
    }

    /// Computes a text and leaves it on disk.
    fn leave(self, text: &[u32]) {
        self.check(prompt(1, text));
        self.forget(1);
        self.save();
    }
}

#[test]
fn a_conversation_survives_its_process() {
    let text = text(300);
    let dir = tempfile::tempdir().expect("a folder");
    engine(&dir, WITH_PREFIX).leave(&text[..230]);
    assert_eq!(files(dir.path()).len(), 8);
    let second = engine(&dir, WITH_PREFIX);
    assert_eq!(second.held(tenant(1), &text), 230);
    let before = second.rows();
    assert_eq!(second.check(prompt(1, &text)), 230);
    assert_eq!(second.rows() - before, 70);
    // Another conversation that begins alike, of which memory holds all; and the longer one once more.
    assert_eq!(second.check(prompt(2, &other_from(&text, 77, 9))), 77);
    second.forget(1);
    second.gauge(|load| &load.saved_blocks, 10);
    assert_eq!(second.runner.load().restored_blocks.load(Relaxed), 8);
    second.save();
    assert_eq!(second.runner.load().saved_bytes.load(Relaxed), bytes(dir.path()));
    drop(second);
    let third = engine(&dir, WITH_PREFIX);
    assert_eq!(third.check(prompt(1, &text)), 299);
}

/// Without being asked to, as soon as there is nothing else to do: a process that is killed had no time for a farewell.
#[test]
fn what_is_over_goes_to_the_disk_by_itself() {
    let (dir, text) = (tempfile::tempdir().expect("a folder"), text(100));
    let first = engine(&dir, WITH_PREFIX);
    first.check(prompt(1, &text));
    first.forget(1);
    first.gauge(|load| &load.saved_blocks, 4);
    drop(first);
    assert_eq!(engine(&dir, WITH_PREFIX).check(prompt(1, &text)), 99);
}

#[test]
fn a_damaged_block_is_found_and_computed_anew() {
    let text = text(300);
    type Spoil = fn(&Path, &[u8]);
    let table: [(&str, Spoil); 3] = [
        ("a number", |file, bytes| {
            let mut bytes = bytes.to_vec();
            let at = bytes.len() - 1000;
            bytes[at] ^= 1;
            fs::write(file, bytes).expect("written");
        }),
        ("torn", |file, bytes| fs::write(file, &bytes[..bytes.len() / 2]).expect("written")),
        ("gone", |file, _| fs::remove_file(file).expect("removed")),
    ];
    for (what, spoil) in table {
        let dir = tempfile::tempdir().expect("a folder");
        engine(&dir, WITH_PREFIX).leave(&text[..230]);
        let fourth = tenant(1).expect("a key").ids(&text)[3];
        let file = dir.path().join(format!("{fourth}.kv"));
        spoil(&file, &fs::read(&file).expect("a block"));
        let second = engine(&dir, WITH_PREFIX);
        assert_eq!(second.check(prompt(1, &text)), 96, "{what}");
        assert_eq!(second.runner.load().refused_blocks.load(Relaxed), u64::from(what != "gone"), "{what}");
        second.forget(1);
        second.save();
        drop(second);
        assert_eq!(engine(&dir, WITH_PREFIX).check(prompt(1, &text)), 299, "{what}: it is whole again");
    }
}

#[test]
fn files_of_others_are_not_used() {
    let (dir, text) = (tempfile::tempdir().expect("a folder"), text(100));
    engine(&dir, WITH_PREFIX).leave(&text);
    fs::write(dir.path().join("0.kv"), "no block").expect("written");
    fs::write(dir.path().join("1.kv.part"), "half a block").expect("written");
    // Two processes share no folder.
    let held = open(dir.path(), 1, ROOM);
    let again = BlockStore::open(dir.path(), tenant(1).expect("a key"), MODEL.kv_layout(), ROOM);
    assert!(matches!(again, Err(BlockStoreError::InUse(_))), "{again:?}");
    drop(held);
    assert_eq!(files(dir.path()).len(), 4, "what is no block goes");
    let other = Engine::start_with(MODEL.clone(), WITH_PREFIX, Some(open(dir.path(), 2, ROOM)));
    assert_eq!(other.held(tenant(2), &text), 0);
    assert_eq!(other.check(Job { prefix: tenant(2), ..prompt(1, &text) }), 0);
    drop(other);
    assert_eq!(engine(&dir, WITH_PREFIX).check(prompt(1, &text)), 0);
    let small = BlockStore::open(dir.path(), tenant(1).expect("a key"), MODEL.kv_layout(), 1000);
    assert!(matches!(small, Err(BlockStoreError::TooSmall { bytes_max: 1000, .. })), "{small:?}");
}

#[test]
fn the_bound_holds_and_the_last_conversation_is_whole() {
    let dir = tempfile::tempdir().expect("a folder");
    let block = (4 * MODEL.spec().layers * MODEL.spec().kv_width() * KV_BLOCK_TOKENS) as u64;
    let bytes_max = 6 * block + block / 2;
    let texts: Vec<Vec<u32>> = (0..6).map(|n| other_from(&text(130), 20, n)).collect();
    let start = |bytes_max| Engine::start_with(MODEL.clone(), WITH_PREFIX, Some(open(dir.path(), 1, bytes_max)));
    let first = start(bytes_max);
    for text in &texts {
        first.check(prompt(1, text));
        first.forget(1);
        first.save();
        assert!(bytes(dir.path()) <= bytes_max, "{}", bytes(dir.path()));
    }
    assert_eq!(files(dir.path()).len(), 6);
    first.check(prompt(1, &texts[2]));
    first.forget(1);
    first.save();
    drop(first);
    // A smaller bound holds too.
    let second = start(5 * block + block / 2);
    assert_eq!(second.held(tenant(1), &texts[2]), 130);
    second.save();
    assert_eq!(files(dir.path()).len(), 5);
    // Of a text that is longer than the bound its beginning is kept.
    let long = other_from(&text(300), 0, 50);
    second.check(prompt(1, &long));
    second.forget(1);
    second.save();
    assert_eq!(files(dir.path()).len(), 5);
    drop(second);
    // Memory that is too small for what is on disk takes what fits.
    let store = Some(open(dir.path(), 1, bytes_max));
    let third = Engine::start_with(MODEL.clone(), RunnerOptions { prefix_blocks_max: 2, ..WITH_PREFIX }, store);
    assert_eq!(third.held(tenant(1), &long), 160);
    assert_eq!(third.check(prompt(1, &long)), 64);
    drop(third);
    settled(|| BlockStore::clear(dir.path()));
    assert_eq!(files(dir.path()).len(), 0);
}
