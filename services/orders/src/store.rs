//! Orders and payments in Postgres. Only this module writes orders; the statement that writes a new version of a row also
//! appends its event.

mod expired;
mod offers;
mod snapshots;

pub use expired::{first_expiry, lock_expired, seconds_since};
pub use offers::FindOffers;
pub use snapshots::{OrderSnapshots, fill_in_titles};

use crate::order::{Order, Ticket};
use anyhow::{Context, ensure};
use bootstrap::list::{Part, Rows};
use contracts::neighbours::Payment;
use contracts::{Id, OrderEvent, Timestamp};
use event_bus::{Columns, Event, Outgoing, Publish, Statement, trace};
use futures::TryStreamExt as _;
use rust_decimal::Decimal;
use sqlx::PgConnection;
use sqlx::types::time::OffsetDateTime;
use std::collections::{BTreeMap, HashSet};

struct Row {
    id: String,
    user_id: String,
    status: String,
    expires_at: OffsetDateTime,
    ticket_id: String,
    title: String,
    price: Decimal,
    ticket_version: i64,
    reservation: i64,
    version: i64,
}

impl TryFrom<Row> for Order {
    type Error = anyhow::Error;

    fn try_from(row: Row) -> anyhow::Result<Self> {
        let Row { id, user_id, status, expires_at, ticket_id, title, price, ticket_version, reservation, version } =
            row;
        Ok(Self {
            id: id.parse().context("the table holds a malformed id")?,
            user_id,
            status: status.parse().context("the table holds an unknown status")?,
            expires_at: Timestamp(expires_at),
            ticket: ticket(&ticket_id, title, price, ticket_version)?,
            reservation,
            version,
        })
    }
}

fn ticket(id: &str, title: String, price: Decimal, version: i64) -> anyhow::Result<Ticket> {
    let id = id.parse().context("the table holds a malformed ticket id")?;
    Ok(Ticket { id, title, price: price.try_into().context("the table holds no price")?, version })
}

fn by_id(rows: Vec<Row>) -> anyhow::Result<BTreeMap<Id, Order>> {
    rows.into_iter().map(|row| Order::try_from(row).map(|order| (order.id, order))).collect()
}

/// The order `id` of any user.
pub async fn find(db: &mut PgConnection, id: Id) -> anyhow::Result<Option<Order>> {
    sqlx::query_as!(
        Row,
        "select id, user_id, status, expires_at, ticket_id, title, price, ticket_version, reservation, version
         from orders where id = $1",
        id.to_string()
    )
    .fetch_optional(db)
    .await?
    .map(Order::try_from)
    .transpose()
}

/// A part of a user's orders in order of creation.
pub async fn list(db: &mut PgConnection, user_id: &str, part: Part) -> anyhow::Result<Rows> {
    let mut page = Rows::default();
    let mut rows = sqlx::query!(
        // octet_length does not read a title that is stored apart from its row, so that rows that do not fit cost little.
        r#"select id, user_id, status, expires_at, ticket_id, title, price, ticket_version, reservation, version, number,
                bytes as "bytes!"
         from (
             select *, sum(octet_length(title) + octet_length(user_id)) over (order by number rows unbounded preceding)
                       as bytes
             from orders
             where user_id = $1
               and number > greatest($2, (select number from orders where id <= $3 order by id desc limit 1))
             order by number limit $4
         ) as page
         where bytes - octet_length(title) - octet_length(user_id) < $5
         order by number"#,
        user_id,
        part.number,
        part.after.map(|id| id.to_string()),
        part.rows,
        part.bytes,
    )
    .fetch(db);
    while let Some(row) = rows.try_next().await? {
        let order = Row {
            id: row.id,
            user_id: row.user_id,
            status: row.status,
            expires_at: row.expires_at,
            ticket_id: row.ticket_id,
            title: row.title,
            price: row.price,
            ticket_version: row.ticket_version,
            reservation: row.reservation,
            version: row.version,
        };
        page.push(row.number, row.bytes, &Order::try_from(order)?)?;
    }
    drop(rows);
    Ok(page)
}

/// Locks those of the orders `ids` that exist, until the transaction ends.
pub async fn lock(db: &mut PgConnection, ids: impl Iterator<Item = Id>) -> anyhow::Result<BTreeMap<Id, Order>> {
    let ids: Vec<String> = ids.map(|id| id.to_string()).collect();
    let rows = sqlx::query_as!(
        Row,
        // In order, so that replicas lock rows in the same order.
        "select id, user_id, status, expires_at, ticket_id, title, price, ticket_version, reservation, version
         from orders where id = any($1) order by id for update",
        &ids
    );
    by_id(rows.fetch_all(db).await?)
}

/// A new order and its event, made where the trace of its request is known.
pub struct NewOrder {
    user_id: String,
    status: &'static str,
    expires_at: OffsetDateTime,
    reservation: i64,
    ticket_id: String,
    ticket_version: i64,
    event: Outgoing,
}

impl NewOrder {
    /// `order`, and `order.created`. Without the title, which the statement takes from the replica: it may be long.
    pub fn new(order: &Order) -> Self {
        Self {
            user_id: order.user_id.clone(),
            status: order.status.as_str(),
            expires_at: order.expires_at.0,
            reservation: order.reservation,
            ticket_id: order.ticket.id.to_string(),
            ticket_version: order.ticket.version,
            event: Outgoing::new(&order.announcement()),
        }
    }
}

/// Writes new orders and their `order.created`, in one statement.
///
/// The output is false, and nothing is written, for an order whose offer is outdated: another order holds the ticket or has the
/// same reservation number, or the ticket has changed. The unique indexes are the lock: of any number of concurrent inserts
/// one succeeds.
pub struct InsertOrders;

impl Statement for InsertOrders {
    type Item = NewOrder;
    type Output = bool;
    const APPENDS: bool = true;

    async fn execute(&self, db: &mut PgConnection, new: &[NewOrder]) -> anyhow::Result<Vec<bool>> {
        let events: Columns = new.iter().map(|new| &new.event).collect();
        let users: Vec<&str> = new.iter().map(|new| new.user_id.as_str()).collect();
        let statuses: Vec<&str> = new.iter().map(|new| new.status).collect();
        let expiries: Vec<OffsetDateTime> = new.iter().map(|new| new.expires_at).collect();
        let reservations: Vec<i64> = new.iter().map(|new| new.reservation).collect();
        let tickets: Vec<&str> = new.iter().map(|new| new.ticket_id.as_str()).collect();
        let ticket_versions: Vec<i64> = new.iter().map(|new| new.ticket_version).collect();
        let inserted = sqlx::query_scalar!(
            r#"
            with inserted as (
                insert into orders
                    (id, user_id, status, expires_at, ticket_id, title, price, ticket_version, reservation, version)
                select new.id, new.user_id, new.status, new.expires_at, ticket.id, ticket.title, ticket.price,
                       ticket.version, new.reservation, new.version
                from unnest($2::text[], $4::bigint[], $7::text[], $8::text[], $9::timestamptz[], $10::bigint[],
                            $11::text[], $12::bigint[])
                     as new (id, version, user_id, status, expires_at, reservation, ticket_id, ticket_version)
                join ticket_replica as ticket on ticket.id = new.ticket_id and ticket.version = new.ticket_version
                -- In order, so that replicas meet in the indexes in the same order.
                order by ticket.id
                on conflict do nothing returning id
            ), appended as (
                select bus.append_all($1, array_agg(subject), array_agg(id), array_agg(version), array_agg(payload),
                                      array_agg(traceparent), array_agg(header))
                from unnest($3::text[], $2, $4, $5::text[], $6::text[], $13::text[])
                     as event (subject, id, version, payload, traceparent, header)
                -- "is true" makes it a lookup in a hash table; as a join, Postgres would compare each event with each order.
                where (id in (select id from inserted)) is true
            )
            select id as "id!" from inserted cross join appended
            "#,
            OrderEvent::STREAM,
            &events.aggregate_ids as _,
            &events.subjects as _,
            &events.versions,
            &events.payloads as _,
            &events.traceparents as _,
            &users as _,
            &statuses as _,
            &expiries,
            &reservations,
            &tickets as _,
            &ticket_versions,
            &events.headers as _,
        );
        let inserted: HashSet<String> = inserted.fetch_all(db).await?.into_iter().collect();
        Ok(new.iter().map(|new| inserted.contains(&new.event.aggregate_id)).collect())
    }
}

/// Writes the next versions of orders and their events, in one statement; at most one event per order.
///
/// Returns how many were written. An order whose version another transaction has written first is not changed.
pub async fn save(db: &mut PgConnection, events: &[OrderEvent]) -> sqlx::Result<u64> {
    let ids: Vec<String> = events.iter().map(Event::aggregate_id).collect();
    let versions: Vec<i64> = events.iter().map(Event::version).collect();
    let statuses: Vec<&str> = events.iter().map(|event| event.snapshot().status.as_str()).collect();
    let subjects: Vec<&str> = events.iter().map(Publish::subject).collect();
    let payloads: Vec<String> = events.iter().map(Publish::encode).collect();
    let saved = sqlx::query!(
        "with saved as (
             update orders set status = new.status, version = new.version, updated_at = now()
             from unnest($1::text[], $2::bigint[], $3::text[], $4::text[], $5::text[])
                  as new (id, version, status, subject, payload)
             where orders.id = new.id and orders.version = new.version - 1
             returning new.*
         )
         select bus.append($6, subject, id, version, payload, $7) from saved",
        &ids,
        &versions,
        &statuses as _,
        &subjects as _,
        &payloads,
        OrderEvent::STREAM,
        trace::current(),
    )
    .execute(db)
    .await?;
    Ok(saved.rows_affected())
}

/// Does what [`save`] does, for locked orders: no other transaction can have written them.
pub async fn save_locked(db: &mut PgConnection, events: &[OrderEvent]) -> anyhow::Result<()> {
    if events.is_empty() {
        return Ok(());
    }
    let saved = save(db, events).await?;
    ensure!(saved == events.len() as u64, "{saved} of {} locked orders could be written", events.len());
    Ok(())
}

/// Records payments. Returns those that were not recorded before, each once.
pub async fn insert_payments<'a>(db: &mut PgConnection, payments: &[&'a Payment]) -> anyhow::Result<Vec<&'a Payment>> {
    let ids: Vec<String> = payments.iter().map(|payment| payment.id.to_string()).collect();
    let orders: Vec<String> = payments.iter().map(|payment| payment.order_id.to_string()).collect();
    let names: Vec<&str> = payments.iter().map(|payment| payment.stripe_id.as_str()).collect();
    let inserted = sqlx::query_scalar!(
        "insert into payments (id, order_id, stripe_id)
         select * from unnest($1::text[], $2::text[], $3::text[])
         on conflict do nothing returning id",
        &ids,
        &orders,
        &names as _,
    );
    let mut inserted: HashSet<String> = inserted.fetch_all(db).await?.into_iter().collect();
    Ok(payments.iter().copied().filter(|payment| inserted.remove(&payment.id.to_string())).collect())
}

/// Those of the complete orders `ids` of which a payment is recorded that is not to be refunded.
pub async fn paid(db: &mut PgConnection, ids: impl Iterator<Item = Id>) -> anyhow::Result<HashSet<Id>> {
    let ids: Vec<String> = ids.map(|id| id.to_string()).collect();
    if ids.is_empty() {
        return Ok(HashSet::new());
    }
    let paid = sqlx::query_scalar!("select order_id from payments where order_id = any($1) and not refund_due", &ids);
    let paid = paid.fetch_all(db).await?;
    paid.iter().map(|id| id.parse().context("the table holds a malformed order id")).collect()
}

/// Those of the payments `ids` that are recorded.
pub async fn find_payments(
    db: &mut PgConnection,
    ids: impl Iterator<Item = Id>,
) -> anyhow::Result<BTreeMap<Id, Payment>> {
    let ids: Vec<String> = ids.map(|id| id.to_string()).collect();
    let rows = sqlx::query!("select id, order_id, stripe_id from payments where id = any($1)", &ids);
    let payments = rows.fetch_all(db).await?.into_iter().map(|row| {
        let id = row.id.parse().context("the table holds a malformed payment id")?;
        let order_id = row.order_id.parse().context("the table holds a malformed order id")?;
        Ok((id, Payment { id, order_id, stripe_id: row.stripe_id }))
    });
    payments.collect()
}

/// Records that these payments must be refunded.
pub async fn owe_refunds(db: &mut PgConnection, payments: &[&Payment]) -> sqlx::Result<()> {
    if payments.is_empty() {
        return Ok(());
    }
    let ids: Vec<String> = payments.iter().map(|payment| payment.id.to_string()).collect();
    sqlx::query!("update payments set refund_due = true where id = any($1)", &ids).execute(db).await?;
    Ok(())
}
