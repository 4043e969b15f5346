//! Events that could not be applied: stored whole, with the error, in `bus.dead_letters`.

use crate::event_id;
use crate::postgres::storable;
use anyhow::anyhow;
use async_nats::HeaderMap;
use async_nats::jetstream::Message;
use serde_json::{Map, Value};
use sqlx::PgConnection;
use sqlx::types::time::OffsetDateTime;

/// What becomes of a message after a failed attempt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// It will be redelivered. It has had so many failed attempts.
    Retry { attempts: u32 },
    /// It is stored as a dead letter.
    Dead,
    /// A newer version of the aggregate has been applied: nothing is missing.
    Superseded,
}

/// A message of a stream, and the consumer that did not apply it.
pub(crate) struct Letter<'a> {
    pub(crate) stream: &'a str,
    pub(crate) consumer: &'a str,
    pub(crate) seq: u64,
    pub(crate) published: OffsetDateTime,
    pub(crate) subject: &'a str,
    pub(crate) payload: &'a [u8],
    pub(crate) headers: Option<&'a HeaderMap>,
}

impl<'a> Letter<'a> {
    pub(crate) fn of_delivery(message: &'a Message) -> anyhow::Result<Self> {
        let info = message.info().map_err(|error| anyhow!("not a JetStream message: {error}"))?;
        Ok(Self {
            stream: info.stream,
            consumer: info.consumer,
            seq: info.stream_sequence,
            published: info.published,
            subject: &message.subject,
            payload: &message.payload,
            headers: message.headers.as_ref(),
        })
    }
}

/// A message that was not applied, and why.
pub(crate) struct FailedAttempt<'a> {
    pub(crate) letter: Letter<'a>,
    /// The id of the event. If the message cannot be decoded, its `Nats-Msg-Id`.
    pub(crate) event_id: Option<&'a str>,
    pub(crate) error: &'a str,
    /// Whether trying again can help.
    pub(crate) retryable: bool,
}

/// Events that a handler has just applied. The three lists have the same order.
pub(crate) struct Applied {
    pub(crate) aggregates: Vec<String>,
    pub(crate) versions: Vec<i64>,
    /// The stream sequences of their messages.
    pub(crate) seqs: Vec<i64>,
}

/// Records a failed attempt. After `limit` of them the event is a dead letter.
pub(crate) async fn record(db: &mut PgConnection, attempt: &FailedAttempt<'_>, limit: u32) -> anyhow::Result<Verdict> {
    let FailedAttempt { letter, event_id, error, retryable } = attempt;
    // Stored only if it has the form of an event id: others may be too long for the index.
    let key = event_id.and_then(event_id::split);
    let event_id = event_id.filter(|_| key.is_some());
    let recorded = sqlx::query!(
        r#"
        insert into bus.dead_letters as letter
            (stream, consumer, seq, published_at, subject, event_id, aggregate_id, version, payload, headers, error,
             attempts, status)
        values ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, 1, case when $12 or $13 <= 1 then 'dead' else 'retrying' end)
        on conflict (consumer, stream, seq, published_at) do update
        set attempts = letter.attempts + 1, error = excluded.error, updated_at = now(),
            status = case
                when letter.status = 'superseded' then 'superseded'
                when $12 or letter.attempts + 1 >= $13 then 'dead'
                else 'retrying'
            end
        returning attempts, status
        "#,
        letter.stream,
        letter.consumer,
        i64::try_from(letter.seq)?,
        letter.published,
        storable(letter.subject),
        event_id,
        key.map(|(aggregate_id, _)| aggregate_id),
        key.map(|(_, version)| version),
        letter.payload,
        headers(letter.headers),
        storable(error),
        !retryable,
        i32::try_from(limit)?,
    )
    .fetch_one(db)
    .await?;
    Ok(match recorded.status.as_str() {
        "retrying" => Verdict::Retry { attempts: u32::try_from(recorded.attempts)? },
        "superseded" => Verdict::Superseded,
        _ => Verdict::Dead,
    })
}

/// Marks as superseded: records of failed attempts of the applied events, and those of older versions of the same
/// aggregates.
///
/// Runs as the last statement of the handler's transaction, and so also detects a handler that ignored an error:
/// Postgres refuses this statement then, but would accept a COMMIT, and roll back without an error.
///
/// Returns the time, by the clock of Postgres.
pub(crate) async fn supersede(
    db: &mut PgConnection,
    stream: &str,
    consumer: &str,
    applied: &Applied,
) -> sqlx::Result<OffsetDateTime> {
    let Applied { aggregates, versions, seqs } = applied;
    let superseded = sqlx::query_scalar!(
        r#"select clock_timestamp() as "now!" from bus.supersede($1, $2, $3, $4, $5)"#,
        stream,
        consumer,
        aggregates,
        versions,
        seqs,
    );
    superseded.fetch_one(db).await
}

fn headers(headers: Option<&HeaderMap>) -> Value {
    let all = headers.into_iter().flat_map(HeaderMap::iter).map(|(name, values)| {
        let values = values.iter().map(|value| Value::from(storable(value.as_str()))).collect();
        (storable(name.as_ref()), Value::Array(values))
    });
    Value::Object(all.collect::<Map<_, _>>())
}
