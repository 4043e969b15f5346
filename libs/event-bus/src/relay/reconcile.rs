//! Finds out why the stream does not end at the position of the relay.
//!
//! - After the position are events that the outbox has with the same content: a relay died after it published them.
//!   Their rows are deleted.
//! - After it are messages without the id of an event: they are skipped.
//! - After it is an event that the outbox does not have, or has with other content: the database is older than the
//!   stream. It was restored from a backup, or failed over to a standby that lagged. See `recover`.
//!
//! In the last case, versions would be assigned twice. A relay without snapshots publishes nothing until a person has decided. A stream
//! that ends before the position has lost history: see `heal`.

use super::Relay;
use super::heal::Seen;
use super::outbox::{self, Position};
use super::recover::{self, Taken};
use crate::broker::message_at;
use crate::connection::Transaction;
use crate::event_id;
use crate::recovery::{self, Mark, Page};
use async_nats::header;
use async_nats::jetstream::stream::Stream;
use bytes::Bytes;
use futures::{StreamExt, TryStreamExt, stream};
use sqlx::PgConnection;
use sqlx::types::time::OffsetDateTime;
use std::collections::HashMap;
use std::time::Duration;
use tokio::time::Instant;

/// How long one transaction compares messages. Much shorter than the time limit of a step.
const COMPARING: Duration = Duration::from_secs(2);
/// Messages in memory at a time: each may have a megabyte, and arrives in base64.
const AT_A_TIME: u64 = 4;
/// The most messages and bytes of bodies that one transaction compares.
const MESSAGES: usize = 512;
const BYTES: usize = 4 << 20;

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
    #[error(
        "the database lost history, and cannot be recovered: it is older than the stream {stream}, whose messages {from} to {to} are \
         deleted. Nothing is published. Restore a newer database; or, to take over what the stream still has, run `update bus.relay \
         set last_seq = {to} where stream = '{stream}'`: changes that only the deleted messages announced are lost"
    )]
    TooOld { stream: String, from: u64, to: u64 },
}

/// A message of the stream with the id of an event.
pub(super) struct Stored {
    pub(super) seq: u64,
    event_id: String,
    pub(super) aggregate_id: String,
    pub(super) version: i64,
    pub(super) subject: String,
    pub(super) payload: Bytes,
    pub(super) published_at: OffsetDateTime,
}

impl Stored {
    /// The database is older than this message of a stream that ends at `end`.
    pub(super) fn contradicts(&self, stream: &str, difference: &'static str, end: u64) -> LostHistory {
        let (stream, event_id) = (stream.to_owned(), self.event_id.clone());
        LostHistory::Database { stream, event_id, seq: self.seq, difference, end }
    }
}

impl Relay<'_> {
    /// Reads the messages after `position`, deletes their rows from the outbox, takes over those that it does not have, moves the
    /// position to the last of them, and commits.
    pub(super) async fn reconcile(
        &mut self,
        seen: &Seen,
        mut tx: Transaction,
        position: Position,
        mark: Option<Mark>,
    ) -> anyhow::Result<()> {
        let (stream, from) = (self.stream, position.last_seq);
        let (stored, until) = page(from, seen).await?;
        let (mut published, differing) = compare(&mut tx, stream, &stored).await?;
        let taken = match (self.source, differing.first()) {
            (_, None) => Taken::default(),
            (None, Some((stored, difference))) => return Err(stored.contradicts(stream, difference, seen.end).into()),
            (Some(source), Some(_)) => {
                let first = seen.stream.cached_info().state.first_sequence;
                if first > from + 1 {
                    return Err(LostHistory::TooOld { stream: stream.to_owned(), from: from + 1, to: first - 1 }.into());
                }
                let differing: Vec<&Stored> = differing.iter().map(|(stored, _)| *stored).collect();
                recover::take_over(&mut tx, source, stream, &stored, &differing, &published).await?
            }
        };
        let found = published.len();
        let page = Page {
            from_seq: from,
            until_seq: seen.end,
            taken_over: taken.aggregates,
            dropped: taken.dropped.len(),
            newest_at: taken.newest_at,
        };
        if mark.is_some() || page.taken_over > 0 {
            recovery::record(&mut tx, stream, &page, &self.duties.subscriptions()).await?;
        }
        published.extend(taken.dropped);
        published.sort_unstable();
        self.connection = Some(outbox::move_on(tx, stream, position, until, &published).await?);
        match mark {
            Some(mark) => {
                self.is_recovering();
                self.log_progress(&mark, i64::try_from(until)?);
            }
            None if page.taken_over > 0 => {
                self.is_recovering();
                log_begin(stream, &page, seen);
            }
            None => tracing::warn!(stream, from, to = until, found, "caught up with the stream"),
        }
        Ok(())
    }
}

fn log_begin(stream: &str, page: &Page, seen: &Seen) {
    let (from, end, last) = (page.from_seq, page.until_seq, seen.stream.cached_info().state.last_timestamp);
    tracing::error!(
        stream,
        from,
        to = end,
        "the database lost history: it ends at {from} of {stream}, which ends at {end}. It was restored from a backup, or failed over to a \
         standby that lagged. It takes over the events since, the last of which was published at {last}; until that is done, writes are \
         refused. What was committed before the loss and not published by then is lost: usually the last milliseconds"
    );
}

/// The messages after a position that are compared in one transaction, and the position of the last of them.
async fn page(position: u64, seen: &Seen) -> anyhow::Result<(Vec<Stored>, u64)> {
    let (mut stored, mut bytes) = (Vec::new(), 0);
    let mut messages = Messages::after(position, seen);
    while stored.len() < MESSAGES && bytes < BYTES {
        let Some(next) = messages.next().await? else { break };
        bytes += next.iter().map(|stored| stored.payload.len()).sum::<usize>();
        stored.extend(next);
    }
    Ok((stored, messages.until))
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

/// The ids of the outbox rows whose events are in `stored`, and those of `stored` that the outbox does not have with the same content.
pub(super) async fn compare<'a>(
    db: &mut PgConnection,
    stream: &str,
    stored: &'a [Stored],
) -> anyhow::Result<(Vec<i64>, Vec<(&'a Stored, &'static str)>)> {
    let keys: Vec<String> = stored.iter().map(|stored| format!("{stream}.{}", stored.aggregate_id)).collect();
    let versions: Vec<i64> = stored.iter().map(|stored| stored.version).collect();
    let rows = sqlx::query!(
        "select id, aggregate_id, outbox.version, subject, payload
         from unnest($1::text[], $2::bigint[]) as wanted (key, version)
         join bus.outbox on (outbox.stream || '.' || outbox.aggregate_id) = key and outbox.version = wanted.version",
        &keys,
        &versions,
    );
    let rows: HashMap<_, _> =
        rows.fetch_all(db).await?.into_iter().map(|row| ((row.aggregate_id.clone(), row.version), row)).collect();
    let (mut published, mut differing) = (Vec::new(), Vec::new());
    for stored in stored {
        match rows.get(&(stored.aggregate_id.clone(), stored.version)) {
            None => differing.push((stored, "the outbox does not have it")),
            Some(row) if row.payload.as_bytes() != stored.payload || row.subject != stored.subject => {
                differing.push((stored, "the outbox has it with other content"));
            }
            Some(row) => published.push(row.id),
        }
    }
    published.dedup();
    Ok((published, differing))
}

/// The message at `seq`. Returns `None` if it was deleted, or has no event id.
pub(super) async fn stored_at<I>(stream: &Stream<I>, seq: u64) -> anyhow::Result<Option<Stored>> {
    let Some(message) = message_at(stream, seq).await? else { return Ok(None) };
    let Some(event_id) = message.headers.get(header::NATS_MESSAGE_ID).map(ToString::to_string) else { return Ok(None) };
    let Some((aggregate_id, version)) = event_id::split(&event_id) else { return Ok(None) };
    let (aggregate_id, subject) = (aggregate_id.to_owned(), message.subject.to_string());
    let (payload, published_at) = (message.payload, message.time);
    Ok(Some(Stored { seq, event_id, aggregate_id, version, subject, payload, published_at }))
}
