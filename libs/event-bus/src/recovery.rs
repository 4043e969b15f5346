//! Recovery: the database came back older than the stream that it publishes to.
//!
//! It was restored from a backup, or failed over to a standby that lagged. The stream is the journal of its owner: each event is a whole
//! snapshot. So the owner takes over from its stream what its tables lost, and then applies the events of other streams again.
//!
//! 1. The relay finds an event after its position that the tables do not have: see `relay::reconcile`. One transaction writes the first
//!    page of snapshots into the tables, moves the position, and inserts the mark, a row of `bus.recovery`. Or the stream ends at the
//!    position, but the database is not the same as before (`bus.incarnation`): only the mark is inserted, because effects of other
//!    streams may be lost.
//! 2. The next pages follow, up to the end of the stream: see `relay::recover`. The position is the cursor.
//! 3. Each subscription applies again what was delivered to it after the backup: see `subscription::reapply`. This restores what snapshots
//!    do not carry, for example the fencing token of a ticket: the newest
//!    event of its orders that was applied.
//! 4. The relay deletes the mark.
//!
//! While the mark exists, `bus.require_recovered` fails: no replica appends events, applies events or performs tasks. HTTP requests that
//! write get a 503, reads continue, and the service is not ready. A write before the mark is inserted is harmless: it is still in the outbox,
//! because the server refuses events at a position that is taken. If it contradicts what was published, what was published stands.
//!
//! What if we die …
//! - during a page: Postgres rolls it back; another relay, or this one after its restart, repeats it.
//! - between pages: the mark exists, and the position is the cursor. `a_recovery_that_was_killed_is_resumed` shows it.
//! - while events are applied again: they are applied from the cursor in `bus.recovery_reads` on. Applying an event twice changes nothing.
//! - after the mark was deleted: everything is recovered.
//!
//! What is lost: what was committed before the disaster and not yet published. Usually that is a few milliseconds; while NATS is away, it
//! is everything since then.

use crate::connection::Connection;
use sqlx::PgConnection;
use sqlx::types::time::OffsetDateTime;

/// Settings of a transaction that recovers, which `bus.require_recovered` lets pass. It waits briefly for a lock: it holds other locks
/// meanwhile.
pub(crate) const BEGIN: &str = "begin; set local lock_timeout = '1s'; set local bus.recovering = 'yes'";

/// A recovery that is under way.
pub(crate) struct Mark {
    /// Whether the tables have all that the stream has.
    pub(crate) walked: bool,
    pub(crate) from_seq: i64,
    pub(crate) until_seq: i64,
    pub(crate) taken_over: i64,
    pub(crate) dropped: i64,
    pub(crate) newest_at: Option<OffsetDateTime>,
    pub(crate) begun_at: OffsetDateTime,
    pub(crate) now: OffsetDateTime,
    /// How many subscriptions still apply events again.
    pub(crate) reading: i64,
}

/// What a page has recovered.
pub(crate) struct Page {
    pub(crate) from_seq: u64,
    pub(crate) until_seq: u64,
    pub(crate) taken_over: usize,
    pub(crate) dropped: usize,
    pub(crate) newest_at: Option<OffsetDateTime>,
}

/// The recovery of `stream`, if one is under way.
pub(crate) async fn mark(db: &mut PgConnection, stream: &str) -> sqlx::Result<Option<Mark>> {
    let mark = sqlx::query_as!(
        Mark,
        r#"select walked, from_seq, until_seq, taken_over, dropped, newest_at, begun_at, now() as "now!",
                  (select count(*) from bus.recovery_reads) as "reading!"
           from bus.recovery where stream = $1"#,
        stream,
    );
    mark.fetch_optional(db).await
}

/// Records what a page has recovered. The first page inserts the mark, with the positions of the subscriptions before the backup.
pub(crate) async fn record(
    db: &mut PgConnection,
    stream: &str,
    page: &Page,
    consumers: &[(&str, &str)],
) -> anyhow::Result<()> {
    let inserted = sqlx::query_scalar!(
        r#"insert into bus.recovery as mark (stream, from_seq, until_seq, taken_over, dropped, newest_at)
           values ($1, $2, $3, $4, $5, $6)
           on conflict (stream) do update
           set until_seq = excluded.until_seq, taken_over = mark.taken_over + excluded.taken_over,
               dropped = mark.dropped + excluded.dropped, newest_at = coalesce(excluded.newest_at, mark.newest_at), walked = false
           returning from_seq = $2 as "inserted!""#,
        stream,
        i64::try_from(page.from_seq)?,
        i64::try_from(page.until_seq)?,
        i64::try_from(page.taken_over)?,
        i64::try_from(page.dropped)?,
        page.newest_at,
    );
    if inserted.fetch_one(&mut *db).await? {
        keep_reads(db, consumers).await?;
        is_another(db, stream).await?;
    }
    Ok(())
}

/// Keeps the positions of the subscriptions before the backup, unless they are kept already.
pub(crate) async fn keep_reads(db: &mut PgConnection, consumers: &[(&str, &str)]) -> anyhow::Result<()> {
    let (streams, names): (Vec<&str>, Vec<&str>) = consumers.iter().copied().unzip();
    let reads = sqlx::query!(
        "insert into bus.recovery_reads (stream, consumer, after_seq)
         select reads.stream, reads.consumer, coalesce(position.before_seq, 0)
         from unnest($1::text[], $2::text[]) as reads (stream, consumer)
         left join bus.read_positions as position using (stream, consumer)
         on conflict do nothing",
        &streams as _,
        &names as _,
    );
    reads.execute(db).await?;
    Ok(())
}

/// The streams and consumers whose events are still applied again.
pub(crate) async fn reads(db: &mut PgConnection) -> sqlx::Result<Vec<(String, String)>> {
    let reads = sqlx::query!("select stream, consumer from bus.recovery_reads");
    Ok(reads.fetch_all(db).await?.into_iter().map(|read| (read.stream, read.consumer)).collect())
}

/// Applies no more events of this consumer again.
pub(crate) async fn end_read(db: &mut PgConnection, stream: &str, consumer: &str) -> sqlx::Result<()> {
    let end = sqlx::query!("delete from bus.recovery_reads where stream = $1 and consumer = $2", stream, consumer);
    end.execute(db).await?;
    Ok(())
}

/// Whether the database is not the same as the last time: it was restored, or another server has taken over. Remembers it.
pub(crate) async fn is_another(db: &mut PgConnection, stream: &str) -> anyhow::Result<bool> {
    let changed = sqlx::query_scalar!(
        r#"with known as (select incarnation from bus.relay where stream = $1 for update)
           update bus.relay set incarnation = bus.incarnation() from known
           where stream = $1 and known.incarnation is distinct from bus.incarnation()
           returning known.incarnation is not null as "is_another!""#,
        stream,
    );
    Ok(changed.fetch_optional(db).await?.unwrap_or(false))
}

/// Records that the tables have all that the stream has.
pub(crate) async fn has_walked(db: &mut PgConnection, stream: &str) -> sqlx::Result<()> {
    sqlx::query!("update bus.recovery set walked = true where stream = $1", stream).execute(db).await?;
    Ok(())
}

/// Deletes the mark.
pub(crate) async fn finish(db: &mut PgConnection, stream: &str) -> sqlx::Result<()> {
    sqlx::query!("delete from bus.recovery where stream = $1", stream).execute(db).await?;
    Ok(())
}

/// How far the recovery is, if one is under way.
pub(crate) async fn progress(db: &mut Connection) -> sqlx::Result<Option<String>> {
    sqlx::query_scalar!(
        r#"select string_agg(
               case when walked
               then format('%s is recovered; events of other streams are applied again: %s messages, %s streams left', stream,
                           (select coalesce(sum(passed), 0) from bus.recovery_reads), (select count(*) from bus.recovery_reads))
               else format('%s is recovered up to %s of %s', stream,
                           (select max(last_seq) from bus.position where position.stream = recovery.stream), until_seq) end, '; ')
           from bus.recovery"#
    )
    .fetch_one(&mut **db)
    .await
}
