//! The invariants of a system at rest: no event is lost, doubled or stuck, and all copies agree.

use crate::records::{PLACES, Records, Stored, count};
use anyhow::{Result, ensure};
use async_nats::jetstream;
use sqlx::{AssertSqlSafe, Connection, PgConnection};
use std::collections::{BTreeMap, HashMap};
use std::time::Duration;
use testkit::eventually_within;

impl Records {
    /// Waits until the system is at rest, then checks its invariants.
    ///
    /// At rest: outboxes are empty, subscriptions have caught up, there are no dead letters, the replica equals its source row
    /// by row, and each ticket is held by its live order and by no other. Then every version of every ticket and order must be
    /// in its stream once, in order, and under the right subject.
    pub async fn settled(&self) -> Result<()> {
        let jetstream = self.jetstream().await?;
        eventually_within(Duration::from_mins(1), "the system to settle", async || self.quiet(&jetstream).await)
            .await?;
        self.agree().await
    }

    /// The same, after a stream has lost events and was healed: the newest event of each ticket and order in its stream is that of
    /// its row, older ones may be missing, and an event may be there twice, with the same content.
    pub async fn settled_after_a_loss(&self) -> Result<()> {
        let jetstream = self.jetstream().await?;
        eventually_within(Duration::from_mins(1), "the system to settle", async || self.quiet(&jetstream).await)
            .await?;
        for (stream, db, table) in [("TICKETS", &self.tickets_db, "tickets"), ("ORDERS", &self.orders_db, "orders")] {
            let stored = self.stored(stream).await?;
            let mut newest: BTreeMap<&str, &Stored> = BTreeMap::new();
            for event in &stored {
                let Some(before) = newest.insert(&event.id, event) else { continue };
                ensure!(before.version <= event.version, "{event:?} comes after {before:?}");
                ensure!(
                    before.version < event.version || before == event,
                    "{event:?} is {before:?} with other content"
                );
            }
            let newest: Vec<(String, i64)> = newest.values().map(|event| (event.id.clone(), event.version)).collect();
            let rows = columns::<(String, i64)>(db, &format!("select id, version from {table} order by id")).await?;
            ensure!(newest == rows, "{stream} has {} of {} rows, or older ones", newest.len(), rows.len());
        }
        Ok(())
    }

    async fn agree(&self) -> Result<()> {
        let stream = self.stream().await?;
        let tickets = history(&stream, |stored| match stored.version {
            0 => "ticket.created",
            _ => "ticket.updated",
        })?;
        let rows = columns::<(String, i64)>(&self.tickets_db, "select id, version from tickets").await?;
        ensure!(tickets.len() == rows.len(), "{} tickets, {} in the stream", rows.len(), tickets.len());
        for (id, version) in rows {
            let announced = tickets.get(&id).map(|last| last.version);
            ensure!(announced == Some(version), "ticket {id}: at {version}, the stream at {announced:?}");
        }

        let stream = self.stored("ORDERS").await?;
        let orders = history(&stream, |stored| match stored.body["status"].as_str() {
            Some("created") => "order.created",
            Some("cancelled") => "order.cancelled",
            _ => "order.completed",
        })?;
        let rows = columns::<(String, i64, String)>(&self.orders_db, "select id, version, status from orders").await?;
        ensure!(orders.len() == rows.len(), "{} orders, {} in the stream", rows.len(), orders.len());
        for (id, version, status) in rows {
            let announced = orders.get(&id).map(|last| (last.version, last.body["status"].as_str()));
            ensure!(
                announced == Some((version, Some(&status))),
                "order {id}: {status} at {version}, the stream says {announced:?}"
            );
        }
        Ok(())
    }

    async fn quiet(&self, jetstream: &jetstream::Context) -> Result<()> {
        self.relayed_and_applied().await?;
        for (stream, service) in PLACES {
            let place = jetstream.get_stream(stream).await?.consumer_info(service).await?;
            let (pending, unacked) = (place.num_pending, place.num_ack_pending);
            ensure!(pending == 0 && unacked == 0, "{stream}: {pending} events to deliver, {unacked} to acknowledge");
        }
        self.copies_agree().await
    }

    /// Checks that all outboxes are empty, and that there is no open dead letter.
    pub async fn relayed_and_applied(&self) -> Result<()> {
        for (name, db) in [("tickets", &self.tickets_db), ("orders", &self.orders_db)] {
            let waiting = count(db, "select count(*) from bus.outbox").await?;
            ensure!(waiting == 0, "{waiting} events wait in the outbox of {name}");
            let dead = count(db, "select count(*) from bus.dead_letters where status <> 'superseded'").await?;
            ensure!(dead == 0, "{dead} dead letters in {name}");
        }
        Ok(())
    }

    /// Checks that the replica equals tickets, and that each ticket is held by its live order.
    pub async fn copies_agree(&self) -> Result<()> {
        let (source, replica) = (self.tickets_rows().await?, self.replica_rows().await?);
        ensure!(source == replica, "the replica has {} of {} tickets, or older ones", replica.len(), source.len());
        let held = self.holders("select id, order_id from tickets where order_id is not null", &self.tickets_db);
        let live = self.holders("select ticket_id, id from orders where status <> 'cancelled'", &self.orders_db);
        let (held, live) = futures::try_join!(held, live)?;
        let wrong = held.iter().filter(|(ticket, order)| live.get(*ticket) != Some(*order)).count();
        ensure!(held == live, "{} tickets are held, {wrong} of them wrongly; {} orders live", held.len(), live.len());
        Ok(())
    }

    /// Pairs of ticket and order.
    async fn holders(&self, sql: &str, database_url: &str) -> Result<BTreeMap<String, String>> {
        let pairs = columns::<(String, String)>(database_url, sql).await?;
        let count = pairs.len();
        let holders: BTreeMap<_, _> = pairs.into_iter().collect();
        ensure!(holders.len() == count, "a ticket has two live orders");
        Ok(holders)
    }
}

/// Checks that a stream has every version of each aggregate once, in order, under the right subject. Returns the last
/// event of each aggregate.
fn history(stream: &[Stored], subject: impl Fn(&Stored) -> &'static str) -> Result<HashMap<String, &Stored>> {
    let mut last: HashMap<String, &Stored> = HashMap::new();
    for stored in stream {
        let expected = last.insert(stored.id.clone(), stored).map_or(0, |before| before.version + 1);
        ensure!(stored.version == expected, "{}: {} in the stream where {expected} belongs", stored.id, stored.version);
        ensure!(stored.subject == subject(stored), "{stored:?} has the wrong subject");
    }
    Ok(last)
}

async fn columns<T>(database_url: &str, sql: &str) -> Result<Vec<T>>
where
    T: for<'row> sqlx::FromRow<'row, sqlx::postgres::PgRow> + Send + Unpin,
{
    let mut db = PgConnection::connect(database_url).await?;
    Ok(sqlx::query_as(AssertSqlSafe(sql.to_owned())).fetch_all(&mut db).await?)
}
