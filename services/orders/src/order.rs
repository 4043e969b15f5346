//! What an order is and what may happen to it. Rules only: nothing here does input or output.

use contracts::order::{OrderSnapshot, OrderStatus, OrderedTicket};
use contracts::{Id, OrderEvent, Price, Timestamp};
use serde::Serialize;

/// An order, as it is in the table. Written as JSON, it is what its user sees.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Order {
    pub id: Id,
    /// Who ordered.
    pub user_id: String,
    pub status: OrderStatus,
    /// Until when it must be paid.
    pub expires_at: Timestamp,
    /// What was ordered, as it was when it was ordered.
    pub ticket: Ticket,
    /// Numbers the orders of this ticket: 1, 2, 3 …
    #[serde(skip)]
    pub reservation: i64,
    /// Counts saved changes, from 0.
    pub version: i64,
}

/// A ticket, as far as orders cares.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Ticket {
    pub id: Id,
    pub title: String,
    pub price: Price,
    pub version: i64,
}

/// A ticket that somebody wants, and on which terms they can have it.
#[derive(Debug, Clone)]
pub struct Offer {
    pub ticket: Ticket,
    /// Whether a live order holds it.
    pub reserved: bool,
    /// The number of its next order.
    pub reservation: i64,
    /// When the next order will expire.
    pub expires_at: Timestamp,
}

/// A live order holds the ticket.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("Ticket is already reserved")]
pub struct Reserved;

/// Why an order cannot be cancelled.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum CancelError {
    #[error("only its user may cancel an order")]
    NotTheOwner,
    #[error("Cannot cancel a complete order")]
    Complete,
}

/// What becomes of a payment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Paid {
    /// It completed its order; the event says so.
    Completed(OrderEvent),
    /// The order was cancelled before, or paid before: somebody has to give the money back.
    RefundDue,
}

impl Order {
    /// A new order of `user_id`.
    pub fn new(user_id: &str, offer: Offer) -> Result<Self, Reserved> {
        let Offer { ticket, reserved, reservation, expires_at } = offer;
        if reserved {
            return Err(Reserved);
        }
        let (id, user_id, status) = (Id::generate(), user_id.to_owned(), OrderStatus::Created);
        Ok(Self { id, user_id, status, expires_at, ticket, reservation, version: 0 })
    }

    /// Its user gives it up. `None`: it was cancelled already, and nothing happens. That an order is not theirs is all
    /// that others hear of it, so it comes first.
    pub fn cancel(&mut self, user_id: &str) -> Result<Option<OrderEvent>, CancelError> {
        if self.user_id != user_id {
            return Err(CancelError::NotTheOwner);
        }
        match self.status {
            OrderStatus::Complete => Err(CancelError::Complete),
            OrderStatus::Cancelled => Ok(None),
            OrderStatus::Created | OrderStatus::AwaitingPayment => Ok(Some(self.end(OrderStatus::Cancelled))),
        }
    }

    /// Its time is over. `None`: it was cancelled or paid already, or a payment is under way.
    pub fn expire(&mut self) -> Option<OrderEvent> {
        (self.status == OrderStatus::Created).then(|| self.end(OrderStatus::Cancelled))
    }

    /// A payment has come in that was not there before.
    pub fn pay(&mut self) -> Paid {
        match self.status {
            OrderStatus::Created | OrderStatus::AwaitingPayment => Paid::Completed(self.end(OrderStatus::Complete)),
            OrderStatus::Cancelled | OrderStatus::Complete => Paid::RefundDue,
        }
    }

    /// What readers of events see.
    pub fn snapshot(&self) -> OrderSnapshot {
        let Ticket { id, price, version, .. } = self.ticket;
        OrderSnapshot {
            id: self.id,
            version: self.version,
            status: self.status,
            user_id: self.user_id.clone(),
            expires_at: self.expires_at,
            ticket: OrderedTicket { id, price, version, reservation: self.reservation },
        }
    }

    /// The last change of an order: `status` is final.
    fn end(&mut self, status: OrderStatus) -> OrderEvent {
        self.status = status;
        self.version += 1;
        let snapshot = self.snapshot();
        if status == OrderStatus::Complete { OrderEvent::Completed(snapshot) } else { OrderEvent::Cancelled(snapshot) }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

    use super::*;
    use OrderStatus::{AwaitingPayment, Cancelled, Complete, Created};
    use event_bus::Publish;
    use serde_json::json;

    const EXPIRES_AT: &str = "2026-01-31T12:15:00.000Z";

    fn offer(reserved: bool) -> Offer {
        let (id, price) = ("5f2b18a3e41d0c0012abcdef".parse().unwrap(), "20.5".parse().unwrap());
        let ticket = Ticket { id, title: "Concert".to_owned(), price, version: 3 };
        Offer { ticket, reserved, reservation: 7, expires_at: serde_json::from_value(json!(EXPIRES_AT)).unwrap() }
    }

    /// Ann's, at version 4.
    fn order(status: OrderStatus) -> Order {
        Order { status, version: 4, ..Order::new("ann", offer(false)).unwrap() }
    }

    /// `order` is in its last status, one version later; nothing else has changed, and the event tells just that.
    fn assert_ended(order: &Order, before: Order, status: OrderStatus, event: &OrderEvent, subject: &str) {
        assert_eq!(*order, Order { status, version: 5, ..before });
        assert_eq!((event.subject(), event.snapshot()), (subject, &order.snapshot()));
    }

    #[test]
    fn an_order_takes_over_what_was_offered() {
        let order = Order::new("ann", offer(false)).unwrap();
        let ticket = json!({"id": "5f2b18a3e41d0c0012abcdef", "title": "Concert", "price": 20.5, "version": 3});
        let mut expected = json!({"id": order.id, "userId": "ann", "status": "created", "expiresAt": EXPIRES_AT,
                                  "ticket": &ticket, "version": 0});
        assert_eq!(serde_json::to_value(&order).unwrap(), expected);
        expected["ticket"] = json!({"id": ticket["id"], "price": 20.5, "version": 3, "reservation": 7});
        assert_eq!(serde_json::to_value(order.snapshot()).unwrap(), expected);
        assert_ne!(Order::new("ann", offer(false)).unwrap().id, order.id);
    }

    #[test]
    fn what_a_live_order_holds_cannot_be_ordered() {
        assert_eq!(Order::new("ann", offer(true)), Err(Reserved));
    }

    #[test]
    fn its_user_cancels_an_order_until_it_is_complete() {
        for status in [Created, AwaitingPayment] {
            let mut order = order(status);
            let before = order.clone();
            let event = order.cancel("ann").unwrap().unwrap();
            assert_ended(&order, before, Cancelled, &event, "order.cancelled");
        }
        for (status, expected) in [(Cancelled, Ok(None)), (Complete, Err(CancelError::Complete))] {
            let mut order = order(status);
            let before = order.clone();
            assert_eq!(order.cancel("ann"), expected);
            assert_eq!(order, before);
        }
    }

    #[test]
    fn nobody_else_cancels_an_order() {
        for status in [Created, AwaitingPayment, Complete, Cancelled] {
            let mut order = order(status);
            let before = order.clone();
            for user in ["bob", "Ann", ""] {
                assert_eq!(order.cancel(user), Err(CancelError::NotTheOwner), "{status:?} {user}");
            }
            assert_eq!(order, before);
        }
    }

    #[test]
    fn only_what_nobody_has_begun_to_pay_expires() {
        let mut unpaid = order(Created);
        let before = unpaid.clone();
        let event = unpaid.expire().unwrap();
        assert_ended(&unpaid, before, Cancelled, &event, "order.cancelled");
        for status in [AwaitingPayment, Complete, Cancelled] {
            let mut order = order(status);
            let before = order.clone();
            assert_eq!((order.expire(), &order), (None, &before), "{status:?}");
        }
    }

    #[test]
    fn a_payment_completes_what_waits_for_it_and_is_given_back_otherwise() {
        for status in [Created, AwaitingPayment] {
            let mut order = order(status);
            let before = order.clone();
            let Paid::Completed(event) = order.pay() else { panic!("{status:?} was not completed") };
            assert_ended(&order, before, Complete, &event, "order.completed");
        }
        for status in [Complete, Cancelled] {
            let mut order = order(status);
            let before = order.clone();
            assert_eq!((order.pay(), &order), (Paid::RefundDue, &before), "{status:?}");
        }
    }

    #[test]
    fn the_last_change_of_an_order_is_its_last() {
        let ends: [fn(&mut Order); 3] =
            [|order| drop(order.cancel("ann")), |order| drop(order.expire()), |order| drop(order.pay())];
        for end in ends {
            let mut order = order(Created);
            end(&mut order);
            let ended = order.clone();
            assert!(!matches!(order.cancel("ann"), Ok(Some(_))));
            assert_eq!((order.expire(), order.pay()), (None, Paid::RefundDue));
            assert_eq!(order, ended);
        }
    }
}
