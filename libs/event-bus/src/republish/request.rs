//! Requests to republish, in `bus.republish`.

use crate::error::is_outage;
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
const POLL: Duration = Duration::from_millis(100);

/// What a service publishes again.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Republish {
    /// The current snapshot of every aggregate.
    All,
    /// Those that have changed in this last time.
    Since(Duration),
    /// Those of these aggregates.
    Ids(Vec<String>),
}

/// Requests that the service that owns the database at `url` publishes current snapshots again.
///
/// Only records the request; a running service does the work, once. Returns false if none has begun it within 5 s: the request
/// stays recorded.
///
/// # Errors
/// Postgres was away for 10 s, the database belongs to another service, or none of its streams can be republished.
pub async fn request_republish(url: &str, schema: &Schema, what: Republish) -> anyhow::Result<bool> {
    let options = postgres::options(url, "republish")?;
    let db = PgPoolOptions::new().max_connections(1).acquire_timeout(postgres::OPEN).connect_lazy_with(options);
    let (since, ids) = match what {
        Republish::All => (None, None),
        Republish::Since(time) => (Some(time.as_secs_f64()), None),
        Republish::Ids(mut ids) => {
            ids.sort_unstable();
            ids.dedup();
            (None, Some(ids))
        }
    };
    let requested = async {
        let request = async || {
            schema.belongs_here(&db).await?;
            let ids = ids.as_deref();
            let requests = sqlx::query_scalar!(
                r#"select bus.request_republish(stream, 'by hand', now() - make_interval(secs => $1), $2, 0, 0) as "id!"
                   from bus.relay where republishes"#,
                since,
                ids as _,
            );
            Ok(requests.fetch_all(&db).await?)
        };
        let requests = patiently(PATIENCE, "requesting a republish", is_outage, request).await?;
        ensure!(!requests.is_empty(), "no stream of this database can be republished; has its service been started?");
        has_begun(&db, &requests).await
    };
    let requested = requested.await;
    db.close().await;
    requested
}

/// Whether a service has seen all requests soon.
async fn has_begun(db: &PgPool, requests: &[i64]) -> anyhow::Result<bool> {
    let deadline = Instant::now() + SEEN;
    loop {
        let unseen = sqlx::query_scalar!(
            r#"select count(*) as "count!" from bus.republish where id = any($1) and begun_at is null"#,
            requests
        );
        if unseen.fetch_one(db).await.context("cannot see whether a service has begun")? == 0 {
            return Ok(true);
        }
        if Instant::now() >= deadline {
            return Ok(false);
        }
        sleep(POLL).await;
    }
}

/// When to begin.
pub(crate) struct Later {
    /// The stream has reached this position.
    pub(crate) seq: u64,
    /// This long ago.
    pub(crate) delay: Duration,
}

/// Records a request of the relay, which has locked the stream, in its transaction.
pub(crate) async fn record(
    db: &mut PgConnection,
    stream: &str,
    reason: &str,
    since: Option<OffsetDateTime>,
    after: Option<Later>,
) -> anyhow::Result<()> {
    let after = after.unwrap_or(Later { seq: 0, delay: Duration::ZERO });
    let request = sqlx::query_scalar!(
        "select bus.request_republish($1, $2, $3, null, $4, $5)",
        stream,
        reason,
        since,
        i64::try_from(after.seq)?,
        after.delay.as_secs_f64(),
    );
    request.fetch_one(db).await?;
    Ok(())
}

/// A request, and the state of its stream.
pub(super) struct Request {
    pub(super) id: i64,
    pub(super) reason: String,
    pub(super) since: Option<OffsetDateTime>,
    pub(super) ids: Option<Vec<String>>,
    pub(super) cursor: String,
    pub(super) total: Option<i64>,
    pub(super) passed: i64,
    pub(super) appended: i64,
    pub(super) begun_at: Option<OffsetDateTime>,
    /// The last aggregate that is looked at.
    pub(super) until: Option<String>,
    pub(super) now: OffsetDateTime,
    /// Seconds after `begun_at`.
    pub(super) delay: f64,
    /// How many events wait, or the limit.
    pub(super) waiting: i64,
}

impl Request {
    /// Whether the next page has to wait.
    pub(super) fn must_wait(&self) -> bool {
        let begun = self.begun_at.unwrap_or(self.now);
        self.waiting >= super::LITTLE || (self.now - begun).as_seconds_f64() < self.delay
    }
}

/// Locks the oldest request of `stream`. Returns `None` if there is none, or if another replica works on it.
pub(super) async fn next(db: &mut PgConnection, stream: &str) -> sqlx::Result<Option<Request>> {
    let next = sqlx::query_as!(
        Request,
        r#"select id, reason, since, ids, cursor, total, passed, appended, begun_at, until, delay, now() as "now!",
                  bus.waiting_events($1, $2) as "waiting!"
           from bus.republish
           where id = (
               select min(id) from bus.republish
               where stream = $1
                 and after_seq <= (select max(last_seq) from bus.position where position.stream = $1)
                 and (begun_at is null or now() >= begun_at + make_interval(secs => delay))
           )
           for update skip locked"#,
        stream,
        super::LITTLE,
    );
    next.fetch_optional(db).await
}

pub(super) async fn begin(db: &mut PgConnection, id: i64, total: i64, until: Option<&str>) -> sqlx::Result<()> {
    let begin = sqlx::query!(
        "update bus.republish set begun_at = now(), total = $2, until = $3 where id = $1",
        id,
        total,
        until,
    );
    begin.execute(db).await?;
    Ok(())
}

pub(super) async fn move_on(
    db: &mut PgConnection,
    id: i64,
    cursor: &str,
    passed: i64,
    appended: i64,
) -> sqlx::Result<()> {
    let move_on = sqlx::query!(
        "update bus.republish set cursor = $2, passed = passed + $3, appended = appended + $4 where id = $1",
        id,
        cursor,
        passed,
        appended,
    );
    move_on.execute(db).await?;
    Ok(())
}

pub(super) async fn finish(db: &mut PgConnection, id: i64) -> sqlx::Result<()> {
    sqlx::query!("delete from bus.republish where id = $1", id).execute(db).await?;
    Ok(())
}
