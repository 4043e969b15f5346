//! Payments with the id of another payment. The one that is not recorded must become a dead letter.

use crate::records::count;
use crate::system::System;
use anyhow::{Result, ensure};
use serde_json::{Value, json};
use sqlx::{Connection, PgConnection};
use std::time::Duration;
use testkit::{eventually, eventually_within};

const FIRST: &str = "000000000000000000000001";
const SECOND: &str = "000000000000000000000002";

fn payment(id: &str, order: &str, stripe_id: &str) -> Value {
    json!({"id": id, "orderId": order, "stripeId": stripe_id})
}

async fn publish(system: &System, payments: &[Value]) -> Result<()> {
    for payment in payments {
        system.publish("payment.created", payment.clone()).await?;
    }
    Ok(())
}

/// Three orders that can be paid.
async fn orders(system: &System) -> Result<[String; 3]> {
    let tickets = system.tickets(3).await?;
    Ok([
        system.order(0, "buyer", &tickets[0]).await?,
        system.order(0, "buyer", &tickets[1]).await?,
        system.order(0, "buyer", &tickets[2]).await?,
    ])
}

async fn statuses(system: &System, orders: &[String; 3]) -> Result<Vec<Value>> {
    let mut statuses = Vec::new();
    for order in orders {
        let order = system.buyer(0, "buyer").get(&format!("/api/orders/{order}")).await?.expect(200)?;
        statuses.push(order["status"].clone());
    }
    Ok(statuses)
}

/// Waits until exactly these payments are dead letters, each with the content of the recorded payment.
async fn refused(system: &System, expected: &[(&Value, &Value)]) -> Result<()> {
    let mut db = PgConnection::connect(&system.orders_db).await?;
    let letters = eventually_within(Duration::from_mins(1), "the dead letters", async || {
        let letters = "select payload, error, status from bus.dead_letters order by seq";
        let letters: Vec<(Vec<u8>, String, String)> = sqlx::query_as(letters).fetch_all(&mut db).await?;
        let dead = letters.iter().filter(|(_, _, status)| status == "dead").count();
        ensure!(dead == expected.len(), "{dead} dead letters, of {letters:?}");
        anyhow::Ok(letters)
    })
    .await?;
    ensure!(letters.len() == expected.len(), "{letters:?}");
    for ((payload, error, _), (payment, recorded)) in letters.iter().zip(expected) {
        ensure!(*payload == payment.to_string().into_bytes(), "{}", String::from_utf8_lossy(payload));
        let content = |payment: &Value| format!("order {}, stripeId {}", payment["orderId"], payment["stripeId"]);
        let reason = format!(
            "payment {}: content differs from the payment recorded before: {} was recorded, {} was received",
            payment["id"],
            content(recorded),
            content(payment),
        );
        ensure!(*error == reason.replace('"', ""), "{error}");
    }
    Ok(())
}

async fn recorded(system: &System) -> Result<Vec<(String, String, String)>> {
    let mut db = PgConnection::connect(&system.orders_db).await?;
    let payments = "select id, order_id, stripe_id from payments where not refund_due order by id";
    Ok(sqlx::query_as(payments).fetch_all(&mut db).await?)
}

#[tokio::test]
async fn a_payment_that_differs_from_the_recorded_one_becomes_a_dead_letter() -> Result<()> {
    let system = System::start(1, 1).await?;
    let orders = orders(&system).await?;
    let first = payment(FIRST, &orders[0], "pi_1");
    let second = payment(SECOND, &orders[1], "pi_2");
    publish(&system, &[first.clone(), second.clone()]).await?;
    system.caught_up("PAYMENTS", "orders").await?;

    let other_order = payment(FIRST, &orders[2], "pi_1");
    let other_name = payment(SECOND, &orders[1], "pi_3");
    publish(&system, &[other_order.clone(), other_name.clone()]).await?;
    refused(&system, &[(&other_order, &first), (&other_name, &second)]).await?;

    // A second delivery of the recorded payment changes nothing, and does not close the dead letter of the other one.
    publish(&system, &[first.clone(), second.clone()]).await?;
    system.caught_up("PAYMENTS", "orders").await?;
    refused(&system, &[(&other_order, &first), (&other_name, &second)]).await?;
    ensure!(statuses(&system, &orders).await? == ["complete", "complete", "created"]);
    let expected = [(FIRST, &orders[0], "pi_1"), (SECOND, &orders[1], "pi_2")];
    let expected = expected.map(|(id, order, name)| (id.to_owned(), order.clone(), name.to_owned()));
    ensure!(recorded(&system).await? == expected, "{:?}", recorded(&system).await?);
    Ok(())
}

#[tokio::test]
async fn of_two_differing_payments_in_a_batch_one_becomes_a_dead_letter() -> Result<()> {
    let mut system = System::start(1, 1).await?;
    let orders = orders(&system).await?;
    // All payments are in the stream before orders starts again, so that they are one batch.
    system.orders[0].stop(Duration::from_secs(30)).await?;
    let first = payment(FIRST, &orders[0], "pi_1");
    let other_order = payment(FIRST, &orders[2], "pi_1");
    let other_name = payment(FIRST, &orders[0], "pi_3");
    let neighbour = payment(SECOND, &orders[1], "pi_2");
    let batch = [first.clone(), first.clone(), other_order.clone(), other_name.clone(), neighbour];
    publish(&system, &batch).await?;
    system.orders[0] = system.spawn_orders()?;
    system.orders[0].wait_ready().await?;

    eventually("the first payments to be recorded", async || {
        ensure!(recorded(&system).await?.len() == 2);
        anyhow::Ok(())
    })
    .await?;
    refused(&system, &[(&other_order, &first), (&other_name, &first)]).await?;
    ensure!(statuses(&system, &orders).await? == ["complete", "complete", "created"]);
    ensure!(count(&system.orders_db, "select count(*) from payments").await? == 2);
    Ok(())
}

#[tokio::test]
async fn redelivery_does_not_close_the_dead_letter_of_the_other_payment() -> Result<()> {
    let system = System::start(1, 1).await?;
    let orders = orders(&system).await?;
    let first = payment(FIRST, &orders[0], "pi_1");
    let other_order = payment(FIRST, &orders[2], "pi_1");
    publish(&system, &[first.clone(), other_order.clone()]).await?;
    eventually("the refusal", async || {
        let retrying = "select count(*) from bus.dead_letters where status = 'retrying'";
        ensure!(count(&system.orders_db, retrying).await? == 1);
        anyhow::Ok(())
    })
    .await?;
    publish(&system, std::slice::from_ref(&first)).await?;
    refused(&system, &[(&other_order, &first)]).await?;
    ensure!(statuses(&system, &orders).await? == ["complete", "created", "created"]);
    Ok(())
}
