//! Orders that are not paid in time are cancelled, on the clock of Postgres, by whichever replica looks first.
//!
//! What if we die … before the commit: the rows are unlocked and as they were, and another replica finds them, or we do
//! after our restart. After it: the orders are cancelled and their events are in the outbox.

use crate::store;
use anyhow::Context;
use event_bus::{Backoff, Bus};
use std::time::Duration;
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;

/// How often to look: an order may live this much longer than its time.
const PERIOD: Duration = Duration::from_millis(500);
/// Orders cancelled in one transaction.
const BATCH: usize = 256;
/// How long one transaction may take before the connection to Postgres counts as dead.
const STEP: Duration = Duration::from_secs(10);

/// Cancels expired orders until `stop`.
pub async fn run(bus: Bus, stop: CancellationToken) -> anyhow::Result<()> {
    let what = "cancelling expired orders";
    let mut backoff = Backoff::default();
    let mut pause = PERIOD;
    while stop.run_until_cancelled(sleep(pause)).await.is_some() {
        let step = timeout(STEP, cancel_expired(&bus)).await.context("Postgres does not answer");
        pause = match step.flatten() {
            Ok(cancelled) => {
                backoff.succeed(what);
                if cancelled == BATCH { Duration::ZERO } else { PERIOD }
            }
            Err(error) => backoff.fail(what, &error),
        };
    }
    Ok(())
}

/// One transaction. Returns how many orders it cancelled, [`BATCH`] at most.
async fn cancel_expired(bus: &Bus) -> anyhow::Result<usize> {
    let mut tx = bus.begin().await?;
    let orders = store::lock_expired(&mut tx, BATCH).await?;
    let cancelled: Vec<_> = orders.into_values().filter_map(|mut order| order.expire()).collect();
    store::save_locked(&mut tx, &cancelled).await?;
    tx.commit().await?;
    if !cancelled.is_empty() {
        tracing::info!(orders = cancelled.len(), "cancelled what was not paid in time");
    }
    Ok(cancelled.len())
}
