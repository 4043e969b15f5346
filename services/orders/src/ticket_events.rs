//! What the events of tickets mean to orders: keep the replica.

use crate::store;
use contracts::TicketEvent;
use event_bus::{Handler, Transaction};

/// Keeps `ticket_replica`.
pub struct TicketEvents;

impl Handler for TicketEvents {
    type Event = TicketEvent;

    async fn apply(&self, tx: &mut Transaction, events: &[TicketEvent]) -> anyhow::Result<()> {
        Ok(store::replicate(tx, events.iter().map(TicketEvent::snapshot)).await?)
    }
}
