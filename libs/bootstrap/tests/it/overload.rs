use std::sync::Arc;

use axum::Router;
use axum::routing::get;
use reqwest::StatusCode;
use tokio::sync::Semaphore;

use crate::server::{self, UNAVAILABLE, assert_error, start_with};

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
async fn a_panic_gives_its_place_back() {
    let handler = || async { panic_now() };
    let running = start_with(&["--max-requests=1"], Router::new().route("/panic", get(handler))).await;
    for _ in 0..3 {
        assert_eq!(server::get(&running, "/panic").await.status(), StatusCode::INTERNAL_SERVER_ERROR);
    }
}

fn panic_now() {
    panic!("on purpose")
}
