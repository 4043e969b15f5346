//! The rows and events that services have written, in their databases and in the streams.

use anyhow::{Context, Result, ensure};
use async_nats::jetstream::{self, consumer};
use futures::TryStreamExt;
use serde_json::Value;
use sqlx::{AssertSqlSafe, Connection, PgConnection};

/// The streams and the service that consumes each.
pub const PLACES: [(&str, &str); 4] =
    [("TICKETS", "orders"), ("ORDERS", "tickets"), ("PAYMENTS", "orders"), ("EXPIRATION", "orders")];

/// Access to all databases and streams, with all rights.
#[derive(Clone)]
pub struct Records {
    /// Servers, comma-separated, with user and password.
    pub nats_url: String,
    pub tickets_db: String,
    pub orders_db: String,
}

/// An event in a stream.
#[derive(Debug, Clone, PartialEq)]
pub struct Stored {
    pub subject: String,
    pub id: String,
    pub version: i64,
    pub body: Value,
}

impl Records {
    pub async fn tickets_rows(&self) -> Result<Vec<String>> {
        rows(&self.tickets_db, "tickets").await
    }

    pub async fn replica_rows(&self) -> Result<Vec<String>> {
        rows(&self.orders_db, "ticket_replica").await
    }

    pub async fn jetstream(&self) -> Result<jetstream::Context> {
        Ok(jetstream::new(testkit::connect(&self.nats_url).await?))
    }

    /// Publishes directly to NATS, as external services do.
    pub async fn publish(&self, subject: &'static str, body: Value) -> Result<()> {
        self.jetstream().await?.publish(subject, body.to_string().into()).await?.await?;
        Ok(())
    }

    /// All events in the stream `TICKETS`, in order.
    pub async fn stream(&self) -> Result<Vec<Stored>> {
        self.stored("TICKETS").await
    }

    /// Subject and body of all events in `stream`, in order.
    pub async fn bodies(&self, stream: &str) -> Result<Vec<(String, Vec<u8>)>> {
        let stream = self.jetstream().await?.get_stream(stream).await?;
        let mut bodies = Vec::new();
        for seq in 1..=stream.cached_info().state.last_sequence {
            let message = stream.get_raw_message(seq).await?;
            bodies.push((message.subject.to_string(), message.payload.to_vec()));
        }
        Ok(bodies)
    }

    /// All events that the services have published to `stream`, in order.
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

    /// The state of the consumer of orders in the stream `TICKETS`.
    pub async fn consumer(&self) -> Result<consumer::Info> {
        self.place("TICKETS", "orders").await
    }

    /// The state of the consumer of a service in a stream.
    pub async fn place(&self, stream: &str, service: &str) -> Result<consumer::Info> {
        Ok(self.jetstream().await?.get_stream(stream).await?.consumer_info(service).await?)
    }

    /// Waits until a service has applied all events of a stream.
    pub async fn caught_up(&self, stream: &str, service: &str) -> Result<()> {
        let what = format!("{service} to catch up with {stream}");
        testkit::eventually(&what, async || self.is_caught_up(stream, service).await).await
    }

    /// Fails if a service has not applied all events of a stream.
    pub async fn is_caught_up(&self, stream: &str, service: &str) -> Result<()> {
        let place = self.place(stream, service).await?;
        let (pending, unacked) = (place.num_pending, place.num_ack_pending);
        ensure!(pending == 0 && unacked == 0, "{pending} to deliver, {unacked} to acknowledge");
        Ok(())
    }
}

/// The columns of a ticket that a copy shares with its source, one text per ticket.
async fn rows(database_url: &str, table: &str) -> Result<Vec<String>> {
    let mut db = PgConnection::connect(database_url).await?;
    let sql = format!("select concat_ws('|', id, title, price, user_id, version, order_id) from {table} order by id");
    Ok(sqlx::query_scalar(AssertSqlSafe(sql)).fetch_all(&mut db).await?)
}

pub async fn count(database_url: &str, sql: &'static str) -> Result<i64> {
    let mut db = PgConnection::connect(database_url).await?;
    Ok(sqlx::query_scalar(sql).fetch_one(&mut db).await?)
}

pub fn id(body: &Value) -> Result<String> {
    Ok(body["id"].as_str().with_context(|| format!("{body} has no id"))?.to_owned())
}
