//! Connections and transactions that are safe to cancel: none returns to the pool inside a transaction.

use crate::error::{Error, Result};
use crate::meters::Connections;
use crate::postgres;
use sqlx::pool::PoolConnection;
use sqlx::postgres::{PgConnectOptions, PgRow};
use sqlx::{AssertSqlSafe, Executor, PgConnection, PgPool, Postgres, RawSql, Row as _};
use std::ops::{Deref, DerefMut};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;
use tokio::time::{Instant, timeout};

/// How long the test of a connection that returns to the pool may take. The pool itself has no limit: it would wait for
/// a dead peer, and never replace that connection.
const SIGN_OF_LIFE: Duration = Duration::from_secs(1);

/// Connections to one database.
#[derive(Clone, Debug)]
pub(crate) struct Pool {
    inner: PgPool,
    /// How long to wait for a connection.
    timeout: Duration,
    meters: Connections,
}

/// What a commit wakes. Clones share everything.
#[derive(Clone, Debug, Default)]
pub(crate) struct Wakes {
    /// One for each stream.
    pub(crate) relays: Wake,
    /// One for each kind of tasks.
    pub(crate) workers: Wake,
}

/// Tells background work of this process that a transaction was committed. Clones share everything.
#[derive(Clone, Debug, Default)]
pub(crate) struct Wake(Arc<watch::Sender<u64>>);

impl Wake {
    /// Wakes all subscribers. One that is reading at the moment will read once more.
    pub(crate) fn all(&self) {
        self.0.send_modify(|commits| *commits = commits.wrapping_add(1));
    }

    /// A receiver that changes with each wake.
    pub(crate) fn subscribe(&self) -> watch::Receiver<u64> {
        self.0.subscribe()
    }
}

/// A connection on which each statement commits by itself, so a cancelled future leaves no transaction open.
pub struct Connection {
    inner: PoolConnection<Postgres>,
    /// Woken when the connection is dropped, if events may have been appended.
    wake: Option<Wake>,
    /// Whether a transaction may be open on it.
    open: bool,
}

impl Pool {
    /// `name` is the one in metrics.
    pub(crate) fn new(name: &'static str, options: PgConnectOptions, connections: u32, timeout: Duration) -> Self {
        Self { inner: postgres::pool(options, connections), timeout, meters: Connections::new(name) }
    }

    /// Sets the gauges of its connections.
    pub(crate) fn observe(&self) {
        let most = self.inner.options().get_max_connections();
        self.meters.are(self.inner.size(), self.inner.num_idle(), most);
    }

    pub(crate) async fn acquire(&self) -> Result<Connection> {
        let begun = Instant::now();
        let acquired = self.acquire_in_time().await;
        match &acquired {
            Ok(_) => self.meters.acquired(begun),
            Err(Error::NoConnection(_)) => self.meters.timed_out(),
            // Postgres has refused, or the pool is closed.
            Err(_) => {}
        }
        acquired
    }

    async fn acquire_in_time(&self) -> Result<Connection> {
        let pool = self.inner.clone();
        let none = Error::NoConnection(self.timeout);
        // Wrapped here: if the caller stops waiting, the connection still returns to the pool with a time limit.
        let acquire = async move { Ok(Connection { inner: pool.acquire().await?, wake: None, open: false }) };
        if self.inner.num_idle() == 0 && self.inner.size() < self.inner.options().get_max_connections() {
            // A connection has to be opened. In a spawned task, so that a timeout does not cancel it: under load,
            // cancelled acquires cause a thundering herd, in which each waiter restarts the connection attempt.
            match timeout(self.timeout, tokio::spawn(acquire)).await {
                Ok(Ok(opened)) => opened,
                // A timeout, or the runtime shuts down.
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
/// If neither [`commit`](Self::commit) nor [`rollback`](Self::rollback) has completed, because of an error, a panic or
/// a cancelled future, the connection is closed instead of returned to the pool, and Postgres rolls back. A transaction
/// of sqlx may return a connection inside an open transaction.
pub struct Transaction {
    connection: Connection,
    wakes: Wakes,
    /// Whether events were appended, other than by the functions of the database.
    appended: bool,
    /// Whether tasks were scheduled in it.
    scheduled: bool,
}

impl Transaction {
    /// `begin` is the statement `begin`, with settings for this transaction.
    pub(crate) async fn begin(mut connection: Connection, wakes: &Wakes, begin: &'static str) -> Result<Self> {
        // Set before the statement is sent: a cancelled BEGIN may have reached the server.
        connection.open = true;
        connection.execute(begin).await?;
        Ok(Self { connection, wakes: wakes.clone(), appended: false, scheduled: false })
    }

    /// Begins, and executes the statement `first` in the same round trip. Returns its rows, with values as text.
    pub(crate) async fn begin_with(
        mut connection: Connection,
        wakes: &Wakes,
        first: &str,
    ) -> Result<(Self, Vec<PgRow>)> {
        connection.open = true;
        let rows = unchecked(format!("begin; {first}")).fetch_all(&mut *connection).await?;
        Ok((Self { connection, wakes: wakes.clone(), appended: false, scheduled: false }, rows))
    }

    /// Makes the commit wake the relays.
    pub(crate) fn wake_relays(&mut self) {
        self.appended = true;
    }

    /// Makes the commit wake the workers that perform tasks.
    pub(crate) fn wake_workers(&mut self) {
        self.scheduled = true;
    }

    /// Commits rows, events and tasks, and wakes the relays and workers that have work now.
    ///
    /// # Errors
    /// A statement of this transaction has failed before, and its error was ignored: nothing is committed.
    /// If the connection is lost here, the outcome of the commit is unknown: do not report success.
    pub async fn commit(mut self) -> Result<()> {
        // In an aborted transaction, Postgres would accept COMMIT alone, and roll back; it refuses any other statement.
        let commit = unchecked("select current_setting('bus.appended', true); commit".to_owned());
        let appended = commit.fetch_all(&mut *self.connection).await?;
        self.connection.open = false;
        let by_function = appended.first().and_then(|row| row.try_get::<Option<&str>, _>(0).ok().flatten());
        if self.appended || by_function == Some("yes") {
            self.wakes.relays.all();
        }
        if self.scheduled {
            self.wakes.workers.all();
        }
        Ok(())
    }

    /// Executes the statement `last`, which appends no event and schedules no task, and commits in the same round trip. Wakes
    /// nothing. Returns the connection.
    pub(crate) async fn commit_with(mut self, last: &str) -> Result<Connection> {
        // After an error of the first one, Postgres does not execute the second one.
        unchecked(format!("{last}; commit")).execute(&mut *self.connection).await?;
        self.connection.open = false;
        Ok(self.connection)
    }

    /// Commits if `work`, the result of this transaction, is `Ok`, and rolls back otherwise. Returns `work`, or the
    /// error of the commit.
    ///
    /// # Errors
    /// See [`commit`](Self::commit).
    pub async fn end<T, E: From<Error>>(self, work: std::result::Result<T, E>) -> std::result::Result<T, E> {
        if work.is_ok() {
            self.commit().await?;
        } else {
            // If the rollback fails, the connection is closed.
            let _ = timeout(SIGN_OF_LIFE, self.rollback()).await;
        }
        work
    }

    /// Rolls back and returns the connection to the pool.
    pub async fn rollback(mut self) -> Result<()> {
        self.connection.execute("rollback").await?;
        self.connection.open = false;
        Ok(())
    }
}

/// Several statements in one round trip.
#[expect(clippy::disallowed_methods, reason = "a prepared statement is a round trip of its own")]
fn unchecked(statements: String) -> RawSql {
    sqlx::raw_sql(AssertSqlSafe(statements))
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
