use crate::orders::{UNKNOWN, path, start};
use testkit::error;

#[tokio::test]
async fn users_see_their_order_in_every_status() {
    let orders = start().await;
    let mut order = orders.any_order().await;
    for status in ["created", "awaiting:payment", "complete", "cancelled"] {
        orders.set_status(&order, status).await;
        order["status"] = status.into();
        assert_eq!(orders.show(&order).await, order);
        let answer = orders.bob.get(&path(&order)).await.unwrap();
        assert_eq!((answer.status, answer.body), (401, error("Not authorized")), "{status}");
    }
}

#[tokio::test]
async fn checks_run_in_the_order_of_the_contract() {
    let orders = start().await;
    let order = orders.any_order().await;
    let found = path(&order);
    let upper = found.replace("/api/orders/", "").to_uppercase();
    assert_eq!(orders.ann.get(&format!("/api/orders/{upper}")).await.unwrap().expect(200).unwrap(), order);
    let unknown = format!("/api/orders/{UNKNOWN}");
    for (client, path, status, message) in [
        (&orders.anonymous, found.as_str(), 401, "Not authorized"),
        (&orders.anonymous, &unknown, 401, "Not authorized"),
        (&orders.anonymous, "/api/orders/malformed", 401, "Not authorized"),
        (&orders.anonymous, "/api/orders/%ff", 401, "Not authorized"),
        (&orders.bob, "/api/orders/malformed", 400, "Something went wrong"),
        (&orders.ann, "/api/orders/0", 400, "Something went wrong"),
        (&orders.ann, "/api/orders/zzzzzzzzzzzzzzzzzzzzzzzz", 400, "Something went wrong"),
        (&orders.ann, "/api/orders/fffffffffffffffffffffffff", 400, "Something went wrong"),
        (&orders.ann, "/api/orders/%00%00", 400, "Something went wrong"),
        (&orders.ann, "/api/orders/%ff%fe", 400, "Something went wrong"),
        (&orders.ann, "/api/orders/'%20or%20'1'='1", 400, "Something went wrong"),
        (&orders.ann, &unknown, 404, "Not Found"),
        (&orders.bob, &unknown, 404, "Not Found"),
        (&orders.bob, &found, 401, "Not authorized"),
    ] {
        let answer = client.get(path).await.unwrap();
        assert_eq!((answer.status, answer.body), (status, error(message)), "{path}");
    }
}
