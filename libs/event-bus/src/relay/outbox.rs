//! The statements of the relay. Each is one call of a function: see migration 7.
//!
//! They are sent as text, together with `begin` or `commit`, which saves a round trip each. So they are not checked at build
//! time; the tests of the relay execute all of them.

use crate::connection::{Connection, Transaction};
use crate::database::Database;
use crate::headers::Headers;
use anyhow::Context;
use sqlx::Row as _;
use sqlx::postgres::PgRow;
use std::collections::HashMap;

/// How many rows after a full batch are searched for events of its transactions.
const AHEAD: i64 = 1000;

/// How far a stream is published.
#[derive(Debug, Clone, Copy)]
pub(super) struct Position {
    /// The sequence of the last message that is known to be in the stream.
    pub(super) last_seq: u64,
    /// The outbox has no row with this id or a smaller one, and will never have one.
    pub(super) floor: i64,
}

/// The limits of one batch.
#[derive(Debug, Clone, Copy)]
pub(super) struct Limits {
    pub(super) events: usize,
    /// Bytes of bodies and headers. A single event may have more.
    pub(super) bytes: usize,
}

/// The oldest rows, which are published together, in the transaction that has locked their stream.
pub(super) struct Batch {
    pub(super) tx: Transaction,
    /// How far the stream is published.
    pub(super) position: Position,
    pub(super) rows: Vec<Row>,
    /// Whether more rows wait.
    pub(super) more: bool,
}

#[derive(Debug)]
pub(super) struct Row {
    pub(super) id: i64,
    pub(super) subject: String,
    pub(super) event_id: String,
    pub(super) payload: String,
    pub(super) traceparent: Option<String>,
    /// The headers of the application, as JSON.
    headers: Option<String>,
    pub(super) transaction: i64,
    /// When it was appended, in microseconds since 1970.
    pub(super) appended_at: i64,
    /// Whether its transaction has events after those of the batch.
    continues: bool,
}

impl Row {
    /// The headers of the application.
    pub(super) fn headers(&self) -> anyhow::Result<Headers> {
        let headers = self.headers.as_deref().map(Headers::of_row).transpose();
        Ok(headers.with_context(|| format!("cannot read the headers of {}", self.event_id))?.unwrap_or_default())
    }

    /// Returns `None` if no event waits.
    fn new(row: &PgRow) -> sqlx::Result<Option<Self>> {
        let Some(id) = row.try_get("id")? else { return Ok(None) };
        Ok(Some(Self {
            id,
            subject: row.try_get("subject")?,
            event_id: row.try_get("event_id")?,
            payload: row.try_get("payload")?,
            traceparent: row.try_get("traceparent")?,
            headers: row.try_get("headers")?,
            transaction: row.try_get("transaction")?,
            continues: row.try_get("continues")?,
            appended_at: row.try_get("appended_at")?,
        }))
    }
}

/// Begins a transaction, locks the stream until it ends, and reads the oldest rows above `floor`. They contain all events of a
/// transaction, or none, unless these exceed a batch.
///
/// Returns `None` if another replica holds the lock.
pub(super) async fn take(
    database: &Database,
    connection: Connection,
    stream: &str,
    floor: i64,
    limits: Limits,
) -> anyhow::Result<Option<Batch>> {
    let (stream, Limits { events, bytes }) = (quoted(stream), limits);
    let take = format!("select * from bus.take_events({stream}, {floor}, {events}, {bytes}, {AHEAD})");
    let (tx, taken) = database.begin_with(connection, &take).await?;
    let Some(first) = taken.first() else {
        tx.rollback().await?;
        return Ok(None);
    };
    let position =
        Position { last_seq: first.try_get::<i64, _>("last_seq")?.try_into()?, floor: first.try_get("floor")? };
    let more = first.try_get("more")?;
    let mut rows = taken.iter().filter_map(|row| Row::new(row).transpose()).collect::<sqlx::Result<Vec<Row>>>()?;
    rows.sort_unstable_by_key(|row| row.id);
    if more {
        rows.truncate(whole(&rows));
    }
    Ok(Some(Batch { tx, position, rows, more }))
}

/// The length of the longest prefix of the rows that contains only whole transactions. All rows if there is no such
/// prefix: a transaction that is larger than a batch is split.
///
/// Only a prefix of the rows can be published: a later row may belong to a newer version of the same aggregate.
fn whole(rows: &[Row]) -> usize {
    let last: HashMap<i64, usize> = rows.iter().enumerate().map(|(at, row)| (row.transaction, at)).collect();
    let (mut reach, mut whole) = (0, 0);
    for (at, row) in rows.iter().enumerate() {
        if row.continues {
            break;
        }
        reach = reach.max(last[&row.transaction]);
        if reach == at {
            whole = at + 1;
        }
    }
    if whole == 0 { rows.len() } else { whole }
}

/// Deletes published rows, and moves the position to `last_seq`, which is not smaller. Commits. `ids` are in ascending order.
pub(super) async fn move_on(
    tx: Transaction,
    stream: &str,
    from: Position,
    last_seq: u64,
    ids: &[i64],
) -> crate::error::Result<Connection> {
    let (stream, Position { last_seq: from_seq, floor }) = (quoted(stream), from);
    let ids = ids.iter().map(i64::to_string).collect::<Vec<_>>().join(",");
    let move_on = format!("select bus.move_on({stream}, {from_seq}, {last_seq}, {floor}, '{{{ids}}}')");
    tx.commit_with(&move_on).await
}

/// A literal of SQL.
fn quoted(text: &str) -> String {
    format!("'{}'", text.replace('\'', "''"))
}

/// Sets the floor to 0: the next step reads rows of any id.
pub(super) async fn forget_floor(tx: &mut Transaction, stream: &str) -> sqlx::Result<()> {
    sqlx::query!("update bus.position set floor = 0 where stream = $1", stream).execute(&mut **tx).await?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_batch_ends_where_no_transaction_is_cut() {
        for (transactions, behind, expected) in [
            (vec![1, 1, 2, 3], vec![], 4),
            (vec![1, 1, 2, 3], vec![3], 3),
            (vec![1, 2, 1, 3, 2, 4], vec![4], 5),
            (vec![1, 2, 3, 2, 4, 4], vec![4], 4),
            (vec![1, 2, 1, 2], vec![2], 4), // no whole prefix: split
            (vec![1, 2, 2, 3, 4, 3], vec![3], 3),
            (vec![7, 7, 7], vec![7], 3),
        ] {
            let rows: Vec<Row> = (1..).zip(&transactions).map(|(id, tx)| row(id, *tx, behind.contains(tx))).collect();
            assert_eq!(whole(&rows), expected, "{transactions:?}, {behind:?} go on");
        }
    }

    fn row(id: i64, transaction: i64, continues: bool) -> Row {
        let (subject, event_id, payload) = Default::default();
        Row { id, subject, event_id, payload, traceparent: None, headers: None, transaction, appended_at: 0, continues }
    }

    #[test]
    fn a_quote_in_the_name_of_a_stream_is_doubled() {
        assert_eq!(quoted("O'Hara"), "'O''Hara'");
    }
}
