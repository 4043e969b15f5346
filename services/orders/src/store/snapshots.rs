//! The current orders, as the events that announced their versions.

use super::Row;
use crate::order::Order;
use contracts::OrderEvent;
use event_bus::{Outgoing, Snapshots};
use sqlx::PgConnection;
use sqlx::types::time::OffsetDateTime;

/// Publishes orders again, if the broker lost events.
pub struct OrderSnapshots;

impl Snapshots for OrderSnapshots {
    type Event = OrderEvent;

    async fn extent(&self, db: &mut PgConnection) -> anyhow::Result<(i64, String)> {
        // An estimate: counting a large table takes longer than a statement may. Without statistics, as after a restore, from the size of
        // the first rows.
        let extent = sqlx::query!(
            r#"
            select case when reltuples > 0 then reltuples::bigint else coalesce((
                       select (pg_relation_size('orders') / (28 + avg(pg_column_size(first.*))))::bigint
                       from (select * from orders limit 100) as first
                   ), 0) end as "count!",
                   coalesce((select max(id) from orders), '') as "last!"
            from pg_class where oid = 'orders'::regclass
            "#
        );
        let extent = extent.fetch_one(db).await?;
        Ok((extent.count, extent.last))
    }

    async fn ids(&self, db: &mut PgConnection, after: &str, limit: i64) -> anyhow::Result<Vec<String>> {
        let ids = sqlx::query_scalar!("select id from orders where id > $1 order by id limit $2", after, limit);
        Ok(ids.fetch_all(db).await?)
    }

    async fn find(&self, db: &mut PgConnection, ids: &[String]) -> anyhow::Result<Vec<Outgoing>> {
        let rows = sqlx::query_as!(
            Row,
            "select id, user_id, status, expires_at, ticket_id, title, price, ticket_version, reservation, version
             from orders where id = any($1)",
            ids,
        );
        announcements(rows.fetch_all(db).await?)
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
            "select id, user_id, status, expires_at, ticket_id, title, price, ticket_version, reservation, version
             from orders where id = any($1) and updated_at >= coalesce($2, timestamptz '-infinity')
             order by id for no key update",
            ids,
            since,
        );
        announcements(rows.fetch_all(db).await?)
    }
}

fn announcements(rows: Vec<Row>) -> anyhow::Result<Vec<Outgoing>> {
    rows.into_iter().map(|row| Ok(Outgoing::new(&Order::try_from(row)?.announcement()))).collect()
}
