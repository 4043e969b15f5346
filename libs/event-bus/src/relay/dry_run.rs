//! What a recovery would take over: see `recover`. Changes nothing.

use super::reconcile::compare;
use super::stored::{Messages, PAGE, Seen};
use crate::broker::Broker;
use crate::error::is_outage;
use crate::nats::NatsSettings;
use crate::postgres;
use crate::retry::patiently;
use crate::schema::Schema;
use anyhow::Context;
use sqlx::PgPool;
use sqlx::postgres::PgPoolOptions;
use sqlx::types::time::OffsetDateTime;
use std::collections::HashSet;
use std::time::Duration;
use tokio::time::timeout;

/// How long the servers may be away.
const PATIENCE: Duration = Duration::from_secs(10);

/// What the database does not have of a stream that its service publishes to.
#[derive(Debug, Clone)]
pub struct Unknown {
    /// The stream.
    pub stream: String,
    /// The position of the database, and the sequence of the last message of the stream.
    pub position: u64,
    /// See `position`.
    pub end: u64,
    /// Messages after the position that were deleted from the stream: they cannot be taken over.
    pub deleted: u64,
    /// Events after the position that do not wait in the outbox with the same content.
    pub events: usize,
    /// How many aggregates these are about.
    pub aggregates: usize,
    /// When the first and the last of them were published.
    pub published: Option<(OffsetDateTime, OffsetDateTime)>,
}

/// Compares the database at `url` with the streams that its service heals and recovers from, as a relay does. Changes nothing.
///
/// An event that is a repetition of an older one is counted too, although a recovery ignores it.
///
/// # Errors
/// Postgres or NATS was away for 10 s, the database belongs to another service, or a right is missing.
pub async fn find_unknown(url: &str, schema: &Schema, nats: &NatsSettings) -> anyhow::Result<Vec<Unknown>> {
    let options = postgres::options(url, "recover")?;
    let db = PgPoolOptions::new().max_connections(1).acquire_timeout(postgres::OPEN).connect_lazy_with(options);
    let broker = Broker::of(nats, schema.service(), "recover").await?;
    timeout(PATIENCE, broker.wait_connected()).await.context("NATS does not answer")?;
    let found = async {
        let streams = async || {
            schema.belongs_here(&db).await?;
            let streams = sqlx::query_scalar!("select stream from bus.relay where republishes order by stream");
            Ok(streams.fetch_all(&db).await?)
        };
        let mut found = Vec::new();
        for stream in patiently(PATIENCE, "reading the position", is_outage, streams).await? {
            found.push(look(&db, &broker, stream).await?);
        }
        Ok(found)
    };
    let found = found.await;
    db.close().await;
    found
}

async fn look(db: &PgPool, broker: &Broker, stream: String) -> anyhow::Result<Unknown> {
    let position =
        sqlx::query_scalar!(r#"select max(last_seq) as "last_seq!" from bus.position where stream = $1"#, stream);
    let position = u64::try_from(position.fetch_one(db).await?)?;
    let seen = Seen::look(broker, &stream).await?;
    let first = seen.stream.cached_info().state.first_sequence;
    let (mut read, mut events, mut aggregates, mut published) = (position, 0, HashSet::new(), None);
    while read < seen.end {
        let mut messages = Messages::after(read, &seen);
        while let Some(stored) = messages.next(PAGE).await? {
            let (_, differing) = compare(&mut *db.acquire().await?, &stream, &stored).await?;
            for (stored, _) in differing {
                events += 1;
                aggregates.insert(stored.aggregate_id.clone());
                let first = published.map_or(stored.published_at, |(first, _)| first);
                published = Some((first, stored.published_at));
            }
        }
        read = messages.until;
    }
    let (end, aggregates) = (seen.end, aggregates.len());
    let deleted = if end > position { first.saturating_sub(position + 1) } else { 0 };
    Ok(Unknown { stream, position, end, deleted, events, aggregates, published })
}
