use std::time::Duration;

use axum::Router;
use axum::routing::get;
use tokio::io::AsyncWriteExt as _;
use tokio::net::TcpStream;
use tokio::time::Instant;

use crate::server::{exchange, read_all, read_head, start};

fn routes() -> Router {
    Router::new().route("/", get(|| async {}))
}

#[tokio::test(start_paused = true)]
async fn a_slow_head_is_cut_off() {
    let running = start(routes()).await;
    let begun = Instant::now();
    assert_eq!(exchange(running.address, b"GET / HTTP/1.1\r\nhost:").await, "");
    assert!((Duration::from_secs(9)..Duration::from_secs(12)).contains(&begun.elapsed()));
}

#[tokio::test(start_paused = true)]
async fn a_connection_that_says_nothing_is_closed() {
    let running = start(routes()).await;
    assert_eq!(exchange(running.address, b"").await, "");
}

#[tokio::test]
async fn one_connection_serves_many_requests() {
    let running = start(routes()).await;
    let mut stream = TcpStream::connect(running.address).await.unwrap();
    for _ in 0..3 {
        stream.write_all(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n").await.unwrap();
        assert!(read_head(&mut stream).await.starts_with("HTTP/1.1 200"));
    }
    stream.write_all(b"GET / HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").await.unwrap();
    assert!(read_all(stream).await.starts_with("HTTP/1.1 200"));
}

#[tokio::test]
async fn what_is_no_http_is_refused_and_harms_nobody() {
    let running = start(routes()).await;
    for garbage in [b"\x16\x03\x01\x02\x00\x01\x00".as_slice(), b"hello\r\n\r\n", b"GET  HTTP/1.1\r\n\r\n"] {
        let answer = exchange(running.address, garbage).await;
        assert!(answer.starts_with("HTTP/1.1 400"), "{answer}");
    }
    for odd in ["OPTIONS * HTTP/1.1", "CONNECT host:1 HTTP/1.1", "GET //// HTTP/1.1", "GET /%zz/%00/ HTTP/1.1"] {
        let request = format!("{odd}\r\nhost: x\r\nconnection: close\r\n\r\n");
        let answer = exchange(running.address, request.as_bytes()).await;
        assert!(answer.starts_with("HTTP/1.1 404"), "{odd}: {answer}");
    }
}
