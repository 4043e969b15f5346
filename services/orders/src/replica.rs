//! The replica of tickets in Postgres. It is written only from events and replies of the tickets service.

use contracts::ticket::TicketSnapshot;
use event_bus::{Copied, encode_json};
use rust_decimal::Decimal;
use sqlx::PgConnection;
use std::collections::BTreeMap;

/// Writes those of `tickets` that are newer than the replica, in any order and number. Returns how many tickets were not newer.
pub async fn update<'a>(db: &mut PgConnection, tickets: impl Iterator<Item = &'a TicketSnapshot>) -> sqlx::Result<u64> {
    // Sorted, so that replicas lock rows in the same order; each ticket once, since one statement cannot change a row
    // twice.
    let mut newest = BTreeMap::new();
    for ticket in tickets {
        let known = newest.entry(ticket.id).or_insert(ticket);
        if known.version < ticket.version {
            *known = ticket;
        }
    }
    let ids: Vec<String> = newest.keys().map(ToString::to_string).collect();
    let titles: Vec<&str> = newest.values().map(|ticket| ticket.title.as_str()).collect();
    let prices: Vec<Decimal> = newest.values().map(|ticket| ticket.price.amount()).collect();
    let users: Vec<&str> = newest.values().map(|ticket| ticket.user_id.as_str()).collect();
    let versions: Vec<i64> = newest.values().map(|ticket| ticket.version).collect();
    let orders: Vec<Option<String>> = newest.values().map(|ticket| ticket.order_id.map(|id| id.to_string())).collect();
    let updated = sqlx::query!(
        "insert into ticket_replica as mine (id, title, price, user_id, version, order_id)
         select * from unnest($1::text[], $2::text[], $3::numeric[], $4::text[], $5::bigint[], $6::text[])
         on conflict (id) do update
         set title = excluded.title, price = excluded.price, user_id = excluded.user_id, version = excluded.version,
             order_id = excluded.order_id
         where mine.version < excluded.version",
        &ids,
        &titles as _,
        &prices,
        &users as _,
        &versions,
        &orders as _,
    );
    let updated = updated.execute(db).await?.rows_affected();
    Ok((ids.len() as u64).saturating_sub(updated))
}

struct Row {
    id: String,
    title: String,
    price: Decimal,
    user_id: String,
    version: i64,
    order_id: Option<String>,
}

impl From<Row> for Copied {
    /// A row that no event can have written, such as one with a malformed id, equals no ticket.
    fn from(row: Row) -> Self {
        let (id, version) = (row.id.clone(), row.version);
        let content = ticket(row).map_or_else(|error| format!("{error:#}"), |ticket| encode_json(&ticket));
        Self { id, version, content }
    }
}

fn ticket(row: Row) -> anyhow::Result<TicketSnapshot> {
    let Row { id, title, price, user_id, version, order_id } = row;
    let order_id = order_id.map(|id| id.parse()).transpose()?;
    Ok(TicketSnapshot { id: id.parse()?, version, title, price: price.try_into()?, user_id, order_id })
}

/// The first `limit` tickets after `after`, up to `until`.
pub async fn range(db: &mut PgConnection, after: &str, until: Option<&str>, limit: i64) -> anyhow::Result<Vec<Copied>> {
    let rows = sqlx::query_as!(
        Row,
        "select id, title, price, user_id, version, order_id from ticket_replica
         where id > $1 and ($2::text is null or id <= $2) order by id limit $3",
        after,
        until,
        limit,
    );
    Ok(rows.fetch_all(db).await?.into_iter().map(Into::into).collect())
}

/// Those of the tickets `ids` that are known.
pub async fn find(db: &mut PgConnection, ids: &[String]) -> anyhow::Result<Vec<Copied>> {
    let rows = sqlx::query_as!(
        Row,
        "select id, title, price, user_id, version, order_id from ticket_replica where id = any($1)",
        ids,
    );
    Ok(rows.fetch_all(db).await?.into_iter().map(Into::into).collect())
}

/// Deletes the tickets `ids` that still have these versions.
pub async fn remove(db: &mut PgConnection, ids: &[String], versions: &[i64]) -> sqlx::Result<()> {
    let remove = sqlx::query!(
        "delete from ticket_replica using unnest($1::text[], $2::bigint[]) as wrong (id, version)
         where ticket_replica.id = wrong.id and ticket_replica.version = wrong.version",
        ids,
        versions,
    );
    remove.execute(db).await?;
    Ok(())
}
