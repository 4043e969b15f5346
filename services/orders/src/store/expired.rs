//! Orders that were not paid in time, by the clock of Postgres.

use super::{Row, by_id};
use crate::order::Order;
use contracts::{Id, Timestamp};
use sqlx::PgConnection;
use std::collections::BTreeMap;

/// A time before which no unpaid order expires, including orders that are created from now on.
pub async fn first_expiry(db: &mut PgConnection) -> sqlx::Result<Option<Timestamp>> {
    // A minute ago: an order that is being inserted may have read the clock before this statement began.
    let first = sqlx::query_scalar!(
        "select least(min(expires_at), now() - interval '1 minute') from orders where status = 'created'"
    );
    Ok(first.fetch_one(db).await?.map(Timestamp))
}

/// Locks at most `limit` orders that expired at `from` or later, until the transaction ends.
///
/// Skips orders that another transaction has locked.
pub async fn lock_expired(
    db: &mut PgConnection,
    limit: usize,
    from: Option<Timestamp>,
) -> anyhow::Result<BTreeMap<Id, Order>> {
    let rows = sqlx::query_as!(
        Row,
        "select id, user_id, status, expires_at, ticket_id, title, price, ticket_version, reservation, version
         from orders where status = 'created' and expires_at >= coalesce($2, timestamptz '-infinity')
                           and expires_at <= now()
         order by expires_at limit $1 for update skip locked",
        i64::try_from(limit)?,
        from.map(|from| from.0),
    );
    by_id(rows.fetch_all(db).await?)
}

/// How long ago `time` was, in seconds, by the clock of Postgres.
pub async fn seconds_since(db: &mut PgConnection, time: Timestamp) -> sqlx::Result<f64> {
    sqlx::query_scalar!(
        r#"select extract(epoch from clock_timestamp() - $1::timestamptz)::double precision as "seconds!""#,
        time.0,
    )
    .fetch_one(db)
    .await
}
