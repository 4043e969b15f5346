//! A database that is older than its own stream: restored from a backup, or failed over to a standby that lagged.

use crate::documents::{DocumentEvent, Id, event};
use crate::harness::{Harness, append};
use event_bus::Bus;
use event_bus::{Event, Publish};
use std::time::Duration;

/// Publishes versions 0 to 2 of a document, then resets the database to the state with version 0 only.
async fn restored(harness: &mut Harness) -> (Bus, Id) {
    let (bus, id) = (harness.relay().await, Id::generate());
    append(&bus, id, 0..3).await;
    harness.published().await;
    harness.forget_event_ids().await;
    sqlx::query("update bus.relay set last_seq = 1").execute(&mut harness.db().await).await.unwrap();
    (bus, id)
}

async fn commit(bus: &Bus, event: &DocumentEvent) {
    let mut tx = bus.begin().await.unwrap();
    tx.append([event]).await.unwrap();
    tx.commit().await.unwrap();
}

async fn nothing_was_published(harness: &Harness, waiting: i64) {
    let before = harness.stream().await;
    tokio::time::sleep(Duration::from_secs(2)).await; // time for a wrong publish
    assert_eq!((harness.stream().await, harness.outbox().await), (before, waiting));
    assert_eq!(harness.stream().await.len(), 3);
}

#[tokio::test]
async fn a_version_with_other_content_in_the_stream_stops_the_relay() {
    let mut harness = Harness::start().await;
    let (bus, id) = restored(&mut harness).await;
    let mut other = event(id, 1);
    other.document().title = "changed after the restore".to_owned();
    commit(&bus, &other).await;
    nothing_was_published(&harness, 1).await;
}

#[tokio::test]
async fn a_version_that_only_the_stream_has_stops_the_relay() {
    let mut harness = Harness::start().await;
    let (bus, id) = restored(&mut harness).await;
    commit(&bus, &event(id, 1)).await; // with the same content; only version 2 has no row
    nothing_was_published(&harness, 1).await;
}

/// The outbox has the row, but the message in the stream has another subject.
#[tokio::test]
async fn a_version_with_another_subject_in_the_stream_stops_the_relay() {
    let mut harness = Harness::start().await;
    let (bus, id) = (harness.relay().await, Id::generate());
    append(&bus, id, 0..2).await;
    harness.published().await;
    harness.forget_event_ids().await;
    harness.publish_as(&event(id, 2).event_id(), "document.created", event(id, 2).encode()).await;
    commit(&bus, &event(id, 2)).await;
    nothing_was_published(&harness, 1).await;
}
