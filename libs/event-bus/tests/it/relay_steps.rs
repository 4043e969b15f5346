//! What a step of the relay costs, and which events it publishes together.

use crate::documents::{Id, event};
use crate::harness::{Harness, append};
use crate::held_snapshot::measure_from_now_on;
use event_bus::Event;
use sqlx::Executor;
use std::time::{Duration, Instant};

/// The ids of the atomic batches in which the events of the stream were published, in order.
async fn batches(harness: &Harness) -> Vec<Option<String>> {
    harness.headers_of("DOCUMENTS", "Nats-Batch-Id").await
}

/// Appends events, each in a transaction of its own, while NATS is down, and publishes them together. Returns their ids.
async fn published_together(harness: &mut Harness, events: i64) -> Vec<String> {
    let bus = harness.relay().await;
    append(&bus, Id::generate(), 0..1).await;
    harness.published().await;
    harness.nats.stop().await.unwrap();
    let id = Id::generate();
    for version in 0..events {
        append(&bus, id, version..version + 1).await;
    }
    harness.nats.start_again().await.unwrap();
    harness.published().await;
    (0..events).map(|version| event(id, version).event_id()).collect()
}

#[tokio::test]
async fn few_events_of_different_transactions_are_a_chain() {
    let mut harness = Harness::start().await;
    let ids = published_together(&mut harness, 12).await;
    assert_eq!(harness.stream().await[1..], ids);
    assert_eq!(batches(&harness).await, vec![None; 13]);
    let before = harness.headers_of("DOCUMENTS", "Nats-Expected-Last-Msg-Id").await;
    let expected: Vec<Option<String>> = [None].into_iter().chain(ids[..11].iter().cloned().map(Some)).collect();
    assert_eq!(before[1..], expected);
}

#[tokio::test]
async fn more_events_are_one_batch() {
    let mut harness = Harness::start().await;
    let ids = published_together(&mut harness, 13).await;
    assert_eq!(harness.stream().await[1..], ids);
    let batches = batches(&harness).await;
    assert!(batches[1].is_some() && batches[1..].iter().all(|batch| *batch == batches[1]), "{batches:?}");
}

#[tokio::test]
async fn the_events_of_one_transaction_are_one_batch() {
    let mut harness = Harness::start().await;
    let bus = harness.relay().await;
    let mut tx = bus.begin().await.unwrap();
    tx.append(&[event(Id::generate(), 0), event(Id::generate(), 0)]).await.unwrap();
    tx.commit().await.unwrap();
    harness.published().await;
    let batches = batches(&harness).await;
    assert!(batches.len() == 2 && batches[0].is_some() && batches[0] == batches[1], "{batches:?}");
}

#[tokio::test]
async fn an_event_costs_the_relay_two_round_trips_and_no_empty_step() {
    const EVENTS: i64 = 50;
    let mut harness = Harness::start().await;
    let mut db = harness.db().await;
    db.execute("create extension pg_stat_statements").await.unwrap();
    let bus = harness.relay().await;
    append(&bus, Id::generate(), 0..1).await;
    harness.published().await;
    let id = Id::generate();
    let begun = Instant::now();
    measure_from_now_on(&mut db).await;
    for version in 0..EVENTS {
        append(&bus, id, version..version + 1).await;
        harness.published().await;
        bus.begin().await.unwrap().commit().await.unwrap();
    }
    let sql = "select coalesce(sum(calls) filter (where query like '%bus.take_events%'), 0)::bigint,
                      coalesce(sum(calls) filter (where query like '%bus.move_on%'), 0)::bigint
               from pg_stat_statements join pg_database on pg_database.oid = dbid
               where datname = current_database()";
    let (taken, moved): (i64, i64) = sqlx::query_as(sql).fetch_one(&mut db).await.unwrap();
    // Without work, the relay looks twice a second. A transaction without events does not wake it.
    let looks = i64::try_from(begun.elapsed().as_millis() / 300).unwrap() + 2;
    assert_eq!(moved, EVENTS);
    assert!((EVENTS..=EVENTS + looks).contains(&taken), "{taken} steps for {EVENTS} events, {looks} may be empty");
}

/// Events enter the outbox in several ways, and each of them wakes the relay: without it, each event would wait for up to half
/// a second.
#[tokio::test]
async fn every_way_to_append_an_event_wakes_the_relay() {
    let mut harness = Harness::start().await;
    let bus = harness.relay().await;
    append(&bus, Id::generate(), 0..1).await;
    harness.published().await;
    for sql in [
        "select bus.append('DOCUMENTS', 'document.created', $1, 0, '{}', null)",
        "select bus.append('DOCUMENTS', 'document.created', $1, 0, '{}', null, null)",
        "select bus.append_all('DOCUMENTS', array['document.created'], array[$1], array[0::bigint], array['{}'],
                               array[null], array[null])",
    ] {
        let mut fastest = Duration::MAX;
        for _ in 0..20 {
            let begun = Instant::now();
            let mut tx = bus.begin().await.unwrap();
            sqlx::query(sql).bind(Id::generate().to_string()).execute(&mut *tx).await.unwrap();
            tx.commit().await.unwrap();
            harness.published().await;
            fastest = fastest.min(begun.elapsed());
        }
        // The relay has begun to wait when the event before was published. Without being woken, it waits for 250 ms or longer.
        assert!(fastest < Duration::from_millis(200), "{sql}: {fastest:?}");
    }
}
