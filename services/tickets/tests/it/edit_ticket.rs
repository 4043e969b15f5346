use crate::tickets::{invalid, path, start};
use futures::future::join_all;
use serde_json::json;
use testkit::{error, id};

const PRICE: &str = "Price must be provided and must be greater than 0";
const UNKNOWN: &str = "/api/tickets/ffffffffffffffffffffffff";

#[tokio::test]
async fn an_edit_replaces_both_fields_and_publishes_the_next_version() {
    let tickets = start().await;
    let ticket = tickets.ticket().await;
    let change = json!({"title": "Opera", "price": "30.50", "version": 9, "userId": "bob", "orderId": "x"});
    let edited = tickets.ann.put(&path(&ticket), change).await.unwrap().expect(200).unwrap();
    assert_eq!(edited, json!({"id": id(&ticket), "title": "Opera", "price": 30.5, "userId": "ann", "version": 1}));
    assert_eq!(tickets.anonymous.get(&path(&ticket)).await.unwrap().expect(200).unwrap(), edited);

    // An edit without changes is a version too.
    let same = tickets.ann.put(&path(&ticket), json!({"title": "Opera", "price": 30.5})).await.unwrap();
    assert_eq!(same.expect(200).unwrap()["version"], 2);
    let events = tickets.events().await;
    let announced: Vec<_> = events.iter().map(|(subject, version, _)| (subject.as_str(), *version)).collect();
    assert_eq!(announced, [("ticket.created", 0), ("ticket.updated", 1), ("ticket.updated", 2)]);
    assert_eq!(events[1].2, edited);
}

#[tokio::test]
async fn checks_run_in_the_order_of_the_contract() {
    let tickets = start().await;
    let (free, reserved) = (tickets.ticket().await, tickets.ticket().await);
    tickets.reserve(&reserved, "0123456789abcdef01234567").await;
    let (good, bad) = (json!({"title": "Opera", "price": 1}), json!({"title": "Opera"}));
    let invalid = json!({"errors": [invalid(PRICE, "price")]});
    for (client, path, body, status, expected) in [
        (&tickets.anonymous, "/api/tickets/malformed".to_owned(), &bad, 401, error("Not authorized")),
        (&tickets.ann, "/api/tickets/malformed".to_owned(), &bad, 400, invalid.clone()),
        (&tickets.ann, "/api/tickets/malformed".to_owned(), &good, 400, error("Something went wrong")),
        (&tickets.ann, "/api/tickets/%ff".to_owned(), &good, 400, error("Something went wrong")),
        (&tickets.anonymous, "/api/tickets/%ff".to_owned(), &good, 401, error("Not authorized")),
        (&tickets.ann, UNKNOWN.to_owned(), &bad, 400, invalid.clone()),
        (&tickets.ann, UNKNOWN.to_owned(), &good, 404, error("Not Found")),
        (&tickets.bob, path(&reserved), &good, 400, error("Cannot edit a reserved ticket")),
        (&tickets.ann, path(&reserved), &good, 400, error("Cannot edit a reserved ticket")),
        (&tickets.bob, path(&free), &good, 401, error("Not authorized")),
        (&tickets.bob, path(&free), &bad, 400, invalid),
    ] {
        let answer = client.put(&path, body.clone()).await.unwrap();
        assert_eq!((answer.status, answer.body), (status, expected), "{path} {body}");
    }
    assert_eq!(tickets.events().await.len(), 2, "a refused edit was announced");
}

#[tokio::test]
async fn concurrent_edits_lose_nothing_and_skip_no_version() {
    let tickets = start().await;
    let ticket = tickets.ticket().await;
    let edits = (1..=100).map(|price| {
        let (ann, path) = (tickets.ann.clone(), path(&ticket));
        async move { ann.put(&path, json!({"title": "Concert", "price": price})).await.unwrap().expect(200).unwrap() }
    });
    let mut versions: Vec<_> = join_all(edits).await.iter().map(|edited| edited["version"].as_i64().unwrap()).collect();
    versions.sort_unstable();
    assert_eq!(versions, (1..=100).collect::<Vec<_>>());
    let announced: Vec<_> = tickets.events().await.iter().map(|(_, version, _)| *version).collect();
    assert_eq!(announced, (0..=100).collect::<Vec<_>>(), "events are not in the order of versions");
}
