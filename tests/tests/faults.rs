//! What an answer survives: the stream has the indices 0..n once each, ends properly, and says when
//! the cloud was not to be had.

use std::time::Duration;

use anyhow::Result;
use tandem_edge_node::pacing::ExactStrategy;
use tandem_edge_node::request::{Controls, Mode};
use tandem_lab::cluster::{Cluster, ClusterOptions};
use tandem_proto::message::SamplingParams;
use tandem_tests::answers::{answer, questions, request};

const QUESTION: &str = "Calculate 936 + 181.";

fn cut(cluster: &Cluster, cut: bool) {
    cluster.edge.set_controls(&Controls { cut: Some(cut), ..Controls::default() });
}

async fn connected(cluster: &Cluster) -> Result<()> {
    tokio::time::timeout(Duration::from_secs(10), async {
        while !cluster.edge.status().cloud_connected {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_link_cut_at_any_token_and_restored_changes_nothing() -> Result<()> {
    for (mode, strategy) in
        [(Mode::Exact, ExactStrategy::Draft), (Mode::Exact, ExactStrategy::Stream), (Mode::Cloud, ExactStrategy::Auto)]
    {
        let mut o = ClusterOptions::default();
        o.edge.exact = strategy;
        o.edge.reconnect_ms_max = 30_000;
        let cluster = Cluster::start(o).await?;
        let ask = || request(&cluster.edge, QUESTION, mode, &SamplingParams::default());
        let undisturbed = answer(&cluster.edge, ask()?, |_| {}).await?;
        for k in 0..undisturbed.tokens.len() as u32 {
            connected(&cluster).await?;
            let disturbed = answer(&cluster.edge, ask()?, |t| {
                if t.index == k {
                    cut(&cluster, true);
                    cut(&cluster, false);
                }
            })
            .await?;
            assert_eq!(disturbed.ids(), undisturbed.ids(), "{mode:?} {strategy:?}, cut after token {k}");
            assert!(!disturbed.route.degraded, "{mode:?} {strategy:?}, cut after token {k}");
        }
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn without_the_cloud_the_edge_ends_the_answer_and_says_so() -> Result<()> {
    for mode in [Mode::Auto, Mode::Exact, Mode::Cloud] {
        let mut o = ClusterOptions::default();
        o.edge.reconnect_ms_max = 50;
        let cluster = Cluster::start(o).await?;
        let ask = || {
            let mut r = request(&cluster.edge, QUESTION, mode, &SamplingParams::default())?;
            // Every token is a question.
            r.threshold = Some(0.0);
            anyhow::Ok(r)
        };
        let whole = answer(&cluster.edge, ask()?, |_| {}).await?;
        assert!(!whole.route.degraded, "{mode:?}");
        for k in 0..whole.tokens.len() as u32 - 1 {
            connected(&cluster).await?;
            let alone = answer(&cluster.edge, ask()?, |t| {
                if t.index == k {
                    cut(&cluster, true);
                }
            })
            .await?;
            assert!(alone.tokens.len() > k as usize, "{mode:?}, cut after token {k}");
            let prefix = k as usize + 1;
            assert_eq!(alone.ids()[..prefix], whole.ids()[..prefix], "{mode:?}, cut after token {k}");
            // Tokens in flight may complete the answer before the cut is felt.
            if alone.ids() != whole.ids() || alone.tokens.iter().any(|t| t.reason == "cloud-away") {
                assert!(alone.route.degraded, "{mode:?}, cut after token {k}: {alone:?}");
            }
            cut(&cluster, false);
        }
        cut(&cluster, true);
        let alone = answer(&cluster.edge, ask()?, |_| {}).await?;
        assert!(alone.route.degraded && alone.route.degraded_reason.is_some(), "{mode:?}, away from the start");
        assert!(alone.route.cloud_tokens == 0 && alone.route.accepted == 0, "{mode:?}");
        cut(&cluster, false);
        connected(&cluster).await?;
        let back = answer(&cluster.edge, ask()?, |_| {}).await?;
        assert_eq!(back.ids(), whole.ids(), "{mode:?}: the cloud is used again without a restart");
        assert!(!back.route.degraded);
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn local_answers_leave_nothing_on_the_wire() -> Result<()> {
    let cluster = Cluster::start(ClusterOptions::default()).await?;
    for question in questions(12)? {
        let a =
            answer(&cluster.edge, request(&cluster.edge, &question, Mode::Local, &SamplingParams::default())?, |_| {})
                .await?;
        assert_eq!((a.route.bytes_up, a.route.bytes_down, a.route.round_trips), (0, 0, 0));
        assert_eq!(a.route.edge_tokens as usize, a.tokens.len());
    }
    assert_eq!(cluster.cloud.load().rows, 0);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_goes_away_stops_the_cloud_within_a_second() -> Result<()> {
    let mut o = ClusterOptions::default();
    o.edge.exact = ExactStrategy::Stream;
    let cluster = Cluster::start(o).await?;
    let mut generation =
        cluster.edge.submit(request(&cluster.edge, QUESTION, Mode::Cloud, &SamplingParams::default())?)?;
    assert!(generation.events.recv().await.is_some());
    drop(generation);
    tokio::time::timeout(Duration::from_secs(1), async {
        while cluster.cloud.load().sessions > 0 || cluster.edge.status().active_requests > 0 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await?;
    let rows = cluster.cloud.load().rows;
    tokio::time::sleep(Duration::from_millis(200)).await;
    assert_eq!(cluster.cloud.load().rows, rows, "the cloud decodes on");
    Ok(())
}
