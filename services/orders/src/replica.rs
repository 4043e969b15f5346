//! The replica of tickets in Postgres. It is written only from events and replies of the tickets service.

use contracts::ticket::TicketSnapshot;
use rust_decimal::Decimal;
use sqlx::PgConnection;
use std::collections::BTreeMap;

/// Writes those of `tickets` that are newer than the replica, in any order and number.
pub async fn update<'a>(db: &mut PgConnection, tickets: impl Iterator<Item = &'a TicketSnapshot>) -> sqlx::Result<()> {
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
    sqlx::query!(
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
    )
    .execute(db)
    .await?;
    Ok(())
}
