//! A replica: a table that copies the aggregates of another service, row by row, and how it is compared with its owner.

use crate::copy::{Copied, Copy, Registered};
use crate::schema::Schema;
use crate::snapshot::Snapshot;
use crate::subscription::Handler;
use event_bus_core::{DecodeError, Event};
use futures::FutureExt;
use futures::future::BoxFuture;
use sqlx::PgConnection;
use std::collections::{BTreeMap, BTreeSet};
use std::future::Future;

/// A table that has one row for each aggregate of another service, written by its own [`Handler`] only.
///
/// It can be compared with its owner and repaired: see [`Bus::replicate`](crate::Bus::replicate) and [`verify`](crate::verify).
///
/// Ids are compared byte by byte, as with the collation `"C"`.
pub trait Replica: Handler {
    /// What the table keeps of an event, as text. Two rows are equal if their texts are.
    ///
    /// Return the body of the event, if the table keeps all of it: equal ranges are then found by a checksum.
    fn content(event: &Self::Event) -> String;

    /// The first `limit` rows after the id `after`, and up to the id `until` if there is one, in ascending order. Locks nothing.
    ///
    /// # Errors
    /// Any error is logged, and the work is tried again. The same for the other functions.
    fn range(
        &self,
        db: &mut PgConnection,
        after: &str,
        until: Option<&str>,
        limit: i64,
    ) -> impl Future<Output = anyhow::Result<Vec<Copied>>> + Send;

    /// The rows of these ids that exist. Locks nothing.
    fn find(&self, db: &mut PgConnection, ids: &[String]) -> impl Future<Output = anyhow::Result<Vec<Copied>>> + Send;

    /// Deletes the rows that have these ids and, in the same order, still these versions.
    fn remove(
        &self,
        db: &mut PgConnection,
        ids: &[String],
        versions: &[i64],
    ) -> impl Future<Output = anyhow::Result<()>> + Send;

    /// Completes other tables from this one, when all aggregates have come from the owner, in the transaction of the last page. Default:
    /// nothing.
    fn filled(&self, _db: &mut PgConnection) -> impl Future<Output = anyhow::Result<()>> + Send {
        async { Ok(()) }
    }
}

impl<R: Replica> Copy for R {
    fn stream(&self) -> &'static str {
        R::Event::STREAM
    }

    fn copied(&self, snapshot: &Snapshot) -> Result<Copied, DecodeError> {
        let event = R::Event::decode(&snapshot.subject, snapshot.body.get().as_bytes())?;
        Ok(Copied { id: snapshot.id.clone(), version: snapshot.version, content: R::content(&event) })
    }

    fn range<'a>(
        &'a self,
        db: &'a mut PgConnection,
        after: &'a str,
        until: Option<&'a str>,
        limit: i64,
    ) -> BoxFuture<'a, anyhow::Result<Vec<Copied>>> {
        Replica::range(self, db, after, until, limit).boxed()
    }

    fn find<'a>(&'a self, db: &'a mut PgConnection, ids: &'a [String]) -> BoxFuture<'a, anyhow::Result<Vec<Copied>>> {
        Replica::find(self, db, ids).boxed()
    }

    fn remove<'a>(
        &'a self,
        db: &'a mut PgConnection,
        ids: &'a [String],
        versions: &'a [i64],
    ) -> BoxFuture<'a, anyhow::Result<()>> {
        Replica::remove(self, db, ids, versions).boxed()
    }

    fn filled<'a>(&'a self, db: &'a mut PgConnection) -> BoxFuture<'a, anyhow::Result<()>> {
        Replica::filled(self, db).boxed()
    }
}

impl Schema {
    /// The same, with a replica that [`Bus::replicate`](crate::Bus::replicate) keeps as the durable consumer `durable`: it can be
    /// [verified](crate::verify) and [rebuilt](crate::rebuild).
    #[must_use]
    pub fn with_replica(self, durable: &'static str, replica: impl Replica) -> Self {
        self.with(Registered { consumer: durable, copy: Box::new(replica) })
    }
}

/// How a row differs from its owner's aggregate.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Difference {
    /// There is no row.
    Missing,
    /// The row has an older version.
    Stale,
    /// The row has the same version with other content.
    Different,
    /// The row has a newer version: perhaps the owner's answer is older than the row.
    Newer,
    /// The owner does not have it: perhaps for the same reason.
    Unknown,
}

/// The version of the row, if there is one, and how it differs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Differs {
    pub(crate) mine: Option<i64>,
    pub(crate) difference: Difference,
}

/// Compares the owner's rows with those of a replica, of the same ids.
pub(crate) fn compare(theirs: &[Copied], mine: &[Copied]) -> BTreeMap<String, Differs> {
    let rows: BTreeMap<&str, &Copied> = mine.iter().map(|row| (row.id.as_str(), row)).collect();
    let known: BTreeSet<&str> = theirs.iter().map(|row| row.id.as_str()).collect();
    let here = theirs.iter().filter_map(|theirs| {
        let mine = rows.get(theirs.id.as_str());
        let difference = match mine {
            None => Difference::Missing,
            Some(mine) if mine.version < theirs.version => Difference::Stale,
            Some(mine) if mine.version > theirs.version => Difference::Newer,
            Some(mine) if mine.content != theirs.content => Difference::Different,
            Some(_) => return None,
        };
        Some((theirs.id.clone(), Differs { mine: mine.map(|mine| mine.version), difference }))
    });
    let unknown = mine.iter().filter(|mine| !known.contains(mine.id.as_str()));
    let unknown =
        unknown.map(|mine| (mine.id.clone(), Differs { mine: Some(mine.version), difference: Difference::Unknown }));
    here.chain(unknown).collect()
}

#[cfg(test)]
mod tests {
    use super::{Copied, Difference, compare};

    #[test]
    fn each_kind_of_difference_is_found() {
        let row = |id: &str, version, content: &str| Copied { id: id.to_owned(), version, content: content.to_owned() };
        let theirs = [row("a", 1, "x"), row("b", 1, "x"), row("c", 1, "x"), row("d", 1, "x"), row("e", 1, "x")];
        let mine = [row("b", 0, "x"), row("c", 1, "y"), row("d", 2, "x"), row("e", 1, "x"), row("f", 0, "x")];
        let found: Vec<_> = compare(&theirs, &mine).into_iter().map(|(id, it)| (id, it.mine, it.difference)).collect();
        let expected = [
            ("a", None, Difference::Missing),
            ("b", Some(0), Difference::Stale),
            ("c", Some(1), Difference::Different),
            ("d", Some(2), Difference::Newer),
            ("f", Some(0), Difference::Unknown),
        ];
        assert_eq!(found, expected.map(|(id, mine, difference)| (id.to_owned(), mine, difference)));
    }
}
