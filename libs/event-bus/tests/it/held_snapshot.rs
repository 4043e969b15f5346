//! A snapshot that is held open, as by a backup or a report: Postgres cannot remove the dead rows of the outbox.

use crate::documents::Id;
use crate::harness::{Harness, append};
use sqlx::{AssertSqlSafe, Executor, PgConnection};
use testkit::eventually;

/// Buffers that a statement of the relay may touch on average. A step that scans the dead rows of published events
/// touches hundreds.
const BUFFERS: f64 = 60.0;

/// Events that are published while the snapshot is held.
const EVENTS: i64 = 10_000;

/// Commits events in transactions of 500, without the bus, and waits until they are published.
async fn publish(harness: &Harness, db: &mut PgConnection, events: i64) {
    for _ in 0..events / 500 {
        commit_500(db).await;
    }
    harness.published().await;
}

async fn commit_500(db: &mut PgConnection) {
    let sql = "select bus.append('DOCUMENTS', 'document.created', substr(md5(random()::text), 1, 24), 0, '{}', null)
               from generate_series(1, 500)";
    db.execute(sql).await.unwrap();
}

/// Resets the statistics of the statements in this database.
pub async fn measure_from_now_on(db: &mut PgConnection) {
    db.execute("select pg_stat_statements_reset(0, (select oid from pg_database where datname = current_database()))")
        .await
        .unwrap();
}

/// The statement of the relay that touches the most buffers per call, and their number.
async fn worst(db: &mut PgConnection) -> (String, f64) {
    let sql = "select query, ((shared_blks_hit + shared_blks_read) / calls)::float8
               from pg_stat_statements join pg_database on pg_database.oid = dbid
               where datname = current_database() and query ~ 'bus\\.(outbox|relay|position|take_events|move_on)'
                     and query !~ 'analyze|pg_stat|generate_series|count'
               order by 2 desc limit 1";
    sqlx::query_as(AssertSqlSafe(sql.to_owned())).fetch_one(db).await.unwrap()
}

/// Fifty steps with one event each.
async fn fifty_steps(harness: &Harness, bus: &event_bus::Bus) {
    let id = Id::generate();
    for version in 0..50 {
        append(bus, id, version..version + 1).await;
        harness.published().await;
    }
}

#[tokio::test]
async fn a_held_snapshot_or_wrong_statistics_do_not_slow_the_relay() {
    let mut harness = Harness::start().await;
    let mut db = harness.db().await;
    db.execute("create extension pg_stat_statements").await.unwrap();
    let bus = harness.relay().await;
    publish(&harness, &mut db, 1000).await;

    let mut holder = harness.db().await;
    holder.execute("begin isolation level repeatable read; select from bus.outbox").await.unwrap();
    publish(&harness, &mut db, EVENTS).await;
    db.execute("analyze bus.outbox; analyze bus.relay").await.unwrap(); // only dead rows
    measure_from_now_on(&mut db).await;
    fifty_steps(&harness, &bus).await;
    let (query, buffers) = worst(&mut db).await;
    assert!(buffers < BUFFERS, "many dead rows: {buffers} buffers a call: {query}");

    harness.nats.stop().await.unwrap();
    for _ in 0..10 {
        commit_500(&mut db).await;
    }
    db.execute("analyze bus.outbox").await.unwrap(); // only live rows
    measure_from_now_on(&mut db).await;
    harness.nats.start_again().await.unwrap();
    harness.published().await;
    // A step publishes up to 512 rows here: three buffers a row are more than it needs.
    let (query, buffers) = worst(&mut db).await;
    assert!(buffers < 3.0 * 512.0, "many live rows: {buffers} buffers a call: {query}");

    holder.execute("rollback").await.unwrap();
    db.execute("vacuum analyze").await.unwrap(); // empty
    publish(&harness, &mut db, 5000).await;
    measure_from_now_on(&mut db).await;
    fifty_steps(&harness, &bus).await;
    let (query, buffers) = worst(&mut db).await;
    assert!(buffers < BUFFERS, "statistics of an empty table: {buffers} buffers a call: {query}");
}

#[tokio::test]
async fn a_held_snapshot_leaves_the_measurement_small() {
    let mut harness = Harness::start().await;
    let mut db = harness.db().await;
    db.execute("create extension pg_stat_statements").await.unwrap();
    let bus = harness.relay().await;
    publish(&harness, &mut db, 1000).await;
    let mut holder = harness.db().await;
    holder.execute("begin isolation level repeatable read; select from bus.outbox").await.unwrap();
    publish(&harness, &mut db, EVENTS).await;
    fifty_steps(&harness, &bus).await;
    db.execute("analyze bus.outbox; analyze bus.position").await.unwrap(); // only dead rows
    measure_from_now_on(&mut db).await;
    let stop = harness.stop.clone();
    harness.tasks.spawn(async move {
        bus.measure(&stop).await;
        Ok(())
    });
    let buffers: f64 = eventually("a measurement", async || {
        let sql = "select ((shared_blks_hit + shared_blks_read) / calls)::float8
                   from pg_stat_statements join pg_database on pg_database.oid = dbid
                   where datname = current_database() and query like '%one_row_at_least%' and query not like '%pg_stat%'";
        sqlx::query_scalar(sql).fetch_one(&mut db).await
    })
    .await
    .unwrap();
    // It reads a few tables, and the rows since the floor last rose.
    assert!(buffers < BUFFERS, "{buffers} buffers");
}

#[tokio::test]
async fn an_event_that_commits_long_after_greater_ids_is_published() {
    let mut harness = Harness::start().await;
    let mut db = harness.db().await;
    harness.relay().await;
    let mut late = harness.db().await;
    late.execute("begin; select bus.append('DOCUMENTS', 'document.created', 'late', 0, '{}', null)").await.unwrap();
    // For longer than the floor takes to rise.
    for _ in 0..8 {
        publish(&harness, &mut db, 500).await;
        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
    }
    late.execute("commit").await.unwrap();
    harness.published().await;
    assert_eq!(harness.stream().await.last().map(String::as_str), Some("late-0"));
}

/// As in a copy of the database without the state of the sequence.
#[tokio::test]
async fn events_are_published_after_the_ids_of_the_outbox_restart() {
    let mut harness = Harness::start().await;
    let mut db = harness.db().await;
    harness.relay().await;
    for _ in 0..5 {
        publish(&harness, &mut db, 500).await;
        tokio::time::sleep(std::time::Duration::from_millis(120)).await; // so that the floor rises
    }
    let floor: i64 = sqlx::query_scalar("select max(floor) from bus.position").fetch_one(&mut db).await.unwrap();
    assert!(floor > 0, "there is no floor to test");
    db.execute("truncate bus.outbox restart identity").await.unwrap();
    publish(&harness, &mut db, 500).await;
    assert_eq!(harness.stream().await.len(), 3000);
}

/// It is neither among the rows that the relay reads, nor among the writers that it finds afterwards.
#[tokio::test]
async fn a_held_snapshot_leaves_the_search_for_due_tasks_small() {
    let mut harness = Harness::start().await;
    let mut db = harness.db().await;
    harness.relay().await;
    let mut holder = harness.db().await;
    holder.execute("begin isolation level repeatable read; select from bus.tasks").await.unwrap();
    let done = "insert into bus.tasks (kind, key, input, due_at)
                select 'print', number::text, '{}', now() - interval '10 minutes' from generate_series(1, 20000) as number;
                delete from bus.tasks";
    db.execute(done).await.unwrap();
    for (looks_back, is_small) in [("120", true), ("null", false)] {
        let lease = format!("explain (analyze, buffers) select * from bus.lease_tasks('print', 8, 1, {looks_back})");
        // The first call of a session also reads the catalogue.
        db.execute(AssertSqlSafe(lease.clone())).await.unwrap();
        let plan: Vec<String> = sqlx::query_scalar(AssertSqlSafe(lease)).fetch_all(&mut db).await.unwrap();
        let hit = plan.iter().find_map(|line| line.trim().strip_prefix("Buffers: shared hit=")).unwrap();
        let buffers: f64 = hit.split(' ').next().unwrap().parse().unwrap();
        assert_eq!(buffers < BUFFERS, is_small, "{looks_back}: {plan:#?}");
    }
}

#[tokio::test]
async fn an_event_that_commits_between_the_statements_of_a_step_is_published() {
    let mut harness = Harness::start().await;
    let bus = harness.relay().await;
    eventually("the stream", async || harness.jetstream().await.get_stream("DOCUMENTS").await).await.unwrap();
    harness.nats.stop().await.unwrap();
    let mut late = harness.db().await;
    late.execute("begin; select bus.append('DOCUMENTS', 'document.created', 'late', 0, '{}', null)").await.unwrap();
    let first = append(&bus, Id::generate(), 0..1).await;
    // The relay publishes the first event, and cannot delete its row.
    let mut holder = harness.db().await;
    holder.execute("begin; select from bus.outbox for update").await.unwrap();
    harness.nats.start_again().await.unwrap();
    eventually("the first event", async || harness.stream().await == first).await.unwrap();
    late.execute("commit").await.unwrap();
    holder.execute("rollback").await.unwrap();
    harness.published().await;
    assert_eq!(harness.stream().await, [first, vec!["late-0".to_owned()]].concat());
}
