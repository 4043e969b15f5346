//! Applies the events of tickets: they update the replica.

use crate::replica;
use contracts::TicketEvent;
use event_bus::{Handler, Received, Transaction};

/// Updates `ticket_replica`.
pub struct TicketEvents;

impl Handler for TicketEvents {
    type Event = TicketEvent;

    async fn apply(&self, tx: &mut Transaction, events: &[Received<TicketEvent>]) -> anyhow::Result<()> {
        Ok(replica::update(tx, events.iter().map(|event| event.snapshot())).await?)
    }
}
