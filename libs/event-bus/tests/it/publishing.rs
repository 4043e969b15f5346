use crate::documents::{Id, event, event_ids};
use crate::harness::{Harness, append};
use event_bus::{Event, Publish};
use std::collections::{HashMap, HashSet};
use testkit::eventually;

#[tokio::test]
async fn concurrent_relays_publish_each_event_once_and_in_order() {
    let mut harness = Harness::start().await;
    let mut buses = Vec::new();
    for _ in 0..3 {
        buses.push(harness.relay().await);
    }
    let documents: Vec<Id> = (0..18).map(|_| Id::generate()).collect();
    let writers = documents.iter().enumerate().map(|(number, id)| append(&buses[number % 3], *id, 0..20));
    futures::future::join_all(writers).await;
    harness.published().await;

    let stream = harness.stream().await;
    assert_eq!(stream.len(), 360);
    assert_eq!(stream.iter().collect::<HashSet<_>>().len(), 360);
    let mut next = HashMap::new();
    for event_id in &stream {
        let (id, version) = event_id.rsplit_once('-').unwrap();
        let expected = next.entry(id).or_insert(0);
        assert_eq!(version.parse::<i64>().unwrap(), *expected);
        *expected += 1;
    }
}

/// More than one batch, by the number of rows and by bytes.
#[tokio::test]
async fn a_backlog_of_many_or_of_large_events_is_published_in_order() {
    let mut harness = Harness::start().await;
    harness.nats.stop().await.unwrap();
    let bus = harness.relay().await;
    let mut expected = Vec::new();
    let mut tx = bus.begin().await.unwrap();
    for version in 0..1500 {
        let mut event = event(Id::generate(), 0);
        if version % 25 == 0 {
            event.document().title = "x".repeat(100_000);
        }
        tx.append([&event]).await.unwrap();
        expected.push(event.event_id());
    }
    tx.commit().await.unwrap();
    harness.nats.start_again().await.unwrap();
    harness.published().await;
    assert_eq!(harness.stream().await, expected);
}

#[tokio::test]
async fn messages_without_an_event_id_are_skipped() {
    let mut harness = Harness::start().await;
    let bus = harness.relay().await;
    let id = Id::generate();
    append(&bus, id, 0..2).await;
    harness.published().await;
    for _ in 0..100 {
        harness.jetstream().await.publish("document.created", "foreign".into()).await.unwrap().await.unwrap();
    }
    append(&bus, id, 2..4).await;
    harness.published().await;
    assert_eq!(harness.ours().await, event_ids(id, 0..4));
}

/// A crash between publish and commit leaves events in the stream whose rows are still in the outbox.
#[tokio::test]
async fn events_that_the_stream_already_has_are_not_published_again() {
    let mut harness = Harness::start().await;
    let bus = harness.relay().await;
    let id = Id::generate();
    append(&bus, id, 0..3).await;
    harness.published().await;
    harness.forget_event_ids().await;

    let mut tx = bus.begin().await.unwrap();
    sqlx::query("update bus.relay set last_seq = 1").execute(&mut *tx).await.unwrap();
    for version in 1..5 {
        tx.append([&event(id, version)]).await.unwrap();
    }
    tx.commit().await.unwrap();
    harness.published().await;
    assert_eq!(harness.stream().await, event_ids(id, 0..5));
}

/// The server confirms such an event without storing it again, with a sequence that the relay does not expect.
#[tokio::test]
async fn an_event_in_the_deduplication_window_does_not_count_as_stored() {
    let mut harness = Harness::start().await;
    let bus = harness.relay().await;
    let id = Id::generate();
    append(&bus, id, 0..1).await;
    harness.published().await;
    // A relay that died has published version 1, and another program a message after it.
    harness.publish_as(&event(id, 1).event_id(), "document.updated", event(id, 1).encode()).await;
    harness.jetstream().await.publish("document.created", "foreign".into()).await.unwrap().await.unwrap();

    append(&bus, id, 1..4).await;
    harness.published().await;
    assert_eq!(harness.ours().await, event_ids(id, 0..4));
}

#[tokio::test]
async fn nothing_is_published_after_the_broker_has_lost_history() {
    let mut harness = Harness::start().await;
    let bus = harness.relay().await;
    append(&bus, Id::generate(), 0..3).await;
    harness.published().await;
    harness.jetstream().await.delete_stream("DOCUMENTS").await.unwrap();
    append(&bus, Id::generate(), 0..1).await;

    // The relay creates the stream again, finds that it is too short, and publishes nothing.
    eventually("the stream", async || harness.jetstream().await.get_stream("DOCUMENTS").await).await.unwrap();
    tokio::time::sleep(std::time::Duration::from_secs(2)).await; // time for a wrong publish
    assert_eq!(harness.stream().await, Vec::<String>::new());
    assert_eq!(harness.outbox().await, 1);
}

/// A subscriber that gets one event of a transaction finds the others in the stream.
#[tokio::test]
async fn the_events_of_a_transaction_are_published_in_one_batch() {
    let mut harness = Harness::start().await;
    harness.nats.stop().await.unwrap();
    let bus = harness.relay().await;
    for number in 0..60 {
        let mut tx = bus.begin().await.unwrap();
        let events: Vec<_> = (0..11).map(|_| event(Id::generate(), number)).collect();
        tx.append(&events).await.unwrap();
        tx.commit().await.unwrap();
    }
    harness.nats.start_again().await.unwrap();
    harness.published().await;

    let stream = harness.jetstream().await.get_stream("DOCUMENTS").await.unwrap();
    let mut batches: HashMap<i64, HashSet<String>> = HashMap::new();
    for seq in 1..=660 {
        let message = stream.get_raw_message(seq).await.unwrap();
        let event = crate::documents::DocumentEvent::decode(&message.subject, &message.payload).unwrap();
        let batch = message.headers.get("Nats-Batch-Id").unwrap().to_string();
        batches.entry(event.version()).or_default().insert(batch);
    }
    assert!(batches.values().flatten().collect::<HashSet<_>>().len() > 1, "there was one batch only");
    let split: Vec<_> = batches.iter().filter(|(_, batches)| batches.len() > 1).collect();
    assert!(split.is_empty(), "{split:?}");
}

#[tokio::test]
async fn two_streams_may_have_the_same_aggregate_id_and_version() {
    let mut harness = Harness::start().await;
    harness.relay().await;
    let append = "select bus.append($1, 'x', 'one', 0, '{}', null)";
    let mut db = harness.db().await;
    sqlx::query(append).bind("NOTES").execute(&mut db).await.unwrap();
    sqlx::query(append).bind("DRAFTS").execute(&mut db).await.unwrap();
    let again = sqlx::query(append).bind("NOTES").execute(&mut db).await.unwrap_err();
    assert!(again.as_database_error().unwrap().is_unique_violation(), "{again}");
}
