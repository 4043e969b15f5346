use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::routing::get;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::sync::Notify;
use tokio::time::Instant;

use crate::server::{REQUEST, endless_route, exchange, read_all, read_head, start, start_with};

fn routes() -> Router {
    Router::new().route("/", get(|| async {}))
}

#[tokio::test(start_paused = true)]
async fn a_connection_with_a_slow_head_is_closed() {
    let running = start(routes()).await;
    let begun = Instant::now();
    assert_eq!(exchange(running.address, b"GET / HTTP/1.1\r\nhost:").await, "");
    assert!((Duration::from_secs(9)..Duration::from_secs(12)).contains(&begun.elapsed()));
}

#[tokio::test(start_paused = true)]
async fn a_silent_connection_is_closed() {
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
async fn input_that_is_not_http_is_refused_and_harms_no_other_client() {
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

#[tokio::test]
async fn a_connection_beyond_the_limit_closes_the_one_idle_longest() {
    let running = start_with(&["--max-connections=3"], routes()).await;
    let mut open = Vec::new();
    for part in [REQUEST, b"GET / HT", REQUEST] {
        let mut stream = TcpStream::connect(running.address).await.unwrap();
        stream.write_all(REQUEST).await.unwrap();
        read_head(&mut stream).await;
        // The second one has begun its next request and does not finish it.
        stream.write_all(if part == REQUEST { b"" } else { part }).await.unwrap();
        open.push(stream);
    }
    // The first one is busy again, so that the second one is idle longest, and then the third one.
    open[0].write_all(REQUEST).await.unwrap();
    read_head(&mut open[0]).await;
    for closed in [1, 1] {
        let mut new = TcpStream::connect(running.address).await.unwrap();
        new.write_all(REQUEST).await.unwrap();
        assert!(read_head(&mut new).await.starts_with("HTTP/1.1 200"));
        let mut rest = Vec::new();
        let _ = open.remove(closed).read_to_end(&mut rest).await;
        assert!(rest.is_empty());
        open.push(new);
    }
    for mut stream in open {
        stream.write_all(REQUEST).await.unwrap();
        assert!(read_head(&mut stream).await.starts_with("HTTP/1.1 200"));
    }
}

#[tokio::test]
async fn a_connection_with_a_running_handler_is_not_closed_for_others() {
    let (begun, release) = (Arc::new(Notify::new()), Arc::new(Notify::new()));
    let handler = {
        let (begun, release) = (begun.clone(), release.clone());
        move || async move {
            begun.notify_one();
            release.notified().await;
        }
    };
    let running = start_with(&["--max-connections=2"], Router::new().route("/", get(handler))).await;
    let mut busy = TcpStream::connect(running.address).await.unwrap();
    busy.write_all(REQUEST).await.unwrap();
    begun.notified().await;
    let mut others = Vec::new();
    for _ in 0..5 {
        let mut other = TcpStream::connect(running.address).await.unwrap();
        other.write_all(b"GET /healthz HTTP/1.1\r\nhost: x\r\n\r\n").await.unwrap();
        assert!(read_head(&mut other).await.starts_with("HTTP/1.1 200"));
        others.push(other);
    }
    release.notify_one();
    assert!(read_head(&mut busy).await.starts_with("HTTP/1.1 200"));
}

#[tokio::test]
async fn health_responds_while_all_connections_are_busy() {
    let (begun, route) = endless_route();
    let running = start_with(&["--max-connections=2"], route).await;
    let mut busy = Vec::new();
    for _ in 0..2 {
        let mut stream = TcpStream::connect(running.address).await.unwrap();
        stream.write_all(REQUEST).await.unwrap();
        begun.notified().await;
        busy.push(stream);
    }
    for _ in 0..3 {
        let mut other = TcpStream::connect(running.address).await.unwrap();
        other.write_all(b"GET /healthz HTTP/1.1\r\nhost: x\r\n\r\n").await.unwrap();
        assert!(read_head(&mut other).await.starts_with("HTTP/1.1 200"));
        busy.push(other);
    }
}
