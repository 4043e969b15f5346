//! What the events of orders mean to tickets: who holds which.

use crate::store;
use anyhow::Context;
use contracts::{OrderEvent, TicketEvent};
use event_bus::{Handler, Transaction};

/// Makes tickets follow their orders.
pub struct OrderEvents;

impl Handler for OrderEvents {
    type Event = OrderEvent;

    async fn apply(&self, tx: &mut Transaction, events: &[OrderEvent]) -> anyhow::Result<()> {
        let orders = || events.iter().map(OrderEvent::snapshot);
        let mut tickets = store::lock(tx, orders().map(|order| order.ticket.id)).await?;
        let mut updates = Vec::new();
        for order in orders() {
            let ticket = tickets.get_mut(&order.ticket.id);
            let ticket = ticket.with_context(|| format!("there is no ticket {}, which it orders", order.ticket.id))?;
            if ticket.follow(order) {
                updates.push(TicketEvent::Updated(ticket.snapshot()));
            }
        }
        Ok(store::save_followed(tx, tickets.values(), &updates).await?)
    }
}
