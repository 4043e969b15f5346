//! Both services with replicas, their servers, and what must be true of them once nothing moves any more.

use anyhow::{Context, Result, ensure};
use async_nats::jetstream::{self, consumer};
use futures::TryStreamExt;
use serde_json::Value;
use sqlx::{AssertSqlSafe, Connection, PgConnection, Row};
use stack::{Client, JWT_KEY, Nats, Postgres, Process, eventually_within};
use std::path::Path;
use std::time::Duration;

pub struct System {
    pub postgres: Postgres,
    pub nats: Nats,
    pub tickets_db: String,
    pub orders_db: String,
    pub tickets: Vec<Process>,
    pub orders: Vec<Process>,
}

/// One message of the stream, as far as tests ask.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Stored {
    pub subject: String,
    pub id: String,
    pub version: i64,
}

impl System {
    /// This many replicas of each service, ready.
    pub async fn start(tickets: usize, orders: usize) -> Result<Self> {
        let (postgres, nats) = tokio::try_join!(Postgres::start(), Nats::start())?;
        let (tickets_db, orders_db) = (postgres.database("tickets").await?, postgres.database("orders").await?);
        let mut system = Self { postgres, nats, tickets_db, orders_db, tickets: Vec::new(), orders: Vec::new() };
        for _ in 0..tickets {
            let nats = system.nats.url();
            system.tickets.push(system.spawn_tickets(&nats)?);
        }
        for _ in 0..orders {
            system.orders.push(system.spawn_orders()?);
        }
        for service in system.tickets.iter_mut().chain(&mut system.orders) {
            service.wait_ready().await?;
        }
        Ok(system)
    }

    /// One more replica of tickets, which reaches NATS at `nats_url`.
    pub fn spawn_tickets(&self, nats_url: &str) -> Result<Process> {
        spawn("tickets", &self.tickets_db, nats_url)
    }

    /// One more replica of orders.
    pub fn spawn_orders(&self) -> Result<Process> {
        spawn("orders", &self.orders_db, &self.nats.url())
    }

    /// The seller, at one of the replicas of tickets.
    pub fn seller(&self, replica: usize) -> Client {
        self.tickets[replica % self.tickets.len()].client().signed_in("seller")
    }

    pub async fn tickets_rows(&self) -> Result<Vec<String>> {
        rows(&self.tickets_db, "tickets").await
    }

    pub async fn replica_rows(&self) -> Result<Vec<String>> {
        rows(&self.orders_db, "ticket_replica").await
    }

    pub async fn jetstream(&self) -> Result<jetstream::Context> {
        Ok(jetstream::new(async_nats::connect(self.nats.url()).await?))
    }

    /// Everything that is in the stream of tickets, in order.
    pub async fn stream(&self) -> Result<Vec<Stored>> {
        let stream = self.jetstream().await?.get_stream("TICKETS").await?;
        let count = usize::try_from(stream.cached_info().state.messages)?;
        if count == 0 {
            return Ok(Vec::new());
        }
        let consumer = stream.create_consumer(consumer::pull::OrderedConfig::default()).await?;
        let mut messages = consumer.messages().await?;
        let mut stored = Vec::with_capacity(count);
        while stored.len() < count {
            let message = messages.try_next().await?.context("the stream ended early")?;
            let body: Value = serde_json::from_slice(&message.payload)?;
            let id = body["id"].as_str().context("an event without id")?.to_owned();
            let version = body["version"].as_i64().context("an event without version")?;
            let event_id = message.headers.as_ref().and_then(|headers| headers.get("Nats-Msg-Id"));
            ensure!(event_id.is_some_and(|event_id| event_id.as_str() == format!("{id}-{version}")), "{event_id:?}");
            stored.push(Stored { subject: message.subject.to_string(), id, version });
        }
        Ok(stored)
    }

    pub async fn consumer(&self) -> Result<consumer::Info> {
        let stream = self.jetstream().await?.get_stream("TICKETS").await?;
        let mut orders: consumer::PullConsumer = stream.get_consumer("orders").await.map_err(anyhow::Error::msg)?;
        Ok(orders.info().await?.clone())
    }

    /// Waits until nothing moves any more, and checks that nothing is lost, doubled or stuck: outboxes empty,
    /// subscriptions caught up, no dead letters, the replica equal to its source row by row, and every version of every
    /// ticket in the stream once and in order.
    pub async fn settled(&self) -> Result<()> {
        eventually_within(Duration::from_mins(1), "the system to settle", async || self.quiet().await).await?;
        let stream = self.stream().await?;
        let mut next = std::collections::HashMap::new();
        for Stored { subject, id, version } in &stream {
            let expected = next.entry(id.clone()).or_insert(0);
            ensure!(version == expected, "{id}: version {version} in the stream where {expected} belongs");
            let created = if *version == 0 { "ticket.created" } else { "ticket.updated" };
            ensure!(subject == created, "{id}: version {version} was announced as {subject}");
            *expected += 1;
        }
        let mut db = PgConnection::connect(&self.tickets_db).await?;
        let tickets = sqlx::query("select id, version from tickets").fetch_all(&mut db).await?;
        ensure!(tickets.len() == next.len(), "{} tickets, {} in the stream", tickets.len(), next.len());
        for ticket in tickets {
            let (id, version): (String, i64) = (ticket.get(0), ticket.get(1));
            ensure!(next.get(&id) == Some(&(version + 1)), "{id}: at {version}, the stream is at {:?}", next.get(&id));
        }
        Ok(())
    }

    async fn quiet(&self) -> Result<()> {
        for (name, db) in [("tickets", &self.tickets_db), ("orders", &self.orders_db)] {
            let waiting = count(db, "select count(*) from bus.outbox").await?;
            ensure!(waiting == 0, "{waiting} events wait in the outbox of {name}");
            let dead = count(db, "select count(*) from bus.dead_letters where status <> 'superseded'").await?;
            ensure!(dead == 0, "{dead} dead letters in {name}");
        }
        let consumer = self.consumer().await?;
        ensure!(
            consumer.num_pending == 0 && consumer.num_ack_pending == 0,
            "{} events to deliver, {} to acknowledge",
            consumer.num_pending,
            consumer.num_ack_pending
        );
        let (source, replica) = (self.tickets_rows().await?, self.replica_rows().await?);
        ensure!(source == replica, "the replica has {} of {} tickets, or older ones", replica.len(), source.len());
        Ok(())
    }
}

fn spawn(service: &str, database_url: &str, nats_url: &str) -> Result<Process> {
    Process::spawn(
        Path::new(env!("CARGO_BIN_EXE_stack")),
        service,
        [
            ("DATABASE_URL", database_url),
            ("NATS_URL", nats_url),
            ("JWT_KEY", JWT_KEY),
            ("RUST_LOG", "info,event_bus=debug"),
        ],
    )
}

/// What a copy must have in common with its source, one text per ticket.
async fn rows(database_url: &str, table: &str) -> Result<Vec<String>> {
    let mut db = PgConnection::connect(database_url).await?;
    let sql = format!("select concat_ws('|', id, title, price, user_id, version, order_id) from {table} order by id");
    Ok(sqlx::query_scalar(AssertSqlSafe(sql)).fetch_all(&mut db).await?)
}

pub async fn count(database_url: &str, sql: &'static str) -> Result<i64> {
    let mut db = PgConnection::connect(database_url).await?;
    Ok(sqlx::query_scalar(sql).fetch_one(&mut db).await?)
}
