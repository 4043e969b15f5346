//! The events of the payments service and of an external timer.

use crate::records::count;
use crate::system::System;
use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use sqlx::{Connection, PgConnection};
use std::time::Duration;
use testkit::{eventually, eventually_within};

struct Story {
    system: System,
    ticket: String,
    order: String,
}

impl Story {
    async fn start() -> Result<Self> {
        let system = System::start(1, 1).await?;
        let ticket = system.tickets(1).await?.remove(0);
        let order = system.order(0, "buyer", &ticket).await?;
        Ok(Self { system, ticket, order })
    }

    async fn order(&self) -> Result<Value> {
        self.system.buyer(0, "buyer").get(&format!("/api/orders/{}", self.order)).await?.expect(200)
    }

    /// Publishes the payment with this number, and waits until it is applied.
    async fn pay(&self, number: u8) -> Result<()> {
        let payment =
            json!({"id": format!("{number:024x}"), "orderId": self.order, "stripeId": format!("pi_{number}")});
        self.system.publish("payment.created", payment).await?;
        self.system.caught_up("PAYMENTS", "orders").await
    }

    async fn expire(&self) -> Result<()> {
        self.system.publish("expiration.complete", json!({"orderId": self.order})).await?;
        self.system.caught_up("EXPIRATION", "orders").await
    }

    async fn cancel(&self) -> Result<()> {
        self.system.buyer(0, "buyer").delete(&format!("/api/orders/{}", self.order)).await?.expect(204)?;
        Ok(())
    }

    /// The refunds that are due: in the table, in the metric, and in the log.
    async fn refunds_due(&self) -> Result<(i64, String, usize)> {
        let rows = count(&self.system.orders_db, "select count(*) from payments where refund_due").await?;
        let metrics = self.system.orders[0].client().get("/metrics").await?.expect(200)?;
        let metrics = metrics.as_str().context("metrics are text")?;
        let metric = metrics.lines().find(|line| line.starts_with("orders_refunds_due_total")).unwrap_or_default();
        let warnings = self.system.orders[0].logs();
        let warnings =
            warnings.lines().filter(|line| line.contains("WARN") && line.contains("a refund is due")).count();
        Ok((rows, metric.replace("orders_refunds_due_total ", ""), warnings))
    }
}

#[tokio::test]
async fn a_payment_completes_its_order_and_the_ticket_stays_held() -> Result<()> {
    let story = Story::start().await?;
    story.pay(1).await?;
    // The payment is delivered again, and the order expires after it was paid.
    story.pay(1).await?;
    story.expire().await?;
    let order = story.order().await?;
    ensure!(order["status"] == "complete" && order["version"] == 1, "{order}");
    story.system.settled().await?;
    ensure!(story.system.see(&story.ticket).await?["orderId"] == json!(story.order));
    let events = story.system.stored("ORDERS").await?;
    let (subjects, last) = (events.iter().map(|stored| stored.subject.as_str()).collect::<Vec<_>>(), &events[1].body);
    ensure!(subjects == ["order.created", "order.completed"], "{subjects:?}");
    ensure!(last["status"] == "complete" && last["ticket"]["reservation"] == 1, "{last}");
    ensure!(story.refunds_due().await? == (0, "0".to_owned(), 0), "{:?}", story.refunds_due().await?);

    // A user has paid twice.
    story.pay(2).await?;
    ensure!(story.order().await? == order);
    ensure!(story.refunds_due().await? == (1, "1".to_owned(), 1), "{:?}", story.refunds_due().await?);
    Ok(())
}

#[tokio::test]
async fn a_payment_of_a_cancelled_order_is_one_refund_and_changes_nothing() -> Result<()> {
    let story = Story::start().await?;
    story.cancel().await?;
    let cancelled = story.order().await?;
    for _ in 0..3 {
        story.pay(1).await?;
    }
    ensure!(story.order().await? == cancelled && cancelled["status"] == "cancelled", "{cancelled}");
    ensure!(story.refunds_due().await? == (1, "1".to_owned(), 1), "{:?}", story.refunds_due().await?);
    story.system.settled().await
}

#[tokio::test]
async fn an_external_timer_cancels_only_orders_in_status_created() -> Result<()> {
    let story = Story::start().await?;
    story.expire().await?;
    story.expire().await?;
    let order = story.order().await?;
    ensure!(order["status"] == "cancelled" && order["version"] == 1, "{order}");
    story.system.settled().await?;
    ensure!(story.system.see(&story.ticket).await?.get("orderId").is_none());

    let order = story.system.order(0, "buyer", &story.ticket).await?;
    let story = Story { order, ..story };
    let mut db = PgConnection::connect(&story.system.orders_db).await?;
    let under_way = "update orders set status = 'awaiting:payment' where status = 'created'";
    sqlx::query(under_way).execute(&mut db).await?;
    story.expire().await?;
    ensure!(story.order().await?["status"] == "awaiting:payment");
    story.pay(1).await?;
    ensure!(story.order().await?["status"] == "complete");
    Ok(())
}

#[tokio::test]
async fn a_payment_of_an_unknown_order_is_retried_then_a_dead_letter() -> Result<()> {
    let story = Story::start().await?;
    let stray = json!({"id": format!("{:024x}", 9), "orderId": "ffffffffffffffffffffffff", "stripeId": "pi_9"});
    story.system.publish("payment.created", stray).await?;
    let payment = json!({"id": format!("{:024x}", 1), "orderId": story.order, "stripeId": "pi_1"});
    story.system.publish("payment.created", payment).await?;
    eventually("the order to be complete", async || {
        let order = story.order().await?;
        ensure!(order["status"] == "complete", "{order}");
        anyhow::Ok(())
    })
    .await?;
    eventually_within(Duration::from_mins(1), "the dead letter", async || {
        let sql = "select count(*) from bus.dead_letters where status = 'dead' and attempts = 5
                   and error = 'payment 000000000000000000000009: order ffffffffffffffffffffffff does not exist'";
        ensure!(count(&story.system.orders_db, sql).await? == 1);
        anyhow::Ok(())
    })
    .await?;
    let metrics = story.system.orders[0].client().get("/metrics").await?.expect(200)?;
    let counted = "event_bus_dead_letters_total{stream=\"PAYMENTS\"} 1";
    ensure!(metrics.as_str().is_some_and(|metrics| metrics.contains(counted)), "{metrics}");
    Ok(())
}
