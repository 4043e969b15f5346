//! The metrics of requests. All tests of this file share one recorder, so each has routes of its own.

#![expect(clippy::float_cmp, reason = "most values are whole numbers")]

use axum::Router;
use axum::routing::{get, post};
use bootstrap::{JsonBody, Running};
use reqwest::{Client, Method, StatusCode};
use testkit::{Metrics, eventually};
use tokio::io::AsyncWriteExt as _;
use tokio::net::TcpStream;

use crate::server::{self, exchange, start, start_with};

const DURATION: &str = "http_server_request_duration_seconds_count";

async fn scrape(running: &Running) -> Metrics {
    Metrics::parse(&server::get(running, "/metrics").await.text().await.unwrap()).unwrap()
}

/// How many requests of this method, route and status were measured.
async fn count(running: &Running, method: &str, route: &str, status: u16) -> f64 {
    let status = status.to_string();
    let labels = [("http_request_method", method), ("http_route", route), ("http_response_status_code", &status)];
    scrape(running).await.sum(DURATION, &labels)
}

async fn send(running: &Running, method: &str, path: &str) -> StatusCode {
    let method = Method::from_bytes(method.as_bytes()).unwrap();
    Client::new().request(method, format!("http://{}{path}", running.address)).send().await.unwrap().status()
}

#[tokio::test]
async fn a_request_is_measured_by_method_template_and_status() {
    let running =
        start(Router::new().route("/measured/{id}", get(|| async {}).put(async || StatusCode::CREATED))).await;
    for path in ["/measured/1", "/measured/2", "/measured/3/"] {
        assert_eq!(send(&running, "GET", path).await, StatusCode::OK);
    }
    assert_eq!(send(&running, "PUT", "/measured/1").await, StatusCode::CREATED);
    assert_eq!(send(&running, "DELETE", "/measured/1").await, StatusCode::NOT_FOUND);
    assert_eq!(send(&running, "INVENTED", "/measured/1").await, StatusCode::NOT_FOUND);
    for (method, status, expected) in [("GET", 200, 3.0), ("PUT", 201, 1.0), ("DELETE", 404, 1.0), ("_OTHER", 404, 1.0)]
    {
        assert_eq!(count(&running, method, "/measured/{id}", status).await, expected, "{method} {status}");
    }
    let metrics = scrape(&running).await;
    let labels = [("http_route", "/measured/{id}"), ("http_request_method", "GET"), ("le", "10")];
    assert_eq!(metrics.sum("http_server_request_duration_seconds_bucket", &labels), 3.0);
}

#[tokio::test]
async fn a_request_that_is_refused_or_fails_is_measured() {
    let routes = Router::new()
        .route("/failing", get(|| async { panic_now() }))
        .route("/failing/body", post(|_: JsonBody| async {}));
    let running =
        start_with(&["--max-requests=1"], routes.route("/failing/slow", get(std::future::pending::<()>))).await;
    assert_eq!(send(&running, "GET", "/failing").await, StatusCode::INTERNAL_SERVER_ERROR);
    assert_eq!(count(&running, "GET", "/failing", 500).await, 1.0);

    let before = count(&running, "POST", "none", 413).await;
    let url = format!("http://{}/failing/body", running.address);
    let large = Client::new().post(&url).header("content-type", "application/json").body("x".repeat(200_000));
    assert_eq!(large.send().await.unwrap().status(), StatusCode::PAYLOAD_TOO_LARGE);
    assert_eq!(count(&running, "POST", "none", 413).await, before + 1.0, "the body is refused before it is routed");

    let before = count(&running, "PATCH", "none", 503).await;
    let mut busy = TcpStream::connect(running.address).await.unwrap();
    busy.write_all(b"GET /failing/slow HTTP/1.1\r\nhost: x\r\n\r\n").await.unwrap();
    eventually("the only permit to be taken", async || match send(&running, "PATCH", "/failing").await {
        StatusCode::SERVICE_UNAVAILABLE => Ok(()),
        status => Err(anyhow::anyhow!("{status}")),
    })
    .await
    .unwrap();
    assert!(count(&running, "PATCH", "none", 503).await > before);
    assert!(scrape(&running).await.sum("http_server_active_requests", &[]) >= 1.0);

    drop(busy);
    eventually("the client to have hung up", async || match count(&running, "GET", "/failing/slow", 499).await {
        1.0 => Ok(()),
        other => Err(anyhow::anyhow!("{other}")),
    })
    .await
    .unwrap();
}

fn panic_now() {
    panic!("on purpose")
}

#[tokio::test]
async fn a_request_that_is_not_http_is_counted() {
    let running = start(Router::new()).await;
    let before = scrape(&running).await.sum("http_server_malformed_requests_total", &[]);
    let answer = exchange(running.address, b"\x16\x03\x01 is not HTTP\r\n\r\n").await;
    assert!(answer.starts_with("HTTP/1.1 400"), "{answer}");
    eventually("it to be counted", async || {
        let now = scrape(&running).await.sum("http_server_malformed_requests_total", &[]);
        if now > before { Ok(()) } else { Err(anyhow::anyhow!("{now}")) }
    })
    .await
    .unwrap();
}
