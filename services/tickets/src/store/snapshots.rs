//! The current tickets, as the events that announced their versions; and back from these events into the table.

use super::{Row, find};
use crate::ticket::Ticket;
use contracts::ticket::TicketSnapshot;
use contracts::{Id, TicketEvent};
use event_bus::{Outgoing, Snapshots};
use rust_decimal::Decimal;
use sqlx::PgConnection;
use sqlx::types::time::OffsetDateTime;

/// Publishes tickets again, if the broker lost events; takes them over, if the database did.
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
        // No ticket has a malformed id. A replica may.
        let ids: Vec<Id> = ids.iter().filter_map(|id| id.parse().ok()).collect();
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

    /// Writes tickets as they were published. The fencing token stays: events do not carry it, and the events of orders, which are applied
    /// again, restore it.
    async fn take_over(&self, db: &mut PgConnection, events: &[TicketEvent]) -> anyhow::Result<Vec<String>> {
        let tickets: Vec<&TicketSnapshot> = events.iter().map(TicketEvent::snapshot).collect();
        let ids: Vec<String> = tickets.iter().map(|ticket| ticket.id.to_string()).collect();
        let titles: Vec<&str> = tickets.iter().map(|ticket| ticket.title.as_str()).collect();
        let prices: Vec<Decimal> = tickets.iter().map(|ticket| ticket.price.amount()).collect();
        let users: Vec<&str> = tickets.iter().map(|ticket| ticket.user_id.as_str()).collect();
        let versions: Vec<i64> = tickets.iter().map(|ticket| ticket.version).collect();
        let orders: Vec<Option<String>> =
            tickets.iter().map(|ticket| ticket.order_id.map(|id| id.to_string())).collect();
        sqlx::query!(
            "insert into tickets (id, title, price, user_id, version, order_id)
             select id, title, price, user_id, version, order_id
             from unnest($1::text[], $2::text[], $3::numeric[], $4::text[], $5::bigint[], $6::text[]) with ordinality
                  as new (id, title, price, user_id, version, order_id, position)
             order by position
             on conflict (id) do update
             set title = excluded.title, price = excluded.price, user_id = excluded.user_id, version = excluded.version,
                 order_id = excluded.order_id, updated_at = now()",
            &ids,
            &titles as _,
            &prices,
            &users as _,
            &versions,
            &orders as _,
        )
        .execute(db)
        .await?;
        Ok(Vec::new())
    }
}
