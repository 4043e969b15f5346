use crate::orders::{Orders, path, start};
use futures::future::join_all;
use serde_json::json;
use testkit::eventually;
use tokio::net::TcpStream;

/// Sends a whole request of Ann's, and is gone before the answer.
async fn hang_up(orders: &Orders, method: &str, path: &str, body: String, number: usize) {
    let (token, length) = (testkit::token("ann"), body.len());
    let request = format!(
        "{method} {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {token}\r\nContent-Type: application/json\r\n\
         Content-Length: {length}\r\n\r\n{body}"
    );
    let stream = TcpStream::connect(orders.base.trim_start_matches("http://")).await.unwrap();
    stream.writable().await.unwrap();
    assert_eq!(stream.try_write(request.as_bytes()).unwrap(), request.len(), "it fits into a buffer that is empty");
    // Different moments of the request's life, from "not yet read" on.
    for _ in 0..number % 50 {
        tokio::task::yield_now().await;
    }
}

#[tokio::test]
async fn clients_that_hang_up_leave_no_connection_inside_a_transaction_and_nothing_half_done() {
    let orders = start().await;
    orders.warm_up().await;
    let made = orders.any_orders::<50>().await;
    let tickets = orders.tickets::<250>().await;
    for round in 0..5 {
        join_all(tickets[round * 50..][..50].iter().enumerate().map(async |(number, ticket)| {
            hang_up(&orders, "POST", "/api/orders", json!({"ticketId": ticket}).to_string(), number).await;
        }))
        .await;
        join_all(made[round * 10..][..10].iter().enumerate().map(async |(number, order)| {
            hang_up(&orders, "DELETE", &path(order), String::new(), number * 5).await;
        }))
        .await;
    }
    eventually("all connections to rest outside of transactions", async || {
        let sql = "select count(*) from pg_stat_activity
                   where datname = current_database() and pid <> pg_backend_pid() and state <> 'idle'";
        let (busy,): (i64,) = orders.row(sql).await;
        anyhow::ensure!(busy == 0, "{busy} are not idle");
        Ok(())
    })
    .await
    .unwrap();
    // More at once than there are connections: none of them is lost.
    assert_eq!(join_all((0..64).map(|_| orders.any_order())).await.len(), 64);
    // What was begun was finished: every version has its event.
    let sql = "select (select sum(version + 1)::bigint from orders), (select count(*) from bus.outbox)";
    let (versions, events): (i64, i64) = orders.row(sql).await;
    assert_eq!(versions, events);
}
