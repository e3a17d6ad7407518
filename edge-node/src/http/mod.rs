//! The HTTP server: connections within bounds of number and time.
//!
//! A connection that has not sent a whole request can be closed for one that has just come, so
//! that idle or slow clients keep no other client out; one whose requests are being answered stays. Where all
//! are being answered, a few more are let in for `/health` and `/ready` alone.

mod connections;
mod rest;
mod stream;

use std::io;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::middleware::from_fn;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::{TcpListener, TcpStream};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tower::Service as _;

pub(crate) use connections::Connection;
use connections::{Connections, Seat};
use stream::Patient;

/// Connections that a server holds at most, unless set.
pub const CONNECTIONS_MAX: usize = 512;
/// Time for a request's head to arrive, which is also how long a connection may be idle, seconds.
const HEAD_S_MAX: u64 = 30;
/// Bytes of a connection's buffers, and longest head of a request.
const BUFFER_BYTES_MAX: usize = 64 * 1024;
/// Idle connections that are closed when the process has no file handle left.
const HANDLES_FREED: usize = 16;
/// Pause before the next attempt to accept when there is no handle, milliseconds.
const ACCEPT_PAUSE_MS: u64 = 20;

/// Serves `routes` until `shutdown`; returns when the requests under way have been answered.
pub async fn serve(listener: TcpListener, routes: Router, connections_max: usize, shutdown: CancellationToken) {
    let routes = routes.layer(from_fn(rest::settle));
    let connections = Connections::new(connections_max);
    let tasks = TaskTracker::new();
    loop {
        let accepted = tokio::select! {
            () = shutdown.cancelled() => break,
            accepted = listener.accept() => accepted,
        };
        match accepted {
            Ok((stream, _)) => {
                if let Some(seat) = connections.enter() {
                    tasks.spawn(converse(stream, seat, routes.clone(), shutdown.clone()));
                }
            }
            Err(error) if is_the_peers(&error) => {}
            Err(error) => {
                tracing::warn!(%error, "a connection could not be accepted");
                connections.evict(HANDLES_FREED);
                tokio::time::sleep(Duration::from_millis(ACCEPT_PAUSE_MS)).await;
            }
        }
    }
    drop(listener);
    tasks.close();
    tasks.wait().await;
}

/// Errors that say something of one connection only.
fn is_the_peers(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionAborted, ConnectionRefused, ConnectionReset};
    matches!(error.kind(), ConnectionAborted | ConnectionRefused | ConnectionReset)
}

/// Serves one connection to its end.
async fn converse(stream: TcpStream, seat: Seat, routes: Router, shutdown: CancellationToken) {
    // Each token goes out when it is there.
    let _ = stream.set_nodelay(true);
    let connection = Arc::clone(seat.connection());
    let answer = service_fn(|mut request: hyper::Request<Incoming>| {
        request.extensions_mut().insert(Arc::clone(&connection));
        let mut routes = routes.clone();
        async move { routes.call(request.map(Body::new)).await }
    });
    let mut http = http1::Builder::new();
    http.timer(TokioTimer::new()).header_read_timeout(Duration::from_secs(HEAD_S_MAX)).max_buf_size(BUFFER_BYTES_MAX);
    let io = TokioIo::new(Patient::new(stream, Arc::clone(&connection)));
    let mut serving = pin!(http.serve_connection(io, answer));
    let mut ending = false;
    loop {
        tokio::select! {
            served = serving.as_mut() => {
                if let Err(error) = served {
                    tracing::debug!(%error, "a connection has ended early");
                }
                return;
            }
            () = connection.evicted() => return,
            () = shutdown.cancelled(), if !ending => {
                serving.as_mut().graceful_shutdown();
                ending = true;
            }
        }
    }
}

#[cfg(test)]
mod tests;
