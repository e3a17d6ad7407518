//! Two nodes of one development CA.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use bytes::Bytes;
use tandem_proto::{
    frame::Message,
    ids::{Digest, Epoch, Round, SessionId},
    message::{Hello, KvBlock, KvShape, Token},
};
use tandem_transport::{Connector, DevCa, Identity, Link, Role, Server, Settings, TransportError};

/// Longer than any bound under test; a test that waits this long has failed.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

pub(crate) fn hello(node: &str) -> Hello {
    Hello::new(node, 1, vec![])
}

pub(crate) struct Bed {
    pub(crate) ca: DevCa,
    pub(crate) cloud: Identity,
    pub(crate) edge: Identity,
    _dir: tempfile::TempDir,
}

impl Bed {
    pub(crate) fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let ca = DevCa::open_or_create(dir.path()).unwrap();
        let (cloud, edge) = (ca.issue(Role::Cloud, "big"), ca.issue(Role::Edge, "phone"));
        Self { cloud: cloud.unwrap(), edge: edge.unwrap(), ca, _dir: dir }
    }

    pub(crate) fn server(&self, settings: Settings) -> Server {
        Server::bind(loopback(), &self.cloud, settings, hello("big")).unwrap()
    }

    pub(crate) fn connector(&self, settings: Settings) -> Connector {
        Connector::new(&self.edge, settings, hello("phone")).unwrap()
    }
}

pub(crate) fn loopback() -> SocketAddr {
    ([127, 0, 0, 1], 0).into()
}

/// Both ends of one link.
pub(crate) struct Pair {
    pub(crate) edge: Arc<Link>,
    pub(crate) cloud: Arc<Link>,
    pub(crate) server: Server,
    _connector: Connector,
}

pub(crate) async fn pair(edge: Settings, cloud: Settings) -> Pair {
    let bed = Bed::new();
    let (server, connector) = (bed.server(cloud), bed.connector(edge));
    let (edge, cloud) = dial(&server, &connector).await.unwrap();
    Pair { edge: edge.into(), cloud: cloud.into(), server, _connector: connector }
}

pub(crate) async fn dial(server: &Server, connector: &Connector) -> Result<(Link, Link), TransportError> {
    let addr = server.local_addr().unwrap();
    let edge = within(connector.connect(addr, "big.tandem")).await?;
    Ok((edge, within(server.accept()).await.unwrap()))
}

pub(crate) async fn within<T>(f: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, f).await.expect("nothing happened for far too long")
}

pub(crate) fn token(position: u32) -> Message {
    let (epoch, round) = (Epoch(1), Round(0));
    let alternatives = vec![];
    Message::Token(Token { epoch, round, position, id: position * 7, logprob: -0.5, alternatives })
}

pub(crate) fn block(index: u32, payload: &Bytes) -> Message {
    Message::KvBlock(KvBlock {
        session: SessionId([7; 16]),
        epoch: Epoch(1),
        exchange: 1,
        index,
        id: Digest::of(&index.to_le_bytes()),
        payload_digest: Digest::of(payload),
        tokens: 32,
        shape: KvShape { layer_from: 0, layer_to: 4, width: 8, hidden: 0 },
    })
}

/// Bytes that differ everywhere, so that a shifted copy shows.
pub(crate) fn pattern(len: usize, seed: u64) -> Bytes {
    let mut rng = fastrand::Rng::with_seed(seed);
    std::iter::repeat_with(|| rng.u8(..)).take(len).collect::<Vec<_>>().into()
}
