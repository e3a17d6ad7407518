//! Keeps a link to a peer that comes and goes.

use std::{
    net::SocketAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use tandem_proto::message::RefuseCode;

use tokio::{
    sync::{Notify, watch},
    task::JoinHandle,
};

use crate::{
    addresses::{self, DEAD_MAX},
    close::CloseCode,
    connector::Connector,
    error::TransportError,
    link::Link,
    suspects::Suspects,
};

/// Waits between attempts. Each wait is drawn between a half and the whole of the nominal one, so
/// that a fleet does not come back in step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Backoff {
    /// Nominal wait after the first failure.
    pub base: Duration,
    /// Largest nominal wait.
    pub cap: Duration,
    /// Time for the first attempt; every failure in a row adds a half of it, up to the settings'
    /// handshake bound. Short first attempts find a node that restarts; later ones wait for a slow
    /// path.
    pub first_attempt: Duration,
}

impl Default for Backoff {
    fn default() -> Self {
        Self { base: Duration::from_millis(100), cap: Duration::from_secs(1), first_attempt: Duration::from_secs(1) }
    }
}

/// A link that lives shorter than this counts as a failed attempt: a peer that accepts and closes
/// at once must not be hammered.
const STABLE: Duration = Duration::from_secs(1);

impl Backoff {
    /// Nominal wait after `failures` failures in a row (1 for the first).
    #[must_use]
    pub fn nominal(&self, failures: u32) -> Duration {
        let factor = 1u32.checked_shl(failures.saturating_sub(1)).unwrap_or(u32::MAX);
        self.base.saturating_mul(factor).min(self.cap)
    }

    fn wait(&self, failures: u32) -> Duration {
        self.nominal(failures).mul_f64(0.5 + fastrand::f64() / 2.0)
    }

    fn attempt(&self, failures: u32) -> Duration {
        self.first_attempt.saturating_add((self.first_attempt / 2).saturating_mul(failures))
    }
}

/// Where to dial.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Target {
    /// Name of the node, by which a resolver is told to avoid it.
    pub node: String,
    /// UDP addresses of the peer, in the resolver's order.
    pub addrs: Vec<SocketAddr>,
    /// Name its certificate must carry.
    pub server_name: String,
}

impl Target {
    /// A node known by its server name, at one address.
    #[must_use]
    pub fn at(addr: SocketAddr, server_name: &str) -> Self {
        Self { node: server_name.to_owned(), addrs: vec![addr], server_name: server_name.to_owned() }
    }
}

/// What a [`Redial`] is doing.
#[derive(Debug, Clone)]
pub enum DialState {
    /// Trying.
    Dialing {
        /// Failures in a row so far.
        failures: u32,
        /// The last one.
        error: Option<TransportError>,
    },
    /// The link is up.
    Up,
    /// Waiting before the next attempt.
    Waiting {
        /// Failures in a row so far.
        failures: u32,
        /// The last one.
        error: TransportError,
        /// Length of this wait.
        wait: Duration,
    },
    /// Severed by [`Redial::cut`].
    Cut,
}

/// The person's switch. A watch shows the last of several turns only, so it counts them.
#[derive(Debug, Clone, Copy, Default)]
struct Switch {
    /// Severed: there must be no link.
    cut: bool,
    /// Times it was cut.
    cuts: u64,
}

/// Which node the link leads to, and which did not work lately.
#[derive(Debug, Default)]
struct Nodes {
    current: Option<String>,
    suspects: Suspects,
}

impl Nodes {
    fn suspect_current(&mut self) {
        if let Some(node) = &self.current {
            self.suspects.add(node, Instant::now());
        }
    }
}

fn lock(nodes: &Mutex<Nodes>) -> MutexGuard<'_, Nodes> {
    nodes.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Dials again whenever there is no link. Stops, and lets go of the link, when dropped.
///
/// A node that shuts down, falls silent, refuses or is [suspected](Redial::suspect) is left for others for
/// [`COOL_DOWN`](crate::suspects::COOL_DOWN): the resolver is asked at once for another one and told which to
/// avoid. Where it knows no other it may name the same again.
#[derive(Debug)]
pub struct Redial {
    link: watch::Receiver<Option<Arc<Link>>>,
    state: watch::Receiver<DialState>,
    switch: watch::Sender<Switch>,
    demand: Arc<Notify>,
    nodes: Arc<Mutex<Nodes>>,
    task: JoinHandle<()>,
}

impl Redial {
    /// Starts dialing what `resolve` answers. It is asked before every attempt, so a node may move, and is
    /// given the nodes to avoid, the one that failed last first. Needs a tokio runtime.
    pub fn start<R, F>(connector: Arc<Connector>, backoff: Backoff, resolve: R) -> Self
    where
        R: Fn(Vec<String>) -> F + Send + Sync + 'static,
        F: Future<Output = Result<Target, TransportError>> + Send + 'static,
    {
        let (link_tx, link) = watch::channel(None);
        let (state_tx, state) = watch::channel(DialState::Dialing { failures: 0, error: None });
        let (switch, turns) = watch::channel(Switch::default());
        let demand = Arc::new(Notify::new());
        let nodes = Arc::default();
        let supervisor = Supervisor {
            connector,
            backoff,
            link: link_tx,
            state: state_tx,
            switch: turns,
            demand: Arc::clone(&demand),
            nodes: Arc::clone(&nodes),
            dead: Vec::new(),
        };
        let task = tokio::spawn(supervisor.run(resolve));
        Self { link, state, switch, demand, nodes, task }
    }

    /// The link of the moment, to be watched: `None` while there is none.
    #[must_use]
    pub fn link(&self) -> watch::Receiver<Option<Arc<Link>>> {
        self.link.clone()
    }

    /// The link now, if it is up.
    #[must_use]
    pub fn current(&self) -> Option<Arc<Link>> {
        self.link.borrow().clone().filter(|link| !link.is_closed())
    }

    /// What is being done, to be watched.
    #[must_use]
    pub fn state(&self) -> watch::Receiver<DialState> {
        self.state.clone()
    }

    /// True severs the link and dials no more; false dials at once. A link that is severed is gone,
    /// however soon it is let back.
    pub fn cut(&self, cut: bool) {
        let link = self.current().filter(|_| cut);
        self.switch.send_modify(|switch| {
            switch.cuts += u64::from(cut);
            switch.cut = cut;
        });
        if let Some(link) = link {
            sever(&link);
        }
    }

    /// True while severed.
    #[must_use]
    pub fn is_cut(&self) -> bool {
        self.switch.borrow().cut
    }

    /// The node at the other end of `link` does not work: closes the link, leaves the node for a cool-down
    /// and asks the resolver for another one at once. A link that has been replaced meanwhile is only closed.
    pub fn suspect(&self, link: &Link, reason: &str) {
        if self.link.borrow().as_deref().is_some_and(|current| std::ptr::eq(current, link)) {
            lock(&self.nodes).suspect_current();
        }
        link.close(CloseCode::TooSlow, reason);
    }

    /// True if the link leads to a node that did not work lately: the resolver knows no better one.
    #[must_use]
    pub fn is_suspect(&self) -> bool {
        let nodes = lock(&self.nodes);
        nodes.current.as_ref().is_some_and(|node| nodes.suspects.has(node, Instant::now()))
    }

    /// A task needs the link now: ends a wait between attempts.
    pub fn wake(&self) {
        self.demand.notify_one();
    }

    /// The link, woken for and waited for; `None` if none comes up within `patience`. Returns at
    /// once if severed.
    pub async fn demand(&self, patience: Duration) -> Option<Arc<Link>> {
        if let Some(link) = self.current() {
            return Some(link);
        }
        if self.is_cut() {
            return None;
        }
        self.wake();
        let mut watch = self.link();
        let up = watch.wait_for(|link| link.as_ref().is_some_and(|link| !link.is_closed()));
        tokio::time::timeout(patience, up).await.ok()?.ok()?.clone()
    }
}

impl Drop for Redial {
    fn drop(&mut self) {
        self.task.abort();
    }
}

fn sever(link: &Link) {
    link.close(CloseCode::Cut, "severed by a switch");
}

struct Supervisor {
    connector: Arc<Connector>,
    backoff: Backoff,
    link: watch::Sender<Option<Arc<Link>>>,
    state: watch::Sender<DialState>,
    switch: watch::Receiver<Switch>,
    demand: Arc<Notify>,
    nodes: Arc<Mutex<Nodes>>,
    /// Addresses at which a link has died, the latest first.
    dead: Vec<SocketAddr>,
}

impl Supervisor {
    async fn run<R, F>(mut self, resolve: R)
    where
        R: Fn(Vec<String>) -> F,
        F: Future<Output = Result<Target, TransportError>>,
    {
        let mut failures = 0;
        let mut last = None;
        loop {
            let Switch { cut, cuts } = *self.switch.borrow_and_update();
            if cut {
                self.state.send_replace(DialState::Cut);
                if self.switch.wait_for(|switch| !switch.cut).await.is_err() {
                    return;
                }
                failures = 0;
                last = None;
                continue;
            }
            self.state.send_replace(DialState::Dialing { failures, error: last.take() });
            let patience = self.backoff.attempt(failures);
            let mut turns = self.switch.clone();
            let attempt = tokio::select! {
                biased;
                _ = turns.wait_for(|switch| switch.cuts != cuts) => continue,
                attempt = self.dial(&resolve, patience) => attempt,
            };
            let error = match attempt {
                Err(error) => error,
                Ok(link) => {
                    let up_since = Instant::now();
                    let error = self.hold(Arc::new(link), cuts).await;
                    if up_since.elapsed() >= STABLE {
                        failures = 0;
                    }
                    error
                }
            };
            if matches!(error, TransportError::Cut) {
                continue;
            }
            failures += 1;
            // A link that was good is replaced at once.
            let wait = if failures == 1 { Duration::ZERO } else { self.backoff.wait(failures - 1) };
            tracing::debug!(%error, failures, ?wait, "no link");
            last = Some(error.clone());
            self.state.send_replace(DialState::Waiting { failures, error, wait });
            tokio::select! {
                () = tokio::time::sleep(wait) => {}
                () = self.demand.notified() => {}
                _ = self.switch.wait_for(|switch| switch.cuts != cuts) => {}
            }
        }
    }

    async fn dial<R, F>(&mut self, resolve: &R, patience: Duration) -> Result<Link, TransportError>
    where
        R: Fn(Vec<String>) -> F,
        F: Future<Output = Result<Target, TransportError>>,
    {
        let ms = patience.as_millis() as u64;
        let late = |what| TransportError::Timeout { what, ms };
        let avoid = lock(&self.nodes).suspects.names(Instant::now());
        let target = tokio::time::timeout(patience, resolve(avoid)).await;
        let target = target.map_err(|_| late("the search for a node"))??;
        let addrs = addresses::order(&target.addrs, &self.dead);
        let dialed = tokio::time::timeout(patience, self.connector.connect_any(&addrs, &target.server_name)).await;
        let dialed = dialed.unwrap_or_else(|_| Err(late("an attempt to connect")));
        let mut nodes = lock(&self.nodes);
        nodes.current = Some(target.node);
        if dialed.is_err() {
            nodes.suspect_current();
            nodes.current = None;
        }
        dialed
    }

    /// Publishes the link until it ends; says why it ended. `cuts` is what the switch had counted
    /// when the link was dialed.
    async fn hold(&mut self, link: Arc<Link>, cuts: u64) -> TransportError {
        let addr = link.remote_address();
        self.dead.retain(|dead| *dead != addr);
        self.link.send_replace(Some(Arc::clone(&link)));
        self.state.send_replace(DialState::Up);
        let error = tokio::select! {
            biased;
            _ = self.switch.wait_for(|switch| switch.cuts != cuts) => {
                sever(&link);
                TransportError::Cut
            }
            error = link.closed() => error,
        };
        {
            let mut nodes = lock(&self.nodes);
            if blames_the_node(&error) {
                nodes.suspect_current();
            }
            nodes.current = None;
        }
        if path_died(&error) {
            self.dead.insert(0, addr);
            self.dead.truncate(DEAD_MAX);
            // What is stuck may be our own port, in a NAT or a firewall.
            if let Err(error) = self.connector.rebind() {
                tracing::debug!(%error, "the socket stays");
            }
        }
        self.link.send_replace(None);
        error
    }
}

/// Whether the end of a link says that its node does not work, so that another one is to be asked for.
fn blames_the_node(error: &TransportError) -> bool {
    match error {
        TransportError::Closed { code, .. } => {
            matches!(code, CloseCode::ShuttingDown | CloseCode::TooSlow | CloseCode::Silent | CloseCode::Busy)
        }
        TransportError::Lost { .. } => true,
        TransportError::Refused { code, .. } => *code == RefuseCode::Busy,
        _ => false,
    }
}

/// Whether the path, or the address at its end, is of no use any more.
fn path_died(error: &TransportError) -> bool {
    matches!(error, TransportError::Lost { .. } | TransportError::Closed { code: CloseCode::Silent, .. })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tls_fault::TlsFault;

    #[test]
    fn backoff_doubles_up_to_its_cap_and_never_overflows() {
        let backoff = Backoff::default();
        let table = [(0, 100), (1, 100), (2, 200), (3, 400), (4, 800), (5, 1_000), (u32::MAX, 1_000)];
        for (failures, ms) in table {
            assert_eq!(backoff.nominal(failures), Duration::from_millis(ms), "{failures}");
            let wait = backoff.wait(failures);
            assert!(wait >= Duration::from_millis(ms / 2) && wait <= Duration::from_millis(ms));
        }
        assert_eq!(backoff.attempt(0), Duration::from_secs(1));
        assert_eq!(backoff.attempt(4), Duration::from_secs(3));
    }

    #[test]
    fn the_end_of_a_link_blames_its_node_or_not() {
        let closed = |code| TransportError::Closed { code, reason: String::new() };
        let table = [
            (closed(CloseCode::ShuttingDown), true, false),
            (closed(CloseCode::Silent), true, true),
            (closed(CloseCode::TooSlow), true, false),
            (closed(CloseCode::Done), false, false),
            (TransportError::Lost { reason: "reset by peer".into() }, true, true),
            (TransportError::Refused { code: RefuseCode::Busy, reason: String::new() }, true, false),
            // The certificate of a link has ended: the next one is made with another.
            (TransportError::Unauthorised { fault: TlsFault::OwnOutOfDate, reason: "expired".into() }, false, false),
            (TransportError::Cut, false, false),
        ];
        for (error, blamed, dead) in table {
            assert_eq!((blames_the_node(&error), path_died(&error)), (blamed, dead), "{error}");
        }
    }
}
