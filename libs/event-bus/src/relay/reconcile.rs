//! Finds out why the stream does not end at the position of the relay.
//!
//! - After the position are events that the outbox has with the same content: a relay died after it published them.
//!   Their rows are deleted.
//! - After it are messages without the id of an event: they are skipped.
//! - After it is an event that the outbox does not have, or has with other content: the database is older than the
//!   stream. It was restored from a backup, or failed over to a standby that lagged. See `recover`.
//!
//! In the last case, versions would be assigned twice. A relay without snapshots publishes nothing until a person has decided. A stream
//! that ends before the position has lost history: see `heal`.

use super::Relay;
use super::outbox::{self, Position};
use super::recover::{self, Taken};
use super::stored::{LostHistory, Messages, PAGE, Seen, Stored};
use crate::connection::Transaction;
use crate::recovery::{self, Mark, Page};
use sqlx::PgConnection;
use std::collections::HashMap;

/// The most bytes of bodies that one transaction compares.
const BYTES: usize = 4 << 20;

impl Relay<'_> {
    /// Reads the messages after `position`, deletes their rows from the outbox, takes over those that it does not have, moves the
    /// position to the last of them, and commits.
    pub(super) async fn reconcile(
        &mut self,
        seen: &Seen,
        mut tx: Transaction,
        position: Position,
        mark: Option<Mark>,
    ) -> anyhow::Result<()> {
        let (stream, from) = (self.stream, position.last_seq);
        let first = seen.stream.cached_info().state.first_sequence;
        // Not one deleted message after the other: there may be millions.
        let (stored, until) = page(from.max(first.saturating_sub(1)).min(seen.end), seen).await?;
        let (mut published, differing) = compare(&mut tx, stream, &stored).await?;
        let taken = match (self.source, differing.first()) {
            (_, None) => Taken::default(),
            (None, Some((stored, difference))) => return Err(stored.contradicts(stream, difference, seen.end).into()),
            (Some(source), Some(_)) => {
                if first > from + 1 {
                    // Until a person has acted, subscriptions move their positions.
                    recovery::keep_reads(&mut tx, &self.duties.subscriptions()).await?;
                    tx.commit().await?;
                    return Err(LostHistory::TooOld { stream: stream.to_owned(), from: from + 1, to: first - 1 }.into());
                }
                let differing: Vec<&Stored> = differing.iter().map(|(stored, _)| *stored).collect();
                recover::take_over(&mut tx, source, stream, &stored, &differing, &published).await?
            }
        };
        let found = published.len();
        let page = Page {
            from_seq: from,
            until_seq: seen.end,
            taken_over: taken.aggregates,
            dropped: taken.dropped.len(),
            newest_at: taken.newest_at,
        };
        if mark.is_some() || page.taken_over > 0 {
            recovery::record(&mut tx, stream, &page, &self.duties.subscriptions()).await?;
        }
        published.extend(taken.dropped);
        published.sort_unstable();
        self.connection = Some(outbox::move_on(tx, stream, position, until, &published).await?);
        match mark {
            Some(mark) => {
                self.is_recovering();
                self.log_progress(&mark, i64::try_from(until)?);
            }
            None if page.taken_over > 0 => {
                self.is_recovering();
                log_begin(stream, &page, seen);
            }
            None => tracing::warn!(stream, from, to = until, found, "caught up with the stream"),
        }
        Ok(())
    }
}

fn log_begin(stream: &str, page: &Page, seen: &Seen) {
    let (from, end, last) = (page.from_seq, page.until_seq, seen.stream.cached_info().state.last_timestamp);
    tracing::error!(
        stream,
        from,
        to = end,
        "the database lost history: it ends at {from} of {stream}, which ends at {end}. It was restored from a backup, or failed over to a \
         standby that lagged. It takes over the events since, the last of which was published at {last}; until that is done, writes are \
         refused. What was committed before the loss and not published by then is lost: usually the last milliseconds"
    );
}

/// The messages after a position that are compared in one transaction, and the position of the last of them.
async fn page(position: u64, seen: &Seen) -> anyhow::Result<(Vec<Stored>, u64)> {
    let (mut stored, mut bytes) = (Vec::new(), 0);
    let mut messages = Messages::after(position, seen);
    while stored.len() < PAGE && bytes < BYTES {
        let Some(next) = messages.next(PAGE - stored.len()).await? else { break };
        bytes += next.iter().map(|stored| stored.payload.len()).sum::<usize>();
        stored.extend(next);
    }
    Ok((stored, messages.until))
}

/// The ids of the outbox rows whose events are in `stored`, and those of `stored` that the outbox does not have with the same content.
pub(super) async fn compare<'a>(
    db: &mut PgConnection,
    stream: &str,
    stored: &'a [Stored],
) -> anyhow::Result<(Vec<i64>, Vec<(&'a Stored, &'static str)>)> {
    let keys: Vec<String> = stored.iter().map(|stored| format!("{stream}.{}", stored.aggregate_id)).collect();
    let versions: Vec<i64> = stored.iter().map(|stored| stored.version).collect();
    let rows = sqlx::query!(
        "select id, aggregate_id, outbox.version, subject, payload
         from unnest($1::text[], $2::bigint[]) as wanted (key, version)
         join bus.outbox on (outbox.stream || '.' || outbox.aggregate_id) = key and outbox.version = wanted.version",
        &keys,
        &versions,
    );
    let rows: HashMap<_, _> =
        rows.fetch_all(db).await?.into_iter().map(|row| ((row.aggregate_id.clone(), row.version), row)).collect();
    let (mut published, mut differing) = (Vec::new(), Vec::new());
    for stored in stored {
        match rows.get(&(stored.aggregate_id.clone(), stored.version)) {
            None => differing.push((stored, "the outbox does not have it")),
            Some(row) if row.payload.as_bytes() != stored.payload || row.subject != stored.subject => {
                differing.push((stored, "the outbox has it with other content"));
            }
            Some(row) => published.push(row.id),
        }
    }
    published.dedup();
    Ok((published, differing))
}
