//! What services have written, and where: in their databases and in the streams.

use anyhow::{Context, Result, ensure};
use async_nats::jetstream::{self, consumer};
use futures::TryStreamExt;
use serde_json::Value;
use sqlx::{AssertSqlSafe, Connection, PgConnection};

/// Whose place is in which stream.
pub const PLACES: [(&str, &str); 4] =
    [("TICKETS", "orders"), ("ORDERS", "tickets"), ("PAYMENTS", "orders"), ("EXPIRATION", "orders")];

/// Everything is looked at with all rights.
#[derive(Clone)]
pub struct Records {
    /// Servers, comma-separated, with user and password.
    pub nats_url: String,
    pub tickets_db: String,
    pub orders_db: String,
}

/// One message of a stream of ours.
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
        testkit::eventually(&what, async || self.is_caught_up(stream, service).await).await
    }

    /// An error if a service has not applied all that is in a stream.
    pub async fn is_caught_up(&self, stream: &str, service: &str) -> Result<()> {
        let place = self.place(stream, service).await?;
        let (pending, unacked) = (place.num_pending, place.num_ack_pending);
        ensure!(pending == 0 && unacked == 0, "{pending} to deliver, {unacked} to acknowledge");
        Ok(())
    }
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

pub fn id(body: &Value) -> Result<String> {
    Ok(body["id"].as_str().with_context(|| format!("{body} has no id"))?.to_owned())
}
