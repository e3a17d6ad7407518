//! `exact` is `cloud`, token for token: greedy and sampled, whatever drafts, whatever the link does,
//! wherever state comes from.

use std::time::Duration;

use anyhow::Result;
use tandem_edge_node::pacing::ExactStrategy;
use tandem_edge_node::request::Mode;
use tandem_lab::cluster::{Cluster, ClusterOptions};
use tandem_proto::message::SamplingParams;
use tandem_router::exchange::Exchange;
use tandem_tests::answers::{Answer, answers, questions};
use tandem_transport::proxy::Faults;

const PROMPTS: usize = 210;
const AT_ONCE: usize = 16;

fn options() -> ClusterOptions {
    let mut o = ClusterOptions::default();
    // Only answers that the cloud had a hand in to the end can be compared.
    o.edge.reconnect_ms_max = 60_000;
    o
}

fn samplings() -> Vec<SamplingParams> {
    let sampled = |seed| SamplingParams { temperature: 0.9, top_p: 0.95, seed, ..SamplingParams::default() };
    vec![SamplingParams::default(), sampled(1), sampled(2), sampled(3)]
}

fn rough_link() -> Faults {
    Faults { jitter: Duration::from_millis(5), loss: 0.02, reorder: 0.02, ..Faults::rtt(Duration::from_millis(50)) }
}

fn assert_same(name: &str, got: &[Answer], expected: &[Answer], questions: &[String]) {
    let mut drafted = 0;
    for ((a, b), question) in got.iter().zip(expected).zip(questions) {
        assert!(!a.route.degraded, "{name}: the cloud was lost on {question:?}: {:?}", a.route.degraded_reason);
        assert_eq!(a.ids(), b.ids(), "{name}: {question:?}");
        assert_eq!(a.finish, b.finish, "{name}: {question:?}");
        drafted += a.route.accepted;
    }
    println!("{name}: {} answers equal, {drafted} drafted tokens accepted", got.len());
}

/// What `cloud` says over the bare loopback.
async fn expected(questions: &[String], sampling: &SamplingParams) -> Result<Vec<Answer>> {
    let cluster = Cluster::start(options()).await?;
    answers(&cluster.edge, questions, Mode::Cloud, sampling, AT_ONCE).await
}

async fn compare(name: &str, options: ClusterOptions, samplings: &[SamplingParams], prompts: usize) -> Result<()> {
    println!("{name}: link seed {}", options.seed);
    let questions = questions(prompts)?;
    let cluster = Cluster::start(options).await?;
    for sampling in samplings {
        let expected = expected(&questions, sampling).await?;
        let got = answers(&cluster.edge, &questions, Mode::Exact, sampling, AT_ONCE).await?;
        assert_same(&format!("{name}, T={} seed={}", sampling.temperature, sampling.seed), &got, &expected, &questions);
        if cluster.proxy.is_some() {
            let streamed = answers(&cluster.edge, &questions, Mode::Cloud, sampling, AT_ONCE).await?;
            for (a, b) in streamed.iter().zip(&expected) {
                assert_eq!(a.ids(), b.ids(), "{name}: `cloud` over the rough link");
            }
        }
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn exact_equals_cloud_on_a_clean_loopback() -> Result<()> {
    let mut o = options();
    o.edge.exact = ExactStrategy::Draft;
    compare("loopback", o, &samplings(), PROMPTS).await
}

#[tokio::test(flavor = "multi_thread")]
async fn exact_equals_cloud_over_a_rough_link() -> Result<()> {
    let mut o = options();
    o.edge.exact = ExactStrategy::Draft;
    o.link = Some(rough_link());
    o.seed = 11;
    compare("50 ms, jitter, 2 % loss, reordering", o, &samplings()[..2], PROMPTS).await
}

#[tokio::test(flavor = "multi_thread")]
async fn exact_equals_cloud_wherever_state_comes_from() -> Result<()> {
    let table = [
        ("hidden states from the edge", ExactStrategy::Draft, Exchange::Always, Exchange::Never, Exchange::Never),
        ("prompt state from the cloud", ExactStrategy::Draft, Exchange::Never, Exchange::Always, Exchange::Never),
        ("both", ExactStrategy::Synchronous, Exchange::Always, Exchange::Always, Exchange::Never),
        (
            "the cloud takes over and pulls",
            ExactStrategy::Handover,
            Exchange::Always,
            Exchange::Always,
            Exchange::Always,
        ),
        (
            "the cloud takes over and recomputes",
            ExactStrategy::Handover,
            Exchange::Always,
            Exchange::Never,
            Exchange::Never,
        ),
        ("left to the rules", ExactStrategy::Auto, Exchange::Auto, Exchange::Auto, Exchange::Auto),
    ];
    for (name, strategy, hidden, fetch, pull) in table {
        let mut o = options();
        o.edge.exact = strategy;
        o.edge.send_hidden = hidden;
        o.edge.fetch_prompt = fetch;
        o.cloud.pull_trunk = pull;
        compare(name, o, &samplings()[..2], 45).await?;
    }
    Ok(())
}
