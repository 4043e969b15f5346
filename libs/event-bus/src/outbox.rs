//! Writing: a change of a row and the event that announces it, committed together.
//!
//! An event exists from the commit on. What if we die … before the commit: neither row nor event exists. After it, before
//! the relay is woken: another replica, or this one after its restart, finds the row when it next looks.

use crate::trace;
use contracts::Publish;
use sqlx::pool::PoolConnection;
use sqlx::{Executor, PgConnection, PgPool, Postgres};
use std::ops::{Deref, DerefMut};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;
use tokio::time::timeout;

/// An event as `bus.append(stream, subject, aggregate_id, version, payload, traceparent)` takes it.
///
/// For statements that write a row and append its event in one round trip. Append after the row is written: its lock
/// makes the order of the outbox the order of the versions.
#[derive(Debug)]
pub struct Outgoing {
    /// The stream of the event's type.
    pub stream: &'static str,
    /// What happened.
    pub subject: &'static str,
    /// What it happened to.
    pub aggregate_id: String,
    /// The version it announces.
    pub version: i64,
    /// The body, JSON.
    pub payload: String,
    /// The trace context of the work at hand.
    pub traceparent: Option<String>,
}

impl Outgoing {
    /// `event`, ready to be appended.
    pub fn new<E: Publish>(event: &E) -> Self {
        Self {
            stream: E::STREAM,
            subject: event.subject(),
            aggregate_id: event.aggregate_id().to_string(),
            version: event.version(),
            payload: event.encode(),
            traceparent: trace::current(),
        }
    }
}

/// Tells the relays of this process, one for each stream, that something was committed. Clones share everything.
#[derive(Clone, Debug, Default)]
pub(crate) struct Wake(Arc<watch::Sender<u64>>);

impl Wake {
    /// Every relay looks at the outbox once more, also one that is just looking.
    pub(crate) fn all(&self) {
        self.0.send_modify(|commits| *commits = commits.wrapping_add(1));
    }

    /// What one relay waits for.
    pub(crate) fn subscribe(&self) -> watch::Receiver<u64> {
        self.0.subscribe()
    }
}

/// A connection on which every statement commits by itself, so that nothing can stay open whatever is cancelled.
pub struct Connection {
    inner: PoolConnection<Postgres>,
    /// Woken at the end, if events may have been appended.
    wake: Option<Wake>,
    /// Whether a transaction may be open on it.
    open: bool,
}

/// How long to wait for a connection before answering that Postgres is unavailable.
const ACQUIRE: Duration = Duration::from_secs(2);

/// How long a connection that goes back to the pool may take to show that it lives. The pool itself would wait for ever
/// for a peer that died without a word, and lose the place of the connection.
const SIGN_OF_LIFE: Duration = Duration::from_secs(1);

impl Connection {
    pub(crate) async fn acquire(db: &PgPool) -> sqlx::Result<Self> {
        let pool = db.clone();
        let acquire = async move { Ok(Self { inner: pool.acquire().await?, wake: None, open: false }) };
        let acquired = if db.num_idle() == 0 && db.size() < db.options().get_max_connections() {
            // One has to be opened. On a task of its own: whoever gives up waiting must not undo what has been done, or a
            // crowd that finds none open, on a busy machine, would begin anew for ever.
            let opened = timeout(ACQUIRE, tokio::spawn(acquire)).await;
            opened.map(|opened| opened.unwrap_or(Err(sqlx::Error::PoolClosed)))
        } else {
            timeout(ACQUIRE, acquire).await
        };
        acquired.unwrap_or(Err(sqlx::Error::PoolTimedOut))
    }

    pub(crate) fn waking(mut self, relays: &Wake) -> Self {
        self.wake = Some(relays.clone());
        self
    }
}

/// A transaction that carries events.
///
/// Unlike sqlx's own it cannot leave a connection half-open: unless [`commit`](Self::commit) or
/// [`rollback`](Self::rollback) came to its end – be it an error, a panic or a cancelled future – the connection is
/// closed instead of going back to the pool, and the server rolls back.
pub struct Transaction {
    connection: Connection,
    wake: Wake,
}

impl Transaction {
    pub(crate) async fn begin(db: &PgPool, wake: &Wake) -> sqlx::Result<Self> {
        Self::begin_as(db, wake, "begin").await
    }

    /// `begin` is `begin`, and settings for this transaction.
    pub(crate) async fn begin_as(db: &PgPool, wake: &Wake, begin: &'static str) -> sqlx::Result<Self> {
        let mut connection = Connection::acquire(db).await?;
        // Open before the server knows: a cancelled BEGIN may have arrived.
        connection.open = true;
        connection.execute(begin).await?;
        Ok(Self { connection, wake: wake.clone() })
    }

    /// Puts `events` into the outbox, in this order; they are published after the commit.
    ///
    /// # Errors
    /// A second event for the same version of an aggregate violates a unique constraint.
    pub async fn append<'a, E: Publish>(&mut self, events: impl IntoIterator<Item = &'a E>) -> sqlx::Result<()> {
        let events: Vec<_> = events.into_iter().map(Outgoing::new).collect();
        if events.is_empty() {
            return Ok(());
        }
        let subjects: Vec<&str> = events.iter().map(|event| event.subject).collect();
        let aggregates: Vec<&str> = events.iter().map(|event| event.aggregate_id.as_str()).collect();
        let versions: Vec<i64> = events.iter().map(|event| event.version).collect();
        let payloads: Vec<&str> = events.iter().map(|event| event.payload.as_str()).collect();
        sqlx::query!(
            "insert into bus.outbox (stream, subject, aggregate_id, version, payload, traceparent)
             select $1, subject, aggregate_id, version, payload, $2
             from unnest($3::text[], $4::text[], $5::bigint[], $6::text[])
                  with ordinality as events (subject, aggregate_id, version, payload, number)
             order by number",
            E::STREAM,
            trace::current(),
            &subjects as _,
            &aggregates as _,
            &versions,
            &payloads as _,
        )
        .execute(&mut **self)
        .await?;
        Ok(())
    }

    /// Makes rows and events durable and wakes the relay.
    ///
    /// # Errors
    /// A connection lost in here leaves open whether the commit happened: tell nobody that it did.
    pub async fn commit(mut self) -> sqlx::Result<()> {
        self.connection.execute("commit").await?;
        self.connection.open = false;
        self.wake.all();
        Ok(())
    }

    /// Undoes everything and returns the connection to the pool.
    pub async fn rollback(mut self) -> sqlx::Result<()> {
        self.connection.execute("rollback").await?;
        self.connection.open = false;
        Ok(())
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        if self.open {
            self.inner.close_on_drop();
        } else {
            tokio::spawn(timeout(SIGN_OF_LIFE, self.inner.return_to_pool()));
        }
        if let Some(relay) = &self.wake {
            relay.all();
        }
    }
}

impl Deref for Connection {
    type Target = PgConnection;

    fn deref(&self) -> &PgConnection {
        &self.inner
    }
}

impl DerefMut for Connection {
    fn deref_mut(&mut self) -> &mut PgConnection {
        &mut self.inner
    }
}

impl Deref for Transaction {
    type Target = PgConnection;

    fn deref(&self) -> &PgConnection {
        &self.connection
    }
}

impl DerefMut for Transaction {
    fn deref_mut(&mut self) -> &mut PgConnection {
        &mut self.connection
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_commit_wakes_the_relays_of_all_streams() {
        let wake = Wake::default();
        let mut relays = [wake.subscribe(), wake.subscribe()];
        wake.all();
        for relay in &mut relays {
            assert!(relay.has_changed().unwrap_or_default());
            relay.mark_unchanged();
        }
        assert!(!relays[0].has_changed().unwrap_or_default(), "woken twice by one commit");
    }
}
