//! A relay that dies or freezes between the publish of its events and their deletion from the outbox.

use crate::records::count;
use crate::system::System;
use anyhow::{Result, ensure};
use serde_json::json;
use sqlx::{AssertSqlSafe, Connection, PgConnection};
use testkit::{Client, Signal, eventually};

const OUTBOX: &str = "select count(*) from bus.outbox";

async fn create(seller: &Client, count: usize) -> Result<()> {
    for number in 0..count {
        seller.post("/api/tickets", json!({"title": format!("Ticket {number}"), "price": 5})).await?.expect(201)?;
    }
    Ok(())
}

/// Locks the rows of the outbox, and waits until the relay has published them. The relay cannot delete them.
async fn published_but_not_deleted(system: &System, events: u64) -> Result<PgConnection> {
    let mut holder = PgConnection::connect(&system.tickets_db).await?;
    sqlx::query("begin").execute(&mut holder).await?;
    sqlx::query("select 1 from bus.outbox for update").execute(&mut holder).await?;
    system.nats.start_again().await?;
    eventually("the events to be in the stream", async || {
        let state = system.jetstream().await?.get_stream("TICKETS").await?.cached_info().state.clone();
        ensure!(state.last_sequence == events, "it ends at {}", state.last_sequence);
        anyhow::Ok(())
    })
    .await?;
    Ok(holder)
}

/// Kills the relay, and then its session, which would still delete the rows: Postgres executes what it has received, although
/// the client is gone.
async fn kill_with_session(system: &mut System, mut holder: PgConnection) -> Result<()> {
    let deleting = "from pg_stat_activity
                    where datname = current_database() and wait_event_type = 'Lock' and query like '%bus.move_on%'";
    let waits = format!("select count(*) {deleting}");
    eventually("the relay to delete the rows", async || {
        let waiting: i64 = sqlx::query_scalar(AssertSqlSafe(waits.clone()))
            .fetch_one(&mut PgConnection::connect(&system.tickets_db).await?)
            .await?;
        ensure!(waiting == 1, "{waiting} sessions");
        anyhow::Ok(())
    })
    .await?;
    system.tickets[0].signal(Signal::Kill).await?;
    system.tickets[0].exited().await?;
    let end = format!("select count(pg_terminate_backend(pid)) {deleting}");
    let ended: i64 = sqlx::query_scalar(AssertSqlSafe(end)).fetch_one(&mut holder).await?;
    ensure!(ended == 1, "{ended} sessions were about to delete rows");
    holder.close().await?;
    Ok(())
}

#[tokio::test]
async fn kill_nine_between_publish_and_delete_loses_and_doubles_nothing() -> Result<()> {
    let mut system = System::start(1, 1).await?;
    create(&system.seller(0), 3).await?;
    system.settled().await?;

    system.nats.stop().await?;
    create(&system.seller(0), 20).await?;
    let holder = published_but_not_deleted(&system, 23).await?;
    kill_with_session(&mut system, holder).await?;
    ensure!(count(&system.tickets_db, OUTBOX).await? == 20, "the killed relay has deleted its rows");

    system.tickets[0] = system.spawn_tickets()?;
    system.tickets[0].wait_ready().await?;
    create(&system.seller(0), 3).await?;
    system.settled().await?;
    ensure!(system.stream().await?.len() == 26);
    Ok(())
}

#[tokio::test]
async fn a_single_event_published_before_a_crash_is_not_published_again() -> Result<()> {
    let mut system = System::start(1, 1).await?;
    create(&system.seller(0), 1).await?;
    system.settled().await?;

    system.nats.stop().await?;
    create(&system.seller(0), 1).await?;
    let holder = published_but_not_deleted(&system, 2).await?;
    kill_with_session(&mut system, holder).await?;

    system.tickets[0] = system.spawn_tickets()?;
    system.tickets[0].wait_ready().await?;
    system.settled().await?;
    ensure!(system.stream().await?.len() == 2);
    Ok(())
}

#[tokio::test]
async fn concurrent_relays_of_three_replicas_publish_each_event_once() -> Result<()> {
    let system = System::start(3, 1).await?;
    let sellers: Vec<Client> = (0..3).map(|replica| system.seller(replica)).collect();
    futures::future::try_join_all(sellers.iter().map(|seller| create(seller, 200))).await?;
    system.settled().await?;
    ensure!(system.stream().await?.len() == 600);
    Ok(())
}

/// The relay is frozen after its batch was stored. It continues after another replica has taken over.
#[tokio::test]
async fn a_relay_frozen_after_publishing_is_taken_over_and_harmless_when_it_thaws() -> Result<()> {
    const PUBLISHING: &str = "select count(*) from pg_stat_activity
        where datname = current_database() and state = 'idle in transaction' and query like '%bus.take_events%'";
    let mut system = System::start(1, 1).await?;
    create(&system.seller(0), 1).await?;
    system.settled().await?;
    system.nats.pause().await?;
    create(&system.seller(0), 19).await?;
    eventually("the relay to publish", async || {
        ensure!(count(&system.tickets_db, PUBLISHING).await? == 1);
        anyhow::Ok(())
    })
    .await?;
    system.tickets[0].signal(Signal::Stop).await?;
    system.nats.unpause().await?;
    eventually("the event to be stored", async || {
        let state = system.jetstream().await?.get_stream("TICKETS").await?.cached_info().state.clone();
        ensure!(state.last_sequence > 1, "it ends at {}", state.last_sequence);
        anyhow::Ok(())
    })
    .await?;
    ensure!(count(&system.tickets_db, OUTBOX).await? == 19, "the frozen relay has deleted its rows");

    let successor = system.spawn_tickets()?;
    system.tickets.push(successor);
    system.tickets[1].wait_ready().await?;
    create(&system.seller(1), 20).await?;
    eventually("the takeover", async || {
        let waiting = count(&system.tickets_db, OUTBOX).await?;
        ensure!(waiting == 0, "{waiting} events wait");
        anyhow::Ok(())
    })
    .await?;

    system.tickets[0].signal(Signal::Continue).await?;
    system.tickets[0].wait_ready().await?;
    let (thawed, successor) = (system.seller(0), system.seller(1));
    futures::try_join!(create(&thawed, 20), create(&successor, 20))?;
    system.settled().await?;
    ensure!(system.stream().await?.len() == 80);
    Ok(())
}
