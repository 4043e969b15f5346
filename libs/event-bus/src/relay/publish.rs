//! Publishes a batch of events. No other code publishes events.

use super::outbox::Row;
use crate::broker::Broker;
use crate::headers::TRACEPARENT;
use anyhow::{Context, bail, ensure};
use async_nats::jetstream::publish::PublishAck;
use async_nats::jetstream::response::Response;
use async_nats::{HeaderMap, header};
use bytes::Bytes;

/// The position of the stream is not what we expected.
const WRONG_LAST_SEQUENCE: u64 = 10071;
/// An event of the batch was stored recently: its id is in the deduplication window.
const DUPLICATE_IN_BATCH: u64 = 10201;

/// The batch is incomplete: the server has dropped its first messages before the last one arrived.
const INCOMPLETE_BATCH: u64 = 10176;

/// The stream takes no atomic batches: it is configured with `allow_atomic: false`.
const ATOMIC_DISABLED: u64 = 10174;

/// Whether the server stored the rows.
pub(super) enum Published {
    /// All are stored; the last one has this sequence.
    UpTo(u64),
    /// Nothing was stored: the stream does not end at the expected position.
    Elsewhere,
    /// Nothing was stored: the stream takes only single events.
    Singly,
}

/// Stores all `rows` directly after `last_seq`, or none of them.
#[expect(clippy::disallowed_methods, reason = "only this function publishes")]
pub(super) async fn publish(broker: &Broker, stream: &str, last_seq: u64, rows: &[Row]) -> anyhow::Result<Published> {
    let nats = &broker.client;
    let batch = (rows.len() > 1).then(|| nats.new_inbox());
    let mut last = None;
    for (row, number) in rows.iter().zip(1_u64..) {
        let mut headers = HeaderMap::new();
        headers.insert(header::NATS_MESSAGE_ID, row.event_id.as_str());
        if let Some(traceparent) = &row.traceparent {
            headers.insert(TRACEPARENT, traceparent.as_str());
        }
        for (name, value) in row.headers()?.iter() {
            headers.insert(name, value);
        }
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
            Ok(Published::UpTo(ack.sequence))
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

/// The id of a batch has at most 64 characters; the unique last token of an inbox has 22.
fn batch_id(inbox: &str) -> &str {
    inbox.rsplit('.').next().unwrap_or(inbox)
}
