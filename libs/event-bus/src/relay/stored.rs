//! The stream as the broker has it: its end, its messages, and how they can contradict the database.

use crate::broker::{Broker, Reader, message_at};
use crate::event_id;
use anyhow::Context;
use async_nats::header;
use async_nats::jetstream::ErrorCode;
use async_nats::jetstream::context::GetStreamErrorKind::JetStream;
use async_nats::jetstream::message::StreamMessage;
use async_nats::jetstream::stream::Stream;
use bytes::Bytes;
use sqlx::types::time::OffsetDateTime;
use std::time::Duration;
use tokio::time::{Instant, timeout};

/// How long the server may take to describe the stream.
const LOOK: Duration = Duration::from_secs(2);
/// How long one transaction compares messages. Much shorter than the time limit of a step.
const COMPARING: Duration = Duration::from_secs(2);
/// The most messages that are compared at a time.
pub(super) const PAGE: usize = 512;
/// Bytes of bodies that are requested at a time.
const BYTES: usize = 1 << 20;

/// The stream as the broker has it.
pub(super) struct Seen {
    pub(super) stream: Stream,
    /// The sequence of its last message.
    pub(super) end: u64,
    /// When it was created, in microseconds, as Postgres stores it.
    pub(super) created: OffsetDateTime,
}

impl Seen {
    pub(super) async fn look(broker: &Broker, stream: &str) -> anyhow::Result<Self> {
        // No node replies while there is no leader.
        let looked = timeout(LOOK, broker.jetstream.get_stream(stream));
        let stream = match looked.await.with_context(|| format!("no reply about the stream {stream}"))? {
            Err(error) if matches!(error.kind(), JetStream(error) if error.error_code() == ErrorCode::STREAM_NOT_FOUND) =>
            {
                anyhow::bail!("the stream {stream} does not exist: run the command `provision`")
            }
            stream => stream.context("cannot read the stream")?,
        };
        let info = stream.cached_info();
        let (end, created) = (info.state.last_sequence, info.created);
        let created = created.replace_nanosecond(created.microsecond() * 1000)?;
        Ok(Self { stream, end, created })
    }
}

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
    pub(super) event_id: String,
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

/// The messages after a position, read for at most two seconds.
pub(super) struct Messages<'a> {
    seen: &'a Seen,
    reader: Reader,
    begun: Instant,
    /// The position of the last message that was read.
    pub(super) until: u64,
}

impl<'a> Messages<'a> {
    pub(super) fn after(position: u64, seen: &'a Seen) -> Self {
        Self { seen, reader: Reader::new(BYTES), begun: Instant::now(), until: position }
    }

    /// Some of the next messages, at most `most`. Returns `None` at the end of the stream, or if the time is over.
    pub(super) async fn next(&mut self, most: usize) -> anyhow::Result<Option<Vec<Stored>>> {
        if self.until >= self.seen.end || self.begun.elapsed() >= COMPARING {
            return Ok(None);
        }
        let next = self.until + 1;
        // From the leader: a follower may not have the message yet.
        let messages = self.reader.read(&self.seen.stream, (next..=self.seen.end).take(most)).await?;
        self.until += u64::try_from(messages.len())?;
        Ok(Some(messages.into_iter().flatten().filter_map(stored).collect()))
    }
}

/// The message at `seq`. Returns `None` if it was deleted, or has no event id.
pub(super) async fn stored_at<I>(stream: &Stream<I>, seq: u64) -> anyhow::Result<Option<Stored>> {
    Ok(message_at(stream, seq).await?.and_then(stored))
}

/// A message that has the id of an event.
fn stored(message: StreamMessage) -> Option<Stored> {
    let event_id = message.headers.get(header::NATS_MESSAGE_ID)?.to_string();
    let (aggregate_id, version) = event_id::split(&event_id)?;
    let (aggregate_id, subject) = (aggregate_id.to_owned(), message.subject.to_string());
    let (seq, payload, published_at) = (message.sequence, message.payload, message.time);
    Some(Stored { seq, event_id, aggregate_id, version, subject, payload, published_at })
}
