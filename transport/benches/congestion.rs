//! CUBIC against BBR through the fault proxy, on the paths that decide the default.
//!
//! `cargo bench -p tandem-transport --bench congestion` moves the same KV blocks over each path and
//! prints the goodput as a share of the path's rate. `TANDEM_BENCH_SECONDS` (default 25) bounds a
//! transfer. The last column is how late timers of 1 ms fired during the transfer (99th percentile):
//! where that is not far below the path's round-trip time, the row measured a busy machine, not the
//! controller, and is to be repeated.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::Bytes;
use tandem_proto::{
    frame::Message,
    ids::{Digest, Epoch, SessionId},
    message::{Hello, KvBlock, KvShape},
};
use tandem_transport::{Congestion, Connector, DevCa, Faults, Role, Server, Settings, UdpProxy};

const BLOCKS: u32 = 64;
const BLOCK_BYTES: usize = 128 << 10;

fn block(index: u32) -> Message {
    Message::KvBlock(KvBlock {
        session: SessionId([1; 16]),
        epoch: Epoch(1),
        exchange: 1,
        index,
        id: Digest::of(b"id"),
        payload_digest: Digest::of(b"payload"),
        tokens: 32,
        shape: KvShape { layer_from: 0, layer_to: 8, width: 128, hidden: 0 },
    })
}

struct Outcome {
    bytes: usize,
    took: Duration,
    lost: u64,
    /// Round trips of a small frame while the transfer runs: median and worst.
    waits: Vec<Duration>,
    /// How late a timer of the same runtime fired, 99th percentile.
    late: Duration,
}

/// Lateness of timers until told to stop.
async fn lateness(mut stop: tokio::sync::oneshot::Receiver<()>) -> Vec<Duration> {
    let nominal = Duration::from_millis(1);
    let mut late = vec![];
    while stop.try_recv().is_err() {
        let asked = Instant::now();
        tokio::time::sleep(nominal).await;
        late.push(asked.elapsed().saturating_sub(nominal));
    }
    late.sort();
    late
}

async fn transfer(congestion: Congestion, faults: Faults, patience: Duration) -> Outcome {
    let dir = tempfile::tempdir().expect("a folder");
    let ca = DevCa::open_or_create(dir.path()).expect("a CA");
    let settings = Settings { congestion, idle: Duration::from_secs(30), ..Settings::edge() };
    let (a, b) = (ca.issue(Role::Cloud, "a").expect("a"), ca.issue(Role::Edge, "b").expect("b"));
    let any = ([127, 0, 0, 1], 0).into();
    let server = Server::bind(any, &a, settings.clone(), Hello::new("bench", 1, vec![])).expect("a server");
    let target = server.local_addr().expect("an address");
    let proxy = UdpProxy::start(any, target, faults, 7).expect("a proxy");
    let connector = Connector::new(&b, settings, Hello::new("bench", 1, vec![])).expect("a connector");
    let edge = connector.connect(proxy.local_addr(), "a.tandem").await.expect("a link");
    let cloud = Arc::new(server.accept().await.expect("a link"));
    let payload = Bytes::from(vec![0x5a; BLOCK_BYTES]);
    // The cloud ships a prompt's state to the edge, the direction that matters.
    let sender = Arc::clone(&cloud);
    let (stop, stopped) = tokio::sync::oneshot::channel();
    let watching = tokio::spawn(lateness(stopped));
    let start = Instant::now();
    let sending = tokio::spawn(async move {
        for index in 0..BLOCKS {
            if sender.send_bulk(&block(index), payload.clone()).await.is_err() {
                return;
            }
        }
    });
    let mut echo = edge.open_session().await.expect("a session");
    echo.tx.send(&block(0), Bytes::new()).await.expect("sent");
    let mut far = cloud.accept_session().await.expect("a session");
    let echoing = tokio::spawn(async move {
        while let Ok(Some(frame)) = far.rx.next().await {
            if far.tx.send(&frame.message, Bytes::new()).await.is_err() {
                return;
            }
        }
    });
    let (mut bytes, mut waits, mut asked) = (0, vec![], Instant::now());
    let deadline = tokio::time::Instant::now() + patience;
    while bytes < BLOCKS as usize * BLOCK_BYTES {
        tokio::select! {
            frame = edge.accept_bulk() => bytes += frame.expect("a block").payload.len(),
            answer = echo.rx.next() => {
                answer.expect("an answer");
                waits.push(asked.elapsed());
                asked = Instant::now();
                echo.tx.send(&block(0), Bytes::new()).await.expect("sent");
            }
            () = tokio::time::sleep_until(deadline) => break,
        }
    }
    let took = start.elapsed();
    sending.abort();
    echoing.abort();
    waits.sort();
    let _ = stop.send(());
    let late = watching.await.expect("the watcher");
    let late = late.get(late.len().saturating_sub(1) * 99 / 100).copied().unwrap_or_default();
    Outcome { bytes, took, lost: cloud.stats().lost_packets, waits, late }
}

fn main() {
    // `cargo test --benches` only checks that it starts.
    if !std::env::args().any(|arg| arg == "--bench") {
        return;
    }
    let seconds = std::env::var("TANDEM_BENCH_SECONDS").ok().and_then(|s| s.parse().ok());
    let patience = Duration::from_secs(seconds.unwrap_or(25));
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().expect("a runtime");
    let path = |rtt_ms, mbit: u64, loss| {
        let bytes_per_s = Some(mbit * 1_000_000 / 8);
        Faults { loss, bytes_per_s, ..Faults::rtt(Duration::from_millis(rtt_ms)) }
    };
    for (rtt_ms, mbit, loss) in
        [(80, 20, 0.01), (80, 20, 0.001), (80, 20, 0.0), (20, 50, 0.0), (20, 50, 0.01), (10, 200, 0.0)]
    {
        for congestion in [Congestion::Cubic, Congestion::Bbr] {
            let faults = path(rtt_ms, mbit, loss);
            let out = runtime.block_on(transfer(congestion, faults, patience));
            let rate = out.bytes as f64 / out.took.as_secs_f64();
            let at = |share: f64| {
                let last = out.waits.len().saturating_sub(1) as f64;
                out.waits.get((last * share) as usize).copied().unwrap_or_default().as_millis()
            };
            println!(
                "{rtt_ms:3} ms {mbit:4} Mbit/s {:4.1} % loss  {congestion:?}: {:5.2} MiB of {} in {:5.2} s = {:5.2} MiB/s, {:3.0} % of the rate; lost {:5}; token RTT p50 {} ms, max {} ms; timers late by {} ms",
                loss * 100.0,
                out.bytes as f64 / 1_048_576.0,
                (BLOCKS as usize * BLOCK_BYTES) >> 20,
                out.took.as_secs_f64(),
                rate / 1_048_576.0,
                100.0 * rate / faults.bytes_per_s.unwrap_or(1) as f64,
                out.lost,
                at(0.5),
                at(1.0),
                out.late.as_millis(),
            );
        }
    }
}
