//! Accepts connections, but never more than a bound at a time.

use std::{
    io,
    pin::Pin,
    sync::{Arc, Mutex, PoisonError},
    task::{Context, Poll},
    time::Duration,
};

use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{TcpListener, TcpStream},
    sync::{OwnedSemaphorePermit, Semaphore, mpsc},
};
use tokio_util::sync::CancellationToken;
use tonic::{
    codegen::tokio_stream::Stream,
    transport::server::{Connected, TcpConnectInfo},
};

use crate::metric_definitions as names;

/// Pause after an accept that failed (out of file descriptors, say), so as not to spin.
const PAUSE: Duration = Duration::from_millis(100);

/// A connection and its place among those allowed.
#[derive(Debug)]
pub(super) struct Bounded {
    stream: TcpStream,
    _place: Place,
}

#[derive(Debug)]
struct Place(#[expect(dead_code, reason = "held, not read")] OwnedSemaphorePermit);

impl Place {
    fn new(permit: OwnedSemaphorePermit) -> Self {
        metrics::gauge!(names::CONNECTIONS).increment(1.0);
        Self(permit)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        metrics::gauge!(names::CONNECTIONS).decrement(1.0);
    }
}

/// A stream of accepted connections; ends with the shutdown, or when another one takes its place.
#[derive(Debug)]
pub(super) struct Incoming(mpsc::Receiver<Bounded>);

/// Hands accepted connections to the server that runs now.
#[derive(Debug)]
pub(super) struct Acceptor(Arc<Mutex<Option<mpsc::Sender<Bounded>>>>);

impl Acceptor {
    /// The connections accepted from now on. What an earlier stream holds stays its own.
    pub(super) fn incoming(&self) -> Incoming {
        let (accepted, incoming) = mpsc::channel(1);
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(accepted);
        Incoming(incoming)
    }
}

/// Hands a connection over; it is dropped only when no server runs any more.
async fn hand_over(to: &Mutex<Option<mpsc::Sender<Bounded>>>, mut connection: Bounded) {
    loop {
        let accepted = to.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let Some(accepted) = accepted else { return };
        match accepted.send(connection).await {
            Ok(()) => return,
            // Another one serves by now, or soon will.
            Err(mpsc::error::SendError(back)) => connection = back,
        }
        tokio::task::yield_now().await;
    }
}

impl Stream for Incoming {
    type Item = io::Result<Bounded>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.0.poll_recv(cx).map(|next| next.map(Ok))
    }
}

/// Accepts from `listener`, at most `max` connections at a time, until `shutdown`.
pub(super) fn bounded(listener: TcpListener, max: usize, shutdown: CancellationToken) -> Acceptor {
    let current = Arc::new(Mutex::new(None));
    let to = Arc::clone(&current);
    tokio::spawn(async move {
        let accepting = async {
            let places = Arc::new(Semaphore::new(max));
            while let Ok(permit) = Arc::clone(&places).acquire_owned().await {
                match listener.accept().await {
                    Ok((stream, _)) => {
                        // Small messages that wait for answers: never hold them back.
                        if let Err(error) = stream.set_nodelay(true) {
                            tracing::debug!(%error, "nodelay");
                        }
                        hand_over(&to, Bounded { stream, _place: Place::new(permit) }).await;
                    }
                    Err(error) => {
                        tracing::warn!(%error, "accept");
                        tokio::time::sleep(PAUSE).await;
                    }
                }
            }
        };
        tokio::select! {
            () = accepting => {}
            () = shutdown.cancelled() => {}
        }
        *to.lock().unwrap_or_else(PoisonError::into_inner) = None;
    });
    Acceptor(current)
}

impl Connected for Bounded {
    type ConnectInfo = TcpConnectInfo;

    fn connect_info(&self) -> TcpConnectInfo {
        self.stream.connect_info()
    }
}

impl AsyncRead for Bounded {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl AsyncWrite for Bounded {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests;
