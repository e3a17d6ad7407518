//! Frames on session streams and bulk streams.

use std::{collections::HashSet, time::Duration};

use bytes::Bytes;
use tandem_proto::{
    frame::{FrameError, Message},
    limits::{PAYLOAD_ALIGN, PAYLOAD_BYTES_MAX},
};
use tandem_transport::{Connector, Settings, TransportError};

use crate::setup::{Bed, block, dial, hello, pair, pattern, token, within};

#[tokio::test]
async fn frames_arrive_in_order_with_aligned_payloads() {
    let pair = pair(Settings::dev(), Settings::dev()).await;
    let mut edge = within(pair.edge.open_session()).await.unwrap();
    let bytes = edge.bytes();
    let payloads: Vec<_> = [0, 1, 63, 64, 65, 5_000, PAYLOAD_BYTES_MAX].map(|len| pattern(len, 1)).into();
    let sent = payloads.clone();
    let sending = tokio::spawn(async move {
        for (i, payload) in sent.into_iter().enumerate() {
            edge.tx.send(&token(i as u32), Bytes::new()).await.unwrap();
            edge.tx.send(&block(i as u32, &payload), payload).await.unwrap();
        }
        edge.tx.finish().unwrap();
        edge
    });
    let mut cloud = within(pair.cloud.accept_session()).await.unwrap();
    for (i, payload) in payloads.iter().enumerate() {
        let frame = within(cloud.rx.next()).await.unwrap().unwrap();
        assert_eq!((frame.seq, &frame.message), (2 * i as u64, &token(i as u32)));
        let frame = within(cloud.rx.next()).await.unwrap().unwrap();
        assert_eq!(frame.message, block(i as u32, payload));
        assert!(frame.payload == *payload, "payload {i} differs");
        assert!(payload.is_empty() || frame.payload.as_ptr().addr().is_multiple_of(PAYLOAD_ALIGN));
    }
    assert!(within(cloud.rx.next()).await.unwrap().is_none());
    assert!(within(cloud.rx.next()).await.unwrap().is_none(), "the end stays the end");
    let edge = sending.await.unwrap();
    let payload_bytes: usize = payloads.iter().map(Bytes::len).sum();
    assert_eq!(bytes.sent(), cloud.bytes().received());
    assert!(bytes.sent() > payload_bytes as u64);
    drop(edge);
    // 8 MiB are enough for an estimate.
    assert!(pair.cloud.stats().receive_bytes_per_s.is_some());
}

#[tokio::test]
async fn a_dropped_sender_is_not_a_clean_end() {
    let pair = pair(Settings::dev(), Settings::dev()).await;
    let mut edge = pair.edge.open_session().await.unwrap();
    edge.tx.send(&token(0), Bytes::new()).await.unwrap();
    let mut cloud = within(pair.cloud.accept_session()).await.unwrap();
    within(cloud.rx.next()).await.unwrap().unwrap();
    drop(edge);
    assert!(matches!(within(cloud.rx.next()).await, Err(TransportError::Reset(_))));
    assert!(matches!(within(cloud.rx.next()).await, Err(TransportError::Broken)));
    // And the receiver's end reaches the sender's other half.
    drop(cloud);
    assert!(!pair.edge.is_closed(), "a broken stream does not break the link");
}

#[tokio::test]
async fn a_message_past_a_limit_is_not_sent_and_breaks_nothing() {
    let pair = pair(Settings::dev(), Settings::dev()).await;
    let mut edge = pair.edge.open_session().await.unwrap();
    let error = edge.tx.send(&token(0), pattern(1, 1)).await.unwrap_err();
    assert!(matches!(error, TransportError::Frame(FrameError::PayloadTooLarge { max: 0, .. })));
    edge.tx.send(&token(1), Bytes::new()).await.unwrap();
    let mut cloud = within(pair.cloud.accept_session()).await.unwrap();
    assert_eq!(within(cloud.rx.next()).await.unwrap().unwrap().message, token(1));
}

#[tokio::test]
async fn the_smaller_payload_bound_of_the_two_holds() {
    let bed = Bed::new();
    let server = bed.server(Settings::dev());
    let mut small = hello("phone");
    small.payload_bytes_max = 1_000;
    let connector = Connector::new(&bed.edge, Settings::dev(), small).unwrap();
    let (edge, cloud) = dial(&server, &connector).await.unwrap();
    let payload = pattern(1_001, 1);
    let error = within(cloud.send_bulk(&block(0, &payload), payload)).await.unwrap_err();
    let too_large = |e| matches!(e, TransportError::Frame(FrameError::PayloadTooLarge { len: 1_001, max: 1_000, .. }));
    assert!(too_large(error));
    let payload = pattern(1_000, 1);
    within(cloud.send_bulk(&block(0, &payload), payload)).await.unwrap();
    assert_eq!(within(edge.accept_bulk()).await.unwrap().payload.len(), 1_000);
}

/// The receiver is polled and dropped at every kind of moment while frames trickle in byte by byte;
/// nothing may be lost, doubled or torn.
#[tokio::test]
async fn receiving_is_cancel_safe() {
    let seed = fastrand::u64(..);
    println!("seed {seed}");
    let pair = pair(Settings::dev(), Settings::dev()).await;
    let mut edge = pair.edge.open_session().await.unwrap();
    const FRAMES: u32 = 200;
    let payload = pattern(3_000, seed);
    let sent = payload.clone();
    let sending = tokio::spawn(async move {
        for i in 0..FRAMES {
            edge.tx.send(&block(i, &sent), sent.clone()).await.unwrap();
            tokio::task::yield_now().await;
        }
        edge.tx.finish().unwrap();
        edge
    });
    let mut cloud = within(pair.cloud.accept_session()).await.unwrap();
    let mut rng = fastrand::Rng::with_seed(seed);
    let (mut got, mut dropped) = (0, 0);
    within(async {
        loop {
            let patience = Duration::from_micros(rng.u64(0..40));
            let next = tokio::select! {
                biased;
                () = tokio::time::sleep(patience), if rng.bool() => None,
                () = std::future::ready(()), if rng.u8(..) < 64 => None,
                frame = cloud.rx.next() => Some(frame.unwrap()),
            };
            match next {
                None => dropped += 1,
                Some(None) => break,
                Some(Some(frame)) => {
                    assert_eq!(frame.message, block(got, &payload));
                    assert!(frame.payload == payload);
                    got += 1;
                }
            }
        }
    })
    .await;
    assert_eq!(got, FRAMES);
    assert!(dropped > 0, "the test never cancelled a receive");
    sending.await.unwrap();
}

#[tokio::test]
async fn a_send_dropped_half_way_breaks_the_channel_and_says_so() {
    let pair = pair(Settings::dev(), Settings::dev()).await;
    let mut edge = pair.edge.open_session().await.unwrap();
    let payload = pattern(PAYLOAD_BYTES_MAX, 1);
    let message = block(0, &payload);
    // Nobody reads: flow control stops the write in the middle.
    let cancelled = tokio::time::timeout(Duration::from_millis(200), edge.tx.send(&message, payload));
    assert!(cancelled.await.is_err());
    assert!(matches!(edge.tx.send(&token(0), Bytes::new()).await, Err(TransportError::Broken)));
    assert!(matches!(edge.tx.finish(), Err(TransportError::Broken)));
    drop(edge);
    let mut cloud = within(pair.cloud.accept_session()).await.unwrap();
    assert!(matches!(within(cloud.rx.next()).await, Err(TransportError::Reset(_))));
}

#[tokio::test]
async fn bulk_frames_all_arrive_while_a_session_goes_on() {
    let pair = pair(Settings::dev(), Settings::dev()).await;
    const BLOCKS: u32 = 40;
    let link = pair.edge.clone();
    let sending = tokio::spawn(async move {
        for i in 0..BLOCKS {
            let payload = pattern(300_000, i.into());
            link.send_bulk(&block(i, &payload), payload).await.unwrap();
        }
    });
    let link = pair.cloud.clone();
    let receiving = tokio::spawn(async move {
        let mut seen = HashSet::new();
        while seen.len() < BLOCKS as usize {
            let frame = link.accept_bulk().await.unwrap();
            let Message::KvBlock(block) = frame.message else { panic!("not a block") };
            assert!(frame.payload == pattern(300_000, block.index.into()));
            assert!(seen.insert(block.index), "block {} twice", block.index);
        }
    });
    let mut edge = pair.edge.open_session().await.unwrap();
    edge.tx.send(&token(0), Bytes::new()).await.unwrap();
    let mut cloud = within(pair.cloud.accept_session()).await.unwrap();
    for i in 0..50 {
        within(cloud.rx.next()).await.unwrap().unwrap();
        cloud.tx.send(&token(i), Bytes::new()).await.unwrap();
        assert_eq!(within(edge.rx.next()).await.unwrap().unwrap().message, token(i));
        edge.tx.send(&token(i), Bytes::new()).await.unwrap();
    }
    within(sending).await.unwrap();
    within(receiving).await.unwrap();
    assert!(pair.cloud.stats().receive_bytes_per_s.is_some());
}

#[tokio::test]
async fn nobody_reading_bulk_stops_the_sender_not_the_memory() {
    let pair = pair(Settings::dev(), Settings::dev()).await;
    let mut accepted = 0;
    loop {
        let payload = pattern(1 << 20, 1);
        let message = block(0, &payload);
        let send = pair.edge.send_bulk(&message, payload);
        match tokio::time::timeout(Duration::from_millis(500), send).await {
            Ok(sent) => sent.unwrap(),
            Err(_) => break,
        }
        accepted += 1;
        // Queue, readers and slots: all bounded, so this ends.
        assert!(accepted < 64, "{accepted} MiB were taken with nobody reading");
    }
    // Sessions still work.
    let mut edge = pair.edge.open_session().await.unwrap();
    edge.tx.send(&token(3), Bytes::new()).await.unwrap();
    let mut cloud = within(pair.cloud.accept_session()).await.unwrap();
    assert_eq!(within(cloud.rx.next()).await.unwrap().unwrap().message, token(3));
}
