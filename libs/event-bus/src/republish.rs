//! Republishing: the tables of the owner → `bus.outbox`, the current snapshot of every aggregate that readers may have missed.
//!
//! A stream that lost events is healed by its owner, because its tables hold the newest version of each aggregate. A request is a
//! row of `bus.republish`: the relay inserts one when the broker lost history (see `relay::heal`), and the function
//! [`request_republish`] inserts one for an operator. Every replica looks for requests once a second, and one of them works on the oldest request of the stream.
//!
//! A page is one transaction: lock the request, read the next ids after its cursor, lock and read these rows, append their
//! snapshots to the outbox, move the cursor, commit. The relay publishes the snapshots like all events.
//!
//! A snapshot never overtakes a newer version, and is never newer than the events before it. The page holds the lock of the row
//! until its events are in the outbox, so the event of the next version gets a greater id. The event of the version that the page
//! read is in the outbox (the page then appends nothing for it), or it was published. A snapshot has the id, the subject and the
//! content of the event that announced its version, so readers that have it skip it.
//!
//! The greatest id is read when the request begins: the events of aggregates that are created later are published anyway, and the
//! republish does not follow them for ever.
//!
//! Live events do not wait behind the whole republish: the next page is appended when fewer than [`LITTLE`] events of the stream
//! wait. A live event waits for one page at most.
//!
//! What if we die …
//! - during a page: Postgres rolls it back, and unlocks the request. Another replica, or this one after its restart, repeats the
//!   page. `a_killed_republish_resumes_where_it_stopped` shows it.
//! - after a page was committed: the cursor is after it. The page is published like all events, and not appended again.
//! - after the last page: the request is deleted in a transaction of its own that finds no more ids; until then another replica
//!   finds none either.
//!
//! A request is not lost: it is deleted only by its last page, or by a newer request that includes it, which begins from the
//! beginning. So a stream that is lost again while it is healed is healed from the beginning.
//!
//! While NATS is away, at most `LITTLE` events and one page wait. A row that another transaction keeps locked delays the
//! republish, and no live event: the page gives up after 100 ms, and is tried again.

mod request;
mod source;

pub(crate) use request::{Later, record};
pub use request::{Republish, request_republish};
pub use source::Snapshots;
pub(crate) use source::Source;

use crate::connection::Transaction;
use crate::database::Database;
use crate::estimate::Estimate;
use crate::outbox::{Columns, Outgoing};
use crate::panics;
use crate::retry::Backoff;
use anyhow::{Context, ensure};
use request::Request;
use std::collections::HashSet;
use std::time::Duration;
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;

/// How often to look for requests.
const LOOK: Duration = Duration::from_secs(1);
/// How long to wait for the relay before the next page: doubles up to [`LOOK`].
const DRAIN: Duration = Duration::from_millis(5);
/// How long a page may take before the connection to Postgres counts as dead.
const PAGE: Duration = Duration::from_secs(20);
/// The most aggregates in a page: their bodies are in memory several times.
const ROWS: usize = 64;
/// Aggregates in the first page. The number doubles with each page up to [`ROWS`], unless pages have more than [`BYTES`].
const FIRST_ROWS: usize = 16;
/// Bytes of bodies in a page, above which the next page has half as many aggregates.
const BYTES: usize = 1 << 20;
/// The next page is appended when fewer events than this wait.
pub(crate) const LITTLE: i64 = 128;

/// A page waits briefly for a lock: it holds the locks of other rows meanwhile. Ids are looked up in indexes whatever the statistics
/// of a young table say.
const BEGIN: &str = "begin; set local lock_timeout = '100ms'; set local enable_seqscan = off";

enum Step {
    /// There is no request, or another replica works on it.
    Nothing,
    /// Too many events wait, or it is too early.
    Crowded,
    /// A page was appended, or a request is done.
    Page,
}

/// The worker of one stream in this process.
struct Republisher<'a> {
    database: &'a Database,
    stream: &'static str,
    source: &'a dyn Source,
    rows: usize,
    /// The request on which this process works.
    progress: Option<(i64, Estimate)>,
}

/// Works on the requests of `stream` until `stop`.
pub(crate) async fn run(
    database: &Database,
    stream: &'static str,
    source: &dyn Source,
    stop: &CancellationToken,
) -> anyhow::Result<()> {
    let what = format!("republishing {stream}");
    let mut backoff = Backoff::default();
    let mut republisher = Republisher { database, stream, source, rows: FIRST_ROWS, progress: None };
    let mut pause = LOOK;
    while stop.run_until_cancelled(sleep(pause)).await.is_some() {
        let step = timeout(PAGE, panics::caught("republishing", republisher.step())).await;
        pause = match step.context("Postgres does not answer").flatten() {
            Ok(step) => {
                backoff.succeed(&what);
                match step {
                    Step::Nothing => LOOK,
                    Step::Crowded => (pause * 2).clamp(DRAIN, LOOK),
                    Step::Page => DRAIN,
                }
            }
            Err(error) => backoff.fail(&what, &error),
        };
    }
    Ok(())
}

impl Republisher<'_> {
    async fn step(&mut self) -> anyhow::Result<Step> {
        let mut tx = self.database.begin_in_background(BEGIN).await?;
        let Some(mut request) = request::next(&mut tx, self.stream).await? else {
            tx.rollback().await?;
            return Ok(Step::Nothing);
        };
        self.begin(&mut tx, &mut request).await?;
        if request.must_wait() {
            tx.commit().await?;
            return Ok(Step::Crowded);
        }
        self.page(tx, request).await?;
        Ok(Step::Page)
    }

    /// Records that the request has begun, and remembers since when this process works on it.
    async fn begin(&mut self, tx: &mut Transaction, request: &mut Request) -> anyhow::Result<()> {
        let (id, passed, reason) = (request.id, request.passed, request.reason.as_str());
        let stream = self.stream;
        if request.begun_at.is_none() {
            let (total, until) = match &request.ids {
                Some(ids) => (i64::try_from(ids.len())?, None),
                None => self.source.extent(tx).await.map(|(count, last)| (count, Some(last)))?,
            };
            request::begin(tx, id, total, until.as_deref()).await?;
            request.until = until;
            tracing::info!(stream, reason, total, "republishing the current state from the tables");
        }
        if self.progress.as_ref().is_none_or(|(request, _)| *request != id) {
            if passed > 0 {
                tracing::info!(stream, reason, passed, "resuming the republish");
            }
            self.progress = Some((id, Estimate::new(passed)));
        }
        Ok(())
    }

    async fn page(&mut self, mut tx: Transaction, request: Request) -> anyhow::Result<()> {
        let mut ids: Vec<String> = match &request.ids {
            Some(ids) => ids.iter().filter(|id| **id > request.cursor).take(self.rows).cloned().collect(),
            None => self.source.ids(&mut tx, &request.cursor, i64::try_from(self.rows)?).await?,
        };
        if let Some(until) = &request.until {
            ids.retain(|id| id <= until);
        }
        let Some(last) = ids.last() else {
            request::finish(&mut tx, request.id).await?;
            tx.commit().await?;
            self.done(&request);
            return Ok(());
        };
        ensure!(ids.is_sorted() && *ids[0] > *request.cursor, "the ids after {:?} are not in order", request.cursor);
        let snapshots = self.source.lock(&mut tx, &ids, request.since).await?;
        let foreign = snapshots.iter().find(|snapshot| snapshot.stream != self.stream);
        ensure!(foreign.is_none(), "a snapshot for another stream than {}: {foreign:?}", self.stream);
        let appended = append_missing(&mut tx, self.stream, &snapshots).await?;
        if request.ids.is_some() && snapshots.len() < ids.len() {
            let known: HashSet<&str> = snapshots.iter().map(|snapshot| snapshot.aggregate_id.as_str()).collect();
            let unknown: Vec<&String> = ids.iter().filter(|id| !known.contains(id.as_str())).collect();
            tracing::warn!(stream = self.stream, ?unknown, "cannot republish these ids: the tables do not have them");
        }
        let (passed, appended) = (i64::try_from(ids.len())?, i64::try_from(appended)?);
        request::move_on(&mut tx, request.id, last, passed, appended).await?;
        tx.commit().await?;
        let bytes: usize = snapshots.iter().map(|snapshot| snapshot.payload.len()).sum();
        self.rows = if bytes > BYTES { self.rows / 2 } else { self.rows * 2 }.clamp(1, ROWS);
        self.log(&request, request.passed + passed);
        Ok(())
    }

    /// Logs the progress of a request that takes long.
    fn log(&mut self, request: &Request, passed: i64) {
        let total = request.total.unwrap_or_default().max(passed);
        let Some((_, estimate)) = &mut self.progress else { return };
        let Some(remaining) = estimate.due(passed, total) else { return };
        tracing::info!(stream = self.stream, reason = request.reason, passed, total, remaining, "republishing");
    }

    fn done(&mut self, request: &Request) {
        self.progress = None;
        let took =
            request.begun_at.map_or(Duration::ZERO, |begun| (request.now - begun).try_into().unwrap_or_default());
        tracing::info!(
            stream = self.stream,
            reason = request.reason,
            aggregates = request.passed,
            events = request.appended,
            took = format!("{:.1}s", took.as_secs_f64()),
            "republished the current state"
        );
    }
}

/// Appends the snapshots whose events are not in the outbox already. Returns how many these are.
async fn append_missing(tx: &mut Transaction, stream: &str, snapshots: &[Outgoing]) -> anyhow::Result<u64> {
    let columns: Columns = snapshots.iter().collect();
    let appended = sqlx::query!(
        "insert into bus.outbox (stream, subject, aggregate_id, version, payload, headers)
         select $1, subject, aggregate_id, version, payload, headers::json
         from unnest($2::text[], $3::text[], $4::bigint[], $5::text[], $6::text[])
              as events (subject, aggregate_id, version, payload, headers)
         on conflict do nothing",
        stream,
        &columns.subjects as _,
        &columns.aggregate_ids as _,
        &columns.versions,
        &columns.payloads as _,
        &columns.headers as _,
    );
    let appended = appended.execute(&mut **tx).await?.rows_affected();
    tx.wake_relays();
    Ok(appended)
}
