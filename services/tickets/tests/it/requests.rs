//! Unknown routes, and input that no well-behaved client sends.

use crate::tickets::{path, start};
use reqwest::Method;
use serde_json::json;
use testkit::{Answer, hostile_texts};

#[tokio::test]
async fn unknown_routes_and_methods_are_not_found() {
    let tickets = start().await;
    let ticket = path(&tickets.ticket().await);
    let routes = [
        (Method::GET, "/"),
        (Method::GET, "/api"),
        (Method::GET, "/api/ticket"),
        (Method::GET, "/api/tickets/a/b"),
        (Method::DELETE, "/api/tickets"),
        (Method::PATCH, &ticket),
        (Method::DELETE, &ticket),
        (Method::POST, &ticket),
    ];
    tickets.assert_not_found(&routes).await;
}

#[tokio::test]
async fn a_trailing_slash_and_a_head_request_are_tolerated() {
    let tickets = start().await;
    let ticket = tickets.ticket().await;
    assert_eq!(tickets.ann.get("/api/tickets/").await.unwrap().expect(200).unwrap(), json!([ticket]));
    let head = Answer::to(tickets.ann.request(Method::HEAD, "/api/tickets")).await.unwrap();
    assert_eq!((head.status, head.body), (200, json!(null)));
}

#[tokio::test]
async fn no_input_causes_a_5xx() {
    let tickets = start().await;
    let ticket = path(&tickets.ticket().await);
    for (number, text) in hostile_texts().iter().enumerate() {
        let quoted = serde_json::to_string(text).unwrap();
        for body in [
            text.clone(),
            format!(r#"{{"title":{quoted},"price":{quoted}}}"#),
            format!(r#"{{"title":{quoted},"price":1}}"#),
            format!(r#"{{"title":"x","price":{text}}}"#),
            format!(r#"{{{quoted}:1,"title":"x","price":1}}"#),
        ] {
            for (method, path) in [(Method::POST, "/api/tickets"), (Method::PUT, &ticket)] {
                let request = tickets.ann.request(method, path).header("content-type", "application/json");
                let answer = Answer::to(request.body(body.clone())).await.unwrap();
                assert!(answer.status < 500, "text {number}: {}", answer.status);
                assert!(answer.status < 400 || answer.body["errors"][0]["message"].is_string(), "{:?}", answer.body);
            }
        }
    }
}
