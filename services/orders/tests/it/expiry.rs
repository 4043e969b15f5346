use crate::orders::{Orders, cancelled, event, order, path, start_on, start_with};
use futures::future::join_all;
use serde_json::Value;
use sqlx::{AssertSqlSafe, Connection, Executor, PgConnection};
use testkit::{Postgres, eventually, id};

/// A service whose Postgres has a clock that can [`leap`]: its own `now()` shadows the built-in one.
async fn start_with_a_clock_that_leaps() -> Orders {
    let postgres = Postgres::shared().await.unwrap();
    let database_url = postgres.database("orders").await.unwrap();
    let name = database_url.rsplit('/').next().unwrap();
    let mut db = PgConnection::connect(&database_url).await.unwrap();
    let sql = format!("alter database {name} set search_path = public, pg_catalog; {}", clock(0));
    db.execute(AssertSqlSafe(sql)).await.unwrap();
    start_on(postgres, database_url).await
}

/// Sets the clock this many minutes ahead of the real time.
async fn leap(orders: &Orders, minutes: u32) {
    orders.sql(&clock(minutes)).await;
}

fn clock(minutes: u32) -> String {
    format!(
        "create or replace function public.now() returns timestamptz language sql stable
         return pg_catalog.now() + interval '{minutes} minutes'"
    )
}

async fn expired(orders: &Orders, order: &Value) {
    eventually("the order to expire", async || orders.show(order).await == cancelled(order)).await.unwrap();
}

#[tokio::test]
async fn an_order_not_paid_in_time_is_cancelled_and_its_ticket_is_free() {
    let orders = start_with(&["--order-ttl", "1s"]).await;
    let ticket = orders.ticket().await;
    let first = orders.order(&ticket).await;
    expired(&orders, &first).await;
    let (late,): (bool,) = orders.row("select updated_at >= expires_at from orders").await;
    assert!(late, "it was cancelled before its time");
    let announced = [event("order.created", &first, 1), event("order.cancelled", &cancelled(&first), 1)];
    assert_eq!(orders.events().await, announced);

    // Its user cancels it too late: the response is the same.
    orders.ann.delete(&path(&first)).await.unwrap().expect(204).unwrap();
    assert_eq!(orders.events().await, announced);
    let second = order(&orders.bob, &ticket).await.expect(201).unwrap();
    assert_eq!(orders.events().await[2], event("order.created", &second, 2));
}

#[tokio::test]
async fn only_an_order_without_a_payment_under_way_expires() {
    let orders = start_with_a_clock_that_leaps().await;
    // In the order of their expiry.
    let [paying, paid, given_up, created] = orders.any_orders().await;
    orders.set_status(&paying, "awaiting:payment").await;
    orders.set_status(&paid, "complete").await;
    orders.ann.delete(&path(&given_up)).await.unwrap().expect(204).unwrap();
    let mut before = Vec::new();
    for order in [&paying, &paid, &given_up] {
        before.push(orders.everything(order).await);
    }
    leap(&orders, 60).await;
    expired(&orders, &created).await;
    let mut after = Vec::new();
    for order in [&paying, &paid, &given_up] {
        after.push(orders.everything(order).await);
    }
    assert_eq!(after, before);
    assert_eq!(orders.events().await[5..], [event("order.cancelled", &cancelled(&created), 1)]);
}

#[tokio::test]
async fn orders_expire_by_the_clock_of_postgres() {
    let orders = start_with_a_clock_that_leaps().await;
    let early = orders.any_order().await;
    leap(&orders, 10).await;
    let late = orders.any_order().await;
    leap(&orders, 16).await;
    expired(&orders, &early).await;
    assert_eq!(orders.show(&late).await, late);
    let sql =
        format!("select expires_at > pg_catalog.now() + interval '24 minutes' from orders where id = '{}'", id(&late));
    assert!(orders.row::<(bool,)>(&sql).await.0, "{late} was made ten minutes later by the clock");
    leap(&orders, 26).await;
    expired(&orders, &late).await;
}

#[tokio::test]
async fn orders_cancelled_while_they_expire_are_cancelled_once() {
    let orders = start_with_a_clock_that_leaps().await;
    orders.warm_up().await;
    // More orders than one transaction expires.
    let mut made = Vec::new();
    for _ in 0..38 {
        let tickets = orders.tickets::<16>().await;
        made.extend(join_all(tickets.iter().map(|ticket| orders.order(ticket))).await);
    }
    leap(&orders, 16).await;
    // Their user cancels them in the order of their expiry, and is not done when they expire.
    for order in &made {
        orders.ann.delete(&path(order)).await.unwrap().expect(204).unwrap();
    }
    let list = eventually("all orders to expire", async || {
        let list = orders.ann.get("/api/orders").await?.expect(200)?;
        let left = list.as_array().unwrap().iter().filter(|order| order["status"] != "cancelled").count();
        anyhow::ensure!(left == 0, "{left} have not");
        Ok(list)
    });
    // Sorted by id: concurrent orders are not created in the order of their responses.
    let mut list = list.await.unwrap().as_array().unwrap().clone();
    list.sort_by(|one, other| id(one).cmp(id(other)));
    let mut expected: Vec<_> = made.iter().map(cancelled).collect();
    expected.sort_by(|one, other| id(one).cmp(id(other)));
    assert_eq!(list, expected);
    let mut announced: Vec<_> = orders.events().await.into_iter().filter(|(_, version, _)| *version == 1).collect();
    announced.sort_by(|(_, _, one), (_, _, other)| id(one).cmp(id(other)));
    let events: Vec<_> = expected.iter().map(|order| event("order.cancelled", order, 1)).collect();
    assert_eq!(announced, events);
}

#[tokio::test]
async fn an_order_expires_while_requests_hold_all_connections_for_requests() {
    let orders = start_with(&["--order-ttl", "3s", "--database-connections", "1"]).await;
    let [first, second] = [orders.ticket().await, orders.ticket().await];
    let (expiring, locked) = (orders.order(&first).await, orders.order(&second).await);
    let mut holder = PgConnection::connect(&orders.database_url).await.unwrap();
    let lock = format!("begin; select from orders where id = '{}' for update", id(&locked));
    holder.execute(AssertSqlSafe(lock)).await.unwrap();
    let (ann, path) = (orders.ann.clone(), path(&locked));
    let waiting = tokio::spawn(async move { ann.delete(&path).await });

    eventually("the order to expire", async || {
        let sql = format!("select count(*) from orders where id = '{}' and status = 'cancelled'", id(&expiring));
        orders.row::<(i64,)>(&sql).await == (1,)
    })
    .await
    .unwrap();
    assert!(!waiting.is_finished(), "the only connection was free");
    holder.execute("rollback").await.unwrap();
    waiting.await.unwrap().unwrap().expect(204).unwrap();
}
