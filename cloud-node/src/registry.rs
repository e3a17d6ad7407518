//! The sessions of a node: who is live, who may come back.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tandem_proto::ids::{Epoch, SessionId};
use tandem_proto::session::cloud::CloudSession;
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use crate::admission::Bounds;

enum Place {
    /// A task owns it.
    Live { stop: CancellationToken },
    /// Its link broke; it waits to be resumed.
    Parked { session: Box<CloudSession>, since: Instant },
}

struct Entry {
    device: String,
    epoch: Epoch,
    place: Place,
}

/// All sessions of a node.
#[derive(Default)]
pub(crate) struct Registry {
    entries: Mutex<HashMap<SessionId, Entry>>,
    changed: Notify,
}

/// What a session that wants to open finds.
pub(crate) enum Claim {
    /// Nothing: it is new.
    New,
    /// What it left behind.
    Resumed(Box<CloudSession>),
    /// It belongs to another device.
    Foreign,
    /// A newer owner has been here.
    Stale(Epoch),
}

/// How long a new stream of a session waits for the old one's task to let go.
const TAKEOVER: Duration = Duration::from_secs(2);

impl Registry {
    fn lock(&self) -> MutexGuard<'_, HashMap<SessionId, Entry>> {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Live sessions, and those of one device.
    pub(crate) fn live(&self, device: &str) -> (usize, usize) {
        let entries = self.lock();
        let live = entries.values().filter(|e| matches!(e.place, Place::Live { .. }));
        live.fold((0, 0), |(all, own), e| (all + 1, own + usize::from(e.device == device)))
    }

    /// Takes what is known of a session out, stopping a task that still holds it.
    pub(crate) async fn claim(&self, id: SessionId, device: &str, epoch: Epoch) -> Claim {
        let deadline = tokio::time::Instant::now() + TAKEOVER;
        loop {
            let changed = self.changed.notified();
            {
                let mut entries = self.lock();
                let Some(entry) = entries.get(&id) else { return Claim::New };
                if entry.device != device {
                    return Claim::Foreign;
                }
                if entry.epoch > epoch {
                    return Claim::Stale(entry.epoch);
                }
                match &entry.place {
                    Place::Live { stop } => stop.cancel(),
                    Place::Parked { .. } => {
                        if let Some(Entry { place: Place::Parked { session, .. }, .. }) = entries.remove(&id) {
                            return Claim::Resumed(session);
                        }
                    }
                }
            }
            if tokio::time::timeout_at(deadline, changed).await.is_err() {
                self.lock().remove(&id);
                return Claim::New;
            }
        }
    }

    /// Enters a session as live.
    pub(crate) fn enter(&self, id: SessionId, device: &str, epoch: Epoch, stop: CancellationToken) {
        self.lock().insert(id, Entry { device: device.into(), epoch, place: Place::Live { stop } });
    }

    /// Keeps a session for resumption, or not if `session` is none. Returns sessions that had to
    /// make room: their KV state must be dropped.
    pub(crate) fn leave(&self, id: SessionId, session: Option<Box<CloudSession>>, bounds: &Bounds) -> Vec<SessionId> {
        let mut entries = self.lock();
        let mut dropped = Vec::new();
        match (session, entries.get_mut(&id)) {
            (Some(session), Some(entry)) => entry.place = Place::Parked { session, since: Instant::now() },
            _ => {
                entries.remove(&id);
                dropped.push(id);
            }
        }
        dropped.extend(expire(&mut entries, bounds));
        drop(entries);
        self.changed.notify_waiters();
        dropped
    }

    /// Drops parked sessions that are too old or too many; their KV state must be dropped too.
    pub(crate) fn expire(&self, bounds: &Bounds) -> Vec<SessionId> {
        expire(&mut self.lock(), bounds)
    }
}

fn expire(entries: &mut HashMap<SessionId, Entry>, bounds: &Bounds) -> Vec<SessionId> {
    let mut parked: Vec<(Instant, SessionId)> = entries
        .iter()
        .filter_map(|(id, e)| match e.place {
            Place::Parked { since, .. } => Some((since, *id)),
            Place::Live { .. } => None,
        })
        .collect();
    parked.sort_unstable_by(|a, b| b.cmp(a));
    let age_max = Duration::from_millis(bounds.parked_ms_max);
    let gone: Vec<SessionId> = parked
        .iter()
        .enumerate()
        .filter(|(i, (since, _))| *i >= bounds.parked_max || since.elapsed() > age_max)
        .map(|(_, (_, id))| *id)
        .collect();
    for id in &gone {
        entries.remove(id);
    }
    gone
}

/// Shared registry.
pub(crate) type SharedRegistry = Arc<Registry>;

#[cfg(test)]
mod tests {
    use super::*;
    use tandem_proto::message::{Open, SamplingParams};

    fn session() -> Box<CloudSession> {
        let open = Open {
            session: SessionId([1; 16]),
            epoch: Epoch(1),
            model: "m".into(),
            request_id: "r".into(),
            prompt_tokens: 1,
            committed_tokens: 0,
            sampling: SamplingParams::default(),
            stop_tokens: vec![],
            answer_tokens_max: 4,
            trunk_layers: 0,
            want_prompt_state: false,
            top_logprobs: 0,
            grammar: None,
        };
        Box::new(CloudSession::open(&open, vec![1], 100, 0).expect("a valid session"))
    }

    #[tokio::test]
    async fn a_session_is_fenced_by_device_and_epoch_and_comes_back_once() {
        let r = Registry::default();
        let (id, bounds) = (SessionId([1; 16]), Bounds::default());
        assert!(matches!(r.claim(id, "a", Epoch(3)).await, Claim::New));
        r.enter(id, "a", Epoch(3), CancellationToken::new());
        assert_eq!(r.live("a"), (1, 1));
        assert!(matches!(r.claim(id, "b", Epoch(9)).await, Claim::Foreign));
        assert!(matches!(r.claim(id, "a", Epoch(2)).await, Claim::Stale(Epoch(3))));
        assert!(r.leave(id, Some(session()), &bounds).is_empty());
        assert_eq!(r.live("a"), (0, 0));
        assert!(matches!(r.claim(id, "a", Epoch(3)).await, Claim::Resumed(_)));
        assert!(matches!(r.claim(id, "a", Epoch(3)).await, Claim::New));
    }

    #[tokio::test]
    async fn a_new_stream_takes_the_session_from_the_old_ones_task() {
        let r = Arc::new(Registry::default());
        let id = SessionId([1; 16]);
        let stop = CancellationToken::new();
        r.enter(id, "a", Epoch(1), stop.clone());
        let r2 = r.clone();
        let old = tokio::spawn(async move {
            stop.cancelled().await;
            r2.leave(id, Some(session()), &Bounds::default());
        });
        assert!(matches!(r.claim(id, "a", Epoch(1)).await, Claim::Resumed(_)));
        old.await.expect("the old task ends");
    }

    #[test]
    fn parked_sessions_are_bounded_in_number_and_time() {
        let r = Registry::default();
        let bounds = Bounds { parked_max: 2, ..Bounds::default() };
        let mut gone = Vec::new();
        for i in 0..4 {
            let id = SessionId([i; 16]);
            r.enter(id, "a", Epoch(1), CancellationToken::new());
            gone.extend(r.leave(id, Some(session()), &bounds));
        }
        assert_eq!(gone, [SessionId([0; 16]), SessionId([1; 16])]);
        assert_eq!(r.expire(&Bounds { parked_ms_max: 0, ..bounds }).len(), 2);
    }
}
