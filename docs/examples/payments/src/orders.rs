//! The copy of the orders. Only the events of the orders service write it.

use contracts::OrderEvent;
use event_bus::{Handler, Received, Transaction};

/// Keeps `order_replica`.
pub struct Replica;

impl Handler for Replica {
    type Event = OrderEvent;

    async fn apply(&self, tx: &mut Transaction, events: &[Received<OrderEvent>]) -> anyhow::Result<()> {
        let mut orders: Vec<_> = events.iter().map(|event| event.snapshot()).collect();
        // Replicas lock rows in the same order. The newest version wins, so duplicates and reordering change nothing.
        orders.sort_by_key(|order| order.id);
        for order in orders {
            let upsert = sqlx::query!(
                "insert into order_replica as mine (id, user_id, status, price, version) values ($1, $2, $3, $4, $5)
                 on conflict (id) do update set status = excluded.status, version = excluded.version
                 where mine.version < excluded.version",
                order.id.to_string(),
                order.user_id,
                order.status.as_str(),
                order.ticket.price.amount(),
                order.version,
            );
            upsert.execute(&mut **tx).await?;
        }
        Ok(())
    }
}
