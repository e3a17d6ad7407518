//! How callers reach the state: they propose commands and read views. Today a single node stands
//! behind it; a raft group can take its place without a change to callers.

use std::{future::Future, path::Path, sync::Arc};

use tandem_proto::ids::Epoch;
use tokio::sync::Mutex;

pub use super::store::StoreError;
use super::{
    Command, ControlState, Outcome, Request, RequestId, RestoreError,
    store::{Store, Stored},
};
use crate::placement::PlacementConfig;

/// Epochs that may be issued between two snapshots. A restart skips what is left of them.
const EPOCHS_RESERVED: u64 = 1024;

/// A command that was not taken.
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    /// The state cannot be made durable, so nothing was promised.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The stored state cannot be understood.
    #[error(
        "router state is damaged: {0}; restore it from a backup, or move it away to start with an empty control plane"
    )]
    Restore(#[from] RestoreError),
    /// The state cannot be written as bytes.
    #[error("router state cannot be encoded: {0}")]
    Encode(#[from] serde_json::Error),
    /// The task that writes the state has died.
    #[error("the task that writes the router's state has stopped")]
    Stopped,
}

/// The replicated log of commands, as callers see it.
pub trait CommandLog: Send + Sync + 'static {
    /// Applies `request` on every replica. The outcome is durable where it has to be: an epoch or a
    /// registration that was answered is never forgotten.
    fn propose(&self, request: Request) -> impl Future<Output = Result<Outcome, LogError>> + Send;

    /// Reads the state, not older than the call.
    fn read<T: Send>(
        &self,
        view: impl FnOnce(&ControlState) -> T + Send,
    ) -> impl Future<Output = Result<T, LogError>> + Send;
}

#[derive(Debug)]
struct Inner {
    state: ControlState,
    /// No epoch above it may be answered before another snapshot is on disk.
    epoch_reserved: u64,
    /// True if the snapshot lacks something worth keeping.
    dirty: bool,
}

/// A group of one: the state in memory, a snapshot in the state folder.
#[derive(Debug)]
pub struct SingleNode {
    inner: Mutex<Inner>,
    store: Option<Arc<Store>>,
}

impl SingleNode {
    /// A state without a folder. Epochs start at the wall clock `now_ms`, so that they rise over
    /// restarts all the same, unless the clock is set back.
    #[must_use]
    pub fn in_memory(config: PlacementConfig, now_ms: u64) -> Self {
        let mut state = ControlState::new(config);
        restart(&mut state, now_ms, now_ms);
        Self { inner: Mutex::new(Inner { state, epoch_reserved: u64::MAX, dirty: false }), store: None }
    }

    /// The state kept in `folder`. A new folder starts its epochs at the wall clock `now_ms`, so
    /// that a lost folder does not bring old epochs back.
    pub async fn open(folder: &Path, config: PlacementConfig, now_ms: u64) -> Result<Self, LogError> {
        let folder = folder.to_path_buf();
        let loaded = tokio::task::spawn_blocking(move || -> Result<_, StoreError> {
            let store = Store::open(&folder)?;
            let stored = store.load()?;
            Ok((store, stored))
        });
        let (store, stored) = loaded.await.map_err(|_| LogError::Stopped)??;
        let (mut state, floor) = match stored {
            Some(stored) => (ControlState::restore(config, &stored.state)?, stored.epoch_reserved),
            None => (ControlState::new(config), now_ms),
        };
        restart(&mut state, floor, now_ms);
        let inner = Inner { epoch_reserved: state.epoch().0, state, dirty: true };
        let this = Self { inner: Mutex::new(inner), store: Some(Arc::new(store)) };
        // A folder that cannot be written must show now, not at the first ticket.
        this.persist(&mut *this.inner.lock().await).await?;
        Ok(this)
    }

    /// Writes what is not on disk yet. Call it before the process ends.
    pub async fn flush(&self) -> Result<(), LogError> {
        let mut inner = self.inner.lock().await;
        if inner.dirty { self.persist(&mut inner).await } else { Ok(()) }
    }

    async fn persist(&self, inner: &mut Inner) -> Result<(), LogError> {
        let Some(store) = self.store.as_ref().map(Arc::clone) else {
            inner.dirty = false;
            return Ok(());
        };
        let epoch_reserved = inner.state.epoch().0.saturating_add(EPOCHS_RESERVED);
        let stored = Stored { epoch_reserved, state: inner.state.snapshot()? };
        let applied = inner.state.applied();
        tokio::task::spawn_blocking(move || store.save(applied, &stored)).await.map_err(|_| LogError::Stopped)??;
        inner.epoch_reserved = epoch_reserved;
        inner.dirty = false;
        Ok(())
    }
}

fn restart(state: &mut ControlState, floor: u64, now_ms: u64) {
    let command = Command::Restart { floor: Epoch(floor) };
    let index = state.applied() + 1;
    state.apply(index, Request { id: RequestId::default(), now_ms, command });
}

impl CommandLog for SingleNode {
    async fn propose(&self, request: Request) -> Result<Outcome, LogError> {
        let mut inner = self.inner.lock().await;
        let index = inner.state.applied() + 1;
        let outcome = inner.state.apply(index, request);
        // Membership must be on disk before it is answered. Tickets need not: their epochs are
        // reserved ahead, and a forgotten owner only costs a new epoch.
        let (changed, durable) = match &outcome {
            Outcome::Registered => (true, true),
            Outcome::Drained { known } => (*known, *known),
            Outcome::Placed(_) => (true, inner.state.epoch().0 > inner.epoch_reserved),
            Outcome::Expired { nodes, devices } => (nodes + devices > 0, false),
            Outcome::Heartbeat { .. } | Outcome::Refused(_) | Outcome::Restarted { .. } => (false, false),
        };
        inner.dirty |= changed;
        if durable {
            self.persist(&mut inner).await?;
        }
        Ok(outcome)
    }

    async fn read<T: Send>(&self, view: impl FnOnce(&ControlState) -> T + Send) -> Result<T, LogError> {
        Ok(view(&self.inner.lock().await.state))
    }
}

#[cfg(test)]
mod tests;
