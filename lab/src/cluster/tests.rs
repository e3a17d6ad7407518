//! What the edge and the cloud make of each other when one of them is not what the other expects.

use tandem_edge_node::pacing::ExactStrategy;
use tandem_edge_node::request::{Controls, Event, GenerateRequest, Mode, Origin, RouteSummary};
use tandem_engine::chat::Message;
use tandem_proto::message::SamplingParams;
use tandem_router::exchange::Exchange;

use tandem_models::EDGE;

use super::*;

const QUESTIONS: [&str; 4] =
    ["What is the capital of France?", "Count from one to ten.", "Who are you?", "Tell me about rivers and the sea."];
/// Longer than any bound under test; a test that waits this long has failed.
const PATIENCE: Duration = Duration::from_secs(120);

struct Answer {
    ids: Vec<u32>,
    origins: Vec<Origin>,
    route: RouteSummary,
}

fn request(cluster: &Cluster, question: &str, mode: Mode) -> GenerateRequest {
    let edge = &cluster.edge;
    let text = edge.chat_template().render(&[Message::new("user", question)], true, 0).expect("a prompt");
    GenerateRequest {
        request_id: format!("test-{}", mode.name()),
        prompt: edge.tokenizer().encode(&text).expect("token ids"),
        mode,
        sampling: SamplingParams::default(),
        tokens_max: 40,
        threshold: None,
        top_logprobs: 0,
        grammar: None,
    }
}

/// Runs a request to its end; `on_token` is called after each token with its index.
async fn answer(cluster: &Cluster, request: GenerateRequest, mut on_token: impl FnMut(usize)) -> Answer {
    let mut generation = cluster.edge.submit(request).expect("the request is taken");
    let (mut ids, mut origins) = (Vec::new(), Vec::new());
    let whole = async {
        loop {
            match generation.events.recv().await {
                Some(Event::Token(token)) => {
                    assert_eq!(token.index as usize, ids.len());
                    ids.push(token.id);
                    origins.push(token.origin);
                    on_token(ids.len() - 1);
                }
                Some(Event::Done(done)) => return done.route,
                Some(Event::Failed(e)) => panic!("{e}"),
                None => panic!("the answer ended without an end"),
            }
        }
    };
    let route = tokio::time::timeout(PATIENCE, whole).await.expect("the answer hangs");
    Answer { ids, origins, route }
}

async fn start(options: ClusterOptions) -> Cluster {
    Cluster::start(options).await.expect("a cluster")
}

fn cut(cluster: &Cluster, cut: bool) {
    cluster.edge.set_controls(&Controls { cut: Some(cut), ..Controls::default() });
}

async fn connected(cluster: &Cluster) {
    let linked = async {
        while !cluster.edge.status().cloud_connected {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(PATIENCE, linked).await.expect("the edge reaches its cloud");
}

/// What the cloud alone would write.
async fn reference(questions: &[&str]) -> Vec<Vec<u32>> {
    let cluster = start(ClusterOptions::default()).await;
    let mut all = Vec::new();
    for question in questions {
        all.push(answer(&cluster, request(&cluster, question, Mode::Cloud), |_| {}).await.ids);
    }
    all
}

/// Options under which an `exact` answer drafts and waits as long as it takes.
fn patient() -> ClusterOptions {
    let mut o = ClusterOptions::default();
    o.edge.exact = ExactStrategy::Draft;
    o.edge.reconnect_ms_max = PATIENCE.as_millis() as u64;
    o
}

/// The link dies, and comes back, after every few tokens: a draft that was under way then is judged
/// all the same.
#[tokio::test(flavor = "multi_thread")]
async fn no_draft_of_an_exact_answer_goes_unjudged_when_the_link_dies_under_it() {
    let expected = reference(&QUESTIONS).await;
    for hidden in [Exchange::Always, Exchange::Never] {
        let mut o = patient();
        o.edge.send_hidden = hidden;
        let cluster = start(o).await;
        for step in 1..5 {
            for (question, expected) in QUESTIONS.iter().zip(&expected) {
                connected(&cluster).await;
                let got = answer(&cluster, request(&cluster, question, Mode::Exact), |i| {
                    if i % step == 0 {
                        cut(&cluster, true);
                        cut(&cluster, false);
                    }
                })
                .await;
                let case = format!("{question}, a cut every {step} tokens, hidden states {hidden:?}");
                assert!(!got.route.degraded, "{case}: {:?}", got.route.degraded_reason);
                assert!(!got.origins.contains(&Origin::Edge), "{case}");
                assert_eq!(&got.ids, expected, "{case}");
            }
        }
    }
}

/// The cloud goes for good after each token in turn, or before the first: the answer ends, and says so.
#[tokio::test(flavor = "multi_thread")]
async fn answers_end_without_the_cloud_wherever_it_goes() {
    let mut o = patient();
    o.edge.reconnect_ms_max = 50;
    o.policy = PolicySpec::Always;
    let cluster = start(o).await;
    for mode in [Mode::Auto, Mode::Exact, Mode::Cloud] {
        for last in 0..8 {
            connected(&cluster).await;
            let request = request(&cluster, QUESTIONS[3], mode);
            if last == 0 {
                cut(&cluster, true);
            }
            let got = answer(&cluster, request, |i| {
                if i + 1 == last {
                    cut(&cluster, true);
                }
            })
            .await;
            let case = format!("{}, cut after {last} tokens", mode.name());
            // A short answer may have been whole by then.
            let edges = got.origins.iter().filter(|o| **o == Origin::Edge).count();
            assert!(got.route.degraded || edges == 0, "{case}: {edges} unjudged tokens and no word of it");
            assert!(last > 0 || got.route.degraded, "{case}");
            cut(&cluster, false);
        }
    }
}

/// A node that has no room says when to come again, and an answer that may wait does.
#[tokio::test(flavor = "multi_thread")]
async fn an_exact_answer_waits_for_a_cloud_that_is_busy() {
    let expected = reference(&QUESTIONS[..2]).await;
    let mut o = patient();
    o.cloud.bounds.sessions_max = 1;
    let cluster = start(o).await;
    let ask = |question| answer(&cluster, request(&cluster, question, Mode::Exact), |_| {});
    let (a, b) = tokio::join!(ask(QUESTIONS[0]), ask(QUESTIONS[1]));
    for (got, expected) in [a, b].iter().zip(&expected) {
        assert!(!got.route.degraded, "{:?}", got.route.degraded_reason);
        assert_eq!(&got.ids, expected);
    }
}

/// Four answers share KV memory for one: where the edge's model cannot go on, the cloud writes.
#[tokio::test(flavor = "multi_thread")]
async fn an_exact_answer_outlives_the_edges_own_model() {
    const CONTEXT: usize = 64;
    let expected = reference(&QUESTIONS).await;
    let mut o = patient();
    o.edge.kv_blocks = CONTEXT / tandem_proto::limits::KV_BLOCK_TOKENS;
    let cluster = start(o).await;
    let ask = async |question| {
        let request = request(&cluster, question, Mode::Exact);
        let room = CONTEXT - request.prompt.len();
        (answer(&cluster, request, |_| {}).await, room)
    };
    let [a, b, c, d] = QUESTIONS;
    let (a, b, c, d) = tokio::join!(ask(a), ask(b), ask(c), ask(d));
    for ((got, room), expected) in [a, b, c, d].iter().zip(&expected) {
        assert!(!got.route.degraded, "{:?}", got.route.degraded_reason);
        assert_eq!(got.ids, expected[..expected.len().min(*room)]);
    }
}

/// The cloud refuses the tail: the session has reached the end of its context, the edge's goes on.
#[tokio::test(flavor = "multi_thread")]
async fn an_answer_longer_than_the_clouds_context_is_finished_by_the_edge() {
    let stops = EDGE.load(1).expect("the edge model").stop_tokens;
    for strategy in [ExactStrategy::Draft, ExactStrategy::Stream] {
        let mut o = patient();
        o.edge.exact = strategy;
        // 96 tokens.
        (o.cloud.bounds.kv_blocks, o.cloud.bounds.kv_blocks_reserve) = (3, 0);
        let cluster = start(o).await;
        let mut long = request(&cluster, QUESTIONS[0], Mode::Exact);
        assert!(long.prompt.len() < 64, "the question must leave the cloud some room");
        long.tokens_max = 150;
        long.sampling.logit_bias = stops.iter().map(|token| (*token, -100.0)).collect();
        let prompt = long.prompt.len();
        let got = answer(&cluster, long, |_| {}).await;
        assert_eq!(got.ids.len(), 150, "{strategy:?}");
        assert!(got.route.degraded, "{strategy:?}");
        let first_edge = got.origins.iter().position(|o| *o == Origin::Edge).expect("tokens of the edge's own");
        // The choice after the last token that fits is still the cloud's.
        assert!(prompt + first_edge <= 97 && first_edge > 0, "{strategy:?}: {first_edge}");
    }
}

/// The pair shares two layers; where one end is set up for one, that is the trunk of both.
#[tokio::test(flavor = "multi_thread")]
async fn trunks_of_two_depths_leave_exact_exact() {
    let expected = reference(&QUESTIONS).await;
    use tandem_models::TRUNK_LAYERS;
    for (edge, cloud) in [(TRUNK_LAYERS, TRUNK_LAYERS - 1), (TRUNK_LAYERS - 1, TRUNK_LAYERS)] {
        for strategy in [ExactStrategy::Draft, ExactStrategy::Handover] {
            let mut o = patient();
            (o.edge.trunk_layers, o.cloud.trunk_layers) = (Some(edge), Some(cloud));
            o.edge.exact = strategy;
            o.edge.send_hidden = Exchange::Always;
            o.edge.fetch_prompt = Exchange::Always;
            o.cloud.pull_trunk = Exchange::Always;
            let cluster = start(o).await;
            for (question, expected) in QUESTIONS.iter().zip(&expected) {
                let got = answer(&cluster, request(&cluster, question, Mode::Exact), |_| {}).await;
                assert!(!got.route.degraded, "{:?}", got.route.degraded_reason);
                assert_eq!(&got.ids, expected, "{question}: edge {edge}, cloud {cloud}, {strategy:?}");
            }
        }
    }
}
