//! Lag: the time from the response to a change until the replica of orders has it.

use crate::tally::{Percentiles, histogram, record};
use anyhow::{Context, Result};
use sqlx::{Connection, PgConnection};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{JoinHandle, sleep, spawn};
use std::time::{Duration, Instant};
use tokio::sync::mpsc;

/// From one probe to the next, if the lag is shorter.
const PERIOD: Duration = Duration::from_millis(25);
/// Between two looks into the replica: this, or a twentieth of the time that the change has been waiting.
const LOOK: Duration = Duration::from_micros(500);
/// A change that is not in the replica by then counts with this time.
const GIVEN_UP: Duration = Duration::from_mins(1);

/// Where a load offers a change that was just answered. Cheap while no probe is wanted.
#[derive(Clone)]
pub struct Sampler {
    is_free: Arc<AtomicBool>,
    changes: mpsc::Sender<Change>,
}

struct Change {
    id: String,
    version: i64,
    answered: Instant,
}

/// Measures the lag of one change at a time, until the load drops its sampler.
///
/// It has a thread and a connection of its own, so that neither waits for the load.
pub struct Prober(JoinHandle<Result<Percentiles>>);

impl Sampler {
    /// Whether the next change is wanted.
    pub fn is_free(&self) -> bool {
        self.is_free.load(Ordering::Relaxed)
    }

    /// Offers a change whose response has just come.
    pub fn offer(&self, id: &str, version: i64) {
        if self.is_free.swap(false, Ordering::Relaxed) {
            // Not sent after the prober has failed: its result says why.
            let _ = self.changes.try_send(Change { id: id.to_owned(), version, answered: Instant::now() });
        }
    }
}

impl Prober {
    /// Starts it. `orders_url` is the database of orders, as a role that may read `ticket_replica`.
    pub fn start(orders_url: String) -> (Self, Sampler) {
        let is_free = Arc::new(AtomicBool::new(false));
        let (changes, received) = mpsc::channel(1);
        let sampler = Sampler { is_free: is_free.clone(), changes };
        let thread = spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            runtime.block_on(measure(&orders_url, &is_free, received))
        });
        (Self(thread), sampler)
    }

    /// The lags. Waits until the last change is visible.
    pub async fn finish(self) -> Result<Percentiles> {
        let joined = tokio::task::spawn_blocking(|| self.0.join()).await?;
        joined.map_err(|_| anyhow::anyhow!("the prober panicked"))?.context("cannot measure lag")
    }
}

async fn measure(orders_url: &str, is_free: &AtomicBool, mut changes: mpsc::Receiver<Change>) -> Result<Percentiles> {
    let mut replica = PgConnection::connect(orders_url).await?;
    let mut lags = histogram();
    is_free.store(true, Ordering::Relaxed);
    while let Some(change) = changes.recv().await {
        while change.answered.elapsed() < GIVEN_UP && version(&mut replica, &change.id).await? < Some(change.version) {
            // Of the thread: it does nothing else, and a timer of tokio is exact to a millisecond only.
            sleep(LOOK.max(change.answered.elapsed() / 20));
        }
        record(&mut lags, change.answered.elapsed());
        sleep(PERIOD.saturating_sub(change.answered.elapsed()));
        is_free.store(true, Ordering::Relaxed);
    }
    replica.close().await?;
    Ok(Percentiles::of(&lags))
}

#[expect(clippy::disallowed_methods, reason = "the replica belongs to orders, and no .sqlx is kept for this crate")]
async fn version(replica: &mut PgConnection, id: &str) -> sqlx::Result<Option<i64>> {
    sqlx::query_scalar("select version from ticket_replica where id = $1").bind(id).fetch_optional(replica).await
}
