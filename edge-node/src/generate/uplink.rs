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

/// An open stream to a cloud node.
pub(crate) struct Uplink {
    pub(crate) link: Arc<Link>,
    tx: FrameSender,
    rx: FrameReceiver,
    epoch: Epoch,
    bulk_up: u64,
    bulk_down: u64,
}

impl Uplink {
    /// Opens a stream and sends the opening frame with the sequence's tokens.
    pub(crate) async fn open(link: Arc<Link>, open: Open, tokens: &[u32]) -> Result<Self, TransportError> {
        let (tx, rx) = Channel::split(link.open_session().await?);
        let mut uplink = Self { link, tx, rx, epoch: open.epoch, bulk_up: 0, bulk_down: 0 };
        let payload: Vec<u8> = tokens.iter().flat_map(|t| t.to_le_bytes()).collect();
        uplink.send(Message::Open(open), payload.into()).await?;
        Ok(uplink)
    }

    /// Sends a frame; waits only for flow control. Not cancel-safe.
    pub(crate) async fn send(&mut self, message: Message, payload: Bytes) -> Result<(), TransportError> {
        self.tx.send(&message, payload).await
    }

    /// Sends KV state beside the stream. Not cancel-safe.
    pub(crate) async fn send_bulk(&mut self, message: Message, payload: Bytes) -> Result<(), TransportError> {
        self.bulk_up += payload.len() as u64;
        self.link.send_bulk(&message, payload).await
    }

    /// Counts KV state that arrived beside the stream.
    pub(crate) fn received_bulk(&mut self, bytes: usize) {
        self.bulk_down += bytes as u64;
    }

    /// The next frame. Cancel-safe.
    pub(crate) async fn next(&mut self) -> Result<Option<Frame>, TransportError> {
        self.rx.next().await
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
