//! Unknown routes, and input that no well-behaved client sends.

use crate::orders::{path, start};
use reqwest::Method;
use serde_json::json;
use testkit::{Answer, hostile_texts};

#[tokio::test]
async fn unknown_routes_and_methods_are_not_found() {
    let orders = start().await;
    let order = path(&orders.any_order().await);
    let routes = [
        (Method::GET, "/api/order"),
        (Method::GET, "/api/orders/a/b"),
        (Method::DELETE, "/api/orders"),
        (Method::PUT, "/api/orders"),
        (Method::PUT, &order),
        (Method::PATCH, &order),
        (Method::POST, &order),
    ];
    orders.assert_not_found(&routes).await;
}

#[tokio::test]
async fn a_trailing_slash_and_a_head_request_are_tolerated() {
    let orders = start().await;
    let order = orders.any_order().await;
    assert_eq!(orders.ann.get("/api/orders/").await.unwrap().expect(200).unwrap(), json!([order]));
    let head = Answer::to(orders.ann.request(Method::HEAD, &path(&order))).await.unwrap();
    assert_eq!((head.status, head.body), (200, json!(null)));
}

#[tokio::test]
async fn no_input_causes_a_5xx() {
    let orders = start().await;
    // Tickets does not reply about an unknown ticket, so the response is a 503.
    let reserved = orders.any_order().await["ticket"]["id"].clone();
    for (number, text) in hostile_texts().iter().enumerate() {
        let quoted = serde_json::to_string(text).unwrap();
        for body in [
            text.clone(),
            format!(r#"{{"ticketId":{quoted}}}"#),
            format!(r#"{{"ticketId":{text}}}"#),
            format!(r#"{{{quoted}:1,"ticketId":{reserved}}}"#),
        ] {
            let request = orders.ann.request(Method::POST, "/api/orders").header("content-type", "application/json");
            let answer = Answer::to(request.body(body)).await.unwrap();
            assert!((400..500).contains(&answer.status), "text {number}: {}", answer.status);
            assert!(answer.body["errors"][0]["message"].is_string(), "{:?}", answer.body);
        }
    }
    assert_eq!(orders.events().await.len(), 1);
}
