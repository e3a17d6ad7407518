//! One answer's stream to the cloud: frames out, frames in, bytes counted. Knows nothing of what
//! the frames mean.

use std::sync::Arc;

use bytes::Bytes;
use tandem_proto::frame::{Frame, Message};
use tandem_proto::ids::Epoch;
use tandem_proto::message::{Close, Open};
use tandem_transport::channel::{Channel, FrameReceiver, FrameSender};
use tandem_transport::error::TransportError;
use tandem_transport::link::Link;
use tokio::time::{Duration, Instant, timeout_at};

/// How long a cloud that listens no more may take to say why, milliseconds.
const LAST_WORD_MS: u64 = 1000;

/// An open stream to a cloud node.
pub(crate) struct Uplink {
    pub(crate) link: Arc<Link>,
    tx: FrameSender,
    rx: FrameReceiver,
    epoch: Epoch,
    /// Since when the cloud listens no more: it refuses the session, and says so on its own half.
    unheard_since: Option<Instant>,
    bulk_up: u64,
    bulk_down: u64,
}

impl Uplink {
    /// Opens a stream and sends the opening frame with the sequence's tokens.
    pub(crate) async fn open(link: Arc<Link>, open: Open, tokens: &[u32]) -> Result<Self, TransportError> {
        let (tx, rx) = Channel::split(link.open_session().await?);
        let mut uplink = Self { link, tx, rx, epoch: open.epoch, unheard_since: None, bulk_up: 0, bulk_down: 0 };
        let payload: Vec<u8> = tokens.iter().flat_map(|t| t.to_le_bytes()).collect();
        uplink.send(Message::Open(open), payload.into()).await?;
        Ok(uplink)
    }

    /// Sends a frame; waits only for flow control. Not cancel-safe. What a cloud that listens no more
    /// would not have read is no error: [`Uplink::next`] has its reason.
    pub(crate) async fn send(&mut self, message: Message, payload: Bytes) -> Result<(), TransportError> {
        if self.unheard_since.is_some() {
            return Ok(());
        }
        match self.tx.send(&message, payload).await {
            Err(TransportError::Reset(code)) => {
                tracing::debug!(code, "the cloud listens no more");
                self.unheard_since = Some(Instant::now());
                Ok(())
            }
            sent => sent,
        }
    }

    /// Counts KV state that is sent beside the stream.
    pub(crate) fn sent_bulk(&mut self, bytes: usize) {
        self.bulk_up += bytes as u64;
    }

    /// Counts KV state that arrived beside the stream.
    pub(crate) fn received_bulk(&mut self, bytes: usize) {
        self.bulk_down += bytes as u64;
    }

    /// The next frame. Cancel-safe.
    pub(crate) async fn next(&mut self) -> Result<Option<Frame>, TransportError> {
        let Some(since) = self.unheard_since else { return self.rx.next().await };
        let late = |_| Err(TransportError::Timeout { what: "why the cloud listens no more", ms: LAST_WORD_MS });
        timeout_at(since + Duration::from_millis(LAST_WORD_MS), self.rx.next()).await.unwrap_or_else(late)
    }

    /// Bytes sent and received so far, KV state included.
    pub(crate) fn bytes(&self) -> (u64, u64) {
        (self.tx.bytes_sent() + self.bulk_up, self.rx.bytes_received() + self.bulk_down)
    }

    /// Ends the session; the cloud drops its state.
    pub(crate) async fn close(mut self, cancelled: bool) -> (u64, u64) {
        let close = Message::Close(Close { epoch: self.epoch, cancelled });
        // A link that is gone has told the cloud already.
        if self.send(close, Bytes::new()).await.is_ok() {
            let _ = self.tx.finish();
        }
        self.bytes()
    }
}
