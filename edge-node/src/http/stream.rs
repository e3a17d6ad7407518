//! A connection's bytes: a client must take what it is sent, and the end of an answer reaches a client that is
//! still sending.

use std::io::{self, IoSlice};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::{Sleep, sleep};

use super::connections::Connection;

/// Time in which a client must take something of what waits for it, seconds.
const TAKE_S_MAX: u64 = 20;
/// Time for which a client that is still sending is listened to after the end, milliseconds. The system
/// resets a connection that is closed with unread bytes, and the client would lose the answer.
const LINGER_MS_MAX: u64 = 1000;
/// Bytes thrown away meanwhile.
const LINGER_BYTES_MAX: usize = 4 << 20;

/// A stream with patience: bounded on both ends.
pub(super) struct Patient<S> {
    inner: S,
    connection: Arc<Connection>,
    /// Runs while a write waits for the client.
    late: Option<Pin<Box<Sleep>>>,
    /// After the own end: until when the client is listened to, and bytes left of it.
    linger: Option<(Pin<Box<Sleep>>, usize)>,
}

impl<S> Patient<S> {
    pub(super) fn new(inner: S, connection: Arc<Connection>) -> Self {
        Self { inner, connection, late: None, linger: None }
    }

    /// An error where the client has taken nothing for too long.
    fn in_time<T>(&mut self, cx: &mut Context<'_>, written: Poll<io::Result<T>>) -> Poll<io::Result<T>> {
        if written.is_ready() {
            self.late = None;
            return written;
        }
        let late = self.late.get_or_insert_with(|| Box::pin(sleep(Duration::from_secs(TAKE_S_MAX))));
        ready!(late.as_mut().poll(cx));
        Poll::Ready(Err(io::Error::new(io::ErrorKind::TimedOut, "the client does not read")))
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Patient<S> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_read(cx, buf)
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncWrite for Patient<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.inner).poll_write(cx, buf);
        self.in_time(cx, written)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.inner).poll_write_vectored(cx, bufs);
        self.in_time(cx, written)
    }

    fn is_write_vectored(&self) -> bool {
        self.inner.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let flushed = Pin::new(&mut self.inner).poll_flush(cx);
        self.in_time(cx, flushed)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = &mut *self;
        if this.linger.is_none() {
            ready!(Pin::new(&mut this.inner).poll_shutdown(cx))?;
            if !this.connection.has_unread() {
                return Poll::Ready(Ok(()));
            }
        }
        let (over, left) = this
            .linger
            .get_or_insert_with(|| (Box::pin(sleep(Duration::from_millis(LINGER_MS_MAX))), LINGER_BYTES_MAX));
        let mut scratch = [0; 8 * 1024];
        while *left > 0 && over.as_mut().poll(cx).is_pending() {
            let mut buf = ReadBuf::new(&mut scratch);
            match ready!(Pin::new(&mut this.inner).poll_read(cx, &mut buf)) {
                Ok(()) if !buf.filled().is_empty() => *left = left.saturating_sub(buf.filled().len()),
                _ => break,
            }
        }
        Poll::Ready(Ok(()))
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, duplex};

    use super::super::connections::Connections;
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_client_must_take_something_now_and_then() {
        let connections = Connections::new(1);
        let seat = connections.enter().expect("room");
        let (ours, mut theirs) = duplex(16);
        let mut ours = Patient::new(ours, Arc::clone(seat.connection()));
        let reader = tokio::spawn(async move {
            for _ in 0..3 {
                sleep(Duration::from_secs(TAKE_S_MAX - 1)).await;
                theirs.read_exact(&mut [0; 16]).await.expect("bytes");
            }
            theirs
        });
        ours.write_all(&[0; 64]).await.expect("a slow client is a client");
        let theirs = reader.await.expect("the reader");
        let error = ours.write_all(&[0; 1]).await.expect_err("nobody reads any more");
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        drop(theirs);
    }
}
