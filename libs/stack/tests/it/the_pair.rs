//! A ticket created over HTTP reaches the replica of orders through JetStream, exactly once.

use crate::system::System;
use anyhow::{Context, Result, ensure};
use futures::{StreamExt, TryStreamExt, stream};
use serde_json::json;

/// Creates a ticket at 5 and changes it to 10 and to 15, alternating between replicas.
async fn create_change_change(system: &System, number: usize) -> Result<()> {
    let title = format!("Ticket {number}");
    let ticket = system.seller(number).post("/api/tickets", json!({"title": title, "price": 5})).await?.expect(201)?;
    let path = format!("/api/tickets/{}", ticket["id"].as_str().context("an id")?);
    for (replica, price) in [(number + 1, 10), (number, 15)] {
        let change = json!({"title": title, "price": price});
        system.seller(replica).put(&path, change).await?.expect(200)?;
    }
    Ok(())
}

#[tokio::test]
async fn three_hundred_tickets_reach_the_replica_once_and_in_order() -> Result<()> {
    let system = System::start(2, 4).await?;
    stream::iter(0..300)
        .map(|number| create_change_change(&system, number))
        .buffer_unordered(32)
        .try_collect::<()>()
        .await?;
    system.settled().await?;
    ensure!(system.stream().await?.len() == 900, "the stream holds {} events", system.stream().await?.len());
    let replica = system.replica_rows().await?;
    ensure!(replica.len() == 300 && replica.iter().all(|row| row.ends_with("|15.0000|seller|2")), "{replica:?}");
    Ok(())
}

#[tokio::test]
async fn the_trace_context_of_a_request_travels_with_its_event() -> Result<()> {
    let system = System::start(1, 0).await?;
    let traceparent = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
    let request = system.seller(0).request(reqwest::Method::POST, "/api/tickets").header("traceparent", traceparent);
    testkit::Answer::to(request.json(&json!({"title": "Traced", "price": 1}))).await?.expect(201)?;

    let jetstream = system.jetstream().await?;
    let message = testkit::eventually("the event", async || {
        jetstream.get_stream("TICKETS").await?.get_raw_message(1).await.map_err(anyhow::Error::from)
    })
    .await?;
    ensure!(message.headers.get("traceparent").is_some_and(|value| value.as_str() == traceparent), "{message:?}");
    Ok(())
}
