use std::sync::Arc;

use axum::Router;
use axum::routing::post;
use bootstrap::Running;
use tokio::io::AsyncWriteExt as _;
use tokio::net::TcpStream;
use tokio::sync::{Notify, mpsc};

use crate::server::{self, start, start_with};

/// A handler that reports its begin and its end, and waits for `release` in between.
fn slow_route(reports: mpsc::UnboundedSender<&'static str>, release: Arc<Notify>) -> Router {
    let handler = move || async move {
        reports.send("begun").unwrap();
        release.notified().await;
        reports.send("ended").unwrap();
    };
    Router::new().route("/slow", post(handler))
}

/// Sends a request, and closes the connection once its handler has begun.
async fn hang_up(running: &Running, reported: &mut mpsc::UnboundedReceiver<&'static str>) {
    let mut stream = TcpStream::connect(running.address).await.unwrap();
    stream.write_all(b"POST /slow HTTP/1.1\r\nhost: x\r\ncontent-length: 0\r\n\r\n").await.unwrap();
    assert_eq!(reported.recv().await, Some("begun"));
}

/// On one thread: after a response to another request, the server has also seen that this client has hung up.
#[tokio::test]
async fn a_client_that_hangs_up_cancels_nothing() {
    let (reports, mut reported) = mpsc::unbounded_channel();
    let release = Arc::new(Notify::new());
    let running = start(slow_route(reports, release.clone())).await;
    hang_up(&running, &mut reported).await;
    for _ in 0..3 {
        server::get(&running, "/healthz").await;
    }
    release.notify_one();
    assert_eq!(reported.recv().await, Some("ended"));
    running.stop().await.unwrap();
}

#[tokio::test]
async fn stopping_waits_for_a_handler_whose_client_has_hung_up() {
    let (reports, mut reported) = mpsc::unbounded_channel();
    let release = Arc::new(Notify::new());
    let running = start(slow_route(reports, release.clone())).await;
    hang_up(&running, &mut reported).await;
    let address = running.address;
    let stopped = tokio::spawn(running.stop());
    while TcpStream::connect(address).await.is_ok() {
        tokio::task::yield_now().await;
    }
    assert!(!stopped.is_finished());
    release.notify_one();
    stopped.await.unwrap().unwrap();
    assert_eq!(reported.recv().await, Some("ended"));
}

/// A handler that never ends must keep neither its permit nor its connection.
#[tokio::test]
async fn a_handler_that_exceeds_the_request_timeout_is_ended() {
    let (reports, mut reported) = mpsc::unbounded_channel();
    let release = Arc::new(Notify::new());
    let running = start_with(&["--request-timeout=50ms"], slow_route(reports, release.clone())).await;
    let response = reqwest::Client::new().post(format!("http://{}/slow", running.address)).send().await.unwrap();
    server::assert_error(response, reqwest::StatusCode::SERVICE_UNAVAILABLE, testkit::UNAVAILABLE).await;
    assert_eq!(reported.recv().await, Some("begun"));
    release.notify_one();
    running.stop().await.unwrap();
    assert_eq!(reported.recv().await, None, "it went on");
}
