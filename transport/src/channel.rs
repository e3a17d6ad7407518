//! One bidirectional stream as two queues of frames.

use std::{
    fmt,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use quinn::{RecvStream, SendStream};
use rkyv::util::AlignedVec;
use tandem_proto::{
    frame::{self, Frame, FrameError, Header, Message, MetaBuf},
    limits::{HEADER_BYTES, PAYLOAD_ALIGN, PAYLOAD_BYTES_MAX},
};
use tokio::time::Instant;

use crate::{
    close::CloseCode,
    error::TransportError,
    meter::{Direction, Meter, TIMED_PAYLOAD_BYTES_MIN, Transfer},
};

/// A started frame must gain this much (or end) within the frame-progress timeout, bytes. So a
/// link of 100 B/s still works and a peer that feeds single bytes does not.
pub const PROGRESS_BYTES_MIN: usize = 256;

/// Bytes of frames (header, meta, payload; without QUIC's own) that went through a channel.
#[derive(Debug, Default)]
pub struct ChannelBytes {
    sent: AtomicU64,
    received: AtomicU64,
}

impl ChannelBytes {
    /// Bytes sent so far.
    #[must_use]
    pub fn sent(&self) -> u64 {
        self.sent.load(Ordering::Relaxed)
    }

    /// Bytes received so far.
    #[must_use]
    pub fn received(&self) -> u64 {
        self.received.load(Ordering::Relaxed)
    }
}

/// Both halves of a session's stream.
#[derive(Debug)]
pub struct Channel {
    /// Sending half.
    pub tx: FrameSender,
    /// Receiving half.
    pub rx: FrameReceiver,
}

impl Channel {
    pub(crate) fn new(streams: (SendStream, RecvStream), bounds: &Bounds) -> Self {
        let bytes = Arc::new(ChannelBytes::default());
        Self {
            tx: FrameSender::new(streams.0, bounds, Arc::clone(&bytes)),
            rx: FrameReceiver::new(streams.1, bounds, bytes),
        }
    }

    /// The two halves, to be used by two tasks.
    #[must_use]
    pub fn split(self) -> (FrameSender, FrameReceiver) {
        (self.tx, self.rx)
    }

    /// Counter of both directions; stays readable after [`Channel::split`].
    #[must_use]
    pub fn bytes(&self) -> Arc<ChannelBytes> {
        Arc::clone(&self.tx.bytes)
    }
}

/// What holds for every stream of a link.
#[derive(Debug, Clone)]
pub(crate) struct Bounds {
    pub(crate) send_payload_max: usize,
    pub(crate) receive_payload_max: usize,
    pub(crate) progress: Duration,
    pub(crate) meter: Arc<Meter>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Sending {
    Between,
    Inside,
    Over,
}

/// Sends frames in order. **Call [`FrameSender::finish`]** when all is said: a sender that is merely
/// dropped resets its stream, so that the peer never takes a dead task for a clean end.
pub struct FrameSender {
    stream: SendStream,
    seq: u64,
    payload_max: usize,
    state: Sending,
    bytes: Arc<ChannelBytes>,
}

impl FrameSender {
    pub(crate) fn new(stream: SendStream, bounds: &Bounds, bytes: Arc<ChannelBytes>) -> Self {
        let payload_max = bounds.send_payload_max;
        Self { stream, seq: 0, payload_max, state: Sending::Between, bytes }
    }

    /// Hands one frame to QUIC without copying `payload`; waits only for flow control.
    ///
    /// **Not cancel-safe**: if the future is dropped half-way, the channel is broken and says so on
    /// the next call. Keep it out of `select!`.
    ///
    /// # Errors
    /// [`TransportError::Frame`] (nothing was sent, the channel still works), else the link's or
    /// stream's end.
    pub async fn send(&mut self, message: &Message, payload: Bytes) -> Result<(), TransportError> {
        if self.state != Sending::Between {
            return Err(TransportError::Broken);
        }
        if payload.len() > self.payload_max {
            let (frame, len, max) = (message.frame_type(), payload.len(), self.payload_max);
            return Err(FrameError::PayloadTooLarge { frame, len, max }.into());
        }
        let head = frame::encode_head(self.seq, message, &payload)?;
        let len = head.len() + payload.len();
        let mut parts = [head, payload];
        let used = if parts[1].is_empty() { 1 } else { 2 };
        self.state = Sending::Inside;
        self.stream.write_all_chunks(&mut parts[..used]).await?;
        self.state = Sending::Between;
        self.seq += 1;
        self.bytes.sent.fetch_add(len as u64, Ordering::Relaxed);
        Ok(())
    }

    /// Ends the stream cleanly: the peer reads what was sent, then `None`.
    ///
    /// # Errors
    /// [`TransportError::Broken`] after a failed send.
    pub fn finish(&mut self) -> Result<(), TransportError> {
        match self.state {
            Sending::Over => Ok(()),
            Sending::Inside => Err(TransportError::Broken),
            Sending::Between => {
                self.state = Sending::Over;
                self.stream.finish().map_err(|_| TransportError::Broken)
            }
        }
    }

    /// Waits until the peer's QUIC has everything that was sent before [`FrameSender::finish`].
    /// That does not mean that the peer has acted on it: acknowledge in the protocol.
    ///
    /// # Errors
    /// The end of the link, or [`TransportError::Reset`] if the peer stopped reading.
    pub async fn delivered(&mut self) -> Result<(), TransportError> {
        match self.stream.stopped().await {
            Ok(None) => Ok(()),
            Ok(Some(code)) => Err(TransportError::Reset(code.into_inner())),
            Err(quinn::StoppedError::ConnectionLost(e)) => Err(e.into()),
            Err(quinn::StoppedError::ZeroRttRejected) => Err(TransportError::Broken),
        }
    }

    /// Gives the stream up; the peer gets [`TransportError::Reset`].
    pub fn abandon(&mut self) {
        if self.state != Sending::Over {
            self.state = Sending::Over;
            // An error means that the stream is over already.
            let _ = self.stream.reset(CloseCode::Abandoned.to_wire());
        }
    }

    /// Bytes of frames sent so far.
    #[must_use]
    pub fn bytes_sent(&self) -> u64 {
        self.bytes.sent()
    }

    pub(crate) fn set_priority(&self, priority: i32) {
        // An error means that the stream is over; its first use will say so.
        let _ = self.stream.set_priority(priority);
    }
}

impl fmt::Debug for FrameSender {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut out = f.debug_struct("FrameSender");
        out.field("seq", &self.seq).field("state", &self.state).finish_non_exhaustive()
    }
}

// Never the buffers: they hold a user's tokens.
impl fmt::Debug for FrameReceiver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut out = f.debug_struct("FrameReceiver");
        out.field("seq", &self.seq).field("state", &self.state).finish_non_exhaustive()
    }
}

impl Drop for FrameSender {
    fn drop(&mut self) {
        self.abandon();
    }
}

#[derive(Debug)]
enum Receiving {
    Header,
    Meta(Header),
    Payload(Header),
    Over,
    Broken,
}

/// Receives frames in order. Holds at most one frame's meta and payload.
pub struct FrameReceiver {
    stream: RecvStream,
    state: Receiving,
    header: [u8; HEADER_BYTES],
    header_len: usize,
    // Kept between frames: metas need no allocation after the first.
    meta: MetaBuf,
    payload: AlignedVec<PAYLOAD_ALIGN>,
    seq: u64,
    bounds: Bounds,
    deadline: Option<Instant>,
    gained: usize,
    transfer: Option<Transfer>,
    bytes: Arc<ChannelBytes>,
}

impl FrameReceiver {
    pub(crate) fn new(stream: RecvStream, bounds: &Bounds, bytes: Arc<ChannelBytes>) -> Self {
        Self {
            stream,
            state: Receiving::Header,
            header: [0; HEADER_BYTES],
            header_len: 0,
            meta: MetaBuf::new(),
            payload: AlignedVec::new(),
            seq: 0,
            bounds: bounds.clone(),
            deadline: None,
            gained: 0,
            transfer: None,
            bytes,
        }
    }

    /// The next frame; `None` after the sender finished cleanly between two frames.
    ///
    /// **Cancel-safe**: what arrived of a frame stays in the receiver, so this may stand in
    /// `select!`. The payload is read once, into memory aligned to [`PAYLOAD_ALIGN`].
    ///
    /// # Errors
    /// [`TransportError::Frame`] for bytes that are no frame or pass a limit,
    /// [`TransportError::Timeout`] if a started frame does not move on,
    /// [`TransportError::Truncated`] or [`TransportError::Reset`] if the sender gave up, else the
    /// link's end. After an error the stream is stopped and every call is
    /// [`TransportError::Broken`].
    pub async fn next(&mut self) -> Result<Option<Frame>, TransportError> {
        let result = self.advance().await;
        if let Err(error) = &result {
            self.state = Receiving::Broken;
            self.transfer = None;
            self.payload = AlignedVec::new();
            let code = match error {
                TransportError::Timeout { .. } => CloseCode::TooSlow,
                _ => CloseCode::Malformed,
            };
            // An error means that there is nothing left to stop.
            let _ = self.stream.stop(code.to_wire());
        }
        result
    }

    /// Bytes of frames received so far, the part of an unfinished one included.
    #[must_use]
    pub fn bytes_received(&self) -> u64 {
        self.bytes.received()
    }

    async fn advance(&mut self) -> Result<Option<Frame>, TransportError> {
        loop {
            let wanted = match &self.state {
                Receiving::Header => HEADER_BYTES - self.header_len,
                Receiving::Meta(header) => header.meta_len - self.meta.len(),
                Receiving::Payload(header) => header.payload_len - self.payload.len(),
                Receiving::Over => return Ok(None),
                Receiving::Broken => return Err(TransportError::Broken),
            };
            if wanted == 0 {
                if let Some(frame) = self.step()? {
                    return Ok(Some(frame));
                }
                continue;
            }
            // The only await: `read_chunk` takes nothing if it is dropped.
            let Some(chunk) = self.read(wanted).await? else {
                if matches!(self.state, Receiving::Header) && self.header_len == 0 {
                    self.state = Receiving::Over;
                    return Ok(None);
                }
                return Err(TransportError::Truncated);
            };
            self.absorb(&chunk);
        }
    }

    async fn read(&mut self, wanted: usize) -> Result<Option<Bytes>, TransportError> {
        let read = self.stream.read_chunk(wanted, true);
        let chunk = match self.deadline {
            None => read.await,
            Some(deadline) => tokio::time::timeout_at(deadline, read).await.map_err(|_| {
                let ms = self.bounds.progress.as_millis() as u64;
                TransportError::Timeout { what: "the progress of a frame", ms }
            })?,
        };
        Ok(chunk?.map(|chunk| chunk.bytes))
    }

    fn absorb(&mut self, chunk: &[u8]) {
        match &self.state {
            Receiving::Header => {
                let end = self.header_len + chunk.len();
                self.header[self.header_len..end].copy_from_slice(chunk);
                self.header_len = end;
            }
            Receiving::Meta(_) => self.meta.extend_from_slice(chunk),
            Receiving::Payload(_) => {
                self.payload.extend_from_slice(chunk);
                if let Some(transfer) = &mut self.transfer {
                    transfer.deliver(chunk.len());
                }
            }
            Receiving::Over | Receiving::Broken => {}
        }
        self.bytes.received.fetch_add(chunk.len() as u64, Ordering::Relaxed);
        self.gained += chunk.len();
        if self.deadline.is_none() || self.gained >= PROGRESS_BYTES_MIN {
            self.gained = 0;
            self.deadline = Some(Instant::now() + self.bounds.progress);
        }
    }

    /// A part is complete: go on to the next, or to the frame.
    fn step(&mut self) -> Result<Option<Frame>, TransportError> {
        match self.state {
            Receiving::Header => {
                let header = Header::parse(&self.header)?;
                let (len, max) = (header.payload_len, self.bounds.receive_payload_max);
                if len > max {
                    let frame = header.frame_type;
                    return Err(FrameError::PayloadTooLarge { frame, len, max }.into());
                }
                if header.seq != self.seq {
                    let (found, expected) = (header.seq, self.seq);
                    return Err(FrameError::OutOfSequence { found, expected }.into());
                }
                self.meta.clear();
                self.meta.reserve(header.meta_len);
                self.state = Receiving::Meta(header);
                Ok(None)
            }
            Receiving::Meta(header) => {
                // Within the payload bound; pages are touched only as bytes arrive.
                self.payload = AlignedVec::with_capacity(header.payload_len);
                if header.payload_len >= TIMED_PAYLOAD_BYTES_MIN {
                    self.transfer = Some(self.bounds.meter.transfer(Direction::Received));
                }
                self.state = Receiving::Payload(header);
                Ok(None)
            }
            Receiving::Payload(header) => {
                self.transfer = None;
                let payload = std::mem::take(&mut self.payload);
                let payload = if payload.is_empty() { Bytes::new() } else { Bytes::from_owner(payload) };
                let frame = frame::decode(&header, &self.meta, payload)?;
                self.state = Receiving::Header;
                self.header_len = 0;
                self.deadline = None;
                self.gained = 0;
                self.seq += 1;
                Ok(Some(frame))
            }
            Receiving::Over | Receiving::Broken => Err(TransportError::Broken),
        }
    }
}

/// Bounds that hold before the peer's HELLO is known.
pub(crate) fn handshake_bounds(progress: Duration, meter: &Arc<Meter>) -> Bounds {
    Bounds {
        send_payload_max: PAYLOAD_BYTES_MAX,
        receive_payload_max: PAYLOAD_BYTES_MAX,
        progress,
        meter: Arc::clone(meter),
    }
}
