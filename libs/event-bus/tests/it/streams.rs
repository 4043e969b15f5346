//! Streams without atomic batches, several streams, and streams without a relay.

use crate::documents::{DocumentEvent, Id, event};
use crate::harness::{Harness, append};
use crate::log::Log;
use async_nats::jetstream::consumer::pull;
use event_bus::{DecodeError, Event, Publish};
use std::time::Duration;
use testkit::{eventually, eventually_within};

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
async fn events_that_no_relay_publishes_are_logged_as_an_error() {
    let mut harness = Harness::start().await;
    let bus = harness.relay().await;
    append(&bus, Id::generate(), 0..1).await;
    harness.published().await;
    let append_note = "insert into bus.outbox (stream, subject, aggregate_id, version, payload, created_at)
                       values ('NOTES', 'note.created', 'one', 0, '{}', now() - interval '1 minute')";
    sqlx::query(append_note).execute(&mut harness.db().await).await.unwrap();

    let (log, logging) = Log::start();
    let restarted = harness.bus(&harness.nats.url()).await;
    let relay = tokio::spawn(restarted.clone().relay::<DocumentEvent>(harness.stop.clone()));
    eventually("the error", async || log.lines(" ERROR ").iter().any(|line| line.contains("NOTES"))).await.unwrap();
    drop(logging);
    // The relay continues.
    append(&restarted, Id::generate(), 0..1).await;
    eventually("the other stream", async || harness.stream().await.len() == 2).await.unwrap();
    relay.abort();

    let (log, logging) = Log::start();
    let complete = harness.bus(&harness.nats.url()).await;
    let (documents, notes) =
        (complete.clone().relay::<DocumentEvent>(harness.stop.clone()), complete.relay::<Note>(harness.stop.clone()));
    harness.tasks.spawn(documents);
    harness.tasks.spawn(notes);
    harness.published().await;
    drop(logging);
    assert_eq!(log.lines(" ERROR "), Vec::<String>::new());
}

/// A refused batch does not count as a failure, but failures of the single events after it are logged.
#[tokio::test]
async fn a_failure_is_logged_for_a_stream_without_atomic_batches() {
    let mut harness = Harness::start().await;
    let bus = harness.bus(&harness.nats.url()).await;
    harness.tasks.spawn(bus.clone().relay::<Note>(harness.stop.clone()));
    eventually("the database", async || bus.connection().await.map(drop)).await.unwrap();
    let mut tx = bus.begin().await.unwrap();
    tx.append(&notes(3)).await.unwrap();
    tx.commit().await.unwrap();
    harness.published().await;
    let jetstream = harness.jetstream().await;
    let stream = jetstream.get_stream("NOTES").await.unwrap();
    let mut config = stream.cached_info().config.clone();
    config.max_messages = 3;
    jetstream.update_stream(config).await.unwrap();
    let idle = pull::Config { durable_name: Some("idle".to_owned()), ..pull::Config::default() };
    stream.create_consumer(idle).await.unwrap();

    let (log, logging) = Log::start();
    let mut tx = bus.begin().await.unwrap();
    for number in 10..15 {
        tx.append([&Note(number.to_string())]).await.unwrap();
    }
    tx.commit().await.unwrap();
    let full = |line: &String| line.contains("the stream is full: NOTES has") && line.contains("3 of 3 messages");
    eventually_within(Duration::from_secs(30), "the reason", async || log.lines(" ERROR ").iter().any(full))
        .await
        .unwrap();
    drop(logging);
    let lines = [log.lines(" WARN "), log.lines(" ERROR ")].concat();
    assert!(lines.len() <= 3, "{lines:#?}");
}
