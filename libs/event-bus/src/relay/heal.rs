//! Compares the stream with the database, and heals a stream that lost events.
//!
//! The relay compares when it starts, after each failure, after each new connection, when the server refuses a publish, and every
//! 30 s. `bus.relay` knows when the stream was created, so a stream that was deleted and created again is noticed even if it is
//! already as long as the position.
//!
//! - The stream is the same and ends at the position: publish.
//! - It is the same and ends after the position: see `reconcile`.
//! - It is the same and ends before the position, for 15 s: its end is lost. A node that was cut off from its cluster replies with
//!   old state for some seconds.
//! - It is another stream: everything is lost. At once if it is newer than the one before; an older one may be the reply of a node
//!   that was cut off. If it holds events of ours that are newer than the tables, the database is older than the stream: see
//!   `reconcile`. This happens if a database is restored to a time before a stream was healed.
//!
//! When history is lost, one transaction takes the end of the stream as position (its beginning, if the database is older), remembers the stream, and records a request to
//! republish (see `republish`). Then publishing continues. Without [`Snapshots`](crate::Snapshots), nothing is published until an
//! operator has decided.
//!
//! What if we die …
//! - before the commit: nothing has changed; the next relay finds the same.
//! - after it: the request is recorded, and publishing continues at the new position.
//!
//! What is republished, if only the end is lost: aggregates that have changed since a checkpoint. A checkpoint is a position at which
//! the outbox was empty, with the time of this database: messages after it announce later changes. The time of the last message
//! that is left says less: after an outage, events are published hours after their commit, and the clocks of two machines differ.
//! The margin of 15 minutes is for transactions that began before the checkpoint and were committed after it. Without a
//! checkpoint before the end, everything is republished.
//!
//! The position of a consumer may be after the end of a stream that lost events. It skips all events up to its position. So if
//! the stream is the same, the snapshots are published a second time when the stream has reached the lost position: they are then
//! after the position of every consumer. Not before the snapshots of the first time have left the deduplication window, which would
//! refuse them.

use super::outbox::Position;
use super::room::Room;
use super::stored::{LostHistory, Messages, PAGE, Seen, Stored};
use super::{CUT_OFF, Known, Relay};
use crate::connection::Transaction;
use crate::outbox::Outgoing;
use crate::recovery;
use crate::republish::{self, Later, Source};
use sqlx::PgConnection;
use sqlx::types::time::OffsetDateTime;
use std::cmp::Ordering;
use std::collections::HashMap;
use std::time::Duration;
use tokio::time::Instant;

/// How often a relay compares the stream with its position.
const COMPARE: Duration = Duration::from_secs(30);

/// What was found out about the stream.
pub(super) enum Compared {
    /// It ends at the position.
    Equal(Transaction),
    /// The position has been changed, and committed.
    Moved,
}

impl Relay<'_> {
    /// Whether it is time to compare the stream with the position. Not while stopping.
    pub(super) fn should_compare(&self) -> bool {
        let Known { compared, connects, .. } = self.known;
        let period = self.recovering.map_or(COMPARE, |recovering| recovering.period);
        let is_due = compared.is_none_or(|last| last.elapsed() >= period) || connects != self.broker.connects();
        is_due && !self.stop.is_cancelled()
    }

    /// Compares the stream with the position, and reconciles or heals it.
    pub(super) async fn compare(&mut self, mut tx: Transaction, position: Position) -> anyhow::Result<Compared> {
        let connects = self.broker.connects();
        let seen = Seen::look(self.broker, self.stream).await?;
        self.room = Room::of(&seen.stream.cached_info().config);
        let known = match remembered(&mut tx, self.stream).await? {
            Some(known) => known,
            None if seen.end < position.last_seq => seen.created,
            None => {
                // The first relay of this database, or of this release.
                remember(&mut tx, self.stream, seen.created).await?;
                tx.commit().await?;
                return Ok(Compared::Moved);
            }
        };
        if known != seen.created || seen.end < position.last_seq {
            return self.lost(tx, position, seen, known).await;
        }
        self.lost = None;
        (self.known.compared, self.known.connects) = (Some(Instant::now()), connects);
        // A database that came back has an older position: the messages after it must not be trimmed.
        self.window.is_published_up_to(position.last_seq);
        let mark = recovery::mark(&mut tx, self.stream).await?;
        if mark.is_some() {
            self.is_recovering();
        } else {
            self.recovering = None;
        }
        if seen.end > position.last_seq {
            self.meters.is_ahead();
            self.reconcile(&seen, tx, position, mark).await?;
            return Ok(Compared::Moved);
        }
        if mark.is_none() && self.source.is_some() && recovery::is_another(&mut tx, self.stream).await? {
            return self.begin_to_recover(tx, position).await;
        }
        self.duties.has_compared(self.stream);
        let Some(mark) = mark else { return Ok(Compared::Equal(tx)) };
        Ok(self.conclude(tx, mark).await?.map_or(Compared::Moved, Compared::Equal))
    }

    /// The database is not the same as before. Even if the stream has nothing that the tables lack, events of other streams may have
    /// been applied in the one before.
    async fn begin_to_recover(&mut self, mut tx: Transaction, position: Position) -> anyhow::Result<Compared> {
        let (from_seq, until_seq) = (position.last_seq, position.last_seq);
        let page = recovery::Page { from_seq, until_seq, taken_over: 0, dropped: 0, newest_at: None };
        recovery::record(&mut tx, self.stream, &page, &self.duties.subscriptions()).await?;
        tx.commit().await?;
        tracing::warn!(
            stream = self.stream,
            "the database was restored, or Postgres failed over: what the stream has and the tables lack is taken over, and what other \
             streams announced in the last minutes is applied again; until then, writes are refused"
        );
        self.is_recovering();
        Ok(Compared::Moved)
    }

    /// The stream is shorter than the position, or another one.
    async fn lost(
        &mut self,
        mut tx: Transaction,
        position: Position,
        seen: Seen,
        known: OffsetDateTime,
    ) -> anyhow::Result<Compared> {
        let Position { last_seq, .. } = position;
        // Nothing is trimmed until the position belongs to this stream.
        self.window.is_published_up_to(0);
        let (stream, end, is_another) = (self.stream, seen.end, seen.created != known);
        let found = if is_another { format!("is another stream, and ends at {end}") } else { format!("ends at {end}") };
        let lasts = self.lost.get_or_insert_with(Instant::now).elapsed();
        let Some(source) = self.source else {
            return Err(LostHistory::Broker { stream: stream.to_owned(), found, last_seq, end }.into());
        };
        if seen.created <= known && lasts < CUT_OFF {
            return Err(LostHistory::Doubtful { stream: stream.to_owned(), found, last_seq }.into());
        }
        let agrees = if is_another { self.agrees_with_tables(&mut tx, source, &seen).await } else { Ok(true) };
        let is_older = match agrees {
            Ok(true) => false,
            Ok(false) => {
                tx.rollback().await?;
                return Ok(Compared::Moved);
            }
            Err(error) if matches!(error.downcast_ref(), Some(LostHistory::Database { .. })) => true,
            Err(error) => return Err(error),
        };
        // An older database takes over the whole stream: see `recover`.
        let end = if is_older { 0 } else { end };
        let since = if is_another { None } else { changed_after(&mut tx, stream, end).await? };
        if is_another {
            // They are included, or wait for a position of the stream before.
            sqlx::query!("delete from bus.republish where stream = $1", stream).execute(&mut *tx).await?;
        }
        take_position(&mut tx, stream, end, seen.created).await?;
        let reason = format!("the stream {found}, but {last_seq} was confirmed before");
        republish::record(&mut tx, stream, &reason, since, None).await?;
        if !is_another {
            let delay = seen.stream.cached_info().config.duplicate_window + Duration::from_secs(1);
            republish::record(&mut tx, stream, &reason, since, Some(Later { seq: last_seq, delay })).await?;
        }
        tx.commit().await?;
        // Otherwise the database is what is older.
        if !is_older {
            self.meters.is_lost(is_another);
        }
        // Publishing has not worked until now; other relays find out by the position.
        (self.known, self.lost, self.agreed) = (Known::default(), None, None);
        tracing::error!(
            stream,
            since = since.map_or("the beginning".to_owned(), |since| since.to_string()),
            "the broker lost history: {stream} {found}, but {last_seq} was confirmed before. Publishing continues after {end}; the \
             current state of what has changed is republished from the tables"
        );
        Ok(Compared::Moved)
    }

    /// Checks that all events of another stream are as old as the tables, or older. Returns false if there are more to compare.
    async fn agrees_with_tables(
        &mut self,
        tx: &mut Transaction,
        source: &dyn Source,
        seen: &Seen,
    ) -> anyhow::Result<bool> {
        let stream = self.stream;
        let agreed = self.agreed.filter(|(created, _)| *created == seen.created).map_or(0, |(_, agreed)| agreed);
        let mut messages = Messages::after(agreed, seen);
        while let Some(stored) = messages.next(PAGE).await? {
            let ids: Vec<String> = stored.iter().map(|stored| stored.aggregate_id.clone()).collect();
            let current = source.lock(tx, &ids, None).await?;
            let current: HashMap<_, _> = current.iter().map(|row| (row.aggregate_id.as_str(), row)).collect();
            for stored in &stored {
                if let Some(difference) = newer_than(current.get(stored.aggregate_id.as_str()).copied(), stored) {
                    return Err(stored.contradicts(stream, difference, seen.end).into());
                }
            }
        }
        let until = messages.until;
        self.agreed = Some((seen.created, until));
        Ok(until == seen.end)
    }
}

/// Why `stored` cannot be an event of the aggregate whose current snapshot this is, or of an older version.
fn newer_than(current: Option<&Outgoing>, stored: &Stored) -> Option<&'static str> {
    let Some(current) = current else { return Some("the tables do not have it") };
    let is_the_same = current.payload.as_bytes() == stored.payload && current.subject == stored.subject;
    match current.version.cmp(&stored.version) {
        Ordering::Less => Some("the tables have an older version"),
        Ordering::Equal if !is_the_same => Some("the tables have it with other content"),
        Ordering::Equal | Ordering::Greater => None,
    }
}

/// When the stream was created to which the position belongs.
async fn remembered(db: &mut PgConnection, stream: &str) -> sqlx::Result<Option<OffsetDateTime>> {
    sqlx::query_scalar!("select stream_created_at from bus.relay where stream = $1", stream).fetch_one(db).await
}

async fn remember(db: &mut PgConnection, stream: &str, created: OffsetDateTime) -> sqlx::Result<()> {
    sqlx::query!("update bus.relay set stream_created_at = $2 where stream = $1", stream, created).execute(db).await?;
    Ok(())
}

/// A time after which everything was changed that the stream has lost after `end`, if it is known.
async fn changed_after(db: &mut PgConnection, stream: &str, end: u64) -> anyhow::Result<Option<OffsetDateTime>> {
    let changed_after = sqlx::query_scalar!(
        "select max(changed_after) - interval '15 minutes' from bus.checkpoints where stream = $1 and last_seq <= $2",
        stream,
        i64::try_from(end)?,
    );
    Ok(changed_after.fetch_one(db).await?)
}

async fn take_position(db: &mut PgConnection, stream: &str, end: u64, created: OffsetDateTime) -> anyhow::Result<()> {
    let take = sqlx::query!(
        "update bus.relay set last_seq = $2, stream_created_at = $3 where stream = $1",
        stream,
        i64::try_from(end)?,
        created,
    );
    take.execute(db).await?;
    Ok(())
}

/// Records that everything is published at this position. The outbox was empty.
pub(super) async fn checkpoint(db: &mut PgConnection, stream: &str, position: Position) -> anyhow::Result<()> {
    let seq = i64::try_from(position.last_seq)?;
    sqlx::query!("select bus.checkpoint($1, $2)", stream, seq).execute(db).await?;
    Ok(())
}
