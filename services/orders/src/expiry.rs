//! Orders that are not paid in time are cancelled, on the clock of Postgres, by whichever replica looks first.
//!
//! What if we die … before the commit: the rows are unlocked and as they were, and another replica finds them, or we do
//! after our restart. After it: the orders are cancelled and their events are in the outbox.

use crate::store;
use anyhow::Context;
use contracts::Timestamp;
use event_bus::{Backoff, Bus};
use std::time::Duration;
use tokio::time::{Instant, sleep, timeout};
use tokio_util::sync::CancellationToken;

/// How often to look: an order may live this much longer than its time.
const PERIOD: Duration = Duration::from_millis(500);
/// Orders cancelled in one transaction.
const BATCH: usize = 256;
/// How often to look at all orders, and not only behind the floor.
const SWEEP: Duration = Duration::from_mins(1);
/// How long one transaction may take before the connection to Postgres counts as dead.
const STEP: Duration = Duration::from_secs(10);

/// Cancels expired orders until `stop`.
pub async fn run(bus: Bus, stop: CancellationToken) -> anyhow::Result<()> {
    let what = "cancelling expired orders";
    let mut backoff = Backoff::default();
    let mut pause = PERIOD;
    let mut floor = Floor::default();
    while stop.run_until_cancelled(sleep(pause)).await.is_some() {
        let step = timeout(STEP, cancel_expired(&bus, &mut floor)).await.context("Postgres does not answer");
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

/// A time before which no order expires that is not paid: looking begins here, not at the entries of the index that orders
/// have left behind, which stay while a backup or a report holds a snapshot open. Should an order come in below it, because
/// the clock of Postgres was set back, the next sweep finds it.
#[derive(Default)]
struct Floor {
    time: Option<Timestamp>,
    swept: Option<Instant>,
}

/// One transaction. Returns how many orders it cancelled, [`BATCH`] at most.
async fn cancel_expired(bus: &Bus, floor: &mut Floor) -> anyhow::Result<usize> {
    let mut tx = bus.begin_in_background().await?;
    if floor.swept.is_none_or(|last| last.elapsed() > SWEEP) {
        *floor = Floor { time: store::first_expiry(&mut tx).await?, swept: Some(Instant::now()) };
    }
    let orders = store::lock_expired(&mut tx, BATCH, floor.time).await?;
    let cancelled: Vec<_> = orders.into_values().filter_map(|mut order| order.expire()).collect();
    store::save_locked(&mut tx, &cancelled).await?;
    tx.commit().await?;
    if !cancelled.is_empty() {
        tracing::info!(orders = cancelled.len(), "cancelled what was not paid in time");
    }
    Ok(cancelled.len())
}
