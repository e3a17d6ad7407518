//! How fast an engine usually answers, by which one that hangs is told from one that works.

use std::time::{Duration, Instant};

/// How many times as long as usual an engine may be silent.
const PATIENCE: u32 = 8;

/// Weight of the latest time in what is usual.
const WEIGHT: f64 = 0.2;

/// A silence is no sign of anything before this: first events wait for prompts and for other callers.
const FIRST_MIN: Duration = Duration::from_secs(10);
const NEXT_MIN: Duration = Duration::from_secs(2);

/// Where nothing is known yet: so long, and for a first event so long more for each token of the prompt.
const UNKNOWN_MAX: Duration = Duration::from_secs(30);
const PER_TOKEN: Duration = Duration::from_millis(10);

/// See the module's text.
#[derive(Clone, Debug, Default)]
pub(crate) struct Pace {
    first: Option<f64>,
    next: Option<f64>,
    calls: usize,
    heard: Option<Instant>,
}

fn learn(usual: &mut Option<f64>, took: Duration) {
    let took = took.as_secs_f64();
    *usual = Some(usual.map_or(took, |usual| usual + WEIGHT * (took - usual)));
}

fn patience(usual: Option<f64>, least: Duration, unknown: Duration) -> Duration {
    usual.map_or(unknown, |usual| (Duration::from_secs_f64(usual) * PATIENCE).clamp(least, unknown.max(least)))
}

impl Pace {
    /// How long a call with a prompt of `tokens` tokens may take to its first event.
    pub(crate) fn first_max(&self, tokens: usize) -> Duration {
        let tokens = u32::try_from(tokens).unwrap_or(u32::MAX);
        patience(self.first, FIRST_MIN, UNKNOWN_MAX + PER_TOKEN.saturating_mul(tokens))
    }

    /// How long the next event may take.
    pub(crate) fn next_max(&self) -> Duration {
        patience(self.next, NEXT_MIN, UNKNOWN_MAX)
    }

    /// A call begins.
    pub(crate) fn begin(&mut self, now: Instant) {
        if self.calls == 0 {
            self.heard = Some(now);
        }
        self.calls += 1;
    }

    /// The first event of a call, or a later one, came after `took`.
    pub(crate) fn event(&mut self, is_first: bool, took: Duration, now: Instant) {
        learn(if is_first { &mut self.first } else { &mut self.next }, took);
        self.heard = Some(now);
    }

    /// A call is over, however it ended.
    pub(crate) fn end(&mut self) {
        self.calls = self.calls.saturating_sub(1);
    }

    /// How long the engine has been silent, if it has calls and that is longer than it may take.
    pub(crate) fn stalled(&self, now: Instant) -> Option<Duration> {
        let silent = now.saturating_duration_since(self.heard.filter(|_| self.calls > 0)?);
        (silent > self.first_max(0)).then_some(silent)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_engine_may_take_eight_times_as_long_as_it_usually_does() {
        let s = Duration::from_secs_f64;
        let mut pace = Pace::default();
        assert_eq!((pace.first_max(0), pace.first_max(1000), pace.next_max()), (s(30.0), s(40.0), s(30.0)));
        let begun = Instant::now();
        pace.event(true, s(0.1), begun);
        pace.event(false, s(0.02), begun);
        assert_eq!((pace.first_max(4000), pace.next_max()), (s(10.0), s(2.0)));
        for _ in 0..60 {
            pace.event(true, s(2.0), begun);
            pace.event(false, s(1.0), begun);
        }
        assert!(
            (pace.first_max(0).as_secs_f64() - 16.0).abs() < 0.1 && (pace.next_max().as_secs_f64() - 8.0).abs() < 0.1
        );
        pace.event(true, s(1e4), begun);
        assert_eq!(pace.first_max(0), s(30.0), "never longer than where nothing is known");
    }

    #[test]
    fn a_silent_engine_is_stalled_if_it_has_calls() {
        let begun = Instant::now();
        let at = |s: u64| begun + Duration::from_secs(s);
        let mut pace = Pace::default();
        assert_eq!(pace.stalled(at(1000)), None, "idle");
        pace.begin(at(1000));
        assert_eq!((pace.stalled(at(1029)), pace.stalled(at(1031))), (None, Some(Duration::from_secs(31))));
        pace.event(true, Duration::from_millis(50), at(1031));
        pace.begin(at(1035));
        assert_eq!((pace.stalled(at(1040)), pace.stalled(at(1042))), (None, Some(Duration::from_secs(11))));
        pace.end();
        pace.end();
        assert_eq!(pace.stalled(at(2000)), None);
    }
}
