//! The statements of the relay. Each has only one possible plan, whatever the statistics: see migration 3.

use crate::connection::Transaction;
use crate::headers::Headers;
use anyhow::Context;
use std::collections::HashMap;

/// How many rows after a full batch are searched for events of its transactions.
const AHEAD: i64 = 1000;

/// Messages after which the position is also written to `bus.relay`, where the previous release reads it.
const SHARED: u64 = 2000;

/// Begins a transaction of the relay, in which the planner can only use the index for the condition.
pub(super) const BEGIN: &str = "begin; set local enable_seqscan = off; set local enable_bitmapscan = off; \
                                set local enable_sort = off";

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

/// The oldest rows, which are published together.
#[derive(Debug)]
pub(super) struct Batch {
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
    transaction: i64,
    /// The number of rows that wait; at most one more than the limit.
    waiting: i64,
}

impl Batch {
    pub(super) fn ids(&self) -> Vec<i64> {
        self.rows.iter().map(|row| row.id).collect()
    }
}

impl Row {
    /// The headers of the application.
    pub(super) fn headers(&self) -> anyhow::Result<Headers> {
        let headers = self.headers.as_deref().map(serde_json::from_str).transpose();
        Ok(headers.with_context(|| format!("cannot read the headers of {}", self.event_id))?.unwrap_or_default())
    }
}

/// Locks the position of a stream until the transaction ends. Returns `None` if another replica holds the lock.
pub(super) async fn lock(tx: &mut Transaction, stream: &str) -> anyhow::Result<Option<Position>> {
    let locked = sqlx::query!(r#"select last_seq as "last_seq!", floor as "floor!" from bus.lock_stream($1)"#, stream);
    let Some(row) = locked.fetch_optional(&mut **tx).await? else { return Ok(None) };
    Ok(Some(Position { last_seq: row.last_seq.try_into()?, floor: row.floor }))
}

/// The oldest rows above `floor`. They contain all events of a transaction, or none, unless these exceed a batch.
pub(super) async fn oldest(tx: &mut Transaction, stream: &str, floor: i64, limits: Limits) -> anyhow::Result<Batch> {
    let mut rows = sqlx::query_as!(
        Row,
        r#"
        select id, subject, aggregate_id || '-' || version as "event_id!", payload, traceparent,
               headers::text, transaction::text::bigint as "transaction!", waiting as "waiting!"
        from (
            select *, sum(octet_length(payload) + coalesce(octet_length(headers::text), 0)) over (order by id) as bytes, row_number() over (order by id) as number,
                   count(*) over () as waiting
            from (select * from bus.outbox where stream = $1 and id > $2 order by id limit $3) as oldest
        ) as measured
        where bytes <= $4 or number = 1
        order by id
        "#,
        stream,
        floor,
        // One more than the limit, to know whether more rows wait.
        i64::try_from(limits.events)? + 1,
        i64::try_from(limits.bytes)?,
    )
    .fetch_all(&mut **tx)
    .await?;
    rows.truncate(limits.events);
    let waiting = rows.first().map_or(0, |row| row.waiting);
    let more = waiting > i64::try_from(rows.len())?;
    if more {
        let transactions: Vec<i64> = rows.iter().map(|row| row.transaction).collect();
        let last = rows.last().map_or(0, |row| row.id);
        let behind = behind(tx, stream, last, &transactions).await?;
        rows.truncate(whole(&transactions, &behind));
    }
    Ok(Batch { rows, more })
}

/// Those of the transactions that also have events after the row `last`.
async fn behind(tx: &mut Transaction, stream: &str, last: i64, transactions: &[i64]) -> sqlx::Result<Vec<i64>> {
    sqlx::query_scalar!(
        r#"
        select distinct transaction as "transaction!"
        from (
            select transaction::text::bigint from bus.outbox where stream = $1 and id > $2 order by id limit $3
        ) as behind
        where transaction = any($4)
        "#,
        stream,
        last,
        AHEAD,
        transactions,
    )
    .fetch_all(&mut **tx)
    .await
}

/// The length of the longest prefix of the rows that contains only whole transactions. All rows if there is no such
/// prefix: a transaction that is larger than a batch is split.
///
/// Only a prefix of the rows can be published: a later row may belong to a newer version of the same aggregate.
fn whole(transactions: &[i64], behind: &[i64]) -> usize {
    let last: HashMap<i64, usize> =
        transactions.iter().enumerate().map(|(at, &transaction)| (transaction, at)).collect();
    let (mut reach, mut whole) = (0, 0);
    for (at, transaction) in transactions.iter().enumerate() {
        if behind.contains(transaction) {
            break;
        }
        reach = reach.max(last[transaction]);
        if reach == at {
            whole = at + 1;
        }
    }
    if whole == 0 { transactions.len() } else { whole }
}

/// Deletes published rows, and moves the position to `last_seq`, which is greater. `ids` are in ascending order.
///
/// Every [`SHARED`] messages, also writes the position to `bus.relay`: relays of the previous release may run during an
/// update, and read at most 4096 messages to catch up. More frequent updates would leave more dead row versions.
pub(super) async fn move_on(
    tx: &mut Transaction,
    stream: &str,
    from: Position,
    last_seq: u64,
    ids: &[i64],
) -> anyhow::Result<()> {
    let is_shared = from.last_seq / SHARED != last_seq / SHARED;
    let last_seq = i64::try_from(last_seq)?;
    sqlx::query!(
        // The range bounds the scan. The ids are needed too: a row of the range may have been committed since.
        "with published as (
             delete from bus.outbox where stream = $1 and id between $5 and $6 and id = any($7)
         ), before as (
             delete from bus.position where stream = $1 and last_seq = $2
         )
         insert into bus.position (stream, last_seq, floor) values ($1, $3, $4)",
        stream,
        i64::try_from(from.last_seq)?,
        last_seq,
        from.floor,
        ids.first().copied().unwrap_or_default(),
        ids.last().copied().unwrap_or_default(),
        ids,
    )
    .execute(&mut **tx)
    .await?;
    if is_shared {
        let share = sqlx::query!("update bus.relay set last_seq = $2 where stream = $1", stream, last_seq);
        share.execute(&mut **tx).await?;
    }
    Ok(())
}

/// Sets the floor to 0: the next step reads rows of any id.
pub(super) async fn forget_floor(tx: &mut Transaction, stream: &str) -> sqlx::Result<()> {
    sqlx::query!("update bus.position set floor = 0 where stream = $1", stream).execute(&mut **tx).await?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::whole;

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
            assert_eq!(whole(&transactions, &behind), expected, "{transactions:?}, {behind:?} go on");
        }
    }
}
