//! SIGTERM under load, and services that start before Postgres and NATS.

use crate::system::System;
use anyhow::{Result, ensure};
use serde_json::json;
use std::time::Duration;
use testkit::{Nats, Postgres, Signal, eventually};
use tokio::time::Instant;

const GRACE: Duration = Duration::from_secs(20);

/// Creates tickets until `until`, or until a response closes the connection. Every request must succeed.
async fn create_until(system: &System, until: Instant) -> Result<usize> {
    let (seller, mut created) = (system.seller(0), 0);
    while Instant::now() < until {
        let answer = seller.post("/api/tickets", json!({"title": "Concert", "price": 5})).await?;
        let closing = answer.headers.get("connection").is_some_and(|value| value == "close");
        answer.expect(201)?;
        created += 1;
        if closing {
            break;
        }
    }
    Ok(created)
}

#[tokio::test]
async fn a_stop_under_load_leaves_nothing_to_redeliver() -> Result<()> {
    let mut system = System::start(1, 1).await?;
    for _ in 0..3 {
        let until = Instant::now() + Duration::from_secs(3);
        let orders = system.orders.remove(0);
        let stop = async {
            tokio::time::sleep(Duration::from_millis(1500)).await; // in the middle of the load
            let mut orders = orders;
            orders.stop(GRACE).await
        };
        let writers = futures::future::try_join_all((0..8).map(|_| create_until(&system, until)));
        let (created, status) = futures::try_join!(writers, stop)?;
        ensure!(created.iter().sum::<usize>() > 100, "too few tickets: {created:?}");
        ensure!(status.success(), "orders ended with {status}");
        ensure!(system.consumer().await?.num_ack_pending == 0, "events are not acknowledged after the stop");

        system.orders.push(system.spawn_orders()?);
        system.settled().await?;
        ensure!(system.consumer().await?.num_redelivered == 0, "events were redelivered after the restart");
        let (delivered, stored) = (system.consumer().await?.delivered, system.stream().await?.len() as u64);
        ensure!(delivered.consumer_sequence == stored, "{} deliveries of {stored}", delivered.consumer_sequence);
    }
    Ok(())
}

#[tokio::test]
async fn accepted_requests_get_a_response_before_the_service_ends() -> Result<()> {
    let mut system = System::start(1, 1).await?;
    let until = Instant::now() + Duration::from_secs(30);
    let stop = async {
        tokio::time::sleep(Duration::from_secs(1)).await; // in the middle of the load
        system.tickets[0].signal(Signal::Terminate).await
    };
    let writers = futures::future::try_join_all((0..16).map(|_| create_until(&system, until)));
    let (created, ()) = futures::try_join!(writers, stop)?;
    ensure!(Instant::now() < until, "no response said that the service stops");
    ensure!(system.tickets[0].exited().await?.success(), "it failed:\n{}", system.tickets[0].last_lines(20));
    // Before it ended, it has published every event that it confirmed.
    system.settled().await?;
    ensure!(system.stream().await?.len() == created.iter().sum::<usize>());
    Ok(())
}

#[tokio::test]
async fn a_stop_ends_in_time_while_nats_is_frozen() -> Result<()> {
    let mut system = System::start(1, 1).await?;
    system.seller(0).post("/api/tickets", json!({"title": "Before", "price": 5})).await?.expect(201)?;
    system.settled().await?;
    system.nats.pause().await?;
    system.seller(0).post("/api/tickets", json!({"title": "During", "price": 5})).await?.expect(201)?;
    tokio::time::sleep(Duration::from_secs(3)).await; // the relay waits for an ack, the subscription has missed a heartbeat
    for service in system.tickets.iter_mut().chain(&mut system.orders) {
        ensure!(service.stop(Duration::from_secs(10)).await?.success(), "it failed:\n{}", service.last_lines(20));
    }
    system.nats.unpause().await?;
    system.tickets = vec![system.spawn_tickets()?];
    system.orders = vec![system.spawn_orders()?];
    system.settled().await
}

#[tokio::test]
async fn services_started_before_postgres_and_nats_become_ready_when_those_do() -> Result<()> {
    let (postgres, nats) = tokio::try_join!(Postgres::start(), Nats::start())?;
    tokio::try_join!(postgres.stop(), nats.stop())?;

    let servers = nats.server();
    let mut system = System::new(postgres, nats, &servers);
    system.tickets.push(system.spawn_tickets()?);
    system.orders.push(system.spawn_orders()?);
    for service in system.tickets.iter().chain(&system.orders) {
        eventually("the process to live", async || service.client().get("/healthz").await?.expect(200)).await?;
        service.client().get("/readyz").await?.expect(503)?;
    }
    let refused = system.seller(0).post("/api/tickets", json!({"title": "Early", "price": 5})).await?.expect(503)?;
    ensure!(refused["errors"][0]["message"].is_string(), "{refused}");

    system.postgres.start_again().await?;
    stack::migrate(&system.postgres).await?;
    for service in system.tickets.iter_mut().chain(&mut system.orders) {
        service.wait_ready().await?;
    }
    // Still without NATS: HTTP works.
    system.seller(0).post("/api/tickets", json!({"title": "On time", "price": 5})).await?.expect(201)?;
    system.nats.start_again().await?;
    stack::provision(&system.nats.server(), 1).await?;
    system.settled().await
}
