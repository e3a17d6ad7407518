//! Peers with a valid certificate that send anything but proper frames.

use std::time::Duration;

use bytes::Bytes;
use tandem_proto::{
    frame::{Frame, FrameError, FrameType, encode},
    limits::HEADER_BYTES,
};
use tandem_transport::{CloseCode, Link, Server, Settings, TransportError};

use crate::{
    handshake::{raw_connect, tls_client},
    setup::{Bed, block, dial, hello, pattern, token, within},
};

fn wire(seq: u64, message: tandem_proto::frame::Message, payload: Bytes) -> Vec<u8> {
    let (head, payload) = encode(&Frame { seq, message, payload }).unwrap();
    [&head[..], &payload[..]].concat()
}

struct Raw {
    bed: Bed,
    server: Server,
    link: Link,
    conn: quinn::Connection,
    // The endpoint and the control stream live as long as the connection.
    _endpoint: quinn::Endpoint,
    _control: (quinn::SendStream, quinn::RecvStream),
}

/// A connection that has said HELLO properly, on bare quinn.
async fn raw(settings: Settings) -> Raw {
    let bed = Bed::new();
    let server = bed.server(settings);
    let (endpoint, conn) = raw_connect(&server, tls_client(&bed, Some(&bed))).await.unwrap();
    let mut control = conn.open_bi().await.unwrap();
    control.0.write_all(&wire(0, hello("raw").into(), Bytes::new())).await.unwrap();
    let link = within(server.accept()).await.unwrap();
    Raw { bed, server, link, conn, _endpoint: endpoint, _control: control }
}

#[tokio::test]
async fn every_malformed_session_frame_is_its_typed_error() {
    let raw = raw(Settings::dev()).await;
    let good = wire(0, token(1), Bytes::new());
    let edited = |edit: &dyn Fn(&mut Vec<u8>)| {
        let mut bytes = good.clone();
        edit(&mut bytes);
        bytes
    };
    type Case = (&'static str, Vec<u8>, fn(&FrameError) -> bool);
    let cases: Vec<Case> = vec![
        ("magic", edited(&|b| b[0] ^= 1), |e| matches!(e, FrameError::BadMagic(_))),
        ("version", edited(&|b| b[4] = 77), |e| matches!(e, FrameError::UnknownVersion(77))),
        ("type", edited(&|b| b[5] = 99), |e| matches!(e, FrameError::UnknownType(99))),
        ("flags", edited(&|b| b[6] = 1), |e| matches!(e, FrameError::UnknownFlags(1))),
        ("meta length", edited(&|b| b[8..12].fill(0xff)), |e| matches!(e, FrameError::MetaTooLarge { .. })),
        ("payload of a token", edited(&|b| b[12] = 1), |e| matches!(e, FrameError::PayloadTooLarge { max: 0, .. })),
        (
            "payload length",
            edited(&|b| {
                b[5] = FrameType::Draft as u8;
                b[12..16].fill(0xff);
            }),
            |e| matches!(e, FrameError::PayloadTooLarge { .. }),
        ),
        ("sequence", wire(5, token(1), Bytes::new()), |e| {
            matches!(e, FrameError::OutOfSequence { found: 5, expected: 0 })
        }),
        ("meta", edited(&|b| b[HEADER_BYTES + 3] ^= 1), |e| matches!(e, FrameError::BadChecksum { .. })),
        ("http", b"GET / HTTP/1.1\r\nHost: a\r\nAccept: */*\r\n\r\n".to_vec(), |e| {
            matches!(e, FrameError::BadMagic(_))
        }),
    ];
    for (name, bytes, expected) in cases {
        let (mut send, _recv) = raw.conn.open_bi().await.unwrap();
        send.write_all(&bytes).await.unwrap();
        let mut session = within(raw.link.accept_session()).await.unwrap();
        match within(session.rx.next()).await {
            Err(TransportError::Frame(e)) if expected(&e) => {}
            other => panic!("{name}: {other:?}"),
        }
        // The stream is stopped, so the peer learns.
        assert_eq!(within(send.stopped()).await.unwrap(), Some((CloseCode::Malformed as u32).into()));
    }
    assert!(!raw.link.is_closed(), "malformed sessions do not take the link with them");
    dial(&raw.server, &raw.bed.connector(Settings::dev())).await.unwrap();
}

#[tokio::test]
async fn an_early_end_is_truncated_wherever_it_falls() {
    let raw = raw(Settings::dev()).await;
    let payload = pattern(5_000, 1);
    let good = wire(0, block(1, &payload), payload);
    for cut in [1, HEADER_BYTES - 1, HEADER_BYTES, HEADER_BYTES + 1, 1_000, good.len() - 1] {
        let (mut send, _recv) = raw.conn.open_bi().await.unwrap();
        send.write_all(&good[..cut]).await.unwrap();
        send.finish().unwrap();
        let mut session = within(raw.link.accept_session()).await.unwrap();
        let end = within(session.rx.next()).await;
        assert!(matches!(end, Err(TransportError::Truncated)), "cut at {cut}: {end:?}");
    }
}

#[tokio::test]
async fn a_frame_that_does_not_move_on_times_out() {
    let settings = Settings { frame_progress: Duration::from_millis(300), ..Settings::dev() };
    let raw = raw(settings).await;
    let good = wire(0, token(1), Bytes::new());
    let (mut send, _recv) = raw.conn.open_bi().await.unwrap();
    send.write_all(&good[..40]).await.unwrap();
    let mut session = within(raw.link.accept_session()).await.unwrap();
    let end = within(session.rx.next()).await;
    assert!(matches!(end, Err(TransportError::Timeout { ms: 300, .. })), "{end:?}");
    // Between frames, silence is fine.
    let (mut send, _recv2) = raw.conn.open_bi().await.unwrap();
    send.write_all(&good).await.unwrap();
    let mut session = within(raw.link.accept_session()).await.unwrap();
    within(session.rx.next()).await.unwrap().unwrap();
    let quiet = tokio::time::timeout(Duration::from_millis(600), session.rx.next()).await;
    assert!(quiet.is_err(), "{quiet:?}");
}

#[tokio::test]
async fn garbage_on_a_bulk_stream_closes_the_link() {
    let raw = raw(Settings::dev()).await;
    let mut stream = raw.conn.open_uni().await.unwrap();
    stream.write_all(&pattern(4_000, 9)).await.unwrap();
    stream.finish().unwrap();
    let end: TransportError = within(raw.conn.closed()).await.into();
    assert!(matches!(end, TransportError::Closed { code: CloseCode::Malformed, .. }), "{end}");
    assert!(within(raw.link.accept_bulk()).await.is_none());
}

#[tokio::test]
async fn a_bulk_transfer_given_up_is_dropped_silently() {
    let raw = raw(Settings::dev()).await;
    let payload = pattern(50_000, 1);
    let good = wire(0, block(1, &payload), payload);
    let mut stream = raw.conn.open_uni().await.unwrap();
    stream.write_all(&good[..20_000]).await.unwrap();
    stream.finish().unwrap();
    let mut stream = raw.conn.open_uni().await.unwrap();
    stream.write_all(&good[..20_000]).await.unwrap();
    stream.reset(1u32.into()).unwrap();
    let mut stream = raw.conn.open_uni().await.unwrap();
    stream.write_all(&good).await.unwrap();
    stream.finish().unwrap();
    let frame = within(raw.link.accept_bulk()).await.unwrap();
    assert_eq!(frame.payload.len(), 50_000);
    assert!(!raw.link.is_closed());
}

#[tokio::test]
async fn a_client_that_says_nothing_or_nonsense_instead_of_hello_is_dropped() {
    let settings = Settings { handshake: Duration::from_millis(700), ..Settings::dev() };
    let bed = Bed::new();
    let server = bed.server(settings);
    let (_endpoint, silent) = raw_connect(&server, tls_client(&bed, Some(&bed))).await.unwrap();
    let end: TransportError = within(silent.closed()).await.into();
    assert!(matches!(end, TransportError::Closed { code: CloseCode::TooSlow, .. }), "{end}");

    let (_endpoint, noisy) = raw_connect(&server, tls_client(&bed, Some(&bed))).await.unwrap();
    let mut control = noisy.open_bi().await.unwrap();
    control.0.write_all(&pattern(100, 1)).await.unwrap();
    let end: TransportError = within(noisy.closed()).await.into();
    assert!(matches!(end, TransportError::Closed { code: CloseCode::Malformed, .. }), "{end}");

    let (_endpoint, early) = raw_connect(&server, tls_client(&bed, Some(&bed))).await.unwrap();
    let mut control = early.open_bi().await.unwrap();
    control.0.write_all(&wire(0, token(1), Bytes::new())).await.unwrap();
    let end: TransportError = within(early.closed()).await.into();
    assert!(matches!(end, TransportError::Incompatible { .. }), "{end}");
    while server.connections() > 0 {
        tokio::task::yield_now().await;
    }
}
