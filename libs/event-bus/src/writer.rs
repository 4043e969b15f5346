//! Coalesced writes: one statement and one commit for the rows and events of concurrent requests.
//!
//! A writer has a connection of its own. While it executes one batch, the next one fills. There is no timer: a single
//! request is written at once.
//!
//! What if …
//! - we die before the commit: nothing was written. After it: the rows and their events exist. In both cases the clients
//!   have no response, as with any write.
//! - the connection is lost: whether the batch was committed is unknown. Each of its callers gets an outage.
//! - one item fails or waits for a lock: Postgres undoes the batch. Its items are then written one by one, each on a
//!   connection for requests. `an_item_that_fails_does_not_fail_its_neighbours` and
//!   `an_item_that_waits_for_a_lock_waits_alone` show it.
//! - a caller leaves: its item may be written or not, as with any request.

use crate::connection::Pool;
use crate::database::Database;
use crate::error::{Error, is_undone};
use crate::panics;
use anyhow::{Context, ensure};
use sqlx::PgConnection;
use std::slice;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{mpsc, oneshot};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

/// How long a statement may take before the connection counts as dead. Longer than Postgres lets it run.
const STEP: Duration = Duration::from_secs(10);
/// How long the connection is kept while nothing comes in. One that has rested for longer is tested before it is used.
const KEPT: Duration = Duration::from_millis(500);

/// A statement that writes the items of concurrent requests, with their events.
pub trait Write: Send + Sync + 'static {
    /// What one request writes.
    type Item: Send + Sync + 'static;
    /// What the request gets.
    type Output: Send + 'static;

    /// Writes all of `items` in a single statement, which commits by itself. Returns one output for each, in their order.
    ///
    /// # Errors
    /// Nothing was written. If there were several items, each of them is then written by itself.
    fn write(
        &self,
        db: &mut PgConnection,
        items: &[Self::Item],
    ) -> impl Future<Output = anyhow::Result<Vec<Self::Output>>> + Send;
}

/// Hands items to a writer. Clones share it.
pub struct Writer<W: Write> {
    queue: mpsc::Sender<Waiting<W>>,
}

/// The background task of a writer: see [`run`](Self::run).
pub struct Writing<W: Write> {
    queue: mpsc::Receiver<Waiting<W>>,
    shared: Arc<Shared<W>>,
    pool: Pool,
    /// Items in one statement at most.
    most: usize,
}

struct Shared<W> {
    write: W,
    database: Database,
}

/// An item, and its caller.
struct Waiting<W: Write> {
    item: W::Item,
    caller: oneshot::Sender<anyhow::Result<W::Output>>,
}

pub(crate) fn new<W: Write>(write: W, database: &Database, most: usize, queue: usize) -> (Writer<W>, Writing<W>) {
    let (sender, receiver) = mpsc::channel(queue);
    let shared = Arc::new(Shared { write, database: database.clone() });
    (Writer { queue: sender }, Writing { queue: receiver, shared, pool: database.writer_pool(), most })
}

impl<W: Write> Clone for Writer<W> {
    fn clone(&self) -> Self {
        Self { queue: self.queue.clone() }
    }
}

impl<W: Write> Writer<W> {
    /// Writes `item`, together with the items of concurrent callers. Returns when it is committed.
    ///
    /// # Errors
    /// An outage if more than [`Settings::write_queue`](crate::Settings::write_queue) items wait, if there is no connection,
    /// or if the outcome of the commit is unknown. Any other error is that of the item alone.
    pub async fn write(&self, item: W::Item) -> anyhow::Result<W::Output> {
        let (caller, outcome) = oneshot::channel();
        self.queue.try_send(Waiting { item, caller }).map_err(|_| Error::Overloaded)?;
        // Dropped without an outcome: the service stops.
        outcome.await.map_err(|_| Error::Overloaded)?
    }
}

impl<W: Write> Writing<W> {
    /// Writes what comes in until `stop`.
    pub async fn run(mut self, stop: CancellationToken) -> anyhow::Result<()> {
        let mut batch = Vec::with_capacity(self.most);
        while let Some(1..) = stop.run_until_cancelled(self.queue.recv_many(&mut batch, self.most)).await {
            if let Err(error) = self.write_while_busy(&mut batch, &stop).await {
                // The items that have come in meanwhile would wait for the same reason.
                while let Ok(waiting) = self.queue.try_recv() {
                    batch.push(waiting);
                }
                let reason = format!("{error:#}");
                for Waiting { caller, .. } in batch.drain(..) {
                    let _ = caller.send(Err(Error::NotWritten(reason.clone()).into()));
                }
            }
        }
        self.pool.close().await;
        Ok(())
    }

    /// Writes batches on one connection for as long as items come in. An error is that of all items in `batch`.
    async fn write_while_busy(&mut self, batch: &mut Vec<Waiting<W>>, stop: &CancellationToken) -> anyhow::Result<()> {
        let mut db = self.shared.database.writer_connection(&self.pool).await?;
        while !batch.is_empty() {
            let (items, callers): (Vec<_>, Vec<_>) =
                batch.drain(..).map(|Waiting { item, caller }| (item, caller)).unzip();
            match self.shared.write(&mut db, &items).await {
                Ok(outputs) => {
                    self.shared.database.wake_relays();
                    // A caller that has left gets nothing.
                    callers.into_iter().zip(outputs).for_each(|(caller, output)| drop(caller.send(Ok(output))));
                }
                Err(error) if is_undone(&error) => self.write_one_by_one(items, callers),
                Err(error) => {
                    batch.extend(items.into_iter().zip(callers).map(|(item, caller)| Waiting { item, caller }));
                    return Err(error);
                }
            }
            let more = timeout(KEPT, self.queue.recv_many(batch, self.most));
            let _ = stop.run_until_cancelled(more).await;
        }
        Ok(())
    }

    /// Each on a connection for requests: one that waits for a lock does not hold up the others, nor the next batch.
    fn write_one_by_one(&self, items: Vec<W::Item>, callers: Vec<oneshot::Sender<anyhow::Result<W::Output>>>) {
        for (item, caller) in items.into_iter().zip(callers) {
            let shared = self.shared.clone();
            tokio::spawn(async move {
                let _ = caller.send(shared.write_alone(&item).await);
            });
        }
    }
}

impl<W: Write> Shared<W> {
    async fn write_alone(&self, item: &W::Item) -> anyhow::Result<W::Output> {
        let mut db = self.database.statement().await?;
        self.write(&mut db, slice::from_ref(item)).await?.pop().context("a write has no output")
    }

    async fn write(&self, db: &mut PgConnection, items: &[W::Item]) -> anyhow::Result<Vec<W::Output>> {
        let written = timeout(STEP, panics::caught("the write", self.write.write(db, items)));
        let outputs = written.await.map_err(|_| Error::NoAnswer(STEP))??;
        ensure!(outputs.len() == items.len(), "{} outputs for {} items", outputs.len(), items.len());
        Ok(outputs)
    }
}
