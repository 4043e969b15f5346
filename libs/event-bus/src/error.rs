//! Errors of the database, and which of them are outages.

use sqlx::postgres::{PgDatabaseError, PgSeverity};
use std::time::Duration;

/// The result of a function that uses Postgres.
pub type Result<T> = std::result::Result<T, Error>;

/// Why a function of the bus failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The tables are not up to date yet. Run [`migrate`](crate::migrate) as the owner, or start a relay, a
    /// subscription or a worker, which migrates them if the role may.
    #[error("the tables are not up to date yet: see what is logged about preparing the database")]
    NotMigrated,
    /// The relays have not compared the database with their streams yet.
    #[error("the database was not compared with its streams yet")]
    NotCompared,
    /// The database is older than its stream, and takes over what it lost. Writes are refused.
    #[error("the database came back older than its stream: {0}")]
    Recovering(String),
    /// No connection became free, or could be opened, in time.
    #[error("no connection to Postgres within {0:?}: it is unreachable, or all connections are busy")]
    NoConnection(Duration),
    /// Postgres did not reply to a statement in time.
    #[error("no answer from Postgres within {0:?}")]
    NoAnswer(Duration),
    /// More items wait than [`Settings::batch_queue`](crate::Settings::batch_queue), or the service stops.
    #[error("too many statements are waiting, or the service stops")]
    Overloaded,
    /// The statement for this and other items was not executed, or whether it was committed is unknown.
    #[error("the statement for this and other items failed: {0}")]
    BatchFailed(String),
    /// The name or the value of a header is not valid. See [`Headers::insert`](crate::Headers::insert).
    #[error(
        "the header {0:?} is not valid: its name has letters, digits and hyphens and is not Nats-…, traceparent or Event-Bus-Appended-At, its \
         value has at most 1000 bytes and no control characters"
    )]
    Header(String),
    /// Postgres, or the connection to it, reports an error.
    #[error(transparent)]
    Postgres(#[from] sqlx::Error),
}

impl Error {
    /// Whether another attempt can succeed: Postgres is unreachable, restarting or overloaded, or the transaction lost
    /// a race. The cause is not the request or the event.
    pub fn is_outage(&self) -> bool {
        match self {
            Self::NotMigrated
            | Self::NotCompared
            | Self::Recovering(_)
            | Self::NoConnection(_)
            | Self::NoAnswer(_)
            | Self::Overloaded
            | Self::BatchFailed(_) => true,
            Self::Header(_) => false,
            Self::Postgres(error) => is_outage_of_postgres(error),
        }
    }
}

/// Whether an outage of Postgres, see [`Error::is_outage`], is among the causes of `error`.
pub fn is_outage(error: &anyhow::Error) -> bool {
    let is_ours = |error: &Error| error.is_outage();
    error.chain().any(|cause| cause.downcast_ref().is_some_and(is_ours))
        || causes_in_postgres(error).any(is_outage_of_postgres)
}

/// Whether Postgres certainly undid the statement, for a reason that concerns this statement alone: it is not an outage, or
/// the statement timed out, waited too long for a lock, or was in a deadlock.
pub(crate) fn is_undone(error: &anyhow::Error) -> bool {
    let gave_up = |state: &str| matches!(state.get(..2), Some("40" | "55")) || state == "57014";
    match causes_in_postgres(error).next() {
        Some(sqlx::Error::Encode(_)) => true,
        Some(error) => is_error(error) && (!is_outage_of_postgres(error) || has_state(error, gave_up)),
        // A panic, or an error of the code around the statement.
        None => !is_outage(error),
    }
}

/// The errors of Postgres among the causes of `error`.
pub(crate) fn causes_in_postgres(error: &anyhow::Error) -> impl Iterator<Item = &sqlx::Error> {
    error.chain().filter_map(|cause| match cause.downcast_ref() {
        Some(Error::Postgres(error)) => Some(error),
        _ => cause.downcast_ref(),
    })
}

/// Whether Postgres cancelled a statement, for example because of its timeout. [`is_outage`] is true for it too.
pub(crate) fn is_statement_timeout(error: &sqlx::Error) -> bool {
    has_state(error, |state| state == "57014")
}

/// Whether a statement has waited too long for a lock. Other rows may be free.
pub(crate) fn is_lock_timeout(error: &sqlx::Error) -> bool {
    has_state(error, |state| state == "55P03")
}

/// The lock for which a statement waited, as Postgres reports it: `while locking tuple (0,1) in relation "…"`.
pub(crate) fn lock_of(error: &sqlx::Error) -> String {
    reported(error).and_then(PgDatabaseError::r#where).unwrap_or("waiting for a lock").replace('\n', "; ")
}

fn is_outage_of_postgres(error: &sqlx::Error) -> bool {
    match error {
        sqlx::Error::Io(_)
        | sqlx::Error::Tls(_)
        | sqlx::Error::Protocol(_)
        | sqlx::Error::PoolTimedOut
        | sqlx::Error::PoolClosed
        | sqlx::Error::WorkerCrashed => true,
        error => has_state(error, is_outage_state),
    }
}

/// The error as Postgres reports it, if it does.
fn reported(error: &sqlx::Error) -> Option<&PgDatabaseError> {
    error.as_database_error().and_then(|error| error.try_downcast_ref())
}

/// Whether Postgres reports an error that ends a statement, and not the session.
fn is_error(error: &sqlx::Error) -> bool {
    reported(error).is_some_and(|error| matches!(error.severity(), PgSeverity::Error))
}

fn has_state(error: &sqlx::Error, wanted: impl FnOnce(&str) -> bool) -> bool {
    matches!(error, sqlx::Error::Database(error) if error.code().is_some_and(|state| wanted(&state)))
}

/// Connection, rollback (deadlock, serialization), resources, object not in the needed state (lock timeout), operator
/// intervention (restart, statement timeout), system error, and a server that became a read-only standby.
fn is_outage_state(sqlstate: &str) -> bool {
    matches!(sqlstate.get(..2), Some("08" | "40" | "53" | "55" | "57" | "58")) || sqlstate == "25006"
}
