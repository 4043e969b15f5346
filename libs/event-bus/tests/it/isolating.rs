//! An event that cannot be applied does not delay events of other aggregates.

use crate::documents::{DocumentEvent, Id, event};
use crate::harness::{Harness, append};
use event_bus::{Bus, Event, Handler, Publish, Received, Transaction};
use sqlx::Executor;
use std::time::Duration;
use testkit::{eventually, eventually_within};

/// Locks a row for each document, as handlers do, and counts in it. Documents called "panic" or "refused" are not
/// applied.
struct Counter;

impl Handler for Counter {
    type Event = DocumentEvent;

    async fn apply(&self, tx: &mut Transaction, events: &[Received<DocumentEvent>]) -> anyhow::Result<()> {
        let mut ids: Vec<String> = events.iter().map(|event| event.aggregate_id()).collect();
        ids.sort();
        sqlx::query("select from counted where id = any($1) order by id for update")
            .bind(&ids)
            .execute(&mut **tx)
            .await?;
        let titles = events.iter().map(|event| event.snapshot().title.as_str());
        for title in titles {
            assert_ne!(title, "panic", "the handler does not like it");
            anyhow::ensure!(title != "refused", "not this one");
        }
        let count =
            "insert into counted select unnest($1::text[]) on conflict (id) do update set times = counted.times + 1";
        for id in ids {
            sqlx::query(count).bind([id]).execute(&mut **tx).await?;
        }
        Ok(())
    }
}

async fn counted(harness: &Harness) -> i64 {
    let count = "select coalesce(sum(times), 0)::bigint from counted";
    sqlx::query_scalar(count).fetch_one(&mut harness.db().await).await.unwrap()
}

async fn counts_to(harness: &Harness, expected: i64) {
    eventually("the events to be applied", async || {
        let counted = counted(harness).await;
        anyhow::ensure!(counted == expected, "{counted} are");
        Ok(())
    })
    .await
    .unwrap();
}

async fn letters(harness: &Harness) -> Vec<(String, String)> {
    let sql = "select status, error from bus.dead_letters order by id";
    sqlx::query_as(sql).fetch_all(&mut harness.db().await).await.unwrap()
}

async fn start() -> (Harness, Bus) {
    let mut harness = Harness::start().await;
    harness
        .db()
        .await
        .execute("create table counted (id text primary key, times int not null default 1)")
        .await
        .unwrap();
    let bus = harness.relay().await;
    harness.tasks.spawn(bus.clone().subscribe("reader", Counter, harness.stop.clone()));
    (harness, bus)
}

/// A version of a document with this title.
fn titled(id: Id, version: i64, title: &str) -> DocumentEvent {
    let mut event = event(id, version);
    let (DocumentEvent::Created(snapshot) | DocumentEvent::Updated(snapshot)) = &mut event;
    title.clone_into(&mut snapshot.title);
    event
}

/// Commits one event of a new document.
async fn commit(harness: &Harness, title: &str) {
    let event = titled(Id::generate(), 0, title);
    let sql = "select bus.append('DOCUMENTS', 'document.created', $1, 0, $2, null)";
    let commit = sqlx::query(sql).bind(event.aggregate_id()).bind(event.encode());
    commit.execute(&mut harness.db().await).await.unwrap();
}

#[tokio::test]
async fn a_locked_row_delays_only_its_own_event() {
    let (harness, bus) = start().await;
    let locked = Id::generate();
    append(&bus, locked, 0..1).await;
    counts_to(&harness, 1).await;

    let mut holder = harness.db().await;
    holder.execute("begin; select from counted for update").await.unwrap();
    append(&bus, locked, 1..2).await;
    for _ in 0..50 {
        commit(&harness, "fine").await;
    }
    counts_to(&harness, 51).await; // while the lock is held
    for _ in 0..50 {
        commit(&harness, "fine").await;
    }
    counts_to(&harness, 101).await;
    holder.execute("rollback").await.unwrap();
    counts_to(&harness, 102).await;
    assert_eq!(letters(&harness).await, [], "waiting for a lock counted as a failed attempt");
}

#[tokio::test]
async fn a_panic_of_a_handler_is_a_failed_attempt() {
    let (mut harness, _bus) = start().await;
    commit(&harness, "fine").await;
    commit(&harness, "panic").await;
    commit(&harness, "fine").await;
    counts_to(&harness, 2).await;
    eventually_within(Duration::from_mins(1), "the dead letter", async || {
        letters(&harness).await.iter().any(|(status, _)| status == "dead")
    })
    .await
    .unwrap();
    let [(_, error)] = &letters(&harness).await[..] else { panic!("not one letter") };
    assert!(error.contains("panicked") && error.contains("the handler does not like it"), "{error}");
    commit(&harness, "fine").await;
    counts_to(&harness, 3).await;
    assert!(harness.tasks.try_join_next().is_none(), "the subscription ended");
}

/// Two messages may carry the same id and different content.
#[tokio::test]
async fn an_applied_message_does_not_supersede_another_with_the_same_id() {
    let (harness, _bus) = start().await;
    let (id, jetstream) = (Id::generate(), harness.jetstream().await);
    eventually("the stream", async || jetstream.get_stream("DOCUMENTS").await).await.unwrap();
    let publish = async |title: &str| {
        let body = titled(id, 0, title).encode();
        jetstream.publish("document.created", body.into()).await.unwrap().await.unwrap();
    };
    publish("refused").await;
    eventually("the first attempt", async || !letters(&harness).await.is_empty()).await.unwrap();
    publish("fine").await;
    counts_to(&harness, 1).await;
    eventually_within(Duration::from_mins(1), "the dead letter", async || {
        let letters = letters(&harness).await;
        anyhow::ensure!(letters == [("dead".to_owned(), "not this one".to_owned())], "{letters:?}");
        Ok(())
    })
    .await
    .unwrap();
}

#[tokio::test]
async fn a_dead_letter_of_another_stream_is_not_superseded() {
    let (harness, bus) = start().await;
    let id = Id::generate();
    for stream in ["NOTES", "DOCUMENTS"] {
        let sql = "insert into bus.dead_letters
                       (stream, consumer, seq, published_at, subject, aggregate_id, version, payload, headers, error,
                        attempts, status)
                   values ($1, 'reader', 1000, now(), 'x', $2, 0, '', '{}', $1, 5, 'dead')";
        sqlx::query(sql).bind(stream).bind(id.to_string()).execute(&mut harness.db().await).await.unwrap();
    }
    append(&bus, id, 1..2).await;
    counts_to(&harness, 1).await;
    let expected = [("dead", "NOTES"), ("superseded", "DOCUMENTS")];
    assert_eq!(letters(&harness).await, expected.map(|(status, error)| (status.to_owned(), error.to_owned())));
}
