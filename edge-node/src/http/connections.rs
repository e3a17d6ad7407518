//! Which connections are open, what they wait for, and which of them goes when there is no room.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio_util::sync::CancellationToken;

/// Connections beyond the bound, for requests about the node's health.
const RESERVE_MAX: usize = 16;

/// One connection, as its requests see it.
pub(crate) struct Connection {
    /// Grows with every connection and every request: the lower, the longer it has been waited for.
    id: Mutex<u64>,
    all: Arc<Connections>,
    reserve: bool,
    evicted: CancellationToken,
    unread: AtomicBool,
}

/// The connections of a server.
pub(super) struct Connections {
    most: usize,
    table: Mutex<Table>,
}

#[derive(Default)]
struct Table {
    next: u64,
    /// Connections within the bound.
    main: Places,
    /// Those beyond.
    reserve: Places,
}

#[derive(Default)]
struct Places {
    /// Connections that have not sent a whole request, the one that has been so for longest first.
    waiting: BTreeMap<u64, CancellationToken>,
    /// Number of those being answered.
    answering: usize,
}

/// A place among the connections; given back on drop.
pub(super) struct Seat(Arc<Connection>);

impl Connections {
    pub(super) fn new(most: usize) -> Arc<Self> {
        Arc::new(Self { most: most.max(1), table: Mutex::default() })
    }

    fn lock(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lets a connection in, for which another may have to go; none if all are being answered.
    pub(super) fn enter(self: &Arc<Self>) -> Option<Seat> {
        let mut table = self.lock();
        let reserve = if table.main.makes_room(self.most) {
            false
        } else if table.reserve.makes_room(RESERVE_MAX) {
            true
        } else {
            return None;
        };
        let evicted = CancellationToken::new();
        let id = table.wait(reserve, evicted.clone());
        drop(table);
        let all = Arc::clone(self);
        Some(Seat(Arc::new(Connection { id: Mutex::new(id), all, reserve, evicted, unread: AtomicBool::new(false) })))
    }

    /// Closes up to `count` connections that wait.
    pub(super) fn evict(&self, count: usize) {
        let mut table = self.lock();
        for _ in 0..count {
            table.main.evict();
        }
    }
}

impl Table {
    fn places(&mut self, reserve: bool) -> &mut Places {
        if reserve { &mut self.reserve } else { &mut self.main }
    }

    fn wait(&mut self, reserve: bool, evicted: CancellationToken) -> u64 {
        self.next += 1;
        let id = self.next;
        self.places(reserve).waiting.insert(id, evicted);
        id
    }
}

impl Places {
    /// Whether there is room for one more, if need be because another goes.
    fn makes_room(&mut self, most: usize) -> bool {
        self.waiting.len() + self.answering < most || self.evict()
    }

    /// Closes the connection that has waited longest, if one waits.
    fn evict(&mut self) -> bool {
        let Some((_, evicted)) = self.waiting.pop_first() else { return false };
        evicted.cancel();
        true
    }
}

impl Connection {
    fn id(&self) -> MutexGuard<'_, u64> {
        self.id.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A whole request is there: the connection stays.
    pub(super) fn is_answering(&self) {
        let mut id = self.id();
        let mut table = self.all.lock();
        let places = table.places(self.reserve);
        if places.waiting.remove(&id).is_some() {
            places.answering += 1;
            *id = 0;
        }
    }

    /// The answer has been taken: the next request is waited for.
    pub(super) fn is_waiting(&self) {
        let mut id = self.id();
        if *id == 0 {
            let mut table = self.all.lock();
            table.places(self.reserve).answering -= 1;
            *id = table.wait(self.reserve, self.evicted.clone());
        }
    }

    /// True for a connection beyond the bound, on which only `/health` is answered.
    pub(crate) fn is_of_reserve(&self) -> bool {
        self.reserve
    }

    /// Ready when the connection is to be closed for another one.
    pub(super) async fn evicted(&self) {
        self.evicted.cancelled().await;
    }

    /// The client is still sending a body that is not read.
    pub(super) fn leaves_unread(&self) {
        self.unread.store(true, Ordering::Relaxed);
    }

    /// Whether it is.
    pub(super) fn has_unread(&self) -> bool {
        self.unread.load(Ordering::Relaxed)
    }
}

impl Seat {
    pub(super) fn connection(&self) -> &Arc<Connection> {
        &self.0
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        let id = self.0.id();
        let mut table = self.0.all.lock();
        let places = table.places(self.0.reserve);
        if *id == 0 {
            places.answering -= 1;
        } else {
            places.waiting.remove(&id);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn evicted(seats: &[Seat]) -> Vec<usize> {
        (0..seats.len()).filter(|i| seats[*i].0.evicted.is_cancelled()).collect()
    }

    fn enter(connections: &Arc<Connections>, count: usize) -> Vec<Seat> {
        (0..count).map(|_| connections.enter().expect("room")).collect()
    }

    #[test]
    fn the_one_that_has_waited_longest_goes_first() {
        let connections = Connections::new(3);
        let mut seats = enter(&connections, 3);
        seats[0].0.is_answering();
        seats[1].0.is_answering();
        seats[1].0.is_waiting();
        seats.extend(enter(&connections, 1));
        assert_eq!(evicted(&seats), [2], "0 is being answered, 1 has begun to wait after 2");
        seats.extend(enter(&connections, 2));
        assert_eq!(evicted(&seats), [1, 2, 3]);
        assert!(seats.iter().all(|seat| !seat.0.is_of_reserve()));
        drop(seats);
        let table = connections.lock();
        assert_eq!((table.main.waiting.len(), table.main.answering), (0, 0));
    }

    #[test]
    fn beyond_those_being_answered_there_is_a_reserve() {
        let connections = Connections::new(2);
        let seats = enter(&connections, 2);
        seats.iter().for_each(|seat| seat.0.is_answering());
        let reserve = enter(&connections, RESERVE_MAX);
        assert!(reserve.iter().all(|seat| seat.0.is_of_reserve()));
        // In the reserve, too, who waits makes room.
        let another = connections.enter().expect("room in the reserve");
        assert_eq!(evicted(&reserve), [0]);
        reserve.iter().chain([&another]).for_each(|seat| seat.0.is_answering());
        assert!(connections.enter().is_none());
        drop(seats);
        assert!(connections.enter().is_some());
    }
}
