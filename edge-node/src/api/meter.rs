//! What the API measures of one request's answers; what they took is booked by the node.

use std::time::Instant;

use metrics::{counter, gauge, histogram};

use crate::metric_definitions as names;
use crate::request::{Mode, Origin};

/// Counts one request's answers; the gauge of active requests falls when it is dropped.
#[derive(Debug)]
pub(crate) struct Meter {
    route: &'static str,
    mode: &'static str,
    received: Instant,
}

impl Meter {
    /// For a request that arrived at `received`.
    pub(crate) fn new(route: &'static str, mode: Mode, received: Instant) -> Self {
        gauge!(names::ACTIVE_REQUESTS).increment(1.0);
        Self { route, mode: mode.name(), received }
    }

    /// The request was taken on.
    pub(crate) fn begin(&self, prompt_tokens: u64) {
        counter!(names::PROMPT_TOKENS_TOTAL, names::LABEL_MODE => self.mode).increment(prompt_tokens);
    }

    /// A token came; `last` is when the one before it came. Returns the time of this one.
    pub(crate) fn token(&self, origin: Origin, last: Option<Instant>) -> Instant {
        let now = Instant::now();
        let (name, since) = match last {
            None => (names::TTFT_SECONDS, self.received),
            Some(last) => (names::ITL_SECONDS, last),
        };
        histogram!(name, names::LABEL_ROUTE => self.route, names::LABEL_MODE => self.mode)
            .record(now.saturating_duration_since(since).as_secs_f64());
        let origin = match origin {
            Origin::Edge => "edge",
            Origin::Verified => "verified",
            Origin::Cloud => "cloud",
        };
        counter!(names::TOKENS_TOTAL, names::LABEL_MODE => self.mode, names::LABEL_ORIGIN => origin).increment(1);
        now
    }

    /// An answer ended.
    pub(crate) fn end(&self, outcome: &'static str) {
        counter!(
            names::ANSWERS_TOTAL,
            names::LABEL_ROUTE => self.route, names::LABEL_MODE => self.mode, names::LABEL_OUTCOME => outcome
        )
        .increment(1);
    }
}

impl Drop for Meter {
    fn drop(&mut self) {
        gauge!(names::ACTIVE_REQUESTS).decrement(1.0);
    }
}
