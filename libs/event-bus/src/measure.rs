//! Measures what only Postgres knows: the outbox, dead letters, and requests that are not done.
//!
//! One statement every 5 s, whatever is scraped: `/metrics` answers at once while Postgres is away or frozen. Then `event_bus_database_up`
//! is 0, and the other gauges are not a number, because an old value would be a wrong one. Every replica measures the same.
//!
//! The statement has one possible plan, and its work is bounded: it counts 10,000 rows at most, and reads the outbox only above the floor of
//! the relay (see `relay::floor`), because an open snapshot keeps the index entries of all published events.

use crate::connection::Transaction;
use crate::database::Database;
use crate::duties::Duties;
use crate::error::{Error, Result};
use metrics::{Gauge, gauge};
use std::collections::BTreeMap;
use std::time::Duration;
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;

/// How often to measure.
const PERIOD: Duration = Duration::from_secs(5);
/// How long it may take.
const LIMIT: Duration = Duration::from_secs(2);
/// The beginning of its transaction. The limit is also that of the statement, so that it does not continue.
const BEGIN: &str = "begin read only; set local statement_timeout = '2s'; set local enable_seqscan = off; \
                     set local enable_bitmapscan = off; set local enable_sort = off";

/// The gauges.
struct Gauges {
    up: Gauge,
    recovering: Gauge,
    retrying: Gauge,
    dead: Gauge,
    fills: Gauge,
    republishes: Gauge,
    /// Of each relayed stream: the events that wait, and the age of the oldest one.
    streams: BTreeMap<String, (Gauge, Gauge)>,
}

/// What was measured. The first fields are the same in all rows; there is one row for each stream, and one if there is none.
struct Measured {
    retrying: i64,
    dead: i64,
    fills: i64,
    republishes: i64,
    is_recovering: bool,
    stream: Option<String>,
    events: i64,
    /// Of the oldest event, in seconds.
    age: f64,
}

/// Measures until `stop`.
pub(crate) async fn run(database: &Database, duties: &Duties, stop: &CancellationToken) {
    let mut gauges = Gauges::new();
    loop {
        let streams = duties.relayed();
        gauges.add(&streams);
        match timeout(LIMIT, look(database, &streams)).await.unwrap_or(Err(Error::NoAnswer(LIMIT))) {
            Ok(rows) => gauges.set(&rows),
            Err(error) => {
                tracing::debug!("cannot measure the outbox: {error:#}");
                gauges.are_unknown(&error);
            }
        }
        if stop.run_until_cancelled(sleep(PERIOD)).await.is_none() {
            return;
        }
    }
}

async fn look(database: &Database, streams: &[&str]) -> Result<Vec<Measured>> {
    let mut tx = database.begin_in_background(BEGIN).await?;
    let rows = measure(&mut tx, streams).await?;
    tx.rollback().await?;
    Ok(rows)
}

async fn measure(tx: &mut Transaction, streams: &[&str]) -> sqlx::Result<Vec<Measured>> {
    let rows = sqlx::query_as!(
        Measured,
        r#"
        with letters as materialized (
            select status from bus.dead_letters where status <> 'superseded' limit 10000
        )
        select (select count(*) from letters where status = 'retrying') as "retrying!",
               (select count(*) from letters where status = 'dead') as "dead!",
               (select count(*) from bus.fills where finished_at is null) as "fills!",
               (select count(*) from bus.republish
                -- Others begin when the stream has grown, which may take days.
                where republish.after_seq <= coalesce(
                    (select max(position.last_seq) from bus.position where position.stream = republish.stream), 0)
               ) as "republishes!",
               exists(select from bus.recovery) as "is_recovering!",
               relayed.stream as "stream?", coalesce(waiting.events, 0) as "events!",
               coalesce(extract(epoch from clock_timestamp() - waiting.oldest), 0)::double precision as "age!"
        from (values (1)) as one_row_at_least (number)
        left join unnest($1::text[]) as relayed (stream) on true
        left join lateral (
            select count(*) as events, min(created_at) as oldest
            from (
                select outbox.created_at from bus.outbox
                where outbox.stream = relayed.stream and outbox.id > coalesce(
                    (select position.floor from bus.position where position.stream = relayed.stream
                     order by position.last_seq desc limit 1), 0)
                order by outbox.id limit 10000
            ) as oldest_first
        ) as waiting on true
        "#,
        streams as _,
    );
    rows.fetch_all(&mut **tx).await
}

impl Gauges {
    fn new() -> Self {
        Self {
            up: gauge!("event_bus_database_up"),
            recovering: gauge!("event_bus_recovering"),
            retrying: gauge!("event_bus_dead_letters_open", "status" => "retrying"),
            dead: gauge!("event_bus_dead_letters_open", "status" => "dead"),
            fills: gauge!("event_bus_fills_open"),
            republishes: gauge!("event_bus_republishes_open"),
            streams: BTreeMap::new(),
        }
    }

    fn add(&mut self, streams: &[&'static str]) {
        for &stream in streams {
            self.streams.entry(stream.to_owned()).or_insert_with(|| {
                (
                    gauge!("event_bus_outbox_events", "stream" => stream),
                    gauge!("event_bus_outbox_oldest_event_age_seconds", "stream" => stream),
                )
            });
        }
    }

    #[expect(clippy::cast_precision_loss, reason = "10000 at most")]
    fn set(&self, rows: &[Measured]) {
        self.up.set(1.0);
        for row in rows {
            self.retrying.set(row.retrying as f64);
            self.dead.set(row.dead as f64);
            self.fills.set(row.fills as f64);
            self.republishes.set(row.republishes as f64);
            self.recovering.set(f64::from(u8::from(row.is_recovering)));
            if let Some((events, age)) = row.stream.as_ref().and_then(|stream| self.streams.get(stream)) {
                events.set(row.events as f64);
                age.set(row.age);
            }
        }
    }

    fn are_unknown(&self, error: &Error) {
        // Before the migrations, Postgres may be up or not.
        self.up.set(if matches!(error, Error::NotMigrated) { f64::NAN } else { 0.0 });
        let streams = self.streams.values().flat_map(|(events, age)| [events, age]);
        let all = [&self.recovering, &self.retrying, &self.dead, &self.fills, &self.republishes];
        all.into_iter().chain(streams).for_each(|gauge| gauge.set(f64::NAN));
    }
}
