//! Goodput of KV frames against a raw quinn stream, and the cost of reading a meta.
//!
//! `cargo bench -p tandem-transport --bench goodput` prints the ratios (targets in brackets), then
//! divan's table of the parts.

use std::{
    hint::black_box,
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::Bytes;
use prost::Message as _;
use quinn::VarInt;
use rkyv::rancor::Failure;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject};
use tandem_proto::{
    frame::{Frame, Header, Message, MetaBuf, decode_meta, encode},
    ids::{Digest, Epoch, SessionId},
    limits::HEADER_BYTES,
    message::{Hello, KvBlock, KvOffer, KvShape},
};
use tandem_transport::{Congestion, Connector, DevCa, Identity, Link, Role, Server, Settings};

const BLOCKS: usize = 128;
const BLOCK_BYTES: usize = 1 << 20;
const ROUNDS: usize = 7;

fn shape() -> KvShape {
    KvShape { layer_from: 0, layer_to: 8, width: 1_024, hidden: 0 }
}

fn block(index: usize, payload_digest: Digest) -> Message {
    Message::KvBlock(KvBlock {
        session: SessionId([1; 16]),
        epoch: Epoch(1),
        exchange: 1,
        index: index as u32,
        id: Digest::of(b"id"),
        payload_digest,
        tokens: 32,
        shape: shape(),
    })
}

struct Bed {
    runtime: tokio::runtime::Runtime,
    ca: DevCa,
    _dir: tempfile::TempDir,
}

fn bed() -> Bed {
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().expect("a runtime");
    let dir = tempfile::tempdir().expect("a folder");
    let ca = DevCa::open_or_create(dir.path()).expect("a CA");
    Bed { runtime, ca, _dir: dir }
}

fn any() -> SocketAddr {
    ([127, 0, 0, 1], 0).into()
}

/// A path that only the machine bounds.
fn fat() -> Settings {
    Settings {
        stream_receive_window: 8 << 20,
        receive_window: 64 << 20,
        send_window: 64 << 20,
        bulk_streams: 64,
        congestion: Congestion::Cubic,
        ..Settings::edge()
    }
}

async fn links(ca: &DevCa) -> (Server, Connector, Link, Link) {
    let (a, b) = (ca.issue(Role::Cloud, "a").expect("a"), ca.issue(Role::Cloud, "b").expect("b"));
    let server = Server::bind(any(), &a, fat(), Hello::new("bench", 1, vec![])).expect("a server");
    let connector = Connector::new(&b, fat(), Hello::new("bench", 1, vec![])).expect("a connector");
    let addr = server.local_addr().expect("an address");
    let out = connector.connect(addr, "a.tandem").await.expect("a link");
    let into = server.accept().await.expect("a link");
    (server, connector, out, into)
}

/// Seconds to move all blocks through a link, checking digests if asked.
async fn frames(out: Arc<Link>, into: &Link, payload: &Bytes, verify: bool) -> f64 {
    let digest = Digest::of(payload);
    let payload = payload.clone();
    let start = Instant::now();
    let sending = tokio::spawn(async move {
        for index in 0..BLOCKS {
            out.send_bulk(&block(index, digest), payload.clone()).await.expect("sent");
        }
    });
    for _ in 0..BLOCKS {
        let frame = into.accept_bulk().await.expect("a block");
        if verify {
            let Message::KvBlock(block) = &frame.message else { panic!("not a block") };
            assert_eq!(Digest::of(&frame.payload), block.payload_digest);
        }
        black_box(&frame);
    }
    let took = start.elapsed().as_secs_f64();
    sending.await.expect("the sender");
    took
}

fn tls_parts(id: &Identity) -> (Vec<CertificateDer<'static>>, PrivateKeyDer<'static>, rustls::RootCertStore) {
    let cert = CertificateDer::from_pem_slice(id.cert_pem().as_bytes()).expect("a certificate");
    let key = PrivateKeyDer::from_pem_slice(id.key_pem().as_bytes()).expect("a key");
    let mut roots = rustls::RootCertStore::empty();
    roots.add(CertificateDer::from_pem_slice(id.ca_pem().as_bytes()).expect("a CA")).expect("a CA");
    (vec![cert], key, roots)
}

/// The same windows, sockets and certificates on bare quinn.
async fn raw(ca: &DevCa) -> (quinn::Endpoint, quinn::Endpoint, quinn::Connection, quinn::Connection) {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut transport = quinn::TransportConfig::default();
    transport
        .stream_receive_window(VarInt::from_u32(8 << 20))
        .receive_window(VarInt::from_u32(64 << 20))
        .send_window(64 << 20);
    let transport = Arc::new(transport);
    let tls13: &[_] = &[&rustls::version::TLS13];
    let (chain, key, roots) = tls_parts(&ca.issue(Role::Cloud, "a").expect("a"));
    let builder = rustls::ServerConfig::builder_with_provider(Arc::clone(&provider))
        .with_protocol_versions(tls13)
        .expect("TLS 1.3");
    let tls = builder.with_no_client_auth().with_single_cert(chain, key).expect("a certificate");
    let quic = quinn::crypto::rustls::QuicServerConfig::try_from(tls).expect("TLS 1.3");
    let mut config = quinn::ServerConfig::with_crypto(Arc::new(quic));
    config.transport_config(Arc::clone(&transport));
    let server =
        quinn::Endpoint::new(quinn::EndpointConfig::default(), Some(config), socket(), Arc::new(quinn::TokioRuntime))
            .expect("a socket");
    let tls = rustls::ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(tls13)
        .expect("TLS 1.3")
        .with_root_certificates(roots)
        .with_no_client_auth();
    let quic = quinn::crypto::rustls::QuicClientConfig::try_from(tls).expect("TLS 1.3");
    let mut config = quinn::ClientConfig::new(Arc::new(quic));
    config.transport_config(transport);
    let endpoint = quinn::Endpoint::new(Default::default(), None, socket(), Arc::new(quinn::TokioRuntime));
    let client = endpoint.expect("a socket");
    let addr = server.local_addr().expect("an address");
    let connecting = client.connect_with(config, addr, "a.tandem").expect("a connection");
    let (out, into) = tokio::join!(connecting, async { server.accept().await.expect("open").await });
    (server, client, out.expect("up"), into.expect("up"))
}

fn socket() -> std::net::UdpSocket {
    let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::DGRAM, None).expect("UDP");
    let _ = socket.set_recv_buffer_size(2 << 20);
    let _ = socket.set_send_buffer_size(2 << 20);
    socket.bind(&any().into()).expect("a port");
    socket.set_nonblocking(true).expect("non-blocking");
    socket.into()
}

/// Seconds to move as many bytes over one raw stream; chunks are counted and dropped.
async fn raw_stream(out: &quinn::Connection, into: &quinn::Connection, payload: &Bytes) -> f64 {
    let (out, payload) = (out.clone(), payload.clone());
    let start = Instant::now();
    let sending = tokio::spawn(async move {
        let mut stream = out.open_uni().await.expect("a stream");
        for _ in 0..BLOCKS {
            stream.write_chunk(payload.clone()).await.expect("written");
        }
        stream.finish().expect("finished");
        let _ = stream.stopped().await;
    });
    let mut stream = into.accept_uni().await.expect("a stream");
    let mut bytes = 0;
    while let Some(chunk) = stream.read_chunk(usize::MAX, true).await.expect("read") {
        bytes += chunk.bytes.len();
    }
    assert_eq!(bytes, BLOCKS * BLOCK_BYTES);
    let took = start.elapsed().as_secs_f64();
    sending.await.expect("the sender");
    took
}

fn median(values: &[f64]) -> f64 {
    let mut values = values.to_vec();
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn goodput_ratios() {
    let bed = bed();
    let payload = Bytes::from(vec![0x5a; BLOCK_BYTES]);
    bed.runtime.block_on(async {
        let (_server, _connector, out, into) = links(&bed.ca).await;
        let out = Arc::new(out);
        let (_raw_server, _raw_client, raw_out, raw_into) = raw(&bed.ca).await;
        // Interleaved, so that a busy machine slows all three alike; the first round warms up.
        let (mut raw, mut plain, mut checked) = (Costs::default(), Costs::default(), Costs::default());
        for round in 0..=ROUNDS {
            let a = cost(raw_stream(&raw_out, &raw_into, &payload)).await;
            let b = cost(frames(Arc::clone(&out), &into, &payload, false)).await;
            let c = cost(frames(Arc::clone(&out), &into, &payload, true)).await;
            if round > 0 {
                raw.push(a);
                plain.push(b);
                checked.push(c);
            }
        }
        println!("                             rate          ÷ above        CPU of both ends  ÷ above");
        raw.print("raw quinn stream", &raw, "");
        plain.print("KV frames", &raw, "[≥ 0.90]");
        checked.print("KV frames, BLAKE3 checked", &plain, "[≥ 0.95]");
    });
}

/// Seconds of each round, by the clock and on the processors. The second says the same on a busy
/// machine as on an idle one.
#[derive(Default)]
struct Costs {
    wall: Vec<f64>,
    cpu: Vec<f64>,
}

impl Costs {
    fn push(&mut self, (wall, cpu): (f64, f64)) {
        self.wall.push(wall);
        self.cpu.push(cpu);
    }

    fn print(&self, name: &str, base: &Self, target: &str) {
        let mib = ((BLOCKS * BLOCK_BYTES) >> 20) as f64;
        let (wall, cpu) = (median(&self.wall), median(&self.cpu));
        let (rate, by_cpu) = (median(&base.wall) / wall, median(&base.cpu) / cpu);
        println!(
            "{name:<26} {:6.1} MiB/s  {rate:.2} {target:<9} {:6.2} ms/MiB  {by_cpu:.2}",
            mib / wall,
            1e3 * cpu / mib,
        );
    }
}

/// Processor seconds of all threads so far; 0 where the system does not say.
fn cpu_seconds() -> f64 {
    let Ok(threads) = std::fs::read_dir("/proc/self/task") else { return 0.0 };
    let nanos = threads.flatten().filter_map(|thread| {
        let text = std::fs::read_to_string(thread.path().join("schedstat")).ok()?;
        text.split(' ').next()?.parse::<f64>().ok()
    });
    nanos.sum::<f64>() / 1e9
}

async fn cost(run: impl Future<Output = f64>) -> (f64, f64) {
    let before = cpu_seconds();
    let wall = run.await;
    (wall, cpu_seconds() - before)
}

#[derive(Clone, prost::Message)]
struct ProstOffer {
    #[prost(uint64, tag = "1")]
    epoch: u64,
    #[prost(uint32, tag = "2")]
    exchange: u32,
    #[prost(uint32, repeated, tag = "3")]
    shape: Vec<u32>,
    #[prost(bytes = "vec", repeated, tag = "4")]
    ids: Vec<Vec<u8>>,
    #[prost(uint32, tag = "5")]
    tokens: u32,
}

/// The same offer three ways: header, rkyv meta, prost bytes.
fn offer() -> (Header, MetaBuf, Vec<u8>) {
    let ids: Vec<Digest> = (0..256u32).map(|i| Digest::of(&i.to_le_bytes())).collect();
    let prost = ProstOffer {
        epoch: 1,
        exchange: 1,
        shape: vec![0, 8, 1_024, 0],
        ids: ids.iter().map(|id| id.0.to_vec()).collect(),
        tokens: 8_192,
    };
    let message = KvOffer { epoch: Epoch(1), exchange: 1, shape: shape(), ids, tokens: 8_192 };
    let frame = Frame { seq: 0, message: message.into(), payload: Bytes::new() };
    let (head, _) = encode(&frame).expect("an offer");
    let mut meta = MetaBuf::new();
    meta.extend_from_slice(&head[HEADER_BYTES..]);
    let header = Header::parse(head[..HEADER_BYTES].try_into().expect("32 bytes")).expect("a header");
    (header, meta, prost.encode_to_vec())
}

fn access(meta: &MetaBuf) -> usize {
    type Offer = rkyv::Archived<KvOffer>;
    rkyv::access::<Offer, Failure>(meta).expect("a valid meta").ids.len()
}

fn time(mut f: impl FnMut()) -> Duration {
    const TIMES: u32 = 20_000;
    let start = Instant::now();
    (0..TIMES).for_each(|_| f());
    start.elapsed() / TIMES
}

fn meta_ratios() {
    let (header, meta, prost) = offer();
    let accessed = time(|| {
        black_box(access(black_box(&meta)));
    });
    let owned = time(|| drop(black_box(decode_meta(&header, black_box(&meta)))));
    let decoded = time(|| drop(black_box(ProstOffer::decode(black_box(&prost[..])))));
    let ratio = |a: Duration| a.as_secs_f64() / decoded.as_secs_f64();
    println!("offer of 256 ids: prost decode {decoded:?}");
    println!("  rkyv validated access {accessed:?}   ÷ prost {:.3} [≤ 0.25]", ratio(accessed));
    println!("  checked and to owned  {owned:?}   ÷ prost {:.3}", ratio(owned));
}

#[divan::bench]
fn rkyv_access(bencher: divan::Bencher<'_, '_>) {
    let (_, meta, _) = offer();
    bencher.bench_local(|| access(divan::black_box(&meta)));
}

#[divan::bench]
fn decode_to_owned(bencher: divan::Bencher<'_, '_>) {
    let (header, meta, _) = offer();
    bencher.bench_local(|| decode_meta(&header, divan::black_box(&meta)));
}

#[divan::bench]
fn prost_decode(bencher: divan::Bencher<'_, '_>) {
    let (_, _, prost) = offer();
    bencher.bench_local(|| ProstOffer::decode(divan::black_box(&prost[..])));
}

#[divan::bench(args = [0, 4_096, 1 << 20])]
fn encode_block(bencher: divan::Bencher<'_, '_>, payload: usize) {
    let payload = Bytes::from(vec![1; payload]);
    let frame = Frame { seq: 0, message: block(0, Digest::default()), payload };
    bencher.bench_local(|| encode(divan::black_box(&frame)));
}

fn main() {
    // `cargo test --benches` only checks that it starts.
    if std::env::args().any(|arg| arg == "--bench") {
        goodput_ratios();
        meta_ratios();
    }
    divan::main();
}
