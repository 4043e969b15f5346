//! Rebuilding a replica in its place: each row becomes exactly that of the owner.
//!
//! Rows that are missing or older get the snapshot of the owner, as in any fill. Rows that have the same version with other content,
//! a newer version, or an id that the owner does not have, are wrong, but a handler would leave them as they are. They are deleted,
//! and the snapshot is applied in the same transaction.
//!
//! Nothing is locked while the owner is asked, and live events are applied meanwhile. So a row that is newer than the snapshot, or
//! unknown to the owner, may be right: the owner has answered before its last change. This is how a wrong row is told apart:
//!
//! 1. The row is read with a version *s*, and a snapshot is requested from the owner afterwards. If *s* is right, the owner had
//!    committed it before it was published, so the reply has *s* or a newer version. Otherwise *s* is wrong.
//! 2. The row is deleted only if it still has the version *s*. What a live event has written since stays.
//! 3. While the row had the wrong version, live events with smaller versions were ignored. So the owner is asked once more after the
//!    commit. Events that come later than this commit are applied, and the answer includes those that came before.
//!
//! A row with the same version and other content needs no second answer: a version has one content for ever.
//!
//! Most rows are right. So the owner is first asked for the number and a checksum of the next 1,000 aggregates; if the rows have the same,
//! the cursor moves to the end of the range. Otherwise its pages are compared row by row.
//!
//! The cursor moves when no doubt is left. Only rows that were in doubt at first are looked at again, so rows that change all the
//! time do not keep it from moving.
//!
//! What if we die …
//! - after a wrong row was set back, before the owner is asked once more: the cursor is before it, so the page is repeated.

use super::request::{self, Done, Request};
use super::{Filler, ROWS, Replaced, Step, count};
use crate::connection::Transaction;
use crate::copy::{self, Copied, Copy};
use crate::owner::{MOST, Page};
use crate::replica::{Difference, compare};
use crate::snapshot::Snapshot;
use crate::subscription::Handler;
use event_bus_core::Event;
use std::collections::{BTreeMap, BTreeSet};

/// Rows of a page of which the owner's answer was not new enough.
pub(super) struct Doubts {
    request: i64,
    cursor: String,
    /// The end of the page.
    until: Option<String>,
    /// How many aggregates the page has.
    passed: i64,
    /// The version that a row had before the owner is asked; none if there was no row.
    seen: BTreeMap<String, Option<i64>>,
}

/// A range whose checksum differs, or changes all the time: its pages are compared.
pub(super) struct Differing {
    request: i64,
    until: Option<String>,
}

/// What is written to the replica.
#[derive(Default)]
struct Writes<'a> {
    snapshots: Vec<&'a Snapshot>,
    /// Rows that are replaced by one of the snapshots.
    replaced: BTreeMap<String, i64>,
    /// Rows that are deleted for good.
    removed: BTreeMap<String, i64>,
}

impl<H: Handler> Filler<'_, H> {
    pub(super) async fn repair(
        &mut self,
        tx: &mut Transaction,
        copy: &dyn Copy,
        request: Request,
    ) -> anyhow::Result<Step> {
        // Another replica may have moved the cursor.
        let is_ours = |doubts: &Doubts| doubts.request == request.id && doubts.cursor == request.cursor;
        match self.doubts.take().filter(is_ours) {
            None => match self.skip_equal(tx, copy, request).await? {
                Ok(step) => Ok(step),
                Err(request) => self.first_pass(tx, copy, request).await,
            },
            Some(doubts) => self.next_pass(tx, copy, request, doubts).await,
        }
    }

    /// Moves the cursor behind the next range, if its rows have the checksum of the owner. Returns the request if they do not.
    async fn skip_equal(
        &mut self,
        tx: &mut Transaction,
        copy: &dyn Copy,
        request: Request,
    ) -> anyhow::Result<Result<Step, Request>> {
        let is_differing = self.differing.as_ref().is_some_and(|Differing { request: id, until }| {
            *id == request.id && until.as_ref().is_none_or(|until| request.cursor < *until)
        });
        // Pages are smaller after a failure. Until they have the full size again, they are compared row by row.
        if is_differing || self.rows < ROWS {
            return Ok(Err(request));
        }
        let theirs = self.owner.digest(&request.cursor, MOST).await?;
        let until = theirs.until.as_deref();
        // Also if this fails: the range may have too many rows.
        self.differing = Some(Differing { request: request.id, until: theirs.until.clone() });
        if copy::digest(copy, tx, &request.cursor, until, theirs.digest.count).await? != theirs.digest {
            return Ok(Err(request));
        }
        self.differing = None;
        let done = Done { passed: i64::try_from(theirs.digest.count)?, ..Done::default() };
        self.move_on(tx, request, until, done).await.map(Ok)
    }

    /// Compares the next page with the rows of its range.
    async fn first_pass(&mut self, tx: &mut Transaction, copy: &dyn Copy, request: Request) -> anyhow::Result<Step> {
        let Page { mut snapshots, mut until } = self.owner.after(&request.cursor, self.rows).await?;
        let mut rows = copy.range(tx, &request.cursor, until.as_deref(), i64::try_from(2 * ROWS)?).await?;
        if rows.len() >= 2 * ROWS {
            // There may be many more rows than aggregates: a shorter page.
            until = rows.last().map(|row| row.id.clone());
            snapshots.retain(|snapshot| Some(&snapshot.id) <= until.as_ref());
        }
        let (theirs, failed) = self.decoded(copy, &snapshots, &mut rows);
        let (mut writes, mut seen) = (Writes::default(), BTreeMap::new());
        for (id, differs) in compare(&theirs, &rows) {
            match differs.difference {
                Difference::Missing | Difference::Stale => writes.apply(&snapshots, &id),
                Difference::Different => writes.replace(&snapshots, id, differs.mine),
                Difference::Newer | Difference::Unknown => drop(seen.insert(id, differs.mine)),
            }
        }
        let done = self.write(tx, copy, &writes, failed).await?;
        let passed = count(&snapshots);
        let doubts = Doubts { request: request.id, cursor: request.cursor.clone(), until, passed, seen };
        self.end_pass(tx, request, doubts, done).await
    }

    /// Compares the rows in doubt with a newer answer.
    async fn next_pass(
        &mut self,
        tx: &mut Transaction,
        copy: &dyn Copy,
        request: Request,
        mut doubts: Doubts,
    ) -> anyhow::Result<Step> {
        let mut ids: Vec<String> = doubts.seen.keys().cloned().collect();
        let Page { snapshots, until } = self.owner.of(ids.clone()).await?;
        ids.retain(|id| until.as_ref().is_none_or(|until| id <= until));
        let mut rows = copy.find(tx, &ids).await?;
        let (theirs, failed) = self.decoded(copy, &snapshots, &mut rows);
        let versions: BTreeMap<&str, i64> = theirs.iter().map(|row| (row.id.as_str(), row.version)).collect();
        let before: BTreeMap<String, Option<i64>> =
            ids.iter().filter_map(|id| Some((id.clone(), doubts.seen.remove(id)?))).collect();
        let mut writes = Writes::default();
        for (id, differs) in compare(&theirs, &rows) {
            let theirs = versions.get(id.as_str()).copied();
            match (differs.difference, before.get(&id).copied().flatten()) {
                (Difference::Missing | Difference::Stale, _) => writes.apply(&snapshots, &id),
                (Difference::Different, _) => writes.replace(&snapshots, id, differs.mine),
                // It has been right, or was not there, before the owner was asked: live events have changed it since.
                (_, None) => {}
                (_, Some(seen)) if theirs >= Some(seen) => {}
                (_, Some(seen)) if differs.mine != Some(seen) => drop(doubts.seen.insert(id, differs.mine)),
                (Difference::Newer, _) => {
                    doubts.seen.insert(id.clone(), theirs);
                    writes.replace(&snapshots, id, differs.mine);
                }
                (Difference::Unknown, Some(seen)) => {
                    doubts.seen.insert(id.clone(), None);
                    writes.removed.insert(id, seen);
                }
            }
        }
        let done = self.write(tx, copy, &writes, failed).await?;
        self.end_pass(tx, request, doubts, done).await
    }

    async fn end_pass(
        &mut self,
        tx: &mut Transaction,
        request: Request,
        doubts: Doubts,
        done: Done,
    ) -> anyhow::Result<Step> {
        if doubts.seen.is_empty() {
            let done = Done { passed: doubts.passed, ..done };
            return self.move_on(tx, request, doubts.until.as_deref(), done).await;
        }
        request::add(tx, request.id, &done).await?;
        self.doubts = Some(doubts);
        Ok(Step::More)
    }

    /// The rows to which the snapshots lead. Those that cannot be decoded are logged, and their rows stay as they are.
    fn decoded(&self, copy: &dyn Copy, snapshots: &[Snapshot], rows: &mut Vec<Copied>) -> (Vec<Copied>, i64) {
        let (mut theirs, mut failed) = (Vec::new(), BTreeSet::new());
        for snapshot in snapshots {
            match copy.copied(snapshot) {
                Ok(row) => theirs.push(row),
                Err(error) => {
                    self.failed(&format!("{}-{}", snapshot.id, snapshot.version), &error.into());
                    failed.insert(&snapshot.id);
                }
            }
        }
        rows.retain(|row| !failed.contains(&row.id));
        (theirs, i64::try_from(failed.len()).unwrap_or(i64::MAX))
    }

    async fn write(
        &self,
        tx: &mut Transaction,
        copy: &dyn Copy,
        writes: &Writes<'_>,
        failed: i64,
    ) -> anyhow::Result<Done> {
        let Writes { snapshots, replaced, removed } = writes;
        if !replaced.is_empty() || !removed.is_empty() {
            let (stream, consumer) = (H::Event::STREAM, self.durable);
            let ids = |rows: &BTreeMap<String, i64>| rows.keys().take(10).cloned().collect::<Vec<_>>().join(" ");
            tracing::warn!(
                stream,
                consumer,
                replaced = replaced.len(),
                removed = removed.len(),
                "rows that no event can explain are repaired; the first ones: {} {}",
                ids(replaced),
                ids(removed)
            );
        }
        if !removed.is_empty() {
            let (ids, versions): (Vec<String>, Vec<i64>) = removed.clone().into_iter().unzip();
            copy.remove(tx, &ids, &versions).await?;
        }
        let failed = failed + self.apply(tx, snapshots, Some(Replaced { copy, versions: replaced })).await?;
        Ok(Done { passed: 0, written: count(snapshots) + i64::try_from(removed.len())?, failed })
    }
}

impl<'a> Writes<'a> {
    fn apply(&mut self, snapshots: &'a [Snapshot], id: &str) {
        self.snapshots.extend(snapshots.iter().find(|snapshot| snapshot.id == id));
    }

    fn replace(&mut self, snapshots: &'a [Snapshot], id: String, mine: Option<i64>) {
        self.apply(snapshots, &id);
        self.replaced.extend(mine.map(|version| (id, version)));
    }
}
