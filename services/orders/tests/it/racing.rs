//! Concurrent requests. Each test checks the rows and the events afterwards.

use crate::orders::{Orders, cancelled, event, order, path, start};
use futures::future::join_all;
use serde_json::{Value, json};
use sqlx::{AssertSqlSafe, Connection, PgConnection};
use std::collections::HashSet;
use std::time::Duration;
use testkit::{Answer, Client, error, eventually, id};
use tokio::time::sleep;

const RESERVED: &str = "Ticket is already reserved";

fn users(orders: &Orders, number: usize) -> Vec<Client> {
    (0..number).map(|number| orders.anonymous.signed_in(&format!("user {number}"))).collect()
}

/// Orders the ticket as soon as it is free.
async fn win(user: &Client, ticket: &str) -> Value {
    let won = eventually("the ticket to be free", async || {
        let answer = order(user, ticket).await;
        // A request that loses the race has no other response.
        assert!(answer.status == 201 || answer.body == error(RESERVED), "{} {}", answer.status, answer.body);
        answer.expect(201)
    });
    won.await.unwrap()
}

/// Replays the events of one ticket in the order of their publication: never two live orders, reservations without gaps,
/// each version of each order once. Returns how many orders there were, and the live one.
async fn replay(orders: &Orders) -> (i64, Option<String>) {
    let (mut reservation, mut live, mut ended) = (0, None, HashSet::new());
    for (subject, version, body) in orders.events().await {
        let order = id(&body).to_owned();
        match subject.as_str() {
            "order.created" => {
                assert_eq!((version, &live), (0, &None), "{body} while another one lives");
                reservation += 1;
                live = Some(order);
            }
            "order.cancelled" => {
                assert_eq!((version, live.take()), (1, Some(order.clone())), "{body} does not live");
                assert!(ended.insert(order));
            }
            other => panic!("{other}: {body}"),
        }
        assert_eq!(body["ticket"]["reservation"], reservation, "{body}");
    }
    let sql = "select count(*), coalesce(sum(version + 1), 0)::bigint, array_agg(reservation order by id),
                      array_agg(id) filter (where status <> 'cancelled')
               from orders";
    let (rows, versions, mut reservations, alive): (i64, i64, Vec<i64>, Option<Vec<String>>) = orders.row(sql).await;
    reservations.sort_unstable();
    assert_eq!((rows, reservations), (reservation, (1..=reservation).collect()));
    assert_eq!(versions, reservation + i64::try_from(ended.len()).unwrap(), "a version was not announced");
    assert_eq!(alive.unwrap_or_default(), Vec::from_iter(live.clone()));
    (reservation, live)
}

#[tokio::test]
async fn of_64_concurrent_orders_of_a_ticket_one_succeeds() {
    let orders = start().await;
    orders.warm_up().await;
    let ticket = orders.ticket().await;
    let users = users(&orders, 64);
    let answers = join_all(users.iter().map(|user| order(user, &ticket))).await;
    let (won, lost): (Vec<_>, Vec<_>) = answers.into_iter().partition(|answer| answer.status == 201);
    for answer in lost {
        assert_eq!((answer.status, answer.body), (400, error(RESERVED)));
    }
    let [won] = won.as_slice() else { panic!("{} have the ticket", won.len()) };
    assert_eq!(orders.events().await, [event("order.created", &won.body, 1)]);
    assert_eq!(replay(&orders).await, (1, Some(id(&won.body).to_owned())));
}

#[tokio::test]
async fn fifty_concurrent_cancels_of_an_order_cancel_it_once() {
    let orders = start().await;
    orders.warm_up().await;
    for _ in 0..5 {
        let order = orders.any_order().await;
        let path = path(&order);
        for answer in join_all((0..50).map(|_| orders.ann.delete(&path))).await {
            answer.unwrap().expect(204).unwrap();
        }
        assert_eq!(orders.show(&order).await, cancelled(&order));
        let events = orders.events().await;
        let (created, gone) = (event("order.created", &order, 1), event("order.cancelled", &cancelled(&order), 1));
        assert_eq!(events[events.len() - 2..], [created, gone]);
    }
    assert_eq!(orders.events().await.len(), 10);
}

#[tokio::test]
async fn a_ticket_under_orders_and_cancels_never_has_two_live_orders() {
    let orders = start().await;
    orders.warm_up().await;
    let ticket = orders.ticket().await;
    let users = users(&orders, 8);
    join_all(users.iter().map(async |user| {
        for _ in 0..12 {
            let path = path(&win(user, &ticket).await);
            // A user clicks twice.
            for answer in join_all([user.delete(&path), user.delete(&path)]).await {
                answer.unwrap().expect(204).unwrap();
            }
        }
    }))
    .await;
    assert_eq!(replay(&orders).await, (8 * 12, None));
}

#[tokio::test]
async fn an_order_of_a_changing_ticket_has_fields_of_one_version() {
    let orders = start().await;
    orders.warm_up().await;
    let ticket = orders.ticket().await;
    let mut db = PgConnection::connect(&orders.database_url).await.unwrap();
    let sql = "update ticket_replica set version = version + 1, price = version + 1, title = (version + 1)::text";
    sqlx::query(sql).execute(&mut db).await.unwrap();
    let change = async {
        loop {
            sqlx::query(sql).execute(&mut db).await.unwrap();
            // Slow enough for an order now and then: an order starts again if its ticket has changed meanwhile.
            sleep(Duration::from_millis(2)).await;
        }
    };
    let users = users(&orders, 8);
    let buy = join_all(users.iter().map(async |user| {
        let mut bought = Vec::new();
        for _ in 0..8 {
            let order = win(user, &ticket).await;
            let version = order["ticket"]["version"].as_i64().unwrap();
            let expected = json!({"id": ticket, "title": version.to_string(), "price": version, "version": version});
            assert_eq!(order["ticket"], expected);
            user.delete(&path(&order)).await.unwrap().expect(204).unwrap();
            bought.push(cancelled(&order));
        }
        // The row is equal to the response.
        assert_eq!(user.get("/api/orders").await.unwrap().expect(200).unwrap(), json!(bought));
    }));
    tokio::select! {
        _ = buy => {}
        () = change => {}
    }
    assert_eq!(replay(&orders).await, (8 * 8, None));
    for (_, _, body) in orders.events().await {
        assert_eq!(body["ticket"]["price"], body["ticket"]["version"], "{body}");
    }
}

/// Runs a competing transaction that commits only when `answer` waits for it.
async fn behind(orders: &Orders, sql: &str, end: &str, answer: impl Future<Output = anyhow::Result<Answer>>) -> Answer {
    let mut first = PgConnection::connect(&orders.database_url).await.unwrap();
    sqlx::query("begin").execute(&mut first).await.unwrap();
    sqlx::query(AssertSqlSafe(sql.to_owned())).execute(&mut first).await.unwrap();
    let let_go = async {
        let waiting = eventually("the request to wait for a lock", async || {
            let (waiting,): (i64,) = orders
                .row(
                    "select count(*) from pg_locks join pg_stat_activity using (pid)
                     where not granted and datname = current_database()",
                )
                .await;
            waiting > 0
        });
        waiting.await.unwrap();
        sqlx::query(AssertSqlSafe(end.to_owned())).execute(&mut first).await.unwrap();
    };
    tokio::join!(answer, let_go).0.unwrap()
}

#[tokio::test]
async fn a_request_that_loses_to_an_open_transaction_sees_its_result() {
    let orders = start().await;
    orders.warm_up().await;
    // A payment completes the order while its user cancels it.
    let (complete, refused) = ("set status = 'complete', version = version + 1", "Cannot cancel a complete order");
    for (end, status, body) in [("commit", 400, error(refused)), ("rollback", 204, json!(null))] {
        let path = path(&orders.any_order().await);
        let sql = format!("update orders {complete} where id = '{}'", path.rsplit('/').next().unwrap());
        let answer = behind(&orders, &sql, end, orders.ann.delete(&path)).await;
        assert_eq!((answer.status, answer.body), (status, body), "{end}");
    }
    // Two users order one ticket.
    let first = "insert into orders
                     (id, user_id, status, expires_at, ticket_id, title, price, ticket_version, reservation, version)
                 select id, 'bob', 'created', now() + interval '1 hour', id, title, price, version, 1, 0
                 from ticket_replica";
    for (end, status) in [("commit", 400), ("rollback", 201)] {
        let ticket = orders.ticket().await;
        let sql = format!("{first} where id = '{ticket}'");
        let answer = behind(&orders, &sql, end, orders.ann.post("/api/orders", json!({"ticketId": ticket}))).await;
        assert_eq!(answer.status, status, "{end}: {}", answer.body);
        assert!(status == 201 || answer.body == error(RESERVED), "{}", answer.body);
    }
}
