//! Connections and transactions that a cancelled future cannot leave half-done.

use crate::error::{Error, Result};
use crate::postgres;
use sqlx::pool::PoolConnection;
use sqlx::postgres::PgConnectOptions;
use sqlx::{Executor, PgConnection, PgPool, Postgres};
use std::ops::{Deref, DerefMut};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;
use tokio::time::timeout;

/// How long a connection that goes back to the pool may take to show that it lives. The pool itself waits
/// for ever for a peer that died, and never opens another connection in its place.
const SIGN_OF_LIFE: Duration = Duration::from_secs(1);

/// Connections to one database.
#[derive(Clone, Debug)]
pub(crate) struct Pool {
    inner: PgPool,
    /// How long to wait for a connection.
    timeout: Duration,
}

/// What a commit wakes. Clones share everything.
#[derive(Clone, Debug, Default)]
pub(crate) struct Wakes {
    /// One for each stream.
    pub(crate) relays: Wake,
    /// One for each kind of tasks.
    pub(crate) workers: Wake,
}

/// Tells background tasks of this process that something was committed. Clones share everything.
#[derive(Clone, Debug, Default)]
pub(crate) struct Wake(Arc<watch::Sender<u64>>);

impl Wake {
    /// Each of them looks once more, also one that is just looking.
    pub(crate) fn all(&self) {
        self.0.send_modify(|commits| *commits = commits.wrapping_add(1));
    }

    /// What one of them waits for.
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

impl Pool {
    pub(crate) fn new(options: PgConnectOptions, connections: u32, timeout: Duration) -> Self {
        Self { inner: postgres::pool(options, connections), timeout }
    }

    pub(crate) async fn acquire(&self) -> Result<Connection> {
        let pool = self.inner.clone();
        let none = Error::NoConnection(self.timeout);
        // The guard is made here: without it, a connection that nobody waits for any more would go back without a limit.
        let acquire = async move { Ok(Connection { inner: pool.acquire().await?, wake: None, open: false }) };
        if self.inner.num_idle() == 0 && self.inner.size() < self.inner.options().get_max_connections() {
            // One has to be opened. On a task of its own, so that giving up does not cancel it: under load, cancelled
            // attempts cause a thundering herd, in which every waiter restarts the connection attempt.
            match timeout(self.timeout, tokio::spawn(acquire)).await {
                Ok(Ok(opened)) => opened,
                // The second: the process ends.
                Err(_) | Ok(Err(_)) => Err(none),
            }
        } else {
            timeout(self.timeout, acquire).await.unwrap_or(Err(none))
        }
    }

    pub(crate) async fn close(&self) {
        self.inner.close().await;
    }
}

impl Connection {
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
    wakes: Wakes,
    /// Whether tasks were scheduled in it.
    scheduled: bool,
}

impl Transaction {
    /// `begin` is `begin`, and settings for this transaction.
    pub(crate) async fn begin(mut connection: Connection, wakes: &Wakes, begin: &'static str) -> Result<Self> {
        // Open before the server knows: a cancelled BEGIN may have arrived.
        connection.open = true;
        connection.execute(begin).await?;
        Ok(Self { connection, wakes: wakes.clone(), scheduled: false })
    }

    /// The commit wakes the workers that perform tasks.
    pub(crate) fn wake_workers(&mut self) {
        self.scheduled = true;
    }

    /// Makes rows, events and tasks durable, and wakes what publishes and performs them.
    ///
    /// # Errors
    /// If the connection is lost here, the outcome of the commit is unknown: do not report success.
    pub async fn commit(mut self) -> Result<()> {
        self.connection.execute("commit").await?;
        self.connection.open = false;
        self.wakes.relays.all();
        if self.scheduled {
            self.wakes.workers.all();
        }
        Ok(())
    }

    /// Commits if `work`, done in this transaction, has succeeded, and rolls back if it has failed. Returns its outcome, or
    /// why it was not committed.
    ///
    /// # Errors
    /// See [`commit`](Self::commit).
    pub async fn end<T, E: From<Error>>(self, work: std::result::Result<T, E>) -> std::result::Result<T, E> {
        if work.is_ok() {
            self.commit().await?;
        } else {
            // If the server is away, the connection is closed.
            let _ = timeout(SIGN_OF_LIFE, self.rollback()).await;
        }
        work
    }

    /// Undoes everything and returns the connection to the pool.
    pub async fn rollback(mut self) -> Result<()> {
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
