//! Orders that are not paid.

use crate::records::count;
use crate::system::System;
use anyhow::{Result, ensure};
use futures::{StreamExt, TryStreamExt, stream};
use std::time::Duration;
use testkit::{Signal, eventually_within};

const ORDERS: usize = 500;

#[tokio::test]
async fn five_hundred_orders_expire_once_each_at_three_replicas() -> Result<()> {
    let system = System::start_with(2, 3, "2s").await?;
    let tickets = system.tickets(ORDERS).await?;
    let orders: Vec<String> = stream::iter(tickets.iter().enumerate())
        .map(|(number, ticket)| system.order(number, "buyer", ticket))
        .buffer_unordered(8)
        .try_collect()
        .await?;
    eventually_within(Duration::from_secs(30), "all to be free", async || {
        let free = system.seller(0).get("/api/tickets").await?.expect(200)?;
        let (free, versions) = (free.as_array().map_or(0, Vec::len), system.stream().await?.len());
        ensure!(free == ORDERS && versions == ORDERS * 3, "{free} are, after {versions} versions");
        anyhow::Ok(())
    })
    .await?;
    system.settled().await?;
    let events = system.stored("ORDERS").await?;
    ensure!(events.len() == ORDERS * 2, "{} events", events.len());
    for order in orders {
        let subjects: Vec<_> =
            events.iter().filter(|stored| stored.id == order).map(|stored| stored.subject.as_str()).collect();
        ensure!(subjects == ["order.created", "order.cancelled"], "{order}: {subjects:?}");
    }
    Ok(())
}

#[tokio::test]
async fn orders_that_expire_without_a_replica_are_cancelled_after_a_restart() -> Result<()> {
    let mut system = System::start_with(1, 2, "2s").await?;
    let ticket = system.tickets(1).await?.remove(0);
    system.order(0, "buyer", &ticket).await?;
    testkit::eventually("the ticket to be held", async || {
        let seen = system.see(&ticket).await?;
        ensure!(seen["orderId"].is_string(), "{seen}");
        anyhow::Ok(())
    })
    .await?;
    for service in &mut system.orders {
        service.signal(Signal::Kill).await?;
        service.exited().await?;
    }
    testkit::eventually("its time to be over", async || {
        let over = count(&system.orders_db, "select count(*) from orders where expires_at < now()").await?;
        ensure!(over == 1);
        anyhow::Ok(())
    })
    .await?;
    ensure!(system.see(&ticket).await?["orderId"].is_string(), "it was cancelled without a replica of orders");
    system.orders.clear();
    system.add(0, 1).await?;
    testkit::eventually("the ticket to be free", async || {
        let seen = system.see(&ticket).await?;
        ensure!(seen.get("orderId").is_none(), "{seen}");
        anyhow::Ok(())
    })
    .await?;
    system.settled().await
}
