//! Keeps a link to a peer that comes and goes.

use std::{
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use tokio::{
    sync::{Notify, watch},
    task::JoinHandle,
};

use crate::{close::CloseCode, connector::Connector, error::TransportError, link::Link};

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
        Self { base: Duration::from_millis(100), cap: Duration::from_secs(2), first_attempt: Duration::from_secs(1) }
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
    /// UDP address of the peer.
    pub addr: SocketAddr,
    /// Name its certificate must carry.
    pub server_name: String,
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

/// Dials again whenever there is no link. Stops, and lets go of the link, when dropped.
#[derive(Debug)]
pub struct Redial {
    link: watch::Receiver<Option<Arc<Link>>>,
    state: watch::Receiver<DialState>,
    switch: watch::Sender<Switch>,
    demand: Arc<Notify>,
    task: JoinHandle<()>,
}

impl Redial {
    /// Starts dialing what `resolve` answers (asked before every attempt, so a node may move).
    /// Needs a tokio runtime.
    pub fn start<R, F>(connector: Arc<Connector>, backoff: Backoff, resolve: R) -> Self
    where
        R: Fn() -> F + Send + Sync + 'static,
        F: Future<Output = Result<Target, TransportError>> + Send + 'static,
    {
        let (link_tx, link) = watch::channel(None);
        let (state_tx, state) = watch::channel(DialState::Dialing { failures: 0, error: None });
        let (switch, turns) = watch::channel(Switch::default());
        let demand = Arc::new(Notify::new());
        let supervisor = Supervisor {
            connector,
            backoff,
            link: link_tx,
            state: state_tx,
            switch: turns,
            demand: Arc::clone(&demand),
        };
        let task = tokio::spawn(supervisor.run(resolve));
        Self { link, state, switch, demand, task }
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

    /// Somebody needs the link now: ends a wait between attempts.
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
}

impl Supervisor {
    async fn run<R, F>(mut self, resolve: R)
    where
        R: Fn() -> F,
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
            let attempt = tokio::select! {
                biased;
                _ = self.switch.wait_for(|switch| switch.cuts != cuts) => continue,
                attempt = dial(&self.connector, &resolve, self.backoff.attempt(failures)) => attempt,
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
            let wait = self.backoff.wait(failures);
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

    /// Publishes the link until it ends; says why it ended. `cuts` is what the switch had counted
    /// when the link was dialed.
    async fn hold(&mut self, link: Arc<Link>, cuts: u64) -> TransportError {
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
        self.link.send_replace(None);
        error
    }
}

async fn dial<R, F>(connector: &Connector, resolve: &R, patience: Duration) -> Result<Link, TransportError>
where
    R: Fn() -> F,
    F: Future<Output = Result<Target, TransportError>>,
{
    let attempt = async {
        let target = resolve().await?;
        connector.connect(target.addr, &target.server_name).await
    };
    let ms = patience.as_millis() as u64;
    let late = |_| Err(TransportError::Timeout { what: "an attempt to connect", ms });
    tokio::time::timeout(patience, attempt).await.unwrap_or_else(late)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn backoff_doubles_up_to_its_cap_and_never_overflows() {
        let backoff = Backoff::default();
        let table = [(0, 100), (1, 100), (2, 200), (3, 400), (5, 1_600), (6, 2_000), (u32::MAX, 2_000)];
        for (failures, ms) in table {
            assert_eq!(backoff.nominal(failures), Duration::from_millis(ms), "{failures}");
            let wait = backoff.wait(failures);
            assert!(wait >= Duration::from_millis(ms / 2) && wait <= Duration::from_millis(ms));
        }
        assert_eq!(backoff.attempt(0), Duration::from_secs(1));
        assert_eq!(backoff.attempt(4), Duration::from_secs(3));
    }
}
