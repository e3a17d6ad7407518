//! What is left of a request's body when its answer is known: read and thrown away if it is little,
//! so that the connection serves the next request; otherwise the answer says that it closes.

use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use axum::body::{Body, Bytes, HttpBody};
use axum::extract::Request;
use axum::http::{HeaderValue, header};
use axum::middleware::Next;
use axum::response::Response;
use futures::StreamExt as _;
use http_body::{Frame, SizeHint};

use super::Connection;
use crate::api::BODY_BYTES_MAX;

/// Bytes of an unread body that are read and thrown away: a body that is a little too large is no
/// reason to lose the connection.
const DRAIN_BYTES_MAX: u64 = 2 * BODY_BYTES_MAX as u64;
/// Time that takes at most, milliseconds.
const DRAIN_MS_MAX: u64 = 1000;

/// Tells the connection what it waits for, and leaves it fit for the next request.
pub(super) async fn settle(request: Request, next: Next) -> Response {
    let connection = request.extensions().get::<Arc<Connection>>().cloned();
    let (parts, body) = request.into_parts();
    let left = Arc::new(Mutex::new(Left::Held));
    let expects = parts.headers.contains_key(header::EXPECT);
    let mut sent = Sent { body, polled: false, ended: false, left: Arc::clone(&left), connection: connection.clone() };
    sent.look_for_the_end(false);
    let mut response = next.run(Request::from_parts(parts, Body::new(sent))).await;
    let left = std::mem::replace(&mut *left.lock().unwrap_or_else(PoisonError::into_inner), Left::Held);
    let settled = match left {
        Left::Nothing => true,
        // The client waits for word before it sends the body: the answer is that word.
        Left::Rest { polled: false, .. } if expects => false,
        Left::Rest { body, .. } => drain(body).await,
        Left::Held => false,
    };
    let Some(connection) = connection else { return response };
    if !settled {
        connection.leaves_unread();
    }
    if !settled || connection.is_of_reserve() {
        response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
    }
    connection.is_answering();
    response.map(|body| Body::new(Answer { body, connection }))
}

/// Reads to the end and throws away; false if that is too much or takes too long.
async fn drain(body: Body) -> bool {
    if body.size_hint().lower() > DRAIN_BYTES_MAX {
        return false;
    }
    let read = async {
        let mut bytes = 0;
        let mut pieces = body.into_data_stream();
        while let Some(piece) = pieces.next().await {
            bytes += piece.map_or(DRAIN_BYTES_MAX, |piece| piece.len() as u64);
            if bytes >= DRAIN_BYTES_MAX {
                return false;
            }
        }
        true
    };
    tokio::time::timeout(Duration::from_millis(DRAIN_MS_MAX), read).await.unwrap_or(false)
}

/// What a handler has left of a body.
enum Left {
    /// It still has it.
    Held,
    /// All was read.
    Nothing,
    /// This; `polled` if a part was asked for.
    Rest { body: Body, polled: bool },
}

/// A request's body on loan: what is not read comes back.
struct Sent {
    body: Body,
    polled: bool,
    ended: bool,
    left: Arc<Mutex<Left>>,
    connection: Option<Arc<Connection>>,
}

impl Sent {
    /// A chunked body ends with a frame that is none.
    fn look_for_the_end(&mut self, none: bool) {
        self.ended |= none || self.body.is_end_stream();
        if let Some(connection) = self.connection.as_ref().filter(|_| self.ended) {
            connection.is_answering();
        }
    }
}

impl HttpBody for Sent {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Self::Data>, Self::Error>>> {
        self.polled = true;
        let frame = Pin::new(&mut self.body).poll_frame(cx);
        self.look_for_the_end(matches!(frame, Poll::Ready(None)));
        frame
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

impl Drop for Sent {
    fn drop(&mut self) {
        let body = std::mem::take(&mut self.body);
        let left = if self.ended { Left::Nothing } else { Left::Rest { body, polled: self.polled } };
        *self.left.lock().unwrap_or_else(PoisonError::into_inner) = left;
    }
}

/// A response's body, after which the connection waits for the next request.
struct Answer {
    body: Body,
    connection: Arc<Connection>,
}

impl HttpBody for Answer {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Self::Data>, Self::Error>>> {
        Pin::new(&mut self.body).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

impl Drop for Answer {
    fn drop(&mut self) {
        self.connection.is_waiting();
    }
}
