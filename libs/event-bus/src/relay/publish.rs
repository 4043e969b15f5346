//! Publishes a batch of events. No other code publishes events.

use super::outbox::Row;
use super::stored::stored_at;
use crate::broker::Broker;
use crate::headers::{APPENDED_AT, TRACEPARENT};
use crate::meters::publish_failed;
use anyhow::{Context, bail, ensure};
use async_nats::jetstream::publish::PublishAck;
use async_nats::jetstream::response::Response;
use async_nats::{HeaderMap, HeaderValue, Message, RequestError, header};
use bytes::Bytes;
use futures::future::join_all;
use tokio::time::{Instant, timeout_at};

/// The position of the stream is not what we expected.
const WRONG_LAST_SEQUENCE: u64 = 10071;
/// An event of the batch was stored recently: its id is in the deduplication window.
const DUPLICATE_IN_BATCH: u64 = 10201;

/// The batch is incomplete: the server has dropped its first messages before the last one arrived.
const INCOMPLETE_BATCH: u64 = 10176;

/// The stream has no room, or cannot store for another reason, which the description says.
const NOT_STORED: u64 = 10077;

/// The stream takes no atomic batches: it is configured with `allow_atomic: false`.
const ATOMIC_DISABLED: u64 = 10174;

/// The last event of the stream is not the one that we expected.
const WRONG_LAST_EVENT: u64 = 10070;

/// Up to this many events are published as a chain: an atomic batch costs the server several files, and more time than they do.
pub(super) const FEW: usize = 12;

/// Whether the server stored the rows.
pub(super) enum Published {
    /// The first `rows` of them are stored; the last of these has the sequence `seq`.
    UpTo { seq: u64, rows: usize },
    /// Nothing was stored: the stream does not end at the expected position.
    Elsewhere,
    /// Nothing was stored: the stream takes only single events.
    Singly,
    /// Nothing was stored: the stream has no room.
    Full,
}

/// Stores `rows` directly after `last_seq`: all or none of them. If they are few and of different transactions, they are a chain,
/// of which any number of the first ones may be stored.
///
/// The deduplication window may hold a snapshot that is published again. Then the server refuses its batch as a whole, and the
/// batch is published as chains, without the events that the stream already holds.
pub(super) async fn publish(
    broker: &Broker,
    stream: &str,
    last_seq: u64,
    rows: &[Row],
    deadline: Instant,
) -> anyhow::Result<Published> {
    let mut is_chain = rows.len() <= FEW && !shares_a_transaction(rows);
    let (mut seq, mut done) = (last_seq, 0);
    while done < rows.len() {
        let rest = &rows[done..];
        let outcome = if is_chain {
            publish_chain(broker, stream, seq, &rest[..rest.len().min(FEW)], deadline).await
        } else {
            in_time(stream, deadline, publish_batch(broker, stream, seq, rest)).await
        };
        match outcome {
            Ok(Outcome::Stored { seq: end, rows }) => (seq, done) = (end, done + rows),
            Ok(Outcome::Duplicate { .. }) if !is_chain => is_chain = true,
            Ok(Outcome::Singly) => return Ok(Published::Singly),
            _ if done > 0 => break,
            Ok(Outcome::Full) => return Ok(Published::Full),
            Ok(Outcome::Elsewhere | Outcome::Duplicate { .. }) => return Ok(Published::Elsewhere),
            Err(error) => return Err(error),
        }
    }
    Ok(Published::UpTo { seq, rows: done })
}

/// What the server did with events that were published directly after a position.
enum Outcome {
    /// The first `rows` of them are in the stream, which now ends at `seq`.
    Stored { seq: u64, rows: usize },
    /// Nothing was stored: the stream does not end at the expected position.
    Elsewhere,
    /// Nothing was stored: an event is in the deduplication window. The sequence of a single one.
    Duplicate { at: Option<u64> },
    /// Nothing was stored: the stream takes only single events.
    Singly,
    /// Nothing was stored: the stream has no room.
    Full,
}

async fn in_time(
    stream: &str,
    deadline: Instant,
    publishing: impl Future<Output = anyhow::Result<Outcome>>,
) -> anyhow::Result<Outcome> {
    timeout_at(deadline, publishing).await.inspect_err(|_| publish_failed(stream, None)).context(
        "the server did not confirm in time; if this continues, it cannot store (disk full?): see its /healthz",
    )?
}

/// Publishes `rows` at once, each on the condition that it follows the one before.
async fn publish_chain(
    broker: &Broker,
    stream: &str,
    last_seq: u64,
    rows: &[Row],
    deadline: Instant,
) -> anyhow::Result<Outcome> {
    let links = rows.iter().enumerate().zip(last_seq..).map(|((number, row), seq)| {
        let before = number.checked_sub(1).map(|before| rows[before].event_id.as_str());
        in_time(stream, deadline, publish_link(broker, stream, seq, before, row))
    });
    // They are sent in this order; the server refuses what arrives in another one.
    let (mut seq, mut stored) = (last_seq, 0);
    for (link, row) in join_all(links).await.into_iter().zip(rows) {
        match link {
            Ok(Outcome::Stored { seq: end, .. }) => seq = end,
            // Before our position, and so confirmed: the snapshot need not be published again.
            Ok(Outcome::Duplicate { at: Some(at) }) if at <= last_seq => is_the_same(broker, stream, at, row).await?,
            _ if stored > 0 => break,
            not_stored => return not_stored,
        }
        stored += 1;
    }
    Ok(Outcome::Stored { seq, rows: stored })
}

/// Fails if the message at `seq` is not the event of `row`: the same event id has one content for ever.
async fn is_the_same(broker: &Broker, stream: &str, seq: u64, row: &Row) -> anyhow::Result<()> {
    let handle = broker.jetstream.get_stream_no_info(stream).await.context("cannot read the stream")?;
    let stored = stored_at(&handle, seq).await?.with_context(|| format!("{stream} holds no event at {seq}"))?;
    ensure!(
        stored.payload == row.payload.as_bytes() && stored.subject == row.subject,
        "{stream} holds {} at {seq} with other content",
        row.event_id
    );
    Ok(())
}

/// Stores `row` directly after `last_seq`, if the message there is the event `before`.
#[expect(clippy::disallowed_methods, reason = "only this function and the next one publish")]
async fn publish_link(
    broker: &Broker,
    stream: &str,
    last_seq: u64,
    before: Option<&str>,
    row: &Row,
) -> anyhow::Result<Outcome> {
    let mut headers = headers(row)?;
    headers.insert(header::NATS_EXPECTED_LAST_SEQUENCE, HeaderValue::from(last_seq));
    if let Some(before) = before {
        headers.insert(header::NATS_EXPECTED_LAST_MESSAGE_ID, before);
    }
    let payload = Bytes::from(row.payload.clone());
    let answer = broker.client.request_with_headers(row.subject.clone(), headers, payload).await;
    outcome(broker, stream, last_seq, 1, answer)
}

/// Stores `rows` directly after `last_seq` as an atomic batch: all of them, or none.
#[expect(clippy::disallowed_methods, reason = "only this function and the one before publish")]
async fn publish_batch(broker: &Broker, stream: &str, last_seq: u64, rows: &[Row]) -> anyhow::Result<Outcome> {
    let nats = &broker.client;
    let batch = nats.new_inbox();
    let mut last = None;
    for (row, number) in rows.iter().zip(1_u64..) {
        let mut headers = headers(row)?;
        if number == 1 {
            headers.insert(header::NATS_EXPECTED_LAST_SEQUENCE, HeaderValue::from(last_seq));
        }
        headers.insert(header::NATS_BATCH_ID, batch_id(&batch));
        headers.insert(header::NATS_BATCH_SEQUENCE, HeaderValue::from(number));
        let message = (row.subject.clone(), headers, Bytes::from(row.payload.clone()));
        if let Some((subject, headers, payload)) = last.replace(message) {
            nats.publish_with_headers(subject, headers, payload).await?;
        }
    }
    let (subject, mut headers, payload) = last.context("nothing to publish")?;
    headers.insert(header::NATS_BATCH_COMMIT, header::NATS_BATCH_COMMIT_FINAL);
    let answer = nats.request_with_headers(subject, headers, payload).await;
    outcome(broker, stream, last_seq, rows.len(), answer)
}

type Answer = Result<Message, RequestError>;

/// What the server has replied to the publish of so many `rows`.
fn outcome(broker: &Broker, stream: &str, last_seq: u64, rows: usize, answer: Answer) -> anyhow::Result<Outcome> {
    let answer = answer.inspect_err(|_| publish_failed(stream, None))?;
    match serde_json::from_slice(&answer.payload)? {
        Response::<PublishAck>::Ok(ack) if ack.duplicate => Ok(Outcome::Duplicate { at: Some(ack.sequence) }),
        Response::Ok(ack) => {
            // Behind a leaf node, a stream of another domain may have the same subject.
            let domain = broker.domain.as_deref();
            ensure!(
                domain.is_none_or(|domain| ack.domain == domain),
                "{stream} events went to the JetStream domain {:?}: delete the streams there that have their subjects",
                ack.domain
            );
            ensure!(ack.stream == stream, "{stream} events went to the stream {}: check its subjects", ack.stream);
            let end = last_seq + u64::try_from(rows)?;
            ensure!(ack.sequence == end, "{stream} ends at {} after a publish, and should end at {end}", ack.sequence);
            Ok(Outcome::Stored { seq: end, rows })
        }
        Response::Err { error } => {
            let code = error.error_code().0;
            publish_failed(stream, Some(code));
            match code {
                WRONG_LAST_SEQUENCE | WRONG_LAST_EVENT => Ok(Outcome::Elsewhere),
                DUPLICATE_IN_BATCH => Ok(Outcome::Duplicate { at: None }),
                ATOMIC_DISABLED => Ok(Outcome::Singly),
                NOT_STORED if is_full(&error) => Ok(Outcome::Full),
                INCOMPLETE_BATCH => {
                    bail!("the server cannot store (disk full?), or no stream has the subject: {error}")
                }
                _ => bail!("the server refused: {error}"),
            }
        }
    }
}

/// Whether the stream has as many bytes or messages as it may have.
fn is_full(error: &async_nats::jetstream::Error) -> bool {
    let error = error.to_string();
    error.contains("maximum bytes exceeded") || error.contains("maximum messages exceeded")
}

/// The headers of an event, except those of publishing.
fn headers(row: &Row) -> anyhow::Result<HeaderMap> {
    let mut headers = HeaderMap::new();
    headers.insert(header::NATS_MESSAGE_ID, row.event_id.as_str());
    headers.insert(APPENDED_AT, HeaderValue::from(row.appended_at));
    if let Some(traceparent) = &row.traceparent {
        headers.insert(TRACEPARENT, traceparent.as_str());
    }
    for (name, value) in row.headers()?.iter() {
        headers.insert(name, value);
    }
    Ok(headers)
}

/// Whether two of the rows were appended by the same transaction: these are published together.
fn shares_a_transaction(rows: &[Row]) -> bool {
    rows.iter().zip(1..).any(|(row, next)| rows[next..].iter().any(|other| other.transaction == row.transaction))
}

/// The id of a batch has at most 64 characters; the unique last token of an inbox has 22.
fn batch_id(inbox: &str) -> &str {
    inbox.rsplit('.').next().unwrap_or(inbox)
}
