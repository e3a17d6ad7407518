//! When a model last got somewhere: noted by the thread that computes, read by those that wait for it.
//! A step is a layer or a piece of the head, so the size of a pass does not matter.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// A thread that has not ended a step for less than this is never called stalled: it may just have lost
/// its core.
pub const STALL_MIN: Duration = Duration::from_secs(1);
/// How many times as long as usual a step may take.
const USUAL_STEPS: u32 = 8;
/// Weight of a step in what is usual, as a divisor.
const GAIN: u64 = 32;

/// See the module's text.
#[derive(Debug)]
pub struct Pulse {
    since: Instant,
    /// When the last step ended, microseconds after `since`.
    beat_us: AtomicU64,
    /// What a step usually takes, microseconds.
    usual_us: AtomicU64,
}

impl Default for Pulse {
    fn default() -> Self {
        Self { since: Instant::now(), beat_us: AtomicU64::new(0), usual_us: AtomicU64::new(0) }
    }
}

impl Pulse {
    fn now_us(&self) -> u64 {
        u64::try_from(self.since.elapsed().as_micros()).unwrap_or(u64::MAX)
    }

    /// Work begins; the time before it was idle.
    pub(crate) fn begin(&self) {
        self.beat_us.store(self.now_us(), Ordering::Relaxed);
    }

    /// A step has ended.
    pub(crate) fn beat(&self) {
        let now = self.now_us();
        let took = now.saturating_sub(self.beat_us.swap(now, Ordering::Relaxed));
        self.usual_us.store(usual(self.usual_us.load(Ordering::Relaxed), took), Ordering::Relaxed);
    }

    /// Time since the last step ended or work began.
    #[must_use]
    pub fn age(&self) -> Duration {
        Duration::from_micros(self.now_us().saturating_sub(self.beat_us.load(Ordering::Relaxed)))
    }

    /// How long a step may take before the thread counts as stalled.
    #[must_use]
    pub fn patience(&self) -> Duration {
        patience(self.usual_us.load(Ordering::Relaxed))
    }
}

fn patience(usual_us: u64) -> Duration {
    STALL_MIN.max(Duration::from_micros(usual_us).saturating_mul(USUAL_STEPS))
}

/// What is usual after a step of `took_us`. A stall that is over counts little: the next one must be seen
/// as soon.
fn usual(usual_us: u64, took_us: u64) -> u64 {
    let most = u64::try_from(patience(usual_us).as_micros()).unwrap_or(u64::MAX).saturating_mul(2);
    let took = took_us.min(most);
    (usual_us.saturating_mul(GAIN - 1).saturating_add(took)) / GAIN
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patience_follows_a_slow_model_and_forgets_a_stall() {
        // A model whose layers take 1.5 s each.
        let slow = (0..200).fold(0, |usual_us, _| usual(usual_us, 1_500_000));
        assert!(patience(slow) > Duration::from_secs(10), "{:?}", patience(slow));
        // One that takes 1 ms, and stood still for a minute once.
        let quick = (0..200).fold(0, |usual_us, _| usual(usual_us, 1_000));
        assert_eq!(patience(quick), STALL_MIN);
        assert_eq!(patience(usual(quick, 60_000_000)), STALL_MIN);
    }
}
