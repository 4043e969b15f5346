//! How to connect to Postgres.

use anyhow::Context;
use sqlx::postgres::{PgConnectOptions, PgPoolOptions};
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

/// The same as in [`SESSION`].
pub(crate) const IDLE_IN_TRANSACTION: Duration = Duration::from_secs(10);

/// How long opening a connection may take, longer than anybody waits for it.
pub(crate) const OPEN: Duration = Duration::from_secs(8);

/// A connection that has rested this long is tried out before it is used; a busy one is not, which saves a round trip.
const TRUSTED: Duration = Duration::from_secs(1);

/// A pool of at most `connections`. Connects when first used, so Postgres may come up later.
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

/// How `application` connects to the database at `url`.
pub(crate) fn options(url: &str, application: &str) -> anyhow::Result<PgConnectOptions> {
    let options: PgConnectOptions =
        url.parse().context("database_url must look like postgres://user:password@host:5432/database")?;
    Ok(options.application_name(application).options(SESSION))
}

/// `text` without NUL, the one character that Postgres does not store.
pub(crate) fn storable(text: &str) -> String {
    text.replace('\0', "\u{fffd}")
}
