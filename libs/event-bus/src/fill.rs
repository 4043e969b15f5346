//! Filling: the owner of a stream → the tables of a reader that has missed events, or that is new.
//!
//! A stream is a window. What a reader has missed there is in the tables of the owner, which replies with the current snapshots (see
//! `owner`). A request is a row of `bus.fills`: the subscription inserts one when messages were deleted before they were read, or
//! when the database has no position of the consumer, and messages were trimmed or acknowledged before (see `subscription::missed`); the
//! function [`rebuild`] inserts one for an operator. Every process of the service looks for requests once a second, and one of them works on the oldest one.
//!
//! A page is one transaction: lock the request, request the next snapshots after the cursor from the owner, apply them as events with the
//! handler of the subscription, move the cursor, commit. The subscription goes on beside it. A handler ignores what is not newer, so
//! the order of the two does not matter. A snapshot is at least as new as each event that was missed before the request: the owner
//! had committed it before it was published. So after the last page nothing is missing.
//!
//! A rebuild does more, if the handler is a [`Replica`](crate::Replica): see `exact`. Neither a fill nor a rebuild
//! deletes the table, or builds a second one: rows do not depend on each other, so each is repaired in its place. The replica is never
//! empty, and no correct row becomes older.
//!
//! What if we die …
//! - during a page: Postgres rolls it back, and unlocks the request. Another process, or this one after its restart, repeats the
//!   page. `a_killed_fill_resumes_at_its_cursor` shows it.
//! - after a page was committed: the cursor is after it.
//! - after the last page: the request has `finished_at`.
//!
//! While the owner is away, the request waits, a warning is logged once a minute, and the request keeps the error. Nothing but the row of the request is locked
//! meanwhile.
//!
//! A snapshot that the handler cannot apply is logged as an error and counted in the request. The others are applied.

mod exact;
pub(crate) mod request;

pub use request::{Rebuilt, rebuild};

use crate::broker::Broker;
use crate::connection::Transaction;
use crate::copy::Copy;
use crate::database::Database;
use crate::dead_letters::{self, Applied};
use crate::error::is_outage;
use crate::estimate::Estimate;
use crate::owner::Owner;
use crate::panics;
use crate::retry::Backoff;
use crate::snapshot::Snapshot;
use crate::subscription::{Handler, Received};
use anyhow::Context;
use event_bus_core::Event;
use exact::{Differing, Doubts};
use request::{Done, Request};
use sqlx::Executor;
use std::collections::BTreeMap;
use std::time::Duration;
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;

/// How often to look for requests.
const LOOK: Duration = Duration::from_secs(1);
/// The pause between two pages. Live events are applied meanwhile.
const PAUSE: Duration = Duration::from_millis(2);
/// How long a page may take before the connection to Postgres counts as dead.
const PAGE: Duration = Duration::from_secs(20);
/// How long it may take to keep the error of a page.
const KEEP: Duration = Duration::from_secs(1);
/// The most aggregates in a page. Fewer after a failure, because the page may have taken too long.
const ROWS: usize = 256;

/// A page waits for a lock as long as a batch of events.
const BEGIN: &str = "begin; set local lock_timeout = '1s'; select bus.require_recovered()";

/// Fills the tables of one handler in this process.
struct Filler<'a, H> {
    database: &'a Database,
    broker: &'a Broker,
    durable: &'static str,
    handler: &'a H,
    copy: Option<&'a dyn Copy>,
    owner: Owner,
    rows: usize,
    /// The request on which this process works.
    estimate: Option<(i64, Estimate)>,
    doubts: Option<Doubts>,
    differing: Option<Differing>,
}

enum Step {
    /// There is no request, or another replica works on it.
    Nothing,
    /// The request has begun, or some doubts remain.
    More,
    /// The cursor was moved.
    Page(Request, Done),
    /// The last page.
    Finished(Request, Done),
}

/// Rows that are deleted before their snapshots are applied, with the versions that they must still have.
#[derive(Clone, Copy)]
struct Replaced<'a> {
    copy: &'a dyn Copy,
    versions: &'a BTreeMap<String, i64>,
}

/// Works on the requests to fill the tables of `handler` until `stop`.
pub(crate) async fn run<H: Handler>(
    database: &Database,
    broker: &Broker,
    durable: &'static str,
    handler: &H,
    copy: Option<&dyn Copy>,
    stop: &CancellationToken,
) -> anyhow::Result<()> {
    let stream = H::Event::STREAM;
    let what = format!("filling {durable} from the owner of {stream}");
    let owner = Owner::new(broker.clone(), stream, 1);
    let (rows, estimate, doubts, differing) = (ROWS, None, None, None);
    let mut filler = Filler { database, broker, durable, handler, copy, owner, rows, estimate, doubts, differing };
    let (mut backoff, mut pause) = (Backoff::default(), LOOK);
    while stop.run_until_cancelled(sleep(pause)).await.is_some() {
        // A page that is cancelled is rolled back.
        let step = timeout(PAGE, panics::caught("filling", filler.step()));
        let Some(step) = stop.run_until_cancelled(step).await else { break };
        pause = match step.context("Postgres does not answer").flatten() {
            Ok(Step::Nothing) => LOOK,
            Ok(step) => {
                backoff.succeed(&what);
                filler.log(step);
                filler.rows = (filler.rows * 2).min(ROWS);
                PAUSE
            }
            Err(error) => {
                filler.rows = (filler.rows / 4).max(1);
                // What they are based on was rolled back.
                filler.doubts = None;
                // If Postgres is away, nothing can be kept.
                let _ = timeout(KEEP, filler.keep(&error)).await;
                backoff.fail(&what, &error)
            }
        };
    }
    Ok(())
}

impl<H: Handler> Filler<'_, H> {
    async fn step(&mut self) -> anyhow::Result<Step> {
        let mut tx = self.database.begin_in_background(BEGIN).await?;
        let step = self.work(&mut tx).await;
        tx.end(step).await
    }

    /// Keeps the error in the request, for the command `rebuild`.
    async fn keep(&self, error: &anyhow::Error) -> anyhow::Result<()> {
        let mut db = self.database.background_connection().await?;
        Ok(request::failed(&mut db, H::Event::STREAM, self.durable, &format!("{error:#}")).await?)
    }

    async fn work(&mut self, tx: &mut Transaction) -> anyhow::Result<Step> {
        let (stream, consumer) = (H::Event::STREAM, self.durable);
        let Some(request) = request::next(tx, stream, consumer).await? else { return Ok(Step::Nothing) };
        self.broker.connected()?;
        let (reason, passed) = (request.reason.as_str(), request.passed);
        if request.begun_at.is_none() {
            let total = self.owner.total().await?;
            request::begin(tx, request.id, total).await?;
            tracing::info!(
                stream,
                consumer,
                reason,
                total,
                exact = request.exact,
                "filling from the owner of {stream}"
            );
            return Ok(Step::More);
        }
        if self.estimate.as_ref().is_none_or(|(id, _)| *id != request.id) {
            if passed > 0 {
                tracing::info!(stream, consumer, reason, passed, "resuming to fill from the owner of {stream}");
            }
            self.estimate = Some((request.id, Estimate::new(passed)));
        }
        match self.copy.filter(|_| request.exact) {
            Some(copy) => self.repair(tx, copy, request).await,
            None => self.page(tx, request).await,
        }
    }

    /// Applies the next page of snapshots.
    async fn page(&mut self, tx: &mut Transaction, request: Request) -> anyhow::Result<Step> {
        let page = self.owner.after(&request.cursor, self.rows).await?;
        let snapshots: Vec<&Snapshot> = page.snapshots.iter().collect();
        let failed = self.apply(tx, &snapshots, None).await?;
        self.move_on(tx, request, page.until.as_deref(), Done { passed: count(&snapshots), written: 0, failed }).await
    }

    async fn move_on(
        &mut self,
        tx: &mut Transaction,
        request: Request,
        until: Option<&str>,
        done: Done,
    ) -> anyhow::Result<Step> {
        if let (None, Some(copy)) = (until, self.copy) {
            copy.filled(tx).await?;
        }
        request::move_on(tx, request.id, until, &done).await?;
        Ok(if until.is_some() { Step::Page(request, done) } else { Step::Finished(request, done) })
    }

    /// Applies snapshots as events. Returns how many could not be applied.
    async fn apply(
        &self,
        tx: &mut Transaction,
        snapshots: &[&Snapshot],
        replaced: Option<Replaced<'_>>,
    ) -> anyhow::Result<i64> {
        let (mut events, mut failed) = (Vec::new(), 0);
        for snapshot in snapshots {
            match H::Event::decode(&snapshot.subject, snapshot.body.get().as_bytes()) {
                Ok(event) => events.push(Received { event, headers: snapshot.headers.clone() }),
                Err(error) => {
                    self.failed(&format!("{}-{}", snapshot.id, snapshot.version), &error.into());
                    failed += 1;
                }
            }
        }
        if events.is_empty() || self.try_apply(tx, &events, replaced).await?.is_ok() {
            return Ok(failed);
        }
        for event in events.chunks(1) {
            if let Err(error) = self.try_apply(tx, event, replaced).await? {
                self.failed(&event[0].event_id(), &error);
                failed += 1;
            }
        }
        Ok(failed)
    }

    /// Applies `events`. The inner result is the failure of the handler, which has changed nothing then.
    async fn try_apply(
        &self,
        tx: &mut Transaction,
        events: &[Received<H::Event>],
        replaced: Option<Replaced<'_>>,
    ) -> anyhow::Result<anyhow::Result<()>> {
        tx.execute("savepoint filled").await?;
        let applied = panics::caught("the handler", self.handle(tx, events, replaced)).await;
        match applied {
            Err(error) if is_outage(&error) => Err(error),
            Err(error) => {
                tx.execute("rollback to savepoint filled").await?;
                Ok(Err(error))
            }
            Ok(()) => {
                tx.execute("release savepoint filled").await?;
                Ok(Ok(()))
            }
        }
    }

    async fn handle(
        &self,
        tx: &mut Transaction,
        events: &[Received<H::Event>],
        replaced: Option<Replaced<'_>>,
    ) -> anyhow::Result<()> {
        let aggregates: Vec<String> = events.iter().map(|event| event.aggregate_id()).collect();
        if let Some(Replaced { copy, versions }) = replaced {
            let rows = aggregates.iter().filter_map(|id| Some((id.clone(), *versions.get(id)?)));
            let (ids, versions): (Vec<_>, Vec<_>) = rows.unzip();
            if !ids.is_empty() {
                copy.remove(tx, &ids, &versions).await?;
            }
        }
        self.handler.apply(tx, events).await?;
        let versions = events.iter().map(|event| event.version()).collect();
        // No message of the stream was applied.
        let applied = Applied { aggregates, versions, seqs: vec![-1; events.len()] };
        dead_letters::supersede(tx, H::Event::STREAM, self.durable, &applied).await?;
        Ok(())
    }

    fn failed(&self, event_id: &str, error: &anyhow::Error) {
        let (stream, consumer) = (H::Event::STREAM, self.durable);
        tracing::error!(
            stream,
            consumer,
            event_id,
            "a snapshot of the owner cannot be applied, and is missing here: {error:#}. When the cause is mended, have its owner \
             publish it again: `republish --id <id>`"
        );
    }

    fn log(&mut self, step: Step) {
        let (stream, consumer) = (H::Event::STREAM, self.durable);
        match step {
            Step::Nothing | Step::More => {}
            Step::Page(request, done) => {
                let passed = request.passed + done.passed;
                let total = request.total.unwrap_or_default().max(passed);
                let Some((_, estimate)) = &mut self.estimate else { return };
                let Some(remaining) = estimate.due(passed, total) else { return };
                let reason = request.reason;
                tracing::info!(
                    stream,
                    consumer,
                    reason,
                    passed,
                    total,
                    remaining,
                    "filling from the owner of {stream}"
                );
            }
            Step::Finished(request, done) => {
                self.estimate = None;
                let took = request.begun_at.map_or(0.0, |begun| (request.now - begun).as_seconds_f64());
                tracing::info!(
                    stream,
                    consumer,
                    reason = request.reason,
                    aggregates = request.passed + done.passed,
                    written = request.exact.then_some(request.written + done.written),
                    failed = request.failed + done.failed,
                    took = format!("{took:.1}s"),
                    "filled from the owner of {stream}"
                );
            }
        }
    }
}

fn count<T>(items: &[T]) -> i64 {
    i64::try_from(items.len()).unwrap_or(i64::MAX)
}
