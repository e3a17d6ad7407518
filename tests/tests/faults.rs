//! What an answer survives: the stream has the indices 0..n once each, ends properly, and says when
//! the cloud was not to be had.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use tandem_edge_node::pacing::ExactStrategy;
use tandem_edge_node::request::Mode;
use tandem_lab::cluster::{Cluster, ClusterOptions};
use tandem_proto::message::SamplingParams;
use tandem_router::exchange::Exchange;
use tandem_tests::answers::{answer, connected, cut, cuts_change_nothing, questions, request};
use tandem_tests::process::until;
use tandem_transport::proxy::Faults;

const QUESTION: &str = "Calculate 936 + 181.";

#[tokio::test(flavor = "multi_thread")]
async fn a_link_cut_at_any_token_and_restored_changes_nothing() -> Result<()> {
    let greedy = SamplingParams::default();
    let sampled = SamplingParams { temperature: 0.9, top_p: 0.95, seed: 5, ..SamplingParams::default() };
    let table = [
        (Mode::Exact, ExactStrategy::Draft, Exchange::Auto, &greedy, 1),
        (Mode::Exact, ExactStrategy::Stream, Exchange::Auto, &greedy, 1),
        (Mode::Cloud, ExactStrategy::Auto, Exchange::Auto, &greedy, 1),
        (Mode::Exact, ExactStrategy::Draft, Exchange::Always, &sampled, 2),
        (Mode::Exact, ExactStrategy::Synchronous, Exchange::Always, &greedy, 3),
        (Mode::Exact, ExactStrategy::Handover, Exchange::Always, &sampled, 3),
        (Mode::Cloud, ExactStrategy::Auto, Exchange::Always, &sampled, 3),
    ];
    for (mode, strategy, hidden, sampling, step) in table {
        let mut o = ClusterOptions::default();
        o.edge.exact = strategy;
        o.edge.send_hidden = hidden;
        o.edge.reconnect_ms_max = 60_000;
        let cluster = Cluster::start(o).await?;
        let (temperature, seed) = (sampling.temperature, sampling.seed);
        let what = format!("{mode:?} {strategy:?}, hidden states {hidden:?}, T={temperature} seed={seed}");
        cuts_change_nothing(&cluster, &what, step, || request(&cluster.edge, QUESTION, mode, sampling)).await?;
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

/// Counted where the packets pass, not by the edge. What a link says to stay alive is all there may be.
#[tokio::test(flavor = "multi_thread")]
async fn local_answers_leave_nothing_on_the_wire() -> Result<()> {
    /// Packets that keep a link alive for a second: a question and its answer, from either side.
    const KEEP_ALIVE_PACKETS: u64 = 4;
    /// Largest of them, bytes.
    const KEEP_ALIVE_BYTES_MAX: u64 = 64;
    let cluster = Cluster::start(ClusterOptions { link: Some(Faults::default()), ..ClusterOptions::default() }).await?;
    let proxy = cluster.proxy.clone().context("the link's proxy")?;
    // What follows a handshake (the search for the path's largest packet) is over once the link is quiet.
    let mut before = proxy.stats();
    until("the fresh link to be quiet", async || {
        tokio::time::sleep(Duration::from_millis(250)).await;
        Ok(std::mem::replace(&mut before, proxy.stats()).forwarded == before.forwarded)
    })
    .await?;
    let begun = Instant::now();
    for question in questions(12)? {
        let a =
            answer(&cluster.edge, request(&cluster.edge, &question, Mode::Local, &SamplingParams::default())?, |_| {})
                .await?;
        assert_eq!((a.route.bytes_up, a.route.bytes_down, a.route.round_trips), (0, 0, 0));
        assert_eq!(a.route.edge_tokens as usize, a.tokens.len());
        assert_eq!(cluster.cloud.load().sessions, 0);
    }
    let after = proxy.stats();
    let packets = KEEP_ALIVE_PACKETS * (begun.elapsed().as_secs() + 2);
    let (sent, bytes) = (after.forwarded - before.forwarded, after.forwarded_bytes - before.forwarded_bytes);
    println!("12 local answers: {sent} packets of {bytes} bytes passed the link, {packets} may keep it alive");
    assert!(sent <= packets && bytes <= sent * KEEP_ALIVE_BYTES_MAX, "{sent} packets, {bytes} bytes");
    assert_eq!((cluster.cloud.load().rows, cluster.cloud.load().sessions), (0, 0));

    // An answer of the cloud does pass here.
    let request = request(&cluster.edge, QUESTION, Mode::Cloud, &SamplingParams::default())?;
    let down = answer(&cluster.edge, request, |_| {}).await?.route.bytes_down;
    assert!(down > 0 && proxy.stats().forwarded_bytes - after.forwarded_bytes >= down);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_goes_away_stops_the_cloud() -> Result<()> {
    let mut o = ClusterOptions::default();
    o.edge.exact = ExactStrategy::Stream;
    let cluster = Cluster::start(o).await?;
    let mut generation =
        cluster.edge.submit(request(&cluster.edge, QUESTION, Mode::Cloud, &SamplingParams::default())?)?;
    assert!(generation.events.recv().await.is_some());
    drop(generation);
    until("the session to end on both sides", async || {
        Ok(cluster.cloud.load().sessions == 0 && cluster.edge.status().active_requests == 0)
    })
    .await?;
    let rows = cluster.cloud.load().rows;
    tokio::time::sleep(Duration::from_millis(200)).await;
    assert_eq!(cluster.cloud.load().rows, rows, "the cloud decodes on");
    Ok(())
}
