//! Streams that are configured otherwise, several streams, and streams that nobody relays.

use crate::documents::{DocumentEvent, Id, event};
use crate::harness::{Harness, append};
use event_bus::{DecodeError, Event, Publish};
use testkit::eventually;

/// An event of a stream that takes no atomic batches.
struct Note(String);

impl Event for Note {
    const STREAM: &'static str = "NOTES";

    fn aggregate_id(&self) -> String {
        self.0.clone()
    }

    fn version(&self) -> i64 {
        0
    }

    fn decode(_: &str, _: &[u8]) -> Result<Self, DecodeError> {
        Ok(Self(String::new()))
    }
}

impl Publish for Note {
    fn subject(&self) -> &'static str {
        "note.created"
    }

    fn encode(&self) -> String {
        "{}".to_owned()
    }
}

fn notes(count: usize) -> Vec<Note> {
    (0..count).map(|number| Note(format!("0190a5f2-4f5c-7c3e-9b1a-{number:012}"))).collect()
}

#[tokio::test]
async fn a_stream_without_atomic_batches_gets_its_events_one_by_one_and_in_order() {
    let mut harness = Harness::start().await;
    let bus = harness.bus(&harness.nats.url()).await;
    harness.tasks.spawn(bus.clone().relay::<Note>(harness.stop.clone()));
    eventually("the database", async || bus.connection().await.map(drop)).await.unwrap();
    let notes = notes(20);
    let mut tx = bus.begin().await.unwrap();
    tx.append(&notes).await.unwrap();
    tx.commit().await.unwrap();
    harness.published().await;
    let expected: Vec<String> = notes.iter().map(Event::event_id).collect();
    assert_eq!(harness.stream_of("NOTES").await, expected);
}

#[tokio::test]
async fn one_process_relays_several_streams() {
    let mut harness = Harness::start().await;
    let bus = harness.relay().await;
    harness.tasks.spawn(bus.clone().relay::<Note>(harness.stop.clone()));
    for note in notes(20) {
        let mut tx = bus.begin().await.unwrap();
        tx.append([&event(Id::generate(), 0)]).await.unwrap();
        tx.append([&note]).await.unwrap();
        tx.commit().await.unwrap();
    }
    harness.published().await;
    assert_eq!(harness.stream_of("DOCUMENTS").await.len(), 20);
    assert_eq!(harness.stream_of("NOTES").await.len(), 20);
}

#[tokio::test]
async fn a_stream_that_nobody_relays_is_an_error_at_the_start() {
    let mut harness = Harness::start().await;
    let bus = harness.relay().await;
    append(&bus, Id::generate(), 0..1).await;
    harness.published().await;
    let mut tx = bus.begin().await.unwrap();
    tx.append(&notes(1)).await.unwrap();
    tx.commit().await.unwrap();

    let restarted = harness.bus(&harness.nats.url()).await;
    let error = restarted.relay::<DocumentEvent>(harness.stop.clone()).await.unwrap_err();
    assert!(error.to_string().contains("NOTES"), "{error}");

    let complete = harness.bus(&harness.nats.url()).await;
    harness.tasks.spawn(complete.clone().relay::<DocumentEvent>(harness.stop.clone()));
    harness.tasks.spawn(complete.relay::<Note>(harness.stop.clone()));
    harness.published().await;
}
