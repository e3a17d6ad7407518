//! What the cloud says to one answer, and what becomes of the stream it says it on.

use std::time::Instant;

use bytes::Bytes;
use tandem_proto::frame::{Frame, Message};
use tandem_proto::message::{Refuse, RefuseCode};
use tandem_proto::session::SessionError;
use tandem_proto::session::edge::PathChange;
use tandem_proto::session::edge::clock::RETRY_US;
use tandem_transport::error::TransportError;
use tandem_transport::exchange::Lender;

use super::away::is_for_now;
use super::uplink::Uplink;
use super::{Answer, Halt};

/// The next frame of the stream, if there is one. Cancel-safe.
pub(super) async fn next_frame(uplink: &mut Option<Uplink>) -> Result<Option<Frame>, TransportError> {
    match uplink {
        Some(u) => u.next().await,
        None => std::future::pending().await,
    }
}

impl Answer {
    pub(super) async fn on_frame(&mut self, frame: Result<Option<Frame>, TransportError>) -> Result<(), Halt> {
        let frame = match frame {
            Ok(Some(frame)) => frame,
            Ok(None) => {
                self.on_link_lost("the cloud ended the session");
                return Ok(());
            }
            Err(e) => {
                tracing::debug!("the cloud session broke: {e}");
                self.on_link_lost("the link to the cloud broke");
                return Ok(());
            }
        };
        // Nothing has been said yet, so the client can still be told; later the edge goes on alone.
        if let Message::Refuse(Refuse { code: RefuseCode::BadGrammar, message, .. }) = &frame.message
            && self.opens_early()
            && self.sent == 0
        {
            return Err(Halt::Grammar(format!("the cloud refused: {message}")));
        }
        match self.take(frame).await {
            Ok(PathChange::Cut(len)) => self.drafter.cut(len),
            Ok(PathChange::Kept | PathChange::Stale) => {}
            Err(e) => {
                tracing::warn!("the cloud sent a frame that does not fit: {e}");
                self.on_link_lost("the cloud sent a frame that does not fit");
            }
        }
        self.summary.round_trips = self.session.round_trips;
        self.summary.rolled_back = self.session.rolled_back;
        Ok(())
    }

    async fn take(&mut self, frame: Frame) -> Result<PathChange, SessionError> {
        let now = self.now();
        if !matches!(frame.message, Message::Progress(_)) {
            self.session.heard(now);
        }
        match frame.message {
            Message::Progress(p) => {
                if self.session.on_progress(&p, now)? {
                    self.on_node_failed(&format!("the cloud's engine has got nowhere for {} ms", p.stalled_ms));
                }
                Ok(PathChange::Kept)
            }
            Message::Opened(o) => {
                self.session.opened();
                let card = self.uplink.as_ref().and_then(|uplink| self.node.cloud_card(&uplink.link));
                self.summary.exact = card.map(|card| card.exactness.name().into());
                if self.sent == 0 && self.drafter.fed() == 0 && !self.drafter.is_running() {
                    self.summary.cached_tokens = o.held_tokens.min(self.request.prompt.len() as u32);
                }
                // A cloud that takes no hidden states above our trunk lends and borrows no state of it either.
                if self.trunk.as_ref().is_some_and(|trunk| trunk.layers != o.trunk_layers as usize) {
                    self.trunk = None;
                    self.send_hidden = false;
                }
                // State that the cloud already has is not offered again.
                if self.trunk.is_none() || o.held_tokens > 0 {
                    self.drop_fetch();
                }
                Ok(PathChange::Kept)
            }
            Message::Verdict(v) => {
                let judged = v.accepted as usize + usize::from(v.rejected);
                let rows = self.session.rows_in_question();
                let seconds = (f64::from(v.compute_us) + f64::from(v.queue_us)) / 1e6;
                let change = self.session.on_verdict(&v)?;
                self.cloud_worked();
                if change != PathChange::Stale {
                    self.node.learn(|e| {
                        e.saw_verdict(judged, v.accepted as usize);
                        e.saw_verify(seconds, rows);
                    });
                }
                Ok(change)
            }
            Message::Token(t) => {
                let now = Instant::now();
                if let Some(last) = self.last_token_at.replace(now) {
                    self.node.learn(|e| e.saw_stream_gap(now.duration_since(last).as_secs_f64()));
                }
                self.cloud_worked();
                self.session.on_token(&t)
            }
            Message::End(e) => self.session.on_end(&e),
            Message::Refuse(r) => {
                let reason = format!("the cloud refused ({:?}): {}", r.code, r.message);
                if r.code == RefuseCode::Stalled {
                    self.on_node_failed(&reason);
                } else {
                    let pause = RETRY_US.max(u64::from(r.retry_after_ms) * 1000);
                    self.lose_session(&reason, Some(pause));
                    if !is_for_now(&r) {
                        self.refused(&reason);
                    }
                }
                Ok(PathChange::Kept)
            }
            Message::KvOffer(offer) => {
                self.on_offer(&offer).await;
                Ok(PathChange::Kept)
            }
            Message::KvPull(pull) => {
                self.pull = Some(pull);
                Ok(PathChange::Kept)
            }
            Message::KvWant(want) => {
                self.on_want(&want);
                Ok(PathChange::Kept)
            }
            Message::KvAck(_) => Ok(PathChange::Kept),
            other => Err(SessionError::OutOfOrder(format!("{} is not for an edge", other.frame_type().name()))),
        }
    }

    /// Sends a frame; false if the link broke under it.
    pub(super) async fn send(&mut self, message: Message, payload: Bytes) -> bool {
        let Some(uplink) = &mut self.uplink else { return false };
        if let Err(e) = uplink.send(message, payload).await {
            tracing::debug!("the cloud session broke: {e}");
            self.on_link_lost("the link to the cloud broke");
            return false;
        }
        true
    }

    pub(super) fn on_link_change(&mut self) {
        // The next cloud node may serve another model.
        if let Some(link) = self.link() {
            let next = self.node.steering(self.request.threshold, Some(&link));
            self.steering = self.steering.succeeded_by(next);
        }
        let gone = self.uplink.as_ref().is_some_and(|u| u.link.is_closed());
        if gone || (self.uplink.is_some() && self.links.borrow().is_none()) {
            self.on_link_lost("the link to the cloud broke");
        }
    }

    pub(super) fn on_link_lost(&mut self, why: &str) {
        // Where only the stream has ended nothing else will wake us, and a cloud that ends every
        // stream must not be hammered.
        let stands = self.uplink.as_ref().is_some_and(|u| !u.link.is_closed());
        self.lose_session(why, stands.then_some(RETRY_US));
    }

    /// The session is gone and is opened again no sooner than `retry_after_us` from now.
    pub(super) fn lose_session(&mut self, why: &str, retry_after_us: Option<u64>) {
        if let Some(uplink) = self.uplink.take() {
            let (up, down) = uplink.bytes();
            self.summary.bytes_up += up;
            self.summary.bytes_down += down;
        }
        self.fetch = None;
        self.pull = None;
        self.lender = Lender::new(self.session.id());
        if self.session.link_lost(self.now(), retry_after_us) {
            self.degrade(why);
        }
    }

    /// The prompt's state does not come, or has come.
    pub(super) fn drop_fetch(&mut self) {
        self.fetch = None;
        self.session.state_settled();
    }

    fn cloud_worked(&self) {
        if let Some(uplink) = &self.uplink {
            self.node.uplinks.worked(&uplink.link);
        }
    }

    pub(super) async fn close_uplink(&mut self, cancelled: bool) {
        if let Some(uplink) = self.uplink.take() {
            let (up, down) = uplink.close(cancelled).await;
            self.summary.bytes_up += up;
            self.summary.bytes_down += down;
        }
    }
}
