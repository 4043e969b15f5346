//! A reader finds out that messages were deleted before it has acknowledged them.

use crate::documents::{DocumentEvent, Id, event_ids, topology_of};
use crate::harness::{Harness, append};
use crate::log::Log;
use crate::subscribing::Recorder;
use event_bus::{Bus, Event, Handler, Received, Settings, Transaction};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use testkit::{eventually, eventually_within};
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;

/// Runs a subscription until `until` is done, and stops it.
async fn subscribed(bus: &Bus, recorder: &Recorder, until: impl Future<Output = ()>) {
    let stop = CancellationToken::new();
    let subscription = tokio::spawn(bus.clone().subscribe("reader", recorder.clone(), stop.clone()));
    until.await;
    stop.cancel();
    subscription.await.unwrap().unwrap();
}

/// Waits until the subscription has kept this position.
async fn kept(harness: &Harness, seq: i64) {
    let position = "select seq from bus.read_positions where stream = 'DOCUMENTS' and consumer = 'reader'";
    eventually_within(Duration::from_secs(30), "the position", async || {
        let kept: Option<i64> = sqlx::query_scalar(position).fetch_optional(&mut harness.db().await).await?;
        anyhow::ensure!(kept == Some(seq), "{kept:?}");
        anyhow::Ok(())
    })
    .await
    .unwrap();
}

async fn purge(harness: &Harness, keep: u64) {
    let stream = harness.jetstream().await.get_stream("DOCUMENTS").await.unwrap();
    stream.purge().sequence(keep).await.unwrap();
}

/// Why the tables of the reader have to be filled from the owner, which has no snapshots here.
async fn requested(harness: &Harness) -> Vec<String> {
    let sql = "select reason from bus.fills where finished_at is null and not exact order by id";
    sqlx::query_scalar(sql).fetch_all(&mut harness.db().await).await.unwrap()
}

fn errors(log: &Log) -> Vec<String> {
    log.lines(" ERROR ")
}

#[tokio::test]
async fn messages_purged_before_they_were_read_are_reported_once() {
    let mut harness = Harness::start().await;
    let (bus, recorder, id) = (harness.relay().await, Recorder::default(), Id::generate());
    let first = append(&bus, id, 0..10).await;
    subscribed(&bus, &recorder, recorder.has(&first)).await;
    subscribed(&bus, &recorder, kept(&harness, 10)).await;
    append(&bus, id, 10..20).await;
    harness.published().await;
    purge(&harness, 16).await;

    let (log, logging) = Log::start();
    subscribed(&bus, &recorder, recorder.has(&event_ids(id, 15..20))).await;
    let found = errors(&log);
    assert!(found.len() == 1 && found[0].contains("from=11 to=15"), "{found:#?}");
    assert_eq!(requested(&harness).await, ["the messages 11 to 15 were missed"]);
    subscribed(&bus, &recorder, kept(&harness, 20)).await;
    subscribed(&bus, &recorder, recorder.has(&append(&bus, id, 20..21).await)).await;
    drop(logging);
    assert_eq!(errors(&log), found);
}

#[tokio::test]
async fn a_new_consumer_of_a_trimmed_stream_is_to_be_filled() {
    let mut harness = Harness::start().await;
    let (bus, recorder, id) = (harness.relay().await, Recorder::default(), Id::generate());
    append(&bus, id, 0..10).await;
    harness.published().await;
    purge(&harness, 5).await;
    let jetstream = harness.jetstream().await;
    jetstream.delete_consumer_from_stream("reader", "DOCUMENTS").await.unwrap();
    let settings = harness.settings(&harness.nats.url());
    event_bus::provision(&settings.nats, &harness.topology, Duration::from_secs(20)).await.unwrap();

    let (log, logging) = Log::start();
    subscribed(&bus, &recorder, recorder.has(&event_ids(id, 4..10))).await;
    drop(logging);
    assert_eq!(errors(&log), Vec::<String>::new());
    let found = log.lines("a new reader of DOCUMENTS");
    assert_eq!(found.len(), 1, "{found:#?}");
    assert_eq!(requested(&harness).await, ["a new reader"]);
}

/// The owner trims messages that the reader has acknowledged after its last kept position; a person purges those that all have read.
#[tokio::test]
async fn trimmed_and_purged_messages_that_were_read_are_not_reported() {
    let mut harness = Harness::start().await;
    harness.topology = topology_of(65_536);
    let (bus, recorder, id) = (harness.relay().await, Recorder::default(), Id::generate());
    let (log, logging) = Log::start();
    let first = append(&bus, id, 0..10).await;
    subscribed(&bus, &recorder, recorder.has(&first)).await;
    let rest = append(&bus, id, 10..700).await;
    subscribed(&bus, &recorder, recorder.has(&rest)).await;
    let trimmed = harness.jetstream().await.get_stream("DOCUMENTS").await.unwrap().cached_info().state.first_sequence;
    assert!(trimmed > 50, "{trimmed}");
    // As after a kill: the kept position is old.
    sqlx::query("update bus.read_positions set seq = 20").execute(&mut harness.db().await).await.unwrap();
    subscribed(&bus, &recorder, kept(&harness, 700)).await;
    harness.jetstream().await.get_stream("DOCUMENTS").await.unwrap().purge().await.unwrap();
    subscribed(&bus, &recorder, recorder.has(&append(&bus, id, 700..710).await)).await;
    drop(logging);
    // Nobody reads while the events are appended: on a slow machine, the stream is full for so long that it is logged.
    assert_eq!(log.lines("has lost the messages"), Vec::<String>::new());
}

/// Applies an event for each permit.
#[derive(Clone)]
struct Gate(Arc<Semaphore>, Arc<Mutex<Vec<String>>>);

impl Handler for Gate {
    type Event = DocumentEvent;
    const HAS_OWNER: bool = false;

    async fn apply(&self, _: &mut Transaction, events: &[Received<DocumentEvent>]) -> anyhow::Result<()> {
        self.0.acquire_many(u32::try_from(events.len())?).await?.forget();
        self.1.lock().unwrap().extend(events.iter().map(|event| event.event_id()));
        Ok(())
    }
}

#[tokio::test]
async fn messages_purged_while_a_reader_is_busy_are_reported() {
    let mut harness = Harness::start().await;
    let bus = harness.relay().await;
    let settings = Settings { apply_events: 1, ..harness.settings(&harness.nats.url()) };
    let reader = Harness::open(settings).await.unwrap();
    let gate = Gate(Arc::new(Semaphore::new(1)), Arc::default());
    let (log, logging) = Log::start();
    harness.tasks.spawn(reader.subscribe("reader", gate.clone(), harness.stop.clone()));
    let id = Id::generate();
    append(&bus, id, 0..1).await;
    eventually("the first event", async || gate.1.lock().unwrap().len() == 1).await.unwrap();
    append(&bus, id, 1..20).await;
    harness.published().await;
    // One event waits for the gate, and one is in memory.
    eventually("two deliveries", async || {
        let stream = harness.jetstream().await.get_stream("DOCUMENTS").await.unwrap();
        stream.consumer_info("reader").await.unwrap().delivered.stream_sequence == 3
    })
    .await
    .unwrap();
    purge(&harness, 15).await;
    gate.0.add_permits(100);
    eventually_within(Duration::from_secs(20), "the last event", async || {
        gate.1.lock().unwrap().contains(&event_ids(id, 19..20)[0])
    })
    .await
    .unwrap();
    drop(logging);
    let found = errors(&log);
    let reported = |line: &String| line.contains("from=4 to=14") && line.contains("Have them published again");
    assert!(found.iter().any(reported), "{found:#?}");
    assert_eq!(requested(&harness).await, Vec::<String>::new());
}
