//! Cancels orders that are not paid in time, by the clock of Postgres. Every replica runs it.
//!
//! If the process dies before the commit, the rows are unlocked and unchanged; another replica finds them, or this one
//! after its restart. If it dies after the commit, the orders are cancelled and their events are in the outbox.
//!
//! A database that came back older may have orders that were paid since. So nothing expires while the database is being recovered, or
//! before it was compared with its stream after the start. NATS that is away delays nothing.

use crate::meters::meters;
use crate::store;
use anyhow::Context;
use contracts::Timestamp;
use event_bus::{Backoff, Bus};
use std::time::Duration;
use tokio::time::{Instant, sleep, timeout};
use tokio_util::sync::CancellationToken;

/// The time between two queries. An order may expire this much too late.
const PERIOD: Duration = Duration::from_millis(500);
/// The most orders that one transaction cancels.
const BATCH: usize = 256;
/// The time between two queries of all unpaid orders, not only of those above the floor.
const SWEEP: Duration = Duration::from_mins(1);
/// The time after which a transaction fails, because the connection to Postgres counts as dead.
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

/// A time before which no unpaid order expires.
///
/// The query begins here. It skips dead index entries of ended orders, which stay while a backup or a report holds a
/// snapshot open. If the clock of Postgres is set back, an order may expire below the floor; the next sweep finds it.
#[derive(Default)]
struct Floor {
    time: Option<Timestamp>,
    swept: Option<Instant>,
}

/// Cancels expired orders in one transaction. Returns how many, [`BATCH`] at most.
async fn cancel_expired(bus: &Bus, floor: &mut Floor) -> anyhow::Result<usize> {
    bus.check_ready().await?;
    let mut tx = bus.begin_in_background().await?;
    if floor.swept.is_none_or(|last| last.elapsed() > SWEEP) {
        *floor = Floor { time: store::first_expiry(&mut tx).await?, swept: Some(Instant::now()) };
    }
    let orders = store::lock_expired(&mut tx, BATCH, floor.time).await?;
    let first = orders.values().map(|order| order.expires_at.0).min();
    let cancelled: Vec<_> = orders.into_values().filter_map(|mut order| order.expire()).collect();
    store::save_locked(&mut tx, &cancelled).await?;
    // Only when orders were cancelled: this is a round trip.
    let lag = match first {
        Some(first) => Some(store::seconds_since(&mut tx, Timestamp(first)).await?),
        None => None,
    };
    tx.commit().await?;
    if let Some(lag) = lag {
        meters().expiry_lag.record(lag);
    }
    if !cancelled.is_empty() {
        tracing::info!(orders = cancelled.len(), "cancelled orders that were not paid in time");
    }
    Ok(cancelled.len())
}
