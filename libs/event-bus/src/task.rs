//! Durable tasks: work with an effect outside of the database, such as an HTTP request that charges a card.
//!
//! A request commits the intent as a row of `bus.tasks`, in the transaction of the change that causes it
//! ([`Transaction::schedule`]). A worker leases the row, performs the task outside of any transaction, and commits the
//! result, its events and the deletion of the row together. This avoids a dual write. The effect may happen more than
//! once, with the same key; its result is committed once.
//!
//! What if we die …
//! - before the intent is committed: nothing happens.
//! - after it, before the lease: any worker finds the row.
//! - between lease and commit, before or after the effect: the lease ends, and another attempt performs the task with the
//!   same key. `a_task_whose_worker_died_is_performed_again_after_its_lease` shows it.
//! - after the commit: the row is gone and the events are in the outbox.
//! - in every attempt, because the task kills its process: attempts are counted when they begin, so the task becomes dead.
//!
//! A frozen worker may continue after another one has leased its task. Both perform the task, and the first to commit
//! deletes the row. The other finds no row and commits nothing.
//! `of_two_attempts_that_overlap_one_commits_its_result` shows it.

mod sweep;

use crate::connection::Transaction;
use crate::database::Database;
use crate::duties::Duties;
use crate::error::Result;
use crate::panics;
use crate::postgres::storable;
use crate::retry::{Backoff, exponential, jitter};
use crate::settings::Settings;
use crate::trace;
use anyhow::{Context, anyhow};
use event_bus_core::{decode_json, encode_json};
use serde::{Serialize, de::DeserializeOwned};
use std::sync::Arc;
use std::time::Duration;
use sweep::Sweep;
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;

/// How often to look for due tasks without being woken.
const POLL: Duration = Duration::from_millis(500);
/// How long attempts may continue after a stop.
const STOP: Duration = Duration::from_secs(3);
/// How long a statement may take before the connection to Postgres counts as dead.
const STEP: Duration = Duration::from_secs(10);
/// Results of one kind that are stored at the same time at most.
const COMPLETING: usize = 2;
/// Characters of an error that are stored at most.
const LONGEST_ERROR: usize = 2000;

/// A kind of durable task: work with an effect outside of the database.
pub trait Task: Send + Sync + 'static {
    /// The name of the kind, in the table, in logs and in metrics. Tasks that are waiting are found by it: do not
    /// change it.
    const KIND: &'static str;
    /// What an attempt needs to know. Stored as JSON; a new release has to understand the tasks that wait.
    type Input: Serialize + DeserializeOwned + Send + Sync + 'static;
    /// The outcome. A final refusal, such as a declined card, is an output, not an error.
    type Output: Send + Sync + 'static;

    /// Performs the effect, outside of any transaction: at least once, perhaps twice at the same time. The key is the
    /// same each time: pass it on as the idempotency key.
    ///
    /// The future is dropped after [`Settings::task_timeout`], and 3 s after the service is told to stop. Whether the
    /// effect has happened is then unknown.
    ///
    /// # Errors
    /// The outcome is unknown, or another attempt may succeed. An error and a panic are failed attempts: the next one
    /// begins after a delay, and after [`Settings::task_attempts`] of them the task is dead.
    fn perform(&self, key: &str, input: &Self::Input) -> impl Future<Output = anyhow::Result<Self::Output>> + Send;

    /// Writes the result, and appends the events that announce it, in the transaction that has deleted the task. Committed
    /// once for each task. May schedule the next task under the same key.
    ///
    /// # Errors
    /// A failed attempt. Nothing is committed.
    fn complete(
        &self,
        tx: &mut Transaction,
        key: &str,
        input: &Self::Input,
        output: &Self::Output,
    ) -> impl Future<Output = anyhow::Result<()>> + Send;
}

impl Transaction {
    /// Schedules a task. If this transaction commits, the task is due `delay` after the transaction began. `key` identifies
    /// the cause: 1 to 200 visible ASCII characters. Returns false, and changes nothing, if a task of this kind and key
    /// exists already, dead or not.
    ///
    /// The key of a completed task is free again: the tables of the service have to say what was done.
    ///
    /// # Errors
    /// Postgres refuses a malformed key, an input of more than 1,000,000 bytes, and a delay of more than some thousand
    /// years.
    ///
    /// # Panics
    /// The input has no JSON form: its `Serialize` fails, or a map has keys that are not strings.
    pub async fn schedule<T: Task>(&mut self, key: &str, input: &T::Input, delay: Duration) -> Result<bool> {
        let scheduled = sqlx::query!(
            "insert into bus.tasks (kind, key, input, traceparent, due_at)
             values ($1, $2, $3::text::json, $4, now() + make_interval(secs => $5))
             on conflict (kind, key) do nothing",
            T::KIND,
            key,
            encode_json(input),
            trace::current(),
            delay.as_secs_f64(),
        );
        let scheduled = scheduled.execute(&mut **self).await?.rows_affected() == 1;
        self.wake_workers();
        Ok(scheduled)
    }
}

/// What the attempts of one kind share.
struct Worker<T> {
    database: Database,
    settings: Arc<Settings>,
    task: T,
    stop: CancellationToken,
    /// Permits to store results, because connections are few.
    completing: Semaphore,
}

/// An attempt that has begun.
struct Attempt {
    id: i64,
    key: String,
    input: String,
    traceparent: Option<String>,
    number: u32,
}

/// Why an attempt has no result.
enum Failure {
    Error(anyhow::Error),
    /// The service stops.
    Stopped,
}

/// Performs the tasks of the kind `T` until `stop`.
pub(crate) async fn run<T: Task>(
    database: Database,
    settings: Arc<Settings>,
    duties: &Duties,
    task: T,
    stop: CancellationToken,
) -> anyhow::Result<()> {
    let what = format!("leasing tasks of the kind {}", T::KIND);
    let mut backoff = Backoff::default();
    let mut scheduled = database.scheduled();
    let mut attempts = JoinSet::new();
    let completing = Semaphore::new(COMPLETING);
    let worker = Arc::new(Worker { database, settings, task, stop: stop.clone(), completing });
    let mut sweep = Sweep::default();
    while !stop.is_cancelled() {
        duties.look_for_forgotten(&worker.database).await;
        let free = worker.settings.task_concurrency - attempts.len();
        let leased = timeout(STEP, worker.lease(free, sweep.looks_back())).await.context("Postgres does not answer");
        match leased.flatten() {
            Ok(leased) => {
                backoff.succeed(&what);
                sweep.has_leased(leased.len() < free);
                for attempt in leased {
                    attempts.spawn(worker.clone().attempt(attempt));
                }
                let is_full = attempts.len() == worker.settings.task_concurrency;
                wait_for_work(&mut scheduled, &mut attempts, is_full, &stop).await;
            }
            Err(error) => drop(stop.run_until_cancelled(sleep(backoff.fail(&what, &error))).await),
        }
    }
    while attempts.join_next().await.is_some() {}
    Ok(())
}

/// Returns when there may be a task to lease and room for it, or at the stop.
async fn wait_for_work(
    scheduled: &mut watch::Receiver<u64>,
    attempts: &mut JoinSet<()>,
    is_full: bool,
    stop: &CancellationToken,
) {
    tokio::select! {
        Some(_) = attempts.join_next() => while attempts.try_join_next().is_some() {},
        _ = scheduled.changed(), if !is_full => {}
        () = sleep(jitter(POLL)), if !is_full => {}
        () = stop.cancelled() => {}
    }
}

impl<T: Task> Worker<T> {
    /// Begins attempts of at most `limit` tasks that are due, and became due within the time that `looks_back` says.
    async fn lease(&self, limit: usize, looks_back: Option<Duration>) -> anyhow::Result<Vec<Attempt>> {
        let mut db = self.database.background_connection().await?;
        let leased = sqlx::query!(
            r#"select id as "id!", key as "key!", input::text as "input!", traceparent, attempts as "attempts!"
               from bus.lease_tasks($1, $2, $3, $4)"#,
            T::KIND,
            i64::try_from(limit)?,
            self.settings.lease().as_secs_f64(),
            looks_back.map(|duration| duration.as_secs_f64()),
        );
        let leased = leased.fetch_all(&mut *db).await?.into_iter().map(|row| Attempt {
            id: row.id,
            key: row.key,
            input: row.input,
            traceparent: row.traceparent,
            number: row.attempts.unsigned_abs(),
        });
        Ok(leased.collect())
    }

    async fn attempt(self: Arc<Self>, attempt: Attempt) {
        // All of it: decoding and dropping may panic as well.
        let work = panics::caught("the task", async { Ok(self.perform_and_complete(&attempt).await) });
        let outcome = trace::scope(attempt.traceparent.clone(), work).await;
        let Err(failure) = outcome.unwrap_or_else(|panic| Err(panic.into())) else { return };
        if let Err(error) = self.failed(&attempt, failure).await {
            let (kind, key) = (T::KIND, &attempt.key);
            tracing::warn!(kind, key, "cannot store that an attempt failed; its lease will end: {error:#}");
        }
    }

    async fn perform_and_complete(&self, attempt: &Attempt) -> std::result::Result<(), Failure> {
        let Attempt { key, number, .. } = attempt;
        if *number > self.settings.task_attempts {
            return Err(anyhow!("the process ended during the last attempt").into());
        }
        let input: T::Input = decode_json(attempt.input.as_bytes()).context("cannot decode the input")?;
        let limit = self.settings.task_timeout;
        let output = tokio::select! {
            performed = timeout(limit, self.task.perform(key, &input)) => {
                performed.map_err(|_| anyhow!("not performed within {limit:?}")).flatten()?
            }
            () = self.stopped() => return Err(Failure::Stopped),
        };
        let limit = self.settings.apply_timeout;
        let completing = async {
            let _permit = tokio::select! {
                permit = self.completing.acquire() => permit?,
                () = self.stopped() => return Err(Failure::Stopped),
            };
            Ok(self.complete(attempt, &input, &output).await?)
        };
        timeout(limit, completing).await.map_err(|_| anyhow!("not completed within {limit:?}"))?
    }

    /// Returns [`STOP`] after the stop.
    async fn stopped(&self) {
        self.stop.cancelled().await;
        sleep(STOP).await;
    }

    async fn complete(&self, attempt: &Attempt, input: &T::Input, output: &T::Output) -> anyhow::Result<()> {
        let mut tx = self.database.begin_in_background("begin").await?;
        // Also if another attempt has begun or the task is dead: this attempt has a valid output. First, so that the task
        // may schedule its successor under the same key.
        let deleted = sqlx::query!("delete from bus.tasks where id = $1", attempt.id).execute(&mut *tx).await?;
        if deleted.rows_affected() == 0 {
            tracing::debug!(kind = T::KIND, key = attempt.key, "another attempt has completed the task");
            return Ok(tx.rollback().await?);
        }
        let completed = self.task.complete(&mut tx, &attempt.key, input, output).await;
        tx.end(completed).await?;
        count::<T>("done");
        Ok(())
    }

    /// Records a failed attempt, unless another one has begun since.
    async fn failed(&self, attempt: &Attempt, failure: Failure) -> anyhow::Result<()> {
        let Attempt { key, number, .. } = attempt;
        let (begun, limit) = (i32::try_from(*number)?, i32::try_from(self.settings.task_attempts)?);
        let (error, attempts, delay) = match failure {
            Failure::Error(error) => (format!("{error:#}"), begun, exponential(self.settings.retry_delay, *number)),
            // A stop is not a failed attempt.
            Failure::Stopped => ("the service stopped".to_owned(), begun - 1, Duration::ZERO),
        };
        let error: String = storable(&error).chars().take(LONGEST_ERROR).collect();
        let mut db = self.database.background_connection().await?;
        let recorded = sqlx::query_scalar!(
            "update bus.tasks
             set status = case when $3::integer >= $4 then 'dead' else 'pending' end, attempts = $3, error = $5,
                 due_at = now() + make_interval(secs => $6), updated_at = now()
             where id = $1 and attempts = $2 and status = 'pending'
             returning status",
            attempt.id,
            begun,
            attempts,
            limit,
            error,
            delay.as_secs_f64(),
        );
        match timeout(STEP, recorded.fetch_optional(&mut *db)).await.context("Postgres does not answer")??.as_deref() {
            Some("dead") => {
                tracing::error!(kind = T::KIND, key, error, "a task is dead: it waits for a person in bus.tasks");
                count::<T>("dead");
            }
            Some(_) if attempts < begun => tracing::info!(kind = T::KIND, key, "a task is left to another replica"),
            Some(_) => {
                tracing::warn!(kind = T::KIND, key, error, attempts, "a task is tried again later");
                count::<T>("failed");
            }
            None => tracing::debug!(kind = T::KIND, key, error, "another attempt has begun"),
        }
        Ok(())
    }
}

fn count<T: Task>(outcome: &'static str) {
    metrics::counter!("event_bus_tasks_total", "kind" => T::KIND, "outcome" => outcome).increment(1);
}

impl<E: Into<anyhow::Error>> From<E> for Failure {
    fn from(error: E) -> Self {
        Self::Error(error.into())
    }
}
