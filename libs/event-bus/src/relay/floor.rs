//! The floor: the id up to which the outbox is empty and stays empty. A step reads only above it, and so does not scan
//! the dead rows of published events.
//!
//! Postgres assigns an id before the commit, so a row with a smaller id may appear after a greater id was published. A
//! published id becomes the floor when two conditions hold. First, every transaction that was writing to the outbox
//! when the id was read has ended: such a transaction holds a lock on the table from before it gets an id until its
//! end, and Postgres lists locks. Second, the outbox was read again afterwards, which finds the rows that such a
//! transaction has committed.

use super::outbox::Position;
use super::{Relay, Step, heal, outbox};
use crate::connection::Transaction;
use std::collections::HashSet;
use std::time::Duration;
use tokio::time::Instant;

/// How often the floor may rise. Until then a step scans the rows that were published since.
const PERIOD: Duration = Duration::from_millis(100);

#[derive(Default)]
pub(super) struct Floor {
    proven: i64,
    /// No running transaction can add a row with this id or a smaller one. Such rows may still exist: those of
    /// transactions that ended after the outbox was read.
    ended: i64,
    /// An id up to which all visible rows are published, and the transactions that may still add a smaller one.
    candidate: Option<(i64, HashSet<String>)>,
    looked: Option<Instant>,
}

impl Floor {
    /// No row with this id or a smaller one exists, or can appear.
    pub(super) fn proven(&self) -> i64 {
        self.proven
    }

    /// Whether [`passed`](Self::passed) should be called after this step.
    pub(super) fn is_due(&self) -> bool {
        self.looked.is_none_or(|last| last.elapsed() > PERIOD)
    }

    /// All visible rows up to `id` are published, and their deletion is committed.
    ///
    /// `writers` were writing after `id` was read. The outbox was read after the previous call.
    pub(super) fn passed(&mut self, id: i64, writers: HashSet<String>) {
        self.looked = Some(Instant::now());
        self.proven = self.proven.max(self.ended.min(id));
        if let Some((candidate, before)) = &self.candidate {
            if !before.is_disjoint(&writers) {
                return;
            }
            self.ended = self.ended.max(*candidate);
        }
        if writers.is_empty() {
            self.ended = self.ended.max(id);
        }
        self.candidate = Some((id, writers));
    }
}

/// The transactions that are writing to the outbox, except our own.
pub(super) async fn writers(tx: &mut Transaction) -> sqlx::Result<HashSet<String>> {
    let writers = sqlx::query_scalar!(
        r#"
        select virtualtransaction as "virtualtransaction!" from pg_locks
        where locktype = 'relation' and mode = 'RowExclusiveLock' and granted
          and relation = 'bus.outbox'::regclass
          and database = (select oid from pg_database where datname = current_database())
          and pid is distinct from pg_backend_pid()
        "#
    );
    Ok(writers.fetch_all(&mut **tx).await?.into_iter().collect())
}

/// What a relay without events looks at.
struct Idle {
    /// The next ids are below the floor, as after `truncate … restart identity`, or in a copy of the database without the state of the
    /// sequence.
    is_too_high: bool,
    /// The database is being recovered.
    is_recovering: bool,
}

async fn look(tx: &mut Transaction, floor: i64) -> sqlx::Result<Idle> {
    let looked = sqlx::query_as!(
        Idle,
        r#"select last_value < $1 as "is_too_high!", exists(select from bus.recovery) as "is_recovering!"
           from bus.outbox_id_seq"#,
        floor,
    );
    looked.fetch_one(&mut **tx).await
}

impl Relay<'_> {
    /// No row waits. Checks that the floor is as expected, and writes a checkpoint after each comparison of the stream.
    pub(super) async fn idle(&mut self, mut tx: Transaction, position: Position) -> anyhow::Result<Step> {
        let idle = look(&mut tx, position.floor).await?;
        if idle.is_recovering && self.recovering.is_none() {
            // Another replica has begun a recovery, and may have died.
            self.is_recovering();
        }
        if idle.is_too_high {
            tracing::warn!(stream = self.stream, "the ids of bus.outbox have restarted; reading all rows");
            (self.known.floor, self.known.committed) = (Floor::default(), None);
            outbox::forget_floor(&mut tx, self.stream).await?;
            tx.commit().await?;
            return Ok(Step::More);
        }
        if self.source.is_some() && self.known.checkpoint != self.known.compared {
            self.known.checkpoint = self.known.compared;
            heal::checkpoint(&mut tx, self.stream, position).await?;
            tx.commit().await?;
        } else {
            tx.rollback().await?;
        }
        Ok(Step::Done)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn writers(names: &[&str]) -> HashSet<String> {
        names.iter().map(|&name| name.to_owned()).collect()
    }

    #[test]
    fn an_id_is_the_floor_once_all_older_writers_have_ended() {
        let mut floor = Floor::default();
        floor.passed(10, writers(&["a", "b"]));
        assert_eq!(floor.proven(), 0);
        floor.passed(20, writers(&["b", "c"]));
        assert_eq!(floor.proven(), 0, "b is still writing");
        floor.passed(30, writers(&["c", "d"]));
        assert_eq!(floor.proven(), 0, "a or b may have committed a smaller id after 30 was read");
        floor.passed(40, writers(&["e"]));
        assert_eq!(floor.proven(), 10, "c began after 10 was read");
        floor.passed(50, writers(&[]));
        assert_eq!(floor.proven(), 30);
        floor.passed(60, writers(&[]));
        assert_eq!(floor.proven(), 50, "a transaction may have ended after 60 was read and before the locks were read");
        // Only a row that was committed late remains.
        floor.passed(55, writers(&[]));
        assert_eq!(floor.proven(), 55);
    }
}
