//! Finds out why the stream does not end at the position of the relay.
//!
//! - After the position are events that the outbox has with the same content: a relay died after it published them.
//!   Their rows are deleted.
//! - After it are messages without the id of an event: they are skipped.
//! - After it is an event that the outbox does not have, or has with other content: the database is older than the
//!   stream. It was restored from a backup, or failed over to a standby that lagged.
//! - The stream ends before the position: the broker lost history.
//!
//! In the last two cases, versions would be assigned twice, or be missing: a person decides before more is published.

use super::outbox::{self, Position};
use crate::broker::Broker;
use crate::connection::{Connection, Transaction};
use crate::event_id;
use anyhow::{Context, ensure};
use async_nats::header;
use async_nats::jetstream::stream::Stream;
use bytes::Bytes;
use futures::{StreamExt, TryStreamExt, stream};
use std::collections::HashMap;
use std::time::Duration;
use tokio::time::Instant;

/// How long one transaction compares messages. Much shorter than the time limit of a step.
const COMPARING: Duration = Duration::from_secs(2);
/// Messages in memory at a time: each may have a megabyte, and arrives in base64.
const AT_A_TIME: u64 = 4;

/// The stream and the database contradict each other: one of them lost history.
#[derive(Debug, thiserror::Error)]
pub(super) enum LostHistory {
    #[error(
        "the broker lost history: {stream} ends at {end}, but {last_seq} was confirmed before. Nothing is published. \
         Restore the stream from a backup; or, if it is gone for good, run `update bus.relay set last_seq = {end} where \
         stream = '{stream}'`, and republish the current state from the tables"
    )]
    Broker { stream: String, end: u64, last_seq: u64 },
    #[error(
        "the database lost history: {stream} holds {event_id} at {seq}, and the outbox {difference}. The database is \
         older than the stream, unless another program has published that message. Nothing is published. Restore a newer \
         database; or, to continue with this one and assign versions twice, run `update bus.relay set last_seq = {end} \
         where stream = '{stream}'`"
    )]
    Database { stream: String, event_id: String, seq: u64, difference: &'static str, end: u64 },
}

/// A message of the stream with the id of an event.
struct Stored {
    seq: u64,
    event_id: String,
    aggregate_id: String,
    version: i64,
    subject: String,
    payload: Bytes,
}

/// Whether the stream ends at `position`.
pub(super) async fn ends_at(broker: &Broker, stream: &str, position: Position) -> anyhow::Result<bool> {
    let stream = broker.jetstream.get_stream(stream).await.context("cannot read the stream")?;
    Ok(stream.cached_info().state.last_sequence == position.last_seq)
}

/// Reads the messages after `position`, deletes their rows from the outbox, moves the position to the last of them, and
/// commits.
pub(super) async fn reconcile(
    broker: &Broker,
    mut tx: Transaction,
    stream: &str,
    position: Position,
) -> anyhow::Result<Connection> {
    let handle = broker.jetstream.get_stream(stream).await.context("cannot read the stream")?;
    let (end, last_seq) = (handle.cached_info().state.last_sequence, position.last_seq);
    if end < last_seq {
        return Err(LostHistory::Broker { stream: stream.to_owned(), end, last_seq }.into());
    }
    ensure!(end > last_seq, "the server refuses an event as a duplicate that {stream} does not hold after {last_seq}");
    let (begun, mut until, mut published) = (Instant::now(), last_seq, Vec::new());
    while until < end && begun.elapsed() < COMPARING {
        let from = until + 1;
        until = end.min(until + AT_A_TIME);
        let stored: Vec<Option<Stored>> = stream::iter(from..=until)
            // From the leader: a follower may not have the message yet.
            .map(|seq| stored_at(&handle, seq))
            .buffered(usize::try_from(AT_A_TIME)?)
            .try_collect()
            .await?;
        let stored: Vec<Stored> = stored.into_iter().flatten().collect();
        published.extend(rows_of(&mut tx, stream, &stored, end).await?);
    }
    published.sort_unstable();
    let connection = outbox::move_on(tx, stream, position, until, &published).await?;
    tracing::warn!(stream, from = last_seq, to = until, found = published.len(), "caught up with the stream");
    Ok(connection)
}

/// The ids of the outbox rows whose events are `stored`.
async fn rows_of(tx: &mut Transaction, stream: &str, stored: &[Stored], end: u64) -> anyhow::Result<Vec<i64>> {
    let keys: Vec<String> = stored.iter().map(|stored| format!("{stream}.{}", stored.aggregate_id)).collect();
    let versions: Vec<i64> = stored.iter().map(|stored| stored.version).collect();
    let rows = sqlx::query!(
        "select id, aggregate_id, outbox.version, subject, payload
         from unnest($1::text[], $2::bigint[]) as wanted (key, version)
         join bus.outbox on (outbox.stream || '.' || outbox.aggregate_id) = key and outbox.version = wanted.version",
        &keys,
        &versions,
    );
    let rows: HashMap<_, _> = rows
        .fetch_all(&mut **tx)
        .await?
        .into_iter()
        .map(|row| ((row.aggregate_id.clone(), row.version), row))
        .collect();
    let row_of = |stored: &Stored| {
        let difference = match rows.get(&(stored.aggregate_id.clone(), stored.version)) {
            None => "does not have it",
            Some(row) if row.payload.as_bytes() != stored.payload || row.subject != stored.subject => {
                "has it with other content"
            }
            Some(row) => return Ok(row.id),
        };
        let (stream, event_id) = (stream.to_owned(), stored.event_id.clone());
        Err(LostHistory::Database { stream, event_id, seq: stored.seq, difference, end }.into())
    };
    stored.iter().map(row_of).collect()
}

/// The message at `seq`. Returns `None` if it was deleted, or has no event id.
async fn stored_at(stream: &Stream, seq: u64) -> anyhow::Result<Option<Stored>> {
    use async_nats::jetstream::stream::LastRawMessageErrorKind::NoMessageFound;
    let message = match stream.get_raw_message(seq).await {
        Ok(message) => message,
        Err(error) if error.kind() == NoMessageFound => return Ok(None),
        Err(error) => return Err(error).context("cannot read the stream"),
    };
    let Some(event_id) = message.headers.get(header::NATS_MESSAGE_ID).map(ToString::to_string) else { return Ok(None) };
    let Some((aggregate_id, version)) = event_id::split(&event_id) else { return Ok(None) };
    let (aggregate_id, subject) = (aggregate_id.to_owned(), message.subject.to_string());
    Ok(Some(Stored { seq, aggregate_id, version, subject, payload: message.payload, event_id }))
}
