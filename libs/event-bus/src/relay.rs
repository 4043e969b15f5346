//! Publishing: `bus.outbox` → JetStream, each event once and in order, at the position the relay expects.
//!
//! A step is one transaction: lock the stream's row in `bus.relay`, read the oldest rows of the outbox, publish them so
//! that the server stores them only directly behind `last_seq`, delete them and move `last_seq`, commit.
//!
//! What if we die, or are frozen …
//! - before publishing: the lock goes with the connection, nothing happened.
//! - between publishing and commit: the rows are still there and `last_seq` is old. Whoever relays next is refused
//!   (*wrong last sequence*), reads what the stream holds behind `last_seq`, and deletes the rows it finds there.
//!   `kill_nine_between_publish_and_delete_loses_and_doubles_nothing` shows it.
//! - and thaw after another replica took over: our publish expects a position that is taken, so the server refuses it;
//!   our transaction was ended by `idle_in_transaction_session_timeout`. `a_stale_batch_is_refused_as_a_whole` and
//!   `a_relay_frozen_after_publishing_is_taken_over_and_harmless_when_it_thaws` show it.
//!
//! Several events go as one atomic batch, which the server stores whole or not at all. A row of single messages, each
//! expecting its own position, would not do: where the rows of a stale and of a new relay meet at the server, a later link
//! of the stale one can find the position it expects behind messages that are not the ones before it.
//!
//! NATS away: no transaction is opened; events wait in the outbox.

use crate::Bus;
use crate::outbox::{Connection, Transaction};
use crate::retry::{Backoff, jitter};
use anyhow::{Context, bail, ensure};
use async_nats::jetstream::publish::PublishAck;
use async_nats::jetstream::response::Response;
use async_nats::{HeaderMap, header};
use bytes::Bytes;
use futures::{StreamExt, TryStreamExt, stream};
use std::time::Duration;
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;

/// Events in one batch at most; the server takes 1000.
const BATCH: i64 = 512;
/// So many that there may be more than one batch.
const FULL: usize = 256;
/// Under load a batch waits this long to fill: each costs six round trips and a write to two disks.
const COALESCE: Duration = Duration::from_millis(5);
/// Bytes of bodies in one batch at most, though always one event.
const BATCH_BYTES: i64 = 1 << 20;
/// When to look for rows that nobody woke us for: those of a replica that died.
const POLL: Duration = Duration::from_millis(500);
/// When to look again while another replica relays and something of ours may wait.
const CONTENDED: Duration = Duration::from_millis(20);
/// How long the server may take to store a batch. Shorter than `idle_in_transaction_session_timeout`.
const PUBLISH: Duration = Duration::from_secs(5);
/// How long a step may take before the connection to Postgres counts as dead.
const STEP: Duration = Duration::from_secs(20);
/// Messages read per step while finding out what of ours the stream already holds.
const RECONCILE: u64 = 4096;

/// The position of the stream is not what we expected.
const WRONG_LAST_SEQUENCE: u64 = 10071;
/// The same event was stored moments ago: the deduplication window knows its id.
const DUPLICATE_IN_BATCH: u64 = 10201;

enum Step {
    /// More waits, or what was found has to be looked at again.
    More,
    /// Several events were published, so that more are probably on their way.
    Busy,
    /// All that was committed before the step began is published.
    Done,
    /// Another replica is relaying.
    Contended,
}

/// Whether the server stored what it was given.
enum Published {
    UpTo(u64),
    /// Nothing was stored: the stream has moved on without us.
    Elsewhere,
}

struct Row {
    id: i64,
    subject: String,
    event_id: String,
    payload: String,
    traceparent: Option<String>,
}

/// Relays `stream` until `stop`, then publishes what is left, as far as that works at once.
pub(crate) async fn run(bus: &Bus, stream: &'static str, stop: &CancellationToken) -> anyhow::Result<()> {
    let what = format!("publishing to {stream}");
    let mut backoff = Backoff::default();
    while let Err(error) = register(bus, stream).await {
        if stop.run_until_cancelled(sleep(backoff.fail(&what, &error.into()))).await.is_none() {
            return Ok(());
        }
    }
    loop {
        let step = timeout(STEP, step(bus, stream, stop)).await.context("Postgres does not answer");
        let pause = match step.flatten() {
            Ok(step) => {
                backoff.succeed(&what);
                match step {
                    Step::More => Duration::ZERO,
                    Step::Busy if stop.is_cancelled() => Duration::ZERO,
                    Step::Busy => COALESCE,
                    // What another replica has locked is published by it, or after the restart.
                    Step::Contended | Step::Done if stop.is_cancelled() => return Ok(()),
                    Step::Contended => jitter(CONTENDED),
                    Step::Done => {
                        wait_for_work(bus, stop).await;
                        Duration::ZERO
                    }
                }
            }
            Err(_) if stop.is_cancelled() => return Ok(()),
            Err(error) => {
                bus.provision_again(stop).await;
                backoff.fail(&what, &error)
            }
        };
        tokio::select! {
            () = sleep(pause) => {}
            () = stop.cancelled(), if !pause.is_zero() => {}
        }
    }
}

async fn wait_for_work(bus: &Bus, stop: &CancellationToken) {
    tokio::select! {
        () = bus.wake.notified() => {}
        () = sleep(jitter(POLL)) => {}
        () = stop.cancelled() => {}
    }
}

/// The row that is lock and position of the stream, for the first of all relays.
async fn register(bus: &Bus, stream: &str) -> sqlx::Result<()> {
    let mut db = Connection::acquire(&bus.db).await?;
    sqlx::query!("insert into bus.relay (stream) values ($1) on conflict do nothing", stream).execute(&mut *db).await?;
    Ok(())
}

/// One transaction of the relay.
async fn step(bus: &Bus, stream: &'static str, stop: &CancellationToken) -> anyhow::Result<Step> {
    bus.connected()?;
    let mut tx = Transaction::begin(&bus.db, &bus.wake).await?;
    let Some(last_seq) = lock(&mut tx, stream).await? else {
        tx.rollback().await?;
        return Ok(Step::Contended);
    };
    // A statement of its own: a row that its predecessor's holder deleted would still be seen by the lock's snapshot.
    let rows = oldest(&mut tx, stream).await?;
    if rows.is_empty() {
        tx.rollback().await?;
        return Ok(Step::Done);
    }
    let published = timeout(PUBLISH, publish(bus, stream, last_seq, &rows)).await;
    let step = match published.context("the server did not confirm in time")?? {
        Published::UpTo(seq) => {
            let ids: Vec<i64> = rows.iter().map(|row| row.id).collect();
            settle(&mut tx, stream, seq, &ids).await?;
            match rows.len() {
                // Behind a single row nothing waited; what has come since has woken us.
                1 if !stop.is_cancelled() => Step::Done,
                FULL.. => Step::More,
                _ => Step::Busy,
            }
        }
        Published::Elsewhere => {
            reconcile(bus, &mut tx, stream, last_seq).await?;
            Step::More
        }
    };
    tx.commit().await?;
    Ok(step)
}

/// The lock and the position of a stream are one row. `None`: another replica has it.
async fn lock(tx: &mut Transaction, stream: &str) -> anyhow::Result<Option<u64>> {
    let last_seq =
        sqlx::query_scalar!("select last_seq from bus.relay where stream = $1 for update skip locked", stream)
            .fetch_optional(&mut **tx)
            .await?;
    Ok(last_seq.map(u64::try_from).transpose()?)
}

/// The oldest rows, as many as go into one batch.
async fn oldest(tx: &mut Transaction, stream: &str) -> sqlx::Result<Vec<Row>> {
    sqlx::query_as!(
        Row,
        r#"
        select id, subject, aggregate_id || '-' || version as "event_id!", payload, traceparent
        from (
            select *, sum(octet_length(payload)) over (order by id) as bytes, row_number() over (order by id) as number
            from (select * from bus.outbox where stream = $1 order by id limit $2) as oldest
        ) as measured
        where bytes <= $3 or number = 1
        order by id
        "#,
        stream,
        BATCH,
        BATCH_BYTES,
    )
    .fetch_all(&mut **tx)
    .await
}

/// Forgets published rows and moves the position, in one statement.
async fn settle(tx: &mut Transaction, stream: &str, last_seq: u64, ids: &[i64]) -> anyhow::Result<()> {
    sqlx::query!(
        "with published as (delete from bus.outbox where id = any($3)) update bus.relay set last_seq = $2 where stream = $1",
        stream,
        i64::try_from(last_seq)?,
        ids,
    )
    .execute(&mut **tx)
    .await?;
    Ok(())
}

/// Stores all `rows` directly behind `last_seq`, or none of them.
#[expect(clippy::disallowed_methods, reason = "this is the one place that publishes")]
async fn publish(bus: &Bus, stream: &str, last_seq: u64, rows: &[Row]) -> anyhow::Result<Published> {
    let batch = (rows.len() > 1).then(|| bus.nats.new_inbox());
    let mut last = None;
    for (row, number) in rows.iter().zip(1_u64..) {
        let mut headers = HeaderMap::new();
        headers.insert(header::NATS_MESSAGE_ID, row.event_id.as_str());
        if let Some(traceparent) = &row.traceparent {
            headers.insert("traceparent", traceparent.as_str());
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
            bus.nats.publish_with_headers(subject, headers, payload).await?;
        }
    }
    let (subject, mut headers, payload) = last.context("nothing to publish")?;
    if batch.is_some() {
        headers.insert(header::NATS_BATCH_COMMIT, header::NATS_BATCH_COMMIT_FINAL);
    }
    let answer = bus.nats.request_with_headers(subject, headers, payload).await?;
    match serde_json::from_slice(&answer.payload)? {
        Response::<PublishAck>::Ok(ack) if ack.duplicate => Ok(Published::Elsewhere),
        Response::Ok(ack) => {
            ensure!(ack.stream == stream, "{stream} events went to the stream {}: check its subjects", ack.stream);
            Ok(Published::UpTo(ack.sequence))
        }
        Response::Err { error } => match error.error_code().0 {
            WRONG_LAST_SEQUENCE | DUPLICATE_IN_BATCH => Ok(Published::Elsewhere),
            _ => bail!("the server refused: {error}"),
        },
    }
}

/// A batch's id has 64 characters at most; the unique end of an inbox has 22.
fn batch_id(inbox: &str) -> &str {
    inbox.rsplit('.').next().unwrap_or(inbox)
}

/// Reads what the stream holds behind `last_seq`, deletes the rows of ours that are among it, and moves on behind it.
async fn reconcile(bus: &Bus, tx: &mut Transaction, stream: &str, last_seq: u64) -> anyhow::Result<()> {
    let handle = bus.jetstream.get_stream(stream).await.context("cannot read the stream")?;
    let end = handle.cached_info().state.last_sequence;
    if end < last_seq {
        tracing::error!(
            "the broker lost history: {stream} ends at {end}, but {last_seq} was confirmed before. Nothing is published \
             until a person has decided: restore the stream from a backup; or, if it is gone for good, set \
             bus.relay.last_seq to {end}, and republish the current state from the tables"
        );
        bail!("the broker lost history");
    }
    ensure!(end > last_seq, "the server refuses an event as a duplicate that {stream} does not hold behind {last_seq}");
    let until = end.min(last_seq + RECONCILE);
    let ids: Vec<Option<String>> = stream::iter(last_seq + 1..=until)
        // From the leader: a follower may not have the message yet.
        .map(|seq| event_id_at(&handle, seq))
        .buffered(64)
        .try_collect()
        .await?;
    let (aggregates, versions): (Vec<_>, Vec<_>) =
        ids.iter().flatten().filter_map(|id| crate::split_event_id(id)).unzip();
    let found = sqlx::query!(
        "delete from bus.outbox using unnest($2::text[], $3::bigint[]) as stored (aggregate_id, version)
         where stream = $1 and outbox.aggregate_id = stored.aggregate_id and outbox.version = stored.version",
        stream,
        &aggregates as _,
        &versions,
    )
    .execute(&mut **tx)
    .await?;
    settle(tx, stream, until, &[]).await?;
    tracing::warn!(stream, from = last_seq, to = until, found = found.rows_affected(), "caught up with the stream");
    Ok(())
}

/// `None`: the message is gone, or is not one of ours.
async fn event_id_at(stream: &async_nats::jetstream::stream::Stream, seq: u64) -> anyhow::Result<Option<String>> {
    use async_nats::jetstream::stream::LastRawMessageErrorKind::NoMessageFound;
    match stream.get_raw_message(seq).await {
        Ok(message) => Ok(message.headers.get(header::NATS_MESSAGE_ID).map(ToString::to_string)),
        Err(error) if error.kind() == NoMessageFound => Ok(None),
        Err(error) => Err(error).context("cannot read the stream"),
    }
}
