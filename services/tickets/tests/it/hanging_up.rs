use crate::tickets::{Tickets, path, start};
use futures::future::join_all;
use serde_json::json;
use sqlx::{Connection, PgConnection};
use testkit::eventually;
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;

/// Sends a whole request, and is gone before the answer.
async fn hang_up(tickets: &Tickets, path: &str, number: usize) {
    let body = json!({"title": format!("Hung up {number}"), "price": 7}).to_string();
    let (method, token, length) =
        (if path.ends_with("tickets") { "POST" } else { "PUT" }, testkit::token("ann"), body.len());
    let request = format!(
        "{method} {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {token}\r\nContent-Type: application/json\r\n\
         Content-Length: {length}\r\n\r\n{body}"
    );
    let mut stream = TcpStream::connect(tickets.base.trim_start_matches("http://")).await.unwrap();
    stream.write_all(request.as_bytes()).await.unwrap();
    // Different moments of the request's life, from "not yet read" on.
    for _ in 0..number % 50 {
        tokio::task::yield_now().await;
    }
}

#[tokio::test]
async fn a_thousand_clients_that_hang_up_leave_no_connection_inside_a_transaction() {
    let tickets = start().await;
    let ticket = path(&tickets.ticket().await);
    for round in 0..20 {
        join_all((0..50).map(|number| {
            hang_up(&tickets, if number % 2 == 0 { "/api/tickets" } else { &ticket }, round * 50 + number)
        }))
        .await;
    }
    let mut db = PgConnection::connect(&tickets.database_url).await.unwrap();
    eventually("all connections to rest outside of transactions", async || {
        let sql = "select count(*) from pg_stat_activity
                   where datname = current_database() and pid <> pg_backend_pid() and state <> 'idle'";
        let busy: i64 = sqlx::query_scalar(sql).fetch_one(&mut db).await?;
        anyhow::ensure!(busy == 0, "{busy} are not idle");
        Ok(())
    })
    .await
    .unwrap();
    // More at once than there are connections: none of them is lost.
    let made = join_all((0..64).map(|_| tickets.ticket())).await;
    assert_eq!(made.len(), 64);
    // What was begun was finished: every version has its event. In one look, since some may still be at it.
    let sql = "select (select sum(version + 1)::bigint from tickets), (select count(*) from bus.outbox)";
    let (versions, events): (i64, i64) = sqlx::query_as(sql).fetch_one(&mut db).await.unwrap();
    assert_eq!(versions, events);
}
