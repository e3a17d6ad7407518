//! The sessions of a node: who is live, who may come back.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use metrics::gauge;
use tandem_proto::ids::{Epoch, SessionId};
use tandem_proto::limits::KV_BLOCK_TOKENS;
use tandem_proto::session::cloud::CloudSession;
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use crate::admission::{Bounds, Refusal};
use crate::metric_definitions as m;

/// How long a new stream of a session waits for the old one's task to let go.
const TAKEOVER: Duration = Duration::from_secs(2);

enum Place {
    /// A task owns it, by its [`Seat`].
    Live { stop: CancellationToken },
    /// Its link broke; it waits to be resumed.
    Parked { session: Box<CloudSession>, since: Instant },
}

struct Entry {
    device: String,
    epoch: Epoch,
    place: Place,
}

type Entries = HashMap<SessionId, Entry>;

/// Drops a session's KV state. Called under the registry's lock, so that the session that takes the id next
/// finds it gone: it must not wait.
type Forget = Box<dyn Fn(SessionId) + Send + Sync>;

/// All sessions of a node: the live ones, bounded by admission, and at most `parked_max` parked ones.
pub(crate) struct Registry {
    bounds: Bounds,
    forget: Forget,
    entries: Mutex<Entries>,
    changed: Notify,
}

/// Live sessions.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Live {
    pub(crate) all: usize,
    pub(crate) of_device: usize,
}

/// What a session that wants to open finds.
pub(crate) enum Claim {
    /// Nothing: it is new.
    New(Seat),
    /// What it left behind.
    Resumed(Box<CloudSession>, Seat),
    /// It belongs to another device.
    Foreign,
    /// A newer owner has been here.
    Stale(Epoch),
    /// Its earlier stream's task has not let go in time.
    Held,
    /// There is no room for another one.
    Refused(Refusal),
}

/// A live session's entry. Dropping it, in a panic too, ends the session and drops its KV state.
pub(crate) struct Seat {
    registry: Arc<Registry>,
    id: SessionId,
    stop: CancellationToken,
    keep: Option<Box<CloudSession>>,
}

impl Seat {
    /// Cancelled when a newer stream wants the session.
    pub(crate) fn stop(&self) -> CancellationToken {
        self.stop.clone()
    }

    /// Leaves the session to be resumed.
    pub(crate) fn park(mut self, session: Box<CloudSession>) {
        self.keep = Some(session);
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        gauge!(m::SESSIONS).decrement(1.0);
        self.registry.leave(self.id, self.keep.take());
    }
}

impl Registry {
    pub(crate) fn new(bounds: Bounds, forget: Forget) -> Arc<Self> {
        Arc::new(Self { bounds, forget, entries: Mutex::default(), changed: Notify::new() })
    }

    fn lock(&self) -> MutexGuard<'_, Entries> {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Live sessions.
    pub(crate) fn live(&self) -> usize {
        live(&self.lock(), "").all
    }

    /// Enters a session as live with what is known of it, stopping a task that still holds it. A new
    /// one needs leave of `admit`, which must not wait.
    pub(crate) async fn claim(
        self: &Arc<Self>,
        id: SessionId,
        device: &str,
        epoch: Epoch,
        admit: impl Fn(Live) -> Result<(), Refusal>,
    ) -> Claim {
        let deadline = tokio::time::Instant::now() + TAKEOVER;
        loop {
            let changed = self.changed.notified();
            if let Some(claim) = self.try_claim(id, device, epoch, &admit) {
                return claim;
            }
            if tokio::time::timeout_at(deadline, changed).await.is_err() {
                return Claim::Held;
            }
        }
    }

    /// None while another task holds the session.
    fn try_claim(
        self: &Arc<Self>,
        id: SessionId,
        device: &str,
        epoch: Epoch,
        admit: &impl Fn(Live) -> Result<(), Refusal>,
    ) -> Option<Claim> {
        let mut entries = self.lock();
        let Some(entry) = entries.get_mut(&id) else {
            if let Err(refusal) = admit(live(&entries, device)) {
                if let Refusal::Memory { free, wanted } = refusal {
                    self.make_room(&mut entries, wanted.saturating_sub(free));
                }
                return Some(Claim::Refused(refusal));
            }
            let (seat, place) = self.seat(id);
            entries.insert(id, Entry { device: device.into(), epoch, place });
            return Some(Claim::New(seat));
        };
        if entry.device != device {
            return Some(Claim::Foreign);
        }
        if entry.epoch > epoch {
            return Some(Claim::Stale(entry.epoch));
        }
        // Fences older owners from now on, also while this one waits.
        entry.epoch = epoch;
        if let Place::Live { stop } = &entry.place {
            stop.cancel();
            return None;
        }
        let (seat, place) = self.seat(id);
        match std::mem::replace(&mut entry.place, place) {
            Place::Parked { session, .. } => Some(Claim::Resumed(session, seat)),
            // Looked at above.
            Place::Live { .. } => Some(Claim::New(seat)),
        }
    }

    fn seat(self: &Arc<Self>, id: SessionId) -> (Seat, Place) {
        gauge!(m::SESSIONS).increment(1.0);
        let stop = CancellationToken::new();
        (Seat { registry: self.clone(), id, stop: stop.clone(), keep: None }, Place::Live { stop })
    }

    /// Takes a seat's entry away, or parks its session. Nobody else touches a live entry's place.
    fn leave(&self, id: SessionId, session: Option<Box<CloudSession>>) {
        let mut entries = self.lock();
        match (session, entries.get_mut(&id)) {
            (Some(session), Some(entry)) => entry.place = Place::Parked { session, since: Instant::now() },
            _ => self.drop_session(&mut entries, id),
        }
        self.trim(&mut entries);
        drop(entries);
        self.changed.notify_waiters();
    }

    /// Drops parked sessions that are too old.
    pub(crate) fn expire(&self) {
        self.trim(&mut self.lock());
    }

    fn trim(&self, entries: &mut Entries) {
        let age_max = Duration::from_millis(self.bounds.parked_ms_max);
        for (i, (since, id, _)) in parked(entries).into_iter().rev().enumerate() {
            if i >= self.bounds.parked_max || since.elapsed() > age_max {
                self.drop_session(entries, id);
            }
        }
    }

    /// Drops the oldest parked sessions until they have given `blocks` KV blocks back, if they hold as
    /// many: these are kept for the next sessions.
    fn make_room(&self, entries: &mut Entries, blocks: usize) {
        let parked = parked(entries);
        if parked.iter().map(|(_, _, held)| held).sum::<usize>() < blocks {
            return;
        }
        let mut freed = 0;
        for (_, id, held) in parked {
            if freed >= blocks {
                return;
            }
            freed += held;
            self.drop_session(entries, id);
        }
    }

    fn drop_session(&self, entries: &mut Entries, id: SessionId) {
        (self.forget)(id);
        entries.remove(&id);
    }
}

fn live(entries: &Entries, device: &str) -> Live {
    let live = entries.values().filter(|e| matches!(e.place, Place::Live { .. }));
    live.fold(Live::default(), |n, e| Live { all: n.all + 1, of_device: n.of_device + usize::from(e.device == device) })
}

/// Parked sessions with the KV blocks they hold, the oldest first.
fn parked(entries: &Entries) -> Vec<(Instant, SessionId, usize)> {
    let mut parked: Vec<(Instant, SessionId, usize)> = entries
        .iter()
        .filter_map(|(id, e)| match &e.place {
            Place::Parked { since, session } => Some((*since, *id, session.processed().div_ceil(KV_BLOCK_TOKENS))),
            Place::Live { .. } => None,
        })
        .collect();
    parked.sort_unstable();
    parked
}

#[cfg(test)]
mod tests {
    use super::*;
    use tandem_proto::message::{Open, SamplingParams};
    use tandem_proto::session::Decided;
    use tandem_proto::session::cloud::{JobTimes, TargetShape};

    const ID: SessionId = SessionId([1; 16]);

    /// A session of `tokens` tokens that the model has seen.
    fn session(tokens: usize) -> Box<CloudSession> {
        let open = Open {
            session: ID,
            epoch: Epoch(1),
            model: "m".into(),
            request_id: "r".into(),
            prompt_tokens: tokens as u32,
            committed_tokens: 0,
            sampling: SamplingParams::default(),
            stop_tokens: vec![],
            answer_tokens_max: 4,
            trunk_layers: 0,
            want_prompt_state: false,
            top_logprobs: 0,
            grammar: None,
        };
        let target = TargetShape { context_tokens: 1000, vocabulary: 10, hidden_row_bytes: 0 };
        let mut session = CloudSession::open(&open, vec![1; tokens], target).expect("a valid session");
        let job = session.next_job(1000).expect("the prompt is to be fed");
        let decided = Decided { id: 1, logprob: 0.0, alternatives: vec![] };
        session.complete(vec![decided; job.picks()], JobTimes::default()).expect("the choices fit");
        assert_eq!(session.processed(), tokens);
        Box::new(session)
    }

    struct Bed {
        registry: Arc<Registry>,
        forgotten: Arc<Mutex<Vec<SessionId>>>,
    }

    impl Bed {
        fn new(bounds: Bounds) -> Self {
            let forgotten = Arc::new(Mutex::new(Vec::new()));
            let list = forgotten.clone();
            let registry = Registry::new(bounds, Box::new(move |id| list.lock().expect("the list").push(id)));
            Self { registry, forgotten }
        }

        async fn claim(&self, id: SessionId, device: &str, epoch: u64) -> Claim {
            self.registry.claim(id, device, Epoch(epoch), |_| Ok(())).await
        }

        async fn new_seat(&self, id: SessionId) -> Seat {
            match self.claim(id, "a", 1).await {
                Claim::New(seat) => seat,
                _ => panic!("session {id} is not new"),
            }
        }

        fn forgotten(&self) -> Vec<SessionId> {
            std::mem::take(&mut *self.forgotten.lock().expect("the list"))
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_session_is_fenced_by_device_and_epoch_and_comes_back_once() {
        let bed = Bed::new(Bounds::default());
        let Claim::New(seat) = bed.claim(ID, "a", 3).await else { panic!("not new") };
        assert_eq!(live(&bed.registry.lock(), "a"), Live { all: 1, of_device: 1 });
        assert_eq!(live(&bed.registry.lock(), "b"), Live { all: 1, of_device: 0 });
        assert!(matches!(bed.claim(ID, "b", 9).await, Claim::Foreign));
        assert!(matches!(bed.claim(ID, "a", 2).await, Claim::Stale(Epoch(3))));
        seat.park(session(1));
        assert_eq!(bed.registry.live(), 0);
        let Claim::Resumed(_, seat) = bed.claim(ID, "a", 3).await else { panic!("not resumed") };
        assert_eq!((bed.registry.live(), bed.forgotten()), (1, vec![]));
        drop(seat);
        assert_eq!((bed.registry.live(), bed.forgotten()), (0, vec![ID]));
        assert!(matches!(bed.claim(ID, "a", 3).await, Claim::New(_)));
    }

    #[tokio::test(start_paused = true)]
    async fn a_new_stream_takes_the_session_from_the_old_ones_task() {
        let bed = Bed::new(Bounds::default());
        let seat = bed.new_seat(ID).await;
        let old = tokio::spawn(async move {
            seat.stop().cancelled().await;
            seat.park(session(1));
        });
        assert!(matches!(bed.claim(ID, "a", 1).await, Claim::Resumed(..)));
        old.await.expect("the old task ends");
    }

    /// A long job keeps the old task from parking its session: a stream that claims it meanwhile is refused as busy,
    /// and the state that the old task parks in the end is not lost.
    #[tokio::test(start_paused = true)]
    async fn a_session_that_is_held_is_neither_lost_nor_owned_twice() {
        let bed = Bed::new(Bounds::default());
        let old = bed.new_seat(ID).await;
        assert!(matches!(bed.claim(ID, "a", 4).await, Claim::Held));
        assert!(old.stop().is_cancelled());
        // The claim fences older owners although it got nothing.
        assert!(matches!(bed.claim(ID, "a", 3).await, Claim::Stale(Epoch(4))));
        assert_eq!(bed.registry.live(), 1);
        old.park(session(1));
        let Claim::Resumed(_, seat) = bed.claim(ID, "a", 4).await else { panic!("not resumed") };
        assert!(!seat.stop().is_cancelled());
        assert_eq!((bed.registry.live(), bed.forgotten()), (1, vec![]));
    }

    #[tokio::test(start_paused = true)]
    async fn a_task_that_panics_leaves_its_seat() {
        let bed = Bed::new(Bounds::default());
        let seat = bed.new_seat(ID).await;
        let task = tokio::spawn(async move {
            let _seat = seat;
            panic!("on purpose");
        });
        assert!(task.await.is_err());
        assert_eq!((bed.registry.live(), bed.forgotten()), (0, vec![ID]));
    }

    #[tokio::test(start_paused = true)]
    async fn parked_sessions_are_bounded_in_number_and_time() {
        let bed = Bed::new(Bounds { parked_max: 2, ..Bounds::default() });
        let mut gone = Vec::new();
        for i in 0..4 {
            bed.new_seat(SessionId([i; 16])).await.park(session(1));
            gone.extend(bed.forgotten());
        }
        assert_eq!(gone, [SessionId([0; 16]), SessionId([1; 16])]);
        let bed = Bed::new(Bounds { parked_ms_max: 0, ..Bounds::default() });
        bed.new_seat(ID).await.park(session(1));
        std::thread::sleep(Duration::from_millis(2));
        bed.registry.expire();
        assert_eq!(bed.forgotten(), [ID]);
    }

    #[tokio::test(start_paused = true)]
    async fn admission_is_asked_for_new_sessions_and_parked_ones_make_room() {
        let bed = Bed::new(Bounds::default());
        for i in 0..3 {
            bed.new_seat(SessionId([i; 16])).await.park(session(KV_BLOCK_TOKENS));
        }
        let full = Refusal::Memory { free: 1, wanted: 3 };
        let refused = bed.registry.claim(SessionId([9; 16]), "a", Epoch(1), |live| {
            assert_eq!(live, Live::default());
            Err(full)
        });
        assert!(matches!(refused.await, Claim::Refused(r) if r == full));
        assert_eq!(bed.forgotten(), [SessionId([0; 16]), SessionId([1; 16])]);
        // What all of them hold would not do: none goes.
        let short =
            bed.registry.claim(SessionId([9; 16]), "a", Epoch(1), |_| Err(Refusal::Memory { free: 0, wanted: 2 }));
        assert!(matches!(short.await, Claim::Refused(_)));
        assert_eq!(bed.forgotten(), []);
        let never = |_| Err(Refusal::Queue(1));
        let resumed = bed.registry.claim(SessionId([2; 16]), "a", Epoch(1), never).await;
        assert!(matches!(resumed, Claim::Resumed(..)));
    }
}
