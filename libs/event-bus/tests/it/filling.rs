//! Readers that have missed events, or are new, get the current state from the owner of the stream.

use crate::copies::{self, Copies};
use crate::documents::Id;
use crate::harness::Harness;
use crate::log::Log;
use crate::rebuilding;
use crate::shelf::{Shelf, change, put};
use event_bus::Bus;
use sqlx::PgConnection;
use std::time::Duration;
use testkit::{eventually, eventually_within};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

/// An owner, and the table of its reader.
pub async fn start() -> (Harness, Bus) {
    let mut harness = Harness::start().await;
    let bus = harness.healing_relay(Shelf).await;
    sqlx::query(copies::TABLE).execute(&mut harness.db().await).await.unwrap();
    (harness, bus)
}

pub async fn documents(bus: &Bus, harness: &Harness, count: usize) -> Vec<Id> {
    let ids: Vec<Id> = (0..count).map(|_| Id::generate()).collect();
    put(bus, &ids).await;
    harness.published().await;
    ids
}

/// Keeps the replica until the token is cancelled.
pub async fn read(harness: &Harness, copies: Copies) -> (CancellationToken, JoinHandle<anyhow::Result<()>>) {
    let (bus, stop) = (harness.bus(&harness.nats.url()).await, CancellationToken::new());
    let reading = tokio::spawn(bus.replicate("reader", copies, stop.clone()));
    (stop, reading)
}

pub async fn stopped((stop, reading): (CancellationToken, JoinHandle<anyhow::Result<()>>)) {
    stop.cancel();
    reading.await.unwrap().unwrap();
}

async fn purge_all(harness: &Harness) {
    harness.jetstream().await.get_stream("DOCUMENTS").await.unwrap().purge().await.unwrap();
}

/// Makes the reader new: as if its service were started for the first time.
async fn forget_reader(harness: &Harness) {
    harness.jetstream().await.delete_consumer_from_stream("reader", "DOCUMENTS").await.unwrap();
    sqlx::query("delete from bus.read_positions").execute(&mut harness.db().await).await.unwrap();
    let settings = harness.settings(&harness.nats.url());
    event_bus::provision(&settings.nats, &harness.topology, Duration::from_secs(20)).await.unwrap();
}

/// How many rows of the replica differ from the documents.
pub async fn differences(db: &mut PgConnection) -> i64 {
    let sql = "select count(*) from documents full join copies using (id)
               where (documents.version, documents.title) is distinct from (copies.version, copies.title)";
    sqlx::query_scalar(sql).fetch_one(db).await.unwrap()
}

pub async fn filled(harness: &Harness) {
    eventually_within(Duration::from_secs(30), "the replica to be filled", async || {
        let mut db = harness.db().await;
        let differences = differences(&mut db).await;
        let sql = "select count(*) from bus.fills where finished_at is null";
        let requests: i64 = sqlx::query_scalar(sql).fetch_one(&mut db).await?;
        anyhow::ensure!(differences == 0 && requests == 0, "{differences} rows differ, {requests} requests");
        anyhow::Ok(())
    })
    .await
    .unwrap();
}

/// How many aggregates the requests have passed, and how many rows were written.
async fn done(harness: &Harness) -> (i64, i64) {
    let sql = "select coalesce(sum(passed), 0)::bigint, coalesce(sum(written), 0)::bigint from bus.fills";
    sqlx::query_as(sql).fetch_one(&mut harness.db().await).await.unwrap()
}

#[tokio::test]
async fn a_new_reader_of_a_trimmed_stream_fills_itself() {
    let (harness, bus) = start().await;
    let ids = documents(&bus, &harness, 600).await;
    change(&bus, ids[7], 1).await;
    harness.published().await;
    purge_all(&harness).await;
    forget_reader(&harness).await;
    let (log, logging) = Log::start();
    let reading = read(&harness, Copies::default()).await;
    filled(&harness).await;
    // It follows the stream from here on.
    change(&bus, ids[8], 1).await;
    filled(&harness).await;
    stopped(reading).await;
    drop(logging);
    assert_eq!(log.lines("a new reader of DOCUMENTS").len(), 1);
    assert_eq!(log.lines(" ERROR "), Vec::<String>::new());
    let lines = log.lines("filled from the owner of DOCUMENTS");
    assert!(lines.len() == 1 && lines[0].contains("aggregates=600"), "{lines:#?}");
}

/// The consumer has acknowledged everything, for a database that is gone.
#[tokio::test]
async fn a_reader_with_an_empty_database_fills_itself() {
    let (harness, bus) = start().await;
    documents(&bus, &harness, 20).await;
    let reading = read(&harness, Copies::default()).await;
    filled(&harness).await;
    stopped(reading).await;
    let mut db = harness.db().await;
    sqlx::raw_sql("delete from copies; delete from bus.read_positions").execute(&mut db).await.unwrap();
    let reading = read(&harness, Copies::default()).await;
    filled(&harness).await;
    stopped(reading).await;
}

#[tokio::test]
async fn messages_purged_under_a_stopped_reader_come_from_the_owner() {
    let (harness, bus) = start().await;
    let ids = documents(&bus, &harness, 20).await;
    let reading = read(&harness, Copies::default()).await;
    filled(&harness).await;
    stopped(reading).await;
    for id in &ids[..5] {
        change(&bus, *id, 1).await;
    }
    harness.published().await;
    purge_all(&harness).await;
    let (log, logging) = Log::start();
    let reading = read(&harness, Copies::default()).await;
    filled(&harness).await;
    stopped(reading).await;
    drop(logging);
    let errors = log.lines(" ERROR ");
    assert!(errors.len() == 1 && errors[0].contains("has lost the messages 21 to 25"), "{errors:#?}");
}

#[tokio::test]
async fn a_killed_fill_resumes_at_its_cursor() {
    let (harness, bus) = start().await;
    documents(&bus, &harness, 1000).await;
    let stale = "insert into copies select id, -1, '' from documents order by id offset 600 limit 1";
    sqlx::query(stale).execute(&mut harness.db().await).await.unwrap();
    purge_all(&harness).await;
    forget_reader(&harness).await;
    // This replica dies in the middle: it cannot get further than a row that somebody else has locked.
    let mut holder = harness.db().await;
    sqlx::query("begin").execute(&mut holder).await.unwrap();
    sqlx::query("select 1 from copies for update").execute(&mut holder).await.unwrap();
    let (_, reading) = read(&harness, Copies::default()).await;
    eventually("a part of the pages", async || done(&harness).await.0 >= 512).await.unwrap();
    reading.abort();
    let _ = reading.await;
    let before = done(&harness).await.0;
    assert!(before <= 600, "{before}");
    sqlx::query("rollback").execute(&mut holder).await.unwrap();

    let (log, logging) = Log::start();
    let reading = read(&harness, Copies::default()).await;
    filled(&harness).await;
    stopped(reading).await;
    drop(logging);
    assert_eq!(done(&harness).await.0, 1000, "some pages were applied twice");
    let resumed = log.lines("resuming to fill");
    assert!(resumed.len() == 1 && resumed[0].contains(&format!("passed={before}")), "{resumed:#?}");
}

#[tokio::test]
async fn two_replicas_share_a_fill() {
    let (harness, bus) = start().await;
    documents(&bus, &harness, 1500).await;
    purge_all(&harness).await;
    forget_reader(&harness).await;
    let one = read(&harness, Copies::default()).await;
    let other = read(&harness, Copies::default()).await;
    filled(&harness).await;
    stopped(one).await;
    stopped(other).await;
    assert_eq!(done(&harness).await.0, 1500);
}

#[tokio::test]
async fn a_fill_waits_for_its_owner() {
    let (mut harness, bus) = start().await;
    documents(&bus, &harness, 10).await;
    purge_all(&harness).await;
    forget_reader(&harness).await;
    harness.tasks.shutdown().await;
    let (log, logging) = Log::start();
    let reading = read(&harness, Copies::default()).await;
    eventually("the warning", async || {
        log.lines(" WARN ").iter().any(|line| line.contains("the owner of DOCUMENTS does not reply with its snapshots"))
    })
    .await
    .unwrap();
    assert_eq!(differences(&mut harness.db().await).await, 10);
    harness.healing_relay(Shelf).await;
    filled(&harness).await;
    stopped(reading).await;
    drop(logging);
}

#[tokio::test]
async fn a_snapshot_that_cannot_be_applied_is_reported_and_delays_no_other() {
    let (harness, bus) = start().await;
    let ids = documents(&bus, &harness, 30).await;
    purge_all(&harness).await;
    forget_reader(&harness).await;
    let (log, logging) = Log::start();
    let refused = Copies { refused: Some(ids[3].to_string()), ..Copies::default() };
    let reading = read(&harness, refused).await;
    eventually("all others", async || differences(&mut harness.db().await).await == 1).await.unwrap();
    stopped(reading).await;
    drop(logging);
    let errors = log.lines(" ERROR ");
    let reported = format!("event_id=\"{}-0\"", ids[3]);
    assert!(errors.len() == 1 && errors[0].contains(&reported), "{errors:#?}");
}

/// Large bodies: a page is smaller than the largest message of the server.
#[tokio::test]
async fn pages_of_large_snapshots_are_short() {
    let (harness, bus) = start().await;
    documents(&bus, &harness, 20).await;
    let large = "update documents set title = repeat('x', 900000), version = 1";
    sqlx::query(large).execute(&mut harness.db().await).await.unwrap();
    purge_all(&harness).await;
    forget_reader(&harness).await;
    let reading = read(&harness, Copies::default()).await;
    filled(&harness).await;
    assert!(rebuilding::verified(&harness).await.is_equal());
    stopped(reading).await;
}
