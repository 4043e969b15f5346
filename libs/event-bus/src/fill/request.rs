//! Requests to fill a replica, in `bus.fills`.

use crate::error::is_outage;
use crate::estimate::Estimate;
use crate::postgres;
use crate::retry::patiently;
use crate::schema::Schema;
use anyhow::{Context, ensure};
use sqlx::postgres::PgPoolOptions;
use sqlx::types::time::OffsetDateTime;
use sqlx::{PgConnection, PgPool};
use std::time::Duration;
use tokio::time::{Instant, sleep};

/// How long Postgres may be away.
const PATIENCE: Duration = Duration::from_secs(10);
/// How long a running service may take to see a request.
const SEEN: Duration = Duration::from_secs(5);
/// How long a rebuild may make no progress.
const STALLED: Duration = Duration::from_mins(1);
const POLL: Duration = Duration::from_millis(100);

/// What became of a request to rebuild the replicas of a service.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rebuilt {
    /// No service has begun within 5 s. The request stays recorded.
    NotBegun,
    /// The replicas equal their owners, except aggregates that the handler could not apply.
    Done {
        /// Aggregates that were compared.
        passed: i64,
        /// Rows that were written or deleted.
        written: i64,
        /// Aggregates that the handler could not apply. The log of the service names them.
        failed: i64,
    },
}

/// Requests that the running service that owns the database at `url` rebuilds its replicas, and waits until it has.
///
/// Logs the progress of what takes longer than 2 s. If this process ends before, the service continues.
///
/// # Errors
/// The service has no replica, Postgres was away for 10 s, the database belongs to another service, or the rebuild made no progress
/// for a minute: the error says why, and the service goes on trying.
pub async fn rebuild(url: &str, schema: &Schema) -> anyhow::Result<Rebuilt> {
    ensure!(!schema.replicas().is_empty(), "this service has no replica");
    let options = postgres::options(url, "rebuild")?;
    let db = PgPoolOptions::new().max_connections(1).acquire_timeout(postgres::OPEN).connect_lazy_with(options);
    let rebuilt = async {
        let request = async || {
            schema.belongs_here(&db).await?;
            let mut requests = Vec::new();
            for replica in schema.replicas() {
                let mut db = db.acquire().await?;
                requests.push(record(&mut db, replica.copy.stream(), replica.consumer, "by hand", true).await?);
            }
            Ok(requests)
        };
        let requests = patiently(PATIENCE, "requesting a rebuild", is_outage, request).await?;
        wait(&db, &requests).await
    };
    let rebuilt = rebuilt.await;
    db.close().await;
    rebuilt
}

async fn wait(db: &PgPool, requests: &[i64]) -> anyhow::Result<Rebuilt> {
    let (deadline, mut estimate) = (Instant::now() + SEEN, Estimate::new(0));
    let (mut before, mut moved, mut logged) = ((0, 0), Instant::now(), None);
    loop {
        let state = sqlx::query!(
            r#"select count(*) filter (where begun_at is not null) as "begun!", coalesce(bool_and(finished_at is not null), true) as "done!",
                      coalesce(sum(passed), 0)::bigint as "passed!", coalesce(sum(written), 0)::bigint as "written!",
                      coalesce(sum(failed), 0)::bigint as "failed!", coalesce(sum(total), 0)::bigint as "total!",
                      string_agg(error, '; ' order by id) filter (where finished_at is null) as error
               from bus.fills where id = any($1)"#,
            requests
        );
        let state = state.fetch_one(db).await.context("cannot see the progress; the service continues")?;
        let (passed, total) = (state.passed, state.total.max(state.passed));
        if state.done {
            return Ok(Rebuilt::Done { passed, written: state.written, failed: state.failed });
        }
        // A service that cannot begin keeps the reason.
        if state.begun == 0 && state.error.is_none() && Instant::now() >= deadline {
            return Ok(Rebuilt::NotBegun);
        }
        if before != (passed, state.written) {
            (before, moved) = ((passed, state.written), Instant::now());
        }
        if state.error != logged {
            logged = state.error;
            if let Some(error) = &logged {
                tracing::warn!("the service tries again until it works: {error}");
            }
        }
        let why = logged.as_deref().unwrap_or("the log of the service says why");
        ensure!(
            moved.elapsed() < STALLED,
            "no progress for a minute, after {passed} of {total}: {why}. The service goes on trying"
        );
        if let Some(remaining) = estimate.due(passed, total) {
            tracing::info!(passed, total, remaining, "rebuilding");
        }
        sleep(POLL).await;
    }
}

/// A request to fill a replica.
pub(super) struct Request {
    pub(super) id: i64,
    pub(super) reason: String,
    pub(super) exact: bool,
    pub(super) cursor: String,
    pub(super) total: Option<i64>,
    pub(super) passed: i64,
    pub(super) written: i64,
    pub(super) failed: i64,
    pub(super) begun_at: Option<OffsetDateTime>,
    pub(super) now: OffsetDateTime,
}

/// What a page has done.
#[derive(Default)]
pub(super) struct Done {
    pub(super) passed: i64,
    pub(super) written: i64,
    pub(super) failed: i64,
}

/// Records a request. It is the same as one that has not begun.
pub(crate) async fn record(
    db: &mut PgConnection,
    stream: &str,
    consumer: &str,
    reason: &str,
    exact: bool,
) -> sqlx::Result<i64> {
    let request =
        sqlx::query_scalar!(r#"select bus.request_fill($1, $2, $3, $4) as "id!""#, stream, consumer, reason, exact);
    request.fetch_one(db).await
}

/// Locks the oldest request. Returns `None` if there is none, or if another replica works on it.
pub(super) async fn next(db: &mut PgConnection, stream: &str, consumer: &str) -> sqlx::Result<Option<Request>> {
    let next = sqlx::query_as!(
        Request,
        r#"select id, reason, exact, cursor, total, passed, written, failed, begun_at, now() as "now!"
           from bus.fills
           where id = (select min(id) from bus.fills where stream = $1 and consumer = $2 and finished_at is null)
             and finished_at is null
           for update skip locked"#,
        stream,
        consumer,
    );
    next.fetch_optional(db).await
}

pub(super) async fn begin(db: &mut PgConnection, id: i64, total: i64) -> sqlx::Result<()> {
    let begin =
        sqlx::query!("update bus.fills set begun_at = now(), total = $2, error = null where id = $1", id, total);
    begin.execute(db).await?;
    Ok(())
}

/// Moves the cursor to `cursor`; if there is none, the request is done.
pub(super) async fn move_on(db: &mut PgConnection, id: i64, cursor: Option<&str>, done: &Done) -> sqlx::Result<()> {
    let move_on = sqlx::query!(
        "update bus.fills
         set cursor = coalesce($2, cursor), finished_at = case when $2::text is null then now() end,
             passed = passed + $3, written = written + $4, failed = failed + $5, error = null
         where id = $1",
        id,
        cursor,
        done.passed,
        done.written,
        done.failed,
    );
    move_on.execute(db).await?;
    Ok(())
}

/// Adds to what a request has done. Its cursor stays.
pub(super) async fn add(db: &mut PgConnection, id: i64, done: &Done) -> sqlx::Result<()> {
    let add = sqlx::query!(
        "update bus.fills set written = written + $2, failed = failed + $3 where id = $1",
        id,
        done.written,
        done.failed,
    );
    add.execute(db).await?;
    Ok(())
}

/// Keeps why the oldest request makes no progress, unless another replica works on it.
pub(super) async fn failed(db: &mut PgConnection, stream: &str, consumer: &str, error: &str) -> sqlx::Result<()> {
    let failed = sqlx::query!(
        "update bus.fills set error = $3
         where id = (
             select id from bus.fills
             where id = (select min(id) from bus.fills where stream = $1 and consumer = $2 and finished_at is null)
                   and finished_at is null and error is distinct from $3
             for update skip locked)",
        stream,
        consumer,
        error,
    );
    failed.execute(db).await?;
    Ok(())
}
