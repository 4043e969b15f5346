//! The current orders, as the events that announced their versions; and back from these events into the table.

use super::Row;
use crate::order::Order;
use contracts::OrderEvent;
use contracts::order::{OrderSnapshot, OrderStatus};
use event_bus::{Outgoing, Snapshots};
use rust_decimal::Decimal;
use sqlx::PgConnection;
use sqlx::types::time::OffsetDateTime;

/// Publishes orders again, if the broker lost events; takes them over, if the database did.
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

    /// Writes orders as they were published. The title is that of the ticket now: events do not carry it.
    ///
    /// An order that was made after the database came back, and is not published, is deleted if it has the reservation number of a
    /// published order, or if a published order holds its ticket: its events could release that ticket. A payment of it is applied
    /// again, and becomes a dead letter, because its order does not exist.
    async fn take_over(&self, db: &mut PgConnection, events: &[OrderEvent]) -> anyhow::Result<Vec<String>> {
        let orders: Vec<&OrderSnapshot> = events.iter().map(OrderEvent::snapshot).collect();
        let ids: Vec<String> = orders.iter().map(|order| order.id.to_string()).collect();
        let statuses: Vec<&str> = orders.iter().map(|order| order.status.as_str()).collect();
        let tickets: Vec<String> = orders.iter().map(|order| order.ticket.id.to_string()).collect();
        let reservations: Vec<i64> = orders.iter().map(|order| order.ticket.reservation).collect();
        let withdrawn = sqlx::query_scalar!(
            r#"select id as "id!" from withdraw_orders($1, $2, $3, $4) as id"#,
            &ids,
            &tickets,
            &statuses as _,
            &reservations,
        );
        let withdrawn = withdrawn.fetch_all(&mut *db).await?;
        write(db, &orders, &ids, &statuses, &tickets, &reservations).await?;
        let is_cancelled = |order: &&&OrderSnapshot| order.status == OrderStatus::Cancelled;
        let cancelled: Vec<String> = orders.iter().filter(is_cancelled).map(|order| order.id.to_string()).collect();
        // A payment may have completed an order that was cancelled before.
        sqlx::query!("update payments set refund_due = true where order_id = any($1) and not refund_due", &cancelled)
            .execute(db)
            .await?;
        Ok(withdrawn)
    }

    async fn recovered(&self, db: &mut PgConnection) -> anyhow::Result<()> {
        Ok(fill_in_titles(db).await?)
    }
}

/// Fills in the titles of orders that were taken over from the stream before their tickets were in the replica.
pub async fn fill_in_titles(db: &mut PgConnection) -> sqlx::Result<()> {
    let titles = sqlx::query!(
        "update orders set title = ticket.title from ticket_replica as ticket
         where ticket.id = orders.ticket_id and orders.title = ''"
    );
    titles.execute(db).await?;
    Ok(())
}

/// Overwrites these orders, in the order of the stream: an order of a ticket is cancelled before the next one of that ticket is written.
async fn write(
    db: &mut PgConnection,
    orders: &[&OrderSnapshot],
    ids: &[String],
    statuses: &[&str],
    tickets: &[String],
    reservations: &[i64],
) -> sqlx::Result<()> {
    let users: Vec<&str> = orders.iter().map(|order| order.user_id.as_str()).collect();
    let expiries: Vec<OffsetDateTime> = orders.iter().map(|order| order.expires_at.0).collect();
    let prices: Vec<Decimal> = orders.iter().map(|order| order.ticket.price.amount()).collect();
    let ticket_versions: Vec<i64> = orders.iter().map(|order| order.ticket.version).collect();
    let versions: Vec<i64> = orders.iter().map(|order| order.version).collect();
    sqlx::query!(
        "insert into orders
             (id, user_id, status, expires_at, ticket_id, title, price, ticket_version, reservation, version)
         select new.id, new.user_id, new.status, new.expires_at, new.ticket_id, coalesce(ticket.title, ''), new.price,
                new.ticket_version, new.reservation, new.version
         from unnest($1::text[], $2::text[], $3::text[], $4::timestamptz[], $5::text[], $6::numeric[], $7::bigint[],
                     $8::bigint[], $9::bigint[])
              with ordinality
              as new (id, user_id, status, expires_at, ticket_id, price, ticket_version, reservation, version, position)
         left join ticket_replica as ticket on ticket.id = new.ticket_id
         order by new.status <> 'cancelled', position
         on conflict (id) do update
         set status = excluded.status, version = excluded.version, updated_at = now()",
        ids,
        &users as _,
        statuses as _,
        &expiries,
        tickets,
        &prices,
        &ticket_versions,
        reservations,
        &versions,
    )
    .execute(db)
    .await?;
    Ok(())
}

fn announcements(rows: Vec<Row>) -> anyhow::Result<Vec<Outgoing>> {
    rows.into_iter().map(|row| Ok(Outgoing::new(&Order::try_from(row)?.announcement()))).collect()
}
