//! Feeds the pure estimators of one link with its clock.

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use crate::estimator::{Goodput, Rtt};

/// Payloads below this are not timed, bytes.
pub(crate) const TIMED_PAYLOAD_BYTES_MIN: usize = 16 * 1024;

#[derive(Debug, Default)]
struct Estimates {
    rtt: Rtt,
    received: Goodput,
    sent: Goodput,
}

/// The estimators of one link.
#[derive(Debug)]
pub(crate) struct Meter {
    start: Instant,
    estimates: Mutex<Estimates>,
}

#[derive(Debug, Clone, Copy)]
pub(crate) enum Direction {
    Received,
    Sent,
}

impl Meter {
    pub(crate) fn new() -> Arc<Self> {
        Arc::new(Self { start: Instant::now(), estimates: Mutex::default() })
    }

    fn lock(&self) -> MutexGuard<'_, Estimates> {
        self.estimates.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn now_us(&self) -> u64 {
        self.start.elapsed().as_micros() as u64
    }

    pub(crate) fn observe_rtt(&self, sample: Duration) {
        self.lock().rtt.observe(self.now_us(), sample.as_micros() as u64);
    }

    pub(crate) fn rtt(&self) -> Rtt {
        self.lock().rtt
    }

    /// (received, sent), bytes per second.
    pub(crate) fn goodput(&self) -> (Option<u64>, Option<u64>) {
        let estimates = self.lock();
        (estimates.received.bytes_per_s(), estimates.sent.bytes_per_s())
    }

    pub(crate) fn transfer(self: &Arc<Self>, direction: Direction) -> Transfer {
        let transfer = Transfer { meter: Arc::clone(self), direction, pending: 0 };
        transfer.update(Goodput::start);
        transfer
    }
}

/// Delivered bytes are handed to the estimator in steps of this many: a lock per packet shows.
const STEP_BYTES: usize = 64 * 1024;

/// A transfer under way; ends when dropped.
#[derive(Debug)]
pub(crate) struct Transfer {
    meter: Arc<Meter>,
    direction: Direction,
    pending: usize,
}

impl Transfer {
    fn update(&self, f: impl FnOnce(&mut Goodput, u64)) {
        let now = self.meter.now_us();
        let mut estimates = self.meter.lock();
        match self.direction {
            Direction::Received => f(&mut estimates.received, now),
            Direction::Sent => f(&mut estimates.sent, now),
        }
    }

    pub(crate) fn deliver(&mut self, bytes: usize) {
        self.pending += bytes;
        if self.pending >= STEP_BYTES {
            self.flush();
        }
    }

    fn flush(&mut self) {
        let bytes = std::mem::take(&mut self.pending) as u64;
        if bytes > 0 {
            self.update(|goodput, now| goodput.deliver(now, bytes));
        }
    }

    /// As [`Transfer::deliver`], for bytes whose acknowledgement took `latency` on top.
    pub(crate) fn acknowledged(&self, bytes: usize, latency: Duration) {
        let latency_us = latency.as_micros() as u64;
        self.update(|goodput, now| goodput.deliver(now.saturating_sub(latency_us), bytes as u64));
    }
}

impl Drop for Transfer {
    fn drop(&mut self) {
        self.flush();
        self.update(Goodput::finish);
    }
}
