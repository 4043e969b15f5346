//! A new ticket can be ordered at once, however large the lag of the stream is.

use crate::records::count;
use crate::system::System;
use anyhow::{Context, Result, ensure};
use futures::StreamExt;
use serde_json::{Value, json};
use sqlx::{Connection, PgConnection};
use std::time::Duration;
use testkit::{Client, Signal, eventually};
use tokio::time::{Instant, timeout};

/// Locks the relay of tickets: while the connection is held, no event is published.
async fn hold_relay(system: &System) -> Result<PgConnection> {
    let mut holder = PgConnection::connect(&system.tickets_db).await?;
    eventually("the relay's row", async || {
        ensure!(count(&system.tickets_db, "select count(*) from bus.relay").await? == 1);
        anyhow::Ok(())
    })
    .await?;
    sqlx::query("begin").execute(&mut holder).await?;
    sqlx::query("select 1 from bus.relay for update").execute(&mut holder).await?;
    Ok(holder)
}

/// Orders a ticket that does not exist. Returns the response time.
async fn order_nothing(buyer: &Client, status: u16) -> Result<Duration> {
    let begun = Instant::now();
    let answer = buyer.post("/api/orders", json!({"ticketId": "ffffffffffffffffffffffff"})).await?;
    let elapsed = begun.elapsed();
    ensure!(answer.headers.contains_key("retry-after") == (status == 503), "{answer:?}");
    answer.expect(status)?;
    Ok(elapsed)
}

/// Sends a request to all replicas of tickets, as `nats micro` does.
async fn micro(system: &System, verb: &str) -> Result<Vec<Value>> {
    let nats = system.nats.connect().await?;
    let inbox = nats.new_inbox();
    let mut answers = nats.subscribe(inbox.clone()).await?;
    nats.publish_with_reply(format!("$SRV.{verb}.tickets"), inbox, "".into()).await?;
    let mut replicas = Vec::new();
    // The number of replicas is unknown: it ends when no more replies come.
    while let Ok(answer) = timeout(Duration::from_secs(1), answers.next()).await {
        replicas.push(serde_json::from_slice(&answer.context("the subscription ended")?.payload)?);
    }
    Ok(replicas)
}

#[tokio::test]
async fn a_ticket_whose_event_has_not_arrived_can_be_ordered_at_once() -> Result<()> {
    let system = System::start(2, 2).await?;
    let holder = hold_relay(&system).await?;
    for number in 0..20 {
        let body = json!({"title": format!("Ticket {number}"), "price": 20 + number});
        let ticket = system.seller(number).post("/api/tickets", body).await?.expect(201)?;
        // On a busy machine a reply may be late; then the buyer tries again.
        let order = eventually("the order", async || {
            let body = json!({"ticketId": ticket["id"]});
            system.buyer(number, "buyer").post("/api/orders", body).await?.expect(201)
        })
        .await?;
        let expected = json!({"id": ticket["id"], "title": ticket["title"], "price": ticket["price"], "version": 0});
        ensure!(order["ticket"] == expected, "{order}");
    }
    ensure!(system.stream().await?.is_empty(), "the stream does not lag");

    // Each request went to one replica, and both got some.
    let stats = micro(&system, "STATS").await?;
    let shares: Vec<_> = stats.iter().map(|replica| replica["endpoints"][0]["num_requests"].as_u64()).collect();
    ensure!(shares.len() == 2 && shares.iter().all(|share| *share > Some(0)), "{shares:?}");
    drop(holder);
    system.settled().await
}

#[tokio::test]
async fn the_endpoint_is_listed_by_the_tools_of_nats() -> Result<()> {
    let system = System::start(2, 0).await?;
    let replicas = eventually("both replicas", async || {
        let replicas = micro(&system, "INFO").await?;
        ensure!(replicas.len() == 2, "{} replicas", replicas.len());
        anyhow::Ok(replicas)
    })
    .await?;
    for replica in replicas {
        let endpoint = &replica["endpoints"][0];
        ensure!(replica["name"] == "tickets" && endpoint["name"] == "show", "{replica}");
        ensure!(endpoint["subject"] == "tickets.show" && endpoint["queue_group"] == "tickets", "{replica}");
    }
    Ok(())
}

#[tokio::test]
async fn unknown_ticket_is_404_only_by_a_reply_of_tickets_and_503_otherwise() -> Result<()> {
    let system = System::start(1, 1).await?;
    let buyer = system.buyer(0, "buyer");
    eventually("tickets to reply to requests", async || {
        ensure!(!micro(&system, "PING").await?.is_empty());
        anyhow::Ok(())
    })
    .await?;
    // Tickets replies that it does not exist. On a busy machine the reply may be late, which is a 503.
    eventually("a reply of tickets", async || order_nothing(&buyer, 404).await).await?;
    // Tickets replies with an error: its table is gone.
    let mut db = PgConnection::connect(&system.tickets_db).await?;
    sqlx::query("alter table tickets rename to hidden").execute(&mut db).await?;
    order_nothing(&buyer, 503).await?;
    // Tickets is frozen: the request times out.
    system.tickets[0].signal(Signal::Stop).await?;
    eventually("tickets to be frozen", async || {
        let waited = order_nothing(&buyer, 503).await?;
        ensure!(waited >= Duration::from_millis(300) && waited < Duration::from_secs(1), "{waited:?}");
        anyhow::Ok(())
    })
    .await?;
    // Tickets is dead: NATS reports that there is no responder.
    system.tickets[0].signal(Signal::Kill).await?;
    eventually("NATS to notice", async || {
        ensure!(order_nothing(&buyer, 503).await? < Duration::from_millis(300));
        anyhow::Ok(())
    })
    .await?;
    system.nats.stop().await?;
    let waited = order_nothing(&buyer, 503).await?;
    ensure!(waited < Duration::from_secs(1), "{waited:?}");
    Ok(())
}
