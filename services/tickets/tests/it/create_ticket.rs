use crate::tickets::{invalid, start};
use reqwest::Method;
use serde_json::{Value, json};
use testkit::{Answer, error};

const TITLE: &str = "Title is required";
const PRICE: &str = "Price must be greater than 0";

#[tokio::test]
async fn a_ticket_is_created_at_version_0_and_announced() {
    let tickets = start().await;
    let ticket = tickets.ticket().await;
    let id = ticket["id"].as_str().unwrap();
    assert!(id.len() == 24 && id.bytes().all(|digit| matches!(digit, b'0'..=b'9' | b'a'..=b'f')), "{id}");
    assert_eq!(ticket, json!({"id": id, "title": "Concert", "price": 20, "userId": "ann", "version": 0}));
    assert_eq!(tickets.events().await, [("ticket.created".to_owned(), 0, ticket)]);
}

#[tokio::test]
async fn without_a_user_nothing_is_created() {
    let tickets = start().await;
    for body in [json!({"title": "Concert", "price": 20}), json!({})] {
        let answer = tickets.anonymous.post("/api/tickets", body).await.unwrap();
        assert_eq!((answer.status, answer.body), (401, error("Not authorized")));
    }
    assert_eq!(tickets.events().await, []);
}

#[tokio::test]
async fn a_body_cannot_set_fields_of_the_server() {
    let tickets = start().await;
    let body = json!({"title": "Concert", "price": 20, "id": "0123456789abcdef01234567", "userId": "bob", "version": 7,
                      "orderId": "0123456789abcdef01234567", "status": "created", "__proto__": {}});
    let ticket = tickets.ann.post("/api/tickets", body).await.unwrap().expect(201).unwrap();
    assert_ne!(ticket["id"], "0123456789abcdef01234567");
    assert_eq!((&ticket["userId"], &ticket["version"], &ticket["orderId"]), (&json!("ann"), &json!(0), &Value::Null));
}

#[tokio::test]
async fn prices_are_kept_exactly() {
    let tickets = start().await;
    for (price, expected) in [
        ("20", "20"),
        ("20.00", "20"),
        ("20.5", "20.5"),
        ("0.001", "0.001"),
        ("0.0001", "0.0001"),
        ("1e3", "1000"),
        ("9999999999.9999", "9999999999.9999"),
        ("\"20.00\"", "20"),
        ("\"1e3\"", "1000"),
        ("\"+5.\"", "5"),
        ("\".5\"", "0.5"),
    ] {
        let body = format!(r#"{{"title":"Concert","price":{price}}}"#);
        let ticket = raw(&tickets, "application/json", body).await.expect(201).unwrap();
        assert_eq!(ticket["price"].to_string(), expected, "{price}");
        let found = tickets.anonymous.get(&crate::tickets::path(&ticket)).await.unwrap().expect(200).unwrap();
        assert_eq!(found, ticket);
    }
}

#[tokio::test]
async fn titles_that_are_not_text_are_converted_to_text() {
    let tickets = start().await;
    for (title, expected) in [
        (json!("Ünïcödé 🎫"), "Ünïcödé 🎫"),
        (json!("   "), "   "),
        (json!("'; drop table tickets; --"), "'; drop table tickets; --"),
        (json!("<script>\"\\\u{7f}\u{1}"), "<script>\"\\\u{7f}\u{1}"),
        (json!(42), "42"),
        (json!(true), "true"),
    ] {
        let body = json!({"title": title, "price": 1});
        let ticket = tickets.ann.post("/api/tickets", body).await.unwrap().expect(201).unwrap();
        assert_eq!(ticket["title"], expected);
    }
}

#[tokio::test]
async fn every_broken_rule_is_reported_in_order() {
    let tickets = start().await;
    let (title, price) = (invalid(TITLE, "title"), invalid(PRICE, "price"));
    for (body, expected) in [
        (json!({}), vec![&title, &price]),
        (json!([]), vec![&title, &price]),
        (json!({"title": null, "price": null}), vec![&title, &price]),
        (json!({"title": "", "price": 10}), vec![&title]),
        (json!({"price": 10}), vec![&title]),
        (json!({"title": "Concert"}), vec![&price]),
        (json!({"title": {}, "price": 0}), vec![&price]),
    ] {
        let answer = tickets.ann.post("/api/tickets", body.clone()).await.unwrap();
        assert_eq!((answer.status, answer.body), (400, json!({"errors": expected})), "{body}");
    }
    for refused in [
        "0",
        "-10",
        "-0.0001",
        "0.00001",
        "20.00001",
        "10000000000",
        "1e999",
        "-1e999",
        "1e99999999999999999999",
        "true",
        "null",
        "{}",
        "[20]",
        r#""0""#,
        r#""-1""#,
        r#"" 20 ""#,
        r#""1,5""#,
        r#""abc""#,
        r#""""#,
        r#""Infinity""#,
        r#""NaN""#,
        r#""1e999""#,
        r#""0x10""#,
        r#""\u0000""#,
        r#""\ud800""#,
        r#""٣""#,
    ] {
        let body = format!(r#"{{"title":"Concert","price":{refused}}}"#);
        let answer = raw(&tickets, "application/json", body).await;
        assert_eq!((answer.status, answer.body), (400, json!({"errors": [price]})), "{refused}");
    }
    assert_eq!(tickets.events().await, []);
}

#[tokio::test]
async fn a_title_of_the_wrong_type_or_one_that_cannot_be_stored_is_a_bad_request() {
    let tickets = start().await;
    for title in ["{}", "[]", r#"["Concert"]"#, r#""Con\u0000cert""#, r#""\ud800""#] {
        let answer = raw(&tickets, "application/json", format!(r#"{{"title":{title},"price":20}}"#)).await;
        assert_eq!((answer.status, answer.body), (400, error("Something went wrong")), "{title}");
    }
}

#[tokio::test]
async fn malformed_json_is_a_bad_request_even_without_a_user() {
    let tickets = start().await;
    for body in ["{", "null", "1", "\"text\"", "{\"title\":}", "{} {}", " "] {
        for client in [&tickets.anonymous, &tickets.ann] {
            let request = client.request(Method::POST, "/api/tickets").header("content-type", "application/json");
            let answer = Answer::to(request.body(body)).await.unwrap();
            assert_eq!((answer.status, answer.body), (400, error("Something went wrong")), "{body}");
        }
    }
}

#[tokio::test]
async fn a_body_that_is_not_declared_as_json_counts_as_empty() {
    let tickets = start().await;
    let body = r#"{"title":"Concert","price":20}"#;
    for content_type in ["text/plain", "application/x-www-form-urlencoded", "application/jsonp", "garbage"] {
        let answer = raw(&tickets, content_type, body.to_owned()).await;
        assert_eq!((answer.status, answer.body["errors"][0]["message"].as_str()), (400, Some(TITLE)), "{content_type}");
    }
    for content_type in ["application/json; charset=utf-8", "Application/JSON"] {
        raw(&tickets, content_type, body.to_owned()).await.expect(201).unwrap();
    }
}

#[tokio::test]
async fn a_body_of_100_kb_is_the_largest() {
    let tickets = start().await;
    let body = |size: usize| {
        let frame = r#"{"price":1,"title":""}"#.len();
        format!(r#"{{"price":1,"title":"{}"}}"#, "x".repeat(size - frame))
    };
    raw(&tickets, "application/json", body(100 * 1024)).await.expect(201).unwrap();
    let answer = raw(&tickets, "application/json", body(100 * 1024 + 1)).await;
    assert_eq!(answer.status, 413);
    assert!(answer.body["errors"][0]["message"].as_str().is_some_and(|message| message.contains("100 kB")));
}

async fn raw(tickets: &crate::tickets::Tickets, content_type: &str, body: String) -> Answer {
    let request = tickets.ann.request(Method::POST, "/api/tickets").header("content-type", content_type);
    Answer::to(request.body(body)).await.unwrap()
}
