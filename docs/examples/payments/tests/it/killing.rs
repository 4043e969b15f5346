//! Payments is killed (SIGKILL) at every step of a payment, and at random moments.

use crate::provider::card;
use crate::shop::Shop;
use anyhow::{Result, ensure};
use serde_json::json;
use sqlx::{AssertSqlSafe, Executor};
use std::time::Duration;
use testkit::eventually;
use tokio::time::sleep;

impl Shop {
    /// Waits until a statement of payments waits for a lock of the test.
    async fn blocked(&self) -> Result<()> {
        let waiting =
            "select count(*)::int from pg_stat_activity where usename = 'payments' and wait_event_type = 'Lock'";
        let blocked = eventually("a statement to wait for the lock", async || {
            let statements = self.numbers(waiting).await?;
            ensure!(statements == [1], "{statements:?} do");
            Ok(())
        });
        blocked.await.map(drop)
    }

    async fn wait_for_announcement(&self, order: &str) -> Result<()> {
        let announced = eventually("the payment to be in the stream", async || {
            ensure!(self.announced().await?.contains_key(order), "it is not");
            Ok(())
        });
        announced.await
    }
}

#[tokio::test]
async fn killed_at_every_step_it_charges_once_and_announces_once() -> Result<()> {
    let mut shop = Shop::open().await?;
    let mut orders = Vec::new();
    for _ in 0..7 {
        orders.push(shop.order().await?);
    }
    let [intent, lease, request, charge, result, event, position] = <[String; 7]>::try_from(orders.clone()).unwrap();
    let mut lock = shop.db().await?;

    // The intent is not committed: it waits for this row, which takes its place in the unique index.
    let row = format!("begin; insert into payments (id, order_id, user_id, number) values ('x', '{intent}', '', 0)");
    lock.execute(AssertSqlSafe(row)).await?;
    let (client, body) = (shop.client(), json!({"orderId": intent, "token": card::GOOD}));
    let post = tokio::spawn(async move { client.post("/api/payments", body).await });
    shop.blocked().await?;
    shop.kill().await?;
    ensure!(post.await?.is_err(), "it was killed, and has answered");
    lock.execute("rollback").await?;
    shop.restart().await?;
    ensure!(shop.numbers("select count(*)::int from payments").await? == [0], "the payment was committed");
    shop.pay(&intent, card::GOOD).await?;

    // The intent is committed, and no attempt has begun: the worker may not lease.
    lock.execute("revoke update on bus.tasks from payments").await?;
    shop.pay(&lease, card::GOOD).await?;
    shop.kill().await?;
    ensure!(shop.provider.requests(&lease) == 0);
    lock.execute("grant update (status, due_at, attempts, error, updated_at) on bus.tasks to payments").await?;
    shop.restart().await?;

    // The provider has the request, and has charged nothing.
    shop.pay(&request, card::HANGS).await?;
    shop.requested(&request, 1).await?;
    shop.kill_and_restart().await?;
    ensure!(shop.provider.charges(&request) == 0);

    // The provider has charged, and has not answered.
    shop.pay(&charge, card::TIMES_OUT).await?;
    shop.requested(&charge, 1).await?;
    shop.kill_and_restart().await?;
    ensure!(shop.provider.charges(&charge) == 1);

    // The provider has answered, and the result is not committed.
    let payment = shop.pay(&result, card::SLOW).await?;
    lock.execute(AssertSqlSafe(format!("begin; select from payments where id = '{payment}' for update"))).await?;
    shop.blocked().await?;
    shop.kill().await?;
    lock.execute("rollback").await?;
    shop.restart().await?;
    ensure!(shop.status(&payment).await? == "pending" && shop.provider.charges(&result) == 1);

    // The result is committed, and its event is not published.
    shop.nats.stop().await?;
    for order in [&event, &position] {
        let payment = shop.pay(order, card::GOOD).await?;
        shop.wait_for_status(&payment, "charged").await?;
    }
    shop.kill_and_restart().await?;

    // The event is published, and its row is not deleted: that waits for the lock.
    lock.execute("begin; select from bus.outbox for update").await?;
    shop.nats.start_again().await?;
    shop.wait_for_announcement(&event).await?;
    shop.blocked().await?;
    shop.kill().await?;
    lock.execute("rollback").await?;
    shop.restart().await?;

    shop.settled(&orders).await
}

#[tokio::test]
async fn killed_at_random_moments_it_charges_once_and_announces_once() -> Result<()> {
    const ROUNDS: usize = 25;
    let cards = [card::GOOD, card::SLOW, card::FAILS, card::TIMES_OUT, card::BREAKS_OFF, card::TWICE];
    let mut shop = Shop::open().await?;
    let mut orders = Vec::new();
    for round in 0..ROUNDS {
        let order = shop.order().await?;
        let body = json!({"orderId": order, "token": cards[round % cards.len()]});
        let (client, first) = (shop.client(), body.clone());
        let post = tokio::spawn(async move { client.post("/api/payments", first).await });
        sleep(Duration::from_micros(rand::random_range(0..80_000))).await;
        shop.kill_and_restart().await?;
        // Without an answer the client cannot know, and asks again.
        if !post.await?.is_ok_and(|answer| answer.status == 201) {
            let answer = shop.client().post("/api/payments", body).await?;
            let known = answer.status == 400 && answer.body["errors"][0]["message"].as_str().unwrap().contains("paid");
            ensure!(answer.status == 201 || known, "{answer:?}");
        }
        orders.push(order);
    }
    shop.settled(&orders).await
}
