//! Writes of concurrent requests, which travel together.

use crate::documents::{Document, DocumentEvent, Id, topology};
use crate::harness::Harness;
use anyhow::Result;
use event_bus::{Batcher, Bus, Columns, Event, Outgoing, Settings, Statement};
use futures::future::join_all;
use sqlx::{Executor, PgConnection};
use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;
use testkit::{eventually, eventually_within};
use tokio_util::sync::CancellationToken;

/// A title that no statement may contain.
const POISON: &str = "poison";
const PANIC: &str = "panic";

struct NewDocument {
    id: String,
    title: String,
    event: Outgoing,
}

fn new(id: &str, title: &str) -> NewDocument {
    let document = Document { id: id.to_owned(), version: 0, title: title.to_owned() };
    let event = Outgoing::new(&DocumentEvent::Created(document)).with_header("Tenant", "one").unwrap();
    NewDocument { id: id.to_owned(), title: title.to_owned(), event }
}

/// Inserts documents. The output says whether there was none of this id.
#[derive(Clone, Default)]
struct Insert {
    statements: Arc<AtomicUsize>,
    largest: Arc<AtomicUsize>,
}

impl Statement for Insert {
    type Item = NewDocument;
    type Output = bool;
    const APPENDS: bool = true;

    async fn execute(&self, db: &mut PgConnection, new: &[NewDocument]) -> Result<Vec<bool>> {
        self.statements.fetch_add(1, Ordering::SeqCst);
        self.largest.fetch_max(new.len(), Ordering::SeqCst);
        assert!(new.iter().all(|new| new.title != PANIC), "a document panics");
        let events: Columns = new.iter().map(|new| &new.event).collect();
        let titles: Vec<&str> = new.iter().map(|new| new.title.as_str()).collect();
        let sql = "with inserted as (
                       insert into documents (id, title) select * from unnest($2, $7::text[]) on conflict do nothing
                       returning id
                   ), appended as (
                       select bus.append_all($1, array_agg(subject), array_agg(id), array_agg(version),
                                             array_agg(payload), array_agg(traceparent), array_agg(header))
                       from unnest($2, $3::text[], $4::bigint[], $5::text[], $6::text[], $8::text[])
                            as event (id, subject, version, payload, traceparent, header)
                       join inserted using (id)
                   )
                   select id from inserted cross join appended";
        let inserted: Vec<String> = sqlx::query_scalar(sql)
            .bind(DocumentEvent::STREAM)
            .bind(&events.aggregate_ids)
            .bind(&events.subjects)
            .bind(&events.versions)
            .bind(&events.payloads)
            .bind(&events.traceparents)
            .bind(&titles)
            .bind(&events.headers)
            .fetch_all(db)
            .await?;
        Ok(new.iter().map(|new| inserted.contains(&new.id)).collect())
    }
}

struct Writers {
    harness: Harness,
    bus: Bus,
    writer: Batcher<Insert>,
    insert: Insert,
    stop: CancellationToken,
}

impl Writers {
    async fn start() -> Self {
        Self::start_with(|settings| settings).await
    }

    async fn start_with(change: impl FnOnce(Settings) -> Settings) -> Self {
        let mut harness = Harness::start().await;
        harness.topology = topology();
        let settings = change(harness.settings(&harness.nats.url()));
        let bus = Harness::open(settings).await.unwrap();
        harness.tasks.spawn(bus.clone().relay::<DocumentEvent>(harness.stop.clone()));
        eventually("the database to be prepared", async || bus.connection().await.map(drop)).await.unwrap();
        let table = "create table documents (id text primary key, title text not null check (title <> 'poison'))";
        harness.db().await.execute(table).await.unwrap();
        let (insert, stop) = (Insert::default(), harness.stop.child_token());
        let (writer, writing) = bus.batcher(insert.clone());
        harness.tasks.spawn(writing.run(stop.clone()));
        Self { harness, bus, writer, insert, stop }
    }

    /// A transaction that holds up an insert of this id.
    async fn lock(&self, id: &str) -> PgConnection {
        let mut db = self.harness.db().await;
        db.execute("begin").await.unwrap();
        sqlx::query("insert into documents values ($1, 'held')").bind(id).execute(&mut db).await.unwrap();
        db
    }

    async fn statements_of_the_service(&self, state: &str) -> i64 {
        let sql = "select count(*) from pg_stat_activity where datname = current_database() and pid <> pg_backend_pid()
                   and query like '%insert into documents%' and state = 'active' and wait_event_type = $1";
        sqlx::query_scalar(sql).bind(state).fetch_one(&mut self.harness.db().await).await.unwrap()
    }
}

fn is_outage(error: &anyhow::Error) -> bool {
    event_bus::is_outage(error)
}

#[tokio::test]
async fn concurrent_writes_travel_together_with_their_events() {
    let writers = Writers::start().await;
    let ids: Vec<String> = (0..500).map(|_| Id::generate().to_string()).collect();
    // Each id twice.
    let written = join_all(ids.iter().chain(&ids).map(|id| writers.writer.run(new(id, "A title")))).await;
    let outcomes: Vec<bool> = written.into_iter().map(Result::unwrap).collect();
    assert_eq!(outcomes.iter().filter(|inserted| **inserted).count(), 500);
    let (statements, largest) =
        (writers.insert.statements.load(Ordering::SeqCst), writers.insert.largest.load(Ordering::SeqCst));
    assert!((8..100).contains(&statements), "{statements} statements");
    assert!((100..=128).contains(&largest), "{largest} items in one statement");

    writers.harness.published().await;
    let mut stream = writers.harness.stream().await;
    stream.sort();
    let mut expected: Vec<String> = ids.iter().map(|id| format!("{id}-0")).collect();
    expected.sort();
    assert_eq!(stream, expected);
    let stream = writers.harness.jetstream().await.get_stream("DOCUMENTS").await.unwrap();
    assert_eq!(stream.get_raw_message(1).await.unwrap().headers.get("Tenant").unwrap().as_str(), "one");
}

#[tokio::test]
async fn an_item_that_fails_does_not_fail_its_neighbours() {
    for title in [POISON, PANIC] {
        let writers = Writers::start().await;
        let items = (0..50).map(|number| {
            let title = if number == 20 { title } else { "A title" };
            writers.writer.run(new(&number.to_string(), title))
        });
        for (number, outcome) in join_all(items).await.into_iter().enumerate() {
            assert_eq!(outcome.is_ok(), number != 20, "{number}: {outcome:?}");
            let Err(error) = outcome else { continue };
            assert!(!is_outage(&error), "{error:#}");
        }
        writers.harness.published().await;
        assert_eq!(writers.harness.stream().await.len(), 49);
    }
}

#[tokio::test]
async fn an_item_that_waits_for_a_lock_waits_alone() {
    let writers = Writers::start().await;
    let mut lock = writers.lock("20").await;
    let held = {
        let writer = writers.writer.clone();
        tokio::spawn(async move { writer.run(new("20", "A title")).await })
    };
    let others = join_all((0..20).map(|number| writers.writer.run(new(&number.to_string(), "A title"))));
    for outcome in others.await {
        assert!(outcome.unwrap());
    }
    assert!(!held.is_finished(), "the lock held nothing up");
    // And the next ones do not wait behind it.
    let next = eventually_within(Duration::from_secs(3), "the next write", async || {
        writers.writer.run(new(&Id::generate().to_string(), "A title")).await
    });
    assert!(next.await.unwrap());
    lock.execute("rollback").await.unwrap();
    assert!(held.await.unwrap().unwrap());
}

#[tokio::test]
async fn a_connection_that_is_lost_is_an_outage_for_the_whole_batch() {
    let writers = Writers::start().await;
    let mut lock = writers.lock("0").await;
    let writes = (0..20).map(|number| {
        let writer = writers.writer.clone();
        tokio::spawn(async move { writer.run(new(&number.to_string(), "A title")).await })
    });
    let writes: Vec<_> = writes.collect();
    eventually("the batch to wait", async || writers.statements_of_the_service("Lock").await == 1).await.unwrap();
    let end = "select pg_terminate_backend(pid) from pg_stat_activity
               where datname = current_database() and query like '%insert into documents%' and wait_event_type = 'Lock'";
    lock.execute(end).await.unwrap();
    lock.execute("rollback").await.unwrap();
    let outcomes = join_all(writes).await;
    let failed = outcomes.iter().filter_map(|outcome| outcome.as_ref().unwrap().as_ref().err());
    let failed: Vec<_> = failed.collect();
    assert!(!failed.is_empty() && failed.iter().all(|error| is_outage(error)), "{failed:?}");
    // What failed was not written, and the writer goes on.
    let written = writers.writer.run(new("0", "A title")).await.unwrap();
    let first = outcomes[0].as_ref().unwrap();
    assert_eq!(written, first.is_err());
}

#[tokio::test]
async fn a_full_queue_is_an_outage_at_once() {
    let writers = Writers::start_with(|settings| Settings { batch_items: 1, batch_queue: 2, ..settings }).await;
    let outcomes = join_all((0..50).map(|number| writers.writer.run(new(&number.to_string(), "A title")))).await;
    let refused: Vec<_> = outcomes.iter().filter_map(|outcome| outcome.as_ref().err()).collect();
    assert!(refused.len() >= 40, "{} were refused", refused.len());
    assert!(refused.iter().all(|error| is_outage(error)));
    writers.harness.published().await;
    assert_eq!(writers.harness.stream().await.len(), 50 - refused.len());
    assert!(writers.writer.run(new("next", "A title")).await.unwrap());
}

#[tokio::test]
async fn callers_that_leave_change_nothing() {
    let writers = Writers::start().await;
    let writes: Vec<_> = (0..1000)
        .map(|number| {
            let writer = writers.writer.clone();
            tokio::spawn(async move { writer.run(new(&number.to_string(), "A title")).await })
        })
        .collect();
    for (number, write) in writes.iter().enumerate() {
        if number % 7 == 0 {
            tokio::task::yield_now().await;
        }
        write.abort();
    }
    drop(writes);
    assert!(writers.writer.run(new("last", "A title")).await.unwrap());
    writers.harness.published().await;
    let sql = "select id || '-0' from documents order by 1";
    let rows: Vec<String> = sqlx::query_scalar(sql).fetch_all(&mut writers.harness.db().await).await.unwrap();
    let mut stream = writers.harness.stream().await;
    stream.sort();
    let mut rows = rows;
    rows.sort();
    assert_eq!(stream, rows);
}

#[tokio::test]
async fn a_writer_that_is_stopped_writes_what_it_has_begun_and_refuses_the_rest() {
    let mut writers = Writers::start().await;
    let mut lock = writers.lock("0").await;
    let held = {
        let writer = writers.writer.clone();
        tokio::spawn(async move { writer.run(new("0", "A title")).await })
    };
    eventually("the write to wait", async || writers.statements_of_the_service("Lock").await == 1).await.unwrap();
    writers.stop.cancel();
    lock.execute("rollback").await.unwrap();
    assert!(held.await.unwrap().unwrap());
    eventually("the writer to end", async || writers.harness.tasks.try_join_next().is_some()).await.unwrap();
    assert!(is_outage(&writers.writer.run(new("1", "A title")).await.unwrap_err()));
    drop(writers.bus);
}

#[tokio::test]
async fn without_postgres_a_write_is_an_outage() {
    let harness = Harness::start().await;
    let url = "postgres://postgres:postgres@127.0.0.1:1/none".to_owned();
    let settings = Settings { database_url: url, ..harness.settings("127.0.0.1:1") };
    let bus = Harness::open(settings).await.unwrap();
    let (writer, writing) = bus.batcher(Insert::default());
    let stop = CancellationToken::new();
    let writing = tokio::spawn(writing.run(stop.clone()));
    assert!(is_outage(&writer.run(new("0", "A title")).await.unwrap_err()));
    stop.cancel();
    writing.await.unwrap().unwrap();
}

#[tokio::test]
async fn while_the_relay_is_behind_writers_are_slowed_down() {
    // A relay that publishes far less than a writer can write.
    let writers = Writers::start_with(|settings| Settings { publish_events: 20, ..settings }).await;
    let until = tokio::time::Instant::now() + Duration::from_secs(6);
    let writing = join_all((0..200).map(|_| {
        let writer = writers.writer.clone();
        async move {
            while tokio::time::Instant::now() < until {
                assert!(writer.run(new(&Id::generate().to_string(), "A title")).await.unwrap());
            }
        }
    }));
    let measuring = async {
        tokio::time::sleep_until(until - Duration::from_secs(3)).await;
        let early = writers.harness.outbox().await;
        tokio::time::sleep_until(until).await;
        (early, writers.harness.outbox().await)
    };
    let (_, (early, late)) = futures::join!(writing, measuring);
    assert!(late <= early + 3000, "the outbox has grown from {early} to {late} events in 3 s");
    writers.harness.published().await;
}

/// Reads titles.
#[derive(Clone, Default)]
struct Read {
    statements: Arc<AtomicUsize>,
}

impl Statement for Read {
    type Item = String;
    type Output = Option<String>;
    const APPENDS: bool = false;

    async fn execute(&self, db: &mut PgConnection, ids: &[String]) -> Result<Vec<Option<String>>> {
        self.statements.fetch_add(1, Ordering::SeqCst);
        let sql = "select id, title from documents where id = any($1)";
        let found: HashMap<String, String> = sqlx::query_as(sql).bind(ids).fetch_all(db).await?.into_iter().collect();
        Ok(ids.iter().map(|id| found.get(id).cloned()).collect())
    }
}

#[tokio::test]
async fn concurrent_reads_share_a_statement_and_see_what_was_written_before() {
    let mut writers = Writers::start().await;
    let read = Read::default();
    let (reader, reading) = writers.bus.batcher(read.clone());
    writers.harness.tasks.spawn(reading.run(writers.stop.clone()));
    let ids: Vec<String> = (0..200).map(|_| Id::generate().to_string()).collect();
    let found = join_all(ids.iter().map(|id| async {
        let before = reader.run(id.clone()).await.unwrap();
        writers.writer.run(new(id, id)).await.unwrap();
        // Twice in one statement.
        let (one, two) = futures::join!(reader.run(id.clone()), reader.run(id.clone()));
        (before, one.unwrap(), two.unwrap())
    }));
    for ((before, one, two), id) in found.await.into_iter().zip(&ids) {
        assert_eq!((before, one.as_ref(), two.as_ref()), (None, Some(id), Some(id)));
    }
    let statements = read.statements.load(Ordering::SeqCst);
    assert!((4..60).contains(&statements), "{statements} statements for 600 reads");
}
