//! The clock of an answer: how long it waits for the cloud, when it tries again, and when the edge goes on
//! alone. Times are microseconds on one clock of the caller's.
//!
//! Call order: [`EdgeSession::poll_timeout`] before each wait, [`EdgeSession::handle_timeout`] once that time
//! has come; [`EdgeSession::heard`] or [`EdgeSession::on_progress`] for every frame of the cloud.

use super::EdgeSession;
use crate::limits::WORK_US_MAX;
use crate::message::Progress;
use crate::session::{SessionError, check_epoch};

/// Pause before a session that did not open is opened again.
pub const RETRY_US: u64 = 100_000;
/// A node that owes an answer and says nothing for so long beyond three round trips has failed. A node that
/// works says so every [`PROGRESS_MS`](crate::limits::PROGRESS_MS).
pub const SILENCE_US: u64 = 1_000_000;
/// Longest wait for a node that lives and does not come to this session, where only the cloud may decide.
pub const STARVED_US: u64 = 15_000_000;
/// Longest wait for the prompt's state without a sign of it; then the edge computes it.
pub const STATE_US: u64 = 3_000_000;

/// Sessions that open and are lost before the cloud has decided anything; of more in a row, the grace counts
/// from the loss of the first.
pub const SETBACKS_TOLERATED: u32 = 3;

/// Sessions lost in a row without anything decided.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Setbacks {
    count: u32,
    since: u64,
    decisions: u64,
}

/// What an answer needs the cloud for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Need {
    /// Nothing: the edge alone writes.
    Nothing,
    /// The tokens that the edge is unsure of. Where the cloud has been away for longer than a question may
    /// take, the edge's own stand at once.
    Advice,
    /// Every token. The edge goes on alone only when no cloud is to be had.
    Decisions,
}

/// How long an answer waits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Patience {
    /// What for.
    pub need: Need,
    /// [`Need::Advice`]: longest wait for a cloud that does not come to the question, or for another link after
    /// one is lost, beyond four round trips.
    pub question_us: u64,
    /// [`Need::Decisions`]: longest time without a sign of any cloud, beyond three round trips.
    pub grace_us: u64,
}

/// How an answer stands with the cloud.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CloudSide {
    /// Not used.
    Unused,
    /// No session is open.
    Waiting {
        /// Since when the cloud is away; none until that has been checked.
        lost_at: Option<u64>,
        /// No session is opened before.
        retry_at: Option<u64>,
    },
    /// A session is open, or asked for.
    Open {
        /// As in `Waiting`, until the cloud has opened the session.
        lost_at: Option<u64>,
        /// Since when the edge waits for an answer; none while it does not.
        since: Option<u64>,
        /// When the cloud last said anything.
        heard_at: u64,
        /// When it last came further with this session.
        moved_at: u64,
        /// Tokens it still had to feed then.
        rows_left: u32,
        /// It owes an answer to a question that was given up: it is not asked again before it has caught up.
        behind: bool,
    },
    /// It does not take this answer; the edge goes on alone.
    Refused,
}

/// What a deadline that has passed means. The session has drawn its own conclusions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Timeout {
    /// The pause is over: open a session again.
    Retry,
    /// No cloud came back in time: the edge's drafts stand.
    Alone,
    /// The cloud lives and did not come to the question in time: the edge's drafts stand.
    Unanswered,
    /// The prompt's state did not arrive in time: the edge computes it.
    NoState,
    /// The node says nothing, or does not come to this session: leave the stream and find another node.
    Silent,
}

impl<I> EdgeSession<I> {
    /// How the answer stands with the cloud.
    #[must_use]
    pub fn cloud(&self) -> CloudSide {
        self.cloud
    }

    /// The cloud has been away since then, before the answer began.
    pub fn away_since(&mut self, at: u64) {
        if let CloudSide::Waiting { lost_at, .. } = &mut self.cloud {
            *lost_at = Some(at);
        }
    }

    /// The round-trip time of the path to the cloud; each wait grows with it.
    pub fn set_rtt(&mut self, rtt_us: u64) {
        self.rtt_us = rtt_us;
    }

    fn silence_us(&self) -> u64 {
        SILENCE_US + 3 * self.rtt_us
    }

    /// When the grace after the loss of the cloud is over.
    fn grace_ends(&self, lost_at: u64) -> u64 {
        let grace_us = match self.patience.need {
            Need::Decisions => self.patience.grace_us.saturating_add(3 * self.rtt_us),
            Need::Nothing | Need::Advice => self.patience.question_us.saturating_add(4 * self.rtt_us),
        };
        lost_at.saturating_add(grace_us)
    }

    /// True while a session may be opened.
    #[must_use]
    pub fn may_open(&self, now: u64) -> bool {
        matches!(self.cloud, CloudSide::Waiting { retry_at, .. } if retry_at.is_none_or(|at| at <= now))
    }

    /// True if a session is open or asked for.
    #[must_use]
    pub fn is_connected(&self) -> bool {
        matches!(self.cloud, CloudSide::Open { .. })
    }

    /// True while the edge must not write because a lost cloud may still come back.
    #[must_use]
    pub fn holds_back(&self, now: u64) -> bool {
        self.patience.need == Need::Decisions && self.hopes(now)
    }

    /// True until the grace after the loss of the link is over.
    fn hopes(&self, now: u64) -> bool {
        matches!(self.cloud, CloudSide::Waiting { lost_at: Some(at), .. } if now < self.grace_ends(at))
    }

    /// Whether the cloud can decide a token: a session is open, or the grace is not over. `reachable` says
    /// whether there is a link to open a session on.
    #[must_use]
    pub fn cloud_decides(&self, now: u64, reachable: bool) -> bool {
        match self.cloud {
            CloudSide::Unused | CloudSide::Refused => false,
            CloudSide::Open { behind, .. } => !behind,
            CloudSide::Waiting { .. } => (reachable && self.may_open(now)) || self.hopes(now),
        }
    }

    /// There is no link to open a session on; `may_come` says whether one is being dialed. True if drafts that
    /// waited for the cloud stand now.
    pub fn unreachable(&mut self, now: u64, may_come: bool) -> bool {
        let CloudSide::Waiting { lost_at, .. } = &mut self.cloud else { return false };
        let needed = self.patience.need == Need::Decisions;
        if needed || may_come {
            lost_at.get_or_insert(now);
        }
        let waits = needed || (may_come && self.hopes(now));
        !waits && self.go_alone()
    }

    /// The stream, the link or the node is gone. Open questions are asked again after [`Self::open`], not
    /// before `retry_after_us` is over; once the grace is over, the drafts stand. True if some do
    /// now.
    pub fn link_lost(&mut self, now: u64, retry_after_us: Option<u64>) -> bool {
        let retry_at = retry_after_us.map(|pause| now.saturating_add(pause));
        self.cloud = match self.cloud {
            side @ (CloudSide::Unused | CloudSide::Refused) => side,
            CloudSide::Waiting { lost_at, .. } => CloudSide::Waiting { lost_at: lost_at.or(Some(now)), retry_at },
            CloudSide::Open { lost_at, since, moved_at, .. } => {
                // The wait for a node that had failed already counts, but leaves time to reach another one.
                let failed_at = since.map_or(now, |_| moved_at.max(now.saturating_sub(self.silence_us())));
                let lost_at = self.setback(lost_at.unwrap_or(failed_at));
                CloudSide::Waiting { lost_at: Some(lost_at), retry_at }
            }
        };
        self.fetching = false;
        self.new_round();
        self.sent_to = 0;
        self.asked_to = self.committed;
        !self.hopes(now) && self.go_alone()
    }

    /// A session is lost. Returns since when the cloud counts as away: a node that opens sessions and gives each of
    /// them up again is as good as none.
    fn setback(&mut self, lost_at: u64) -> u64 {
        let Setbacks { count, since, decisions } = self.setbacks;
        let in_a_row = count > 0 && decisions == self.decisions;
        let (count, since) = if in_a_row { (count.saturating_add(1), since) } else { (1, lost_at) };
        self.setbacks = Setbacks { count, since, decisions: self.decisions };
        if count > SETBACKS_TOLERATED { since } else { lost_at }
    }

    /// The cloud does not take this answer: the edge's drafts stand.
    pub fn refused(&mut self) {
        if self.cloud != CloudSide::Unused {
            self.cloud = CloudSide::Refused;
        }
        self.fetching = false;
        self.resolve_locally();
    }

    /// True if drafts that waited for the cloud stand now.
    fn go_alone(&mut self) -> bool {
        let waited = self.is_waiting();
        self.resolve_locally();
        waited
    }

    /// The cloud has opened the session.
    pub fn opened(&mut self) {
        if let CloudSide::Open { lost_at, .. } = &mut self.cloud {
            *lost_at = None;
            self.alone = false;
        }
    }

    /// The cloud has said something that brings the answer further.
    pub fn heard(&mut self, now: u64) {
        if let CloudSide::Open { heard_at, moved_at, behind, since, .. } = &mut self.cloud {
            (*heard_at, *moved_at, *behind) = (now, now, false);
            *since = since.map(|_| now);
        }
    }

    /// The cloud says how far it is. True if its engine hangs: leave the stream and find another node.
    ///
    /// # Errors
    /// The frame belongs to another epoch.
    pub fn on_progress(&mut self, p: &Progress, now: u64) -> Result<bool, SessionError> {
        check_epoch(p.epoch, self.epoch)?;
        if let CloudSide::Open { heard_at, moved_at, rows_left, .. } = &mut self.cloud {
            *heard_at = now;
            if p.stalled_ms == 0 && (p.working || p.rows_left < *rows_left) {
                *moved_at = now;
            }
            *rows_left = p.rows_left;
        }
        Ok(p.stalled_ms > 0)
    }

    /// The prompt's state has arrived, or is not wanted any more.
    pub fn state_settled(&mut self) {
        self.fetching = false;
    }

    fn awaits(&self) -> bool {
        self.fetching || self.span.is_some() || !self.questions.is_empty()
    }

    /// The next deadline. To be asked before every wait: a wait for the cloud begins here.
    pub fn poll_timeout(&mut self, now: u64) -> Option<u64> {
        let awaits = self.awaits() && !self.finished;
        if let CloudSide::Open { since, heard_at, moved_at, rows_left, .. } = &mut self.cloud {
            match (awaits, *since) {
                (true, None) => (*since, *heard_at, *moved_at, *rows_left) = (Some(now), now, now, u32::MAX),
                (false, Some(_)) => *since = None,
                _ => {}
            }
        }
        self.deadline().map(|(at, _)| at)
    }

    /// The next deadline and what it means.
    fn deadline(&self) -> Option<(u64, Timeout)> {
        match self.cloud {
            CloudSide::Unused | CloudSide::Refused => None,
            CloudSide::Waiting { lost_at, retry_at } => {
                let waits = self.patience.need == Need::Decisions || self.is_waiting();
                let hope = lost_at.filter(|_| waits && !self.alone);
                let hope = hope.map(|at| (self.grace_ends(at), Timeout::Alone));
                let retry = retry_at.map(|at| (at, Timeout::Retry));
                hope.into_iter().chain(retry).min_by_key(|(at, _)| *at)
            }
            CloudSide::Open { since, heard_at, moved_at, behind, .. } => {
                let since = since?;
                let silent = (heard_at + self.silence_us(), Timeout::Silent);
                let late = match self.patience.need {
                    _ if self.fetching => (moved_at + STATE_US, Timeout::NoState),
                    Need::Decisions => (moved_at + STARVED_US, Timeout::Silent),
                    // The question was given up: its answer has no deadline.
                    _ if behind => return None,
                    _ => {
                        let idle = moved_at.saturating_add(self.patience.question_us).saturating_add(4 * self.rtt_us);
                        (idle.min(since + WORK_US_MAX), Timeout::Unanswered)
                    }
                };
                Some(if silent.0 <= late.0 { silent } else { late })
            }
        }
    }

    /// What has come to its end at `now`, if anything has. After [`Timeout::Silent`] call
    /// [`Self::link_lost`].
    pub fn handle_timeout(&mut self, now: u64) -> Option<Timeout> {
        let (_, what) = self.deadline().filter(|(at, _)| *at <= now)?;
        match what {
            Timeout::Retry => {
                if let CloudSide::Waiting { retry_at, .. } = &mut self.cloud {
                    *retry_at = None;
                }
            }
            Timeout::Alone => {
                self.alone = true;
                self.resolve_locally();
            }
            Timeout::Unanswered => {
                if let CloudSide::Open { behind, .. } = &mut self.cloud {
                    *behind = true;
                }
                self.resolve_locally();
            }
            Timeout::NoState => self.fetching = false,
            Timeout::Silent => {}
        }
        Some(what)
    }
}
