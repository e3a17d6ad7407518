//! Keeps a cloud node registered for as long as it runs.

use std::time::Duration;

use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::{ClientError, RouterClient};
use crate::{
    control::Refusal,
    node::{LoadReport, NodeCard},
};

/// First pause after a failed call.
const RETRY_FIRST: Duration = Duration::from_millis(250);
/// Longest pause between failed calls.
const RETRY_MAX: Duration = Duration::from_secs(5);
/// Time that the farewell at shutdown may take.
const FAREWELL: Duration = Duration::from_secs(2);

/// How the node stands with the router.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RegistrationState {
    /// Not registered yet, or the router forgot it.
    Registering,
    /// Registered and reporting.
    Registered {
        /// True: the router places no new sessions here.
        draining: bool,
    },
    /// No router answers. The node keeps serving; the router keeps its place for a while.
    Away {
        /// What happened.
        why: String,
    },
}

/// The loop that registers a node and reports its load.
#[derive(Debug)]
pub struct Registration {
    client: RouterClient,
    card: NodeCard,
    every: Option<Duration>,
    state: watch::Sender<RegistrationState>,
}

impl Registration {
    /// Prepares the registration of `card`.
    #[must_use]
    pub fn new(client: RouterClient, card: NodeCard) -> Self {
        Self { client, card, every: None, state: watch::Sender::new(RegistrationState::Registering) }
    }

    /// Reports every `period` instead of as often as the router asks (1 s).
    #[must_use]
    pub fn every(mut self, period: Duration) -> Self {
        self.every = Some(period.max(Duration::from_millis(10)));
        self
    }

    /// Follows how the node stands.
    #[must_use]
    pub fn state(&self) -> watch::Receiver<RegistrationState> {
        self.state.subscribe()
    }

    /// Registers, reports what `load` says, registers again when the router forgot the node, and
    /// retries while no router answers; until `shutdown`, when it tells the router to place no session
    /// here any more. Fails only for what no retry can mend: a certificate or a card that the
    /// router does not accept.
    pub async fn run(
        self,
        load: impl Fn() -> LoadReport + Send + Sync,
        shutdown: CancellationToken,
    ) -> Result<(), ClientError> {
        let ended = tokio::select! {
            ended = self.keep(&load) => ended,
            () = shutdown.cancelled() => Ok(()),
        };
        if ended.is_ok() && matches!(*self.state.borrow(), RegistrationState::Registered { .. }) {
            let farewell = self.client.drain(&self.card.name, true);
            if let Ok(Err(error)) = tokio::time::timeout(FAREWELL, farewell).await {
                tracing::debug!(%error, "farewell to the router");
            }
        }
        ended
    }

    async fn keep(&self, load: &(impl Fn() -> LoadReport + Sync)) -> Result<(), ClientError> {
        let mut pause = RETRY_FIRST;
        loop {
            let error = match self.client.register(&self.card, &load()).await {
                Ok(period) => {
                    tracing::info!(node = self.card.name, "registered with the router");
                    self.set(RegistrationState::Registered { draining: false });
                    pause = RETRY_FIRST;
                    self.report(load, self.every.unwrap_or(period.max(RETRY_FIRST))).await?;
                    self.set(RegistrationState::Registering);
                    continue;
                }
                Err(error) => error,
            };
            match &error {
                ClientError::Unreachable { .. } | ClientError::Refused(Refusal::Full { .. }) => {}
                _ => return Err(error),
            }
            self.away(&error);
            tokio::time::sleep(jittered(pause)).await;
            pause = (pause * 2).min(RETRY_MAX);
        }
    }

    /// Reports until the router does not know the node.
    async fn report(&self, load: &(impl Fn() -> LoadReport + Sync), period: Duration) -> Result<(), ClientError> {
        let mut pause = period;
        loop {
            tokio::time::sleep(pause).await;
            match self.client.heartbeat(&self.card.name, self.card.boot_epoch, &load()).await {
                Ok(answer) if !answer.known => return Ok(()),
                Ok(answer) => {
                    self.set(RegistrationState::Registered { draining: answer.draining });
                    pause = period;
                }
                Err(error @ ClientError::Unreachable { .. }) => {
                    self.away(&error);
                    pause = jittered((pause * 2).min(RETRY_MAX.max(period)));
                }
                Err(error) => return Err(error),
            }
        }
    }

    fn away(&self, error: &ClientError) {
        let why = error.to_string();
        // Once per outage is enough.
        if !matches!(*self.state.borrow(), RegistrationState::Away { .. }) {
            tracing::warn!(why, "the router is away; will keep trying");
        }
        self.set(RegistrationState::Away { why });
    }

    fn set(&self, state: RegistrationState) {
        self.state.send_if_modified(|present| {
            let changed = *present != state;
            *present = state;
            changed
        });
    }
}

/// Half to all of `pause`, so that a fleet does not come back in step.
fn jittered(pause: Duration) -> Duration {
    pause.mul_f64(0.5 + 0.5 * fastrand::f64())
}
