//! Coalesced statements: one statement, and one commit, for concurrent requests.
//!
//! A batcher has a connection of its own. While it executes one batch, the next one fills. No timer fills a batch: a single
//! request is executed at once. Writes may be delayed by `backpressure`.
//!
//! What if …
//! - we die before the commit: nothing was written. After it: the rows and their events exist. In both cases the clients
//!   have no response, as with any write.
//! - the connection is lost: whether the batch was committed is unknown. Each caller of a write gets an outage.
//!   Reads are repeated one by one.
//! - one item fails or waits for a lock: Postgres undoes the batch. Its items are then executed one by one, each on a
//!   connection for requests. `an_item_that_fails_does_not_fail_its_neighbours` and
//!   `an_item_that_waits_for_a_lock_waits_alone` show it.
//! - a caller is cancelled: its item may be executed or not, as with any request.

use crate::connection::Pool;
use crate::database::Database;
use crate::error::{Error, is_outage, is_undone};
use crate::meters::{self, Batches, float};
use crate::panics;
use anyhow::{Context, anyhow, ensure};
use sqlx::PgConnection;
use std::slice;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{mpsc, oneshot};
use tokio::time::{Instant, timeout};
use tokio_util::sync::CancellationToken;

/// How long a batch may take before the connection counts as dead. Longer than Postgres lets its statement run.
const BATCH: Duration = Duration::from_secs(3);
/// The same for one item, on a connection for requests.
const ALONE: Duration = Duration::from_secs(10);
/// How long closing may take.
const CLOSE: Duration = Duration::from_secs(1);
/// How long the connection is kept while nothing comes in. One that has rested for longer is tested before it is used.
const KEPT: Duration = Duration::from_millis(500);

/// A statement that reads or writes the items of concurrent requests.
pub trait Statement: Send + Sync + 'static {
    /// What one request reads or writes.
    type Item: Send + Sync + 'static;
    /// What the request gets.
    type Output: Send + 'static;

    /// Whether it appends events: the relays are woken after each commit.
    const APPENDS: bool;

    /// Executes a single statement for all of `items`, which commits by itself. Returns one output for each, in their order.
    ///
    /// # Errors
    /// Return an error only if nothing was written: nothing that can fail comes after the statement. Unless it was an outage, each
    /// of several items is then executed by itself.
    fn execute(
        &self,
        db: &mut PgConnection,
        items: &[Self::Item],
    ) -> impl Future<Output = anyhow::Result<Vec<Self::Output>>> + Send;
}

/// Hands items to the statement. Clones share it.
pub struct Batcher<S: Statement> {
    queue: mpsc::Sender<Waiting<S>>,
}

/// The background task of a batcher: see [`run`](Self::run).
pub struct Batching<S: Statement> {
    queue: mpsc::Receiver<Waiting<S>>,
    shared: Arc<Shared<S>>,
    pool: Pool,
    /// Items in one statement at most.
    most: usize,
}

struct Shared<S> {
    statement: S,
    database: Database,
    meters: Batches,
}

/// An item, and its caller.
struct Waiting<S: Statement> {
    item: S::Item,
    since: Instant,
    caller: oneshot::Sender<anyhow::Result<S::Output>>,
}

pub(crate) fn new<S: Statement>(
    statement: S,
    database: &Database,
    most: usize,
    queue: usize,
) -> (Batcher<S>, Batching<S>) {
    let (sender, receiver) = mpsc::channel(queue);
    let shared = Arc::new(Shared { statement, database: database.clone(), meters: Batches::new::<S>() });
    let (waiting, gauge) = (sender.downgrade(), meters::queue::<S>());
    database.on_observe(move || {
        let items = waiting.upgrade().map_or(0, |queue| queue.max_capacity() - queue.capacity());
        gauge.set(float(items));
    });
    (Batcher { queue: sender }, Batching { queue: receiver, shared, pool: database.batch_pool(), most })
}

impl<S: Statement> Clone for Batcher<S> {
    fn clone(&self) -> Self {
        Self { queue: self.queue.clone() }
    }
}

impl<S: Statement> Batcher<S> {
    /// Executes the statement for `item`, together with the items of concurrent callers. Returns when it is committed.
    ///
    /// # Errors
    /// An outage if more than [`Settings::batch_queue`](crate::Settings::batch_queue) items wait, if there is no connection,
    /// or if the outcome of the commit is unknown. Any other error is that of the item alone.
    pub async fn run(&self, item: S::Item) -> anyhow::Result<S::Output> {
        let (caller, outcome) = oneshot::channel();
        self.queue.try_send(Waiting { item, since: Instant::now(), caller }).map_err(|_| Error::Overloaded)?;
        // Dropped without an outcome: the service stops.
        outcome.await.map_err(|_| Error::Overloaded)?
    }
}

impl<S: Statement> Batching<S> {
    /// Executes what comes in until `stop`.
    pub async fn run(mut self, stop: CancellationToken) -> anyhow::Result<()> {
        let mut batch = Vec::with_capacity(self.most);
        while let Some(1..) = stop.run_until_cancelled(self.queue.recv_many(&mut batch, self.most)).await {
            let Err(error) = self.execute_while_busy(&mut batch, &stop).await else { continue };
            let (reason, is_outage) = (format!("{error:#}"), is_outage(&error));
            for Waiting { caller, .. } in batch.drain(..) {
                let error = if is_outage { Error::BatchFailed(reason.clone()).into() } else { anyhow!(reason.clone()) };
                let _ = caller.send(Err(error));
            }
        }
        let _ = timeout(CLOSE, self.pool.close()).await;
        Ok(())
    }

    /// Executes batches on one connection for as long as items come in. An error is that of all items in `batch`.
    async fn execute_while_busy(
        &mut self,
        batch: &mut Vec<Waiting<S>>,
        stop: &CancellationToken,
    ) -> anyhow::Result<()> {
        let mut db = match self.shared.database.batch_connection(&self.pool).await {
            Ok(db) => db,
            Err(error) => {
                self.take_all(batch);
                return Err(error.into());
            }
        };
        while !batch.is_empty() {
            if S::APPENDS {
                self.fill(batch, self.most);
                self.shared.database.backpressure().hold(batch.len()).await;
            }
            // A caller that has left has told its client that the outcome is unknown.
            batch.retain(|waiting| !waiting.caller.is_closed());
            let begun = Instant::now();
            let waited = batch.first().map_or(Duration::ZERO, |first| begun - first.since);
            let (items, callers): (Vec<_>, Vec<_>) =
                batch.drain(..).map(|Waiting { item, caller, .. }| (item, caller)).unzip();
            match self.shared.execute(&mut db, &items, BATCH).await {
                Ok(outputs) => {
                    self.shared.meters.executed(items.len(), waited, begun);
                    if S::APPENDS {
                        self.shared.database.wake_relays();
                    }
                    callers.into_iter().zip(outputs).for_each(|(caller, output)| drop(caller.send(Ok(output))));
                }
                // A single item would fail again.
                Err(error) if callers.len() == 1 && !is_outage(&error) => {
                    callers.into_iter().zip([error]).for_each(|(caller, error)| drop(caller.send(Err(error))));
                }
                Err(error) if is_undone(&error) && !error.is::<Outputs>() => {
                    self.execute_one_by_one(items, callers, &error);
                }
                // A read can be repeated. The connection may be lost.
                Err(error) if !S::APPENDS => {
                    self.execute_one_by_one(items, callers, &error);
                    return Ok(());
                }
                Err(error) => {
                    let waiting = items.into_iter().zip(callers);
                    batch.extend(waiting.map(|(item, caller)| Waiting { item, since: begun, caller }));
                    if matches!(error.downcast_ref(), Some(Error::NoAnswer(_))) {
                        self.take_all(batch);
                    }
                    return Err(error);
                }
            }
            let more = timeout(KEPT, self.queue.recv_many(batch, self.most));
            let _ = stop.run_until_cancelled(more).await;
        }
        Ok(())
    }

    /// Adds items that have come in since, until the batch has `most`.
    fn fill(&mut self, batch: &mut Vec<Waiting<S>>, most: usize) {
        while batch.len() < most
            && let Ok(waiting) = self.queue.try_recv()
        {
            batch.push(waiting);
        }
    }

    /// Postgres is away: the items that have come in meanwhile would wait for the same reason, one batch after another.
    fn take_all(&mut self, batch: &mut Vec<Waiting<S>>) {
        self.fill(batch, usize::MAX);
    }

    /// Each on a connection for requests: one that waits for a lock does not hold up the others, nor the next batch.
    fn execute_one_by_one(
        &self,
        items: Vec<S::Item>,
        callers: Vec<oneshot::Sender<anyhow::Result<S::Output>>>,
        error: &anyhow::Error,
    ) {
        tracing::debug!(items = items.len(), "a batch is executed item by item: {error:#}");
        self.shared.meters.split.increment(1);
        for (item, caller) in items.into_iter().zip(callers) {
            let shared = self.shared.clone();
            tokio::spawn(async move {
                if !caller.is_closed() {
                    let _ = caller.send(shared.execute_alone(&item).await);
                }
            });
        }
    }
}

impl<S: Statement> Shared<S> {
    async fn execute_alone(&self, item: &S::Item) -> anyhow::Result<S::Output> {
        let mut db = if S::APPENDS { self.database.statement().await? } else { self.database.connection().await? };
        self.execute(&mut db, slice::from_ref(item), ALONE).await?.pop().context("a statement has no output")
    }

    async fn execute(
        &self,
        db: &mut PgConnection,
        items: &[S::Item],
        limit: Duration,
    ) -> anyhow::Result<Vec<S::Output>> {
        if items.is_empty() {
            return Ok(Vec::new());
        }
        let executing = panics::caught("the statement", async { self.statement.execute(db, items).await });
        let outputs = timeout(limit, executing).await.map_err(|_| Error::NoAnswer(limit))??;
        ensure!(outputs.len() == items.len(), Outputs(outputs.len(), items.len()));
        Ok(outputs)
    }
}

/// Returned after the commit: the batch must not be repeated.
#[derive(Debug, thiserror::Error)]
#[error("the statement returned {0} outputs for {1} items")]
struct Outputs(usize, usize);
