use std::future::poll_fn;

use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::*;

async fn next(incoming: &mut Incoming) -> Option<Bounded> {
    poll_fn(|cx| Pin::new(&mut *incoming).poll_next(cx)).await.map(Result::unwrap)
}

#[tokio::test]
async fn one_more_connection_waits_until_another_ends() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let shutdown = CancellationToken::new();
    let mut incoming = bounded(listener, 2, shutdown.clone());
    let mut clients = Vec::new();
    for _ in 0..3 {
        clients.push(TcpStream::connect(address).await.unwrap());
    }
    let (first, second) = (next(&mut incoming).await.unwrap(), next(&mut incoming).await.unwrap());
    let third = tokio::time::timeout(Duration::from_millis(50), next(&mut incoming)).await;
    assert!(third.is_err(), "a third connection was taken");
    drop(first);
    let mut third = next(&mut incoming).await.unwrap();
    // And it is the third client's.
    clients[2].write_all(b"hi").await.unwrap();
    let mut text = [0; 2];
    third.read_exact(&mut text).await.unwrap();
    assert_eq!(&text, b"hi");
    shutdown.cancel();
    assert!(next(&mut incoming).await.is_none());
    drop(second);
}
