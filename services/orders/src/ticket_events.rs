//! Applies the events of tickets: they update the replica.

use crate::meters::meters;
use crate::{replica, store};
use contracts::TicketEvent;
use event_bus::{Copied, Handler, Publish, Received, Replica, Transaction};
use sqlx::PgConnection;

/// Keeps `ticket_replica`.
pub struct TicketEvents;

impl Handler for TicketEvents {
    type Event = TicketEvent;

    async fn apply(&self, tx: &mut Transaction, events: &[Received<TicketEvent>]) -> anyhow::Result<()> {
        let stale = replica::update(tx, events.iter().map(|event| event.snapshot())).await?;
        meters().stale.increment(stale);
        Ok(())
    }
}

impl Replica for TicketEvents {
    fn content(event: &TicketEvent) -> String {
        // All of the event is kept.
        event.encode()
    }

    async fn range(
        &self,
        db: &mut PgConnection,
        after: &str,
        until: Option<&str>,
        limit: i64,
    ) -> anyhow::Result<Vec<Copied>> {
        replica::range(db, after, until, limit).await
    }

    async fn find(&self, db: &mut PgConnection, ids: &[String]) -> anyhow::Result<Vec<Copied>> {
        replica::find(db, ids).await
    }

    async fn remove(&self, db: &mut PgConnection, ids: &[String], versions: &[i64]) -> anyhow::Result<()> {
        Ok(replica::remove(db, ids, versions).await?)
    }

    async fn filled(&self, db: &mut PgConnection) -> anyhow::Result<()> {
        Ok(store::fill_in_titles(db).await?)
    }
}
