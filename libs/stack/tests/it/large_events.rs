//! A backlog of events of the largest permitted size, larger than the memory of a process.

use crate::system::System;
use anyhow::{Result, ensure};
use futures::future::try_join_all;
use serde_json::json;
use std::time::Duration;
use testkit::eventually_within;

/// Memory that no process may exceed, in kB.
const LIMIT: u64 = 64 << 10;
const EVENTS: usize = 512;

#[tokio::test]
async fn a_backlog_of_events_of_a_megabyte_is_applied_in_little_memory() -> Result<()> {
    let mut system = System::start(1, 0).await?;
    let mut jetstream = system.jetstream().await?;
    jetstream.set_timeout(Duration::from_secs(30)); // the disk of a busy machine
    let title = "x".repeat(1_000_000);
    for first in (0..EVENTS).step_by(16) {
        let publish = async |number: usize| {
            let id = format!("{number:024x}");
            let event = json!({"id": id, "version": 0, "title": title, "price": 5, "userId": "seller"});
            jetstream.publish("ticket.created", event.to_string().into()).await?.await?;
            anyhow::Ok(())
        };
        try_join_all((first..first + 16).map(publish)).await?;
    }
    // The relay of tickets reads them: they are at the position of its own event.
    system.ticket().await?;
    system.orders.push(system.spawn_orders()?);
    system.orders[0].wait_ready().await?;
    eventually_within(Duration::from_mins(2), "orders to apply all of them", async || {
        let place = system.place("TICKETS", "orders").await?;
        ensure!(place.num_pending == 0 && place.num_ack_pending == 0, "{} to deliver", place.num_pending);
        ensure!(place.delivered.stream_sequence > EVENTS as u64, "the event of tickets is missing");
        anyhow::Ok(())
    })
    .await?;
    for service in [&system.tickets[0], &system.orders[0]] {
        let peak = service.memory_peak()?;
        ensure!(peak < LIMIT, "{service} has taken {peak} kB");
    }
    Ok(())
}
