//! What payments mean to orders: they complete them.

use crate::order::Paid;
use crate::store;
use anyhow::Context;
use contracts::PaymentEvent;
use event_bus::{Handler, Transaction};
use metrics::Counter;

/// Completes paid orders.
///
/// Every payment is recorded with the effect it had, in the same transaction, so that one that is delivered again has
/// none. A payment whose order is unknown is refused: the order may be restored, and the money must not be forgotten.
pub struct PaymentEvents {
    /// Payments that somebody has to give back.
    refunds_due: Counter,
}

impl Default for PaymentEvents {
    fn default() -> Self {
        Self { refunds_due: metrics::counter!("orders_refunds_due_total") }
    }
}

impl Handler for PaymentEvents {
    type Event = PaymentEvent;

    async fn apply(&self, tx: &mut Transaction, events: &[PaymentEvent]) -> anyhow::Result<()> {
        let payments: Vec<_> = events.iter().map(|PaymentEvent::Created(payment)| payment).collect();
        let mut orders = store::lock(tx, payments.iter().map(|payment| payment.order_id)).await?;
        if let Some(lost) = payments.iter().find(|payment| !orders.contains_key(&payment.order_id)) {
            anyhow::bail!("there is no order {}, which it pays", lost.order_id);
        }
        let (mut completed, mut refunds) = (Vec::new(), Vec::new());
        for payment in store::insert_payments(tx, &payments).await? {
            let order = orders.get_mut(&payment.order_id).context("only payments of locked orders were inserted")?;
            match order.pay() {
                Paid::Completed(event) => completed.push(event),
                Paid::RefundDue => refunds.push(payment),
            }
        }
        store::save_locked(tx, &completed).await?;
        store::owe_refunds(tx, &refunds).await?;
        for payment in refunds {
            let (id, order_id, stripe_id) = (payment.id, payment.order_id, &payment.stripe_id);
            tracing::warn!(%id, %order_id, stripe_id, "a refund is due: the order was cancelled or paid before");
            self.refunds_due.increment(1);
        }
        Ok(())
    }
}
