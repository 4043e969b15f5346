use axum::Router;
use axum::routing::post;
use bootstrap::{Field, JsonBody, Running};
use reqwest::{Client, Response, StatusCode};
use tokio::io::AsyncWriteExt as _;
use tokio::net::TcpStream;

use crate::server::{assert_error, exchange, read_all, read_head, start, start_with};

const LIMIT: usize = 102_400;

async fn echo(body: JsonBody) -> String {
    match body.field("title") {
        Field::Text(text) => format!("text {}", text.len()),
        other => format!("{other:?}"),
    }
}

async fn service() -> Running {
    start(Router::new().route("/echo", post(echo))).await
}

async fn send(running: &Running, content_type: &str, body: impl Into<reqwest::Body>) -> Response {
    let request = Client::new().post(format!("http://{}/echo", running.address));
    request.header("content-type", content_type).body(body).send().await.unwrap()
}

fn object_of(size: usize) -> String {
    format!(r#"{{"title":"{}"}}"#, "x".repeat(size - r#"{"title":""}"#.len()))
}

#[tokio::test]
async fn only_a_body_declared_as_json_is_read() {
    let running = service().await;
    for (content_type, expected) in [
        ("application/json", "Number(\"1\")"),
        ("application/json; charset=utf-8", "Number(\"1\")"),
        ("Application/JSON ;x=y", "Number(\"1\")"),
        ("text/plain", "Missing"),
        ("application/json5", "Missing"),
        ("application/x-www-form-urlencoded", "Missing"),
        ("", "Missing"),
    ] {
        let response = send(&running, content_type, r#"{"title":1}"#).await;
        assert_eq!((response.status(), response.text().await.unwrap().as_str()), (StatusCode::OK, expected));
        let response = send(&running, content_type, "").await;
        assert_eq!(response.text().await.unwrap(), "Missing");
    }
    assert_eq!(send(&running, "text/plain", "{").await.status(), StatusCode::OK);
}

#[tokio::test]
async fn malformed_json_is_refused() {
    let running = service().await;
    for body in ["{", "null", "1", "\"title\"", "{\"title\":1,}"] {
        let response = send(&running, "application/json", body).await;
        assert_error(response, StatusCode::BAD_REQUEST, "Something went wrong").await;
    }
}

#[tokio::test]
async fn a_body_of_100_kb_is_the_largest() {
    let running = service().await;
    let response = send(&running, "application/json", object_of(LIMIT)).await;
    assert_eq!(response.text().await.unwrap(), format!("text {}", LIMIT - 12));
    for size in [LIMIT + 1, 5_000_000] {
        let response = send(&running, "application/json", object_of(size)).await;
        assert_error(response, StatusCode::PAYLOAD_TOO_LARGE, "The request body is larger than 100 kB").await;
    }
}

#[tokio::test]
async fn the_limit_holds_for_a_body_without_a_length() {
    let running = service().await;
    for (size, status) in [(LIMIT, "200 OK"), (LIMIT + 1, "413 Payload Too Large")] {
        let mut stream = TcpStream::connect(running.address).await.unwrap();
        let head = "POST /echo HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-type: application/json\r\n\
                    transfer-encoding: chunked\r\n\r\n";
        stream.write_all(head.as_bytes()).await.unwrap();
        for chunk in object_of(size).as_bytes().chunks(10_000) {
            stream.write_all(format!("{:x}\r\n", chunk.len()).as_bytes()).await.unwrap();
            stream.write_all(chunk).await.unwrap();
            stream.write_all(b"\r\n").await.unwrap();
        }
        stream.write_all(b"0\r\n\r\n").await.unwrap();
        let answer = read_all(stream).await;
        assert!(answer.starts_with(&format!("HTTP/1.1 {status}")), "{answer}");
    }
}

#[tokio::test]
async fn a_body_that_is_too_large_is_refused_before_it_is_sent() {
    let running = service().await;
    let head = "POST /echo HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 200000\r\n\
                expect: 100-continue\r\n\r\n";
    let answer = exchange(running.address, head.as_bytes()).await;
    assert!(answer.starts_with("HTTP/1.1 413"), "{answer}");
}

/// The clock is paused: it advances when all tasks are idle.
#[tokio::test(start_paused = true)]
async fn a_body_that_does_not_arrive_in_time_is_a_408() {
    let running = service().await;
    let begun = tokio::time::Instant::now();
    let request = "POST /echo HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 20\r\n\r\n{";
    let answer = exchange(running.address, request.as_bytes()).await;
    assert!(answer.starts_with("HTTP/1.1 408"), "{answer}");
    assert!(answer.ends_with(r#"{"errors":[{"message":"The request body took too long to arrive"}]}"#), "{answer}");
    assert!(begun.elapsed().as_secs() <= 6);
}

#[tokio::test]
async fn broken_chunks_are_a_bad_request() {
    let running = service().await;
    let request = "POST /echo HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n\
                   transfer-encoding: chunked\r\n\r\nzz\r\n";
    let answer = exchange(running.address, request.as_bytes()).await;
    assert!(answer.starts_with("HTTP/1.1 400"), "{answer}");
}

/// The limit is the size of two bodies and a half.
#[tokio::test]
async fn a_body_beyond_the_shared_limit_drops_the_oldest_unfinished_one() {
    let running = start_with(&["--max-body-bytes=250KiB"], Router::new().route("/echo", post(echo))).await;
    let body = object_of(LIMIT);
    let mut slow = Vec::new();
    for _ in 0..2 {
        let mut stream = TcpStream::connect(running.address).await.unwrap();
        let head = format!(
            "POST /echo HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {LIMIT}\r\n\
             expect: 100-continue\r\n\r\n"
        );
        stream.write_all(head.as_bytes()).await.unwrap();
        // From here on the body is being received.
        assert!(read_head(&mut stream).await.starts_with("HTTP/1.1 100"));
        stream.write_all(&body.as_bytes()[..LIMIT - 1]).await.unwrap();
        slow.push(stream);
    }
    // Large bodies, one after the other: each fits into the bytes of the first slow one.
    for _ in 0..5 {
        let response = send(&running, "application/json", body.clone()).await;
        assert_eq!(response.text().await.unwrap(), format!("text {}", LIMIT - 12));
    }
    let mut second = slow.pop().unwrap();
    let answer = read_all(slow.pop().unwrap()).await;
    assert!(answer.starts_with("HTTP/1.1 408"), "{answer}");
    assert!(answer.ends_with(r#"{"errors":[{"message":"The request body took too long to arrive"}]}"#), "{answer}");
    second.write_all(&body.as_bytes()[LIMIT - 1..]).await.unwrap();
    assert!(read_head(&mut second).await.starts_with("HTTP/1.1 200"));
}
