//! A UDP proxy that behaves like a bad link: for tests and experiments (feature `fault-proxy`).
//!
//! Put it between an edge and a cloud node: the edge dials [`UdpProxy::local_addr`]. It needs no
//! privileges, runs in the process and can be changed while traffic flows. The decisions (when does
//! this packet arrive, if ever?) are the pure [`impairment`]; the task here only moves packets.

pub mod impairment;

use std::{
    cmp::Reverse,
    collections::{BinaryHeap, HashMap},
    net::SocketAddr,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use tokio::{
    net::UdpSocket,
    sync::mpsc,
    task::JoinHandle,
    time::{Instant, sleep_until},
};

pub use self::impairment::Faults;
use self::impairment::{Fate, Impairment};
use crate::{error::TransportError, socket};

/// Client addresses served at once; the one idle longest gives way.
pub const CLIENTS_MAX: usize = 64;
/// Packets on their way through the proxy; more are dropped.
pub const PACKETS_MAX: usize = 65_536;
/// Answers read ahead of the proxy's task.
const ANSWERS_MAX: usize = 1_024;
/// Largest UDP packet.
const PACKET_BYTES_MAX: usize = 65_535;
/// Packets taken from a socket before the others get their turn.
const BURST_MAX: usize = 64;

/// What a proxy has done.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ProxyStats {
    /// Packets passed on, copies included.
    pub forwarded: u64,
    /// Bytes passed on.
    pub forwarded_bytes: u64,
    /// Packets lost by chance or because the link was off.
    pub lost: u64,
    /// Packets dropped because the queue before the link was full.
    pub overflowed: u64,
    /// Packets sent twice.
    pub duplicated: u64,
    /// Packets held back past their successors.
    pub reordered: u64,
}

#[derive(Debug, Default)]
struct Counters {
    forwarded: AtomicU64,
    forwarded_bytes: AtomicU64,
    lost: AtomicU64,
    overflowed: AtomicU64,
    duplicated: AtomicU64,
    reordered: AtomicU64,
}

fn count(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}

#[derive(Debug)]
struct Shared {
    faults: Mutex<(Faults, SocketAddr)>,
    /// Times the proxy forgot its clients' addresses.
    rebinds: AtomicU64,
    counters: Counters,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, (Faults, SocketAddr)> {
        self.faults.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Changes a running proxy; cheap to clone.
#[derive(Debug, Clone)]
pub struct ProxyHandle(Arc<Shared>);

impl ProxyHandle {
    /// The faults now.
    #[must_use]
    pub fn faults(&self) -> Faults {
        self.0.lock().0
    }

    /// Replaces the faults; packets on their way keep their fate.
    pub fn set(&self, faults: Faults) {
        self.0.lock().0 = faults;
    }

    /// Changes single faults.
    pub fn update(&self, change: impl FnOnce(&mut Faults)) {
        change(&mut self.0.lock().0);
    }

    /// Sends packets of all clients to another address from now on (a node that restarted elsewhere).
    pub fn set_target(&self, target: SocketAddr) {
        self.0.lock().1 = target;
    }

    /// Forgets under which port each client goes to the target, as a NAT does: the next packet of a client
    /// leaves from a new one, and answers to the old one are lost.
    pub fn rebind(&self) {
        count(&self.0.rebinds);
    }

    /// What was done so far.
    #[must_use]
    pub fn stats(&self) -> ProxyStats {
        let counters = &self.0.counters;
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        ProxyStats {
            forwarded: get(&counters.forwarded),
            forwarded_bytes: get(&counters.forwarded_bytes),
            lost: get(&counters.lost),
            overflowed: get(&counters.overflowed),
            duplicated: get(&counters.duplicated),
            reordered: get(&counters.reordered),
        }
    }
}

/// A running proxy; stops when dropped.
#[derive(Debug)]
pub struct UdpProxy {
    addr: SocketAddr,
    handle: ProxyHandle,
    task: JoinHandle<()>,
}

impl UdpProxy {
    /// Listens on `listen` (port 0 for any) and passes packets to `target` and back. The same
    /// `seed` and the same traffic give the same fates. Needs a tokio runtime.
    ///
    /// # Errors
    /// [`TransportError::Bind`].
    pub fn start(listen: SocketAddr, target: SocketAddr, faults: Faults, seed: u64) -> Result<Self, TransportError> {
        let bind = |e: std::io::Error| TransportError::Bind { addr: listen, reason: e.to_string() };
        let front = Arc::new(UdpSocket::from_std(socket::udp(listen)?).map_err(bind)?);
        let addr = front.local_addr().map_err(bind)?;
        let shared = Arc::new(Shared {
            faults: Mutex::new((faults, target)),
            rebinds: AtomicU64::new(0),
            counters: Counters::default(),
        });
        let (answers_tx, answers) = mpsc::channel(ANSWERS_MAX);
        let relay = Relay {
            front,
            shared: Arc::clone(&shared),
            start: Instant::now(),
            out: Impairment::new(seed),
            back: Impairment::new(seed ^ 0x5bd1_e995),
            clients: HashMap::new(),
            rebinds: 0,
            queue: BinaryHeap::new(),
            queued: 0,
            answers_tx,
        };
        let task = tokio::spawn(relay.run(answers));
        Ok(Self { addr, handle: ProxyHandle(shared), task })
    }

    /// Where clients send to.
    #[must_use]
    pub fn local_addr(&self) -> SocketAddr {
        self.addr
    }

    /// The controls.
    #[must_use]
    pub fn handle(&self) -> ProxyHandle {
        self.handle.clone()
    }
}

impl Drop for UdpProxy {
    fn drop(&mut self) {
        self.task.abort();
    }
}

struct Client {
    socket: Arc<UdpSocket>,
    reader: JoinHandle<()>,
    last_used: Instant,
}

impl Drop for Client {
    fn drop(&mut self) {
        self.reader.abort();
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Way {
    Out,
    Back,
}

#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Packet {
    due_us: u64,
    // Breaks ties in order of arrival.
    number: u64,
    way: Way,
    client: SocketAddr,
    bytes: Bytes,
}

struct Relay {
    front: Arc<UdpSocket>,
    shared: Arc<Shared>,
    start: Instant,
    out: Impairment,
    back: Impairment,
    clients: HashMap<SocketAddr, Client>,
    /// Those of the handle that have been carried out.
    rebinds: u64,
    queue: BinaryHeap<Reverse<Packet>>,
    queued: u64,
    answers_tx: mpsc::Sender<(SocketAddr, Bytes)>,
}

impl Relay {
    async fn run(mut self, mut answers: mpsc::Receiver<(SocketAddr, Bytes)>) {
        let mut buf = vec![0; PACKET_BYTES_MAX];
        let front = Arc::clone(&self.front);
        loop {
            let next = self.queue.peek().map(|Reverse(packet)| packet.due_us);
            let due = self.start + Duration::from_micros(next.unwrap_or(0));
            tokio::select! {
                () = sleep_until(due), if next.is_some() => {}
                // An error is an ICMP echo of a client that went away.
                Ok((len, client)) = front.recv_from(&mut buf) => {
                    self.take(Way::Out, client, &buf[..len]);
                    for _ in 1..BURST_MAX {
                        let Ok((len, client)) = front.try_recv_from(&mut buf) else { break };
                        self.take(Way::Out, client, &buf[..len]);
                    }
                }
                Some((client, bytes)) = answers.recv() => {
                    self.take(Way::Back, client, &bytes);
                    for _ in 1..BURST_MAX {
                        let Ok((client, bytes)) = answers.try_recv() else { break };
                        self.take(Way::Back, client, &bytes);
                    }
                }
            }
            self.deliver();
        }
    }

    fn now_us(&self) -> u64 {
        self.start.elapsed().as_micros() as u64
    }

    /// Decides over one packet and queues its copies.
    fn take(&mut self, way: Way, client: SocketAddr, bytes: &[u8]) {
        let rebinds = self.shared.rebinds.load(Ordering::Relaxed);
        if rebinds != self.rebinds {
            self.rebinds = rebinds;
            self.clients.clear();
        }
        if way == Way::Back && !self.clients.contains_key(&client) {
            // For a port that is no more.
            return count(&self.shared.counters.lost);
        }
        let (faults, now_us) = (self.shared.lock().0, self.now_us());
        let impairment = match way {
            Way::Out => &mut self.out,
            Way::Back => &mut self.back,
        };
        let counters = &self.shared.counters;
        match impairment.judge(&faults, now_us, bytes.len()) {
            Fate::Lost => count(&counters.lost),
            Fate::Overflowed => count(&counters.overflowed),
            Fate::Arrives { at_us, copy_at_us, reordered } => {
                if reordered {
                    count(&counters.reordered);
                }
                if copy_at_us.is_some() {
                    count(&counters.duplicated);
                }
                for due_us in [Some(at_us), copy_at_us].into_iter().flatten() {
                    if self.queue.len() >= PACKETS_MAX {
                        count(&counters.overflowed);
                        continue;
                    }
                    self.queued += 1;
                    let (number, bytes) = (self.queued, Bytes::copy_from_slice(bytes));
                    self.queue.push(Reverse(Packet { due_us, number, way, client, bytes }));
                }
            }
        }
    }

    /// Sends what is due.
    fn deliver(&mut self) {
        let now_us = self.now_us();
        while self.queue.peek().is_some_and(|Reverse(packet)| packet.due_us <= now_us) {
            let Some(Reverse(packet)) = self.queue.pop() else {
                return;
            };
            let sent = match packet.way {
                Way::Back => self.front.try_send_to(&packet.bytes, packet.client).is_ok(),
                Way::Out => {
                    let target = self.shared.lock().1;
                    self.upstream(packet.client, target)
                        .is_some_and(|socket| socket.try_send_to(&packet.bytes, target).is_ok())
                }
            };
            let counters = &self.shared.counters;
            if sent {
                count(&counters.forwarded);
                counters.forwarded_bytes.fetch_add(packet.bytes.len() as u64, Ordering::Relaxed);
            } else {
                // The system's own queue is full: as on a real link.
                count(&counters.overflowed);
            }
        }
    }

    /// The socket that stands for `client` before the target.
    fn upstream(&mut self, client: SocketAddr, target: SocketAddr) -> Option<Arc<UdpSocket>> {
        if !self.clients.contains_key(&client) {
            if self.clients.len() >= CLIENTS_MAX {
                let idle = self.clients.iter().min_by_key(|(_, client)| client.last_used);
                let idle = idle.map(|(addr, _)| *addr)?;
                self.clients.remove(&idle);
            }
            let any: SocketAddr = if target.is_ipv4() { ([0, 0, 0, 0], 0).into() } else { ([0u16; 8], 0).into() };
            let socket = Arc::new(UdpSocket::from_std(socket::udp(any).ok()?).ok()?);
            let reader = tokio::spawn(read_answers(Arc::clone(&socket), client, self.answers_tx.clone()));
            self.clients.insert(client, Client { socket, reader, last_used: Instant::now() });
        }
        let client = self.clients.get_mut(&client)?;
        client.last_used = Instant::now();
        Some(Arc::clone(&client.socket))
    }
}

async fn read_answers(socket: Arc<UdpSocket>, client: SocketAddr, answers: mpsc::Sender<(SocketAddr, Bytes)>) {
    let mut buf = vec![0; PACKET_BYTES_MAX];
    loop {
        // An error is an ICMP echo: the target is down for now.
        let Ok((len, _)) = socket.recv_from(&mut buf).await else {
            continue;
        };
        if answers.send((client, Bytes::copy_from_slice(&buf[..len]))).await.is_err() {
            return;
        }
    }
}
