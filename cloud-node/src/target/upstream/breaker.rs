//! When an engine that failed is asked again: a circuit breaker.

use std::time::{Duration, Instant};

/// Faults in a row after which an engine is left alone.
const FAULTS_MAX: u32 = 3;

/// How long it is left alone at first; twice as long each time it fails again.
const OPEN_FOR: Duration = Duration::from_secs(10);
const OPEN_FOR_MAX: Duration = Duration::from_secs(160);

/// After a single fault it is asked last, for so long.
const SHUNNED_FOR: Duration = Duration::from_secs(1);

/// See the module's text.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Breaker {
    faults: u32,
    until: Option<Instant>,
}

/// Whether an engine is to be asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Health {
    /// Yes.
    Sound,
    /// If there is no other.
    Shunned,
    /// No.
    Open,
}

impl Breaker {
    pub(super) fn health(&self, now: Instant) -> Health {
        match self.until {
            Some(until) if now < until => {
                if self.faults < FAULTS_MAX {
                    Health::Shunned
                } else {
                    Health::Open
                }
            }
            // Half open: the next call decides.
            _ => Health::Sound,
        }
    }

    pub(super) fn succeeded(&mut self) {
        *self = Self::default();
    }

    /// `wait` is what the engine asked for.
    pub(super) fn failed(&mut self, wait: Option<Duration>, now: Instant) {
        self.faults = self.faults.saturating_add(1);
        let open = match self.faults.checked_sub(FAULTS_MAX) {
            Some(again) => OPEN_FOR.saturating_mul(1 << again.min(4)).min(OPEN_FOR_MAX),
            None => SHUNNED_FOR,
        };
        self.until = Some(now + wait.map_or(open, |wait| wait.max(open)));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_engine_that_fails_again_and_again_is_left_alone_for_longer() {
        let begun = Instant::now();
        let at = |s: f64| begun + Duration::from_secs_f64(s);
        let mut breaker = Breaker::default();
        assert_eq!(breaker.health(at(0.0)), Health::Sound);
        breaker.failed(None, at(0.0));
        assert_eq!((breaker.health(at(0.5)), breaker.health(at(1.5))), (Health::Shunned, Health::Sound));
        breaker.failed(None, at(2.0));
        breaker.failed(None, at(4.0));
        assert_eq!((breaker.health(at(13.9)), breaker.health(at(14.1))), (Health::Open, Health::Sound));
        breaker.failed(None, at(15.0));
        assert_eq!((breaker.health(at(34.0)), breaker.health(at(35.1))), (Health::Open, Health::Sound));
        for _ in 0..50 {
            breaker.failed(None, at(40.0));
        }
        assert_eq!((breaker.health(at(199.0)), breaker.health(at(200.1))), (Health::Open, Health::Sound));
        breaker.succeeded();
        assert_eq!(breaker.health(at(41.0)), Health::Sound);
        // What it asks for is heeded.
        breaker.failed(Some(Duration::from_secs(7)), at(50.0));
        assert_eq!((breaker.health(at(56.0)), breaker.health(at(57.1))), (Health::Shunned, Health::Sound));
    }
}
