//! An edge node and a cloud that speaks frames by hand: what a well-behaved cloud never does must not
//! leave a client waiting.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;
use tandem_edge_node::node::{EdgeNode, EdgeParts};
use tandem_edge_node::pacing::ExactStrategy;
use tandem_edge_node::request::{Event, GenerateError, GenerateRequest, Mode, Origin, RouteSummary};
use tandem_edge_node::settings::EdgeSettings;
use tandem_edge_node::uplinks::{TicketEpoch, Uplinks};
use tandem_engine::constraint::json_object;
use tandem_models::{CLOUD, EDGE};
use tandem_proto::frame::Message;
use tandem_proto::ids::Epoch;
use tandem_proto::message::{Close, Draft, Hello, Opened, Progress, Refuse, RefuseCode, SamplingParams, Verdict};
use tandem_router::policy::Top1;
use tandem_transport::bulk::BulkInbox;
use tandem_transport::{
    Backoff, Channel, Connector, DevCa, FrameReceiver, FrameSender, Redial, Role, Server, Settings, Target,
};

/// Far less than the edge's grace for a lost cloud; a test that waits this long has failed.
const PATIENCE: Duration = Duration::from_secs(30);
const GRACE_MS: u64 = 600_000;

async fn within<T>(f: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, f).await.expect("nothing happened for far too long")
}

/// An edge node with the patience of the tests, whose cloud answers the `n`th session as `say` does.
async fn edge<F>(say: impl Fn(usize, Channel) -> F + Send + 'static) -> (EdgeNode, Arc<AtomicUsize>)
where
    F: Future<Output = ()> + Send + 'static,
{
    edge_that_waits(GRACE_MS, say).await
}

/// As [`edge`], with a grace of its own.
async fn edge_that_waits<F>(
    reconnect_ms_max: u64,
    say: impl Fn(usize, Channel) -> F + Send + 'static,
) -> (EdgeNode, Arc<AtomicUsize>)
where
    F: Future<Output = ()> + Send + 'static,
{
    let folder = tempfile::tempdir().expect("a folder");
    let ca = DevCa::open_or_create(folder.path()).expect("a CA");
    let identity = ca.issue(Role::Cloud, "big").expect("an identity");
    let any = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
    let greeting = Hello::new("big", 1, vec![CLOUD.load(1).expect("the cloud model").card]);
    let server = Server::bind(any, &identity, Settings::dev(), greeting).expect("a server");
    let address = server.local_addr().expect("an address");
    let sessions = Arc::new(AtomicUsize::new(0));
    let counted = sessions.clone();
    tokio::spawn(async move {
        while let Some(link) = server.accept().await {
            while let Some(channel) = link.accept_session().await {
                tokio::spawn(say(counted.fetch_add(1, Ordering::SeqCst), channel));
            }
        }
    });
    let small = EDGE.load(1).expect("the edge model");
    let identity = ca.issue(Role::Edge, "small").expect("an identity");
    let connector =
        Connector::new(&identity, Settings::dev(), Hello::new("small", 1, vec![small.card])).expect("a connector");
    let redial = Redial::start(Arc::new(connector), Backoff::default(), move |_| async move {
        Ok(Target::at(address, "big.tandem"))
    });
    let epoch = TicketEpoch::default();
    epoch.saw(Epoch(1));
    let bulk = BulkInbox::default();
    let uplinks = Uplinks::new(redial, epoch, bulk.clone());
    let mut links = uplinks.links();
    let settings = EdgeSettings { exact: ExactStrategy::Draft, reconnect_ms_max, ..EdgeSettings::default() };
    let parts = EdgeParts {
        model: small.model,
        tokenizer: small.tokenizer,
        chat: small.chat,
        stop_tokens: small.stop_tokens,
        sampling: small.sampling,
        short_json: None,
        policy: Arc::new(Top1::new(0.9).expect("a policy")),
        uplinks,
        bulk,
        tenant_key: [1; 32],
        kv_folder: None,
    };
    let edge = EdgeNode::start(settings, parts).expect("an edge node");
    within(links.wait_for(Option::is_some)).await.expect("a link");
    (edge, sessions)
}

/// What the client of an answer under a grammar hears first.
async fn first_event(edge: &EdgeNode, mode: Mode) -> Option<Event> {
    let grammar = edge.constraints().compile(&json_object()).expect("a grammar");
    let request = GenerateRequest {
        request_id: "by-hand".into(),
        prompt: edge.tokenizer().encode("What is a tide?").expect("a prompt"),
        mode,
        sampling: SamplingParams::default(),
        tokens_max: 96,
        threshold: None,
        top_logprobs: 0,
        grammar: Some(grammar),
    };
    let mut generation = edge.submit(request).expect("room for an answer");
    within(generation.events.recv()).await
}

/// The halves of a session's stream, its opening frame read.
async fn opened(channel: Channel) -> (FrameSender, FrameReceiver) {
    let (tx, mut rx) = channel.split();
    rx.next().await.expect("a frame").expect("the opening frame");
    (tx, rx)
}

async fn refuse(mut tx: FrameSender) {
    let refuse = Refuse { code: RefuseCode::BadGrammar, message: "not this one".into(), retry_after_ms: 0 };
    tx.send(&Message::Refuse(refuse), Bytes::new()).await.expect("the refusal goes out");
    tx.finish().expect("the end goes out");
}

fn assert_refused(event: Option<Event>, what: &str) {
    match event {
        Some(Event::Failed(GenerateError::Grammar(problem))) => {
            assert!(problem.contains("not this one"), "{what}: {problem}");
        }
        other => panic!("{what}: {other:?}"),
    }
}

/// A cloud that refuses a session listens no more: the edge may be writing at that very moment.
#[tokio::test(flavor = "multi_thread")]
async fn a_cloud_that_listens_no_more_is_heard_out() {
    for mode in [Mode::Exact, Mode::Cloud] {
        let (edge, sessions) = edge(|_, channel| async move {
            let (tx, rx) = opened(channel).await;
            drop(rx);
            // The edge drafts on and sends what it has.
            tokio::time::sleep(Duration::from_millis(300)).await;
            refuse(tx).await;
        })
        .await;
        assert_refused(first_event(&edge, mode).await, mode.name());
        assert_eq!(sessions.load(Ordering::SeqCst), 1, "{mode:?}");
    }
}

/// The link stands, so nothing but the edge's own clock brings it back to the cloud.
#[tokio::test(flavor = "multi_thread")]
async fn a_stream_that_breaks_on_a_sound_link_is_opened_again() {
    for mode in [Mode::Exact, Mode::Cloud] {
        let (edge, sessions) = edge(|n, channel| async move {
            let (tx, _rx) = opened(channel).await;
            if n == 2 {
                refuse(tx).await;
            }
        })
        .await;
        assert_refused(first_event(&edge, mode).await, mode.name());
        assert_eq!(sessions.load(Ordering::SeqCst), 3, "{mode:?}");
    }
}

/// A request that always has a question for the cloud.
fn request(edge: &EdgeNode, mode: Mode) -> GenerateRequest {
    GenerateRequest {
        request_id: "by-hand".into(),
        prompt: edge.tokenizer().encode("What is a tide?").expect("a prompt"),
        mode,
        sampling: SamplingParams::default(),
        tokens_max: 12,
        threshold: Some(0.0),
        top_logprobs: 0,
        grammar: None,
    }
}

/// A whole answer: who decided each token, and what it took.
async fn answer(edge: &EdgeNode, mode: Mode) -> (Vec<Origin>, RouteSummary) {
    let mut generation = edge.submit(request(edge, mode)).expect("room for an answer");
    let mut origins = Vec::new();
    loop {
        match within(generation.events.recv()).await.expect("the answer goes on") {
            Event::Token(token) => origins.push(token.origin),
            Event::Done(done) => return (origins, done.route),
            Event::Failed(e) => panic!("{mode:?}: {e}"),
        }
    }
}

async fn say_opened(tx: &mut FrameSender) {
    let opened = Opened { epoch: Epoch(1), held_tokens: 0, trunk_layers: 0 };
    tx.send(&Message::Opened(opened), Bytes::new()).await.expect("the frame goes out");
}

/// Tells the edge how far the cloud is, until the edge leaves.
async fn say_progress(tx: &mut FrameSender, working: bool, stalled_ms: u32) {
    let progress = Progress { epoch: Epoch(1), rows_left: 9, working, stalled_ms };
    while tx.send(&Message::Progress(progress.clone()), Bytes::new()).await.is_ok() {
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// A cloud that accepts sessions and answers nothing: each mode goes on alone in the end, and the answers after
/// the first do not find out anew.
#[tokio::test(flavor = "multi_thread")]
async fn a_mute_cloud_is_left_alone_by_later_answers_too() {
    for mode in [Mode::Auto, Mode::Exact, Mode::Cloud] {
        let (edge, sessions) = edge_that_waits(100, |_, channel| async move {
            let (mut tx, _rx) = opened(channel).await;
            say_opened(&mut tx).await;
            std::future::pending::<()>().await;
        })
        .await;
        let (origins, route) = answer(&edge, mode).await;
        assert!(route.degraded && origins.iter().all(|o| *o == Origin::Edge), "{mode:?}: {route:?}");
        assert_eq!(sessions.load(Ordering::SeqCst), 1, "{mode:?}: one question was enough");
        let (_, route) = answer(&edge, mode).await;
        assert!(route.degraded && route.bytes_up == 0, "{mode:?}: {route:?}");
        assert_eq!(sessions.load(Ordering::SeqCst), 1, "{mode:?}: the next answer knows");
    }
}

/// The network side of a node lives on when its engine hangs, and says so.
#[tokio::test(flavor = "multi_thread")]
async fn a_cloud_whose_engine_hangs_is_left() {
    for refuses in [false, true] {
        for mode in [Mode::Auto, Mode::Exact, Mode::Cloud] {
            let (edge, sessions) = edge_that_waits(100, move |_, channel| async move {
                let (mut tx, _rx) = opened(channel).await;
                if refuses {
                    let refuse = Refuse { code: RefuseCode::Stalled, message: "it hangs".into(), retry_after_ms: 0 };
                    tx.send(&Message::Refuse(refuse), Bytes::new()).await.expect("the refusal goes out");
                    tx.finish().expect("the end goes out");
                    return;
                }
                say_opened(&mut tx).await;
                say_progress(&mut tx, false, 1500).await;
            })
            .await;
            let (origins, route) = answer(&edge, mode).await;
            assert!(route.degraded && origins.iter().all(|o| *o == Origin::Edge), "{mode:?}: {route:?}");
            assert_eq!(sessions.load(Ordering::SeqCst), 1, "{mode:?}");
            let status = edge.status();
            assert!(status.cloud.problem.is_some(), "{mode:?}: it is said: {:?}", status.cloud);
        }
    }
}

/// A cloud whose prefill takes longer than any fixed deadline, and then agrees with all drafts.
#[tokio::test(flavor = "multi_thread")]
async fn auto_waits_for_a_cloud_that_works_on_its_question() {
    let (edge, sessions) = edge(|_, channel| async move {
        let (mut tx, mut rx) = opened(channel).await;
        say_opened(&mut tx).await;
        for rows_left in (0..40).rev() {
            let progress = Progress { epoch: Epoch(1), rows_left, working: true, stalled_ms: 0 };
            tx.send(&Message::Progress(progress), Bytes::new()).await.expect("the frame goes out");
            tokio::time::sleep(Duration::from_millis(60)).await;
        }
        while let Ok(Some(frame)) = rx.next().await {
            match frame.message {
                Message::Draft(draft) => agree(&mut tx, &draft).await,
                Message::Close(Close { .. }) => return,
                other => panic!("{other:?}"),
            }
        }
    })
    .await;
    let (origins, route) = answer(&edge, Mode::Auto).await;
    assert!(!route.degraded && origins.iter().any(|o| *o != Origin::Edge), "{route:?}");
    assert_eq!(sessions.load(Ordering::SeqCst), 1);
}

/// Accepts the judged tokens of a frame; of a question about the position after them, chooses a fixed token.
async fn agree(tx: &mut FrameSender, draft: &Draft) {
    let accepted = draft.start + draft.tokens.len() as u32 - draft.judge_from;
    let verdict = Verdict {
        epoch: draft.epoch,
        round: draft.round,
        from: draft.judge_from,
        accepted,
        next: Some(5),
        rejected: false,
        tail_agreed: 0,
        tail_tokens: 0,
        logprobs: vec![0.0; accepted as usize + 1],
        alternatives: Vec::new(),
        compute_us: 1,
        queue_us: 1,
    };
    // The edge may have left.
    let _ = tx.send(&Message::Verdict(verdict), Bytes::new()).await;
}

/// A cloud that lives and has no time for the question: it costs one wait, not one per question, and the next
/// answer does not ask.
#[tokio::test(flavor = "multi_thread")]
async fn auto_asks_a_busy_cloud_once() {
    let (edge, sessions) = edge(|_, channel| async move {
        let (mut tx, _rx) = opened(channel).await;
        say_opened(&mut tx).await;
        say_progress(&mut tx, false, 0).await;
    })
    .await;
    let (_, route) = answer(&edge, Mode::Auto).await;
    assert!(route.degraded && route.round_trips == 0, "{route:?}");
    let (_, route) = answer(&edge, Mode::Auto).await;
    assert!(route.degraded && route.bytes_up == 0, "{route:?}");
    assert_eq!(sessions.load(Ordering::SeqCst), 1);
}

/// Whoever stops the node ends its answers properly.
#[tokio::test(flavor = "multi_thread")]
async fn answers_of_a_node_that_ends_say_so() {
    let (edge, _) = edge(|_, channel| async move {
        let (mut tx, _rx) = opened(channel).await;
        say_opened(&mut tx).await;
        say_progress(&mut tx, true, 0).await;
    })
    .await;
    let mut generation = edge.submit(request(&edge, Mode::Exact)).expect("room for an answer");
    edge.close();
    let event = within(generation.events.recv()).await;
    assert!(matches!(event, Some(Event::Failed(GenerateError::Closing))), "{event:?}");
}
