//! The edge's link to its cloud node: which one, since when it is gone, and the switch that cuts
//! it off.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tandem_proto::ids::Epoch;
use tandem_transport::bulk::BulkInbox;
use tandem_transport::link::Link;
use tandem_transport::redial::{DialState, Redial};
use tokio::sync::watch;
use tokio_util::task::AbortOnDropHandle;

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

/// The edge's side of its cloud link.
#[derive(Debug)]
pub struct Uplinks {
    redial: Option<Redial>,
    links: watch::Receiver<Option<Arc<Link>>>,
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
        Self { redial: None, links, _idle: Some(idle), epoch: TicketEpoch::default(), down_since: Arc::default() }
    }

    /// A link that is kept up by `redial`; `epoch` is fed by its resolver, `bulk` gets the KV blocks
    /// that arrive. Needs a tokio runtime.
    #[must_use]
    pub fn new(redial: Redial, epoch: TicketEpoch, bulk: BulkInbox) -> Self {
        let links = redial.link();
        let down_since = Arc::new(Mutex::new(Some(Instant::now())));
        let (mut watched, since) = (links.clone(), down_since.clone());
        tokio::spawn(async move {
            // Holds a link, so it must not outlive the watch of it: a new one ends the one before.
            let mut _reader = None;
            loop {
                let link = watched.borrow_and_update().clone();
                let up = link.is_some();
                _reader = link.map(|link| {
                    let bulk = bulk.clone();
                    AbortOnDropHandle::new(tokio::spawn(async move { bulk.serve(&link).await }))
                });
                {
                    let mut since = since.lock().unwrap_or_else(PoisonError::into_inner);
                    *since = if up { None } else { since.or_else(|| Some(Instant::now())) };
                }
                if watched.changed().await.is_err() {
                    return;
                }
            }
        });
        Self { redial: Some(redial), links, _idle: None, epoch, down_since }
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
        *self.down_since.lock().unwrap_or_else(PoisonError::into_inner)
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
