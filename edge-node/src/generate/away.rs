//! While the cloud is away: how long the stricter modes hope for it, and when the edge goes on alone.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tandem_proto::message::{Refuse, RefuseCode};
use tandem_transport::link::Link;

use super::{Answer, Cloud};
use crate::request::Mode;

/// Pause before a session that did not open is opened again.
pub(super) const RETRY_AFTER: Duration = Duration::from_millis(100);

/// Whether a refusal is for now only: the session may be opened again.
pub(super) fn is_for_now(refuse: &Refuse) -> bool {
    match refuse.code {
        RefuseCode::ShuttingDown | RefuseCode::StaleEpoch => true,
        RefuseCode::Busy => refuse.retry_after_ms > 0,
        _ => false,
    }
}

impl Answer {
    pub(super) fn link(&self) -> Option<Arc<Link>> {
        self.links.borrow().clone().filter(|l| !l.is_closed())
    }

    /// True while no session is to be opened.
    pub(super) fn is_paused(&self) -> bool {
        self.retry_at.is_some_and(|t| t > Instant::now())
    }

    /// Whether the cloud can decide a token: it is there, or a stricter mode still hopes for it.
    pub(super) fn cloud_decides(&self) -> bool {
        let there = self.uplink.is_some() || (self.link().is_some() && !self.is_paused());
        let hopes = self.opens_early() && self.grace_left().is_some();
        self.cloud == Cloud::Wanted && (there || hopes)
    }

    /// The cloud cannot be opened now: the stricter modes begin to wait, `auto` does not.
    pub(super) fn note_absence(&mut self) {
        if self.opens_early() {
            self.lost_at.get_or_insert_with(Instant::now);
        } else if self.session.is_waiting() {
            self.go_alone("the cloud is not reachable");
        }
    }

    /// True while the edge model must not write: the cloud streams, or may still come back.
    pub(super) fn holds_back(&self) -> bool {
        let streaming = self.session.is_streaming() || self.fetch.is_some();
        let waits =
            self.opens_early() && self.cloud == Cloud::Wanted && self.uplink.is_none() && self.grace_left().is_some();
        streaming || waits
    }

    /// The edge's own drafts stand for what the cloud has not answered.
    pub(super) fn go_alone(&mut self, why: &str) {
        if self.session.is_waiting() || self.request.mode != Mode::Auto {
            self.degrade(why);
        }
        self.session.resolve_locally();
        self.asked_at = None;
    }

    pub(super) fn degrade(&mut self, why: &str) {
        self.summary.degraded = true;
        self.summary.degraded_reason.get_or_insert_with(|| why.to_owned());
    }

    /// How much longer a stricter mode waits for a lost cloud; none once that is over.
    pub(super) fn grace_left(&self) -> Option<Duration> {
        let most = Duration::from_millis(self.node.settings.reconnect_ms_max);
        let lost = self.lost_at?;
        most.checked_sub(lost.elapsed()).filter(|d| !d.is_zero())
    }

    pub(super) fn deadline(&self) -> Option<Instant> {
        if let Some(fetch) = &self.fetch {
            return Some(fetch.deadline);
        }
        if self.uplink.is_none() && self.cloud == Cloud::Wanted {
            let grace = if self.opens_early() { self.grace_left().map(|d| Instant::now() + d) } else { None };
            return grace.into_iter().chain(self.retry_at).min();
        }
        let asked = self.asked_at.filter(|_| self.request.mode == Mode::Auto)?;
        let rtt = self.uplink.as_ref().map_or(0, |u| u.link.stats().rtt_us);
        Some(asked + Duration::from_millis(self.node.settings.escalation_ms_max) + Duration::from_micros(4 * rtt))
    }

    pub(super) fn on_deadline(&mut self) {
        if self.fetch.take().is_some() {
            tracing::debug!("the prompt's state did not arrive in time; computing it here");
        } else if self.uplink.is_none() {
            // Else only the pause before the next attempt is over.
            if self.grace_left().is_none() {
                self.go_alone("the cloud did not come back in time");
            }
        } else {
            self.go_alone("the cloud did not answer in time");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cloud_that_says_when_to_come_again_is_asked_again() {
        let table = [
            (RefuseCode::Busy, 1000, true),
            (RefuseCode::Busy, 0, false),
            (RefuseCode::ShuttingDown, 0, true),
            (RefuseCode::StaleEpoch, 0, true),
            (RefuseCode::Malformed, 1000, false),
            (RefuseCode::TooLong, 0, false),
            (RefuseCode::UnknownModel, 0, false),
            (RefuseCode::Internal, 0, false),
        ];
        for (code, retry_after_ms, expected) in table {
            let refuse = Refuse { code, message: String::new(), retry_after_ms };
            assert_eq!(is_for_now(&refuse), expected, "{refuse:?}");
        }
    }
}
