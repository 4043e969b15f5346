//! Publishes a batch of events. No other code publishes events.

use super::outbox::Row;
use crate::broker::Broker;
use crate::headers::TRACEPARENT;
use anyhow::{Context, bail, ensure};
use async_nats::jetstream::publish::PublishAck;
use async_nats::jetstream::response::Response;
use async_nats::{HeaderMap, header};
use bytes::Bytes;
use std::slice;
use tokio::time::{Instant, timeout_at};

/// The position of the stream is not what we expected.
const WRONG_LAST_SEQUENCE: u64 = 10071;
/// An event of the batch was stored recently: its id is in the deduplication window.
const DUPLICATE_IN_BATCH: u64 = 10201;

/// The batch is incomplete: the server has dropped its first messages before the last one arrived.
const INCOMPLETE_BATCH: u64 = 10176;

/// The stream takes no atomic batches: it is configured with `allow_atomic: false`.
const ATOMIC_DISABLED: u64 = 10174;

/// Up to this many events are published one after another: an atomic batch costs the server several files, and as much time as
/// eight single events. Not up to eight, because each of them costs the server more CPU.
pub(super) const FEW: usize = 4;

/// Whether the server stored the rows.
pub(super) enum Published {
    /// The first `rows` of them are stored; the last of these has the sequence `seq`.
    UpTo { seq: u64, rows: usize },
    /// Nothing was stored: the stream does not end at the expected position.
    Elsewhere,
    /// Nothing was stored: the stream takes only single events.
    Singly,
}

/// Stores `rows` directly after `last_seq`: all or none of them. If they are few and of different transactions, they are
/// published one by one, and any number of the first ones may be stored.
pub(super) async fn publish(
    broker: &Broker,
    stream: &str,
    last_seq: u64,
    rows: &[Row],
    deadline: Instant,
) -> anyhow::Result<Published> {
    if rows.len() > FEW || shares_a_transaction(rows) {
        return publish_until(deadline, broker, stream, last_seq, rows).await;
    }
    let mut seq = last_seq;
    for (row, before) in rows.iter().zip(0..) {
        match publish_until(deadline, broker, stream, seq, slice::from_ref(row)).await {
            Ok(Published::UpTo { seq: stored, .. }) => seq = stored,
            Ok(_) | Err(_) if before > 0 => return Ok(Published::UpTo { seq, rows: before }),
            refused => return refused,
        }
    }
    Ok(Published::UpTo { seq, rows: rows.len() })
}

async fn publish_until(
    deadline: Instant,
    broker: &Broker,
    stream: &str,
    last_seq: u64,
    rows: &[Row],
) -> anyhow::Result<Published> {
    timeout_at(deadline, publish_together(broker, stream, last_seq, rows)).await.context(
        "the server did not confirm in time; if this continues, it cannot store (disk full?): see its /healthz",
    )?
}

/// Stores all `rows` directly after `last_seq`, or none of them.
#[expect(clippy::disallowed_methods, reason = "only this function publishes")]
async fn publish_together(broker: &Broker, stream: &str, last_seq: u64, rows: &[Row]) -> anyhow::Result<Published> {
    let nats = &broker.client;
    let batch = (rows.len() > 1).then(|| nats.new_inbox());
    let mut last = None;
    for (row, number) in rows.iter().zip(1_u64..) {
        let mut headers = headers(row)?;
        if number == 1 {
            headers.insert(header::NATS_EXPECTED_LAST_SEQUENCE, header::HeaderValue::from(last_seq));
        }
        if let Some(batch) = &batch {
            headers.insert(header::NATS_BATCH_ID, batch_id(batch));
            headers.insert(header::NATS_BATCH_SEQUENCE, header::HeaderValue::from(number));
        }
        let message = (row.subject.clone(), headers, Bytes::from(row.payload.clone()));
        if let Some((subject, headers, payload)) = last.replace(message) {
            nats.publish_with_headers(subject, headers, payload).await?;
        }
    }
    let (subject, mut headers, payload) = last.context("nothing to publish")?;
    if batch.is_some() {
        headers.insert(header::NATS_BATCH_COMMIT, header::NATS_BATCH_COMMIT_FINAL);
    }
    let answer = nats.request_with_headers(subject, headers, payload).await?;
    match serde_json::from_slice(&answer.payload)? {
        Response::<PublishAck>::Ok(ack) if ack.duplicate => Ok(Published::Elsewhere),
        Response::Ok(ack) => {
            // Behind a leaf node, a stream of another domain may have the same subject.
            let domain = broker.domain.as_deref();
            ensure!(
                domain.is_none_or(|domain| ack.domain == domain),
                "{stream} events went to the JetStream domain {:?}: delete the streams there that have their subjects",
                ack.domain
            );
            ensure!(ack.stream == stream, "{stream} events went to the stream {}: check its subjects", ack.stream);
            Ok(Published::UpTo { seq: ack.sequence, rows: rows.len() })
        }
        Response::Err { error } => match error.error_code().0 {
            WRONG_LAST_SEQUENCE | DUPLICATE_IN_BATCH => Ok(Published::Elsewhere),
            ATOMIC_DISABLED => Ok(Published::Singly),
            INCOMPLETE_BATCH => {
                bail!("the server cannot store (disk full?), or no stream has the subject: {error}")
            }
            _ => bail!("the server refused: {error}"),
        },
    }
}

/// The headers of an event, except those of publishing.
fn headers(row: &Row) -> anyhow::Result<HeaderMap> {
    let mut headers = HeaderMap::new();
    headers.insert(header::NATS_MESSAGE_ID, row.event_id.as_str());
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
