//! Events of the orders service: stream `ORDERS`.

use crate::event::{self, DecodeError, Event};
use crate::{Id, Price, Timestamp};
use serde::{Deserialize, Serialize};

/// What happened to an order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum OrderEvent {
    /// `order.created`: version 0; the order holds its ticket.
    Created(OrderSnapshot),
    /// `order.cancelled`: by its user, or because it was not paid in time; the ticket is free again.
    Cancelled(OrderSnapshot),
    /// `order.completed`: paid; the ticket stays held for good.
    Completed(OrderSnapshot),
}

/// An order at one version.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct OrderSnapshot {
    /// The order.
    pub id: Id,
    /// Counts saved changes, from 0.
    #[serde(deserialize_with = "event::version")]
    pub version: i64,
    /// Where the order stands.
    pub status: OrderStatus,
    /// Who ordered.
    pub user_id: String,
    /// Until when it must be paid.
    pub expires_at: Timestamp,
    /// What was ordered.
    pub ticket: OrderedTicket,
}

/// The ticket as it was when it was ordered.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct OrderedTicket {
    /// The ticket.
    pub id: Id,
    /// What it cost.
    pub price: Price,
    /// The version of the ticket that was ordered.
    #[serde(deserialize_with = "event::version")]
    pub version: i64,
    /// Numbers the orders of this ticket: 1, 2, 3 … A fencing token: what belongs to a lower number is history.
    /// 0 where an older publisher does not say.
    #[serde(default)]
    pub reservation: i64,
}

/// Where an order stands. All but `Cancelled` hold the ticket; the last two are final.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum OrderStatus {
    /// Made, not yet paid.
    #[serde(rename = "created")]
    Created,
    /// A payment is under way.
    #[serde(rename = "awaiting:payment")]
    AwaitingPayment,
    /// Paid.
    #[serde(rename = "complete")]
    Complete,
    /// Given up, or not paid in time.
    #[serde(rename = "cancelled")]
    Cancelled,
}

impl OrderEvent {
    /// The order at the version this event announces.
    pub fn snapshot(&self) -> &OrderSnapshot {
        match self {
            Self::Created(snapshot) | Self::Cancelled(snapshot) | Self::Completed(snapshot) => snapshot,
        }
    }
}

impl Event for OrderEvent {
    const STREAM: &'static str = "ORDERS";

    fn subject(&self) -> &'static str {
        match self {
            Self::Created(_) => "order.created",
            Self::Cancelled(_) => "order.cancelled",
            Self::Completed(_) => "order.completed",
        }
    }

    fn aggregate_id(&self) -> Id {
        self.snapshot().id
    }

    fn version(&self) -> i64 {
        self.snapshot().version
    }

    fn encode(&self) -> String {
        event::json(self.snapshot())
    }

    fn decode(subject: &str, body: &[u8]) -> Result<Self, DecodeError> {
        match subject {
            "order.created" => event::body(body).map(Self::Created),
            "order.cancelled" => event::body(body).map(Self::Cancelled),
            "order.completed" => event::body(body).map(Self::Completed),
            unknown => Err(DecodeError::UnknownSubject(unknown.to_owned())),
        }
    }
}
