use crate::orders::{path, start};
use futures::future::join_all;
use reqwest::Method;
use serde_json::json;

#[tokio::test]
async fn clients_that_hang_up_leave_no_open_transaction_and_no_partial_write() {
    let orders = start().await;
    orders.warm_up().await;
    let made = orders.any_orders::<50>().await;
    let tickets = orders.tickets::<250>().await;
    for round in 0..5 {
        join_all(tickets[round * 50..][..50].iter().enumerate().map(async |(number, ticket)| {
            let body = json!({"ticketId": ticket}).to_string();
            orders.hang_up(&Method::POST, "/api/orders", &body, number).await;
        }))
        .await;
        join_all(made[round * 10..][..10].iter().enumerate().map(async |(number, order)| {
            orders.hang_up(&Method::DELETE, &path(order), "", number * 5).await;
        }))
        .await;
    }
    orders.no_open_transactions().await;
    // More requests at once than connections to Postgres: no connection is lost.
    assert_eq!(join_all((0..64).map(|_| orders.any_order())).await.len(), 64);
    // Every request that began was finished: each version has its event.
    let sql = "select (select sum(version + 1)::bigint from orders), (select count(*) from bus.outbox)";
    let (versions, events): (i64, i64) = orders.row(sql).await;
    assert_eq!(versions, events);
}
