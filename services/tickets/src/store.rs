//! Tickets in Postgres. Only this module writes the table; each new version of a row is announced by one event.

mod snapshots;

pub use snapshots::TicketSnapshots;

use crate::ticket::{FencingToken, Ticket};
use anyhow::Context;
use bootstrap::list::{Part, Rows};
use contracts::ticket::TicketSnapshot;
use contracts::{Id, TicketEvent};
use event_bus::{Columns, Event, Outgoing, Statement, Transaction};
use futures::TryStreamExt as _;
use rust_decimal::Decimal;
use sqlx::PgConnection;
use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;

const MALFORMED_ID: &str = "the table holds a malformed id";
const NO_PRICE: &str = "the table holds no price";

struct Row {
    id: String,
    title: String,
    price: Decimal,
    user_id: String,
    version: i64,
    order_id: Option<String>,
    reservation: i64,
    order_version: i64,
}

impl TryFrom<Row> for Ticket {
    type Error = anyhow::Error;

    fn try_from(row: Row) -> anyhow::Result<Self> {
        let Row { id, title, price, user_id, version, order_id, reservation, order_version } = row;
        let order_id = order_id.map(|id| id.parse()).transpose().context("the table holds a malformed order id")?;
        Ok(Self {
            id: id.parse().context(MALFORMED_ID)?,
            title,
            price: price.try_into().context(NO_PRICE)?,
            user_id,
            version,
            order_id,
            fencing_token: FencingToken { reservation, order_version },
        })
    }
}

fn by_id(rows: Vec<Row>) -> anyhow::Result<BTreeMap<Id, Ticket>> {
    rows.into_iter().map(|row| Ticket::try_from(row).map(|ticket| (ticket.id, ticket))).collect()
}

/// Finds the tickets of concurrent requests, reserved or not.
pub struct FindTickets;

impl Statement for FindTickets {
    type Item = Id;
    type Output = Option<Ticket>;
    const APPENDS: bool = false;

    async fn execute(&self, db: &mut PgConnection, ids: &[Id]) -> anyhow::Result<Vec<Option<Ticket>>> {
        let found = find(db, ids).await?;
        Ok(ids.iter().map(|id| found.get(id).cloned()).collect())
    }
}

/// Those of the tickets `ids` that exist, reserved or not.
pub async fn find(db: &mut PgConnection, ids: &[Id]) -> anyhow::Result<BTreeMap<Id, Ticket>> {
    let ids: Vec<String> = ids.iter().map(Id::to_string).collect();
    let rows = sqlx::query_as!(
        Row,
        "select id, title, price, user_id, version, order_id, reservation, order_version from tickets
         where id = any($1)",
        &ids
    );
    by_id(rows.fetch_all(db).await?)
}

/// Reads parts of the unreserved tickets in order of creation, as clients see them.
///
/// Concurrent requests for the same part share its rows.
pub struct ListTickets;

impl Statement for ListTickets {
    type Item = Part;
    type Output = Arc<Rows>;
    const APPENDS: bool = false;

    async fn execute(&self, db: &mut PgConnection, parts: &[Part]) -> anyhow::Result<Vec<Arc<Rows>>> {
        let mut distinct = parts.to_vec();
        distinct.sort_unstable();
        distinct.dedup();
        let pages: Vec<Arc<Rows>> = list(db, &distinct).await?.into_iter().map(Arc::new).collect();
        Ok(parts.iter().filter_map(|part| pages.get(distinct.binary_search(part).ok()?)).cloned().collect())
    }
}

async fn list(db: &mut PgConnection, parts: &[Part]) -> anyhow::Result<Vec<Rows>> {
    let numbers: Vec<i64> = parts.iter().map(|part| part.number).collect();
    let after: Vec<Option<String>> = parts.iter().map(|part| part.after.map(|id| id.to_string())).collect();
    let limits: Vec<i64> = parts.iter().map(|part| part.rows).collect();
    let bytes: Vec<i64> = parts.iter().map(|part| part.bytes).collect();
    let mut pages: Vec<Rows> = parts.iter().map(|_| Rows::default()).collect();
    let mut rows = sqlx::query!(
        // octet_length does not read a title that is stored apart from its row, so that rows that do not fit cost little.
        r#"select position as "position!", page.id, title, price, user_id, version, page.number, page.bytes as "bytes!"
         from unnest($1::bigint[], $2::text[], $3::bigint[], $4::bigint[]) with ordinality
              as part (number, after, rows, bytes, position)
         cross join lateral (
             select id, title, price, user_id, version, number,
                    sum(octet_length(title) + octet_length(user_id)) over (order by number rows unbounded preceding)
                        as bytes
             from tickets
             where order_id is null
               and number > greatest(part.number, (select number from tickets where id <= after order by id desc limit 1))
             order by number limit rows
         ) as page
         where page.bytes - octet_length(title) - octet_length(user_id) < part.bytes
         order by position, page.number"#,
        &numbers,
        &after as _,
        &limits,
        &bytes,
    )
    .fetch(db);
    while let Some(row) = rows.try_next().await? {
        let (id, price) = (row.id.parse().context(MALFORMED_ID)?, row.price.try_into().context(NO_PRICE)?);
        let (title, user_id, version) = (row.title, row.user_id, row.version);
        let ticket = TicketSnapshot { id, version, title, price, user_id, order_id: None };
        let page = usize::try_from(row.position - 1)?;
        pages[page].push(row.number, row.bytes, &ticket)?;
    }
    drop(rows);
    Ok(pages)
}

/// Locks those of the tickets `ids` that exist, until the transaction ends.
pub async fn lock(db: &mut PgConnection, ids: impl Iterator<Item = Id>) -> anyhow::Result<BTreeMap<Id, Ticket>> {
    let ids: Vec<String> = ids.map(|id| id.to_string()).collect();
    let rows = sqlx::query_as!(
        Row,
        // In order, so that replicas lock rows in the same order.
        "select id, title, price, user_id, version, order_id, reservation, order_version from tickets
         where id = any($1) order by id for update",
        &ids
    );
    by_id(rows.fetch_all(db).await?)
}

/// A new version of a ticket, and its event with the trace of the request.
pub struct Version {
    ticket: Ticket,
    event: Outgoing,
}

impl Version {
    /// The version of `ticket`, and the event that announces it.
    pub fn new(ticket: Ticket) -> Self {
        let event = Outgoing::new(&ticket.announcement());
        Self { ticket, event }
    }
}

/// Writes new tickets and their `ticket.created`, in one statement.
pub struct InsertTickets;

impl Statement for InsertTickets {
    type Item = Version;
    type Output = ();
    const APPENDS: bool = true;

    async fn execute(&self, db: &mut PgConnection, new: &[Version]) -> anyhow::Result<Vec<()>> {
        let events: Columns = new.iter().map(|new| &new.event).collect();
        let titles: Vec<&str> = new.iter().map(|new| new.ticket.title.as_str()).collect();
        let prices: Vec<Decimal> = new.iter().map(|new| new.ticket.price.amount()).collect();
        let users: Vec<&str> = new.iter().map(|new| new.ticket.user_id.as_str()).collect();
        sqlx::query!(
            "with tickets as (
                 insert into tickets (id, title, price, user_id, version)
                 select id, title, price, user_id, version
                 from unnest($2::text[], $3::text[], $4::numeric[], $5::text[], $6::bigint[]) with ordinality
                      as new (id, title, price, user_id, version, position)
                 order by position
             )
             select bus.append_all($1, $7, $2, $6, $8, $9, $10)",
            TicketEvent::STREAM,
            &events.aggregate_ids as _,
            &titles as _,
            &prices,
            &users as _,
            &events.versions,
            &events.subjects as _,
            &events.payloads as _,
            &events.traceparents as _,
            &events.headers as _,
        )
        .execute(db)
        .await?;
        Ok(vec![(); new.len()])
    }
}

/// Writes the next versions of tickets and their `ticket.updated`, in one statement.
///
/// The output is false, and nothing is written, for a ticket of which another request has written that version first.
///
/// Optimistic locking on the version that was read: nothing is locked while the rules are checked, and there are two round
/// trips instead of four.
pub struct SaveTickets;

impl Statement for SaveTickets {
    type Item = Version;
    type Output = bool;
    const APPENDS: bool = true;

    async fn execute(&self, db: &mut PgConnection, new: &[Version]) -> anyhow::Result<Vec<bool>> {
        let events: Columns = new.iter().map(|new| &new.event).collect();
        let titles: Vec<&str> = new.iter().map(|new| new.ticket.title.as_str()).collect();
        let prices: Vec<Decimal> = new.iter().map(|new| new.ticket.price.amount()).collect();
        let saved = sqlx::query_scalar!(
            r#"
            with locked as materialized (
                -- In order, so that replicas lock rows in the same order.
                select id from tickets where id = any($2) order by id for no key update
            ), saved as (
                update tickets set title = new.title, price = new.price, version = new.version, updated_at = now()
                from unnest($2::text[], $3::bigint[], $4::text[], $5::numeric[], $6::text[], $7::text[], $8::text[],
                            $9::text[])
                     with ordinality
                     as new (id, version, title, price, subject, payload, traceparent, header, position)
                -- Executes "locked" once, before the first row is written.
                cross join (select count(*) from locked) as locked_rows
                -- Of several that are next, one is taken.
                where tickets.id = new.id and tickets.version = new.version - 1
                returning new.*
            ), appended as (
                select bus.append_all($1, array_agg(subject), array_agg(id), array_agg(version), array_agg(payload),
                                      array_agg(traceparent), array_agg(header))
                from saved
            )
            select position as "position!" from saved cross join appended
            "#,
            TicketEvent::STREAM,
            &events.aggregate_ids as _,
            &events.versions,
            &titles as _,
            &prices,
            &events.subjects as _,
            &events.payloads as _,
            &events.traceparents as _,
            &events.headers as _,
        );
        let saved: HashSet<i64> = saved.fetch_all(db).await?.into_iter().collect();
        Ok((1..).take(new.len()).map(|position| saved.contains(&position)).collect())
    }
}

/// Writes the locked tickets whose fencing token or version has grown, and appends `updates`, one event per version.
pub async fn save_followed(
    tx: &mut Transaction,
    tickets: impl Iterator<Item = &Ticket>,
    updates: &[TicketEvent],
) -> event_bus::Result<()> {
    let (mut ids, mut orders, mut versions) = (Vec::new(), Vec::new(), Vec::new());
    let (mut reservations, mut order_versions) = (Vec::new(), Vec::new());
    for ticket in tickets {
        ids.push(ticket.id.to_string());
        orders.push(ticket.order_id.map(|id| id.to_string()));
        versions.push(ticket.version);
        reservations.push(ticket.fencing_token.reservation);
        order_versions.push(ticket.fencing_token.order_version);
    }
    sqlx::query!(
        "update tickets
         set order_id = new.order_id, version = new.version, reservation = new.reservation,
             order_version = new.order_version, updated_at = now()
         from unnest($1::text[], $2::text[], $3::bigint[], $4::bigint[], $5::bigint[])
              as new (id, order_id, version, reservation, order_version)
         where tickets.id = new.id
           and ((tickets.reservation, tickets.order_version) < (new.reservation, new.order_version)
                or tickets.version < new.version)",
        &ids,
        &orders as _,
        &versions,
        &reservations,
        &order_versions,
    )
    .execute(&mut **tx)
    .await?;
    tx.append(updates).await
}
