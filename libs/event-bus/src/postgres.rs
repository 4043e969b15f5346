//! How to connect to Postgres.

use anyhow::Context;
use sqlx::postgres::{PgConnectOptions, PgPoolOptions};
use sqlx::{Connection, PgPool};
use std::time::Duration;

/// Limits after which Postgres ends statements, transactions and connections. A relay that is frozen in its transaction
/// holds the lock of its stream for at most `idle_in_transaction_session_timeout`.
const SESSION: [(&str, &str); 5] = [
    ("statement_timeout", "8s"),
    ("lock_timeout", "5s"),
    ("idle_in_transaction_session_timeout", "10s"),
    ("tcp_user_timeout", "10s"),
    ("tcp_keepalives_idle", "10s"),
];

/// The same as in [`SESSION`].
pub(crate) const IDLE_IN_TRANSACTION: Duration = Duration::from_secs(10);

/// How long opening a connection may take. Longer than any caller waits for one.
pub(crate) const OPEN: Duration = Duration::from_secs(8);

/// A connection that was idle for this long is tested before it is used. Others are not, which saves a round trip.
const TRUSTED: Duration = Duration::from_secs(1);

/// A pool of at most `connections`. Connects on first use, so Postgres may start later.
pub(crate) fn pool(options: PgConnectOptions, connections: u32) -> PgPool {
    PgPoolOptions::new()
        .max_connections(connections)
        .acquire_timeout(OPEN)
        .test_before_acquire(false)
        .before_acquire(|connection, meta| {
            Box::pin(async move { Ok(meta.idle_for < TRUSTED || connection.ping().await.is_ok()) })
        })
        .connect_lazy_with(options)
}

/// The options of connections of `application` to the database at `url`.
pub(crate) fn options(url: &str, application: &str) -> anyhow::Result<PgConnectOptions> {
    let options: PgConnectOptions =
        url.parse().context("database_url must look like postgres://user:password@host:5432/database")?;
    Ok(options.application_name(application).options(SESSION))
}

/// `text` with U+FFFD for NUL, the only character that Postgres does not store.
pub(crate) fn storable(text: &str) -> String {
    text.replace('\0', "\u{fffd}")
}
