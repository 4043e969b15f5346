//! Postgres does not respond, or is stopped.

use crate::orders::{Orders, order, path, start_on};
use futures::future::join_all;
use serde_json::json;
use std::sync::Arc;
use std::time::Duration;
use testkit::{Answer, Postgres, UNAVAILABLE, error, eventually};
use tokio::time::timeout;

/// Longer than the request timeout.
const BOUND: Duration = Duration::from_secs(15);

/// Every kind of request, several at once.
async fn ask(orders: &Orders, held: &str, free: &str) -> Vec<Answer> {
    let answers = join_all((0..24).map(|number| async move {
        let answer = match number % 4 {
            0 => orders.ann.get(held).await,
            1 => orders.ann.get("/api/orders").await,
            2 => orders.ann.delete(held).await,
            _ => orders.ann.post("/api/orders", json!({"ticketId": free})).await,
        };
        answer.unwrap()
    }));
    timeout(BOUND, answers).await.expect("answers in time")
}

fn assert_unavailable(answers: Vec<Answer>) {
    for answer in answers {
        assert_eq!((answer.status, answer.body), (503, error(UNAVAILABLE)));
        assert_eq!(answer.headers["retry-after"], "1");
    }
}

#[tokio::test]
async fn frozen_or_stopped_postgres_gives_503_and_is_used_again_after() {
    let postgres = Arc::new(Postgres::start().await.unwrap());
    let database_url = postgres.database("orders").await.unwrap();
    let orders = start_on(postgres.clone(), database_url).await;
    let [held, free] = orders.tickets().await;
    let held = path(&orders.order(&held).await);
    ask_until_answered(&orders, &held).await;

    postgres.pause().await.unwrap();
    assert_unavailable(ask(&orders, &held, &free).await);
    assert_eq!(orders.anonymous.get("/readyz").await.unwrap().status, 503);
    assert_eq!(orders.anonymous.get("/healthz").await.unwrap().status, 200);
    postgres.unpause().await.unwrap();
    ask_until_answered(&orders, &held).await;

    postgres.kill().await.unwrap();
    assert_unavailable(ask(&orders, &held, &free).await);
    postgres.start_again().await.unwrap();
    ask_until_answered(&orders, &held).await;

    // A request with a 503 may have been committed or not. If it was, row and event are both there.
    let again = order(&orders.bob, &free).await;
    assert!(
        again.status == 201 || again.body == error("Ticket is already reserved"),
        "{} {}",
        again.status,
        again.body
    );
    let sql = "select (select sum(version + 1)::bigint from orders), (select count(*) from bus.outbox),
                      (select count(*) from orders where status <> 'cancelled' and ticket_id = ";
    let (versions, events, live): (i64, i64, i64) = orders.row(&format!("{sql}'{free}')")).await;
    assert_eq!((versions, live), (events, 1));
}

async fn ask_until_answered(orders: &Orders, path: &str) {
    eventually("an answer", async || orders.ann.get(path).await?.expect(200)).await.unwrap();
}
