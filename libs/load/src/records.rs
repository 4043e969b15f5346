//! What the databases and the broker hold: tickets to begin with, outboxes, and what subscriptions still have to apply.

use crate::routes::id;
use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;
use sqlx::{AssertSqlSafe, Connection, Executor, PgConnection, Row};
use std::ops::Range;
use std::time::{Duration, Instant};
use testkit::Client;
use tokio::time::sleep;

/// The user who owns all tickets of a load.
pub const USER: &str = "load";

/// How long a system may take to come to rest.
const PATIENCE: Duration = Duration::from_mins(10);

/// Connections to both databases as superuser, and to the monitoring of NATS.
pub struct Records {
    /// The database of tickets.
    pub tickets: PgConnection,
    /// The database of orders.
    pub orders: PgConnection,
    monitoring: Client,
    /// How many tickets were filled in.
    filled: u64,
}

impl Records {
    /// Connects.
    pub async fn open(tickets_url: &str, orders_url: &str, monitoring_url: &str) -> Result<Self> {
        let tickets = PgConnection::connect(tickets_url).await?;
        let orders = PgConnection::connect(orders_url).await?;
        Ok(Self { tickets, orders, monitoring: Client::new(monitoring_url), filled: 0 })
    }

    /// Fills this many more tickets into the table and into the replica, without events. Returns their numbers.
    pub async fn fill(&mut self, count: u64) -> Result<Range<u64>> {
        let range = self.filled..self.filled + count;
        if range.is_empty() {
            return Ok(range);
        }
        let ids = numbered_ids(&range);
        let tickets = format!(
            "insert into tickets (id, title, price, user_id, version) select id, 'Concert', 20.5, '{USER}', 0 from {ids}"
        );
        let replica = format!(
            "insert into ticket_replica (id, title, price, user_id, version)
             select id, 'Concert', 20.5, '{USER}', 0 from {ids}"
        );
        let (tickets, replica) = (execute(&mut self.tickets, tickets), execute(&mut self.orders, replica));
        tokio::try_join!(tickets, replica)?;
        self.filled = range.end;
        Ok(range)
    }

    /// How many tickets were filled in.
    pub fn filled(&self) -> u64 {
        self.filled
    }

    /// Appends this many events to the outbox of tickets, each with the ticket that it announces.
    pub async fn fill_outbox(&mut self, count: u64) -> Result<()> {
        let range = self.filled..self.filled + count;
        let sql = format!(
            r#"with new as (
                   insert into tickets (id, title, price, user_id, version)
                   select id, 'Concert', 20.5, '{USER}', 0 from {} returning id
               )
               insert into bus.outbox (stream, subject, aggregate_id, version, payload)
               select 'TICKETS', 'ticket.created', id, 0,
                      '{{"id":"' || id || '","version":0,"title":"Concert","price":20.5,"userId":"{USER}"}}'
               from new"#,
            numbered_ids(&range)
        );
        execute(&mut self.tickets, sql).await?;
        self.filled = range.end;
        Ok(())
    }

    /// Makes statistics and visibility maps as they are in a database that has been running for a while.
    pub async fn vacuum(&mut self) -> Result<()> {
        for db in [&mut self.tickets, &mut self.orders] {
            execute(db, "vacuum analyze".to_owned()).await?;
            execute(db, "checkpoint".to_owned()).await?;
        }
        Ok(())
    }

    /// The events in both outboxes.
    pub async fn outbox(&mut self) -> Result<u64> {
        let sql = "select count(*) from bus.outbox";
        let (tickets, orders) = tokio::try_join!(number(&mut self.tickets, sql), number(&mut self.orders, sql))?;
        Ok(u64::try_from(tickets + orders)?)
    }

    /// Whether the outbox of tickets is empty. Cheaper than to count.
    pub async fn tickets_outbox_is_empty(&mut self) -> Result<bool> {
        Ok(number(&mut self.tickets, "select count(*) from (select from bus.outbox limit 1) as any_event").await? == 0)
    }

    /// The bytes that a stream has.
    pub async fn stream_bytes(&self, stream: &str) -> Result<u64> {
        let streams = self.streams().await?;
        let stream = streams.iter().find(|found| found["name"] == stream);
        stream.and_then(|stream| stream["state"]["bytes"].as_u64()).context("NATS does not show the stream")
    }

    async fn streams(&self) -> Result<Vec<Value>> {
        let mut account = self.monitoring.get("/jsz?consumers=true").await?.expect(200)?;
        match account["account_details"][0]["stream_detail"].take() {
            Value::Array(streams) => Ok(streams),
            _ => bail!("NATS shows no streams"),
        }
    }

    /// The events that subscriptions have not acknowledged.
    pub async fn pending(&self) -> Result<u64> {
        let streams = self.streams().await?;
        let consumers = streams.iter().filter_map(|stream| stream["consumer_detail"].as_array()).flatten();
        consumers
            .map(|consumer| Some(consumer["num_pending"].as_u64()? + consumer["num_ack_pending"].as_u64()?))
            .sum::<Option<u64>>()
            .context("NATS shows no consumers")
    }

    /// Waits until outboxes are empty and everything is applied. Returns how long the outboxes took.
    pub async fn drained(&mut self) -> Result<Duration> {
        let begun = Instant::now();
        let mut outbox = None;
        let mut quiet = 0;
        // Applying an event may append one to the other outbox: at rest twice in a row.
        while quiet < 2 {
            ensure!(begun.elapsed() < PATIENCE, "the system did not come to rest within {PATIENCE:?}");
            let is_empty = self.outbox().await? == 0;
            if is_empty {
                outbox.get_or_insert_with(|| begun.elapsed());
            }
            quiet = if is_empty && self.pending().await? == 0 { quiet + 1 } else { 0 };
            sleep(Duration::from_millis(10)).await;
        }
        Ok(outbox.unwrap_or_default())
    }
}

/// Executes a statement without parameters.
pub async fn execute(db: &mut PgConnection, sql: String) -> Result<()> {
    // Nothing in it comes from outside of this program.
    db.execute(AssertSqlSafe(sql)).await?;
    Ok(())
}

/// The number that a query returns.
pub async fn number(db: &mut PgConnection, sql: &'static str) -> Result<i64> {
    Ok(db.fetch_one(sql).await?.try_get(0)?)
}

/// The text that a query returns.
pub async fn text(db: &mut PgConnection, sql: &'static str) -> Result<String> {
    Ok(db.fetch_one(sql).await?.try_get(0)?)
}

/// A table of the ids that [`id`] makes of these numbers.
fn numbered_ids(range: &Range<u64>) -> String {
    let width = id(0).len();
    let (first, last) = (range.start, range.end.saturating_sub(1));
    format!(
        "(select lpad(to_hex(n), {width}, '0') as id from generate_series({first}::bigint, {last}::bigint) as n) as new"
    )
}
