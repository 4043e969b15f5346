//! Takes over from the own stream what the tables lost: see `recovery`.
//!
//! The relay has locked the stream. For each page of messages after its position, which the outbox does not have with the same content:
//! lock the rows of their aggregates, then read the events of these aggregates that wait in the outbox. A writer appends while it holds the
//! lock of the row, so no such event is missed. An aggregate has lost history if a message announces a version that the tables have not
//! published: the version of its oldest waiting event, a later one, or, if none waits, a version after that of its row, the same version
//! with other content, or any version if there is no row.
//!
//! What was published stands, because readers have it. So the newest message of such an aggregate is written into the tables, even
//! over a greater version, and the events that wait are deleted: they belong to versions that were assigned twice. At most 100 of a page are logged. A message
//! that is older than what the tables have published changes nothing.

use super::stored::Stored;
use super::{Known, Relay};
use crate::connection::Transaction;
use crate::outbox::Outgoing;
use crate::recovery::{self, Mark};
use crate::republish::Source;
use anyhow::ensure;
use sqlx::PgConnection;
use sqlx::types::time::OffsetDateTime;
use std::cmp::Ordering;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::time::Duration;
use tokio::time::Instant;

/// How often progress is logged.
const REMINDER: Duration = Duration::from_secs(10);
/// How often to look whether the subscriptions are done.
const LOOK: Duration = Duration::from_millis(250);
/// How often to ask the broker for consumers that no subscription of this process has.
const ASK: Duration = Duration::from_secs(10);
/// The most deleted events of a page that are logged one by one.
const NAMED: usize = 100;

/// What this relay knows of a recovery.
#[derive(Clone, Copy)]
pub(super) struct Recovering {
    /// How often to look at stream and mark.
    pub(super) period: Duration,
    logged: Instant,
    /// When the broker was last asked for consumers that this process does not have.
    asked: Option<Instant>,
}

/// What was taken over from a page.
#[derive(Default)]
pub(super) struct Taken {
    pub(super) aggregates: usize,
    /// The ids of deleted outbox rows.
    pub(super) dropped: Vec<i64>,
    pub(super) newest_at: Option<OffsetDateTime>,
}

/// An event that is not published.
struct Waiting {
    id: i64,
    aggregate_id: String,
    version: i64,
}

/// Writes into the tables what they lost. `stored` are the messages of a page, `differing` those that the outbox does not have with the
/// same content, `published` the ids of the outbox rows of the others.
pub(super) async fn take_over(
    tx: &mut Transaction,
    source: &dyn Source,
    stream: &str,
    stored: &[Stored],
    differing: &[&Stored],
    published: &[i64],
) -> anyhow::Result<Taken> {
    let ids: BTreeSet<&str> = differing.iter().map(|stored| stored.aggregate_id.as_str()).collect();
    let ids: Vec<String> = ids.into_iter().map(str::to_owned).collect();
    let current = source.lock(tx, &ids, None).await?;
    let current: HashMap<&str, &Outgoing> = current.iter().map(|row| (row.aggregate_id.as_str(), row)).collect();
    let mut unpublished = unpublished(tx, stream, &ids).await?;
    unpublished.retain(|waiting| !published.contains(&waiting.id));
    let oldest = |id: &str| unpublished.iter().filter(|row| row.aggregate_id == id).map(|row| row.version).min();
    let lost: BTreeSet<&str> = differing
        .iter()
        .filter(|stored| {
            let id = stored.aggregate_id.as_str();
            is_lost(stored, oldest(id), current.get(id).copied())
        })
        .map(|stored| stored.aggregate_id.as_str())
        .collect();
    let newest = newest(stored, &lost);
    if newest.is_empty() {
        return Ok(Taken::default());
    }
    let events: Vec<(&str, &[u8])> =
        newest.iter().map(|stored| (stored.subject.as_str(), &stored.payload[..])).collect();
    let withdrawn = source.take_over(tx, &events).await?;
    let mut others = self::unpublished(tx, stream, &withdrawn).await?;
    others.retain(|waiting| !published.contains(&waiting.id));
    for id in &withdrawn {
        ensure!(
            others.iter().any(|row| row.aggregate_id == *id && row.version == 0),
            "{id} contradicts what was published to {stream}, and was published too"
        );
    }
    unpublished.retain(|row| lost.contains(row.aggregate_id.as_str()));
    unpublished.extend(others);
    for Waiting { aggregate_id, version, .. } in unpublished.iter().take(NAMED) {
        tracing::error!(
            stream,
            event_id = format!("{aggregate_id}-{version}"),
            "a change that was committed after the database came back contradicts what was published before: it is undone"
        );
    }
    Ok(Taken {
        aggregates: newest.len(),
        dropped: unpublished.into_iter().map(|row| row.id).collect(),
        newest_at: newest.iter().map(|stored| stored.published_at).max(),
    })
}

/// Whether this message announces a version that the tables have not published, or published with other content. `oldest` is the
/// oldest version that waits, and `current` the row.
fn is_lost(stored: &Stored, oldest: Option<i64>, current: Option<&Outgoing>) -> bool {
    match (oldest, current) {
        (Some(oldest), _) => stored.version >= oldest,
        (None, None) => true,
        (None, Some(current)) => match stored.version.cmp(&current.version) {
            Ordering::Less => false,
            Ordering::Equal => current.payload.as_bytes() != stored.payload || current.subject != stored.subject,
            Ordering::Greater => true,
        },
    }
}

/// The newest message of each of these aggregates, in the order of the stream.
fn newest<'a>(stored: &'a [Stored], aggregates: &BTreeSet<&str>) -> Vec<&'a Stored> {
    let mut newest: BTreeMap<&str, &Stored> = BTreeMap::new();
    for stored in stored.iter().filter(|stored| aggregates.contains(stored.aggregate_id.as_str())) {
        let known = newest.entry(&stored.aggregate_id).or_insert(stored);
        if known.version < stored.version {
            *known = stored;
        }
    }
    let mut newest: Vec<&Stored> = newest.into_values().collect();
    newest.sort_unstable_by_key(|stored| stored.seq);
    newest
}

/// The events of these aggregates that wait in the outbox.
async fn unpublished(db: &mut PgConnection, stream: &str, ids: &[String]) -> sqlx::Result<Vec<Waiting>> {
    let keys: Vec<String> = ids.iter().map(|id| format!("{stream}.{id}")).collect();
    sqlx::query_as!(
        Waiting,
        "select id, aggregate_id, version from bus.outbox
         where (outbox.stream || '.' || outbox.aggregate_id) = any($1) order by id",
        &keys,
    )
    .fetch_all(db)
    .await
}

impl Relay<'_> {
    /// The mark was seen or inserted: looks at stream and mark with each step.
    pub(super) fn is_recovering(&mut self) {
        let before = self.recovering;
        let logged = before.map_or_else(Instant::now, |recovering| recovering.logged);
        let asked = before.and_then(|recovering| recovering.asked);
        self.recovering = Some(Recovering { period: Duration::ZERO, logged, asked });
    }

    /// The stream ends at the position. Ends the recovery when all subscriptions are done. Returns the transaction if they are not.
    pub(super) async fn conclude(&mut self, mut tx: Transaction, mark: Mark) -> anyhow::Result<Option<Transaction>> {
        let stream = self.stream;
        if !mark.walked {
            recovery::has_walked(&mut tx, stream).await?;
            tx.commit().await?;
            tracing::info!(stream, taken_over = mark.taken_over, "the tables have all that the stream has");
            return Ok(None);
        }
        if mark.reading > 0 {
            self.log_progress(&mark, mark.until_seq);
            self.recovering = self.recovering.map(|recovering| Recovering { period: LOOK, ..recovering });
            if !self.give_up_abandoned(&mut tx).await? {
                return Ok(Some(tx));
            }
            tx.commit().await?;
            return Ok(None);
        }
        if let Some(source) = self.source {
            source.recovered(&mut tx).await?;
        }
        recovery::finish(&mut tx, stream).await?;
        tx.commit().await?;
        (self.recovering, self.known) = (None, Known::default());
        let took: Duration = (mark.now - mark.begun_at).try_into().unwrap_or_default();
        let Mark { from_seq, until_seq, taken_over, dropped, newest_at, .. } = mark;
        tracing::info!(
            stream,
            newest_at = newest_at.map(|newest| newest.to_string()),
            from = from_seq,
            to = until_seq,
            taken_over,
            dropped,
            took = format!("{:.1}s", took.as_secs_f64()),
            "the database is recovered from the stream"
        );
        Ok(None)
    }

    /// Does not wait for consumers that this process does not have, and that do not exist any more. Returns whether there were any.
    ///
    /// A consumer that is created again begins at the start of its stream, and its handler applies everything that is there. What was
    /// trimmed comes from the owner of the stream, if it has one.
    async fn give_up_abandoned(&mut self, db: &mut PgConnection) -> anyhow::Result<bool> {
        let Some(recovering) = &mut self.recovering else { return Ok(false) };
        if recovering.asked.is_some_and(|asked| asked.elapsed() < ASK) {
            return Ok(false);
        }
        recovering.asked = Some(Instant::now());
        let (mine, mut given_up) = (self.duties.subscriptions(), false);
        for (stream, consumer) in recovery::reads(db).await? {
            if mine.contains(&(&*stream, &*consumer)) || !self.broker.is_gone(&stream, &consumer).await {
                continue;
            }
            recovery::end_read(db, &stream, &consumer).await?;
            given_up = true;
            tracing::warn!(
                stream,
                consumer,
                "the consumer {consumer} does not exist any more: the recovery does not wait until its events are applied again. If it is \
                 created again, it begins at the start of {stream}"
            );
        }
        Ok(given_up)
    }

    /// Logs how far a recovery is, every 10 s.
    pub(super) fn log_progress(&mut self, mark: &Mark, reached: i64) {
        let Some(recovering) = &mut self.recovering else { return };
        if recovering.logged.elapsed() < REMINDER {
            return;
        }
        recovering.logged = Instant::now();
        let Mark { from_seq, until_seq, taken_over, reading, .. } = *mark;
        tracing::info!(stream = self.stream, from_seq, reached, until_seq, taken_over, reading, "recovering");
    }
}

#[cfg(test)]
mod tests {
    use super::{Stored, newest};
    use bytes::Bytes;
    use sqlx::types::time::OffsetDateTime;
    use std::collections::BTreeSet;

    fn stored(seq: u64, aggregate_id: &str, version: i64) -> Stored {
        Stored {
            seq,
            event_id: format!("{aggregate_id}-{version}"),
            aggregate_id: aggregate_id.to_owned(),
            version,
            subject: String::new(),
            payload: Bytes::new(),
            published_at: OffsetDateTime::UNIX_EPOCH,
        }
    }

    /// Otherwise an order that was cancelled would be written after the next order of its ticket, and both would hold the ticket.
    #[test]
    fn a_version_that_was_republished_counts_where_it_was_first() {
        let page = [
            stored(1, "a", 0),
            stored(2, "a", 1),
            stored(3, "b", 0),
            stored(4, "a", 1),
            stored(5, "c", 0),
            stored(6, "a", 0),
        ];
        let newest = newest(&page, &BTreeSet::from(["a", "b"]));
        assert_eq!(newest.iter().map(|stored| stored.seq).collect::<Vec<_>>(), [2, 3]);
    }
}
