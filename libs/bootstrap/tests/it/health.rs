use axum::Router;
use reqwest::{Client, StatusCode};
use testkit::UNAVAILABLE;

use crate::server::{assert_error, get, start};

#[tokio::test]
async fn without_postgres_a_service_is_alive_and_not_ready() {
    let running = start(Router::new()).await;
    let response = get(&running, "/healthz").await;
    assert_eq!(response.status(), StatusCode::OK);
    assert_eq!(response.text().await.unwrap(), r#"{"status":"ok"}"#);
    assert_error(get(&running, "/readyz").await, StatusCode::SERVICE_UNAVAILABLE, UNAVAILABLE).await;
}

#[tokio::test]
async fn metrics_are_text_and_need_no_postgres() {
    let running = start(Router::new()).await;
    let response = get(&running, "/metrics").await;
    assert_eq!(response.status(), StatusCode::OK);
    assert_eq!(response.headers()["content-type"], "text/plain; version=0.0.4; charset=utf-8");
    // Every line of the text format is empty, a comment, or a name with its value.
    for line in response.text().await.unwrap().lines() {
        assert!(line.is_empty() || line.starts_with('#') || line.contains(' '), "{line}");
    }
}

#[tokio::test]
async fn health_accepts_only_get() {
    let running = start(Router::new()).await;
    let response = Client::new().post(format!("http://{}/healthz", running.address)).send().await.unwrap();
    assert_error(response, StatusCode::NOT_FOUND, "Not Found").await;
}
