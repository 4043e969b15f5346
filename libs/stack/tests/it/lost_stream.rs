//! The broker comes back with less: the owners of the streams heal them by themselves, under load.

use crate::load::Load;
use crate::records::count;
use crate::system::System;
use anyhow::{Result, ensure};
use sqlx::{Connection, PgConnection};
use std::path::Path;
use std::time::Duration;
use testkit::{Process, Signal, eventually, eventually_within};
use tokio::process::Command;
use tokio::time::sleep;

/// How long a part of the load lasts.
const A_WHILE: Duration = Duration::from_secs(2);

async fn load(system: &System) -> Result<Load> {
    let clients = |services: &[Process]| services.iter().map(Process::client).collect();
    Load::new(clients(&system.tickets), clients(&system.orders), &system.nats.server()).await
}

/// Deletes everything that NATS stores, while it is stopped.
async fn wipe(system: &System) -> Result<()> {
    system.nats.kill().await?;
    system.nats.in_store("rm -rf jetstream").await?;
    system.nats.start_again().await?;
    stack::provision(&system.nats.server(), 1).await
}

/// Runs `fault` under load, and waits until the streams are healed. Nothing is missing then.
async fn heals(system: &System, fault: impl AsyncFnOnce() -> Result<()>) -> Result<()> {
    let load = load(system).await?;
    load.during(Box::pin(fault())).await?;
    system.healed().await?;
    load.nothing_is_missing(system).await
}

impl System {
    /// Waits until both owners have republished what was lost, then until the system is at rest.
    async fn healed(&self) -> Result<()> {
        eventually_within(Duration::from_mins(1), "the streams to be healed", async || {
            for db in [&self.tickets_db, &self.orders_db] {
                let requests = count(db, "select count(*) from bus.republish where after_seq = 0").await?;
                ensure!(requests == 0, "{requests} requests to republish");
            }
            anyhow::Ok(())
        })
        .await?;
        self.settled_after_a_loss().await
    }

    /// The sequence of the last message of a stream.
    async fn end(&self, stream: &str) -> Result<u64> {
        Ok(self.jetstream().await?.get_stream(stream).await?.cached_info().state.last_sequence)
    }

    /// Waits until the log of a replica of tickets has a line with this text.
    async fn logged(&self, text: &str) -> Result<()> {
        let what = format!("the line {text:?}");
        eventually_within(Duration::from_mins(1), &what, async || {
            let logs: String = self.tickets.iter().map(Process::logs).collect();
            ensure!(logs.contains(text), "not in:\n{logs}");
            anyhow::Ok(())
        })
        .await
    }
}

#[tokio::test]
async fn a_store_wiped_under_load_is_healed() -> Result<()> {
    let system = System::start(2, 2).await?;
    heals(&system, async || {
        sleep(A_WHILE).await; // under load
        wipe(&system).await?;
        system.logged("the broker lost history: TICKETS is another stream").await?;
        system.logged("republished the current state").await?;
        sleep(A_WHILE).await; // under load
        Ok(())
    })
    .await
}

#[tokio::test]
async fn a_store_wiped_while_the_services_are_down_is_healed() -> Result<()> {
    let mut system = System::start(1, 1).await?;
    let load = load(&system).await?;
    load.during(Box::pin(async {
        sleep(A_WHILE).await; // under load
        Ok(())
    }))
    .await?;
    let (mut tickets, mut orders) = (system.tickets.remove(0), system.orders.remove(0));
    futures::try_join!(tickets.stop(Duration::from_secs(30)), orders.stop(Duration::from_secs(30)))?;
    wipe(&system).await?;
    system.add(1, 1).await?;
    system.logged("republished the current state").await?;
    system.healed().await?;
    load.nothing_is_missing(&system).await
}

#[tokio::test]
async fn streams_recreated_in_the_middle_of_publishing_are_healed() -> Result<()> {
    let system = System::start(2, 2).await?;
    heals(&system, async || {
        for _ in 0..2 {
            sleep(A_WHILE).await; // under load
            let jetstream = system.jetstream().await?;
            futures::try_join!(jetstream.delete_stream("TICKETS"), jetstream.delete_stream("ORDERS"))?;
            stack::provision(&system.nats.server(), 1).await?;
        }
        system.logged("republished the current state").await?;
        sleep(A_WHILE).await; // under load
        Ok(())
    })
    .await
}

#[tokio::test]
async fn a_store_restored_from_an_older_copy_is_healed() -> Result<()> {
    let system = System::start(1, 1).await?;
    heals(&system, async || {
        sleep(A_WHILE).await; // under load
        system.nats.stop().await?;
        system.nats.in_store("cp -a jetstream copy").await?;
        system.nats.start_again().await?;
        let (tickets, orders) = futures::try_join!(system.end("TICKETS"), system.end("ORDERS"))?;
        eventually("events that will be lost", async || {
            let ends = futures::try_join!(system.end("TICKETS"), system.end("ORDERS"))?;
            ensure!(ends.0 > tickets + 20 && ends.1 > orders + 5, "{ends:?}");
            anyhow::Ok(())
        })
        .await?;
        system.nats.stop().await?;
        system.nats.in_store("rm -rf jetstream && mv copy jetstream").await?;
        system.nats.start_again().await?;
        system.logged("the broker lost history: TICKETS ends at").await?;
        system.logged("republished the current state").await?;
        Ok(())
    })
    .await
}

/// With `sync_interval: always`, a killed server has everything that it has confirmed.
#[tokio::test]
async fn a_killed_nats_has_lost_nothing_and_nothing_is_healed() -> Result<()> {
    let system = System::start(1, 1).await?;
    let load = load(&system).await?;
    load.during(Box::pin(async {
        for _ in 0..3 {
            sleep(A_WHILE).await; // under load
            system.nats.kill().await?;
            system.nats.start_again().await?;
        }
        sleep(A_WHILE).await; // under load
        Ok(())
    }))
    .await?;
    system.settled().await?;
    let logs = system.tickets[0].logs() + &system.orders[0].logs();
    ensure!(!logs.contains("lost history") && !logs.contains("republish"), "{logs}");
    Ok(())
}

/// A service with the rights creates streams and consumers itself, and then heals.
#[tokio::test]
async fn services_that_provision_heal_without_a_command() -> Result<()> {
    let mut system = System { nats_user: Some("admin"), ..System::prepared().await? };
    system.add(1, 1).await?;
    let ticket = system.ticket().await?;
    system.settled().await?;
    system.nats.kill().await?;
    system.nats.in_store("rm -rf jetstream").await?;
    system.nats.start_again().await?;
    system.logged("republished the current state").await?;
    system.order(0, "bob", &ticket).await?;
    system.healed().await
}

#[tokio::test]
async fn a_missing_stream_is_logged_with_the_command_to_run() -> Result<()> {
    let system = System::start(1, 1).await?;
    system.ticket().await?;
    system.settled().await?;
    system.jetstream().await?.delete_stream("TICKETS").await?;
    system.ticket().await?;
    system.logged("the stream TICKETS does not exist: run the command `provision`").await?;
    stack::provision(&system.nats.server(), 1).await?;
    system.logged("republished the current state").await?;
    system.healed().await
}

#[tokio::test]
async fn kill_nine_in_the_middle_of_a_republish_loses_nothing() -> Result<()> {
    let mut system = System::start(1, 1).await?;
    system.tickets(600).await?;
    system.settled().await?;
    let last = "select id from tickets order by id offset 500 limit 1";
    let mut holder = PgConnection::connect(&system.tickets_db).await?;
    hold(&mut holder, last).await?;
    wipe(&system).await?;
    eventually("a part of the snapshots", async || {
        let stored = system.jetstream().await?.get_stream("TICKETS").await?.cached_info().state.messages;
        ensure!(stored >= 200, "{stored} snapshots");
        anyhow::Ok(())
    })
    .await?;
    system.tickets[0].signal(Signal::Kill).await?;
    system.tickets[0].exited().await?;
    sqlx::query("rollback").execute(&mut holder).await?;
    system.tickets[0] = system.spawn_tickets()?;
    system.tickets[0].wait_ready().await?;
    system.logged("resuming the republish").await?;
    system.healed().await?;
    let stored = system.stream().await?.len();
    ensure!(stored == 600, "{stored} events: some were published twice");
    Ok(())
}

async fn hold(db: &mut PgConnection, id: &'static str) -> Result<()> {
    sqlx::query("begin").execute(&mut *db).await?;
    let id: String = sqlx::query_scalar(id).fetch_one(&mut *db).await?;
    sqlx::query("select 1 from tickets where id = $1 for update").bind(id).execute(&mut *db).await?;
    Ok(())
}

/// Runs `stack <service> republish …` as the role of the service.
async fn republish(system: &System, service: &stack::services::Service, arguments: &[&str]) -> Result<String> {
    let mut command = Command::new(Path::new(env!("CARGO_BIN_EXE_stack")));
    let url = system.postgres.url(service.database_user, service.database);
    let output = command.args([service.name, "republish"]).args(arguments).env("DATABASE_URL", url).output().await?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{text}");
    Ok(text)
}

/// The bytes of what is published again equal those that were published first.
#[tokio::test]
async fn a_republish_by_hand_repeats_the_newest_events_byte_by_byte() -> Result<()> {
    let system = System::start(1, 1).await?;
    let tickets = system.tickets(3).await?;
    let order = system.order(0, "bob", &tickets[0]).await?;
    let cancelled = system.order(0, "bob", &tickets[1]).await?;
    system.buyer(0, "bob").delete(&format!("/api/orders/{cancelled}")).await?.expect(204)?;
    let paid = system.order(0, "bob", &tickets[2]).await?;
    let payment = serde_json::json!({"id": paid, "orderId": paid, "stripeId": "pi"});
    system.publish("payment.created", payment).await?;
    eventually("the payment", async || {
        let complete = count(&system.orders_db, "select count(*) from orders where status = 'complete'").await?;
        ensure!(complete == 1);
        anyhow::Ok(())
    })
    .await?;
    system.settled().await?;
    sleep(Duration::from_secs(10)).await; // the deduplication window
    let (before, orders_before) = (system.bodies("TICKETS").await?, system.bodies("ORDERS").await?);

    let said = republish(&system, &stack::services::TICKETS, &["--all"]).await?;
    ensure!(said.contains("the service has begun"), "{said}");
    republish(&system, &stack::services::ORDERS, &["--id", &order, &cancelled]).await?;
    republish(&system, &stack::services::ORDERS, &["--since", "1h"]).await?;
    system.healed().await?;
    let (after, orders_after) = (system.bodies("TICKETS").await?, system.bodies("ORDERS").await?);
    ensure!(after.len() == before.len() + 3, "{} and {} tickets", before.len(), after.len());
    // Those of the second request are in the deduplication window of the first one, except one.
    ensure!(orders_after.len() == orders_before.len() + 3, "{} and {} orders", orders_before.len(), orders_after.len());
    for (before, after) in [(before, after), (orders_before, orders_after)] {
        for again in &after[before.len()..] {
            ensure!(before.contains(again), "{again:?} was not published before");
        }
    }
    Ok(())
}
