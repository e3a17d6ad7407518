//! While the cloud is away, or does not answer. When that is, is decided by the session
//! (`tandem_proto::session::edge::clock`); what it means for the node, here.

use std::sync::Arc;
use std::time::Instant;

use tandem_proto::message::{Refuse, RefuseCode};
use tandem_proto::session::edge::clock::Timeout;
use tandem_transport::link::Link;

use super::Answer;
use crate::request::Mode;

/// Whether a refusal is for now only: the session may be opened again.
pub(super) fn is_for_now(refuse: &Refuse) -> bool {
    match refuse.code {
        RefuseCode::ShuttingDown | RefuseCode::StaleEpoch | RefuseCode::Stalled => true,
        RefuseCode::Busy => refuse.retry_after_ms > 0,
        _ => false,
    }
}

impl Answer {
    pub(super) fn link(&self) -> Option<Arc<Link>> {
        self.links.borrow().clone().filter(|l| !l.is_closed())
    }

    /// The session's clock.
    pub(super) fn now(&self) -> u64 {
        self.node.clock_us(Instant::now())
    }

    /// The link to open a session on, if there is one that this answer may use.
    pub(super) fn usable_link(&self) -> Option<Arc<Link>> {
        self.link().filter(|_| self.request.mode != Mode::Auto || !self.node.uplinks.rests())
    }

    /// Whether the cloud can decide a token: it is connected, or the grace after its loss is not over.
    pub(super) fn cloud_decides(&self) -> bool {
        self.session.cloud_decides(self.now(), self.usable_link().is_some())
    }

    /// No session can be opened now.
    pub(super) fn note_absence(&mut self) {
        let uplinks = &self.node.uplinks;
        let may_come = uplinks.configured() && !uplinks.is_cut() && !uplinks.rests();
        if self.session.unreachable(self.now(), may_come) {
            self.degrade("the cloud is not reachable");
        }
    }

    /// True while the edge model must not write: the cloud streams, or may still come back.
    pub(super) fn holds_back(&self) -> bool {
        self.session.is_streaming() || self.fetch.is_some() || self.session.holds_back(self.now())
    }

    /// The cloud does not take this answer.
    pub(super) fn refused(&mut self, why: &str) {
        if self.session.is_waiting() || self.request.mode != Mode::Auto {
            self.degrade(why);
        }
        self.session.refused();
    }

    pub(super) fn degrade(&mut self, why: &str) {
        self.summary.degraded = true;
        self.summary.exact = Some("none".into());
        self.summary.degraded_reason.get_or_insert_with(|| why.to_owned());
    }

    pub(super) fn deadline(&mut self) -> Option<Instant> {
        if let Some(uplink) = &self.uplink {
            self.session.set_rtt(uplink.link.stats().rtt_us);
        }
        let at = self.session.poll_timeout(self.now())?;
        self.node.instant_of(at)
    }

    pub(super) fn on_deadline(&mut self) {
        match self.session.handle_timeout(self.now()) {
            None | Some(Timeout::Retry) => {}
            Some(Timeout::Alone) => self.degrade("the cloud did not come back in time"),
            Some(Timeout::Unanswered) => {
                self.degrade("the cloud did not answer in time");
                self.node.uplinks.rest();
            }
            Some(Timeout::NoState) => {
                tracing::debug!("the prompt's state did not arrive in time; computing it here");
                self.fetch = None;
            }
            Some(Timeout::Silent) => self.on_node_failed("the cloud node does not answer"),
        }
    }

    /// The node does not serve this session: another one may.
    pub(super) fn on_node_failed(&mut self, why: &str) {
        if let Some(uplink) = &self.uplink {
            self.node.uplinks.suspect(&uplink.link, why);
        }
        self.on_link_lost(why);
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
            (RefuseCode::Stalled, 0, true),
            (RefuseCode::Malformed, 1000, false),
            (RefuseCode::TooLong, 0, false),
            (RefuseCode::UnknownModel, 0, false),
            (RefuseCode::Incompatible, 0, false),
            (RefuseCode::Internal, 0, false),
        ];
        for (code, retry_after_ms, expected) in table {
            let refuse = Refuse { code, message: String::new(), retry_after_ms };
            assert_eq!(is_for_now(&refuse), expected, "{refuse:?}");
        }
    }
}
