//! An edge node and a cloud that speaks frames by hand: what a well-behaved cloud never does must not
//! leave a client waiting.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;
use tandem_edge_node::node::{EdgeNode, EdgeParts};
use tandem_edge_node::pacing::ExactStrategy;
use tandem_edge_node::request::{Event, GenerateError, GenerateRequest, Mode};
use tandem_edge_node::settings::EdgeSettings;
use tandem_edge_node::uplinks::{TicketEpoch, Uplinks};
use tandem_engine::constraint::json_object;
use tandem_models::{CLOUD, EDGE, TRUNK_LAYERS};
use tandem_proto::frame::Message;
use tandem_proto::ids::Epoch;
use tandem_proto::message::{Hello, Refuse, RefuseCode, SamplingParams};
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

/// An edge node whose cloud answers the `n`th session as `say` does.
async fn edge<F>(say: impl Fn(usize, Channel) -> F + Send + 'static) -> (EdgeNode, Arc<AtomicUsize>)
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
    let mut links = redial.link();
    let uplinks = Uplinks::new(redial, epoch, bulk.clone());
    let settings = EdgeSettings {
        trunk_layers: TRUNK_LAYERS,
        exact: ExactStrategy::Draft,
        reconnect_ms_max: GRACE_MS,
        ..EdgeSettings::default()
    };
    let parts = EdgeParts {
        model: small.model,
        tokenizer: small.tokenizer,
        chat: small.chat,
        stop_tokens: small.stop_tokens,
        sampling: small.sampling,
        policy: Arc::new(Top1::new(0.9).expect("a policy")),
        uplinks,
        bulk,
        tenant: "dev".into(),
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
