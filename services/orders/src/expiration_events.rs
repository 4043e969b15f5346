//! Applies the events of an external timer: the time to pay is over. Orders expire without it too: see [`crate::expiry`].

use crate::store;
use anyhow::Context;
use contracts::ExpirationEvent;
use event_bus::{Handler, Received, Transaction};

/// Cancels unpaid orders.
pub struct ExpirationEvents;

impl Handler for ExpirationEvents {
    type Event = ExpirationEvent;
    /// The service that publishes it is not ours.
    const HAS_OWNER: bool = false;

    async fn apply(&self, tx: &mut Transaction, events: &[Received<ExpirationEvent>]) -> anyhow::Result<()> {
        let ids = || events.iter().map(|event| event.order_id());
        let mut orders = store::lock(tx, ids()).await?;
        let mut cancelled = Vec::new();
        for id in ids() {
            let order = orders.get_mut(&id).with_context(|| format!("expiration: order {id} does not exist"))?;
            cancelled.extend(order.expire());
        }
        store::save_locked(tx, &cancelled).await
    }
}
