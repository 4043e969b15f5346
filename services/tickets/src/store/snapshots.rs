//! The current tickets, as the events that announced their versions.

use super::{Row, find};
use crate::ticket::Ticket;
use contracts::{Id, TicketEvent};
use event_bus::{Outgoing, Snapshots};
use sqlx::PgConnection;
use sqlx::types::time::OffsetDateTime;

/// Publishes tickets again, if the broker lost events.
pub struct TicketSnapshots;

impl Snapshots for TicketSnapshots {
    type Event = TicketEvent;

    async fn extent(&self, db: &mut PgConnection) -> anyhow::Result<(i64, String)> {
        // An estimate: counting a large table takes longer than a statement may. Without statistics, as after a restore, from the size of
        // the first rows.
        let extent = sqlx::query!(
            r#"
            select case when reltuples > 0 then reltuples::bigint else coalesce((
                       select (pg_relation_size('tickets') / (28 + avg(pg_column_size(first.*))))::bigint
                       from (select * from tickets limit 100) as first
                   ), 0) end as "count!",
                   coalesce((select max(id) from tickets), '') as "last!"
            from pg_class where oid = 'tickets'::regclass
            "#
        );
        let extent = extent.fetch_one(db).await?;
        Ok((extent.count, extent.last))
    }

    async fn ids(&self, db: &mut PgConnection, after: &str, limit: i64) -> anyhow::Result<Vec<String>> {
        let ids = sqlx::query_scalar!("select id from tickets where id > $1 order by id limit $2", after, limit);
        Ok(ids.fetch_all(db).await?)
    }

    async fn find(&self, db: &mut PgConnection, ids: &[String]) -> anyhow::Result<Vec<Outgoing>> {
        let ids = ids.iter().map(|id| id.parse()).collect::<Result<Vec<Id>, _>>()?;
        Ok(find(db, &ids).await?.values().map(|ticket| Outgoing::new(&ticket.announcement())).collect())
    }

    async fn lock(
        &self,
        db: &mut PgConnection,
        ids: &[String],
        since: Option<OffsetDateTime>,
    ) -> anyhow::Result<Vec<Outgoing>> {
        let rows = sqlx::query_as!(
            Row,
            // In order, so that replicas lock rows in the same order.
            "select id, title, price, user_id, version, order_id, reservation, order_version from tickets
             where id = any($1) and updated_at >= coalesce($2, timestamptz '-infinity')
             order by id for no key update",
            ids,
            since,
        );
        rows.fetch_all(db)
            .await?
            .into_iter()
            .map(|row| Ok(Outgoing::new(&Ticket::try_from(row)?.announcement())))
            .collect()
    }
}
