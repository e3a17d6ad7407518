//! KV exchange on a link: [`Lender`] has state and [`Borrower`] wants it; each end of a session is the one or the other.
//! What a frame means and whether a block counts is decided by `tandem_proto::exchange`; here blocks are sent and
//! awaited. The frames of the session's own stream are handed out and in as messages.

use std::sync::Arc;

use bytes::Bytes;
use tandem_proto::exchange::{ExchangeError, Incoming, Outgoing, StateRun};
use tandem_proto::frame::Message;
use tandem_proto::ids::{Epoch, SessionId};
use tandem_proto::message::{KvAck, KvBlock, KvOffer, KvPull, KvShape, KvWant};
use tokio::task::JoinHandle;

use crate::bulk::{BulkInbox, BulkReceiver};
use crate::link::Link;

/// The side that has state. One offer at a time: a newer one takes the place of what is under way. Dropping it ends
/// the sending.
#[derive(Debug)]
pub struct Lender {
    session: SessionId,
    offered: Option<(Outgoing, Vec<Bytes>)>,
    sending: Option<JoinHandle<()>>,
}

impl Lender {
    /// For one session.
    #[must_use]
    pub fn new(session: SessionId) -> Self {
        Self { session, offered: None, sending: None }
    }

    /// The frame that offers `run`, whose blocks have the payloads `blocks`.
    pub fn offer(&mut self, epoch: Epoch, exchange: u32, run: StateRun, blocks: Vec<Bytes>) -> Message {
        let (outgoing, offer) = Outgoing::new(self.session, epoch, exchange, run);
        self.offered = Some((outgoing, blocks));
        Message::KvOffer(offer)
    }

    /// The frame that answers a pull of state which is not here.
    #[must_use]
    pub fn nothing(pull: &KvPull, shape: KvShape) -> Message {
        let (epoch, exchange) = (pull.epoch, pull.exchange);
        Message::KvOffer(KvOffer { epoch, exchange, shape, ids: Vec::new(), tokens: 0 })
    }

    /// The peer wants (some of) what was offered: begins to send it beside the session and returns its bytes. A want
    /// that answers no offer is nothing.
    ///
    /// # Errors
    /// It is for another exchange, or for blocks that were not offered; nothing is sent, and the offer is over.
    pub fn wanted(&mut self, want: &KvWant, link: &Arc<Link>) -> Result<usize, ExchangeError> {
        let Some((outgoing, blocks)) = self.offered.take() else { return Ok(0) };
        let wanted: Vec<(KvBlock, Bytes)> = outgoing
            .wanted(want)?
            .into_iter()
            .filter_map(|index| blocks.get(index).map(|payload| (outgoing.block(index, payload), payload.clone())))
            .collect();
        let bytes = wanted.iter().map(|(_, payload)| payload.len()).sum();
        let link = link.clone();
        // Not in the session's task: what it says must not wait for the state to be through.
        let sending = tokio::spawn(async move {
            for (block, payload) in wanted {
                if let Err(e) = link.send_bulk(&Message::KvBlock(block), payload).await {
                    tracing::debug!("KV state did not reach the peer: {e}");
                    return;
                }
            }
        });
        self.stop();
        self.sending = Some(sending);
        Ok(bytes)
    }

    fn stop(&mut self) {
        if let Some(sending) = self.sending.take() {
            sending.abort();
        }
    }
}

impl Drop for Lender {
    fn drop(&mut self) {
        self.stop();
    }
}

/// The side that wants state: one exchange.
#[derive(Debug)]
pub struct Borrower {
    blocks: BulkReceiver,
    incoming: Option<Incoming>,
}

/// A block that came.
#[derive(Debug)]
pub struct Arrived {
    /// Bytes of its payload.
    pub bytes: usize,
    /// What it makes of the exchange.
    pub state: Borrowed,
}

/// How far an exchange is.
#[derive(Debug)]
pub enum Borrowed {
    /// More blocks are to come.
    Part,
    /// All are there and passed; the acknowledgement is to be sent.
    Whole(KvAck, Vec<Bytes>),
    /// One did not pass, so none is used; the acknowledgement is to be sent.
    Refused(KvAck, ExchangeError),
}

impl Borrower {
    /// Takes the blocks of `session` that arrive from now on.
    #[must_use]
    pub fn new(inbox: &BulkInbox, session: SessionId) -> Self {
        Self { blocks: inbox.register(session), incoming: None }
    }

    /// The frame that answers an offer: all of it is wanted if it is exactly `run`, else nothing; and which of the
    /// two.
    pub fn answer(&mut self, offer: &KvOffer, run: Option<StateRun>) -> (Message, bool) {
        let session = self.blocks.session();
        let (want, incoming) = match run {
            Some(run) => Incoming::answer(session, offer, run),
            None => (KvWant { epoch: offer.epoch, exchange: offer.exchange, indices: Vec::new() }, None),
        };
        self.incoming = incoming;
        (Message::KvWant(want), self.incoming.is_some())
    }

    /// The next block, checked; none once another exchange of the session has taken this one's place. Pends when the
    /// exchange is over. Cancel-safe.
    pub async fn next(&mut self) -> Option<Arrived> {
        loop {
            let (block, payload) = self.blocks.next().await?;
            // What nothing was said about yet, or comes after the end.
            let Some(mut incoming) = self.incoming.take() else { continue };
            let bytes = payload.len();
            let state = match incoming.accept(&block, payload) {
                Err(e) if incoming.has_failed() => Borrowed::Refused(incoming.finish().0, e),
                checked => {
                    // A block of an earlier exchange, or one twice: neither counts.
                    if let Err(e) = checked {
                        tracing::debug!("a KV block was not wanted: {e}");
                    }
                    if incoming.is_complete() {
                        let (ack, blocks) = incoming.finish();
                        Borrowed::Whole(ack, blocks.unwrap_or_default())
                    } else {
                        self.incoming = Some(incoming);
                        Borrowed::Part
                    }
                }
            };
            return Some(Arrived { bytes, state });
        }
    }
}
