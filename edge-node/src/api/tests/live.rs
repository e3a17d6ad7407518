//! Over a real socket: a client that goes away stops the work.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio_util::sync::CancellationToken;

use super::replay::Replay;
use super::*;
use crate::http;

/// Longest wait for what must happen; reached only on failure.
const PATIENCE: Duration = Duration::from_secs(20);

async fn served(replay: &Arc<Replay>) -> TcpStream {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addr = listener.local_addr().unwrap();
    let app = app(replay);
    tokio::spawn(http::serve(listener, app, http::CONNECTIONS_MAX, CancellationToken::new()));
    TcpStream::connect(addr).await.unwrap()
}

async fn ask(stream: &mut TcpStream, body: &serde_json::Value) {
    let body = body.to_string();
    let head = format!(
        "POST {CHAT} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n",
        body.len()
    );
    stream.write_all(head.as_bytes()).await.unwrap();
    stream.write_all(body.as_bytes()).await.unwrap();
}

async fn until(what: &str, reached: impl Fn() -> bool) {
    let wait = async {
        while !reached() {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    };
    tokio::time::timeout(PATIENCE, wait).await.unwrap_or_else(|_| panic!("{what} did not happen"));
}

fn slow() -> Arc<Replay> {
    let mut replay = Replay::of(&"many words that take long ".repeat(20));
    replay.pause = Duration::from_millis(5);
    Arc::new(replay)
}

#[tokio::test]
async fn a_client_that_leaves_a_stream_stops_every_choice() {
    let replay = slow();
    let mut stream = served(&replay).await;
    ask(&mut stream, &chat(&json!({ "stream": true, "n": 3 }))).await;
    let mut seen = Vec::new();
    while !String::from_utf8_lossy(&seen).contains("many") {
        assert_ne!(stream.read_buf(&mut seen).await.unwrap(), 0);
    }
    assert_eq!(replay.abandoned.load(Ordering::SeqCst), 0);
    drop(stream);
    until("the end of three answers", || replay.abandoned.load(Ordering::SeqCst) == 3).await;
}

#[tokio::test]
async fn a_client_that_does_not_wait_for_a_whole_answer_stops_it() {
    let replay = slow();
    let mut stream = served(&replay).await;
    ask(&mut stream, &chat(&json!({}))).await;
    until("the request", || !replay.requests.lock().unwrap().is_empty()).await;
    drop(stream);
    until("the end of the answer", || replay.abandoned.load(Ordering::SeqCst) == 1).await;
}
