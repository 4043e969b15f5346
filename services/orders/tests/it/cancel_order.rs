use crate::orders::{UNKNOWN, cancelled, event, order, path, start};
use serde_json::Value;
use testkit::error;

#[tokio::test]
async fn a_cancel_keeps_the_order_and_publishes_its_next_version() {
    let orders = start().await;
    let order = orders.any_order().await;
    let answer = orders.ann.delete(&path(&order)).await.unwrap();
    assert_eq!((answer.status, answer.body), (204, Value::Null));
    assert!(answer.headers.get("content-type").is_none(), "a 204 has no body");

    let cancelled = cancelled(&order);
    assert_eq!(cancelled["version"], 1);
    assert_eq!(orders.show(&order).await, cancelled);
    let events = [event("order.created", &order, 1), event("order.cancelled", &cancelled, 1)];
    assert_eq!(orders.events().await, events);
}

#[tokio::test]
async fn a_second_cancel_changes_nothing() {
    let orders = start().await;
    let order = orders.any_order().await;
    orders.ann.delete(&path(&order)).await.unwrap().expect(204).unwrap();
    let before = orders.everything(&order).await;
    for _ in 0..3 {
        let answer = orders.ann.delete(&path(&order)).await.unwrap();
        assert_eq!((answer.status, answer.body), (204, Value::Null));
    }
    assert_eq!(orders.everything(&order).await, before);
    assert_eq!(orders.events().await.len(), 2);
}

#[tokio::test]
async fn a_second_cancel_of_an_old_order_does_not_change_a_newer_one() {
    let orders = start().await;
    let ticket = orders.ticket().await;
    let old = orders.order(&ticket).await;
    orders.ann.delete(&path(&old)).await.unwrap().expect(204).unwrap();
    let new = orders.order(&ticket).await;
    orders.ann.delete(&path(&old)).await.unwrap().expect(204).unwrap();
    assert_eq!(orders.show(&new).await, new);
    assert_eq!(orders.events().await.len(), 3);
}

#[tokio::test]
async fn a_complete_order_cannot_be_cancelled() {
    let orders = start().await;
    let order = orders.any_order().await;
    orders.set_status(&order, "complete").await;
    let before = orders.everything(&order).await;
    let answer = orders.ann.delete(&path(&order)).await.unwrap();
    assert_eq!((answer.status, answer.body), (400, error("Cannot cancel a complete order")));
    assert_eq!(orders.everything(&order).await, before);
    assert_eq!(orders.events().await.len(), 1);
}

#[tokio::test]
async fn an_order_awaiting_payment_holds_its_ticket_until_cancelled() {
    let orders = start().await;
    let ticket = orders.ticket().await;
    let first = orders.order(&ticket).await;
    orders.set_status(&first, "awaiting:payment").await;
    let refused = order(&orders.bob, &ticket).await;
    assert_eq!((refused.status, refused.body), (400, error("Ticket is already reserved")));

    orders.ann.delete(&path(&first)).await.unwrap().expect(204).unwrap();
    assert_eq!(orders.show(&first).await, cancelled(&first));
    let second = order(&orders.bob, &ticket).await.expect(201).unwrap();
    let (given_up, taken) = (event("order.cancelled", &cancelled(&first), 1), event("order.created", &second, 2));
    assert_eq!(orders.events().await[1..], [given_up, taken]);
}

#[tokio::test]
async fn other_users_learn_only_that_the_order_is_not_theirs() {
    let orders = start().await;
    let order = orders.any_order().await;
    for status in ["created", "awaiting:payment", "complete", "cancelled"] {
        orders.set_status(&order, status).await;
        let before = orders.everything(&order).await;
        let answer = orders.bob.delete(&path(&order)).await.unwrap();
        assert_eq!((answer.status, answer.body), (401, error("Not authorized")), "{status}");
        assert_eq!(orders.everything(&order).await, before);
    }
    assert_eq!(orders.events().await.len(), 1);
}

#[tokio::test]
async fn checks_run_in_the_order_of_the_contract() {
    let orders = start().await;
    let found = path(&orders.any_order().await);
    let unknown = format!("/api/orders/{UNKNOWN}");
    for (client, path, status, message) in [
        (&orders.anonymous, found.as_str(), 401, "Not authorized"),
        (&orders.anonymous, &unknown, 401, "Not authorized"),
        (&orders.anonymous, "/api/orders/malformed", 401, "Not authorized"),
        (&orders.anonymous, "/api/orders/%ff", 401, "Not authorized"),
        (&orders.ann, "/api/orders/malformed", 400, "Something went wrong"),
        (&orders.ann, "/api/orders/%ff", 400, "Something went wrong"),
        (&orders.ann, "/api/orders/%00", 400, "Something went wrong"),
        (&orders.ann, &unknown, 404, "Not Found"),
        (&orders.bob, &unknown, 404, "Not Found"),
        (&orders.bob, &found, 401, "Not authorized"),
    ] {
        let answer = client.delete(path).await.unwrap();
        assert_eq!((answer.status, answer.body), (status, error(message)), "{path}");
    }
    assert_eq!(orders.events().await.len(), 1, "a refused cancellation was announced");
}
