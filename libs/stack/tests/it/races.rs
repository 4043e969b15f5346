//! Two concurrent changes of an order: one wins, and all services agree on it.

use crate::system::System;
use anyhow::{Result, ensure};
use futures::{StreamExt, TryStreamExt, stream};
use serde_json::{Value, json};
use sqlx::{Connection, PgConnection};
use std::time::Duration;
use tokio::time::sleep;

const ROUNDS: usize = 200;

async fn pay(system: &System, order: &str) -> Result<()> {
    let payment = json!({"id": order, "orderId": order, "stripeId": format!("pi_{order}")});
    system.publish("payment.created", payment).await
}

async fn expire(system: &System, order: &str) -> Result<()> {
    system.publish("expiration.complete", json!({"orderId": order})).await
}

/// Cancels the order as its user. Returns the error if the order was already complete.
async fn cancel(system: &System, replica: usize, order: &str) -> Result<Option<Value>> {
    let answer = system.buyer(replica, "buyer").delete(&format!("/api/orders/{order}")).await?;
    ensure!([204, 400].contains(&answer.status), "{}: {}", answer.status, answer.body);
    Ok((answer.status == 400).then_some(answer.body))
}

/// A delay that varies between rounds, so that either change may come first.
async fn lag(round: usize) {
    sleep(Duration::from_millis(round as u64 % 20)).await;
}

/// Waits until the system is at rest, and checks every order and its refund. Returns `(complete, cancelled)`.
async fn outcome(system: &System) -> Result<(usize, usize)> {
    system.settled().await?;
    let mut db = PgConnection::connect(&system.orders_db).await?;
    let sql = "select status, orders.version, refund_due
               from orders left join payments on payments.order_id = orders.id";
    let orders: Vec<(String, i64, Option<bool>)> = sqlx::query_as(sql).fetch_all(&mut db).await?;
    ensure!(orders.len() == ROUNDS, "{} orders", orders.len());
    for (status, version, refund_due) in &orders {
        let ended_once = ["complete", "cancelled"].contains(&status.as_str()) && *version == 1;
        ensure!(ended_once, "an order is {status} at version {version}");
        let expected = if status == "complete" { Some(false) } else { refund_due.and(Some(true)) };
        ensure!(*refund_due == expected, "an order is {status}, and the refund due for its payment: {refund_due:?}");
    }
    let complete = orders.iter().filter(|(status, ..)| status == "complete").count();
    Ok((complete, ROUNDS - complete))
}

/// Runs all rounds, each with its own order.
async fn rounds(system: &System, at_once: usize, round: impl AsyncFn(usize, &str) -> Result<()>) -> Result<()> {
    let tickets = system.tickets(ROUNDS).await?;
    stream::iter(tickets.iter().enumerate())
        .map(async |(number, ticket)| round(number, &system.order(number, "buyer", ticket).await?).await)
        .buffer_unordered(at_once)
        .try_collect()
        .await
}

#[tokio::test]
async fn a_payment_and_a_cancel_have_one_winner() -> Result<()> {
    let system = System::start(1, 2).await?;
    rounds(&system, 8, async |number, order| {
        let late = async {
            lag(number).await;
            cancel(&system, number, order).await
        };
        let (refused, ()) = futures::try_join!(late, pay(&system, order))?;
        let seen = system.buyer(number, "buyer").get(&format!("/api/orders/{order}")).await?.expect(200)?;
        match refused {
            None => ensure!(seen["status"] == "cancelled", "answered 204, and yet {seen}"),
            Some(refused) => {
                ensure!(refused == json!({"errors": [{"message": "Cannot cancel a complete order"}]}), "{refused}");
                ensure!(seen["status"] == "complete", "answered 400, and yet {seen}");
            }
        }
        Ok(())
    })
    .await?;
    let (complete, cancelled) = outcome(&system).await?;
    ensure!(complete > 0 && cancelled > 0, "{complete} paid, {cancelled} cancelled: this was no race");
    Ok(())
}

#[tokio::test]
async fn a_payment_and_an_expiration_event_have_one_winner() -> Result<()> {
    let system = System::start(1, 2).await?;
    rounds(&system, 8, async |_, order| {
        futures::try_join!(pay(&system, order), expire(&system, order))?;
        Ok(())
    })
    .await?;
    let (complete, cancelled) = outcome(&system).await?;
    ensure!(complete > 0 && cancelled > 0, "{complete} paid, {cancelled} expired: this was no race");
    Ok(())
}

#[tokio::test]
async fn an_expiration_event_and_a_cancel_have_one_winner() -> Result<()> {
    let system = System::start(1, 2).await?;
    rounds(&system, 8, async |number, order| {
        let late = async {
            lag(number).await;
            cancel(&system, number, order).await
        };
        let (refused, ()) = futures::try_join!(late, expire(&system, order))?;
        ensure!(refused.is_none(), "an unpaid order is complete");
        Ok(())
    })
    .await?;
    let (complete, _) = outcome(&system).await?;
    ensure!(complete == 0, "{complete} orders are complete");
    Ok(())
}

/// The same with the clock of the service: each order is paid about when its time is over.
#[tokio::test]
async fn a_payment_and_an_expiry_by_the_clock_have_one_winner() -> Result<()> {
    let system = System::start_with(1, 3, "2s").await?;
    rounds(&system, 64, async |number, order| {
        // Before the time is over, and after it, when the expiry may or may not have run.
        sleep(Duration::from_millis(1700 + 6 * number as u64 % 1200)).await;
        pay(&system, order).await
    })
    .await?;
    let (complete, cancelled) = outcome(&system).await?;
    ensure!(complete > 0 && cancelled > 0, "{complete} paid, {cancelled} expired: this was no race");
    Ok(())
}
