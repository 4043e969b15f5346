use crate::tickets::{path, start};
use serde_json::json;
use testkit::error;

#[tokio::test]
async fn anybody_sees_a_ticket_reserved_or_not() {
    let tickets = start().await;
    let ticket = tickets.ticket().await;
    assert_eq!(tickets.anonymous.get(&path(&ticket)).await.unwrap().expect(200).unwrap(), ticket);

    tickets.reserve(&ticket, "0123456789abcdef01234567").await;
    let mut reserved = ticket.clone();
    reserved["orderId"] = json!("0123456789abcdef01234567");
    assert_eq!(tickets.bob.get(&path(&ticket)).await.unwrap().expect(200).unwrap(), reserved);
}

#[tokio::test]
async fn an_id_is_found_unknown_or_malformed() {
    let tickets = start().await;
    let ticket = tickets.ticket().await;
    let upper = path(&ticket).replace("/api/tickets/", "").to_uppercase();
    assert_eq!(tickets.ann.get(&format!("/api/tickets/{upper}")).await.unwrap().expect(200).unwrap(), ticket);
    for (id, status, message) in [
        ("ffffffffffffffffffffffff", 404, "Not Found"),
        ("0", 400, "Something went wrong"),
        ("zzzzzzzzzzzzzzzzzzzzzzzz", 400, "Something went wrong"),
        ("fffffffffffffffffffffffff", 400, "Something went wrong"),
        ("%00%00", 400, "Something went wrong"),
        ("%ff%fe", 400, "Something went wrong"),
        ("'%20or%20'1'='1", 400, "Something went wrong"),
    ] {
        let answer = tickets.ann.get(&format!("/api/tickets/{id}")).await.unwrap();
        assert_eq!((answer.status, answer.body), (status, error(message)), "{id}");
    }
}
