use std::path::Path;
use std::sync::Arc;

use tandem_router::policy::{PolicyFile, PolicySpec};

use super::*;

/// The embedded pair with its fitted rule.
fn nodes() -> ClusterOptions {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/policy.json");
    let policy_file = Some(Arc::new(PolicyFile::load(&file).unwrap()));
    let policy = PolicySpec::Calibrated { threshold: None };
    ClusterOptions { policy, policy_file, ..ClusterOptions::default() }
}

/// Every way and every exchange over a short link: the texts are what they must be.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn texts_do_not_depend_on_link_strategy_or_exchange() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let options = LinkOptions { data: root.join("models/data"), rtts_ms: vec![10, 0], answers: 1 };
    let report = measure(&options, &nodes()).await.unwrap();
    assert_eq!(report.speeds.len(), 2 * WAYS.len());
    for row in &report.speeds {
        assert!(row.tokens > 0 && row.equals_cloud != Some(false), "{row:?}");
        let drafts = row.way.mode == Mode::Exact && row.way.strategy == ExactStrategy::Draft;
        assert!(row.hidden_share.is_none() || (row.rtt_ms > 0 && row.round_trips > 0.0), "{row:?}");
        assert!(row.hidden_share.is_some() || row.rtt_ms == 0 || !drafts, "{row:?}");
    }
    for row in &report.exchanges {
        assert!(row.same_text, "{row:?}");
    }
    let fetched = |on| {
        report.exchanges.iter().find(|r| r.exchange.contains("long prompt") && r.on == on).map_or(0.0, |r| r.bytes[1])
    };
    assert!(fetched(true) > 100.0 * fetched(false), "{} {}", fetched(true), fetched(false));
    assert!(report.markdown().contains("exact (draft)"));
    let json = serde_json::to_string(&report).unwrap();
    assert_eq!(serde_json::from_str::<LinkReport>(&json).unwrap().speeds.len(), report.speeds.len());
}

#[tokio::test]
async fn a_link_experiment_needs_something_to_compare_with() {
    let options = LinkOptions { rtts_ms: vec![50], ..LinkOptions::default() };
    assert!(matches!(measure(&options, &nodes()).await, Err(LabError::Empty(_))));
}
