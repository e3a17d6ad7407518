//! The first frames of a link.

use std::time::Duration;

use bytes::Bytes;
use quinn::Connection;
use tandem_proto::{frame::Message, message::Hello};

use super::Side;
use crate::{channel::Channel, error::TransportError};

/// How long the side that finds a misfit leaves the other time to find it too.
const FAREWELL: Duration = Duration::from_millis(500);

/// Client first, so that a server says nothing to a peer that has not authenticated itself.
pub(super) async fn exchange(control: &mut Channel, side: Side, ours: &Hello) -> Result<Hello, TransportError> {
    let ours = Message::Hello(ours.clone());
    match side {
        Side::Client => {
            control.tx.send(&ours, Bytes::new()).await?;
            receive(control).await
        }
        Side::Server => {
            let theirs = receive(control).await?;
            control.tx.send(&ours, Bytes::new()).await?;
            Ok(theirs)
        }
    }
}

async fn receive(control: &mut Channel) -> Result<Hello, TransportError> {
    match control.rx.next().await? {
        Some(frame) => match frame.message {
            Message::Hello(hello) => Ok(hello),
            other => Err(TransportError::Incompatible {
                what: "first frame",
                here: "Hello".into(),
                there: other.frame_type().to_string(),
            }),
        },
        None => Err(TransportError::Truncated),
    }
}

/// The newest minor version both speak, if the schemas are equal.
pub(super) fn check(ours: &Hello, theirs: &Hello) -> Result<u16, TransportError> {
    let minor = ours.minor_max.min(theirs.minor_max);
    if minor < ours.minor_min.max(theirs.minor_min) {
        let range = |hello: &Hello| format!("1.{} to 1.{}", hello.minor_min, hello.minor_max);
        return Err(TransportError::Incompatible { what: "protocol version", here: range(ours), there: range(theirs) });
    }
    if ours.schema != theirs.schema {
        return Err(TransportError::Incompatible {
            what: "message schema",
            here: ours.schema.to_string(),
            there: theirs.schema.to_string(),
        });
    }
    Ok(minor)
}

/// The check is the same on both sides, but a close would overtake our HELLO: the server waits for
/// the client to see it and to close first.
pub(super) async fn let_peer_see(conn: &Connection, side: Side) {
    if side == Side::Server {
        let _ = tokio::time::timeout(FAREWELL, conn.closed()).await;
    }
}
