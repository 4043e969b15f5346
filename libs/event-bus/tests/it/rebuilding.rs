//! A replica is compared with its owner, and repaired row by row.

use crate::copies::Copies;
use crate::documents::Id;
use crate::filling::{differences, documents, filled, read, start, stopped};
use crate::harness::Harness;
use crate::shelf::{Shelf, change};
use event_bus::{Bus, Rebuilt, Schema, Verification, rebuild, verify};
use sqlx::PgConnection;
use sqlx::migrate::Migrator;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;
use testkit::eventually;
use tokio::sync::Semaphore;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

fn schema() -> Schema {
    Schema::new("test", Migrator::DEFAULT, "").with_replica("reader", Copies::default())
}

pub async fn verified(harness: &Harness) -> Verification {
    let nats = harness.settings(&harness.nats.url()).nats;
    verify(&harness.database_url, &schema(), nats).await.unwrap().remove(0)
}

async fn sql(harness: &Harness, sql: &'static str, id: Id) {
    sqlx::query(sql).bind(id.to_string()).execute(&mut harness.db().await).await.unwrap();
}

/// Damages one row in each way. Returns their documents.
async fn damage(harness: &Harness, ids: &[Id]) -> [String; 5] {
    sql(harness, "delete from copies where id = $1", ids[0]).await;
    sql(harness, "update copies set version = 0, title = 'version 0' where id = $1", ids[1]).await;
    sql(harness, "update copies set version = 1000 where id = $1", ids[2]).await;
    sql(harness, "update copies set title = 'other' where id = $1", ids[3]).await;
    let invented = Id::generate();
    sql(harness, "insert into copies values ($1, 3, 'invented')", invented).await;
    [ids[0], ids[1], ids[2], ids[3], invented].map(|id| id.to_string())
}

#[tokio::test]
async fn verify_finds_each_kind_of_difference_and_a_rebuild_repairs_it() {
    let (harness, bus) = start().await;
    let ids = documents(&bus, &harness, 2500).await;
    change(&bus, ids[1], 1).await;
    let reading = read(&harness, Copies::default()).await;
    filled(&harness).await;
    let equal = verified(&harness).await;
    assert!(equal.is_equal(), "{equal:?}");
    assert_eq!((equal.counted, equal.ranges, equal.compared), (2500, 3, 0));

    let [missing, stale, newer, different, unknown] = damage(&harness, &ids).await;
    let found = verified(&harness).await;
    for (ids, expected) in [
        (&found.missing, missing),
        (&found.stale, stale),
        (&found.newer, newer),
        (&found.different, different),
        (&found.unknown, unknown),
    ] {
        assert_eq!((ids.count, &ids.first), (1, &vec![expected]), "{found:?}");
    }
    let rebuilt = rebuild(&harness.database_url, &schema()).await.unwrap();
    // The row with another version was written once more, after the owner was asked again, only if it had changed.
    assert_eq!(rebuilt, Rebuilt::Done { passed: 2500, written: 5, failed: 0 });
    assert_eq!(differences(&mut harness.db().await).await, 0);
    assert!(verified(&harness).await.is_equal());
    stopped(reading).await;
}

#[tokio::test]
async fn a_replica_of_many_rows_that_the_owner_does_not_have_is_emptied() {
    let (harness, bus) = start().await;
    documents(&bus, &harness, 3).await;
    let reading = read(&harness, Copies::default()).await;
    filled(&harness).await;
    let invent = "insert into copies select 'invented ' || number, 1, 'x' from generate_series(1, 3000) as number";
    sqlx::query(invent).execute(&mut harness.db().await).await.unwrap();
    let found = verified(&harness).await;
    assert_eq!((found.unknown.count, found.unknown.first.len()), (3000, 20), "{found:?}");
    let rebuilt = rebuild(&harness.database_url, &schema()).await.unwrap();
    assert_eq!(rebuilt, Rebuilt::Done { passed: 3, written: 3000, failed: 0 });
    assert_eq!(differences(&mut harness.db().await).await, 0);
    stopped(reading).await;
}

/// While the row was wrong, live events were ignored: also those after the answer of the owner with which it is replaced.
#[tokio::test]
async fn an_event_that_a_wrong_row_has_ignored_is_not_lost() {
    let (harness, bus) = start().await;
    let ids = documents(&bus, &harness, 5).await;
    let gate = Arc::new(Semaphore::new(0));
    let reading = read(&harness, Copies { gate: gate.clone(), ..Copies::default() }).await;
    filled(&harness).await;
    sql(&harness, "update copies set version = 1000 where id = $1", ids[2]).await;
    let meanwhile = async {
        // The owner has answered, and the row is not deleted yet.
        eventually("the gate", async || waits(&harness).await).await.unwrap();
        change(&bus, ids[2], 1).await;
        harness.published().await;
        eventually("the event to be acknowledged", async || {
            let stream = harness.jetstream().await.get_stream("DOCUMENTS").await.unwrap();
            stream.consumer_info("reader").await.unwrap().ack_floor.stream_sequence == 6
        })
        .await
        .unwrap();
        gate.add_permits(1);
    };
    let schema = schema();
    let (rebuilt, ()) = tokio::join!(rebuild(&harness.database_url, &schema), meanwhile);
    let rebuilt = rebuilt.unwrap();
    assert!(matches!(rebuilt, Rebuilt::Done { failed: 0, .. }), "{rebuilt:?}");
    assert_eq!(differences(&mut harness.db().await).await, 0);
    stopped(reading).await;
}

/// Whether a transaction of the rebuild waits for the gate: it has locked the request, and executes nothing.
async fn waits(harness: &Harness) -> bool {
    let sql = "select count(*) from pg_stat_activity
               where datname = current_database() and state = 'idle in transaction' and query ilike '%savepoint%'";
    let waiting: i64 = sqlx::query_scalar(sql).fetch_one(&mut harness.db().await).await.unwrap();
    waiting > 0
}

/// Writers change the documents while all pages are compared, and a reader looks whether a row goes back.
#[tokio::test]
async fn a_rebuild_under_writes_sets_no_row_back() {
    let (harness, bus) = start().await;
    let ids = documents(&bus, &harness, 800).await;
    let reading = read(&harness, Copies::default()).await;
    filled(&harness).await;
    let writing = CancellationToken::new();
    let writers: Vec<_> = (0..4)
        .map(|writer| {
            let (bus, writing) = (bus.clone(), writing.clone());
            let ids: Vec<Id> = ids.iter().copied().skip(writer).step_by(4).collect();
            tokio::spawn(async move {
                for version in 1.. {
                    for id in &ids {
                        if writing.is_cancelled() {
                            return;
                        }
                        change(&bus, *id, version).await;
                    }
                }
            })
        })
        .collect();
    let watched = tokio::spawn({
        let (mut db, writing) = (harness.db().await, writing.clone());
        async move {
            let mut before: Vec<(String, i64)> = Vec::new();
            while !writing.is_cancelled() {
                let sql = "select id, version from copies order by id";
                let now: Vec<(String, i64)> = sqlx::query_as(sql).fetch_all(&mut db).await.unwrap();
                assert!(now.len() >= 800, "{} rows", now.len());
                for (before, now) in before.iter().zip(&now) {
                    assert!(before.0 == now.0 && before.1 <= now.1, "{now:?} after {before:?}");
                }
                before = now;
            }
        }
    });
    for _ in 0..3 {
        let rebuilt = rebuild(&harness.database_url, &schema()).await.unwrap();
        assert!(matches!(rebuilt, Rebuilt::Done { passed: 800, failed: 0, .. }), "{rebuilt:?}");
        let found = verified(&harness).await;
        assert!(found.is_equal(), "{found:?}");
    }
    writing.cancel();
    watched.await.unwrap();
    for writer in writers {
        writer.await.unwrap();
    }
    filled(&harness).await;
    stopped(reading).await;
}

#[tokio::test]
async fn a_rebuild_without_a_running_service_is_kept() {
    let (harness, bus) = start().await;
    documents(&bus, &harness, 3).await;
    assert_eq!(rebuild(&harness.database_url, &schema()).await.unwrap(), Rebuilt::NotBegun);
    let reading = read(&harness, Copies::default()).await;
    filled(&harness).await;
    stopped(reading).await;
    let error = rebuild(&harness.database_url, &Schema::new("test", Migrator::DEFAULT, "")).await.unwrap_err();
    assert!(error.to_string().contains("this service has no replica"), "{error}");
}

/// A live event is applied after the reply of the owner, before the rows are read: first for the checksum, and then to compare them.
#[tokio::test]
async fn rows_that_are_newer_than_the_reply_of_the_owner_stay() {
    let (harness, bus) = start().await;
    let ids = documents(&bus, &harness, 5).await;
    let copies = Copies { reads: Arc::new(Semaphore::new(0)), ..Copies::default() };
    let (reads, begun) = (copies.reads.clone(), copies.begun.clone());
    let reading = read(&harness, copies).await;
    filled(&harness).await;
    let schema = schema();
    let (rebuilt, ()) = tokio::join!(
        rebuild(&harness.database_url, &schema),
        change_before_reads(&harness, &bus, ids[1], &begun, &reads)
    );
    assert_eq!(rebuilt.unwrap(), Rebuilt::Done { passed: 6, written: 0, failed: 0 });
    assert_eq!(differences(&mut harness.db().await).await, 0);
    stopped(reading).await;
}

/// Before each of two reads of rows, a document is changed, another one is new, and both events are applied.
async fn change_before_reads(harness: &Harness, bus: &Bus, id: Id, begun: &AtomicUsize, reads: &Semaphore) {
    for step in 1..=2 {
        eventually("the rows to be read", async || begun.load(Ordering::Relaxed) == step).await.unwrap();
        change(bus, id, i64::try_from(step).unwrap()).await;
        documents(bus, harness, 1).await;
        eventually("the events", async || differences(&mut harness.db().await).await == 0).await.unwrap();
        reads.add_permits(1);
    }
}

/// The same for `verify`.
#[tokio::test]
async fn rows_that_are_newer_than_the_reply_of_the_owner_are_no_difference() {
    let (harness, bus) = start().await;
    let ids = documents(&bus, &harness, 5).await;
    let reading = read(&harness, Copies::default()).await;
    filled(&harness).await;
    let copies = Copies { reads: Arc::new(Semaphore::new(0)), ..Copies::default() };
    let (reads, begun) = (copies.reads.clone(), copies.begun.clone());
    let schema = Schema::new("test", Migrator::DEFAULT, "").with_replica("reader", copies);
    let nats = harness.settings(&harness.nats.url()).nats;
    let meanwhile = change_before_reads(&harness, &bus, ids[1], &begun, &reads);
    let (found, ()) = tokio::join!(verify(&harness.database_url, &schema, nats), meanwhile);
    let found = found.unwrap().remove(0);
    assert!(found.is_equal() && found.compared == 1, "{found:?}");
    stopped(reading).await;
}

#[tokio::test]
async fn a_stalled_rebuild_command_ends_with_the_reason_and_the_service_goes_on() {
    let (mut harness, bus) = start().await;
    documents(&bus, &harness, 5).await;
    let reading = read(&harness, Copies::default()).await;
    filled(&harness).await;
    // The owner is away.
    harness.tasks.shutdown().await;
    let schema = schema();
    let rebuilt = timeout(Duration::from_secs(90), rebuild(&harness.database_url, &schema)).await;
    let error = format!("{:#}", rebuilt.expect("the command does not end").unwrap_err());
    let reason = "no progress for a minute, after 0 of 0: the owner of DOCUMENTS does not reply with its snapshots";
    assert!(error.contains(reason), "{error}");
    let kept = "select count(*) from bus.fills where error like 'the owner of DOCUMENTS does not reply%'";
    let kept = async |db: &mut PgConnection| sqlx::query_scalar::<_, i64>(kept).fetch_one(db).await.unwrap();
    assert_eq!(kept(&mut harness.db().await).await, 1);

    harness.healing_relay(Shelf).await;
    filled(&harness).await;
    assert_eq!(kept(&mut harness.db().await).await, 0, "the error is over");
    stopped(reading).await;
}

/// What the first pass over a page has written is rolled back together with the page.
#[tokio::test]
async fn a_page_with_doubts_that_is_rolled_back_is_compared_from_the_beginning() {
    let (harness, bus) = start().await;
    let ids = documents(&bus, &harness, 5).await;
    let reading = read(&harness, Copies::default()).await;
    filled(&harness).await;
    sql(&harness, "delete from copies where id = $1", ids[0]).await;
    sql(&harness, "update copies set version = 1000 where id = $1", ids[1]).await;
    // A sequence counts attempts: it is not rolled back.
    let fail_once = "create sequence attempts;
        create function fail_once() returns trigger language plpgsql as $$
        begin
            if nextval('attempts') = 1 then raise exception 'the first commit fails'; end if;
            return null;
        end $$;
        create constraint trigger fail_once after insert on copies deferrable initially deferred
        for each row execute function fail_once()";
    sqlx::raw_sql(fail_once).execute(&mut harness.db().await).await.unwrap();
    let rebuilt = rebuild(&harness.database_url, &schema()).await.unwrap();
    assert!(matches!(rebuilt, Rebuilt::Done { passed: 5, failed: 0, .. }), "{rebuilt:?}");
    let attempts: i64 =
        sqlx::query_scalar("select last_value from attempts").fetch_one(&mut harness.db().await).await.unwrap();
    assert!(attempts > 1, "no commit failed");
    assert_eq!(differences(&mut harness.db().await).await, 0);
    stopped(reading).await;
}
