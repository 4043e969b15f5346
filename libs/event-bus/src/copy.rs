//! A replica of any event, as its service registers it.

use crate::digest::Digest;
use crate::snapshot::Snapshot;
use event_bus_core::DecodeError;
use futures::future::BoxFuture;
use sqlx::PgConnection;
use std::fmt;

/// How many rows are in memory at a time.
const ROWS: usize = 256;

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
    fn filled<'a>(&'a self, db: &'a mut PgConnection) -> BoxFuture<'a, anyhow::Result<()>>;
}

/// The digest of the rows after `after` and up to `until`. Ends early if there are more than `most`.
pub(crate) async fn digest(
    copy: &dyn Copy,
    db: &mut PgConnection,
    after: &str,
    until: Option<&str>,
    most: u64,
) -> anyhow::Result<Digest> {
    let (mut digest, mut after) = (Digest::new(), after.to_owned());
    loop {
        let rows = copy.range(db, &after, until, i64::try_from(ROWS)?).await?;
        for Copied { id, version, content } in &rows {
            digest.add(id, *version, content);
        }
        match rows.last() {
            Some(last) if rows.len() == ROWS && digest.count <= most => after.clone_from(&last.id),
            _ => return Ok(digest),
        }
    }
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
