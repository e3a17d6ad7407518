//! A cloud node and an edge that speaks frames by hand: what a well-behaved edge never says must cost
//! its own session only.

mod lacking;

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tandem_cloud_node::admission::Bounds;
use tandem_cloud_node::node::CloudNode;
use tandem_cloud_node::settings::CloudSettings;
use tandem_cloud_node::target::Target;
use tandem_cloud_node::target::own::OwnEngine;
use tandem_engine::trunk::{SharedLayers, Trunk};
use tandem_models::{CLOUD, EDGE, TRUNK_LAYERS};
use tandem_proto::frame::Message;
use tandem_proto::ids::{Epoch, Round, SessionId};
use tandem_proto::message::{
    Close, Draft, Generate, Grammar, GrammarSyntax, Hello, KvOffer, Open, Opened, Refuse, RefuseCode, SamplingParams,
    Verdict,
};
use tandem_router::exchange::Exchange;
use tandem_transport::{Channel, Connector, DevCa, Link, PeerIdentity, Role, Server, Settings};
use tokio_util::sync::CancellationToken;

/// Longer than any bound under test; a test that waits this long has failed.
const PATIENCE: Duration = Duration::from_secs(30);
const EPOCH: Epoch = Epoch(1);
const PROMPT: [u32; 4] = [11, 12, 13, 14];

async fn within<T>(f: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, f).await.expect("nothing happened for far too long")
}

/// A cloud node, and an edge's link to it.
struct Bed {
    node: CloudNode,
    link: Link,
    /// The edge's side of the trunk.
    trunk: Trunk,
    shutdown: CancellationToken,
    ca: DevCa,
    address: SocketAddr,
    _connector: Connector,
    _folder: tempfile::TempDir,
}

impl Drop for Bed {
    fn drop(&mut self) {
        self.shutdown.cancel();
    }
}

impl Bed {
    async fn new(settings: CloudSettings) -> Self {
        Box::pin(Self::over(settings, |engine| Arc::new(engine))).await
    }

    /// A node whose target is what `wrap` makes of the own engine.
    async fn over(settings: CloudSettings, wrap: impl FnOnce(OwnEngine) -> Arc<dyn Target>) -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let ca = DevCa::open_or_create(folder.path()).expect("a CA");
        let (big, small) = (CLOUD.load(1).expect("the cloud model"), EDGE.load(1).expect("the edge model"));
        let identity = ca.issue(Role::Cloud, "big").expect("an identity");
        let any = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
        let greeting = Hello::new("big", 1, vec![big.card]);
        let server = Server::bind(any, &identity, Settings::dev(), greeting).expect("a server");
        let address = server.local_addr().expect("an address");
        let engine = OwnEngine::start(big.model, &settings).expect("an engine");
        let node = CloudNode::with_target(wrap(engine), big.tokenizer, settings);
        let shutdown = CancellationToken::new();
        tokio::spawn(node.clone().serve(server, shutdown.clone()));
        let identity = ca.issue(Role::Edge, "small").expect("an identity");
        let trunk = SharedLayers::of(&small.model, None).at(TRUNK_LAYERS).expect("a trunk");
        let connector =
            Connector::new(&identity, Settings::dev(), Hello::new("small", 1, vec![small.card])).expect("a connector");
        let link = within(connector.connect(address, "big.tandem")).await.expect("a link");
        Self { node, link, trunk, shutdown, ca, address, _connector: connector, _folder: folder }
    }

    /// A link of another device. Whoever lets go of the connector ends it.
    async fn link_of(&self, tenant: &str, name: &str) -> (Connector, Link) {
        let id = PeerIdentity::new(tenant, Role::Edge, name).expect("a name");
        let identity = self.ca.issue_for(&id, Duration::from_secs(3600)).expect("an identity");
        let connector = Connector::new(&identity, Settings::dev(), Hello::new(name, 1, vec![])).expect("a connector");
        let link = within(connector.connect(self.address, "big.tandem")).await.expect("a link");
        (connector, link)
    }

    /// What the cloud says by itself after `prompt`, with the tokens it held of it and the rows it computed.
    async fn ask(&self, link: &Link, id: u8, prompt: &[u32]) -> (Vec<u32>, usize, u64) {
        let before = self.node.load().rows;
        let open = Open { prompt_tokens: prompt.len() as u32, trunk_layers: 0, ..open(id) };
        let mut session = Self::session_on(link, open, prompt).await;
        let held = session.opened().await.held_tokens as usize;
        let said = session.generate(prompt.len(), 8).await;
        // Its state is handed on when it ends.
        self.quiet().await;
        (said, held, self.node.load().rows - before)
    }

    async fn session(&self, open: Open, tokens: &[u32]) -> Session {
        Self::session_on(&self.link, open, tokens).await
    }

    async fn session_on(link: &Link, open: Open, tokens: &[u32]) -> Session {
        let mut channel = within(link.open_session()).await.expect("a stream");
        let payload: Vec<u8> = tokens.iter().flat_map(|t| t.to_le_bytes()).collect();
        channel.tx.send(&Message::Open(open), payload.into()).await.expect("the opening frame goes out");
        Session { channel }
    }

    /// Waits until no session is open.
    async fn quiet(&self) {
        within(async {
            while self.node.load().sessions > 0 {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        })
        .await;
    }
}

struct Session {
    channel: Channel,
}

impl Session {
    async fn send(&mut self, message: Message, payload: Bytes) {
        self.channel.tx.send(&message, payload).await.expect("the frame goes out");
    }

    /// The next frame that is no report of progress.
    async fn next(&mut self) -> Message {
        loop {
            let frame = within(self.channel.rx.next()).await.expect("a whole frame").expect("the stream goes on");
            if !matches!(frame.message, Message::Progress(_)) {
                return frame.message;
            }
        }
    }

    async fn opened(&mut self) -> Opened {
        match self.next().await {
            Message::Opened(opened) => opened,
            other => panic!("{other:?}"),
        }
    }

    async fn verdict(&mut self) -> Verdict {
        match self.next().await {
            Message::Verdict(verdict) => verdict,
            other => panic!("{other:?}"),
        }
    }

    /// Sends drafts with hidden states that are no model's (zeros). All are accepted: a target that used the states
    /// would choose other tokens.
    async fn accepts_beside_zeros(&mut self, drafts: &[u32], hidden_size: usize) {
        let rows = vec![0; drafts.len() * hidden_size * 4];
        let draft = Draft { hidden_rows: drafts.len() as u32, ..question(1, 4, drafts) };
        self.send(Message::Draft(draft), rows.into()).await;
        let verdict = self.verdict().await;
        assert_eq!((verdict.accepted as usize, verdict.rejected), (drafts.len(), false));
    }

    async fn refused(&mut self) -> Refuse {
        match self.next().await {
            Message::Refuse(refuse) => refuse,
            other => panic!("{other:?}"),
        }
    }

    /// What the cloud says by itself after the prompt.
    async fn write(mut self, tokens_max: u32) -> Vec<u32> {
        self.opened().await;
        self.generate(PROMPT.len(), tokens_max).await
    }

    async fn generate(mut self, start: usize, tokens_max: u32) -> Vec<u32> {
        let start = start as u32;
        let generate = Generate { epoch: EPOCH, round: Round(1), start, tail: vec![], tokens_max };
        self.send(Message::Generate(generate), Bytes::new()).await;
        let mut ids = Vec::new();
        loop {
            match self.next().await {
                Message::Token(token) => ids.push(token.id),
                Message::End(_) => break,
                other => panic!("{other:?}"),
            }
        }
        self.send(Message::Close(Close { epoch: EPOCH, cancelled: false }), Bytes::new()).await;
        // A channel that is let go before its end is reset, perhaps before the cloud has read the frame.
        self.channel.tx.finish().expect("the stream ends");
        while let Ok(Some(_)) = within(self.channel.rx.next()).await {}
        ids
    }
}

fn open(id: u8) -> Open {
    Open {
        session: SessionId([id; 16]),
        epoch: EPOCH,
        model: "demo-cloud".into(),
        request_id: "r".into(),
        prompt_tokens: PROMPT.len() as u32,
        committed_tokens: 0,
        sampling: SamplingParams::default(),
        stop_tokens: vec![],
        answer_tokens_max: 64,
        trunk_layers: TRUNK_LAYERS as u32,
        want_prompt_state: false,
        top_logprobs: 0,
        grammar: None,
    }
}

/// A question about `tokens` and the position after them.
fn question(round: u32, start: u32, tokens: &[u32]) -> Draft {
    Draft {
        epoch: EPOCH,
        round: Round(round),
        start,
        judge_from: start,
        tokens: tokens.to_vec(),
        hidden_from: start,
        hidden_rows: 0,
    }
}

fn settings() -> CloudSettings {
    CloudSettings { pull_trunk: Exchange::Never, ..CloudSettings::default() }
}

#[tokio::test(flavor = "multi_thread")]
async fn tokens_past_the_vocabulary_cost_their_own_session_only() {
    let bed = Bed::new(settings()).await;
    let expected = bed.session(open(1), &PROMPT).await.write(8).await;
    assert_eq!(expected.len(), 8);
    let mut bystander = bed.session(open(2), &PROMPT).await;
    let refuse = bed.session(open(3), &[1, 2, u32::MAX, 4]).await.refused().await;
    assert_eq!(refuse.code, RefuseCode::Malformed, "{}", refuse.message);
    assert!(refuse.message.contains("vocabulary"), "{}", refuse.message);
    let mut drafting = bed.session(open(4), &PROMPT).await;
    drafting.opened().await;
    drafting.send(Message::Draft(question(1, 4, &[5, 1 << 20])), Bytes::new()).await;
    assert_eq!(drafting.refused().await.code, RefuseCode::Malformed);
    bystander.opened().await;
    bystander.send(Message::Draft(question(1, 4, &[])), Bytes::new()).await;
    assert_eq!(bystander.verdict().await.next, Some(expected[0]));
    bystander.send(Message::Close(Close { epoch: EPOCH, cancelled: false }), Bytes::new()).await;
    bed.quiet().await;
}

/// Sessions of a tenant compute together what they have in common, whatever its device; another tenant's
/// sessions find nothing, whatever they ask.
#[tokio::test(flavor = "multi_thread")]
async fn a_tenants_sessions_share_rows_and_no_other_tenants() {
    let bed = Bed::new(settings()).await;
    let prompt: Vec<u32> = (0..100).map(|i| (i * 37 + 11) % 4000).collect();
    let (expected, held, rows) = bed.ask(&bed.link, 1, &prompt).await;
    assert_eq!((expected.len(), held, rows), (8, 0, 100 + 7));
    // The same question again, of this device and of another one.
    assert_eq!(bed.ask(&bed.link, 2, &prompt).await, (expected.clone(), 99, 1 + 7));
    let (_tablet, tablet) = bed.link_of("default", "tablet").await;
    assert_eq!(bed.ask(&tablet, 3, &prompt).await, (expected.clone(), 99, 1 + 7));
    // The next turn.
    let second = [&prompt[..], &expected[..7], &[5, 6, 7, 8]].concat();
    let (said, held, rows) = bed.ask(&tablet, 4, &second).await;
    assert_eq!((held, rows), (107, 4 + 7));
    // The names of another tenant's devices are its own affair.
    for (id, name) in [(5, "small"), (6, "stranger")] {
        let (_stranger, stranger) = bed.link_of("rivals", name).await;
        let answer = bed.ask(&stranger, id, &second).await;
        assert_eq!(answer, (said.clone(), if id == 5 { 0 } else { 110 }, if id == 5 { 111 + 7 } else { 1 + 7 }));
    }
    // State of the prompt that an edge wants is computed: its hidden states are not kept.
    let wants = Open { prompt_tokens: 100, want_prompt_state: true, ..open(7) };
    let mut session = bed.session(wants, &prompt).await;
    assert_eq!(session.opened().await.held_tokens, 0);
    assert!(matches!(session.next().await, Message::KvOffer(offer) if offer.tokens == 100));
}

#[tokio::test(flavor = "multi_thread")]
async fn hidden_states_above_layers_that_are_not_shared_are_not_used() {
    let bed = Bed::new(settings()).await;
    let expected = bed.session(open(1), &PROMPT).await.write(4).await;
    let mut session = bed.session(Open { trunk_layers: TRUNK_LAYERS as u32 + 1, ..open(2) }, &PROMPT).await;
    assert_eq!(session.opened().await.trunk_layers, 0);
    session.accepts_beside_zeros(&expected, bed.trunk.hidden_size).await;
}

/// While the cloud waits for trunk state of a path, the edge leaves that path for a shorter one.
#[tokio::test(flavor = "multi_thread")]
async fn a_path_may_shorten_while_its_state_is_pulled() {
    for offers in [true, false] {
        let bed = Bed::new(CloudSettings { pull_trunk: Exchange::Always, ..settings() }).await;
        let mut session = bed.session(open(1), &PROMPT).await;
        assert_eq!(session.opened().await.trunk_layers, TRUNK_LAYERS as u32);
        session.send(Message::Draft(question(1, 4, &[])), Bytes::new()).await;
        let first = session.verdict().await.next.expect("a token after the prompt");

        // Rows of the edge's: the cloud's own trunk state ends with the prompt.
        let rows = vec![0; 4 * bed.trunk.hidden_size * 4];
        let draft = Draft { hidden_from: 4, hidden_rows: 4, ..question(1, 5, &[21, 22, 23]) };
        session.send(Message::Draft(draft), rows.into()).await;
        let verdict = session.verdict().await;
        let end = verdict.from + verdict.accepted + u32::from(verdict.next.is_some());
        session.send(Message::Draft(question(2, end, &[31, 32, 33, 34])), Bytes::new()).await;
        let pull = match session.next().await {
            Message::KvPull(pull) => pull,
            other => panic!("{other:?}"),
        };
        assert!(pull.tokens > 4);

        session.send(Message::Draft(question(3, 4, &[])), Bytes::new()).await;
        if offers {
            let shape = bed.trunk.shape(false);
            let offer = KvOffer { epoch: EPOCH, exchange: pull.exchange, shape, ids: vec![], tokens: 0 };
            session.send(Message::KvOffer(offer), Bytes::new()).await;
            match session.next().await {
                Message::KvWant(want) => assert!(want.indices.is_empty()),
                other => panic!("{other:?}"),
            }
        }
        let verdict = session.verdict().await;
        assert_eq!((verdict.round, verdict.from, verdict.next), (Round(3), 4, Some(first)), "offers: {offers}");
        session.send(Message::Close(Close { epoch: EPOCH, cancelled: false }), Bytes::new()).await;
        bed.quiet().await;
    }
}

/// Compiling is work: it is done for sessions that were let in.
#[tokio::test(flavor = "multi_thread")]
async fn a_grammar_is_looked_at_after_admission() {
    let with_grammar = |id| Open {
        grammar: Some(Grammar { syntax: GrammarSyntax::JsonSchema, text: "no schema".into() }),
        ..open(id)
    };
    let full = CloudSettings { bounds: Bounds { sessions_max: 1, ..Bounds::default() }, ..settings() };
    let bed = Bed::new(full).await;
    let mut first = bed.session(open(1), &PROMPT).await;
    first.opened().await;
    let busy = bed.session(with_grammar(2), &PROMPT).await.refused().await;
    assert_eq!(busy.code, RefuseCode::Busy, "{}", busy.message);
    assert!(busy.retry_after_ms > 0);
    first.send(Message::Close(Close { epoch: EPOCH, cancelled: false }), Bytes::new()).await;
    bed.quiet().await;
    assert_eq!(bed.session(with_grammar(3), &PROMPT).await.refused().await.code, RefuseCode::BadGrammar);
    bed.quiet().await;
}
