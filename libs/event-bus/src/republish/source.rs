//! Where snapshots come from, and where they are restored to: the tables of a service.

use crate::outbox::Outgoing;
use anyhow::Context;
use event_bus_core::{Event, Publish};
use futures::FutureExt;
use futures::future::BoxFuture;
use sqlx::PgConnection;
use sqlx::types::time::OffsetDateTime;
use std::future::Future;

/// The current snapshots of a stream's aggregates, from the tables of its owner.
///
/// With them, a relay heals a stream that lost events, and a database that is older than its stream, and answers readers that have
/// missed events: see [`Bus::relay_with`](crate::Bus::relay_with).
///
/// A snapshot must equal the event that announced its version: the same subject, body and headers, which therefore must be
/// functions of the row. The same event id has one content for ever.
///
/// Ids are compared byte by byte, as with the collation `"C"`.
pub trait Snapshots: Send + Sync + 'static {
    /// The events of the stream.
    type Event: Publish;

    /// How many aggregates there are, about, and the greatest id; empty if there is none.
    ///
    /// # Errors
    /// Any error is logged, and the work is tried again. The same for the other functions.
    fn extent(&self, db: &mut PgConnection) -> impl Future<Output = anyhow::Result<(i64, String)>> + Send;

    /// The first `limit` ids of aggregates after `after`, in ascending order. Locks nothing.
    fn ids(
        &self,
        db: &mut PgConnection,
        after: &str,
        limit: i64,
    ) -> impl Future<Output = anyhow::Result<Vec<String>>> + Send;

    /// Reads the snapshots of these aggregates. Locks nothing. Leaves out aggregates that do not exist.
    fn find(&self, db: &mut PgConnection, ids: &[String])
    -> impl Future<Output = anyhow::Result<Vec<Outgoing>>> + Send;

    /// Locks the rows of these aggregates until the transaction ends, and reads their snapshots.
    ///
    /// Without the lock (`for no key update`), an old snapshot could be published after a newer event. Lock in the order in which
    /// the service locks. Leaves out aggregates that do not exist, and those that have not changed since `since`.
    fn lock(
        &self,
        db: &mut PgConnection,
        ids: &[String],
        since: Option<OffsetDateTime>,
    ) -> impl Future<Output = anyhow::Result<Vec<Outgoing>>> + Send;

    /// Writes published snapshots into the tables, because the database is older than the stream. Appends no event.
    ///
    /// `events` are in the order of the stream, with one event of each aggregate. Overwrite the row, even if it has a greater version:
    /// that version was assigned a second time, and is not published. After all events up to any message of the stream are written,
    /// the tables are as they were when it was published.
    ///
    /// A row that was inserted after the database came back may violate a constraint together with what was published, for example
    /// two orders of one ticket. Delete such rows, and return their ids. They must be rows of which no event was published: otherwise
    /// the transaction is rolled back.
    fn take_over(
        &self,
        db: &mut PgConnection,
        events: &[Self::Event],
    ) -> impl Future<Output = anyhow::Result<Vec<String>>> + Send;

    /// Completes what snapshots do not carry. Called once, after the events of other streams were applied again. Default: nothing.
    fn recovered(&self, _db: &mut PgConnection) -> impl Future<Output = anyhow::Result<()>> + Send {
        async { Ok(()) }
    }
}

/// [`Snapshots`] of any event.
pub(crate) trait Source: Send + Sync {
    fn extent<'a>(&'a self, db: &'a mut PgConnection) -> BoxFuture<'a, anyhow::Result<(i64, String)>>;
    fn ids<'a>(
        &'a self,
        db: &'a mut PgConnection,
        after: &'a str,
        limit: i64,
    ) -> BoxFuture<'a, anyhow::Result<Vec<String>>>;
    fn find<'a>(&'a self, db: &'a mut PgConnection, ids: &'a [String]) -> BoxFuture<'a, anyhow::Result<Vec<Outgoing>>>;
    fn lock<'a>(
        &'a self,
        db: &'a mut PgConnection,
        ids: &'a [String],
        since: Option<OffsetDateTime>,
    ) -> BoxFuture<'a, anyhow::Result<Vec<Outgoing>>>;
    /// Takes subjects and bodies.
    fn take_over<'a>(
        &'a self,
        db: &'a mut PgConnection,
        events: &'a [(&'a str, &'a [u8])],
    ) -> BoxFuture<'a, anyhow::Result<Vec<String>>>;
    fn recovered<'a>(&'a self, db: &'a mut PgConnection) -> BoxFuture<'a, anyhow::Result<()>>;
}

impl<S: Snapshots> Source for S {
    fn extent<'a>(&'a self, db: &'a mut PgConnection) -> BoxFuture<'a, anyhow::Result<(i64, String)>> {
        Snapshots::extent(self, db).boxed()
    }

    fn ids<'a>(
        &'a self,
        db: &'a mut PgConnection,
        after: &'a str,
        limit: i64,
    ) -> BoxFuture<'a, anyhow::Result<Vec<String>>> {
        Snapshots::ids(self, db, after, limit).boxed()
    }

    fn find<'a>(&'a self, db: &'a mut PgConnection, ids: &'a [String]) -> BoxFuture<'a, anyhow::Result<Vec<Outgoing>>> {
        Snapshots::find(self, db, ids).boxed()
    }

    fn lock<'a>(
        &'a self,
        db: &'a mut PgConnection,
        ids: &'a [String],
        since: Option<OffsetDateTime>,
    ) -> BoxFuture<'a, anyhow::Result<Vec<Outgoing>>> {
        Snapshots::lock(self, db, ids, since).boxed()
    }

    fn take_over<'a>(
        &'a self,
        db: &'a mut PgConnection,
        events: &'a [(&'a str, &'a [u8])],
    ) -> BoxFuture<'a, anyhow::Result<Vec<String>>> {
        let decode = |(subject, body): &(&str, &[u8])| {
            S::Event::decode(subject, body)
                .with_context(|| format!("cannot take over an event with the subject {subject}"))
        };
        async move {
            let events = events.iter().map(decode).collect::<anyhow::Result<Vec<_>>>()?;
            Snapshots::take_over(self, db, &events).await
        }
        .boxed()
    }

    fn recovered<'a>(&'a self, db: &'a mut PgConnection) -> BoxFuture<'a, anyhow::Result<()>> {
        Snapshots::recovered(self, db).boxed()
    }
}
