//! NATS is killed, frozen, or loses its data. HTTP continues.

use crate::system::System;
use anyhow::{Result, ensure};
use serde_json::json;
use std::time::Duration;
use testkit::{eventually, eventually_within};
use tokio::time::Instant;

const OUTAGE: Duration = Duration::from_secs(20);

/// Writes until `until`. Every response must be a success.
async fn write_until(system: &System, writer: usize, until: Instant) -> Result<usize> {
    let mut writes = 0;
    while Instant::now() < until {
        let seller = system.seller(writer);
        let body = json!({"title": format!("Ticket {writer}/{writes}"), "price": 5});
        let ticket = seller.post("/api/tickets", body).await?.expect(201)?;
        let path = format!("/api/tickets/{}", ticket["id"].as_str().unwrap_or_default());
        seller.put(&path, json!({"title": "Changed", "price": 6})).await?.expect(200)?;
        writes += 2;
    }
    Ok(writes)
}

#[tokio::test]
async fn nats_killed_for_20_s_under_load_fails_no_write_and_loses_no_event() -> Result<()> {
    let system = System::start(2, 2).await?;
    let until = Instant::now() + OUTAGE + Duration::from_secs(2);
    let outage = async {
        tokio::time::sleep(Duration::from_secs(1)).await; // in the middle of the load
        system.nats.kill().await?;
        tokio::time::sleep(OUTAGE).await; // the outage
        system.nats.start_again().await
    };
    let writers = futures::future::try_join_all((0..8).map(|writer| write_until(&system, writer, until)));
    let (writes, ()) = futures::try_join!(writers, outage)?;
    system.settled().await?;
    let (written, stored) = (writes.iter().sum::<usize>(), system.stream().await?.len());
    ensure!(written == stored, "{written} writes succeeded, {stored} events are in the stream");
    Ok(())
}

#[tokio::test]
async fn frozen_nats_fails_no_write_and_all_events_arrive_afterwards() -> Result<()> {
    let system = System::start(1, 1).await?;
    write_until(&system, 0, Instant::now() + Duration::from_secs(1)).await?;
    system.nats.pause().await?;
    let until = Instant::now() + Duration::from_secs(12); // long enough for pings, pulls and publishes to time out
    write_until(&system, 0, until).await?;
    system.nats.unpause().await?;
    system.settled().await
}

#[tokio::test]
async fn lost_stream_is_logged_as_an_error_and_http_continues() -> Result<()> {
    let system = System::start(1, 1).await?;
    write_until(&system, 0, Instant::now() + Duration::from_millis(300)).await?;
    system.settled().await?;
    system.jetstream().await?.delete_stream("TICKETS").await?;
    system.nats.restart().await?;
    stack::provision(&system.nats.server(), 1).await?;
    system.seller(0).post("/api/tickets", json!({"title": "After", "price": 5})).await?.expect(201)?;
    eventually("the error", async || {
        let log = system.tickets[0].logs();
        let error = log.lines().find(|line| line.contains("lost history")).map(str::to_owned);
        let error = error.ok_or_else(|| anyhow::anyhow!("nothing of it in:\n{log}"))?;
        ensure!(error.contains("ERROR") && error.contains("TICKETS"), "{error}");
        anyhow::Ok(())
    })
    .await?;
    system.seller(0).post("/api/tickets", json!({"title": "Later", "price": 5})).await?.expect(201)?;
    Ok(())
}

#[tokio::test]
async fn deleted_consumer_is_created_again_by_a_service_with_the_rights() -> Result<()> {
    let mut system = System { nats_user: Some("admin"), ..System::prepared().await? };
    system.add(1, 1).await?;
    write_until(&system, 0, Instant::now() + Duration::from_millis(300)).await?;
    system.settled().await?;
    system.jetstream().await?.get_stream("TICKETS").await?.delete_consumer("orders").await?;
    write_until(&system, 0, Instant::now() + Duration::from_millis(300)).await?;
    eventually_within(Duration::from_secs(30), "a new consumer", async || system.consumer().await).await?;
    system.settled().await
}

/// The lines of a log with the level of a warning or an error.
fn warnings(log: &str) -> Vec<&str> {
    log.lines().filter(|line| line.contains(" WARN ") || line.contains("ERROR")).collect()
}

#[tokio::test]
async fn an_outage_is_logged_once_when_it_begins_and_once_when_it_ends() -> Result<()> {
    let system = System::start(1, 1).await?;
    system.nats.pause().await?;
    let until = Instant::now() + Duration::from_secs(12);
    let ask = async |user: usize| {
        let buyer = system.buyer(0, &format!("user {user}"));
        while Instant::now() < until {
            let answer = buyer.post("/api/orders", json!({"ticketId": "ffffffffffffffffffffffff"})).await?;
            ensure!(answer.status != 201, "{}", answer.body);
        }
        anyhow::Ok(())
    };
    futures::future::try_join_all((0..8).map(ask)).await?;
    let log = system.orders[0].logs();
    let warned = warnings(&log);
    // The request, three subscriptions, the relay and the NATS client log one line each. So do the three subscriptions that look for
    // missed events, and the owner that trims its stream.
    ensure!((1..=10).contains(&warned.len()), "{} warnings:\n{}", warned.len(), warned.join("\n"));
    system.nats.unpause().await?;
    system.settled().await?;
    // On a busy machine a reply may take longer than 300 ms, which is a 503.
    eventually("tickets to be asked again", async || {
        let unknown = json!({"ticketId": "ffffffffffffffffffffffff"});
        system.buyer(0, "later").post("/api/orders", unknown).await?.expect(404)
    })
    .await?;
    eventually("the end of it", async || system.orders[0].logs().contains("requesting tickets.show: works again")).await
}

#[tokio::test]
async fn deleted_consumer_is_logged_once_with_the_command_to_run() -> Result<()> {
    let system = System::start(1, 1).await?;
    system.jetstream().await?.get_stream("TICKETS").await?.delete_consumer("orders").await?;
    let named = || {
        let log = system.orders[0].logs();
        warnings(&log)
            .into_iter()
            .filter(|line| line.contains("consuming TICKETS as orders"))
            .map(str::to_owned)
            .collect()
    };
    eventually("the warning", async || !Vec::<String>::is_empty(&named())).await?;
    tokio::time::sleep(Duration::from_secs(8)).await; // time for more warnings
    let lines: Vec<String> = named();
    ensure!(lines.len() == 1 && lines[0].contains("run the command `provision`"), "{}", lines.join("\n"));
    stack::provision(&system.nats.server(), 1).await?;
    let again = "consuming TICKETS as orders: works again";
    eventually("the end of it", async || system.orders[0].logs().contains(again)).await
}
