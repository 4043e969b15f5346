use crate::tickets::{path, start};
use futures::future::join_all;
use reqwest::Method;
use serde_json::json;

#[tokio::test]
async fn a_thousand_clients_that_hang_up_leave_no_open_transaction() {
    let tickets = start().await;
    let ticket = path(&tickets.ticket().await);
    let routes = [(Method::POST, "/api/tickets"), (Method::PUT, ticket.as_str())];
    for round in 0..20 {
        join_all((0..50).map(async |number| {
            let (method, path) = &routes[number % 2];
            let body = json!({"title": format!("Hung up {}", round * 50 + number), "price": 7}).to_string();
            tickets.hang_up(method, path, &body, number).await;
        }))
        .await;
    }
    tickets.no_open_transactions().await;
    // More requests at once than connections to Postgres: no connection is lost.
    let made = join_all((0..64).map(|_| tickets.ticket())).await;
    assert_eq!(made.len(), 64);
    // Every request that began was finished: each version has its event. One query, because some may still run.
    let sql = "select (select sum(version + 1)::bigint from tickets), (select count(*) from bus.outbox)";
    let (versions, events): (i64, i64) = tickets.row(sql).await;
    assert_eq!(versions, events);
}
