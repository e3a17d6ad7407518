//! Which sequences decode, although between a result and the next job they have none. Bounded, and pure but
//! for the times that it is given.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use tandem_proto::ids::SessionId;

use super::fairness::Stream;

/// Most sequences remembered.
const STREAMS_MAX: usize = 1024;
/// A sequence that has no job for this long has paused ...
const PAUSE_MIN: Duration = Duration::from_millis(100);
/// ... unless so many times its usual turnaround is more.
const TURNAROUNDS: f64 = 4.0;
/// Weight of a turnaround in what is usual.
const GAIN: f64 = 0.25;

#[derive(Debug)]
struct Known {
    turnaround_us: f64,
    done_at: Instant,
}

impl Known {
    fn has_paused(&self, now: Instant) -> bool {
        let since = now.saturating_duration_since(self.done_at);
        since > PAUSE_MIN && since.as_secs_f64() * 1e6 > TURNAROUNDS * self.turnaround_us
    }
}

/// See the module's text.
#[derive(Debug, Default)]
pub(super) struct Streams(HashMap<SessionId, Known>);

impl Streams {
    /// A job of the sequence has been submitted.
    pub(super) fn came(&mut self, key: SessionId, queued_at: Instant) {
        let Some(known) = self.0.get_mut(&key) else { return };
        if known.has_paused(queued_at) {
            self.0.remove(&key);
            return;
        }
        let turnaround = queued_at.saturating_duration_since(known.done_at).as_secs_f64() * 1e6;
        known.turnaround_us += GAIN * (turnaround - known.turnaround_us);
    }

    /// A job of the sequence has ended with outputs.
    pub(super) fn went(&mut self, key: SessionId, now: Instant) {
        if self.0.len() >= STREAMS_MAX && !self.0.contains_key(&key) {
            self.0.retain(|_, known| !known.has_paused(now));
            if self.0.len() >= STREAMS_MAX {
                return;
            }
        }
        self.0.entry(key).or_insert(Known { turnaround_us: 0.0, done_at: now }).done_at = now;
    }

    /// The sequence is dropped.
    pub(super) fn forget(&mut self, key: SessionId) {
        self.0.remove(&key);
    }

    /// The streams, where `waiting` tells those that have a job.
    pub(super) fn beside(&mut self, now: Instant, waiting: impl Fn(SessionId) -> bool) -> Vec<Stream> {
        let mut streams = Vec::with_capacity(self.0.len());
        self.0.retain(|key, known| {
            let waits = waiting(*key);
            if !waits && known.has_paused(now) {
                return false;
            }
            let since = now.saturating_duration_since(known.done_at).as_secs_f64() * 1e6;
            streams.push(Stream { turnaround_us: known.turnaround_us, since_us: (!waits).then_some(since) });
            true
        });
        streams
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stream_is_known_until_it_pauses_or_is_forgotten() {
        let (begun, key) = (Instant::now(), SessionId([1; 16]));
        let at = |us| begun + Duration::from_micros(us);
        let mut streams = Streams::default();
        streams.came(key, at(0));
        assert_eq!(streams.beside(at(0), |_| true), [], "its prompt is no stream yet");
        streams.went(key, at(1000));
        assert_eq!(streams.beside(at(1400), |_| false), [Stream { turnaround_us: 0.0, since_us: Some(400.0) }]);
        streams.came(key, at(1400));
        assert_eq!(streams.beside(at(9000), |_| true), [Stream { turnaround_us: 100.0, since_us: None }]);
        streams.went(key, at(9000));
        assert_eq!(streams.beside(at(9000 + 100_000), |_| false).len(), 1);
        assert_eq!(streams.beside(at(9000 + 100_001), |_| false), []);
        // One that takes 50 ms each time has paused after 200 ms.
        streams.went(key, at(0));
        for n in 1..40 {
            streams.came(key, at(n * 50_000));
            streams.went(key, at(n * 50_000));
        }
        assert_eq!(streams.beside(at(1_950_000 + 190_000), |_| false).len(), 1);
        streams.forget(key);
        assert_eq!(streams.beside(at(1_950_000), |_| false), []);
    }

    #[test]
    fn no_more_than_the_bound_are_remembered() {
        let begun = Instant::now();
        let mut streams = Streams::default();
        let key = |n: usize| SessionId((n as u128).to_le_bytes());
        (0..STREAMS_MAX + 10).for_each(|n| streams.went(key(n), begun));
        assert_eq!(streams.0.len(), STREAMS_MAX);
        // Those that have paused make room.
        streams.went(key(STREAMS_MAX + 10), begun + 2 * PAUSE_MIN);
        assert_eq!(streams.0.len(), 1);
    }
}
