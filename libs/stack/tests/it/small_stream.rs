//! Streams that hold only a fraction of the events: their owners trim them, below what every consumer has acknowledged.

use crate::load::Load;
use crate::records::{PLACES, Records, Stored};
use crate::system::System;
use anyhow::{Context, Result, ensure};
use async_nats::jetstream::stream::State;
use futures::{StreamExt, TryStreamExt, stream};
use sqlx::{AssertSqlSafe, Connection, PgConnection};
use std::collections::HashMap;
use std::time::Duration;
use testkit::{Process, Signal, eventually_within};

const SMALL: i64 = 65_536;

impl Records {
    /// Limits the streams of tickets and orders to 64 KiB.
    async fn shrink(&self) -> Result<()> {
        let jetstream = self.jetstream().await?;
        for stream in ["TICKETS", "ORDERS"] {
            let mut config = jetstream.get_stream(stream).await?.cached_info().config.clone();
            config.max_bytes = SMALL;
            jetstream.update_stream(config).await?;
        }
        Ok(())
    }

    /// Waits until the system is at rest. Each stream then holds the newest versions, each once and in order, of the tickets and orders
    /// that it still holds.
    async fn settled_in_a_window(&self) -> Result<()> {
        eventually_within(Duration::from_mins(1), "the system to settle", async || {
            self.relayed_and_applied().await?;
            for (stream, service) in PLACES {
                self.is_caught_up(stream, service).await?;
            }
            self.copies_agree().await
        })
        .await?;
        for (stream, db, table) in [("TICKETS", &self.tickets_db, "tickets"), ("ORDERS", &self.orders_db, "orders")] {
            let mut newest: HashMap<String, i64> = HashMap::new();
            for Stored { id, version, .. } in self.stored(stream).await? {
                let before = newest.insert(id.clone(), version);
                ensure!(before.is_none_or(|before| before + 1 == version), "{id}: {version} comes after {before:?}");
            }
            let sql = format!("select id, version from {table}");
            let rows: Vec<(String, i64)> =
                sqlx::query_as(AssertSqlSafe(sql)).fetch_all(&mut PgConnection::connect(db).await?).await?;
            for (id, version) in rows {
                let last = newest.get(&id);
                ensure!(last.is_none_or(|last| *last == version), "{id}: at {version}, the stream at {last:?}");
            }
        }
        Ok(())
    }

    async fn state(&self, stream: &str) -> Result<State> {
        Ok(self.jetstream().await?.get_stream(stream).await?.cached_info().state.clone())
    }
}

/// The value of a gauge of the stream `TICKETS`.
async fn gauge(process: &Process, name: &str) -> Result<f64> {
    let metrics = process.client().get("/metrics").await?.body;
    let metrics = metrics.as_str().context("no metrics")?;
    let begin = format!("{name}{{stream=\"TICKETS\"}} ");
    let value = metrics.lines().find_map(|line| line.strip_prefix(&begin)).with_context(|| format!("no {name}"))?;
    Ok(value.parse()?)
}

#[tokio::test]
async fn small_streams_under_load_never_stay_full() -> Result<()> {
    let mut system = System::prepared().await?;
    system.shrink().await?;
    system.add(2, 2).await?;
    let clients = |services: &[Process]| services.iter().map(Process::client).collect();
    let load = Load::new(clients(&system.tickets), clients(&system.orders), &system.nats.server()).await?;
    load.during(async {
        // Two and a half times as many events as fit.
        stream::iter(0..600).map(|_| system.ticket()).buffer_unordered(8).try_collect::<Vec<_>>().await.map(drop)
    })
    .await?;
    system.settled_in_a_window().await?;
    for stream in ["TICKETS", "ORDERS"] {
        let State { first_sequence, last_sequence, bytes, .. } = system.state(stream).await?;
        ensure!(
            first_sequence > 100 && bytes <= 65_536,
            "{stream}: {first_sequence} to {last_sequence}, {bytes} bytes"
        );
    }
    for service in system.tickets.iter().chain(&system.orders) {
        ensure!(!service.logs().contains(" ERROR "), "{}", service.logs());
    }
    load.nothing_is_missing(&system).await
}

#[tokio::test]
async fn a_stream_full_because_orders_stands_still_fails_no_write_and_drains_afterwards() -> Result<()> {
    let mut system = System::prepared().await?;
    system.shrink().await?;
    system.add(1, 1).await?;
    system.tickets(10).await?;
    system.orders[0].signal(Signal::Stop).await?;
    let error = eventually_within(Duration::from_mins(1), "the error", async || {
        for _ in 0..20 {
            system.ticket().await?;
        }
        let log = system.tickets[0].logs();
        let error = log.lines().find(|line| line.contains(" ERROR ") && line.contains("the stream is full"));
        error.map(str::to_owned).context("there is none")
    })
    .await?;
    for part in ["publishing to TICKETS", "of 65536 bytes", "The consumer orders prevents trimming", "wait for it"] {
        ensure!(error.contains(part), "{part}: {error}");
    }
    ensure!(gauge(&system.tickets[0], "event_bus_stream_bytes").await? > 50_000.0, "the gauge is too low");
    ensure!(gauge(&system.tickets[0], "event_bus_stream_max_bytes").await? > 65_000.0, "the gauge is too low");
    let (place, state) = (system.place("TICKETS", "orders").await?, system.state("TICKETS").await?);
    ensure!(state.first_sequence <= place.ack_floor.stream_sequence.max(1), "{state:?}, {:?}", place.ack_floor);
    ensure!(state.last_sequence < 500, "{state:?}");

    system.orders[0].signal(Signal::Continue).await?;
    system.settled_in_a_window().await?;
    ensure!(system.replica_rows().await?.len() > 10, "tickets are missing");
    Ok(())
}
