//! A database that comes back older than its stream takes over what it lost.

use crate::documents::{Id, event, event_ids};
use crate::harness::Harness;
use crate::log::Log;
use crate::republishing::{healed, recreate_stream, stream_equals_tables};
use crate::shelf::{Shelf, change, entitle, put};
use crate::subscribing::Recorder;
use event_bus::{Bus, Error, Event, Publish};
use sqlx::AssertSqlSafe;
use std::time::Duration;
use testkit::{eventually, eventually_within};

async fn start() -> (Harness, Bus) {
    let mut harness = Harness::start().await;
    let bus = harness.healing_relay(Shelf).await;
    (harness, bus)
}

/// Waits until no recovery is under way, and everything is published.
pub async fn recovered(harness: &Harness) {
    eventually_within(Duration::from_mins(1), "the database to be recovered", async || {
        let end = harness.jetstream().await.get_stream("DOCUMENTS").await?.cached_info().state.last_sequence;
        let sql = "select (select count(*) from bus.recovery), (select max(last_seq) from bus.position)";
        let state: (i64, i64) = sqlx::query_as(sql).fetch_one(&mut harness.db().await).await?;
        anyhow::ensure!(state == (0, i64::try_from(end)?), "{state:?} of {end}");
        anyhow::Ok(())
    })
    .await
    .unwrap();
    harness.published().await;
}

/// The titles of these documents.
async fn titles(harness: &Harness, ids: &[Id]) -> Vec<Option<String>> {
    let mut titles = Vec::new();
    for id in ids {
        let sql = sqlx::query_scalar("select title from documents where id = $1").bind(id.to_string());
        titles.push(sql.fetch_optional(&mut harness.db().await).await.unwrap());
    }
    titles
}

#[tokio::test]
async fn an_older_database_takes_over_what_was_published() {
    let (mut harness, bus) = start().await;
    let ids: Vec<Id> = (0..700).map(|_| Id::generate()).collect();
    put(&bus, &ids[..5]).await;
    harness.published().await;
    harness.back_up().await;
    put(&bus, &ids[5..]).await;
    for version in 1..4 {
        change(&bus, ids[0], version).await;
    }
    change(&bus, ids[600], 1).await;
    harness.published().await;
    harness.tasks.shutdown().await;
    let before = harness.stream().await;
    harness.restore().await;

    let (log, logging) = Log::start();
    let bus = harness.healing_relay(Shelf).await;
    recovered(&harness).await;
    stream_equals_tables(&harness).await;
    assert_eq!(harness.stream().await, before, "a recovery publishes nothing");
    change(&bus, ids[0], 4).await;
    harness.published().await;
    stream_equals_tables(&harness).await;
    drop(logging);
    let errors = log.lines(" ERROR ");
    assert!(
        errors.len() == 1
            && errors[0].contains("the database lost history: it ends at 5 of DOCUMENTS, which ends at 704")
    );
    let done = log.lines("the database is recovered from the stream");
    assert!(done.len() == 1 && done[0].contains("taken_over=69"), "{done:#?}");
}

/// Requests are served between the restore and the first comparison.
#[tokio::test]
async fn what_was_published_stands_and_other_changes_are_kept() {
    let (mut harness, bus) = start().await;
    let [twice, kept, unchanged, live] = [(); 4].map(|()| Id::generate());
    let [new, rival] = [(); 2].map(|()| Id::generate());
    put(&bus, &[twice, kept, unchanged]).await;
    harness.published().await;
    harness.back_up().await;
    change(&bus, twice, 1).await;
    change(&bus, twice, 2).await;
    entitle(&bus, live, 0, "only one").await;
    harness.published().await;
    harness.tasks.shutdown().await;
    let before = harness.stream().await;
    harness.restore().await;
    // Further than the published versions.
    for version in 1..5 {
        entitle(&bus, twice, version, "assigned twice").await;
    }
    entitle(&bus, kept, 1, "kept").await;
    entitle(&bus, new, 0, "new").await;
    entitle(&bus, rival, 0, "only one").await;
    entitle(&bus, rival, 1, "only one").await;

    let (log, logging) = Log::start();
    let bus = harness.healing_relay(Shelf).await;
    recovered(&harness).await;
    stream_equals_tables(&harness).await;
    let expected = ["version 2", "kept", "version 0", "only one", "new"].map(|title| Some(title.to_owned()));
    assert_eq!(titles(&harness, &[twice, kept, unchanged, live, new]).await, expected);
    assert_eq!(titles(&harness, &[rival]).await, [None]);
    let mut published = before;
    published.extend([event(kept, 1).event_id(), event(new, 0).event_id()]);
    assert_eq!(harness.stream().await, published);
    change(&bus, twice, 3).await;
    harness.published().await;
    drop(logging);
    let undone = log.lines("it is undone");
    assert_eq!(undone.len(), 6, "{undone:#?}");
    for id in event_ids(twice, 1..5).into_iter().chain(event_ids(rival, 0..2)) {
        assert!(undone.iter().any(|line| line.contains(&id)), "{id} is not in {undone:#?}");
    }
}

/// The recovery waits for a row that another transaction has locked. Meanwhile nothing is written; then the process dies.
#[tokio::test]
async fn a_recovery_that_was_killed_is_resumed() {
    let (mut harness, bus) = start().await;
    let ids: Vec<Id> = (0..1200).map(|_| Id::generate()).collect();
    put(&bus, &ids[..1]).await;
    harness.published().await;
    harness.back_up().await;
    put(&bus, &ids[1..]).await;
    change(&bus, ids[0], 1).await;
    harness.published().await;
    harness.tasks.shutdown().await;
    harness.restore().await;

    let mut holder = harness.db().await;
    sqlx::query("begin").execute(&mut holder).await.unwrap();
    sqlx::query("select 1 from documents for update").execute(&mut holder).await.unwrap();
    let bus = harness.healing_relay(Shelf).await;
    eventually("a part to be recovered", async || {
        let ready = bus.check_ready().await;
        anyhow::ensure!(
            matches!(&ready, Err(Error::Recovering(progress)) if progress.contains(" of 1201")),
            "{ready:?}"
        );
        anyhow::Ok(())
    })
    .await
    .unwrap();
    let mut tx = bus.begin().await.unwrap();
    let refused = tx.append([&event(Id::generate(), 0)]).await.unwrap_err();
    assert!(refused.is_outage() && refused.to_string().contains("is being recovered"), "{refused}");
    drop(tx);
    harness.tasks.shutdown().await;
    assert!(bus.check_ready().await.is_err());
    sqlx::query("rollback").execute(&mut holder).await.unwrap();

    let (log, logging) = Log::start();
    let bus = harness.healing_relay(Shelf).await;
    recovered(&harness).await;
    stream_equals_tables(&harness).await;
    bus.check_ready().await.unwrap();
    assert_eq!(harness.stream().await.len(), 1201);
    drop(logging);
    let done = log.lines("the database is recovered from the stream");
    assert!(done.len() == 1 && done[0].contains("taken_over=1200"), "{done:#?}");
}

#[tokio::test]
async fn another_replica_finishes_a_recovery() {
    let (mut harness, bus) = start().await;
    let ids: Vec<Id> = (0..600).map(|_| Id::generate()).collect();
    put(&bus, &ids[..1]).await;
    harness.published().await;
    harness.back_up().await;
    put(&bus, &ids[1..]).await;
    harness.published().await;
    harness.tasks.shutdown().await;
    harness.restore().await;
    for _ in 0..2 {
        harness.healing_relay(Shelf).await;
    }
    recovered(&harness).await;
    stream_equals_tables(&harness).await;
    assert_eq!(harness.stream().await.len(), 600);
}

/// The reader is a subscription of the same service. Its position in the dump is that of the backup.
#[tokio::test]
async fn events_of_other_streams_are_applied_again_from_the_newest_to_the_oldest() {
    let (mut harness, bus) = start().await;
    let (id, other) = (Id::generate(), Id::generate());
    let recorder = Recorder::default();
    harness.tasks.spawn(bus.clone().subscribe("reader", recorder.clone(), harness.stop.clone()));
    put(&bus, &[id]).await;
    let kept = "update bus.read_positions set seq = 1, before_seq = 1, between_seq = 1, between_at = now() - interval '1 hour'";
    eventually("the position", async || {
        let kept = sqlx::query(kept).execute(&mut harness.db().await).await.unwrap();
        anyhow::ensure!(kept.rows_affected() == 1);
        Ok(())
    })
    .await
    .unwrap();
    harness.back_up().await;
    for version in 1..150 {
        change(&bus, id, version).await;
    }
    put(&bus, &[other]).await;
    recorder.has(&event_ids(other, 0..1)).await;
    harness.tasks.shutdown().await;
    harness.restore().await;

    // A subscription has written its position before the recovery began.
    sqlx::query("update bus.read_positions set seq = 151").execute(&mut harness.db().await).await.unwrap();
    let again = Recorder::default();
    again.refuses(&event(id, 7).event_id());
    let bus = harness.healing_relay(Shelf).await;
    harness.tasks.spawn(bus.clone().subscribe("reader", again.clone(), harness.stop.clone()));
    recovered(&harness).await;
    let mut expected = event_ids(id, 1..150);
    expected.extend(event_ids(other, 0..1));
    expected.reverse();
    expected.retain(|event_id| *event_id != event(id, 7).event_id());
    assert_eq!(again.applied(), expected);
    let letters = "select event_id from bus.dead_letters where status = 'dead'";
    let letters: Vec<String> = sqlx::query_scalar(letters).fetch_all(&mut harness.db().await).await.unwrap();
    assert_eq!(letters, [event(id, 7).event_id()]);
    again.refuses("none");
    change(&bus, id, 150).await;
    again.has(&event_ids(id, 150..151)).await;
}

/// Nothing of its own was published since the backup, but events of other streams were applied.
#[tokio::test]
async fn a_restored_database_applies_again_what_it_read_even_if_its_own_stream_is_unchanged() {
    let (mut harness, bus) = start().await;
    let ids = [Id::generate(), Id::generate(), Id::generate()];
    let recorder = Recorder::default();
    harness.tasks.spawn(bus.clone().subscribe("reader", recorder.clone(), harness.stop.clone()));
    put(&bus, &ids).await;
    let mut expected: Vec<String> = ids.iter().map(|id| event(*id, 0).event_id()).collect();
    recorder.has(&expected).await;
    expected.reverse();
    harness.published().await;
    harness.tasks.shutdown().await;
    let kept = "update bus.read_positions set before_seq = 0";
    sqlx::query(kept).execute(&mut harness.db().await).await.unwrap();
    harness.back_up().await;
    harness.restore().await;

    let again = Recorder::default();
    let bus = harness.healing_relay(Shelf).await;
    harness.tasks.spawn(bus.clone().subscribe("reader", again.clone(), harness.stop.clone()));
    eventually("what was read before", async || {
        anyhow::ensure!(again.applied().starts_with(&expected), "{:?}", again.applied());
        anyhow::Ok(())
    })
    .await
    .unwrap();
    recovered(&harness).await;
    let new = Id::generate();
    put(&bus, &[new]).await;
    again.has(&event_ids(new, 0..1)).await;
}

/// Restores a backup that the stream does not reach back to, because its messages up to `purged` are deleted. Nothing is published, and
/// nobody gets old snapshots, until a person has decided.
async fn restore_too_old(harness: &mut Harness, bus: &Bus, more: usize) {
    let id = Id::generate();
    put(bus, &[id]).await;
    harness.published().await;
    harness.back_up().await;
    for version in 1..5 {
        change(bus, id, version).await;
    }
    harness.published().await;
    harness.tasks.shutdown().await;
    // Not of a service: without the id of an event.
    let nats = harness.nats.connect().await.unwrap();
    for _ in 0..more {
        nats.publish("document.updated", "x".into()).await.unwrap();
    }
    nats.flush().await.unwrap();
    let last = u64::try_from(5 + more).unwrap();
    let jetstream = harness.jetstream().await;
    eventually_within(Duration::from_mins(1), "the messages", async || {
        anyhow::ensure!(jetstream.get_stream("DOCUMENTS").await?.cached_info().state.last_sequence == last);
        anyhow::Ok(())
    })
    .await
    .unwrap();
    harness.publish_as(&event(id, 5).event_id(), "document.updated", event(id, 5).encode()).await;
    harness.restore().await;
    jetstream.get_stream("DOCUMENTS").await.unwrap().purge().sequence(last).await.unwrap();

    let (log, logging) = Log::start();
    let bus = harness.healing_relay(Shelf).await;
    put(&bus, &[Id::generate()]).await;
    let deleted = format!("messages 2 to {} are deleted", last - 1);
    eventually("the error", async || {
        let errors = log.lines(" ERROR ");
        anyhow::ensure!(errors.iter().any(|line| line.contains(&deleted)), "{errors:#?}");
        anyhow::Ok(())
    })
    .await
    .unwrap();
    drop(logging);
    assert_eq!((titles(harness, &[id]).await, harness.outbox().await), (vec![Some("version 0".to_owned())], 1));
    let reply = nats.request("snapshots.DOCUMENTS", r#""total""#.into()).await.unwrap();
    let refused = reply.headers.and_then(|headers| headers.get("Nats-Service-Error-Code").map(ToString::to_string));
    assert_eq!(refused.as_deref(), Some("503"), "{:?}", reply.payload);
    // A person decides.
    let decide = format!("update bus.relay set last_seq = {} where stream = 'DOCUMENTS'", last - 1);
    sqlx::query(AssertSqlSafe(decide)).execute(&mut harness.db().await).await.unwrap();
    recovered(harness).await;
    assert_eq!(titles(harness, &[id]).await, [Some("version 5".to_owned())]);
    let reply = nats.request("snapshots.DOCUMENTS", r#""total""#.into()).await.unwrap();
    assert_eq!(std::str::from_utf8(&reply.payload).unwrap(), r#"{"total":2}"#);
}

#[tokio::test]
async fn a_backup_older_than_the_window_stops_the_relay() {
    let (mut harness, bus) = start().await;
    restore_too_old(&mut harness, &bus, 0).await;
}

/// More messages than the relay can look at in one step.
#[tokio::test]
async fn a_backup_much_older_than_the_window_stops_the_relay() {
    let (mut harness, bus) = start().await;
    restore_too_old(&mut harness, &bus, 60_000).await;
}

/// The database was restored to a time before the stream was recreated and healed.
#[tokio::test]
async fn tables_older_than_another_stream_are_recovered() {
    let (mut harness, bus) = start().await;
    let (id, untouched) = (Id::generate(), Id::generate());
    put(&bus, &[id, untouched]).await;
    harness.published().await;
    harness.back_up().await;
    recreate_stream(&harness).await;
    change(&bus, id, 1).await;
    healed(&harness).await;
    eventually("the stream", async || harness.stream().await.len() >= 2).await.unwrap();
    harness.tasks.shutdown().await;
    harness.restore().await;

    let bus = harness.healing_relay(Shelf).await;
    let new = Id::generate();
    eventually("a write", async || {
        bus.check_ready().await?;
        anyhow::Ok(())
    })
    .await
    .unwrap();
    put(&bus, &[new]).await;
    recovered(&harness).await;
    healed(&harness).await;
    assert_eq!(titles(&harness, &[id]).await, [Some("version 1".to_owned())]);
    stream_equals_tables(&harness).await;
}

/// A message that somebody has published again announces nothing new.
#[tokio::test]
async fn an_old_event_that_is_published_again_changes_nothing() {
    let (mut harness, bus) = start().await;
    let id = Id::generate();
    put(&bus, &[id]).await;
    change(&bus, id, 1).await;
    harness.published().await;
    harness.forget_event_ids().await;
    let old = event_bus::Publish::encode(&event(id, 0));
    harness.publish_as(&event(id, 0).event_id(), "document.created", old).await;
    let (log, logging) = Log::start();
    // No event of the same document waits, then one does.
    put(&bus, &[Id::generate()]).await;
    harness.published().await;
    assert_eq!(titles(&harness, &[id]).await, [Some("version 1".to_owned())]);
    let old = event_bus::Publish::encode(&event(id, 1));
    harness.publish_as(&event(id, 1).event_id(), "document.updated", old).await;
    change(&bus, id, 2).await;
    harness.published().await;
    drop(logging);
    assert_eq!(log.lines(" ERROR "), Vec::<String>::new());
    assert_eq!(titles(&harness, &[id]).await, [Some("version 2".to_owned())]);
    let versions: Vec<i64> = harness.documents().await.iter().map(|document| document.version).collect();
    assert_eq!(versions, [0, 1, 0, 0, 1, 2]);
}
