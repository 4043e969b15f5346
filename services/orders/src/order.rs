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
