//! Applies the events of orders: they reserve and release tickets.

use crate::{meters, store};
use anyhow::Context;
use contracts::OrderChange;
use event_bus::{Handler, Received, Transaction};

/// Reserves and releases tickets.
pub struct OrderEvents;

impl Handler for OrderEvents {
    type Event = OrderChange;

    async fn apply(&self, tx: &mut Transaction, orders: &[Received<OrderChange>]) -> anyhow::Result<()> {
        let mut tickets = store::lock(tx, orders.iter().map(|order| order.ticket.id)).await?;
        let mut updates = Vec::new();
        let mut stale = 0;
        for order in orders {
            let (id, ticket_id) = (order.id, order.ticket.id);
            let ticket = tickets.get_mut(&ticket_id);
            let ticket = ticket.with_context(|| format!("order {id}: ticket {ticket_id} does not exist"))?;
            stale += u64::from(ticket.has_applied(order));
            if ticket.follow(order) {
                updates.push(ticket.announcement());
            }
        }
        store::save_followed(tx, tickets.values(), &updates).await?;
        meters::stale().increment(stale);
        Ok(())
    }
}
