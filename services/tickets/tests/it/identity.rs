use crate::tickets::start;
use reqwest::Method;
use serde_json::json;
use testkit::{Answer, cookie};

#[tokio::test]
async fn a_user_is_known_by_either_cookie_or_by_a_bearer_token() {
    let tickets = start().await;
    for (header, value) in [
        ("cookie", format!("express:sess={}", cookie("ann"))),
        ("cookie", format!("session={}", cookie("ann").trim_end_matches('='))),
        ("cookie", format!("theme=dark; express:sess=garbage; session={}", cookie("ann"))),
        ("authorization", format!("Bearer {}", testkit::token("ann"))),
    ] {
        let request = tickets.anonymous.request(Method::POST, "/api/tickets").header(header, &value);
        let ticket = Answer::to(request.json(&json!({"title": "Concert", "price": 20}))).await.unwrap();
        assert!(ticket.headers.get("set-cookie").is_none(), "a service set a cookie");
        assert_eq!(ticket.expect(201).unwrap()["userId"], "ann", "{header}: {value}");
    }
}

#[tokio::test]
async fn a_bad_token_makes_a_request_anonymous() {
    let tickets = start().await;
    let (head, signature) = testkit::token("ann").rsplit_once('.').map(|(a, b)| (a.to_owned(), b.to_owned())).unwrap();
    let reversed: String = signature.chars().rev().collect();
    for (header, value) in [
        ("cookie", "express:sess=".to_owned()),
        ("cookie", "express:sess=e30=".to_owned()),
        ("cookie", "express:sess=%%%".to_owned()),
        ("authorization", format!("Bearer {head}.{reversed}")),
        ("authorization", format!("Bearer {head}.")),
        ("authorization", format!("Basic {}", testkit::token("ann"))),
        ("authorization", "Bearer".to_owned()),
    ] {
        let public = tickets.anonymous.request(Method::GET, "/api/tickets").header(header, &value);
        Answer::to(public).await.unwrap().expect(200).unwrap();
        let private = tickets.anonymous.request(Method::POST, "/api/tickets").header(header, &value);
        Answer::to(private.json(&json!({"title": "Concert", "price": 20}))).await.unwrap().expect(401).unwrap();
    }
}
