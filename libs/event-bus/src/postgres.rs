//! Pools, their timeouts, and which errors mean that Postgres is out of reach rather than that we asked nonsense.

use anyhow::Context;
use sqlx::postgres::{PgConnectOptions, PgDatabaseError, PgPoolOptions};
use sqlx::{Connection, PgPool};
use std::time::Duration;

/// Settings that make the server end what we forgot or lost. A relay that is frozen in its transaction holds the lock
/// of its stream for `idle_in_transaction_session_timeout` at most.
const SESSION: [(&str, &str); 5] = [
    ("statement_timeout", "8s"),
    ("lock_timeout", "5s"),
    ("idle_in_transaction_session_timeout", "10s"),
    ("tcp_user_timeout", "10s"),
    ("tcp_keepalives_idle", "10s"),
];

/// How long opening a connection may take, longer than anybody waits for it.
pub(crate) const OPEN: Duration = Duration::from_secs(8);

/// A connection that has rested this long is tried out before it is used; a busy one is not, which saves a round trip.
const TRUSTED: Duration = Duration::from_secs(1);

/// A pool of at most `connections` to the database at `url`. Connects when first used, so Postgres may come up later.
pub fn pool(url: &str, application: &str, connections: u32) -> anyhow::Result<PgPool> {
    let options = options(url, application)?;
    Ok(PgPoolOptions::new()
        .max_connections(connections)
        .acquire_timeout(OPEN)
        .test_before_acquire(false)
        .before_acquire(|connection, meta| {
            Box::pin(async move { Ok(meta.idle_for < TRUSTED || connection.ping().await.is_ok()) })
        })
        .connect_lazy_with(options))
}

/// How `application` connects to the database at `url`.
pub(crate) fn options(url: &str, application: &str) -> anyhow::Result<PgConnectOptions> {
    let options: PgConnectOptions =
        url.parse().context("DATABASE_URL must look like postgres://user:password@host:5432/database")?;
    Ok(options.application_name(application).options(SESSION))
}

/// Whether `error` says that Postgres is unreachable, restarting or overloaded, or that the transaction lost a race it
/// may win next time. Nothing is wrong with the request or the event then, and trying again later can help.
pub fn is_outage(error: &sqlx::Error) -> bool {
    match error {
        sqlx::Error::Io(_)
        | sqlx::Error::Tls(_)
        | sqlx::Error::Protocol(_)
        | sqlx::Error::PoolTimedOut
        | sqlx::Error::PoolClosed
        | sqlx::Error::WorkerCrashed => true,
        sqlx::Error::Database(error) => error.code().is_some_and(|code| is_outage_state(&code)),
        _ => false,
    }
}

/// Whether Postgres gave up on a statement that took longer than it may. An outage as well, to whoever waits.
pub(crate) fn is_statement_timeout(error: &sqlx::Error) -> bool {
    matches!(error, sqlx::Error::Database(error) if error.code().as_deref() == Some("57014"))
}

/// Whether a statement has waited too long for a lock: another transaction has *this row*. Other rows may be free.
pub(crate) fn is_lock_timeout(error: &sqlx::Error) -> bool {
    matches!(error, sqlx::Error::Database(error) if error.code().as_deref() == Some("55P03"))
}

/// Which lock a statement was waiting for, in the words of Postgres: `while locking tuple (0,1) in relation "tickets"`.
pub(crate) fn lock_of(error: &sqlx::Error) -> String {
    let error = error.as_database_error().and_then(|error| error.try_downcast_ref::<PgDatabaseError>());
    error.and_then(PgDatabaseError::r#where).unwrap_or("waiting for a lock").replace('\n', "; ")
}

/// Connection, rollback (deadlock, serialization), resources, object not in the needed state (lock timeout), operator
/// intervention (restart, statement timeout), system error, and a server that became a read-only standby.
fn is_outage_state(sqlstate: &str) -> bool {
    matches!(sqlstate.get(..2), Some("08" | "40" | "53" | "55" | "57" | "58")) || sqlstate == "25006"
}
