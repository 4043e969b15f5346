//! A replica of any event, as its service registers it.

use crate::snapshot::Snapshot;
use event_bus_core::DecodeError;
use futures::future::BoxFuture;
use sqlx::PgConnection;
use std::fmt;

/// A row of a replica.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Copied {
    /// The aggregate.
    pub id: String,
    /// Its version.
    pub version: i64,
    /// See [`Replica::content`](crate::Replica::content).
    pub content: String,
}

/// A [`Replica`](crate::Replica) of any event.
pub(crate) trait Copy: Send + Sync {
    fn stream(&self) -> &'static str;
    /// The row to which a snapshot leads.
    fn copied(&self, snapshot: &Snapshot) -> Result<Copied, DecodeError>;
    fn range<'a>(
        &'a self,
        db: &'a mut PgConnection,
        after: &'a str,
        until: Option<&'a str>,
        limit: i64,
    ) -> BoxFuture<'a, anyhow::Result<Vec<Copied>>>;
    fn find<'a>(&'a self, db: &'a mut PgConnection, ids: &'a [String]) -> BoxFuture<'a, anyhow::Result<Vec<Copied>>>;
    fn remove<'a>(
        &'a self,
        db: &'a mut PgConnection,
        ids: &'a [String],
        versions: &'a [i64],
    ) -> BoxFuture<'a, anyhow::Result<()>>;
}

/// A replica of a service, and the durable consumer that keeps it.
pub(crate) struct Registered {
    pub(crate) consumer: &'static str,
    pub(crate) copy: Box<dyn Copy>,
}

impl fmt::Debug for Registered {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} as {}", self.copy.stream(), self.consumer)
    }
}
