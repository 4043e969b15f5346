//! The owner trims its stream, and never below what a consumer has not acknowledged.

use crate::documents::{DocumentEvent, Id, event, event_ids, topology_of};
use crate::harness::{Harness, append};
use crate::log::Log;
use crate::subscribing::Recorder;
use async_nats::jetstream::consumer::{AckPolicy, pull};
use async_nats::jetstream::stream::State;
use event_bus::{Bus, NatsSettings, Settings};
use futures::StreamExt;
use std::time::Duration;
use testkit::{NatsSetup, eventually, eventually_within};

const SMALL: u64 = 65_536;

/// A stream of 64 KiB, with a relay.
async fn small() -> (Harness, Bus) {
    let mut harness = Harness::start().await;
    harness.topology = topology_of(SMALL);
    let bus = harness.relay().await;
    (harness, bus)
}

async fn state(harness: &Harness) -> State {
    harness.jetstream().await.get_stream("DOCUMENTS").await.unwrap().cached_info().state.clone()
}

/// Commits this many versions of a document in one transaction.
async fn append_at_once(bus: &Bus, id: Id, versions: std::ops::Range<i64>) -> Vec<String> {
    let mut tx = bus.begin().await.unwrap();
    for version in versions.clone() {
        tx.append([&event(id, version)]).await.unwrap();
    }
    tx.commit().await.unwrap();
    event_ids(id, versions)
}

/// The ids of the events that are left in the stream.
async fn left(harness: &Harness) -> Vec<String> {
    let stream = harness.jetstream().await.get_stream("DOCUMENTS").await.unwrap();
    let State { first_sequence, last_sequence, .. } = stream.cached_info().state;
    let mut ids = Vec::new();
    for seq in first_sequence..=last_sequence {
        let message = stream.get_raw_message(seq).await.unwrap();
        ids.push(message.headers.get("Nats-Msg-Id").unwrap().to_string());
    }
    ids
}

/// A durable consumer that a test reads by hand.
async fn consumer(harness: &Harness, config: pull::Config) -> async_nats::jetstream::consumer::PullConsumer {
    let jetstream = harness.jetstream().await;
    let stream = eventually("the stream", async || jetstream.get_stream("DOCUMENTS").await).await.unwrap();
    stream.create_consumer(pull::Config { ack_policy: AckPolicy::Explicit, ..config }).await.unwrap()
}

fn durable(name: &str) -> pull::Config {
    pull::Config { durable_name: Some(name.to_owned()), ..pull::Config::default() }
}

async fn full(log: &Log) -> String {
    let find = || log.lines(" ERROR ").into_iter().find(|line| line.contains("the stream is full"));
    eventually_within(Duration::from_secs(30), "the error", async || find().is_some()).await.unwrap();
    find().unwrap()
}

#[tokio::test]
async fn a_small_stream_whose_reader_keeps_up_never_stays_full() {
    let (log, logging) = Log::start();
    let (mut harness, bus) = small().await;
    let recorder = Recorder::default();
    harness.tasks.spawn(bus.clone().subscribe("reader", recorder.clone(), harness.stop.clone()));
    let id = Id::generate();
    let mut ids = Vec::new();
    for batch in 0..20 {
        ids.extend(append_at_once(&bus, id, batch * 100..(batch + 1) * 100).await);
    }
    eventually_within(Duration::from_mins(1), "the outbox", async || harness.outbox().await == 0).await.unwrap();
    recorder.has(&ids).await;
    drop(logging);

    let State { bytes, first_sequence, last_sequence, .. } = state(&harness).await;
    assert_eq!(last_sequence, 2000, "an event is in the stream twice, or not at all");
    assert!(first_sequence > 1000 && bytes <= SMALL, "{first_sequence} is the first one, {bytes} bytes");
    let left = left(&harness).await;
    assert_eq!(left, ids[ids.len() - left.len()..]);
    assert_eq!(log.lines(" ERROR "), Vec::<String>::new());
}

#[tokio::test]
async fn a_stream_whose_reader_stands_still_is_an_error_and_drains_afterwards() {
    let (mut harness, bus) = small().await;
    let (log, logging) = Log::start();
    let id = Id::generate();
    let ids = append_at_once(&bus, id, 0..1000).await;
    let error = full(&log).await;
    for part in ["DOCUMENTS has ", "of 65536 bytes", "The consumer reader prevents trimming", "up to 0", "consumer rm"]
    {
        assert!(error.contains(part), "{part}: {error}");
    }
    let before = state(&harness).await;
    assert!(before.first_sequence == 1 && before.bytes > SMALL / 2, "{before:?}");
    let waiting = harness.outbox().await;
    assert!(waiting > 500, "{waiting}");

    let recorder = Recorder::default();
    harness.tasks.spawn(bus.clone().subscribe("reader", recorder.clone(), harness.stop.clone()));
    eventually_within(Duration::from_mins(1), "the outbox", async || harness.outbox().await == 0).await.unwrap();
    recorder.has(&ids).await;
    eventually("the end of the error", async || log.lines(" INFO ").iter().any(|line| line.contains("works again")))
        .await
        .unwrap();
    drop(logging);
    assert_eq!(log.lines(" ERROR ").len(), 1, "{:#?}", log.lines(" ERROR "));
    assert_eq!(state(&harness).await.last_sequence, 1000);
}

#[tokio::test]
async fn nothing_is_trimmed_that_one_of_several_consumers_has_not_acknowledged() {
    let (mut harness, bus) = small().await;
    let recorder = Recorder::default();
    harness.tasks.spawn(bus.clone().subscribe("reader", recorder.clone(), harness.stop.clone()));
    let slow = consumer(&harness, durable("slow")).await;
    let (log, logging) = Log::start();
    append_at_once(&bus, Id::generate(), 0..1000).await;
    let mut messages = slow.batch().max_messages(60).expires(Duration::from_secs(20)).messages().await.unwrap();
    let mut count = 0;
    while let Some(message) = messages.next().await {
        count += 1;
        // The acknowledgement of one event is missing.
        if count != 50 {
            message.unwrap().double_ack().await.unwrap();
        }
    }
    let error = full(&log).await;
    drop(logging);
    assert!(error.contains("The consumer slow prevents trimming") && error.contains("up to 49"), "{error}");
    assert_eq!(state(&harness).await.first_sequence, 49);
}

#[tokio::test]
async fn a_filtered_consumer_without_events_prevents_no_trimming() {
    let (mut harness, bus) = small().await;
    let recorder = Recorder::default();
    harness.tasks.spawn(bus.clone().subscribe("reader", recorder.clone(), harness.stop.clone()));
    append(&bus, Id::generate(), 0..1).await;
    let filtered = pull::Config { filter_subject: "document.created".to_owned(), ..durable("filtered") };
    let filtered = consumer(&harness, filtered).await;
    let mut messages = filtered.batch().max_messages(1).expires(Duration::from_secs(20)).messages().await.unwrap();
    messages.next().await.unwrap().unwrap().double_ack().await.unwrap();
    // Only updates.
    append_at_once(&bus, Id::generate(), 1..1000).await;
    harness.published().await;
    assert!(state(&harness).await.first_sequence > 500);

    // One for it.
    append(&bus, Id::generate(), 0..1).await;
    harness.published().await;
    let at = state(&harness).await.last_sequence;
    let (log, logging) = Log::start();
    append_at_once(&bus, Id::generate(), 1..1000).await;
    let error = full(&log).await;
    drop(logging);
    assert!(error.contains("The consumer filtered prevents trimming"), "{error}");
    assert!(state(&harness).await.first_sequence <= at);
}

#[tokio::test]
async fn events_older_than_the_window_are_trimmed() {
    const AGE: Duration = Duration::from_secs(10);
    let mut harness = Harness::start().await;
    let bus = harness.relay().await;
    let recorder = Recorder::default();
    harness.tasks.spawn(bus.clone().subscribe("reader", recorder.clone(), harness.stop.clone()));
    let id = Id::generate();
    append_at_once(&bus, id, 0..50).await;
    harness.published().await;
    tokio::time::sleep(AGE).await; // until they are old
    recorder.has(&append_at_once(&bus, id, 50..60).await).await;

    let aged = Settings { window_age: AGE, ..harness.settings(&harness.nats.url()) };
    harness.tasks.spawn(Harness::open(aged).await.unwrap().relay::<DocumentEvent>(harness.stop.clone()));
    eventually("the window", async || state(&harness).await.first_sequence > 1).await.unwrap();
    assert_eq!(state(&harness).await.first_sequence, 51);
}

/// The relay reads the messages after its position to find out which events it has published.
#[tokio::test]
async fn a_relay_reconciles_with_a_stream_that_was_trimmed_or_emptied() {
    let mut harness = Harness::start().await;
    let bus = harness.relay().await;
    let id = Id::generate();
    append_at_once(&bus, id, 0..10).await;
    harness.published().await;
    harness.forget_event_ids().await;
    let stream = harness.jetstream().await.get_stream("DOCUMENTS").await.unwrap();
    stream.purge().sequence(8).await.unwrap();

    // A relay that died after it published the last three.
    let mut tx = bus.begin().await.unwrap();
    sqlx::query("update bus.relay set last_seq = 7").execute(&mut *tx).await.unwrap();
    for version in 7..12 {
        tx.append([&event(id, version)]).await.unwrap();
    }
    tx.commit().await.unwrap();
    harness.published().await;
    assert_eq!(left(&harness).await, event_ids(id, 7..12));

    stream.purge().await.unwrap();
    let restarted = harness.relay().await;
    append_at_once(&restarted, id, 12..20).await;
    harness.published().await;
    append(&bus, id, 20..22).await;
    harness.published().await;
    assert_eq!(left(&harness).await, event_ids(id, 12..22));
    assert_eq!(state(&harness).await.last_sequence, 22);
}

#[tokio::test]
async fn a_missing_right_to_trim_is_logged_once_and_events_are_published() {
    let users = r#"authorization { users: [{
        user: test, password: test, permissions { publish: { deny: ["$JS.API.STREAM.PURGE.>", "$JS.API.CONSUMER.LIST.>"] } }
    }] }"#;
    let setup = format!("http: 8222\njetstream {{ store_dir: /data }}\n{users}\n");
    let setup = NatsSetup { own_configuration: Some(setup), ..NatsSetup::default() };
    let (log, logging) = Log::start();
    let mut harness = Harness::start_with(setup, NatsSettings::default()).await;
    let bus = harness.relay_through(&format!("nats://test:test@{}", harness.nats.server())).await;
    append(&bus, Id::generate(), 0..3).await;
    let warnings =
        || log.lines(" WARN ").into_iter().filter(|line| line.contains("is not trimmed")).collect::<Vec<_>>();
    eventually_within(Duration::from_secs(20), "the warning", async || !warnings().is_empty()).await.unwrap();
    append(&bus, Id::generate(), 0..3).await;
    harness.published().await;
    drop(logging);
    assert_eq!(warnings().len(), 1, "{:#?}", warnings());
    assert!(warnings()[0].contains("$JS.API.STREAM.PURGE.DOCUMENTS"), "{:#?}", warnings());
}
