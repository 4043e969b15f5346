use anyhow::anyhow;
use axum::extract::{Path, Query};
use axum::routing::get;
use axum::{Json, Router};
use bootstrap::{ApiError, FieldError, Running};
use reqwest::{Client, Method, StatusCode};
use serde::Deserialize;
use serde_json::{Value, json};
use testkit::UNAVAILABLE;

use crate::server::{self, assert_error, start};

#[derive(Deserialize)]
struct Page {
    limit: Option<u32>,
}

async fn service() -> Running {
    let routes = Router::new()
        .route("/items/{id}", get(|Path(id): Path<u32>| async move { id.to_string() }))
        .route("/items", get(|Query(page): Query<Page>| async move { format!("{:?}", page.limit) }).post(take))
        .route("/bug", get(|| async { ApiError::Internal(anyhow!("a secret cause")) }))
        .route("/panic", get(panic))
        .route("/outage", get(|| async { ApiError::from(sqlx::Error::PoolTimedOut) }))
        .route("/wrapped-outage", get(|| async { ApiError::from(anyhow!(sqlx::Error::PoolTimedOut).context("while")) }))
        .route("/wrong-query", get(|| async { ApiError::from(sqlx::Error::RowNotFound) }))
        .route("/refused", get(|| async { ApiError::Refused("Cannot edit a reserved ticket") }))
        .route("/invalid", get(invalid));
    start(routes).await
}

async fn take(Json(_): Json<Page>) {}

async fn panic() {
    panic!("a secret cause")
}

async fn invalid() -> ApiError {
    ApiError::Invalid(vec![
        FieldError { message: "Invalid value", field: "ticketId" },
        FieldError { message: "TicketId must be provided", field: "ticketId" },
    ])
}

#[tokio::test]
async fn every_failure_has_the_error_body() {
    let running = service().await;
    for (path, status, message) in [
        ("/unknown", StatusCode::NOT_FOUND, "Not Found"),
        ("/", StatusCode::NOT_FOUND, "Not Found"),
        ("/items//", StatusCode::NOT_FOUND, "Not Found"),
        ("/Items", StatusCode::NOT_FOUND, "Not Found"),
        ("/items/abc", StatusCode::BAD_REQUEST, "Something went wrong"),
        ("/items/%ff", StatusCode::BAD_REQUEST, "Something went wrong"),
        ("/items/%zz", StatusCode::BAD_REQUEST, "Something went wrong"),
        ("/items?limit=-1", StatusCode::BAD_REQUEST, "Something went wrong"),
        ("/items?limit=%ff", StatusCode::BAD_REQUEST, "Something went wrong"),
        ("/bug", StatusCode::INTERNAL_SERVER_ERROR, "Something went wrong"),
        ("/panic", StatusCode::INTERNAL_SERVER_ERROR, "Something went wrong"),
        ("/wrong-query", StatusCode::INTERNAL_SERVER_ERROR, "Something went wrong"),
        ("/outage", StatusCode::SERVICE_UNAVAILABLE, UNAVAILABLE),
        ("/wrapped-outage", StatusCode::SERVICE_UNAVAILABLE, UNAVAILABLE),
        ("/refused", StatusCode::BAD_REQUEST, "Cannot edit a reserved ticket"),
    ] {
        assert_error(server::get(&running, path).await, status, message).await;
    }
}

#[tokio::test]
async fn an_unknown_method_is_not_found() {
    let running = service().await;
    for method in [Method::PUT, Method::DELETE, Method::OPTIONS, Method::PATCH, Method::from_bytes(b"BREW").unwrap()] {
        let response =
            Client::new().request(method, format!("http://{}/items/1", running.address)).send().await.unwrap();
        assert_error(response, StatusCode::NOT_FOUND, "Not Found").await;
    }
}

#[tokio::test]
async fn rejections_of_the_framework_have_the_error_body() {
    let running = service().await;
    let url = format!("http://{}/items", running.address);
    let response = Client::new().post(&url).body("{}").send().await.unwrap();
    assert_error(response, StatusCode::UNSUPPORTED_MEDIA_TYPE, "Something went wrong").await;
    let response = Client::new().post(&url).json(&json!({ "limit": "x" })).send().await.unwrap();
    assert_error(response, StatusCode::UNPROCESSABLE_ENTITY, "Something went wrong").await;
}

#[tokio::test]
async fn validation_lists_every_broken_rule_with_its_field() {
    let response = server::get(&service().await, "/invalid").await;
    assert_eq!(response.status(), StatusCode::BAD_REQUEST);
    let expected = json!({ "errors": [
        { "message": "Invalid value", "field": "ticketId" },
        { "message": "TicketId must be provided", "field": "ticketId" },
    ] });
    assert_eq!(response.json::<Value>().await.unwrap(), expected);
}

#[tokio::test]
async fn one_trailing_slash_is_tolerated() {
    let running = service().await;
    assert_eq!(server::get(&running, "/items/?limit=3").await.text().await.unwrap(), "Some(3)");
    assert_eq!(server::get(&running, "/items/7/").await.text().await.unwrap(), "7");
}

#[tokio::test]
async fn head_is_get_without_the_body() {
    let running = service().await;
    for (path, status) in [("items/7", StatusCode::OK), ("unknown", StatusCode::NOT_FOUND), ("healthz", StatusCode::OK)]
    {
        let response = Client::new().head(format!("http://{}/{path}", running.address)).send().await.unwrap();
        assert_eq!(response.status(), status);
        assert_eq!(response.text().await.unwrap(), "");
    }
}
