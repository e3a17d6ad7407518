use std::collections::BTreeMap;

use proptest::prelude::*;
use tandem_proto::ids::{Digest, Epoch};

use super::*;
use crate::{
    node::{LoadReport, ModelCard, NodeCard, PREFIXES_PER_NODE_MAX},
    placement::PlacementConfig,
};

fn card(name: &str, boot_epoch: u64) -> NodeCard {
    NodeCard {
        name: name.into(),
        address: "10.0.0.1:7443".into(),
        server_name: format!("{name}.tandem"),
        region: String::new(),
        models: vec![ModelCard { name: "big".into(), digest: Digest::of(b"big") }],
        boot_epoch,
    }
}

/// Makes one field of a card wrong.
type Spoil = fn(&mut NodeCard);

/// Drives a state with rising indices and request ids.
struct Driver {
    state: ControlState,
    index: u64,
}

impl Driver {
    fn new() -> Self {
        Self { state: ControlState::new(PlacementConfig::default()), index: 0 }
    }

    fn request(&mut self, now_ms: u64, command: Command) -> Request {
        self.index += 1;
        let mut id = RequestId::default();
        id.0[..8].copy_from_slice(&self.index.to_le_bytes());
        Request { id, now_ms, command }
    }

    fn apply(&mut self, now_ms: u64, command: Command) -> Outcome {
        let request = self.request(now_ms, command);
        self.state.apply(self.index, request)
    }

    fn register(&mut self, now_ms: u64, name: &str, boot_epoch: u64) -> Outcome {
        self.apply(now_ms, Command::RegisterNode { card: card(name, boot_epoch), load: LoadReport::default() })
    }

    fn heartbeat(&mut self, now_ms: u64, name: &str, boot_epoch: u64, load: LoadReport) -> Outcome {
        self.apply(now_ms, Command::Heartbeat { node: name.into(), boot_epoch, load })
    }

    fn place(&mut self, now_ms: u64, device: &str) -> Outcome {
        self.apply(now_ms, place(device))
    }

    fn ticket(&mut self, now_ms: u64, device: &str) -> Ticket {
        match self.place(now_ms, device) {
            Outcome::Placed(ticket) => ticket,
            other => panic!("{other:?}"),
        }
    }
}

fn place(device: &str) -> Command {
    Command::Place(PlaceCommand { device: device.into(), model: "big".into(), ..PlaceCommand::default() })
}

const KNOWN: Outcome = Outcome::Heartbeat { known: true, draining: false };
const UNKNOWN: Outcome = Outcome::Heartbeat { known: false, draining: false };

#[test]
fn the_epoch_stays_with_the_owner_and_rises_with_every_change() {
    let mut driver = Driver::new();
    driver.register(0, "a", 1);
    let first = driver.ticket(1, "phone");
    assert_eq!((first.node.as_str(), first.epoch, first.expires_at_ms), ("a", Epoch(1), 1 + TICKET_MS));
    assert_eq!(driver.ticket(2, "phone").epoch, Epoch(1), "same owner");
    assert_eq!(driver.ticket(3, "tablet").epoch, Epoch(2), "one counter for all devices");

    // The node restarts: its sessions are gone.
    driver.register(4, "a", 2);
    assert_eq!(driver.ticket(5, "phone").epoch, Epoch(3));

    // The device moves.
    driver.register(6, "b", 1);
    driver.apply(7, Command::Drain { node: "a".into(), draining: true });
    let moved = driver.ticket(8, "phone");
    assert_eq!((moved.node.as_str(), moved.epoch), ("b", Epoch(4)));

    // The ticket expires.
    let late = 8 + TICKET_MS;
    driver.heartbeat(late, "b", 1, LoadReport::default());
    assert_eq!(driver.ticket(late, "phone").epoch, Epoch(5));
}

#[test]
fn two_models_of_one_device_do_not_disturb_each_other() {
    let mut driver = Driver::new();
    driver.register(0, "a", 1);
    let by_digest =
        PlaceCommand { device: "phone".into(), model: Digest::of(b"big").to_string(), ..PlaceCommand::default() };
    let first = driver.ticket(1, "phone").epoch;
    assert!(matches!(driver.apply(2, Command::Place(by_digest)), Outcome::Placed(_)));
    assert_eq!(driver.ticket(3, "phone").epoch, first);
}

#[test]
fn a_repeated_request_gets_the_same_answer_and_changes_nothing() {
    let mut driver = Driver::new();
    driver.register(0, "a", 1);
    let request = driver.request(1, place("phone"));
    let first = driver.state.apply(2, request.clone());
    // The device moved on meanwhile; the late duplicate must not move it back.
    driver.register(2, "a", 2);
    let second = driver.ticket(3, "phone");
    assert_eq!(driver.state.apply(5, request.clone()), first);
    assert_eq!(driver.ticket(6, "phone").epoch, second.epoch);
    // The same id from another device is another request.
    let other = driver.state.apply(7, Request { command: place("tablet"), ..request });
    assert_ne!(other, first);
}

#[test]
fn a_refused_request_may_be_tried_again_under_its_id() {
    let mut driver = Driver::new();
    let request = driver.request(1, place("phone"));
    let refused = driver.state.apply(1, request.clone());
    let Outcome::Refused(Refusal::UnknownModel { known, .. }) = &refused else { panic!("{refused:?}") };
    assert!(known.is_empty());
    driver.register(2, "a", 1);
    assert!(matches!(driver.state.apply(3, request), Outcome::Placed(_)));
}

#[test]
fn an_older_start_of_a_node_cannot_push_the_newer_one_out() {
    let mut driver = Driver::new();
    driver.register(0, "a", 5);
    let refused = driver.register(1, "a", 4);
    assert!(matches!(&refused, Outcome::Refused(Refusal::Taken { message }) if message.contains("--name")));
    assert_eq!(driver.heartbeat(2, "a", 4, LoadReport::default()), UNKNOWN);
    assert_eq!(driver.heartbeat(3, "a", 5, LoadReport::default()), KNOWN);
    // Once it is silent, any registration under its name is taken: its clock may have been set back.
    assert_eq!(driver.register(3 + 5_001, "a", 4), Outcome::Registered);
}

#[test]
fn a_drain_lasts_until_it_is_ended_or_the_node_restarts() {
    let mut driver = Driver::new();
    driver.register(0, "a", 1);
    assert_eq!(driver.apply(1, Command::Drain { node: "z".into(), draining: true }), Outcome::Drained { known: false });
    driver.apply(1, Command::Drain { node: "a".into(), draining: true });
    driver.register(2, "a", 1);
    let refused = driver.place(3, "phone");
    let Outcome::Refused(Refusal::NoNode { excluded, .. }) = refused else { panic!("{refused:?}") };
    assert_eq!(excluded, [("a".to_owned(), "draining".to_owned())]);
    driver.apply(4, Command::Drain { node: "a".into(), draining: false });
    driver.ticket(5, "phone");
    driver.apply(6, Command::Drain { node: "a".into(), draining: true });
    driver.register(7, "a", 2);
    driver.ticket(8, "phone");
}

#[test]
fn silent_nodes_are_passed_over_then_forgotten() {
    let mut driver = Driver::new();
    driver.register(0, "a", 1);
    driver.register(0, "b", 1);
    driver.heartbeat(4_000, "b", 1, LoadReport::default());
    assert_eq!(driver.ticket(5_001, "phone").node, "b");
    let status = driver.state.status(5_001);
    assert_eq!(status.nodes.iter().map(|node| node.alive).collect::<Vec<_>>(), [false, true]);
    assert_eq!(driver.apply(NODE_FORGET_MS, Command::Expire), Outcome::Expired { nodes: 0, devices: 0 });
    assert_eq!(driver.apply(NODE_FORGET_MS + 1, Command::Expire), Outcome::Expired { nodes: 1, devices: 0 });
    assert_eq!(driver.heartbeat(NODE_FORGET_MS + 2, "a", 1, LoadReport::default()), UNKNOWN);
    let end = 5_001 + TICKET_MS;
    assert_eq!(driver.apply(end, Command::Expire), Outcome::Expired { nodes: 1, devices: 1 });
    assert_eq!(driver.state.status(end).devices, 0);
}

#[test]
fn a_clock_that_steps_back_is_ignored() {
    let mut driver = Driver::new();
    driver.register(10_000, "a", 1);
    let ticket = driver.ticket(5_000, "phone");
    assert_eq!((ticket.expires_at_ms, driver.state.clock_ms()), (10_000 + TICKET_MS, 10_000));
}

/// The clock was an hour, or ten years, ahead when the snapshot was written, or is behind now.
#[test]
fn time_in_a_snapshot_blocks_nobody() {
    for ahead_ms in [3_600_000, 10 * 365 * 86_400_000] {
        let now = 1_800_000_000_000;
        let mut driver = Driver::new();
        driver.register(now + ahead_ms, "a", now + ahead_ms);
        let before = driver.ticket(now + ahead_ms + 1, "phone");
        let bytes = driver.state.snapshot().unwrap();
        driver.state = ControlState::restore(PlacementConfig::default(), &bytes).unwrap();
        driver.apply(now, Command::Restart { floor: before.epoch });
        assert_eq!(driver.state.clock_ms(), now);
        // What was owned is still owned, for as long as it was to be.
        let after = driver.ticket(now + 1, "phone");
        assert_eq!((after.epoch, after.expires_at_ms), (before.epoch, now + 1 + TICKET_MS));
        // The node comes back with the earlier clock of its own start.
        assert_eq!(driver.register(now + 2, "a", now + 2), Outcome::Registered, "{ahead_ms}");
        assert!(driver.ticket(now + 3, "phone").epoch > before.epoch);
        // And time goes on: a silent node is silent, a ticket ends.
        let late = now + 3 + TICKET_MS;
        assert!(!driver.state.status(now + 5_003).nodes[0].alive);
        assert_eq!(driver.apply(late, Command::Expire), Outcome::Expired { nodes: 1, devices: 1 });
    }
}

/// A registration that was restored from the log leaves its name free; one that reports does not.
#[test]
fn a_node_holds_its_name_once_it_has_reported_to_this_router() {
    let mut driver = Driver::new();
    driver.register(10, "a", 10);
    driver.apply(11, Command::Restart { floor: Epoch(0) });
    assert_eq!(driver.heartbeat(12, "a", 10, LoadReport::default()), KNOWN);
    assert!(matches!(driver.register(13, "a", 9), Outcome::Refused(Refusal::Taken { .. })));
    driver.apply(14, Command::Restart { floor: Epoch(0) });
    assert_eq!(driver.register(15, "a", 9), Outcome::Registered);
}

#[test]
fn malformed_commands_are_refused_with_the_field() {
    let mut driver = Driver::new();
    let refused = |outcome: Outcome, field: &str| match outcome {
        Outcome::Refused(Refusal::Invalid { message }) => {
            assert!(message.contains(field), "{message:?} lacks {field:?}");
        }
        other => panic!("{field}: {other:?}"),
    };
    let cards: [(&str, Spoil); 8] = [
        ("name", |card| card.name.clear()),
        ("name", |card| card.name = "x".repeat(300)),
        ("name", |card| card.name = "a\nb".into()),
        ("address", |card| card.address = "10.0.0.1".into()),
        ("address", |card| card.address = "10.0.0.1:0".into()),
        ("server_name", |card| card.server_name.clear()),
        ("models", |card| card.models.clear()),
        ("models", |card| card.models = vec![card.models[0].clone(); 17]),
    ];
    for (field, spoil) in cards {
        let mut card = card("a", 1);
        spoil(&mut card);
        refused(driver.apply(0, Command::RegisterNode { card, load: LoadReport::default() }), field);
    }
    driver.register(0, "a", 1);
    let prefixes = vec![Digest::default(); PREFIXES_PER_NODE_MAX + 1];
    refused(driver.heartbeat(1, "a", 1, LoadReport { prefixes, ..LoadReport::default() }), "prefixes");
    let good = PlaceCommand { device: "phone".into(), model: "big".into(), ..PlaceCommand::default() };
    let many: BTreeMap<_, _> = (0..=LATENCIES_MAX).map(|at| (at.to_string(), 1)).collect();
    for (field, place) in [
        ("device", PlaceCommand { device: String::new(), ..good.clone() }),
        ("model", PlaceCommand { model: String::new(), ..good.clone() }),
        ("region", PlaceCommand { region: "r".repeat(300), ..good.clone() }),
        ("latencies", PlaceCommand { latencies_us: many, ..good.clone() }),
        ("avoid", PlaceCommand { avoid: vec!["a".into(); AVOID_MAX + 1], ..good }),
    ] {
        refused(driver.apply(2, Command::Place(place)), field);
    }
}

#[test]
fn every_table_is_bounded() {
    let mut driver = Driver::new();
    for at in 0..NODES_MAX {
        assert_eq!(driver.register(0, &format!("n{at}"), 1), Outcome::Registered);
    }
    let refused = driver.register(0, "one-more", 1);
    assert!(matches!(refused, Outcome::Refused(Refusal::Full { .. })), "{refused:?}");
    assert_eq!(driver.register(0, "n0", 2), Outcome::Registered, "a known node may always return");

    // One node is enough for the devices, and ranking 1024 of them 65536 times is not.
    let mut driver = Driver::new();
    driver.register(0, "a", 1);
    for at in 0..DEVICES_MAX {
        driver.ticket(1, &format!("d{at}"));
    }
    let refused = driver.place(2, "one-more");
    assert!(matches!(refused, Outcome::Refused(Refusal::Full { .. })), "{refused:?}");
    driver.ticket(2, "d0");
    let full = driver.state.snapshot().unwrap();
    let back = ControlState::restore(PlacementConfig::default(), &full).unwrap();
    assert_eq!(back, driver.state);

    // Expired tickets make room; the counter goes on from where it was.
    let late = 3 + TICKET_MS;
    driver.heartbeat(late, "a", 1, LoadReport::default());
    assert_eq!(driver.ticket(late, "one-more").epoch, Epoch(DEVICES_MAX as u64 + 1));
    assert_eq!(driver.state.status(late).devices, 1);

    // Only the newest outcomes are remembered.
    let mut driver = Driver::new();
    driver.register(0, "a", 1);
    let first = driver.request(1, place("phone"));
    driver.state.apply(2, first.clone());
    driver.register(2, "a", 2);
    for at in 0..DEDUP_MAX - 1 {
        driver.ticket(2, &format!("d{}", at % 100));
    }
    let remembered = driver.state.apply(9_000, first.clone());
    assert!(matches!(remembered, Outcome::Placed(ticket) if ticket.epoch == Epoch(1)));
    driver.ticket(2, "d0");
    let forgotten = driver.state.apply(9_001, first);
    assert!(matches!(forgotten, Outcome::Placed(ticket) if ticket.epoch > Epoch(1)));
}

#[test]
fn long_lists_in_answers_are_cut() {
    let mut driver = Driver::new();
    for at in 0..40 {
        driver.register(0, &format!("n{at:02}"), 1);
    }
    assert_eq!(driver.ticket(1, "phone").alternatives.len(), ALTERNATIVES_MAX);
    let refused = driver.place(6_000, "phone");
    let Outcome::Refused(Refusal::NoNode { excluded, .. }) = refused else { panic!("{refused:?}") };
    assert_eq!(excluded.len(), ALTERNATIVES_MAX);
}

#[test]
fn damaged_snapshots_are_refused() {
    let mut driver = Driver::new();
    driver.register(0, "a", 1);
    driver.ticket(1, "phone");
    let good = String::from_utf8(driver.state.snapshot().unwrap()).unwrap();
    let says = |bytes: &str, words: &str| {
        let error = ControlState::restore(PlacementConfig::default(), bytes.as_bytes()).unwrap_err().to_string();
        assert!(error.contains(words), "{error:?} lacks {words:?}");
    };
    assert!(good.contains("\"epoch\":1"), "{good}");
    says(&good[..good.len() / 2], "not of the expected form");
    says(&good.replacen("\"epoch\":1", "\"epoch\":0", 1), "the counter stands at 0");
    says(&good.replace("10.0.0.1:7443", "nowhere"), "node `a`");
    says(&good.replace("clock_ms", "clock"), "not of the expected form");
}

/// One step of a random history.
#[derive(Debug, Clone)]
enum Step {
    Register(u8, u64),
    Heartbeat(u8, u64, u32),
    Drain(u8, bool),
    Place(u8, Option<u8>),
    Expire,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        (0u8..4, 1u64..4).prop_map(|(node, boot)| Step::Register(node, boot)),
        (0u8..4, 1u64..4, 0u32..10).prop_map(|(node, boot, sessions)| Step::Heartbeat(node, boot, sessions)),
        (0u8..4, any::<bool>()).prop_map(|(node, drain)| Step::Drain(node, drain)),
        (0u8..5, prop::option::of(0u8..4)).prop_map(|(device, avoid)| Step::Place(device, avoid)),
        Just(Step::Expire),
    ]
}

fn command(step: &Step) -> Command {
    let name = |node: u8| format!("n{node}");
    match step {
        Step::Register(node, boot) => {
            Command::RegisterNode { card: card(&name(*node), *boot), load: LoadReport::default() }
        }
        Step::Heartbeat(node, boot_epoch, sessions) => Command::Heartbeat {
            node: name(*node),
            boot_epoch: *boot_epoch,
            load: LoadReport { sessions: *sessions, sessions_max: 8, ..LoadReport::default() },
        },
        Step::Drain(node, draining) => Command::Drain { node: name(*node), draining: *draining },
        Step::Place(device, avoid) => Command::Place(PlaceCommand {
            device: format!("d{device}"),
            model: "big".into(),
            avoid: avoid.iter().map(|node| name(*node)).collect(),
            ..PlaceCommand::default()
        }),
        Step::Expire => Command::Expire,
    }
}

proptest! {
    /// Replicas agree byte for byte, also when one of them is restored from a snapshot on the way;
    /// a device's epochs never fall, and (device, epoch) names one start of one node.
    #[test]
    fn replicas_agree_and_epochs_fence(
        steps in prop::collection::vec((step(), 0u64..20_000), 1..120),
        restore_at in 0usize..120,
    ) {
        let (mut one, mut two) = (Driver::new(), Driver::new());
        let mut now_ms = 0;
        let mut boots = BTreeMap::new();
        let mut owners = BTreeMap::new();
        let mut last = BTreeMap::new();
        for (at, (step, pause)) in steps.iter().enumerate() {
            now_ms += pause;
            let outcome = one.apply(now_ms, command(step));
            prop_assert_eq!(&two.apply(now_ms, command(step)), &outcome);
            if at == restore_at {
                let bytes = two.state.snapshot().unwrap();
                two.state = ControlState::restore(PlacementConfig::default(), &bytes).unwrap();
            }
            prop_assert_eq!(one.state.snapshot().unwrap(), two.state.snapshot().unwrap());
            if let (Step::Register(node, boot), Outcome::Registered) = (step, &outcome) {
                boots.insert(format!("n{node}"), *boot);
            }
            if let (Step::Place(device, _), Outcome::Placed(ticket)) = (step, outcome) {
                let owner = (*device, ticket.node.clone(), boots[&ticket.node]);
                prop_assert_eq!(owners.entry(ticket.epoch).or_insert_with(|| owner.clone()), &owner);
                let before = last.insert(*device, ticket.epoch);
                prop_assert!(before <= Some(ticket.epoch), "{before:?} then {:?}", ticket.epoch);
            }
        }
    }
}
