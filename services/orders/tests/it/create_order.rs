use crate::orders::{Orders, UNKNOWN, event, order, path, start};
use reqwest::Method;
use serde_json::{Value, json};
use testkit::{Answer, Client, error, id};

const RESERVED: &str = "Ticket is already reserved";
const UNAVAILABLE: &str = "The service is temporarily unavailable, please try again";

/// The error body without an id.
fn missing() -> Value {
    json!({"errors": [{"message": "Invalid value", "field": "ticketId"},
                      {"message": "TicketId must be provided", "field": "ticketId"}]})
}

/// The error body with a malformed id.
fn malformed() -> Value {
    json!({"errors": [{"message": "TicketId must be provided", "field": "ticketId"}]})
}

#[tokio::test]
async fn an_order_is_created_at_version_0_and_announced() {
    let orders = start().await;
    let ticket = orders.ticket().await;
    let order = orders.order(&ticket).await;
    let id = id(&order);
    assert!(id.len() == 24 && id.bytes().all(|digit| matches!(digit, b'0'..=b'9' | b'a'..=b'f')), "{id}");
    let expires_at = &order["expiresAt"];
    let expected = json!({"id": id, "userId": "ann", "status": "created", "expiresAt": expires_at, "version": 0,
                          "ticket": {"id": ticket, "title": "Concert", "price": 20.5, "version": 3}});
    assert_eq!(order, expected);
    assert_eq!(orders.show(&order).await, order);
    let announced = json!({"id": id, "version": 0, "status": "created", "userId": "ann", "expiresAt": expires_at,
                           "ticket": {"id": ticket, "price": 20.5, "version": 3, "reservation": 1}});
    assert_eq!(orders.events().await, [("order.created".to_owned(), 0, announced)]);
}

#[tokio::test]
async fn an_order_expires_after_15_minutes_by_the_clock_of_postgres() {
    let orders = start().await;
    let order = orders.any_order().await;
    let sql = r#"select to_char(expires_at at time zone 'utc', 'YYYY-MM-DD"T"HH24:MI:SS.MS"Z"'),
                        expires_at = date_trunc('milliseconds', expires_at),
                        extract(epoch from created_at + interval '15 minutes' - expires_at)::float8
                 from orders"#;
    let (expires_at, whole, early): (String, bool, f64) = orders.row(sql).await;
    assert_eq!(order["expiresAt"], expires_at.as_str());
    assert!(whole, "more is kept than was told");
    // It is computed before the row is written, and cut to milliseconds.
    assert!((0.0..10.0).contains(&early), "{early} s less than 15 minutes");
}

#[tokio::test]
async fn a_body_cannot_set_fields_of_the_server() {
    let orders = start().await;
    let ticket = orders.ticket().await;
    let body = json!({"ticketId": ticket, "id": UNKNOWN, "userId": "bob", "status": "complete", "version": 7,
                      "expiresAt": "2099-01-01T00:00:00.000Z", "orderId": UNKNOWN, "reservation": 9, "__proto__": {},
                      "ticket": {"id": UNKNOWN, "title": "Mine", "price": 0.01, "version": 9}});
    let order = orders.ann.post("/api/orders", body).await.unwrap().expect(201).unwrap();
    assert_ne!(id(&order), UNKNOWN);
    assert_eq!((&order["userId"], &order["status"], &order["version"]), (&json!("ann"), &json!("created"), &json!(0)));
    assert_eq!(order["ticket"], json!({"id": ticket, "title": "Concert", "price": 20.5, "version": 3}));
    assert!(order["expiresAt"].as_str().unwrap() < "2099");
    assert_eq!(orders.events().await, [event("order.created", &order, 1)]);
}

#[tokio::test]
async fn an_order_keeps_the_ticket_as_it_was_when_it_was_ordered() {
    let orders = start().await;
    let ticket = orders.ticket().await;
    let before = orders.order(&ticket).await;
    orders.sql("update ticket_replica set title = 'Opera', price = 99, version = 5").await;
    assert_eq!(orders.show(&before).await, before);
    assert_eq!(orders.ann.get("/api/orders").await.unwrap().expect(200).unwrap(), json!([before]));

    orders.ann.delete(&path(&before)).await.unwrap().expect(204).unwrap();
    let after = orders.order(&ticket).await;
    assert_eq!(after["ticket"], json!({"id": ticket, "title": "Opera", "price": 99, "version": 5}));
    let events = orders.events().await;
    assert_eq!(events[1].2["ticket"], json!({"id": ticket, "price": 20.5, "version": 3, "reservation": 1}));
    assert_eq!(events[2], event("order.created", &after, 2));
}

#[tokio::test]
async fn prices_are_kept_exactly() {
    let orders = start().await;
    for price in ["20", "20.5", "0.001", "0.0001", "1000", "9999999999.9999"] {
        let ticket = orders.ticket().await;
        orders.sql(&format!("update ticket_replica set price = {price} where id = '{ticket}'")).await;
        let order = orders.order(&ticket).await;
        assert_eq!(order["ticket"]["price"].to_string(), price);
        assert_eq!(orders.events().await.pop(), Some(event("order.created", &order, 1)));
        assert_eq!(orders.show(&order).await, order);
    }
}

#[tokio::test]
async fn a_ticket_has_at_most_one_live_order() {
    let orders = start().await;
    let ticket = orders.ticket().await;
    let first = orders.order(&ticket).await;
    for status in ["created", "awaiting:payment", "complete"] {
        orders.set_status(&first, status).await;
        for user in [&orders.ann, &orders.bob] {
            let answer = order(user, &ticket).await;
            assert_eq!((answer.status, answer.body), (400, error(RESERVED)), "{status}");
        }
    }
    assert_eq!(orders.bob.get("/api/orders").await.unwrap().expect(200).unwrap(), json!([]));
    assert_eq!(orders.events().await, [event("order.created", &first, 1)]);
    // The order holds this ticket and no other.
    orders.any_order().await;
}

#[tokio::test]
async fn orders_of_one_ticket_are_numbered() {
    let orders = start().await;
    let ticket = orders.ticket().await;
    let mut reservations = Vec::new();
    for user in [&orders.ann, &orders.bob, &orders.bob, &orders.ann] {
        let made = order(user, &ticket).await.expect(201).unwrap();
        reservations.push(orders.events().await.pop().unwrap().2["ticket"]["reservation"].as_i64().unwrap());
        user.delete(&path(&made)).await.unwrap().expect(204).unwrap();
    }
    assert_eq!(reservations, [1, 2, 3, 4]);
    let another = orders.any_order().await;
    assert_eq!(orders.events().await.pop(), Some(event("order.created", &another, 1)), "another ticket counts anew");
}

#[tokio::test]
async fn the_holder_in_the_replica_is_not_a_lock() {
    let orders = start().await;
    let ticket = orders.ticket().await;
    // The state after a cancel whose event tickets has not applied yet.
    orders.sql(&format!("update ticket_replica set order_id = '{UNKNOWN}'")).await;
    orders.order(&ticket).await;
    // The opposite: tickets has not applied the event of the order.
    orders.sql("update ticket_replica set order_id = null").await;
    assert_eq!(order(&orders.bob, &ticket).await.body, error(RESERVED));
}

#[tokio::test]
async fn a_ticket_is_found_by_its_id_in_any_case() {
    let orders = start().await;
    orders.sql("insert into ticket_replica values ('5f2b18a3e41d0c0012abcdef', 'Concert', 20, 'carl', 0)").await;
    let made = orders.order("5F2B18A3E41D0C0012AbCdEf").await;
    assert_eq!(made["ticket"]["id"], "5f2b18a3e41d0c0012abcdef");
    for same in ["5f2b18a3e41d0c0012abcdef", "5F2B18A3E41D0C0012ABCDEF"] {
        assert_eq!(order(&orders.bob, same).await.body, error(RESERVED));
    }
}

/// There is no NATS, so tickets does not reply whether the ticket exists.
#[tokio::test]
async fn an_unknown_ticket_is_unavailable_while_tickets_does_not_reply() {
    let orders = start().await;
    let made = orders.any_order().await;
    // The id of an order is not the id of a ticket.
    for unknown in [UNKNOWN, "000000000000000000000000", id(&made)] {
        let answer = order(&orders.ann, unknown).await;
        assert_eq!(answer.headers["retry-after"], "1");
        assert_eq!((answer.status, answer.body), (503, error(UNAVAILABLE)));
    }
    assert_eq!(orders.events().await.len(), 1);
}

#[tokio::test]
async fn a_missing_or_malformed_ticket_id_is_reported() {
    let orders = start().await;
    for nothing in ["", "{}", "[]", r#"{"ticketId":""}"#, r#"{"ticketId":null}"#, r#"{"ticketid":"x","id":"y"}"#] {
        let answer = raw(&orders.ann, "application/json", nothing).await;
        assert_eq!((answer.status, answer.body), (400, missing()), "{nothing}");
    }
    for no_id in [
        r#""abc""#,
        r#""5f2b18a3e41d0c0012abcde""#,
        r#""5f2b18a3e41d0c0012abcdef0""#,
        r#""5f2b18a3e41d0c0012abcdeg""#,
        r#"" 5f2b18a3e41d0c0012abcdef""#,
        r#""+f2b18a3e41d0c0012abcdef""#,
        r#""0x2b18a3e41d0c0012abcdef""#,
        r#""5f2b18a3e41d0c0012abcde\u0000""#,
        r#""éééééééééééé""#,
        r#""12 bytes tex""#,
        r#"" ""#,
        r#""                        ""#,
        r#""\u0000""#,
        r#""\ud800""#,
        "0",
        "1",
        "-1.5e3",
        "123456789012345678901234",
        "true",
        "false",
    ] {
        let answer = raw(&orders.ann, "application/json", &format!(r#"{{"ticketId":{no_id}}}"#)).await;
        assert_eq!((answer.status, answer.body), (400, malformed()), "{no_id}");
    }
    for no_text in ["{}", "[]", r#"["5f2b18a3e41d0c0012abcdef"]"#, r#"{"$ne":null}"#] {
        let answer = raw(&orders.ann, "application/json", &format!(r#"{{"ticketId":{no_text}}}"#)).await;
        assert_eq!((answer.status, answer.body), (400, error("Something went wrong")), "{no_text}");
    }
    assert_eq!(orders.events().await, []);
}

#[tokio::test]
async fn a_body_that_is_not_declared_as_json_counts_as_empty() {
    let orders = start().await;
    let body = json!({"ticketId": orders.ticket().await}).to_string();
    for content_type in ["text/plain", "application/x-www-form-urlencoded", "application/jsonp", "garbage"] {
        for body in [&body, "{"] {
            let answer = raw(&orders.ann, content_type, body).await;
            assert_eq!((answer.status, answer.body), (400, missing()), "{content_type}");
        }
    }
    raw(&orders.ann, "application/json; charset=utf-8", &body).await.expect(201).unwrap();
}

#[tokio::test]
async fn malformed_json_is_a_bad_request_even_without_a_user() {
    let orders = start().await;
    for body in ["{", "null", "1", r#""text""#, r#"{"ticketId":}"#, "{} {}", " "] {
        for user in [&orders.anonymous, &orders.ann] {
            let answer = raw(user, "application/json", body).await;
            assert_eq!((answer.status, answer.body), (400, error("Something went wrong")), "{body}");
        }
    }
}

#[tokio::test]
async fn without_a_user_nothing_is_created() {
    let orders: Orders = start().await;
    let ticket = orders.ticket().await;
    for body in [json!({"ticketId": ticket}), json!({"ticketId": UNKNOWN}), json!({"ticketId": []}), json!({})] {
        let answer = orders.anonymous.post("/api/orders", body.clone()).await.unwrap();
        assert_eq!((answer.status, answer.body), (401, error("Not authorized")), "{body}");
    }
    assert_eq!(orders.events().await, []);
}

async fn raw(user: &Client, content_type: &str, body: &str) -> Answer {
    let request = user.request(Method::POST, "/api/orders").header("content-type", content_type);
    Answer::to(request.body(body.to_owned())).await.unwrap()
}
