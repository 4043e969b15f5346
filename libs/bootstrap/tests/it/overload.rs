use std::sync::Arc;

use axum::Router;
use axum::routing::get;
use reqwest::StatusCode;
use testkit::UNAVAILABLE;
use tokio::io::AsyncWriteExt as _;
use tokio::net::TcpStream;
use tokio::sync::Semaphore;

use crate::server::{self, assert_error, start_with};

#[tokio::test]
async fn requests_beyond_the_limit_are_refused_at_once() {
    let begun = Arc::new(Semaphore::new(0));
    let release = Arc::new(Semaphore::new(0));
    let handler = {
        let (begun, release) = (begun.clone(), release.clone());
        move || async move {
            begun.add_permits(1);
            release.acquire().await.unwrap().forget();
        }
    };
    let running = start_with(&["--max-requests=2"], Router::new().route("/slow", get(handler))).await;
    let url = format!("http://{}/slow", running.address);
    let busy = [tokio::spawn(reqwest::get(url.clone())), tokio::spawn(reqwest::get(url.clone()))];
    begun.acquire_many(2).await.unwrap().forget();

    assert_error(server::get(&running, "/slow").await, StatusCode::SERVICE_UNAVAILABLE, UNAVAILABLE).await;
    assert_error(server::get(&running, "/unknown").await, StatusCode::SERVICE_UNAVAILABLE, UNAVAILABLE).await;
    assert_eq!(server::get(&running, "/healthz").await.status(), StatusCode::OK);

    release.add_permits(2);
    for request in busy {
        assert_eq!(request.await.unwrap().unwrap().status(), StatusCode::OK);
    }
    release.add_permits(1);
    assert_eq!(server::get(&running, "/slow").await.status(), StatusCode::OK);
}

#[tokio::test]
async fn a_handler_that_panics_releases_its_permit() {
    let handler = || async { panic_now() };
    let running = start_with(&["--max-requests=1"], Router::new().route("/panic", get(handler))).await;
    for _ in 0..3 {
        assert_eq!(server::get(&running, "/panic").await.status(), StatusCode::INTERNAL_SERVER_ERROR);
    }
}

fn panic_now() {
    panic!("on purpose")
}

#[tokio::test]
async fn a_client_that_sends_its_body_slowly_takes_no_permit() {
    let routes = Router::new().route("/", get(|| async {}).post(|_: bootstrap::JsonBody| async {}));
    let running = start_with(&["--max-requests=1"], routes).await;
    let mut slow = TcpStream::connect(running.address).await.unwrap();
    slow.write_all(b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 10\r\n\r\n{").await.unwrap();
    for _ in 0..3 {
        assert_eq!(server::get(&running, "/").await.status(), StatusCode::OK);
    }
    slow.write_all(b"         ").await.unwrap();
    assert!(server::read_head(&mut slow).await.starts_with("HTTP/1.1 200"));
}
