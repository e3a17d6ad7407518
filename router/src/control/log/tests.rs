use std::{fs, path::PathBuf};

use proptest::prelude::*;
use tandem_proto::ids::Digest;

use super::*;
use crate::{
    control::PlaceCommand,
    node::{LoadReport, ModelCard, NodeCard},
};

fn request(id: u64, now_ms: u64, command: Command) -> Request {
    let mut bytes = RequestId::default();
    bytes.0[..8].copy_from_slice(&id.to_le_bytes());
    Request { id: bytes, now_ms, command }
}

fn register(name: &str, boot_epoch: u64) -> Command {
    let card = NodeCard {
        name: name.into(),
        address: "10.0.0.1:7443".into(),
        server_name: "a.tandem".into(),
        region: String::new(),
        models: vec![ModelCard { name: "big".into(), digest: Digest::of(b"big") }],
        boot_epoch,
    };
    Command::RegisterNode { card, load: LoadReport::default() }
}

fn place(device: u64) -> Command {
    Command::Place(PlaceCommand { device: format!("d{device}"), model: "big".into(), ..PlaceCommand::default() })
}

async fn open(folder: &Path) -> SingleNode {
    SingleNode::open(folder, PlacementConfig::default(), 1).await.unwrap()
}

async fn epoch_of(log: &SingleNode, id: u64, device: u64) -> u64 {
    match log.propose(request(id, 1, place(device))).await.unwrap() {
        Outcome::Placed(ticket) => ticket.epoch.0,
        other => panic!("{other:?}"),
    }
}

fn snapshot_file(folder: &Path) -> PathBuf {
    folder.join("control.snapshot")
}

#[tokio::test]
async fn a_crash_never_brings_an_old_epoch_back() {
    let folder = tempfile::tempdir().unwrap();
    let mut last = 0;
    for (round, places) in [1, 3, EPOCHS_RESERVED - 1, EPOCHS_RESERVED, EPOCHS_RESERVED + 1, 2].into_iter().enumerate()
    {
        let log = open(folder.path()).await;
        log.propose(request(0, 1, register("a", round as u64))).await.unwrap();
        for id in 0..places {
            // A repeated id would be answered from memory.
            let epoch = epoch_of(&log, round as u64 * 10_000 + id, id).await;
            assert!(epoch > last, "{epoch} after {last} in round {round}");
            last = epoch;
        }
        // No flush: the process is killed here.
    }
}

#[tokio::test]
async fn what_a_flush_wrote_is_there_again() {
    let folder = tempfile::tempdir().unwrap();
    let log = open(folder.path()).await;
    log.propose(request(0, 1, register("a", 1))).await.unwrap();
    let epoch = epoch_of(&log, 1, 7).await;
    log.flush().await.unwrap();
    let before = fs::metadata(snapshot_file(folder.path())).unwrap().modified().unwrap();
    log.flush().await.unwrap();
    let after = fs::metadata(snapshot_file(folder.path())).unwrap().modified().unwrap();
    assert_eq!(before, after, "nothing new, nothing written");
    drop(log);
    let log = open(folder.path()).await;
    assert_eq!(epoch_of(&log, 2, 7).await, epoch, "same owner, same epoch");
    assert!(epoch_of(&log, 3, 8).await > epoch);
}

#[tokio::test]
async fn a_lost_folder_starts_from_the_clock() {
    let folder = tempfile::tempdir().unwrap();
    let now_ms = 1_800_000_000_000;
    let log = SingleNode::open(folder.path(), PlacementConfig::default(), now_ms).await.unwrap();
    log.propose(request(0, now_ms, register("a", 1))).await.unwrap();
    assert!(epoch_of(&log, 1, 1).await > now_ms);
}

#[tokio::test]
async fn no_ticket_without_a_reserved_epoch() {
    let outside = tempfile::tempdir().unwrap();
    let folder = outside.path().join("state");
    let log = open(&folder).await;
    log.propose(request(0, 1, register("a", 1))).await.unwrap();
    // The disk goes away.
    fs::remove_dir_all(&folder).unwrap();
    for id in 1..=EPOCHS_RESERVED {
        epoch_of(&log, id, id).await;
    }
    let id = EPOCHS_RESERVED + 1;
    let refused = log.propose(request(id, 1, place(id))).await;
    assert!(matches!(refused, Err(LogError::Store(StoreError::Io { .. }))), "{refused:?}");
    let refused = log.propose(request(0, 1, register("b", 1))).await;
    assert!(refused.is_err(), "a registration that is not on disk must not be answered");
    // And comes back.
    fs::create_dir_all(&folder).unwrap();
    assert!(matches!(log.propose(request(id, 1, place(id))).await, Ok(Outcome::Placed(_))));
}

#[tokio::test]
async fn a_second_owner_of_the_folder_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let first = open(folder.path()).await;
    let second = SingleNode::open(folder.path(), PlacementConfig::default(), 1).await;
    assert!(matches!(second, Err(LogError::Store(StoreError::InUse { .. }))), "{second:?}");
    drop(first);
    open(folder.path()).await;
}

#[tokio::test]
async fn a_folder_that_cannot_be_made_says_which() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("file");
    fs::write(&file, "").unwrap();
    let error = SingleNode::open(&file, PlacementConfig::default(), 1).await.unwrap_err().to_string();
    assert!(error.contains("file"), "{error}");
}

/// A state folder with a snapshot, and the snapshot's bytes.
async fn written() -> (tempfile::TempDir, Vec<u8>) {
    let folder = tempfile::tempdir().unwrap();
    let log = open(folder.path()).await;
    log.propose(request(0, 1, register("a", 1))).await.unwrap();
    epoch_of(&log, 1, 1).await;
    log.flush().await.unwrap();
    let bytes = fs::read(snapshot_file(folder.path())).unwrap();
    (folder, bytes)
}

async fn must_stop(folder: &Path, bytes: &[u8], what: &str) {
    fs::write(snapshot_file(folder), bytes).unwrap();
    let error = SingleNode::open(folder, PlacementConfig::default(), 1).await.expect_err(what).to_string();
    assert!(error.contains("damaged") && error.contains("control.snapshot"), "{what}: {error}");
    assert_eq!(fs::read(snapshot_file(folder)).unwrap(), bytes, "{what}: the evidence is kept");
}

#[tokio::test]
async fn a_torn_or_flipped_snapshot_stops_the_router() {
    let (folder, good) = written().await;
    for len in 0..good.len() {
        must_stop(folder.path(), &good[..len], &format!("cut at {len}")).await;
    }
    for at in 0..good.len() {
        let mut flipped = good.clone();
        flipped[at] ^= 0x10;
        must_stop(folder.path(), &flipped, &format!("bit flipped in byte {at}")).await;
    }
    let mut longer = good.clone();
    longer.push(b'\n');
    must_stop(folder.path(), &longer, "a byte more").await;
    fs::write(snapshot_file(folder.path()), &good).unwrap();
    open(folder.path()).await;
}

#[tokio::test]
async fn a_half_written_new_snapshot_does_not_matter() {
    let (folder, good) = written().await;
    fs::write(folder.path().join("control.partial"), &good[..good.len() / 2]).unwrap();
    open(folder.path()).await;
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    /// Kills at any point: no epoch is ever answered for two owners.
    #[test]
    fn an_epoch_never_has_two_owners(steps in prop::collection::vec((0u64..6, 0u8..12), 1..60)) {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        runtime.block_on(async {
            let folder = tempfile::tempdir().unwrap();
            let mut log = open(folder.path()).await;
            let mut owners = std::collections::BTreeMap::new();
            let mut boot = 0;
            log.propose(request(0, 1, register("a", boot))).await.unwrap();
            for (at, (device, event)) in steps.into_iter().enumerate() {
                match event {
                    0 => {
                        drop(log);
                        log = open(folder.path()).await;
                    }
                    1 => log.flush().await.unwrap(),
                    2 => {
                        boot += 1;
                        log.propose(request(0, 1, register("a", boot))).await.unwrap();
                    }
                    _ => {
                        let epoch = epoch_of(&log, 1 + at as u64, device).await;
                        let owner = (device, boot);
                        assert_eq!(owners.entry(epoch).or_insert(owner), &owner);
                    }
                }
            }
        });
    }
}
