//! Finds out why the stream does not end at the position of the relay.
//!
//! - After the position are events that the outbox has with the same content: a relay died after it published them.
//!   Their rows are deleted.
//! - After it are messages without the id of an event: they are skipped.
//! - After it is an event that the outbox does not have, or has with other content: the database is older than the
//!   stream. It was restored from a backup, or failed over to a standby that lagged.
//!
//! In the last case, versions would be assigned twice: a person decides before more is published. A stream that ends before the
//! position has lost history: see `heal`.

use super::heal::Seen;
use super::outbox::{self, Position};
use crate::connection::{Connection, Transaction};
use crate::event_id;
use anyhow::Context;
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
        "the broker lost history: {stream} {found}, but {last_seq} was confirmed before. Nothing is published, because this \
         relay has no snapshots of the tables. Restore the stream from a backup; or, if it is gone for good, run `update \
         bus.relay set last_seq = {end}, stream_created_at = null where stream = '{stream}'`, and republish the current state \
         from the tables"
    )]
    Broker { stream: String, found: String, last_seq: u64, end: u64 },
    #[error(
        "the broker lost history: {stream} {found}, but {last_seq} was confirmed before. If this lasts, the current state is \
         republished from the tables"
    )]
    Doubtful { stream: String, found: String, last_seq: u64 },
    #[error(
        "the database lost history: {stream} holds {event_id} at {seq}, and {difference}. The database is older than the \
         stream, unless another program has published that message. Nothing is published. Restore a newer database; or, to \
         continue with this one and assign versions twice, run `update bus.relay set last_seq = {end}, stream_created_at = null \
         where stream = '{stream}'`"
    )]
    Database { stream: String, event_id: String, seq: u64, difference: &'static str, end: u64 },
}

/// A message of the stream with the id of an event.
pub(super) struct Stored {
    seq: u64,
    event_id: String,
    pub(super) aggregate_id: String,
    pub(super) version: i64,
    pub(super) subject: String,
    pub(super) payload: Bytes,
}

impl Stored {
    /// The database is older than this message of a stream that ends at `end`.
    pub(super) fn contradicts(&self, stream: &str, difference: &'static str, end: u64) -> LostHistory {
        let (stream, event_id) = (stream.to_owned(), self.event_id.clone());
        LostHistory::Database { stream, event_id, seq: self.seq, difference, end }
    }
}

/// Reads the messages after `position`, deletes their rows from the outbox, moves the position to the last of them, and
/// commits.
pub(super) async fn reconcile(
    seen: &Seen,
    mut tx: Transaction,
    stream: &str,
    position: Position,
) -> anyhow::Result<Connection> {
    let (mut published, from) = (Vec::new(), position.last_seq);
    let mut messages = Messages::after(from, seen);
    while let Some(stored) = messages.next().await? {
        published.extend(rows_of(&mut tx, stream, &stored, seen.end).await?);
    }
    let until = messages.until;
    published.sort_unstable();
    let connection = outbox::move_on(tx, stream, position, until, &published).await?;
    tracing::warn!(stream, from, to = until, found = published.len(), "caught up with the stream");
    Ok(connection)
}

/// The messages after a position, read for at most two seconds.
pub(super) struct Messages<'a> {
    seen: &'a Seen,
    begun: Instant,
    /// The position of the last message that was read.
    pub(super) until: u64,
}

impl<'a> Messages<'a> {
    pub(super) fn after(position: u64, seen: &'a Seen) -> Self {
        Self { seen, begun: Instant::now(), until: position }
    }

    /// Some of the next messages. Returns `None` at the end of the stream, or if the time is over.
    pub(super) async fn next(&mut self) -> anyhow::Result<Option<Vec<Stored>>> {
        if self.until >= self.seen.end || self.begun.elapsed() >= COMPARING {
            return Ok(None);
        }
        let next = self.until + 1;
        self.until = self.seen.end.min(self.until + AT_A_TIME);
        let stored: Vec<Option<Stored>> = stream::iter(next..=self.until)
            // From the leader: a follower may not have the message yet.
            .map(|seq| stored_at(&self.seen.stream, seq))
            .buffered(usize::try_from(AT_A_TIME)?)
            .try_collect()
            .await?;
        Ok(Some(stored.into_iter().flatten().collect()))
    }
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
            None => "the outbox does not have it",
            Some(row) if row.payload.as_bytes() != stored.payload || row.subject != stored.subject => {
                "the outbox has it with other content"
            }
            Some(row) => return Ok(row.id),
        };
        Err(stored.contradicts(stream, difference, end).into())
    };
    stored.iter().map(row_of).collect()
}

/// The message at `seq`. Returns `None` if it was deleted, or has no event id.
pub(super) async fn stored_at<I>(stream: &Stream<I>, seq: u64) -> anyhow::Result<Option<Stored>> {
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
