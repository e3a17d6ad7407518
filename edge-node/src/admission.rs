//! Who may begin an answer: a number of slots, and a queue before them, bounded in length and time.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::request::GenerateError;

/// Requests that wait for slots at most. Each holds little more than its prompt's text.
pub const QUEUE_MAX: usize = 64;
/// Shortest time after which a refused client is asked to try again, milliseconds.
const RETRY_MS_MIN: u64 = 500;

/// The slots of a node and the queue before them.
#[derive(Debug)]
pub struct Admission {
    slots: Arc<Semaphore>,
    queue: Semaphore,
    limit: usize,
    wait: Duration,
}

/// Slots for the answers of one request.
#[derive(Debug)]
pub struct Slots(OwnedSemaphorePermit);

/// The right to have one answer under way. Dropping it, in a panic too, lets the next one in.
#[derive(Debug)]
pub struct Slot(#[allow(dead_code, reason = "held for its drop")] OwnedSemaphorePermit);

impl Admission {
    /// `limit` answers at once; requests wait for up to `wait_ms`.
    #[must_use]
    pub fn new(limit: usize, wait_ms: u64) -> Self {
        let limit = limit.min(Semaphore::MAX_PERMITS);
        let (slots, queue) = (Arc::new(Semaphore::new(limit)), Semaphore::new(QUEUE_MAX));
        Self { slots, queue, limit, wait: Duration::from_millis(wait_ms) }
    }

    /// Slots for `answers` answers, when it is this request's turn.
    ///
    /// # Errors
    /// [`GenerateError::Busy`] if the queue is full or no slots are free in time,
    /// [`GenerateError::TooManyAnswers`] if there never will be.
    pub async fn enter(&self, answers: usize) -> Result<Slots, GenerateError> {
        let limit = self.limit;
        let fitting = u32::try_from(answers).ok().filter(|n| *n as usize <= limit);
        let answers = fitting.ok_or(GenerateError::TooManyAnswers { answers, limit })?;
        let _place = self.queue.try_acquire().map_err(|_| self.busy())?;
        match tokio::time::timeout(self.wait, Arc::clone(&self.slots).acquire_many_owned(answers)).await {
            Ok(Ok(permit)) => Ok(Slots(permit)),
            _ => Err(self.busy()),
        }
    }

    /// A slot, if one is free now.
    ///
    /// # Errors
    /// [`GenerateError::Busy`].
    pub fn try_enter(&self) -> Result<Slot, GenerateError> {
        Arc::clone(&self.slots).try_acquire_owned().map(Slot).map_err(|_| self.busy())
    }

    /// Slots taken.
    #[must_use]
    pub fn taken(&self) -> usize {
        self.limit - self.slots.available_permits()
    }

    fn busy(&self) -> GenerateError {
        let retry_after_ms = RETRY_MS_MIN.max(self.wait.as_millis() as u64 / 2);
        GenerateError::Busy { limit: self.limit, retry_after_ms }
    }
}

impl Slots {
    /// The slot of one of the request's answers; none if all were handed out.
    pub fn take(&mut self) -> Option<Slot> {
        self.0.split(1).map(Slot)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn who_comes_too_early_waits_in_line_and_not_for_ever() {
        let admission = Arc::new(Admission::new(2, 1000));
        let mut first = admission.enter(2).await.expect("room");
        assert_eq!(admission.taken(), 2);
        let (one, two) = (first.take().expect("a slot"), first.take().expect("a slot"));
        assert!(first.take().is_none());
        drop(first);
        let wait = |answers| {
            let admission = Arc::clone(&admission);
            tokio::spawn(async move { admission.enter(answers).await })
        };
        let (pair, single) = (wait(2), wait(1));
        tokio::time::sleep(Duration::from_millis(900)).await;
        drop(one);
        // The line holds: one slot is free, and who wants two came first.
        assert!(admission.try_enter().is_err());
        drop(two);
        let pair = pair.await.expect("a task").expect("both slots");
        tokio::time::sleep(Duration::from_millis(200)).await;
        assert!(matches!(single.await.expect("a task"), Err(GenerateError::Busy { limit: 2, retry_after_ms: 500 })));
        drop(pair);
        assert_eq!(admission.taken(), 0);
        assert!(matches!(admission.enter(3).await, Err(GenerateError::TooManyAnswers { answers: 3, limit: 2 })));
    }

    #[tokio::test(start_paused = true)]
    async fn the_line_is_bounded() {
        let admission = Arc::new(Admission::new(1, 1000));
        let _slot = admission.try_enter().expect("room");
        let waiting: Vec<_> = (0..QUEUE_MAX)
            .map(|_| {
                let admission = Arc::clone(&admission);
                tokio::spawn(async move { admission.enter(1).await.is_ok() })
            })
            .collect();
        tokio::time::sleep(Duration::from_millis(1)).await;
        let begun = tokio::time::Instant::now();
        assert!(admission.enter(1).await.is_err());
        assert_eq!(begun.elapsed(), Duration::ZERO, "a full queue says so at once");
        for waiting in waiting {
            assert!(!waiting.await.expect("a task"));
        }
    }
}
