//! Over real sockets.

use std::sync::atomic::{AtomicBool, Ordering};

use axum::body::Bytes;
use axum::routing::{get, post};
use futures::stream::unfold;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use super::*;
use crate::api::BODY_BYTES_MAX;

/// A server with a path that reads its body, one that does not, and one whose answer has no end.
struct Bed {
    address: std::net::SocketAddr,
    shutdown: CancellationToken,
    serving: tokio::task::JoinHandle<()>,
    /// Set when the reader of the endless answer is gone.
    dropped: Arc<AtomicBool>,
}

struct SetOnDrop(Arc<AtomicBool>);

impl Drop for SetOnDrop {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

async fn bed(connections_max: usize) -> Bed {
    let dropped = Arc::new(AtomicBool::new(false));
    let flag = Arc::clone(&dropped);
    let endless = get(|| async move {
        let piece = |flag| async move { Some((Ok::<_, io::Error>(Bytes::from_static(&[b'x'; 4096])), flag)) };
        Body::from_stream(unfold(SetOnDrop(flag), piece))
    });
    let routes = Router::new()
        .route("/read", post(|body: String| async move { body.len().to_string() }))
        .route("/unread", post(|| async { "not read" }))
        .route("/endless", endless);
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let shutdown = CancellationToken::new();
    let serving = tokio::spawn(serve(listener, routes, connections_max, shutdown.clone()));
    Bed { address, shutdown, serving, dropped }
}

/// A client on a connection that it keeps.
struct Client(TcpStream);

impl Client {
    async fn of(bed: &Bed) -> Self {
        Self(TcpStream::connect(bed.address).await.unwrap())
    }

    async fn say(&mut self, text: &str) {
        self.0.write_all(text.as_bytes()).await.unwrap();
    }

    /// Status, whether the connection closes, and body of the next response.
    async fn hear(&mut self) -> (u16, bool, String) {
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            head.push(self.0.read_u8().await.expect("a response"));
        }
        let head = String::from_utf8(head).unwrap().to_ascii_lowercase();
        let field = |name: &str| head.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(": "));
        let mut body = vec![0; field("content-length").unwrap().parse().unwrap()];
        self.0.read_exact(&mut body).await.unwrap();
        let status = head.split(' ').nth(1).unwrap().parse().unwrap();
        (status, field("connection") == Some("close"), String::from_utf8(body).unwrap())
    }

    async fn post(&mut self, path: &str, bytes: usize) {
        self.say(&format!("POST {path} HTTP/1.1\r\nhost: x\r\ncontent-length: {bytes}\r\n\r\n")).await;
        // A server that has heard enough resets the connection.
        let _ = self.0.write_all(&vec![b'x'; bytes]).await;
    }

    /// True once the server has closed the connection.
    async fn is_closed(&mut self) -> bool {
        matches!(self.0.read_u8().await, Err(error) if error.kind() != io::ErrorKind::WouldBlock)
    }
}

#[tokio::test]
async fn a_connection_serves_the_next_request_whatever_became_of_the_body() {
    let bed = bed(8).await;
    for path in ["/unread", "/nowhere", "/endless"] {
        for bytes in [0, 3, 20_000, 200_000, BODY_BYTES_MAX + 300_000] {
            let mut client = Client::of(&bed).await;
            client.post(path, bytes).await;
            let (_, closes, _) = client.hear().await;
            assert!(!closes, "{path} {bytes}");
            client.post("/read", 5).await;
            assert_eq!(client.hear().await, (200, false, "5".to_owned()), "{path} {bytes}");
        }
    }
    // Chunked, without a `content-length`.
    let mut client = Client::of(&bed).await;
    client.say("POST /unread HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n").await;
    assert_eq!(client.hear().await, (200, false, "not read".to_owned()));
    client.post("/read", 7).await;
    assert_eq!(client.hear().await.2, "7");
}

#[tokio::test]
async fn an_answer_that_closes_the_connection_says_so_and_is_heard() {
    let bed = bed(8).await;
    let mut client = Client::of(&bed).await;
    client.say("POST /unread HTTP/1.1\r\nhost: x\r\ncontent-length: 900000000\r\n\r\n").await;
    let _ = client.0.write_all(&vec![b'x'; 2_000_000]).await;
    assert_eq!(client.hear().await, (200, true, "not read".to_owned()));
    let mut client = Client::of(&bed).await;
    client.say("POST /unread HTTP/1.1\r\nhost: x\r\nexpect: 100-continue\r\ncontent-length: 9\r\n\r\n").await;
    assert_eq!(client.hear().await, (200, true, "not read".to_owned()), "no `100 Continue` comes before");
    // A body that does not come.
    let mut client = Client::of(&bed).await;
    client.say("POST /unread HTTP/1.1\r\nhost: x\r\ncontent-length: 9\r\n\r\nabc").await;
    assert_eq!(client.hear().await, (200, true, "not read".to_owned()));
}

#[tokio::test]
async fn idle_clients_and_slow_ones_lock_nobody_out() {
    let bed = bed(4).await;
    let mut kept = Client::of(&bed).await;
    kept.post("/read", 1).await;
    assert_eq!(kept.hear().await.0, 200);
    let mut silent = Vec::new();
    for head in ["", "POST /read HT", "POST /read HTTP/1.1\r\nhost: x\r\ncontent-length: 9\r\n\r\nabc"].repeat(7) {
        let mut client = Client::of(&bed).await;
        client.say(head).await;
        silent.push(client);
        let mut client = Client::of(&bed).await;
        client.post("/read", 2).await;
        assert_eq!(client.hear().await, (200, false, "2".to_owned()));
    }
    // The first ones had to go, one that was between two requests among them.
    assert!(silent[0].is_closed().await && silent[1].is_closed().await && silent[2].is_closed().await);
    assert!(kept.is_closed().await);
}

#[tokio::test(start_paused = true)]
async fn a_client_that_does_not_read_is_left() {
    let bed = bed(4).await;
    let mut client = Client::of(&bed).await;
    client.say("GET /endless HTTP/1.1\r\nhost: x\r\n\r\n").await;
    let begun = tokio::time::Instant::now();
    while !bed.dropped.load(Ordering::SeqCst) {
        assert!(begun.elapsed() < Duration::from_secs(3600), "the answer still waits for its client");
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
    drop(client);
    bed.shutdown.cancel();
    bed.serving.await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_head_that_does_not_come_ends_the_connection() {
    let bed = bed(4).await;
    let mut client = Client::of(&bed).await;
    client.say("GET /endless HTT").await;
    assert!(client.is_closed().await);
    bed.shutdown.cancel();
    bed.serving.await.unwrap();
}
