//! Streams that lost events are healed by their owner, from its tables.

use crate::documents::{self, Document, DocumentEvent, Id, event, event_ids};
use crate::harness::{Harness, append};
use crate::log::Log;
use crate::shelf::{Shelf, change, put, write};
use event_bus::{Bus, Event, Publish, Republish, Schema, request_republish};
use sqlx::migrate::Migrator;
use std::time::Duration;
use testkit::{eventually, eventually_within};

/// Deletes the stream of documents, and creates it again with the consumer of its reader.
pub async fn recreate_stream(harness: &Harness) {
    let jetstream = harness.jetstream().await;
    jetstream.delete_stream("DOCUMENTS").await.unwrap();
    provision(harness).await;
}

async fn provision(harness: &Harness) {
    let settings = harness.settings(&harness.nats.url()).nats;
    event_bus::provision(&settings, &documents::topology(), Duration::from_secs(10)).await.unwrap();
}

/// Waits until nothing is left to republish, and the outbox is empty.
pub async fn healed(harness: &Harness) {
    eventually_within(Duration::from_mins(1), "the stream to be healed", async || {
        let requests: i64 = sqlx::query_scalar("select count(*) from bus.republish where after_seq = 0")
            .fetch_one(&mut harness.db().await)
            .await?;
        anyhow::ensure!(requests == 0, "{requests} requests wait");
        anyhow::Ok(())
    })
    .await
    .unwrap();
    harness.published().await;
}

/// The newest event of each document in the stream is that of its row, and an id always has the same content.
pub async fn stream_equals_tables(harness: &Harness) {
    let rows: Vec<(String, i64, String)> = sqlx::query_as("select id, version, title from documents order by id")
        .fetch_all(&mut harness.db().await)
        .await
        .unwrap();
    let stored = harness.documents().await;
    let mut newest = std::collections::BTreeMap::<String, Document>::new();
    for document in stored {
        let before = newest.insert(document.id.clone(), document.clone());
        if let Some(before) = before {
            assert!(before.version <= document.version, "{document:?} after {before:?}");
            if before.version == document.version {
                assert_eq!(before.title, document.title);
            }
        }
    }
    let newest: Vec<_> = newest.into_values().map(|document| (document.id, document.version, document.title)).collect();
    assert_eq!(newest, rows);
}

async fn requested(harness: &Harness, what: Republish) -> anyhow::Result<bool> {
    request_republish(&harness.database_url, &Schema::new("test", Migrator::DEFAULT, ""), what).await
}

async fn start() -> (Harness, Bus) {
    let mut harness = Harness::start().await;
    let bus = harness.healing_relay(Shelf).await;
    (harness, bus)
}

#[tokio::test]
async fn a_recreated_stream_gets_the_newest_version_of_every_document() {
    let (harness, bus) = start().await;
    let ids: Vec<Id> = (0..700).map(|_| Id::generate()).collect();
    put(&bus, &ids).await;
    change(&bus, ids[0], 1).await;
    harness.published().await;
    let (log, logging) = Log::start();
    recreate_stream(&harness).await;
    change(&bus, ids[1], 1).await;
    eventually("the request", async || !log.lines(" ERROR ").is_empty()).await.unwrap();
    healed(&harness).await;
    stream_equals_tables(&harness).await;
    change(&bus, ids[1], 2).await;
    harness.published().await;
    stream_equals_tables(&harness).await;
    drop(logging);
    let errors = log.lines(" ERROR ");
    assert!(errors.len() == 1 && errors[0].contains("is another stream, and ends at 0, but 701 was"), "{errors:#?}");
    let done = log.lines("republished the current state");
    assert!(done.len() == 1 && done[0].contains("aggregates=700"), "{done:#?}");
}

/// The relay is idle: it notices the new connection, or compares after 30 s.
#[tokio::test]
async fn a_stream_recreated_with_the_same_length_is_noticed() {
    let (harness, bus) = start().await;
    let ids = [Id::generate(), Id::generate()];
    put(&bus, &ids).await;
    harness.published().await;
    recreate_stream(&harness).await;
    // Messages without the id of an event.
    let jetstream = harness.jetstream().await;
    for _ in 0..2 {
        jetstream.publish("document.created", "x".into()).await.unwrap().await.unwrap();
    }
    harness.nats.restart().await.unwrap();
    eventually("the snapshots", async || harness.stream().await.len() == 4).await.unwrap();
    healed(&harness).await;
}

#[tokio::test]
async fn a_stream_that_lost_its_end_gets_what_changed_since_a_checkpoint() {
    let (mut harness, bus) = start().await;
    let (old, kept, lost) = (Id::generate(), Id::generate(), Id::generate());
    put(&bus, &[old, kept]).await;
    harness.published().await;
    // The next one would follow in five minutes.
    sqlx::query("delete from bus.checkpoints").execute(&mut harness.db().await).await.unwrap();
    harness.nats.restart().await.unwrap();
    eventually("a checkpoint", async || checkpoints(&harness).await == [2]).await.unwrap();
    let long_ago = "update documents set updated_at = now() - interval '1 day' where id = $1";
    sqlx::query(long_ago).bind(old.to_string()).execute(&mut harness.db().await).await.unwrap();
    harness.copy_store().await;
    put(&bus, &[lost]).await;
    harness.published().await;

    harness.restore_store().await;
    put(&bus, &[Id::generate()]).await;
    eventually_within(Duration::from_mins(1), "the end of the stream", async || {
        healed(&harness).await;
        anyhow::ensure!(harness.stream().await.len() >= 4);
        anyhow::Ok(())
    })
    .await
    .unwrap();
    stream_equals_tables(&harness).await;
    let stream = harness.stream().await;
    let count = |id: Id| stream.iter().filter(|event_id| **event_id == event(id, 0).event_id()).count();
    assert_eq!((count(old), count(lost)), (1, 1), "{stream:?}");
    harness.stop.cancel();
    while let Some(ended) = harness.tasks.join_next().await {
        ended.unwrap().unwrap();
    }
}

async fn checkpoints(harness: &Harness) -> Vec<i64> {
    let sql = "select last_seq from bus.checkpoints order by last_seq";
    sqlx::query_scalar(sql).fetch_all(&mut harness.db().await).await.unwrap()
}

/// A consumer may be ahead of the stream that lost its end. It gets the snapshots that are published behind its position.
#[tokio::test]
async fn snapshots_are_published_again_behind_the_position_that_was_lost() {
    let (harness, bus) = start().await;
    let (kept, lost) = (Id::generate(), Id::generate());
    put(&bus, &[kept]).await;
    harness.published().await;
    harness.copy_store().await;
    for version in 0..20 {
        change(&bus, lost, version).await;
    }
    harness.published().await; // up to 21
    harness.restore_store().await;
    change(&bus, lost, 20).await;
    eventually_within(Duration::from_mins(1), "the first snapshots", async || harness.stream().await.len() >= 3)
        .await
        .unwrap();
    healed(&harness).await;
    let filler = Id::generate();
    for version in 0..25 {
        change(&bus, filler, version).await;
    }
    let last = event(lost, 20).event_id();
    eventually("the second snapshots", async || {
        harness.stream().await.iter().skip(21).any(|event_id| *event_id == last)
    })
    .await
    .unwrap();
    stream_equals_tables(&harness).await;
}

#[tokio::test]
async fn a_killed_republish_resumes_where_it_stopped() {
    let (mut harness, bus) = start().await;
    let ids: Vec<Id> = (0..300).map(|_| Id::generate()).collect();
    put(&bus, &ids).await;
    harness.published().await;
    harness.tasks.shutdown().await;
    recreate_stream(&harness).await;
    // This replica dies in the middle: it cannot get further than a row that somebody else has locked.
    let mut holder = harness.db().await;
    sqlx::query("begin").execute(&mut holder).await.unwrap();
    let middle =
        "select 1 from documents where id = (select id from documents order by id offset 200 limit 1) for update";
    sqlx::query(middle).execute(&mut holder).await.unwrap();
    harness.healing_relay(Shelf).await;
    eventually("half of the snapshots", async || harness.stream().await.len() >= 96).await.unwrap();
    harness.tasks.shutdown().await;
    let before = harness.stream().await.len();
    // It would hide snapshots that are published twice.
    harness.forget_event_ids().await;
    sqlx::query("rollback").execute(&mut holder).await.unwrap();

    let (log, logging) = Log::start();
    harness.healing_relay(Shelf).await;
    healed(&harness).await;
    drop(logging);
    assert!((96..=224).contains(&before), "{before}");
    let stream = harness.stream().await;
    assert_eq!(stream.len(), 300, "some snapshots were published twice");
    stream_equals_tables(&harness).await;
    assert_eq!(log.lines("resuming").len(), 1);
}

/// Writers change the documents while pages are read and published.
#[tokio::test]
async fn an_old_snapshot_never_follows_a_newer_version() {
    let (harness, bus) = start().await;
    let ids: Vec<Id> = (0..400).map(|_| Id::generate()).collect();
    put(&bus, &ids).await;
    harness.published().await;
    recreate_stream(&harness).await;
    let writers = (0..4).map(|writer| {
        let (bus, ids) = (&bus, &ids);
        async move {
            for version in 1..6 {
                for id in ids.iter().skip(writer).step_by(4) {
                    change(bus, *id, version).await;
                }
            }
        }
    });
    futures::future::join_all(writers).await;
    healed(&harness).await;
    stream_equals_tables(&harness).await;
}

/// The deduplication window of 10 s still holds all these events.
#[tokio::test]
async fn events_that_the_stream_has_just_stored_are_not_republished_and_block_nothing() {
    let (harness, bus) = start().await;
    let ids: Vec<Id> = (0..100).map(|_| Id::generate()).collect();
    put(&bus, &ids).await;
    harness.published().await;
    let begun = std::time::Instant::now();
    assert!(requested(&harness, Republish::All).await.unwrap());
    let live = Id::generate();
    put(&bus, &[live]).await;
    healed(&harness).await;
    assert!(begun.elapsed() < Duration::from_secs(9), "it waited until the window was over");
    assert_eq!(harness.stream().await.len(), 101);
    stream_equals_tables(&harness).await;
}

#[tokio::test]
async fn a_request_by_hand_republishes_what_it_names() {
    let (mut harness, bus) = start().await;
    let ids: Vec<Id> = (0..5).map(|_| Id::generate()).collect();
    put(&bus, &ids).await;
    harness.published().await;
    harness.forget_event_ids().await;
    let named = vec![ids[3].to_string(), "unknown".to_owned(), ids[1].to_string()];
    let (log, logging) = Log::start();
    assert!(requested(&harness, Republish::Ids(named)).await.unwrap());
    healed(&harness).await;
    drop(logging);
    let warned = log.lines(" WARN ");
    assert!(warned.len() == 1 && warned[0].contains(r#"unknown=["unknown"]"#), "{warned:?}");
    let mut expected = [event(ids[1], 0).event_id(), event(ids[3], 0).event_id()];
    expected.sort();
    assert_eq!(harness.stream().await[5..], expected);

    let long_ago = "update documents set updated_at = now() - interval '3 hours' where id <> $1";
    sqlx::query(long_ago).bind(ids[2].to_string()).execute(&mut harness.db().await).await.unwrap();
    assert!(requested(&harness, Republish::Since(Duration::from_hours(2))).await.unwrap());
    healed(&harness).await;
    assert_eq!(harness.stream().await[7..], event_ids(ids[2], 0..1));

    assert!(requested(&harness, Republish::All).await.unwrap());
    healed(&harness).await;
    assert_eq!(harness.stream().await.len(), 13);
}

#[tokio::test]
async fn a_request_without_a_running_service_is_kept() {
    let (mut harness, bus) = start().await;
    put(&bus, &[Id::generate()]).await;
    harness.published().await;
    harness.forget_event_ids().await;
    harness.tasks.shutdown().await;
    assert!(!requested(&harness, Republish::All).await.unwrap());
    harness.healing_relay(Shelf).await;
    healed(&harness).await;
    assert_eq!(harness.stream().await.len(), 2);
}

#[tokio::test]
async fn a_stream_without_snapshots_cannot_be_republished() {
    let mut harness = Harness::start().await;
    let bus = harness.relay().await;
    append(&bus, Id::generate(), 0..1).await;
    harness.published().await;
    let error = requested(&harness, Republish::All).await.unwrap_err().to_string();
    assert!(error.contains("no stream of this database can be republished"), "{error}");
}

/// A wider request deletes narrower ones for the same position, and begins from the beginning.
#[tokio::test]
async fn a_new_request_replaces_those_that_it_includes() {
    let (harness, bus) = start().await;
    put(&bus, &[Id::generate()]).await;
    harness.published().await;
    let mut db = harness.db().await;
    let requests = "select bus.request_republish('DOCUMENTS', 'test', since, ids, after, 0) from (values
        (1, now() - interval '1 hour', null::text[], 1000), (2, null, array['a'], 1000),
        (3, now() - interval '2 hours', null, 1000), (4, now() - interval '1 hour', null, 1000),
        (5, null, array['b'], 1000)) as request (number, since, ids, after) order by number";
    sqlx::query(requests).execute(&mut db).await.unwrap();
    let kept = async |db: &mut sqlx::PgConnection| {
        let sql = "select coalesce(ids[1], extract(hour from requested_at - since)::text, 'all') from bus.republish order by id";
        sqlx::query_scalar::<_, String>(sql).fetch_all(db).await.unwrap()
    };
    assert_eq!(kept(&mut db).await, ["a", "2", "1", "b"]);
    let sql = "select bus.request_republish('DOCUMENTS', 'test', null, null, 500, 0)";
    sqlx::query(sql).execute(&mut db).await.unwrap();
    assert_eq!(kept(&mut db).await, ["a", "2", "1", "b", "all"], "these wait for a later position");
    let sql = "select bus.request_republish('DOCUMENTS', 'test', null, null, 1000, 0)";
    sqlx::query(sql).execute(&mut db).await.unwrap();
    assert_eq!(kept(&mut db).await, ["all", "all"]);
}

#[tokio::test]
async fn a_relay_without_snapshots_publishes_nothing_to_another_stream() {
    let mut harness = Harness::start().await;
    let bus = harness.relay().await;
    append(&bus, Id::generate(), 0..2).await;
    harness.published().await;
    recreate_stream(&harness).await;
    let (log, logging) = Log::start();
    let restarted = harness.bus(&harness.nats.url()).await;
    let relay = tokio::spawn(restarted.relay::<DocumentEvent>(harness.stop.clone()));
    append(&bus, Id::generate(), 0..1).await;
    eventually("the error", async || {
        log.lines(" ERROR ").iter().any(|line| line.contains("has no snapshots of the tables"))
    })
    .await
    .unwrap();
    drop(logging);
    relay.abort();
    assert_eq!((harness.stream().await.len(), harness.outbox().await), (0, 1));
    // A person decides.
    let decide = "update bus.relay set last_seq = 0, stream_created_at = null where stream = 'DOCUMENTS'";
    sqlx::query(decide).execute(&mut harness.db().await).await.unwrap();
    harness.published().await;
    assert_eq!(harness.stream().await.len(), 1);
    drop(event(Id::generate(), 0).encode());
}

/// The page locks its rows: otherwise it would append the old version, and the stream would have it after the new one.
#[tokio::test]
async fn a_document_that_is_being_written_is_republished_with_its_new_version() {
    let (harness, bus) = start().await;
    let id = Id::generate();
    put(&bus, &[id]).await;
    harness.published().await;
    let mut writer = bus.begin().await.unwrap();
    write(&mut writer, id, 1).await;
    writer.append([&event(id, 1)]).await.unwrap();

    assert!(!requested(&harness, Republish::All).await.unwrap(), "the page did not wait for the writer");
    assert_eq!(harness.outbox().await, 0, "the old version was appended");
    writer.commit().await.unwrap();
    healed(&harness).await;
    let versions: Vec<i64> = harness.documents().await.iter().map(|document| document.version).collect();
    assert_eq!(versions, [0, 1]);
}
