//! Both services with replicas, their servers, and what is in them. What must be true of it: see `settled`.

use anyhow::{Context, Result, ensure};
use async_nats::jetstream::{self, consumer};
use futures::{StreamExt, TryStreamExt, stream};
use serde_json::{Value, json};
use sqlx::{AssertSqlSafe, Connection, PgConnection};
use stack::{Client, JWT_KEY, Nats, Postgres, Process, free_port};
use std::path::Path;

/// Whose place is in which stream.
pub const PLACES: [(&str, &str); 4] =
    [("TICKETS", "orders"), ("ORDERS", "tickets"), ("PAYMENTS", "orders"), ("EXPIRATION", "orders")];

pub struct System {
    pub postgres: Postgres,
    pub nats: Nats,
    pub tickets_db: String,
    pub orders_db: String,
    pub tickets: Vec<Process>,
    pub orders: Vec<Process>,
    /// Where orders reach NATS, and what is set beside that.
    pub orders_nats: String,
    pub order_ttl: &'static str,
}

/// One message of a stream of ours.
#[derive(Debug, Clone, PartialEq)]
pub struct Stored {
    pub subject: String,
    pub id: String,
    pub version: i64,
    pub body: Value,
}

impl System {
    /// This many replicas of each service, ready.
    pub async fn start(tickets: usize, orders: usize) -> Result<Self> {
        Self::start_with(tickets, orders, "15m").await
    }

    /// The same, with orders that expire after `order_ttl`.
    pub async fn start_with(tickets: usize, orders: usize, order_ttl: &'static str) -> Result<Self> {
        let (postgres, nats) = tokio::try_join!(Postgres::start(), Nats::start())?;
        let (tickets_db, orders_db) = (postgres.database("tickets").await?, postgres.database("orders").await?);
        let mut system = Self { order_ttl, ..Self::new(postgres, nats, tickets_db, orders_db) };
        system.add(tickets, orders).await?;
        Ok(system)
    }

    /// No service yet.
    pub fn new(postgres: Postgres, nats: Nats, tickets_db: String, orders_db: String) -> Self {
        let (tickets, orders) = (Vec::new(), Vec::new());
        Self { orders_nats: nats.url(), postgres, nats, tickets_db, orders_db, tickets, orders, order_ttl: "15m" }
    }

    /// This many more replicas of each service, ready.
    pub async fn add(&mut self, tickets: usize, orders: usize) -> Result<()> {
        for _ in 0..tickets {
            self.tickets.push(self.spawn_tickets(&self.nats.url())?);
        }
        for _ in 0..orders {
            self.orders.push(self.spawn_orders()?);
        }
        for service in self.tickets.iter_mut().chain(&mut self.orders) {
            service.wait_ready().await?;
        }
        // Ready says nothing of NATS.
        for (stream, service) in PLACES {
            stack::eventually("streams and consumers", async || self.place(stream, service).await).await?;
        }
        Ok(())
    }

    /// One more replica of tickets, which reaches NATS at `nats_url`.
    pub fn spawn_tickets(&self, nats_url: &str) -> Result<Process> {
        self.spawn_at("tickets", free_port(), &self.tickets_db, nats_url)
    }

    /// One more replica of orders.
    pub fn spawn_orders(&self) -> Result<Process> {
        self.spawn_at("orders", free_port(), &self.orders_db, &self.orders_nats)
    }

    /// Whatever listened on `port` comes back there.
    pub fn respawn(&self, port: u16) -> Result<Process> {
        if self.tickets.iter().any(|process| process.port() == port) {
            self.spawn_at("tickets", port, &self.tickets_db, &self.nats.url())
        } else {
            self.spawn_at("orders", port, &self.orders_db, &self.orders_nats)
        }
    }

    fn spawn_at(&self, service: &str, port: u16, database_url: &str, nats_url: &str) -> Result<Process> {
        let env = [
            ("DATABASE_URL", database_url),
            ("NATS_URL", nats_url),
            ("JWT_KEY", JWT_KEY),
            ("ORDER_TTL", self.order_ttl),
            // There are many services on this machine, and every connection costs its start some time.
            ("DATABASE_CONNECTIONS", "6"),
            ("RUST_LOG", "info,event_bus=debug"),
        ];
        Process::spawn_at(Path::new(env!("CARGO_BIN_EXE_stack")), service, port, env, |_| {})
    }

    /// The seller, at one of the replicas of tickets.
    pub fn seller(&self, replica: usize) -> Client {
        self.tickets[replica % self.tickets.len()].client().signed_in("seller")
    }

    /// A user, at one of the replicas of orders.
    pub fn buyer(&self, replica: usize, user: &str) -> Client {
        self.orders[replica % self.orders.len()].client().signed_in(user)
    }

    /// A new ticket of the seller.
    pub async fn ticket(&self) -> Result<String> {
        id(&self.seller(0).post("/api/tickets", json!({"title": "Concert", "price": 20})).await?.expect(201)?)
    }

    /// This many new tickets of the seller, in no order, once orders knows them all.
    pub async fn tickets(&self, count: usize) -> Result<Vec<String>> {
        let tickets = stream::iter(0..count).map(|_| self.ticket()).buffer_unordered(8).try_collect().await?;
        stack::eventually("orders to know all tickets", async || {
            ensure!(self.replica_rows().await?.len() == self.tickets_rows().await?.len());
            anyhow::Ok(())
        })
        .await?;
        Ok(tickets)
    }

    /// The order of this ticket by this user, at one of the replicas of orders.
    pub async fn order(&self, replica: usize, user: &str, ticket: &str) -> Result<String> {
        id(&self.buyer(replica, user).post("/api/orders", json!({"ticketId": ticket})).await?.expect(201)?)
    }

    /// The ticket, as anybody sees it.
    pub async fn see(&self, ticket: &str) -> Result<Value> {
        self.seller(0).get(&format!("/api/tickets/{ticket}")).await?.expect(200)
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

    /// Publishes past all services, as their neighbours do.
    pub async fn publish(&self, subject: &'static str, body: Value) -> Result<()> {
        self.jetstream().await?.publish(subject, body.to_string().into()).await?.await?;
        Ok(())
    }

    /// Everything that is in the stream of tickets, in order.
    pub async fn stream(&self) -> Result<Vec<Stored>> {
        self.stored("TICKETS").await
    }

    /// Everything that our services have published to `stream`, in order.
    pub async fn stored(&self, stream: &str) -> Result<Vec<Stored>> {
        let stream = self.jetstream().await?.get_stream(stream).await?;
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
            let id = id(&body)?;
            let version = body["version"].as_i64().context("an event without version")?;
            let event_id = message.headers.as_ref().and_then(|headers| headers.get("Nats-Msg-Id"));
            ensure!(event_id.is_some_and(|event_id| event_id.as_str() == format!("{id}-{version}")), "{event_id:?}");
            stored.push(Stored { subject: message.subject.to_string(), id, version, body });
        }
        Ok(stored)
    }

    /// The place of orders in the stream of tickets.
    pub async fn consumer(&self) -> Result<consumer::Info> {
        self.place("TICKETS", "orders").await
    }

    /// The place of a service in a stream.
    pub async fn place(&self, stream: &str, service: &str) -> Result<consumer::Info> {
        Ok(self.jetstream().await?.get_stream(stream).await?.consumer_info(service).await?)
    }

    /// Waits until a service has applied all that is in a stream.
    pub async fn caught_up(&self, stream: &str, service: &str) -> Result<()> {
        let what = format!("{service} to catch up with {stream}");
        stack::eventually(&what, async || {
            let place = self.place(stream, service).await?;
            let (pending, unacked) = (place.num_pending, place.num_ack_pending);
            ensure!(pending == 0 && unacked == 0, "{pending} to deliver, {unacked} to acknowledge");
            anyhow::Ok(())
        })
        .await
    }
}

pub fn id(body: &Value) -> Result<String> {
    Ok(body["id"].as_str().with_context(|| format!("{body} has no id"))?.to_owned())
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
