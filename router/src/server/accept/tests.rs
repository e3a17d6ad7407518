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
    let acceptor = bounded(listener, 2, shutdown.clone());
    let mut incoming = acceptor.incoming();
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

#[tokio::test]
async fn a_new_stream_takes_over_and_loses_no_connection() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let acceptor = bounded(listener, 8, CancellationToken::new());
    let mut first = acceptor.incoming();
    let _one = TcpStream::connect(address).await.unwrap();
    next(&mut first).await.unwrap();
    let mut second = acceptor.incoming();
    // Whatever was on its way to the first one is still delivered there, or goes to the second.
    let _two = TcpStream::connect(address).await.unwrap();
    let taken = tokio::select! {
        taken = next(&mut second) => taken,
        taken = next(&mut first) => match taken {
            Some(taken) => Some(taken),
            None => next(&mut second).await,
        },
    };
    assert!(taken.is_some());
    drop(first);
    let _three = TcpStream::connect(address).await.unwrap();
    assert!(next(&mut second).await.is_some());
}
