//! The edge's link to its cloud node: which one, since when it is gone, and the switch that cuts
//! it off.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tandem_proto::ids::Epoch;
use tandem_transport::bulk::BulkInbox;
use tandem_transport::link::Link;
use tandem_transport::redial::{DialState, Redial};
use tokio::sync::{Notify, watch};
use tokio_util::task::AbortOnDropHandle;

use crate::cool_down::{COOL_DOWN_MIN, CoolDown, NodeRun};

/// Epoch of the newest placement ticket, shared with the resolver that gets the tickets.
#[derive(Clone, Debug, Default)]
pub struct TicketEpoch(Arc<AtomicU64>);

impl TicketEpoch {
    /// Notes a ticket's epoch; older ones are ignored.
    pub fn saw(&self, epoch: Epoch) {
        self.0.fetch_max(epoch.0, Ordering::Relaxed);
    }

    /// The newest epoch.
    #[must_use]
    pub fn current(&self) -> Epoch {
        Epoch(self.0.load(Ordering::Relaxed))
    }
}

/// What answers have found out about the cloud.
#[derive(Debug, Default)]
struct Experience {
    /// The node that failed last.
    failed: Mutex<Option<CoolDown>>,
    changed: Notify,
    /// Until when `auto` does not ask a cloud that lives and has more to do than it can.
    busy_until: Mutex<Option<Instant>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Experience {
    /// Until when the node of `link` is to be left alone.
    fn cools_until(&self, link: &Link) -> Option<Instant> {
        let node = NodeRun::of(link.peer_hello());
        lock(&self.failed).as_ref().filter(|failed| failed.holds(&node, Instant::now())).map(|failed| failed.until)
    }
}

/// The edge's side of its cloud link.
#[derive(Debug)]
pub struct Uplinks {
    redial: Option<Redial>,
    links: watch::Receiver<Option<Arc<Link>>>,
    experience: Arc<Experience>,
    /// Keeps `links` open where nothing is dialed.
    _idle: Option<watch::Sender<Option<Arc<Link>>>>,
    epoch: TicketEpoch,
    down_since: Arc<Mutex<Option<Instant>>>,
}

impl Uplinks {
    /// No cloud at all: every answer is the edge's own.
    #[must_use]
    pub fn none() -> Self {
        let (idle, links) = watch::channel(None);
        Self {
            redial: None,
            links,
            experience: Arc::default(),
            _idle: Some(idle),
            epoch: TicketEpoch::default(),
            down_since: Arc::default(),
        }
    }

    /// A link that is kept up by `redial`; `epoch` is fed by its resolver, `bulk` gets the KV blocks
    /// that arrive. Needs a tokio runtime.
    #[must_use]
    pub fn new(redial: Redial, epoch: TicketEpoch, bulk: BulkInbox) -> Self {
        let (publish, links) = watch::channel(None);
        let down_since = Arc::new(Mutex::new(Some(Instant::now())));
        let experience = Arc::new(Experience::default());
        let (mut watched, since, known) = (redial.link(), down_since.clone(), experience.clone());
        tokio::spawn(async move {
            // Holds a link, so it must not outlive the watch of it: a new one ends the one before.
            let mut _reader = None;
            let mut fresh = true;
            loop {
                let link = watched.borrow_and_update().clone();
                if fresh {
                    _reader = link.clone().map(|link| {
                        let bulk = bulk.clone();
                        AbortOnDropHandle::new(tokio::spawn(async move { bulk.serve(&link).await }))
                    });
                }
                // A link to a node that has just failed is not handed out until its cool-down is over.
                let cools_until = link.as_ref().and_then(|link| known.cools_until(link));
                let link = link.filter(|_| cools_until.is_none());
                {
                    let mut since = lock(&since);
                    *since = if link.is_some() { None } else { since.or_else(|| Some(Instant::now())) };
                }
                let same = |a: &Option<Arc<Link>>| match (a, &link) {
                    (Some(a), Some(b)) => Arc::ptr_eq(a, b),
                    (a, b) => a.is_none() && b.is_none(),
                };
                if !same(&publish.borrow()) {
                    publish.send_replace(link);
                }
                let cooled = async {
                    match cools_until {
                        Some(until) => tokio::time::sleep_until(until.into()).await,
                        None => std::future::pending().await,
                    }
                };
                fresh = tokio::select! {
                    changed = watched.changed() => match changed {
                        Ok(()) => true,
                        Err(_) => {
                            publish.send_replace(None);
                            return;
                        }
                    },
                    () = known.changed.notified() => false,
                    () = cooled => false,
                };
            }
        });
        Self { redial: Some(redial), links, experience, _idle: None, epoch, down_since }
    }

    /// True if a cloud is configured.
    #[must_use]
    pub fn configured(&self) -> bool {
        self.redial.is_some()
    }

    /// The link as it comes and goes.
    #[must_use]
    pub fn links(&self) -> watch::Receiver<Option<Arc<Link>>> {
        self.links.clone()
    }

    /// The link, if it is up.
    #[must_use]
    pub fn current(&self) -> Option<Arc<Link>> {
        self.links.borrow().clone().filter(|l| !l.is_closed())
    }

    /// Epoch for new sessions.
    #[must_use]
    pub fn epoch(&self) -> Epoch {
        self.epoch.current()
    }

    /// When the link was lost, or the start if it never was up; none while it is up.
    #[must_use]
    pub fn down_since(&self) -> Option<Instant> {
        *lock(&self.down_since)
    }

    /// What the dialing is doing, to be watched; none without a cloud.
    #[must_use]
    pub fn dialing(&self) -> Option<watch::Receiver<DialState>> {
        self.redial.as_ref().map(Redial::state)
    }

    /// How much is left of `patience` since the link went; none once it is over.
    #[must_use]
    pub fn patience_left(&self, patience: Duration) -> Option<Duration> {
        let gone = self.down_since().map_or(Duration::ZERO, |since| since.elapsed());
        patience.checked_sub(gone).filter(|left| !left.is_zero())
    }

    /// The node at the other end of `link` has failed an answer: the link is closed, another node is asked
    /// for, and this one is left alone for a while.
    pub fn suspect(&self, link: &Link, why: &str) {
        {
            let mut failed = lock(&self.experience.failed);
            let next = CoolDown::after(failed.take(), NodeRun::of(link.peer_hello()), why, Instant::now());
            tracing::warn!(node = link.peer_hello().node, "the cloud node is left alone for a while: {why}");
            *failed = Some(next);
        }
        if let Some(redial) = &self.redial {
            redial.suspect(link, why);
        }
        self.experience.changed.notify_one();
    }

    /// The node at the other end of `link` has done its work.
    pub fn worked(&self, link: &Link) {
        let node = NodeRun::of(link.peer_hello());
        let mut failed = lock(&self.experience.failed);
        if failed.as_ref().is_some_and(|failed| failed.is_about(&node)) {
            *failed = None;
        }
    }

    /// Why the connected node is left alone, if it is.
    #[must_use]
    pub fn left_alone(&self) -> Option<String> {
        let failed = lock(&self.experience.failed);
        failed.as_ref().filter(|failed| Instant::now() < failed.until).map(|failed| failed.why.clone())
    }

    /// The cloud lives and did not come to a question of `auto` in time: it is not asked for a while.
    pub fn rest(&self) {
        *lock(&self.experience.busy_until) = Some(Instant::now() + COOL_DOWN_MIN);
    }

    /// True while `auto` does not ask the cloud.
    #[must_use]
    pub fn rests(&self) -> bool {
        lock(&self.experience.busy_until).is_some_and(|until| Instant::now() < until)
    }

    /// Cuts the cloud off, or lets it back.
    pub fn cut(&self, cut: bool) {
        if let Some(redial) = &self.redial {
            redial.cut(cut);
        }
    }

    /// True while the cloud is cut off.
    #[must_use]
    pub fn is_cut(&self) -> bool {
        self.redial.as_ref().is_some_and(Redial::is_cut)
    }
}
