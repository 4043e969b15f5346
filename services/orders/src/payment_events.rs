//! Applies payments: a payment completes its order.

use crate::meters::meters;
use crate::order::Paid;
use crate::store;
use anyhow::{Context, bail, ensure};
use contracts::PaymentEvent;
use contracts::neighbours::Payment;
use contracts::order::OrderStatus;
use event_bus::{Handler, Received, Transaction};
use sqlx::PgConnection;

/// Completes paid orders.
///
/// Every payment is recorded in the transaction of its effect, so a redelivered payment has no effect. No money may be
/// lost, so two kinds of payments become dead letters: a payment of an unknown order, because the order may be restored,
/// and a payment with a known id whose content differs from the recorded one.
pub struct PaymentEvents;

impl Handler for PaymentEvents {
    type Event = PaymentEvent;
    /// The service that publishes it is not ours.
    const HAS_OWNER: bool = false;
    // Of two payments of an order, the first one completes it.
    const NEWEST_FIRST: bool = false;

    async fn apply(&self, tx: &mut Transaction, events: &[Received<PaymentEvent>]) -> anyhow::Result<()> {
        let payments: Vec<_> = events.iter().map(|event| event.payment()).collect();
        let mut orders = store::lock(tx, payments.iter().map(|payment| payment.order_id)).await?;
        if let Some(lost) = payments.iter().find(|payment| !orders.contains_key(&payment.order_id)) {
            bail!("payment {}: order {} does not exist", lost.id, lost.order_id);
        }
        let complete = orders.values().filter(|order| order.status == OrderStatus::Complete).map(|order| order.id);
        let mut paid = store::paid(tx, complete).await?;
        let inserted = store::insert_payments(tx, &payments).await?;
        if inserted.len() < payments.len() {
            compare_with_recorded(tx, &payments).await?;
        }
        let (mut completed, mut refunds) = (Vec::new(), Vec::new());
        for payment in inserted {
            let order = orders.get_mut(&payment.order_id).context("only payments of locked orders were inserted")?;
            let is_paid = !paid.insert(order.id);
            match order.pay(is_paid) {
                Paid::Completed(event) => completed.push(event),
                Paid::Known => {}
                Paid::RefundDue => refunds.push(payment),
            }
        }
        store::save_locked(tx, &completed).await?;
        store::owe_refunds(tx, &refunds).await?;
        for payment in refunds {
            let (id, order_id, stripe_id) = (payment.id, payment.order_id, &payment.stripe_id);
            tracing::warn!(%id, %order_id, stripe_id, "a refund is due: the order was cancelled or paid before");
            meters().refunds_due.increment(1);
        }
        Ok(())
    }
}

/// Fails if one of `payments` differs from the recorded payment with the same id.
async fn compare_with_recorded(db: &mut PgConnection, payments: &[&Payment]) -> anyhow::Result<()> {
    let recorded = store::find_payments(db, payments.iter().map(|payment| payment.id)).await?;
    for payment in payments {
        let recorded = recorded.get(&payment.id).context("every payment was recorded")?;
        ensure!(
            recorded == *payment,
            "payment {}: content differs from the payment recorded before: order {}, stripeId {} was recorded, order {}, \
             stripeId {} was received",
            payment.id,
            recorded.order_id,
            recorded.stripe_id,
            payment.order_id,
            payment.stripe_id,
        );
    }
    Ok(())
}
