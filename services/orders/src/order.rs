//! The rules of orders. This module does no input or output.

use contracts::order::{OrderSnapshot, OrderStatus, OrderedTicket};
use contracts::{Id, OrderEvent, Price, Timestamp};
use serde::Serialize;

/// An order as the table stores it. Its JSON form is what its user sees.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Order {
    pub id: Id,
    /// The user who ordered.
    pub user_id: String,
    pub status: OrderStatus,
    /// The time until which it must be paid.
    pub expires_at: Timestamp,
    /// The ticket as it was when it was ordered.
    pub ticket: Ticket,
    /// Numbers the orders of this ticket: 1, 2, 3 …
    #[serde(skip)]
    pub reservation: i64,
    /// Counts saved changes, from 0.
    pub version: i64,
}

/// The fields of a ticket that orders uses.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Ticket {
    pub id: Id,
    pub title: String,
    pub price: Price,
    pub version: i64,
}

/// A ticket that a user wants to order, and the terms of its next order.
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

/// The effect of a payment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Paid {
    /// It completed its order.
    Completed(OrderEvent),
    /// The order is complete, and no payment for it is recorded: this one completed it, before the database was recovered.
    Known,
    /// The order was cancelled or paid before: the money must be refunded.
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

    /// Cancels the order for its user. Returns `None` and changes nothing if it is already cancelled.
    ///
    /// The user is checked first: others must not learn the status.
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

    /// Cancels the order because its time is over.
    ///
    /// Returns `None` and changes nothing if it is cancelled or paid, or if a payment is under way.
    pub fn expire(&mut self) -> Option<OrderEvent> {
        (self.status == OrderStatus::Created).then(|| self.end(OrderStatus::Cancelled))
    }

    /// Applies a payment that was not recorded before. `is_paid`: another payment for it is recorded, and not to be refunded.
    pub fn pay(&mut self, is_paid: bool) -> Paid {
        match self.status {
            OrderStatus::Created | OrderStatus::AwaitingPayment => Paid::Completed(self.end(OrderStatus::Complete)),
            OrderStatus::Complete if !is_paid => Paid::Known,
            OrderStatus::Cancelled | OrderStatus::Complete => Paid::RefundDue,
        }
    }

    /// The event that announces this version, and no other one.
    pub fn announcement(&self) -> OrderEvent {
        let snapshot = self.snapshot();
        match self.status {
            OrderStatus::Created | OrderStatus::AwaitingPayment => OrderEvent::Created(snapshot),
            OrderStatus::Complete => OrderEvent::Completed(snapshot),
            OrderStatus::Cancelled => OrderEvent::Cancelled(snapshot),
        }
    }

    /// The public state, which events contain.
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

    /// Makes the last change of an order: `status` is final.
    fn end(&mut self, status: OrderStatus) -> OrderEvent {
        self.status = status;
        self.version += 1;
        self.announcement()
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

    /// Asserts that only status and version of `order` have changed, and that the event has this state.
    fn assert_ended(order: &Order, before: Order, status: OrderStatus, event: &OrderEvent, subject: &str) {
        assert_eq!(*order, Order { status, version: 5, ..before });
        assert_eq!((event.subject(), event.snapshot()), (subject, &order.snapshot()));
    }

    #[test]
    fn an_order_has_the_terms_of_its_offer() {
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
    fn a_ticket_with_a_live_order_cannot_be_ordered() {
        assert_eq!(Order::new("ann", offer(true)), Err(Reserved));
    }

    #[test]
    fn its_user_can_cancel_an_order_until_it_is_complete() {
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
    fn another_user_cannot_cancel_an_order() {
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
    fn only_an_order_without_a_payment_under_way_expires() {
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
    fn a_payment_completes_an_unpaid_order_and_is_refunded_otherwise() {
        for status in [Created, AwaitingPayment] {
            let mut order = order(status);
            let before = order.clone();
            let Paid::Completed(event) = order.pay(false) else { panic!("{status:?} was not completed") };
            assert_ended(&order, before, Complete, &event, "order.completed");
        }
        for status in [Complete, Cancelled] {
            let mut order = order(status);
            let before = order.clone();
            assert_eq!((order.pay(true), &order), (Paid::RefundDue, &before), "{status:?}");
        }
        assert_eq!(order(Cancelled).pay(false), Paid::RefundDue);
    }

    #[test]
    fn the_first_recorded_payment_of_a_complete_order_is_not_refunded() {
        let mut complete = order(Complete);
        let before = complete.clone();
        assert_eq!((complete.pay(false), complete), (Paid::Known, before));
    }

    #[test]
    fn a_final_status_does_not_change() {
        let ends: [fn(&mut Order); 3] =
            [|order| drop(order.cancel("ann")), |order| drop(order.expire()), |order| drop(order.pay(true))];
        for end in ends {
            let mut order = order(Created);
            end(&mut order);
            let ended = order.clone();
            assert!(!matches!(order.cancel("ann"), Ok(Some(_))));
            assert_eq!((order.expire(), order.pay(true)), (None, Paid::RefundDue));
            assert_eq!(order, ended);
        }
    }
}
